"""The adapter folder: what training leaves behind, and everything that inference needs beside the backbone.

    adapter_config.json, adapter_model.safetensors    LoRA, as PEFT writes it: plain PEFT can load it too
    router_model.safetensors                          `weight` [routable, width] and `bias` [routable], float32
    router_config.json                                format version, settings, backbone name and fingerprint, recipe,
                                                      data digests, and the SHA-256 of the files above
    calibration.json                                  where it was measured: thresholds by skip budget
    README.md                                         a model card

Every file is written beside the folder first and renamed into it last, `router_config.json` at the very end, so that a
failed save leaves the old adapter whole. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import layerroute
from layerroute.config import RouterConfig, nearest
from layerroute.data.steps import digest
from layerroute.errors import AdapterError, ConfigError
from layerroute.model.backbone import load_model
from layerroute.model.calibration import CALIBRATION_FILE, routers_digest
from layerroute.model.card import model_card
from layerroute.model.router import Routers
from layerroute.model.structure import find_structure

if TYPE_CHECKING:
    from layerroute.model.routed import RoutedModel

__all__ = ["BUILTIN", "find_adapter", "fingerprint", "load", "read_config", "save"]

FORMAT_VERSION = 1
BUILTIN = Path(layerroute.__file__).parent / "adapters"
"""Adapters that ship with the package, one folder each."""

_CONFIG = "router_config.json"
_HASHED = ("adapter_config.json", "adapter_model.safetensors", "router_model.safetensors")


def fingerprint(backbone: nn.Module) -> str:
    """Return a digest of the backbone's weights: 16 hex digits.

    Up to 256 evenly spaced values of every parameter, rounded to bfloat16 so that a float32 and a bfloat16 load of the
    same checkpoint agree, with the parameter's shape. LoRA parameters and names are left out, so that the digest is
    the same with and without adapters attached.
    """
    hasher = hashlib.sha256()
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            continue
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)][:256].to(torch.bfloat16).cpu()
        hasher.update(str(tuple(parameter.shape)).encode())
        hasher.update(sample.view(torch.int16).numpy().tobytes())
    return hasher.hexdigest()[:16]


def find_adapter(name: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter given as a built-in name or as a path; `./NAME` always means the folder.

    Raises:
        AdapterError: there is no such folder and no such built-in adapter.
    """
    known = sorted(path.name for path in BUILTIN.iterdir() if path.is_dir()) if BUILTIN.is_dir() else []
    if str(name) in known:
        return BUILTIN / str(name)
    folder = Path(name)
    if folder.is_dir():
        return folder
    raise AdapterError(
        f"adapter {str(name)!r} is neither a folder nor a built-in adapter{nearest(str(name), known)}; "
        f"built in: {', '.join(known) or 'none'}"
    )


def save(
    model: RoutedModel, directory: str | os.PathLike[str], recipe: Mapping[str, Any], data: Mapping[str, Any]
) -> None:
    """Write `model`'s routers and LoRA to `directory`; what stood there survives if anything fails.

    A calibration is written where it was measured on these very routers, and one of other routers does not stay.

    Raises:
        AdapterError: the folder cannot be written (a full disk, no permission).
    """
    target = Path(directory)
    staging: Path | None = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
        model.peft_model.save_pretrained(str(staging), save_embedding_layers=False)
        state = {name: tensor.detach().contiguous().cpu() for name, tensor in model.routers.state_dict().items()}
        save_file(state, staging / "router_model.safetensors")
        config = _describe(model, staging, recipe, data)
        names = [*_HASHED, _CONFIG]
        if (target / _CONFIG).exists() or not (target / "README.md").exists():  # never over a README that is not ours
            (staging / "README.md").write_text(model_card(config), encoding="utf-8")
            names.insert(0, "README.md")
        (staging / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if _stage_calibration(model, staging):
            names.insert(0, CALIBRATION_FILE)
        for name in names:
            _flush(staging / name)
        for name in names:
            os.replace(staging / name, target / name)
        if CALIBRATION_FILE not in names:
            (target / CALIBRATION_FILE).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"could not save the adapter to {target}: {error}; what stood there stays") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _stage_calibration(model: RoutedModel, staging: Path) -> bool:
    """Write the model's calibration if it was measured on the routers that are saved; return whether it was."""
    calibration = model.calibration
    if calibration is None or calibration.routers != routers_digest(staging):
        return False
    (staging / CALIBRATION_FILE).write_text(calibration.to_json(), encoding="utf-8")
    return True


def _describe(model: RoutedModel, staging: Path, recipe: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "layerroute_version": layerroute.__version__,
        "backbone": {
            "name": backbone_name(model.backbone),
            "fingerprint": fingerprint(model.backbone),
            "model_type": model.config.model_type,
            "blocks": model.routers.blocks,
            "parameters": sum(p.numel() for name, p in model.backbone.named_parameters() if "lora_" not in name),
        },
        "router": model.router_config.model_dump(mode="json"),
        "recipe": dict(recipe),
        "data": dict(data),
        "files": {name: digest(staging / name) for name in _HASHED},
    }


def backbone_name(backbone: PreTrainedModel) -> str:
    """Return the name under which `backbone` was loaded."""
    return str(getattr(backbone, "name_or_path", "") or backbone.config.name_or_path or "unnamed")


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check an adapter folder's `router_config.json` and the digests in it; loads no weights.

    Raises:
        AdapterError: a file is missing, unreadable, of another format version, or not the one that was saved.
    """
    missing = [name for name in (_CONFIG, *_HASHED) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"{folder} is not a complete adapter folder: {', '.join(missing)} missing")
    try:
        config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        version = config["format_version"]
        missing = [
            key for key in ("backbone", "router", "recipe", "data", "files") if not isinstance(config[key], dict)
        ]
        if missing:
            raise KeyError(missing[0])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise AdapterError(f"{folder / _CONFIG} cannot be read: {error!r}; save the adapter again") from None
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{folder} has adapter format {version!r}, but this version of layerroute reads format {FORMAT_VERSION}"
        )
    for name in _HASHED:
        if config.get("files", {}).get(name) != digest(folder / name):
            raise AdapterError(f"{folder / name} is truncated or was changed: its SHA-256 is not the one saved with it")
    return config


def load(folder: Path, backbone: PreTrainedModel | None, is_trainable: bool) -> tuple[PeftModel, Routers]:
    """Load LoRA and routers from `folder` onto `backbone`, or onto the backbone that the folder names.

    Raises:
        AdapterError: see `read_config`; or the backbone is not the one the adapter was trained on.
    """
    config = read_config(folder)
    saved = config["backbone"]
    if backbone is None:
        backbone = load_model(saved["name"])
    structure = find_structure(backbone)
    structure.require_unrouted()
    found = fingerprint(backbone)
    if found != saved["fingerprint"]:
        raise AdapterError(
            f"{folder} was trained on backbone {saved['name']!r} (fingerprint {saved['fingerprint']}), not on "
            f"{backbone_name(backbone)!r} (fingerprint {found}); load that backbone, or train an adapter for this one"
        )
    try:
        router_config = RouterConfig(**config["router"])
        routers = Routers(router_config, int(backbone.config.get_text_config().hidden_size), len(structure.blocks))
        routers.load_state_dict(load_file(folder / "router_model.safetensors"))
        peft_model = PeftModel.from_pretrained(backbone, str(folder), is_trainable=is_trainable)
    except (ConfigError, RuntimeError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{folder} cannot be loaded: {error}") from error
    return peft_model, routers
