"""Most programs here run once."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest):
    """Compiled without optimizations they are ready sooner; not where the program is what is tested."""
    jax.config.update("jax_disable_most_optimizations", "optimized" not in request.keywords)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
