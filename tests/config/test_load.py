"""What files and command lines become, and what is said about those that become nothing."""

import dataclasses
import types
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from jaxlab import config as configs
from jaxlab.config.command_line import from_mapping
from jaxlab.config.schema import fields_of
from jaxlab.errors import ConfigError
from tests.config.examples import (
    Attention,
    Constant,
    Cosine,
    Example,
    Gaussian,
    Linear,
    Model,
    Rule,
    Uniform,
)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_file_fills_defaults_and_groups(file: Any) -> None:
    path = file("steps: 10\nlambda: 1e-3\nbetas: [0, 1]\nmodel:\n  attention: {num_heads: 4}\n")
    config = configs.load(Example, path)
    assert config == Example(
        steps=10,
        lambda_=0.001,
        betas=(0.0, 1.0),
        # What the file does not name is taken from the field's own default, not from the class's.
        model=Model(width=32, attention=Attention(num_heads=4, num_kv_heads=4)),
    )
    assert isinstance(config.betas[0], float)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", 0.5),
        ("1", 1.0),
        ("[1, 0.5]", (1.0, 0.5)),
        ("[]", ()),
        ("[{pattern: a.*, value: 1}]", (Rule("a.*", 1.0),)),
    ],
)
def test_a_union_takes_the_member_that_fits(file: Any, text: str, expected: Any) -> None:
    assert configs.load(Example, file(f"steps: 1\nlambda_v: {text}\n")).lambda_v == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001),
        ("-1E+3", -1000.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("007", 7),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("no", "no"),
        ("on", "on"),
        ("'1'", "1"),
    ],
)
def test_scalars_hold_no_surprise(file: Any, text: str, expected: Any) -> None:
    value = configs.load(Example, file(f"steps: 1\nlimit: {text}\n")).limit
    assert value == expected
    assert isinstance(value, str) == isinstance(expected, str)


def test_words_of_the_command_line_win(file: Any) -> None:
    words = [
        "--steps=3",
        "--model.attention.num-heads",
        "16",
        "--remat",
        "--names",
        "x",
        "3",
        "--layers",
        "[1,2]",
    ]
    words += [
        "--note",
        "1e-3",
        "--init_from",
        "null",
        "--weights.a.b",
        "2",
        "--lambda",
        "-1",
        "--precision",
        "8",
    ]
    config = configs.load(Example, file("steps: 1\ninit_from: here\nweights: {c: 1}\n"), words)
    assert (config.steps, config.model.attention.num_heads, config.remat) == (3, 16, True)
    assert (config.names, config.layers, config.note, config.init_from) == (("x", "3"), (1, 2), "1e-3", None)
    assert (config.weights, config.lambda_, config.precision) == ({"c": 1.0, "a.b": 2.0}, -1.0, 8)


def test_values_of_a_program_pass_the_same_validation(file: Any) -> None:
    path = file("steps: 1\n")
    config = configs.load(
        Example, path, {"model.width": 8, "model.attention": {"kind": "nsa"}, "layers": (1,)}
    )
    assert config.model == Model(width=8, attention=Attention(kind="nsa", num_kv_heads=4))
    assert config.layers == (1,)
    assert configs.load(Example, path, {"teacher": Model(width=1)}).teacher == Model(width=1)
    assert configs.replace(config, {"model.width": 9}).model.width == 9
    with pytest.raises(ConfigError, match=r"--model\.width: expected int, found 8\.0"):
        configs.load(Example, path, {"model.width": 8.0})


