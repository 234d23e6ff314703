"""What the kernels give beside XLA in float32: outputs, all gradients, the choice, the same bits again.

Axis letters as in api.py. Inputs are normal numbers in the kernels' dtype; XLA gets the same numbers in
float32, and where blocks are chosen the ones that the kernels chose, so that a near-tie is judged once
(`choice.py`) and does not spoil everything else.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.nsa.api import (
    compressed_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention_with_lse,
)
from kernels_pallas.nsa.checking import decoding
from kernels_pallas.nsa.checking.cases import CheckCase, Part
from kernels_pallas.nsa.checking.choice import importance, wrong_choices
from kernels_pallas.nsa.implementations import calls_noted
from kernels_pallas.nsa.records import Key
from kernels_pallas.nsa.specs.synthetic import overlapping_indices
from kernels_pallas.nsa.xla.compression import compress_blocks

LEAST_LEFT_OUT = 0.5
"""Of the queries of a check leave blocks out."""
RMS = {"bfloat16": 5e-3, "float16": 2e-3, "float32": 1e-4}
"""Limit of the RMS of the differences over that of the reference."""
ROW = 10.0
"""Times that: limit for the difference of any row (the last axis) over the RMS of the rows' norms."""
LSE = 2e-3
"""Limit of a log-sum-exp's difference."""
OPERANDS: dict[str, tuple[str, ...]] = {
    "window_attention": ("q", "k_win", "v_win"),
    "compressed_attention": ("q", "k_cmp", "v_cmp"),
    "selected_attention": ("q", "k_slc", "v_slc"),
    "select_blocks": ("q", "k_cmp", "v_cmp"),
    "whole": ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates"),
}
"""Gradients are those of all but the choice's."""
RESULTS = {
    "window_attention": ("window", "lse of the window"),
    "compressed_attention": ("compressed", "lse"),
    "selected_attention": ("selected",),
    "select_blocks": (),
    "whole": ("output", "compressed", "selected", "window"),
}

Array = Any


@dataclasses.dataclass(frozen=True)
class Finding:
    """One comparison."""

    what: str
    right: bool
    error: float
    """RMS of the differences over the RMS of the reference; of a choice the share of wrong ones."""
    detail: str = ""
    """The first difference, where it is wrong."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A check whose programs are compiled."""

    case: CheckCase
    part: Part
    keys: frozenset[Key]
    """Of the kernels that it runs."""
    run: Callable[[], list[Finding]]


