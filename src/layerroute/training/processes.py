"""Several processes, one run (torchrun, accelerate launch): who speaks, what all agree on, and when one is lost.

Boundary: knows nothing of models; what the processes share of the arithmetic is accelerate's.
"""

from __future__ import annotations

import atexit
import gc
import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce

from layerroute.errors import ConfigError, LayerRouteError

__all__ = ["any_process", "check_launch", "is_first_process", "part_at_exit", "process_count", "process_lost"]


def is_first_process() -> bool:
    """Whether this is the process that writes and prints; known before the processes have met."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """How many processes the launcher started; known before they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch() -> None:
    """Refuse a launcher's configuration under which training would hang or go wrong.

    Raises:
        ConfigError: FSDP or DeepSpeed is asked for.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ConfigError(
                f"ACCELERATE_USE_{name}: the processes would share out each block's weights, but they run different "
                "blocks and would wait for one another for ever; launch without it (docs/training.md, Many processes)"
            )


def part_at_exit() -> None:
    """Close the process group when the interpreter ends: its threads, if they outlive it, may abort the process."""
    if process_count() > 1:
        atexit.register(_part)


def _part() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # the trainer and its model, which end in a cycle, hold the group and with it its threads


def any_process(flag: bool) -> bool:
    """Whether it is set in any process; all of them must ask."""
    state: Any = PartialState()
    if state.num_processes == 1:
        return flag
    return bool(reduce(torch.tensor(float(flag), device=state.device), reduction="sum") > 0)


def process_lost(error: BaseException) -> bool:
    """Whether an error says that another process can no longer be reached."""
    if isinstance(error, LayerRouteError):
        return False
    # gloo's errors are plain RuntimeErrors that name its source files
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
