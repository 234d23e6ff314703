"""The task generate: what it streams, how it reads images, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxlab.checkpoints import save_model
from jaxlab.data.digits_words import digits_tokenizer
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.evaluation import answers
from jaxlab.evaluation.prompting import read_plain_image
from jaxlab.models import PlainVisionConfig
from jaxlab.processing import TextStream
from jaxlab.tasks import generate
from tests.models.tiny import draw_params, make_config


def successor(vocab):
    """A model that answers token t with t + 1."""
    one = {"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_width": 1}
    model = make_config(vocab_size=vocab, width=vocab, tie_embeddings=False, max_length=6, **one)
    params = jax.tree.map(jnp.zeros_like, draw_params(model))
    params["embedding"]["table"] = jnp.eye(vocab)
    params["final_norm"]["scale"] = jnp.ones(vocab)
    params["head"]["table"] = jnp.roll(jnp.eye(vocab), 1, axis=1)
    return model, params


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "bytes"
    save_model(path, *successor(256))
    return str(path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_new_tokens": 4}, "cdef"),
        ({"max_new_tokens": 4, "prefill_chunk": 1}, "cdef"),
        ({}, "cdef"),  # up to max_length
        ({"stop": ("e",)}, "cd"),
        ({"stop": ("x", "ef")}, "cd"),
        ({"stop": ("dx", "fe")}, "cdef"),  # held back, and shown when nothing followed
    ],
)
def test_a_byte_model_streams(bytes_model, capsys, options, text):
    generate.run(generate.Arguments(bytes_model, prompt="ab", **options))
    assert capsys.readouterr().out == f"{text}\n"


def test_bytes_of_one_letter_are_shown_together():
    stream = TextStream(None)
    assert [stream.add(byte) for byte in "é!".encode()] == ["", "é", "!"]
    assert stream.add(300) == "<300>"


def test_a_model_with_words_reads_and_streams_words(tmp_path, capsys, monkeypatch):
    tokenizer = digits_tokenizer()
    model = make_config(num_layers=1, vocab_size=tokenizer.get_vocab_size())
    save_model(tmp_path / "words", model, draw_params(model), tokenizer)
    words = [tokenizer.id_to_token(i) for i in range(20, 24)]

    def following(params, batch, config, **_):
        return (batch["tokens"][:, -1] + i for i in (1, 2, 3))

    monkeypatch.setattr(answers, "stream", following)
    generate.run(generate.Arguments(str(tmp_path / "words"), prompt=words[0]))
    assert capsys.readouterr().out.split() == words[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"raw": True}, "holds 0 tokens; the model takes 1 to 5"),
        ({"prompt": "abcdefgh"}, "holds 8 tokens"),
        ({"prompt": "a\udcff"}, r"--prompt is not valid UTF-8 \(at its character 2\)"),
        ({"prompt": "é" * 9}, "holds 18 tokens"),
        ({"prompt": "a", "chat": True}, r"has no chat template; give one by --chat_template FILE"),
        ({"prompt": "a", "system": "b"}, "has no chat template"),
        ({"prompt": "a", "chat_template": "other"}, "no template, nor a text file; the model has none"),
        ({"prompts": "none.txt"}, "none.txt: cannot be read: No such file"),
        ({"messages": "none.jsonl"}, "none.jsonl: cannot be read: No such file"),
        ({"prompt": "a", "image": ("x.png",)}, "without vision cannot read x.png"),
    ],
)
def test_errors(bytes_model, options, message):
    with pytest.raises(UserError, match=message):
        generate.run(generate.Arguments(bytes_model, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"max_new_tokens": 0},
        {"prefill_chunk": 0},
        {"prefill_chunk": 8, "image": ("a",)},
        {"top_k": -1},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"samples": 0},
        {"batch_size": 0},
        {"chat": True, "raw": True},
        {"system": "x", "raw": True},
        {"chat_options": {"a": 1}, "raw": True},
        {"prompts": "x"},
        {"prompt": "", "messages": "x", "raw": True},
        {"prompt": "", "messages": "x", "image": ("a",)},
        {"prompt": None},
    ],
)
def test_impossible_arguments(options):
    with pytest.raises(ConfigError) as raised:
        generate.Arguments("model", **{"prompt": "a", **options})
    assert raised.value.key in options


def test_images_are_read_in_the_size_and_channels_of_the_model(tmp_path):
    pixels = np.zeros((4, 4), np.uint8)
    pixels[:2, 2:] = [[100, 200], [0, 100]]
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    grey = make_config(vision=PlainVisionConfig(num_layers=1, image_size=2, patch_size=1, channels=1))
    found = read_plain_image(str(tmp_path / "grey.png"), grey)
    np.testing.assert_allclose(found[:, :, 0], [[0, 100 / 255], [0, 0]], rtol=1e-6)
    Image.new("RGB", (5, 3), (255, 0, 51)).save(tmp_path / "colour.png")
    colour = make_config(vision=PlainVisionConfig(num_layers=1, image_size=4, patch_size=2, channels=3))
    found = read_plain_image(str(tmp_path / "colour.png"), colour)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.broadcast_to([1, 0, 0.2], (4, 4, 3)), rtol=1e-6)
    (tmp_path / "broken.png").write_bytes((tmp_path / "colour.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("no image")
    for name, message in (
        ("broken.png", "not an image"),
        ("text.png", "not an image"),
        ("none.png", "no such image"),
    ):
        with pytest.raises(UserError, match=message):
            read_plain_image(str(tmp_path / name), colour)
    with pytest.raises(UserError, match="2 channels"):
        read_plain_image(str(tmp_path / "colour.png"), make_config("vision"))


def test_an_image_stands_before_the_prompt(tmp_path, capsys, monkeypatch):
    model = make_config(
        "vision",
        vocab_size=256,
        num_layers=1,
        vision=PlainVisionConfig(
            num_layers=1,
            image_size=4,
            patch_size=2,
            channels=1,
            width=4,
            num_heads=1,
            mlp_width=4,
            image_token=9,
        ),
    )
    save_model(tmp_path / "vlm", model, draw_params(model))
    Image.new("L", (4, 4), 255).save(tmp_path / "white.png")
    seen = []
    monkeypatch.setattr(answers, "stream", lambda params, batch, config, **_: seen.append(batch) or iter(()))
    image = str(tmp_path / "white.png")
    generate.run(generate.Arguments(str(tmp_path / "vlm"), prompt="ab", image=(image,)))
    assert seen[0]["tokens"].tolist() == [[9, 9, 9, 9, 97, 98]]
    assert seen[0]["images"].shape == (1, 1, 4, 4, 1)
    assert (seen[0]["images"] == 1).all()
    # Placeholders that the prompt holds itself are not added again.
    generate.run(generate.Arguments(str(tmp_path / "vlm"), prompt="a\t\t\t\tb", image=(image,)))
    assert seen[1]["tokens"].tolist() == [[97, 9, 9, 9, 9, 98]]
    capsys.readouterr()


def test_a_selector_without_a_cache_is_refused(tmp_path):
    model = make_config("nsa_auxiliary", num_layers=1, vocab_size=256)
    save_model(tmp_path / "model", model, draw_params(model))
    with pytest.raises(UserError, match="auxiliary selector keeps no cache to generate from"):
        generate.run(generate.Arguments(str(tmp_path / "model"), prompt="ab"))


def test_nan_among_the_weights_is_said(tmp_path):
    model, params = successor(256)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(jnp.nan)
    save_model(tmp_path / "nan", model, params)
    with pytest.warns(UserNote, match=r"final_norm\.scale holds NaN or infinities"):
        generate.run(generate.Arguments(str(tmp_path / "nan"), prompt="ab", max_new_tokens=1))
