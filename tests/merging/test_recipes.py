"""Recipes: every parameter of every operator, every number by layer and name, checked where it stands."""

import json

import numpy as np
import pytest

from jaxlab.checkpoints import open_model
from jaxlab.checkpoints.tensor_folder import open_folder
from jaxlab.config import build, dump
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.merging import (
    AFTERWARDS,
    OPERATORS,
    InjectRecipe,
    MergeRecipe,
    Rule,
    check_same_architecture,
    load_recipe,
    merge_tensors,
    notes_of,
    operator_named,
    prepare_merge,
    tensor_key,
    write_merge,
)
from jaxlab.tasks import main
from tests.merging.test_engine import llama

NAMES = [
    f"model.layers.{i}.{part}.weight"
    for i in range(2)
    for part in ("mlp.up_proj", "self_attn.q_proj", "input_layernorm")
]
NORM = "model.norm.weight"
GIVEN = {"layer_swap": {"bottom": 1}, "lines": {"alpha": 0.5, "beta": 1.0}, "nearswap": {"t": 0.1}}
"""What some operators cannot do without."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one", "two", "three")):
        llama(folder / name, seed, dtype=np.float32)
    return folder


def injection(place, **more):
    roles = {role: str(place / name) for role, name in (("vlm", "one"), ("expert", "two"), ("base", "base"))}
    return build(InjectRecipe, {**roles, "lambda_v": 0.9, "lambda_e": 0.4, **more})


def merging(place, **more):
    models = [{"model": str(place / name)} for name in ("one", "two")]
    return build(MergeRecipe, {"models": models, "base": str(place / "base"), **more})


def written(recipe, out):
    models = [open_model(reference) for reference in recipe.references()]
    write_merge(prepare_merge(recipe, models), out, overwrite=True)
    return {name: tensor.read() for name, tensor in open_folder(out).items()}


def planned(recipe):
    models = [open_model(reference) for reference in recipe.references()]
    return {t.name: t.merging for t in prepare_merge(recipe, models).plan.tensors if t.merging is not None}


def sources(place, *names):
    return [open_folder(place / name) for name in names]


def test_every_number_may_change_over_layers_by_name_and_by_model(place, tmp_path):
    """What is written is what the operator gives with the numbers of that tensor."""
    rules = [{"filter": "mlp", "value": [0.2, 0.6]}, {"pattern": "*norm*", "value": 1.0}, {"value": 0.5}]
    recipe = injection(
        place,
        operator="breadcrumbs",
        lambda_v=[1.0, 0.5],
        lambda_e=[{"pattern": "*.q_proj.*", "value": [0.1, 0.9]}, {"value": 0.3}],
        density={"vlm": rules, "expert": [0.9, 0.7]},
        gamma=[{"filter": "layers.1.", "value": 0.2}, {"value": 0.0}],
        rescale=[{"filter": "mlp", "value": True}, {"value": False}],
    )
    got = written(recipe, tmp_path / "out")
    one, two, base = sources(place, "one", "two", "base")
    expected = {}
    for layer in range(2):
        start = f"model.layers.{layer}."
        gamma, lambda_v, expert = (0.0, 0.2)[layer], (1.0, 0.5)[layer], (0.9, 0.7)[layer]
        expected[start + "mlp.up_proj.weight"] = lambda_v, 0.3, [(0.2, 0.6)[layer], expert], gamma, True
        expected[start + "self_attn.q_proj.weight"] = (
            lambda_v, (0.1, 0.9)[layer], [0.5, expert], gamma, False
        )  # fmt: skip
        expected[start + "input_layernorm.weight"] = lambda_v, 0.3, [1.0, expert], gamma, False
    expected[NORM] = 0.5, 0.3, [1.0, 0.7], 0.0, False
    for name, (lambda_v, lambda_e, density, gamma, rescale) in expected.items():
        want = merge_tensors(
            "breadcrumbs",
            [one[name].read(), two[name].read()],
            base=base[name].read(),
            weight=[lambda_v, lambda_e],
            density=density,
            gamma=gamma,
            rescale=rescale,
        )
        np.testing.assert_array_equal(got[name], want, err_msg=name)


def test_numbers_of_a_merge(place, tmp_path):
    models = [
        {"model": str(place / "one"), "weight": [0.2, 1.0], "density": 0.5},
        {"model": str(place / "two"), "density": [{"filter": "mlp", "value": 0.25}, {"value": 1.0}]},
    ]
    recipe = merging(place, models=models, operator="ties", weight=2.0, **{"lambda": [0.5, 1.5]})
    got = written(recipe, tmp_path / "out")
    one, two, base = sources(place, "one", "two", "base")
    for layer, weight, lam in ((0, 0.2, 0.5), (1, 1.0, 1.5)):
        for part, density in (("mlp.up_proj", 0.25), ("self_attn.q_proj", 1.0)):
            name = f"model.layers.{layer}.{part}.weight"
            want = merge_tensors(
                "ties",
                [one[name].read(), two[name].read()],
                base=base[name].read(),
                weight=[weight, 2.0],
                density=[0.5, density],
                **{"lambda": lam},
            )
            np.testing.assert_array_equal(got[name], want, err_msg=name)
    steps = planned(merging(place, operator="slerp", base=None, t=[0.25, 0.75]))
    assert [dict(steps[f"model.layers.{i}.mlp.up_proj.weight"].parameters) for i in (0, 1)] == [
        {"t": 0.25}, {"t": 0.75}
    ]  # fmt: skip


def test_a_gradient_has_the_values_it_lists_and_lines_between(tmp_path):
    from jaxlab.merging.numbers import Setting
    from jaxlab.merging.schedules import Place, value_at

    at = lambda values, layers: [
        value_at("x", Setting.of(values), Place("", i, layers, False)) for i in range(layers)
    ]
    listed = np.random.default_rng(0).uniform(size=97).tolist()
    assert at(listed, 97) == listed  # exactly
    np.testing.assert_allclose(at([0.0, 1.0], 5), [0, 0.25, 0.5, 0.75, 1], rtol=1e-15)
    np.testing.assert_allclose(at([0, 1, 0], 5), [0, 0.5, 1, 0.5, 0], rtol=1e-15)
    assert at([0.3], 3) == [0.3] * 3
    ends = [value_at("x", Setting.of([0.1, 0.2]), Place("", None, 2, before)) for before in (True, False)]
    assert ends == [0.1, 0.2]
    with pytest.raises(UserError, match="x lists 3 values for 2 layers"):
        at([1.0, 2.0, 3.0], 2)


@pytest.mark.parametrize(
    "operator",
    [
        "ties+svc",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("svc", "dare_linear+subspace_boosting")),
    ],
)
def test_what_follows_an_operator(place, tmp_path, operator):
    first, _, after = operator.rpartition("+")
    assert after in AFTERWARDS
    options = {"density": 0.5} if first else {}
    got = written(injection(place, operator=operator, seed=3, **options), tmp_path / "out")
    one, two, base = sources(place, "one", "two", "base")
    fixed = {"normalize": False} if "normalize" in operator_named(operator).parameters else {}
    for name in NAMES[:3]:
        more = {"key": tensor_key(3, name)} if first == "dare_linear" else {}
        want = merge_tensors(
            operator, [one[name].read(), two[name].read()], base=base[name].read(), weight=[0.9, 0.4],
            **options, **fixed, **more,
        )  # fmt: skip
        np.testing.assert_allclose(got[name], want, rtol=2e-5, atol=2e-5)


WITHOUT_DATA = [
    name
    for name in (*OPERATORS, *AFTERWARDS)
    if not (operator_named(name).takes("statistics") and name != "trust_region")
    and not operator_named(name).per_task
]
QUICK = ("nearswap",)


@pytest.mark.parametrize(
    "operator",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WITHOUT_DATA],
)
def test_every_operator_without_data_is_injected(place, tmp_path, operator, capsys):
    """From a file to a folder; what cannot be injected says so."""
    known = operator_named(operator)
    lines = {"kind": "inject", "operator": operator, "lambda_v": 0.9, "lambda_e": 0.4}
    lines |= {role: str(place / name) for role, name in (("vlm", "one"), ("expert", "two"), ("base", "base"))}
    lines |= {"density": 0.5} if "density" in known.parameters else GIVEN.get(operator, {})
    (tmp_path / "r.yaml").write_text(json.dumps(lines))
    status = main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), "--verify"])
    printed = capsys.readouterr()
    if operator == "passthrough":
        assert status == 2
        assert "passthrough cannot be injected" in printed.err
        return
    assert status == 0
    found, models = open_folder(tmp_path / "out"), sources(place, "one", "two", "base")
    for name in (*NAMES, NORM):
        assert np.isfinite(found[name].read()).all()
        if name == NAMES[1]:
            assert all(np.any(found[name].read() != model[name].read()) for model in models), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operator": "ties"}, "density: ties needs it: one value, or one for each of vlm, expert"),
        ({"operator": "nearswap"}, "t: nearswap needs it"),
        ({"operator": "slerp", "t": 0.5}, "t: an injection has it from lambda_v and lambda_e; give these: "),
        ({"weight": 0.5}, "weight: an injection has no such key; the weights are lambda_v and lambda_e"),
        ({"expert": "", "experts": [{"model": "a"}, {"model": "x", "weight": 0.3}]},
         "experts.1.weight: an injection has no such key; an expert's weight is its lambda"),
        ({"expert": "", "experts": [{"model": "x", "density": 0.3}]}, "experts.0.density: task_arithmetic d"),
        ({"operator": "ties+ties", "density": 0.5}, "'ties' cannot follow an operator; .*svc.* can"),
        ({"operator": "ties+", "density": 0.5}, r"ties\+: nothing follows the \+; .*svc.* can"),
        ({"density": 0.5}, "density: task_arithmetic does not use it; .* no parameters .normalize and "),
        ({"operator": "layer_swap", "bottom": -1}, "bottom: must be 0 or more, is -1"),
        ({"operator": "wudi", "steps": -1}, "steps: must be 0 or more, is -1"),
        ({"operator": "wudi", "learning_rate": -0.1}, "learning_rate: must be 0 or more, is -0.1"),
        ({"operator": "optmerge", "momentum": 2.0}, "momentum: must be between 0 and 1, is 2"),
        ({"operator": "karcher", "max_iter": 0}, "max_iter: must be 1 or more, is 0"),
        ({"operator": "consensus_ta", "k": -1}, "k: must be 0 or more, is -1"),
        ({"normalize": True}, "normalize: an injection has it fixed at false; its weights are lambda_v and"),
        ({"operator": "ties", "densty": 0.5}, "densty: unknown key; did you mean density"),
        ({"lambda_x": 0.5}, "lambda_x: unknown key; did you mean lambda_[ve]"),
        ({"operator": "ties", "density": 1.5}, "density: must be between 0 and 1, is 1.5"),
        ({"operator": "ties", "density": [0.5, 1.5]}, "density: must be between 0 and 1"),
        ({"operator": "ties", "density": [{"filter": "mlp", "value": [2.0]}]}, "density: must be between"),
        ({"operator": "ties", "density": {"vlm": 0.5}}, "density: missing for expert"),
        ({"operator": "ties", "density": {"vlm": 0.5, "one": 1}}, "density: no model 'one'; there are vlm"),
        ({"operator": "sce", "select_topk": {"vlm": 1}}, "select_topk: is one for all models"),
        ({"operator": "ties", "density": 0.5, "rescale": 1}, "rescale: must be true or false, is 1"),
        ({"operator": "ties", "density": True}, "density: must be a number, is true"),
        ({"operator": "wudi", "steps": 1.5}, "steps: must be a whole number"),
        ({"operator": "wudi", "steps": [1, 2]}, "steps: has no values between others"),
        ({"operator": "ties_global", "density": [0.5, 0.1]}, "density: ties_global sees all tensors at once"),
        ({"lambda_e": "much"}, "lambda_e: must be a number, is 'much'"),
        ({"lambda_e": [{"value": 1.0, "patern": "x"}]}, "lambda_e.0.patern: unknown key; did you mean pat"),
        ({"operator": "tie"}, "no operator 'tie'; there are"),
        ({"operator": "emr"}, "emr makes a model for each task"),
    ],
)  # fmt: skip
def test_mistakes_in_an_injection(place, change, message):
    with pytest.raises(ConfigError, match=message):
        injection(place, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operator": "slerp", "base": None}, "t: slerp needs it"),
        ({"operator": "slerp", "base": None, "t": 0.5, "weight": 0.3}, "weight: slerp has no weights"),
        ({"operator": "linear"}, "base: linear takes no base"),
        ({"embeddings": "union"}, "embeddings: union makes a vocabulary of its own"),
        ({"operator": "linear", "base": None, "density": 1}, "density: linear does not use it; linear tak"),
        ({"operator": "ties", "k": 2}, "k: ties does not use it; ties takes density, "),
        ({"models": [{"model": "x", "lambda": 2.0}]}, "models.0.lambda: is one for all models; it be"),
        ({"models": [{"model": "x", "wieght": 2.0}]}, "models.0.wieght: unknown key; did you mean weight"),
        ({"operator": "linear", "base": None, "models": [{"model": "x", "density": 0.5}]},
         "models.0.density: linear does not use it"),
    ],
)  # fmt: skip
def test_mistakes_in_a_merge(place, change, message):
    with pytest.raises(ConfigError, match=message):
        merging(place, **change)


def test_mergekit_tolerates_what_it_does_not_use(place):
    with pytest.warns(UserNote, match="linear does not use density"):
        merging(place, operator="linear", base=None, mode="mergekit", density=0.5)
    with pytest.warns(UserNote, match="linear does not use density"):
        merging(
            place, models=[{"model": "x", "density": 0.5}, "y"], operator="linear", base=None, mode="mergekit"
        )
    recipe = merging(place, mode="mergekit", int8_mask=True)
    assert recipe.options() == {}
    with pytest.raises(ConfigError, match="unknown key"):
        merging(place, mode="mergekit", weigth=0.5)


def test_a_model_may_stand_alone_in_a_list(place):
    assert merging(place, models=["a", {"model": "b"}]) == merging(place, models=[{"model": "a"}, "b"])
    several = injection(place, expert="", experts=["a", {"model": "b", "lambda": 0.1}])
    assert [one.model for one in several.experts] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "kind: the file holds nothing; a recipe begins with kind: inject or kind: merge"),
        ("# all commented out\n", "kind: the file holds nothing"),
        ("kind:\nvlm: x\n", "kind: missing; a recipe begins with kind: inject or kind: merge"),
        ("kind: injct\n", "kind: no such kind of recipe, 'injct'; did you mean inject"),
    ],
)
def test_a_recipe_has_a_kind(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_a_merge_of_nothing_asks_for_a_recipe(capsys):
    assert main(["merge"]) == 2
    assert "RECIPES missing: name it, without a key" in capsys.readouterr().err


def test_a_recipe_is_written_as_it_is_read(place, tmp_path, capsys):
    rules = [{"pattern": "*mlp*", "value": [0.5, 1.0]}, {"value": 0.25}]
    for recipe in (
        injection(place, operator="breadcrumbs", density={"vlm": 0.5, "expert": rules}, gamma=0.1),
        merging(place, operator="ties", density=[0.1, 0.3], **{"lambda": rules}),
    ):
        (tmp_path / "r.yaml").write_text(dump(recipe))
        assert load_recipe(tmp_path / "r.yaml") == recipe
    assert recipe.parameters["lambda"][0] == Rule((0.5, 1.0), pattern="*mlp*")
    # A mistake has its place.
    (tmp_path / "r.yaml").write_text(dump(recipe).replace("density", "gamma"))
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]) == 2
    line = next(i for i, text in enumerate(dump(recipe).splitlines(), 1) if text.startswith("density"))
    assert f"r.yaml:{line}: gamma: ties does not use it" in capsys.readouterr().err


def test_a_vlm_that_is_its_own_expert_is_noted(place):
    def notes(recipe):
        return notes_of(prepare_merge(recipe, [open_model(one) for one in recipe.references()]))

    found = notes(injection(place, expert=str(place / "one")))
    assert f"the expert is the VLM: both are {place / 'one'}" in found
    assert not any("both are" in note for note in notes(injection(place)))


def test_a_pattern_that_matches_nothing(place):
    recipe = injection(place, operator="ties", density=[{"filter": "mlpp", "value": 0.1}, {"value": 0.5}])
    with pytest.raises(
        UserError, match="the pattern 'mlpp' of density matches no tensor that is merged; tens"
    ):
        planned(recipe)
    recipe = injection(
        place, operator="ties", density={"vlm": 1.0, "expert": [{"filter": "mlp", "value": 0.1}]}
    )
    with pytest.raises(UserError, match="no pattern of density of expert matches model"):
        planned(recipe)


def test_a_rule_that_decides_nothing(place):
    mlp, rest = {"filter": "mlp", "value": 0.1}, {"value": 0.5}
    for rules in ([rest, mlp], [mlp, {"pattern": "*.mlp.*", "value": 0.2}, rest]):
        with pytest.raises(UserError, match=r"mlp.*' of lambda_e decides nothing: rules before it fit all"):
            planned(injection(place, lambda_e=rules))
    planned(
        injection(place, lambda_e=[mlp, {"pattern": "*", "value": 0.2}, rest])
    )  # nothing is left for the last
    table = {"filter": "embed_tokens", "value": 0.1}
    with pytest.raises(UserError, match=r"merged: .*embed_tokens\.weight is copied \(embeddings: vlm\)"):
        planned(injection(place, lambda_e=[table, rest]))


def test_settings_that_cannot_be_averaged_are_decided_by_the_recipe(tmp_path, capsys):
    """The refusal names the line that is missing; what was kept is in the account and on the card."""
    for seed, (role, theta) in enumerate({"base": 1e4, "vlm": 1e6, "expert": 1e4}.items()):
        llama(tmp_path / role, seed)
        path = tmp_path / role / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": theta}))
    lines = {"kind": "inject", **{role: str(tmp_path / role) for role in ("vlm", "expert", "base")}}
    run = lambda out="out": main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / out)])
    (tmp_path / "r.yaml").write_text(json.dumps(lines))
    assert run() == 2
    error = capsys.readouterr().err
    assert "rope.theta is 1000000.0 in one, 10000.0 in the other" in error
    assert "say so with differences: {rope.theta: vlm}" in error
    (tmp_path / "r.yaml").write_text(json.dumps({**lines, "differences": {"rope.thta": "vlm"}}))
    assert run() == 2
    error = capsys.readouterr().err
    assert "differences: {rope.theta: vlm} (without 'rope.thta', in which they do not differ)" in error
    (tmp_path / "r.yaml").write_text(json.dumps({**lines, "differences": {"rope.theta": "vlm"}}))
    with pytest.warns(UserNote, match="rope.theta: 1000000.0 is kept, 10000.0 is not"):
        assert run() == 0
    made = json.loads((tmp_path / "out" / "account.json").read_text())
    others = {str(tmp_path / role): 1e4 for role in ("expert", "base")}
    assert made["differences"] == {"rope.theta": {"kept": 1e6, "others": others}}
    assert "| rope.theta | 1000000.0 | 10000.0 (" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 1e6
    (tmp_path / "r.yaml").write_text(
        json.dumps({**lines, "differences": {"rope.theta": "vlm", "mlp": "vlm"}})
    )
    assert run("again") == 2
    assert "the models do not differ in 'mlp'; they differ in rope.theta" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text(json.dumps({**lines, "differences": {"rope.theta": "expert"}}))
    assert run("again") == 2
    assert "differences.rope.theta: expected vlm, found expert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "waived"),
    [
        ({"rms_norm_eps": 0.1}, True),
        ({"sliding_window": 4, "model_type": "mistral"}, True),
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, False),
        ({"num_hidden_layers": 1, "rms_norm_eps": 0.1}, False),
        ({"attention_bias": True}, False),
    ],
)
def test_only_what_a_recipe_can_waive_is_offered(tmp_path, change, waived):
    llama(tmp_path / "one", 0)
    llama(tmp_path / "two", 1)
    path = tmp_path / "two" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    models = [open_model(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(UserError, match="say so with" if waived else "merge models of one architecture") as e:
        check_same_architecture(models)
    if waived:
        names = str(e.value).partition("differences: {")[2].rstrip("}").split(", ")
        assert check_same_architecture(models, [name.partition(":")[0] for name in names])


def test_several_experts(place, tmp_path):
    """Each with a lambda and parameters of its own; one expert in the list is the recipe with `expert`."""
    experts = [
        {"model": str(place / "two"), "lambda": [0.4, 0.2], "density": 0.25},
        {"model": str(place / "three")},
    ]
    recipe = injection(place, expert="", experts=experts, operator="ties", density=0.75, lambda_e=0.6)
    got = written(recipe, tmp_path / "out")
    *models, base = sources(place, "one", "two", "three", "base")
    for layer, lam in enumerate((0.4, 0.2)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        want = merge_tensors(
            "ties",
            [model[name].read() for model in models],
            base=base[name].read(),
            weight=[0.9, lam, 0.6],
            density=[0.75, 0.25, 0.75],
            normalize=False,
        )
        np.testing.assert_array_equal(got[name], want)
    assert load_recipe(dumped(recipe, tmp_path)) == recipe
    alone = injection(place, expert="", experts=[{"model": str(place / "two"), "lambda": 0.4}])
    both = [planned(one)[NAMES[0]] for one in (alone, injection(place))]
    assert both[0] == both[1]
    for change, message in {
        "slerp": "slerp merges two tensors",
        "nearswap": "nearswap merges a base and one model, not 2",
        "layer_swap": "layer_swap takes two models, not 3",
    }.items():
        recipe = injection(
            place, expert="", experts=experts[1:] * 2, operator=change, **GIVEN.get(change, {})
        )
        with pytest.raises(UserError, match=message):
            planned(recipe)
    with pytest.raises(ConfigError, match="experts: expert is given too"):
        injection(place, experts=experts)
    with pytest.raises(ConfigError, match=r"experts\.1\.t: task_arithmetic does not use it"):
        injection(place, expert="", experts=[experts[1], {"model": "x", "t": 0.1}])


def dumped(recipe, folder):
    (folder / "dumped.yaml").write_text(dump(recipe))
    return folder / "dumped.yaml"


@pytest.mark.parametrize("operator", ["tall", pytest.param("emr", marks=pytest.mark.slow)])
def test_a_model_of_one_task(place, tmp_path, operator):
    """Of operators that make a model for each task; which one is said."""
    name = NAMES[0]
    with pytest.raises(
        ConfigError, match=f"task: missing; {operator} makes a model for each task: one of vlm"
    ):
        injection(place, operator=operator)
    with pytest.raises(ConfigError, match="task: no task 'base'"):
        injection(place, operator=operator, task="base")
    with pytest.raises(ConfigError, match="task: ties makes one model for all tasks"):
        injection(place, operator="ties", density=0.5, task="vlm")
    if operator == "tall":
        models, base = sources(place, "one", "two"), sources(place, "base")[0]
        want = merge_tensors(
            operator, [model[name].read() for model in models], base=base[name].read(), weight=[0.9, 0.4]
        )
        got = [
            written(injection(place, operator=operator, task=t), tmp_path / "out") for t in ("vlm", "expert")
        ]
        for i, found in enumerate(got):
            np.testing.assert_array_equal(found[name], want[str(i)])
    found = {
        task: written(merging(place, operator=operator, task=task), tmp_path / "out")[name]
        for task in ("model 0", "model 1")
    }
    assert np.any(found["model 0"] != found["model 1"])


def test_an_expert_with_an_adapter(place, tmp_path, capsys):
    """Its matrices are made as they are read; nothing else is written."""
    from tests.checkpoints.test_lora import adapter, pair

    tensors, update = pair("model.layers.0.self_attn.q_proj", 8, 8)
    adapter(tmp_path / "lora", tensors)
    lines = {role: str(place / name) for role, name in (("vlm", "one"), ("base", "base"))}
    lines |= {"kind": "inject", "expert": f"{place / 'two'}+{tmp_path / 'lora'}", "lambda_v": 0.0}
    (tmp_path / "r.yaml").write_text(json.dumps(lines))
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), "--verify"]) == 0
    two, found = open_folder(place / "two"), open_folder(tmp_path / "out")
    np.testing.assert_allclose(
        found[NAMES[1]].read(), two[NAMES[1]].read() + 3 * update, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(found[NAMES[0]].read(), two[NAMES[0]].read(), rtol=1e-5, atol=1e-6)
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "lora")]) == 2
    assert "lora: is an input" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text(json.dumps(lines | {"expert": "a+b+c"}))
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "x")]) == 2
    assert "one with an adapter is named model+adapter" in capsys.readouterr().err
