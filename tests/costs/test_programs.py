"""Compiled programs are let go at a limit, and what was let go works again."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.costs import let_go_of_programs, programs


def test_programs_are_let_go_at_a_limit(monkeypatch):
    monkeypatch.setattr(programs, "_EVERY", 8)
    let_go_of_programs(1)
    kept = jax.jit(lambda x: x + 1)
    kept(np.zeros(3))
    # Functions that jax keeps programs of, each of its own shape.
    add = jax.jit(lambda x: jnp.sin(x).sum() + x)
    for size in range(4, 7):
        add(np.zeros(size))
    assert not let_go_of_programs(1)  # few were compiled since the last look
    for size in range(7, 12):
        add(np.zeros(size))
    before = programs.memory_maps()
    assert not let_go_of_programs(before + 1000)
    assert add._cache_size() == 8
    for size in range(12, 20):
        add(np.zeros(size))
    before = programs.memory_maps()
    assert let_go_of_programs(before - 1)
    assert add._cache_size() == 0
    assert programs.memory_maps() < before - 10
    assert kept(np.zeros(3)).tolist() == [1, 1, 1]


def test_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(programs, "_MAPS", tmp_path / "none")
    monkeypatch.setattr(programs, "_compiled", 1 << 20)
    assert not let_go_of_programs(1)
    monkeypatch.setattr(programs, "_LIMIT", tmp_path / "none")
    monkeypatch.setattr(programs, "_compiled", 1 << 20)
    assert not let_go_of_programs()


def test_the_limit_is_a_part_of_the_system_s(monkeypatch, tmp_path):
    (tmp_path / "limit").write_text("1000\n")
    monkeypatch.setattr(programs, "_LIMIT", tmp_path / "limit")
    assert programs._limit() == 400
