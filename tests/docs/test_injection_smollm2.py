"""docs/injection_smollm2.py: its page is of the committed results, and its data are what it says."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.scripts import DOCS, load


@pytest.fixture
def script() -> ModuleType:
    return load("injection_smollm2")


def search(outputs: Path, skill: str) -> None:
    """A finished search, made up."""
    measures = {f"image_{skill}": 0.6, "image_words": 0.8, f"text_{skill}": 0.9}
    both = {"validation": measures, "test": {**measures, f"image_{skill}": 0.0}}
    points = [
        {"lambda_v": v, "lambda_e": e, "score": 0.5, "validation": {**measures, f"image_{skill}": v * e}}
        for v in (0.5, 1.0)
        for e in (0.0, 0.5)
    ]
    found = {"points": points, "best": {**points[-1], "test": measures}}
    operators = dict.fromkeys(("task_arithmetic", "dare_linear", "ties"), found)
    run = outputs / "merge-search" / f"search_{skill}-00000000"
    run.mkdir(parents=True)
    answers = {"VLM alone": "four", "injected": "a | b\n`c`"}
    results = {
        "unmerged": {"vlm": both, "expert": both, "base": both},
        "operators": operators,
        "best": {"operator": "ties"},
        "examples": [{"question": f"<image>\nIn {skill}?", "expected": "d", "answers": answers}],
    }
    (run / "results.json").write_text(json.dumps(results))
    env = {"commit": "c0ffee0123456", "dirty": False, "device_kind": "cpu"}
    (run / "env.json").write_text(json.dumps(env))


def test_searches_become_a_page(script: ModuleType, tmp_path: Path) -> None:
    for skill in script.SKILLS:
        search(tmp_path, skill)
    script.write_page(script.collect(tmp_path), tmp_path)
    page = (tmp_path / "injection_smollm2.md").read_text()
    prose = page.replace("\n", " ")
    assert "by 3 operators with 4 settings each" in prose
    assert "| `ties` | 60 | 60 | 60 | 60.0 | 80 |" in page
    assert re.search(r"- M1, seed 0: seen\. On images 0\s% without and 60\s% with injection", page)
    assert "Commit c0ffee0123, cpu" in page
    assert "in so many of 3 scenarios: `task_arithmetic` 3, `dare_linear` 3, `ties` 3." in page.replace(
        "\n", " "
    )
    assert "| In french? (`ties`) | `d` | `four` | `a / b 'c'` |" in page
    assert (tmp_path / "injection_smollm2" / "weights.svg").stat().st_size > 10_000
    with pytest.raises(SystemExit, match=r"search_french is not done in .*empty"):
        script.collect(tmp_path / "empty")


def test_the_page_is_of_the_committed_results(script: ModuleType, tmp_path: Path) -> None:
    if not script.RESULTS.exists():
        pytest.skip("no results are committed")
    script.write_page(json.loads(script.RESULTS.read_text()), tmp_path)
    made, kept = (folder / "injection_smollm2.md" for folder in (tmp_path, DOCS))
    assert made.read_text() == kept.read_text(), "run: python docs/injection_smollm2.py --page"


def test_no_training_sees_what_is_asked(script: ModuleType, tmp_path: Path) -> None:
    script.write_data(tmp_path)
    rows = lambda name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    learnt = {row["image"] for row in rows("vlm")}
    for skill in ("words", *script.SKILLS):
        asked = rows(f"image_{skill}")
        assert len(asked) == script.HELD_OUT
        assert not learnt & {row["image"] for row in asked}
    said = {turn["value"] for row in rows("vlm") for turn in row["conversations"][1:]}
    assert said == {*script.DIGITS, *script.COLORS}  # no French, no JSON, no sums
