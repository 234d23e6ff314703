"""The optimizer as a config: AdamW, beside it Muon, with schedules, groups and clipping, from optax."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import optax

from jaxlab.errors import ConfigError, UserError
from jaxlab.models import ModelConfig, Params, abstract_params, logical_axes
from jaxlab.training.averages import EmaConfig, keep_average
from jaxlab.training.muon import MuonConfig, muon_dimensions, scale_by_muon_matrices
from jaxlab.training.patterns import matches, pattern_hint
from jaxlab.training.schedule import Decay, make_schedule


@dataclass(frozen=True)
class GroupConfig:
    """Parameters that learn in their own way."""

    pattern: str
    """Their names: a part (language, vision, projector), how they begin (layers.mlp), or with * and ?
    (*.bias)."""
    learning_rate: float | None = None
    """Their peak learning rate; 0 freezes them, null: as without a group."""
    weight_decay: float | None = None
    """Their decay, norms and biases among them too; null: as without a group."""

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ConfigError("names nothing; '*' is everything", key="pattern")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"must not be negative, is {value}", key=name)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019)."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps in which it rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    """How it falls from the peak over the remaining steps; wsd: warm-up, stable, decay."""
    final_fraction: float = 0.1
    """Learning rate at the last step over the peak's, for linear, cosine and wsd."""
    decay_fraction: float = 0.2
    """Share of all steps, the last ones, in which wsd falls."""
    decay: Decay = "linear"
    """How wsd falls; sqrt is 1 - sqrt."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the squared gradients' mean."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and position tables have none."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    language_scale: float = 1.0
    """Learning rate of a VLM's language model over that of its vision tower and projector; 0 freezes it."""
    groups: tuple[GroupConfig, ...] = ()
    """Parameters with a learning rate or decay of their own; the first group that matches one holds."""
    muon: MuonConfig | None = None
    """Muon for the hidden matrices."""
    ema: EmaConfig | None = None
    """A moving average of the parameters."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"must be positive, is {getattr(self, name)}", key=name)
        for name in ("warmup_steps", "weight_decay", "clip_norm", "language_scale"):
            if getattr(self, name) < 0:
                raise ConfigError(f"must not be negative, is {getattr(self, name)}", key=name)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"must be in [0, 1), is {getattr(self, name)}", key=name)
        for name in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"must be in [0, 1], is {getattr(self, name)}", key=name)


def make_optimizer(
    config: OptimizerConfig,
    model: ModelConfig,
    steps: int,
    *,
    shapes: Params | None = None,
    axes: Params | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates.

    Args:
      shapes, axes: of what is trained, if that is not the whole model: trees of shapes and logical axes.

    Raises:
      UserError: the pattern of a group matches nothing, or all parameters are frozen.
    """
    names: dict[str, tuple[str, ...]] = dict(_named(logical_axes(model) if axes is None else axes))
    sizes = {n: leaf.shape for n, leaf in _named(abstract_params(model) if shapes is None else shapes)}
    group_of = _groups(config, list(names))
    muon = {n: muon_dimensions(tuple(a)) if config.muon else None for n, a in names.items()}
    rates, decays, kinds = {}, {}, {}
    for name, of_axes in names.items():
        group = group_of[name]
        rate, decay = config.learning_rate, config.weight_decay if _decays(name, of_axes) else 0.0
        if config.muon and muon[name] and config.muon.learning_rate:
            rate = config.muon.learning_rate
        if matches("language", name):
            rate *= config.language_scale
        if group is not None:
            rate = rate if group.learning_rate is None else group.learning_rate
            decay = decay if group.weight_decay is None else group.weight_decay
        rates[name] = rate / config.learning_rate
        kinds[name] = "frozen" if rate == 0 else "muon" if muon[name] else "adamw"
        decays[name] = 0.0 if rate == 0 else decay
    if set(kinds.values()) == {"frozen"}:
        raise UserError("optimizer: every parameter is frozen; raise a learning rate")

    found = {name: dimensions for name, dimensions in muon.items() if dimensions is not None}
    by_kind = {
        "frozen": optax.set_to_zero,
        "muon": lambda: scale_by_muon_matrices(config.muon or MuonConfig(), found, sizes),
        "adamw": lambda: optax.scale_by_adam(config.beta1, config.beta2, config.eps),
    }
    used = [kind for kind in by_kind if kind in kinds.values()]
    inner = by_kind[used[0]]()
    if len(used) > 1:
        inner = optax.partition({kind: by_kind[kind]() for kind in used}, _labels(kinds))
    frozen = {name: float(kind == "frozen") for name, kind in kinds.items()}
    optimizer = optax.chain(
        *_masked(lambda _: optax.set_to_zero(), frozen),  # so that they have no part in the norm
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.chain(
            inner,
            *_masked(optax.add_decayed_weights, decays),
            optax.scale_by_learning_rate(make_schedule(config, steps)),
            *_masked(optax.scale, rates, neutral=1.0),
        ),
    )
    return optimizer if config.ema is None else keep_average(optimizer, config.ema)


def is_frozen(config: OptimizerConfig, name: str) -> bool:
    """Whether a parameter, by its dotted name, has a learning rate of 0."""
    group = next((group for group in config.groups if matches(group.pattern, name)), None)
    if group is not None and group.learning_rate is not None:
        return group.learning_rate == 0
    return config.language_scale == 0 and matches("language", name)


def groups_of(config: OptimizerConfig, trained: Iterable[str], others: Iterable[str]) -> OptimizerConfig:
    """The config for what is trained, without groups of which nothing is.

    Args:
      trained, others: dotted names of the parameters that are trained, and of those that are not.

    Raises:
      UserError: the pattern of a group matches none of them all.
    """
    trained = list(trained)
    _groups(config, [*trained, *others])
    kept = tuple(g for g in config.groups if any(matches(g.pattern, name) for name in trained))
    return replace(config, groups=kept)


def _groups(config: OptimizerConfig, names: list[str]) -> dict[str, GroupConfig | None]:
    """The group of each parameter: the first one that matches."""
    for number, group in enumerate(config.groups):
        if not any(matches(group.pattern, name) for name in names):
            raise UserError(
                f"optimizer.groups.{number}.pattern: no parameter matches {group.pattern!r}; "
                f"{pattern_hint(group.pattern, names)}"
            )
    first = lambda name: next((g for g in config.groups if matches(g.pattern, name)), None)
    return {name: first(name) for name in names}


def _masked(
    make: Callable[[float], optax.GradientTransformation], values: dict[str, float], neutral: float = 0.0
) -> list[optax.GradientTransformation]:
    """A transformation for each value that is not neutral, of the parameters that have it."""
    different = sorted(set(values.values()) - {neutral})
    return [
        optax.masked(make(value), _labels({n: v == value for n, v in values.items()})) for value in different
    ]


def _labels(by_name: dict[str, Any]) -> Callable[[Params], Params]:
    """A tree like the parameters' with what each is called; of what a partition has left, of that."""
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: by_name[jax.tree_util.keystr(path, simple=True, separator=".")], params
    )


def _named(tree: Params) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _decays(name: str, axes: tuple[str, ...]) -> bool:
    """Matrices decay: two axes or more besides the stacking ones, unless they are positions, biases or scales
    of norms."""
    last = name.rpartition(".")[2]
    size = len([a for a in axes if a not in ("layers", "branch")])
    return size >= 2 and not (last.endswith("bias") or last in ("scale", "position") or "position" in axes)
