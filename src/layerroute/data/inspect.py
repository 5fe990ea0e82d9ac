"""What a set of steps is like, before anything is trained on it: counts, lengths, pairing, and what gives a type away.

Contract: steps are read once, and of each a few numbers are kept, never its texts; what comes out is JSON-able. A
conversation is a group of one source. Boundary: a tokenizer is passed in; nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from scipy.stats import rankdata

from layerroute.data.render import encode, render_step, tokenize_step
from layerroute.data.steps import STEP_TYPES, Step
from layerroute.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FEW_CONVERSATIONS", "FEW_ROWS", "auc", "inspect_steps"]

FEW_ROWS = 50
FEW_CONVERSATIONS = 10
"""With fewer, `layerroute evaluate` gives no interval."""
_TELLING = 0.9
"""An AUC from which on, and one minus which down, a shortcut is warned about."""
_DROPPED = 0.1
"""A share of dropped rows above which it is."""

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

_TOOL_CALL, _PLANNING = STEP_TYPES.index("tool_call"), STEP_TYPES.index("planning")
_NUMBERS = (
    *("kind", "source", "conversation"),  # index in STEP_TYPES, in the order of the sources, of the conversations
    *("prompt_characters", "target_characters", "messages", "tools", "after_thought"),
    *("prompt_tokens", "target_tokens", "cut", "dropped"),  # 0 without a tokenizer
)
_QUANTILES = {"10%": 0.1, "50%": 0.5, "90%": 0.9, "max": 1.0}


def inspect_steps(
    steps: Iterable[Step], tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None
) -> dict[str, Any]:
    """Describe steps; docs/data.md explains every key.

    Args:
        steps: read once, one by one.
        tokenizer: with a chat template; lengths are then given in tokens too, and prompt lengths compared in them.
        max_length: with a tokenizer, count the steps that training or evaluation would cut or drop at so many tokens.

    Raises:
        DataError: no step at all, or one that the chat template cannot render.
    """
    table, sources, duplicates = _read(steps, tokenizer, max_length)
    units = ["characters"] if tokenizer is None else ["characters", "tokens"]
    kinds = {name: table[table["kind"] == code] for code, name in enumerate(STEP_TYPES)}
    by_source = {name: table[table["source"] == code] for code, name in enumerate(sources)}
    calls = kinds["tool_call"]
    facts = {
        **_size(table),
        "types": {name: _size(rows) for name, rows in kinds.items()},
        "sources": {name: _size(rows) | _types(rows) for name, rows in by_source.items()},
        "lengths": {name: _lengths(rows, units, max_length) for name, rows in kinds.items() if len(rows)},
        "pairing": {**_size(_paired(table)), "sources": {name: _size(_paired(t)) for name, t in by_source.items()}},
        "tool_calls": {
            "after_thought": int(calls["after_thought"].sum()),
            "direct": int((calls["after_thought"] == 0).sum()),
        },
        "shortcuts": _shortcuts(table, units[-1]),
        "duplicates": duplicates,
    }
    return {**facts, "warnings": list(_warnings(facts))}


def auc(values: Array, positive: Array, conversations: Array | None = None) -> float | None:
    """How often a positive row's value exceeds another row's, ties counting half: Mann and Whitney's U, as a share.

    Args:
        values: `[n]`.
        positive: bool `[n]`.
        conversations: `[n]`, or None; given, only rows of one conversation are compared with each other.

    Returns:
        None where no two rows are compared.
    """
    groups = [np.arange(len(values))]
    if conversations is not None:
        order = np.argsort(conversations, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(conversations[order])) + 1)
    wins, pairs = 0.0, 0
    for rows in groups:
        count = int(positive[rows].sum())
        compared = count * (len(rows) - count)
        if compared:
            wins += float(rankdata(values[rows])[positive[rows]].sum()) - count * (count + 1) / 2
            pairs += compared
    return wins / pairs if pairs else None


def _read(
    steps: Iterable[Step], tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
) -> tuple[Array, list[str], dict[str, int]]:
    """The steps' numbers as a structured array `[n]`, the sources by code, and how many steps repeat another."""
    numbers = array("q")
    sources: dict[str, int] = {}
    conversations: dict[tuple[str, str], int] = {}
    ids: set[str] = set()
    contents: set[bytes] = set()
    for step in steps:
        ids.add(step.id)
        contents.add(hashlib.blake2b(_json([step.messages, step.tools, step.target]).encode(), digest_size=12).digest())
        source = sources.setdefault(step.source, len(sources))
        conversation = conversations.setdefault((step.source, step.group), len(conversations))
        numbers.extend([STEP_TYPES.index(step.step_type), source, conversation, *_shape(step)])
        numbers.extend((0, 0, 0, 0) if tokenizer is None else _tokens(tokenizer, step, max_length))
    if not numbers:
        raise DataError("there are no steps to inspect")
    table: Array = np.frombuffer(numbers, dtype=[(name, np.int64) for name in _NUMBERS])
    return table, list(sources), {"ids": len(table) - len(ids), "contents": len(table) - len(contents)}


def _shape(step: Step) -> tuple[int, ...]:
    """Characters of prompt and target, without what a template adds; whole messages; whether tools, and a thought."""
    after_thought = bool(step.messages[-1].get("partial"))
    prompt = sum(map(_characters, step.messages)) + (len(_json(step.tools)) if step.tools else 0)
    return prompt, _characters(step.target), len(step.messages) - after_thought, bool(step.tools), after_thought


