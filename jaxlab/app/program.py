"""How the command line was called, for messages and for the commands that runs note."""

import sys
from pathlib import Path

import jaxlab


def program() -> str:
    """`python run.py`, `jaxlab` or `python -m jaxlab`; elsewhere, what would work."""
    called = Path(sys.argv[0])
    if called.name == "jaxlab":
        return "jaxlab"
    if called.name == "__main__.py" and called.parent.name == "jaxlab":
        return "python -m jaxlab"
    in_checkout = (Path(jaxlab.__file__).parent.parent / "run.py").exists()
    return "python run.py" if called.name == "run.py" or in_checkout else "jaxlab"
