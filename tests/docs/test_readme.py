"""What README, CONTRIBUTING and the hooks tell to do can be done."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxlab import config as configs
from jaxlab.tasks import TASKS, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python run\.py ([^#\n]+)", README, re.MULTILINE)


def test_there_are_commands_of_most_tasks() -> None:
    assert {"train", "generate", "merge", "inspect", "convert", "report"} <= {c.split()[0] for c in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_valid(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    name, *words = shlex.split(command)
    for word in words:
        assert not word.endswith(".yaml") or Path(word).is_file()
    if "--help" in (name, *words):
        assert main([name, *words]) == 0
        return
    task = TASKS.find(name)
    if task.takes == "config":
        assert main([name, *words, "--print-config"]) == 0, capsys.readouterr().err
    else:
        configs.load(task.schema(), None, words)


def test_the_python_of_the_readme_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert re.search(r"\d+", capsys.readouterr().out)


def test_links_lead_to_files() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_ci_runs_every_hook() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = re.findall(r"sed -n '([^']+)' \.pre-commit-config\.yaml", script)
    lines = subprocess.run(
        ["sed", "-n", pattern, ".pre-commit-config.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert lines.stdout.splitlines() == [hook["entry"] for hook in hooks]
    assert {"ruff", "mypy", "mkdocs"} <= {word for hook in hooks for word in hook["entry"].split()}


def test_citations_agree() -> None:
    """CITATION.cff and the page of papers name the same papers."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert sorted(reference["title"] for reference in cited) == sorted(
        re.findall(r"    title = \"(.+)\"", page)
    )
    for reference in cited:
        number = reference["identifiers"][0]["value"].removeprefix("arXiv:")
        assert f'eprint = "{number}"' in page
        assert f"arxiv.org/abs/{number}" in README
        names = ["{family-names}, {given-names}".format(**author) for author in reference["authors"]]
        assert " and ".join(names) in " ".join(page.split())
