"""Trackers that are down: the run goes on, says so once, and loses nothing of its own log."""

from __future__ import annotations

import json

import pytest
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from layerroute.errors import ConfigError
from layerroute.training.callbacks import LogFile
from layerroute.training.run import train
from layerroute.training.trackers import Trackers


class Unreachable(TrainerCallback):
    """A tracker that connects when it is made, as if without a network."""

    def __init__(self) -> None:
        self.connect("made")

    def connect(self, when: str) -> None:
        if when == "made":
            raise ConnectionError("no route\nto host")


class DownAtSetUp(Unreachable):
    def connect(self, when: str) -> None:
        if when == "set up":
            raise RuntimeError("no route\nto host")

    def on_train_begin(self, args, state, control, **kwargs):
        self.connect("set up")


class DownWhileLogging(DownAtSetUp):
    def connect(self, when: str) -> None:
        if when == "logging":
            raise TimeoutError("no route\nto host")

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs.clear()
        self.connect("logging")


class Up(TrainerCallback):
    seen: list[int]

    def on_train_begin(self, args, state, control, **kwargs):
        type(self).seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(state.global_step)


@pytest.fixture
def register(monkeypatch):
    """Makes a tracker known to transformers under a name."""
    return lambda name, tracker: monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, tracker)


@pytest.mark.parametrize("tracker", [Unreachable, DownAtSetUp, DownWhileLogging])
def test_a_tracker_that_is_down(make_trainer, fast_recipe, register, tmp_path, caplog, tracker):
    register("down", tracker)
    register("up", Up)
    log = tmp_path / "log.jsonl"
    make_trainer(fast_recipe(steps=3), callbacks=[Trackers(["down", "up"]), LogFile(log)]).train()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "cross_entropy" in line] == [1, 2, 3]
    assert Up.seen == [1, 2, 3, 3]  # and the end
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "layerroute.training.trackers"]
    assert warning.startswith("tracker down is down, the run goes on without it: ")
    assert warning.endswith("Error: no route to host")


def test_trackers_that_are_not_there_are_refused(fast_recipe, tmp_path):
    missing = next(name for name in INTEGRATION_TO_CALLBACK if name not in get_available_reporting_integrations())
    for name, reason in (("nonsense", "nonsense is not supported, only "), (missing, f"{missing} is not installed")):
        with pytest.raises(ConfigError, match=rf"training\.report_to: {reason}"):
            train("none", [], fast_recipe(report_to=f"[{name}]"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
