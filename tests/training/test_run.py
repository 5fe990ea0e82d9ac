"""`train` from names to an adapter folder, its interruptions, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layerroute import RoutedModel
from layerroute.data.steps import Step, write_steps
from layerroute.errors import ConfigError, DataError, TrainingError, TrainingInterrupted
from layerroute.training.recipe import load_recipe
from layerroute.training.run import load_parts, train

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} "
    "{{ m['content'] or m['tool_calls'][0]['function']['name'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}{% if tools %}{% endif %}"
)
"""One word per token; a call is its function's name."""


def row(index: int) -> Step:
    kind = ("tool_call", "planning", "answer")[index % 3]
    ask = {"tool_call": "call", "planning": "plan", "answer": "say"}[kind]
    calls = [{"name": "lookup", "arguments": {}}] if kind == "tool_call" else None
    return Step.from_row(
        {
            "id": str(index),
            "source": "toy",
            "group": f"g{index // 3}",
            "step_type": kind,
            "messages": [{"role": "user", "content": f"w{index % 7} w{index % 5} {ask} {ask}"}],
            "tools": [{"name": "lookup", "description": "", "parameters": {"type": "object"}}],
            "target": {"role": "assistant", "content": None if calls else f"w{index % 7} {ask}", "tool_calls": calls},
        }
    )


@pytest.fixture
def workplace(tmp_path: Path, make_backbone) -> Path:
    """A folder with a tiny backbone (`model`) and 36 rows of data (`rows.jsonl`)."""
    words = ["<unk>", "<s>", "</s>", "user", "assistant", "call", "plan", "say", "lookup", *(f"w{i}" for i in range(7))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    make_backbone(blocks=4).save_pretrained(tmp_path / "model")
    write_steps(tmp_path / "rows.jsonl", [row(i) for i in range(36)])
    return tmp_path


def run(workplace: Path, recipe, output: str, **kwargs):
    return train(str(workplace / "model"), [str(workplace / "rows.jsonl")], recipe, workplace / output, **kwargs)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "router_model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_run_leaves_a_complete_adapter(workplace, fast_recipe):
    recipe = fast_recipe(steps=4, validation_share=0.25)
    result = run(workplace, recipe, "out")
    assert result.rows["train"] == {"tool_call": 9, "planning": 9, "answer": 9}
    assert result.rows["validation"] == {"tool_call": 3, "planning": 3, "answer": 3}
    assert (result.updates, result.cut, result.dropped) == (4, 0, 0)
    assert {"cross_entropy", "eval_loss", "eval_full_loss", "eval_skip_rate_tool_call"} <= result.final.keys()
    assert json.loads(json.dumps(result.as_dict()))["output"] == str(workplace / "out")
    assert "train rows: 9 tool_call, 9 planning, 9 answer; 0 cut to fit, 0 dropped" in result.summary()
    loaded = RoutedModel.from_pretrained(workplace / "out")
    assert loaded.routable == [1, 2]
    recorded = json.loads((workplace / "out" / "router_config.json").read_text())
    assert recorded["recipe"] == recipe.model_dump(mode="json")
    assert list(recorded["data"]["sources"]) == [str(workplace / "rows.jsonl")]
    top = {path.name for path in (workplace / "out").iterdir()}
    assert {"train_log.jsonl", "checkpoints", "README.md"} <= top
    assert not [name for name in top if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_the_card_makes_the_adapter_again(workplace, fast_recipe):
    run(workplace, fast_recipe(steps=2), "out")
    card = (workplace / "out" / "README.md").read_text()
    recipe = workplace / "recipe.yaml"
    recipe.write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL).group(1))
    command = shlex.split(re.search(r"layerroute train .*?my-adapter", card, re.DOTALL).group().replace("\\\n", ""))
    said = dict(zip(command[2::2], command[3::2], strict=True))
    assert said.keys() == {"--model", "--data", "--recipe", "--output"}
    train(said["--model"], [said["--data"]], load_recipe(recipe), workplace / "again")
    assert_same_weights(workplace / "out", workplace / "again")


