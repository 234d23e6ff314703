"""Train a small byte-level LM with Native Sparse Attention on Python's own library, then let it write."""

import dataclasses

import numpy as np

from jaxlab import generate, load_model
from jaxlab.config import load
from jaxlab.tasks import execute
from jaxlab.tasks.train import Config


def main(outputs: str = "outputs", steps: int = 150) -> str:
    config = load(Config, "configs/quickstart/nsa_sparse.yaml")
    config = dataclasses.replace(config, steps=steps, batch_size=4, eval_batches=2)
    result = execute("train", config, outputs=outputs, name="example")
    print(f"held-out loss {result.results['validation']['eval_loss']:.3f} nats per byte")

    model, params, _ = load_model(result.path / "model")
    prompt = b"def main("
    tokens = generate(params, {"tokens": np.asarray([list(prompt)], np.int32)}, model, max_new_tokens=40)
    text = (prompt + bytes(tokens[0].tolist())).decode(errors="replace")
    print(text)
    return text


if __name__ == "__main__":
    main()
