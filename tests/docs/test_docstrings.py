"""What public functions raise stands in their docstrings in Google's form, everywhere the same:

Raises:
  Error: when.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for name in ("jaxlab", "kernels_pallas") for path in (ROOT / name).rglob("*.py"))

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

INLINE = re.compile(r"\bRaises:? +`?[A-Z]\w*|\bRaises: *\S")
ENTRY = re.compile(r" +[A-Za-z_][\w.]*(?:, [A-Za-z_][\w.]*)*: \S")


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def faults(text: str) -> list[str]:
    """What is not in Google's form in one docstring."""
    found = [f"in a sentence: {hit.group()}" for hit in INLINE.finditer(text)]
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if line.strip() != "Raises:":
            continue
        block = []
        for inner in lines[at + 1 :]:
            if not inner.strip() or len(inner) - len(inner.lstrip()) <= len(line) - len(line.lstrip()):
                break
            block.append(inner)
        least = min((len(inner) - len(inner.lstrip()) for inner in block), default=0)
        entries = [inner for inner in block if len(inner) - len(inner.lstrip()) == least]
        if not entries:
            found.append("an empty block")
        found += [f"no `Error: when`: {entry.strip()}" for entry in entries if not ENTRY.match(entry)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_raised_stands_in_a_block(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [(line, fault) for line, text in docstrings(tree) for fault in faults(text)] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("What it does.\n\nRaises:\n  UserError: there is none;\n    say so.\n  ValueError: else.", 0),
        ("What it raises, and that it raises it.", 0),
        ("What it does. Raises UserError.", 1),
        ("What it does.\n\nRaises: UserError for mistakes.", 1),
        ("What it does.\n\nRaises:\n  when there is none", 1),
        ("What it does.\n\nRaises:\n\nNothing.", 1),
    ],
)
def test_other_forms_are_found(text: str, count: int) -> None:
    assert len(faults(text)) == count
