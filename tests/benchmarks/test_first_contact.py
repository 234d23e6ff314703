"""The first minutes on a GPU, without one: what hangs, crashes or fails stops nothing else, and is told."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import first_contact
import pytest
from first_contact_parts import ceilings, report, runner, smoke
from first_contact_parts.runner import Outcome
from first_contact_parts.steps import Step

from jaxlab import config as configs
from jaxlab.config.command_line import from_mapping
from jaxlab.tasks import TASKS
from kernels_pallas.nsa import records
from kernels_pallas.nsa.checking import CASES

ROOT = Path(__file__).parents[2]
FAKES = "tests.benchmarks.first_contact_fakes"
BAD = ("hang", "crash", "memory", "killed", "lost", "wrong", "bad compile", "crashing compile", "import")


def fake(name, *parts, **more):
    return Step(name, FAKES, **{"limit_s": 30, "item_limit_s": 1.5, "parts": parts, "least_s": 0.1, **more})


def run(tmp_path, *steps, words=()):
    out = tmp_path / "out"
    status = first_contact.main(["--out", str(out), "--tiny", "--threads", "2", *words], steps)
    return status, out, json.loads((out / "results.json").read_text())


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(first_contact, "PATIENCE", {})


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A step of which every part breaks in its own way, and one after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_contact, "PATIENCE", {})
        steps = fake("breaks", *BAD), fake("timed", "fine", needs=("breaks",)), fake("last", "fine")
        was_lost = Path(tempfile.gettempdir()) / f"lost_{os.getpid()}"
        was_lost.unlink(missing_ok=True)
        try:
            return run(tmp_path_factory.mktemp("broken"), *steps, words=["--processes", "9"])
        finally:
            was_lost.unlink()


def rows(result, step="breaks"):
    (found,) = [s for s in result["steps"] if s["step"] == step]
    return found["rows"]


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("hang", "no answer for 1.5 s: killed"),
        ("crash", "signal 11 (SIGSEGV)"),
        ("memory", "MemoryError: out of memory"),
        ("killed", "signal 9 (SIGKILL, out of memory perhaps)"),
        ("lost", "JaxRuntimeError: INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("bad compile", "ValueError: no such layout"),
        ("crashing compile", "signal 11 (SIGSEGV)"),
    ],
)
def test_what_breaks_one_item_leaves_the_others(broken, part, told):
    _, _, result = broken
    here = [row for row in rows(result) if row["part"] == part]
    (failed,) = [row for row in here if "failed" in row]
    assert failed["item"] == part
    assert told in failed["failed"]
    assert {row["item"] for row in here if row.get("right")} == {"before", "after"}
    if part == "lost":  # a device that answers no more is left to a new process
        (after,) = [row["fact"]["process of lost"] for row in here if row["item"] == "after"]
        assert not failed["failed"].endswith(f" in {after}")
        assert failed["failed"].rpartition(" in ")[2].isdecimal()


def test_a_step_that_cannot_be_imported_says_so(broken):
    (row,) = [row for row in rows(broken[2]) if row["part"] == "import"]
    assert "exit status 1; last line: ImportError: no module of that name" in row["failed"]


def test_after_what_is_not_right_nothing_is_timed_and_the_rest_runs(broken):
    status, out, result = broken
    assert status == 1
    timed, last = result["steps"][1:]
    assert timed["dropped"] == "breaks found something wrong, or nothing"
    assert last["all_right"]
    summary = (out / "summary.md").read_text()
    for told in (
        "- breaks, hang: FAILED: no answer for 1.5 s: killed",
        "- breaks, wrong: error 5.00e-01; first at [3]: 1, float32 gives 2",
        "- timed: breaks found something wrong, or nothing",
    ):
        assert told in summary
    assert "no such layout" in (out / "log.txt").read_text()
    assert len(list(out.iterdir())) <= 4  # no partial files


def test_what_is_timed_compiles_together_and_runs_alone(tmp_path):
    step = fake("in turn", "turn a", "turn b", "turn c", in_turn=True)
    status, _, result = run(tmp_path, step, words=["--processes", "3"])
    assert status == 0
    taken = sorted((row["begin"], row["end"]) for row in rows(result, "in turn"))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(taken))
    assert max(row["prepared"] for row in rows(result, "in turn")) <= taken[0][0]


def test_a_small_budget_drops_the_last_steps_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESERVE_S", 0.2)
    steps = fake("first", "fine"), fake("slow one", "slow", limit_s=60), fake("last", "fine", least_s=5)
    status, out, result = run(tmp_path, *steps, words=["--budget", "5"])
    first, slow, last = result["steps"]
    assert first["all_right"]
    assert status == 1
    assert [row["item"] for row in slow["rows"] if row.get("right")] == ["fine"]
    (cut,) = [row for row in slow["rows"] if "cut" in row]
    assert cut["item"] == "slow"
    assert "s of 5 s were left" in last["dropped"]
    assert "## Dropped" in (out / "summary.md").read_text()


def test_without_a_gpu_it_stops_at_once_and_says_so(tmp_path):
    steps = fake("first", "stop", "fine"), fake("last", "fine")
    status, out, result = run(tmp_path, *steps)
    assert status == 1
    assert result["steps"][1]["dropped"] == "no GPU"
    assert "- last: no GPU" in (out / "summary.md").read_text()
    (words,) = ceilings.items({"tiny": False}, "")[1].run(None)
    assert words["stop"] == "jax sees no GPU here, only cpu; --tiny is a dry run without one"


def test_a_record_of_before_goes_where_the_check_runs_anew(tmp_path):
    run(tmp_path, fake("first", "fine"))
    record = tmp_path / "out" / "record.json"
    record.write_text("of an earlier run")
    run(tmp_path, fake("first", "fine"))
    assert record.exists()
    run(tmp_path, fake("correctness", "import"))
    assert not record.exists()


def test_what_was_found_stays_when_the_whole_is_ended(tmp_path):
    program = (
        "import first_contact, sys; from first_contact_parts.steps import Step; first_contact.PATIENCE = {};"
        f"steps = Step('one', '{FAKES}', 60, 60, parts=('fine', 'hang')),;"
        f"sys.exit(first_contact.main(['--out', {str(tmp_path / 'out')!r}, '--tiny'], steps))"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    process = subprocess.Popen([sys.executable, "-c", program], env=env, cwd=tmp_path)
    results = tmp_path / "out" / "results.json"

    def found():
        return (
            [r for s in json.loads(results.read_text())["steps"] for r in s["rows"]]
            if results.exists()
            else []
        )

    deadline = time.monotonic() + 60
    while len(found()) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert len(found()) == 4
    assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def entry(**changes):
    whole = {
        "operator": "selected_attention",
        "dtype": "bfloat16",
        "group": 16,
        "key_dim": 192,
        "value_dim": 128,
    }
    return {**whole, "right": True, **changes}


def outcome(*found):
    facts = {
        "device_kind": "NVIDIA H200",
        "kernels": "abc",
        "jax": "0.11.2",
        "jaxlib": "0.11.2",
        "driver": "1",
    }
    return [
        Outcome("ceilings", [{"name": "versions", "fact": facts}]),
        Outcome(
            "correctness",
            [{"name": "x", "item": "", "case": "c", "right": True, "error": 0.0, **r} for r in found],
        ),
    ]


ITEM = "paper | bfloat16 | 16 heads a group | 192/128 | 4097 tokens"


@pytest.mark.parametrize(
    ("found", "right"),
    [
        ([{"record": [entry()]}, {"record": [entry()]}], True),
        ([{"record": [entry()]}, {"record": [entry(right=False)]}], False),
        # What hung at another length, was cut off, or nobody knows.
        ([{"record": [entry()]}, {"item": f"{ITEM} | whole", "failed": "killed"}], False),
        ([{"record": [entry()]}, {"name": ITEM, "cut": "no time"}], False),
        ([{"record": [entry()]}, {"failed": "ImportError"}], False),
        # About other kernels.
        ([{"record": [entry()]}, {"item": f"{ITEM} | decode", "failed": "killed"}], True),
        (
            [{"record": [entry()]}, {"item": f"{ITEM} | whole".replace("192", "128"), "failed": "killed"}],
            True,
        ),
    ],
)
def test_the_record_trusts_what_was_right_everywhere(tmp_path, found, right):
    made = report.record(outcome(*found))
    (only,) = made["entries"]
    assert only["right"] is right
    path = tmp_path / "record.json"
    path.write_text(json.dumps(made))
    record = records.read(path)
    assert record.device_kind == "NVIDIA H200"
    assert record.right == {records.Key("selected_attention", "bfloat16", 16, 192, 128): right}


def test_the_parts_of_the_correctness_are_the_cases_of_the_check():
    (step,) = [step for step in first_contact.STEPS if step.name == "correctness"]
    assert sorted(step.parts) == sorted(case.label for case in CASES)


def test_the_steps_stand_in_the_order_of_their_worth():
    names = [step.name for step in first_contact.STEPS]
    assert names == ["ceilings", "kernels", "correctness", "times", "peers", "decode", "crossover", "smoke"]
    assert all(step.limit_s <= 150 for step in first_contact.STEPS)


def test_nothing_but_jax_and_numpy_is_needed():
    """The parent imports the standard library alone, the steps of the kernels jax and numpy."""
    program = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] in {'tyro', 'tqdm', 'jaxtyping', 'flax', 'etils', 'yaml', 'optax',"
        " 'torch', 'tokenizers', 'gguf', 'orbax', 'PIL', 'matplotlib', 'beartype'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import first_contact\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "from first_contact_parts import stand_in\n"
        "try: import jaxtyping\n"
        "except ModuleNotFoundError: pass\n"
        "else: raise AssertionError('nothing hides jaxtyping: this test says nothing')\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *x: None if name == 'jaxtyping' else find(name, *x)\n"
        "assert stand_in.put_in()\n"
        "import importlib\n"
        "options = {'tiny': True, 'peers': '', 'results': 'none.json'}\n"
        "for step in first_contact.STEPS[:-1]:\n"
        "    assert importlib.import_module(step.module).items(options, step.parts[0])\n"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--peers", "nowhere"], "--peers nowhere: there is no such folder"),
        (["--budget", "0"], "must be above 0"),
        (["--only", "tea"], "invalid choice: 'tea'"),
    ],
)
def test_wrong_arguments_are_told_before_anything_runs(tmp_path, capsys, words, told):
    with pytest.raises(SystemExit) as left:
        first_contact.main(["--out", str(tmp_path / "out"), *words])
    assert left.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "config", "more"),
    [
        ("train", "nsa_sparse", smoke.KERNELS | smoke.SHORT),
        ("train", "nsa_sparse", smoke.SMALL | smoke.SHORT),
        ("train", "nsa_full", smoke.SMALL | smoke.SHORT),
        ("train", "digits_base", smoke.SHORT),
        ("merge-search", "digits_search_french", smoke.ONE_POINT),
    ],
)
def test_what_the_smoke_changes_in_a_config_is_valid(monkeypatch, task, config, more):
    monkeypatch.chdir(ROOT)
    schema = TASKS.find(task).schema()
    configs.load(schema, f"{smoke.QUICKSTART}/{config}.yaml", from_mapping(schema, more))


def test_a_folder_of_somebody_else_stays_as_it_is(tmp_path, capsys):
    out = tmp_path / "out"
    assert run(tmp_path, fake("one", "fine"))[0] == 0
    assert run(tmp_path, fake("one", "fine"))[0] == 0  # what an earlier run wrote is written anew
    (out / "results.json").write_text("[1]")
    with pytest.raises(SystemExit):
        first_contact.main(["--out", str(out)])
    assert "results.json there is not of this script" in capsys.readouterr().err
    assert (out / "results.json").read_text() == "[1]"


def test_the_summary_names_errors_times_and_what_is_not_there():
    facts = {"device_kind": "NVIDIA H200", "copy_bytes_per_s": 4.3e12, "product_flops_per_s": 7.9e14}
    outcomes = [
        Outcome("ceilings", [{"name": "versions", "fact": facts}], 9.0),
        Outcome(
            "times",
            [
                {"name": "nsa, 65536 tokens, forward", "seconds": 0.03, "floor_s": 0.015},
                {"name": "nsa, 65536 tokens, backward", "seconds": 0.06},
                {"name": "choice alone", "seconds": 0.004},
            ],
            80.0,
        ),
        Outcome("peers", [{"name": "fla", "reason": "no --peers was given"}], 1.0),
    ]
    text = report.summary(outcomes, 90.0, 540)
    assert "copy 4.30 TB/s, bf16 product 790 TFLOP/s" in text
    assert "| nsa, 65536 tokens | 30.000 (50%) | 60.000 |" in text
    assert "| choice alone | 4.000 |  |" in text
    assert "- peers, fla: no --peers was given" in text
    assert text.startswith("# First contact: NVIDIA H200\n")


def test_what_was_cut_off_is_neither_right_nor_known_to_be_wrong():
    right, cut = {"name": "a", "right": True}, {"name": "b", "cut": "no time"}
    outcome = Outcome("x", [right, cut])
    assert (outcome.all_right, outcome.broken) == (False, False)
    for rows in (
        [],
        [cut],
        [right, {"name": "c", "failed": "killed"}],
        [right, {"name": "c", "right": False}],
    ):
        outcome = Outcome("x", rows)
        assert (outcome.all_right, outcome.broken) == (False, True)


@pytest.mark.slow
def test_the_whole_script_in_the_interpreter(tmp_path):
    """Every step at tiny sizes on the CPU: what is for a GPU alone says so, the rest is right."""
    command = [sys.executable, "benchmarks/first_contact.py", "--out", str(tmp_path / "out"), "--tiny"]
    command += ["--budget", "3000", "--processes", "2", "--threads", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    wrong = [
        row
        for step in result["steps"]
        for row in step["rows"]
        if row.get("right") is False or "failed" in row
    ]
    assert done.returncode == 0, (wrong, done.stderr)
    assert [step["step"] for step in result["steps"]] == [step.name for step in first_contact.STEPS]
    assert all(step["rows"] and not step["dropped"] for step in result["steps"])
    assert records.read(tmp_path / "out" / "record.json").right
