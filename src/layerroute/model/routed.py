"""`RoutedModel`: a frozen backbone, LoRA on its attention, and routers that decide which blocks an input runs through.

Owns the public surface (PEFT's vocabulary). How blocks run under a route is `routing.py`; how tokens are generated is
`generation.py`; what is written to disk is `adapter.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from layerroute.config import RouterConfig
from layerroute.errors import ConfigError, GenerationError
from layerroute.model import adapter
from layerroute.model.blocks import RoutedBlocks
from layerroute.model.cache import RoutedCache
from layerroute.model.generation import generate
from layerroute.model.router import Gates, Routers, tail_mask
from layerroute.model.routing import MaskedRouting, RouteProbe, Routing, SkippingRouting
from layerroute.model.structure import Structure, find_structure

__all__ = ["RoutedModel", "RoutedOutput"]


@dataclass
class RoutedOutput(CausalLMOutputWithPast):
    """What transformers returns, and the route that gave it."""

    routes: Tensor | None = None
    """bool `[batch, blocks]`, True = executed."""
    gate_probs: Tensor | None = None
    """float32 `[batch, blocks]`: sigmoid of each router's logit; 1 at blocks without a router."""
    gates: Tensor | None = None
    """float32 `[batch, blocks]`: the hard gates, carrying the soft gates' gradient while training."""


class RoutedModel(nn.Module):
    """A causal language model that skips blocks. Built by `get_routed_model` or `from_pretrained`.

    In training mode every block is computed and gated (masked); in evaluation mode closed blocks are not called
    (skipped). Both decide the same route on the same tokens.
    """

    def __init__(self, peft_model: PeftModel, routers: Routers) -> None:
        super().__init__()
        self.peft_model = peft_model
        self.routers = routers
        decoder = self.structure.decoder
        decoder.layers = RoutedBlocks(self.structure.blocks)
        routers.to(self.device)
        self.routing_enabled = True

    # --- parts -------------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformers model, with LoRA layers in place (inactive within `disable_adapter`)."""
        backbone: Any = self.peft_model.get_base_model()
        assert isinstance(backbone, PreTrainedModel)
        return backbone

    @property
    def structure(self) -> Structure:
        """Where the backbone's blocks are."""
        return find_structure(self.backbone)

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        """The backbone's device."""
        return self.backbone.device

    @property
    def router_config(self) -> RouterConfig:
        """How routes are decided."""
        return self.routers.config

    @property
    def routable(self) -> list[int]:
        """Indices of the blocks that carry a router."""
        return self.routers.routable

    def router_parameters(self) -> Iterator[nn.Parameter]:
        """The routers' trained parameters."""
        return self.routers.parameters()

    def lora_parameters(self) -> Iterator[nn.Parameter]:
        """LoRA's trained parameters."""
        return (parameter for name, parameter in self.peft_model.named_parameters() if "lora_" in name)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, per part, and their share of all."""
        routers = sum(p.numel() for p in self.router_parameters())
        lora = sum(p.numel() for p in self.lora_parameters())
        total = sum(p.numel() for p in self.parameters())
        print(
            f"trainable params: {routers + lora:,} (routers: {routers:,} || lora: {lora:,}) || "
            f"all params: {total:,} || trainable%: {100 * (routers + lora) / total:.4f}"
        )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute each block's activations in the backward pass (gradient checkpointing); gates are kept."""
        backbone: Any = self.backbone
        # transformers before 5.21 has only the older name
        enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
        enable(activation_checkpointing_kwargs, **kwargs)

    # --- switches ----------------------------------------------------------------------------------------------

    @contextmanager
    def disable_routing(self) -> Iterator[None]:
        """Within this context every block runs, with LoRA on."""
        before, self.routing_enabled = self.routing_enabled, False
        try:
            yield
        finally:
            self.routing_enabled = before

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model is the untouched backbone: no routing, no LoRA, the same bits."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.peft_model.parameters()]
        try:
            with self.disable_routing(), self.peft_model.disable_adapter():
                yield
        finally:
            for parameter, flag in flags:  # PEFT makes LoRA trainable again on leaving
                parameter.requires_grad_(flag)

    # --- the three ways to run it ------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        routes: Tensor | None = None,
        logit_noise: float = 0.0,
        gate_gradient: bool = True,
        **kwargs: Any,
    ) -> RoutedOutput:
        """Run the backbone under a route.

        Args:
            input_ids: int64 `[batch, seq]`.
            attention_mask: `[batch, seq]`, 0 at padding on either side.
            labels: int64 `[batch, seq]`, -100 outside the loss; shifted inside, as in transformers.
            context_mask: bool `[batch, seq]`, the tokens that the route may depend on. By default the prompt: the
                attended tokens before the first label, or all of them when there are no labels.
            routes: bool `[blocks]` or `[batch, blocks]`, a forced route; the routers are not asked.
            logit_noise: scale of exploration noise on the routers' logits, for training.
            gate_gradient: whether, in training mode, the gradient of the logits reaches the gates.
            kwargs: further arguments of the backbone's forward. A `past_key_values` must be a `RoutedCache`, whose
                route then holds.

        Raises:
            ConfigError: `routes` has the wrong shape or cannot be obeyed here, or `labels` leave no token before the
                first one.
            GenerationError: `past_key_values` is a cache of another kind, or carries a route while routing is disabled.
            BackboneError: the backbone's forward does not run its blocks through its list of layers.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **kwargs}
        cache = kwargs.get("past_key_values")
        if routes is not None and (cache is not None or not self.routing_enabled):
            reason = "past_key_values carry a route" if cache is not None else "routing is disabled in this context"
            raise ConfigError(f"routes= was given, but {reason}")
        if not self.routing_enabled:
            if isinstance(cache, RoutedCache):
                raise GenerationError("past_key_values=RoutedCache carries a route, but routing is disabled here")
            return self._unrouted(inputs)
        if cache is not None:
            if not isinstance(cache, RoutedCache):
                raise GenerationError(
                    f"past_key_values={type(cache).__name__}: expected the RoutedCache of a generation"
                )
            return self._run(inputs, cache.routing)
        context = _context(input_ids, attention_mask, labels) if context_mask is None else context_mask.bool()
        gates = self.known_gates(input_ids, context, routes, logit_noise)
        if self.training:
            if kwargs.get("use_cache"):
                raise ConfigError("use_cache=True in training mode: masked training keeps no cache; call eval() first")
            inputs["use_cache"] = False
            return self._run(
                inputs, MaskedRouting(self.routers, context, gates, logit_noise, gate_gradient=gate_gradient)
            )
        routing = SkippingRouting(self.routers, context, gates, logit_noise)
        if kwargs.get("use_cache"):
            inputs["past_key_values"] = RoutedCache(self.config.get_text_config(), routing)
        return self._run({"use_cache": False, **inputs}, routing)

    @torch.no_grad()
    def route(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Return the route that inference would decide for these prompts, bool `[batch, blocks]`, without generating.

        Nothing above the decision is computed.
        """
        if not self.routing_enabled:
            return torch.ones(len(input_ids), self.routers.blocks, dtype=torch.bool, device=input_ids.device)
        context = _context(input_ids, attention_mask, None) if context_mask is None else context_mask.bool()
        gates = self.known_gates(input_ids, context, None, 0.0)
        return (gates if gates else self._probe(input_ids, attention_mask, context)).hard > 0.5

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as transformers' `generate` does, each row under its own route; see `generation.generate`."""
        return generate(self, input_ids, attention_mask, **kwargs)

    def _run(self, inputs: dict[str, Any], routing: Routing) -> RoutedOutput:
        out = self.backbone(**inputs, routing=routing)
        routing.check_all_asked()
        hard, prob = routing.gates
        return RoutedOutput(**out, routes=hard.detach() > 0.5, gate_probs=prob, gates=hard)

    def _unrouted(self, inputs: dict[str, Any]) -> RoutedOutput:
        out = self.backbone(**inputs)
        ones = torch.ones(len(out.logits), self.routers.blocks, device=out.logits.device)
        return RoutedOutput(**out, routes=ones.bool(), gate_probs=ones, gates=ones)

    def known_gates(
        self, input_ids: Tensor, context: Tensor, routes: Tensor | None, logit_noise: float
    ) -> Gates | None:
        """Gates `[batch, blocks]` known before the backbone runs: a forced route's or a window's; None if undecided."""
        if routes is not None:
            return _forced(routes, len(input_ids), self.routers.blocks, input_ids.device)
        if self.router_config.context == "window":
            window_ids, window_mask = _last_tokens(input_ids, context, self.router_config.window)
            return self._probe(window_ids, window_mask, window_mask.bool(), logit_noise)
        return None

    def _probe(self, input_ids: Tensor, attention_mask: Tensor | None, context: Tensor, noise: float = 0.0) -> Gates:
        probe = RouteProbe(self.routers, context, noise=noise)
        self.structure.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, routing=probe)
        return probe.gates

    # --- disk --------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        recipe: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the adapter folder (see `adapter.py`); an adapter already there survives a failure."""
        adapter.save(self, save_directory, recipe or {}, data or {})

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        backbone: PreTrainedModel | None = None,
        is_trainable: bool = False,
    ) -> RoutedModel:
        """Load an adapter folder or a built-in adapter by name onto `backbone`, or onto the backbone it names.

        Raises:
            AdapterError: the folder is incomplete or damaged, or was trained on another backbone.
        """
        folder = adapter.find_adapter(directory)
        model = cls(*adapter.load(folder, backbone, is_trainable))
        return model.train() if is_trainable else model.eval().requires_grad_(False)


