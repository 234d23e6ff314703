"""The check of the kernels can fail: it refuses sizes at which it could not, and catches planted faults."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.nsa import records
from kernels_pallas.nsa.checking import (
    CASES,
    SMALL_CASES,
    CheckCase,
    Finding,
    Prepared,
    also,
    leaves_blocks_out,
    prepare,
)
from kernels_pallas.nsa.checking import __main__ as command
from kernels_pallas.nsa.checking.choice import wrong_choices
from kernels_pallas.nsa.checking.comparison import LEAST_LEFT_OUT, compare
from kernels_pallas.nsa.checking.recording import record_of, rights
from kernels_pallas.nsa.decoding import ONE_TOKEN
from kernels_pallas.nsa.mosaic_gpu import operators, tuning, vjp
from kernels_pallas.nsa.records import Key
from kernels_pallas.target import OLDEST_JAX, interpreted, is_hopper

needs_pallas = pytest.mark.skipif(
    jax.__version_info__ < OLDEST_JAX, reason=f"the kernels need jax {OLDEST_JAX}, this is {jax.__version__}"
)
TINY = CheckCase(
    256,
    "tiny",
    heads=32,
    kv_heads=2,
    key_dim=64,
    value_dim=64,
    num_blocks=2,
    num_init=0,
    num_local=1,
    window=64,
    batches=(2,),
    page_size=128,
    queries=(130, 131, 200, 255),
)
"""Two key/value heads, a tile of four queries each: what is mixed up between either of them shows."""


@contextlib.contextmanager
def small_tiles():
    with interpreted(), tuning.forced(registers=False, warpgroups=1):
        yield


def wrong(case, part, *, gradients=False, **more):
    more = {"running": small_tiles, **more}
    findings = prepare(case, part, gradients=gradients, **more).run()
    assert findings
    return {f.what: f.detail for f in findings if not f.right}


@pytest.mark.parametrize(
    "case", [*CASES, *SMALL_CASES, *also("12/2,64/64,float16")], ids=lambda case: case.label
)
def test_at_least_half_of_the_queries_leave_blocks_out(case):
    assert leaves_blocks_out(case) >= LEAST_LEFT_OUT
    assert case.segment_ids is None or case.segment_ids.shape == (1, case.length)


def test_sizes_at_which_everything_is_read_are_refused():
    with pytest.raises(ValueError, match="0% of the queries leave blocks out"):
        prepare(CheckCase(1024))
    with pytest.raises(ValueError, match="'16' is not of the form HEADS/KV_HEADS"):
        also("16")


# Faults of the plan of selected attention, as a kernel would have them.


def one_block_short(plan):
    return plan._replace(steps=jnp.maximum(plan.steps - 1, 1))


def bit_of_the_next_query(plan):
    return plan._replace(members=((plan.members << 1) | (plan.members >> 3)) & 15)


def next_block(plan):
    return plan._replace(blocks=jnp.where(plan.blocks < 2, plan.blocks + 1, plan.blocks))


def other_group(plan):
    turned = (jnp.roll(x, 1, axis=0) for x in (plan.steps, plan.blocks, plan.members))
    return plan._replace(**dict(zip(("steps", "blocks", "members"), turned, strict=True)))


def everybody_reads_the_union(plan):
    return plan._replace(members=jnp.full_like(plan.members, 15))


PLANTED = (bit_of_the_next_query, one_block_short, next_block, other_group, everybody_reads_the_union)


def plant(monkeypatch, fault):
    right = vjp.lists
    monkeypatch.setattr(vjp, "lists", lambda *args: fault(right(*args)))


@needs_pallas
@pytest.mark.parametrize(
    "fault", [None, PLANTED[0], *(pytest.param(fault, marks=pytest.mark.slow) for fault in PLANTED[1:])]
)
def test_a_planted_fault_of_the_selection_is_caught(monkeypatch, fault):
    if fault is None:
        assert wrong(TINY, "selected_attention") == {}
        return
    plant(monkeypatch, fault)
    found = wrong(TINY, "selected_attention")
    assert list(found) == ["selected"]
    assert "first at [0, " in found["selected"]
    assert "float32 gives" in found["selected"]


@needs_pallas
@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_of_the_backward_pass_is_caught(monkeypatch, fault):
    """Of the plans that the gradients read, the forward pass being right."""
    right, calls = vjp.lists, []

    def later(*args):
        calls.append(args)
        return right(*args) if len(calls) == 1 else fault(right(*args))

    monkeypatch.setattr(vjp, "lists", later)
    found = wrong(TINY, "selected_attention", gradients=True)
    assert "selected" not in found
    assert {"d_q", "d_k_slc", "d_v_slc"} & set(found)


CHOICE_FAULTS = {
    "other group": lambda indices: jnp.roll(indices, 1, axis=1),
    "next block": lambda indices: jnp.where(indices == 0, 1, indices),
    "next query": lambda indices: jnp.roll(indices, 1, axis=2),
    "one fewer": lambda indices: indices.at[..., -1].set(-1),
    "the last blocks": lambda indices: jnp.maximum(indices, jnp.max(indices, -1, keepdims=True) - 1),
}


@needs_pallas
@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICE_FAULTS)
def test_a_planted_fault_of_the_choice_is_caught(monkeypatch, name):
    right, fault = operators.OPERATORS, CHOICE_FAULTS[name]
    assert wrong(TINY, "select_blocks") == {}
    broken = right._replace(select_blocks=lambda *args: fault(right.select_blocks(*args)))
    monkeypatch.setattr(operators, "OPERATORS", broken)
    assert list(wrong(TINY, "select_blocks")) == ["choice"]


@needs_pallas
@pytest.mark.slow
@pytest.mark.parametrize("part", ["whole", "decode"])
def test_the_kernels_are_right_where_they_are_interpreted(part):
    check = prepare(TINY, part, running=small_tiles)
    findings = check.run()
    assert [f for f in findings if not f.right] == []
    names = {key.operator for key in check.keys}
    parts = {"compressed_attention", "select_blocks", "selected_attention", "window_attention"}
    assert names == {ONE_TOKEN} if part == "decode" else names >= parts


@pytest.mark.slow
@pytest.mark.parametrize("segments", [(), (100, 7, -9, 140)], ids=["one text", "packed"])
def test_what_is_right_passes_whole(segments):
    """XLA beside itself: the check's own arithmetic, choice and cache."""
    sizes = {"heads": 4, "key_dim": 16, "value_dim": 8, "block_len": 8, "stride": 4, "block_size": 16}
    case = dataclasses.replace(TINY, **sizes, dtype="float32", segments=segments, queries=())
    plain = {"implementation": "xla", "running": contextlib.nullcontext}
    assert wrong(case, "whole", gradients=True, **plain) == {}
    if not segments:
        assert wrong(case, "decode", **plain) == {}


