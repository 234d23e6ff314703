"""From a tiny folder and an image file to words: each family whose processor and tower work together."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlab.checkpoints import open_model
from jaxlab.models import forward, prepare_batch
from jaxlab.tasks import generate
from tests.checkpoints import folders, test_internvl_chat
from tests.processing.folders import GOLDEN, write_tokenizer

WIDE, TURNED = str(GOLDEN / "wide.png"), str(GOLDEN / "turned.png")
IDEFICS = {77: "<image>", 78: "<fake_token_around_image>", 79: "<global-img>"} | {
    80 + 3 * row + column: f"<row_{row + 1}_col_{column + 1}>" for row in range(3) for column in range(3)
}
SPECIAL = {
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "idefics2": {77: "<image>", 78: "<fake_token_around_image>"},
    "mistral3": {77: "[IMG]", 78: "[IMG_BREAK]", 79: "[IMG_END]"},
    "mllama": {1: "<|begin_of_text|>", 109: "<|image|>"},
}
PROCESSORS = {
    "smolvlm": (
        {"image_seq_len": 9, "processor_class": "SmolVLMProcessor"},
        {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}},
    ),
    "idefics2": (
        {"image_seq_len": 5, "processor_class": "Idefics2Processor"},
        {"size": {"shortest_edge": 9, "longest_edge": 23}},
    ),
    "mistral3": (
        {"patch_size": 4, "spatial_merge_size": 2, "processor_class": "PixtralProcessor"},
        {"size": {"longest_edge": 24}, "patch_size": 4},
    ),
    "mllama": (
        {"processor_class": "MllamaProcessor"},
        {"size": {"height": 16, "width": 16}, "max_image_tiles": 2},
    ),
}


def make(path: Path, case: str) -> Path:
    if case == "internvl_chat":
        return test_internvl_chat.make(path, "internlm2")
    folders.make(path, case)
    if case == "mllama":  # its placeholder is beyond the vocabulary, as in the models that there are
        told = folders.config(case) | {"image_token_index": 109}
        (path / "config.json").write_text(json.dumps(told))
    write_tokenizer(path, SPECIAL[case], 110 if case == "mllama" else 109)
    around, pixels = PROCESSORS[case]
    (path / "processor_config.json").write_text(json.dumps(around))
    (path / "preprocessor_config.json").write_text(json.dumps(pixels))
    return path


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Programs that run once are compiled in half the time without optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(
    ("case", "prompt"),
    [
        pytest.param("smolvlm", "w5 w6 <image> w7 <image> w8", marks=pytest.mark.slow),
        pytest.param("idefics2", "w5 <image> w7 <image>", marks=pytest.mark.slow),
        ("mistral3", "w5 [IMG] w6 [IMG] w7"),
        ("mllama", "w5 <|image|> w6 w7 <|image|> w8"),
        ("internvl_chat", "w5 <image> w6 <image> w9 w10"),
    ],
)
def test_generation_with_images_is_that_of_the_whole_text(case, prompt, tmp_path, capsys):
    """What is streamed with a cache is what forward, without one, takes for the most likely words.

    Slow are those whose parts others share.
    """
    folder = make(tmp_path / "model", case)
    generate.run(
        generate.Arguments(str(folder), prompt=prompt, image=(WIDE, TURNED), max_new_tokens=4, past_end=True)
    )
    printed = capsys.readouterr().out.strip()
    opened = open_model(folder)
    batch = dict(opened.processor(prompt, [WIDE, TURNED], opened.tokenizer))
    words = [f"w{word}" for word in printed.split("w")[1:]]
    made = opened.tokenizer.encode(" ".join(words), add_special_tokens=False).ids
    assert len(made) == 4
    length = batch["tokens"].shape[1]
    batch["tokens"] = np.concatenate([batch["tokens"], np.asarray([made], np.int32)], axis=1)
    if "cross_attention_mask" in batch:  # what follows sees what the last token saw
        batch["cross_attention_mask"] = np.pad(
            batch["cross_attention_mask"], [(0, 0), (0, len(made)), (0, 0), (0, 0)], mode="edge"
        )
    batch = prepare_batch(batch, opened.config)
    logits = jax.jit(forward, static_argnames="config")(opened.read(), batch, opened.config)[0]
    assert np.argmax(logits[0], axis=-1)[length - 1 : -1].tolist() == made
