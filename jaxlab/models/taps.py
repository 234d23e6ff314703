"""The seam of a decoder: named activations, read and changed where they arise, in every layer.

Each step of a layer passes its result through `tap(name, value)`. That is the value itself, unless somebody
asked for the name or patches it: then, and only then, anything is added to the program. Layers are scanned,
so what differs between them (`Taps.per_layer`) is scanned with their parameters, and what is read is written
to buffers that go from layer to layer, with a row for each layer that was asked for and for no other. Flows
and blocking (kernels_pallas/flow) reach attention through the same seam, as `tap.probe`.

Axis letters: L layers, B batch, T tokens, S tokens attended to (S = T), D width, H query heads, Hkv key/value
heads, Dk and Dv their dimensions, F width of the MLP, V vocabulary, M compressed blocks, n chosen blocks.
"""

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxlab.models.batch import Batch
from jaxlab.models.config import BRANCHES, ModelConfig
from kernels_pallas.flow import Probe
from kernels_pallas.nsa import num_compressed


class Activation(NamedTuple):
    """One name: its axes, L first where every layer has one, and what it is."""

    axes: str
    meaning: str

    @property
    def layered(self) -> bool:
        return self.axes.startswith("L ")


ACTIVATIONS: dict[str, Activation] = {
    "embedding": Activation("B T D", "what the first layer reads: embeddings, images in their places"),
    "residual_pre": Activation("L B T D", "the residual stream as a layer reads it"),
    "attention_input": Activation("L B T D", "the stream as attention reads it, normed in most models"),
    "queries": Activation("L B T H Dk", "queries, after their norm and rotary positions"),
    "keys": Activation("L B T Hkv Dk", "keys, after their norm and rotary positions"),
    "values": Activation("L B T Hkv Dv", "values"),
    "attention_scores": Activation("L B H T S", "scaled scores, after softcap and mask, before the softmax"),
    "attention_pattern": Activation("L B H T S", "attention weights: from query t to token s"),
    "gates": Activation("L B T H 3", "NSA: gates of compression, selection, window"),
    "chosen_blocks": Activation("L B Hkv T n", "NSA: selection blocks that a query reads, -1 none"),
    "compression_pattern": Activation("L B H T M", "NSA: weights of compressed blocks"),
    "selection_pattern": Activation("L B H T S", "NSA: weights of the tokens of chosen blocks"),
    "window_pattern": Activation("L B H T S", "NSA: weights of the tokens of the window"),
    "compression_output": Activation("L B T H Dv", "NSA: output of a branch, before its gate"),
    "selection_output": Activation("L B T H Dv", "NSA: output of a branch, before its gate"),
    "window_output": Activation("L B T H Dv", "NSA: output of a branch, before its gate"),
    "head_output": Activation("L B T H Dv", "output of each head, before the output projection"),
    "attention_output": Activation("L B T D", "what attention adds to the stream"),
    "residual_mid": Activation("L B T D", "the stream between attention and MLP"),
    "mlp_input": Activation("L B T D", "the stream as the MLP or the experts read it, normed likewise"),
    "mlp_hidden": Activation("L B T F", "neurons of the MLP, after the activation (and times the gate)"),
    "mlp_output": Activation("L B T D", "what the MLP or the experts add to the stream"),
    "residual_post": Activation("L B T D", "the stream after a layer"),
    "final_hidden": Activation("B T D", "after the last norm, what the head reads"),
    "logits": Activation("B T V", "float32"),
}
"""Every name, in the order in which they arise. NSA's keys and values are those of its three branches,
[L, B, T, 3, Hkv, D], keys before rotary positions, as compression reads them."""
BRANCH_PATTERNS = tuple(f"{branch}_pattern" for branch in BRANCHES)
BRANCH_OUTPUTS = tuple(f"{branch}_output" for branch in BRANCHES)
_FLOAT32 = ("logits", "attention_scores")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("layers", "value", "positions", "heads", "sources"),
    meta_fields=("name", "mode"),
)
@dataclasses.dataclass(frozen=True)
class Patch:
    """A change of one named activation. A pytree: name and mode are static, everything else is data, so that
    one program serves every layer, position and value, and sweeps over them run under `jax.vmap`.

    The fields are typed `Any` because a pytree holds tracers and slices as well.
    """

    name: str
    """One of ACTIVATIONS."""
    layers: Any = None
    """int or int[n], counted from 0; None: every layer (and for what layers do not have, the only choice)."""
    value: Any = None
    """What comes in its place, or is added. It broadcasts to what `activations` returns for the same `layers`
    (no axis for layers where that is one number); where it lacks leading axes, it serves all of them."""
    positions: Any = None
    """int, int[P] or int[B, P] (-1: none): tokens whose activation changes; of patterns, the queries. None:
    all of them."""
    heads: Any = None
    """int or int[h], of activations with heads. None: all."""
    sources: Any = None
    """int or int[s], of patterns over tokens: the tokens attended to. None: all."""
    mode: str = "replace"
    """replace, add or zero."""

    def __post_init__(self) -> None:
        if self.mode not in ("replace", "add", "zero"):
            raise ValueError(f"mode of a patch is replace, add or zero, not {self.mode!r}")
        for field in ("layers", "value", "positions", "heads", "sources"):
            given = getattr(self, field)
            if isinstance(given, list | tuple):  # one array, not a tree of numbers
                traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(given))
                object.__setattr__(self, field, jnp.asarray(given) if traced else np.asarray(given))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the axes of one batch of a model."""

    config: ModelConfig
    batch: int
    length: int

    def axes(self, name: str) -> tuple[str, ...]:
        """Axis letters without L."""
        axes = [axis for axis in ACTIVATIONS[name].axes.split() if axis != "L"]
        if self.config.attention.kind == "nsa" and name in ("keys", "values"):
            axes.insert(2, "3")
        return tuple(axes)

    def shape(self, name: str) -> tuple[int, ...]:
        c = self.config
        sizes = {
            **{"B": self.batch, "T": self.length, "S": self.length, "D": c.width, "V": c.vocab_size, "3": 3},
            **{"H": c.num_heads, "Hkv": c.kv_heads, "Dk": c.key_dim, "Dv": c.value_dim, "F": c.mlp_width},
        }
        if c.attention.kind == "nsa":
            sizes["M"] = num_compressed(self.length, c.nsa.block_len, c.nsa.stride)
            sizes["n"] = c.nsa.num_blocks
        return tuple(sizes[axis] for axis in self.axes(name))

    def empty(self, name: str, *leading: int) -> Array:
        dtype: str = self.config.compute_dtype
        if name == "chosen_blocks":
            dtype = "int32"
        elif name in _FLOAT32:
            dtype = "float32"
        return jnp.zeros((*leading, *self.shape(name)), dtype)


class PerLayer(NamedTuple):
    """What is scanned together with the parameters of the layers; every leaf has a leading axis L."""

    probe: Probe | None
    row: Array | None
    """int32[L]: where a layer's activations go in the buffers; past their end where nobody asked for it."""
    slots: tuple[Array | None, ...]
    """Of each patch, int32[L]: which of its layers a layer is, -1 none. None: not of layers."""


