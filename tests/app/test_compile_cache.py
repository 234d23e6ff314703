"""Where compiled programs are kept, and what a damaged, a full or a forbidden place does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlab.app import compile_cache

PROGRAM = """
from jaxlab.app import use_compile_cache
use_compile_cache()
import jax, jax.numpy as jnp
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
f = jax.jit(lambda x: jnp.sin(x) @ x.T + 1)
print(jax.config.jax_compilation_cache_dir, float(f(jnp.ones((8, 8))).sum()),
      "hits", events.count("cache_hits"), "misses", events.count("cache_misses"))
"""


def run(home: Path, **variables: str) -> tuple[str, str]:
    environment = {
        k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k and k != "XDG_CACHE_HOME"
    }
    environment |= {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout, done.stderr


@pytest.mark.multiprocess
def test_programs_are_kept_and_found_again(tmp_path: Path) -> None:
    first, said = run(tmp_path)
    folder = tmp_path / ".cache" / "jaxlab" / "compiled"
    assert f"compiled programs are kept in {folder}" in said
    assert str(folder) in first
    assert "hits 0" in first
    again, said = run(tmp_path)
    assert said == ""
    assert "misses 0" in again
    assert again.split()[1] == first.split()[1]
    # A torn entry, as a kill leaves it, is removed and written anew.
    (place,) = folder.iterdir()
    entries = sorted(place.glob("*-cache"))
    entries[0].write_bytes(entries[0].read_bytes()[:20])
    entries[0].with_name(entries[0].name.removesuffix("-cache") + "-atime").unlink()
    torn, said = run(tmp_path)
    assert said == ""
    assert "misses 1" in torn


def test_the_user_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compile_cache.default_folder().parent == tmp_path / "cache" / "jaxlab" / "compiled"
    compile_cache.use_compile_cache()  # JAX_ENABLE_COMPILATION_CACHE=false in these tests
    assert not (tmp_path / "cache").exists()


def test_a_home_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jaxlab").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE")
    compile_cache.use_compile_cache()
    said = capsys.readouterr().err
    assert said.startswith("compiled programs are not kept: ")
    assert said.count("\n") == 1