def leaves_blocks_out(case: CheckCase) -> float:
    """Share of the queries that have more candidates than they may choose."""
    texts = case.segments or (case.length,)
    places = [np.arange(n) if n > 0 else np.full(-n, -1) for n in texts]
    of_text = np.concatenate(places)
    if case.queries:
        of_text = of_text[list(case.queries)]
    return float(np.mean(of_text // case.block_size + 1 > case.num_blocks))


def prepare(
    case: CheckCase,
    part: Part = "whole",
    *,
    implementation: str = "mosaic_gpu",
    running: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    gradients: bool = True,
) -> Prepared:
    """Compile one check. `running`: in what its kernels are traced, `kernels_pallas.target.interpreted` say.

    Raises:
        ValueError: too few queries of the case leave blocks out for it to say anything.
        NotImplementedError: the implementation does not take the case.
    """
    share = leaves_blocks_out(case)
    if share < LEAST_LEFT_OUT:
        raise ValueError(
            f"{case.label}: {share:.0%} of the queries leave blocks out, less than {LEAST_LEFT_OUT:.0%}: a "
            f"kernel that ignores the choice would pass; take fewer blocks or more tokens"
        )
    if part == "decode":
        keys, run = decoding.prepare(case, implementation, running, _judge_decoding)
    else:
        keys, run = _prepare(case, part, implementation, running, gradients)
    return Prepared(case, part, frozenset(keys), run)


def draw(case: CheckCase) -> dict[str, Array]:
    """Operands and cotangents; where texts are packed, k_cmp and v_cmp are made of tokens, and all that is
    padding holds NaN."""
    like: dict[str, tuple[int, ...]] = {n: x.shape for n, x in case.shapes().items()}
    count = len(case.queries) or case.length
    for name in ("q", "gates"):
        like[name] = (case.batch, count, *like[name][2:])
    out = (case.batch, count, case.heads, case.value_dim)
    like |= {f"d_{name}": out for name in RESULTS["whole"]} | {"d_lse": out[:3]}
    dtype = jnp.dtype(case.dtype)

    @jax.jit
    def make(key):  # type: ignore[no-untyped-def]
        keys = dict(zip(like, jax.random.split(key, len(like)), strict=True))
        made = {n: jax.random.normal(keys[n], shape, dtype) for n, shape in like.items()}
        made["d_lse"] = made["d_lse"].astype(jnp.float32)
        if not case.segments:
            return made
        assert case.segment_ids is not None
        padding = (case.segment_ids == 0)[:, :, None, None]
        for i, name in enumerate(("k_cmp", "v_cmp")):
            tokens = jax.random.normal(jax.random.fold_in(key, i), like[f"{name[0]}_slc"], jnp.float32)
            tokens = jnp.where(padding, jnp.nan, tokens)
            made[name] = _compressed(case, tokens).astype(dtype)
        for name in ("k_slc", "v_slc", "k_win", "v_win"):
            made[name] = jnp.where(padding, jnp.asarray(jnp.nan, dtype), made[name])
        of_queries = padding[:, list(case.queries)] if case.queries else padding
        made["q"] = jnp.where(of_queries, jnp.asarray(jnp.nan, dtype), made["q"])
        return made

    made: dict[str, Array] = make(jax.random.key(case.seed))
    return made


def _compressed(case: CheckCase, tokens: Array) -> Array:
    """Blocks of normal numbers about 1 in size."""
    dim = tokens.shape[-1]
    random = np.random.default_rng(case.seed)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)
    params = {
        "position": jnp.zeros((case.block_len, dim)),
        "hidden": draw(case.block_len, dim, 16) / np.sqrt(case.block_len),
        "hidden_bias": jnp.zeros((16,)),
        "output": 2 * draw(16, dim),
        "output_bias": jnp.zeros((dim,)),
    }
    sizes: dict[str, Any] = {"block_len": case.block_len, "stride": case.stride}
    return compress_blocks(tokens, params, **sizes, segment_ids=case.segment_ids)


def _function(case: CheckCase, part: Part, implementation: str) -> Callable[..., Any]:
    """(operands, extra) -> (what has gradients, the rest)."""
    place: dict[str, Any] = {"segment_ids": case.segment_ids, "implementation": implementation}
    if case.queries:
        place["q_positions"] = jnp.broadcast_to(_positions(case)[None], (case.batch, len(case.queries)))
    blocks: dict[str, Any] = {"block_len": case.block_len, "stride": case.stride}
    rule: dict[str, Any] = {n: x for n, x in case.selection_sizes.items() if n not in blocks}
    if not case.segments and case.queries:
        rule["kv_len"] = case.length
    sizes: dict[str, Any] = dict(case.sizes)
    choice: dict[str, Any] = blocks | rule | place

    def run(operands, extra):  # type: ignore[no-untyped-def]
        q, k, v = (operands[name] for name in OPERANDS[part][:3])
        if part == "window_attention":
            return window_attention_with_lse(q, k, v, window=case.window, **place), ()
        if part == "compressed_attention":
            return compressed_attention(q, k, v, **blocks, **place), ()
        if part == "selected_attention":
            return (selected_attention(q, k, v, extra, block_size=case.block_size, **place),), ()
        if part == "select_blocks":
            return (), select_blocks(q, k, extra, **choice)
        out, branches = nsa_attention(**operands, **sizes, indices=extra, **place)
        return (out, branches.compressed, branches.selected, branches.window), branches.indices

    return run


def _prepare(
    case: CheckCase, part: Part, implementation: str, running: Any, gradients: bool
) -> tuple[set[Key], Callable[[], list[Finding]]]:
    names = OPERANDS[part]
    data = draw(case)
    cotangents = {
        "window_attention": ("d_window", "d_lse"),
        "compressed_attention": ("d_compressed", "d_lse"),
        "selected_attention": ("d_selected",),
        "select_blocks": (),
        "whole": ("d_output",),  # as models have it: then the kernels apply the gates
    }[part]
    operands, d_results = {n: data[n] for n in names}, tuple(data[n] for n in cotangents)
    wide, d_wide = (jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (operands, d_results))

    def step(implementation: str) -> Callable[..., Any]:
        function = _function(case, part, implementation)

        def both(operands, d_results, extra):  # type: ignore[no-untyped-def]
            def differentiated(x):  # type: ignore[no-untyped-def]
                results, rest = function(x, extra)
                return results[: len(d_results)], (results, rest)

            _, pull, (results, rest) = jax.vjp(differentiated, operands, has_aux=True)
            return results, rest, pull(d_results)[0] if gradients and d_results else {}

        return both

    extra: Array | None = None
    if part == "selected_attention":
        chosen = overlapping_indices(case, 0.5, case.seed)
        extra = jnp.asarray(chosen[:, :, list(case.queries)] if case.queries else chosen)
    if part == "select_blocks":
        lse = _function(case, "compressed_attention", "xla")
        extra = jax.jit(lambda x: lse(x, None)[0][1])(wide)
    with running(), calls_noted() as noted:
        program = jax.jit(step(implementation)).lower(operands, d_results, extra).compile()
    keys = {key for name, key in noted if name == implementation}
    like = None if extra is None else jax.eval_shape(lambda: extra)
    if part in ("whole", "select_blocks"):
        like = jax.ShapeDtypeStruct((*_choice_shape(case),), jnp.int32)
    with jax.default_matmul_precision("highest"):
        reference = None
        if part != "select_blocks":
            reference = jax.jit(step("xla")).lower(wide, d_wide, like).compile()
        chooser: Any = None
        if part in ("whole", "select_blocks") and case.segments:
            chooser = jax.jit(lambda x: _function(case, "whole", "xla")(x, None)[1])

    def run() -> list[Finding]:
        with running():
            found = jax.block_until_ready(program(operands, d_results, extra))
            again = jax.block_until_ready(program(operands, d_results, extra))
        findings = [_same_bits(found, again)]
        results, rest, pulled = found
        if part in ("whole", "select_blocks"):
            own = None
            if chooser is not None:
                everything = {n: data[n].astype(jnp.float32) for n in OPERANDS["whole"]}
                with jax.default_matmul_precision("highest"):
                    own = np.asarray(chooser(everything))
            findings.append(_judge_choice(case, np.asarray(rest), wide, own))
        if reference is None:
            return findings
        given = rest if part == "whole" else extra
        expected, _, d_expected = reference(wide, d_wide, given)
        for name, x, y in zip(RESULTS[part], results, expected, strict=True):
            findings.append(compare(name, x, y, case.dtype, exact_zeros=True))
        findings += [compare(f"d_{n}", pulled[n], d_expected[n], case.dtype) for n in pulled]
        return findings

    return keys, run


def _choice_shape(case: CheckCase) -> tuple[int, int, int, int]:
    return case.batch, case.kv_heads, len(case.queries) or case.length, case.num_blocks


def _positions(case: CheckCase) -> Array:
    if case.queries:
        return jnp.asarray(case.queries, jnp.int32)
    return jnp.arange(case.length, dtype=jnp.int32)


@jax.jit
def _bits_differ(x: Array, y: Array) -> Array:
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jnp.any(jax.lax.bitcast_convert_type(x, unsigned) != jax.lax.bitcast_convert_type(y, unsigned))


def _same_bits(found: Any, again: Any) -> Finding:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True)
    different = [bool(_bits_differ(x, y)) for x, y in pairs]
    share = float(np.mean(different)) if different else 0.0
    detail = f"{sum(different)} of {len(different)} arrays differ between two calls" if any(different) else ""
    return Finding("same bits again", not any(different), share, detail)


