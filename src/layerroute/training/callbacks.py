"""What happens beside the training loop: a progress bar, the log file, and stopping on a signal."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layerroute.training.processes import any_process

__all__ = ["BeforeEvaluation", "LogFile", "LogLines", "ProgressBar", "StopOnSignal"]

_LOG = logging.getLogger(__name__)

_SHOWN = ("cross_entropy", "skip_rate_tool_call", "skip_rate_planning")


class ProgressBar(ProgressCallback):
    """transformers' bar, with the last logged figures on it instead of printed to stdout."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show cross-entropy and skip rates beside the bar."""
        bar: Any = self.training_bar
        shown = {name: f"{value:.3f}" for name, value in (logs or {}).items() if name in _SHOWN}
        if bar is not None and shown:
            bar.set_postfix(shown)


class LogFile(TrainerCallback):
    """Every log event as one JSON object per line, in the order of steps; a resumed run continues the same curve."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the checkpoint's history, which drops lines logged after it by a run that was killed."""
        if state.is_world_process_zero:
            self.path.write_text("".join(_line(event) for event in state.log_history), encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append the event."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))


def _line(event: dict[str, Any]) -> str:
    # "epoch" is the Trainer's name for the share of the sampler used, which here spans the whole run
    return json.dumps({"step": event["step"]} | {key: event[key] for key in event if key != "epoch"}) + "\n"


class LogLines(TrainerCallback):
    """The figures of the bar as log messages, for where no bar can be drawn."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log one line per training line of the log."""
        event = state.log_history[-1]
        if state.is_world_process_zero and "loss" in event:
            shown = ", ".join(f"{name} {event[name]:.3f}" for name in _SHOWN if name in event)
            _LOG.info("update %d of %d: %s", event["step"], state.max_steps, shown)


class BeforeEvaluation(TrainerCallback):
    """Calls something after the last update, and after any other that an evaluation follows."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Call it if this update is one of those."""
        every = int(args.eval_steps or 0) if args.eval_strategy == "steps" else 0
        evaluated = every and state.global_step % every == 0
        if evaluated or state.global_step == state.max_steps:
            self.call()


class StopOnSignal(TrainerCallback):
    """Ends the run after the current update, with a checkpoint, on Ctrl-C or SIGTERM; a second one ends it at once.

    A signal to one of several processes ends all of them, after the same update. A context manager: the signals' former
    handlers come back on leaving. Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._on_signal)
        except ValueError:
            self._former.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask the trainer to save and stop if a signal came, to this process or another."""
        self.requested = any_process(self.requested)
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
        return control
