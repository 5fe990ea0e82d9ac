"""What a measurement ran on, and the memory that it took, to stand beside its figures."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["machine_facts", "peak_memory"]


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


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most: of the GPU as torch's allocator counts, otherwise resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # not getrusage: Linux lets a new process inherit its parent's peak there
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # of Unix alone

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
