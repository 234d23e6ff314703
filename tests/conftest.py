"""Every test runs under the same strict rules, on four CPU devices, with jaxtyping's annotations checked."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.typechecking import check_types

check_types(["jaxlab", "kernels_pallas"])  # before anything imports them

hypothesis.settings.register_profile("jaxlab", deadline=None)
hypothesis.settings.load_profile("jaxlab")


def pytest_configure(config: pytest.Config) -> None:
    wants_gpu = re.search(r"(?<!not )\bgpu\b", config.option.markexpr or "") is not None
    if not wants_gpu:
        # A CUDA plugin without a GPU logs an error at start; the suite does not look for one unless it is
        # asked to.
        os.environ["JAX_PLATFORMS"] = "cpu"
    # Four devices; and machine code that is not optimised: most tests compile longer than they compute, and
    # this halves the time of the suite. What XLA does above machine code, its fusions among them, stays. On a
    # GPU it is optimised: that is what is tested there.
    flags = {"--xla_force_host_platform_device_count": 4, "--xla_backend_optimization_level": 0}
    for flag, value in () if wants_gpu else flags.items():
        if flag not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()

    # What a test compiles, it compiles: nothing comes from a run before, nothing stays in the user's cache.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

    import jax

    if not wants_gpu:
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def kept_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs that a test compiles several times, in its processes too, come from a folder of its own."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    values = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        monkeypatch.setenv(name.upper(), str(value))
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def pytest_runtest_teardown() -> None:
    """A worker that runs half of the suite compiles more programs than a process may map."""
    if "jax" in sys.modules:
        from jaxlab.costs import let_go_of_programs

        let_go_of_programs()
