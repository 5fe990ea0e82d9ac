"""What a measurement ran on, to stand beside its figures."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["machine_facts"]


def machine_facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """JSON-able facts: processor, threads, device, versions, and the dtype of the weights."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
