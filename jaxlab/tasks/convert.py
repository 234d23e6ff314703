"""Task `convert`: a model from one form to another, Hugging Face's folders and ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tokenizers import Tokenizer

from jaxlab.app import model_folder
from jaxlab.checkpoints import families, huggingface, loading, locate, native
from jaxlab.checkpoints.folder import open_folder
from jaxlab.checkpoints.kept import Kept
from jaxlab.checkpoints.safetensors_file import Tensor
from jaxlab.checkpoints.tokenizer_files import read_tokenizer
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, Params, count_params, forward

Dtype = jax.typing.DTypeLike | None
Reader = Callable[[Dtype], tuple[ModelConfig, Params]]
"""IN in a dtype, or as it is."""
_TOKENS = (2, 24)
"""Rows and length of the batch on which logits are compared."""


@dataclass(frozen=True)
class Arguments:
    """Write a model in another form."""

    in_: Annotated[str, tyro.conf.Positional]
    """A folder of Hugging Face or of ours, a hub id, a run folder, or a .bin file of llama2.c."""
    out: Annotated[str, tyro.conf.Positional]
    """The folder to write."""
    to: Literal["hf", "orbax"] | None = None
    """Hugging Face's form or ours; by default the one that IN has not."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the tensors; by default as they are."""
    verify: bool = False
    """Read OUT again: compare the bytes of every tensor, where the dtype is kept, and logits."""
    adapter: str | None = None
    """A LoRA adapter (PEFT), a folder or a hub id, that is merged into the tensors."""
    revision: str | None = None
    """Of a hub id: commit, tag or branch."""
    offline: bool = False
    """Take a hub id from the cache alone."""
    allow_pickle: bool = False
    """Read PyTorch's .bin files where there are no safetensors."""
    check_finite: bool = False
    """Refuse tensors with NaN or infinities."""
    check: bool = False
    """Make all checks and estimate the memory; read no tensor and write nothing."""
    overwrite: bool = False
    """Replace OUT if it exists."""


@dataclass(frozen=True)
class Source:
    """IN, opened: every tensor accounted for, none read."""

    path: Path
    kind: locate.Kind
    config: ModelConfig
    shapes: Params
    kept: Kept | None
    read: Reader
    account: str
    """A line about its tensors."""
    stored: Mapping[str, Tensor] | None = None
    """Of a folder of Hugging Face, the tensors that must come out as they went in."""


def run(arguments: Arguments) -> None:
    source, out = open_source(arguments), Path(arguments.out)
    to = arguments.to or ("hf" if source.kind == "native" else "orbax")
    if out.exists() and not arguments.overwrite:
        raise UserError(f"{out}: exists already; choose another place or use --overwrite")
    if out.resolve() == source.path.resolve() or source.path.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: holds the model to convert; choose another place")
    if to == "hf":  # before anything is read: can it be written?
        huggingface.config_json(source.config, source.kept)
    tokenizer = _tokenizer(source)
    print(f"{source.path}: {source.account}")
    print(
        f"{source.config.family}, {count_params(source.shapes):,} parameters, "
        f"{_bytes(source.shapes):,} bytes per device"
    )
    if arguments.check:
        return
    config, params = source.read(arguments.dtype)
    if to == "hf":
        huggingface.save(out, config, params, tokenizer, kept=source.kept, overwrite=arguments.overwrite)
    else:
        native.save_model(out, config, params, tokenizer, kept=source.kept, overwrite=arguments.overwrite)
    print(f"written: {out}")
    if arguments.verify:
        verify(source, config, params, out, same_dtype=arguments.dtype is None)


def open_source(arguments: Arguments) -> Source:
    """IN with all checks that need no tensor. Raises UserError."""
    path = _find(arguments)
    kind = locate.kind_of(path)
    dtype = None if arguments.dtype is None else jnp.dtype(arguments.dtype)
    if kind != "huggingface":
        if arguments.adapter is not None:
            raise UserError(f"{path}: --adapter is for folders of Hugging Face; convert it to one first")
        shapes = loading.stored_shapes(path)
        kept = loading.kept_of(path)

        def read(dtype: Dtype) -> tuple[ModelConfig, Params]:
            config, params, _ = loading.load_model(path, dtype=dtype)
            if arguments.check_finite:
                _check_finite(params, path)
            return config, params

        account = f"{len(jax.tree.leaves(shapes))} parameters, stacked over layers"
        return Source(path, kind, loading.load_model_config(path), _cast(shapes, dtype), kept, read, account)
    checkpoint = huggingface.open_checkpoint(
        path, adapter=arguments.adapter, allow_pickle=arguments.allow_pickle
    )
    found = checkpoint.account
    used = sum(len(entry.names) for entry in found.entries)
    account = f"{used} tensors used, {len(found.ignored)} ignored by rule"
    if found.copies:
        account += f", {', '.join(found.copies)} a copy of the embedding"
    reading = lambda dtype: huggingface.read(checkpoint, dtype=dtype, check_finite=arguments.check_finite)
    names = [name for entry in found.entries for name in entry.names]
    stored = {name: checkpoint.folder[name] for name in (*names, *found.copies)}
    return Source(
        path,
        kind,
        checkpoint.config,
        checkpoint.shapes(dtype),
        checkpoint.kept,
        reading,
        account,
        None if arguments.adapter is not None else stored,
    )


