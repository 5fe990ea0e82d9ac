"""Where a backbone keeps its decoder blocks: found by structure, never by a copy of its modelling code.

What is looked for, in any `transformers` causal language model:

    decoder = backbone.get_decoder()        with `layers` (an nn.ModuleList) and `embed_tokens`
    each block                              with `self_attn` and `mlp`
    each block's `self_attn`                with q/k/v/o linear projections, separate or fused (`qkv_proj`)

Works for Llama (SmolLM), Qwen2, Qwen3, Mistral, Gemma 3 text, Phi-3, OLMo 2 and Granite, each of which is tested.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from layerroute.errors import BackboneError
from layerroute.model.blocks import RoutedBlocks

__all__ = ["FAMILIES", "Structure", "find_structure"]

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "olmo2", "granite")
"""`config.model_type` of the families that the tests cover."""

_PROJECTIONS = (("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_proj", "o_proj"))


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The parts of a backbone that routing touches."""

    decoder: nn.Module
    """The module that owns `layers`: embeds tokens, runs the blocks, normalises."""
    projections: tuple[str, ...]
    """Names of the attention projections that carry LoRA, in every block's `self_attn`."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, bottom first."""
        layers = self.decoder.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def require_unrouted(self) -> None:
        """Make sure that no routers are attached yet.

        Raises:
            BackboneError: there are.
        """
        if isinstance(self.decoder.layers, RoutedBlocks):
            raise BackboneError("this backbone is routed already; load it again to attach other routers")


def find_structure(backbone: nn.Module) -> Structure:
    """Find the decoder blocks of `backbone` and their attention projections.

    Raises:
        BackboneError: says what was looked for, what is missing, and which families work.
    """
    if not isinstance(backbone, PreTrainedModel):
        raise _refusal(backbone, "it is not a transformers model")
    if getattr(backbone.config, "is_encoder_decoder", False):
        raise _refusal(backbone, "it is an encoder-decoder model")
    if getattr(backbone.config.get_text_config(), "num_kv_shared_layers", 0):
        raise _refusal(backbone, "its blocks share keys and values, so none can be left out alone")
    decoder = backbone.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(decoder, "embed_tokens") or len(layers) == 0:
        raise _refusal(backbone, f"its decoder {type(decoder).__name__} has no `layers` beside `embed_tokens`")
    return Structure(decoder=decoder, projections=_projections(backbone, layers))


def _projections(backbone: nn.Module, layers: nn.ModuleList) -> tuple[str, ...]:
    found = {_block_projections(block) for block in layers}
    if len(found) != 1:
        raise _refusal(backbone, "its blocks are not all of one kind")
    names = found.pop()
    if names is None:
        raise _refusal(backbone, f"its block {type(layers[0]).__name__} has no `mlp` beside `self_attn` with q/k/v/o")
    return names


def _block_projections(block: nn.Module) -> tuple[str, ...] | None:
    attention = getattr(block, "self_attn", None)
    if attention is None or not hasattr(block, "mlp"):
        return None
    return next((names for names in _PROJECTIONS if all(hasattr(attention, name) for name in names)), None)


def _refusal(backbone: nn.Module, reason: str) -> BackboneError:
    kind = getattr(getattr(backbone, "config", None), "model_type", type(backbone).__name__)
    return BackboneError(
        f"backbone of type {kind!r} cannot be routed: {reason}. Looked for a causal language model whose decoder has "
        f"`layers`, each with `self_attn` (q_proj, k_proj, v_proj, o_proj or qkv_proj, o_proj) and `mlp`. "
        f"Families that work: {', '.join(FAMILIES)}"
    )
