"""Planning a grid, and its table against numpy and scipy on rows that were written by hand."""

import json

import numpy as np
import pytest
import torch
from scipy import stats as sps

from layerroute import get_routed_model
from layerroute.errors import ConfigError, DataError
from layerroute.evaluation.grid import cell, plan_grid
from layerroute.evaluation.grid_table import METRICS, collect, markdown
from layerroute.evaluation.summary import summarize
from layerroute.training.recipe import load_recipe
from layerroute.training.run import lora_config

WEIGHT = "gates.router_loss_weight"


@pytest.fixture
def plan():
    def make(seeds=3, **options):
        return plan_grid(
            "nowhere", options.pop("recipe", "end_to_end"), ["builtin:6"], ["builtin:9"], seeds=seeds, **options
        )

    return make


def test_runs_are_all_variants_with_every_seed(plan):
    grid = plan(changes={"seed": "7"}, sensitivity={"router_loss_weight": "100, 3e2,1000"})
    assert grid.seeds == [7, 8, 9]
    assert list(grid.variants) == ["recipe", "lora_only", "routers_only", f"{WEIGHT}=100", f"{WEIGHT}=1000"]
    curve = [(point["value"], point["variant"]) for point in grid.sensitivity[WEIGHT]]
    assert curve == [(100.0, f"{WEIGHT}=100"), (300.0, "recipe"), (1000.0, f"{WEIGHT}=1000")]  # 3e2 is the recipe's own
    runs = list(grid.runs())
    assert [run[:2] for run in runs[:6]] == [*((name, 7) for name in grid.variants), ("recipe", 8)] and len(runs) == 15
    assert all(recipe.training.seed == seed for _, seed, recipe in runs)
    assert runs[-1][2] == load_recipe("end_to_end", {"seed": "9", WEIGHT: "1000"})
    assert grid.data.keys() == {"builtin:6"} and len(grid.eval_data["builtin:9"]) == 64


def test_values_of_any_kind_are_swept(plan):
    sensitivity = {"betas": "[0.8, 0.9], [0.9, 0.99]", "pooling": "mean,joint", "cost_rows": "2"}
    grid = plan(sensitivity=sensitivity)
    assert [point["value"] for point in grid.sensitivity["router.pooling"]] == ["tail", "mean", "joint"]
    assert [point["value"] for point in grid.sensitivity["optimizer.betas"]] == [[0.9, 0.99], [0.8, 0.9]]
    assert [point["value"] for point in grid.sensitivity["gates.cost_rows"]] == [2, 4]
    assert not any("/" in name or " " in name for name in grid.variants)


@pytest.mark.parametrize("recipe", ["end_to_end", "paper"])
def test_lora_only_starts_open_whatever_the_recipe_is(recipe, plan, make_backbone, tokens):
    """And nothing can move its gates: no learning rate, no noise."""
    changes = {"closed_blocks": "[2, 3]", "threshold": "0.9", "router_lr": "0.1", "optimizer.router_lr": "0.2"}
    if recipe == "end_to_end":
        changes |= {"logit_noise": "2", "gate_signal": "measured"}
    grid = plan(recipe=recipe, changes=changes)
    for name, is_open in (("lora_only", True), ("recipe", False)):
        made = grid.variants[name]
        model = get_routed_model(make_backbone(blocks=6), made.router, lora_config(made)).eval()
        assert bool(model(tokens(2, 9)).routes.all()) == is_open
    settings = grid.variants["lora_only"]
    assert (settings.optimizer.router_lr, settings.gates.router_loss_weight, settings.gates.logit_noise) == (
        0,
        0,
        0,
    )
    assert grid.variants["routers_only"].optimizer.lora_lr == 0
    assert grid.variants["recipe"].optimizer.router_lr == 0.2


def test_no_learning_rate_is_none_at_all(make_backbone, tmp_path):
    """The cosine ends at `min_lr`, which must not be a rise from nothing; the other group is not held up."""
    from layerroute.training.trainer import RoutedTrainer

    recipe = load_recipe("end_to_end", {"router_lr": "0", "min_lr": "1e-4", "steps": "4", "boundaries": "[]"})
    model = get_routed_model(make_backbone(blocks=6), recipe.router, lora_config(recipe))
    empty = type("Empty", (torch.utils.data.Dataset,), {"samples": [], "__len__": lambda self: 0})()
    trainer = RoutedTrainer(model, recipe, empty, None, pad_token_id=0, checkpoints=tmp_path, data={})
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(4, optimizer)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [routers for routers, _ in rates] == [0.0] * 4
    assert all(lora > 1e-4 for _, lora in rates)
    with pytest.raises(ConfigError, match=r"min_lr=0\.01 exceeds"):
        load_recipe("end_to_end", {"router_lr": "0", "min_lr": "0.01"})


