"""Files of mergekit as people write them: what is read, noted, refused in one line, and what stands beside
the tensors that come of them.
"""

import contextlib
import io
import json
import random

import numpy as np
import pytest
import yaml

from jaxlab.checkpoints import open_folder, open_model
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.merging import load_recipe
from jaxlab.merging.mergekit import stages
from jaxlab.merging.mergekit.reading import parse_mergekit_file
from jaxlab.merging.mergekit.templates import TEMPLATES
from jaxlab.tasks import main
from tests.checkpoints import folders
from tests.merging.mergekit_desk import GOLDEN, case

LINEAR = """
merge_method: linear
models:
  - model: a
    parameters: {weight: 1}
  - model: b
    parameters: {weight: 2}
"""
SOUP = (
    "merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: models/{}}}, {{model: models/{}}}]\n"
)
TIES = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n    parameters: {weight: 1}\n"


def parse(text):
    return parse_mergekit_file(text, "m.yaml")


def only(text):
    (merge,) = parse(text).stages
    return merge


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: a\ngate_mode: hidden\nexperts: []\n", "m.yaml:3: experts: a file of mergekit-moe"),
        ("merge_method: moe\nmodels: [a]\n", "merge_method: a file of mergekit-moe"),
        ("merge_method: extract_lora\nmodels: [a]\n", "what mergekit-extract-lora does"),
        ("genome: {}\n", "a file of mergekit-evolve"),
        (
            "merge_method: tis\nmodels: [a]\n",
            "m.yaml:1: merge_method: no such method, 'tis'; did you mean ties?",
        ),
        (LINEAR + "dtype: bfloat\n", "m.yaml:8: dtype: no such dtype, 'bfloat'; did you mean bfloat16?"),
        (LINEAR + "out_dtype: fp16\n", "out_dtype: no such dtype, 'fp16'; did you mean float16?"),
        (LINEAR + "dtype: float64\n", "dtype: float64 is not computed here"),
        (LINEAR + "slices: [1]\n", "one of models, slices and modules is needed, found models and slices"),
        (LINEAR + "chat_template: chatlm\n", "no such chat template, 'chatlm'; did you mean chatml?"),
        (LINEAR + "tokenizer_source: base\ntokenizer: {}\n", "tokenizer_source is given too"),
        (LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}\n", "token or token_id"),
        (LINEAR.replace("1}", "x}"), "m.yaml:5: models.0.parameters.weight: must be a number, is 'x'"),
        (LINEAR.replace("model: b", "model: a"), "a is among the inputs twice"),
        (LINEAR.replace("model: b", "model: b+c+d"), "models.1.model: 'b+c+d' is no model"),
        (LINEAR.replace("linear", "slerp"), "slerp needs a base_model"),
        (
            TIES.replace("ties", "model_stock"),
            "model_stock takes at least 3 models, the base included; found 2",
        ),
        ("merge_method: passthrough" + LINEAR.partition("linear")[2], "passthrough takes 1 models"),
        (
            "merge_method: ties\nbase_model: c\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]\n",
            "the base_model c is not among the sources of the slice",
        ),
        (
            "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n"
            "  - {model: b, layer_range: [0, 3]}\n",
            "m.yaml:3: slices.0: its sources have 2 and 3 layers",
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3, 1]}]}]\n",
            "layer_range: must be",
        ),
        ("merge_method: linear\nslices: [{sources: [{model: a}]}]\n", "layer_range: must be"),
        (f"name: x{LINEAR}---\nname: x{LINEAR}", "two merges are named x"),
        (f"name: a{LINEAR}", "the merge a needs itself"),
        (f"name: x{LINEAR}---\nname: y{LINEAR}", "no other merge of the file needs x"),
        ("- 1\n", "must be lines of `key: value`, is a list"),
        (
            "merge_method: !!python/name:os.system x\n",
            "m.yaml:1: not YAML: could not determine a constructor",
        ),
        ("a: &a [*a]\nmerge_method: ties\n", "nested too deeply"),
        ("\tmerge_method: ties\n", "m.yaml:1: not YAML"),
        ("", "m.yaml: empty"),
    ],
)
def test_refuses_in_one_line(text, message):
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert message in str(error.value)