def _judge_choice(
    case: CheckCase, indices: np.ndarray, wide: dict[str, Array], own: np.ndarray | None
) -> Finding:
    """By the definitions; of packed texts by what XLA chooses in float32, but for few near-ties."""
    if own is not None:
        sets = [np.sort(x, axis=-1) for x in (indices, own)]
        wrong = (sets[0] != sets[1]).any(axis=-1)
        right = float(wrong.mean()) <= 2e-3
        return Finding("choice", right, float(wrong.mean()), "" if right else _first(wrong, indices, own))
    positions = np.broadcast_to(np.asarray(_positions(case))[None], (case.batch, indices.shape[2]))
    worth = np.asarray(
        jax.jit(lambda q, k, p: importance(case, q, k, p))(wide["q"], wide["k_cmp"], jnp.asarray(positions))
    )
    wrong, _ = wrong_choices(case, indices, worth, positions)
    best = np.argsort(-worth, axis=-1)[..., : case.num_blocks] if wrong.any() else indices
    detail = _first(wrong, indices, best) if wrong.any() else ""
    return Finding("choice", not wrong.any(), float(wrong.mean()), detail)


def _first(wrong: np.ndarray, indices: np.ndarray, expected: np.ndarray) -> str:
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return (
        f"first at batch {at[0]}, key/value head {at[1]}, query {at[2]}: {indices[at].tolist()}; "
        f"worth most: {expected[at].tolist()}; {int(wrong.sum())} of {wrong.size} are wrong"
    )


