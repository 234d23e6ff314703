"""The page: everything on it is its own, every text is escaped, and missing parts are said."""

import html
import html.parser
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from jaxlab.app.cli import RunOptions
from jaxlab.config.schema import fields_of, leaves
from jaxlab.errors import UserError
from jaxlab.reporting import next_steps, plots, render
from jaxlab.reporting.folders import read_runs
from jaxlab.reporting.markup import Markup, join, tag
from jaxlab.reporting.papers.label_words.prompt_widget import SCRIPT
from jaxlab.tasks import TASKS, main
from tests.reporting import made

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert('x')</script>&\"$\\frac$"


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in ("meta", "img", "br"):
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.tags.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open[-1:] != ["script"]:
            self.words.append(data)
        elif self.tags[-1] == ("script", {"type": "application/json"}):
            self.words.append(str(json.loads(data)))
        else:
            self.scripts.append(data)


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("outputs")
    return [
        made.attention_speed(root, "nsa_speed-99999999"),
        made.train(root, "nsa_full-11111111", loss=2.0),
        made.train(root, "nsa_sparse-22222222", "nsa", 1.96),
        made.evaluate(root, "nsa_full_test-33333333", "nsa_full-11111111"),
        made.evaluate(root, "nsa_sparse_test-44444444", "nsa_sparse-22222222", nsa=True),
        made.search(root, "digits_search_french-55555555", "french", 0.9),
        made.search(root, "digits_search_format-66666666", "format", 0.8),
        made.search(root, "digits_search_arithmetic-77777777", "arithmetic", 0.2),
        made.icl(root, "icl_analysis-88888888"),
    ]


@pytest.fixture(scope="module")
def whole_page(everything) -> str:
    return render(read_runs(everything))


def check_self_contained(page: str) -> Reader:
    reader = Reader(page)
    assert not reader.open
    for script in reader.scripts:  # nothing runs but what draws figure 1
        assert script == SCRIPT or re.fullmatch(r'flowFigure\(document.getElementById\("[\w-]+"\)\);', script)
    for name, attributes in reader.tags:
        assert name not in ("link", "iframe", "object", "embed", "base", "foreignobject"), name
        for key in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (name, key, value[:80])
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", page))
    identifiers = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    referred = {a[key][1:] for _, a in reader.tags for key in ("href", "xlink:href") if key in a}
    assert {r for r in referred if not r.startswith("data:")} <= set(identifiers) | {""}
    return reader


def test_nothing_comes_from_elsewhere(whole_page):
    reader = check_self_contained(whole_page)
    assert [name for name, _ in reader.tags].count("section") == 4  # and what comes next
    images = [attributes for name, attributes in reader.tags if name == "img"]
    assert len(images) == 9  # three examples of three searches
    assert all(attributes["alt"] for attributes in images)
    drawings = [a for name, a in reader.tags if name == "svg"]
    assert len(drawings) >= 9
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)


def test_figures_take_the_colours_of_the_page(whole_page):
    assert "var(--ink)" in whole_page
    body = whole_page[whole_page.index("<body") :]
    for colour in (plots.INK, plots.FAINT, plots.RULE, *plots.SERIES):
        assert colour not in body


def test_commands_and_verdicts_are_on_the_page(whole_page):
    words = " ".join(Reader(whole_page).words)
    assert "python run.py merge-search configs/digits_search_french-55555555.yaml" in words
    for claim in ("N1", "N5", "M1", "M5", "I1", "I8"):
        assert claim in words
    assert "1 × cpu" in words
    assert "0123456789" in words
    assert "jax 0.11.2" in words


def test_time_of_attention_by_length_is_on_the_page(whole_page):
    words = " ".join(Reader(whole_page).words)
    assert "2.00 × dense attention's time over NSA's, forward and backward" in words
    assert "at 8\u202f192 tokens (0.50 × at 2\u202f048); test loss −1.9\u00a0% beside full attention" in words
    assert "chunked 1.50 s, query_stretches 2.50 s" in words
    assert "seconds of processor" in words


def test_what_cannot_be_seen_is_on_the_card_with_what_would_show_it(whole_page):
    cards = re.findall(r'<a class="card".*?</a>', whole_page)
    assert [("configs/nsa/" in card, "I5, I6, I7, I8" in card) for card in cards] == [
        (True, False),
        (False, False),
        (False, True),
    ]


def test_the_page_ends_with_commands_that_exist(whole_page):
    end = whole_page[whole_page.index('id="next"') :]
    for _, commands in next_steps.STEPS:
        for command in commands:
            assert html.escape(command, quote=True) in end
            program, script, task, *words = shlex.split(command)
            assert (program, script) == ("python", "run.py")
            schema = TASKS.find(task).schema()
            given = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
            assert given <= {*leaves(schema), *fields_of(RunOptions)}, command
            files = [word for word in words if word.startswith("configs/")]
            assert all((ROOT / file).is_file() for file in files), command


def test_every_text_is_escaped(tmp_path):
    train = made.train(tmp_path, "x-12345678", command=EVIL, versions={"python": EVIL}, device_kind=EVIL)
    runs = [train, made.search(tmp_path, "s-12345678", "french", 0.9), made.icl(tmp_path, "i-12345678")]
    read = read_runs(runs)
    for example in read[1].results["examples"]:
        example["question"] = example["expected"] = EVIL
        example["answers"] = {EVIL: EVIL}
    read[1].config["expert"] = EVIL
    read[2].results["figure1"] |= {"tokens": [EVIL] * 13, "answer": EVIL, "prediction": EVIL}
    evil = tmp_path / "train" / "<img src=x onerror=alert(1)>"
    shutil.copytree(train, evil)
    reader = check_self_contained(render([*read, *read_runs([evil])]))
    words = "".join(reader.words)
    assert words.count(EVIL) >= 20
    assert "<img src=x onerror=alert(1)>" in words


