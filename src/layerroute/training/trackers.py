"""Trackers of experiments beside a run: one that is down costs its own record, never the training or its log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partialmethod
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from layerroute.errors import ConfigError

__all__ = ["Trackers"]

_LOG = logging.getLogger(__name__)


class Trackers(TrainerCallback):
    """Passes every event on to the trackers' own callbacks; one that fails is named in a warning and left out.

    Args:
        names: as transformers' Trainer knows them (`tensorboard`, `wandb`, ...).

    Raises:
        ConfigError: a tracker that is unknown or not installed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.running: dict[str, TrainerCallback] = {}
        """The callbacks that have not failed, by the tracker's name."""
        for name in names:
            callback = _start(name)
            if callback is not None:
                self.running[name] = callback

    def _pass_on(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        for name, callback in list(self.running.items()):
            try:
                control = getattr(callback, event)(args, state, control, **kwargs) or control
            except Exception as error:
                del self.running[name]
                _warn(name, error)
        return control


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(Trackers, _event, partialmethod(Trackers._pass_on, _event))


def _start(name: str) -> TrainerCallback | None:
    """The tracker's callback, or None if it is down."""
    try:
        (make,) = get_reporting_integration_callbacks([name])
    except ValueError as error:
        raise ConfigError(f"training.report_to: {error}") from None
    try:
        callback: TrainerCallback = make()
    except Exception as error:  # whatever a tracker raises, it is no reason to stop
        missing = isinstance(error, (ImportError, RuntimeError))  # what transformers raises if it is not installed
        if missing and name not in get_available_reporting_integrations():
            raise ConfigError(f"training.report_to: {name} is not installed ({error})") from None
        _warn(name, error)
        return None
    return callback


def _warn(name: str, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    _LOG.warning("tracker %s is down, the run goes on without it: %s", name, reason)
