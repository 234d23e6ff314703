"""The engine: from headers to a folder, with the bits of `inject` and `merge_models`, whatever the chunks."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxlab.checkpoints import host_tensors, open_model
from jaxlab.checkpoints.tensor_folder import Planned, open_folder, write_folder
from jaxlab.config import build
from jaxlab.errors import UserError
from jaxlab.merging import (
    InjectRecipe,
    Input,
    MergePlan,
    MergeRecipe,
    Merging,
    PlannedTensor,
    TensorSource,
    execute,
    inject_by_recipe,
    merge_by_recipe,
    merge_models,
    merge_tensors,
    needs_of,
    prepare_merge,
    read_trio,
    verify_folder,
    write_merge,
)
from jaxlab.merging.layout import layout
from jaxlab.merging.matrix_work import matrix_seconds
from jaxlab.merging.operators import AFTERWARDS, OPERATORS, operator_named
from jaxlab.tasks import main
from tests.checkpoints import folders

BF16 = np.dtype(ml_dtypes.bfloat16)
WIDTH, LAYERS = 8, 2


def config(vocabulary=24, **more):
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 12,
        "vocab_size": vocabulary,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **more,
    }


def llama(path, seed, *, vocabulary=24, dtype=BF16, shard_bytes=1 << 40, tied=False, change=None):
    """A small Llama, its tensors those of seed 0 and something small of its own."""
    shapes = {"model.embed_tokens.weight": (vocabulary, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, WIDTH)
    for i in range(LAYERS):
        start = f"model.layers.{i}."
        shapes |= {start + f"{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
        shapes |= {start + f"mlp.{n}_proj.weight": (12, WIDTH) for n in ("gate", "up")}
        shapes |= {start + "mlp.down_proj.weight": (WIDTH, 12)}
        shapes |= {start + f"self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qkvo"}
    tensors = {}
    for name, shape in shapes.items():
        draw = lambda *key, n=name, s=shape: np.random.default_rng([*key, *n.encode()]).normal(size=s)
        tensors[name] = (draw(0) + (0.1 * draw(seed) if seed else 0)).astype(np.float32).astype(dtype)
    if change:
        change(tensors)
    planned = [Planned(n, v.dtype, v.shape, lambda v=v: v) for n, v in tensors.items()]
    more = {"torch_dtype": np.dtype(dtype).name}
    text = config(vocabulary, tie_word_embeddings=tied, **more)
    write_folder(path, planned, config=text, shard_bytes=shard_bytes, overwrite=True)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one", "two")):
        llama(folder / name, seed, shard_bytes=1500 if name == "one" else 1 << 40)
    return folder


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def hashes(folder):
    return {name: hashlib.sha256(t.read().tobytes()).hexdigest() for name, t in open_folder(folder).items()}


def write(recipe, out, **options):
    models = [open_model(reference) for reference in recipe.references()]
    return write_merge(prepare_merge(recipe, models), out, overwrite=True, **options)


def injection(place, **more):
    roles = {role: str(place / name) for role, name in (("vlm", "one"), ("expert", "two"), ("base", "base"))}
    return build(InjectRecipe, {**roles, "lambda_e": 0.4, **more})


def merge(place, operator, base=True, **more):
    models = [{"model": str(place / "one"), "weight": 0.9}, {"model": str(place / "two"), "weight": 0.4}]
    if density := more.pop("density", None):
        models = [model | {"density": density} for model in models]
    return build(
        MergeRecipe,
        {"operator": operator, "models": models, **({"base": str(place / "base")} if base else {}), **more},
    )


INJECTIONS = [
    {"operator": "task_arithmetic", "lambda_v": 0.9, "embeddings": "merge"},
    {"operator": "dare_linear", "density": 0.5, "seed": 3},
    {"operator": "ties_global", "density": 0.3},
]
SLOW_INJECTIONS = [
    {"operator": "linear", "mode": "mergekit"},
    {"operator": "dare_ties", "density": {"vlm": 0.3, "expert": 0.8}, "mode": "mergekit"},
    {"operator": "ties", "density": 0.4, "embeddings": "merge_common_rows"},
    {"operator": "slerp"},
]
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "options",
    [*INJECTIONS, *(pytest.param(options, marks=SLOW) for options in SLOW_INJECTIONS)],
    ids=lambda options: f"{options['operator']}-{options.get('mode', 'paper')}",
)
def test_an_injection_has_the_bits_of_inject(place, tmp_path, options):
    recipe = injection(place, **options)
    write(recipe, tmp_path / "out")
    want, account = inject_by_recipe(recipe, read_trio(*map(open_model, recipe.references())))
    found = open_folder(tmp_path / "out")
    for name, value in host_tensors(want, "llama"):
        assert found[name].read().tobytes() == value.tobytes(), name
    assert {line.name for line in account.lines if line.action != "refused"} == set(found)


MERGES = [
    ("linear", {"base": False}),
    ("task_arithmetic", {"lambda": 0.7, "mode": "mergekit"}),
    ("ties", {"density": 0.5, "mode": "mergekit"}),
    pytest.param("task_arithmetic", {"lambda": 0.7}, marks=SLOW),
    pytest.param("dare_linear", {"density": 0.3}, marks=SLOW),
    pytest.param("dare_ties", {"density": 0.3, "mode": "mergekit"}, marks=SLOW),
    pytest.param("della", {"density": 0.5}, marks=SLOW),
    pytest.param("della_linear", {"density": 0.5, "mode": "mergekit"}, marks=SLOW),
]


@pytest.mark.parametrize(("operator", "options"), MERGES)
def test_a_merge_has_the_bits_of_merge_models(place, tmp_path, operator, options):
    recipe = merge(place, operator, **options)
    write(recipe, tmp_path / "out")
    opened = [open_model(r) for r in recipe.references()]
    models = [model.read() for model in opened]
    named = options | {"weight": [0.9, 0.4], "base": models.pop() if recipe.base else None}
    want, _ = merge_models(operator, models, family="llama", **named)
    found = open_folder(tmp_path / "out")
    for name, value in host_tensors(want, "llama"):
        assert found[name].read().tobytes() == value.tobytes(), name
    held, account = merge_by_recipe(recipe, opened)
    same = {name: value.tobytes() for name, value in host_tensors(held, "llama")}
    assert same == {name: value.tobytes() for name, value in host_tensors(want, "llama")}
    assert account.differences(held) == []


@pytest.mark.parametrize("operator", ["dare_ties", "della"])
def test_chunks_threads_and_order_do_not_matter(place, tmp_path, operator):
    """Also for masks, whose elements are counted, for whole rows, and for the digests of what is read."""
    recipe = merge(place, operator, density=0.5)
    models, results = [open_model(r) for r in recipe.references()], []
    for threads, chunk, hashed in ((1, 1 << 18, "full"), (3, 32, "full"), (2, 7, "full"), (2, 7, "sampled")):
        prepared = prepare_merge(recipe, models)
        options = {"threads": threads, "chunk": chunk, "hash_inputs": hashed}
        account = write_merge(prepared, tmp_path / "out", overwrite=True, **options)
        made = json.loads((tmp_path / "out" / "account.json").read_text())
        results.append((files_of(tmp_path / "out"), account, made["inputs"]))
    assert results[0] == results[1] == results[2]
    assert results[3][:2] == results[0][:2]


def test_the_folder_is_the_first_models(place, tmp_path):
    (place / "one" / "tokenizer_config.json").write_text("{}")
    out = tmp_path / "out"
    account = write(injection(place), out)
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (place / "one" / "config.json").read_text()
    )
    assert (out / "tokenizer_config.json").read_text() == "{}"
    shards = lambda folder: {n: t.file.name for n, t in open_folder(folder).items()}
    assert len(set(shards(out).values())) > 2
    assert shards(out) == shards(place / "one")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):  # embeddings: vlm
        assert hashes(out)[name] == hashes(place / "one")[name]
    lines = json.loads((out / "account.json").read_text())["tensors"]
    assert {line["name"]: line["sha256"] for line in lines if line["action"] != "refused"} == hashes(out)
    assert verify_folder(out, account) == len(hashes(out))
    card = (out / "README.md").read_text()
    assert "operator: task_arithmetic" in card
    assert str(place / "two") in card
    assert re.search(r"\| expert \| .*/two \| \d+ \| [0-9a-f]{64} \|", card)
    # The command of the card: its own recipe makes the same bytes.
    assert main(["merge", str(out / "recipe.yaml"), "--out", str(tmp_path / "again"), "--verify"]) == 0
    assert files_of(tmp_path / "again") == files_of(out)
    # A changed byte is found.
    file = out / shards(out)["model.norm.weight"]
    tensor = open_folder(out)["model.norm.weight"]
    with open(file, "r+b") as opened:
        opened.seek(tensor.offset + 3)
        byte = opened.read(1)
        opened.seek(tensor.offset + 3)
        opened.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match=r"1 tensors differ from the account: model\.norm\.weight"):
        verify_folder(out, account)


def test_digests_of_inputs_tell_models_apart(place, tmp_path):
    write(injection(place), tmp_path / "a")
    swapped = injection(place, expert=str(place / "base"))
    write(swapped, tmp_path / "b")
    inputs = [json.loads((tmp_path / out / "account.json").read_text())["inputs"] for out in "ab"]
    same = [one["sha256"] == other["sha256"] for one, other in zip(*inputs, strict=True)]
    assert same == [True, False, True]


def test_rows_and_tied_heads(place, tmp_path):
    """A VLM with more rows than the others, whose head is tied; and a tied model among untied ones."""
    llama(tmp_path / "wide", 1, vocabulary=30)
    llama(tmp_path / "tied", 2, tied=True)
    recipe = InjectRecipe(
        vlm=str(tmp_path / "wide"),
        expert=str(tmp_path / "tied"),
        base=str(place / "base"),
        lambda_e=0.5,
        embeddings="merge",
    )
    account = write(recipe, tmp_path / "out")
    want, _ = inject_by_recipe(recipe, read_trio(*map(open_model, recipe.references())))
    found = open_folder(tmp_path / "out")
    for name, value in host_tensors(want, "llama"):
        assert found[name].read().tobytes() == value.tobytes(), name
    wide = open_folder(tmp_path / "wide")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert found[name].read()[24:].tobytes() == wide[name].read()[24:].tobytes()
        assert found[name].read()[:24].tobytes() != wide[name].read()[:24].tobytes()
    head = next(line for line in account.lines if line.name == "lm_head.weight")
    assert "the expert's is its embedding" in head.reason
    assert head.models == ("vlm", "base")


def test_an_expert_with_more_rows_than_the_vlm(place, tmp_path):
    llama(tmp_path / "wide", 2, vocabulary=30)
    recipe = injection(place, expert=str(tmp_path / "wide"), lambda_v=1.0, lambda_e=1.0, embeddings="merge")
    write(recipe, tmp_path / "out")
    models = (open_folder(path) for path in (place / "one", tmp_path / "wide", place / "base"))
    name = "model.embed_tokens.weight"
    vlm, expert, base = (model[name].read()[:24].astype(np.float32) for model in models)
    want = (base + ((vlm - base) + (expert - base))).astype(BF16)
    assert open_folder(tmp_path / "out")[name].read().tobytes() == want.tobytes()


def test_a_tied_head_that_is_not_the_embedding_is_refused(place, tmp_path):
    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + BF16.type(differs)

    recipe = merge(place, "linear", base=False)
    for differs in (0, 1):
        for name, seed in (("a", 1), ("b", 2)):
            llama(tmp_path / name, seed, tied=True, change=untie)
        models = [open_model(tmp_path / name) for name in "ab"]
        prepared = prepare_merge(recipe, models)
        if differs:
            with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens"):
                write_merge(prepared, tmp_path / "out", overwrite=True)
        else:
            write_merge(prepared, tmp_path / "out")
            found = hashes(tmp_path / "out")
            assert found["lm_head.weight"] == found["model.embed_tokens.weight"]


def test_a_model_twice_in_a_plan(tmp_path):
    """mergekit's files have the base among the models; its digest is of its bytes all the same."""
    base, one = llama(tmp_path / "base", 0), llama(tmp_path / "one", 1)
    inputs = [Input(str(p), m := open_model(p), engine_tensors(m)) for p in (base, one)]
    name = "model.layers.0.mlp.up_proj.weight"
    source = TensorSource(0, name)
    step = Merging("task_arithmetic", "paper", (source, TensorSource(1, name)), source, weights=(0.5, 0.5))
    plan = MergePlan((PlannedTensor(name, "bfloat16", (12, WIDTH), (), "", "", merging=step),))
    want = {f"{i}:{name}": hashes(path)[name] for i, path in enumerate((base, one))}
    for chunk in (7, 1 << 18):
        run_plan(plan, inputs, tmp_path / "out", chunk=chunk, hash_inputs="full", overwrite=True, expect=want)


