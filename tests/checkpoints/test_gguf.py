"""GGUF files: the same model as the Hugging Face folder that they were made from, whatever the types."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quantize
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.checkpoints import families, inspect_model, load_model, open_model, resolve, save_model
from jaxlab.checkpoints.compatibility import difference
from jaxlab.checkpoints.gguf_header import can_dequantize, read_gguf
from jaxlab.checkpoints.gguf_tokenizer import GGUFTokens
from jaxlab.errors import UserError, UserNote
from jaxlab.icl import flows
from jaxlab.models import forward
from jaxlab.tasks import main as run_command
from tests.checkpoints import folders, gguf_files

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf"
SMOLLM2 = Path(os.environ.get("JAXLAB_MODELS", "~/models")).expanduser() / "SmolLM2-135M-Instruct.Q4_1.gguf"
CASES = (
    "llama2",
    "llama3",
    "llama_bias",
    "llama_tied",
    "llama_linear",
    "llama_yarn",
    "mixtral",
    "qwen2",
    "qwen2_5",
    "qwen3",
    "qwen3_moe_raw",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_neox_serial",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi",
    "phi3",
    "phi3_longrope",
    "smollm3",
    "stablelm",
    "stablelm_parallel",
    "granite",
    "cohere",
    "cohere2",
    "exaone4",
    "exaone4_full",
    "seed_oss",
    "seed_oss_bias",
)
SAID_OTHERWISE = {
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3_text": {"query_pre_attn_scalar": 12},
    "qwen3_moe_raw": {"norm_topk_prob": True},
}
"""What a GGUF file cannot say, as llama.cpp has it."""
KINDS = [kind for kind in GGMLQuantizationType if can_dequantize(kind)]
TYPES = {"tokenizer.ggml.token_type": [3, 3, *[1] * 129]}


def config_of(case):
    return folders.config(case, 4) | SAID_OTHERWISE.get(case, {})


def make(path, case, **more):
    return gguf_files.make(path / f"{case}.gguf", config_of(case), folders.weights(case), **more)


# The model


@pytest.mark.parametrize("case", CASES)
def test_tensors_and_config_are_those_of_the_folder(tmp_path, case):
    opened = open_model(make(tmp_path, case))
    tensors, expected = opened.tensors, folders.weights(case)
    assert set(tensors) == set(expected)
    for name, values in expected.items():
        got = tensors[name]
        assert got.shape == values.shape
        # Gemma's norms lose a bit: 1 + w was rounded.
        np.testing.assert_allclose(got.read(), values, rtol=0, atol=1.2e-7 if "gemma" in case else 0)
        np.testing.assert_array_equal(got.read_rows(1, 3), got.read()[1:3])
    assert difference(opened.config, families.read_config(config_of(case), case)) is None
    written = families.read_config(opened.config_json, case)
    assert difference(opened.config, written) is None


def test_rows_in_their_own_order_are_not_taken_for_permuted_ones(tmp_path):
    """The check above can fail: the same rows, not permuted by the writer, are another model."""
    config = config_of("llama2")
    tensors = gguf_files.converted(config, folders.weights("llama2"))
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors["blk.0.attn_q.weight"] = folders.weights("llama2")[name]
    path = gguf_files.write(tmp_path / "m.gguf", "llama", gguf_files.metadata(config), tensors)
    assert not np.array_equal(open_model(path).tensors[name].read(), folders.weights("llama2")[name])


def test_a_gate_of_shared_experts_that_lost_an_axis_is_read(tmp_path):
    """Qwen2-MoE, without the layer of the golden case that has no experts, which llama.cpp does not know."""
    config = config_of("qwen2_moe") | {"mlp_only_layers": [], "norm_topk_prob": False}
    first = {n: v for n, v in folders.weights("qwen2_moe").items() if ".layers.1." in n}
    tensors = {n: v for n, v in folders.weights("qwen2_moe").items() if ".layers.0." not in n}
    tensors |= {n.replace(".layers.1.", ".layers.0."): v for n, v in first.items()}
    made = gguf_files.converted(config, tensors)
    made = {n: v.reshape(-1) if "gate_inp_shexp" in n else v for n, v in made.items()}
    path = gguf_files.write(tmp_path / "m.gguf", "qwen2moe", gguf_files.metadata(config), made)
    opened = open_model(path)
    assert set(opened.tensors) == set(tensors)
    for name, values in tensors.items():
        np.testing.assert_array_equal(opened.tensors[name].read(), values)
    assert difference(opened.config, families.read_config(config, "x")) is None


def test_logits_are_those_of_transformers(tmp_path):
    golden = folders.golden("llama3")
    config, params, tokenizer = load_model(make(tmp_path, "llama3"))
    assert tokenizer is None
    logits = jax.jit(forward, static_argnames="config")(
        params, {"tokens": golden["tokens"].astype(np.int32)}, config
    )[0]
    assert np.abs(logits - golden["logits"]).max() < 1e-4 * np.abs(golden["logits"]).max()


def test_flows_are_those_of_the_folder(tmp_path):
    golden = folders.golden("llama2")
    tokens = golden["tokens"][:, :9].astype(np.int32)
    classes = np.arange(18, dtype=np.int32).reshape(2, 9) % 3
    targets = {"positions": np.full(2, 8), "label_tokens": np.asarray([4, 9]), "labels": np.asarray([0, 1])}
    found = []
    for path in (make(tmp_path, "llama2"), folders.make(tmp_path / "hf", "llama2")):
        config, params, _ = load_model(path)
        found.append(flows(params, {"tokens": tokens}, config, classes, targets)[0])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_is_dequantised_as_the_package_does(tmp_path, kind):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 3, 512)).astype(np.float32)
    try:
        raw = quantize(values, kind)
    except NotImplementedError:  # the package only reads these
        block, size = GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (5, 3, 512 // block * size)).astype(np.uint8)
    writer = gguf_files.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("before", np.arange(7, dtype=np.float32))
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(tmp_path / "t.gguf").tensors["t"]
    assert tensor.shape == (5, 3, 512)
    with np.errstate(all="ignore"):  # bytes at random make any number
        expected, got, rows = dequantize(raw, kind), tensor.read(), tensor.read_rows(2, 4)
    np.testing.assert_array_equal(got.astype(np.float32), expected)
    np.testing.assert_array_equal(rows.astype(np.float32), expected[2:4])
    assert tensor.stored_bytes == raw.nbytes


def mixed(name):
    """A type for each tensor, as mixtures of quantisations have them."""
    if "ffn" in name and ".1." in name:
        return GGMLQuantizationType.BF16
    return GGMLQuantizationType.Q8_0 if "attn" in name else GGMLQuantizationType.F16


def test_a_mixture_of_types_is_read_as_float32(tmp_path):
    path = make(tmp_path, "llama2", kind=mixed)
    opened = open_model(path)
    assert opened.dequantized == "Q8_0"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(opened.shapes)} == {"float32"}
    params, header = opened.read(), read_gguf(path)
    gate = header.tensors["blk.1.ffn_gate.weight"].read().astype(np.float32)
    np.testing.assert_array_equal(params["layers"]["mlp"]["gate"][1], gate.T)
    halves = open_model(make(tmp_path / "..", "llama2", kind=lambda name: GGMLQuantizationType.BF16))
    assert halves.dequantized is None
    assert halves.config.compute_dtype == "bfloat16"


def test_inspect_tells_types_and_bytes_without_reading_a_tensor(tmp_path, capsys):
    path = make(tmp_path, "llama2", kind=mixed)
    assert run_command(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    header = read_gguf(path)
    stored = sum(tensor.stored_bytes for tensor in header.tensors.values())
    assert f"{stored:,} bytes of " in said
    for kind in ("Q8_0", "F16", "BF16", "F32"):
        count = sum(t.size for t in header.tensors.values() if t.kind.name == kind)
        assert f"{kind} ({count:,})" in said
    assert "21 used" in said


def test_reading_puts_each_part_where_it_shall_live(tmp_path):
    opened = open_model(make(tmp_path, "llama2", kind=mixed))
    mesh = jax.make_mesh((2,), ("model",))
    parts = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), opened.shapes)
    parts["layers"]["mlp"]["up"] = NamedSharding(mesh, PartitionSpec(None, None, "model"))
    sharded, whole = opened.read(shardings=parts), opened.read()
    assert sharded["layers"]["mlp"]["up"].sharding == parts["layers"]["mlp"]["up"]
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)


# Tokenizers


def tokens_of(model):
    keys = {
        "model": "llama",
        "tokens": model["tokens"],
        "scores": np.asarray(model["scores"], np.float32),
        "token_type": np.asarray(model["types"], np.int32),
        "add_space_prefix": model["prefix"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


MODELS = json.loads((GOLDEN / "sentencepiece.json").read_text())["models"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: "prefix" if model["prefix"] else "no prefix")
def test_sentencepiece_ids_are_those_of_sentencepiece(model):
    tokenizer = GGUFTokens(tokens_of(model), "x").tokenizer
    for case in model["texts"]:
        assert tokenizer.encode(case["text"]).ids == [1, *case["ids"]]  # llama.cpp: texts begin with <s>
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    inner = tokenizer.encode("a<s>b<tool>c", add_special_tokens=False).ids
    assert inner.count(1) == 1
    assert model["tokens"].index("<tool>") in inner


BYTES = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else None for b in range(256)]
_OTHERS = iter(range(256, 512))
ALPHABET = [text if text is not None else chr(next(_OTHERS)) for text in BYTES]
"""A letter for each byte, GPT-2's."""