def verify(source: Source, config: ModelConfig, params: Params, out: Path, *, same_dtype: bool) -> None:
    """Read OUT again and compare it with IN, tensor by tensor and in its logits.

    Raises:
      RuntimeError: a tensor is not what it was, or logits differ although no dtype changed.
    """
    out_config, out_params, _ = loading.load_model(out)
    if same_dtype:
        theirs = huggingface.tensors(config, params, source.kept)
        if source.stored is not None:
            theirs = {name: tensor.read for name, tensor in source.stored.items()}
        ours = _tensors(out, out_config, out_params)
        wrong = sorted(set(theirs) ^ set(ours))
        wrong += [name for name in theirs if name in ours and not _equal(theirs[name](), ours[name]())]
        if wrong:
            raise RuntimeError(f"{out}: {len(wrong)} tensors are not those of IN: {', '.join(wrong[:3])}")
        print(f"verified: all {len(theirs)} tensors are the same bytes")
    if config.family != "jaxlab" and not families.find(config.family).forward:
        print(f"logits are not compared: models of the family {config.family} are not run")
        return
    if not same_dtype:
        config, params = source.read(None)
    difference, size = compare_logits(config, params, out_params)
    print(f"verified: logits differ by at most {difference:.3g} (the largest is {size:.3g})")
    if same_dtype and difference:
        raise RuntimeError(f"{out}: logits differ by {difference} from those of IN")


def compare_logits(config: ModelConfig, params: Params, others: Params) -> tuple[float, float]:
    """Largest difference of logits on a fixed batch of text, computed in float32, and the largest logit."""
    rng = np.random.default_rng(0)
    shape = (_TOKENS[0], min(_TOKENS[1], config.max_length))
    tokens = rng.integers(0, config.vocab_size, shape).astype(np.int32)
    if config.has_vision:  # no placeholders of images
        tokens = np.where(tokens == config.vision.image_token, (tokens + 1) % config.vocab_size, tokens)
    config = replace(config, compute_dtype="float32", attention_implementation="xla")
    run_model = jax.jit(lambda p: forward(p, {"tokens": tokens}, config)[0])
    one, other = (np.asarray(run_model(p), np.float64) for p in (params, others))
    return float(np.abs(one - other).max()), float(np.abs(one).max())


def _find(arguments: Arguments) -> Path:
    name = arguments.in_
    if not Path(name).exists() and not name.endswith((".yaml", ".yml")):
        return locate.resolve(
            name, revision=arguments.revision, offline=arguments.offline, allow_pickle=arguments.allow_pickle
        )
    if arguments.revision is not None or arguments.offline:
        raise UserError(
            f"--{'revision' if arguments.revision else 'offline'} is for a hub id; {name} is here"
        )
    return model_folder(name)


def _tokenizer(source: Source) -> Tokenizer | None:
    """What can be read of it: a folder with SentencePiece's format alone is copied as it is."""
    if source.kind != "huggingface":
        return loading.load_tokenizer(source.path)
    try:
        return read_tokenizer(source.path)
    except UserError as error:
        print(f"note: {error}")
        return None


def _tensors(path: Path, config: ModelConfig, params: Params) -> Mapping[str, Callable[[], np.ndarray]]:
    """The tensors of OUT as Hugging Face has them: of such a folder those that it holds."""
    if locate.kind_of(path) == "huggingface":
        return {name: tensor.read for name, tensor in open_folder(path).items()}
    return huggingface.tensors(config, params, loading.kept_of(path))


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _cast(shapes: Params, dtype: jax.typing.DTypeLike | None) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), shapes)


def _bytes(shapes: Params) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _check_finite(params: Params, path: Path) -> None:
    for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not bool(jnp.isfinite(leaf).all()):
            name = jax.tree_util.keystr(leaf_path, simple=True, separator=".")
            raise UserError(f"{path}: {name} holds NaN or infinities")
