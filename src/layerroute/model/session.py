"""A conversation's cache between turns: what was read is kept, and only what a new turn's route lacks is read again.

Every token keeps the route under which it was read. A new turn's route is decided from the whole conversation; tokens
whose route contains it stay, for they hold keys and values in every block that it runs. From the first token that does
not, everything is read again under the new route. (Keys of a block that a token skipped could be computed only from
hidden states that the new route would change, so that is never exact; see docs/decisions.)

The outputs are those of a cold start that reads the same tokens under the same routes; with `reuse="equal"` no older
route is ever mixed in, and they are those of `generate` without a session.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from layerroute.errors import ConfigError, GenerationError
from layerroute.model.cache import RoutedCache
from layerroute.model.router import Gates, Memory
from layerroute.model.routing import SkippingRouting

if TYPE_CHECKING:
    from layerroute.model.decoding import Decoding
    from layerroute.model.routed import RoutedModel

__all__ = ["ConversationRouting", "RouteOpens", "Session"]


class RouteOpens(Exception):
    """The route just decided runs blocks in which tokens from `position` on hold no keys; the pass stops there."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


class ConversationCache(RoutedCache):
    """Keeps the keys of blocks that a turn closes: an earlier part of the conversation may need them again."""

    def keep_rows(self, index: int, rows: Sequence[int]) -> None:
        """Keep everything; there is one row, and a later turn that opens the block truncates first."""


class ConversationRouting(SkippingRouting):
    """Stops the pass that decides the route, if the conversation's cache does not serve it.

    Args:
        session: knows the routes of the tokens in the cache.
    """

    def __init__(self, *args: Any, session: Session, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.session = session

    def _decide(self, index: int, hidden: Tensor) -> None:
        undecided = self.columns[index] is None
        super()._decide(index, hidden)
        if undecided:
            self.session.require(self.routes[0])


class Session:
    """One conversation with one model; pass it to `generate(..., session=session)` with the whole prompt of each turn.

    Args:
        model: whose turns these are.
        max_tokens: keep at most so many tokens between turns; older ones first, as later ones depend on them.
        reuse: keep tokens whose route contains the new turn's (`within`), or only those whose route is the same
            (`equal`).

    Raises:
        ConfigError: a setting out of range, or a model whose routers decide block by block.
    """

    def __init__(
        self, model: RoutedModel, *, max_tokens: int = 8192, reuse: Literal["within", "equal"] = "within"
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"max_tokens={max_tokens}: a session keeps at least one token")
        if reuse not in ("within", "equal"):
            raise ConfigError(f"reuse={reuse!r}: use 'within' or 'equal'")
        if model.router_config.position == "block":
            raise ConfigError("a session needs routers with position='early': the others decide while a prompt is read")
        self.model = model
        self.max_tokens = max_tokens
        self.reuse = reuse
        self._merged = model.merged
        self.drop()

    def drop(self) -> None:
        """Forget the conversation and free its memory; the next turn is a cold start."""
        self.tokens: list[int] = []
        """Token ids whose keys and values are held."""
        self.routes: list[tuple[int, Tensor]] = []
        """Where each run of tokens under one route starts, and the route, bool `[blocks]`."""
        self._cache: ConversationCache | None = None
        self._memory: Memory | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self._cache.nbytes() if self._cache is not None else 0

    def require(self, route: Tensor) -> None:
        """Make sure that every token in the cache may stay under a new turn's route, bool `[blocks]`.

        Raises:
            RouteOpens: some may not.
        """
        position = self._serves(route)
        if position < len(self.tokens):
            raise RouteOpens(position)

    def check(self, model: RoutedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Refuse a prompt that is none of this conversation's.

        Raises:
            GenerationError: another model's prompt, several rows, or padding.
        """
        if model is not self.model:
            raise GenerationError("session: it belongs to another adapter or model; start a Session for this one")
        if len(input_ids) != 1:
            raise GenerationError(f"session: a conversation is one row, not {len(input_ids)}")
        if not bool(attention_mask.all()):
            raise GenerationError("session: its prompt is read as it stands; attention_mask must not hide any token")

    def open(
        self,
        model: RoutedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        gates: Gates | None,
        threshold: float | None,
        *,
        forced: bool,
    ) -> RoutedCache:
        """The cache for a turn whose whole prompt is `input_ids` `[1, seq]`, what the two share kept in it."""
        if self._merged != model.merged:
            self.drop()  # keys of weights that round differently
            self._merged = model.merged
        self._keep_shared(input_ids[0].tolist())
        if gates is not None:
            self._forget(self._serves(gates.hard[0, 0] > 0.5))
        remember = not forced and model.router_config.context == "full"
        if remember and len(self.tokens) and self._memory is None:
            # the routers' tail is read again; a mean needs everything
            tail_only = model.router_config.pooling in ("tail", "last")
            self._forget(len(self.tokens) - model.router_config.window if tail_only else 0)
        fed = attention_mask[:, len(self.tokens) :].bool()
        routing = ConversationRouting(
            model.routers,
            [fed],
            gates,
            threshold=threshold,
            remember=remember,
            memory=self._memory if remember else None,
            session=self,
        )
        if self._cache is None:
            self._cache = ConversationCache(model.config.get_text_config(), routing)
        self._cache.routing, self._cache.segments = routing, []
        return self._cache

    def keep(self, decoding: Decoding) -> None:
        """Take over what a finished turn left in the cache."""
        cache = decoding.cache
        assert cache is self._cache and decoding.sequences is not None
        for start, routes in cache.segments:
            self._cut_routes(start)
            self.routes.append((start, routes[0]))
        self.tokens = decoding.sequences[0, : cache.get_seq_length()].tolist()
        self._memory = cache.routing.memory if cache.routing.remember else None
        if len(self.tokens) > self.max_tokens:
            self._forget(self.max_tokens)

    def _keep_shared(self, prompt: list[int]) -> None:
        """Forget what the prompt does not start with; its last token is always read, for its logits."""
        pairs = zip(self.tokens, prompt[:-1], strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.tokens), len(prompt) - 1))
        self._forget(shared)

    def _serves(self, route: Tensor) -> int:
        """The first position whose route does not serve a new one, bool `[blocks]`."""
        for start, held in self.routes:
            serves = (held == route) if self.reuse == "equal" else (held | ~route)
            if not bool(serves.all()):
                return 0 if self._cache is None or self._cache.slides else start
        return len(self.tokens)

    def _forget(self, position: int) -> None:
        """Forget every token from `position` on."""
        position = max(0, position)
        if position >= len(self.tokens):
            return
        assert self._cache is not None
        self._memory = None  # it has read what is now forgotten
        if position == 0 or self._cache.slides:
            self.drop()
            return
        self._cache.truncate(position)
        self.tokens = self.tokens[:position]
        self._cut_routes(position)

    def _cut_routes(self, position: int) -> None:
        self.routes = [(start, route) for start, route in self.routes if start < position]
