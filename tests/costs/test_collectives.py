"""What devices exchange, counted by hand and from programs that are compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxlab.costs import by_kind, read_collectives
from jaxlab.costs.collectives import Collective

MESH = AbstractMesh((2, 4), ("data", "model"))
TEXT = """
HloModule step

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x.1 = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %ag = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%x.1), replica_groups=[2,4]<=[8], dimensions={0}
  %agd = bf16[32,16]{1,0} all-gather-done(%ag)
  %am = bf16[8,16]{1,0} all-to-all(%x.1), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  %cp = bf16[8,16]{1,0} collective-permute(%x.1), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %cp)
}

%condition (p: (s32[], bf16[8,16])) -> pred[] {
  %p.2 = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: bf16[8,16]) -> f32[] {
  %a = bf16[8,16]{1,0} parameter(0)
  %w = (s32[], bf16[8,16]{1,0}) while(%a), condition=%condition, body=%body, BACKEND
  %z = f32[100]{0} constant(0)
  %rs = f32[25]{0} reduce-scatter(%z), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %ar = f32[100]{0} all-reduce-start(%z), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
}
"""


def test_counted_by_hand():
    known = TEXT.replace("BACKEND", 'backend_config={"known_trip_count":{"n":"3"}}')
    assert read_collectives(known, MESH) == [
        Collective("all-gather", "bf16[32,16]", ("model",), 1024, 3),
        Collective("all-to-all", "bf16[8,16]", ("model",), 256, 3),
        Collective("collective-permute", "bf16[8,16]", ("data",), 256, 3),
        Collective("all-reduce", "f32[100]", ("data",), 400, 1),
        Collective("reduce-scatter", "f32[25]", ("model",), 400, 1),
    ]
    rows = {row["kind"]: row for row in by_kind(read_collectives(known, MESH))}
    assert rows["all-gather"] == {
        "kind": "all-gather",
        "axes": "model",
        "times": 3,
        "bytes": 3072,
        "largest": 1024,
    }
    unknown = {c.kind: c for c in read_collectives(TEXT.replace(", BACKEND", ""), MESH)}
    assert unknown["all-gather"] == Collective("all-gather", "bf16[32,16]", ("model",), 1024, 1, known=False)
    assert unknown["all-reduce"].known
    assert next(r for r in by_kind(list(unknown.values())) if r["kind"] == "all-gather")["at_least"]
    with pytest.raises(ValueError, match="no optimised HLO"):
        read_collectives("nothing", MESH)


def test_of_a_program_compiled_here():
    """A loop of products whose weights are split: each turn sums over `model` what is split over it."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    place = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )

    def loop(x, ups, downs):
        layer = lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None)
        return jax.lax.scan(layer, x, (ups, downs))[0]

    shapes = (
        place((8, 16), "data"),
        place((5, 16, 32), None, None, "model"),
        place((5, 32, 16), None, "model"),
    )
    out = NamedSharding(mesh, PartitionSpec("data"))
    compiled = jax.jit(loop, out_shardings=out).lower(*shapes).compile()
    (found,) = read_collectives(compiled.as_text(), mesh)
    assert found == Collective("all-reduce", "f32[4,16]", ("model",), 4 * 16 * np.dtype("f4").itemsize, 5)
