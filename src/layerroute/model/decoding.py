"""The decoding loop of a routed generation, run by transformers' `generate` in place of its own.

transformers prepares everything (processors, stopping criteria, special tokens) and calls a `Decoding`. Token choice is
as in its sampling loop; what is ours is that the cache carries the route, that a boundary among a row's new tokens has
its route decided again, and that decoding may run as compiled graphs. One host read a token tells which rows go on, as
in the original, and what they chose; routing adds one per decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from layerroute.data.boundaries import ends_in_boundary
from layerroute.errors import GenerationError
from layerroute.model.cache import RoutedCache
from layerroute.model.deciding import forced_gates, known_gates
from layerroute.model.router import Gates
from layerroute.model.routing import SkippingRouting
from layerroute.model.session import RouteOpens, Session

if TYPE_CHECKING:
    from layerroute.model.graphs import DecodeGraphs, GraphRun
    from layerroute.model.routed import RoutedModel

__all__ = ["Decoding"]

_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")


@dataclass
class Decoding:
    """One generation: its model, its cache, and what it does at a boundary."""

    model: RoutedModel
    mask: Tensor
    """int64 `[batch, seq]`: 0 at the prompt's padding."""
    cache: RoutedCache
    boundaries: tuple[tuple[int, ...], ...]
    forced: Tensor | None
    """bool `[batch, segments, blocks]`: the routes that boundaries bring; None asks the routers."""
    threshold: float | None
    graphs: DecodeGraphs | None
    streamer: BaseStreamer | None
    """Receives the new tokens; transformers shows it the prompt, and passes it to no loop but its own."""
    sequences: Tensor | None = None
    """int64 `[batch, seq]` prompt and new tokens so far."""
    crossed: list[int] = field(default_factory=list)
    """Boundaries generated so far, per row."""
    _new: list[list[int]] = field(default_factory=list)
    """New tokens per row, on the host."""
    _graph: GraphRun | None = None
    _try_graph: bool = True
    """Whether a graph may take over; not again before the next decision once none could."""

    @classmethod
    def prepare(
        cls,
        model: RoutedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        routes: Tensor | None,
        *,
        threshold: float | None,
        boundaries: tuple[tuple[int, ...], ...],
        session: Session | None,
        graphs: DecodeGraphs | None,
        streamer: BaseStreamer | None,
    ) -> Decoding:
        """Everything known before the first pass; `routes` and rows are those of `generate`, copies included.

        Raises:
            ConfigError: `routes` has the wrong shape.
            GenerationError: the session cannot serve this prompt.
        """
        context = attention_mask.bool()
        forced, first = None, routes
        if routes is not None and routes.ndim == 3:
            shape = (len(input_ids), routes.shape[1], model.routers.blocks)
            forced = forced_gates(routes, shape, input_ids.device).hard > 0.5
            first = forced[:, 0]
        with torch.no_grad():
            gates = known_gates(model, input_ids, [context], first, threshold=threshold)
        if routes is not None and forced is None:
            boundaries = ()  # the route is forced for good
        if session is not None:
            cache = session.open(model, input_ids, attention_mask, gates, threshold, forced=routes is not None)
        else:
            remember = bool(boundaries) and gates is None
            routing = SkippingRouting(model.routers, [context], gates, threshold=threshold, remember=remember)
            cache = RoutedCache(model.config.get_text_config(), routing)
        return cls(model, attention_mask, cache, boundaries, forced, threshold, graphs, streamer)

    def __call__(
        self,
        backbone: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """Generate; called by transformers with what it prepared. `input_ids` are int64 `[batch, seq]`."""
        try:
            return self._loop(backbone, input_ids, logits_processor, stopping_criteria, generation_config)
        finally:
            if self._graph is not None:
                self._graph.release()

    def _loop(
        self,
        backbone: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        settings: Any,
    ) -> Any:
        positions = _Positions(self.mask)
        pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        keep_scores = settings.return_dict_in_generate and settings.output_scores
        keep_logits = settings.return_dict_in_generate and settings.output_logits
        scores: list[Tensor] = []
        raw: list[Tensor] = []
        self.sequences, self.crossed = input_ids, [0] * len(input_ids)
        self._new = [[] for _ in input_ids]
        alive = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        logits = self._prefill(backbone, input_ids, positions)
        while True:
            chosen_from = logits_processor(self.sequences, logits[:, -1].to(copy=True, dtype=torch.float32))
            if keep_scores:
                scores.append(chosen_from)
            if keep_logits:
                raw.append(logits[:, -1].float())
            tokens = _choose(chosen_from, bool(settings.do_sample))
            if pads:  # as transformers: rows that have ended go on as padding
                tokens = torch.where(alive, tokens, settings._pad_token_tensor)
            self.sequences = torch.cat([self.sequences, tokens[:, None]], dim=1)
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            alive = alive & ~stopping_criteria(self.sequences, tuple(scores))
            due = self._due(alive, tokens)
            if due is None:
                break
            logits = self._step(backbone, tokens, positions, due, int(settings.max_length))
        self._leave_graph()
        if self.streamer is not None:
            self.streamer.end()
        if not settings.return_dict_in_generate:
            return self.sequences
        kept: dict[str, Any] = {
            "scores": tuple(scores) if keep_scores else None,
            "logits": tuple(raw) if keep_logits else None,
        }
        output: Any = GenerateDecoderOnlyOutput
        return output(sequences=self.sequences, past_key_values=self.cache, **kept)

    def _prefill(self, backbone: Any, input_ids: Tensor, positions: _Positions) -> Tensor:
        """Read the prompt, or what a conversation's cache does not hold of it; logits `[batch, 1, words]`."""
        try:
            known = self.cache.get_seq_length()
            try:
                logits = self._pass(backbone, input_ids[:, known:], positions.prompt(known))
            except RouteOpens as opens:  # keys are missing from there on: read again what was read without them
                known = opens.position
                self.cache.truncate(known)
                logits = self._pass(backbone, input_ids[:, known:], positions.prompt(known))
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not isinstance(error, MemoryError) and not any(words in str(error) for words in _NO_MEMORY):
                raise
            rows, length = input_ids.shape
            raise GenerationError(
                f"out of memory while reading a prompt of {rows} x {length} tokens; use fewer rows or a shorter prompt"
            ) from error
        self.cache.segments.append((known, self.cache.routes))
        return logits

    def _step(self, backbone: Any, tokens: Tensor, positions: _Positions, due: list[bool], end: int) -> Tensor:
        """Read one more token of every row, `[batch]`; logits `[batch, 1, words]`. Rows that are due decide again."""
        assert self.sequences is not None
        decides = any(due)
        if not decides and self.graphs is not None and self._try_graph:
            self._graph, self._try_graph = self.graphs.start(self.model, self.cache, self.mask, end), False
        if not decides and self._graph is not None:
            return self._graph.step(tokens)
        self._leave_graph()
        if decides:
            self._decide_again(torch.tensor(due, device=tokens.device))
        logits = self._pass(backbone, tokens[:, None], positions.step(self.sequences.shape[1] - self.mask.shape[1]))
        if decides:
            self.cache.segments.append((self.sequences.shape[1] - 1, self.cache.routes))
            self._try_graph = True
        return logits

    def _leave_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.finish()

    def _decide_again(self, due: Tensor) -> None:
        routing = self.cache.routing
        if routing.remember:
            routing.decide_again(due)
        else:
            routing.close(self._next_gates(), due, self.cache)

    def _pass(self, backbone: Any, input_ids: Tensor, where: dict[str, Tensor | None]) -> Tensor:
        out = backbone(input_ids=input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **where)
        logits: Tensor = out.logits
        return logits

    def _due(self, alive: Tensor, tokens: Tensor) -> list[bool] | None:
        """Which rows have just generated a boundary; None if no row goes on. The one host read of a token."""
        if not self.boundaries:
            return [False] * len(alive) if bool(alive.any()) else None
        running, new = torch.stack([alive.long(), tokens]).tolist()
        if not any(running):
            return None
        due = []
        for row, (goes_on, token) in enumerate(zip(running, new, strict=True)):
            self._new[row].append(token)
            due.append(bool(goes_on) and ends_in_boundary(self._new[row], self.boundaries))
            self.crossed[row] += due[row]
        return due

    def _next_gates(self) -> Gates:
        """Gates `[batch, blocks]` known before the pass: of the window that ends here, or forced."""
        assert self.sequences is not None
        if self.forced is not None:
            segment = torch.tensor(self.crossed, device=self.forced.device).clamp(max=self.forced.shape[1] - 1)
            routes = self.forced[torch.arange(len(self.forced), device=self.forced.device), segment].float()
            return Gates(routes, routes)
        new = self.mask.new_ones(len(self.mask), self.sequences.shape[1] - self.mask.shape[1])
        context = torch.cat([self.mask, new], dim=1).bool()
        gates = known_gates(self.model, self.sequences, [context], threshold=self.threshold)
        assert gates is not None
        return Gates(gates.hard[:, 0], gates.prob[:, 0])


def _choose(scores: Tensor, sample: bool) -> Tensor:
    """The next token of every row, int64 `[batch]`, from scores `[batch, words]`."""
    if sample:
        return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
    return scores.argmax(dim=-1)


class _Positions:
    """Masks and positions of the passes of one generation, made once; rows may be padded on the left."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        # without padding transformers needs neither: positions follow from the cache, and nothing is to be masked
        self.padded = bool((mask == 0).any())
        self.counts = mask.long().cumsum(1)

    def prompt(self, known: int) -> dict[str, Tensor | None]:
        """Arguments of the pass over the prompt from position `known` on."""
        if not self.padded:
            return {"attention_mask": None}
        return {"attention_mask": self.mask, "position_ids": (self.counts - 1).clamp(min=0)[:, known:]}

    def step(self, step: int) -> dict[str, Tensor | None]:
        """Arguments of the pass over the `step`-th new token, from 1."""
        if not self.padded:
            return {"attention_mask": None}
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), step)], dim=1)
        return {"attention_mask": mask, "position_ids": self.counts[:, -1:] - 1 + step}
