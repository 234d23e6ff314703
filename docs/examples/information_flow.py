"""How much flows into label words and from them to the prediction, layer by layer, in one jitted gradient."""

import jax
import numpy as np

from jaxlab.icl import flows
from jaxlab.models import ModelConfig, init_params

WORD, LABEL, LAST = 0, 1, 2  # token classes


def main() -> np.ndarray:
    config = ModelConfig(vocab_size=32, width=32, num_layers=3, mlp_width=64)
    params = init_params(config, jax.random.key(0))
    # Two demonstrations "item item label" and a query "item item ->"; labels are the tokens 30 and 31.
    tokens = np.asarray([[3, 4, 30, 7, 8, 31, 3, 5, 1]], np.int32)
    classes = np.asarray([[WORD, WORD, LABEL, WORD, WORD, LABEL, WORD, WORD, LAST]], np.int32)
    targets = {
        "positions": np.asarray([8], np.int32),
        "label_tokens": np.asarray([30, 31], np.int32),
        "labels": np.asarray([0], np.int32),
    }
    sums, counts = flows(params, {"tokens": tokens}, config, classes, targets)
    means = np.asarray(sums[0] / np.maximum(counts[0], 1.0))
    for layer, mean in enumerate(means):
        print(f"layer {layer}: into labels {mean[LABEL, WORD]:.2e}  labels to last {mean[LAST, LABEL]:.2e}")
    return means


if __name__ == "__main__":
    main()
