"""Routed generation: transformers' own loop, over a cache that carries the route.

The prompt is read once, its route is decided on the way, and every generated token runs through the same blocks. What
cannot work with routing is refused by name, never ignored.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from layerroute.errors import GenerationError
from layerroute.model.cache import RoutedCache
from layerroute.model.routing import SkippingRouting

if TYPE_CHECKING:
    from layerroute.model.routed import RoutedModel

__all__ = ["generate"]

_REFUSED = {
    "num_beams": "beam search reorders rows between routes",
    "num_beam_groups": "beam search reorders rows between routes",
    "assistant_model": "assisted decoding needs a second model under its own route",
    "prompt_lookup_num_tokens": "prompt-lookup decoding takes tokens back from the cache",
    "assistant_early_exit": "assisted decoding needs a second route for its draft",
    "use_mtp": "multi-token prediction reads blocks that a route may skip",
    "penalty_alpha": "contrastive search runs candidates that share one route",
    "dola_layers": "DoLa reads the hidden states of blocks that a route may skip",
    "constraints": "constrained search is beam search",
    "force_words_ids": "constrained search is beam search",
    "custom_generate": "a custom loop may not carry the route",
    "cache_implementation": "routing brings its own cache",
    "past_key_values": "routing brings its own cache",
    "prefill_chunk_size": "the route is decided at the end of the prompt, not at the end of its first chunk",
    "token_healing": "it changes the prompt after the route is decided",
    "guidance_scale": "its unconditional pass would run without the route",
    "inputs_embeds": "the route is decided on tokens; pass input_ids",
}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "cache_implementation": (None, "dynamic"),
    "guidance_scale": (None, 1, 1.0),
    "token_healing": (None, False),
    "use_mtp": (None, False),
}


def generate(
    model: RoutedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    routes: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    **kwargs: Any,
) -> Any:
    """Generate from prompts `[batch, seq]`, each row under the route decided from its prompt.

    Takes what transformers' `generate` takes (greedy, sampling, `num_return_sequences`, streamers, stopping criteria,
    `return_dict_in_generate`). `routes` (bool `[blocks]` or `[batch, blocks]`) forces a route. With
    `return_dict_in_generate=True` the routes are at `.past_key_values.routes`.

    Raises:
        GenerationError: an argument that routing cannot serve, or a prompt longer than the backbone's context.
        ConfigError: `routes` has the wrong shape.
        BackboneError: the backbone's forward does not run its blocks through its list of layers.
    """
    backbone: Any = model.backbone
    settings = copy.deepcopy(generation_config or backbone.generation_config)
    for name, value in backbone.generation_config.to_dict().items():  # as transformers fills what is left open
        if getattr(settings, name, None) is None:
            setattr(settings, name, value)
    kwargs = settings.update(**kwargs)
    _refuse(settings, kwargs)
    _check_length(model, input_ids, settings)
    if attention_mask is None:
        attention_mask = _attended(input_ids, settings)
    if not model.routing_enabled:
        if routes is not None:
            raise GenerationError("routes= was given, but routing is disabled in this context")
        return backbone.generate(input_ids, attention_mask=attention_mask, generation_config=settings, **kwargs)
    context = attention_mask.bool()
    with torch.no_grad():
        gates = model.known_gates(input_ids, context, routes, 0.0)
    copies = settings.num_return_sequences or 1
    if copies > 1:
        context = context.repeat_interleave(copies, dim=0)
        gates = gates and type(gates)(*(part.repeat_interleave(copies, dim=0) for part in gates))
    cache = RoutedCache(model.config.get_text_config(), SkippingRouting(model.routers, context, gates))
    out = backbone.generate(
        input_ids, attention_mask=attention_mask, past_key_values=cache, generation_config=settings, **kwargs
    )
    cache.routing.check_all_asked()
    return out


def _refuse(settings: GenerationConfig, kwargs: dict[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        value = kwargs.get(name, getattr(settings, name, None))
        if value not in _HARMLESS.get(name, (None,)):
            shown = value if isinstance(value, int | float | str) else type(value).__name__
            raise GenerationError(f"{name}={shown} cannot be used with routing: {reason}")
    if settings.use_cache is False:
        raise GenerationError("use_cache=False cannot be used with routing: the cache carries the route")


def _check_length(model: RoutedModel, input_ids: Tensor, settings: GenerationConfig) -> None:
    text_config = model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    length = input_ids.shape[1]
    if limit is not None and length >= limit:
        raise GenerationError(
            f"the prompt has {length} tokens, but the backbone's context holds {limit}, generated tokens included; "
            "shorten the prompt"
        )
    # transformers drops the cache, and the route with it, where long-RoPE backbones change their rotary scaling
    switch = getattr(text_config, "original_max_position_embeddings", None)
    end = length + settings.max_new_tokens if settings.max_new_tokens else settings.max_length
    if switch and length <= switch < (end or 0) and "longrope" in str(getattr(text_config, "rope_parameters", "")):
        raise GenerationError(
            f"a long-RoPE backbone changes its rotary scaling at {switch} tokens and drops the cache there; "
            f"max_new_tokens must be at most {switch - length} for this prompt"
        )


def _attended(input_ids: Tensor, settings: GenerationConfig) -> Tensor:
    """The mask that transformers would infer: padding is masked if the padding token is not also the end token."""
    pad, eos = settings.pad_token_id, settings.eos_token_id
    eos_ids = eos if isinstance(eos, list) else [eos]
    if pad is None or pad in eos_ids:
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()
