"""Whether a model that was written is the one that it was made from: bytes of tensors, and logits."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlab.checkpoints.formats import hf_write
from jaxlab.checkpoints.formats.base import OpenModel
from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder
from jaxlab.models import ModelConfig, NSAConfig, Params, forward, using

_TOKENS = (2, 24)
"""Rows and length of the batch on which logits are compared."""


def verify_tensors(source: OpenModel, params: Params, written: OpenModel, *, mesh: Mesh | None = None) -> int:
    """How many tensors, in Hugging Face's names and shapes, both models hold, the same bytes in each.

    Args:
      params: the source's, in the dtype they are stored in.
      mesh: devices over which the written model is split; None: the default device.

    Raises:
      RuntimeError: a tensor is not what it was.
    """
    if isinstance(source, HuggingFaceFolder) and source.adapter is None:
        used = [name for entry in source.account.entries for name in entry.names]
        theirs = {name: source.tensors[name].read for name in (*used, *source.account.copies)}
    else:
        theirs = hf_write.tensors(source.config, params, source.source_files)
    ours: Mapping[str, Callable[[], np.ndarray]]
    if isinstance(written, HuggingFaceFolder):
        ours = {name: tensor.read for name, tensor in written.stored.items()}
    else:
        ours = hf_write.tensors(written.config, written.read(mesh=mesh), written.source_files)
    wrong = sorted(set(theirs) ^ set(ours))
    wrong += [name for name in theirs if name in ours and not _equal(theirs[name](), ours[name]())]
    if wrong:
        raise RuntimeError(
            f"{written.path}: {len(wrong)} tensors are not those of IN: {', '.join(wrong[:3])}"
        )
    return len(theirs)


def verify_logits(
    source: OpenModel, written: OpenModel, params: Params | None, *, mesh: Mesh | None = None
) -> str:
    """Compares logits on a fixed batch; a line that says how far they are apart.

    Args:
      params: the source's, if no dtype changed: then logits must be equal. None: they are read.
      mesh: devices over which the models are split; None: the default device.

    Raises:
      RuntimeError: logits differ although no dtype changed.
    """
    config = source.config
    # Logits are computed in float32, in which also what no leaf can hold as it is stored can be read.
    others = source.read(mesh=mesh, dtype="float32") if params is None else params
    with using(mesh):
        difference, size = compare_logits(config, others, written.read(mesh=mesh))
    if params is not None and difference:
        raise RuntimeError(f"{written.path}: logits differ by {difference} from those of IN")
    largest = "they hold NaN" if np.isnan(size) else f"the largest is {size:.3g}"
    return f"verified: logits differ by at most {difference:.3g} ({largest})"


def compare_logits(config: ModelConfig, params: Params, others: Params) -> tuple[float, float]:
    """Largest difference of logits on a fixed batch of text, computed in float32, and the largest logit.

    NaN beside NaN is no difference, and beside a number one of NaN.
    """
    rng = np.random.default_rng(0)
    shape = (_TOKENS[0], min(_TOKENS[1], config.max_length))
    tokens = rng.integers(0, config.vocab_size, shape).astype(np.int32)
    if config.has_vision:  # no placeholders of images
        tokens = np.where(tokens == config.image_token, (tokens + 1) % config.vocab_size, tokens)
    attention = config.attention
    if not isinstance(attention, NSAConfig):
        attention = dataclasses.replace(attention, implementation="xla")
    config = dataclasses.replace(config, compute_dtype="float32", attention=attention)
    run_model = jax.jit(lambda p: forward(p, {"tokens": tokens}, config)[0])
    one, other = (np.asarray(run_model(p), np.float64) for p in (params, others))
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    return float(np.where(same, 0.0, np.abs(one - other)).max()), float(np.abs(one).max())


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
