"""Model folders whose config.yaml has the flat form of before; the files were written by the code of then."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from jaxlab.checkpoints import open_model, save_model
from jaxlab.config import to_dict
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import (
    FullAttentionConfig,
    InfLLM,
    LearnedPositions,
    MllamaVisionConfig,
    ModelConfig,
    MoEConfig,
    NoPositions,
    NSAConfig,
    PlainVisionConfig,
    QwenVisionConfig,
    ResamplerConfig,
    RopeConfig,
    SlidingAttentionConfig,
    ViTConfig,
    is_flat,
)
from tests.models.tiny import draw_params

FLAT = Path(__file__).parent / "flat"
SIZES = {"vocab_size": 13, "width": 12, "num_layers": 2, "num_heads": 2, "mlp_width": 8, "max_length": 24}
TOWER = {"num_layers": 2, "patch_size": 2, "width": 8, "num_heads": 2, "mlp_width": 6, "image_token": 3}
NSA = NSAConfig(block_len=4, stride=2, block_size=4, num_blocks=3, num_local=1, window=3)
CASES = {
    "full": {
        "attention": FullAttentionConfig(implementation="chunked"),
        "position": RopeConfig(theta=99.0),
    },
    "sliding": {"attention": SlidingAttentionConfig(window=7), "position": LearnedPositions()},
    "pattern": {
        "attention": SlidingAttentionConfig(window=5, pattern=("sliding", "full"), rope_theta=50.0),
    },
    "nsa": {"attention": NSA},
    "moe": {"moe": MoEConfig(num_experts=3, width=5, first_dense=1), "position": NoPositions()},
    "sparsity": {"sparsity": InfLLM(block_size=4)},
    "plain": {"vision": PlainVisionConfig(**TOWER, image_size=4)},
    "vit": {
        "vision": ViTConfig(**TOWER, connector="resampler", resampler=ResamplerConfig(num_queries=3)),
    },
    "qwen": {
        "num_heads": 1,
        "vision": QwenVisionConfig(**TOWER, window=8, full_layers=(0,)),
        "position": RopeConfig(sections=(2, 2, 2)),
    },
    "mllama": {
        "tie_embeddings": False,
        "extra_embeddings": 8,
        "vision": MllamaVisionConfig(**TOWER, cross_layers=(1,)),
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder, whose config.yaml a test changes."""
    path, config = tmp_path_factory.mktemp("flat") / "model", ModelConfig(**SIZES)
    save_model(path, config, draw_params(config))
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_flat_config_is_read(folder, name):
    shutil.copy(FLAT / f"{name}.yaml", folder / "config.yaml")
    expected = ModelConfig(**SIZES | CASES[name])
    attention = expected.attention
    if not isinstance(attention, NSAConfig) and attention.implementation == "auto":
        # The files say what was the default then.
        attention = dataclasses.replace(attention, implementation="xla")
        expected = dataclasses.replace(expected, attention=attention)
    assert open_model(folder).config == expected
    assert not is_flat(to_dict(expected))


def test_what_the_model_did_not_use_may_not_say_anything(folder):
    shutil.copy(FLAT / "dead.yaml", folder / "config.yaml")
    with pytest.raises(UserError) as raised:
        _ = open_model(folder).config
    at = f"{folder / 'config.yaml'}: nsa.num_blocks"
    assert str(raised.value) == f"{at}: is 8 where the model does not use it; delete the line"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("window: 7", "window: is 7 where the model does not use it"),
        ("local_rope_theta: 5.0", "local_rope_theta: is 5.0 where"),
        ("rope: 3", "rope: expected a group of values, found 3"),
        ("rope: {thita: 3}", "position.thita: unknown key; did you mean theta?"),
        ("rope: {}\nposition: turned", "position.kind: expected rotary|learned|none, found turned"),
        ("rope: {theta: 3}\nposition: none", "rope.theta: is 3 where"),
        ("nsa: {}\nvision: {num_layers: 0, width: 3}", "vision.width: is 3 where"),
        ("nsa: {}\nvision: {num_layers: 1, vit: {shuffle: 2}}", "vision.vit.shuffle: is 2 where"),
        ("nsa: {}\nmoe: {num_experts: 0, width: 3}", "moe.width: is 3 where"),
        ("nsa: {}\nsparsity: {method: h2o, num_init: 3}", "sparsity.num_init: is 3 where"),
    ],
)
def test_mistakes_in_a_flat_config_are_one_line(folder, line, message):
    (folder / "config.yaml").write_text(line + "\n")
    with pytest.raises(ConfigError) as raised:
        _ = open_model(folder).config
    assert str(raised.value).removeprefix(str(folder / "config.yaml")).partition(": ")[2].startswith(message)
