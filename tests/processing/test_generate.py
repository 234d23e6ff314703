"""The task generate hands images of other people's models to the processor in their folder."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxlab.checkpoints import SourceFiles
from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder
from jaxlab.errors import UserError
from jaxlab.evaluation import answers
from jaxlab.models import ViTConfig
from jaxlab.processing import Prompt, read_messages
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
    monkeypatch.setattr(generate, "open_model", lambda path, **_: opened)
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


def test_a_prompt_that_asks_for_a_video_is_refused(tmp_path):
    opened = HuggingFaceFolder(write_folder(tmp_path, "qwen2_vl"))  # one without tensors
    config = dataclasses.replace(make_config("vision"), vocab_size=300, family="qwen2_vl+qwen2")
    image = CASES["qwen2_vl"]["config"]["image_token_id"]
    opened.config = dataclasses.replace(config, vision=ViTConfig(image_token=image))
    opened.tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer_plain.json"))
    opened.source_files = SourceFiles(opened.path, opened.config_json)
    video = Prompt("--prompt", "What is <|video_pad|>?")
    with pytest.raises(
        UserError, match=r"^the prompt holds <\|video_pad\|>: videos are not read; give frames"
    ):
        generate.read_prompt(video, opened, chat=False)
    batch = generate.read_prompt(Prompt("--prompt", "What?"), opened, chat=False)
    assert batch.keys() == {"tokens"}
    messages = [{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}]}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(UserError, match=r"chat\.jsonl.*: videos are not read; give frames of it as images"):
        read_messages(tmp_path / "chat.jsonl")
