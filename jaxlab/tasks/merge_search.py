"""Task `merge-search`: weights, parameters and operators of an injection, searched on the device.

Points are chosen on validation splits and measured once on test splits; every entry has equally many
evaluations, unless the config says otherwise. Every point is a line of points.jsonl in the run's folder, from
which a search that was killed goes on.
"""

import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from jaxlab import config as configs
from jaxlab.app import Run, command_line, model_folder
from jaxlab.checkpoints import OpenModel, open_model
from jaxlab.data import Source, make_source
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.evaluation import Questions, prepare_questions
from jaxlab.files import write_atomic, write_json
from jaxlab.icl import flows
from jaxlab.merging import (
    ANSWERS,
    DETAILS,
    ENTROPY,
    SCORE,
    Data,
    Effort,
    Evaluator,
    InjectRecipe,
    Journal,
    Measuring,
    Space,
    Split,
    Trio,
    answered,
    check_same_architecture,
    compare_task_vectors,
    count_not_finite,
    learned_on,
    note_dequantized,
    own_answers,
    plan_injection,
    prepare_merge,
    read_data,
    read_trio,
    save_merged,
    score_tokens,
    search_entry,
    stack_batches,
    text_only,
    token_measure,
    write_merge,
)
from jaxlab.models import Params
from jaxlab.tasks.merge_search_config import Config as Config

SPLITS: tuple[Literal["validation", "test"], ...] = ("validation", "test")
UNSAVED = "results-unsaved.json"
"""All results, while the models are being written; results.json says that those are there too."""


def inputs(config: Config) -> dict[str, str]:
    """What the run depends on besides its config."""
    models = dict(zip(("vlm", "expert", "base"), _models(config), strict=True))
    data = {n: make_source(data, model_folder).identity for n, data in config.token_sets.items()}
    data |= {name: data.identity for name, data in config.question_sets.items()}
    return {role: model.identity for role, model in models.items()} | {
        f"evaluate.{name}": identity for name, identity in data.items()
    }


def check(config: Config) -> dict[str, Any]:
    """Whether the models fit together, and what the search holds on the device; reads no parameters."""
    models = _models(config)
    check_same_architecture(models, config.differences)
    for questions in config.question_sets.values():
        for split in SPLITS:
            prepare_questions(questions, models[0], split)
    shapes = [model.shapes for model in models]
    plan = plan_injection(*shapes, embeddings=config.embeddings, family=models[0].config.family)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    # Three models, the base once more in the checkpoint's shape, two float32 task vectors, one merged model.
    vectors = 8 * sum(leaf.size for leaf in jax.tree.leaves(shapes[2]))
    held = sum(map(size, shapes)) + size(shapes[2]) + vectors
    return {
        "points": {label: config.evaluations_of(label) for label in config.entries},
        "tensors_merged": sum(len(entry.names) for entry in plan.merged),
        "device_bytes": held + (0 if config.in_forward else size(shapes[0])),
    }