@pytest.mark.parametrize("name", ["default", "end_to_end"])
def test_a_type_that_is_missing_is_named(name, workplace, fast_recipe, caplog):
    write_steps(workplace / "rows.jsonl", [row(index) for index in range(24) if index % 3 != 2])
    run(workplace, fast_recipe(name, steps=2), "out")
    assert "the data holds no answer to train on: the run goes without its budget" in caplog.text


def with_thought(index: int) -> Step:
    thought = {"role": "assistant", "content": "plan", "partial": True}
    step = row(3 * index)
    return replace(step, id=f"t{index}", group=f"t{index}", messages=[*step.messages, thought])


THOUGHTFUL = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] or '' }}"
    "{% for call in m['tool_calls'] or [] %} lookup call{% endfor %} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}{% if tools %}{% endif %}"
)


def test_a_turn_is_routed_again_at_a_boundary(workplace, fast_recipe):
    write_steps(workplace / "rows.jsonl", [*map(row, range(12)), *map(with_thought, range(8))])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(workplace / "model")
    tokenizer.chat_template = THOUGHTFUL
    tokenizer.save_pretrained(workplace / "model")
    result = run(workplace, fast_recipe(steps=2, validation_share=0.3, boundaries="['lookup']"), "out")
    figures = {f"eval_first_segment_skip_rate_{name}" for name in ("planning", "tool_call")}
    assert figures <= result.final.keys() and "eval_first_segment_skip_rate_planning: " in result.summary()
    loaded = RoutedModel.from_pretrained(workplace / "out")
    assert loaded.router_config.boundaries == (tuple(tokenizer.encode("lookup", add_special_tokens=False)),)


def test_boundaries_that_the_backbone_does_not_write(workplace, fast_recipe, caplog):
    with pytest.raises(ConfigError, match="boundaries: this tokenizer cannot write '<tool_call>'"):
        run(workplace, fast_recipe(boundaries="['<tool_call>']"), "out")
    assert not (workplace / "out").exists()
    run(workplace, fast_recipe(steps=1, boundaries="[template]"), "out")
    assert "router.boundaries=['template']: the chat template writes none of the known markers" in caplog.text
    assert RoutedModel.from_pretrained(workplace / "out").router_config.boundaries == ()


KILLED = """
import sys
from layerroute.training.recipe import load_recipe
from layerroute.training.run import load_parts, train
import torch
torch.set_num_threads(1)
train(sys.argv[1], [sys.argv[2]], load_recipe(sys.argv[4]), sys.argv[3])
"""


def test_kill_minus_nine_and_resume(workplace, fast_recipe):
    """A process killed at any moment, resumed in another, ends with the weights of one that was left alone."""
    recipe = fast_recipe(steps=40, save_every=3, dropout=0.3, validation_share=0, log_every=1)
    path = workplace / "recipe.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    arguments = [str(workplace / name) for name in ("model", "rows.jsonl", "killed")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments, str(path)], env=environment, stderr=subprocess.DEVNULL
    )
    log, deadline = workplace / "killed" / "train_log.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 8):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (workplace / "killed" / "router_config.json").exists()
    run(workplace, recipe, "killed", resume=True)
    run(workplace, recipe, "whole")
    assert_same_weights(workplace / "killed", workplace / "whole")


def test_control_c_leaves_a_checkpoint_and_says_how_to_go_on(workplace, fast_recipe):
    recipe = fast_recipe(steps=40, save_every=1000, validation_share=0)
    log = workplace / "out" / "train_log.jsonl"

    def interrupt() -> None:
        while not (log.exists() and log.read_text()):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    former = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(TrainingInterrupted, match=r"interrupted after update \d+ of 40; checkpoint: .*--resume"):
        run(workplace, recipe, "out")
    thread.join()
    assert signal.getsignal(signal.SIGINT) is former
    assert not (workplace / "out" / "router_config.json").exists()
    run(workplace, recipe, "out", resume=True)
    run(workplace, recipe, "whole")
    assert_same_weights(workplace / "out", workplace / "whole")


def test_bf16_backbone(workplace, fast_recipe):
    result = run(workplace, fast_recipe(steps=2, precision="bf16", validation_share=0.25), "out")
    assert 0 < result.final["eval_loss"] < 20
    assert {tensor.dtype for tensor in weights(workplace / "out").values()} == {torch.float32}