def test_a_plan_of_any_making(tmp_path):
    """Stacked layers, copies in another dtype, sources read in a dtype of the plan."""
    base, one = llama(tmp_path / "base", 0), llama(tmp_path / "one", 1, dtype=np.float32)
    inputs = [Input(name, m := open_model(p), engine_tensors(m)) for name, p in (("a", one), ("base", base))]
    name = "model.layers.0.mlp.up_proj.weight"
    step = Merging(
        "task_arithmetic",
        "mergekit",
        (TensorSource(0, "model.layers.1.mlp.up_proj.weight"),),
        TensorSource(1, name),
        weights=(0.5,),
        read_as="bfloat16",
    )
    made = PlannedTensor(
        "model.layers.7.mlp.up_proj.weight", "float16", (12, WIDTH), ("a",), "", "", merging=step
    )
    copy = PlannedTensor("x", "bfloat16", (WIDTH,), ("a",), "", "", copy=TensorSource(0, "model.norm.weight"))
    got = run_plan(MergePlan((made, copy)), inputs, tmp_path / "out")
    x = open_folder(one)[step.sources[0].name].read().astype(BF16)
    want = merge_tensors(
        "task_arithmetic", [x], base=open_folder(base)[name].read(), mode="mergekit", weight=[0.5]
    )
    np.testing.assert_array_equal(got[made.name], np.asarray(want).astype(np.float16))
    np.testing.assert_array_equal(got["x"], open_folder(one)["model.norm.weight"].read().astype(BF16))


