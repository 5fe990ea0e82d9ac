"""The files of an evaluation: JSON lines that grow while something is measured, and JSON objects beside them.

Rows are appended in whole batches and flushed; a last line that was cut off (a killed process, a full disk) is removed
before more is written. Knows nothing of what is in a row. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from layerroute.errors import DataError

__all__ = ["RowFile", "read_rows", "write_json"]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one object; what stood there stays until the new file is whole.

    Raises:
        DataError: it cannot be written (a full disk, no permission).
    """
    new = path.with_name(f".{path.name}.new")
    try:
        try:
            new.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(new, path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be written: {error.strerror or error}; once it can, the same command goes on from there"
    )


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, one at a time; none where there is no file.

    Raises:
        DataError: a line that is no JSON object.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}; remove the file and evaluate again") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a row is a JSON object; remove the file and evaluate again")
            yield row


class RowFile:
    """A file of rows to add to.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            _drop_torn_line(path)
        except OSError as error:
            raise _unwritable(path, error) from error

    def keys(self, *names: str) -> set[tuple[Any, ...]]:
        """The values of these fields in every row that is there: what has been done already."""
        return {tuple(row.get(name) for name in names) for row in read_rows(self.path)}

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, all of them or, if the process dies, none but the first few.

        Raises:
            DataError: the file cannot be written.
        """
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _drop_torn_line(path: Path) -> None:
    """Cut the file after its last line end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, 2)
        end = size
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