class Tap:
    """The seam within one layer, or around the layers; it lives while they are traced."""

    def __init__(
        self,
        names: tuple[str, ...] = (),
        patches: Sequence[tuple[Patch, Array | None]] = (),
        sizes: Sizes | None = None,
        probe: Probe | None = None,
    ):
        self.probe = probe
        self.found: dict[str, Array] = {}
        """What was asked for, after patches."""
        self._names, self._patches, self._sizes = names, patches, sizes

    def __call__(self, name: str, value: Array) -> Array:
        """`value`, patched where somebody patches it, and noted where somebody asked for it."""
        for patch, slot in self._patches:
            if patch.name == name:
                assert self._sizes is not None
                value = _patched(value, patch, slot, self._sizes.axes(name))
        if name in self._names:
            self.found[name] = value
        return value

    def wants(self, *names: str) -> bool:
        """Whether somebody reads or patches one of these."""
        return any(name in self._names for name in names) or self.patches(*names)

    def patches(self, *names: str) -> bool:
        return any(patch.name in names for patch, _ in self._patches)


class Taps:
    """What is read and changed in all layers, and around them."""

    def __init__(
        self,
        sizes: Sizes | None = None,
        *,
        names: tuple[str, ...] = (),
        layers: tuple[int, ...] | None = None,
        patches: Sequence[Patch] = (),
        probe: Probe | None = None,
    ):
        count = 0 if sizes is None else sizes.config.num_layers
        self.sizes, self.patches = sizes, tuple(patches)
        self._around = tuple(name for name in names if not ACTIVATIONS[name].layered)
        self._within = tuple(name for name in names if ACTIVATIONS[name].layered)
        of_layers, shared = (None, None) if probe is None else probe.split()
        self._shared_probe = shared
        row = None
        self.buffers: dict[str, Array] = {}
        """Of each name that layers have: [layers asked for, ...], still empty."""
        if self._within:
            assert sizes is not None
            layers = tuple(range(count)) if layers is None else layers
            row = np.full((count,), len(layers), np.int32)
            row[list(layers)] = np.arange(len(layers))
            self.buffers = {name: sizes.empty(name, len(layers)) for name in self._within}
        slots = tuple(_slots(patch, count) for patch in self.patches)
        self.per_layer = PerLayer(of_layers, None if row is None else jnp.asarray(row), slots)

    def around(self) -> Tap:
        """The seam before the first layer and after the last."""
        return Tap(self._around, [(patch, None) for patch in self.patches], self.sizes)

    def layer(self, own: PerLayer) -> Tap:
        """The seam of one layer, from its slice of `per_layer`."""
        probe = own.probe
        if probe is not None:
            assert self._shared_probe is not None
            probe = probe.join(self._shared_probe)
        return Tap(self._within, list(zip(self.patches, own.slots, strict=True)), self.sizes, probe)

    def store(self, buffers: Mapping[str, Array], own: PerLayer, tap: Tap) -> dict[str, Array]:
        """The buffers with what one layer's seam found, if the layer was asked for."""
        stored = dict(buffers)
        for name, value in tap.found.items():
            assert value.shape == buffers[name].shape[1:], (name, value.shape, buffers[name].shape)
            stored[name] = buffers[name].at[own.row].set(value.astype(buffers[name].dtype), mode="drop")
        return stored


