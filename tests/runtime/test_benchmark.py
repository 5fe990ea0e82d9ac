"""The runs that are compared, and what the report makes of their times; nothing here depends on how fast it is."""

import dataclasses
import json

import pytest
import torch

from layerroute import RouterConfig
from layerroute.errors import ConfigError
from layerroute.runtime.arms import Arm, decided, evenly_spread, mixed_routes, routed_arm, static_removal
from layerroute.runtime.benchmark import BenchmarkSettings, run

BLOCKS, NEW = 6, 5
QUICK = {"batch": (2,), "prompt_tokens": 8, "new_tokens": NEW, "repetitions": 3, "skip": 2}
MILLISECONDS = {"plain": 100.0, "static": 80.0, "open": 101.0, "routed": 81.0, "mixed": 95.0}


@pytest.fixture
def pair(make_backbone, make_routed):
    """The untouched backbone, and another copy of it with trained routers and LoRA merged."""
    model = make_routed(blocks=BLOCKS)
    model.merge_adapter()
    return make_backbone(blocks=BLOCKS), model


@pytest.fixture
def invented_times(monkeypatch):
    """Real generations whose times are made up, the same in every repetition; gives the order of the runs."""
    order = []
    original = Arm.run

    def run_arm(arm, ids, new_tokens):
        order.append(arm.name)
        ms = MILLISECONDS.get(arm.name, 50.0)
        return dataclasses.replace(original(arm, ids, new_tokens), prefill=2 * ms, decode=ms)

    monkeypatch.setattr(Arm, "run", run_arm)
    return order


def test_deleting_blocks_gives_the_reference_and_leaves_the_backbone_alone(
    family, make_backbone, make_routed, delete_blocks, tokens
):
    plain, ids = make_backbone(family, BLOCKS), tokens(2, 9)
    before = plain(ids).logits
    static = static_removal(plain, [1, 3])
    route = torch.tensor([True, False, True, False, True, True])
    reference = delete_blocks(make_routed(family, blocks=BLOCKS, trained=False), route)
    assert torch.equal(
        Arm("static", static).generate(ids, NEW).sequences,
        reference.generate(ids, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW),
    )
    assert torch.equal(plain(ids).logits, before)
    assert len(plain.get_decoder().layers) == plain.config.num_hidden_layers == BLOCKS
    shared = {parameter.data_ptr() for parameter in plain.parameters()}
    assert all(parameter.data_ptr() in shared for parameter in static.parameters())


@pytest.mark.parametrize("config", [
    RouterConfig(protect_first=1, threshold=0.9), RouterConfig(position="block"), RouterConfig(context="window"),
], ids=["early", "block", "window"])  # fmt: skip
def test_the_routers_decide_what_the_benchmark_wants(config, make_routed, tokens):
    model, ids = make_routed(config=config, blocks=BLOCKS), tokens(2, 9)
    own, weight = model.route(ids), model.routers.weight.clone()
    with decided(model, [2, 4]):
        assert model.route(ids).tolist() == [[True, True, False, True, False, True]] * 2
    with decided(model, []):
        assert bool(model.route(ids).all())
    assert torch.equal(model.route(ids), own)
    assert torch.equal(model.routers.weight, weight)


def test_a_routed_run_generates_what_the_static_one_does(make_backbone, make_routed, tokens):
    model = make_routed(blocks=BLOCKS, trained=False)
    ids = tokens(2, 9)
    routed = routed_arm("routed", model, [2, 4])
    static = Arm("static", static_removal(make_backbone(blocks=BLOCKS), [2, 4]))
    with routed.within():
        assert torch.equal(routed.generate(ids, NEW).sequences, static.generate(ids, NEW).sequences)
    timed = routed.run(ids, NEW)
    assert timed.prefill > 0 and timed.decode > 0
    assert timed.cache.routes.tolist() == [[True, True, False, True, False, True]] * 2


def test_blocks_are_spread_evenly():
    assert evenly_spread(range(2, 29), 8) == [3, 7, 10, 13, 17, 20, 23, 27]
    for count in range(8):
        chosen = evenly_spread(range(3, 10), count)
        assert len(set(chosen)) == count and chosen == sorted(chosen) and set(chosen) <= set(range(3, 10))


def test_odd_rows_of_a_mixed_batch_skip():
    assert mixed_routes(4, 3, [1]).tolist() == [[True] * 3, [True, False, True]] * 2


def test_arms_run_in_turn_in_rotating_order(pair, invented_times):
    run(*pair, BenchmarkSettings(**QUICK))
    arms = ["plain", "static", "open", "routed", "mixed"]
    assert invented_times == arms + arms + [*arms[1:], arms[0]] + [*arms[2:], *arms[:2]]


