"""Weights of the golden cases, from the names and shapes of their tensors alone (numpy only).

The golden cases store no weights: both the script that makes them and the tests that use them call
`weights(case folder)`. Values come from raw bits of Philox keyed by the tensor's name, which numpy promises
to keep, and from correctly rounded arithmetic on them, so they are the same everywhere, bit for bit.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np


def tensor(
    name: str, shape: tuple[int, ...], seed: int = 0, centered: str = "", embedding: float = 0.3
) -> np.ndarray:
    """One tensor, float32, uniform around its center.

    Matrices have a standard deviation of 1.5 / sqrt(fan in) (enough for attention to be far from flat),
    embeddings of `embedding`, weights of norms 0.3 around 1, or around 0 where the name matches the pattern
    `centered` (norms that scale by 1 + weight), biases 0.2, other vectors 0.3.
    """
    center, deviation = 0.0, 0.3
    if re.search(r"(embed\w*|wte|wpe)(\.weight)?$", name) and len(shape) == 2:
        deviation = embedding
    elif len(shape) >= 2:
        transposed = re.search(r"c_(attn|proj|fc)\.weight$", name)  # GPT-2's matrices are [in, out]
        stacked = re.search(r"experts\.(gate_up|down)_proj$", name)  # Qwen3-VL's are [expert, in, out]
        fan_in = shape[1] if stacked else shape[0] if transposed else math.prod(shape[1:])
        deviation = 1.5 / math.sqrt(fan_in)
    elif name.endswith("bias"):
        deviation = 0.2
    elif len(shape) == 1 and name.endswith(".weight"):
        center, deviation = (0.0 if centered and re.search(centered, name) else 1.0), 0.3
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.Philox(key=np.frombuffer(key[:16], "<u8"))
    bits = generator.random_raw(math.prod(shape)) >> np.uint64(40)
    uniform = (2.0 * bits.astype(np.float64) + 1.0) * 2.0**-24 - 1.0  # exact, in (-1, 1)
    return (center + deviation * math.sqrt(3.0) * uniform).astype(np.float32).reshape(shape)


def weights(case: Path) -> dict[str, np.ndarray]:
    """All tensors of a case by their names on disk."""
    about = json.loads((case / "case.json").read_text())
    keys = json.loads((case / "keys.json").read_text())
    settings = about["seed"], about["centered_norms"], about["embedding"]
    return {name: tensor(name, tuple(shape), *settings) for name, shape, _ in keys}


def other_layout(tensors: dict[str, np.ndarray], layout: dict) -> dict[str, np.ndarray]:
    """The tensors of a case in one of the layouts of its layouts.json."""
    found = {
        name: value
        for name, value in tensors.items()
        if not any(re.search(p, name) for p in layout.get("drop", ()))
    }
    for pattern, joined in layout.get("stack", ()):
        expression = re.compile(pattern.replace("{e}", r"(?P<e>\d+)"))
        experts: dict[str, dict[int, list[np.ndarray]]] = {}
        for name in sorted(found):
            if match := expression.search(name):
                of_layer = experts.setdefault(name[: match.start()] + joined, {})
                of_layer.setdefault(int(match["e"]), []).append(found.pop(name))
        for name, parts in experts.items():
            found[name] = np.stack([np.concatenate(parts[e]) for e in range(len(parts))])
    for name, source in layout.get("copies", {}).items():
        found[name] = tensors[source].copy()
    for pattern, replacement in layout.get("rename", ()):
        found = {re.sub(pattern, replacement, name): value for name, value in found.items()}
    types = {"F32": np.float32, "U8": np.uint8, "BOOL": np.bool_}
    for name, shape, dtype in layout.get("extra", ()):
        found[name] = np.ones(shape, types[dtype])
    return found
