"""How long attention takes: Native Sparse Attention beside the fastest dense attention, by length.

Axis letters: B batch, T queries, S keys, H query heads, Hkv key/value heads, D head dim.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.errors import ConfigError
from kernels_pallas.nsa import nsa_attention, num_compressed, window_attention

PARTS = ("forward", "forward_backward")
STRETCH = 256
"""Queries at a time in `query_stretches`; 512 and 1024 took longer on a CPU."""
LEAST_SAMPLE_S = 0.02
"""Calls of less are timed several in a row."""


@dataclass(frozen=True)
class AttentionSpeedConfig:
    """Time Native Sparse Attention beside dense attention."""

    lengths: tuple[int, ...] = (2048, 8192)
    """Tokens of a text; every length is compiled and timed."""
    batch_size: int = 1
    """Texts at once."""
    num_heads: int = 16
    """Query heads."""
    num_kv_heads: int = 1
    """Key/value heads."""
    head_dim: int = 64
    """Of queries, keys and values."""
    block_len: int = 32
    """Tokens in a compression block."""
    stride: int = 16
    """Tokens between the starts of compression blocks."""
    block_size: int = 64
    """Tokens in a selection block."""
    num_blocks: int = 16
    """Selection blocks that a query reads."""
    window: int = 512
    """Tokens of the sliding window."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: float32 on a CPU, bfloat16 elsewhere."""
    rounds: int = 5
    """Timed calls of each kind, in turn; medians are reported."""
    seed: int = 0
    """Of the random inputs."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_heads", "num_kv_heads", "head_dim", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if not self.lengths or min(self.lengths) < self.block_len:
            raise ConfigError(f"give lengths of at least block_len, {self.block_len}", key="lengths")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads equally",
                key="num_kv_heads",
            )


Query = Float[Array, "B T H D"]
KeyOrValue = Float[Array, "B S Hkv D"]
Attention = Callable[..., Query]


def dense_chunked(q: Query, k: KeyOrValue, v: KeyOrValue) -> Query:
    """Online softmax over tiles of keys: what `attention: {kind: full, implementation: chunked}` is."""
    return window_attention(q, k, v, window=k.shape[1])


def dense_query_stretches(q: Query, k: KeyOrValue, v: KeyOrValue) -> Query:
    """jax's own attention for some queries at a time, which see the keys before them; its backward pass
    computes the scores again, so that they are never all there at once."""

    def stretch(q: Query, k: KeyOrValue, v: KeyOrValue) -> Query:
        first = k.shape[1] - q.shape[1]
        seen = first + jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[1])[None]
        return jax.nn.dot_product_attention(q, k, v, mask=seen[None, None], implementation="xla")

    length = q.shape[1]
    bounds = [(first, min(first + STRETCH, length)) for first in range(0, length, STRETCH)]
    parts = [jax.checkpoint(stretch)(q[:, a:b], k[:, :b], v[:, :b]) for a, b in bounds]
    return jnp.concatenate(parts, axis=1)


def dense_cudnn(q: Query, k: KeyOrValue, v: KeyOrValue) -> Query:
    """cuDNN's flash attention through jax."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def dense_candidates(platform: str, dtype: str) -> dict[str, Attention]:
    """Causal dense attention that jax has on a platform and that never holds all T x T scores, by name."""
    found: dict[str, Attention] = {"chunked": dense_chunked, "query_stretches": dense_query_stretches}
    return {"cudnn": dense_cudnn, **found} if platform == "gpu" and dtype != "float32" else found


def measure_attention_speed(config: AttentionSpeedConfig) -> dict[str, Any]:
    """Times of forward and of forward and backward together, medians of calls in turn.

    The dense attention is the fastest of `dense_candidates` at the shortest length (forward and backward);
    all of them are listed. "seconds" is wall time, "processor_seconds" what the process used on all cores
    (None elsewhere than on a CPU): where other programs use the machine, that is the fairer figure.
    """
    dtype = dtype_of(config)
    candidates = dense_candidates(jax.default_backend(), dtype)
    shortest = min(config.lengths)
    tried = {}
    for name, attention in candidates.items():
        program = _compile(_both(attention), *_operands(config, shortest, dtype, dense=True))
        operands = _draw(config, shortest, dtype, dense=True)
        tried[name] = _medians(_in_turn({name: (program.call, operands)}, config.rounds)[name])
    dense = min(tried, key=lambda name: _fair(tried[name]))
    rows = []
    for length in config.lengths:
        calls, programs = {}, {}
        for kind, attention in (("nsa", nsa_of(config)), ("dense", candidates[dense])):
            operands = _draw(config, length, dtype, dense=kind == "dense")
            for part in PARTS:
                arguments = operands[:-1] if part == "forward" else operands
                function = attention if part == "forward" else _both(attention)
                programs[kind, part] = program = _compile(function, *arguments)
                calls[kind, part] = (program.call, arguments)
        samples = _in_turn(calls, config.rounds)
        rows += [
            {
                "attention": kind,
                "length": length,
                "part": part,
                **_medians(samples[kind, part]),
                "samples": [round(wall, 6) for wall, _ in samples[kind, part]],
                "compile_seconds": round(programs[kind, part].compile_seconds, 3),
                "temporary_bytes": programs[kind, part].temporary_bytes,
            }
            for kind, part in calls
        ]
    return {
        "dtype": dtype,
        "dense": dense,
        "dense_tried": [{"name": name, "length": shortest, **tried[name]} for name in tried],
        "rows": rows,
    }


