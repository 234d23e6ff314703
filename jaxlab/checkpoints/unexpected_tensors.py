"""Which tensor of a Hugging Face folder goes where: each is used, ignored by a rule, or unexpected: an error.

All of it follows from names, shapes and dtypes: nothing is read. `account` is for loading; `match` looks at
names alone, without jax, and is what `inspect` tells in an instant.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlab.checkpoints import families
from jaxlab.checkpoints.families.settings import CONVERT_FIRST
from jaxlab.checkpoints.safetensors_file import Tensor
from jaxlab.checkpoints.tensor_kinds import TensorKind, kind_of
from jaxlab.checkpoints.tensor_table import EMBEDDING, HEAD, Row
from jaxlab.errors import UserError
from jaxlab.models import MllamaVisionConfig, ModelConfig, MoEConfig, QwenVisionConfig, ViTConfig

if TYPE_CHECKING:  # names are matched without jax
    from jaxlab.checkpoints.tensor_map import Entry
    from jaxlab.models import Params

_SHOWN = 8
_ROWS_BYTES = 1 << 26
_PARTS = ("gate", "up", "down")
_LATENT_QUERY = tuple(f"attention.{leaf}" for leaf in ("query_down", "query_latent_norm.scale", "query_up"))
_LATENT = tuple(
    f"attention.{leaf}" for leaf in ("kv_down", "shared_key", "kv_latent_norm.scale", "key_up", "value_up")
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class TensorAccount:
    """What becomes of every tensor of a folder."""

    family: str
    """With the variant whose names the folder has."""
    entries: "tuple[Entry, ...]"
    """Their names are all those that are used."""
    copies: tuple[str, ...] = ()
    """Heads written out although they are tied: the embedding once more."""
    ignored: tuple[str, ...] = ()
    """No parameters, by a rule of the family."""
    missing: tuple[str, ...] = ()
    unmapped: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    """Sentences about shapes and dtypes."""

    @property
    def problems(self) -> int:
        return len(self.missing) + len(self.unmapped) + len(self.wrong)

    @property
    def summary(self) -> str:
        used = sum(len(entry.names) for entry in self.entries)
        line = f"{used} tensors used, {len(self.ignored)} ignored by rule"
        return f"{line}, {', '.join(self.copies)} stored beside a tied embedding" if self.copies else line

    def check(self, where: object) -> None:
        """Whether every tensor has its place.

        Raises:
          UserError: tensors are missing, not known, or of a wrong shape or dtype; one line lists them.
        """
        said = told(self.family, self.missing, self.unmapped, self.wrong)
        if said:
            raise UserError(f"{where}: not the family {self.family}: {said}")


def told(family: str, missing: Sequence[str], unmapped: Sequence[str], wrong: Sequence[str] = ()) -> str:
    """What makes tensors no model of a family, and how to mend it; "": nothing."""
    prefix = _common_prefix(missing, unmapped)
    if prefix and not _adapter(unmapped):
        return f"names begin with {prefix!r}, which the family does not have; take it off them"
    said = []
    if missing:
        said.append(f"{_count(missing, 'tensor')} missing: {_listed(missing)}")
    if unmapped:
        said.append(f"{_count(unmapped, 'tensor')} not known: {_listed(unmapped)}")
    if wrong:
        said.append(_listed(wrong))
    return "; ".join(said) + _hint(family, missing, unmapped, wrong)


def _hint(family: str, missing: Sequence[str], unmapped: Sequence[str], wrong: Sequence[str]) -> str:
    if _adapter(unmapped):
        return " (an adapter that was not merged: merge it with PEFT's merge_and_unload)"
    head = families.head_name(family)
    if head in missing and any(name.endswith("score.weight") for name in unmapped):
        return f" (a classifier or reward model: it has a head of its own in place of {head})"
    if head in missing:
        return f" ({head} may be absent only where config.json says tie_word_embeddings)"
    if unmapped and not missing and not wrong:
        names = unmapped[0] if len(unmapped) == 1 else "NAME ... (* stands for anything)"
        return f"; if the model computes without, pass --ignore-tensors {names}{CONVERT_FIRST}"
    return ""


def _adapter(names: Sequence[str]) -> bool:
    return any(".lora_" in name for name in names)


def _common_prefix(missing: Sequence[str], unmapped: Sequence[str]) -> str:
    """What stands before all names that are missed; "": nothing that all have."""
    there = set(unmapped)
    for name in unmapped:
        if missing and name.endswith(f".{missing[0]}"):
            prefix = name.removesuffix(missing[0])
            if all(prefix + wanted in there for wanted in missing):
                return prefix
    return ""


def account(tensors: Mapping[str, Tensor], config: ModelConfig, template: "Params") -> TensorAccount:
    """The account of a folder under the variant of the family that fits it best.

    Args:
      tensors: by their names in the folder.
      template: shapes of our parameters (`abstract_params(config)`).
    """
    best: TensorAccount | None = None
    for name in families.names_of(config.family):
        found = _account(tensors, config, template, name)
        if best is None or found.problems < best.problems:
            best = found
        if not found.problems:
            break
    assert best is not None
    return best


def _account(
    tensors: Mapping[str, Tensor], config: ModelConfig, template: "Params", name: str
) -> TensorAccount:
    from jaxlab.checkpoints.tensor_map import entries

    known = entries(template, name)
    missing, wrong = [], []
    for entry in known:
        shape = entry.shape(template)
        for tensor_name in entry.names:
            tensor = tensors.get(tensor_name)
            if tensor is None:
                missing.append(tensor_name)
            elif tuple(tensor.shape) != shape:
                wrong.append(f"{tensor_name} is {list(tensor.shape)}, expected {list(shape)}")
            elif not is_float(tensor.dtype):
                wrong.append(f"{tensor_name} is {tensor.dtype}, expected a floating-point dtype")
    used = {tensor_name for entry in known for tensor_name in entry.names}
    left = [tensor_name for tensor_name in tensors if tensor_name not in used]
    copies = [n for n in left if config.tie_embeddings and n == families.head_name(name)]
    for copy in copies:
        embedding = next(entry for entry in known if entry.path == EMBEDDING)
        if tuple(tensors[copy].shape) != embedding.shape(template):
            wrong.append(
                f"{copy} is {list(tensors[copy].shape)}, but config.json says it is the embedding, "
                f"{list(embedding.shape(template))}"
            )
    ignored = [n for n in left if n not in copies and families.ignored(name).fullmatch(n)]
    unmapped = [n for n in left if n not in copies and n not in set(ignored)]
    return TensorAccount(
        name, known, tuple(copies), tuple(ignored), tuple(missing), tuple(unmapped), tuple(wrong)
    )


def check_tied_head(head: Tensor, embedding: Tensor) -> None:
    """Whether a tied head that is written out is the embedding.

    Raises:
      UserError: it is not, bit for bit.
    """
    rows = max(1, _ROWS_BYTES // max(1, head.nbytes // head.shape[0]))
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and all(
        head.read_rows(i, min(i + rows, head.shape[0])).tobytes()
        == embedding.read_rows(i, min(i + rows, head.shape[0])).tobytes()
        for i in range(0, head.shape[0], rows)
    )
    if not same:
        raise UserError(
            f"{head.name} differs from {embedding.name}, but config.json ties the two; set "
            "tie_word_embeddings to false if the head is one of its own, or pass --ignore-tensors "
            f"{head.name}{CONVERT_FIRST}"
        )


def is_float(dtype: Any) -> bool:
    """Whether parameters can have a dtype; bfloat16 and float8 are numpy's by way of ml_dtypes."""
    return np.dtype(dtype).kind == "f" or np.dtype(dtype).name.startswith(("bfloat16", "float8"))


