"""A model of ours on disk: a folder with config.yaml (the ModelConfig), params/ (Orbax) and tokenizer.json.

Without tokenizer.json the model reads bytes.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from tokenizers import Tokenizer

from jaxlab.config import dump, load
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, Params, abstract_params

CONFIG, PARAMS, TOKENIZER = "config.yaml", "params", "tokenizer.json"


def save_model(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model folder: aside first, then renamed, so that `path` is always whole or absent.

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
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(aside / PARAMS, params)
        if path.exists():
            shutil.rmtree(path)
        os.chmod(aside, 0o755)
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_model(
    path: str | Path, *, shardings: Params | None = None, dtype=None
) -> tuple[ModelConfig, Params, Tokenizer | None]:
    """Read a model folder.

    Args:
      shardings: a tree like the parameters (or a prefix of it) of `jax.sharding.Sharding`: each tensor is read
        straight to where it will live. None: the default device.
      dtype: read the tensors in this dtype instead of the one they are stored in.

    Raises:
      UserError: not a model folder, or its parameters are not those of its config.
    """
    path = Path(path).absolute()
    config = load_model_config(path)
    tokenizer = Tokenizer.from_file(str(path / TOKENIZER)) if (path / TOKENIZER).exists() else None
    with ocp.StandardCheckpointer() as checkpointer:
        stored = stored_shapes(path)
        expected = abstract_params(config)
        check_same_tree(stored, expected, path)
        if shardings is None:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda _: here, expected)
        target = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, dtype or s.dtype, sharding=sharding),
            stored,
            shardings,
        )
        return config, checkpointer.restore(path / PARAMS, target), tokenizer


def load_model_config(path: str | Path) -> ModelConfig:
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such model folder")
    if not (path / CONFIG).is_file() or not (path / PARAMS).is_dir():
        raise UserError(f"{path}: not a model folder of ours: it needs {CONFIG} and {PARAMS}/")
    return load(ModelConfig, path / CONFIG, [])


def stored_shapes(path: Path) -> Params:
    """Shapes and dtypes of the parameters on disk, from metadata alone."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path.absolute() / PARAMS).item_metadata
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), dict(metadata))


def check_same_tree(stored: Params, expected: Params, path: Path) -> None:
    """Raise one line that names what is missing, unexpected or of another shape."""
    flat = lambda tree: {
        jax.tree_util.keystr(k, simple=True, separator="."): v.shape for k, v in _leaves(tree)
    }  # noqa: E731
    have, want = flat(stored), flat(expected)
    problems = [f"lacks {name}" for name in want if name not in have]
    problems += [f"has an unexpected {name}" for name in have if name not in want]
    problems += [
        f"{n} is {have[n]}, its config says {want[n]}" for n in want if n in have and have[n] != want[n]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: {'; '.join(problems[:3])}{more}")


def _leaves(tree: Params):
    return jax.tree_util.tree_leaves_with_path(tree)


def model_identity(path: str | Path) -> str:
    """A digest of a model folder's files: changes when the model does."""
    path = Path(path)
    load_model_config(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(json.dumps(str(file.relative_to(path))).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
