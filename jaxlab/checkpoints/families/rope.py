"""Rotary positions in a config.json: `rope_parameters` of transformers 5, `rope_scaling` of those before."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlab.checkpoints.families.base import Json
from jaxlab.checkpoints.families.settings import Settings
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import (
    AttentionConfig,
    ModelConfig,
    NoPositions,
    PositionConfig,
    RopeConfig,
    SlidingAttentionConfig,
)

_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclasses.dataclass(frozen=True)
class Partial:
    """Families in which a part of each head's dimensions turns."""

    head_dim: int
    factor: float
    """The part, where config.json says none."""
    key: str = "partial_rotary_factor"
    """Where older configs of the family say it, beside `rope_theta`."""


def read_rope(
    settings: Settings, theta: float = 10000.0, *, sections: bool = False, partial: Partial | None = None
) -> RopeConfig:
    """The rotary positions that one level of a config.json describes.

    Args:
      theta: the family's base where none is given.
      sections: whether the family has positions with several coordinates (`mrope_section`).
      partial: how many dimensions turn; None: all of them, and no other number is known.

    Raises:
      UserError: a kind of stretching, or a key, that is not known.
    """
    theta = settings.number("rope_theta", theta)
    given = settings.value("rope_parameters")
    older = settings.value("rope_scaling")
    length = settings.whole("max_position_embeddings", 2048)
    # Where both stand, transformers 4 knows rope_scaling alone, and 5 takes it in place of rope_parameters.
    key, found = ("rope_scaling", older) if older or given is None else ("rope_parameters", given)
    if older and given and older != given:
        settings.note("rope_parameters is not applied: rope_scaling stands beside it, as in transformers")
    if partial is not None:
        general = settings.number("partial_rotary_factor", partial.factor)
        partial = dataclasses.replace(partial, factor=settings.number(partial.key, general))
    group = {} if found is None else found
    return rope_of(settings, group, key, theta, length, sections=sections, partial=partial)


def rope_of(
    settings: Settings,
    config: Any,
    key: str,
    theta: float,
    max_length: int,
    *,
    sections: bool = False,
    partial: Partial | None = None,
) -> RopeConfig:
    """The rotary positions of one group of keys, which stands at `key`."""
    s = Settings(config, settings.family, within=f"{settings.within}{key}.")
    older = s.word("type", "default")
    kind = s.word("rope_type", older)
    if kind == "mrope" and sections:
        kind = "default"
    if kind not in _KINDS:
        raise s.refuse("rope_type" if "rope_type" in s else "type", f"supported: {', '.join(_KINDS)}")
    fields: dict[str, Any] = {"theta": s.number("rope_theta", theta)}
    if partial is not None:
        fields["dim"] = _turning(s, partial)
    elif s.value("partial_rotary_factor", 1.0) != 1.0:
        raise s.refuse("partial_rotary_factor", "all dimensions of a head turn")
    s.ignore("finetuned")
    # Beside the group it goes before the one within, as in transformers.
    of_group, given = (at.maybe_whole("original_max_position_embeddings") for at in (s, settings))
    given = of_group if given is None else given
    if kind != "default":
        fields["scaling"] = kind
        original = max_length if given is None or kind == "dynamic" else given
        if kind != "linear":
            fields["original_length"] = original
        implied = max_length / original if kind in ("yarn", "longrope") else None
        fields["factor"] = s.number("factor", implied)
    if kind == "llama3":
        fields["low_frequency_factor"] = s.number("low_freq_factor")
        fields["high_frequency_factor"] = s.number("high_freq_factor")
    if kind == "yarn":
        fields["beta_fast"] = float(s.value("beta_fast") or 32.0)
        fields["beta_slow"] = float(s.value("beta_slow") or 1.0)
        fields["truncate"] = s.flag("truncate", True)
        fields["attention_factor"] = _attention_factor(s, fields["factor"])
    if kind == "longrope":
        fields |= {f"{length}_factors": _factors(s, f"{length}_factor") for length in ("short", "long")}
        fields["attention_factor"] = s.maybe_number("attention_factor")
    if sections:
        fields |= _sections(s)
    s.done()
    try:
        return RopeConfig(**fields)
    except ConfigError as error:
        raise s.wrong(error.key, error.message.replace("must be ", "").partition(", is")[0]) from None


