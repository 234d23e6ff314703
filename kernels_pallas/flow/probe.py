"""What is read from, and changed in, the attention of every layer."""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
from jaxtyping import Array

Reduction = Literal["abs_of_sum", "sum_of_abs", "mean_abs"]
Blocking = Literal["paper", "released_code"]
NsaEdges = Literal["token", "block"]
Implementation = Literal["xla", "mosaic_gpu"]

_PER_LAYER = ("class_tap", "count_tap", "map_tap", "blocked", "factors")
_SHARED = ("classes", "slot_classes", "read_from", "read_at")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(*_PER_LAYER, *_SHARED),
    meta_fields=("reduction", "signed", "blocking", "nsa_edges", "implementation"),
)
@dataclasses.dataclass(frozen=True)
class Probe:
    """Taps, whose cotangents are information flows, and interventions. A pytree; every leaf may be None.

    P is A * dL/dA, the saliency of attention weights before its absolute value (Wang et al. 2023, arXiv
    2305.14160, section 2.1). A tap's own value is never read. Leaves are stacked over layers (axis L) or
    shared by them; attention takes the probe of one layer (`split` and `join`). The fields are typed `Any`
    because a pytree holds tracers, slices of one layer and cotangents as well.
    """

    class_tap: Any = None
    """float32[L, B, K, K], or [L, B, H, K, K] for each query head: its cotangent is the flow summed over
    edges j < i, [class of i, class of j]."""
    count_tap: Any = None
    """float32[L, B, K, K]: its cotangent is the number of visible edges j < i of each pair of classes."""
    map_tap: Any = None
    """float32[L, B, T, T]: its cotangent is the sum of P over heads [to i, from j], diagonal included."""
    blocked: Any = None
    """bool[L, B, T]: tokens i to which nothing flows from tokens j < i. A[i, i] stays."""
    factors: Any = None
    """float32[L, B, H, K, K]: each A[i, j] of j < i is multiplied, after the softmax, by the entry [class of
    i, class of j] of its head; nothing is renormalised, and its cotangent is its gradient."""
    classes: Any = None
    """int32[B, T], of all layers: the class of each token, 0..K-1, or -1 for none. Taps and factors over
    classes need it."""
    slot_classes: Any = None
    """int32[B, S]: with a cache, where factors alone can be used, the class of each of its slots, those of
    the new tokens included."""
    read_from: Any = None
    """int32[B]: the query whose attention weights are read."""
    read_at: Any = None
    """int32[B, P]: the tokens at which they are read; 0 comes back where this is -1."""
    reduction: str = "abs_of_sum"
    """A `Reduction`, over heads: |sum of P| as the paper's text has it, sum of |P| (its footnote 3), or mean
    of |P|. The map is the signed sum."""
    signed: bool = False
    """No absolute values: the sum of P, or its mean."""
    blocking: str = "paper"
    """A `Blocking`. `paper`: A[i, j] = 0 after the softmax. `released_code`: the logit is -10000 before it;
    the row renormalises."""
    nsa_edges: str = "token"
    """An `NsaEdges`. Flow from a compressed block: in equal parts from its tokens, or whole from each of
    them."""

    implementation: str | None = None
    """An `Implementation`. None: XLA, until the kernels were checked on a GPU, not in the interpreter alone.
    A named one is never replaced by another."""

    def __post_init__(self) -> None:
        if self.implementation is not None:
            check_word("implementation", self.implementation, get_args(Implementation))
        words = {"reduction": Reduction, "blocking": Blocking, "nsa_edges": NsaEdges}
        for name, known in words.items():
            check_word(name, getattr(self, name), get_args(known))

    @property
    def streams(self) -> bool:
        """Whether it needs attention in its own form, which streams flows or changes weights."""
        return any(getattr(self, name) is not None for name in _PER_LAYER)

    @property
    def continues(self) -> bool:
        """Whether it can be used with a cache: it has factors for slots, and nothing else."""
        given = {name for name in (*_PER_LAYER, *_SHARED) if getattr(self, name) is not None}
        return given == {"factors", "classes", "slot_classes"}

    @property
    def per_head(self) -> bool:
        """Of one layer: whether the flows of heads are kept apart."""
        return self.class_tap is not None and self.class_tap.ndim == 4

    def split(self) -> tuple["Probe", "Probe"]:
        """(leaves with a leading layer axis, to be scanned over; leaves shared by all layers)."""
        nothing: dict[str, Any] = dict.fromkeys(_SHARED)
        per_layer = dataclasses.replace(self, **nothing)
        nothing = dict.fromkeys(_PER_LAYER)
        return per_layer, dataclasses.replace(self, **nothing)

    def join(self, shared: "Probe") -> "Probe":
        """The probe of one layer: this one's leaves (a slice of `split()[0]`) with the shared ones."""
        return dataclasses.replace(self, **{name: getattr(shared, name) for name in _SHARED})

    def cotangent(self, **values: Array | None) -> "Probe":
        """A probe of cotangents; leaves that are not named have none."""
        nothing: dict[str, Any] = dict.fromkeys((*_PER_LAYER, *_SHARED))
        return dataclasses.replace(self, **{**nothing, **values})

    def of_head_sum(self, signed: Array, absolute: Array | None, heads: int) -> Array:
        """The flow of an edge, from the sum over heads of P and, if the reduction needs it, of |P|."""
        if self.signed:
            return signed / heads if self.reduction == "mean_abs" else signed
        if self.reduction == "abs_of_sum":
            return abs(signed)
        assert absolute is not None
        return absolute / heads if self.reduction == "mean_abs" else absolute

    @property
    def needs_absolute(self) -> bool:
        """Whether `of_head_sum` takes the sum of absolute values."""
        return not self.signed and self.reduction != "abs_of_sum"


def check_word(name: str, word: object, known: tuple[str, ...]) -> None:
    """Refuse a word that an option does not have.

    Raises:
      ValueError: with the words that there are.
    """
    if word not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {word!r}")
