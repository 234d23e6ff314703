"""Numbers as a reader wants them."""

from collections.abc import Sequence

NONE = "–"


def percent(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f}\u00a0%"


def change(value: float | None, digits: int = 1) -> str:
    """A relative change with its sign, in per cent."""
    return NONE if value is None else f"{100 * value:+.{digits}f}\u00a0%".replace("-", "\u2212")


def decimal(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with thin spaces between thousands."""
    return NONE if value is None else f"{round(value):,}".replace(",", "\u2009")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(number: float | None) -> str:
    """Bytes in binary units."""
    if number is None:
        return NONE
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
