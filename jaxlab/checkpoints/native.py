"""A model of ours on disk: a folder with config.yaml (the ModelConfig), params/ (Orbax) and tokenizer.json.

Without tokenizer.json the model reads bytes. A model that came from a folder of Hugging Face keeps in
huggingface/ what it needs to become one again. Whatever is wrong with a folder is a UserError of one line.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from tokenizers import Tokenizer

from jaxlab.checkpoints.kept import Kept
from jaxlab.checkpoints.locate import OWN_CONFIG, OWN_PARAMS
from jaxlab.config import Source, dump
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import ModelConfig, Params, abstract_params, from_flat, is_flat

CONFIG, PARAMS, TOKENIZER, MADE_BY = OWN_CONFIG, OWN_PARAMS, "tokenizer.json", "made_by.json"


def save_model(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    kept: Kept | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model folder: aside first, then renamed, so that `path` is always whole or absent.

    Args:
      kept: what a folder of Hugging Face needs besides, if the model came from one.

    Raises:
      UserError: `path` exists and `overwrite` is not set.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; choose another place or overwrite it explicitly")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        (aside / CONFIG).write_text(dump(config))
        if tokenizer is not None:
            tokenizer.save(str(aside / TOKENIZER))
        if kept is not None:
            kept.write(aside)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(aside / PARAMS, params)
        if path.exists():
            shutil.rmtree(path)
        os.chmod(aside, 0o755)
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_model(
    path: str | Path, *, shardings: Params | None = None, dtype: jax.typing.DTypeLike | None = None
) -> tuple[ModelConfig, Params, Tokenizer | None]:
    """Read a model folder.

    Args:
      shardings: a tree like the parameters of `jax.sharding.Sharding`: each tensor is read straight to where
        it will live. None: the default device.
      dtype: read the tensors in this dtype instead of the one they are stored in.

    Raises:
      UserError: not a model folder, or its parameters are not those of its config.
    """
    path = Path(path).absolute()
    config = load_model_config(path)
    tokenizer = load_tokenizer(path)
    stored, expected = stored_shapes(path), abstract_params(config)
    check_same_tree(stored, expected, path)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, expected)
    place = lambda s, where: jax.ShapeDtypeStruct(s.shape, dtype or s.dtype, sharding=where)
    with _damage(path), ocp.StandardCheckpointer() as checkpointer:
        return config, checkpointer.restore(path / PARAMS, jax.tree.map(place, stored, shardings)), tokenizer


def load_model_config(path: str | Path) -> ModelConfig:
    """The config of a model folder.

    Raises:
      UserError: not a model folder, or one with a link that leads out of it.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such model folder")
    if not (path / CONFIG).is_file() or not (path / PARAMS).is_dir():
        raise UserError(f"{path}: not a model folder of ours: it needs {CONFIG} and {PARAMS}/")
    root = path.resolve()
    for file in path.rglob("*"):
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            raise UserError(f"{file}: leads out of the model folder; put the file itself there")
    source = Source.of_file(path / CONFIG)
    if is_flat(source.tree):
        try:
            source.tree = from_flat(source.tree)
        except ConfigError as error:
            raise error.at(str(path / CONFIG)) from None
    return source.build(ModelConfig)


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a model folder; None: the model reads bytes."""
    file = Path(path) / TOKENIZER
    if not file.exists():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file}: not a tokenizer ({error})") from error


def stored_shapes(path: str | Path) -> Params:
    """Shapes and dtypes of the parameters on disk, from metadata alone."""
    path = Path(path).absolute()
    with _damage(path), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path / PARAMS).item_metadata
        if metadata is None:
            raise FileNotFoundError("it holds no metadata")
        return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), dict(metadata))


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What Orbax raises on files that are missing, cut off or changed, as one line for the user."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / PARAMS}: the parameters cannot be read: {error}"[:400]) from error


def check_same_tree(
    stored: Params, expected: Params, path: str | Path, expected_by: str = "its config"
) -> None:
    """Raise one line that names what is missing, unexpected or of another shape."""
    have, want = _shapes(stored), _shapes(expected)
    problems = [f"lacks {name}" for name in want if name not in have]
    problems += [f"has an unexpected {name}" for name in have if name not in want]
    problems += [
        f"{n} is {have[n]}, {expected_by} says {want[n]}" for n in want if have.get(n, want[n]) != want[n]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: {'; '.join(problems[:3])}{more}")


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


def model_identity(path: str | Path) -> str:
    """A digest of a model folder's files: changes when the model does."""
    path = Path(path)
    load_model_config(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(json.dumps(str(file.relative_to(path))).encode())
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def made_by(path: str | Path) -> dict[str, Any] | None:
    """What a shipped model folder says of its making: config, command, commit, results; None without."""
    file = Path(path) / MADE_BY
    return dict(json.loads(file.read_text())) if file.is_file() else None
