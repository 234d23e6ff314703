"""Rows of embeddings and heads by token: which are merged, and that all ways give the same bits."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from jaxlab.checkpoints import Tensor, host_tensors, open_model, same_tokens
from jaxlab.checkpoints.tensor_folder import open_folder
from jaxlab.config import build
from jaxlab.errors import UserError
from jaxlab.merging import (
    InjectRecipe,
    MergeRecipe,
    inject_by_recipe,
    merge_tensors,
    notes_of,
    prepare_merge,
    read_trio,
    tensor_key,
    write_merge,
)
from jaxlab.merging.vocabulary import common_rows, table_of_rows
from tests.merging.test_engine import llama

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = {
    "vlm": [*"abcdefgh", "<image>", *"ij"],  # rows 0 to 10 of 12
    "expert": [*"abcde", "g", "f", *"hijkl"],  # two swapped, no image, two more: 12 of 16
    "base": [*"abcdefgh", "j"],  # no i: 9 of 10
}
SIZES = {"vlm": 12, "expert": 16, "base": 10}
MERGED = {word: [WORDS[role].index(word) for role in WORDS] for word in "abcdefghj"}


def words(vocabulary):
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="a"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, role in enumerate(("base", "vlm", "expert")):
        llama(folder / role, seed, vocabulary=SIZES[role], dtype=np.float32, tied=role == "expert")
        (folder / role / "tokenizer.json").write_text(words(WORDS[role]).to_str())
    llama(folder / "mute", 3, vocabulary=12, dtype=np.float32)
    return folder


def injection(place, **more):
    roles = {role: str(place / role) for role in ("vlm", "expert", "base")}
    options = {"embeddings": "merge_common_rows", "lambda_v": 0.9, "lambda_e": 0.4}
    return build(InjectRecipe, {**roles, **options, **more})


def written(recipe, out, **options):
    opened = [open_model(reference) for reference in recipe.references()]
    account = write_merge(prepare_merge(recipe, opened), out, overwrite=True, **options)
    return {name: tensor.read() for name, tensor in open_folder(out).items()}, account


def test_tokens_are_matched_by_their_text():
    found = same_tokens([words(WORDS[role]) for role in WORDS])
    rows = common_rows(found, list(SIZES.values()))
    assert {tuple(rows.index(i)[n] for i in range(3)) for n in range(9)} == {
        tuple(v) for v in MERGED.values()
    }
    assert rows.count == 9
    assert [count for count, _ in rows.runs] == [5, 1, 1, 1, 1]
    assert rows.described("vlm") == "9 of 12 rows merged, the other 3 the vlm's"
    assert same_tokens([None, None]) is None
    assert common_rows(None, [5, 4]).runs == ((4, (0, 0)),)
    assert common_rows(2, [5, 4]).count == 2
    assert common_rows(found, [12, 16, 4]).count == 4  # fewer rows than tokens
    assert not len(same_tokens([None, words("ab")]))
    assert common_rows(same_tokens([words("ab")] * 2), [2, 2]).is_everything
    assert not common_rows(same_tokens([words("ab")] * 2), [2, 3]).is_everything


def test_some_rows_of_a_table():
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    reads = []

    def read_rows(start, stop):
        reads.append((start, stop))
        return values[start:stop]

    table = table_of_rows(Tensor("x", values.dtype, values.shape, read_rows), np.array([4, 0, 1, 2, 5]))
    np.testing.assert_array_equal(table.read_rows(0, 4), values[[4, 0, 1, 2]])
    assert reads == [(4, 5), (0, 3)]
    with pytest.raises(UserError, match="x: has 6 rows, row 6 is asked for"):
        table_of_rows(Tensor("x", values.dtype, values.shape, read_rows), np.array([4, 6]))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow, id="task_arithmetic"),
        pytest.param({"operator": "ties", "density": 0.5}, marks=pytest.mark.slow, id="ties"),
        pytest.param({"operator": "dare_linear", "density": 0.5, "seed": 3}, id="dare_linear"),
    ],
)
def test_rows_are_merged_with_those_of_the_same_token(place, tmp_path, options):
    """By chunks of any size, in memory as the search does, and by the operator on these rows alone."""
    recipe = injection(place, **options)
    got, account = written(recipe, tmp_path / "out")
    for chunk in (7, 1 << 12):
        again, _ = written(recipe, tmp_path / "again", chunk=chunk, threads=1)
        for name in (EMBED, HEAD):
            assert again[name].tobytes() == got[name].tobytes()
    held, other = inject_by_recipe(recipe, read_trio(*map(open_model, recipe.references())))
    for name, value in host_tensors(held, "llama"):
        assert got[name].tobytes() == value.tobytes(), name
    folders = {role: open_folder(place / role) for role in WORDS}
    rows = np.array([MERGED[word] for word in WORDS["vlm"] if word in MERGED])
    parameters = {k: v for k, v in options.items() if k == "density"}
    for name in (EMBED, HEAD):
        tables = [folders["vlm"][name], folders["expert"][EMBED], folders["base"][name]]
        *models, base = (table.read()[rows[:, i]] for i, table in enumerate(tables))
        if options.get("operator") == "dare_linear":
            parameters["key"] = tensor_key(3, name)
        elif options:
            parameters["normalize"] = False
        want = tables[0].read()
        operator = options.get("operator", "task_arithmetic")
        want[rows[:, 0]] = merge_tensors(operator, models, base=base, weight=[0.9, 0.4], **parameters)
        np.testing.assert_array_equal(got[name], want)
    for lines in (account.lines, other.lines):
        reasons = {line.name: line.reason for line in lines if "vlm" in line.models}
        assert "merge_common_rows, 9 of 12 rows merged, the other 3 the vlm's" in reasons[EMBED]
        assert "the expert's is its embedding, 9 of 12 rows" in reasons[HEAD]


def test_models_without_a_tokenizer_share_no_token(place):
    recipe = injection(place, expert=str(place / "mute"))
    with pytest.raises(UserError, match="the expert has no tokenizer"):
        prepare_merge(recipe, [open_model(reference) for reference in recipe.references()])


def test_a_merge_of_different_vocabularies_has_a_policy(place, tmp_path):
    models = [{"model": str(place / role)} for role in ("vlm", "expert")]
    recipe = lambda **more: build(MergeRecipe, {"models": models, "operator": "linear", **more})
    opened = [open_model(place / role) for role in ("vlm", "expert")]
    with pytest.raises(
        UserError, match=r"\[16, 8\] in the model 1; say what to do about it with embeddings:"
    ):
        prepare_merge(recipe(), opened)
    vlm, expert = (open_folder(place / role)[EMBED].read() for role in ("vlm", "expert"))
    both = [(i, WORDS["expert"].index(w)) for i, w in enumerate(WORDS["vlm"]) if w in WORDS["expert"]]
    for policy, pairs in {
        "first": [],
        "merge": [(i, i) for i in range(12)],
        "merge_common_rows": both,
    }.items():
        want = vlm.copy()
        for mine, theirs in pairs:
            want[mine] = (vlm[mine] + expert[theirs]) / 2
        got, _ = written(recipe(embeddings=policy), tmp_path / "out")
        np.testing.assert_allclose(got[EMBED], want, rtol=1e-6, err_msg=policy)
        np.testing.assert_allclose(got["model.norm.weight"].shape, (8,))


@pytest.mark.parametrize("first", ["tied", "untied"])
def test_tied_and_untied_heads_merge(tmp_path, first):
    llama(tmp_path / "tied", 1, tied=True, dtype=np.float32)
    llama(tmp_path / "untied", 2, dtype=np.float32)
    names = ["tied", "untied"] if first == "tied" else ["untied", "tied"]
    models = [{"model": str(tmp_path / name)} for name in names]
    recipe = build(MergeRecipe, {"models": models, "operator": "linear"})
    got, account = written(recipe, tmp_path / "out")
    notes = notes_of(prepare_merge(recipe, [open_model(tmp_path / name) for name in names]))
    tied, untied = open_folder(tmp_path / "tied"), open_folder(tmp_path / "untied")
    mean = (tied[EMBED].read() + untied[EMBED].read()) / 2
    np.testing.assert_allclose(got[EMBED], mean, rtol=1e-6)
    if first == "tied":
        assert HEAD not in got
        refused = [line for line in account.lines if line.action == "refused"]
        assert [(line.name, line.reason) for line in refused] == [
            (HEAD, "the model 0's head is its embedding")
        ]
        (note,) = notes
        assert f"{HEAD} of model 1 ({tmp_path / 'untied'}) goes nowhere" in note
        assert "list a model with a head of its own first" in note
    else:
        assert notes == []
        np.testing.assert_allclose(got[HEAD], (tied[EMBED].read() + untied[HEAD].read()) / 2, rtol=1e-6)


def test_a_tied_head_that_is_written_out_has_the_masks_of_its_embedding(tmp_path):
    def with_head(tensors):
        tensors[HEAD] = tensors[EMBED]

    for seed, name in enumerate(("base", "one")):
        llama(tmp_path / name, seed, tied=True, dtype=np.float32, change=with_head)
    models = [{"model": str(tmp_path / "one")}]
    recipe = {"models": models, "base": str(tmp_path / "base"), "operator": "dare_linear", "density": 0.5}
    got, _ = written(build(MergeRecipe, recipe), tmp_path / "out")
    np.testing.assert_array_equal(got[HEAD], got[EMBED])
