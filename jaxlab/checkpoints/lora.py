"""LoRA adapters (arXiv 2106.09685) in PEFT's layout: merged into the tensors of a folder as they are read."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.checkpoints.safetensors_file import Tensor, read_header
from jaxlab.checkpoints.tensor_folder import TensorFolder, inside, read_json
from jaxlab.errors import UserError

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Patterns = dict[str, list[tuple[re.Pattern[str], Any]]]
PREFIX = "base_model.model."
"""Of the names of an adapter's tensors."""
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
# From the names of modules in memory to those of tensors on disk, where a name is not the same on both.
_PLACES = (
    (r"^model\.", ""),
    (r"^transformer\.", ""),
    (r"^", "transformer."),
    (r"^", "model."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.", "model.language_model."),
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
)
_OF_LANGUAGE_MODEL = r"^(model\.)?(?=layers\.|embed_tokens\.)"
_IN_A_VLM = ("language_model.model.", "model.language_model.", "model.text_model.")
"""Where a VLM has what a language model by itself, and an adapter that was trained on it, call `model.`."""
_REFUSED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "megatron_config",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "lora_ga_config",
)
"""Settings under which the model is not W + scale * B A."""
MAX_ALPHA = 1e30
MAX_PATTERNS = 10_000
_PATTERN = re.compile(r"[\w.^$|()\[\]\\*+-]{1,500}")
"""What a pattern for names of modules may hold; with few groups and repetitions none takes long to match."""
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave W as it is; PiSSA, OLoRA, CorDA and LoftQ change it before training."""


def merged(base: TensorFolder, adapter: str | Path, *, allow_pickle: bool = False) -> TensorFolder:
    """The base with W + scale * B A in place of the matrices that the adapter changes, in W's dtype.

    Args:
      allow_pickle: where the adapter has no safetensors, read its .bin file (without running code from it).

    Raises:
      UserError: a kind of adapter that is not known, or tensors that fit nothing in the base, or two places.
    """
    adapter = Path(adapter)
    if not adapter.is_dir():
        raise UserError(f"{adapter}: no such adapter")
    config = read_json(inside(adapter, CONFIG))
    _check_known(config, adapter)
    pairs: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, str] = {}
    replaced: dict[str, Tensor] = {}
    embeddings, unknown = set(), []
    for key, tensor in _tensors(adapter, allow_pickle).items():
        name = key.removeprefix(PREFIX)
        match = _KEY.fullmatch(name)
        if (match is None and ".modules_to_save" in name) or (match is None and _place(base, name)):
            name = re.sub(r"\.modules_to_save(\.default)?", "", name)
            place = _place(base, name)
            if place is not None and base[place].shape == tensor.shape:
                if place in replaced:
                    raise UserError(f"{adapter}: holds {place} twice, as {replaced[place].name} and {key}")
                replaced[place] = tensor
                continue
        place = None if match is None else _place(base, f"{match['module']}.weight")
        if match is None or place is None:
            unknown.append(key)
            continue
        pair = pairs.setdefault(place, {})
        if match["side"] in pair:
            raise UserError(f"{adapter}: two tensors for {place}: {pair[match['side']].name} and {key}")
        pair[match["side"]] = tensor
        modules[place] = match["module"]
        if match["kind"]:
            embeddings.add(place)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"{adapter}: fits nothing in {base.path}: {', '.join(unknown[:3])}{more}"
            + _expected(base, unknown[0])
        )
    both = sorted(set(pairs) & set(replaced))
    if both:
        raise UserError(f"{adapter}: both changes and replaces {', '.join(both[:3])}")
    if not pairs and not replaced:
        raise UserError(f"{adapter}: holds no tensors")
    tensors = dict(base.tensors)
    patterns = {key: _patterns(config, key, adapter) for key in ("rank_pattern", "alpha_pattern")}
    for place, pair in pairs.items():
        transposed = bool(config.get("fan_in_fan_out")) and place not in embeddings
        _check_pair(pair, base[place], place, adapter)
        scale = _scale(config, patterns, modules[place], pair["A"].shape[0], adapter)
        tensors[place] = _with_update(base[place], pair, scale, place in embeddings, transposed, adapter)
    for place, tensor in replaced.items():
        dtype = base[place].dtype
        tensors[place] = dataclasses.replace(
            tensor, name=place, dtype=dtype, read_rows=_cast(tensor, dtype), file=None, offset=0
        )
    return dataclasses.replace(base, tensors=tensors)


def _tensors(adapter: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if (adapter / TENSORS).exists() or not (adapter / PICKLED).exists():
        return read_header(inside(adapter, TENSORS))
    if not allow_pickle:
        raise UserError(
            f"{adapter}: holds only a PyTorch pickle, which can carry code; save it as {TENSORS}, or pass "
            "--allow-pickle if you trust its origin"
        )
    from jaxlab.checkpoints.pickle_file import pickled_tensors

    return pickled_tensors(inside(adapter, PICKLED))


def _check_known(config: dict[str, Any], adapter: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{adapter}: an adapter of type {config.get('peft_type')!r}; only LORA is read")
    for key in _REFUSED:
        if config.get(key):
            raise UserError(f"{adapter / CONFIG}: {key} is set, which is not read")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{adapter / CONFIG}: init_lora_weights is {start!r}, which changes the base too; convert the "
            "adapter to plain LoRA with peft"
        )
    if config.get("bias", "none") != "none":
        raise UserError(f"{adapter / CONFIG}: bias is {config['bias']!r}; only 'none' is read")
    if type(config.get("r")) is not int or config["r"] < 1:
        raise UserError(f"{adapter / CONFIG}: r is {config.get('r')!r}, not a rank")


def _place(base: TensorFolder, name: str) -> str | None:
    """The tensor of the base that a module's tensor is called; None if there is none.

    Raises:
      UserError: the base does not hold the name itself, and more than one that may be meant.
    """
    if name in base:
        return name
    candidates = {re.sub(pattern, replacement, name, count=1) for pattern, replacement in _PLACES}
    # Layers that read images shift the numbers of the others.
    if not (base.config.get("text_config") or {}).get("cross_attention_layers"):
        candidates |= {re.sub(_OF_LANGUAGE_MODEL, prefix, name, count=1) for prefix in _IN_A_VLM}
    found = sorted(candidate for candidate in candidates if candidate in base)
    if len(found) > 1:
        raise UserError(f"{base.path}: the adapter's {name} may mean each of {', '.join(found)}")
    return found[0] if found else None


def _expected(base: TensorFolder, key: str) -> str:
    """How the base calls what an adapter's tensor may be of, for a message."""
    module = re.sub(r"\.lora_.*", "", key).split(".")
    ends = (f".{'.'.join(module[-n:])}.weight" for n in (2, 1))
    language = [name for name in base if "vision" not in name]
    like = next((name for end in ends for name in [*language, *base] if name.endswith(end)), None)
    if like is None:
        return ""
    shifted = (base.config.get("text_config") or {}).get("cross_attention_layers")
    if shifted and "language_model." not in key and ".layers." in like:
        listed = ", ".join(map(str, shifted[:4])) + (", ..." if len(shifted) > 4 else "")
        return (
            f"; layers {listed} of this model read images and shift the numbers of the others, so that a "
            "number from a language model may mean two layers: rename the adapter's tensors to "
            f"{PREFIX}{like[: like.index('layers.')]}layers.N..., N counting all layers"
        )
    return f"; expected are names such as {PREFIX}{like.removesuffix('.weight')}.lora_A.weight"


