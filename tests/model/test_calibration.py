"""The dial: the table is met on other rows, its ends are exact, and it serves no routers but its own."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerroute import RoutedModel
from layerroute.data.steps import digest
from layerroute.errors import AdapterError, ConfigError
from layerroute.model.calibration import calibrate, read_calibration, routers_digest, skip_rate, write_calibration

BLOCKS, ROUTABLE = 30, 27
SHIFT = {"tool_call": -1.0, "planning": 1.5, "answer": 0.0}


def draw(rows: int, seed: int, kinds: tuple[str, ...] = tuple(SHIFT)):
    """Gates whose probabilities depend on block, row and step type: float32 `[rows, ROUTABLE]` and the types."""
    generator = torch.Generator().manual_seed(seed)
    types = [kinds[i % len(kinds)] for i in range(rows)]
    shift = torch.tensor([[SHIFT[kind]] for kind in types])
    noise = torch.randn(rows, ROUTABLE, generator=generator) + torch.randn(rows, 1, generator=generator)
    return torch.sigmoid(torch.linspace(-2, 2, ROUTABLE) + shift + noise), types


def make(probs, types, blocks=BLOCKS, routers="00"):
    return calibrate(probs, types, blocks, routers=routers, data={"drawn": "ff"})


@pytest.mark.parametrize("budget", [0.0, 0.05, 0.123, 0.3, 0.55, 0.899, 0.9])
def test_a_budget_is_met_on_other_rows_of_the_same_kind(budget):
    table = make(*draw(1500, seed=0))
    probs, types = draw(1500, seed=1)
    assert skip_rate(probs, table.threshold(budget), BLOCKS) == pytest.approx(budget, abs=0.03)
    for kind in SHIFT:
        rows = probs[torch.tensor([name == kind for name in types])]
        assert skip_rate(rows, table.threshold({kind: budget}), BLOCKS) == pytest.approx(budget, abs=0.03)


def test_the_table_is_exact_on_its_own_rows():
    probs, types = draw(101, seed=2)
    table = make(probs, types)
    assert table.budgets[:3] == (0.0, 0.01, 0.02) and table.budgets[-2:] == (0.89, ROUTABLE / BLOCKS)
    assert table.rows == {"all": 101, "tool_call": 34, "planning": 34, "answer": 33}
    for budget in table.budgets:
        reached = skip_rate(probs, table.threshold(budget), BLOCKS)
        assert abs(reached - budget) <= 0.5 / (len(probs) * BLOCKS) + 1e-9


def test_more_budget_never_skips_less():
    table = make(*draw(50, seed=3))
    probs, _ = draw(50, seed=4)
    rates = [skip_rate(probs, table.threshold(budget / 1000), BLOCKS) for budget in range(901)]
    assert rates == sorted(rates)


def test_the_ends_are_exact_for_any_gate():
    """A sigmoid that underflows to 0 or rounds to 1 is a gate like any other."""
    table = make(*draw(50, seed=5))
    extreme = torch.sigmoid(torch.tensor([[-200.0, -90.0, 0.0, 40.0, 200.0]]))
    assert extreme[0, 0] == 0 and extreme[0, -1] == 1
    assert skip_rate(extreme, table.threshold(0), 5) == 0
    assert skip_rate(extreme, table.threshold(0.9), 5) == 1


def test_equal_probabilities_close_together_at_the_nearer_side():
    """Blocks that every row closes alike leave 0, 2/5 or 3/5 to choose from."""
    probs = torch.tensor([[0.2, 0.2, 0.9]] * 4)
    table = make(probs, ["answer"] * 4, blocks=5)
    reached = [skip_rate(probs, table.threshold(budget), 5) for budget in (0.0, 0.15, 0.25, 0.45, 0.55, 0.6)]
    assert reached == pytest.approx([0, 0, 0.4, 0.4, 0.6, 0.6])


def test_neighbouring_floats_are_told_apart():
    low = torch.tensor(0.7)
    high = torch.nextafter(low, torch.tensor(1.0))
    probs = torch.stack([low, high]).expand(3, 2)
    assert skip_rate(probs, make(probs, ["answer"] * 3, blocks=4).threshold(0.25), 4) == 0.25


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("lots", r"skip_budget='lots': expected a share of all blocks from 0 to 0\.9"),
        (True, "skip_budget=True: expected a share"),
        (None, "skip_budget=None: expected a share"),
        (-0.1, r"skip_budget=-0\.1: expected a share"),
        (1.5, r"skip_budget=1\.5: expected a share"),
        (float("nan"), "skip_budget=nan: expected a share"),
        (0.95, r"skip_budget=0\.95: the blocks that this adapter can close are at most 0\.9 of all"),
        ({"answer": 0.95}, r"skip_budget=\{'answer': 0\.95\}: the blocks .* at most 0\.9"),
        ({"answer": "x"}, r"skip_budget=\{'answer': 'x'\}: expected a share"),
        ({"tool_cal": 0.3}, r"unknown step type 'tool_cal' \(did you mean 'tool_call'\?\); measured: planning, answer"),
        ({"all": 0.3}, "unknown step type 'all'"),
        ({"tool_call": 0.3}, "calibrated without a tool_call step; measured: planning, answer; run `layerroute calib"),
        ({"planning": 0.1, "answer": 0.2}, "one threshold serves one step type"),
        ({}, "one threshold serves one step type"),
    ],
)
def test_a_budget_that_cannot_be_served_is_refused(budget, message):
    table = make(*draw(20, seed=6, kinds=("planning", "answer")))
    with pytest.raises(ConfigError, match=message):
        table.threshold(budget)


def test_the_most_that_is_said_is_served():
    table = make(torch.tensor([[0.2, 0.4]]), ["answer"], blocks=3)
    with pytest.raises(ConfigError, match=r"at most 0\.6666 of all"):
        table.threshold(0.6667)
    table.threshold(0.6666)


@pytest.fixture
def calibrated(make_routed, tmp_path):
    """A saved model, calibrated on drawn gates for its 4 blocks, and its folder."""
    model, folder = make_routed(), tmp_path / "adapter"
    model.save_pretrained(folder)
    probs, types = draw(30, seed=7)
    model.calibration = make(probs[:, :2].contiguous(), types, blocks=4, routers=routers_digest(folder))
    return model, folder


def test_round_trip_is_exact(calibrated, make_backbone):
    model, folder = calibrated
    assert read_calibration(folder) is None
    path = write_calibration(folder, model.calibration)
    assert path == folder / "calibration.json"
    assert read_calibration(folder) == model.calibration
    assert RoutedModel.from_pretrained(folder, make_backbone()).calibration == model.calibration


def test_saving_keeps_the_calibration_of_the_same_routers(calibrated, make_backbone, tmp_path):
    model, folder = calibrated
    model.save_pretrained(folder)
    RoutedModel.from_pretrained(folder, make_backbone()).save_pretrained(tmp_path / "copy")
    assert read_calibration(tmp_path / "copy") == model.calibration


def test_saving_other_routers_drops_the_calibration(calibrated):
    model, folder = calibrated
    model.save_pretrained(folder)
    with torch.no_grad():
        model.routers.bias.add_(1)
    model.save_pretrained(folder)
    assert not (folder / "calibration.json").exists()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_calibration_of_other_routers_is_refused(calibrated, make_backbone):
    model, folder = calibrated
    write_calibration(folder, model.calibration)
    state = load_file(folder / "router_model.safetensors")
    save_file({**state, "bias": state["bias"] + 1}, folder / "router_model.safetensors")
    config = json.loads((folder / "router_config.json").read_text())
    config["files"]["router_model.safetensors"] = digest(folder / "router_model.safetensors")
    (folder / "router_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"belongs to other routers .* run `layerroute calibrate` again"):
        RoutedModel.from_pretrained(folder, make_backbone())


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2],
    lambda text: "[]",
    lambda text: text.replace('"budgets"', '"budget"'),
    lambda text: text.replace('"all"', '"al"'),
    lambda text: text.replace("0.01,", "0.5,"),
    lambda text: text.replace("0.01,", ""),
    lambda text: text.replace("0.01,", "NaN,"),
], ids=["truncated", "list", "key", "curve", "order", "length", "nan"])  # fmt: skip
def test_a_damaged_file_is_named(damage, calibrated):
    model, folder = calibrated
    path = write_calibration(folder, model.calibration)
    path.write_text(damage(path.read_text()))
    with pytest.raises(AdapterError, match=r"calibration\.json cannot be read: .*run `layerroute calibrate` again"):
        read_calibration(folder)


def test_a_failed_write_leaves_the_old_file(calibrated, tmp_path, monkeypatch):
    model, folder = calibrated
    before = write_calibration(folder, model.calibration).read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(AdapterError, match=r"could not write .*no space left"):
        write_calibration(folder, make(*draw(10, seed=8)))
    assert (folder / "calibration.json").read_bytes() == before
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="could not write"):
        write_calibration(tmp_path / "file", model.calibration)