def test_the_report(pair, invented_times):
    report = json.loads(json.dumps(run(*pair, BenchmarkSettings(**{**QUICK, "batch": (1, 2)}))))
    assert report["skipped"] == [2, 4] and report["blocks"] == BLOCKS
    assert report["settings"]["skip"] == 2
    assert {"cpu", "threads", "device", "dtype", "torch", "transformers"} <= set(report["machine"])
    assert list(report["arms"]["1"]) == ["plain", "static", "open", "routed"]
    assert report["arms"]["2"]["static"]["decode_ms"]["median"] == 80.0
    assert report["arms"]["2"]["static"]["prefill_ms"]["max"] == 160.0
    ratios = report["comparisons"]["2"]
    assert ratios["open/plain"]["decode"]["ratio"] == pytest.approx(1.01)
    assert ratios["share_of_ideal"]["decode"]["ratio"] == pytest.approx(80 / 81)
    assert ratios["routed/static"]["prefill"]["interval"] == [pytest.approx(81 / 80)] * 2
    assert "mixed/open" not in report["comparisons"]["1"]
    assert ratios["mixed/open"]["decode"]["resolved"]


def test_goals_are_met_or_missed(pair, invented_times, monkeypatch):
    goals = run(*pair, BenchmarkSettings(**QUICK))["goals"]
    assert len(goals) == 8 and all(goal["met"] for goal in goals)
    monkeypatch.setitem(MILLISECONDS, "open", 110.0)
    monkeypatch.setitem(MILLISECONDS, "mixed", 111.0)
    met = {goal["goal"]: goal["met"] for goal in run(*pair, BenchmarkSettings(**QUICK))["goals"]}
    assert met["batch 2: decode, open/plain <= 1.02"] is False
    assert met["batch 2: decode, mixed/open < 1"] is False
    assert met["batch 2: prefill, routed/static <= 1.03"] is True


def test_skipped_blocks_hold_no_memory_and_cost_no_flops(pair):
    report = run(*pair, BenchmarkSettings(**QUICK))
    assert report["kv_bytes"]["ratio"] == pytest.approx(4 / 6)
    assert next(goal for goal in report["goals"] if "KV" in goal["goal"])["met"]
    for arm in ("open", "routed"):
        assert report["flops"][arm]["counted"] == report["flops"][arm]["closed_form"]
    assert report["flops"]["routed_share"]["blocks"] == pytest.approx(4 / 6)
    assert report["flops"]["routed_share"]["counted"] < 1
    assert pair[1].backbone.config._attn_implementation == "sdpa"


def test_a_sweep_measures_several_depths(pair, invented_times):
    sweep = run(*pair, BenchmarkSettings(**QUICK, sweep=True))["sweep"]
    assert sweep["executed"] == [6, 5, 4, 2] and sweep["batch"] == 2
    for kind in ("routed", "static"):
        assert [point["median"] for point in sweep[kind]["decode_ms"]] == [50.0] * 4
        assert sweep[kind]["line"]["per_block"] == pytest.approx(0, abs=1e-9)


def test_compiled_decoding_is_measured_beside_eager(pair, invented_times, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **settings: step)
    report = run(*pair, BenchmarkSettings(**{**QUICK, "batch": (1, 2)}, compiled=True))
    assert list(report["arms"]["1"])[-2:] == ["compiled-open", "compiled-routed"]
    assert report["comparisons"]["1"]["compiled-open/open"]["decode"]["ratio"] == pytest.approx(50 / 101)
    assert not any("compiled" in arm for arm in report["arms"]["2"])  # on a CPU that batch decodes eagerly


def test_compiled_decoding_that_would_run_eagerly_is_refused(make_backbone, make_routed):
    with pytest.raises(ConfigError, match="compiled=True: this backbone decodes eagerly"):
        run(make_backbone("mistral"), make_routed("mistral"), BenchmarkSettings(**QUICK, compiled=True))


def test_by_default_a_quarter_of_the_blocks_is_left_out(pair):
    settings = {**QUICK, "skip": None, "repetitions": 2}
    assert len(run(*pair, BenchmarkSettings(**settings))["skipped"]) == 2  # 0.27 * 6


@pytest.mark.parametrize(("change", "words"), [
    ({"skip": 5}, "skip=5: only 4 of this model's 6 blocks"),
    ({"prompt_tokens": 124}, "need 129 positions, but the backbone's context holds 128"),
    ({"new_tokens": 1}, "new_tokens=1"),
    ({"batch": (0,)}, "batch.0=0"),
    ({"repetitions": 1}, "repetitions=1"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(change, words, pair):
    with pytest.raises(ConfigError, match=words):
        run(*pair, BenchmarkSettings(**{**QUICK, **change}))