def engine_tensors(model):
    from jaxlab.checkpoints import model_tensors

    return model_tensors(model)


def run_plan(plan, inputs, out, overwrite=False, expect=None, **options):
    from jaxlab.checkpoints import resumable_folder

    with resumable_folder(out, layout(plan, inputs), digest="x", overwrite=overwrite) as folder:
        records = execute(plan, inputs, folder, **options)
        if expect is not None:
            assert [record["sources"] for record in records.values()] == [expect]
        folder.complete(config=config(), copy_from=None, texts={})
    return {name: tensor.read() for name, tensor in open_folder(out).items()}


def test_not_finite_values_are_counted_and_refused(place, tmp_path, capsys):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3:5] = np.nan
        tensors["lm_head.weight"][0, 0] = np.inf

    llama(tmp_path / "bad", 2, change=spoil)
    recipe = injection(place, expert=str(tmp_path / "bad"))
    with pytest.raises(UserError, match=r"be in model\.layers\.1\.mlp\.up_proj\.weight \(2\); `inspect"):
        write(recipe, tmp_path / "out")
    assert list(tmp_path.glob("out")) == list(tmp_path.glob(".out*")) == []
    account = write(recipe, tmp_path / "out", allow_not_finite=True)
    counts = {line.name: line.not_finite for line in account.lines if line.not_finite}
    assert counts == {"model.layers.1.mlp.up_proj.weight": 2}  # the head stays the VLM's
    # A copied tensor is looked at, too.
    recipe = injection(place, vlm=str(tmp_path / "bad"), expert=str(place / "two"))
    both = r"(lm_head\.weight \(1\)|, |model\.layers\.1\.mlp\.up_proj\.weight \(2\)){3};"
    for many in (1, 2):
        with pytest.raises(UserError, match=both):
            write(recipe, tmp_path / "out2", threads=many)
    assert list(tmp_path.glob("out2")) == list(tmp_path.glob(".out2*")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lambda_e: [{pattern: 'model.layers.9.*', value: 1}, {pattern: '*', value: 0.5}]",
            "matches no tensor",
        ),
        ("lambda_e: [{pattern: '*.mlp.*', value: 1}]", "no pattern of lambda_e matches"),
        ("lambda_e: [1, 2, 3]", "3 values for 2 layers"),
    ],
)
def test_lambdas_that_do_not_fit(place, tmp_path, capsys, text, message):
    recipe = "kind: inject\n" + "".join(
        f"{role}: {place / name}\n" for role, name in (("vlm", "one"), ("expert", "two"), ("base", "base"))
    )
    (tmp_path / "r.yaml").write_text(recipe + text + "\n")
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), "--check"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_pattern_with_the_names_of_another_model(tmp_path):
    """Written for the expert: model.* instead of language_model.model.*; silently wrong otherwise."""
    from tests.merging.test_families import language_model

    folders.make(tmp_path / "vlm", "llava")
    for seed, name in enumerate(("base", "expert")):
        noise = np.random.default_rng(seed).standard_normal
        weights = folders.weights("llava").items()
        language_model(
            tmp_path / name, "llava", {n: (x + noise(x.shape)).astype(np.float32) for n, x in weights}
        )
    roles = {role: str(tmp_path / role) for role in ("vlm", "expert", "base")}
    rules = ({"pattern": "model.layers.0.*", "value": 0.5}, {"pattern": "*", "value": 1.0})
    recipe = build(InjectRecipe, {**roles, "lambda_e": rules})
    with pytest.raises(
        UserError, match=r"it has names of the expert; those of the vlm count, as language_model"
    ):
        prepare_merge(recipe, [open_model(r) for r in recipe.references()])


