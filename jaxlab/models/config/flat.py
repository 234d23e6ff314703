"""The flat form that config.yaml of model folders had before groups were unions: for saved weights."""

from collections.abc import Mapping
from typing import Any

from jaxlab.config import to_dict
from jaxlab.errors import ConfigError
from jaxlab.models.config.attention import NSAConfig
from jaxlab.models.config.moe import MoEConfig
from jaxlab.models.config.position import RopeConfig
from jaxlab.models.config.sparsity import InfLLM
from jaxlab.models.config.vision import MllamaVisionConfig, PlainVisionConfig, QwenVisionConfig, ViTConfig

Tree = Mapping[str, Any]

_ONLY_FLAT = ("nsa", "rope", "window", "pattern", "local_rope_theta", "attention_implementation")
_TOWER = ("num_layers", "patch_size", "channels", "width", "num_heads", "mlp_width", "image_token")
_VISION: dict[str, tuple[str, ...]] = {"vit": ("vit",), "qwen": ("qwen",), "mllama": ("vit", "mllama")}
"""The groups that each kind of tower used."""
_NO_RESAMPLER = {"num_queries": 0, "num_layers": 3, "num_heads": 16, "num_kv_heads": 4, "head_dim": 96}
_MLLAMA = {
    **to_dict(ViTConfig()),
    "resampler": _NO_RESAMPLER,
    "class_token": True,
    "patch_bias": False,
    "pre_norm": True,
    "attention_bias": False,
    "output_bias": False,
}
"""What the flat form said of every tower of Mllama."""
_SPARSITY = {
    "exact_tokens": ("block_size", "num_blocks"),
    "exact_blocks": ("block_size", "num_blocks", "num_init", "num_local"),
    "quest": ("block_size", "num_blocks", "num_init", "num_local"),
    "infllm": ("block_size", "num_blocks", "num_init", "num_local", "representatives"),
    "h2o": ("block_size", "num_blocks", "num_local"),
}


def is_flat(tree: Tree) -> bool:
    """Whether the plain values of a ModelConfig have the flat form."""
    return any(key in tree for key in _ONLY_FLAT)


def from_flat(tree: Tree) -> dict[str, Any]:
    """The plain values of a ModelConfig from those of the flat form.

    Raises:
      ConfigError: a group that the model does not use says something other than its defaults.
    """
    new = {key: value for key, value in tree.items() if key not in _ONLY_FLAT}
    new["attention"] = _attention(tree)
    new["position"] = {"kind": tree.get("position", "rotary")}
    if new["position"]["kind"] == "rotary":
        new["position"] |= _group(tree, "rope")
    else:
        _check_unused("rope", _group(tree, "rope"), to_dict(RopeConfig()))
    moe = _group(tree, "moe")
    new["moe"] = moe if moe.get("num_experts", 0) != 0 else None
    if new["moe"] is None:
        _check_unused("moe", moe, {**to_dict(MoEConfig(num_experts=2)), "num_experts": 0})
    new["vision"] = _vision(_group(tree, "vision"))
    new["sparsity"] = _sparsity(_group(tree, "sparsity"))
    return new


def _group(tree: Tree, key: str) -> Tree:
    value = tree.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"expected a group of values, found {value}", key)
    return value


def _attention(tree: Tree) -> dict[str, Any]:
    kind, pattern = tree.get("attention", "full"), tree.get("pattern", [])
    sliding = "sliding" in list(pattern or [kind])
    theta, window = tree.get("local_rope_theta"), tree.get("window", 512)
    if kind != "nsa":
        _check_unused("nsa", _group(tree, "nsa"), to_dict(NSAConfig()))
    if not sliding:
        _check_unused("", {"window": window, "local_rope_theta": theta}, {"window": 512})
    if kind == "nsa":
        return {"kind": "nsa", **_group(tree, "nsa")}
    implementation = {"implementation": tree.get("attention_implementation", "xla")}
    if not sliding:
        return {"kind": "full", **implementation}
    return {"kind": "sliding", "window": window, "pattern": pattern, "rope_theta": theta, **implementation}


def _vision(vision: Tree) -> dict[str, Any] | None:
    kind, has_vision = vision.get("kind", "plain"), vision.get("num_layers", 0) != 0
    used = _VISION.get(kind, ())
    defaults = {
        "vit": {**to_dict(ViTConfig()), "resampler": _NO_RESAMPLER},
        "qwen": to_dict(QwenVisionConfig()),
        "mllama": to_dict(MllamaVisionConfig()),
    }
    for name, default in defaults.items():
        if not has_vision or name not in used:
            _check_unused(f"vision.{name}", _group(vision, name), default)
    sizes = to_dict(PlainVisionConfig())
    if not has_vision:
        _check_unused("vision", {k: v for k, v in vision.items() if k in sizes}, {**sizes, "num_layers": 0})
        return None
    new = {"kind": kind, **{key: vision[key] for key in _TOWER if key in vision}}
    for name in used:
        new |= _group(vision, name)
    if kind == "mllama":
        tower = dict(_group(vision, "vit"))
        new = {key: value for key, value in new.items() if key not in tower or key == "max_tiles"}
        new |= {key: tower.pop(key) for key in ("norm_eps", "activation") if key in tower}
        _check_unused("vision.vit", tower, _MLLAMA | {"max_tiles": 0})
    if kind == "qwen":
        _check_unused("vision", {"image_size": vision.get("image_size", 8)}, sizes)
    elif "image_size" in vision:
        new["image_size"] = vision["image_size"]
    if new.get("connector") != "resampler" and "resampler" in new:
        _check_unused("vision.vit.resampler", new.pop("resampler"), _NO_RESAMPLER)
    return new


def _sparsity(sparsity: Tree) -> dict[str, Any] | None:
    method = sparsity.get("method", "none")
    used = _SPARSITY.get(method, ())
    unused = {key: value for key, value in sparsity.items() if key not in used and key != "method"}
    _check_unused("sparsity", unused, to_dict(InfLLM()))
    return None if method == "none" else {"kind": method, **{k: sparsity[k] for k in used if k in sparsity}}


def _check_unused(group: str, values: Tree, defaults: Tree) -> None:
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            _check_unused(f"{group}.{key}", value, default)
        elif value != default:
            raise ConfigError(
                f"is {value} where the model does not use it; delete the line", f"{group}.{key}".lstrip(".")
            )
