"""The config.json of public checkpoints means the model that they are: its size, and what is its own."""

import json
from pathlib import Path

import pytest

from jaxlab.checkpoints import families
from jaxlab.models import abstract_params, count_params

PUBLIC = json.loads((Path(__file__).parents[1] / "golden" / "public_configs.json").read_text())
PARAMETERS = {
    "pythia-70m": 70_426_624,
    "pythia-2.8b": 2_775_208_960,
    "pythia-12b": 11_846_072_320,
    "opt-125m": 125_239_296,
    "OLMo-2-0425-1B": 1_484_916_736,
    "OLMo-2-1124-13B": 13_716_198_400,
    "Olmo-3-1025-7B": 7_298_011_136,
    "SmolLM3-3B": 3_075_098_624,
    "phi-1_5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "Phi-3-vision-128k-instruct": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "Phi-4-mini-instruct": 3_836_021_760,
    "stablelm-zephyr-3b": 2_795_443_200,
    "stablelm-2-1_6b": 1_644_515_328,
}
"""As counted for the public checkpoints."""
TURNING = {
    "pythia-70m": 16,
    "pythia-12b": 32,
    "phi-1_5": 32,
    "phi-2": 32,
    "Phi-3-vision-128k-instruct": 96,
    "Phi-4-mini-instruct": 96,
    "stablelm-zephyr-3b": 20,
    "stablelm-2-12b": 40,
}
"""Dimensions of a head that turn."""


def read(name):
    return families.read_config(PUBLIC[name], name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_it_has_as_many_parameters(name):
    assert count_params(abstract_params(read(name))) == PARAMETERS[name]


@pytest.mark.parametrize("name", TURNING)
def test_a_part_of_each_head_turns(name):
    assert read(name).rotary_dim == TURNING[name]


def test_layers_are_of_the_kinds_that_the_paper_tells():
    smollm3, olmo3 = read("SmolLM3-3B"), read("Olmo-3-1025-7B")
    assert [i for i, turns in enumerate(smollm3.rotary_layers) if not turns] == list(range(3, 36, 4))
    assert [i for i, kind in enumerate(olmo3.kinds) if kind == "full"] == list(range(3, 32, 4))
    assert (olmo3.sliding.window, olmo3.sliding.rope_theta, olmo3.rope.scaling) == (4096, 500000.0, "yarn")
    assert read("Phi-3-mini-4k-instruct").sliding.window == 2047
    assert read("phi-4").attention.kind == "full"


def test_what_is_stretched_by_factors_for_short_and_long_texts():
    for name in ("Phi-3-vision-128k-instruct", "Phi-4-mini-instruct"):
        rope = read(name).rope
        assert (rope.scaling, rope.original_length, rope.factor) == ("longrope", 4096, 32.0)
        assert len(rope.short_factors) == len(rope.long_factors) == 48


def test_norms_and_residual_sums():
    pythia, olmo2, phi, stable = (
        read(n) for n in ("pythia-70m", "OLMo-2-0425-1B", "phi-2", "stablelm-2-12b")
    )
    assert (pythia.parallel, pythia.parallel_norms, pythia.norm) == (True, True, "layer")
    assert (olmo2.pre_norms, olmo2.post_norms, olmo2.qk_norm) == (False, True, "width")
    assert (phi.parallel, phi.parallel_norms, phi.head_bias) == (True, False, True)
    assert (stable.parallel, stable.qk_norm, stable.kv_heads) == (True, "each_head", 8)