def run(config: Config, run: Run) -> dict[str, Any]:
    journal = Journal(run.path)
    models = _models(config)
    note_dequantized(models)
    trio = read_trio(*models, differences=config.differences, not_finite="refuse")
    sources = {name: make_source(data, model_folder) for name, data in config.token_sets.items()}
    validation, test = (read_data(sources, split, config.batch_size, config.batches) for split in SPLITS)
    plan = plan_injection(
        trio.vlm,
        trio.expert,
        trio.base,
        embeddings=config.embeddings,
        common_rows=trio.common_rows,
        family=trio.config.family,
    )
    evaluator = Evaluator(
        plan, trio, mode=config.mode, seed=config.seed, chunk=config.chunk, in_forward=config.in_forward
    )
    asked = _prepared_questions(config, models)
    unmerged = _unmerged(config, trio, (validation, test), asked, journal, run.name)
    measuring = _measuring(config, trio, (validation, test), asked["vlm"], unmerged)
    spaces = config.entries
    profile = None
    if any(space.layers == "flows" for space in spaces.values()):
        profile = flow_profile(trio, with_questions(validation, asked["expert"], config), config.profile_on)
    learned = None
    if any(space.method == "gradient" for space in spaces.values()):
        needed = any(s.method == "gradient" and s.loss == "entropy" for s in spaces.values())
        learnable = with_questions(validation, asked["vlm"], config)
        names = [name for name in config.chosen_by if name in learnable]
        if not names:
            raise UserError("method gradient: no question of choose has a right answer that it can learn on")
        answers = {name: own_answers(name, learnable[name])[1:] for name in names} if needed else {}
        learned = learned_on(learnable, names, answers)
    found: dict[str, Any] = {}
    for label, space in spaces.items():
        effort = Effort(config.evaluations_of(label), config.seed, profile, learned)
        with tqdm(total=effort.evaluations, desc=f"{run.name} {label}", unit="point") as bar:
            found[label] = search_entry(label, space, evaluator, measuring, effort, journal, bar.update)
        best = found[label]["best"]
        run.log(operator=label, validation=best["score"], **{f"test_{k}": v for k, v in best["test"].items()})
    spent = {label: result["evaluations"] for label, result in found.items()}
    if config.equal_points and len(set(spent.values())) > 1:
        raise RuntimeError(f"entries were evaluated unequally often: {spent}")
    winner = max(found, key=lambda label: found[label]["best"]["score"])  # the first of equals
    recipes = {label: recipe_of(config, spaces[label], found[label]["best"]) for label in spaces}
    results = {
        "operators": found,
        "best": {"operator": winner, **found[winner]["best"]},
        "chosen_by": list(config.chosen_by),
        "kept_by": list(config.keep),
        "unmerged": unmerged,
        "task_vectors": compare_task_vectors(plan, trio),
        **({} if profile is None else {"flow_profile": list(profile)}),
        "examples": _examples(
            config,
            sources,
            asked["vlm"],
            trio,
            evaluator.merged(spaces[winner].operator, spaces[winner].point_of_row(found[winner]["best"])),
        ),
    }
    write_json(run.path / UNSAVED, results)  # they outlive a model that cannot be written
    _save(config, run, models, evaluator, recipes, found, winner)
    (run.path / UNSAVED).unlink()
    return results


Asked = dict[str, dict[str, Questions]]
"""By split and data set."""


def _prepared_questions(config: Config, models: Sequence[OpenModel]) -> dict[str, Asked]:
    """By role: the questions as each model reads them; of the language models those without images."""
    found: dict[str, Asked] = {}
    for role, opened in zip(("vlm", "expert", "base"), models, strict=True):
        found[role] = {split: {} for split in SPLITS}
        for name, data in config.question_sets.items():
            for split in SPLITS:
                if role == "vlm" or not found["vlm"][split][name].has_images:
                    found[role][split][name] = prepare_questions(data, opened, split)
    return found


def with_questions(data: Data, asked: Asked, config: Config) -> Data:
    """Validation data with the questions that have right answers, as batches of tokens."""
    batches = {
        name: q.batches(config.batch_size)[: config.batches] for name, q in asked["validation"].items()
    }
    return data | {name: stack_batches(own) for name, own in batches.items() if own}


