"""docs/icl_results.md is what docs/icl_results.py makes of the committed results, byte for byte."""

import importlib.util
import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def script():
    spec = importlib.util.spec_from_file_location("icl_results", DOCS / "icl_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_follows_from_the_results(tmp_path):
    module = script()
    runs = module.committed(DOCS / "results" / "icl")
    assert len(runs) >= 2
    assert module.page(runs) == (DOCS / "icl_results.md").read_text(encoding="utf-8")
    for run in runs:
        drawn = {*module.pictures(run), *(["figure1"] if run.get("figure1") else [])}
        shown = {*module.DRAWN, *module.AFTER, "figure1"}
        assert {n for n in shown if (DOCS / "icl" / f"{run.label}_{n}.svg").exists()} == drawn
    # Other figures, another page: nothing is written by hand.
    kept = json.loads((DOCS / "results" / "icl" / "smollm2_trec.json").read_text())
    kept["results"]["flows"]["share"]["wp"] = [0.1] * len(kept["results"]["flows"]["share"]["wp"])
    (tmp_path / "smollm2_trec.json").write_text(json.dumps(kept))
    assert "**I1, not seen.**" in module.page(module.committed(tmp_path))
