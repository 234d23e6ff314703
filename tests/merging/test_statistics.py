"""Operators with data, from a recipe: what is measured is what its definition says, and a file keeps it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from jaxlab.checkpoints import open_model
from jaxlab.checkpoints.tensor_folder import open_folder
from jaxlab.config import build
from jaxlab.errors import ConfigError, UserError
from jaxlab.merging import InjectRecipe, MergeData, MergeRecipe, merge_tensors, prepare_merge
from jaxlab.merging.measuring import measure_statistics
from jaxlab.merging.preparing import prepared_statistics
from jaxlab.merging.statistics import gradient_statistics, gram_matrices, read_texts, text_batches
from jaxlab.merging.statistics_file import save_statistics
from jaxlab.models import activations, forward
from jaxlab.tasks import main
from tests.merging.test_engine import llama

TEXTS = {"vlm": ["a b c d e f", "b d f h"], "expert": ["h g f e d c b a", "a a b", "c"]}
UP, DOWN, OUT = (f"model.layers.1.{n}.weight" for n in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"))
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcdefgh")}, unk_token="a"))
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary.pre_tokenizer = Whitespace()
    for seed, role in enumerate(("base", "vlm", "expert")):
        llama(folder / role, seed, dtype=np.float32)
        (folder / role / "tokenizer.json").write_text(vocabulary.to_str())
    for role, texts in TEXTS.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{role}.jsonl").write_text(lines)
    (folder / "all.txt").write_text("\n".join([*TEXTS["vlm"], "", *TEXTS["expert"]]))
    return folder


def injection(place, operator, **more):
    roles = {role: str(place / role) for role in ("vlm", "expert", "base")}
    data = {"text": {role: str(place / f"{role}.jsonl") for role in TEXTS}, "batch_size": 2}
    data |= more.pop("data", {})
    options = {"lambda_v": 0.9, "lambda_e": 0.4, "data": data}
    return build(InjectRecipe, {**roles, "operator": operator, **options, **more})


def measured(recipe):
    models = [open_model(reference) for reference in recipe.references()]
    prepared = prepare_merge(recipe, models)
    return measure_statistics(recipe, prepared.plan, prepared.inputs, recipe.data)


def opened(place, role):
    model = open_model(place / role)
    return model, model.config, model.read()


def test_texts_become_batches(place):
    assert read_texts(place / "all.txt", 99) == [*TEXTS["vlm"], *TEXTS["expert"]]
    model = open_model(place / "vlm")
    batches = text_batches(model, MergeData(text="x", batch_size=2, length=4), place / "all.txt")
    assert [batch["tokens"].shape for batch in batches] == [(2, 4)] * 2  # "c" alone predicts nothing
    np.testing.assert_array_equal(batches[0]["tokens"], [[0, 1, 2, 3], [1, 3, 5, 7]])
    np.testing.assert_array_equal(batches[1]["segment_ids"], [[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.mark.slow
def test_the_fisher_diagonal_is_the_mean_square_of_scores(place):
    """Of two tokens all labels can be summed over: the mean over drawn ones comes near."""
    _, config, params = opened(place, "vlm")
    row = {"tokens": np.array([[2, 5]], np.int32), "segment_ids": np.ones((1, 2), np.int32)}
    many = jax.tree.map(lambda x: np.repeat(x, 400, axis=0), row)
    up = lambda tree: tree["layers"]["mlp"]["up"]
    found = up(gradient_statistics(params, config, [many], squared=True))

    def log_p(leaf):
        layers = {**params["layers"], "mlp": {**params["layers"]["mlp"], "up": leaf}}
        return jax.nn.log_softmax(forward({**params, "layers": layers}, row, config)[0][0, 0])

    scores = jax.jacobian(log_p)(up(params))
    want = jnp.einsum("v,v...->...", jnp.exp(log_p(up(params))), scores**2)
    np.testing.assert_allclose(np.sum(found), np.sum(want), rtol=0.2)
    assert np.corrcoef(np.ravel(found), np.ravel(want))[0, 1] > 0.95
    padded = {"tokens": np.zeros((1, 2), np.int32), "segment_ids": np.zeros((1, 2), np.int32)}
    one = gradient_statistics(params, config, [row, padded], squared=False)
    np.testing.assert_allclose(
        up(one), jnp.abs(scores[5]), rtol=1e-4, atol=1e-7
    )  # padding counts for nothing


def test_gram_matrices_are_those_of_the_inputs(place):
    from jaxlab.checkpoints import entries

    model, config, params = opened(place, "expert")
    batches = text_batches(model, MergeData(text="x", batch_size=2), place / "expert.jsonl")
    found = gram_matrices(params, config, batches, entries(params, config.family))
    assert UP in found
    assert found["lm_head.weight"].shape == (8, 8)
    assert "model.embed_tokens.weight" not in found
    sums = {name: 0.0 for name in ("mlp_input", "mlp_hidden", "head_output")}
    for text in TEXTS["expert"][:2]:
        ids = model.tokenizer.encode(text).ids
        batch = {"tokens": np.array([ids], np.int32), "segment_ids": np.ones((1, len(ids)), np.int32)}
        for name, x in activations(params, batch, config, list(sums), layers=1).items():
            rows = np.asarray(x, np.float64).reshape(len(ids), -1)
            sums[name] = sums[name] + rows.T @ rows / 11
    for name, tensor in (("mlp_input", UP), ("mlp_hidden", DOWN), ("head_output", OUT)):
        np.testing.assert_allclose(found[tensor], sums[name], rtol=1e-3, atol=1e-5)
    some = gram_matrices(params, config, batches, entries(params, config.family), layers=[1])
    np.testing.assert_allclose(some[UP], found[UP], rtol=1e-6)
    assert "model.layers.0.mlp.up_proj.weight" not in some


@pytest.mark.parametrize(
    "operator",
    ["regmean", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fisher", "trust_region"))],
)
def test_a_recipe_with_data_is_its_operator_with_these_statistics(place, tmp_path, operator):
    recipe = injection(place, operator)
    statistics = measured(recipe)
    lines = json.loads(json.dumps({"kind": "inject", **as_plain(recipe)}))
    lines["data"]["save"] = str(tmp_path / "kept.safetensors")
    (tmp_path / "r.yaml").write_text(json.dumps(lines))
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), "--verify"]) == 0
    found = open_folder(tmp_path / "out")
    folders = [open_folder(place / role) for role in ("vlm", "expert", "base")]
    if operator != "trust_region":  # which sees all tensors at once
        for name in (UP, DOWN, NORM):
            *models, base = (folder[name].read() for folder in folders)
            want = merge_tensors(operator, models, base=base, weight=[0.9, 0.4], statistics=statistics[name])
            np.testing.assert_allclose(found[name].read(), want, rtol=1e-5, atol=1e-6, err_msg=name)
            plain = merge_tensors("linear", models, weight=[0.9, 0.4])
            assert name == NORM or np.abs(found[name].read() - plain).max() > 1e-3
    # The file that was kept gives the same bytes.
    again = {k: v for k, v in lines.items() if k != "data"} | {
        "statistics": str(tmp_path / "kept.safetensors")
    }
    (tmp_path / "r.yaml").write_text(json.dumps(again))
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "again")]) == 0
    other = open_folder(tmp_path / "again")
    assert all(other[name].read().tobytes() == found[name].read().tobytes() for name in found)


def as_plain(recipe):
    from jaxlab.config import to_dict

    return to_dict(recipe)


@pytest.mark.slow
def test_regmean_plusplus_sees_the_merged_layers_before(place):
    """The first layer's inputs are RegMean's but for the merged embedding; the second's are not."""
    recipe = injection(place, "regmean_plusplus", embeddings="vlm", lambda_v=1.0, lambda_e=1.0)
    plain, after = measured(injection(place, "regmean")), measured(recipe)
    first = "model.layers.0.self_attn.q_proj.weight"
    for i in range(2):
        np.testing.assert_allclose(after[first][i], plain[first][i], rtol=1e-5)
        assert np.abs(after[UP][i] - plain[UP][i]).max() > 1e-3
    assert after[NORM] == [None, None]


