"""`RoutedModel`: a frozen backbone, LoRA on its attention, and routers that decide which blocks an input runs through.

Owns the public surface (PEFT's vocabulary). How blocks run under a route is `routing.py`; how tokens are generated is
`generation.py`; what is written to disk is `adapter.py`.
"""

from __future__ import annotations

import copy
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
from layerroute.model.backbone import checkpoint_activations
from layerroute.model.blocks import RoutedBlocks
from layerroute.model.cache import RoutedCache
from layerroute.model.calibration import Calibration, read_calibration
from layerroute.model.deciding import (
    attended_segments,
    known_gates,
    probed_gates,
    prompt_context,
    segment_contexts,
)
from layerroute.model.generation import generate
from layerroute.model.graphs import DecodeGraphs
from layerroute.model.merging import MergedLora
from layerroute.model.router import Routers
from layerroute.model.routing import MaskedRouting, Routing, SkippingRouting
from layerroute.model.structure import Structure, find_structure

__all__ = ["RoutedModel", "RoutedOutput"]


@dataclass
class RoutedOutput(CausalLMOutputWithPast):
    """What transformers returns, and the route that gave it; with segments, these have a dimension for them."""

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
        self.structure: Structure = find_structure(self.backbone)
        """Where the backbone's blocks are."""
        self.structure.decoder.layers = RoutedBlocks(self.structure.blocks)
        routers.to(self.device)
        self.routing_enabled = True
        self.calibration: Calibration | None = None
        """What `skip_budget` looks its threshold up in (see `layerroute calibrate`)."""
        self._merged: MergedLora | None = None
        self.graphs = DecodeGraphs()
        """Compiled decoding steps, one per route that was asked for with `generate(compiled=True)`."""

    # --- parts -------------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformers model, with LoRA layers in place (inactive within `disable_adapter`)."""
        backbone: Any = self.peft_model.get_base_model()
        assert isinstance(backbone, PreTrainedModel)
        return backbone

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
        with self.unmerged():
            return iter([parameter for name, parameter in self.peft_model.named_parameters() if "lora_" in name])

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, per part, and their share of all."""
        routers = sum(p.numel() for p in self.router_parameters())
        lora = sum(p.numel() for p in self.lora_parameters())
        with self.unmerged():
            total = sum(p.numel() for p in self.parameters())
        print(
            f"trainable params: {routers + lora:,} (routers: {routers:,} || lora: {lora:,}) || "
            f"all params: {total:,} || trainable%: {100 * (routers + lora) / total:.4f}"
        )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute each block's activations in the backward pass (gradient checkpointing); gates are kept."""
        checkpoint_activations(self.backbone, activation_checkpointing_kwargs, **kwargs)

    # --- merging -----------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether LoRA is folded into the weights."""
        return self._merged is not None

    def merge_adapter(self) -> None:
        """Fold LoRA into the projections' weights, for inference without its cost; results agree up to rounding.

        The backbone's own projections are kept aside (a copy of q, k, v and o), so that `disable_adapter` and
        `unmerge_adapter` give the very same bits back. Merging twice is harmless.
        """
        if self._merged is None:
            self._merged = MergedLora(self.peft_model)
            self.graphs.clear()

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`, to the bit."""
        if self._merged is not None:
            self._merged.restore()
            self._merged = None
            self.graphs.clear()

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Within this context LoRA is beside the weights, whether or not it was merged."""
        if self._merged is None:
            yield
            return
        graphs, self.graphs = self.graphs, copy.deepcopy(self.graphs)  # those of the merged weights wait
        self._merged.restore()
        try:
            yield
        finally:
            self._merged.apply()
            self.graphs = graphs

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
        with self.unmerged(), self.disable_routing():
            flags = [(parameter, parameter.requires_grad) for parameter in self.peft_model.parameters()]
            try:
                with self.peft_model.disable_adapter():
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
        segment_ids: Tensor | None = None,
        routes: Tensor | None = None,
        logit_noise: float = 0.0,
        gate_gradient: bool = True,
        **kwargs: Any,
    ) -> RoutedOutput:
        """Run the backbone under a route, or under one route per segment of a turn.

        Args:
            input_ids: int64 `[batch, seq]`.
            attention_mask: `[batch, seq]`, 0 at padding on either side.
            labels: int64 `[batch, seq]`, -100 outside the loss; shifted inside, as in transformers.
            context_mask: bool `[batch, seq]`, the tokens that the (first) route may depend on. By default the prompt:
                the attended tokens before the first label, or all of them when there are no labels.
            segment_ids: int64 `[batch, seq]`, 0 for the first segment and k from the k-th boundary's token on; at
                padding anything. The route is decided again for each segment, from everything up to and with its first
                token, and may only close blocks; `routes`, `gates` and `gate_probs` are then
                `[batch, segments, blocks]`, and a segment that a row does not have repeats the route of its last one.
            routes: bool `[blocks]`, `[batch, blocks]` or, with `segment_ids`, `[batch, segments, blocks]`: a forced
                route; the routers are not asked.
            logit_noise: scale of exploration noise on the routers' logits, for training.
            gate_gradient: whether, in training mode, the gradient of the logits reaches the gates.
            kwargs: further arguments of the backbone's forward. A `past_key_values` must be a `RoutedCache`, whose
                route then holds.

        Raises:
            ConfigError: `routes` has the wrong shape or cannot be obeyed here, `labels` leave no token before the
                first one, or training mode while LoRA is merged.
            GenerationError: `past_key_values` is a cache of another kind, or carries a route while routing is disabled.
            BackboneError: the backbone's forward does not run its blocks through its list of layers.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **kwargs}
        segment_ids = attended_segments(segment_ids, attention_mask)
        cache = kwargs.get("past_key_values")
        if self.training and self.merged:
            raise ConfigError("training mode while LoRA is merged: its gradient would be lost; call unmerge_adapter()")
        if routes is not None and (cache is not None or not self.routing_enabled):
            reason = "past_key_values carry a route" if cache is not None else "routing is disabled in this context"
            raise ConfigError(f"routes= was given, but {reason}")
        if segment_ids is not None and (cache is not None or kwargs.get("use_cache")):
            raise ConfigError(
                "segment_ids with a cache: a cached pass holds one segment; generation decides between two"
            )
        if not self.routing_enabled:
            if isinstance(cache, RoutedCache):
                raise GenerationError("past_key_values=RoutedCache carries a route, but routing is disabled here")
            return self._unrouted(inputs, segment_ids)
        if cache is not None:
            if not isinstance(cache, RoutedCache):
                raise GenerationError(
                    f"past_key_values={type(cache).__name__}: expected the RoutedCache of a generation"
                )
            return self._run(inputs, cache.routing)
        context = prompt_context(input_ids, attention_mask, labels) if context_mask is None else context_mask.bool()
        contexts = segment_contexts(self, context, attention_mask, segment_ids)
        gates = known_gates(self, input_ids, contexts, routes, noise=logit_noise, segment_ids=segment_ids)
        settings: dict[str, Any] = {"noise": logit_noise, "segment_ids": segment_ids}
        if self.training and kwargs.get("use_cache"):
            raise ConfigError("use_cache=True in training mode: training keeps no cache; call eval() first")
        if self.training and routes is None:  # a forced route has no gate to train: closed blocks are not called
            inputs["use_cache"] = False
            routing: Routing = MaskedRouting(self.routers, contexts, gates, gate_gradient=gate_gradient, **settings)
            return self._run(inputs, routing, segment_ids)
        skipping = SkippingRouting(self.routers, contexts, gates, **settings)
        if kwargs.get("use_cache"):
            inputs["past_key_values"] = RoutedCache(self.config.get_text_config(), skipping)
        return self._run({"use_cache": False, **inputs}, skipping, segment_ids)

    @torch.no_grad()
    def route(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        *,
        skip_budget: float | Mapping[str, float] | None = None,
    ) -> Tensor:
        """Return the route that inference would decide for these prompts, bool `[batch, blocks]`, without generating.

        Nothing above the decision is computed. `skip_budget` is that of `generate`.
        """
        if not self.routing_enabled:
            return torch.ones(len(input_ids), self.routers.blocks, dtype=torch.bool, device=input_ids.device)
        gates = probed_gates(self, input_ids, attention_mask, context_mask, None, self.threshold(skip_budget))
        return gates.hard[:, 0] > 0.5

    @torch.no_grad()
    def gate_probs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the probability of every gate, float32 `[batch, blocks]`, or `[batch, segments, blocks]`.

        Each decision's own, whatever an earlier one closed. Nothing above the decision is computed.
        """
        prob = probed_gates(self, input_ids, attention_mask, context_mask, segment_ids, None).prob
        return prob[:, 0] if segment_ids is None else prob

    def threshold(self, skip_budget: float | Mapping[str, float] | None) -> float | None:
        """The gates' threshold for a skip budget; None, the routers' own, without one.

        Raises:
            ConfigError: the budget is out of range, or the adapter was never calibrated.
        """
        if skip_budget is None:
            return None
        if self.calibration is None:
            raise ConfigError(
                f"skip_budget={skip_budget}: this adapter holds no calibration; run `layerroute calibrate` on it first"
            )
        return self.calibration.threshold(skip_budget)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as transformers' `generate` does, each row under its own route; see `generation.generate`."""
        return generate(self, input_ids, attention_mask, **kwargs)

    def _run(self, inputs: dict[str, Any], routing: Routing, segment_ids: Tensor | None = None) -> RoutedOutput:
        out = self.backbone(**inputs, routing=routing)
        routing.check_all_asked()
        hard, prob = routing.gates
        if segment_ids is None:
            hard, prob = hard[:, 0], prob[:, 0]
        return RoutedOutput(**out, routes=hard.detach() > 0.5, gate_probs=prob, gates=hard)

    def _unrouted(self, inputs: dict[str, Any], segment_ids: Tensor | None) -> RoutedOutput:
        out = self.backbone(**inputs)
        segments = [] if segment_ids is None else [int(segment_ids.max()) + 1]
        ones = torch.ones(len(out.logits), *segments, self.routers.blocks, device=out.logits.device)
        return RoutedOutput(**out, routes=ones.bool(), gate_probs=ones, gates=ones)

    # --- disk --------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        recipe: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the adapter folder (see `adapter.py`); an adapter already there survives a failure."""
        with self.unmerged():
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
        model.calibration = read_calibration(folder)
        return model.train() if is_trainable else model.eval().requires_grad_(False)
