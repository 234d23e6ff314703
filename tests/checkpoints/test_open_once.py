"""No task reads a config or a header of a model twice: counted where files are opened."""

import collections
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import StandardCheckpointer

from jaxlab.checkpoints import OpenModel, open_model, save_model
from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder
from jaxlab.checkpoints.tensor_folder import read_json
from jaxlab.data import EpisodesConfig, EpisodesSource
from jaxlab.models import ModelConfig, abstract_params
from jaxlab.tasks import icl, main, merge_search, train
from tests.checkpoints import test_llama2c

EPISODES = EpisodesConfig(longer_from=(5,), classes=2, shots=2, sequence_length=16)
DATA = "{kind: episodes, longer_from: [5], classes: 2, shots: 2, sequence_length: 16}"
HEADERS = ("config.json", "config.yaml", ".safetensors", "model.bin", "tensors.json")
"""How names of files end whose reading tells what a model is."""
WHOLE = ("identity", "copy_to", "copy_companions")
"""Functions that read or copy whole files as bytes: a digest, and the files beside a model."""

counted: collections.Counter[str] | None = None


def count(event, arguments):
    """Opens by Python's `open`, as of headers; tensors are read through `os.open`, which has no mode."""
    if counted is None or event != "open" or not isinstance(arguments[0], str | Path):
        return
    path, mode, _ = arguments
    if mode is None or "r" not in mode or not str(path).endswith(HEADERS):
        return
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in WHOLE:
            return
        frame = frame.f_back
    counted[str(path)] += 1


@pytest.fixture(scope="module")
def hook():
    sys.addaudithook(count)  # for as long as the process lives; it counts only where it is asked to


@pytest.fixture
def reads(hook, monkeypatch):
    """How often each config and header is read in a test."""
    global counted
    counted = collections.Counter()
    metadata = StandardCheckpointer.metadata

    def watched(self, path):
        counted[str(path)] += 1
        return metadata(self, path)

    monkeypatch.setattr(StandardCheckpointer, "metadata", watched)
    yield counted
    counted = None


def drawn(config, rng):
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract_params(config))