def test_check_reads_headers_alone(place, tmp_path, capsys, monkeypatch):
    recipe = "kind: inject\nlambda_e: 0.5\noperator: ties\ndensity: 0.5\n" + "".join(
        f"{role}: {place / name}\n" for role, name in (("vlm", "one"), ("expert", "two"), ("base", "base"))
    )
    (tmp_path / "r.yaml").write_text(recipe)
    out = tmp_path / "out"
    words = ["merge", str(tmp_path / "r.yaml"), "--out", str(out)]
    # Neither Flax nor Orbax is loaded, and help needs no jax at all.
    code = "import sys; from jaxlab.tasks import main; main(sys.argv[1:])\n"
    code += "print('loaded', *(m for m in ('jax', 'flax', 'orbax', 'optax') if m in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    for more, loaded in ((["--check"], "loaded jax"), (["--help"], "loaded")):
        done = subprocess.run(
            [sys.executable, "-c", code, *words, *more],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1].strip() == loaded
    # The account comes before anything is written, and is the same.
    monkeypatch.setattr(
        "jaxlab.checkpoints.safetensors_file.read_into", lambda *_: pytest.fail("a tensor was read")
    )
    monkeypatch.setattr("jaxlab.merging.streams.Files.read", lambda *_: pytest.fail("a tensor was read"))
    assert main([*words, "--check"]) == 0
    checked = capsys.readouterr().out
    assert not out.exists()
    assert re.search(r"merged +2 +model\.layers\.\{i\}\.mlp\.up_proj\.weight +vlm\+expert\+base", checked)
    assert re.search(r"reads .* writes .* memory, takes about .* disk are free", checked)
    monkeypatch.undo()
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(checked[: checked.index("reads ")])


