"""`layerroute ablate` on a tiny backbone: a grid of real trainings, its table, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layerroute.data.steps import STEP_TYPES, Step, write_steps
from layerroute.evaluation.baselines import ARMS
from layerroute.evaluation.grid_table import METRICS

QUICK = ["batch_size=2", "gradient_accumulation=1", "max_length=256", "validation_rows=3", "cost_rows=1"]
FIRM = ["router_lr=1", "ramp_share=0", "warmup_share=0"]  # two updates close gates
KEY = "objective.budgets.tool_call"
VARIANTS = ["recipe", "lora_only", "routers_only", f"{KEY}=0.4"]
DIVERGING = "optimizer.lora_lr=1e30"


@pytest.fixture(scope="session")
def steps(tmp_path_factory) -> tuple[Path, Path]:
    """Short steps to train on, and others to measure."""
    folder = tmp_path_factory.mktemp("steps")
    for name, count in (("train", 24), ("test", 15)):
        write_steps(folder / f"{name}.jsonl", [short_step(i, random.Random(f"{name}{i}")) for i in range(count)])
    return folder / "train.jsonl", folder / "test.jsonl"


def short_step(index: int, rng: random.Random) -> Step:
    kind = STEP_TYPES[index % 3]
    calls = [{"name": "f", "arguments": {}}] if kind == "tool_call" else None
    row = {"id": f"s{index}", "source": "drawn", "group": f"g{index // 3}", "step_type": kind}
    row["messages"] = [{"role": "user", "content": "".join(rng.choices("abcdefgh", k=rng.randrange(5, 40)))}]
    return Step.from_row(
        row | {"target": {"role": "assistant", "content": None if calls else "Well.", "tool_calls": calls}}
    )


def command(backbone: Path, steps: tuple[Path, Path], output: Path, seeds: object = 1) -> list[object]:
    settings = [part for setting in [*QUICK, *FIRM] for part in ("--set", setting)]
    data = ["--data", steps[0], "--eval-data", steps[1], "--limit", 12]
    grid = ["--seeds", seeds, "--steps", 2, "--sensitivity", "budgets.tool_call=0.25,0.4"]
    grid += ["--sensitivity", "lora_lr=1e30"]
    return ["ablate", "--recipe", "end_to_end", "--model", backbone, *data, *grid, *settings, "--output", output]


@pytest.fixture(scope="module")
def finished(backbone, steps, tmp_path_factory) -> Path:
    """A finished grid of one seed."""
    from layerroute.cli import main

    folder = tmp_path_factory.mktemp("grids") / "grid"
    with pytest.raises(SystemExit) as exit_:
        main([str(part) for part in command(backbone, steps, folder)])
    assert not exit_.value.code
    return folder


def rows(folder: Path, variant: str, name: str = "samples", seed: int = 42) -> list[dict]:
    text = (folder / variant / f"seed-{seed}" / "evaluation" / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_every_variant_is_trained_and_measured_on_the_same_rows(finished):
    assert {path.name for path in finished.iterdir()} == {
        *VARIANTS,
        DIVERGING,
        "grid.json",
        "ablation.json",
        "ablation.md",
    }
    ids = [row["id"] for row in rows(finished, "recipe")]
    assert len(ids) == 12
    for variant in VARIANTS:
        cell = finished / variant / "seed-42"
        assert [row["id"] for row in rows(finished, variant)] == ids
        assert (cell / "evaluation" / "baselines.jsonl").exists() == (variant == "recipe")
        recipe = json.loads((cell / "adapter" / "router_config.json").read_text())["recipe"]
        assert recipe["training"]["seed"] == 42 and recipe["training"]["steps"] == 2
        assert recipe["objective"]["budgets"]["tool_call"] == (0.4 if variant == f"{KEY}=0.4" else 0.25)


def test_lora_only_never_closes_a_gate_and_routers_only_never_moves_lora(finished):
    """Both were given learning rates that would have."""
    assert {row["route"] for row in rows(finished, "lora_only")} == {"11111"}
    assert any("0" in row["route"] for row in rows(finished, "recipe") + rows(finished, "routers_only"))

    def weights(variant, name):
        return load_file(finished / variant / "seed-42" / "adapter" / f"{name}_model.safetensors")

    routers, lora = weights("lora_only", "router"), weights("lora_only", "adapter")
    assert not routers["weight"].any() and (routers["bias"] == 1).all()
    assert any(tensor.any() for name, tensor in lora.items() if "lora_B" in name)
    routers, lora = weights("routers_only", "router"), weights("routers_only", "adapter")
    assert routers["weight"].any()
    assert not any(tensor.any() for name, tensor in lora.items() if "lora_B" in name)
    for row in rows(finished, "routers_only"):
        assert row["nll"]["lora_only"] == pytest.approx(row["nll"]["base"], rel=1e-6)


def test_the_table_holds_every_arm_and_the_curve(finished, steps):
    table = json.loads((finished / "ablation.json").read_text())
    assert (table["seeds"], table["recipe"], table["metrics"]) == ([42], "end_to_end", list(METRICS))
    assert list(table["arms"]) == ["base", "lora_only", "routed", *ARMS, "trained_lora_only", "routers_only"]
    figures = [row["skip_rate"] for row in rows(finished, "recipe") if row["step_type"] == "tool_call"]
    routed = table["arms"]["routed"]["skip_tool_call"]
    assert routed == {"mean": pytest.approx(sum(figures) / len(figures)), "ci95": None, "values": [routed["mean"]]}
    assert table["arms"]["trained_lora_only"]["skip_tool_call"]["values"] == [0.0]
    assert table["arms"]["base"]["flops_share"]["mean"] == 1
    assert table["tests"]["base"]["skip_tool_call"] == {
        "mean_difference": pytest.approx(routed["mean"]), "t_p_value": None, "wilcoxon_p_value": None
    }  # fmt: skip
    curve = table["sensitivity"][KEY]
    assert [point["value"] for point in curve] == [0.25, 0.4]
    assert curve[0]["skip_tool_call"] == routed
    own, diverged = table["sensitivity"]["optimizer.lora_lr"]
    assert (own["value"], diverged["value"]) == (0.001, 1e30)
    assert diverged["flops_share"] == {"mean": None, "ci95": None, "values": [None]}
    assert f"{DIVERGING}, seed 42: no evaluation; its training failed, or has yet to run." in table["warnings"]
    assert table["provenance"]["command"].startswith("layerroute ablate --model ")
    assert table["provenance"]["data"].keys() == {str(steps[0])}
    text = (finished / "ablation.md").read_text()
    assert "| `routers_only` |" in text and f"## Sensitivity to `{KEY}`" in text


def test_what_is_done_is_not_done_again_and_what_is_missing_is(run, finished, backbone, steps, tmp_path):
    """An evaluation and a training were lost; a checkpoint of the training is left."""
    folder = shutil.copytree(finished, tmp_path / "grid")
    lost = folder / "lora_only" / "seed-42"
    expected = {name: load_file(lost / "adapter" / name) for name in ("adapter_model.safetensors",)}
    for name in ("router_config.json", "adapter_model.safetensors", "router_model.safetensors"):
        (lost / "adapter" / name).unlink()
    shutil.rmtree(lost / "evaluation")
    kept = folder / "recipe" / "seed-42" / "evaluation" / "summary.json"
    before = kept.stat().st_mtime_ns, (folder / "ablation.json").read_text()
    outcome = run(*command(backbone, steps, folder), "--json")
    assert outcome.status == 0, outcome.stderr
    assert "variant lora_only, seed 42 (2 of 5): training goes on from checkpoint-2" in outcome.stderr
    assert "variant lora_only, seed 42 (2 of 5): evaluating" in outcome.stderr
    assert outcome.stderr.count(": evaluating") == 1
    assert outcome.stderr.count(": training") == 3  # with the one that diverges: it is tried again
    assert f"variant {DIVERGING}, seed 42 (5 of 5): training failed, the table goes without it: the " in outcome.stderr
    assert kept.stat().st_mtime_ns == before[0]
    found = load_file(lost / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected["adapter_model.safetensors"].items())
    table = json.loads(outcome.stdout)
    assert table == json.loads((folder / "ablation.json").read_text())
    assert table["arms"] == json.loads(before[1])["arms"]


@pytest.mark.parametrize(
    ("logger", "text"), [("training.trainer", "measuring what each"), ("evaluation.ablate", "evaluating")]
)
def test_control_c_says_how_to_go_on(logger, text, run, finished, backbone, steps, tmp_path, press_control_c):
    """In a training and in an evaluation; the same command then comes to the same end."""
    folder = shutil.copytree(finished, tmp_path / "grid")
    shutil.rmtree(folder / "recipe")
    with press_control_c(f"layerroute.{logger}", text):
        outcome = run(*command(backbone, steps, folder))
    assert outcome.status == 130
    message = "error: interrupted in variant recipe, seed 42 (1 of 5); run the same command again to go on from there"
    assert outcome.stderr.splitlines()[-1] == message
    assert run(*command(backbone, steps, folder)).status == 0
    tables = [json.loads((path / "ablation.json").read_text()) for path in (folder, finished)]
    assert tables[0]["arms"] == tables[1]["arms"]


def test_other_data_under_the_same_name_is_refused(run, finished, backbone, steps, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "grid")
    grid = json.loads((folder / "grid.json").read_text())
    grid["eval_data"][str(steps[1])] = "0" * 64
    (folder / "grid.json").write_text(json.dumps(grid))
    outcome = run(*command(backbone, steps, folder))
    assert outcome.status == 2 and f"holds another grid: eval_data.{steps[1]} is '0000" in outcome.stderr


def test_another_grid_in_the_same_folder_is_refused(run, finished, backbone, steps):
    outcome = run(*command(backbone, steps, finished, seeds=2))
    assert outcome.status == 2 and outcome.stderr.count("\n") == 1
    assert "holds another grid: seeds is [42] there, not [42, 43]; give the command that it was" in outcome.stderr
    outcome = run(*command(backbone, steps, finished), "--set", "lora_lr=0.002")
    assert outcome.status == 2
    assert "holds another grid: variants.recipe.optimizer.lora_lr is 0.001 there, not 0.002" in outcome.stderr


MODEL = ("ablate", "--model", "nowhere", "--output", "{tmp}/out")
DATA = ("--data", "builtin:6", "--eval-data", "builtin:6")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*DATA, "--seeds", "0"), "seeds=0: at least one is needed"),
        ((*DATA,), "Missing option '--seeds'"),
        ((*DATA, "--seeds", "1", "--recipe", "defualt"), "did you mean 'default'?"),
        ((*DATA, "--seeds", "1", "--set", "routr_lr=1"), "did you mean 'router_lr'?"),
        ((*DATA, "--seeds", "1", "--sensitivity", "routr_lr=1"), "did you mean 'router_lr'?"),
        ((*DATA, "--seeds", "1", "--sensitivity", "lora_lr=0.1,-1"), "lora_lr=-1: Input should be greater"),
        ((*DATA, "--seeds", "1", "--sensitivity", "router_lr="), "expected values with commas between them"),
        ((*DATA, "--seeds", "1", "--sensitivity", "lora_lr=1,1"), "a value is given twice"),
        ((*DATA, "--seeds", "1", "--sensitivity", "router_lr"), "expected KEY=VALUE"),
        ((*DATA, "--seeds", "1", "--sensitivity", "seed=1,2"), "every variant runs with every seed"),
        ((*DATA, "--seeds", "1", "--sensitivity", "budgets=null"), "that is a section"),
        ((*DATA, "--seeds", "1", "--sensitivity", "a=1", "--sensitivity", "a=2"), "--sensitivity a is given twice"),
        ((*DATA, "--seeds", "1", "--steps", "3", "--set", "steps=4"), "are given both"),
        (("--data", "builtin:6", "--eval-data", "nothing", "--seeds", "1"), "unknown data 'nothing'"),
        ((*DATA, "--seeds", "1"), "'nowhere': no such folder"),
        ((*DATA, "--seeds", "1", "--model", "{backbone}", "--set", "budgets.tool_call=0.9"), "budget can be at most"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_written(run, backbone, tmp_path, args, message):
    given = [part.format(tmp=tmp_path, backbone=backbone) for part in (*MODEL, *args)]
    outcome = run(*given)
    assert outcome.status == 2 and message in outcome.stderr
    assert outcome.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
