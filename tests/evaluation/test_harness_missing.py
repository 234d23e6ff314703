"""Without lm-evaluation-harness its command line is one line that says what to install."""

import sys

from jaxlab.evaluation.harness.__main__ import main


def test_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["run", "--tasks", "mmlu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "pip install 'jaxlab[lm-eval]'" in err
