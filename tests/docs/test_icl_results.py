"""docs/icl_results.md is what docs/icl_results.py makes of the committed results, byte for byte."""

import json

from tests.docs.scripts import DOCS, load


def test_the_page_follows_from_the_results(tmp_path):
    module = load("icl_results")
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
