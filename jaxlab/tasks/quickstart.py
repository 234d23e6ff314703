"""Task `quickstart`: the main job. It runs the project's tasks on configs/quickstart and writes a page."""

import dataclasses
import resource
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxlab.app import RunResult, command_line, environment
from jaxlab.config import dump_yaml
from jaxlab.files import write_atomic, write_json
from jaxlab.reporting import build_sections, compose, duration, read_run, read_runs
from jaxlab.tasks import execute

CONFIGS = Path("configs/quickstart")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Run all three systems on real input, and write a report."""

    outputs: str = "outputs"
    """the folder that run folders go to; the report is quickstart/report.html in it"""
    overwrite: bool = False
    """do finished stages anew"""
    smoke: bool = False
    """a few steps of every stage, to see that everything runs; its numbers mean nothing"""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of a task on a config, which may read models that earlier stages made."""

    task: str
    config: str
    reads: dict[str, str] = dataclasses.field(default_factory=dict)
    """Keys of the config that name a model, and the stage that makes it."""

    @property
    def path(self) -> Path:
        return CONFIGS / f"{self.config}.yaml"


_SEARCH = {"vlm": "digits_vlm", "base": "digits_base"}
STAGES = (
    # Native sparse attention: what it costs beside dense attention, two models of one size, where they look.
    Stage("attention-speed", "nsa_speed"),
    Stage("train", "nsa_full"),
    Stage("train", "nsa_sparse"),
    Stage("evaluate", "nsa_full_test", {"model": "nsa_full"}),
    Stage("evaluate", "nsa_sparse_test", {"model": "nsa_sparse"}),
    # Skill injection: a base, a VLM and three experts that grew from it, a search for each expert.
    Stage("train", "digits_base"),
    Stage("train", "digits_vlm", {"init_from": "digits_base"}),
    Stage("train", "digits_expert_french", {"init_from": "digits_base"}),
    Stage("train", "digits_expert_format", {"init_from": "digits_base"}),
    Stage("train", "digits_expert_arithmetic", {"init_from": "digits_base"}),
    Stage("merge-search", "digits_search_french", {**_SEARCH, "expert": "digits_expert_french"}),
    Stage("merge-search", "digits_search_format", {**_SEARCH, "expert": "digits_expert_format"}),
    Stage("merge-search", "digits_search_arithmetic", {**_SEARCH, "expert": "digits_expert_arithmetic"}),
    # In-context learning: how information flows in a model that learns from its prompt. The model is shipped.
    Stage("icl", "icl_analysis"),
)

SMOKE: dict[str, dict[str, Any]] = {
    "train": {"steps": 2, "eval_batches": 1},
    "evaluate": {"batches": 1},
    "merge-search": {"batches": 1},
    "attention-speed": {"lengths": [512, 1024], "rounds": 1},
    "icl": {"examples": 8, "seeds": [0]},
}
"""What `--smoke` changes, by task."""


def run(arguments: Arguments) -> None:
    started = time.time()
    made: dict[str, RunResult] = {}
    lines: list[dict[str, Any]] = []
    folder = Path(arguments.outputs) / "quickstart"
    layout = "{desc} {bar} {n_fmt} of {total_fmt} stages, {elapsed}"
    with tqdm(total=len(STAGES), desc="quickstart", bar_format=layout) as bar:
        for stage in STAGES:
            began = time.perf_counter()
            made[stage.config] = result = execute(
                stage.task,
                stage.path,
                overrides(stage, made, arguments),
                outputs=arguments.outputs,
                overwrite=arguments.overwrite,
            )
            seconds = time.perf_counter() - began
            lines.append(
                {
                    "name": stage.config,
                    "task": stage.task,
                    "folder": f"../{stage.task}/{result.path.name}",
                    "seconds": round(seconds, 3),
                    "reused": result.reused,
                }
            )
            told = "already done" if result.reused else duration(seconds)
            bar.write(
                f"quickstart: {stage.task} {stage.config}, {told}; {duration(time.time() - started)} in all"
            )
            bar.update()

    runs = read_runs(result.path for result in made.values())
    sections = build_sections(runs)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", dump_yaml(dataclasses.asdict(arguments)))
    write_json(
        folder / "results.json",
        {
            "headline": {section.key: " ".join(section.headline) for section in sections if section.headline},
            "claims": {v.claim.id: v.status for section in sections for v in section.verdicts},
            "seconds": round(time.time() - started, 3),
            "peak_memory_bytes": peak_memory(),
            "stages": lines,
        },
    )
    write_json(
        folder / "env.json",
        {
            "task": "quickstart",
            "command": command_line("quickstart", *_words(arguments)),
            **environment(),
        },
    )
    write_atomic(folder / "report.html", compose([read_run(folder), *runs], sections))
    print(f"report: {folder / 'report.html'}")


def overrides(stage: Stage, made: dict[str, RunResult], arguments: Arguments) -> dict[str, Any]:
    """What a stage changes in its config: the models that it reads, and the smallness of a smoke test.

    The configs name each other, which finds the models of whole runs in `outputs`, so that the same commands
    by hand find everything done. Elsewhere, and for models of other settings, the stages' folders are given.
    """
    if not arguments.smoke and arguments.outputs == "outputs":
        return {}
    folders = {key: str(made[name].path) for key, name in stage.reads.items()}
    return {**folders, **(SMOKE[stage.task] if arguments.smoke else {})}


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _words(arguments: Arguments) -> list[str]:
    words = [] if arguments.outputs == "outputs" else ["--outputs", arguments.outputs]
    return words + ["--smoke"] * arguments.smoke
