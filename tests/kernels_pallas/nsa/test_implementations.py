"""The table of implementations: which one a call gets, and that only that one is imported."""

import logging
import subprocess
import sys
import typing

import jax.numpy as jnp
import pytest

from kernels_pallas.nsa import Implementation
from kernels_pallas.nsa.implementations import IMPLEMENTATIONS, Entry, operators_for
from kernels_pallas.nsa.interface import Case, Operators

Q, KV = jnp.ones((1, 6, 4, 3)), jnp.ones((1, 6, 2, 3))
CASE = Case("window_attention", Q, KV, KV)


@pytest.fixture(autouse=True)
def _table_stays():
    before = dict(IMPLEMENTATIONS)
    yield
    IMPLEMENTATIONS.clear()
    IMPLEMENTATIONS.update(before)


def put_first(**facts) -> Operators:
    """A new implementation before all others, whose operators are words."""
    operators = Operators(*["new"] * len(Operators._fields))
    entry = Entry(lambda: operators, **{"reason_against": lambda case: None, **facts})
    others = {name: other for name, other in IMPLEMENTATIONS.items() if name != "new"}
    IMPLEMENTATIONS.clear()
    IMPLEMENTATIONS.update({"new": entry, **others})
    return operators


def test_the_type_names_those_of_the_table():
    assert typing.get_args(Implementation) == tuple(IMPLEMENTATIONS)[::-1] == ("xla", "mosaic_gpu")
    assert all(isinstance(entry.load(), Operators) for entry in IMPLEMENTATIONS.values())


def test_a_new_implementation_is_one_entry():
    operators = put_first()
    assert operators_for(CASE, None) is operators
    assert operators_for(CASE, "new") is operators
    assert operators_for(CASE, "xla") is IMPLEMENTATIONS["xla"].load()


@pytest.mark.parametrize(
    "facts",
    [
        {"reason_against": lambda case: "it is Monday"},
        {"reason_against_default": lambda case: "it is Monday"},
    ],
)
def test_none_passes_over_what_does_not_take_the_case_and_says_so(caplog, facts):
    put_first(**facts)
    caplog.set_level(logging.DEBUG, logger="kernels_pallas.nsa.implementations")
    assert operators_for(CASE, None) is IMPLEMENTATIONS["xla"].load()
    (message,) = caplog.messages
    assert message.startswith("window_attention runs as xla: new: it is Monday: mosaic_gpu: ")


def test_a_named_one_is_not_replaced():
    operators = put_first(reason_against_default=lambda case: "it is Monday")
    assert operators_for(CASE, "new") is operators
    put_first(reason_against=lambda case: "it is Monday")
    with pytest.raises(
        NotImplementedError, match=r"window_attention with implementation='new': it is Monday"
    ):
        operators_for(CASE, "new")
    with pytest.raises(ValueError, match=r"must be one of .*'mosaic_gpu', 'xla' or None, not 'no'"):
        operators_for(CASE, "no")


def test_only_what_a_call_gets_is_imported():
    """Where Mosaic GPU cannot be imported, XLA attends and decodes all the same."""
    program = """
import sys
sys.modules["jax.experimental.pallas.mosaic_gpu"] = None
import jax
import jax.numpy as jnp
from kernels_pallas.nsa import NewTokens, append_tokens, cached_attention, init_cache, nsa_attention
from kernels_pallas.nsa.specs.arg_specs import with_tag
spec = with_tag("test")["many tiles"]
jax.eval_shape(lambda args: nsa_attention(**args, **spec.sizes)[0], spec.shapes())
sizes = {name: spec.sizes[name] for name in ("block_len", "stride", "block_size", "window")}
cache = init_cache(1, 64, **sizes, kv_heads=1, key_dim=4, value_dim=4, dtype=jnp.float32)
compress = lambda k, v, starts: (k[:, :1], v[:, :1])
def token(cache, x):
    geometry = {"block_len": spec.block_len, "stride": spec.stride}
    cache, recent = append_tokens(cache, NewTokens(*[x] * 6), compress, **geometry)
    return cached_attention(cache, recent, x, x[..., :3], **spec.sizes)
jax.eval_shape(token, cache, jax.ShapeDtypeStruct((1, 1, 1, 4), jnp.float32))
assert not any("mosaic_gpu.operators" in name for name in sys.modules)
try:
    nsa_attention(**spec.arguments(dtype=jnp.bfloat16), **spec.sizes, implementation="mosaic_gpu")
except NotImplementedError as error:
    assert "no Hopper GPU" in str(error), error
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
