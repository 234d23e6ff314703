"""llama2.c files: a small one made by hand, files that lie, and a real trained model."""

import dataclasses
import os
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.checkpoints import load_model
from jaxlab.checkpoints.formats.llama2c import find_tokenizer, read_config, read_tokenizer
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, generate
from tests.models.tiny import run_model

D, F, L, H, HKV, V, T = 8, 6, 2, 2, 1, 300, 16
K = D // H
STORIES = Path(os.environ.get("JAXLAB_DATA", "../shared/data")) / "stories260k"


def made(path, shared=True):
    """A checkpoint of random numbers; returns them by llama2.c's names."""
    rng = np.random.default_rng(0)
    shapes = {
        "embedding": (V, D),
        "rms_att": (L, D),
        "wq": (L, H * K, D),
        "wk": (L, HKV * K, D),
        "wv": (L, HKV * K, D),
        "wo": (L, D, H * K),
        "rms_ffn": (L, D),
        "w1": (L, F, D),
        "w2": (L, D, F),
        "w3": (L, F, D),
        "rms_final": (D,),
        "freq_cis": (2, T, K // 2),
        **({} if shared else {"wcls": (V, D)}),
    }
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    header = struct.pack("<7i", D, F, L, H, HKV, V if shared else -V, T)
    path.write_bytes(header + b"".join(x.tobytes() for x in tensors.values()))
    return tensors


@pytest.mark.parametrize("shared", [True, False])
def test_a_model_is_the_one_that_turns_neighbours(tmp_path, shared):
    """llama2.c's matrices as they are, with rotary pairs of neighbours, give the same logits."""
    t = made(tmp_path / "model.bin", shared)
    config, params, tokenizer = load_model(tmp_path / "model.bin")
    assert tokenizer is None
    assert config.tie_embeddings == shared
    heads = lambda x, n: jnp.asarray(x.reshape(L, n, K, D).transpose(0, 3, 1, 2))
    linear = lambda x: jnp.asarray(x.swapaxes(1, 2))
    plain = {
        "embedding": {"table": jnp.asarray(t["embedding"])},
        "final_norm": {"scale": jnp.asarray(t["rms_final"])},
        "layers": {
            "attention_norm": {"scale": jnp.asarray(t["rms_att"])},
            "mlp_norm": {"scale": jnp.asarray(t["rms_ffn"])},
            "attention": {
                "query": heads(t["wq"], H),
                "key": heads(t["wk"], HKV),
                "value": heads(t["wv"], HKV),
                "output": jnp.asarray(t["wo"].transpose(0, 2, 1).reshape(L, H, K, D)),
            },
            "mlp": {"gate": linear(t["w1"]), "down": linear(t["w2"]), "up": linear(t["w3"])},
        },
    }
    if not shared:
        plain["head"] = {"table": jnp.asarray(t["wcls"].T)}
    neighbours = dataclasses.replace(config, position=dataclasses.replace(config.rope, interleaved=True))
    tokens = {"tokens": jnp.asarray(np.random.default_rng(1).integers(0, V, (1, 7)), jnp.int32)}
    found, expected = run_model(params, tokens, config)[0], run_model(plain, tokens, neighbours)[0]
    assert np.abs(np.asarray(expected)).max() > 1
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def tokenizer_bytes(pieces, scores):
    parts = [struct.pack("<i", 9)]
    for piece, score in zip(pieces, scores, strict=True):
        parts.append(struct.pack("<fi", score, len(piece.encode())) + piece.encode())
    return b"".join(parts)


PIECES = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256))]
PIECES += [" ", "a", "b", "c", "ab", "bc", " a", " ab", *(f"x{i}" for i in range(V - 267))]


def test_better_scores_merge_first_and_bytes_catch_the_rest(tmp_path):
    file, config = tmp_path / "tok.bin", ModelConfig(vocab_size=V)
    scores = dict.fromkeys(PIECES, -100.0) | {"ab": -3.0, "bc": -2.0, " a": -1.0}
    file.write_bytes(tokenizer_bytes(PIECES, list(scores.values())))
    tokenizer = read_tokenizer(file, config)
    at = PIECES.index
    assert tokenizer.encode("").ids == [1]
    assert tokenizer.encode("ab").ids == [1, at(" ab")]
    assert tokenizer.encode("cabc").ids == [1, at(" "), at("c"), at("a"), at("bc")]  # bc before ab
    snowman = [at(f"<0x{byte:02X}>") for byte in "☃".encode()]
    assert tokenizer.encode("☃").ids == [1, at(" "), *snowman]
    assert tokenizer.decode(tokenizer.encode("ab ☃ c").ids) == "ab ☃ c"


def test_files_that_lie_are_one_line(tmp_path):
    made(tmp_path / "good.bin")
    good = (tmp_path / "good.bin").read_bytes()
    header = lambda *sizes: struct.pack("<7i", *sizes) + good[28:]
    variants = [
        b"",
        good[:20],
        good[:28],
        good[:-1],
        good + b"\0",
        header(D, F, L, H, HKV, V + 1, T),
        header(0, F, L, H, HKV, V, T),
        header(D, F, L, 3, HKV, V, T),
        header(D, F, L, H, 3, V, T),
        header(D, F, L, H, HKV, -(2**31), T),
        header(2**30, F, L, H, HKV, V, T),
        header(D, F, L, H, HKV, -V, T),
        header(D, F, L, H, -1, V, T),
        b"PK\x03\x04" + bytes(100),
    ]
    for index, data in enumerate(variants):
        file = tmp_path / f"{index}.bin"
        file.write_bytes(data)
        with pytest.raises(UserError) as error:
            load_model(file)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path / "absent.bin")
    whole = tokenizer_bytes(PIECES, [0.0] * V)
    for data in (b"", whole[:-1], whole + b"x", whole[:40], whole[:8] + b"\xff\xff\xff\xff" + whole[12:]):
        (tmp_path / "tok").write_bytes(data)
        with pytest.raises(UserError):
            read_tokenizer(tmp_path / "tok", ModelConfig(vocab_size=V))


def test_the_tokenizer_beside_a_model_is_found(tmp_path):
    model = tmp_path / "token_model.bin"
    model.touch()
    assert find_tokenizer(model) is None
    (tmp_path / "tok512.bin").touch()
    assert find_tokenizer(model) == tmp_path / "tok512.bin"
    (tmp_path / "tok32000.bin").touch()
    assert find_tokenizer(model) is None  # which of the two?
    (tmp_path / "tokenizer.bin").touch()
    assert find_tokenizer(model) == tmp_path / "tokenizer.bin"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the model stories260K is not here; set JAXLAB_DATA")
def test_a_real_model_tells_its_story():
    config, params, tokenizer = load_model(STORIES / "stories260K.bin")
    assert tokenizer is not None
    prompt = {"tokens": jnp.asarray([tokenizer.encode("").ids], jnp.int32)}
    made = generate(params, prompt, config, max_new_tokens=30)[0]
    text = tokenizer.decode(made.tolist())
    assert text.startswith("Once upon a time, there was a little girl named Lily")