@pytest.mark.slow
def test_adamerging_lowers_the_entropy(place):
    recipe = injection(place, "adamerging", data={"steps": 30, "learning_rate": 0.05})
    found = measured(recipe)
    assert np.ndim(found[UP][0]) == 0
    assert found[UP] != found[UP.replace("layers.1", "layers.0")]  # a coefficient for each layer
    assert found[UP] == found[DOWN]
    assert np.abs(np.subtract(found[UP], 0.3)).max() > 0.05

    def entropy(coefficients):
        config = open_model(place / "vlm").config
        trees = [open_model(place / role).read() for role in ("vlm", "expert", "base")]
        total = count = 0
        layers = trees[0]["layers"]
        at = jnp.asarray([coefficients[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(2)])
        mix = lambda a, b, o: (
            o
            + sum(
                (at[:, i] * w).reshape(-1, *(1,) * (o.ndim - 1)) * (x - o)
                for i, (x, w) in enumerate([(a, 0.9), (b, 0.4)])
            )
        )
        merged = {**trees[0], "layers": jax.tree.map(mix, layers, trees[1]["layers"], trees[2]["layers"])}
        for role in TEXTS:
            for batch in text_batches(
                open_model(place / role), MergeData(text="x", batch_size=2), place / f"{role}.jsonl"
            ):
                log_p = jax.nn.log_softmax(forward(merged, batch, config)[0][:, :-1])
                mask = (batch["segment_ids"][:, 1:] > 0).astype(np.float32)[..., None]
                total, count = total - jnp.sum(jnp.exp(log_p) * log_p * mask), count + float(mask.sum())
        return float(total / count)

    start = {name: [0.3, 0.3] for name in found}
    assert entropy(found) < entropy(start) - 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operator": "fisher"}, "data: missing; fisher takes statistics of data: a group data:"),
        ({"operator": "ties", "density": 0.5, "data": {"text": "x"}}, "data: ties takes no statistics"),
        ({"operator": "fisher", "data": {"text": "x"}, "statistics": "y"}, "statistics: data is given too"),
        ({"operator": "fisher", "data": {}}, "data.text: missing"),
        ({"operator": "fisher", "data": {"text": "x", "batches": 0}}, "data.batches: is too small: 0"),
    ],
)
def test_mistakes(place, change, message):
    roles = {role: str(place / role) for role in ("vlm", "expert", "base")}
    with pytest.raises(ConfigError, match=message):
        build(InjectRecipe, {**roles, **change})


