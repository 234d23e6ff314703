"""Fine-tuning end to end: adapters and parts of a model, what a run keeps of them, resuming, a mesh."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlab.checkpoints import load_model, open_model, save_model
from jaxlab.config import load
from jaxlab.data import TextConfig, digits_tokenizer, make_source
from jaxlab.losses import evaluate_step
from jaxlab.models import ModelConfig, PlainVisionConfig
from jaxlab.tasks import execute, main, train
from jaxlab.training import Checkpoints
from tests.models.tiny import make_params

MODEL = ModelConfig(num_layers=2, width=16, num_heads=2, mlp_width=24, vocab_size=256, max_length=64)
TINY = {
    "data.sequence_length": 16,
    "steps": 4,
    "batch_size": 4,
    "log_every": 1,
    "eval_every": 4,
    "eval_batches": 1,
    "checkpoint_every": 2,
    "optimizer.learning_rate": 0.01,
    "optimizer.warmup_steps": 0,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder of a model that reads bytes."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    save_model(folder, MODEL, make_params(MODEL, jax.random.key(0)), form="huggingface")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the cat sat on the mat. " * 200)
    return file


def run(tmp_path, base, text, config="", **changes):
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / "tuned.yaml"
    file.write_text(f"init_from: {base}\ndata: {{kind: text, path: {text}}}\n{config}")
    return execute("train", file, {**TINY, **changes}, outputs=tmp_path / "out")


LORA = "lora: {rank: 2, targets: [q_proj, down_proj], dropout: 0.1, merge: true}\n"


def test_adapters_are_all_that_a_run_keeps(base, text, tmp_path):
    found = run(tmp_path, base, text, LORA)
    results = found.results
    assert results["trained_parameters"] == 2 * 2 * (16 + 16 + 24 + 16)
    assert results["parameters"] > 10 * results["trained_parameters"]
    adapter = found.path / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    assert np.abs(tensors[name]).max() > 0  # b begins at zero: it has learnt
    told = json.loads((adapter / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(base)
    # A checkpoint holds adapters and their moments, and nothing of the base.
    kept = found.path / "checkpoints" / "4"
    size = sum(file.stat().st_size for file in kept.rglob("d/*") if file.is_file())  # of arrays
    whole = sum(leaf.size for leaf in jax.tree.leaves(load_model(base)[1])) * 4
    assert size < whole
    # Base and adapter, and what was merged, are the model that was evaluated.
    opened = open_model(base, adapter=adapter)
    config, merged, _ = load_model(found.path / "model")
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(same, merged, opened.read())
    (batch,) = make_source(TextConfig(path=str(text), sequence_length=16)).held_out_batches(4, 1, "test")
    sums = evaluate_step(merged, batch, config)
    loss = float(sums["loss"]) / float(sums["targets"])
    assert loss == pytest.approx(results["test"]["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_killed(base, text, tmp_path, monkeypatch):
    whole = run(tmp_path / "a", base, text, LORA + "frozen_dtype: bfloat16\n")
    saved = Checkpoints.save

    def killed(self, step, state, **how):
        saved(self, step, state)  # not in the background
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", base, text, LORA + "frozen_dtype: bfloat16\n")
    monkeypatch.setattr(Checkpoints, "save", saved)
    again = run(tmp_path / "b", base, text, LORA + "frozen_dtype: bfloat16\n")
    one, two = (load_file(r.path / "adapter" / "adapter_model.safetensors") for r in (whole, again))
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, two[name])


@pytest.mark.slow
def test_parts_that_are_trained(tmp_path):
    """Of a VLM the projector alone: the rest is in no state, and stays as it was."""
    vision = PlainVisionConfig(image_size=8, patch_size=4, width=8, num_heads=2, mlp_width=8, image_token=4)
    model = dataclasses.replace(MODEL, vocab_size=128, vision=vision)
    before = make_params(model, jax.random.key(1))
    save_model(tmp_path / "vlm", model, before, digits_tokenizer())
    file = tmp_path / "projector.yaml"
    file.write_text(
        f"init_from: {tmp_path / 'vlm'}\ndata: {{kind: digits, mixture: {{image_words: 1}}}}\n"
        "optimizer:\n  groups: [{pattern: projector}, {pattern: '*', learning_rate: 0}]\n"
    )
    tiny = {name: value for name, value in TINY.items() if not name.startswith("data.")}
    found = execute("train", file, {**tiny, "steps": 2}, outputs=tmp_path / "out")
    after = load_model(found.path / "model")[1]
    assert found.results["trained_parameters"] == sum(x.size for x in jax.tree.leaves(before["projector"]))
    for name in set(before) - {"projector"}:
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])
    assert np.abs(after["projector"]["output"] - before["projector"]["output"]).max() > 1e-4
    _, setup = train.prepare(load(train.Config, file))
    assert set(setup.trainable.abstract()) == {"projector"}


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ("lora: {targets: [q_prj]}", "lora.targets: no matrix .* did you mean q_proj"),
        ("lora: {rank: 0}", "lora.rank: must be from 1"),
        ("lora: {also: [layers.mpl]}", "lora.also: no parameter matches 'layers.mpl'; did you mean"),
        ("optimizer: {groups: [{pattern: vision, learning_rate: 0}]}", "no parameter matches 'vision'"),
        ("optimizer: {groups: [{pattern: '*', learning_rate: 0}]}", "every parameter is frozen"),
        ("model: {max_length: 8}", "8 does not hold sequences of 16"),
        ("model: {head_dim: 3}", "head_dim"),
    ],
)
def test_what_does_not_fit_is_one_line(base, text, tmp_path, config, line, capsys):
    file = tmp_path / "wrong.yaml"
    file.write_text(
        f"init_from: {base}\ndata: {{kind: text, path: {text}, sequence_length: 16}}\n"
        f"batch_size: 4\n{config}\n"
    )
    assert main(["train", str(file), "--check"]) == 2
    error = capsys.readouterr().err
    assert re.search(line, error), error
    assert "Traceback" not in error
