"""A model and the model made from it on the same prompts, in one run."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlab.checkpoints import save_model
from jaxlab.data.episodes import EpisodesConfig, EpisodesSource
from jaxlab.errors import UserError
from jaxlab.icl import ImagePromptsConfig
from jaxlab.models import ModelConfig, init_params
from jaxlab.reporting import build_sections, read_runs
from jaxlab.tasks import execute
from jaxlab.tasks import icl as task
from tests.icl import test_image_prompts

place = test_image_prompts.place
EPISODES = EpisodesConfig(longer_from=(5,), classes=2, shots=1, sequence_length=12)

pytestmark = pytest.mark.usefixtures("quick")


def save(folder, seed):
    tokenizer = EpisodesSource(EPISODES).tokenizer()
    size = {"vocab_size": tokenizer.get_vocab_size(), "width": 16, "num_layers": 2, "num_heads": 2}
    model = ModelConfig(**size, mlp_width=16, initializer_range=0.3)
    save_model(folder, model, jax.jit(init_params, static_argnums=0)(model, jax.random.key(seed)), tokenizer)
    return str(folder)


def test_both_models_are_as_they_are_alone(tmp_path):
    models = [save(tmp_path / name, seed) for seed, name in enumerate("ab")]
    size = {"data": EPISODES, "examples": 4, "batch_size": 4, "seeds": (1,)}
    config = task.Config(model=models[0], analyses=("flows",), **size)
    both = execute("icl", dataclasses.replace(config, after=models[1]), outputs=tmp_path)
    alone = execute("icl", dataclasses.replace(config, model=models[1]), outputs=tmp_path).results
    found = json.loads((both.path / "results.json").read_text())
    assert found["after"]["model"] == models[1]
    assert found["after"]["flows"]["share"]["wp"] == pytest.approx(
        np.asarray(alone["flows"]["share"]["wp"]).tolist()
    )
    assert found["flows"]["share"]["wp"] != pytest.approx(found["after"]["flows"]["share"]["wp"])
    (section,) = build_sections(read_runs([both.path]))
    assert 'id="figure-icl-after"' in " ".join(map(str, section.body))


@pytest.mark.slow
def test_flows_of_a_vlm_before_and_after(place, tmp_path):
    """The image's way to the answer, before and after its language model was changed."""
    root, data = place
    shutil.copytree(root / "smolvlm", tmp_path / "changed")
    file = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(file)
    moved = {n: x * np.float32(1.5) if "text_model" in n and "q_proj" in n else x for n, x in tensors.items()}
    assert any((moved[name] != tensors[name]).any() for name in tensors)
    save_file(moved, file, {"format": "pt"})
    config = task.Config(
        model=str(root / "smolvlm"),
        after=str(tmp_path / "changed"),
        data=ImagePromptsConfig(path=str(data), file="prompts.jsonl"),
        analyses=("flows",),
        examples=8,
        seeds=(1,),
        batch_size=4,
    )
    done = execute("icl", config, outputs=tmp_path)
    found = json.loads((done.path / "results.json").read_text())
    of = lambda results: np.array(results["flows"]["mean"]["image_to_instruction"])
    assert np.max(of(found)) > 0.0
    assert np.max(np.abs(of(found) - of(found["after"]))) > 0.01 * np.max(of(found))
    (section,) = build_sections(read_runs([done.path]))
    page = " ".join(map(str, section.body))
    assert 'id="figure-icl-cross-modal"' in page
    assert 'id="figure-icl-after"' in page


def test_another_tokenizer_is_refused(place, tmp_path):
    root, _ = place
    config = task.Config(
        model=save(tmp_path / "a", 0), after=str(root / "smolvlm"), data=EPISODES, seeds=(1,)
    )
    with pytest.raises(UserError):
        task.check(dataclasses.replace(config, analyses=("flows",)))
