"""Recipes: the packaged figures, overrides, and one clear error for every mistake."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import yaml

from layerroute.config import RouterConfig
from layerroute.errors import ConfigError
from layerroute.training.recipe import load_recipe, recipe_keys, recipe_names


def test_paper_is_the_publication():
    recipe = load_recipe("paper")
    assert recipe.router == RouterConfig(
        position="block",
        context="full",
        pooling="mean",
        protect_first=0,
        protect_last=0,
        normalize=False,
        threshold=0.5,
        init_bias=1.0,
        closed_blocks=tuple(range(8, 17)),
    )
    assert recipe.lora.model_dump() == {"rank": 8, "alpha": 16, "dropout": 0.05}
    objective = recipe.objective
    gates = recipe.gates
    assert (gates.penalty, gates.router_loss_weight, objective.budgets) == ("soft_mean", 1.0, None)
    assert (objective.loss_on, objective.pool_over) == ("all", "sequence")
    assert (gates.logit_noise, objective.distillation_weight) == (0, 0)
    optimizer = recipe.optimizer
    assert (optimizer.router_lr, optimizer.lora_lr, optimizer.weight_decay) == (2e-4, 2e-4, 0.01)
    assert (optimizer.betas, optimizer.schedule, optimizer.min_lr) == ((0.9, 0.999), "cosine", 1e-6)
    assert optimizer.warmup_share == 0
    training = recipe.training
    assert (training.batch_size, training.gradient_accumulation, training.max_length) == (4, 4, 512)
    assert (training.precision, training.rows_per_source, training.validation_share) == ("bf16", 5000, 0.1)
    assert training.seed == 42


def test_published_steps_are_micro_batches():
    training = load_recipe("paper").training
    assert (training.steps, training.step_unit, training.updates) == (3000, "micro_batch", 750)
    assert load_recipe("paper", {"step_unit": "update"}).training.updates == 3000
    with pytest.raises(ConfigError, match=r"training: steps=10 micro-batches are no whole number of updates"):
        load_recipe("paper", {"steps": "10"})


def test_default_follows_the_design():
    recipe = load_recipe("default")
    router = recipe.router
    assert (router.position, router.normalize, router.window) == ("early", True, 16)
    assert (router.protect_first, router.protect_last) == (2, 1)
    assert router.boundaries == ("template",) and load_recipe("paper").router.boundaries == ()
    assert recipe.gates is None and recipe.search is not None
    assert load_recipe("end_to_end").gates.penalty == "budget"
    assert recipe.objective.pool_over == "prompt" and recipe.objective.loss_on == "target"
    recipe.check_blocks(30)


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_state_every_key(name):
    text = (resources.files("layerroute") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    for path in recipe_keys():
        node = values
        for part in path.split("."):
            if node is None:  # a section that is null
                break
            assert part in node, f"{name}.yaml lacks {path}"
            node = node[part]


def test_names():
    assert recipe_names() == ["default", "end_to_end", "paper"]


def test_a_file_changes_default(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("objective:\n  budgets: {tool_call: 0.45}\ntraining: {steps: 7}\n")
    recipe, default = load_recipe(path), load_recipe("default")
    assert recipe.objective.budgets.tool_call == 0.45
    assert recipe.training.steps == 7
    assert recipe.router == default.router


def test_overrides_dotted_and_bare():
    recipe = load_recipe(
        "end_to_end",
        {
            "training.steps": "20",
            "router_lr": "2e-4",
            "betas": "[0.8, 0.9]",
            "pooling": "joint",
            "boundaries": "[template, '[CALL]', [7, 8]]",
        },
    )
    assert recipe.training.steps == 20
    assert recipe.optimizer.router_lr == 2e-4
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.router.pooling == "joint"
    assert recipe.router.boundaries == ("template", "[CALL]", (7, 8))
    soft = load_recipe("end_to_end", {"penalty": "soft_mean", "objective.budgets": "null"})
    assert soft.objective.budgets is None


def test_recipe_survives_json():
    recipe = load_recipe("default")
    assert type(recipe)(**recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stepz": "1"}, r"unknown recipe key 'stepz' \(did you mean 'steps'\?\)"),
        ({"router.treshold": "1"}, r"unknown recipe key 'router.treshold' \(did you mean 'router.threshold'\?\)"),
        ({"xyzzy": "1"}, r"unknown recipe key 'xyzzy'; known: router\.position"),
        ({"threshold": "2"}, r"recipe default, router: threshold=2: Input should be less than 1"),
        ({"steps": "many"}, r"training: steps='many': Input should be a valid integer"),
        ({"steps": "[1"}, r"training\.steps='\[1' is not valid YAML"),
        ({"objective.budgets": "null"}, r"objective\.budgets and objective\.accepted: neither is given"),
        ({"search": "null"}, r"search and gates: both are null"),
        (
            {"objective.budgets": "null", "accepted": "{tool_call: 1, direct_call: 1, planning: 0, answer: 0}"},
            r"objective\.accepted with distillation_weight=0: the divergence is then not measured",
        ),
        ({"router_lr": "0.1"}, r"optimizer\.router_lr=0\.1 with search: .*router_lr=null"),
        ({"closed_blocks": "[3]"}, r"search with .*closed_blocks=\[3\]: it needs .*closed_blocks=\[\]"),
        ({"boundaries": "[]", "position": "block"}, r"search with router\.position='block'"),
        ({"boundaries": "[]", "pool_over": "sequence"}, r"pool_over='sequence' with search"),
        ({"budgets.planning": "0.5"}, r"planning=0\.5 exceeds tool_call=0\.24"),
        ({"full_depth_share": "0.7"}, r"full_depth_share=0\.7 and objective\.ramp_share=0\.4 add up to more"),
        (
            {
                "objective.budgets": "null",
                "accepted": "{tool_call: 1, direct_call: 1, planning: 0, answer: 0}",
                "distillation_weight": "1",
            },
            r"objective\.accepted with .*search\.part=30: .*part <= 8",
        ),
        ({"budgets.direct_call": "0.5"}, r"direct_call=0\.5 exceeds tool_call=0\.24"),
        ({"budgets.tool_call": "1.5"}, r"objective\.budgets: tool_call=1\.5: Input should be less than or equal to 1"),
        ({"betas": "[1, 0.9]"}, r"betas=\[1\.0, 0\.9\]"),
        ({"min_lr": "1"}, r"min_lr=1\.0 exceeds"),
        ({"context": "window", "position": "block"}, r"context='window' needs position='early'"),
        (
            {"pool_over": "sequence"},
            r"router\.boundaries=\['template'\] with objective\.pool_over='sequence': .*boundaries=\[\]",
        ),
        ({"position": "block"}, r"boundaries=\['template'\] needs position='early'"),
        ({"training": "3"}, r"training=3: Input should be a valid dictionary"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("default", overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"penalty": "soft"}, r"gates: penalty='soft': Input should be 'soft_mean' or 'budget'"),
        ({"objective.budgets": "null"}, r"penalty='budget' needs budgets"),
        ({"penalty": "soft_mean"}, r"penalty='soft_mean' obeys no budgets"),
        ({"budgets.direct_call": "0.1"}, r"direct_call=0\.1 with gates: .*use direct_call=null"),
        ({"router_lr": "null"}, r"optimizer\.router_lr=null with gates: give a learning rate"),
        ({"cost_rows": "null"}, r"cost_rows=None with gate_signal='measured'"),
    ],
)
def test_mistakes_with_gates_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("end_to_end", overrides)


def test_mistakes_in_files(tmp_path):
    with pytest.raises(ConfigError, match=r"no recipe 'papr' \(did you mean 'paper'\?\)"):
        load_recipe("papr")
    path = tmp_path / "mine.yaml"
    path.write_text("router:\n  window: [1\nlora: 3\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml, line 3: not valid YAML"):
        load_recipe(path)
    path.write_text("just words")
    with pytest.raises(ConfigError, match=r"expected sections \(router, lora"):
        load_recipe(path)
    path.write_text("router:\n  windoww: 3\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml, router: unknown setting 'windoww' \(did you mean 'window'\?\)"):
        load_recipe(path)


def test_budgets_that_protected_blocks_forbid():
    recipe = load_recipe("default", {"budgets.tool_call": "0.6"})
    recipe.check_blocks(8)
    with pytest.raises(ConfigError, match=r"budgets\.tool_call=0\.6: only 3 of this backbone's 6 blocks.*at most 0\.5"):
        recipe.check_blocks(6)
    with pytest.raises(ConfigError, match="none of the backbone's 3 blocks"):
        recipe.check_blocks(3)


def test_every_key_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    assert [path for path in recipe_keys() if f"`{path}`" not in text] == []