def _characters(message: Mapping[str, Any]) -> int:
    calls = message.get("tool_calls")
    return len(message["content"] or "") + (len(_json(calls)) if calls else 0)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _tokens(tokenizer: PreTrainedTokenizerBase, step: Step, max_length: int | None) -> tuple[int, ...]:
    """Tokens of prompt and target, and whether the step would be cut, or dropped."""
    try:
        prompt, target = (len(encode(tokenizer, text)) for text in render_step(tokenizer, step))
        if max_length is None or prompt + target <= max_length:
            return prompt, target, False, False
        fits = tokenize_step(tokenizer, step, max_length) is not None
    except DataError as error:
        raise DataError(f"step {step.id!r} of {step.source!r}: {error}") from None
    return prompt, target, fits, not fits


def _size(rows: Array) -> dict[str, int]:
    return {"rows": len(rows), "conversations": len(np.unique(rows["conversation"]))}


def _types(rows: Array) -> dict[str, int]:
    return {name: int((rows["kind"] == code).sum()) for code, name in enumerate(STEP_TYPES)}


def _lengths(rows: Array, units: list[str], max_length: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (f"{part}_{unit}" for unit in units for part in ("prompt", "target")):
        # lengths that occur, not numbers between them
        values = np.quantile(rows[name], list(_QUANTILES.values()), method="inverted_cdf")
        found[name] = dict(zip(_QUANTILES, values.tolist(), strict=True))
    if max_length is not None:
        found |= {name: int(rows[name].sum()) for name in ("cut", "dropped")}
    return found


def _paired(table: Array) -> Array:
    """The tool_call and planning rows of conversations that hold both."""
    rows = table[np.isin(table["kind"], [_TOOL_CALL, _PLANNING])]
    calls = rows["kind"] == _TOOL_CALL
    both = np.intersect1d(rows["conversation"][calls], rows["conversation"][~calls])
    paired: Array = rows[np.isin(rows["conversation"], both)]
    return paired


def _shortcuts(table: Array, unit: str) -> dict[str, Any]:
    """How well each thing that is not the step type tells tool_call from planning; None where there are not both."""
    compared, paired = table[np.isin(table["kind"], [_TOOL_CALL, _PLANNING])], _paired(table)
    calls = compared["kind"] == _TOOL_CALL
    both = calls.any() and not calls.all()
    return {
        "length_unit": unit,
        "pooled": _told(compared, unit, None) if both else None,
        "paired": _told(paired, unit, paired["conversation"]) if len(paired) else None,
        "tools_exactly_on_calls": bool(both and (calls == compared["tools"]).all()),
    }


def _told(rows: Array, unit: str, conversations: Array | None) -> dict[str, Any]:
    calls = rows["kind"] == _TOOL_CALL
    features = {"prompt_length": f"prompt_{unit}", "tools": "tools", "messages": "messages"}
    counts = np.zeros((rows["source"].max() + 1, 2))
    np.add.at(counts, (rows["source"], calls.astype(int)), 1)
    return {
        **{name: auc(rows[column], calls, conversations) for name, column in features.items()},
        # how often the commoner type of a step's source is its type, and how often the commoner type of all is
        "source": {
            "accuracy": float(counts.max(1).sum() / len(rows)),
            "majority": float(counts.sum(0).max() / len(rows)),
        },
    }


def _warnings(facts: Mapping[str, Any]) -> Iterator[str]:
    """What stands in the way of training on these steps, or of believing an evaluation on them."""
    for name, size in facts["types"].items():
        yield from _few(name, size["rows"], size["conversations"])
    for name, lengths in facts["lengths"].items():
        dropped, rows = lengths.get("dropped", 0), facts["types"][name]["rows"]
        if dropped > _DROPPED * rows:
            yield (
                f"{dropped} of {rows} {name} rows would be dropped, for target and tools alone do not fit; raise "
                "--max-length"
            )
    shortcuts, paired = facts["shortcuts"], facts["pairing"]["conversations"]
    if shortcuts["pooled"] and not paired:
        yield (
            "no conversation holds both tool_call and planning steps, so step type and source cannot be told apart; "
            "add conversations in which the agent both thinks and calls"
        )
    elif shortcuts["pooled"] and paired < FEW_CONVERSATIONS:
        yield (
            f"only {paired} conversations hold both tool_call and planning steps; have {FEW_CONVERSATIONS} at least, "
            "or an evaluation gives no interval within conversations"
        )
    for where, words in (("pooled", "over all steps"), ("paired", "within conversations")):
        value = shortcuts[where] and shortcuts[where]["prompt_length"]
        if value is not None and not 1 - _TELLING <= value <= _TELLING:
            yield (
                f"prompt length alone tells tool_call from planning {words} (AUC {value:.2f}), so routes may follow "
                "length; look at the length-matched differential of an evaluation"
            )
    if shortcuts["tools_exactly_on_calls"]:
        yield (
            "tools are present on tool_call steps and on no planning step, so routes may follow the tool list; add "
            "planning steps that have tools"
        )
    duplicates = facts["duplicates"]
    if duplicates["ids"]:
        yield f"{duplicates['ids']} rows repeat the id of another row; `layerroute evaluate` leaves them out"
    if duplicates["contents"]:
        yield f"{duplicates['contents']} rows repeat the prompt and target of another row; they count twice"


def _few(name: str, rows: int, conversations: int) -> Iterator[str]:
    if not rows:
        yield f"no {name} rows: what routing does to such steps can be neither trained nor measured"
    elif rows < FEW_ROWS or conversations < FEW_CONVERSATIONS:
        yield (
            f"few {name} rows: {rows} in {conversations} conversations; have {FEW_ROWS} rows in {FEW_CONVERSATIONS} "
            "conversations at least"
        )