def _count(names: Sequence[str], noun: str) -> str:
    return f"1 {noun} is" if len(names) == 1 else f"{len(names)} {noun}s are"


def _listed(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more


@dataclass(frozen=True)
class Match:
    """What becomes of the names of a folder."""

    family: str
    """With the variant whose names they are."""
    paths: Mapping[str, str]
    """The leaf, or the first of several, of each name that is used."""
    kinds: tuple[TensorKind, ...]
    """Of those names."""
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
    rows: list[tuple[Row, list[str]]] = []
    for row in families.rows_of(family):
        path, found = row.paths[0], kinds.get(_general(re.sub(r"\{\w+\}", "0", row.name)), [])
        if _needed(path, config) if _is_language(path) else found:
            rows.append((row, _names(row, config, found)))
            expected |= dict.fromkeys(rows[-1][1], path)
    present = set(names)
    missing = [name for name in expected if name not in present]
    left = [name for name in names if name not in expected]
    copies = [n for n in left if config.tie_embeddings and n == families.head_name(family)]
    ignored = [n for n in left if n not in copies and families.ignored(family).fullmatch(n)]
    unmapped = [n for n in left if n not in copies and n not in ignored]
    paths = {n: path for n, path in expected.items() if n in present}
    used = tuple(_kind(row, listed, expected, config) for row, listed in rows)
    return Match(family, paths, used, tuple(copies), tuple(ignored), tuple(unmapped), tuple(missing))


def _kind(row: Row, names: list[str], expected: Mapping[str, str], config: ModelConfig) -> TensorKind:
    """The tensors of a row; a name that a later row has too is that one's."""
    own = tuple(name for name in names if expected[name] == row.paths[0])
    layers = _layers(row.paths[0], config) if "{i}" in row.name else None
    numbers = () if layers is None else row.layer_numbers(*layers)
    return kind_of(row, own, numbers, 0 if layers is None else layers[1])


def _general(name: str) -> str:
    """A name with its numbers out."""
    return _NUMBER.sub("0", name)


def _names(row: Row, config: ModelConfig, found: list[str]) -> list[str]:
    """All names of a row, by what the config says of layers, experts and heads; else those that are found."""
    counted = re.findall(r"\{(\w+)\}", row.name)
    if not counted:
        return [row.name]
    layers = _layers(row.paths[0], config)
    if layers is None:
        return found
    numbers = row.layer_numbers(*layers) if "i" in counted else (0,)
    inner = 1
    if "e" in counted and config.moe is not None:
        inner = config.moe.num_experts
    elif "h" in counted:
        inner = config.num_heads if "query" in row.paths[0] else config.kv_heads
    second = next((axis for axis in ("{e}", "{h}") if axis in row.name), "{e}")
    return [row.name.replace("{i}", str(i)).replace(second, str(n)) for i in numbers for n in range(inner)]


def _layers(path: str, config: ModelConfig) -> tuple[int, int] | None:
    """How many layers the stack of a leaf has, and how many stand before it; None: it is no such stack."""
    vision = config.vision
    if path.startswith("layers."):
        return config.num_layers - config.dense_layers, config.dense_layers
    if path.startswith("dense_layers."):
        return config.dense_layers, 0
    counts: dict[str, int] = {}
    if vision is not None:
        counts["vision.layers."] = vision.num_layers
    if isinstance(vision, MllamaVisionConfig):
        counts["vision.global_layers."] = vision.num_global_layers
        counts["projector.cross_layers."] = len(vision.cross_layers)
    elif isinstance(vision, QwenVisionConfig):
        counts["projector.deep."] = len(vision.deep_layers)
    elif isinstance(vision, ViTConfig) and vision.resampler is not None:
        counts["projector.resampler.layers."] = vision.resampler.num_layers
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
        "position.table": c.position.kind == "learned",
        "final_norm.scale": True,
        "final_norm.bias": c.norm == "layer" and c.norm_bias,
        "head.bias": c.head_bias,
    }
    if path in edges:
        return edges[path]
    stack, _, leaf = path.partition(".")
    if stack not in ("layers", "dense_layers") or (stack == "dense_layers" and not c.dense_layers):
        return False
    experts = c.moe is not None and stack == "layers"
    return _of_layer(c, experts).get(leaf, False)


