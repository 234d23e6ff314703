"""What is counted of a program outside of its kernels, by hand on HLO as XLA prints it."""

import pytest

from kernels_pallas.hlo import shape_bytes
from kernels_pallas.nsa.specs.outside import outside

HLO = """HloModule jit_step, is_scheduled=true

%fused_slice (p0: f32[8,100], p1: s32[]) -> f32[1,100] {
  %p0 = f32[8,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %view = f32[8,100]{1,0} bitcast(%p0)
  ROOT %slice = f32[1,100]{1,0} dynamic-slice(%view, %p1, %zero), dynamic_slice_sizes={1,100}
}

%fused_update (q0: f32[8,100], q1: f32[1,100], q2: s32[]) -> f32[8,100] {
  %q0 = f32[8,100]{1,0} parameter(0)
  %q1 = f32[1,100]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %nought = s32[] constant(0)
  ROOT %put = f32[8,100]{1,0} dynamic-update-slice(%q0, %q1, %q2, %nought)
}

%body (arg: (s32[], f32[8,100])) -> (s32[], f32[8,100]) {
  %arg = (s32[], f32[8,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8,100]{1,0} get-tuple-element(%arg), index=1
  %row = f32[1,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused_slice
  %new = f32[1,100]{1,0} custom-call(%row), custom_call_target="mosaic_gpu_v2"
  %y = f32[8,100]{1,0} fusion(%x, %new, %i), kind=kLoop, calls=%fused_update
  ROOT %out = (s32[], f32[8,100]{1,0}) tuple(%i, %y)
}

%condition (c: (s32[], f32[8,100])) -> pred[] {
  %c = (s32[], f32[8,100]{1,0}) parameter(0)
  ROOT %no = pred[] constant(false)
}

ENTRY %main (a: f32[8,100], b: bf16[100]) -> f32[8,100] {
  %a = f32[8,100]{1,0} parameter(0)
  %b = bf16[100]{0} parameter(1)
  %start = s32[] constant(0)
  %copy.1 = bf16[100]{0} copy(%b)
  %tuple = (s32[], f32[8,100]{1,0}) tuple(%start, %a)
  %loop = (s32[], f32[8,100]{1,0}) while(%tuple), condition=%condition, body=%body, TRIPS
  ROOT %result = f32[8,100]{1,0} get-tuple-element(%loop), index=1
}
"""
TRIPS = 'backend_config={"known_trip_count":{"n":"8"}}'


def test_slices_updates_in_place_loops_and_kernels():
    found = outside(HLO.replace("TRIPS", TRIPS))
    assert found.kernels == 8
    assert found.launches == 1 + 8 * 2
    # The copy; in each turn a slice read and written with its index, and an update read and written with its.
    assert found.bytes == 2 * 200 + 8 * ((400 + 4 + 400) + (400 + 4 + 400))
    assert [launch.name for launch in found.largest] == ["row", "y", "copy.1"]


def test_loops_of_unknown_length_and_other_texts_are_refused():
    with pytest.raises(ValueError, match="loop loop does not say"):
        outside(HLO.replace(", TRIPS", ""))
    with pytest.raises(ValueError, match="no ENTRY"):
        outside("module @jit_step")


def test_bytes_of_shapes():
    assert shape_bytes("(pred[3], bf16[2,4]{1,0}, /*index=2*/s64[])") == 3 + 16 + 8
    assert shape_bytes("f8e4m3fn[16]{0}") == 16
