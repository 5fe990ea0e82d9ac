"""Routed generation: what transformers' `generate` takes, prepared by it, with the decoding loop of `decoding.py`.

The prompt is read once, its route is decided on the way, and generated tokens run through the same blocks, or through
fewer from a boundary on. What cannot work with routing is refused by name, never ignored.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from layerroute.errors import GenerationError
from layerroute.model.decoding import Decoding

if TYPE_CHECKING:
    from layerroute.model.routed import RoutedModel
    from layerroute.model.session import Session

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
    "output_attentions": "a skipped block has none",
    "output_hidden_states": "a skipped block has none",
    "synced_gpus": "routes differ between processes",
    "cache_implementation": "routing brings its own cache; compiled=True decodes over a static one",
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
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "synced_gpus": (None, False),
    "use_mtp": (None, False),
}


def generate(
    model: RoutedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    routes: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    skip_budget: float | Mapping[str, float] | None = None,
    boundaries: Sequence[Sequence[int]] | None = None,
    session: Session | None = None,
    compiled: bool = False,
    **kwargs: Any,
) -> Any:
    """Generate from prompts `[batch, seq]`, each row under the route decided from its prompt.

    Takes what transformers' `generate` takes (greedy, sampling, `num_return_sequences`, streamers, stopping criteria,
    `return_dict_in_generate`). With `return_dict_in_generate=True` the routes are at `.past_key_values.routes` and the
    segments, `(start, routes)`, at `.past_key_values.segments`; with a session that is its live cache.

    Args:
        model: in evaluation mode.
        input_ids: int64 `[batch, seq]`.
        attention_mask: `[batch, seq]`, 0 at padding on either side.
        routes: forces a route: bool `[blocks]` or `[batch, blocks]`; with `[batch, segments, blocks]` the k-th boundary
            of a row brings its k-th route (the last one from then on).
        generation_config: transformers' settings; `kwargs` go before it.
        skip_budget: average share of blocks to skip, 0 to 1, or of one step type, `{"tool_call": 0.3}`; needs a
            calibrated adapter. 0 is the LoRA-only model.
        boundaries: token-id sequences after which a row's route is decided again (see
            `layerroute.data.boundaries.boundary_tokens`); by default the adapter's, () for none.
        session: the conversation that this prompt continues; one row.
        compiled: decode with one compiled graph per route, see `graphs.py`.
        kwargs: transformers' arguments.

    Raises:
        GenerationError: an argument that routing cannot serve, a prompt longer than the backbone's context, or memory
            that does not hold the prompt.
        ConfigError: `routes` has the wrong shape, or `skip_budget` cannot be met.
        BackboneError: the backbone's forward does not run its blocks through its list of layers.
    """
    backbone: Any = model.backbone
    settings = _filled(generation_config or backbone.generation_config, backbone.generation_config)
    kwargs = settings.update(**kwargs)
    _refuse(settings, kwargs)
    _check_length(model, input_ids, settings)
    mask = (_attended(input_ids, settings) if attention_mask is None else attention_mask).long()
    own = {"routes": routes, "skip_budget": skip_budget, "boundaries": boundaries, "session": session}
    if not model.routing_enabled:
        _refuse_unrouted({**own, "compiled": compiled or None})
        return backbone.generate(input_ids, attention_mask=mask, generation_config=settings, **kwargs)
    forced = None if routes is None else torch.as_tensor(routes, device=input_ids.device)
    markers = _boundaries(model, boundaries)
    _refuse_ignored(forced, skip_budget, boundaries, markers)
    threshold = model.threshold(skip_budget)
    copies = settings.num_return_sequences or 1
    prompt, mask = _left_aligned(input_ids, mask)
    if forced is not None and forced.ndim > 1:
        forced = forced.repeat_interleave(copies, dim=0)
    rows, rows_mask = prompt.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
    if session is not None:
        session.check(model, rows, rows_mask)
    criteria = _stopping_criteria(settings, kwargs)
    try:
        with torch.inference_mode(False), torch.no_grad():  # what a session or a graph keeps is written to later
            decoding = Decoding.prepare(
                model,
                rows,
                rows_mask,
                forced,
                threshold=threshold,
                boundaries=markers,
                session=session,
                graphs=model.graphs if compiled else None,
                streamer=kwargs.get("streamer"),
            )
            out = backbone.generate(
                prompt,
                attention_mask=mask,
                past_key_values=decoding.cache,
                generation_config=settings,
                stopping_criteria=criteria,
                custom_generate=decoding,
                **kwargs,
            )
            decoding.cache.routing.check_all_asked()
            if session is not None:
                session.keep(decoding)
    except BaseException:
        if session is not None:
            session.drop()  # half a turn may be in its cache
        raise
    sequences = out.sequences if settings.return_dict_in_generate else out
    sequences[:, : input_ids.shape[1]] = input_ids.repeat_interleave(copies, dim=0)  # padded where it was
    return out


def _filled(settings: GenerationConfig, defaults: GenerationConfig) -> GenerationConfig:
    """A copy of `settings` in which what is left open is the backbone's, as transformers fills it."""
    filled = copy.deepcopy(settings)
    for name, value in defaults.to_dict().items():
        if getattr(filled, name, None) is None:
            setattr(filled, name, value)
    return filled


