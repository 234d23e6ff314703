"""docs/claims.md is what docs/claims.py makes of the committed results, byte for byte."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from jaxlab.reporting import CLAIMS
from tests.docs.scripts import DOCS, load
from tests.reporting import made


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    return load("claims")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return shutil.copytree(DOCS / "results", tmp_path / "results")


def change(path: Path, *keys: str | int, to: object) -> None:
    whole = value = json.loads(path.read_text())
    for key in keys[:-1]:
        value = value[key]
    value[keys[-1]] = to
    path.write_text(json.dumps(whole))


def line_of(page: str, claim: str) -> str:
    (line,) = (line for line in page.splitlines() if line.startswith(f"| [{claim}]"))
    return line


def test_the_page_is_made_of_the_committed_results(claims: ModuleType) -> None:
    assert (DOCS / "claims.md").read_text(encoding="utf-8") == claims.page(DOCS / "results"), (
        "run: python docs/claims.py"
    )


def test_every_claim_has_its_line_and_its_part(claims: ModuleType) -> None:
    page = claims.page(DOCS / "results")
    assert len(CLAIMS) == 18
    for name, claim in CLAIMS.items():
        assert claim.statement in line_of(page, name)
        assert page.count(f"\n### {name}\n") == 1
    assert claims.BETTER.keys() == CLAIMS.keys()


def test_a_verdict_follows_from_its_figures(claims: ModuleType, results: Path) -> None:
    assert "**seen** (3 seeds)" in line_of(claims.page(results), "N1")
    change(results / "nsa.json", "records", 0, "numbers", "nsa", to=[2.1, 2.1, 2.1])
    assert "**not seen** (3 seeds)" in line_of(claims.page(results), "N1")
    change(results / "nsa.json", "records", 0, "numbers", "parameters", to=[787584, 900000])
    assert "3 seeds" not in line_of(claims.page(results), "N1"), "models of unequal size were judged"


def test_a_real_model_is_judged_by_data_set(claims: ModuleType, results: Path) -> None:
    change(results / "smollm2.json", "data", "TREC", "wp", to=[0.3, 0.02])
    assert "**seen on SST-2, AGNews alone** (SmolLM2" in line_of(claims.page(results), "I1")


def test_what_nothing_speaks_about_is_not_measured(claims: ModuleType, results: Path) -> None:
    change(results / "nsa.json", "records", to=[])
    for name in ("quickstart", "real_run"):
        (results / f"{name}.json").unlink()
    change(results / "smollm2.json", "data", to={})
    for file in (results / "icl").glob("*.json"):
        file.unlink()
    page = claims.page(results)
    assert "| not measured here |" in line_of(page, "N1")
    assert "| not measured here |" in line_of(page, "I8")
    assert "**Quickstart.** No run of it is committed." in page


def test_a_quickstart_is_taken_over(claims: ModuleType, results: Path, tmp_path: Path) -> None:
    """Its verdicts are those of its runs; a smoke test's and uncommitted code's are refused."""
    run = made.train(tmp_path, "nsa_sparse-12345678", "nsa")
    other = made.train(tmp_path, "nsa_full-12345678", "full")
    stages = {"stages": [{"folder": f"../../train/{path.name}"} for path in (run, other)]}
    whole = made.write_run(tmp_path, "quickstart", "quickstart", {"smoke": False}, stages)
    found = claims.collect(whole)
    (n1,) = (record for record in found["records"] if record["claim"] == "N1")
    assert n1["status"] in ("seen", "not seen", "not examined")
    (results / "quickstart.json").write_text(json.dumps(found))
    assert n1["evidence"] in claims.page(results)
    for name, text in (("config.yaml", "smoke: true"), ("env.json", json.dumps({**made.ENV, "dirty": True}))):
        before = (whole / name).read_text()
        (whole / name).write_text(text)
        with pytest.raises(SystemExit, match="not kept"):
            claims.collect(whole)
        (whole / name).write_text(before)


def test_every_study_of_injection_speaks(claims: ModuleType, results: Path) -> None:
    told = json.loads((results / "injection_study.json").read_text())
    told |= {"models": "another model", "command": "python other.py"}
    (results / "injection_smollm2.json").write_text(json.dumps(told))
    page = claims.page(results)
    assert page.count("operators on another model") == 5
    assert page.count("operators on digits") == 5
