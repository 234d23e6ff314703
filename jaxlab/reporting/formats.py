"""Numbers as a reader wants them."""

from collections.abc import Sequence

NONE = "–"

Number = int | float
"""What JSON calls a number."""


def percent(value: Number | None, digits: int = 0) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f}\u00a0%"


def change(value: Number | None, digits: int = 1) -> str:
    """A relative change with its sign, in per cent."""
    return NONE if value is None else f"{100 * value:+.{digits}f}\u00a0%".replace("-", "\u2212")


def decimal(value: Number | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def count(value: Number | None) -> str:
    """A whole number with narrow spaces between thousands, at which no line breaks."""
    return NONE if value is None else f"{round(value):,}".replace(",", "\u202f")


def duration(seconds: Number | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(number: Number | None) -> str:
    """Bytes in binary units."""
    if number is None:
        return NONE
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def mean(values: Sequence[Number]) -> float | None:
    return sum(values) / len(values) if values else None