def _patterns(config: dict[str, Any], key: str, adapter: Path) -> list[tuple[re.Pattern[str], Any]]:
    """The patterns for names of modules, in memory, under a key of the config, with their values."""
    where = f"{adapter / CONFIG}: {key}"
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        raise UserError(f"{where} is not an object, or one of more than {MAX_PATTERNS} patterns")
    found = []
    for pattern, value in patterns.items():
        repeated = len(re.findall(r"[*+]", pattern))
        if (
            not _PATTERN.fullmatch(pattern)
            or pattern.count("(") > 1
            or repeated > 3
            or re.search(r"\)[*+]", pattern)
        ):
            raise UserError(
                f"{where}: {pattern[:80]!r} is not read: only names, one group and three of * and + are"
            )
        try:
            found.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except re.error:
            raise UserError(f"{where}: {pattern[:80]!r} is no pattern") from None
    return found


def _scale(config: dict[str, Any], patterns: Patterns, module: str, rank: int, adapter: Path) -> float:
    """alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv 2312.03732); patterns overrule both.

    Args:
      module: its name in memory, which is what patterns are written for.
    """

    def setting(key: str, default: Any) -> Any:
        return next((value for pattern, value in patterns[key] if pattern.match(module)), default)

    expected = setting("rank_pattern", config["r"])
    if rank != expected or rank < 1:
        raise UserError(f"{adapter}: {module} has rank {rank}, {CONFIG} says {expected}")
    alpha = setting("alpha_pattern", config.get("lora_alpha", 8))
    if type(alpha) not in (int, float) or not -MAX_ALPHA <= alpha <= MAX_ALPHA:
        raise UserError(
            f"{adapter / CONFIG}: the alpha of {module} is {str(alpha)[:40]}, not a usable number"
        )
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _check_pair(pair: dict[str, Tensor], weight: Tensor, name: str, adapter: Path) -> None:
    if set(pair) != {"A", "B"}:
        raise UserError(f"{adapter}: {name} lacks one of its two matrices A and B")
    for tensor in (*pair.values(), weight):
        if len(tensor.shape) != 2:
            raise UserError(f"{adapter}: {name}: {tensor.name} is {list(tensor.shape)}, not a matrix")


def _with_update(
    weight: Tensor, pair: dict[str, Tensor], scale: float, embedding: bool, transposed: bool, adapter: Path
) -> Tensor:
    """W + scale * B A. An embedding's factors are A [r, V] and B [D, r], so that its update is (B A)^T."""
    name, a, b = weight.name, pair["A"], pair["B"]
    rank = a.shape[0]
    made = (b.shape[0], a.shape[1]) if not (embedding or transposed) else (a.shape[1], b.shape[0])
    if b.shape[1] != rank or made != weight.shape:
        raise UserError(
            f"{adapter}: {name}: B {list(b.shape)} times A {list(a.shape)} does not fit {list(weight.shape)}"
        )
    factor = np.float32(scale)

    def read_rows(start: int, stop: int) -> np.ndarray:
        left, right = b.read().astype(np.float32), a.read().astype(np.float32)
        flipped = embedding or transposed
        update = right[:, start:stop].T @ left.T if flipped else left[start:stop] @ right
        return (weight.read_rows(start, stop).astype(np.float32) + factor * update).astype(weight.dtype)

    return dataclasses.replace(weight, read_rows=read_rows, file=None, offset=0)


def _cast(tensor: Tensor, dtype: np.dtype) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: tensor.read_rows(start, stop).astype(dtype)