NO_TAP, NO_TAPS = Tap(), Taps()
"""Nothing is read and nothing changed."""


def read_outputs(config: ModelConfig, rows: tuple[int, ...], layers: tuple[int, ...]) -> Taps:
    """Taps that read the stream after some layers, of `rows` [B, T]."""
    return Taps(Sizes(config, *rows), names=("residual_post",), layers=layers) if layers else NO_TAPS


def make_taps(
    batch: Batch,
    config: ModelConfig,
    *,
    names: tuple[str, ...] = (),
    layers: tuple[int, ...] | None = None,
    patches: Sequence[Patch] = (),
    probe: Probe | None = None,
) -> Taps:
    """Taps of a prepared batch.

    Raises:
      ValueError: in one line, what the model or the batch does not have; see `check_request`.
    """
    sizes = Sizes(config, *np.shape(batch["tokens"]))
    check_request(names, layers, patches, sizes, packed="segment_ids" in batch)
    streamed = ("attention_scores", "attention_pattern", "chosen_blocks", *BRANCH_PATTERNS, *BRANCH_OUTPUTS)
    found = [name for name in (*names, *(patch.name for patch in patches)) if name in streamed]
    if probe is not None:
        _check_probe(probe, config)
    if probe is not None and probe.streams and found:
        raise ValueError(
            f"{found[0]}: a probe streams attention and keeps none; read or patch it without one"
        )
    return Taps(sizes, names=names, layers=layers, patches=patches, probe=probe)


def _check_probe(probe: Probe, config: ModelConfig) -> None:
    per_layer, _ = probe.split()
    for leaf in jax.tree.leaves(per_layer):
        if leaf.shape[:1] != (config.num_layers,):
            given = list(leaf.shape)
            raise ValueError(f"what a probe has for each layer begins with {config.num_layers}, not {given}")
    if (probe.read_from is None) != (probe.read_at is None):
        raise ValueError("a probe reads weights from one token at others: read_from and read_at go together")
    if probe.read_from is None:
        return
    if probe.blocked is not None or probe.factors is not None:
        raise ValueError("weights are read of attention as it is: read them without blocking and factors")
    if "nsa" in config.kinds or config.sparsity is not None:
        kind = "nsa" if "nsa" in config.kinds else "sparse"
        raise ValueError(f"weights are read of one softmax over all tokens; the model's attention is {kind}")


def activation_names(config: ModelConfig) -> tuple[str, ...]:
    """The names that every layer of a model has, in the order in which they arise."""
    every = range(config.num_layers)
    return tuple(name for name in ACTIVATIONS if not any(_reason_against(name, config, i) for i in every))


