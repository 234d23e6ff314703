"""Exit statuses, messages, and the options of every task."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlab import config as configs
from jaxlab.config.schema import leaves
from jaxlab.tasks import TASKS, main
from tests.app import fake_command, fake_task

ROOT = Path(__file__).parents[2]


def folders() -> list[Path]:
    return sorted(Path("outputs/fake").iterdir())


def test_the_list_of_tasks_is_printed_without_jax() -> None:
    code = "import sys; from jaxlab.tasks import main; main(['--help']); sys.exit('jax' in sys.modules)"
    started = time.monotonic()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert time.monotonic() - started < 10  # about 0.3 s where nothing else runs
    assert process.returncode == 0, process.stderr
    for name in TASKS.names():
        if not name.startswith("fake"):
            assert f"  {name} " in process.stdout


def test_the_help_of_a_task_shows_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", "--help"]) == 0
    page = capsys.readouterr().out
    for dotted in leaves(fake_task.Config):
        assert f"--{dotted} " in page
    assert {"source.kind", "source.path", "source.seed"} < leaves(fake_task.Config).keys()
    for text in (
        "--source.kind file|random  (default: random)",
        "source, kind file: Numbers of a file.",
        "source, kind random: Numbers drawn anew.",
        "How many lines to log. (required)",
        "What the loss falls by. (default: 0.5)",
        "--sweep-mode",
    ):
        assert text in page
    assert main(["fake-command", "-h"]) == 0
    page = capsys.readouterr().out
    assert "usage: python run.py fake-command MODEL [OTHERS ...] [--field.sub VALUE ...]" in page
    assert "What to begin with. (default: hello)" in page
    assert "--sweep" not in page


MISTAKES = [
    ([], "which task? "),
    (["--outputs", "x"], "which task? "),
    (["fak"], "unknown task 'fak'; did you mean fake?"),
    (["xyzzy"], "unknown task 'xyzzy'; there are quickstart, prepare, train"),
    (["fake"], "fake takes a config first: python run.py fake CONFIG.yaml"),
    (["fake", "--steps", "3"], "fake takes a config first"),
    (["fake", "smal.yaml"], "smal.yaml: cannot be read: No such file or directory; did you mean small.yaml?"),
    (["fake-command"], "command line: MODEL missing: name it"),
    (["fake-command", "a", "--loud", "--prompt"], "command line: --prompt: needs a value"),
]
CONFIG_MISTAKES = [
    (["--stop", "user"], "the rate is wrong; lower it"),
    (["--outputs", "small.yaml"], "small.yaml/fake/small-"),
    (["--step", "3"], "command line: --step: unknown option; did you mean --steps?"),
    (["--overwite"], "command line: --overwite: unknown option; did you mean --overwrite?"),
    (["--model.depth=-1"], "command line: --model.depth: must not be negative, is -1"),
    (["--sweep-mode", "zap"], "command line: --sweep_mode: expected product|zip, found zap"),
    (["--sweep", "steps=1"], "command line: --sweep: expected key=[a,b], found 'steps=1'"),
    (["--sweep", "steps=[1,"], "command line: --sweep: expected key=[a,b], found 'steps=[1,'"),
    (["--sweep", "steps=[1,,]"], "command line: --sweep: expected key=[a,b], found 'steps=[1,,]'"),
    (["--sweep", "steps=[]"], "command line: --sweep: expected key=[a,b]"),
    (["--sweep", "stepz=[1]"], "command line: --stepz: unknown option; did you mean --steps?"),
    (["--sweep", "steps=[1,a]"], "command line: --steps: expected int, found a"),
    (["--sweep", "stop=[null]"], "command line: --stop: expected str, found null"),
    (["--sweep", "steps=[1]", "steps=[2]"], "command line: --sweep: steps is given twice"),
    (
        ["--sweep", "steps=[1,2]", "rate=[1]", "--sweep-mode=zip"],
        "command line: --sweep_mode: zip needs lists of",
    ),
]


@pytest.mark.parametrize(
    ("words", "message"),
    MISTAKES + [(["fake", "small.yaml", *words], line) for words, line in CONFIG_MISTAKES],
)
def test_a_mistake_is_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_bug_keeps_its_traceback_and_status_1() -> None:
    with pytest.raises(ValueError, match="a bug"):
        main(["fake", "small.yaml", "--stop", "bug"])


def test_an_interrupted_run_is_taken_up_again(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fake", "small.yaml", "--stop", "killed"]
    assert main(words) == 130
    assert capsys.readouterr().err == "interrupted; a run is taken up again by the same command\n"
    (folder,) = folders()
    assert not (folder / "results.json").exists()
    (folder / "metrics.jsonl").open("a").write('{"step": 2, "lo')  # torn by a kill
    (folder / "counter").write_text("2")
    assert main(words) == 0
    assert "taken up again" in capsys.readouterr().out
    assert json.loads((folder / "results.json").read_text())["started_at"] == 2
    assert len(json.loads((folder / "env.json").read_text())["interrupted"]) == 1
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_a_run_is_done_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", "small.yaml"]) == 0
    assert main(["fake", "small.yaml"]) == 0
    assert "already done: outputs/fake/small-" in capsys.readouterr().out
    assert len(fake_task.calls) == 1
    assert main(["fake", "small.yaml", "--overwrite"]) == 0
    assert len(fake_task.calls) == 2
    assert main(["fake", "small.yaml", "--steps", "4"]) == 0
    assert len(folders()) == 2


def test_the_config_in_a_run_folder_is_valid_input() -> None:
    assert main(["fake", "small.yaml", "--rate", "1e-3", "--note", "3"]) == 0
    (folder,) = folders()
    assert configs.load(fake_task.Config, folder / "config.yaml") == fake_task.calls[0]
    environment = json.loads((folder / "env.json").read_text())
    assert environment["command"] == "python run.py fake small.yaml --rate 1e-3 --note 3"
    assert environment["commit"] == "c0ffee"
    assert not environment["dirty"]
    assert environment["device_count"] == 4
    assert environment["platform"] == "cpu"
    assert environment["seconds"] >= 0
    assert {"python", "jax", "numpy"} <= environment["versions"].keys()


def test_nothing_runs_when_only_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", "small.yaml", "--print-config", "--steps", "9"]) == 0
    Path("again.yaml").write_text(capsys.readouterr().out)
    assert configs.load(fake_task.Config, "again.yaml") == fake_task.Config(steps=9)
    assert main(["fake", "small.yaml", "--check"]) == 0
    assert capsys.readouterr().out == "steps: 3\nmemory:\n  device 0: 1 MiB\n"
    assert not fake_task.calls
    assert not Path("outputs").exists()


def test_a_sweep_is_one_run_per_point(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "fake",
        "small.yaml",
        "--sweep",
        "rate=[0.5,1e-1]",
        "model.depth=[1,2]",
        "--outputs",
        "elsewhere",
    ]
    assert main(words) == 0
    points = [(config.rate, config.model.depth) for config in fake_task.calls]
    assert points == [(0.5, 1), (0.5, 2), (0.1, 1), (0.1, 2)]
    out = capsys.readouterr().out
    (table,) = Path("elsewhere/sweeps").glob("fake-small-*/sweep.json")
    runs = json.loads(table.read_text())["runs"]
    assert [row["values"] for row in runs] == [{"rate": r, "model.depth": d} for r, d in points]
    for row in runs:
        assert json.loads((Path("elsewhere") / row["run"] / "results.json").read_text()) == row["results"]
        assert row["run"] in out
    assert main(words) == 0  # resumed: nothing is left to do
    assert len(fake_task.calls) == 4


def test_zip_walks_side_by_side() -> None:
    assert main(["fake", "small.yaml", "--sweep", "rate=[1,2]", "steps=[3,4]", "--sweep-mode", "zip"]) == 0
    assert [(config.rate, config.steps) for config in fake_task.calls] == [(1.0, 3), (2.0, 4)]


def test_printed_commands_do_what_the_sweep_does(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fake", "small.yaml", "--rate=2", "--outputs", "o u t"]
    sweep = ["--sweep", "note=['it''s', \"3\", null]", "model.names=[[a, b c], []]"]
    assert main([*words, *sweep, "--print-commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert not fake_task.calls
    for line in lines:
        program, script, *rest = shlex.split(line)
        assert (program, script) == ("python", "run.py")
        assert main(rest) == 0
    printed = list(fake_task.calls)
    assert main([*words, *sweep]) == 0
    assert fake_task.calls == printed  # each point was found done
    assert [config.note for config in printed[::2]] == ["it's", "3", None]


def test_arguments_of_a_command_task() -> None:
    assert main(["fake-command", "a", "b", "--loud", "--prompt", "1 2", "c"]) == 0
    assert fake_command.calls == [fake_command.Arguments("a", ("b", "c"), prompt="1 2", loud=True)]
    assert main(["fake-command", "a", "--prompt=--x"]) == 0
    assert fake_command.calls[1].prompt == "--x"


def test_no_task_takes_the_name_of_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    clashing = dataclasses.make_dataclass("Config", [("check", int, 0)], frozen=True)
    monkeypatch.setattr(fake_task, "Config", clashing)
    with pytest.raises(TypeError, match=r"fields named as options of every task: \['check'\]"):
        main(["fake", "small.yaml"])


def test_what_is_logged_for_the_user_is_a_plain_line() -> None:
    words = ["train", "configs/quickstart/nsa_sparse.yaml", "--model.attention", "full", "--print-config"]
    process = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words], capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    assert re.fullmatch(
        r"configs/quickstart/nsa_sparse\.yaml:\d+: model\.attention: left out.*\n", process.stderr
    )


def test_a_failed_point_of_a_sweep_is_noted_and_the_others_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "fake",
        "small.yaml",
        "--sweep",
        "stop=['',user,'']",
        "rate=[0.5,0.25,0.1]",
        "--sweep-mode",
        "zip",
    ]
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err == "error: the rate is wrong; lower it\n"
    assert "failed: the rate is wrong; lower it" in said.out
    assert "1 of 3 points failed" in said.out
    (table,) = Path("outputs/sweeps").glob("fake-small-*/sweep.json")
    rows = json.loads(table.read_text())["runs"]
    assert [row.get("error") for row in rows] == [None, "the rate is wrong; lower it", None]
    assert rows[2]["results"]["loss"] == pytest.approx(0.1**3)


def test_a_bug_in_a_point_of_a_sweep_is_status_1_and_the_others_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["fake", "small.yaml", "--sweep", "stop=[bug,user,'']"]
    assert main(words) == 1
    assert "ValueError: a bug" in capsys.readouterr().err  # with its traceback
    assert [config.stop for config in fake_task.calls] == ["bug", "user", ""]


def test_what_a_task_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = {"test": {"loss": 0.5, "exact": None}, "parameters": 3, "model": "model"}
    monkeypatch.setattr(fake_task, "run", lambda config, run: results)
    monkeypatch.setattr(
        fake_task, "SHOWN", ("test.loss", "test.exact", "parameters", "gone.x"), raising=False
    )
    assert main(["fake", "small.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "test.loss 0.5, parameters 3"
    assert main(["fake", "small.yaml", "--sweep", "rate=[1,2]"]) == 0
    assert "rate  test.loss  parameters  run" in capsys.readouterr().out
