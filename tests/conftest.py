"""Every test runs under the same strict rules, on four CPU devices, with jaxtyping's annotations checked."""

import gc
import os
import re
from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Before anything imports the packages: each function with shapes in its signature is then checked by
# beartype.
install_import_hook(["jaxlab", "kernels_pallas"], "beartype.beartype")

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


_MAPS = Path("/proc/self/maps")
_MOST_MAPS = 25_000
_tests_done = 0


def pytest_runtest_teardown() -> None:
    """Compiled programs are let go when they are many.

    Each is mapped into memory in a few pieces, Linux allows a process 65,530 of these (vm.max_map_count), and
    beyond that XLA crashes while it compiles. A worker that runs half of the suite gets there.
    """
    global _tests_done
    _tests_done += 1
    if _tests_done % 20 or not _MAPS.exists():
        return
    with _MAPS.open("rb") as lines:
        maps = sum(1 for _ in lines)
    if maps > _MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()
