"""docs/injection_study.md is what docs/injection_study.py makes of the committed results, and its rules can
say no."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from jaxlab import config as configs
from jaxlab.reporting.papers.skill_injection import study, study_figures, study_page
from jaxlab.tasks.merge_search import Config
from tests.docs.scripts import DOCS, load

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1)


@pytest.fixture
def script() -> ModuleType:
    return load("injection_study")


def record(label, scenario, seed, target, kept):
    points = [[1.0, e, target * e, kept] for e in (0.0, 0.5, 1.0)]
    return {
        "scenario": scenario,
        "seed": seed,
        "label": label,
        "best": {"lambda_v": 1.0, "lambda_e": 1.0},
        "test": {"target": target, "kept": kept, "donor": 0.9},
        "keys": ["lambda_v", "lambda_e"],
        "points": points,
        "origin": "made up",
    }


def made(**targets):
    """A study whose operators reach these accuracies on images in all scenarios."""
    cells = [(scenario, seed) for scenario in study.SCENARIOS for seed in SEEDS]
    vlm = {"target": 0.0, "kept": 0.9}
    unmerged = [
        {"scenario": s, "seed": seed, "vlm": vlm, "expert": {"donor": 0.9}, "base": {"donor": 0.0}}
        for s, seed in cells
    ]
    records = [record(label, *cell, value, 0.8) for label, value in targets.items() for cell in cells]
    return {"title": "made up", "unmerged": unmerged, "records": records}


def statuses(told):
    return {name: study.summed_up(found) for name, found in study.verdicts(study.Study(told)).items()}


def test_the_page_is_made_of_the_committed_results() -> None:
    told = json.loads((DOCS / "results" / "injection_study.json").read_text(encoding="utf-8"))
    page = study_page.page(study.Study(told))
    assert (DOCS / "injection_study.md").read_text(encoding="utf-8") == page, (
        "run: python docs/injection_study.py"
    )
    for name in study_figures.FIGURES:
        assert f"injection_study/{name}.svg" in page
        assert (DOCS / "injection_study" / f"{name}.svg").is_file()


def test_verdicts_follow_from_the_numbers() -> None:
    told = made(task_arithmetic=0.8, dare_linear=0.8, ties=0.5)
    assert statuses(told) == {"M1": "seen", "M2": "seen", "M3": "not seen", "M4": "seen", "M5": "seen"}
    told = made(task_arithmetic=0.1, dare_linear=0.1, ties=0.9)
    assert statuses(told)["M4"] == "not seen"
    told = made(task_arithmetic=0.1, dare_linear=0.1, ties=0.1)
    assert statuses(told) | {"M4": "", "M5": ""} == {
        "M1": "not seen", "M2": "not seen", "M3": "seen", "M4": "", "M5": ""
    }  # fmt: skip
    told = made(task_arithmetic=0.8, dare_linear=0.8, ties=0.5)
    for row in told["records"]:
        if row["seed"] == 1 and row["scenario"] == "french":
            row["test"]["target"] = 0.1
    assert statuses(told)["M2"] == "seen in 1 of 2 seeds"


def test_who_gains_reliably_can_be_either() -> None:
    lone = study_page.page(study.Study(made(task_arithmetic=0.8, dare_linear=0.05, ties=0.05)))
    assert "**Seen here: no other operator gains in every cell.**" in lone
    both = study_page.page(study.Study(made(task_arithmetic=0.8, dare_linear=0.8, ties=0.05)))
    assert "**Not seen here: 1 of 2 other operators gain in every cell too.**" in both
    none = study_page.page(study.Study(made(task_arithmetic=0.05, dare_linear=0.8, ties=0.05)))
    assert "task arithmetic itself does not gain" in none


def test_an_operator_without_all_seeds_is_not_in_the_tables() -> None:
    told = made(task_arithmetic=0.8, dare_linear=0.8, ties=0.5)
    told["records"].pop()
    page = study_page.page(study.Study(told))
    assert "| `ties` |" not in page
    assert "not run here in every scenario with every seed: `ties`." in page


def test_a_search_is_taken_over_in_place(script: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results" / "study.json")
    measures = {"image_french": 0.5, "image_words": 0.75, "text_french": 1.0}
    point = {"lambda_v": 1.0, "lambda_e": 0.5, "density": 0.5, "score": 0.5, "validation": measures}
    both = {"validation": measures, "test": measures}
    found = {"points": [point], "best": {**point, "test": measures}}
    results = {"unmerged": {"vlm": both, "expert": both, "base": both}, "operators": {"ties": found}}
    for origin in ("first", "second"):
        script.take_over("french", 0, results, origin)
    script.take_over("french", 1, results, "second")
    told = json.loads(script.RESULTS.read_text())
    assert [(r["seed"], r["origin"]) for r in told["records"]] == [(0, "second"), (1, "second")]
    assert told["records"][0]["keys"] == ["lambda_v", "lambda_e", "density"]
    assert told["records"][0]["points"] == [[1.0, 0.5, 0.5, 0.5, 0.75]]
    assert told["records"][0]["test"] == {"target": 0.5, "kept": 0.75, "donor": 1.0}
    assert len(told["unmerged"]) == 2


def test_the_three_searches_try_the_same() -> None:
    found = [configs.load(Config, ROOT / "configs" / "injection" / f"{s}.yaml") for s in study.SCENARIOS]
    assert found[0].operators == found[1].operators == found[2].operators
    assert len(found[0].operators) > 30
    assert {found[0].evaluations_of(label) for label in found[0].operators} == {24}