def read_two_ropes(settings: Settings, theta: float, local: float | None = None) -> tuple[RopeConfig, float]:
    """The rotary positions of full layers, and the base of those of sliding ones, which are not stretched.

    Args:
      theta: the family's base where none is given.
      local: the same for sliding layers; None: that of full ones.

    Raises:
      UserError: positions of sliding layers that are stretched, or what `read_rope` refuses.
    """
    given = settings.value("rope_parameters")
    if not is_nested(given):
        of_full = read_rope(settings, theta)
        return of_full, of_full.theta if local is None else local
    inner = Settings(given, settings.family, within="rope_parameters.")
    length = settings.whole("max_position_embeddings", 2048)
    groups = {kind: inner.value(kind, {}) for kind in ("full_attention", "sliding_attention")}
    older = settings.value("rope_scaling", {})
    if isinstance(older, Mapping) and isinstance(groups["full_attention"], Mapping):
        groups["full_attention"] = {**groups["full_attention"], **older}  # as in transformers 5
    bases = (theta, theta if local is None else local)
    of_full, of_sliding = (
        rope_of(inner, group, kind, base, length)
        for (kind, group), base in zip(groups.items(), bases, strict=True)
    )
    inner.done()
    if of_sliding != RopeConfig(theta=of_sliding.theta):
        raise inner.refuse("sliding_attention", "sliding layers have plain rotary positions")
    settings.ignore("rope_theta")
    return of_full, of_sliding.theta


def write_two_ropes(config: ModelConfig) -> Json:
    """`rope_parameters` of full and of sliding layers, beside the keys of `write_rope` for transformers 4."""
    keys = write_rope(config)
    local = getattr(config.attention, "rope_theta", None) or config.rope.theta
    of_full = {"rope_type": "default", **(keys["rope_scaling"] or {}), "rope_theta": config.rope.theta}
    of_sliding = {"rope_type": "default", "rope_theta": local}
    return {"rope_parameters": {"full_attention": of_full, "sliding_attention": of_sliding}}


def in_layers(rope: RopeConfig, turned: Sequence[bool]) -> PositionConfig:
    """The positions of a model only some of whose layers have these."""
    if not any(turned):
        return NoPositions()
    return rope if all(turned) else dataclasses.replace(rope, layers=period_of(tuple(turned)))


def in_sliding_layers(rope: RopeConfig, attention: AttentionConfig) -> PositionConfig:
    """Of a model whose sliding layers have positions; full ones beside them have none (Cohere2)."""
    if not isinstance(attention, SlidingAttentionConfig):
        return rope
    return in_layers(rope, [kind == "sliding" for kind in attention.pattern or ("sliding",)])


def period_of[T](values: tuple[T, ...]) -> tuple[T, ...]:
    """The shortest beginning that gives the values when it is repeated."""
    whole = range(1, len(values) + 1)
    return values[: next(p for p in whole if all(v == values[i % p] for i, v in enumerate(values)))]


def renamed_kind(config: Json, names: Mapping[str, str]) -> Json:
    """A config.json with other names of kinds of stretching in place of a family's own."""
    renamed = dict(config)
    for key in ("rope_parameters", "rope_scaling"):
        group = config.get(key)
        if isinstance(group, Mapping):
            kinds = {k: names.get(v, v) for k, v in group.items() if k in ("type", "rope_type")}
            renamed[key] = {**group, **kinds}
    return renamed


