"""Compiled decoding: one graph per route, over keys and values that stay where they are.

A graph is the backbone with the closed blocks left out of its list, over transformers' static cache, under
`torch.compile` (with CUDA graphs on a GPU). Prompts, and the passes that decide, run eagerly; between two decisions a
batch's rows are grouped by route, and every group's step is one call of its graph. A bounded number of graphs is kept;
what needs more, and what a static cache cannot hold (sliding windows), decodes eagerly.

Boundary: knows caches and backbones; what tokens come out is `decoding.py`'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, StaticCache

from layerroute.errors import GenerationError
from layerroute.model.cache import RoutedCache
from layerroute.model.views import decoding_block, without_blocks

if TYPE_CHECKING:
    from layerroute.model.routed import RoutedModel

__all__ = ["DecodeGraphs", "GraphRun"]

_LOG = logging.getLogger(__name__)
_CAPACITY_STEP = 64  # positions: on a GPU attention runs over all of them, written to or not


class _Key(NamedTuple):
    """What a graph is made for."""

    route: tuple[bool, ...]
    rows: int
    remember: bool
    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None


class DecodeGraphs:
    """The compiled decoding steps of one model.

    Args:
        limit: how many are kept; each holds a static cache. The first ones stay, further routes decode eagerly.
        cpu_rows: larger batches decode eagerly on a CPU, where generated code gains for one row and loses for several
            (docs/log.md).
    """

    def __init__(self, limit: int = 8, cpu_rows: int = 1) -> None:
        self.limit = limit
        self.cpu_rows = cpu_rows
        self._graphs: dict[_Key, _Graph] = {}
        self._told: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeGraphs:
        return DecodeGraphs(self.limit, self.cpu_rows)  # a copied model's weights are others

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drop every graph and its cache; needed when modules of the model are exchanged."""
        self._graphs.clear()

    def start(self, model: RoutedModel, cache: RoutedCache, mask: Tensor, end: int) -> GraphRun | None:
        """Move a generation into graphs, if they can take it.

        Args:
            model: in evaluation mode.
            cache: holds everything read so far; until `GraphRun.finish` it stays as it is.
            mask: `[batch, prompt]`, 0 at the prompt's padding.
            end: the most positions that the generation can reach.

        Returns:
            None where the generation has to go on eagerly.
        """
        if model.device.type == "cpu" and len(mask) > self.cpu_rows:
            return self._none(f"on a CPU more than {self.cpu_rows} rows are faster so")
        attention = model.config._attn_implementation
        if cache.slides or attention not in ("sdpa", "eager"):
            return self._none(f"a static cache serves neither sliding windows nor {attention} attention")
        open_rows = [cache.routing.open_rows(block) for block in range(len(cache.layers))]
        groups: dict[tuple[bool, ...], list[int]] = {}
        for row in range(len(mask)):
            groups.setdefault(tuple(row in rows for rows in open_rows), []).append(row)
        device = model.device
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        found = []
        for route, rows in groups.items():
            key = _Key(route, len(rows), cache.routing.remember, device, model.backbone.dtype, cast)
            graph = self._get(model, key, end)
            if graph is None:
                return None
            found.append((graph, rows))
        return GraphRun(cache, mask, found)

    def _get(self, model: RoutedModel, key: _Key, end: int) -> _Graph | None:
        graph = self._graphs.get(key)
        if graph is not None and graph.busy:
            return self._none("its graph is in use by another generation")
        if graph is None and len(self._graphs) >= self.limit:
            return self._none(f"{self.limit} compiled routes are held, the most")
        if key.remember and not any(key.route[model.routable[0] :]):
            return self._none("no block runs where the routers read")
        if graph is None or graph.capacity < end:
            # of a route whose generations grow there is one graph, and it grows by more than a step
            wanted = max(end, 2 * graph.capacity if graph else 0)
            graph = self._graphs[key] = _Graph(model, key, -(-wanted // _CAPACITY_STEP) * _CAPACITY_STEP)
        return graph

    def _none(self, reason: str) -> Any:
        """None, and why a generation that was to be compiled is not; said once."""
        if reason not in self._told:
            _LOG.warning("compiled=True: decoding eagerly: %s", reason)
            self._told.add(reason)
        return None


class _Tap(nn.Module):
    """A block whose input is noted, for the routers to read when they decide again."""

    def __init__(self, block: nn.Module, capacity: int) -> None:
        super().__init__()
        self.block = block
        self.capacity = capacity
        self.hidden: Tensor | None = None
        """`[rows, capacity, hidden]`, by position."""

    def forward(self, hidden_states: Tensor, *, cache_position: Tensor, **kwargs: Any) -> Tensor:
        assert self.hidden is not None
        self.hidden.index_copy_(1, cache_position, hidden_states)
        output: Tensor = self.block(hidden_states, **kwargs)
        return output


class _Graph:
    """The decoding step of one route for a number of rows, with the static cache that it works on."""

    def __init__(self, model: RoutedModel, key: _Key, capacity: int) -> None:
        self.open = [index for index, is_open in enumerate(key.route) if is_open]
        self.capacity = capacity
        self.busy = self._runs = False
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=capacity)
        blocks = [decoding_block(model.structure.blocks[index]) for index in self.open]
        self.tap: _Tap | None = None
        if key.remember:
            position = next(i for i, index in enumerate(self.open) if index >= model.routable[0])
            self.tap = blocks[position] = _Tap(blocks[position], capacity)
        view: Any = without_blocks(model.backbone, model.structure.decoder, blocks)
        cache, tapped = self.cache, self.tap is not None

        def step(ids: Tensor, positions: Tensor, mask: Tensor, where: Tensor) -> Tensor:
            noted = {"cache_position": where} if tapped else {}
            out = view(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **noted,
            )
            logits: Tensor = out.logits
            return logits

        self._step = torch.compile(_apart(step), dynamic=False, options=_options(model.device))

    def load(self, cache: RoutedCache, rows: list[int], mask: Tensor) -> None:
        """Copy the keys and values of `rows` in, and what the prompt's mask hides of them."""
        length = cache.get_seq_length()
        for index in self.open:
            held, static = _layer(cache, index), _layer(self.cache, index)
            of_block = cache.routing.open_rows(index)
            chosen = torch.tensor([of_block.index(row) for row in rows], device=held.keys.device)
            keys, values = held.keys.index_select(0, chosen), held.values.index_select(0, chosen)
            if not static.is_initialized:
                static.lazy_initialization(keys, values)
            static.keys[:, :, :length].copy_(keys)
            static.values[:, :, :length].copy_(values)
            static.cumulative_length.fill_(length)
        self.mask = torch.zeros(len(rows), 1, 1, self.capacity, dtype=torch.bool, device=mask.device)
        self.mask[..., :length] = True
        self.mask[..., : mask.shape[1]] = mask[rows, None, None].bool()
        self.attended = mask[rows].sum(1, keepdim=True) + length - mask.shape[1]
        self.where = torch.tensor([length], device=mask.device)
        if self.tap is not None and self.tap.hidden is None:
            memory = cache.routing.memory
            assert memory is not None
            tail = memory.tail
            self.tap.hidden = tail.new_zeros(len(rows), self.capacity, tail.shape[-1])
            torch._dynamo.mark_static_address(self.tap.hidden)  # as transformers does with keys and values

    def step(self, tokens: Tensor, position: int) -> Tensor:
        """Logits `[rows, 1, words]` after `tokens` `[rows]`, which stand at `position`."""
        self.mask[..., position] = True
        try:
            logits: Tensor = self._step(tokens[:, None], self.attended, self._shown(position), self.where)
        except Exception as error:
            if self._runs:
                raise
            cause = str(error).strip().split("\n")[0]
            raise GenerationError(
                f"compiled=True: torch could not compile the decoding step ({type(error).__name__}: {cause}); a C++ "
                "compiler is needed on a CPU, Triton on a GPU; without compiled=True decoding is eager"
            ) from error
        self._runs = True
        self.attended, self.where = self.attended + 1, self.where + 1
        return logits.clone()  # a CUDA graph writes its next result to the same place

    def _shown(self, position: int) -> Tensor:
        """The mask up to `position`, so that attention does not run over capacity that nothing was written to.

        A CUDA graph has one shape for good and gets the whole mask.
        """
        if self.mask.is_cuda:
            return self.mask
        shown = self.mask[..., : position + 1]
        if not self._runs:
            torch._dynamo.mark_dynamic(shown, 3)
        return shown


class GraphRun:
    """A generation while it decodes in graphs, from one decision to the next.

    Args:
        cache: the generation's; takes over what was read when the run finishes.
        mask: `[batch, prompt]`.
        groups: graphs with the rows that each decodes.
    """

    def __init__(self, cache: RoutedCache, mask: Tensor, groups: list[tuple[_Graph, list[int]]]) -> None:
        self.cache = cache
        self.begin = self.length = cache.get_seq_length()
        self.groups = groups
        self._indices = [torch.tensor(rows, device=mask.device) for _, rows in groups]
        try:
            for graph, rows in groups:
                graph.busy = True
                graph.load(cache, rows, mask)
        except BaseException:
            self.release()
            raise

    def step(self, tokens: Tensor) -> Tensor:
        """Logits `[batch, 1, words]` after one more token of every row, `[batch]`."""
        if len(self.groups) == 1:
            logits = self.groups[0][0].step(tokens, self.length)
        else:
            parts = [
                graph.step(tokens.index_select(0, index), self.length)
                for (graph, _), index in zip(self.groups, self._indices, strict=True)
            ]
            logits = parts[0].new_empty(len(tokens), *parts[0].shape[1:])
            for index, part in zip(self._indices, parts, strict=True):
                logits.index_copy_(0, index, part)
        self.length += 1
        return logits

    def finish(self) -> None:
        """Give what was read back to the generation's cache and memory, and the graphs to others."""
        if self.length > self.begin:
            for index in range(len(self.cache.layers)):
                self._give_back(index)
            memory = self.cache.routing.memory
            if memory is not None and self.cache.routing.remember:
                memory.extend(self._noted(memory.tail))
            self.cache.advance(self.length - self.begin)
        self.release()

    def release(self) -> None:
        """Give the graphs to others."""
        for graph, _ in self.groups:
            graph.busy = False

    def _give_back(self, index: int) -> None:
        of_block = self.cache.routing.open_rows(index)
        if not of_block:
            return
        layer = _layer(self.cache, index)
        new = slice(self.begin, self.length)
        shape = (len(of_block), layer.keys.shape[1], self.length - self.begin)
        keys = layer.keys.new_empty(*shape, layer.keys.shape[-1])
        values = layer.values.new_empty(*shape, layer.values.shape[-1])
        for graph, rows in self.groups:
            if index in graph.open:
                places = [of_block.index(row) for row in rows]
                static = _layer(graph.cache, index)
                keys[places], values[places] = static.keys[:, :, new], static.values[:, :, new]
        layer.update(keys, values)

    def _noted(self, like: Tensor) -> Tensor:
        """`[batch, new, hidden]`: what entered the first routable block."""
        rows = sum(len(rows) for _, rows in self.groups)
        noted = like.new_empty(rows, self.length - self.begin, like.shape[-1])
        for graph, chosen in self.groups:
            assert graph.tap is not None and graph.tap.hidden is not None
            noted[chosen] = graph.tap.hidden[:, self.begin : self.length]
        return noted


def _apart(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with a code object of its own: torch files what it compiles under that."""
    assert isinstance(function, FunctionType)
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )


def _options(device: torch.device) -> dict[str, Any]:
    """Options of `torch.compile`. A graph's key and its owner's `clear` say when it holds, so that torch need not look
    through every module before each token, which takes longer than a small model's step on a GPU."""
    options: dict[str, Any] = {"triton.cudagraphs": device.type == "cuda"}
    if hasattr(torch.compiler, "skip_all_guards_unsafe"):  # of late versions
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    return options


def _layer(cache: Cache, index: int) -> Any:
    """A block's part of a cache; transformers types it as any kind of layer."""
    return cache.layers[index]