def check_request(
    names: Iterable[str],
    layers: Sequence[int] | None,
    patches: Iterable[Patch],
    sizes: Sizes,
    *,
    packed: bool,
) -> None:
    """Refuse what the model or the batch does not have. Values that are traced are not looked at: layers and
    positions that are not there then change nothing.

    Raises:
      ValueError: in one line, what is wrong and what there is instead.
    """
    config = sizes.config
    every = range(config.num_layers)
    if layers is not None:
        for layer in layers:
            _check_range("layers", layer, config.num_layers)
        if len({*layers}) < len(layers) or not layers:
            raise ValueError(f"layers: name at least one, and each once: {list(layers)}")
    for name in names:
        _check_name(name, every if layers is None else layers, config, packed)
    for patch in patches:
        _check_patch(patch, sizes, packed)


def _check_name(name: str, layers: Iterable[int], config: ModelConfig, packed: bool) -> None:
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name, ACTIVATIONS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(ACTIVATIONS)}"
        raise ValueError(f"no activation is called {name!r}; {hint}")
    for layer in layers:
        reason = _reason_against(name, config, layer)
        if reason is not None:
            at = f" in layer {layer}" if ACTIVATIONS[name].layered else ""
            raise ValueError(f"{name}: the model has none{at}: {reason}")
    if packed and config.attention.kind == "nsa" and name in BRANCH_PATTERNS:
        raise ValueError(f"{name}: NSA's patterns are of one text a row; leave segment_ids out")


def _reason_against(name: str, config: ModelConfig, layer: int) -> str | None:
    """Why a layer of a model does not have an activation."""
    nsa = config.kinds[layer] == "nsa"
    if name in ("attention_scores", "attention_pattern"):
        if nsa:
            return "NSA has " + ", ".join(f"{branch}_pattern" for branch in config.nsa.branches)
        if config.sparsity is not None:
            return f"sparsity at inference ({config.sparsity.kind}) keeps no weights"
    branch = name.partition("_")[0]
    if branch in BRANCHES or name in ("gates", "chosen_blocks"):
        if not nsa:
            return f"its attention is {config.kinds[layer]}, not nsa"
        branch = "selection" if name == "chosen_blocks" else branch
        if name != "gates" and branch not in config.nsa.branches:
            return f"it goes without the branch {branch}"
    if name == "residual_mid" and config.parallel:
        return "attention and MLP are parallel"
    if name == "mlp_hidden" and config.moe is not None and layer >= config.dense_layers:
        return "it has experts"
    return None


def _check_range(what: str, number: int, count: int, least: int = 0) -> None:
    if not least <= number < count:
        raise ValueError(f"{what}: {number} is outside of 0..{count - 1}")


def _check_patch(patch: Patch, sizes: Sizes, packed: bool) -> None:
    config, name = sizes.config, patch.name
    layers = _concrete(patch.layers)
    if layers is not None:
        _check_integers("layers", layers, config.num_layers, axes=(0, 1))
    asked = range(config.num_layers) if layers is None else np.atleast_1d(layers).tolist()
    _check_name(name, asked, config, packed)
    of_layers, axes, shape = ACTIVATIONS[name].layered, sizes.axes(name), sizes.shape(name)
    if patch.layers is not None and not of_layers:
        raise ValueError(f"{name} is not of layers; leave layers out of its patch")
    if patch.positions is not None:
        positions = np.ndim(patch.positions)
        if positions > 2 or (positions == 2 and np.shape(patch.positions)[0] != sizes.batch):
            given = list(np.shape(patch.positions))
            raise ValueError(f"positions of a patch are one number, [P] or [{sizes.batch}, P], not {given}")
        found = _concrete(patch.positions)
        if found is not None:
            least = -1 if positions == 2 else 0
            _check_integers("positions", found, sizes.length, axes=(0, 1, 2), least=least)
    for what, axis in (("heads", _head_axis(axes)), ("sources", axes.index("S") if "S" in axes else None)):
        numbers = getattr(patch, what)
        if numbers is None:
            continue
        if axis is None:
            raise ValueError(f"{name} [{' '.join(axes)}] has no {what}; leave them out of its patch")
        found = _concrete(numbers)
        if found is not None:
            _check_integers(what, found, shape[axis], axes=(0, 1))
    if (patch.value is None) != (patch.mode == "zero"):
        needs = "takes no" if patch.mode == "zero" else "needs a"
        raise ValueError(f"a patch of {name} by {patch.mode} {needs} value")
    if name == "chosen_blocks" and (patch.mode != "replace" or not _is_integer(patch.value)):
        raise ValueError("chosen_blocks are numbers of blocks: replace them by integers")
    if patch.value is not None:
        whole = shape
        if of_layers and np.ndim(patch.layers if patch.layers is not None else [0]):
            count = config.num_layers if patch.layers is None else np.shape(patch.layers)[0]
            whole = (count, *shape)
        _check_value(name, np.shape(patch.value), whole, (*["L"] * (len(whole) - len(shape)), *axes))