def _of_layer(c: ModelConfig, experts: bool) -> dict[str, bool]:
    mlp, gated, biased = not experts, c.mlp == "gated", c.mlp_bias
    layer_norm, normed = c.norm == "layer" and c.norm_bias, c.qk_norm != "none"
    norms: dict[str, Any] = {
        "attention_norm": c.pre_norms,
        "mlp_norm": c.has_mlp_norm,
        "attention_post_norm": c.post_norms,
        "mlp_post_norm": c.post_norms,
        "attention.query_norm": normed,
        "attention.key_norm": normed,
    }
    without_bias = ("attention.query_norm", "attention.key_norm") if c.qk_norm == "each_head" else ()
    latent = c.latent is not None
    latent_query = c.latent is not None and c.latent.query_rank is not None
    leaves = {"attention.output": True, "attention.query": not latent_query}
    leaves |= {f"attention.{part}": not latent for part in ("key", "value")}
    leaves |= dict.fromkeys(_LATENT, latent) | dict.fromkeys(_LATENT_QUERY, latent_query)
    leaves |= {f"attention.{part}_bias": c.attention_bias for part in ("query", "key", "value")}
    leaves |= {f"{norm}.scale": there for norm, there in norms.items()}
    leaves |= {
        f"{norm}.bias": there and layer_norm and norm not in without_bias for norm, there in norms.items()
    }
    leaves |= _of_experts(c.moe if experts else None)
    return leaves | {
        "attention.output_bias": c.has_output_bias,
        "attention.sinks": c.attention_sinks,
        "mlp.gate": mlp and gated,
        "mlp.up": mlp,
        "mlp.down": mlp,
        "mlp.gate_bias": mlp and gated and biased,
        "mlp.up_bias": mlp and biased,
        "mlp.down_bias": mlp and biased,
    }


def _of_experts(m: MoEConfig | None) -> dict[str, bool]:
    if m is None:
        return {}
    leaves = dict.fromkeys(("moe.router", *(f"moe.{part}" for part in _PARTS)), True)
    leaves |= {f"moe.{part}_bias": m.bias for part in _PARTS}
    leaves |= {f"moe.shared.{part}": m.shared_width > 0 for part in _PARTS}
    return leaves | {
        "moe.shared_gate": m.shared_gate,
        "moe.router_bias": m.router_bias,
        "moe.choice_bias": m.choice_bias,
    }