def test_output_folders_that_are_taken(workplace, fast_recipe):
    recipe = fast_recipe(steps=2)
    with pytest.raises(TrainingError, match="holds no complete checkpoint; start without --resume"):
        run(workplace, recipe, "out", resume=True)
    run(workplace, recipe, "out")
    with pytest.raises(TrainingError, match="already holds an adapter"):
        run(workplace, recipe, "out")
    with pytest.raises(TrainingError, match="nothing to resume"):
        run(workplace, recipe, "out", resume=True)
    with pytest.raises(TrainingError, match="is a file"):
        run(workplace, recipe, "rows.jsonl")
    (workplace / "mine" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(TrainingError, match="is of no LayerRoute run"):
        run(workplace, recipe, "mine")
    assert (workplace / "mine" / "checkpoints" / "checkpoint-1").is_dir()


def test_resuming_another_run_is_refused(workplace, fast_recipe):
    recipe = fast_recipe(steps=2)
    run(workplace, recipe, "out")
    (workplace / "out" / "router_config.json").unlink()  # as if killed just before the adapter was saved
    with pytest.raises(TrainingError, match="add --resume to continue it"):
        run(workplace, recipe, "out")
    with pytest.raises(TrainingError, match=r"started with recipe\.optimizer\.lora_lr=0\.01, not 0\.02"):
        run(workplace, fast_recipe(steps=2, lora_lr=0.02), "out", resume=True)
    write_steps(workplace / "rows.jsonl", [row(i) for i in range(30)])
    with pytest.raises(TrainingError, match=r"started with data\..*rows\.jsonl="):
        run(workplace, recipe, "out", resume=True)
    write_steps(workplace / "rows.jsonl", [row(i) for i in range(36)])
    run(workplace, recipe, "out", resume=True)
    assert_same_weights(workplace / "out", workplace / "out" / "checkpoints" / "checkpoint-2")


def test_resuming_on_other_weights_is_refused(workplace, fast_recipe, make_backbone):
    recipe = fast_recipe(steps=2)
    run(workplace, recipe, "out")
    (workplace / "out" / "router_config.json").unlink()
    make_backbone(seed=9).save_pretrained(workplace / "model")  # the same name, another model
    with pytest.raises(TrainingError, match="was trained on a backbone with fingerprint"):
        run(workplace, recipe, "out", resume=True)


def test_routers_are_fitted_to_longer_rows_of_the_same_conversations(workplace, fast_recipe):
    """Every second row is too long for LoRA, and in the fit; no validation row is in either."""
    rows = [row(i) for i in range(36)]
    for step in rows[::2]:
        step.messages[0]["content"] = "w1 " * 20 + step.messages[0]["content"]
    write_steps(workplace / "rows.jsonl", rows)
    recipe = fast_recipe("default", max_length=16, fit_length=64, validation_share=0.2)
    parts = load_parts(str(workplace / "model"), [str(workplace / "rows.jsonl")], recipe)
    lengths = [max(len(sample.input_ids) for sample in part.samples) for part in (parts.train, parts.fit)]
    assert lengths[0] <= 16 < 20 < lengths[1]
    held = {sample.group for sample in parts.validation.samples}
    groups = {sample.group for sample in parts.fit.samples}
    assert len(groups) == 12 - len(held) and not groups & held
    same = fast_recipe("default", fit_length="null", validation_share=0.2)
    parts = load_parts(str(workplace / "model"), [str(workplace / "rows.jsonl")], same)
    assert parts.fit is parts.train
    with pytest.raises(ConfigError, match=r"search\.fit_length=4096: this backbone reads at most 128 tokens"):
        run(workplace, fast_recipe("default", fit_length=4096), "out")


def test_nothing_to_train_on(workplace, fast_recipe):
    write_steps(workplace / "rows.jsonl", [row(i) for i in range(3)])
    with pytest.raises(ConfigError, match=r"training\.max_length=4096: this backbone reads at most 128 tokens"):
        run(workplace, fast_recipe(max_length=4096), "out")
    (workplace / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        run(workplace, fast_recipe(), "out")
    assert not (workplace / "out").exists()