def attention_speed_memory(config: AttentionSpeedConfig) -> dict[str, dict[str, int]]:
    """Bytes of temporaries of NSA and of chunked dense attention, forward and backward, by length of shapes
    alone."""
    dtype = dtype_of(config)
    kinds = (("nsa", nsa_of(config), False), ("dense", dense_chunked, True))
    return {
        str(length): {
            name: _compile(_both(attention), *_operands(config, length, dtype, dense)).temporary_bytes
            for name, attention, dense in kinds
        }
        for length in config.lengths
    }


def dtype_of(config: AttentionSpeedConfig) -> str:
    """The one asked for; of "auto" the device's. Initialises jax's backend."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def nsa_of(config: AttentionSpeedConfig) -> Attention:
    """(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates) -> output, the choice of blocks included."""
    names = ("block_len", "stride", "block_size", "num_blocks", "window")
    sizes = {name: getattr(config, name) for name in names}
    return lambda *operands: nsa_attention(*operands, **sizes)[0]


class _Program(NamedTuple):
    call: Callable[..., Any]
    compile_seconds: float
    temporary_bytes: int


def _operands(
    config: AttentionSpeedConfig, length: int, dtype: str, dense: bool
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What an attention takes, and last the output's cotangent."""
    keys = [length] if dense else [num_compressed(length, config.block_len, config.stride), length, length]
    query = (config.batch_size, length, config.num_heads, config.head_dim)
    pairs = [(config.batch_size, n, config.num_kv_heads, config.head_dim) for n in keys for _ in "kv"]
    gates = [] if dense else [(*query[:3], 3)]
    return tuple(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in (query, *pairs, *gates, query))


def _draw(config: AttentionSpeedConfig, length: int, dtype: str, dense: bool) -> tuple[Array, ...]:
    like = _operands(config, length, dtype, dense)
    keys = jax.random.split(jax.random.key(config.seed), len(like))
    draw = lambda key, of: jax.random.normal(key, of.shape, of.dtype)
    return tuple(draw(key, of) for key, of in zip(keys, like, strict=True))


def _both(attention: Attention) -> Callable[..., Any]:
    """(*operands, cotangent of the output) -> output and gradients of the operands, in one program."""

    def both(*operands: Array) -> tuple[Array, tuple[Array, ...]]:
        out, pull = jax.vjp(attention, *operands[:-1])
        return out, pull(operands[-1])

    return both


def _compile(function: Callable[..., Any], *operands: Any) -> _Program:
    lowered = jax.jit(function).lower(*operands)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return _Program(compiled, seconds, memory.temp_size_in_bytes)  # type: ignore[union-attr]


Sample = tuple[float, float]
"""Wall seconds and processor seconds of a call."""


def _in_turn(
    calls: dict[Any, tuple[Callable[..., Any], tuple[Array, ...]]], rounds: int
) -> dict[Any, list[Sample]]:
    """`rounds` samples of each call, taken in turn, so that what else the machine does falls on all alike."""
    repeats = {}
    for key, (call, operands) in calls.items():
        jax.block_until_ready(call(*operands))  # the first call of a program loads it
        repeats[key] = max(1, min(50, round(LEAST_SAMPLE_S / _sample(call, operands, 1)[0])))
    samples: dict[Any, list[Sample]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, (call, operands) in calls.items():
            samples[key].append(_sample(call, operands, repeats[key]))
    return samples


def _sample(call: Callable[..., Any], operands: tuple[Array, ...], repeats: int) -> Sample:
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        out = call(*operands)
    jax.block_until_ready(out)
    return (time.perf_counter() - wall) / repeats, (time.process_time() - processor) / repeats


def _medians(samples: list[Sample]) -> dict[str, float | None]:
    on_cpu = jax.default_backend() == "cpu"
    return {
        "seconds": statistics.median(wall for wall, _ in samples),
        "processor_seconds": statistics.median(used for _, used in samples) if on_cpu else None,
    }


def _fair(medians: dict[str, float | None]) -> float:
    used = medians["processor_seconds"]
    return used if used is not None else medians["seconds"] or 0.0