def flops_of(arm, row):
    return sum(row["flops"][arm].values())


def write_grid(folder, plan, make_samples, provenance, seeds=3, lost=()):
    """A grid's files with synthetic evaluations; returns the rows of each run."""
    grid = plan(seeds, sensitivity={"router_loss_weight": "100"})
    grid.keep(folder)
    runs = {}
    for number, (variant, seed, _) in enumerate(grid.runs()):
        if (variant, seed) in lost:
            continue
        samples = make_samples(effect=10.0 + number, seed=number, groups=10)
        rng = np.random.default_rng(number)
        baselines = [drawn_baselines(sample, rng) for sample in samples] if variant == "recipe" else []
        target = cell(folder, variant, seed) / "evaluation"
        target.mkdir(parents=True)
        for name, rows in (("samples", samples), ("baselines", baselines)):
            if rows:
                (target / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = summarize(samples, provenance, baselines=baselines)
        (target / "summary.json").write_text(json.dumps(summary))
        runs[variant, seed] = samples, baselines, summary
    return runs


def drawn_baselines(sample, rng):
    arms = {}
    for arm in ("static_greedy", "oracle"):
        closed = rng.random(len(sample["route"])) < (
            0.5 if arm == "oracle" and sample["step_type"] == "tool_call" else 0.2
        )
        arms[arm] = {
            "route": "".join("0" if shut else "1" for shut in closed),
            "skip_rate": 100 * closed.mean(),
            "nll": sample["nll"]["base"] * rng.uniform(0.9, 1.1),
            "accuracy": rng.uniform(0.4, 0.6),
            "flops": {"prefill": int(rng.integers(1000, 9000)), "decode": 7},
        }
    return {"id": sample["id"], "arms": arms}


def expected(samples, figures):
    """All metrics by plain numpy; `figures` gives a row's skip rate, loss, accuracy and FLOPs."""
    kinds = np.array([row["step_type"] for row in samples])
    tokens = np.array([row["target_tokens"] for row in samples])
    rates, nll, accuracy, flops = np.array([figures(row) for row in samples], dtype=float).T
    call, plan = kinds == "tool_call", kinds == "planning"
    paired = np.array([row["source"] == "talk" for row in samples])
    perplexity = {
        name: np.exp(nll[rows].sum() / tokens[rows].sum())
        for name, rows in (("tool_call", call), ("planning", plan), ("all", tokens > 0))
    }
    return {
        "skip_tool_call": rates[call].mean(),
        "skip_planning": rates[plan].mean(),
        "differential": rates[call].mean() - rates[plan].mean(),
        "paired_differential": rates[call & paired].mean() - rates[plan & paired].mean(),
        **{f"perplexity_{name}": value for name, value in perplexity.items()},
        "token_accuracy_all": np.average(accuracy, weights=tokens),
        "flops_share": flops.sum() / sum(flops_of("base", row) for row in samples),
    }


def of_sample(arm):
    def figures(row):
        rate = row["skip_rate"] if arm == "routed" else 0.0
        return rate, row["nll"][arm], row["accuracy"][arm], flops_of(arm, row)

    return figures


def of_baseline(arm, baselines):
    by_id = {row["id"]: row["arms"][arm] for row in baselines}

    def figures(row):
        found = by_id[row["id"]]
        return found["skip_rate"], found["nll"], found["accuracy"], sum(found["flops"].values())

    return figures


def test_the_table_is_numpys_and_scipys(tmp_path, plan, make_samples, provenance):
    runs = write_grid(tmp_path, plan, make_samples, provenance)
    table = collect(tmp_path)
    assert table["seeds"] == [42, 43, 44] and json.loads(json.dumps(table, allow_nan=False)) == table
    assert list(table["arms"])[:5] == ["base", "lora_only", "routed", "static_greedy", "oracle"]

    def by_seed(variant, arm):
        found = [runs[variant, seed] for seed in (42, 43, 44)]
        if arm in ("static_greedy", "oracle"):
            return [expected(samples, of_baseline(arm, baselines)) for samples, baselines, _ in found]
        return [expected(samples, of_sample(arm)) for samples, _, _ in found]

    arms = {arm: by_seed("recipe", arm) for arm in ("base", "lora_only", "routed", "static_greedy", "oracle")}
    arms |= {"trained_lora_only": by_seed("lora_only", "routed"), "routers_only": by_seed("routers_only", "routed")}
    assert set(arms) == set(table["arms"])
    for arm, seeds in arms.items():
        for metric in METRICS:
            values = np.array([figures[metric] for figures in seeds])
            found = table["arms"][arm][metric]
            np.testing.assert_allclose(found["values"], values, rtol=1e-9)
            assert found["mean"] == pytest.approx(values.mean())
            margin = sps.t.ppf(0.975, 2) * values.std(ddof=1) / 3**0.5
            assert found["ci95"] == pytest.approx([values.mean() - margin, values.mean() + margin])
    for arm in ("static_greedy", "routers_only"):
        first, second = ([figures["paired_differential"] for figures in arms[name]] for name in ("routed", arm))
        test = table["tests"][arm]["paired_differential"]
        assert test["mean_difference"] == pytest.approx(np.mean(first) - np.mean(second))
        assert test["t_p_value"] == pytest.approx(sps.ttest_rel(first, second).pvalue)
        assert test["wilcoxon_p_value"] == pytest.approx(sps.wilcoxon(first, second).pvalue)
    assert "routed" not in table["tests"]
    curve = table["sensitivity"][WEIGHT]
    assert [point["value"] for point in curve] == [100.0, 300.0]
    assert curve[1]["flops_share"] == table["arms"]["routed"]["flops_share"]
    other = [figures["differential"] for figures in by_seed(f"{WEIGHT}=100", "routed")]
    assert curve[0]["differential"]["values"] == pytest.approx(other)


def test_the_table_agrees_with_the_summaries(tmp_path, plan, make_samples, provenance):
    runs = write_grid(tmp_path, plan, make_samples, provenance, seeds=1)
    table, (_, _, summary) = collect(tmp_path), runs["recipe", 42]
    routed = {metric: figure["mean"] for metric, figure in table["arms"]["routed"].items()}
    assert routed["skip_planning"] == pytest.approx(summary["skip_rate"]["planning"]["mean"])
    assert routed["differential"] == pytest.approx(summary["differential"]["pooled"]["mean"])
    assert routed["paired_differential"] == pytest.approx(summary["differential"]["paired"]["mean"])
    assert routed["perplexity_tool_call"] == pytest.approx(summary["perplexity"]["routed"]["tool_call"])
    assert routed["flops_share"] == pytest.approx(summary["flops"]["all"]["total_share"])
    oracle = summary["baselines"]["oracle"]
    assert table["arms"]["oracle"]["perplexity_all"]["mean"] == pytest.approx(oracle["perplexity"]["all"])
    assert table["arms"]["oracle"]["token_accuracy_all"]["mean"] == pytest.approx(oracle["token_accuracy"]["all"])


@pytest.mark.parametrize(("seeds", "interval"), [(1, False), (2, True)])
def test_few_seeds_give_no_test(seeds, interval, tmp_path, plan, make_samples, provenance):
    write_grid(tmp_path, plan, make_samples, provenance, seeds=seeds)
    table = collect(tmp_path)
    assert (table["arms"]["routed"]["differential"]["ci95"] is not None) == interval
    test = table["tests"]["oracle"]["differential"]
    assert test["mean_difference"] is not None and test["t_p_value"] is test["wilcoxon_p_value"] is None


def test_a_lost_run_leaves_its_arm_without_a_mean(tmp_path, plan, make_samples, provenance):
    write_grid(tmp_path, plan, make_samples, provenance, lost=[("routers_only", 43)])
    table = collect(tmp_path)
    found = table["arms"]["routers_only"]["differential"]
    assert found["mean"] is found["ci95"] is found["values"][1] is None and found["values"][0] is not None
    assert table["tests"]["routers_only"]["differential"]["t_p_value"] is None
    assert table["arms"]["routed"]["differential"]["mean"] is not None
    assert "routers_only, seed 43: no evaluation; its training failed, or has yet to run." in table["warnings"]
    assert "- routers_only, seed 43: no evaluation" in markdown(table)


def test_markdown_shows_means_and_half_intervals(tmp_path, plan, make_samples, provenance):
    write_grid(tmp_path, plan, make_samples, provenance)
    table = collect(tmp_path)
    lines = markdown(table).splitlines()
    assert lines[0] == "# Ablation of recipe `end_to_end`, 3 seeds"
    figure = table["arms"]["routed"]["skip_tool_call"]
    half = figure["ci95"][1] - figure["mean"]
    assert next(line for line in lines if line.startswith("| `routed` | ")).split(" | ")[1] == (
        f"{figure['mean']:.3f} ± {half:.3f}"
    )
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {len(METRICS) + 2, 5}


def test_no_grid_is_told(tmp_path):
    with pytest.raises(DataError, match=r"grid\.json cannot be read: .*run `layerroute ablate`"):
        collect(tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="taken: cannot be used"):
        plan_grid("m", "default", ["builtin:6"], ["builtin:9"], seeds=1).keep(tmp_path / "taken")