def test_notes_what_mergekit_passes_over():
    text = (
        TIES
        + "    density: 0.5\n    revision: main\nparameters: {int8_mask: true, lambd: 1, normalize: yes}\n"
    )
    file = parse(text + "dtype: float16\ndtype: bfloat16\ntokeniser: x\n")
    assert list(file.notes) == [
        "m.yaml:10: dtype: stands here twice; the last one counts",
        "m.yaml:11: tokeniser: mergekit has no such key here and passes over it; did you mean tokenizer?",
        "m.yaml:6: models.0.density: is not read here: it belongs into parameters, a level deeper",
        "m.yaml:7: models.0.revision: mergekit has no such key here and passes over it",
        "m.yaml:8: parameters.lambd: ties does not use it; did you mean lambda?",
    ]
    assert file.stages[0].parameters["normalize"].at("x", kind="switch") is True
    assert file.stages[0].dtype == "bfloat16"


def test_models_in_every_form():
    forms = ["m@v1", "m+lora", "{model: {path: m, revision: v2}, lora: {path: l, revision: v3}}"]
    lines = "".join(f"  - model: {form}\n    parameters: {{weight: 1}}\n" for form in forms)
    found = only(f"merge_method: linear\nmodels:\n{lines}").references()
    assert [(one.path, one.adapter) for one in found] == [("m@v1", None), ("m", "lora"), ("m@v2", "l@v3")]


def test_anchors_and_merge_keys_are_followed():
    merge = only(
        "x: &x {weight: 1e-1}\nmerge_method: ties\nbase_model: c\nmodels:\n"
        "  - {model: a, parameters: *x}\n  - model: b\n    parameters:\n      <<: *x\n      density: 0.5\n"
    )
    sources = merge.modules[0].slices[0].sources
    assert [source.parameters["weight"].at("") for source in sources] == [0.1, 0.1]
    assert sources[1].parameters["density"].at("") == 0.5


def test_stages_come_before_those_that_read_them():
    one = "merge_method: linear\nmodels: [{model: %s, parameters: {weight: 1}}]\n"
    file = parse("---\n".join(["name: c\n" + one % "./parts/b", one % "c", "name: b\n" + one % "m"]))
    assert [stage.name for stage in file.stages] == ["b", "c", None]
    assert [str(model) for model in file.references()] == ["m"]


def run(*words):
    errors, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
        status = main(["merge", *map(str, words)])
    return status, [line for line in errors.getvalue().splitlines() if line], printed.getvalue()


