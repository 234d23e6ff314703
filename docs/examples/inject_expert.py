"""Inject an expert into the language model of a VLM: pure functions on pytrees, here on random ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.merging import inject
from jaxlab.models import ModelConfig, PlainVisionConfig, forward, init_params, language_model


def main() -> dict:
    text = ModelConfig(vocab_size=64, width=32, num_layers=2, mlp_width=64)
    multimodal = dataclasses.replace(text, vision=PlainVisionConfig(num_layers=1, width=32, image_token=63))
    base = init_params(text, jax.random.key(0))
    expert = jax.tree.map(lambda x: x + 0.01 * jnp.sin(x * 1000), base)  # stands for a fine-tuned expert
    vlm = {
        **init_params(multimodal, jax.random.key(1)),
        **jax.tree.map(lambda x: x + 0.01 * jnp.cos(x * 999), base),
    }

    merged, account = inject(vlm, expert, base, operator="ties", lambda_v=0.9, lambda_e=0.4, density=0.5)
    print(account.table())

    batch = {
        "tokens": np.asarray([[63] * 16 + [1, 2, 3]], np.int32),  # 16 image tokens, then text
        "images": np.zeros((1, 1, 8, 8, 1), np.float32),
    }
    logits, _ = forward(merged, batch, multimodal)
    print("most likely next token:", int(jnp.argmax(logits[0, -1])))
    assert set(language_model(merged)) == set(base)
    return merged


if __name__ == "__main__":
    main()
