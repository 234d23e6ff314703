"""`inspect --merge`: each planted cause is found and named, and a healthy pair has no finding."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from jaxlab.checkpoints import open_model
from jaxlab.merging import diagnose
from jaxlab.merging.diagnosis.measures import Sums, match_tensors, measure, module_of, open_sides
from jaxlab.tasks import main
from tests.checkpoints import folders

ROOT = Path(__file__).parents[2]
LAYERS, WORDS = 5, 60
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tensors_of(case):
    """The tensors of a case with more layers, random, and as large as real ones."""
    known = {name: x for name, x in folders.weights(case).items() if ".layers." not in name}
    vlm = case == "llava"
    prefix = "language_model.model.layers." if vlm else "model.layers."
    layer = {name: x for name, x in folders.weights(case).items() if name.startswith(f"{prefix}0.")}
    for i in range(LAYERS):
        known |= {name.replace(f"{prefix}0.", f"{prefix}{i}."): x for name, x in layer.items()}
    rest = {name: x for name, x in folders.weights(case).items() if ".layers." in name and prefix not in name}
    rng = np.random.default_rng(7)
    draw = lambda x: (0.05 * rng.standard_normal(x.shape) + (x.ndim == 1)).astype(np.float32)
    return {name: draw(x) for name, x in (rest | known).items()}


def moved(tensors, seed, by=0.002):
    rng = np.random.default_rng(seed)
    return {n: x + by * rng.standard_normal(x.shape).astype(np.float32) for n, x in tensors.items()}


def language(tensors):
    prefix = "language_model."
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


ROLES = ("vlm", "expert", "base")


class Trio:
    """A VLM, an expert and their base as folders, healthy until something is planted."""

    def __init__(self, path, healthy=None):
        self.path, self.healthy = path, healthy
        config = folders.config("llava")
        config["text_config"]["num_hidden_layers"] = LAYERS
        base = tensors_of("llava")
        self.config, self.text = config, json.loads(json.dumps(config["text_config"]))
        self.vlm, self.expert, self.base = moved(base, 1), language(moved(base, 2)), language(base)
        self.tokens = {role: {f"w{i}": i for i in range(WORDS)} for role in ROLES}
        self.template = dict.fromkeys(ROLES, TEMPLATE)

    def parts(self, role):
        text = self.config["text_config"] if role == "base" else self.text
        config = self.config if role == "vlm" else text
        return config, getattr(self, role), self.tokens[role], self.template[role]

    def write(self):
        """The folders; what was not changed is that of the healthy trio."""
        found = {}
        for role in ROLES:
            config, tensors, tokens, template = self.parts(role)
            if self.healthy is not None and same(self.parts(role), self.healthy.parts(role)):
                found[role] = self.healthy.path / role
                continue
            found[role] = path = folders.write(self.path / role, config, tensors)
            if tokens:
                Tokenizer(models.WordLevel(tokens, unk_token="w0")).save(str(path / "tokenizer.json"))
            (path / "chat_template.jinja").write_text(template)
        return found

    def diagnose(self):
        return diagnose({role: open_model(path) for role, path in self.write().items()}, "base")


def same(one, other):
    (*mine, x), (*theirs, y) = ((c, w, t, tensors) for c, tensors, w, t in (one, other))
    return (
        mine == theirs
        and x.keys() == y.keys()
        and all(x[n].dtype == y[n].dtype and np.array_equal(x[n], y[n]) for n in x)
    )


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    made = Trio(tmp_path_factory.mktemp("healthy"))
    made.write()
    return made


@pytest.fixture
def trio(tmp_path, healthy):
    return Trio(tmp_path, healthy)


def test_a_healthy_pair_has_no_finding(healthy):
    found = Trio(healthy.path, healthy).diagnose()
    assert found.findings == ()
    whole = found.facts.whole
    assert np.all(whole.to_reference > 0.99)
    assert abs(whole.cosines[0, 1]) < 0.05
    assert whole.conflicts[0, 1] == pytest.approx(0.5, abs=0.02)
    two = diagnose({role: open_model(healthy.path / role) for role in ("vlm", "expert")})
    assert two.findings == ()
    assert two.facts.whole.relative.shape == (1,)


def swap_tokens(trio):
    ids = trio.tokens["expert"]
    for i in range(10, 20, 2):
        ids[f"w{i}"], ids[f"w{i + 1}"] = ids[f"w{i + 1}"], ids[f"w{i}"]


def another_tokenizer(trio):
    trio.tokens["expert"] = {f"v{i}" if i else "w0": i for i in range(WORDS)}


def wrong_theta(trio):
    trio.text["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}


def wrong_eps(trio):
    trio.text["rms_norm_eps"] = 1e-2


def window(trio):
    trio.text |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}


def another_base(trio):
    rng = np.random.default_rng(3)
    trio.expert = {
        n: (x + 0 if x.ndim == 1 else 0.05 * rng.standard_normal(x.shape).astype(np.float32))
        for n, x in trio.expert.items()
    }


def wrong_base(trio):
    rng = np.random.default_rng(3)
    trio.base = {n: 0.05 * rng.standard_normal(x.shape).astype(np.float32) for n, x in trio.base.items()}


def nan(trio):
    x = trio.expert["model.layers.2.mlp.up_proj.weight"]
    x[3, 4:6] = np.nan, np.inf


def swapped_layers(trio):
    layer = lambda i: {n: x for n, x in trio.expert.items() if f".layers.{i}." in n}
    first = layer(1)
    trio.expert |= {n.replace(".1.", ".3."): x for n, x in first.items()} | {
        n.replace(".3.", ".1."): x for n, x in layer(3).items()
    }


def all_layers_shifted(trio):
    expert = {n: x for n, x in trio.expert.items() if ".layers." not in n}
    for name, x in trio.expert.items():
        if ".layers." in name:
            i = int(name.split(".")[2])
            expert[name.replace(f".{i}.", f".{(i + 1) % LAYERS}.", 1)] = x
    trio.expert = expert


def shuffled_layer(trio):
    """Rows of all its matrices in another order."""
    rng = np.random.default_rng(0)
    for name, x in trio.expert.items():
        if ".layers.2." in name and x.ndim > 1:
            trio.expert[name] = x[rng.permutation(len(x))]


def llama_cpp_order(trio):
    """Halves of heads as neighbours, as llama.cpp has them."""
    name = "model.layers.4.self_attn.q_proj.weight"
    heads = trio.text["num_attention_heads"]
    x = trio.expert[name]
    trio.expert[name] = x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def damaged_layer(trio):
    rng = np.random.default_rng(0)
    for name, x in trio.expert.items():
        if ".layers.2." in name and x.ndim > 1:
            trio.expert[name] = 0.05 * rng.standard_normal(x.shape).astype(np.float32)


def one_tensor_far(trio):
    trio.expert["model.layers.1.mlp.down_proj.weight"] *= 3


def zero_head(trio):
    trio.expert["lm_head.weight"] *= 0


def scaled(trio):
    trio.expert = {n: 2 * x for n, x in trio.expert.items()}


def permuted_embedding(trio):
    trio.expert["model.embed_tokens.weight"] = trio.expert["model.embed_tokens.weight"][::-1].copy()


def opposed(trio):
    trio.expert = {
        n: 2 * trio.base[n] - trio.vlm[f"language_model.{n}"] + 0.1 * (x - trio.base[n])
        for n, x in trio.expert.items()
    }


def unchanged(trio):
    trio.expert = trio.base


def lopsided(trio):
    trio.expert = {n: trio.base[n] + 0.02 * (x - trio.base[n]) for n, x in trio.expert.items()}


def another_template(trio):
    trio.template["expert"] = TEMPLATE + "!"


def no_tokenizer(trio):
    trio.tokens["expert"] = None


def dtypes(trio):
    trio.expert = {n: x.astype(np.float16) for n, x in trio.expert.items()}
    trio.vlm = {n: x.astype(ml_dtypes.bfloat16) for n, x in trio.vlm.items()}


def another_width(trio):
    trio.text["intermediate_size"] += 8
    for name, x in trio.expert.items():
        if "mlp" in name:
            more = [(0, 8), (0, 0)] if "down" not in name else [(0, 0), (0, 8)]
            trio.expert[name] = np.pad(x, more)


def with_biases(trio):
    """A setting that no list of sizes has."""
    trio.text["attention_bias"] = True
    for i in range(LAYERS):
        for part in "qkvo":
            name = f"model.layers.{i}.self_attn.{part}_proj"
            trio.expert[f"{name}.bias"] = np.zeros(len(trio.expert[f"{name}.weight"]), np.float32)


PLANTED = {
    swap_tokens: ("harms", "token_ids", "give 10 tokens other ids ('w10', 'w11'"),
    another_tokenizer: ("breaks", "tokenizer", "1 of 60 tokens have the same id"),
    wrong_theta: ("breaks", "rope", "rope.theta is 10000 in vlm and 500000 in expert"),
    wrong_eps: ("harms", "norm_eps", "norm_eps is 1e-06 in vlm and 0.01 in expert"),
    window: ("harms", "attention", "sliding_window is None in vlm and 8 in expert"),
    another_base: (
        "breaks",
        "origin",
        "expert does not come from base: their weights have nothing in common",
    ),
    wrong_base: ("breaks", "origin", "base is not what vlm and expert come from"),
    nan: ("breaks", "not_finite", "model.layers.2.mlp.up_proj.weight (2)"),
    swapped_layers: ("breaks", "shuffled_layers", "its layer 1 is layer 3 of base, its layer 3 is layer 1"),
    all_layers_shifted: ("breaks", "shuffled_layers", "its layer 1 is layer 0 of base"),
    shuffled_layer: ("breaks", "permuted", "layers 2 of expert have rows in another order"),
    llama_cpp_order: (
        "breaks",
        "permuted",
        "layers.4.self_attn.q_proj.weight of expert have rows in another",
    ),
    damaged_layer: ("breaks", "strange_layers", "layers 2 of expert have nothing in common"),
    one_tensor_far: ("harms", "outliers", "layers.1.mlp.down_proj.weight"),
    zero_head: ("harms", "zeros", "expert is zero in language_model.lm_head.weight"),
    scaled: ("harms", "scaled", "the weights of expert are 2.00 times"),
    permuted_embedding: ("breaks", "embedding", "the embedding of expert has other rows"),
    opposed: ("harms", "opposed", "point away from each other"),
    unchanged: ("note", "unchanged", "the language model of expert is that of base, bit for bit"),
    lopsided: ("note", "lopsided", "the task vector of vlm is 50 times as long as that of expert"),
    another_template: ("note", "chat_template", "vlm and expert have two chat templates"),
    no_tokenizer: ("note", "tokenizer_unknown", "expert has no tokenizer"),
    dtypes: ("note", "dtype", "expert is float16"),
    another_width: ("breaks", "architecture", "mlp_width"),
    with_biases: ("breaks", "architecture", "attention_bias is False in vlm and True in expert: the tensors"),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_is_planted_is_found_and_named(trio, plant):
    plant(trio)
    severity, cause, said = PLANTED[plant]
    found = trio.diagnose().findings
    first = next((f for f in found if f.cause == cause), None)
    assert first is not None, found
    assert first.severity == severity
    assert said in first.said
    if plant is wrong_theta:
        assert "differences: {rope.theta: vlm}" in first.remedy
    allowed = {cause, *ALSO.get(plant, ())}
    assert {f.cause for f in found} <= allowed, found


ALSO = {another_width: ("tensors",), with_biases: ("tensors",), scaled: ("lopsided",)}
"""What else may be said, since it is true too."""


def test_sums_are_those_of_whole_tensors(healthy):
    sides = open_sides({role: open_model(healthy.path / role) for role in ROLES})
    compared, misfits = match_tensors(sides)
    assert misfits == []
    parts, wholes = (measure(compared, 2, chunk=chunk).tensors for chunk in (64, 1 << 30))
    for part, whole, item in zip(parts, wholes, compared, strict=True):
        v, e, b = (tensor.read().astype(np.float64).ravel() for tensor in item.tensors)
        dv, de = v - b, e - b
        for sums in (part.sums, whole.sums):
            assert sums.size == b.size
            np.testing.assert_allclose(sums.reference, b @ b, rtol=1e-5)
            np.testing.assert_allclose(
                sums.products, [[dv @ dv, dv @ de], [dv @ de, de @ de]], rtol=1e-3, atol=1e-8
            )
            np.testing.assert_allclose(sums.relative, np.sqrt([dv @ dv, de @ de]) / np.sqrt(b @ b), rtol=1e-4)
            cosine = v @ b / np.sqrt(v @ v * (b @ b))
            np.testing.assert_allclose(sums.to_reference[0], cosine, rtol=1e-5)
            between = v @ e / np.sqrt(v @ v * (e @ e))
            np.testing.assert_allclose(sums.between[0, 1], between, rtol=1e-5)
            assert sums.conflict[0, 1] == np.sum(dv * de < 0)
            assert sums.agree[0, 1] == np.sum(dv * de > 0)
            assert list(sums.changed) == [np.sum(dv != 0), np.sum(de != 0)]
            assert not sums.not_finite.any()


def test_sums_of_nothing_and_of_zeros():
    empty = Sums.zero(2)
    assert np.isnan(empty.cosines).all()
    assert np.isnan(empty.to_reference).all()
    assert list(empty.relative) == [0, 0]
    one = Sums(
        4,
        0.0,
        np.zeros(2),
        np.diag([4.0, 0.0]),
        *(empty.changed, empty.agree, empty.conflict, empty.not_finite),
    )
    assert np.isnan(one.relative[0])
    assert (empty + one).size == 4


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        ("language_model.model.layers.{i}.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("model.layers.{0,1,2,4}.mlp.up_proj.weight", "mlp.up_proj"),
        ("h.{i}.attn.c_attn.bias", "attn.c_attn.bias"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_modules_are_named_as_people_do(pattern, module):
    assert module_of(pattern) == module


def test_no_tensor_is_read_whole(healthy, monkeypatch):
    """Chunks are of whole rows, and no more than asked for."""
    from jaxlab.checkpoints import safetensors_file

    read, most = safetensors_file.read_into, []
    monkeypatch.setattr(
        safetensors_file,
        "read_into",
        lambda path, array, offset: most.append(array.size) or read(path, array, offset),
    )
    sides = open_sides({role: open_model(healthy.path / role) for role in ROLES})
    measure(match_tensors(sides)[0], 2, chunk=256)
    assert max(most) <= 256


def run(*words):
    return main(["inspect", *map(str, words)])


def test_the_command_line(trio, capsys):
    swap_tokens(trio)
    vlm, expert, base = trio.write().values()
    out = trio.path / "out"
    assert run(expert, vlm, "--merge", "--base", base, "--out", out) == 0
    said = capsys.readouterr().out
    assert "1. harms: the tokenizers of vlm and expert give 10 tokens other ids" in said
    assert "use embeddings: vlm, or merge_common_rows" in said
    assert "task vectors from base: A vlm, B expert" in said
    assert f"report: {out / 'diagnosis.html'}" in said
    told = json.loads((out / "diagnosis.json").read_text())
    assert [f["cause"] for f in told["findings"]] == ["token_ids"]
    assert len(told["layers"]) == LAYERS
    assert told["tokens"][0]["moved"]["first"][0] == ["w10", 10, 11]
    page = (out / "diagnosis.html").read_text()
    assert "give 10 tokens other ids" in page
    assert page.count("<svg") == 4
    assert "nan" not in page.lower().replace("finance", "")
    assert run(vlm, expert, "--merge", "--base", base, "--json") == 0  # nothing but JSON
    assert json.loads(capsys.readouterr().out) == told


def test_mistakes_are_one_line(healthy, tmp_path, capsys):
    vlm, expert = (healthy.path / role for role in ("vlm", "expert"))
    (tmp_path / "diagnosis.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for words, said in (
        ((vlm, "--merge"), "takes two models or more"),
        ((vlm, expert, "--json"), "is only for --merge"),
        ((vlm, expert, "--base", vlm), "is only for --merge"),
        ((vlm, expert, "--merge", "--out", tmp_path), "holds a diagnosis.json that is not a diagnosis"),
        ((vlm, expert, "--merge", "--out", tmp_path / "file"), "is no folder"),
        ((vlm, expert, "--merge", "--out", vlm / "in"), "lies in the model"),
    ):
        assert run(*words) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert said in captured.err
    assert (tmp_path / "diagnosis.json").read_text() == "{}"


def test_models_of_two_architectures_cannot_be_compared(healthy, tmp_path, capsys):
    other = folders.make(tmp_path / "gpt2", "gpt2")
    assert run(healthy.path / "vlm", other, "--merge") == 2
    assert "have no tensor of their language models in common" in capsys.readouterr().err


def test_a_gguf_file_and_the_folder_it_came_from(tmp_path, capsys):
    from tests.checkpoints import gguf_files

    folder = folders.make(tmp_path / "folder", "llama2")
    config, tensors = folders.config("llama2", version=4), folders.weights("llama2")
    file = gguf_files.make(tmp_path / "model.gguf", config, tensors)
    found = diagnose({"folder": open_model(folder), "file": open_model(file)})
    assert [f.cause for f in found.findings if f.severity != "note"] == []
    assert found.facts.whole.to_reference[0] > 0.999


def test_jax_is_not_imported(healthy):
    vlm, expert = (str(healthy.path / role) for role in ("vlm", "expert"))
    program = (
        "import sys; from jaxlab.tasks import main; "
        f"assert main(['inspect', {vlm!r}, {expert!r}, '--merge']) == 0; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True)