def _check_value(name: str, given: tuple[int, ...], whole: tuple[int, ...], axes: tuple[str, ...]) -> None:
    tail = whole[len(whole) - len(given) :]
    if len(given) > len(whole) or any(size not in (1, full) for size, full in zip(given, tail, strict=True)):
        raise ValueError(
            f"the value of a patch of {name} has shape {list(given)}, which does not broadcast to "
            f"{list(whole)} [{' '.join(axes)}]"
        )


def _concrete(value: Any) -> np.ndarray | None:
    return None if value is None or isinstance(value, jax.core.Tracer) else np.asarray(value)


def _is_integer(value: Any) -> bool:
    return value is not None and jnp.issubdtype(jnp.result_type(value), jnp.integer)


def _check_integers(
    what: str, value: np.ndarray, count: int, *, axes: tuple[int, ...], least: int = 0
) -> None:
    if value.ndim not in axes or not np.issubdtype(value.dtype, np.integer):
        given = f"{value.dtype}{list(value.shape)}"
        raise ValueError(f"{what} of a patch are whole numbers with at most {axes[-1]} axes, not {given}")
    for number in value.flatten().tolist():
        _check_range(f"{what} of a patch", number, count, least)


def _head_axis(axes: tuple[str, ...]) -> int | None:
    return next((i for i, axis in enumerate(axes) if axis in ("H", "Hkv")), None)


def _slots(patch: Patch, count: int) -> Array | None:
    """int32[L]: which of the patch's layers each layer is, -1 for none."""
    if not ACTIVATIONS[patch.name].layered:
        return None
    every = jnp.arange(count, dtype=jnp.int32)
    if patch.layers is None:
        return every
    chosen = jnp.atleast_1d(jnp.asarray(patch.layers, jnp.int32))[:, None] == every[None]
    return jnp.where(jnp.any(chosen, axis=0), jnp.argmax(chosen, axis=0).astype(jnp.int32), -1)


def _patched(x: Array, patch: Patch, slot: Array | None, axes: tuple[str, ...]) -> Array:
    """`x` of the layer that is the patch's number `slot`; unchanged where that is -1."""
    changed = jnp.ones((1,) * x.ndim, bool)
    if slot is not None:
        changed &= slot >= 0
    if patch.positions is not None:
        changed &= _among(patch.positions, x, axes.index("T"))
    if patch.heads is not None:
        changed &= _among(patch.heads, x, _head_axis(axes))
    if patch.sources is not None:
        changed &= _among(patch.sources, x, axes.index("S"))
    if patch.mode == "zero":
        return jnp.where(changed, jnp.zeros((), x.dtype), x)
    value = jnp.asarray(patch.value)
    if value.ndim > x.ndim:  # one for each of the patch's layers
        assert slot is not None
        value = value[0] if value.shape[0] == 1 else value[jnp.maximum(slot, 0)]
    value = jnp.broadcast_to(value.astype(x.dtype), x.shape)
    return jnp.where(changed, value if patch.mode == "replace" else x + value, x)


def _among(numbers: Any, x: Array, axis: int | None) -> Bool[Array, "..."]:
    """Which entries of an axis of `x` are among the numbers, [n] or a row each [B, n]; of the rank of `x`."""
    assert axis is not None
    numbers = jnp.atleast_1d(jnp.asarray(numbers, jnp.int32))
    entries = jnp.arange(x.shape[axis], dtype=jnp.int32).reshape((1,) * (numbers.ndim - 1) + (-1, 1))
    found = jnp.any(entries == numbers[..., None, :], axis=-1)
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    if found.ndim == 2:
        shape[0] = x.shape[0]
    return found.reshape(shape)