ROLES = [f"{role}/{file}" for role in ("vlm", "expert", "base") for file in ("config.json", "model.")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three small models as Hugging Face has them, one of them in our form, and configs of tasks."""
    place = tmp_path_factory.mktemp("models")
    tokenizer = EpisodesSource(EPISODES).tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(), width=8, num_layers=1, num_heads=2, mlp_width=8, max_length=64
    )
    for seed, name in enumerate(("vlm", "expert", "base")):
        params = drawn(config, np.random.default_rng(seed))
        save_model(place / name, config, params, tokenizer, form="huggingface")
    hf = open_model(place / "vlm")
    save_model(place / "ours", hf.config, hf.read(), tokenizer, source_files=hf.source_files)
    (place / "llama2c").mkdir()
    test_llama2c.made(place / "llama2c" / "model.bin")
    roles = "".join(f"{role}: {place / role}\n" for role in ("vlm", "expert", "base"))
    (place / "inject.yaml").write_text(f"kind: inject\n{roles}operator: task_arithmetic\n")
    (place / "search.yaml").write_text(f"{roles}evaluate: {{episodes: {DATA}}}\nbatch_size: 2\n")
    for form in ("vlm", "ours"):
        model = f"model: {place / form}\n"
        (place / f"evaluate-{form}.yaml").write_text(f"{model}data: {DATA}\nbatch_size: 2\nbatches: 1\n")
        (place / f"icl-{form}.yaml").write_text(
            f"{model}data: {DATA}\nanalyses: [blocking]\n"
            "examples: 2\nseeds: [1]\nbatch_size: 2\nblocking: {layers: [1], top_words: 2}\n"
        )
        (place / f"train-{form}.yaml").write_text(
            f"init_from: {place / form}\ndata: {DATA}\nsteps: 1\nbatch_size: 4\neval_batches: 1\n"
            f"model: {{vocab_size: {config.vocab_size}, width: 8, num_layers: 1, num_heads: 2, mlp_width: 8, "
            "max_length: 64}\n"
        )
    return place


def once(reads, *names):
    """Each file under the names was read once, and nothing else of a model; all names were read."""
    assert set(reads.values()) == {1}, {path: n for path, n in reads.items() if n > 1}
    for name in names:
        assert any(name in path for path in reads), (name, list(reads))


def test_merge(models, tmp_path, reads):
    assert main(["merge", str(models / "inject.yaml"), "--out", str(tmp_path / "out")]) == 0
    once(
        reads, *(f"{role}/{file}" for role in ("vlm", "expert", "base") for file in ("config.json", "model."))
    )


def test_merge_search(models, tmp_path, reads, monkeypatch):
    point = {"lambda_v": 1.0, "lambda_e": 0.5, "score": 1.0, "validation": {}, "test": {}}
    found = {"points": [point], "evaluations": 1, "best": point}
    # What it measures is not the point here.
    monkeypatch.setattr(merge_search, "search_entry", lambda *_, **__: found)
    monkeypatch.setattr(merge_search, "score_tokens", lambda *_: {})
    monkeypatch.setattr(merge_search, "answered", lambda *_: [])
    assert main(["merge-search", str(models / "search.yaml"), f"--outputs={tmp_path}"]) == 0
    once(
        reads, *(f"{role}/{file}" for role in ("vlm", "expert", "base") for file in ("config.json", "model."))
    )


@pytest.mark.parametrize(
    ("task", "form"),
    [("icl", "vlm"), ("icl", "ours"), ("evaluate", "vlm"), ("evaluate", "ours"), ("train", "vlm")],
)
def test_a_task_with_a_config(models, tmp_path, reads, monkeypatch, task, form):
    # What it measures or learns is not the point.
    monkeypatch.setattr(icl, "_analyse", lambda *_: {"accuracy": 1.0})
    monkeypatch.setattr(
        train, "train_step", lambda state, batch, **_: (state, {"loss": state.step.astype("float32")})
    )
    assert main([task, str(models / f"{task}-{form}.yaml"), f"--outputs={tmp_path}"]) == 0
    of_model = collections.Counter({path: n for path, n in reads.items() if str(models / form) in path})
    once(of_model, f"{form}/config.", "vlm/model.safetensors" if form == "vlm" else "ours/params")


@pytest.mark.parametrize("words", [["generate", "--prompt", "a", "--max-new-tokens", "1"], ["inspect"]])
@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("vlm", ["vlm/config.json", "vlm/model.safetensors"]),
        ("ours", ["ours/config.yaml", "ours/params"]),
        ("llama2c/model.bin", ["model.bin"]),
    ],
)
def test_a_task_with_arguments(models, reads, words, form, files):
    task, *more = words
    status = main([task, str(models / form), *more])
    assert status == (2 if form.startswith("llama2c") and task == "generate" else 0)  # it has no tokenizer
    once(reads, *files)


@pytest.mark.parametrize("form", ["vlm", "ours", "llama2c/model.bin"])
def test_convert(models, tmp_path, reads, form):
    assert main(["convert", str(models / form), str(tmp_path / "out"), "--verify"]) == 0
    once(reads, form.partition("/")[0], "out/")


def test_a_second_read_is_seen(models, reads, monkeypatch):
    """The count of a task in which one property reads what another has read."""
    monkeypatch.setattr(
        HuggingFaceFolder,
        "source_files",
        property(lambda self: read_json(self.path / "config.json") and None),
    )
    main(["generate", str(models / "vlm"), "--prompt", "a", "--max-new-tokens", "1"])
    with pytest.raises(AssertionError, match=r"config\.json"):
        once(reads)


def test_properties_are_kept(models):
    for form in ("vlm", "ours", "llama2c/model.bin"):
        opened = open_model(models / form)
        for name in ("config", "shapes", "tokenizer", "identity", "source_files"):
            assert getattr(opened, name) is getattr(opened, name)
    assert isinstance(opened, OpenModel)


def test_the_chat_template_is_found_wherever_it_stands(models, tmp_path):
    config = json.loads((models / "vlm" / "config.json").read_text())
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for name, text, expected in (
        ("README.md", "x", None),
        ("tokenizer_config.json", json.dumps({"chat_template": several}), "plain"),
        ("chat_template.json", json.dumps({"chat_template": "newer"}), "newer"),
        ("chat_template.jinja", "{{ newest }}", "{{ newest }}"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / "config.json").write_text(json.dumps(config))
        source = HuggingFaceFolder(tmp_path)
        source.matched = open_model(models / "vlm").matched  # a folder without tensors
        assert source.chat_template == expected
    assert source.special_tokens == {}
