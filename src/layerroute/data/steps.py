"""The row: one assistant step, read, checked and written as JSON lines.

Contract: a `Step` that was read here is well formed: its type is known, its tool schemas are valid JSON Schemas, the
arguments of every call are objects, and a `tool_call` step holds calls while the other types hold text. Whoever gets
a `Step` need not check again. Boundary: knows nothing of tokenizers, chat templates or torch.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, cast

from layerroute.data.chat import check_tools, kind_of, normalize_message
from layerroute.errors import ConfigError, DataError

__all__ = [
    "STEP_TYPES",
    "Step",
    "digest",
    "digest_steps",
    "mark_open_turn",
    "open_turns",
    "read_json_rows",
    "read_steps",
    "split_by_group",
    "write_steps",
]

STEP_TYPES = ("tool_call", "planning", "answer")

_FIELDS = ("id", "source", "group", "step_type", "messages", "target")


@dataclass(frozen=True)
class Step:
    """One assistant step: what stood before it, the tools it could call, and the step itself."""

    id: str
    source: str
    group: str
    """The problem or conversation; a split never parts a group."""
    step_type: str
    """One of `STEP_TYPES`."""
    messages: list[dict[str, Any]]
    """Everything before the step, in OpenAI's chat form. A last `{"role": "assistant", "content": THOUGHT,
    "partial": true}` is the start of the very turn that the target continues."""
    tools: list[dict[str, Any]] | None
    """`{"name", "description", "parameters": JSON Schema}` each."""
    target: dict[str, Any]
    """`{"role": "assistant", "content", "tool_calls"}`; `"partial": true` where the turn goes on after the target, so
    that no end of turn belongs to it (a thought that a call follows)."""
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Step:
        """Check a row and make it a step; arguments given as JSON strings become objects.

        Raises:
            DataError: what is wrong with the row, without its place.
        """
        if not isinstance(row, Mapping):
            raise DataError(f"a row is a JSON object, not {kind_of(row)}")
        missing = [name for name in _FIELDS if name not in row]
        if missing:
            raise DataError(f"field {missing[0]!r} is missing; a row has {', '.join(_FIELDS)} and may have tools, meta")
        for name in ("id", "source", "group"):
            if not isinstance(row[name], str):
                raise DataError(f"{name!r} is a string, not {kind_of(row[name])}")
        if row["step_type"] not in STEP_TYPES:
            raise DataError(f"'step_type' is {row['step_type']!r}; use one of {', '.join(STEP_TYPES)}")
        tools, meta = row.get("tools") or None, row.get("meta") or {}
        if tools is not None:
            check_tools(tools)
        if not isinstance(meta, dict):
            raise DataError(f"'meta' is an object, not {kind_of(meta)}")
        messages = _messages(row["messages"])
        target = _target(row["target"], row["step_type"])
        return cls(row["id"], row["source"], row["group"], row["step_type"], messages, tools, target, meta)

    def to_row(self) -> dict[str, Any]:
        """The row as it is written, fields in their documented order."""
        return {name.name: getattr(self, name.name) for name in fields(self)}


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'messages' is a list with at least one message, not {messages!r:.60}")
    checked = []
    for position, message in enumerate(messages):
        try:
            checked.append(normalize_message(message))
        except DataError as error:
            raise DataError(f"messages[{position}]: {error}") from None
        if checked[-1].get("partial") and position != len(messages) - 1:
            raise DataError(f"messages[{position}]: only the last message can be partial")
    return checked


def _target(target: Any, step_type: str) -> dict[str, Any]:
    try:
        checked = normalize_message(target)
    except DataError as error:
        raise DataError(f"target: {error}") from None
    if checked["role"] != "assistant":
        raise DataError(f"target: 'role' is {checked['role']!r}; a step is the assistant's")
    calls, text = checked.get("tool_calls"), checked["content"]
    if step_type == "tool_call" and not calls:
        raise DataError("target: a tool_call step needs 'tool_calls'")
    if step_type == "tool_call" and text:
        raise DataError("target: text and calls are two rows; move the text into a last message with 'partial': true")
    if step_type != "tool_call" and calls:
        raise DataError(f"target: a {step_type} step holds no 'tool_calls'; a thought and its call are two rows")
    if step_type != "tool_call" and not text:
        raise DataError(f"target: a {step_type} step needs text in 'content'")
    open_turn = {"partial": True} if checked.get("partial") else {}
    return {"role": "assistant", "content": text or None, "tool_calls": calls, **open_turn}


def _open(path: Path) -> IO[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    return cast("IO[str]", opener(path, "rt", encoding="utf-8"))


@contextmanager
def _create(path: Path) -> Iterator[IO[str]]:
    if path.suffix != ".gz":
        with open(path, "w", encoding="utf-8") as file:
            yield file
        return
    # with neither name nor time in its header, for a digest says whether data is the same
    with (
        open(path, "wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as file,
    ):
        yield file


def read_json_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """`(line number from 1, JSON value)` of every non-blank line of a JSON lines file, gzipped or not.

    A file named `.json` or `.json.gz` is one JSON array, whose rows are numbered instead.

    Raises:
        DataError: a missing, unreadable, truncated or empty file; a line that is no JSON.
    """
    path, number = Path(path), 0
    try:
        with _open(path) as file:
            for number, value in _json_values(path, file):
                yield number, value
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number + 1}: not UTF-8: {error.reason}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}:{number + 1}: the gzip file is truncated or damaged: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not number:
        raise DataError(f"{path}: the file is empty; expected one JSON object per line")


def _json_values(path: Path, file: IO[str]) -> Iterator[tuple[int, Any]]:
    if path.name.endswith((".json", ".json.gz")):
        rows = _parse(path, 1, file.read())
        if not isinstance(rows, list):
            raise DataError(f"{path}: a .json file is a list of rows, not {kind_of(rows)}")
        yield from enumerate(rows, start=1)
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, _parse(path, number, line.rstrip())


def _parse(path: Path, first_line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{first_line + error.lineno - 1}: not JSON: {error.msg}") from None


def read_steps(path: str | Path) -> Iterator[Step]:
    """The steps of a file in the row format.

    Raises:
        DataError: `FILE:LINE: ...` at the first malformed row; `FILE: ...` for a missing or empty file.
    """
    for number, row in read_json_rows(path):
        try:
            yield Step.from_row(row)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None


def write_steps(path: str | Path, steps: Iterable[Step]) -> int:
    """Write steps as JSON lines, gzipped where the name ends in `.gz`; returns their number.

    Equal steps give equal bytes.
    """
    count = 0
    with _create(Path(path)) as file:
        for step in steps:
            file.write(json.dumps(step.to_row(), ensure_ascii=False) + "\n")
            count += 1
    return count


def digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def digest_steps(steps: Iterable[Step]) -> str:
    """SHA-256 over the rows of steps that stand in no file, in hex."""
    sha = hashlib.sha256()
    for step in steps:
        sha.update(json.dumps(step.to_row(), sort_keys=True).encode() + b"\n")
    return sha.hexdigest()


def open_turns(steps: Iterable[Step]) -> set[bytes]:
    """The thoughts that a call follows in the same turn, as short digests for `mark_open_turn`.

    Such a thought is recognised by another row of its group that takes it up as its partial last message.
    """
    last = ((step, step.messages[-1]) for step in steps)
    return {_turn_key(step.group, len(step.messages) - 1, end["content"]) for step, end in last if end.get("partial")}


def mark_open_turn(step: Step, opened: set[bytes]) -> Step:
    """Mark a thought that a call follows in the same turn with `"partial": true`.

    Unmarked, it would be trained with an end of turn after it, and the model would stop where it should go on to the
    call.
    """
    text = step.target["content"]
    if step.step_type == "tool_call" or _turn_key(step.group, len(step.messages), text) not in opened:
        return step
    return replace(step, target={**step.target, "partial": True})


def _turn_key(group: str, before: int, text: str) -> bytes:
    return hashlib.blake2b(json.dumps([group, before, text]).encode(), digest_size=12).digest()


def split_by_group(steps: Iterable[Step], share: float, seed: int) -> tuple[list[Step], list[Step]]:
    """`(train, validation)`: whole groups, about `share` of each source's groups in validation.

    The same steps, share and seed give the same parts, whatever the order of the steps. With a share above zero and
    more than one group, neither part is empty.

    Raises:
        ConfigError: a share outside 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"the validation share is {share}; use 0 <= share < 1")
    steps = list(steps)
    home: dict[str, str] = {}
    for step in steps:
        home[step.group] = min(step.source, home.get(step.group, step.source))
    by_source: dict[str, list[str]] = defaultdict(list)
    for group in sorted(home):
        by_source[home[group]].append(group)
    held: set[str] = set()
    for source in sorted(by_source):
        groups = by_source[source]
        random.Random(f"{seed}:{source}").shuffle(groups)
        held.update(groups[: round(share * len(groups))])
    if share and not held and len(home) > 1:
        held.add(random.Random(seed).choice(sorted(home)))
    if len(held) == len(home) and held:
        held.remove(min(held))
    return [s for s in steps if s.group not in held], [s for s in steps if s.group in held]