def test_data_that_do_not_fit(place, tmp_path):
    def prepared(**more):
        recipe = injection(place, "fisher", **more)
        return prepare_merge(recipe, [open_model(r) for r in recipe.references()])

    with pytest.raises(UserError, match=r"absent.txt: cannot be read: No such file"):
        prepared(data={"text": str(tmp_path / "absent.txt")})
    with pytest.raises(UserError, match="no file for expert"):
        prepared(data={"text": {"vlm": str(place / "all.txt")}})
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty.txt: holds no text"):
        prepared(data={"text": str(tmp_path / "empty.txt")})
    models = [{"model": str(place / "vlm")}]
    recipe = build(MergeRecipe, {"models": models, "operator": "linear"})
    inputs = prepare_merge(recipe, [open_model(place / "vlm")])
    with pytest.raises(UserError, match="linear is not measured on data here"):
        measure_statistics(recipe, inputs.plan, inputs.inputs, MergeData(text=str(place / "all.txt")))


def kept(place, tmp_path, operator="fisher"):
    """A file of statistics, all ones, of the trio; and the injection that takes it, as a mapping."""
    roles = {role: str(place / role) for role in ("vlm", "expert", "base")}
    recipe = build(
        InjectRecipe, {**roles, "operator": operator, "statistics": str(tmp_path / "s.safetensors")}
    )
    without = build(InjectRecipe, {**roles, "operator": "task_arithmetic"})
    prepared = prepare_merge(without, [open_model(r) for r in without.references()])
    shapes = {t.name: t.shape for t in prepared.plan.tensors if t.merging is not None}
    alone = operator == "adamerging"  # one number for each model
    found = {name: [np.ones(() if alone else shape, np.float32)] * 2 for name, shape in shapes.items()}
    save_statistics(tmp_path / "s.safetensors", operator, prepared.inputs, prepared.plan, found)
    return recipe


