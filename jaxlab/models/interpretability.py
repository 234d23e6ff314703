"""Activations of a model by name and layer: read, and patched."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array

from jaxlab.models.batch import Batch, Params
from jaxlab.models.config import ModelConfig
from jaxlab.models.decoder import as_arrays, bind_decoder
from jaxlab.models.taps import ACTIVATIONS, Patch, make_taps
from jaxlab.models.vision.encoders import encode_images, layers_between, prepare_batch


def activations(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    names: str | Sequence[str],
    *,
    layers: int | Sequence[int] | None = None,
    patches: Patch | Sequence[Patch] = (),
) -> dict[str, Array]:
    """Named activations of a batch, from one jitted forward pass. Names and axes: ACTIVATIONS in taps.py.

    Args:
      batch: as `forward` takes it.
      names: one or several. Others cost nothing, and no T x T is built for them.
      layers: whose activations come back, counted from 0, in this order; None: all. Memory holds no others.
      patches: changes of named activations; what comes back is patched.

    Returns:
      Each name's array, with `layers` stacked in front, or without that axis where they are one number.
      Names, layers and config are static; parameters, batch and patches are data, and gradients and vmap go
      through.

    Raises:
      ValueError: names, layers, positions, heads or shapes that the model or the batch does not have.
    """
    if "images" in batch and not config.has_vision:
        raise ValueError("the batch holds images, the model has no vision")
    names = (names,) if isinstance(names, str) else tuple(names)
    patches = (patches,) if isinstance(patches, Patch) else tuple(patches)
    one = isinstance(layers, int | np.integer)
    chosen = None if layers is None else tuple(int(layer) for layer in np.atleast_1d(np.asarray(layers)))
    batch = prepare_batch(batch, config)
    make_taps(batch, config, names=names, layers=chosen, patches=patches)  # refuses before anything is traced
    found = _activations(params, batch, patches, config=config, names=names, layers=chosen)
    return {name: found[name][0] if one and ACTIVATIONS[name].layered else found[name] for name in names}


@functools.partial(jax.jit, static_argnames=("config", "names", "layers"))
def _activations(
    params: Params,
    batch: Batch,
    patches: tuple[Patch, ...],
    *,
    config: ModelConfig,
    names: tuple[str, ...],
    layers: tuple[int, ...] | None,
) -> dict[str, Array]:
    batch = as_arrays(batch)
    taps = make_taps(batch, config, names=names, layers=layers, patches=patches)
    images = encode_images(params, batch, config)
    between = layers_between(params, images, config)
    found = bind_decoder(params, config)(batch, images=images, between=between, taps=taps).activations
    return found or {}