def compare(what: str, found: Array, expected: Array, dtype: str, *, exact_zeros: bool = False) -> Finding:
    """Two arrays [..., D] (log-sum-exps without D); `exact_zeros`: a row of zeros has to be one."""
    if what.startswith("lse"):
        x, y = np.asarray(found, np.float32), np.asarray(expected, np.float32)
        with np.errstate(invalid="ignore"):
            difference = np.where(np.isneginf(x) & np.isneginf(y), 0.0, np.abs(x - y))
        off = ~(difference <= LSE)
        error = float(np.max(difference, initial=0.0))
        return Finding(what, not off.any(), error, _where(off, x, y) if off.any() else "")
    size, of_found, of_difference = (np.asarray(x, np.float64) for x in _norms(found, expected))
    typical = float(np.sqrt(np.mean(np.square(size)))) or 1.0
    error = float(np.sqrt(np.mean(np.square(of_difference)))) / typical
    limit = RMS[dtype]
    off = ~(of_difference <= ROW * limit * typical)  # NaN is off too
    if exact_zeros:
        off |= (size == 0) & (of_found != 0)
    right = error <= limit and not bool(off.any())
    detail = ""
    if not right:
        x, y = np.asarray(found, np.float32), np.asarray(expected, np.float32)
        elements = ~(np.abs(x - y) <= ROW * limit * typical / np.sqrt(x.shape[-1]))
        detail = _where(elements if elements.any() else np.broadcast_to(off[..., None], x.shape), x, y)
        detail += f"; rows off: {int(off.sum())} of {off.size}"
    return Finding(what, right, error, detail)


@jax.jit
def _norms(found: Array, expected: Array) -> tuple[Array, Array, Array]:
    """Of the rows of what was expected, of what was found, and of their difference."""
    x, y = found.astype(jnp.float32), expected.astype(jnp.float32)
    size = lambda z: jnp.sqrt(jnp.sum(jnp.square(z), axis=-1))
    return size(y), size(x), size(x - y)


def _where(off: np.ndarray, found: np.ndarray, expected: np.ndarray) -> str:
    if not off.any():
        return "small differences everywhere"
    at = tuple(int(i) for i in np.argwhere(off)[0])
    return f"first at {list(at)} of {list(found.shape)}: {found[at]:.6g}, float32 gives {expected[at]:.6g}"


def _judge_decoding(
    case: CheckCase, found: Sequence[Any], again: Sequence[Any], expected: Sequence[Any], worth: Any
) -> list[Finding]:
    """Of one token of every sequence; `worth`: the importance of its blocks, and its position."""
    outputs, indices = found[:-1], np.asarray(found[-1])
    findings = [_same_bits(found, again)]
    importance, positions = worth
    wrong, _ = wrong_choices(case, indices, np.asarray(importance), np.asarray(positions))
    best = np.argsort(-np.asarray(importance), axis=-1)[..., : case.num_blocks]
    findings.append(
        Finding(
            "choice",
            not wrong.any(),
            float(wrong.mean()),
            _first(wrong, indices, best) if wrong.any() else "",
        )
    )
    names = (*RESULTS["whole"], "lse")
    for name, x, y in zip(names, outputs, expected, strict=True):
        findings.append(compare(name, x, y, case.dtype))
    return [dataclasses.replace(f, what=f"{f.what}, batch {indices.shape[0]}") for f in findings]
