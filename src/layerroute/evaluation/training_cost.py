"""What training a recipe costs beside plain PEFT LoRA: time and peak memory of updates on the same rows.

Contract: each arm lives in a process of its own, so that its peak memory is its own; they take turns update by update,
on the same micro-batches, so that a slow minute slows both. The search of routes and the fit of routers, which a run
does once, are timed apart. Boundary: how an update is made is `training_arms.py`'s; prints nothing.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from layerroute.errors import ConfigError, LayerRouteError, TrainingError
from layerroute.evaluation.training_arms import ARMS, Arm, MicroBatches, planned_updates
from layerroute.runtime.machine import machine_facts, peak_memory
from layerroute.runtime.timing import Goal, Ratio, Spread
from layerroute.training.recipe import Recipe
from layerroute.training.run import load_parts

__all__ = ["Measured", "Update", "measure_training", "summarise"]

_GOALS = (Goal("update time, routed/lora", "<=", 1.10), Goal("share of padding", "<", 0.10))

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """One optimiser update of an arm."""

    seconds: float
    tokens: int
    """Attended tokens, prompt and target."""
    padding: int
    """Positions that hold no token."""
    loss: float


@dataclass(frozen=True)
class Measured:
    """What was measured of an arm."""

    once_s: float
    """What a run does once."""
    updates: list[Update]
    peak_bytes: int


def measure_training(
    model: str, data: Sequence[str], recipe: Recipe, updates: int, threads: int | None = None
) -> dict[str, Any]:
    """Measure both arms on the first micro-batches of the recipe's plan.

    Args:
        model: anything `load_backbone` takes.
        data: anything `load_steps` takes.
        recipe: every setting; `training.steps` tells over how many updates the search and the fit spread.
        updates: measured, after one that warms up; two at least.
        threads: of each process on the CPU; None leaves torch's own number.

    Returns:
        JSON-able: see docs/training.md.

    Raises:
        ConfigError: the recipe's run is too short, or ends at a depth that is not known beforehand.
        TrainingError: a measuring process was lost, or there is no row to train on.
        DataError, BackboneError: as `train`.
    """
    if not 2 <= updates < recipe.training.updates:
        raise ConfigError(
            f"updates={updates}: of this recipe's {recipe.training.updates} updates, from 2 to "
            f"{recipe.training.updates - 1} can be measured, for one warms up"
        )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers, once = {}, {}
        for arm in ARMS:  # the next one loads when this one is ready
            workers[arm] = _Worker(arm, model, list(data), recipe, updates + 1, threads, Path(folder))
            stack.callback(workers[arm].end)
            once[arm] = workers[arm].receive()
            _LOG.info("%s: ready, %.1f s for what a run does once", arm, once[arm])
        taken = _take_turns(workers, updates)
        lasts = {arm: worker.next() for arm, worker in workers.items()}
    measured = {arm: Measured(once[arm], taken[arm], last["peak_bytes"]) for arm, last in lasts.items()}
    return {"machine": lasts["lora"]["machine"], **summarise(measured, recipe)}


def _take_turns(workers: Mapping[str, _Worker], updates: int) -> dict[str, list[Update]]:
    taken: dict[str, list[Update]] = {arm: [] for arm in workers}
    for number in range(updates + 1):
        for arm in list(workers) if number % 2 else reversed(list(workers)):
            update = workers[arm].next()
            if number:  # the first warms up
                taken[arm].append(update)
        _LOG.info("update %d of %d done", number, updates) if number else _LOG.info("warmed up")
    return taken


def summarise(measured: Mapping[str, Measured], recipe: Recipe) -> dict[str, Any]:
    """The report of both arms, JSON-able; `ratio` follows `Ratio.as_dict`."""
    lora, routed = measured["lora"], measured["routed"]
    seconds = {arm: [update.seconds for update in of_arm.updates] for arm, of_arm in measured.items()}
    tokens = sum(update.tokens for update in lora.updates)
    padding = sum(update.padding for update in lora.updates)
    assert all(
        (ours.tokens, ours.padding) == (theirs.tokens, theirs.padding)
        for ours, theirs in zip(lora.updates, routed.updates, strict=True)
    ), "both arms were to see the same rows"
    ratio = Ratio.of(seconds["routed"], seconds["lora"])
    share = padding / (padding + tokens)
    run_updates = recipe.training.updates
    whole_run = {arm: sum(seconds[arm]) / len(seconds[arm]) * run_updates + measured[arm].once_s for arm in measured}
    intervals = (ratio.interval, (share, share))
    return {
        "updates": len(lora.updates),
        "run_updates": run_updates,
        "gradient_accumulation": recipe.training.gradient_accumulation,
        "batch_size": recipe.training.batch_size,
        "tokens": tokens,
        "padding": share,
        "arms": {
            arm: {
                "tokens_per_second": tokens / sum(seconds[arm]),
                "seconds": asdict(Spread.of(seconds[arm])),
                "once_s": of_arm.once_s,
                "peak_bytes": of_arm.peak_bytes,
                "losses": [update.loss for update in of_arm.updates],
            }
            for arm, of_arm in measured.items()
        },
        "ratio": ratio.as_dict(),
        "run_ratio": whole_run["routed"] / whole_run["lora"],
        "memory_ratio": routed.peak_bytes / lora.peak_bytes,
        "goals": [
            {"goal": str(goal), "interval": list(interval), "met": goal.met(interval)}
            for goal, interval in zip(_GOALS, intervals, strict=True)
        ],
    }


class _Worker:
    """An arm in a process of its own: it gets ready at once, and goes on by one answer whenever it is asked."""

    def __init__(self, arm: str, *given: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.arm = arm
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, arm, *given), daemon=True)
        with _ignored_interrupts():  # Ctrl-C is for the process that asks, which then ends this one
            self.process.start()
        theirs.close()  # so that its end is seen here

    def next(self) -> Any:
        """The next answer."""
        try:
            self.pipe.send(None)
        except BrokenPipeError:
            raise self._lost() from None
        return self.receive()

    def receive(self) -> Any:
        """An answer that is on its way."""
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise self._lost() from None
        if isinstance(answer, LayerRouteError):
            raise answer
        return answer

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()

    def _lost(self) -> TrainingError:
        self.process.join()
        return TrainingError(
            f"the process that measures {self.arm!r} ended with status {self.process.exitcode}; is there memory for "
            f"{len(ARMS)} trainings at once?"
        )


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Within this context Ctrl-C does nothing; a process that is started in it ignores Ctrl-C for good."""
    if threading.current_thread() is not threading.main_thread():  # where Python lets no signal be set
        yield
        return
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _work(pipe: Connection, arm: str, *given: Any) -> None:
    """What a measuring process does: it gives answers, each when the one before has been taken."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)  # PEFT's own
    try:
        for answer in _answers(arm, *given):
            pipe.send(answer)
            pipe.recv()
    except LayerRouteError as error:
        pipe.send(error)


def _answers(
    name: str, model: str, data: list[str], recipe: Recipe, updates: int, threads: int | None, checkpoints: Path
) -> Iterator[Any]:
    """Seconds of what is done once, then an `Update` each time, then peak memory and the machine's facts."""
    torch.set_num_threads(torch.get_num_threads() if threads is None else threads)  # pinned, either way
    parts = load_parts(model, data, recipe)
    dtype = parts.backbone.dtype
    batches = list(islice(planned_updates(parts, recipe), updates))
    arm = ARMS[name](parts, recipe, checkpoints)
    yield arm.once(batches[0])
    for of_update in batches:
        yield _timed(arm, of_update)
    yield {"peak_bytes": peak_memory(arm.device), "machine": machine_facts(arm.device, dtype)}


def _timed(arm: Arm, batches: MicroBatches) -> Update:
    started = time.perf_counter()
    loss = arm.update(batches)  # reads the loss, and so waits for the device
    seconds = time.perf_counter() - started
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    positions = sum(batch["attention_mask"].numel() for batch in batches)
    return Update(seconds, tokens, positions - tokens, loss)
