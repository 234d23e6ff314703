"""Task `icl`: how a model answers few-shot prompts, by the analyses of jaxlab.icl.analyses."""

import dataclasses
import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
from tqdm import tqdm

from jaxlab.app import Run, model_folder
from jaxlab.checkpoints import OpenModel, describe_model, open_model
from jaxlab.costs import bytes_per_device
from jaxlab.data import EpisodesConfig
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.files import jsonable, write_atomic
from jaxlab.icl import (
    Analysis,
    Answers,
    Attention,
    Baselines,
    Blocking,
    ChunkStore,
    Compression,
    Diagnosis,
    Faithfulness,
    FlowShares,
    Heads,
    LabelPosition,
    LabelWordClasses,
    ManyShot,
    Mode,
    Picture,
    PromptsConfig,
    PromptSource,
    Reweighting,
    Split,
    Study,
    TokenClasses,
    make_prompts,
    pack_maps,
    prompts_identity,
    run_analysis,
    unpack_maps,
)
from jaxlab.models import SplitConfig, model_mesh, using
from jaxlab.reporting import prompt_page

Name = Literal[
    "flows",
    "blocking",
    "figure1",
    "baselines",
    "attention",
    "reweighting",
    "compression",
    "diagnosis",
    "faithfulness",
    "many_shot",
    "heads",
]

MOST_PROMPTS = 1 << 20
"""Of a run, and of a batch: they are made before anything is measured."""
MOST_BYTES = 2_000_000
"""Of results.json."""


