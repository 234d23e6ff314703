"""LoRA adapters (arXiv 2106.09685) in PEFT's layout: merged into the tensors of a folder as they are read."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.checkpoints.folder import TensorFolder, inside, read_json
from jaxlab.checkpoints.safetensors_file import Tensor, read_header
from jaxlab.errors import UserError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
# From the names of modules in memory to those of tensors on disk; the first that the folder holds is taken.
_PLACES = (
    (r"", ""), (r"^model\.", ""), (r"^", "transformer."), (r"^", "model."),
    (r"^model\.language_model\.", "language_model.model."), (r"^model\.language_model\.", "model."),
    (r"^language_model\.", "model.language_model."), (r"^lm_head", "language_model.lm_head"),
)  # fmt: skip


def base_of(adapter: str | Path) -> str:
    """The model that an adapter was trained on, as its config names it. Raises UserError if it names none."""
    name = read_json(inside(Path(adapter), CONFIG)).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{Path(adapter) / CONFIG}: names no base_model_name_or_path")
    return name


def merged(base: TensorFolder, adapter: str | Path) -> TensorFolder:
    """The base with W + scale * B A in place of the matrices that the adapter changes, in W's dtype.

    Raises:
      UserError: a kind of adapter that is not known, or tensors that fit nothing in the base.
    """
    adapter = Path(adapter)
    if not adapter.is_dir():
        raise UserError(f"{adapter}: no such adapter")
    config = read_json(inside(adapter, CONFIG))
    _check_known(config, adapter)
    pairs: dict[str, dict[str, Tensor]] = {}
    embeddings, replaced, unknown = set(), {}, []
    for key, tensor in read_header(inside(adapter, TENSORS)).items():
        name = key.removeprefix(_PREFIX)
        match = _KEY.fullmatch(name)
        if (match is None and ".modules_to_save" in name) or (match is None and _place(base, name)):
            name = re.sub(r"\.modules_to_save(\.default)?|\.original_module", "", name)
            place = _place(base, name)
            if place is not None and base[place].shape == tensor.shape:
                replaced[place] = tensor
                continue
        place = None if match is None else _place(base, f"{match['module']}.weight")
        if match is None or place is None:
            unknown.append(key)
            continue
        pairs.setdefault(place, {})[match["side"]] = tensor
        if match["kind"]:
            embeddings.add(place)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(f"{adapter}: fits nothing in {base.path}: {', '.join(unknown[:3])}{more}")
    tensors = dict(base.tensors)
    for place, pair in pairs.items():
        transposed = bool(config.get("fan_in_fan_out")) and place not in embeddings
        tensors[place] = _with_update(
            base[place], pair, place, config, place in embeddings, transposed, adapter
        )
    for place, tensor in replaced.items():
        tensors[place] = dataclasses.replace(
            tensor, name=place, dtype=base[place].dtype, read_rows=_cast(tensor, base[place].dtype)
        )
    return dataclasses.replace(base, tensors=tensors)


def _check_known(config: dict[str, Any], adapter: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{adapter}: an adapter of type {config.get('peft_type')!r}; only LORA is read")
    for key in ("use_dora", "lora_bias", "use_qalora", "megatron_config", "trainable_token_indices"):
        if config.get(key):
            raise UserError(f"{adapter / CONFIG}: {key} is set, which is not read")
    if config.get("bias", "none") != "none":
        raise UserError(f"{adapter / CONFIG}: bias is {config['bias']!r}; only 'none' is read")
    if type(config.get("r")) is not int or config["r"] < 1:
        raise UserError(f"{adapter / CONFIG}: r is {config.get('r')!r}, not a rank")


def _place(base: TensorFolder, name: str) -> str | None:
    """The tensor of the base that a module's tensor is called; None if there is none."""
    for pattern, replacement in _PLACES:
        candidate = re.sub(pattern, replacement, name, count=1) if pattern else name
        if candidate in base:
            return candidate
    return None


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv 2312.03732); patterns overrule both."""
    module = name.removesuffix(".weight")

    def setting(patterns: str, default: Any) -> Any:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        return default

    expected = setting("rank_pattern", config["r"])
    if rank != expected:
        raise UserError(f"{name}: the adapter has rank {rank} here, its config says {expected}")
    alpha = float(setting("alpha_pattern", config.get("lora_alpha", 8)))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _with_update(
    weight: Tensor,
    pair: dict[str, Tensor],
    name: str,
    config: dict[str, Any],
    embedding: bool,
    transposed: bool,
    adapter: Path,
) -> Tensor:
    """W + scale * B A. An embedding's factors are A [r, V] and B [D, r], so that its update is (B A)^T."""
    if set(pair) != {"A", "B"} or any(len(t.shape) != 2 for t in (*pair.values(), weight)):
        raise UserError(f"{adapter}: {name} lacks one of its two matrices A and B")
    a, b = pair["A"], pair["B"]
    rank = a.shape[0]
    made = (b.shape[0], a.shape[1]) if not (embedding or transposed) else (a.shape[1], b.shape[0])
    if b.shape[1] != rank or made != weight.shape:
        raise UserError(
            f"{adapter}: {name}: B {list(b.shape)} times A {list(a.shape)} does not fit {list(weight.shape)}"
        )
    scale = np.float32(_scale(config, name, rank))

    def read_rows(start: int, stop: int) -> np.ndarray:
        left, right = b.read().astype(np.float32), a.read().astype(np.float32)
        flipped = embedding or transposed
        update = right[:, start:stop].T @ left.T if flipped else left[start:stop] @ right
        return (weight.read_rows(start, stop).astype(np.float32) + scale * update).astype(weight.dtype)

    return dataclasses.replace(weight, read_rows=read_rows)


def _cast(tensor: Tensor, dtype: np.dtype) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: tensor.read_rows(start, stop).astype(dtype)
