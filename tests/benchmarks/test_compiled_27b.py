"""The paper's 27B compiled for 64 H100s: it fits, and devices exchange what they should alone."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPORT = json.loads((ROOT / "benchmarks" / "train_compiled.json").read_text())
STAGES = {"pretrain_8k": (), "continue_32k": ("context",)}
"""Stages of the paper's 27B, and the axes over which they gather more than weights."""


@pytest.mark.parametrize("stage", STAGES)
def test_the_27b_fits_and_gathers_weights_and_keys_alone(stage):
    found = REPORT[stage]
    devices = 1
    for size in found["mesh"].values():
        devices *= size
    assert devices == 64
    assert found["layers"] == 30
    assert found["fits"]
    assert found["bytes_per_device"]["total"] < 80e9
    assert not any(kernel["spilled_bytes"] for kernel in found["kernels"])
    assert {kernel["name"] for kernel in found["kernels"]} >= {
        "nsa_forward",
        "nsa_choice",
        "nsa_key_gradients",
    }

    sums = {(row["kind"], row["axes"]): row for row in found["collectives"]}
    small = 5 << 20  # counts of rows for each expert, numbers of each token
    gathers = {axes for (kind, axes), row in sums.items() if kind == "all-gather" and row["largest"] > small}
    assert gathers == {"fsdp", *STAGES[stage]}
    # Tokens travel to experts and back: three times with the backward pass and a layer that is recomputed.
    assert sums["ragged-all-to-all", "expert"]["times"] == 3 * 2 * 29 * accumulation(stage)
    assert all(
        row["largest"] < small
        for (kind, axes), row in sums.items()
        if kind == "all-to-all" and axes == "expert"
    )


def accumulation(stage):
    return {"pretrain_8k": 8, "continue_32k": 4}[stage]
