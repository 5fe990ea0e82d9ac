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
from layerroute.data.sources import CONVERTERS
from layerroute.errors import DataError
from layerroute.evaluation.measure import bits
from layerroute.evaluation.samples import write_json
from layerroute.model.adapter import read_config
from layerroute.model.routed import RoutedModel
from layerroute.runtime.machine import machine_facts

__all__ = ["describe", "resumed", "trained_on"]

_SAME = ("adapter", "backbone", "data", "calibration_data", "seed", "settings", "versions")
"""What must be equal for an evaluation to go on, where both have it: calibration data comes with baselines."""
_THEN = " && "
"""Between the commands of an evaluation that was added to."""


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
    sources = config["data"].get("sources", {})
    training_seed = config["recipe"].get("training", {}).get("seed")
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
            "data": sources,
            "overlap": trained_on(data.digests, seed, sources, training_seed),
            "recipe": config["recipe"],
        },
    }


def trained_on(data: Mapping[str, str], seed: int, sources: Mapping[str, str], training_seed: int | None) -> list[str]:
    """The evaluated specs that an adapter was trained on, or most likely was.

    That is data of the same digest; and, as a part, a longer version or a repacked file has another digest: a file of
    the same name, whatever its folder and with or without `.gz`, a hub dataset of the same name, and `builtin` by the
    same seed, whatever its count.

    Args:
        data: spec to digest of what is evaluated.
        seed: that it was opened with.
        sources: spec to digest of what the adapter was trained on.
        training_seed: that this was opened with; None where the adapter does not say.
    """
    digests, names = set(sources.values()), {_name(spec, training_seed) for spec in sources}
    return sorted(spec for spec, digest in data.items() if digest in digests or _name(spec, seed) in names)


def _name(spec: str, seed: int | None) -> str:
    """What stays the same about a source when its size or its place changes."""
    form, _, rest = spec.partition(":")
    if form == "builtin":
        return f"builtin, seed {seed}"
    return Path(rest if rest and form in CONVERTERS else spec).name.removesuffix(".gz")


def resumed(path: Path, provenance: dict[str, Any]) -> dict[str, Any]:
    """Write provenance.json, or read what an earlier run of the same evaluation wrote there.

    Raises:
        DataError: another evaluation lies there, or the file cannot be read or written.
    """
    if not path.exists():
        write_json(path, provenance)
        return provenance
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in _SAME if None not in (found[name], provenance[name])]
        differing = [name for name in differing if found[name] != provenance[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error!r}; give another --output") from None
    if differing:
        raise DataError(f"{path.parent} holds another evaluation: {_unlike(differing[0], found, provenance)}")
    if provenance["calibration_data"] is not None:  # baselines or generations are added to what was measured before
        found["calibration_data"] = provenance["calibration_data"]
        if provenance["command"] not in (before := found["command"].split(_THEN)):
            found["command"] = _THEN.join([*before, provenance["command"]])
    return found


def _unlike(name: str, found: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    if name != "versions":
        values = (json.dumps(part[name])[:200] for part in (found, provenance))
        return f"its {name} is {', not '.join(values)}; give another --output"
    then, now = found[name], provenance[name]
    changed = [part for part in now if then.get(part) != now[part]]
    return (
        f"its versions are {', '.join(f'{part} {then.get(part)}' for part in changed)}, not "
        f"{', '.join(f'{part} {now[part]}' for part in changed)}; give another --output, or use those versions"
    )