def byte_level(pre, **more):
    """A tokenizer that merges nothing across pieces: so pieces show as the merges that happen."""
    tokens = [*ALPHABET, "ab", "<|end|>", "<user>"]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": np.asarray([*[1] * 257, 3, 4], np.int32),
        "merges": ["a b"],
        "eos_token_id": 257,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


UNTIDY = "I'm at  12345\tHeLLo'LL a+b\n\n x"
PIECES = {
    "gpt-2": ["I", "'m", " at", " ", " 12345", "\t", "HeLLo", "'", "LL", " a", "+", "b", "\n\n", " x"],
    "smollm": ["I", "'m", " at", "  ", *"12345", "\t", "HeLLo", "'", "LL", " a", "+", "b", "\n\n", " x"],
    "qwen2": ["I", "'m", " at", " ", " ", *"12345", "\tHeLLo", "'LL", " a", "+b", "\n\n", " x"],
    "llama-bpe": ["I", "'m", " at", " ", " ", "123", "45", "\tHeLLo", "'LL", " a", "+b", "\n\n", " x"],
    "tekken": ["I", "'m", " at", " ", " ", *"12345", "\tHe", "LLo", "'LL", " a", "+b", "\n\n", " x"],
    "gpt-4o": ["I'm", " at", " ", " ", "123", "45", "\tHe", "LLo'LL", " a", "+b", "\n\n", " x"],
    "deepseek-v3": ["I", "'m", " at", "  ", "123", "45", "\tHeLLo", "'LL", " a", "+b", "\n\n", " x"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_a_name_says_how_text_is_cut(pre):
    tokens = GGUFTokens(byte_level(pre, bos_token_id=257), "x")
    cut = tokens.tokenizer.pre_tokenizer.pre_tokenize_str(UNTIDY)
    letters = dict(zip(ALPHABET, range(256), strict=True))
    assert [bytes(letters[c] for c in piece).decode() for piece, _ in cut] == PIECES[pre]


def test_special_tokens_and_those_around_a_text():
    tokens = GGUFTokens(byte_level("gpt-2"), "x")
    encode = lambda keys, text: GGUFTokens(keys, "x").tokenizer.encode(text).ids
    assert encode(tokens.metadata, "ab<|end|>ab<user>") == [256, 257, 256, 258]
    assert tokens.tokenizer.decode([256, 257, 258]) == "ab<user>"
    assert encode(byte_level("gpt-2", bos_token_id=257, add_bos_token=True), "ab") == [257, 256]
    assert encode(byte_level("gpt-2", add_eos_token=True), "ab") == [256, 257]
    assert encode(byte_level("llama-bpe", bos_token_id=257), "ab") == [257, 256]
    assert encode(byte_level("llama-bpe", bos_token_id=257, add_bos_token=False), "ab") == [256]
    assert GGUFTokens(byte_level("gpt-2", eot_token_id=256, eom_token_id=257), "x").ends == [257, 256]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pre": "strange"}, r"pre is 'strange'; text is split in the ways of .*llama-bpe.*smollm"),
        ({"pre": None}, "pre is missing"),
        ({"model": "bert"}, "model is 'bert'; only gpt2 and llama are read"),
        ({"merges": ["a b c"]}, "holds 'a b c', which is no pair of tokens"),
        ({"merges": ["a zz"]}, "holds 'a zz', which is no pair of tokens that make one"),
        ({"merges": None}, "merges is missing"),
        ({"tokens": None}, "tokens is missing"),
        ({"token_type": np.zeros(3, np.int32)}, "a number for each of 259 tokens"),
        ({"eos_token_id": 4000, "add_eos_token": True}, "eos_token_id is 4000, not one of 259 tokens"),
        ({"add_bos_token": True}, "add_bos_token is true, but .*bos_token_id is missing"),
        ({"add_bos_token": 3}, "add_bos_token is 3, not true or false"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_one_line(changed, message):
    keys = byte_level(**({"pre": "gpt-2"} | changed))
    with pytest.raises(UserError, match=message):
        _ = GGUFTokens(keys, "m.gguf").tokenizer


def chat(**more):
    """Keys of a tokenizer for a model of 131 rows."""
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<|end|>", "<|start|>", *(ALPHABET[i] for i in range(129))],
        "tokenizer.ggml.token_type": [3, 3, *[1] * 129],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    del keys["tokenizer.ggml.merges"]  # the writer cannot write an empty list
    return keys | more


@pytest.fixture
def chatty(tmp_path):
    return make(
        tmp_path,
        "llama2",
        others=chat(
            **{
                "tokenizer.ggml.merges": ["! !"],
                "tokenizer.ggml.tokens": ["<|end|>", "<|start|>", "!!", *(ALPHABET[i] for i in range(128))],
            }
        ),
    )


def test_a_tokenizer_that_is_not_known_stops_neither_inspect_nor_convert(tmp_path, capsys):
    path = make(tmp_path, "llama2", others=chat(**{"tokenizer.ggml.pre": "strange"}))
    assert run_command(["inspect", str(path)]) == 0
    assert "pre is 'strange'" in capsys.readouterr().out
    assert run_command(["generate", str(path), "--prompt", "x"]) == 2
    assert "pre is 'strange'" in capsys.readouterr().err
    assert run_command(["convert", str(path), str(tmp_path / "out")]) == 0
    assert "note: " in capsys.readouterr().out


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_a_converted_file_keeps_tokenizer_template_and_ends(tmp_path, chatty, form, capsys):
    out = tmp_path / "out"
    assert run_command(["convert", str(chatty), str(out), "--to", form, "--verify"]) == 0
    assert "verified: all 21 tensors are the same bytes" in capsys.readouterr().out
    opened, written = open_model(chatty), open_model(out)
    assert written.config == opened.config
    assert written.end_tokens == opened.end_tokens == {0}
    assert written.chat_template == opened.chat_template == "{{ messages[0]['content'] }}"
    assert written.tokenizer.to_str() == opened.tokenizer.to_str()
    again = tmp_path / "again"
    source = written.source_files
    save_model(
        again, written.config, written.read(), written.tokenizer, form="huggingface", source_files=source
    )
    config = json.loads((again / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 0)
    assert json.loads((again / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    named = json.loads((again / "tokenizer_config.json").read_text())
    assert (named["bos_token"], named["eos_token"]) == ("<|start|>", "<|end|>")
    assert (again / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_generate_goes_on_from_a_prompt(chatty, capsys):
    assert run_command(["generate", str(chatty), "--prompt", "!!", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_merge_says_that_its_models_are_not_the_originals(tmp_path):
    tensors = folders.weights("llama2")
    folder = folders.write(tmp_path / "hf", folders.config("llama2"), tensors)
    path = make(tmp_path, "llama2", kind=mixed)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"kind: merge\nmodels: [{{model: {path}}}, {{model: {folder}}}]\noperator: linear\n")
    with pytest.warns(UserNote, match=r"llama2\.gguf: its tensors are dequantised from Q8_0"):
        assert run_command(["merge", str(recipe), "--out", str(tmp_path / "out")]) == 0


# Split files


def split(path, case="llama2", shards=3):
    """The file of a case in shards, as gguf-split names them."""
    config = config_of(case)
    tensors = gguf_files.converted(config, folders.weights(case))
    names = list(tensors)
    for i in range(shards):
        part = {name: tensors[name] for name in names[i::shards]}
        keys = {"split.no": i, "split.count": shards, "split.tensors.count": len(tensors)}
        target = path / f"m-{i + 1:05d}-of-{shards:05d}.gguf"
        gguf_files.write(target, "llama", gguf_files.metadata(config) if i == 0 else {}, part, others=keys)
    return path / f"m-00001-of-{shards:05d}.gguf"


def test_a_split_file_is_read_whole(tmp_path):
    opened = open_model(split(tmp_path))
    for name, values in folders.weights("llama2").items():
        np.testing.assert_array_equal(opened.tensors[name].read(), values)
    assert len(opened.inputs) == 3
    before = opened.identity
    with open(opened.inputs[2], "ab") as last:
        last.write(b"\0")
    assert open_model(opened.path).identity != before


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (lambda f: (f / "m-00002-of-00003.gguf").unlink(), 1, "shards are missing: m-00002-of-00003.gguf"),
        (lambda f: None, 2, "not the first of 3 shards; name m-00001-of-00003.gguf"),
        (
            lambda f: (f / "m-00003-of-00003.gguf").replace(f / "m-00002-of-00003.gguf"),
            1,
            "shards are missing",
        ),
        (
            lambda f: (f / "m-00003-of-00003.gguf").write_bytes((f / "m-00002-of-00003.gguf").read_bytes()),
            1,
            "says it is shard 1 of 3, not 2 of 3",
        ),
    ],
)
def test_a_split_file_with_a_fault_is_one_line(tmp_path, spoil, name, message):
    split(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        _ = open_model(tmp_path / f"m-0000{name}-of-00003.gguf").config


def test_a_shard_of_another_name_says_so(tmp_path):
    split(tmp_path).rename(tmp_path / "other.gguf")
    with pytest.raises(UserError, match="one of 3 shards, but not named"):
        _ = open_model(tmp_path / "other.gguf").config


# What is not read


@pytest.mark.parametrize(
    ("architecture", "others", "message"),
    [
        ("clip", {}, "the vision tower of a model \\(mmproj\\)"),
        ("llama", {"general.type": "mmproj"}, "a GGUF file of type 'mmproj', not a model"),
        ("llama", {"general.type": "adapter"}, "a GGUF file of type 'adapter', not a model"),
        ("mamba", {}, "the architecture 'mamba' is not supported; supported: .*gemma2.*llama"),
        (
            "llama",
            {"llama.attention.clamp_kqv": 8.0},
            "clamp_kqv 8.0 is not known; .*--ignore-keys llama.attention.clamp_kqv",
        ),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "must be none, linear or yarn, is longrope"),
        ("llama", {"llama.attention.value_length": 4}, "value_length must be that of the keys, 8, is 4"),
        ("llama", {"llama.rope.dimension_count": 4}, "dimension_count must be all 8 of a head, is 4"),
        ("llama", {"llama.attention.head_count": 0}, "attention.head_count must be at least 1, is 0"),
        ("llama", {"llama.block_count": 3}, "9 tensors are missing"),
        ("llama", {"llama.block_count": 1000}, "says 1000 layers, and holds 21 tensors"),
        ("llama", {"llama.context_length": None}, "llama.context_length is missing"),
        ("llama", {"llama.embedding_length": 33}, "expected"),
        ("llama", {"llama.attention.causal": False}, "attention.causal must be true, is False"),
        ("llama", {"llama.attention.head_count_kv": [2, 4]}, "must be a whole number"),
    ],
)
def test_what_is_not_known_is_one_line(tmp_path, architecture, others, message):
    config = config_of("llama2")
    keys = {f"llama.{key}": value for key, value in gguf_files.metadata(config).items()} | others
    keys = {key: value for key, value in keys.items() if value is not None}
    tensors = gguf_files.converted(config, folders.weights("llama2"))
    path = gguf_files.write(tmp_path / "m.gguf", architecture, {}, tensors, others=keys)
    with pytest.raises(UserError, match=message) as caught:
        open_model(path).read()
    assert str(path) in str(caught.value)


def test_keys_and_tensors_are_left_out_on_request(tmp_path):
    config = config_of("llama2")
    tensors = gguf_files.converted(config, folders.weights("llama2")) | {
        "strange": np.ones((2, 2), np.float32)
    }
    keys = gguf_files.metadata(config) | {"attention.clamp_kqv": 8.0}
    path = gguf_files.write(tmp_path / "m.gguf", "llama", keys, tensors)
    wanted = {"ignore_keys": ["llama.attention.clamp_kqv"], "ignore_tensors": ["stra*"]}
    opened = open_model(path, **wanted)
    with pytest.warns(UserNote, match="tensors ignored, as you asked: stra"):
        opened.read()
    assert opened.source_files.config["_jaxlab_ignored_keys"] == ["llama.attention.clamp_kqv"]
    with pytest.raises(UserError, match=r"--ignore-keys llama\.block_count: the metadata lacks it"):
        _ = open_model(path, ignore_keys=[*wanted["ignore_keys"], "llama.block_count"]).config
    with pytest.raises(UserError, match="--adapter is for folders of Hugging Face"):
        open_model(path, adapter=tmp_path)


def test_a_tensor_that_is_not_known_is_named(tmp_path):
    tensors = gguf_files.converted(config_of("llama2"), folders.weights("llama2"))
    tensors["blk.0.strange.weight"] = np.ones((2, 2), np.float32)
    path = gguf_files.write(tmp_path / "m.gguf", "llama", gguf_files.metadata(config_of("llama2")), tensors)
    with pytest.raises(UserError, match=r"not known: blk\.0\.strange\.weight"):
        open_model(path).read()
    assert "blk.0.strange.weight" in inspect_model(open_model(path), "m").problems


def test_rotary_factors_that_are_not_llama_3s_are_refused(tmp_path):
    tensors = gguf_files.converted(config_of("llama2"), folders.weights("llama2"))
    tensors["rope_freqs.weight"] = np.asarray([1, 3, 2, 5], np.float32)
    path = gguf_files.write(tmp_path / "m.gguf", "llama", gguf_files.metadata(config_of("llama2")), tensors)
    with pytest.raises(UserError, match=r"rope_freqs\.weight stretches rotary positions"):
        _ = open_model(path).config


def test_a_folder_of_gguf_files_says_which_to_name(tmp_path):
    make(tmp_path, "llama2")
    with pytest.raises(UserError, match="holds GGUF files; name one of them"):
        open_model(tmp_path)
    assert resolve(tmp_path / "llama2.gguf") == tmp_path / "llama2.gguf"


# A real one


HAS_SMOLLM2 = pytest.mark.skipif(
    not SMOLLM2.exists(), reason=f"needs {SMOLLM2}; set JAXLAB_MODELS to its folder"
)


@HAS_SMOLLM2
def test_a_real_model_is_told_and_reads_untidy_text(capsys):
    assert run_command(["inspect", str(SMOLLM2)]) == 0
    assert "Q4_1 (106,168,320), Q8_0 (28,311,552), F32 (35,136)" in capsys.readouterr().out
    opened = open_model(SMOLLM2)
    checks = {  # of the tokenizer.json on the hub
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }
    for text, ids in checks.items():
        assert opened.tokenizer.encode(text).ids == ids
        assert opened.tokenizer.decode(ids) == text


@pytest.mark.slow  # 135 million parameters, in code that is not optimised
@HAS_SMOLLM2
def test_a_real_model_knows_the_capital_of_france():
    opened = open_model(SMOLLM2)
    golden = dict(np.load(GOLDEN / "smollm2.npz"))
    logits = jax.jit(forward, static_argnames="config")(
        opened.read(), {"tokens": golden["tokens"]}, opened.config
    )[0]
    apart = np.abs(np.asarray(logits)[..., golden["columns"]] - golden["logits"]).max()
    assert apart < 2e-5 * np.abs(golden["logits"]).max()
    assert opened.tokenizer.decode([int(logits[0, 4].argmax())]) == " Paris"
