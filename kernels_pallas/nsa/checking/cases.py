"""At what sizes the kernels are checked. At each of them at least half of the queries leave blocks out: where
every query reads everything, a kernel that ignores the choice would pass."""

import dataclasses
from typing import Any, Literal

from kernels_pallas.nsa.records import padded
from kernels_pallas.nsa.specs.arg_specs import ArgSpec

Part = Literal[
    "compressed_attention", "select_blocks", "selected_attention", "window_attention", "whole", "decode"
]
PARTS: tuple[Part, ...] = (
    "window_attention",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "decode",
    "whole",
)
"""The operators one by one, the simplest first, then all as one."""


@dataclasses.dataclass(frozen=True)
class CheckCase(ArgSpec):
    """A spec with what a check needs besides."""

    queries: tuple[int, ...] = ()
    """Their positions; empty: all."""
    batches: tuple[int, ...] = (1, 8)
    """Of decoding."""
    page_size: int = 1024
    """Of its cache: a sequence has several."""
    seed: int = 0

    @property
    def label(self) -> str:
        """For people, and to tell results apart: name | dtype | group | padded head dims | tokens."""
        dims = f"{padded(self.key_dim)}/{padded(self.value_dim)}"
        about = (self.name or "asked for", self.dtype, f"{self.groups} heads a group", dims)
        return " | ".join([*about, f"{self.length} tokens"])


def _both(name: str, **sizes: Any) -> tuple[CheckCase, ...]:
    """At 4,096 tokens and at one more, which divides into nothing."""
    return tuple(CheckCase(length, name, **sizes) for length in (4096, 4097))


def _packed(length: int) -> CheckCase:
    texts = (1500, 37, 1300, -59, 700, length - 3596)
    return CheckCase(length, "packed, NaN in the padding", segments=texts, num_blocks=6)


EQUAL: dict[str, Any] = {"key_dim": 128, "value_dim": 128, "kv_heads": 2}

CASES: tuple[CheckCase, ...] = (
    *_both("paper"),
    *_both("16 heads a group", heads=32, **EQUAL),
    *_both("8 heads a group", heads=16, **EQUAL),
    *_both("64 heads a group", heads=128, **EQUAL),
    *_both("4 heads a group", heads=8, **EQUAL),
    *_both("1 head a group", heads=2, **EQUAL),
    _packed(4096),
    _packed(4097),
    *_both("blocks of 128", heads=32, block_size=128, **EQUAL),  # branch by branch too
    *_both("half", dtype="float16"),
    *_both("half, equal head dims", heads=32, dtype="float16", **EQUAL),
)
"""For the record."""

_LITTLE: dict[str, Any] = {
    "num_blocks": 2,
    "num_init": 0,
    "num_local": 1,
    "window": 64,
    "kv_heads": 2,
    "page_size": 128,
}
SMALL_CASES: tuple[CheckCase, ...] = (
    CheckCase(256, "small", heads=32, batches=(1, 3), **_LITTLE),
    CheckCase(256, "small, by blocks", heads=8, key_dim=128, batches=(1, 3), **_LITTLE),
)
"""To see whether a kernel runs at all: in the order of the queries and in that of the blocks."""


def also(text: str, lengths: tuple[int, ...] = (4096, 4097)) -> tuple[CheckCase, ...]:
    """Cases of `HEADS/KV_HEADS,KEY_DIM/VALUE_DIM,DTYPE`.

    Raises:
        ValueError: the text is of another form.
    """
    try:
        heads, dims, dtype = text.split(",")
        (h, kv), (dk, dv) = (map(int, pair.split("/")) for pair in (heads, dims))
    except ValueError:
        raise ValueError(f"{text!r} is not of the form HEADS/KV_HEADS,KEY_DIM/VALUE_DIM,DTYPE") from None
    sizes: dict[str, Any] = {
        "heads": h,
        "kv_heads": kv,
        "key_dim": dk,
        "value_dim": dv,
        "dtype": dtype.strip(),
    }
    return tuple(CheckCase(length, "", **sizes) for length in lengths)
