"""Flow maps of a prompt in a text small enough for results.json; the exact ones lie beside it.

Each layer is scaled by its largest value, square roots are rounded to 255 steps, and the part below the
diagonal is compressed: a value that is 1 % of the largest is right to 4 % of itself.
"""

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

MOST_LETTERS = 1 << 20
STEPS = 255


def pack_maps(maps: Float[np.ndarray, "L T T"], most: int = MOST_LETTERS) -> dict[str, Any]:
    """Maps [to i, from j] without the diagonal, in at most `most` letters.

    Where they would be longer, the weakest values are left out, and `least` says up to which part of a
    layer's largest value.
    """
    row, column = np.tril_indices(maps.shape[-1], k=-1)
    values = np.maximum(np.nan_to_num(maps[:, row, column].astype(np.float64)), 0.0)
    scale = values.max(axis=1, initial=0.0)
    steps = np.rint(STEPS * np.sqrt(values / np.where(scale > 0.0, scale, 1.0)[:, None])).astype(np.uint8)
    least = 0
    while True:
        text = base64.b64encode(zlib.compress(np.where(steps > least, steps, 0).tobytes(), 9)).decode()
        if len(text) <= most or least >= STEPS:
            break
        least += max(1, min(least // 2, (STEPS - least) // 4))
    return {
        "layers": maps.shape[0],
        "tokens": maps.shape[-1],
        "scale": [float(f"{x:.6g}") for x in scale],
        "least": (least / STEPS) ** 2,
        "data": text,
    }


def unpack_maps(packed: Mapping[str, Any]) -> Float[np.ndarray, "L T T"]:
    """The maps of `pack_maps`; zero on the diagonal and above it."""
    layers, tokens = int(packed["layers"]), int(packed["tokens"])
    steps = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), np.uint8)
    row, column = np.tril_indices(tokens, k=-1)
    maps = np.zeros((layers, tokens, tokens), np.float32)
    values = (steps.reshape(layers, -1).astype(np.float32) / STEPS) ** 2
    maps[:, row, column] = values * np.asarray(packed["scale"], np.float32)[:, None]
    return maps