def test_needs_count_every_tensor(place):
    recipe = injection(place, embeddings="merge")
    prepared = prepare_merge(recipe, [open_model(r) for r in recipe.references()])
    needs, size = needs_of(prepared), sum(t.nbytes for t in open_folder(place / "one").values())
    assert needs.written_bytes == size
    assert needs.read_bytes == 3 * size


def test_what_matrices_take_grows_with_their_arithmetic():
    """Every operator that decomposes or multiplies them has a figure."""
    named = [*OPERATORS, *(f"ties+{name}" for name in AFTERWARDS)]
    of_matrices = [name for name in named if operator_named(name).scope("paper") == "matrix"]
    assert len(of_matrices) >= 9
    for name in of_matrices:
        small, large = (matrix_seconds(name, {}, (n, n)) for n in (512, 1024))
        assert large == pytest.approx(8 * small), name
        assert small > 0.01, name
        assert matrix_seconds(name, {}, (512,)) == 0.0
    few, many = (matrix_seconds("wudi", {"steps": n}, (64, 64)) for n in (30, 300))
    assert many == pytest.approx(10 * few)


def test_a_gguf_file_gives_its_dequantised_tensors(tmp_path, capsys):
    from tests.checkpoints import gguf_files

    case = "qwen2"
    weights = folders.weights(case)
    noisy = {
        n: x + 0.1 * np.random.default_rng(1).standard_normal(x.shape, np.float32) for n, x in weights.items()
    }
    for name, tensors in (("vlm", noisy), ("base", weights)):
        folders.write(tmp_path / name, folders.config(case), tensors)
    file = gguf_files.make(tmp_path / "expert.gguf", folders.config(case, 4), noisy)
    recipe = InjectRecipe(
        vlm=str(tmp_path / "vlm"), expert=str(file), base=str(tmp_path / "base"), lambda_v=0.0
    )
    write(recipe, tmp_path / "out")
    dequantised = open_model(file).tensors
    found = open_folder(tmp_path / "out")
    for name, base in weights.items():
        if "embed_tokens" not in name and "lm_head" not in name:
            assert found[name].read().tobytes() == (base + (dequantised[name].read() - base)).tobytes(), name
