"""A small VLM, an expert and a base whose numbers are drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.merging import Trio
from jaxlab.models import ModelConfig, NoPositions, PlainVisionConfig, abstract_params

LM = ModelConfig(
    vocab_size=256, width=8, num_layers=2, num_heads=2, mlp="plain", mlp_width=8, position=NoPositions()
)
VISION = PlainVisionConfig(num_layers=1, width=8, num_heads=2, mlp_width=4, image_token=255)


def draw(config, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), abstract_params(config)
    )


def hand_trio(keep=lambda params: params, lm=LM):
    vlm = dataclasses.replace(lm, vision=VISION)
    return Trio(vlm, None, keep(draw(vlm, 0)), keep(draw(lm, 1)), keep(draw(lm, 2)), None, lm, lm)


def few(params):
    """A part of the tensors, quicker to compile."""
    mlp = {name: params["layers"]["mlp"][name] for name in ("up", "down")}
    return {**params, "layers": {"mlp": mlp}}