def test_a_weight_one_level_too_high_is_refused_by_its_name(at_desk, tmp_path):
    status, errors, _ = run(case("90"), "--out", tmp_path / "out")
    assert status == 2
    assert len(errors) == 1
    assert (
        "90_refused_missing_weight.yaml:4: weight: task_arithmetic needs it for models/mistral_bf16/a"
        in errors[0]
    )
    assert "it stands beside parameters" in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "merge_method: passthrough\nslices:\n"
            "- sources: [{model: models/llama_f32/a, layer_range: [2, 5]}]\n",
            ":3: layer_range: models/llama_f32/a has 4 layers, not 5",
        ),
        (
            SOUP.format("llama_f32/a", "words_f32/a"),
            "model.embed_tokens.weight is [32, 8] in models/llama_f32/a, [30, 8] in models/words_f32/a; "
            "tokenizer_source: base, or union, matches rows by token",
        ),
        pytest.param(
            SOUP.format("llama_f32/a", "gpt2_f32/a"),
            "the models cannot be merged: ",
            marks=pytest.mark.slow,
        ),
        (
            SOUP.format("mistral_bf16/a", "deep_bf16/a"),
            "the numbers of layers differ: 4 in models/mistral_bf16/a, 6 in models/deep_bf16/a",
        ),
        (
            "merge_method: linear\nmodels: [{model: models/llama_f32/a, parameters: {weight: 1}},"
            " {model: models/llama_f32/b, parameters: {weight: -1}}]\n",
            "the weights [1.0, -1.0] for model.embed_tokens.weight sum to zero",
        ),
        (
            "merge_method: ties\nbase_model: models/llama_f32/base\nparameters: {weight: 1, density: 1.5}\n"
            "models: [{model: models/llama_f32/a}]\n",
            "density: must be between 0 and 1, is 1.5, for model.embed_tokens.weight",
        ),
        (
            "merge_method: linear\nparameters: {weight: [{filter: mlp, value: 1}]}\n"
            "models: [{model: models/llama_f32/a}]\n",
            "no filter of it fits; end its list with one that has none",
        ),
        (SOUP.replace("models/", "").format("absent", "other"), "absent: no such model"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused_in_one_line(at_desk, tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    status, errors, _ = run(tmp_path / "m.yaml", "--out", tmp_path / "out")
    assert (status, len(errors)) == (2, 1)
    assert message in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["m.yaml"]


def test_what_stands_beside_the_tensors(at_desk, tmp_path):
    """A file is kept as it is; config, tokenizer and how texts are sampled are the first model's."""
    text = "# mine\nmerge_method: passthrough\nchat_template: chatml\nslices:\n"
    for start, stop in ((0, 3), (2, 4)):  # the third layer and the fourth, which slides not, come once more
        text += f"  - sources: [{{model: models/gemma2_f32/a, layer_range: [{start}, {stop}]}}]\n"
    (tmp_path / "m.yaml").write_text(text)
    out, source = tmp_path / "out", at_desk / "models/gemma2_f32/a"
    status, errors, printed = run(tmp_path / "m.yaml", "--out", out, "--check")
    assert (status, errors) == (0, [])
    assert "copied  5        model.layers.{i}.mlp.up_proj.weight" in printed
    assert not out.exists()
    assert run(tmp_path / "m.yaml", "--out", out, "--verify")[0] == 0
    assert (out / "recipe.yaml").read_text() == text
    assert text.rstrip() in (out / "README.md").read_text()
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "chat_template.jinja").read_text() == TEMPLATES["chatml"]
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    config = json.loads((out / "config.json").read_text())
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in (0, 1, 2, 2, 3)]
    assert (config["num_hidden_layers"], config["layer_types"]) == (5, kinds)
    model = open_model(out)
    assert model.config.kinds == ("sliding", "full", "sliding", "sliding", "full")
    model.read()
    account = json.loads((out / "account.json").read_text())
    lines = [(line["name"], line["action"]) for line in account["tensors"]]
    assert ("model.layers.4.mlp.up_proj.weight", "copied") in lines
    assert account["recipe"] == yaml.safe_load(text)
    stored = open_folder(source)
    for name, value in open_folder(out).items():
        layer = name.split(".")[2] if ".layers." in name else None
        of = name if layer is None else name.replace(f".{layer}.", f".{(0, 1, 2, 2, 3)[int(layer)]}.", 1)
        np.testing.assert_array_equal(value.read(), stored[of].read(), err_msg=name)


def test_what_a_config_cannot_say_is_noted(at_desk, tmp_path):
    (tmp_path / "m.yaml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels:\n"
        "  - model: models/llama_bf16/a\n  - model: models/words_bf16/a\ntokenizer_source: base\n"
        "base_model: models/llama_bf16/a\nchat_template: auto\n"
    )
    with pytest.warns(UserNote, match="the tables are cut from 32 rows to 27"):
        assert run(tmp_path / "m.yaml", "--out", tmp_path / "out", "--check")[0] == 0


def test_layers_of_two_vocabularies_are_noted(at_desk, tmp_path):
    """The embedding of the first slice and the head of the last have other rows: nothing loads that."""
    slices = "slices:\n"
    for name, layers in (("a", "[0, 2]"), ("b", "[2, 4]")):
        slices += f"- sources: [{{model: models/words_f32/{name}, layer_range: {layers}}}]\n"
    (tmp_path / "m.yaml").write_text(f"merge_method: passthrough\n{slices}")
    said = r"no model can be read from it: lm_head\.weight is \[29, 8\], expected \[30, 8\]"
    with pytest.warns(UserNote, match=said):
        status, _, _ = run(tmp_path / "m.yaml", "--out", tmp_path / "out", "--check")
    assert status == 0


