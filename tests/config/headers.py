"""The header of a shipped config, as docs/configs.md describes it."""

import re
from pathlib import Path

KEYS = ("paper", "command", "time", "expected")


def read_header(path: Path) -> dict[str, str]:
    """The comment lines at the top of a file: `what`, then the values of KEYS; lines without a key go on."""
    header = {"what": ""}
    key = "what"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        found = re.match(rf"({'|'.join(KEYS)}):\s*", text)
        if found:
            key, text = found[1], text[found.end() :]
        header[key] = f"{header.get(key, '')} {text}".strip()
    return header
