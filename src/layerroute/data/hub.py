"""The public datasets by name: hermes, glaive, gsm8k and turing, through `datasets`.

Contract: `hub_steps(name)` yields the dataset's training rows as steps; rows that cannot be converted are counted.
Boundary: `datasets` is imported on first use and nothing is kept of its own cache; anything that goes wrong on the
way to the hub is one `DataError` that says how to do without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from layerroute.data.sources import Converter, glaive_steps, qa_steps, sharegpt_steps
from layerroute.data.steps import Step
from layerroute.errors import DataError

__all__ = ["HUB", "HubSource", "hub_rows", "hub_steps"]


@dataclass(frozen=True)
class HubSource:
    """Where a dataset lies and how its rows are converted."""

    path: str
    configs: tuple[str | None, ...]
    """Configurations to read, one after another; None is the dataset's default."""
    convert: Converter


HUB: dict[str, HubSource] = {
    # of Hermes' five parts the two that call functions; its Glaive part would repeat the source of that name
    "hermes": HubSource(
        "NousResearch/hermes-function-calling-v1", ("func_calling_singleturn", "func_calling"), sharegpt_steps
    ),
    "glaive": HubSource("glaiveai/glaive-function-calling-v2", (None,), glaive_steps),
    "gsm8k": HubSource("openai/gsm8k", ("main",), qa_steps),
    "turing": HubSource("TuringEnterprises/Turing-Open-Reasoning", (None,), qa_steps),
}


def hub_rows(name: str, streaming: bool = False) -> Iterator[Mapping[str, Any]]:
    """The raw training rows of a dataset of `HUB`.

    Args:
        name: a key of `HUB`.
        streaming: read over the network as needed instead of downloading the whole dataset first.

    Raises:
        DataError: the hub or the dataset cannot be reached.
    """
    hub_source = HUB[name]
    for config in hub_source.configs:
        try:
            load_dataset: Any = import_module("datasets").load_dataset
            yield from load_dataset(hub_source.path, config, split="train", streaming=streaming)
        except Exception as error:  # the hub's clients raise errors of four libraries, with no common base
            raise DataError(
                f"dataset {name!r} ({hub_source.path}) cannot be read from the hub: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}; "
                "without a network, give a file in the row format or the source 'builtin'"
            ) from error


def hub_steps(name: str, skipped: Counter[str] | None = None, streaming: bool = False) -> Iterator[Step]:
    """The steps of a dataset of `HUB`; rows that cannot be converted are counted in `skipped` by reason.

    Raises:
        DataError: the hub or the dataset cannot be reached.
    """
    counter: Counter[str] = Counter() if skipped is None else skipped
    return HUB[name].convert(hub_rows(name, streaming), source=name, skipped=counter)
