"""Notices when gates no longer choose: all of them open, or all closed, for every input, for many updates on end.

Contract: warns once for each of the two, names it, and changes nothing; a collapse may be what a recipe leads to, and
is then a result. Boundary: sees one share; knows neither losses nor models.
"""

from __future__ import annotations

import logging

__all__ = ["PATIENCE", "Collapse"]

_LOG = logging.getLogger(__name__)

PATIENCE = 50
"""Updates in a row before it is said."""


class Collapse:
    """Watches the gates of successive micro-batches."""

    def __init__(self) -> None:
        self._since: dict[str, int | None] = {"open": None, "closed": None}
        self._said: set[str] = set()

    def note(self, share: float, step: int, skipping: bool) -> None:
        """Note a micro-batch.

        Args:
            share: of its gates at routable blocks that are open, over all decisions and processes.
            step: update, from 0.
            skipping: whether anything is to be skipped at this update; if not, open gates are no collapse.
        """
        for state, holds in (("open", share == 1 and skipping), ("closed", share == 0)):
            since = self._since[state]
            if not holds:
                self._since[state] = None
            elif since is None:
                self._since[state] = step
            elif step - since >= PATIENCE and state not in self._said:
                self._said.add(state)
                _LOG.warning(
                    "all gates have been %s for every input since update %d: the routers do not choose; another "
                    "router_lr, router_loss_weight or logit_noise may help, or recipe `default`",
                    state,
                    since + 1,
                )