def _factors(s: Settings, key: str) -> tuple[float, ...]:
    found = s.value(key)
    known = isinstance(found, list) and all(type(n) in (int, float) and 0 < n < math.inf for n in found)
    if not known or not found:
        raise s.wrong(key, "a list of positive numbers")
    return tuple(float(n) for n in found)


def _turning(s: Settings, partial: Partial) -> int | None:
    """Dimensions of a head that turn; None: all."""
    factor = s.number("partial_rotary_factor", partial.factor)
    dim = int(partial.head_dim * min(factor, 2.0))
    if not 2 <= dim <= partial.head_dim or dim % 2:
        why = f"it must give an even number of the {partial.head_dim} dimensions of a head, not {dim}"
        raise UserError(f"config.json: {s.within}partial_rotary_factor {factor} is not supported: {why}")
    return dim if dim < partial.head_dim else None


def partial_factor(config: ModelConfig) -> float:
    """The part of a head's dimensions that turns, as a factor which gives their number when it is cut to a
    whole one."""
    factor = config.rotary_dim / config.key_dim
    return factor if int(config.key_dim * factor) == config.rotary_dim else math.nextafter(factor, 2.0)


def _attention_factor(s: Settings, factor: float) -> float | None:
    """yarn's factor on cosines and sines; DeepSeek's two scales make one factor."""
    given, scale, scale_all = (
        s.maybe_number(key) for key in ("attention_factor", "mscale", "mscale_all_dim")
    )
    if given is not None or scale is None or scale_all is None:
        return given
    grown = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
    return grown(scale) / grown(scale_all)


def _sections(s: Settings) -> dict[str, Any]:
    found = s.value("mrope_section", [])
    if not isinstance(found, list) or not all(type(n) is int and 0 < n < 4096 for n in found):
        raise s.wrong("mrope_section", "a list of whole numbers")
    return {"sections": tuple(found), "sections_interleaved": s.flag("mrope_interleaved")}


def max_length(settings: Settings, rope: RopeConfig) -> int:
    """Longest sequence: what `max_position_embeddings` says, stretched where it counts the training's."""
    length = settings.whole("max_position_embeddings", 2048)
    if rope.scaling in ("linear", "dynamic"):
        return int(length * max(rope.factor, 1.0))
    return max(length, int(rope.original_length * rope.factor)) if rope.scaling == "yarn" else length


def write_rope(config: ModelConfig) -> Json:
    """The keys of `read_rope`, as transformers 4 and 5 both read them."""
    rope, length = config.rope, config.max_length
    scaling: Json | None = None
    if rope.scaling != "none":
        scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("linear", "dynamic"):
        length = math.ceil(config.max_length / max(rope.factor, 1.0))
    if rope.scaling == "dynamic":
        length = rope.original_length
    if rope.scaling == "longrope":
        return _write_longrope(rope, length)
    if scaling is not None and rope.scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_length
    if scaling is not None and rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
        }
    if scaling is not None and rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    if rope.sections:
        scaling = {"rope_type": "default", **(scaling or {}), "mrope_section": list(rope.sections)}
        if rope.sections_interleaved:
            scaling["mrope_interleaved"] = True
    return {"max_position_embeddings": length, "rope_theta": rope.theta, "rope_scaling": scaling}


def _write_longrope(rope: RopeConfig, length: int) -> Json:
    """As Phi-3's own config class wants it: three keys in the group, unless the others say something new."""
    scaling: Json = {
        "type": "longrope",
        "short_factor": list(rope.short_factors),
        "long_factor": list(rope.long_factors),
    }
    if rope.factor != length / rope.original_length:
        scaling["factor"] = rope.factor
    if rope.attention_factor is not None:
        scaling["attention_factor"] = rope.attention_factor
    return {
        "max_position_embeddings": length,
        "original_max_position_embeddings": rope.original_length,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
    }


def is_nested(value: Any) -> bool:
    """Whether `rope_parameters` has a group for each kind of layer."""
    return isinstance(value, Mapping) and "full_attention" in value
