"""Writes docs/injection_study.md and its figures: every operator on three scenarios of digits, over seeds.

python docs/injection_study.py                           # the page, from docs/results/injection_study.json
python docs/injection_study.py --run --seeds 0 1 2       # first trains the models and runs the searches
python docs/injection_study.py --run --only ties slerp   # only these operators; results of others stay

The searches are configs/injection/*.yaml, a few operators at a time. What is finished in --outputs is not
done again, so that a run that was killed goes on.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlab.files import write_atomic

DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "injection_study.json"
CONFIGS = Path("configs/injection")
MODELS = Path("configs/quickstart")
SCENARIOS = ("format", "french", "arithmetic")
AT_ONCE = 4
"""Operators of a run."""

Json = dict[str, Any]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="train and search before the page is made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="labels of operators")
    parser.add_argument("--outputs", default="outputs", help="the folder that run folders go to")
    parser.add_argument("--trained", type=Path, help="take models from the train runs in this folder")
    arguments = parser.parse_args(words)
    if arguments.run:
        run(arguments.seeds, arguments.only, arguments.outputs, arguments.trained)
    from jaxlab import config as configs
    from jaxlab.reporting.papers.skill_injection.study_page import write
    from jaxlab.tasks.merge_search import Config

    told = json.loads(RESULTS.read_text(encoding="utf-8"))
    told["searched"] = list(configs.load(Config, CONFIGS / f"{SCENARIOS[0]}.yaml").operators)
    write_compact(told)
    write(told, DOCS)
    return 0


def run(seeds: Sequence[int], only: Sequence[str], outputs: str, trained: Path | None) -> None:
    """Models and searches of every seed; a few operators are searched in all scenarios with all seeds before
    the next ones, and what they found is taken over into the results as it comes."""
    from jaxlab import config as configs
    from jaxlab.app import environment, use_compile_cache
    from jaxlab.tasks import execute
    from jaxlab.tasks.merge_search import Config

    paths = {scenario: CONFIGS / f"{scenario}.yaml" for scenario in SCENARIOS}
    searches = {scenario: configs.load(Config, path) for scenario, path in paths.items()}
    labels = [label for label in searches[SCENARIOS[0]].operators if not only or label in only]
    if not labels:
        sys.exit(f"none of {', '.join(only)} is in {CONFIGS}")
    env = environment()
    origin = f"Commit {env['commit'][:10]}{', with changes' if env['dirty'] else ''}, {env['device_kind']}"
    use_compile_cache()
    models = {seed: find(seed, trained) if trained else train(seed, outputs) for seed in seeds}
    makers = {read_commit(path) for made in models.values() for path in made.values()}
    origin += f"; models trained by commit {', '.join(sorted(makers))}"
    for group in itertools.batched(labels, AT_ONCE):
        for scenario, seed in itertools.product(SCENARIOS, seeds):
            operators = {label: searches[scenario].operators[label] for label in group}
            made = models[seed]
            config = dataclasses.replace(
                searches[scenario],
                operators=operators,
                seed=seed,
                save="none",
                vlm=made["vlm"],
                expert=made[scenario],
                base=made["base"],
            )
            name = f"injection_{scenario}_{group[0]}"
            result = execute("merge-search", config, outputs=outputs, name=name)
            take_over(scenario, seed, result.results, origin)


def train(seed: int, outputs: str) -> dict[str, str]:
    """Base, VLM and experts of one seed, by name."""
    from jaxlab.tasks import execute

    base = execute("train", MODELS / "digits_base.yaml", {"seed": seed}, outputs=outputs)
    made = {"base": str(base.path)}
    for name in ("vlm", *SCENARIOS):
        config = MODELS / config_of(name)
        found = execute("train", config, {"seed": seed, "init_from": str(base.path)}, outputs=outputs)
        made[name] = str(found.path)
    return made


def read_commit(run: str) -> str:
    """Of a train run."""
    env = json.loads((Path(run) / "env.json").read_text(encoding="utf-8"))
    return f"{env['commit'][:10]}{' with changes' if env['dirty'] else ''}"


def config_of(name: str) -> str:
    return "digits_vlm.yaml" if name == "vlm" else f"digits_expert_{name}.yaml"


def find(seed: int, folder: Path) -> dict[str, str]:
    """The same from finished train runs of the same configs, by whichever commit."""
    from jaxlab import config as configs
    from jaxlab.training import TrainConfig

    def meaning(config: TrainConfig) -> Json:
        """The config without what says how attention is computed, which newer code may choose differently."""
        told = configs.to_dict(config)
        told["model"]["attention"].pop("implementation")
        return told

    def finished(file: str, **changes: Any) -> str:
        wanted = meaning(dataclasses.replace(configs.load(TrainConfig, MODELS / file), seed=seed, **changes))
        for run in sorted(folder.glob(f"{Path(file).stem}-*")):
            done = (run / "results.json").exists()
            if done and meaning(configs.load(TrainConfig, run / "config.yaml")) == wanted:
                return str(run)
        sys.exit(f"{folder}: no finished run of {file} with seed {seed}")

    base = finished("digits_base.yaml")
    return {"base": base} | {name: finished(config_of(name), init_from=base) for name in ("vlm", *SCENARIOS)}


def take_over(scenario: str, seed: int, results: Json, origin: str) -> None:
    """Puts a search into the committed results, in place of what they had of it."""
    from jaxlab.reporting.papers.skill_injection.study import records_of

    unmerged, records = records_of(scenario, seed, results, origin)
    known: Json = {"title": "Injection study", "unmerged": [], "records": []}
    if RESULTS.exists():
        known = json.loads(RESULTS.read_text(encoding="utf-8"))
    mine = lambda record: record["scenario"] == scenario and record["seed"] == seed
    labels = {record["label"] for record in records}
    known["unmerged"] = [r for r in known["unmerged"] if not mine(r)] + [unmerged]
    known["records"] = [r for r in known["records"] if not (mine(r) and r["label"] in labels)] + records
    order = lambda r: (SCENARIOS.index(r["scenario"]), r.get("label", ""), r["seed"])
    for key in ("unmerged", "records"):
        known[key].sort(key=order)
    write_compact(known)


def write_compact(known: Json) -> None:
    """JSON with one line for each record."""
    lines = ["{", f'"title": {json.dumps(known["title"])},']
    lines.append(f'"searched": {json.dumps(known.get("searched", []))},')
    for key in ("unmerged", "records"):
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in known[key])
        lines.append(f'"{key}": [\n{rows}\n]' + ("," if key == "unmerged" else ""))
    RESULTS.parent.mkdir(exist_ok=True)
    write_atomic(RESULTS, "\n".join([*lines, "}"]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