def _unmerged(
    config: Config,
    trio: Trio,
    data: tuple[Data, Data],
    asked: Mapping[str, Asked],
    journal: Journal,
    title: str,
) -> dict[str, dict[str, dict[str, float]]]:
    """What each of the three models can do by itself: language models on texts only. What the journal has of
    it is not measured again."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    rows = {row.get("role"): row for row in journal.rows("unmerged", "model")}
    roles = (
        ("vlm", trio.vlm, trio.config),
        ("expert", trio.expert, trio.expert_config),
        ("base", trio.base, trio.base_config),
    )
    for role, params, model in tqdm(roles, desc=f"{title} unmerged", unit="model"):
        if role not in rows:
            scores = {}
            for split, batches in zip(SPLITS, data, strict=True):
                scores[split] = score_tokens(params, model, batches if role == "vlm" else text_only(batches))
                for name, questions in asked[role][split].items():
                    scores[split][name] = questions.measure(params, batch_size=config.batch_size).score
            (rows[role],) = journal.add("unmerged", "model", [{"role": role, "scores": scores}])
        number = lambda value: math.nan if value is None else float(value)  # JSON has no NaN
        found[role] = {
            split: {name: number(value) for name, value in measured.items()}
            for split, measured in rows[role]["scores"].items()
        }
    return found


def _on_model(config: Config, name: str, questions: Questions) -> Callable[[Params], dict[str, Any]]:
    """What is measured of a merged model by one set of questions."""

    def measure(params: Params) -> dict[str, Any]:
        measured = questions.measure(params, batch_size=config.batch_size)
        found: dict[str, Any] = {
            f"{SCORE}/{name}": measured.score,
            f"{DETAILS}/{name}": measured.measures,
        }
        if name in config.chosen_by and "neighbours" in config.choose_by:
            found[f"{ANSWERS}/{name}"] = [zlib.crc32(answer.encode()) for answer in measured.answers]
        if name in config.chosen_by and "entropy" in config.choose_by:
            found[f"{ENTROPY}/{name}"] = questions.entropy(params, batch_size=config.batch_size)
        return found

    return measure


def _measuring(
    config: Config,
    trio: Trio,
    data: tuple[Data, Data],
    asked: Asked,
    unmerged: Mapping[str, Any],
) -> Measuring:
    own: tuple[tuple[str, int, int], ...] = ()
    if set(config.choose_by) != {"labels"}:
        names = [name for name in config.chosen_by if name in config.token_sets]
        own = tuple(own_answers(name, data[0][name]) for name in names)
    least = None
    if config.keep_at_least:
        scores = unmerged["vlm"]["validation"]
        least = config.keep_at_least * float(np.mean([scores[name] for name in config.keep]))
    validation, test = (
        Split(batches, tuple(_on_model(config, name, q) for name, q in asked[split].items()))
        for split, batches in zip(SPLITS, data, strict=True)
    )
    return Measuring(
        token_measure(trio.config, own) if config.token_sets else None,
        validation,
        test,
        config.chosen_by,
        config.keep,
        config.choose_by,
        least,
    )


def flow_profile(trio: Trio, data: Data, name: str = "") -> tuple[float, ...]:
    """For each layer its share in the expert's information flow from a text to where its answer is read,
    times the number of layers: the mean is 1. Of the last token of each answer before its end.

    Raises:
      ConfigError: no data set of texts.
    """
    texts = text_only(data)
    name = name or next(iter(texts), "")
    if name not in texts:
        raise ConfigError("layers: flows needs a data set without images in evaluate", key="profile_on")
    stack: Any = texts[name][0]
    batch = {key: np.asarray(value[0]) for key, value in stack.items()}
    tokens, mask = batch["tokens"], batch["loss_mask"]
    last = tokens.shape[1] - 1 - mask[:, ::-1].argmax(1)
    read = np.where(mask.sum(1) > 1, last - 2, last - 1)  # the token before that which is predicted
    rows = np.arange(len(tokens))
    right = tokens[rows, read + 1]
    words, labels = np.unique(right, return_inverse=True)
    place = np.arange(tokens.shape[1])[None]
    classes = np.where(place < read[:, None], 0, np.where(place == read[:, None], 1, -1)).astype(np.int32)
    targets = {
        "positions": read.astype(np.int32),
        "label_tokens": words.astype(np.int32),
        "labels": labels.astype(np.int32),
    }
    asked = {key: value for key, value in batch.items() if key != "loss_mask"}
    sums, _ = flows(
        trio.expert, asked, trio.expert_config, classes, targets, loss="vocabulary", num_classes=2
    )
    by_layer = np.asarray(sums, np.float64)[:, :, 1, 0].mean(0)
    return tuple(float(x) for x in by_layer / max(by_layer.mean(), np.finfo(float).tiny))


def _examples(
    config: Config, sources: Mapping[str, Source], asked: Asked, trio: Trio, merged: Params
) -> list[dict[str, Any]]:
    name, models = config.chosen_by[0], {"VLM alone": trio.vlm, "injected": merged}
    if name in asked["test"]:
        questions = asked["test"][name]
        said = {
            who: questions.measure(params, batch_size=config.batch_size).answers
            for who, params in models.items()
        }
        return [
            {
                "question": one.question.asked,
                "expected": one.question.expected,
                "answers": {who: answers[i] for who, answers in said.items()},
            }
            for i, one in enumerate(questions.asked[: config.examples])
        ]
    if trio.tokenizer is None or not config.examples:
        return []
    batch = next(iter(sources[name].held_out_batches(config.batch_size, 1, "test")))
    return answered(models, batch, trio.config, trio.tokenizer, config.examples)


def _save(
    config: Config,
    run: Run,
    models: Sequence[OpenModel],
    evaluator: Evaluator,
    recipes: Mapping[str, InjectRecipe],
    found: Mapping[str, Any],
    winner: str,
) -> None:
    """The recipes of the chosen points, and the models that the config asks for."""
    (run.path / "recipes").mkdir(exist_ok=True)
    for label, recipe in recipes.items():
        write_atomic(run.path / "recipes" / f"{label}.yaml", configs.dump(recipe))
    write_atomic(run.path / "best.yaml", configs.dump(recipes[winner]))
    wanted = {"best": [winner], "each": list(recipes), "none": []}[config.save]
    for label in wanted:
        out = run.path / ("model" if config.save == "best" else f"models/{label}")
        out.parent.mkdir(exist_ok=True)
        space = config.entries[label]
        params = evaluator.merged(space.operator, space.point_of_row(found[label]["best"]))
        if bad := sum(count_not_finite(np.asarray(leaf)) for leaf in jax.tree.leaves(params)):
            text = f"{out}: not written: {bad:,} values of the merged model are NaN or infinite"
            warnings.warn(text, UserNote, stacklevel=2)
            continue
        _write(out, recipes[label], models, params, evaluator)


def _write(
    out: Path, recipe: InjectRecipe, models: Sequence[OpenModel], params: Params, evaluator: Evaluator
) -> None:
    """A model that was measured, in the VLM's form: what `run.py merge` makes of its recipe.

    Raises:
      RuntimeError: that is another model.
    """
    if models[0].form not in ("huggingface", "gguf"):
        save_merged(out, recipe, models, params, evaluator.plan.account(), overwrite=True)
        return
    write_merge(
        prepare_merge(recipe, models),
        out,
        references=recipe.references(),
        command=command_line("merge", "recipe.yaml", "--out", f"{out.name}-again", "--verify"),
        overwrite=True,
    )
    check_written(out, params)


def check_written(out: Path, params: Params) -> None:
    """Whether a model on disk is the one in memory, bit for bit: leaf by leaf, since names of tensors depend
    on the layout of its folder.

    Raises:
      RuntimeError: it is another one.
    """
    leaves_of = jax.tree_util.tree_leaves_with_path
    flat = lambda tree: {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves_of(tree)}
    measured, written = flat(params), flat(open_model(out).read())
    wrong = [name for name in sorted(measured | written) if not _same(measured.get(name), written.get(name))]
    if wrong:
        raise RuntimeError(f"{out}: {len(wrong)} parameters are not those that were measured: {wrong[0]}")


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return one.tobytes() == other.tobytes()


def recipe_of(config: Config, space: Space, point: Mapping[str, Any]) -> InjectRecipe:
    """The recipe with which `run.py merge` makes the model of a point."""
    lambda_v, lambda_e = space.point_of_row(point).over_layers
    return configs.build(
        InjectRecipe,
        {
            "vlm": config.vlm,
            "expert": config.expert,
            "base": config.base,
            "operator": space.operator,
            "lambda_v": lambda_v,
            "lambda_e": lambda_e,
            **dict(space.point_of_row(point).parameters),
            "embeddings": config.embeddings,
            "differences": config.differences,
            "mode": config.mode,
            "seed": config.seed,
        },
    )


def _models(config: Config) -> list[OpenModel]:
    return [open_model(model_folder(reference)) for reference in (config.vlm, config.expert, config.base)]
