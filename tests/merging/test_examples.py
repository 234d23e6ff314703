"""Examples for people to read: each prompt's answer is the one that the model gives to it alone."""

import jax
import numpy as np

from jaxlab.data.digits import DigitsConfig, DigitsSource
from jaxlab.data.digits_words import EOS, IMAGE_ID, VOCABULARY
from jaxlab.merging import answered
from jaxlab.models import ModelConfig, PlainVisionConfig, generate, init_params

CONFIG = ModelConfig(
    vocab_size=len(VOCABULARY),
    width=32,
    num_layers=1,
    num_heads=2,
    mlp_width=64,
    max_length=64,
    initializer_range=0.5,
    vision=PlainVisionConfig(
        num_layers=1, patch_size=4, width=16, num_heads=2, mlp_width=32, image_token=IMAGE_ID
    ),
)


def test_answers_of_rows_of_different_lengths():
    source = DigitsSource(DigitsConfig(mixture={"image_format": 1.0}))
    batch = next(source.held_out_batches(8, 1, "test"))
    models = {name: init_params(CONFIG, jax.random.key(seed)) for seed, name in enumerate(("a", "b"))}
    tokenizer = source.tokenizer()
    examples = answered(models, batch, CONFIG, tokenizer, 3)
    assert len(examples) == 3
    assert any(e["answers"]["a"] != e["answers"]["b"] for e in examples)
    starts = batch["loss_mask"].argmax(1)
    shorter = int(starts[:3].argmin())
    assert starts[shorter] < starts[:3].max()
    example, rows = examples[shorter], slice(shorter, shorter + 1)
    np.testing.assert_allclose(example["image"], batch["images"][shorter, 0, :, :, 0], atol=1e-3)
    assert example["question"] == tokenizer.decode(batch["tokens"][shorter, : starts[shorter]])
    answer = batch["tokens"][shorter][batch["loss_mask"][shorter]]
    assert example["expected"] == tokenizer.decode(answer) != ""
    prompt = {"tokens": batch["tokens"][rows, : starts[shorter]], "images": batch["images"][rows]}
    alone = generate(models["a"], prompt, CONFIG, max_new_tokens=6, stop_token=VOCABULARY[EOS])[0]
    said = example["answers"]["a"].split()[:6]
    assert said == tokenizer.decode(alone).split()[: len(said)]
    assert said


def test_text_has_no_image():
    source = DigitsSource(DigitsConfig(mixture={"text_words": 1.0}))
    batch = next(source.held_out_batches(4, 1, "test"))
    params = init_params(CONFIG, jax.random.key(0))
    examples = answered({"model": params}, batch, CONFIG, source.tokenizer(), 2)
    assert ["image" in example for example in examples] == [False, False]
