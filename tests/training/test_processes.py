"""Several real processes (torchrun, gloo): the same adapter as one, one of them killed, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from layerroute.data.steps import Step, write_steps
from layerroute.errors import ConfigError, TrainingError
from layerroute.training.checkpoints import last_checkpoint
from layerroute.training.recipe import load_recipe
from layerroute.training.run import train

WORKER = """
import atexit, json, os, sys
from pathlib import Path
import torch
from layerroute.cli import main

def leave_threads():
    names = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    Path(sys.argv[1], "threads" + os.environ["RANK"]).write_text(json.dumps(names))

torch.set_num_threads(1)
atexit.register(leave_threads)  # first in, last out
Path(sys.argv[1], "pid" + os.environ["RANK"]).write_text(str(os.getpid()))
for arguments in json.loads(sys.argv[2]):
    try:
        main(arguments)
    except SystemExit as exit:
        if exit.code:
            raise
"""

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] or '' }}"
    "{% for call in m['tool_calls'] or [] %} open {{ call['function']['name'] }}{% endfor %} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}{% if tools %}{% endif %}"
)
"""One word per token; `open` is the boundary of a call."""

CHANGES = {
    "default": {"warmup_share": "0", "rows": "3", "search.part": "1", "fit_rows": "20", "fit_length": "null"},
    "end_to_end": {"logit_noise": "0", "router_lr": "0.1", "cost_rows": "2", "balance_types": "false"},
}
BOTH = {
    "budgets.tool_call": "0.5",
    "budgets.planning": "0.25",
    "max_length": "64",
    "window": "4",
    "protect_first": "1",
    "protect_last": "1",
    "boundaries": "[open]",
    "gradient_accumulation": "2",
    "length_window": "4",
    "lora_lr": "0.01",
    "log_every": "1",
    "validation_share": "0.3",
}


def row(index: int) -> Step:
    """Calls, after a thought or at once, plans and answers, of many lengths."""
    kind = ("tool_call", "tool_call", "planning", "answer")[index % 4]
    ask = ("think", "call", "plan", "say")[index % 4]
    thought = [{"role": "assistant", "content": " ".join(["plan"] * (1 + index % 3)), "partial": True}]
    calls = [{"name": "lookup", "arguments": {}}] if kind == "tool_call" else None
    said = " ".join([f"w{index % 7}"] * (1 + index % 5))
    return Step.from_row(
        {
            "id": str(index),
            "source": "toy",
            "group": f"g{index // 4}",
            "step_type": kind,
            "messages": [
                {"role": "user", "content": " ".join([f"w{index % 5}"] * (2 + index % 6) + [ask] * 3)},
                *(thought if index % 4 == 0 else []),
            ],
            "tools": [{"name": "lookup", "description": "", "parameters": {"type": "object"}}],
            "target": {"role": "assistant", "content": None if calls else said, "tool_calls": calls},
        }
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, make_config) -> Path:
    """A folder with a tiny backbone (`model`), its data and two recipes."""
    folder = tmp_path_factory.mktemp("processes")
    words = ["<unk>", "<s>", "</s>", "user", "assistant", "think", "call", "plan", "say", "lookup", "open"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*words, *(f"w{i}" for i in range(7))])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make_config("llama", 5)).save_pretrained(folder / "model")
    write_steps(folder / "rows.jsonl", [row(i) for i in range(40)])
    for name, changes in CHANGES.items():
        recipe = load_recipe(name, BOTH | changes)
        (folder / f"{name}.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    return folder


def command(workplace: Path, recipe: str, output: str, *more: str) -> list[str]:
    """`layerroute train` of two rows per process."""
    given = ["--model", str(workplace / "model"), "--data", str(workplace / "rows.jsonl")]
    named = ["--recipe", str(workplace / f"{recipe}.yaml"), "--output", str(workplace / output)]
    return ["train", *given, *named, "--set", "training.batch_size=2", *more]


def launch(workplace: Path, *commands: list[str]) -> subprocess.Popen[str]:
    """Two processes that run the commands one after the other."""
    worker = workplace / "worker.py"
    worker.write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*torchrun, str(worker), str(workplace), json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LONG = ("--steps", "30", "--set", "save_every=3", "--set", "dropout=0.3")


@pytest.fixture(scope="module")
def launched(workplace) -> tuple[str, str]:
    """What two processes printed that trained `default-2`, `end_to_end-2` and, longer and with dropout, `whole`."""
    short = [command(workplace, name, f"{name}-2", "--steps", "5") for name in CHANGES]
    job = launch(workplace, *short, command(workplace, "default", "whole", *LONG))
    printed = job.communicate(timeout=120)
    assert job.returncode == 0, printed[1]
    return printed


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "router_model.safetensors")


def events(folder: Path) -> list[dict[str, float]]:
    """The log without what a clock says."""
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if not name.endswith(("runtime", "per_second"))} for line in lines]


@pytest.mark.parametrize("name", CHANGES)
def test_two_processes_train_as_one_with_twice_the_batch(workplace, launched, name):
    recipe = load_recipe(workplace / f"{name}.yaml", {"steps": "5", "training.batch_size": "4"})
    train(str(workplace / "model"), [str(workplace / "rows.jsonl")], recipe, workplace / f"{name}-1")
    one, two = workplace / f"{name}-1", workplace / f"{name}-2"
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=2e-4)
    banks = [json.loads((run / "checkpoints/checkpoint-5/objective_state.json").read_text()) for run in (one, two)]
    assert banks[0].get("orders") == banks[1].get("orders")
    single, double = events(one), events(two)
    assert any(event.get("skip_rate_tool_call") for event in single)
    assert len(single) == len(double) == 7  # five updates, the evaluation and the end
    for ours, theirs in zip(double, single, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_only_the_first_process_speaks(launched):
    out, err = launched
    assert out.count("adapter: ") == 3
    assert err.count("train rows: ") == 3 and err.count("update 1 of 5: ") == 2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="names threads as Linux does")
def test_no_thread_of_the_process_group_outlives_the_run(workplace, launched):
    """One that does may abort the process while the interpreter ends, and the launcher calls the run failed."""
    for rank in (0, 1):
        names = json.loads((workplace / f"threads{rank}").read_text())
        assert names and not [name for name in names if "gloo" in name]


def kill_one(workplace: Path, rank: int, after: int, *more: str) -> str:
    """Train `killed` with two processes, kill one after so many updates, and return what the other had to say."""
    log = workplace / "killed" / "train_log.jsonl"
    (workplace / f"pid{rank}").unlink()
    job = launch(workplace, command(workplace, "default", "killed", *LONG, *more))
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= after and (workplace / f"pid{rank}").exists()):
        assert job.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    os.kill(int((workplace / f"pid{rank}").read_text()), signal.SIGKILL)
    _, err = job.communicate(timeout=30)
    assert job.returncode != 0 and not (workplace / "killed" / "router_config.json").exists()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "RuntimeError" not in err
    return line


def test_a_killed_process_ends_the_run_and_two_resume_it(workplace, launched):
    """Whichever is killed, the other names the checkpoint, from which two end with the weights of an unbroken run."""
    checkpoints = workplace / "killed" / "checkpoints"
    for rank, after, more in ((1, 7, ()), (0, 16, ("--resume",))):
        line = kill_one(workplace, rank, after, *more)
        good = last_checkpoint(checkpoints)
        assert good is not None and (good / "rng_state_1.pth").is_file()
        assert "because another process of this run has ended" in line and line.endswith("--resume to continue")
        assert f"last good checkpoint: {checkpoints}/checkpoint-" in line
    recipe = load_recipe(workplace / "default.yaml", {"steps": "30", "save_every": "3", "dropout": "0.3"})
    with pytest.raises(TrainingError, match="was started with processes=2, not 1"):
        data = [str(workplace / "rows.jsonl")]
        batch = {"training": recipe.training.model_copy(update={"batch_size": 2})}
        train(str(workplace / "model"), data, recipe.model_copy(update=batch), workplace / "killed", resume=True)
    job = launch(workplace, command(workplace, "default", "killed", *LONG, "--resume"))
    _, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    torch.testing.assert_close(weights(workplace / "killed"), weights(workplace / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_weights_are_refused(workplace, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match=f"{name}: .*run different blocks"):
        train("none", [], load_recipe("default"), workplace / "sharded")
