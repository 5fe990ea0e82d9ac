"""The output folder of a run, and whether a run may start or go on in it.

    OUTPUT/                     the adapter folder, written when the run is complete
    OUTPUT/train_log.jsonl      the log
    OUTPUT/checkpoints/run.json what the run is: recipe, data digests, backbone, processes
    OUTPUT/checkpoints/checkpoint-N/    adapter, optimiser, schedule and random states after update N

A checkpoint counts only when its last file is whole, so that a run killed while saving falls back on the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from layerroute.errors import TrainingError

__all__ = ["RunFolder", "last_checkpoint"]

_LAST_FILE = "trainer_state.json"
_NEEDED = ("router_config.json", "optimizer.pt", "scheduler.pt", _LAST_FILE)


def _by_step(checkpoints: Path) -> list[tuple[int, Path]]:
    found = [(path.name.removeprefix("checkpoint-"), path) for path in checkpoints.glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def _complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _LAST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all((checkpoint / name).is_file() for name in _NEEDED)


def last_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint of a `checkpoints` folder, if there is one."""
    complete = [path for _, path in _by_step(checkpoints) if _complete(path)]
    return complete[-1] if complete else None


class RunFolder:
    """The output folder of one run."""

    def __init__(self, output: str | os.PathLike[str]) -> None:
        self.path = Path(output)
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / "train_log.jsonl"

    def check(self, resume: bool) -> Path | None:
        """Return the checkpoint to go on from, or None for a new run; touches nothing.

        Raises:
            TrainingError: a new run would overwrite an adapter or an interrupted run, or there is nothing to resume.
        """
        adapter = (self.path / "router_config.json").is_file()
        checkpoint = last_checkpoint(self.checkpoints)
        if self.path.exists() and not self.path.is_dir():
            raise TrainingError(f"output {self.path} is a file; give a folder")
        if resume and adapter:
            raise TrainingError(f"output {self.path} already holds the finished adapter; there is nothing to resume")
        if resume and checkpoint is None:
            raise TrainingError(f"output {self.path} holds no complete checkpoint; start without --resume")
        if not resume and adapter:
            raise TrainingError(f"output {self.path} already holds an adapter; give another output, or delete it")
        if not resume and checkpoint is not None:
            raise TrainingError(
                f"output {self.path} holds an interrupted run ({checkpoint.name}); add --resume to continue it, or "
                "give another output"
            )
        return checkpoint

    def open(self, description: Mapping[str, Any], checkpoint: Path | None) -> None:
        """Record what the run is; on resume, make sure that it is still the same and drop unfinished checkpoints.

        Args:
            description: JSON-able, nested by section.
            checkpoint: what `check` returned.

        Raises:
            TrainingError: the resumed run differs (the first differing key is named), or the folder cannot be written.
        """
        record = self.checkpoints / "run.json"
        try:
            if checkpoint is not None:
                before = {"processes": 1} | json.loads(record.read_text(encoding="utf-8"))  # once it was not recorded
                _same(before, json.loads(json.dumps(description)), self.path)
            elif self.checkpoints.exists() and not record.is_file():
                raise TrainingError(f"{self.checkpoints} exists but is of no LayerRoute run; give another output")
            else:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                record.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            for _, path in _by_step(self.checkpoints):
                if not _complete(path):
                    shutil.rmtree(path)
        except (OSError, ValueError) as error:
            raise TrainingError(f"output {self.path} cannot be used: {error}") from error


def _same(before: Mapping[str, Any], now: Mapping[str, Any], output: Path) -> None:
    old, new = dict(_flat(before, "")), dict(_flat(now, ""))
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) != new.get(key):
            raise TrainingError(
                f"output {output} was started with {key}={old.get(key)!r}, not {new.get(key)!r}; resume with what it "
                "was started with, or give another output"
            )


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