def test_kept_statistics_are_of_one_operator_and_these_models(place, tmp_path, capsys):
    recipe = kept(place, tmp_path)

    def merge(**change):
        lines = {"kind": "inject", **as_plain(recipe), **change}
        (tmp_path / "r.yaml").write_text(json.dumps(lines))
        status = main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), "--check"])
        error = capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        return status, error

    assert merge() == (0, "")
    assert merge(operator="fisher+svc") == (0, "")
    for operator in ("regmean", "adamerging", "trust_region"):
        status, error = merge(operator=operator)
        assert (status, error.count("\n")) == (2, 1)
        assert f"holds statistics for fisher (of vlm {place / 'vlm'}, expert" in error
        assert f"not for {operator}" in error
    status, error = merge(expert=str(place / "vlm"))
    assert (status, error.count("\n")) == (2, 1)
    assert f"its expert {place / 'expert'} is another model than {place / 'vlm'}" in error
    several = [{"model": str(place / role)} for role in ("expert", "vlm")]
    status, error = merge(expert="", experts=several)
    assert status == 2
    assert "here are vlm, expert 1, expert 2, base" in error
    # A copy under another name is the same model; one of whose weights has changed is not.
    shutil.copytree(place / "expert", tmp_path / "copy")
    assert merge(expert=str(tmp_path / "copy")) == (0, "")
    (file,) = (tmp_path / "copy").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert merge(expert=str(tmp_path / "copy"))[0] == 2


def test_coefficients_belong_to_the_weights_that_they_were_learned_with(place, tmp_path):
    recipe = kept(place, tmp_path, "adamerging")
    opened = [open_model(r) for r in recipe.references()]
    prepare_merge(recipe, opened)
    for change in ({"lambda_e": 0.5}, {"lambda_e": (0.5, 1.0)}):
        with pytest.raises(UserError, match=r"statistics of weights 1\.0, 1\.0 \(here (1\.0, 0\.5|that)"):
            prepare_merge(dataclasses.replace(recipe, **change), opened)
    with pytest.raises(UserError, match=r"tensors or rows that are merged otherwise"):
        prepare_merge(dataclasses.replace(recipe, embeddings="merge"), opened)
    prepare_merge(dataclasses.replace(recipe, operator="adamerging+svc"), opened)
    path = tmp_path / "s.safetensors"
    with safe_open(path, "np") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "numbers"}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(UserError, match="does not say of which weights"):
        prepare_merge(recipe, opened)


def test_kept_statistics_have_the_shapes_that_their_operator_takes(place, tmp_path):
    recipe = kept(place, tmp_path, "regmean")  # which takes [in, in]
    with pytest.raises(UserError, match=r"regmean takes float32 \[\d+, \d+\] here"):
        prepare_merge(recipe, [open_model(r) for r in recipe.references()])
    plain = tmp_path / "plain.safetensors"
    save_file({f"0/{UP}": np.ones((2, 2), np.float32)}, plain, metadata={"operator": "regmean"})
    other = dataclasses.replace(recipe, statistics=str(plain))
    with pytest.raises(UserError, match="does not say of which operator and models"):
        prepare_merge(other, [open_model(r) for r in other.references()])


def test_a_file_of_statistics_that_exists_is_refused_before_they_are_measured(place, tmp_path, monkeypatch):
    (tmp_path / "there").write_text("mine")
    for save in (tmp_path / "there", tmp_path / "no" / "folder"):
        recipe = injection(place, "fisher", data={"save": str(save)})
        prepared = prepare_merge(recipe, [open_model(r) for r in recipe.references()])
        monkeypatch.setattr("jaxlab.merging.measuring.measure_statistics", lambda *_: pytest.fail("measured"))
        with pytest.raises(UserError, match=r"exists already|no folder"):
            prepared_statistics(prepared)
    assert (tmp_path / "there").read_text() == "mine"