def choices(spec, importance, positions):
    """By brute force, one query after the other."""
    found = np.full((*importance.shape[:3], spec.num_blocks), -1)
    for b, h, t in np.ndindex(*importance.shape[:3]):
        newest = positions[b, t] // spec.block_size
        forced = [j for j in range(newest + 1) if j < spec.num_init or j > newest - spec.num_local]
        free = sorted(set(range(newest + 1)) - set(forced), key=lambda j: (-importance[b, h, t, j], j))
        best = sorted((forced + free)[: spec.num_blocks])
        found[b, h, t, : len(best)] = best
    return found


def test_only_right_choices_pass():
    spec = CheckCase(640, num_blocks=4)
    random = np.random.default_rng(0)
    positions = np.asarray([[70, 300, 639]])
    importance = random.random((1, 2, 3, 10)).astype(np.float32)
    right = choices(spec, importance, positions)
    is_wrong, left_out = wrong_choices(spec, right, importance, positions)
    assert not is_wrong.any()
    assert left_out[0, 0].tolist() == [False, True, True]
    last = (0, 1, 2)
    free = [j for j in right[last] if j not in (0, 8, 9)]
    out = next(j for j in range(1, 8) if j not in right[last])
    faults = {
        "the next block": np.sort(np.where(right[last] == free[0], out, right[last])),
        "no first block": np.sort(np.where(right[last] == 0, out, right[last])),
        "one twice": np.asarray([0, free[0], free[0], 9]),
        "too few": np.asarray([0, 8, 9, -1]),
        "no order": right[last][::-1],
        "one of the future": np.asarray([0, free[0], 9, 10]),
        "another group's": right[0, 0, 2],
    }
    for name, choice in faults.items():
        planted = right.copy()
        planted[last] = choice
        found, _ = wrong_choices(spec, planted, importance, positions)
        assert found[last], name
        assert found.sum() == 1, name
    near = importance.copy()
    near[(*last, out)] = near[(*last, free[0])] * (1 + 1e-4)  # rounding decides between the two
    assert not wrong_choices(spec, right, near, positions)[0].any()


def test_one_row_among_thousands_is_seen():
    random = np.random.default_rng(0)
    expected = random.standard_normal((1, 4096, 4, 64)).astype(np.float32)
    noise = expected * (1 + 2e-3 * random.standard_normal(expected.shape)).astype(np.float32)
    assert compare("selected", noise, expected, "bfloat16").right
    for what, value in (("nan", np.nan), ("another", 0.3)):
        broken = noise.copy()
        broken[0, 77, 2, :] = value
        found = compare("selected", broken, expected, "bfloat16")
        assert not found.right, what
        assert found.detail.startswith("first at [0, 77, 2, ")
        assert "rows off: 1 of 16384" in found.detail
    zeros = expected.copy()
    zeros[0, 5] = 0
    assert not compare("selected", noise, zeros, "bfloat16", exact_zeros=True).right
    lse = np.asarray([[0.5, -np.inf, 1.0]], np.float32)
    assert compare("lse", lse, lse, "bfloat16").right
    assert not compare("lse", np.asarray([[0.5, 0.0, 1.0]], np.float32), lse, "bfloat16").right