def test_a_head_stays_tied_where_it_is_made_as_the_embedding(at_desk, tmp_path):
    for number, (extra, tied) in enumerate({"": True, ", tokenizer_source: base": True}.items()):
        text = (
            "{merge_method: linear, base_model: models/tied_bf16/a, parameters: {weight: 0.5}, "
            f"models: [{{model: models/tied_bf16/a}}, {{model: models/tied_bf16/b}}]{extra}}}\n"
        )
        (tmp_path / "m.yaml").write_text(text)
        out = tmp_path / str(number)
        assert run(tmp_path / "m.yaml", "--out", out)[0] == 0
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
        assert "lm_head.weight" not in open_folder(out)


def test_a_head_and_an_embedding_that_is_one_are_noted(at_desk, tmp_path):
    other = at_desk / "models/tied_bf16/b"
    tensors = {name: tensor.read() for name, tensor in open_folder(other).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    config = json.loads((other / "config.json").read_text())
    folders.write(tmp_path / "own", {**config, "tie_word_embeddings": False}, tensors)
    (tmp_path / "m.yaml").write_text(
        "{merge_method: linear, parameters: {weight: 0.5}, "
        f"models: [{{model: models/tied_bf16/a}}, {{model: {tmp_path / 'own'}}}]}}\n"
    )
    told = "is made from heads and, of models/tied_bf16/a, from the embedding.* a head of its own"
    with pytest.warns(UserNote, match=told):
        assert run(tmp_path / "m.yaml", "--out", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in open_folder(tmp_path / "out")


STAGES = """name: core
merge_method: linear
parameters: {weight: 0.5}
models: [{model: models/mistral_f32/a}, {model: models/mistral_f32/b}]
---
merge_method: passthrough
slices:
- sources: [{model: core, layer_range: [0, 3]}]
- sources: [{model: blend, layer_range: [1, 4]}]
---
name: blend
merge_method: linear
parameters: {weight: 0.5}
models: [{model: core}, {model: models/mistral_f32/c}]
"""


def hidden(folder):
    return sorted(path.name for path in folder.rglob(".*") if path.parent == folder)


def test_a_killed_file_of_stages_goes_on_where_it_was(at_desk, tmp_path, monkeypatch):
    out, file = tmp_path / "out", tmp_path / "m.yaml"
    file.write_text(STAGES)
    write, written = stages.write_merge, []

    def killed_at_last(prepared, folder, **options):
        if folder == out:
            raise KeyboardInterrupt
        written.append(folder.name)
        return write(prepared, folder, **options)

    monkeypatch.setattr(stages, "write_merge", killed_at_last)
    with contextlib.suppress(KeyboardInterrupt):
        run(file, "--out", out)
    assert written == ["4-core", "5-blend"]
    assert hidden(tmp_path) == [".out.stages"]
    # One stage is damaged meanwhile: it is written again, the other is not.
    tensors = tmp_path / ".out.stages" / "5-blend" / "model.safetensors"
    raw = bytearray(tensors.read_bytes())
    raw[-1] ^= 1
    tensors.write_bytes(raw)
    again = []
    monkeypatch.setattr(
        stages, "write_merge", lambda p, folder, **o: (again.append(folder.name), write(p, folder, **o))[1]
    )
    assert run(file, "--out", out, "--verify")[0] == 0
    assert again == ["5-blend", "out"]
    assert hidden(tmp_path) == []
    made = json.loads((out / "account.json").read_text())["stages"]
    assert [stage["name"] for stage in made] == ["core", "blend"]
    assert made[1]["inputs"] == ["core", "models/mistral_f32/c"]


def test_after_an_error_no_stage_is_left_but_what_is_foreign(at_desk, tmp_path, monkeypatch):
    out = tmp_path / "out"
    foreign = tmp_path / ".out.stages"
    foreign.mkdir()
    # What a killed run of the file as it was before has left, complete or not, goes too.
    (foreign / "3-old.json").write_text('{"digest": "0"}')
    (foreign / ".4-some.partial").mkdir()
    (foreign / ".4-some.partial" / ".jaxlab-partial.json").write_text('{"digest": "1", "files": ["x"]}')
    (foreign / ".4-some.partial" / "x").write_text("half")
    mine = ("notes.txt", "5-mine.json", ".4-mine.partial/x")
    (foreign / ".4-mine.partial").mkdir()
    for name in mine:
        (foreign / name).write_text('{"mine": 1}')
    write = stages.write_merge

    def no_room(prepared, folder, **options):
        if folder == out:
            raise UserError("no room")
        return write(prepared, folder, **options)

    monkeypatch.setattr(stages, "write_merge", no_room)
    (tmp_path / "m.yaml").write_text(STAGES)
    assert run(tmp_path / "m.yaml", "--out", out)[0] == 2
    left = {str(path.relative_to(foreign)) for path in foreign.rglob("*") if path.is_file()}
    assert left == set(mine)


def places(tree, keys=()):
    """Of every value in a document."""
    if keys:
        yield keys
    for key in tree if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list) else 0):
        yield from places(tree[key], (*keys, key))


