"""What an evaluation was of: adapter, backbone, data, versions, settings: enough to have its figures again.

It is also what an interrupted evaluation must find unchanged before it goes on.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import layerroute
from layerroute.data.load import StepStream
from layerroute.errors import DataError
from layerroute.evaluation.measure import bits
from layerroute.model.adapter import read_config
from layerroute.model.routed import RoutedModel
from layerroute.runtime.machine import machine_facts

__all__ = ["describe", "resumed"]

_SAME = ("adapter", "backbone", "data", "calibration_data", "seed", "settings")
"""What must be equal for an evaluation to go on, where both have it: calibration data comes with baselines."""


def describe(
    model: RoutedModel,
    folder: Path,
    *,
    data: StepStream,
    calibration: StepStream | None,
    seed: int,
    settings: Mapping[str, Any],
    command: str,
) -> dict[str, Any]:
    """provenance.json, JSON-able.

    Args:
        model: the adapter on its backbone.
        folder: the adapter's.
        data: the steps that are evaluated.
        calibration: those that baselines are chosen on, or None.
        seed: of every random choice.
        settings: what else the figures depend on.
        command: how to make them again.
    """
    config = read_config(folder)
    trained_on = config["data"].get("sources", {})
    seen = set(trained_on.values())
    routers = model.routers
    alone = torch.ones(routers.blocks, dtype=torch.bool)
    alone[routers.routable] = (torch.sigmoid(routers.bias.detach().float()) > routers.config.threshold).cpu()
    initial = torch.ones(routers.blocks)
    initial[routers.routable] = torch.sigmoid(routers.initial_logit)
    dtype = next(model.backbone.parameters()).dtype
    return {
        "adapter": {"name": folder.name, "files": config["files"]},
        "backbone": config["backbone"],
        "data": data.digests,
        "calibration_data": calibration.digests if calibration else None,
        "versions": {
            "layerroute": layerroute.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "machine": machine_facts(model.device, dtype),
        "seed": seed,
        "settings": dict(settings),
        "command": command,
        "routers": {
            "routable": model.routable,
            "threshold": routers.config.threshold,
            "bias_route": bits(alone),
            "initial_probs": [round(value, 6) for value in initial.tolist()],
        },
        "training": {
            "data": trained_on,
            "overlap": sorted(spec for spec, digest in data.digests.items() if digest in seen),
            "recipe": config["recipe"],
        },
    }


def resumed(path: Path, provenance: dict[str, Any]) -> dict[str, Any]:
    """Write provenance.json, or read what an earlier run of the same evaluation wrote there.

    Raises:
        DataError: another evaluation lies there, or the file cannot be read.
    """
    if not path.exists():
        path.write_text(json.dumps(provenance, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return provenance
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in _SAME if None not in (found[name], provenance[name])]
        differing = [name for name in differing if found[name] != provenance[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error!r}; give another --output") from None
    if differing:
        name = differing[0]
        raise DataError(
            f"{path.parent} holds another evaluation: its {name} is {json.dumps(found[name])[:200]}, not "
            f"{json.dumps(provenance[name])[:200]}; give another --output"
        )
    if found["calibration_data"] is None:  # baselines are added to what was measured without
        found |= {name: provenance[name] for name in ("calibration_data", "command")}
    return found
