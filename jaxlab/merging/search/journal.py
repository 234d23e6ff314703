"""Points as they are done, a line of JSON each: what a killed search goes on from."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError
from jaxlab.files import jsonable, write_atomic, writing

POINTS = "points.jsonl"


class Journal:
    """The file of a search's points; a line torn by a kill is dropped when it is opened."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
          UserError: a whole line is not one that was written here.
        """
        self.path = folder / POINTS
        self._rows: list[dict[str, Any]] = []
        if self.path.exists():
            try:
                text = self.path.read_text(encoding="utf-8")
                whole = text.rpartition("\n")[0]
                self._rows = [json.loads(line) for line in whole.splitlines()]
                counts: dict[tuple[str, str], int] = {}
                for row in self._rows:
                    key = row["entry"], row["kind"]
                    counts[key] = counts.get(key, -1) + 1
                    is_point, score = row["kind"] == "point", row.get("score")
                    if is_point and (row["index"] != counts[key] or not isinstance(score, int | float)):
                        raise ValueError(row)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"{self.path}: not the lines that a search writes; remove it or use --overwrite"
                ) from None
            if whole + "\n" != text:
                write_atomic(self.path, whole + "\n" if whole else "")

    def rows(self, operator: str, kind: str) -> list[dict[str, Any]]:
        """The lines of one entry of `operators:`, by what they are."""
        return [row for row in self._rows if row["entry"] == operator and row["kind"] == kind]

    def add(self, operator: str, kind: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Appends lines, and gives them as they will be read again."""
        lines = [jsonable({"entry": operator, "kind": kind, **row}) for row in rows]
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._rows += lines
        return lines