NAMES = ("compressed_attention", "selected_attention", "new one")
KEYS = [Key(name, "bfloat16", 16, 192, 128) for name in NAMES]


@pytest.mark.parametrize(
    ("what", "right"),
    [
        ("nothing", (True, True, True)),
        ("lse", (False, True, False)),
        ("d_k_slc", (True, False, False)),
        ("d_v_cmp", (False, True, False)),
        ("d_q", (False, False, False)),
        ("same bits again", (False, False, False)),
    ],
)
def test_an_operator_is_right_if_all_is_that_may_be_about_it(what, right):
    names = ("lse", "compressed", "selected", "choice", "d_k_slc", "d_v_cmp", "d_q", "same bits again")
    found = rights("whole", KEYS, {name: name != what for name in names})
    assert tuple(found[key] for key in KEYS) == right
    assert not any(rights("whole", KEYS, {}).values())


def test_what_failed_at_one_length_is_not_right_by_another():
    choice = KEYS[0]._replace(operator="select_blocks", value_dim=0)
    seen = dict.fromkeys([*KEYS, KEYS[0]._replace(group=4), choice], True)
    token = Key(ONE_TOKEN, "bfloat16", 16, 192, 128)
    made = record_of("device", [seen | {token: True}], [(CheckCase(4097), "whole")], {}, {})
    assert [key for key, right in made.right.items() if right] == [KEYS[0]._replace(group=4), token]
    assert made.versions["jax"] == jax.__version__


def test_the_command_says_where_there_is_nothing_to_check(capsys):
    assert command.main([]) == 2
    assert "no Hopper GPU" in capsys.readouterr().err
    assert command.main(["--also", "x"]) == 2
    assert "--also: 'x' is not of the form" in capsys.readouterr().err


def test_the_command_replaces_nothing_that_is_no_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "is_hopper", lambda: True)
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    assert command.main(["--record", str(notes)]) == 2
    assert "it stays as it is: name another file" in capsys.readouterr().err
    assert notes.read_text() == "mine"
    assert command.main(["--record", str(notes / "record.json")]) == 2


def test_the_command_writes_what_it_found(monkeypatch, tmp_path, capsys):
    """One case that is right, one of which a gradient is wrong, one that raises."""
    broken, bad = (dataclasses.replace(TINY, name=n, heads=h) for n, h in (("broken", 64), ("bad", 16)))

    def fake(case, part):
        if case is broken and part == "whole":
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        names = ("compressed_attention", "selected_attention") if part == "whole" else (ONE_TOKEN,)
        keys = frozenset(Key(name, "bfloat16", case.groups, 64, 64) for name in names)
        findings = [Finding("lse", True, 1e-6), Finding("d_k_slc", case is not bad, 0.5, "first at [3]")]
        return Prepared(case, part, keys, lambda: findings if part == "whole" else findings[:1])

    monkeypatch.setattr(command, "is_hopper", lambda: True)
    monkeypatch.setattr(command, "CASES", (TINY, bad, broken))
    monkeypatch.setattr(command, "prepare", fake)
    path = tmp_path / "deep" / "record.json"
    assert command.main(["--record", str(path)]) == 1
    said = capsys.readouterr().out
    assert (
        "right  tiny | bfloat16 | 16 heads a group | 64/64 | 256 tokens, whole: largest error 5.0e-01" in said
    )
    assert "wrong  bad | bfloat16 | 8 heads a group" in said
    assert "       d_k_slc: first at [3]" in said
    assert "FAILED broken | bfloat16 | 32 heads a group" in said
    record = records.read(path)
    wrong = Key("selected_attention", "bfloat16", 8, 64, 64)
    assert [key for key, right in record.right.items() if not right] == [wrong]
    assert {(key.operator, key.group) for key in record.right} == {
        *((name, group) for name in ("compressed_attention", "selected_attention") for group in (16, 8)),
        *((ONE_TOKEN, group) for group in (16, 8, 32)),
    }
    assert "ILLEGAL_ADDRESS" in record.facts["checks"][4]["error"]


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["whole", "decode"])
@pytest.mark.parametrize("case", [*SMALL_CASES, *CASES], ids=lambda case: case.label)
def test_on_a_gpu(case, part):
    """What the script of the first contact and `python -m kernels_pallas.nsa.checking` run."""
    if not is_hopper():
        pytest.skip("the kernels run on Hopper GPUs alone (compute capability 9.0)")
    assert [f for f in prepare(case, part).run() if not f.right] == []