def _context(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """bool `[batch, seq]`: the attended tokens before the first label, or all attended tokens without labels."""
    attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if labels is None:
        return attended.bool()
    context = attended.bool() & ((labels != -100).long().cumsum(1) == 0)
    if not bool(context.any(1).all()):
        raise ConfigError(
            "labels: a row's first token is in the loss, so no token precedes the segment that the route governs; set "
            "the prompt's labels to -100, or pass context_mask"
        )
    return context


def _forced(routes: Tensor, batch: int, blocks: int, device: torch.device) -> Gates:
    gates = torch.as_tensor(routes, device=device)
    if gates.shape not in {(blocks,), (batch, blocks)} or gates.dtype != torch.bool:
        raise ConfigError(
            f"routes: got {str(gates.dtype).removeprefix('torch.')} of shape {tuple(gates.shape)}; expected bool of "
            f"shape ({blocks},) or ({batch}, {blocks})"
        )
    hard = gates.float().expand(batch, blocks)
    return Gates(hard=hard, prob=hard)


def _last_tokens(input_ids: Tensor, context: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The last `window` context tokens of each row, right-aligned: int64 ids and mask, each `[batch, <= window]`."""
    tail = tail_mask(context, window)
    order = torch.argsort(tail.long(), dim=1, stable=True)[:, -window:]
    return input_ids.gather(1, order), tail.gather(1, order).long()
