"""Which code, which versions and which devices made a result."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jaxlab
from jaxlab.app.compile_cache import folder_in_use

_CODE = ("run.py", "jaxlab", "kernels_pallas")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "scikit-learn")


@dataclasses.dataclass(frozen=True)
class Code:
    """The state of the code: package version and, in a git checkout, the commit and what is changed since."""

    version: str
    commit: str
    """Empty outside a checkout, and in one without a commit."""
    changes: str
    """A hash of the code if it differs from the commit, else empty."""

    @property
    def dirty(self) -> bool:
        return bool(self.changes)


@functools.cache
def code() -> Code:
    """The code that this process runs, as it was when first asked for."""
    return code_in(Path(jaxlab.__file__).parent.parent)


def code_in(root: Path) -> Code:
    """The state of the code in a checkout, or of an installed package.

    Only what computes counts as changed: run.py, jaxlab/ and kernels_pallas/. A config is part of a run's
    identity by its values, and pages of documentation change no result.
    """
    if not (root / ".git").exists() or not (root / "run.py").exists():
        return Code(jaxlab.__version__, "", "")
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *_CODE)
    return Code(jaxlab.__version__, commit or "", "" if commit and changed == "" else _hash_of_code(root))


def _git(root: Path, *arguments: str) -> str | None:
    try:
        process = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:  # no git on this machine: the code counts as changed
        return None
    return process.stdout.strip() if process.returncode == 0 else None


def _hash_of_code(root: Path) -> str:
    digest = hashlib.sha256()
    files = [
        path
        for name in _CODE
        for path in ((root / name).rglob("*") if (root / name).is_dir() else [root / name])
    ]
    for path in sorted(files):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions, devices and code, for env.json. Initialises jax's backend."""
    import jax

    devices = jax.devices()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    return {
        **dataclasses.asdict(code()),
        "dirty": code().dirty,
        "versions": versions,
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "compile_cache": folder_in_use(),
        "system": f"{platform.system()} {platform.machine()}",
    }
