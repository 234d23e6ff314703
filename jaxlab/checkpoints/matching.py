"""Which tensors of a folder are whose, by names alone and without jax: what `inspect` tells in an instant.

Loading accounts for shapes as well (accounting.py).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxlab.checkpoints import families
from jaxlab.checkpoints.rows import EMBEDDING, HEAD, Row
from jaxlab.models import ModelConfig

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Match:
    """What becomes of the names of a folder."""

    family: str
    """With the variant whose names they are."""
    paths: Mapping[str, str]
    """The leaf, or the first of several, of each name that is used."""
    copies: tuple[str, ...]
    ignored: tuple[str, ...]
    unmapped: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def problems(self) -> int:
        return len(self.unmapped) + len(self.missing)


def match(names: Iterable[str], config: ModelConfig) -> Match:
    """The match under the variant of the family that fits best."""
    names = list(names)
    found = (_match(names, config, family) for family in families.names_of(config.family))
    best = next(found)
    for other in found:
        if not best.problems:
            break
        best = other if other.problems < best.problems else best
    return best


def _match(names: list[str], config: ModelConfig, family: str) -> Match:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_general(name), []).append(name)
    expected: dict[str, str] = {}
    for row in families.rows_of(family):
        path, found = row.paths[0], kinds.get(_general(re.sub(r"\{\w+\}", "0", row.name)), [])
        if _needed(path, config) if _is_language(path) else found:
            expected |= dict.fromkeys(_names(row, config, found), path)
    present = set(names)
    missing = [name for name in expected if name not in present]
    left = [name for name in names if name not in expected]
    copies = [n for n in left if config.tie_embeddings and n == families.head_name(family)]
    ignored = [n for n in left if n not in copies and families.ignored(family).fullmatch(n)]
    unmapped = [n for n in left if n not in copies and n not in ignored]
    paths = {n: path for n, path in expected.items() if n in present}
    return Match(family, paths, tuple(copies), tuple(ignored), tuple(unmapped), tuple(missing))


def _general(name: str) -> str:
    """A name with its numbers out."""
    return _NUMBER.sub("0", name)


def _names(row: Row, config: ModelConfig, found: list[str]) -> list[str]:
    """All names of a row, by what the config says of layers and experts; else those that are found."""
    counted = re.findall(r"\{(\w+)\}", row.name)
    if not counted:
        return [row.name]
    layers = _layers(row.paths[0], config)
    if layers is None:
        return found
    numbers = row.layer_numbers(*layers) if "i" in counted else (0,)
    experts = range(config.moe.num_experts) if "e" in counted else range(1)
    return [row.name.replace("{i}", str(i)).replace("{e}", str(e)) for i in numbers for e in experts]


def _layers(path: str, config: ModelConfig) -> tuple[int, int] | None:
    """How many layers the stack of a leaf has, and how many stand before it; None: it is no such stack."""
    vision = config.vision
    if path.startswith("layers."):
        return config.num_layers - config.dense_layers, config.dense_layers
    if path.startswith("dense_layers."):
        return config.dense_layers, 0
    if path.startswith("vision.layers."):
        return vision.num_layers, 0
    counts = {
        "vision.global_layers.": vision.mllama.num_global_layers,
        "projector.cross_layers.": len(vision.mllama.cross_layers),
        "projector.resampler.layers.": vision.vit.resampler.num_layers,
        "projector.deep.": len(vision.qwen.deep_layers),
    }
    return next(((count, 0) for start, count in counts.items() if path.startswith(start)), None)


def _is_language(path: str) -> bool:
    return not path.startswith(("vision.", "projector."))


def _needed(path: str, config: ModelConfig) -> bool:
    """Whether the language model has a leaf."""
    c = config
    if path == ".".join(HEAD):
        return not c.tie_embeddings
    edges = {
        ".".join(EMBEDDING): True,
        "position.table": c.position == "learned",
        "final_norm.scale": True,
        "final_norm.bias": c.norm == "layer",
        "head.bias": c.head_bias,
    }
    if path in edges:
        return edges[path]
    stack, _, leaf = path.partition(".")
    if stack not in ("layers", "dense_layers") or (stack == "dense_layers" and not c.dense_layers):
        return False
    experts = bool(c.moe.num_experts) and stack == "layers"
    return _of_layer(c, experts).get(leaf, False)


def _of_layer(c: ModelConfig, experts: bool) -> dict[str, bool]:
    mlp, gated, biased = not experts, c.mlp == "gated", c.mlp_bias
    layer_norm, normed = c.norm == "layer", c.qk_norm != "none"
    norms: dict[str, Any] = {
        "attention_norm": True,
        "mlp_norm": not c.parallel,
        "attention_post_norm": c.post_norms,
        "mlp_post_norm": c.post_norms,
        "attention.query_norm": normed,
        "attention.key_norm": normed,
    }
    leaves = {f"attention.{part}": True for part in ("query", "key", "value", "output")}
    leaves |= {f"attention.{part}_bias": c.attention_bias for part in ("query", "key", "value")}
    leaves |= {f"{norm}.scale": there for norm, there in norms.items()}
    leaves |= {f"{norm}.bias": there and layer_norm for norm, there in norms.items()}
    leaves |= {f"moe.{part}": experts for part in ("router", "gate", "up", "down")}
    return leaves | {
        "attention.output_bias": c.has_output_bias,
        "mlp.gate": mlp and gated,
        "mlp.up": mlp,
        "mlp.down": mlp,
        "mlp.gate_bias": mlp and gated and biased,
        "mlp.up_bias": mlp and biased,
        "mlp.down_bias": mlp and biased,
    }
