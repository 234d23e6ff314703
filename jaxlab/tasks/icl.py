"""Task `icl`: how a model answers few-shot prompts. Flows by layer, blocking of label words, and a prompt to
look at."""

import time
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from jaxlab.app import Run, model_folder
from jaxlab.checkpoints import OpenModel, open_model
from jaxlab.data import check_same_words
from jaxlab.errors import ConfigError, UserError
from jaxlab.icl import (
    NsaEdges,
    Prompts,
    PromptsConfig,
    PromptSource,
    Reduction,
    Roles,
    blocked_logits,
    blocking_settings,
    flow_memory,
    flow_shares,
    flows,
    label_predictions,
    make_prompts,
    random_words,
    saliency_maps,
    token_texts,
    word_loyalty,
)
from jaxlab.models import ModelConfig, Params, SplitConfig, model_mesh, using
from jaxlab.processing import check_token_ids

PICTURE_TOKENS = 512
"""Longest prompt whose maps go into results.json."""


@dataclass(frozen=True)
class Config:
    """Analyse how a model answers few-shot prompts."""

    model: str = ""
    """A model folder, a run folder, or the config of a finished train run."""
    data: PromptsConfig = PromptsConfig()
    """Where the prompts come from."""
    split: Literal["validation", "test"] = "test"
    """Which prompts."""
    analyses: tuple[Literal["flows", "blocking", "figure1"], ...] = ("flows", "blocking", "figure1")
    """flows: S_wp, S_pq, S_ww by layer; blocking: of label words and of random words; figure1: the maps of
    one prompt."""
    examples: int = 128
    """Prompts for each seed."""
    seeds: tuple[int, ...] = (42, 43, 44, 45, 46)
    """Seeds of the prompts and of the random words; means and deviations are over them."""
    batch_size: int = 32
    """Prompts in a batch."""
    mode: Literal["paper", "released_code"] = "paper"
    """How blocking is done: A = 0 after the softmax, or logits of -10000 before it."""
    reduction: Reduction = "abs_of_sum"
    """Over heads: the absolute value of the sum, or the sum of the absolute values."""
    nsa_edges: NsaEdges = "token"
    """Flow from a compressed block of native sparse attention: in equal parts, or whole, to its tokens."""
    blocked_layers: tuple[int, ...] = (5,)
    """Blocking is done in the first, and in the last, so many layers; each number is a setting of its own."""
    top_words: int = 5
    """Word loyalty compares so many of the most likely next words."""
    mesh: SplitConfig = SplitConfig()
    """Devices over which the model is split, if one of them does not hold it."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("which model? give a folder or the config of a train run", key="model")
        for name in ("examples", "batch_size", "top_words"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        for name in ("analyses", "seeds"):
            if not getattr(self, name):
                raise ConfigError("must not be empty", key=name)
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must differ, they are {list(self.seeds)}", key="seeds")
        if "blocking" in self.analyses and not self.blocked_layers:
            raise ConfigError("give the numbers of layers to block", key="blocked_layers")
        if any(n < 1 for n in self.blocked_layers):
            raise ConfigError(f"must be at least 1, are {list(self.blocked_layers)}", key="blocked_layers")


def inputs(config: Config) -> dict[str, str]:
    """What the run depends on besides its config."""
    return {
        "model": open_model(model_folder(config.model)).identity,
        "data": make_prompts(config.data, config.split).identity,
    }


def check(config: Config) -> dict[str, Any]:
    """Everything that can be checked, and the memory of the flows, without reading a parameter."""
    opened = open_model(model_folder(config.model))
    source = make_prompts(config.data, config.split)
    check_same_words(opened.tokenizer, source.tokenizer, opened.path)
    model = opened.config
    _check_fits(config, model, source)
    mesh = model_mesh(config.mesh)
    with using(mesh):
        parameters, temporary = flow_memory(
            model,
            config.batch_size,
            source.length,
            source.num_labels,
            source.roles,
            params=opened.placed(mesh),
        )
    return {
        "prompts": config.examples * len(config.seeds),
        "tokens": source.length,
        "parameter_bytes_per_device": parameters,
        "temporary_bytes_per_device": temporary,
    }


def _check_fits(config: Config, model: ModelConfig, source: PromptSource) -> None:
    if max(config.blocked_layers, default=0) > model.num_layers and "blocking" in config.analyses:
        raise UserError(
            f"blocked_layers: the model has {model.num_layers} layers, not {max(config.blocked_layers)}"
        )
    if source.length > model.max_length and model.position.kind == "learned":
        raise UserError(f"data: prompts of {source.length} tokens exceed the model's {model.max_length}")
    for seed in config.seeds:
        for prompts in source.batches(seed, config.examples, config.batch_size):
            for name, ids in (("prompts", prompts.batch["tokens"]), ("label words", prompts.label_tokens)):
                check_token_ids(ids, model, source.tokenizer, where=f"data: one of the {name}")
    if config.top_words > model.vocab_size:
        raise UserError(f"top_words: the vocabulary has {model.vocab_size} words, not {config.top_words}")
    if "figure1" in config.analyses and source.length > PICTURE_TOKENS:
        raise UserError(
            f"analyses: figure1 draws prompts of at most {PICTURE_TOKENS} tokens, these have {source.length}"
        )


def run(config: Config, run: Run) -> dict[str, Any]:
    """Means over all prompts, deviations over the means of the seeds."""
    opened = open_model(model_folder(config.model))
    source = make_prompts(config.data, config.split)
    check_same_words(opened.tokenizer, source.tokenizer, opened.path)
    model = opened.config
    _check_fits(config, model, source)
    mesh = model_mesh(config.mesh)
    params = opened.read(mesh=mesh)
    with using(mesh):
        return _analyse(config, run, opened, source, params)


def _analyse(
    config: Config, run: Run, opened: OpenModel, source: PromptSource, params: Params
) -> dict[str, Any]:
    model = opened.config
    answers = _Answers(config, model, params, source)
    flow = _Flows(config, model, params, source) if "flows" in config.analyses else None
    passes = -(-config.examples // config.batch_size) * len(config.seeds)
    with tqdm(total=passes, desc=f"icl {run.name}", unit="batch") as progress:
        for seed in config.seeds:
            rng = np.random.default_rng((seed, 1))
            for prompts in source.batches(seed, config.examples, config.batch_size):
                answers.add(seed, prompts, rng)
                if flow is not None:
                    flow.add(seed, prompts)
                progress.update()
    results: dict[str, Any] = {
        "made_by": opened.made_by,
        "layers": model.num_layers,
        "tokens": source.length,
        "labels": source.num_labels,
        "chance": 1.0 / source.num_labels,
        "examples": config.examples * len(config.seeds),
        "seeds": list(config.seeds),
        "mode": config.mode,
        **answers.results(),
    }
    if flow is not None:
        results["flows"] = flow.results()
    if "figure1" in config.analyses:
        results["figure1"] = _picture(model, params, source.roles, *answers.example(), opened.tokenizer)
    return results


class _Answers:
    """Answers with and without blocking: one program, in which the first setting blocks nothing."""

    def __init__(self, config: Config, model: ModelConfig, params: Params, source: PromptSource) -> None:
        self.config, self.model, self.params, self.roles = config, model, params, source.roles
        self.settings = blocking_settings(config.blocked_layers) if "blocking" in config.analyses else []
        layers = [np.zeros(model.num_layers, bool), *(s.layer_mask(model.num_layers) for s in self.settings)]
        self.layers = jnp.asarray(np.stack(layers))
        self.by_seed: dict[int, list[np.ndarray]] = {seed: [] for seed in config.seeds}
        self.candidates: list[tuple[Prompts, int]] = []
        self.seconds = 0.0

    def add(self, seed: int, prompts: Prompts, rng: np.random.Generator) -> None:
        started = time.perf_counter()
        label_words = np.isin(prompts.classes, self.roles.labels)
        special = (-1, self.roles.query, self.roles.sink)
        others = ~label_words & ~np.isin(prompts.classes, [c for c in special if c is not None])
        others[:, 0] = False  # nothing flows to the first token anyway
        words = {"label": label_words, "random": random_words(rng, label_words, others)}
        chosen = np.stack([np.zeros_like(label_words), *(words[s.words] for s in self.settings)])
        batch = {name: jnp.asarray(value) for name, value in prompts.batch.items()}
        positions = jnp.asarray(prompts.positions)
        logits = np.asarray(
            blocked_logits(
                self.params, batch, positions, self.layers, jnp.asarray(chosen), self.model, self.config.mode
            )
        )
        predicted = label_predictions(logits, prompts.label_tokens)
        top = self.config.top_words
        measures = [
            predicted == prompts.labels,
            predicted == predicted[0],
            np.stack([word_loyalty(x, logits[0], top) for x in logits]),
        ]
        self.by_seed[seed].append(np.stack(measures).astype(np.float64))
        self.seconds += time.perf_counter() - started
        at = int(np.argmax(measures[0][0]))  # the first right one, or 0
        self.candidates.append((jax.tree.map(lambda x: x[at : at + 1], prompts), int(predicted[0, at])))

    def example(self) -> tuple[Prompts, int]:
        """The first prompt that is answered rightly, or the very first if none is; and its answer."""
        right = (candidate for candidate in self.candidates if candidate[1] == candidate[0].labels[0])
        return next(right, self.candidates[0])

    def results(self) -> dict[str, Any]:
        seeds = np.stack([np.concatenate(parts, axis=2).mean(2) for parts in self.by_seed.values()])
        mean, deviation = seeds.mean(0), _deviation(seeds)
        found: dict[str, Any] = {"accuracy": mean[0, 0], "accuracy_std": deviation[0, 0]}
        if self.settings:
            found["blocking"] = {"top_words": self.config.top_words, "seconds": self.seconds, "table": []}
        for at, setting in enumerate(self.settings, start=1):
            row: dict[str, Any] = {"words": setting.words, "where": setting.where, "layers": setting.layers}
            for number, name in enumerate(("accuracy", "label_loyalty", "word_loyalty")):
                row |= {name: mean[number, at], f"{name}_std": deviation[number, at]}
            found["blocking"]["table"].append(row)
        return found


class _Flows:
    """S_wp, S_pq, S_ww of every prompt."""

    def __init__(self, config: Config, model: ModelConfig, params: Params, source: PromptSource) -> None:
        self.config, self.model, self.params, self.roles = config, model, params, source.roles
        self.by_seed: dict[int, list[dict[str, np.ndarray]]] = {seed: [] for seed in config.seeds}
        self.edges = np.zeros((model.num_layers, self.roles.classes, self.roles.classes))
        self.seconds = 0.0

    def add(self, seed: int, prompts: Prompts) -> None:
        started = time.perf_counter()
        sums, counts = flows(
            self.params,
            prompts.batch,
            self.model,
            prompts.classes,
            prompts.targets,
            reduction=self.config.reduction,
            nsa_edges=self.config.nsa_edges,
            num_classes=self.roles.classes,
        )
        self.by_seed[seed].append(flow_shares(sums, counts, self.roles)[0])
        self.edges += np.asarray(counts, np.float64).sum(0)
        self.seconds += time.perf_counter() - started

    def results(self) -> dict[str, Any]:
        sets = self.roles.edge_sets()
        each = {n: [np.concatenate([p[n] for p in parts]) for parts in self.by_seed.values()] for n in sets}
        seeds = {name: np.stack([values.mean(0) for values in each[name]]) for name in sets}
        total = seeds["wp"] + seeds["pq"] + seeds["ww"]
        total = np.where(total > 0.0, total, 1.0)
        shares = {name: seeds[name] / total for name in ("wp", "pq", "ww")}
        prompts = self.config.examples * len(self.config.seeds)
        return {
            "reduction": self.config.reduction,
            "mean": {name: values.mean(0) for name, values in seeds.items()},
            "mean_std_over_prompts": {name: np.concatenate(values).std(0) for name, values in each.items()},
            "share": {name: values.mean(0) for name, values in shares.items()},
            "share_std": {name: _deviation(values) for name, values in shares.items()},
            "edges_per_prompt": {
                name: self.edges[:, edges].sum(-1) / prompts for name, edges in sets.items()
            },
            "seconds": self.seconds,
        }


def _deviation(by_seed: np.ndarray) -> np.ndarray:
    """Standard deviation of a sample along the first axis; 0 for one seed, which has none to tell."""
    return by_seed.std(0, ddof=1) if len(by_seed) > 1 else np.zeros_like(by_seed[0])


def _picture(
    model: ModelConfig,
    params: Params,
    roles: Roles,
    example: Prompts,
    predicted: int,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Maps and texts of one prompt."""
    started = time.perf_counter()
    maps = np.asarray(saliency_maps(params, example.batch, model, example.targets))[0]
    names = token_texts(example.label_tokens[0], tokenizer)
    return {
        "tokens": token_texts(example.batch["tokens"][0], tokenizer),
        "labels": np.flatnonzero(np.isin(example.classes[0], roles.labels)),
        "query": int(example.positions[0]),
        "answer": names[int(example.labels[0])],
        "prediction": names[predicted],
        # Row i holds the flows from the tokens 0 ... i - 1.
        "maps": [[[float(f"{x:.3g}") for x in row[:i]] for i, row in enumerate(layer)] for layer in maps],
        "seconds": time.perf_counter() - started,
    }
