"""The task generate hands images of other people's models to the processor in their folder."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxlab.checkpoints import SourceFiles
from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder
from jaxlab.errors import UserError
from jaxlab.evaluation import answers
from jaxlab.models import ViTConfig
from jaxlab.tasks import generate
from tests.models.tiny import make_config
from tests.processing.folders import CASES, GOLDEN, load_processor, write_folder


def test_generate_takes_the_processor_of_the_folder(tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path, "llava")
    tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    config = make_config("vision")
    config = dataclasses.replace(config, vocab_size=300, max_length=99, family="llava+llama")
    config = dataclasses.replace(config, vision=ViTConfig(image_token=260))
    seen = []
    opened = HuggingFaceFolder(folder)  # one without tensors
    opened.config, opened.tokenizer, opened.read = config, tokenizer, dict
    opened.source_files = SourceFiles(folder, opened.config_json)
    monkeypatch.setattr(generate, "open_model", lambda path: opened)
    monkeypatch.setattr(generate, "prepare_batch", lambda batch, config: batch)
    monkeypatch.setattr(answers, "stream", lambda params, batch, config, **_: seen.append(batch) or iter(()))
    images = tuple(str(GOLDEN / image) for image in CASES["llava"]["images"])
    generate.run(generate.Arguments(str(folder), prompt=CASES["llava"]["text"], image=images))
    expected = load_processor(folder)(CASES["llava"]["text"], images, tokenizer)
    assert seen[0].keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(seen[0][key], value)

    def misfit(batch, config):
        raise ValueError("the text has 32 placeholders, its images make 18 tokens")

    monkeypatch.setattr(generate, "prepare_batch", misfit)
    with pytest.raises(UserError, match="its processor does not fit its model: the text has 32 placeholders"):
        generate.run(generate.Arguments(str(folder), prompt="a", image=images))
    opened.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        generate.run(generate.Arguments(str(folder), prompt="a", image=images))
    capsys.readouterr()
