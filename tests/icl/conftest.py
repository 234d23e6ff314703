"""What the tests of this folder share."""

import jax
import pytest

from tests.icl import made


@pytest.fixture(scope="module")
def quick():
    """Programs that run once are compiled in half the time without optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a small task about sentiments."""
    place = tmp_path_factory.mktemp("task")
    made.sentiment(place)
    return place


@pytest.fixture(scope="session")
def tokenizers():
    """By name."""
    return {name: make() for name, make in made.TOKENIZERS.items()}