MISTAKES = [
    ("stepz: 1", "{file}:1: stepz: unknown key; did you mean steps?"),
    ("steps: 1\nmodel:\n  widht: 3", "{file}:3: model.widht: unknown key; did you mean width?"),
    ("steps: 1\nnum_heads: 3", "{file}:2: num_heads: unknown key; did you mean model.attention.num_heads?"),
    ("steps: 1\nmodel.width: 3", "{file}:2: model.width: unknown key; write width below model, indented"),
    ("lambda: 1", "{file}: steps: missing; give it as int"),
    ("steps: four", "{file}:1: steps: expected int, found four"),
    ("steps: 1e4", "{file}:1: steps: expected int, found 10000.0"),
    ("steps: true", "{file}:1: steps: expected int, found true"),
    ("steps:", "{file}:1: steps: expected int, found nothing"),
    ("steps: 1\nremat: 1", "{file}:2: remat: expected true|false, found 1"),
    ("steps: 1\nnote: 1", "{file}:2: note: expected str, found 1; put it in quotes if it is a word"),
    ("steps: 1\nlayers: 3", "{file}:2: layers: expected [int, ...], found 3"),
    ("steps: 1\nlayers:\n - 1\n - b", "{file}:4: layers.1: expected int, found b"),
    ("steps: 1\nbetas: [1]", "{file}:2: betas: needs 2 values, found 1"),
    ("steps: 1\nrules: [{pattern: a}]", "{file}:2: rules.0.value: missing; give it as float"),
    (
        "steps: 1\nlambda_v: [{pattern: a, valve: 1}]",
        "{file}:2: lambda_v.0.valve: unknown key; did you mean value?",
    ),
    ("steps: 1\nweights: {a: b}", "{file}:2: weights.a: expected float, found b"),
    ("steps: 1\nweights: [1]", "{file}:2: weights: expected {{name: float, ...}}, found [1]"),
    ("steps: 1\nmodel: 3", "{file}:2: model: expected {{width, attention, dropout}}, found 3"),
    (
        "steps: 1\nmodel:\n  attention:\n    kind: nsaa",
        "{file}:4: model.attention.kind: expected full|sliding|nsa, found nsaa; did you mean nsa?",
    ),
    (
        "steps: 1\nmodel:\n  attention:\n    num_heads: 6",
        "{file}:4: model.attention.num_heads: 6 heads cannot be shared by 4 key/value heads",
    ),
    (
        "steps: 1\nmodel:\n  attention:\n    num_kv_heads: 3",
        "{file}:3: model.attention.num_heads: 8 heads cannot be shared by 3 key/value heads",
    ),
    ("steps: 1\nsteps: 2", "{file}:2: steps: given twice, first in line 1"),
    ("- 1", "{file}: expected lines of `key: value`, found [1]"),
    ("steps: [1", "{file}:1: not YAML: expected ',' or ']', but got '<stream end>'"),
    ("steps: &a 1", "{file}:1: not YAML: anchors and aliases are not used here"),
    ("steps: !!python/name:os.system x", "{file}:1: steps: the tag python/name:os.system is not used here"),
    ("1: 2", "{file}:1: a key must be a word, found 1; put it in quotes if it is one"),
    ("steps: 1\n---\nsteps: 2", "{file}:2: not YAML: but found another document"),
    ("steps: 1\nlambda: 1e999", "{file}:2: lambda: 1e999 is too large for a float"),
    ("steps: 1\nlambda: .nan", "{file}:2: lambda: must be a finite number, is .nan"),
    ("steps: 1\nlambda: -.inf", "{file}:2: lambda: must be a finite number, is -.inf"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_a_mistake_in_a_file_is_named(file: Any, text: str, message: str) -> None:
    path = file(text)
    with pytest.raises(ConfigError) as caught:
        configs.load(Example, path)
    assert str(caught.value) == message.format(file=path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.widht", "3"], "--model.widht: unknown option; did you mean --model.width?"),
        (["--num_heads", "3"], "--num_heads: unknown option; did you mean --model.attention.num_heads?"),
        (["--qqqqqq", "3"], "--qqqqqq: unknown option; --help lists the options"),
        (["--steps"], "--steps: needs a value: int"),
        (["--steps", "--remat"], "--steps: needs a value: int"),
        (["--steps", "a"], "--steps: expected int, found a"),
        (["--steps", "1", "2"], "'2' is not expected; options begin with --"),
        (["--steps.a", "1"], "--steps.a: unknown option; did you mean --steps?"),
        (["--betas", "1", "2", "3"], "--betas: needs 2 values, found 3"),
        (["--model", "3"], "--model: expected {width, attention, dropout}, found 3"),
        (
            ["--model.attention.num_heads=6"],
            "--model.attention.num_heads: 6 heads cannot be shared by 4 key/value heads",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_named(file: Any, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(Example, file("steps: 1\n"), words)
    assert str(caught.value) == f"command line: {message}"


WHICH = "expected constant|linear|cosine, found "
MISTAKES_IN_UNIONS = [
    ("schedule: {cycles: 2}", "2: schedule.cycles: belongs to kind cosine, here is linear"),
    (
        "schedule:\n  kind: constant\n  final: 1",
        "4: schedule.final: belongs to kind linear and cosine, here is constant",
    ),
    ("schedule: {kind: cosine, cyles: 2}", "2: schedule.cyles: unknown key; did you mean cycles?"),
    ("schedule: {kind: cosine, cycles: 0}", "2: schedule.cycles: must be at least 1, is 0"),
    ("schedule: {kind: linear, shape: half}", "2: schedule.shape: expected straight|steps, found half"),
    ("schedule: consine", f"2: schedule.kind: {WHICH}consine; did you mean cosine?"),
    ("schedule:\n  kind: consine", f"3: schedule.kind: {WHICH}consine; did you mean cosine?"),
    ("schedule: {kind: 1}", f"2: schedule.kind: {WHICH}1"),
    ("schedule: 3", f"2: schedule: {WHICH}3"),
    ("noise: 3", "2: noise: expected gaussian|uniform|null, found 3"),
    ("noise: {edges: [0, 1]}", "2: noise.kind: missing; give it as gaussian|uniform"),
    ("noise: gaussian", "2: noise.deviation: missing; give it as float"),
    ("cycles: 2", "2: cycles: unknown key; did you mean schedule.cycles?"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES_IN_UNIONS)
def test_a_mistake_in_a_union_is_named(file: Any, text: str, message: str) -> None:
    path = file(f"steps: 1\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        configs.load(Example, path)
    assert str(caught.value) == f"{path}:{message}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("note: x", Linear(final=0.25)),
        ("schedule:", Linear(final=0.25)),
        ("schedule: {shape: steps}", Linear(final=0.25, shape="steps")),
        ("schedule: linear", Linear(final=0.25)),
        # The field's default is of another kind: nothing of it is left.
        ("schedule: cosine", Cosine()),
        ("schedule: constant", Constant()),
        ("schedule: {kind: cosine, cycles: 3}", Cosine(cycles=3)),
    ],
)
def test_a_group_is_of_the_kind_that_it_names(file: Any, text: str, expected: Any) -> None:
    config = configs.load(Example, file(f"steps: 1\n{text}\n"))
    assert config.schedule == expected
    assert configs.load(Example, file(configs.dump(config))) == config
    assert configs.load(Example, None, from_mapping(Example, configs.to_dict(config))) == config


def test_a_group_that_may_be_missing(file: Any) -> None:
    load = lambda text, *words: configs.load(Example, file(f"steps: 1\n{text}\n"), words).noise
    assert load("") is None
    assert load("noise: null") is None
    assert load("noise: uniform") == Uniform()
    assert load("noise: {kind: gaussian, deviation: 2}") == Gaussian(deviation=2.0)
    assert load("noise: uniform", "--noise", "null") is None
    assert load("", "--noise.deviation", "2", "--noise", "gaussian") == Gaussian(deviation=2.0)
    assert load("", "--noise", "null", "--noise.kind", "uniform") == Uniform()
    assert configs.load(Example, None, ["--steps=1", "--teacher.width=3"]).teacher == Model(width=3)


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("cosine", ["--schedule.cycles", "4"], Cosine(cycles=4)),
        ("{kind: cosine, cycles: 2}", ["--schedule.final=1"], Cosine(cycles=2, final=1.0)),
        ("constant", ["--schedule.cycles=4", "--schedule.kind=cosine"], Cosine(cycles=4)),
        (
            "constant",
            ["--schedule", "{kind: cosine, cycles: 4}", "--schedule.final=1"],
            Cosine(cycles=4, final=1.0),
        ),
        # The last word about a kind counts; values that the new kind takes too stay.
        ("{kind: linear, final: 0.5}", ["--schedule=constant", "--schedule=cosine"], Cosine()),
        ("{kind: linear, final: 0.5}", ["--schedule", "cosine"], Cosine(final=0.5)),
    ],
)
def test_the_command_line_sets_kinds_and_what_is_in_them(
    file: Any, caplog: pytest.LogCaptureFixture, text: str, words: list[str], expected: Any
) -> None:
    assert configs.load(Example, file(f"steps: 1\nschedule: {text}\n"), words).schedule == expected
    assert len(caplog.messages) == ("constant" in words[0])


def test_what_another_kind_does_not_take_is_left_out_and_said(
    file: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = file("steps: 1\nschedule:\n  kind: cosine\n  final: 0.5\n  cycles: 3\n")
    for words in (["--schedule=linear"], ["--schedule.kind", "linear"], {"schedule": "linear"}):
        caplog.clear()
        config = configs.load(Example, path, words)
        assert config.schedule == Linear(final=0.5)
        assert caplog.messages == [f"{path}:5: schedule: left out, the kind is linear now: cycles"]
    # What the command line itself says for another kind is a mistake.
    with pytest.raises(
        ConfigError, match=r"^command line: --schedule\.cycles: belongs to kind cosine, here is linear$"
    ):
        configs.load(Example, path, ["--schedule.cycles", "4", "--schedule.kind", "linear"])
    # A file that leaves the kind to the default has not said what its values are for.
    path = file("steps: 1\nschedule:\n  shape: straight\n")
    with pytest.raises(
        ConfigError, match=r"x\.yaml:3: schedule\.shape: belongs to kind linear and cosine, here is constant$"
    ):
        configs.load(Example, path, ["--schedule=constant"])
    caplog.clear()
    config = configs.replace(Example(steps=1, schedule=Cosine(cycles=2)), {"schedule": "constant"})
    assert (config.schedule, caplog.messages) == (Constant(), [])


def test_unions_that_cannot_be_told_apart_are_refused() -> None:
    def frozen(name: str, *fields: Any) -> Any:
        return dataclasses.make_dataclass(name, fields, frozen=True)

    plain = frozen("Plain", ("x", int, 0))
    one = frozen("One", ("kind", Literal["one"], "one"), ("x", int, 0))
    two = frozen("Two", ("kind", Literal["two"], "two"), ("x", str, ""))
    for union in (plain | one, one | frozen("Also", ("kind", Literal["one"], "one"))):
        with pytest.raises(TypeError, match="need a field `kind` each, with a word of its own"):
            fields_of(frozen("Config", ("group", union)))
    with pytest.raises(TypeError, match=r"Two\.x: <class 'str'>, but <class 'int'> in other kinds"):
        fields_of(frozen("Config", ("group", one | two)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("steps: 1\n")
    with pytest.raises(
        ConfigError, match=r"smal\.yaml: cannot be read: No such file .*; did you mean .*small\.yaml\?"
    ):
        configs.load(Example, tmp_path / "smal.yaml")


def test_dump_keeps_the_words_of_the_file(file: Any) -> None:
    text = configs.dump(configs.load(Example, file("steps: 1\nlambda: 1e-5\nnote: 'no'\nbetas: [0.5, 1]\n")))
    assert text.startswith(
        "steps: 1\nlambda: 1e-05\nlambda_v: 0.9\nlearning_rate: 0.001\nbetas: [0.5, 1.0]\n"
    )
    assert configs.dump(configs.load(Example, file(text))) == text


def test_classes_that_cannot_be_configs_are_refused() -> None:
    frozen: Any = dataclasses.make_dataclass("Frozen", [("x", set)], frozen=True)
    with pytest.raises(TypeError, match=r"Frozen\.x: configs cannot hold the type <class 'set'>"):
        fields_of(frozen)
    thawed: Any = dataclasses.make_dataclass("Thawed", [("x", int)])
    with pytest.raises(TypeError, match="not a frozen dataclass"):
        fields_of(thawed)
    with pytest.raises(TypeError, match="not a frozen dataclass"):
        fields_of(types.SimpleNamespace)


def test_errors_stay_on_one_line() -> None:
    error = ConfigError("two\nlines\u2028and \x1b[31m colour \ud800", key="a")
    assert str(error) == "a: two lines and \\x1b[31m colour \\ud800"


@dataclasses.dataclass(frozen=True)
class Free:
    """A config that takes keys of which another place knows what they may be."""

    name: str = "x"
    rest: Annotated[dict[str, float | tuple[float, ...]], configs.OTHERS] = dataclasses.field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        if "wrong" in self.rest:
            raise ConfigError("is not known there", key="wrong")


def test_keys_that_no_field_has_may_go_to_one(file: Any) -> None:
    config = configs.load(Free, file("a: 1\nname: y\nb: [0.5, 2]\n"))
    assert config == Free("y", {"a": 1.0, "b": (0.5, 2.0)})
    assert configs.to_dict(config) == {"name": "y", "a": 1.0, "b": [0.5, 2.0]}
    assert configs.load(Free, file(configs.dump(config))) == config
    for text, message in {
        "name: y\na: word\n": r"x\.yaml:2: a: expected float\|\[float, \.\.\.\], found word",
        "name: y\n\nwrong: 1\n": r"x\.yaml:3: wrong: is not known there",
        "rest: {a: 1}\n": r"x\.yaml:1: rest: expected float",
    }.items():
        with pytest.raises(ConfigError, match=message):
            configs.load(Free, file(text))


@dataclasses.dataclass(frozen=True)
class Asked:
    """A set of questions."""

    path: str
    limit: int = 0


@dataclasses.dataclass(frozen=True)
class Named:
    """A config with groups under names of one's own."""

    sets: dict[str, Asked]
    scores: dict[str, float] = dataclasses.field(default_factory=dict)


def test_fields_of_groups_under_free_names_from_the_command_line(file: Any) -> None:
    text = "sets: {one: {path: a}, t.w.o: {path: b, limit: 3}}\n"
    words = ["--sets.one.limit=5", "--sets.one.path", "c", "--sets.three.path=d", "--scores.a.limit=0.5"]
    config = configs.load(Named, file(text), words)
    assert config.sets == {"one": Asked("c", 5), "t.w.o": Asked("b", 3), "three": Asked("d")}
    assert config.scores == {"a.limit": 0.5}  # a name, of what has no fields
    config = configs.load(Named, file(text), ["--sets.t.w.o={path: e}"])
    assert config.sets["t.w.o"] == Asked("e", 3)
    with pytest.raises(ConfigError, match=r"sets\.one\.limit: expected int, found many"):
        configs.load(Named, file(text), ["--sets.one.limit=many"])