@dataclass(frozen=True)
class Config:
    """Analyse how a model answers few-shot prompts."""

    HOW_IT_RUNS: ClassVar = ("mesh",)

    model: str = ""
    """A model folder or file, a hub id, a run folder, or the config of a finished train run."""
    after: str = ""
    """A second model on the same prompts in the same run: the model after skills were injected, say."""
    data: PromptsConfig = EpisodesConfig()
    """Where the prompts come from: a named set, a task of your own (classification), or made-up episodes."""
    split: Split = "test"
    """Which prompts; validation: queries from one half of each class of data.train, demonstrations from the
    other."""
    analyses: tuple[Name, ...] = ("flows", "blocking", "figure1")
    """flows: S_wp, S_pq, S_ww by layer; blocking: of label words and of random words; figure1: the maps of
    one prompt; baselines: accuracy by number of demonstrations; attention: AUCROC_l and R_l; reweighting of
    attention to label words; compression of demonstrations to their anchors; diagnosis of confusions;
    faithfulness of flows; many_shot: flows by number of demonstrations; heads: label flow, function-vector
    and induction scores of each."""
    examples: int = 128
    """Prompts for each seed, or as many as there are."""
    seeds: tuple[int, ...] = (42, 43, 44, 45, 46)
    """Seeds of demonstrations, queries and random words; means and deviations are over them."""
    batch_size: int = 32
    """Prompts in a batch."""
    mode: Mode = "paper"
    """Where the released code differs from the paper: how demonstrations are drawn, and how blocking is done
    (docs/information_flow.md)."""
    label_classes: LabelWordClasses = "together"
    """Token classes of label words: one for all, one for each label, or one for each demonstration."""
    label_position: LabelPosition = "first"
    """Which token of a label word of several tokens carries its class; mean: all of them."""
    sink: bool = False
    """Whether the first token's edges are left out of S_wp, S_pq and S_ww; S_ww is told both ways."""
    forerunners: bool = False
    """Whether the tokens right before label words have a class of their own."""
    flows: FlowShares = FlowShares()
    """Flow shares by layer."""
    blocking: Blocking = Blocking()
    """Blocking of words."""
    figure1: Picture = Picture()
    """One prompt to look at."""
    baselines: Baselines = Baselines()
    """Accuracy by number of demonstrations."""
    attention: Attention = Attention()
    """Attention to label words."""
    reweighting: Reweighting = Reweighting()
    """Re-weighting of it."""
    compression: Compression = Compression()
    """Caches of anchors alone."""
    diagnosis: Diagnosis = Diagnosis()
    """Confusions told from keys."""
    faithfulness: Faithfulness = Faithfulness()
    """Flows beside what cutting their edges does."""
    many_shot: ManyShot = ManyShot()
    """Flows by number of demonstrations."""
    heads: Heads = Heads()
    """Heads one by one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the parameters, instead of the one that they are stored in."""
    mesh: SplitConfig = SplitConfig()
    """Devices over which the model is split, if one of them does not hold it."""

    MOVED: ClassVar[dict[str, str]] = {
        "blocked_layers": "blocking.layers",
        "top_words": "blocking.top_words",
        "reduction": "flows.reduction",
        "nsa_edges": "flows.nsa_edges",
    }

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("which model? give a folder or the config of a train run", key="model")
        for name in ("examples", "batch_size"):
            if not 1 <= getattr(self, name) <= MOST_PROMPTS:
                raise ConfigError(f"must be from 1 to {MOST_PROMPTS}, is {getattr(self, name)}", key=name)
        for name in ("analyses", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ConfigError("must not be empty", key=name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} must differ, they are {list(values)}", key=name)
        if any(seed < 0 for seed in self.seeds):
            raise ConfigError(f"must not be negative, are {list(self.seeds)}", key="seeds")

    @property
    def chosen(self) -> list[Analysis[Any]]:
        """What is done, in this order."""
        return [Answers(), *(getattr(self, name) for name in self.analyses)]


def inputs(config: Config) -> dict[str, str]:
    """What the run depends on besides its config."""
    identity = lambda model: open_model(model_folder(model)).identity
    found = {"model": identity(config.model), "data": prompts_identity(config.data)}
    return found | ({"after": identity(config.after)} if config.after else {})


def check(config: Config) -> dict[str, Any]:
    """Everything that can be checked, and the memory of the analyses, without reading a parameter."""
    study = _study(config, describe_model(model_folder(config.model)))
    with using(model_mesh(config.mesh)):
        studies = [study]
        if config.after:
            studies.append(_after(config, study, describe_model(model_folder(config.after))))
        for one in studies:
            _check_analyses(config, one)
        # Of two models that differ in size or dtype the larger one: they are looked at in turn.
        same = len({(one.config, tuple(map(_kind, jax.tree.leaves(one.params)))) for one in studies}) == 1
        found = [_memory(config, one) for one in (studies[:1] if same else studies)]
    parameters, temporary = max(found, key=sum)
    needed, held = parameters + temporary, _device_memory()
    if held is not None and needed > held:
        warnings.warn(
            f"{needed / 2**30:.1f} GiB are needed on a device and it has {held / 2**30:.1f}; lower "
            f"batch_size, {'' if config.dtype else 'set dtype to bfloat16, '}or split the model by mesh",
            UserNote,
            stacklevel=2,
        )
    return {
        "prompts": sum(study.source.count(config.examples) for _ in config.seeds),
        "tokens": study.longest,
        "programs": len(study.lengths),
        **study.source.facts(),
        "parameter_dtypes": sorted({str(leaf.dtype) for leaf in jax.tree.leaves(study.params)}),
        "parameter_bytes_per_device": parameters,
        "temporary_bytes_per_device": temporary,
        "device_bytes": held,
        "fits": None if held is None else needed <= held,
    }


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    return leaf.shape, str(leaf.dtype)


def _memory(config: Config, study: Study) -> tuple[int, int]:
    """Bytes of parameters, and of temporaries, on one device."""
    return bytes_per_device(study.params), max(analysis.memory(study) for analysis in config.chosen)


def run(config: Config, run: Run) -> dict[str, Any]:
    """Means over all prompts, deviations over the means of the seeds."""
    opened = open_model(model_folder(config.model))
    study = _study(config, opened)
    mesh = model_mesh(config.mesh)
    with using(mesh):
        _check_analyses(config, study)
        models = [(opened, study)]
        if config.after:
            changed = open_model(model_folder(config.after))
            models.append((changed, _after(config, study, changed)))
            _check_analyses(config, models[1][1])
        found = []
        for number, (one, looked_at) in enumerate(models):  # the weights of one at a time
            params = one.read(mesh=mesh, dtype=config.dtype, not_finite="warn")
            name = "after" if number else ""
            found.append(_analyse(config, run, one, dataclasses.replace(looked_at, params=params), name))
            del params
    results = found[0] if len(found) == 1 else {**found[0], "after": {"model": config.after, **found[1]}}
    return _made_to_fit(results, found)


def _after(config: Config, before: Study, opened: OpenModel) -> Study:
    """The second model's study.

    Raises:
      UserError: it does not read the same prompts.
    """
    study = _study(config, opened)
    for seed in study.seeds:
        pairs = zip(
            before.source.batches(seed, before.examples, before.batch_size),
            study.source.batches(seed, study.examples, study.batch_size),
            strict=True,
        )
        for one, other in pairs:
            tokens = (one.batch["tokens"], other.batch["tokens"])
            if tokens[0].shape != tokens[1].shape or (tokens[0] != tokens[1]).any():
                raise UserError(
                    f"after: {opened.path} reads the prompts in other tokens than the model; give one "
                    "that was made from it"
                )
    return study


def _check_analyses(config: Config, study: Study) -> None:
    first = study.source.batches(study.seeds[0], study.examples, study.batch_size)[0]
    shown = bool((first.label_words >= 0).any())
    for analysis in config.chosen:
        if analysis.needs_label_words and not study.source.label_names:
            raise UserError(
                f"analyses: {analysis.name} is about label words, and these prompts have none; leave it out"
            )
        if analysis.needs_demonstrations and study.source.label_names and not shown:
            raise UserError(
                f"analyses: {analysis.name} is about demonstrations, and data.shots is 0; leave it out or "
                "set data.shots to 1 or more"
            )
        analysis.check(study)


def _analyse(config: Config, run: Run, opened: OpenModel, study: Study, name: str = "") -> dict[str, Any]:
    store = ChunkStore(run.path / "_".join(filter(None, ("records", name))))
    found, seconds = {}, {}
    asked = sum(study.source.count(config.examples) for _ in study.seeds)
    for analysis in config.chosen:
        started = time.perf_counter()
        total = sum(len(analysis.chunks(study, seed)) for seed in study.seeds)
        with tqdm(
            total=total, desc=f"icl {run.name}: {' '.join(filter(None, (name, analysis.name)))}", unit="batch"
        ) as progress:
            found[analysis.name] = run_analysis(analysis, study, store, progress.update)
        seconds[analysis.name] = time.perf_counter() - started
        _tell_left_out(analysis.name, found[analysis.name].get("left_out", 0))
        if analysis.name == Answers.name:
            _check_answers(found[Answers.name]["no_prediction"], asked, opened)
    answers = found["answers"]
    undefined = [] if answers["single_class"] is None else ["accuracy", "label_loyalty", "aucroc"]
    if "figure1" in found:
        page = run.path / ("_".join(filter(None, ("figure1", name))) + ".html")
        write_atomic(page, prompt_page(jsonable(found), f"Information flow: {run.name}"))
        print(f"figure1: {page}")
    return {
        "made_by": opened.made_by,
        "dequantized": opened.dequantized,
        "layers": study.config.num_layers,
        "tokens": study.longest,
        "labels": len(study.source.label_names),
        "chance": study.chance,
        "examples": asked,
        "seeds": list(config.seeds),
        "mode": config.mode,
        "data": config.data.kind,
        "prompts": study.source.facts(),
        "accuracy": answers["accuracy"],
        "accuracy_std": answers["accuracy_std"],
        "single_class": answers["single_class"],
        "undefined": undefined,
        "seconds": seconds,
        **found,
    }


def _made_to_fit(results: dict[str, Any], models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results, in place and told where they are smaller: while results.json would be too large, what
    grows with the square of the token classes goes, and maps lose their weakest flows; `records/` has all.

    Args:
      models: the parts of the results that are of one model each.
    """
    size = lambda: len(json.dumps(jsonable(results), indent=2, ensure_ascii=False).encode())
    told: list[str] = []

    def leave_out(analysis: str, *names: str) -> None:
        having = [one[analysis] for one in models if names[0] in one.get(analysis, {})]
        if having and size() > MOST_BYTES:
            for part in having:
                for name in names:
                    del part[name]
            told.extend(f"{analysis}.{name}" for name in names)

    leave_out("flows", "pairs")  # drawn nowhere
    pictures = [one["figure1"] for one in models if "figure1" in one]
    for again in range(2):
        if pictures and size() > MOST_BYTES:
            for one in pictures:
                maps = one["maps"]
                packed = pack_maps(unpack_maps(maps), len(maps["data"]) // 2)
                one["maps"] = packed | {"least": max(packed["least"], maps["least"])}
            told.extend(["the weakest flows of figure1"] if not again else [])
    leave_out("faithfulness", "flow", "effect")
    if told:
        warnings.warn(
            f"results.json is kept below {MOST_BYTES / 1e6:g} MB without {', '.join(told)}; records/ has all",
            UserNote,
            stacklevel=2,
        )
    return results


def _check_answers(missing: int, asked: int, opened: OpenModel) -> None:
    """Say how many prompts have no prediction; without any there is nothing to analyse."""
    if missing == asked:
        raise UserError(
            f"{opened.path}: no prompt has a prediction, the logits of all {asked} hold NaN; there is "
            "nothing to analyse (are the weights damaged?)"
        )
    if missing:
        warnings.warn(
            f"{missing} of {asked} prompts have no prediction, as their logits hold NaN: accuracies and "
            "loyalties are over the others",
            UserNote,
            stacklevel=3,
        )


def _tell_left_out(name: str, count: int) -> None:
    if count:
        warnings.warn(
            f"{name}: {count} prompts are left out, their flows hold NaN or infinity", UserNote, stacklevel=3
        )


def _source(config: Config, opened: OpenModel) -> PromptSource:
    return make_prompts(
        config.data,
        opened,
        split=config.split,
        mode=config.mode,
        classes=TokenClasses(config.label_classes, config.sink, config.forerunners),
        label_position=config.label_position,
    )


def _study(config: Config, opened: OpenModel) -> Study:
    """The study with shapes in place of parameters; UserError if model and prompts do not fit together."""
    source = _source(config, opened)
    model = opened.config_in(config.dtype)
    study = Study(
        config=model,
        params=opened.placed(model_mesh(config.mesh), config.dtype),
        source=source,
        seeds=config.seeds,
        examples=config.examples,
        batch_size=min(config.batch_size, source.count(config.examples)),
        mode=config.mode,
        tokenizer=opened.tokenizer,
    )
    if study.longest > model.max_length and model.position.kind == "learned":
        raise UserError(f"data: prompts of {study.longest} tokens exceed the model's {model.max_length}")
    return study


def _device_memory() -> int | None:
    """Bytes of the first device; of the host where that is the device; None: not known."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")
