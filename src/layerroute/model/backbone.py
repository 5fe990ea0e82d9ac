"""Backbones by name: a built-in asset, a local folder, a GGUF file or a hub id, with a tokenizer that knows tools.

Contract: `load_backbone` returns a plain transformers model in eval mode and its tokenizer; the model records the name
that was asked for, the tokenizer has a padding token and a chat template that takes `tools`. Weights are read from
safetensors only, and no code that comes with a checkpoint is run. Boundary: knows nothing of routers; a built-in name
wins over a folder of that name (`./NAME` means the folder).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from jinja2 import Environment
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from layerroute.config import nearest
from layerroute.errors import BackboneError
from layerroute.model.assets import ASSETS, ensure_asset, ensure_gguf
from layerroute.model.untrained import spell_out_untrained

__all__ = ["backbone_config", "checkpoint_activations", "load_backbone", "load_model"]

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_TURN_END = "<|im_end|>"

Loaded = TypeVar("Loaded")


def load_backbone(
    name: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model in eval mode and its tokenizer (padding left, template with tools).

    Args:
        name: a built-in name (`smollm2-135m`), a folder, a `.gguf` file, or a hub id.
        dtype: of the weights; None keeps the checkpoint's own (float32 for built-in backbones and GGUF files).
        device: where the weights go; None leaves them on the CPU.

    Raises:
        BackboneError: nothing loadable under that name; the message says what was looked for.
        AssetError: a built-in backbone could not be fetched.
    """
    model = load_model(name, dtype=dtype, device=device)
    source = _resolve(name)
    tokenizer: PreTrainedTokenizerBase = _read(
        name, "tokenizer", lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    )
    spell_out_untrained(tokenizer, model)
    if not _knows_tools(tokenizer):
        _attach_template(tokenizer, model)
    if tokenizer.pad_token is None:
        # padding is masked wherever it stands, so any token serves, and the embedding keeps its size
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "left"
    return model, tokenizer


def load_model(
    name: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> PreTrainedModel:
    """Return the model of `load_backbone` alone; a folder without a tokenizer will do.

    Raises:
        BackboneError, AssetError: as `load_backbone`.
    """
    source = _resolve(name)
    model: PreTrainedModel = _read(
        name,
        "weights",
        lambda: AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False
        ),
    )
    model.name_or_path = model.config._name_or_path = os.fspath(name)
    if device is not None:
        torch.nn.Module.to(model, device)
    return model.eval()


def backbone_config(name: str | os.PathLike[str]) -> PretrainedConfig:
    """Return the configuration of a backbone; a folder that holds only `config.json` will do.

    Raises:
        BackboneError, AssetError: as `load_backbone`.
    """
    source = _resolve(name)
    config: PretrainedConfig = _read(
        name, "config", lambda: AutoConfig.from_pretrained(source, trust_remote_code=False)
    )
    config._name_or_path = os.fspath(name)
    return config


def checkpoint_activations(backbone: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> None:
    """Have a transformers model recompute each block's activations in the backward pass; arguments are its own."""
    # transformers before 5.21 has only the older name
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable(settings, **kwargs)


def _resolve(name: str | os.PathLike[str]) -> str:
    """What `from_pretrained` loads: a folder that holds a config, or a hub id."""
    given = os.fspath(name)
    if given in ASSETS:
        return str(ensure_asset(given))
    path = Path(given).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(ensure_gguf(path))
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        adapter = " (it is an adapter folder)" if (path / "adapter_config.json").is_file() else ""
        raise BackboneError(f"the folder {given!r} holds no config.json, so it is no backbone{adapter}")
    if path.exists():
        raise BackboneError(f"{given!r} is a file, but no .gguf; a backbone is a folder or a .gguf file")
    if _HUB_ID.fullmatch(given) and path.suffix != ".gguf":
        return given
    raise BackboneError(
        f"backbone {given!r}: no such folder or .gguf file, and a hub id has the form OWNER/NAME{_hint(given)}"
    )


def _read(name: str | os.PathLike[str], what: str, load: Callable[[], Loaded]) -> Loaded:
    """`load()`, with the ways in which a checkpoint can be missing or damaged turned into one error."""
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        given = os.fspath(name)
        cause = " ".join(str(error).split())
        if given in ASSETS or Path(given).expanduser().exists():
            raise BackboneError(f"backbone {given!r}: its {what} cannot be loaded: {cause}") from error
        offline = " (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else ""
        raise BackboneError(
            f"backbone {given!r} is no built-in name, folder or .gguf file, and the hub did not give its {what}"
            f"{offline}{_hint(given)}: {cause}"
        ) from error


def _hint(given: str) -> str:
    known = sorted(ASSETS)
    return f"{nearest(given, known)}; built in: {', '.join(known)}"


def _knows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template, or one of several, reads the variable `tools`."""
    template = tokenizer.chat_template or ""
    texts = template.values() if isinstance(template, dict) else [template]
    # the lexer alone: it knows a name from text, and needs none of the extensions that templates use
    tokens = (token for text in texts for token in Environment().lex(text))
    return any(kind == "name" and value == "tools" for _, kind, value in tokens)


def _attach_template(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Give the tokenizer the project's template, and make generation stop where its turns end."""
    template = files("layerroute").joinpath("templates/hermes.jinja").read_text(encoding="utf-8")
    turn_end = _TURN_END
    if tokenizer.convert_tokens_to_ids(_TURN_END) in (None, tokenizer.unk_token_id):
        turn_end = str(tokenizer.eos_token)
        logger.warning(
            "the tokenizer has no %s, so turns end with %s; a backbone new to ChatML needs training to follow it",
            _TURN_END,
            turn_end,
        )
    tokenizer.chat_template = template.replace(_TURN_END, turn_end)
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    stop = tokenizer.convert_tokens_to_ids(turn_end)
    if stop not in stops:
        model.generation_config.eos_token_id = [*stops, stop]
