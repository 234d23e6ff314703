"""Compiled programs are kept between runs, by jax's persistent compilation cache.

jax's own variables come first: JAX_COMPILATION_CACHE_DIR names another folder,
JAX_ENABLE_COMPILATION_CACHE=false keeps nothing, JAX_COMPILATION_CACHE_MAX_SIZE sets its size in bytes. jax's
key covers the program, its compiler, flags and devices, but not every feature of a CPU; so each kind of CPU
has a folder of its own, and a home that several machines share never gives one machine code of another.
"""

import contextlib
import hashlib
import os
import platform
import sys
from pathlib import Path

_SETTINGS = {
    # The least recently used goes when there is more.
    "jax_compilation_cache_max_size": 2 << 30,
    # Seconds of compiling that are worth a file; a small model is hundreds of quick programs.
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}
_DIR = "jax_compilation_cache_dir"


def use_compile_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless jax was told where, or not to."""
    off = _variable("jax_enable_compilation_cache").lower() in ("0", "false", "no", "off")
    if off or folder_in_use() is not None:
        return
    try:
        folder = default_folder()
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # whoever can write there can run code
        _remove_torn(folder)
    except (OSError, RuntimeError) as error:  # no home
        reason = getattr(error, "strerror", None) or error
        print(f"compiled programs are not kept: {reason}; set JAX_COMPILATION_CACHE_DIR", file=sys.stderr)
        return
    if new:
        print(f"compiled programs are kept in {folder} (JAX_COMPILATION_CACHE_DIR sets it)", file=sys.stderr)
    for name, value in {_DIR: str(folder), **_SETTINGS}.items():
        if _variable(name):
            continue
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name, value)
        else:  # which reads it when it is imported
            os.environ[name.upper()] = str(value)


def folder_in_use() -> str | None:
    """The folder that jax keeps compiled programs in, if it does."""
    if "jax" in sys.modules:
        found: str | None = getattr(sys.modules["jax"].config, _DIR)
        return found
    return _variable(_DIR) or None


def default_folder() -> Path:
    """`jaxlab/compiled` in the user's cache folder, and in it one folder for this kind of CPU.

    Raises:
      RuntimeError: there is no home.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return cache / "jaxlab" / "compiled" / hashlib.sha256(_cpu().encode()).hexdigest()[:8]


def _variable(name: str) -> str:
    return os.environ.get(name.upper(), "")


def _cpu() -> str:
    """What tells apart CPUs that cannot run each other's code."""
    told = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():  # the first CPU stands for all
                break
            if line.startswith(("model name", "flags", "Features", "CPU part")):
                told.append(line.strip())
    return "\n".join(told)


def _remove_torn(folder: Path) -> None:
    """Removes entries whose writer was killed: jax would find them damaged, say so every time, and never
    write them anew. A whole entry has a second file, which is written after it."""
    import filelock  # not needed by --help

    with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=1):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()