def test_markup_escapes_what_it_did_not_make():
    built = tag("p", "<b>", tag("i", 'a "b"'), None, ["&", 3], title='"<')
    assert built == '<p title="&quot;&lt;">&lt;b&gt;<i>a &quot;b&quot;</i>&amp;3</p>'
    assert isinstance(join([built, "x"]), Markup)
    assert join([Markup("<br>"), "<br>"]) == "<br>&lt;br&gt;"


def test_a_single_train_run(tmp_path, capsys):
    out = tmp_path / "deep" / "page.html"
    assert main(["report", str(made.train(tmp_path, "some_model-12345678")), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    reader = check_self_contained(out.read_text())
    words = " ".join(reader.words)
    assert "some_model" in words
    assert "test.eval_loss" in words
    assert "Loss while training." in words
    assert "Not on this page" not in words
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]


def test_runs_without_a_part_stand_under_other_runs(tmp_path):
    runs = [
        made.train(tmp_path, "nsa_sparse-22222222", "nsa", 1.96),
        made.train(tmp_path, "unrelated-12345678", kind="digits"),
    ]
    words = " ".join(Reader(render(read_runs(runs))).words)
    assert "Other runs" in words
    assert "unrelated" in words
    assert "Loss while training, of all runs" not in words  # only one is left over
    assert "No run with full attention was given" in words
    assert "The chosen blocks were not recorded" in words
    assert "Not on this page: skill injection. It needs a merge-search run." in words
    assert "Not on this page: in-context learning. It needs an icl run." in words


def test_the_losses_of_several_runs_are_drawn_together(tmp_path):
    runs = [made.train(tmp_path, f"run_{name}-1234567{name}", kind="digits") for name in "12"]
    page = render(read_runs(runs))
    words = " ".join(Reader(page).words)
    assert "Loss while training, of all runs." in words
    together = page[page.index("runs-loss") :]
    assert together.index("run_1") < together.index("run_2")


def test_parts_of_results_may_be_missing(tmp_path):
    sparse = made.train(tmp_path, "nsa_sparse-22222222", "nsa", tokens_per_second=None, attended_tokens=None)
    icl = made.icl(tmp_path, "icl-12345678", flows=None, blocking=None, figure1=None)
    search = made.search(tmp_path, "s-12345678", "french", 0.5, examples=False)
    runs = read_runs([made.train(tmp_path, "nsa_full-11111111", test=None), sparse, icl, search])
    runs[3].results["unmerged"] = {}
    words = " ".join(check_self_contained(render(runs)).words)
    assert "Flows were not analysed in this run." in words
    assert "Blocking was not analysed in this run." in words
    assert "No scenario of this kind in the search." in words


def test_loaded_models_are_named(whole_page, tmp_path):
    words = " ".join(Reader(whole_page).words)
    assert (
        "Loaded, not trained in these runs: outputs/train/digits_vlm (read by digits_search_french)" in words
    )
    assert "assets/icl_model (made by configs/quickstart/icl_model.yaml, read by icl_analysis)" in words
    assert "read by nsa_sparse_test" not in words
    trained = [
        made.train(tmp_path, "nsa_sparse-22222222", "nsa"),
        made.evaluate(tmp_path, "nsa_sparse_test-44444444", "nsa_sparse-22222222", nsa=True),
    ]
    words = " ".join(Reader(render(read_runs(trained))).words)
    assert "Every model on this page was trained by a run named on it; none was loaded." in words


def test_damaged_and_unfinished_folders(tmp_path):
    run = made.train(tmp_path, "a-12345678")
    (run / "env.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_runs([run])
    (run / "results.json").unlink()
    with pytest.raises(UserError, match=r"no results\.json"):
        read_runs([run])


def test_a_folder_given_twice_is_read_once(tmp_path):
    run = made.train(tmp_path, "a-12345678")
    assert len(read_runs([run, str(run), run / ".." / run.name])) == 1


def test_unfinished_and_damaged_runs_are_named_and_the_others_shown(tmp_path, capsys):
    whole = made.train(tmp_path, "whole-12345678")
    bad = {
        name: made.train(tmp_path, f"{name}-12345678", "nsa")
        for name in ("unfinished", "cut", "list", "env", "metrics")
    }
    (bad["unfinished"] / "results.json").unlink()
    (bad["cut"] / "results.json").write_text('{"a": ')
    (bad["list"] / "results.json").write_text('{"validation": 3, "test": [], "parameters": "many"}')
    (bad["env"] / "env.json").write_text("[1]")
    (bad["metrics"] / "metrics.jsonl").write_bytes(b"\xff\n")
    out = tmp_path / "page.html"
    assert main(["report", *map(str, [*bad.values(), whole]), "--out", str(out)]) == 0
    page, said = out.read_text(), capsys.readouterr().err
    assert "whole-12345678" in page
    for name, folder in bad.items():
        assert f"left out: {folder}" in said, name
        assert str(folder) in page
    assert main(["report", *map(str, bad.values()), "--out", str(out)]) in (0, 2)
    assert main(["report", str(bad["unfinished"]), "--out", str(out)]) == 2
    assert "no results.json" in capsys.readouterr().err