def _left_aligned(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with their padding on the left, where new tokens follow the prompt's last one."""
    if bool(mask[:, -1].all()):
        return input_ids, mask
    order = torch.argsort(mask, dim=1, stable=True)
    return input_ids.gather(1, order), mask.gather(1, order)


def _refuse_ignored(
    routes: Tensor | None,
    skip_budget: float | Mapping[str, float] | None,
    boundaries: Sequence[Sequence[int]] | None,
    markers: tuple[tuple[int, ...], ...],
) -> None:
    """Refuse what a forced route would leave without effect.

    Raises:
        GenerationError: names both.
    """
    if routes is None:
        return
    if skip_budget is not None:
        raise GenerationError(
            f"skip_budget={skip_budget} with routes=: a forced route asks no router; give one of them"
        )
    if routes.ndim < 3 and boundaries:
        raise GenerationError(
            f"boundaries with routes of shape {tuple(routes.shape)}: a forced route holds for good; give "
            "[batch, segments, blocks], one route for each boundary, or leave boundaries out"
        )
    if routes.ndim == 3 and routes.shape[1] > 1 and not markers:
        raise GenerationError(f"routes of {routes.shape[1]} segments without boundaries: nothing starts the second one")


def _stopping_criteria(settings: GenerationConfig, kwargs: dict[str, Any]) -> StoppingCriteriaList:
    """The caller's criteria, and one for `stop_strings`: transformers hands the tokenizer that it needs to no loop but
    its own.

    Raises:
        GenerationError: `stop_strings` without a `tokenizer`.
    """
    criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
    tokenizer = kwargs.pop("tokenizer", None)
    if settings.stop_strings is not None:
        if tokenizer is None:
            raise GenerationError(f"stop_strings={settings.stop_strings!r} needs tokenizer=, the backbone's")
        criteria.append(StopStringCriteria(tokenizer, settings.stop_strings))
        settings.stop_strings = None
    return criteria


def _boundaries(model: RoutedModel, given: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...]:
    """Token-id sequences to decide again after.

    Raises:
        GenerationError: one that this backbone cannot produce, or a model whose routers decide once.
    """
    chosen = model.router_config.boundaries if given is None else given
    words = model.config.get_text_config().vocab_size
    for boundary in chosen:
        if isinstance(boundary, str) or not boundary or not all(0 <= token < words for token in boundary):
            raise GenerationError(
                f"boundaries: {boundary!r} is no sequence of this backbone's token ids; "
                "layerroute.data.boundaries.boundary_tokens(tokenizer, [TEXT]) makes them from text"
            )
    if chosen and model.router_config.position == "block":
        raise GenerationError("boundaries were given, but routers with position='block' decide once")
    return tuple(tuple(int(token) for token in boundary) for boundary in chosen)


def _refuse_unrouted(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise GenerationError(f"{name}= was given, but routing is disabled in this context")


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