def mutated(text, draw):
    """A file with something changed in its tree, or in its text."""
    odd = [None, True, -1, 0.5, float("nan"), "", "x", "union", "a+b", [], {}, [[]], [0, 4], [0, 99], 10**30]
    odd += [{"filter": "mlp"}, {"filter": "mlp", "value": [0, 1]}, "models/llama_f32/a", "models/gpt2_f32/a"]
    odd += ["models/words_f32/a", "slerp", {"kind": "zero"}, {"model": {"path": "models/llama_f32/a"}}]
    if draw.random() < 0.4:
        lines = text.split("\n")
        i = draw.randrange(len(lines))
        edits = [
            "  " + lines[i],
            lines[i].lstrip(),
            "",
            "---",
            "&a *a",
            "\t",
            lines[i] + ":",
            lines[i] + " [",
        ]
        lines[i] = draw.choice(edits)
        return "\n".join(lines)
    documents = list(yaml.safe_load_all(text))
    *above, last = draw.choice(list(places(documents)))
    node = documents
    for key in above:
        node = node[key]
    if draw.random() < 0.3:
        del node[last]
    else:
        node[last] = draw.choice(odd)
    return yaml.safe_dump_all(documents, sort_keys=False)


def outcomes(at_desk, tmp_path, count, seed):
    """How often files that were changed at random end in which way."""
    draw, texts = (
        random.Random(seed),
        [path.read_text() for path in sorted((GOLDEN / "cases").glob("*.yaml"))],
    )
    ends = {}
    for _ in range(count):
        text = mutated(draw.choice(texts), draw)
        (tmp_path / "m.yaml").write_text(text)
        status, errors, _ = run(tmp_path / "m.yaml", "--out", tmp_path / "out", "--check")
        said = [line for line in errors if not line.startswith("note: ")]
        assert (status, len(said)) in ((0, 0), (2, 1)), text
        assert [path.name for path in tmp_path.iterdir()] == ["m.yaml"]
        ends[status] = ends.get(status, 0) + 1
    return ends


@pytest.mark.filterwarnings("ignore::jaxlab.errors.UserNote")
def test_hostile_files_end_in_one_line(at_desk, tmp_path):
    ends = outcomes(at_desk, tmp_path, 40, seed=0)
    assert min(ends[0], ends[2]) > 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxlab.errors.UserNote")
def test_many_hostile_files_end_in_one_line(at_desk, tmp_path):
    assert set(outcomes(at_desk, tmp_path, 600, seed=1)) == {0, 2}


def test_a_file_without_a_kind_is_one_of_mergekit(tmp_path):
    (tmp_path / "m.yaml").write_text(LINEAR)
    assert [str(one) for one in load_recipe(tmp_path / "m.yaml").references()] == ["a", "b"]
