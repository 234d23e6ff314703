"""What the forward pass returns."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from jaxlab.models.kv_cache import Cache


@dataclass(frozen=True)
class Output:
    """Logits and what else a forward pass computed; None where it does not apply. A pytree.

    It unpacks as `logits, intermediates = forward(...)`. Under jit, what is not used costs nothing.
    """

    logits: Float[Array, "B T V"]
    """Of the next token, float32; of the positions that were asked for alone, where some were."""
    hidden: Float[Array, "B T D"]
    """After the last norm, in the compute dtype, of the same positions."""
    cache: Cache | None = None
    """With these tokens in it, where one was given."""
    chosen_blocks: Int[Array, "L B Hkv _ n"] | None = None
    """NSA's selection blocks of each layer, of every token that was given; -1: none."""
    weights_read: Float[Array, "L B H P"] | None = None
    """float32: attention weights from one token at others, where a probe reads them."""
    selector_loss: Float[Array, " L"] | None = None
    """Of NSA's auxiliary selector or indexer."""
    balance_loss: Float[Array, " layers"] | None = None
    """The load-balancing loss of each layer with experts."""
    expert_load: Float[Array, "layers E"] | None = None
    """The share of all choices that each routed expert of these layers got."""
    dropped_choices: Float[Array, " layers"] | None = None
    """The share of all choices that no expert took, as it was full."""
    activations: dict[str, Array] | None = None
    """Those that were asked for by name (interpretability.py)."""

    @property
    def intermediates(self) -> dict[str, Any]:
        """By name: all but the logits, where it applies."""
        named = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: value for name, value in named.items() if value is not None}

    def __iter__(self) -> Iterator[Any]:
        return iter((self.logits, self.intermediates))

    def __getitem__(self, index: int) -> Any:
        return (self.logits, self.intermediates)[index]


_NAMES = tuple(field.name for field in fields(Output))


def _flatten(output: Output) -> tuple[tuple[tuple[Any, Any], ...], None]:
    return tuple((jax.tree_util.GetAttrKey(name), getattr(output, name)) for name in _NAMES), None


def _unflatten(_: None, children: Any) -> Output:
    """Without `__init__`: leaves of a tree may be anything, the fields are annotated as arrays."""
    output = object.__new__(Output)
    for name, child in zip(_NAMES, children, strict=True):
        object.__setattr__(output, name, child)
    return output


jax.tree_util.register_pytree_with_keys(Output, _flatten, _unflatten)
