"""The task generate hands images of other people's models to the processor in their folder."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxlab.checkpoints import SourceFiles
from jaxlab.checkpoints.formats.hf_folder import HuggingFaceFolder
from jaxlab.errors import UserError
from jaxlab.evaluation import answers, prompting, read_prompt
from jaxlab.models import ViTConfig
from jaxlab.processing import Prompt, read_messages
from jaxlab.tasks import generate
from tests.checkpoints import folders as families
from tests.models.tiny import make_config
from tests.processing.folders import CASES, GOLDEN, load_processor, write_folder

pytestmark = pytest.mark.filterwarnings("ignore::jaxlab.errors.UserNote")


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
    monkeypatch.setattr(prompting, "prepare_batch", lambda batch, config: batch)
    monkeypatch.setattr(answers, "stream", lambda params, batch, config, **_: seen.append(batch) or iter(()))
    images = tuple(str(GOLDEN / image) for image in CASES["llava"]["images"])
    generate.run(generate.Arguments(str(folder), prompt=CASES["llava"]["text"], image=images))
    expected = load_processor(folder)(CASES["llava"]["text"], images, tokenizer)
    assert seen[0].keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(seen[0][key], value)

    def misfit(batch, config):
        raise ValueError("the text has 32 placeholders, its images make 18 tokens")

    monkeypatch.setattr(prompting, "prepare_batch", misfit)
    with pytest.raises(UserError, match="its processor does not fit its model: the text has 32 placeholders"):
        generate.run(generate.Arguments(str(folder), prompt="a", image=images))
    opened.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        generate.run(generate.Arguments(str(folder), prompt="a", image=images))
    capsys.readouterr()


PARTS = (
    "{% for m in messages %}{{ m.role | upper }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ '<image>\n' if c.type == 'image' else c.text }}{% endfor %}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEXTS = "{% for m in messages %}{{ m.role | upper + ': ' + m.content + ' ' }}{% endfor %}ASSISTANT:"
BLIND = PARTS.replace("'<image>\n'", "''")


def vision_model(folder, template):
    """An opened LLaVA without tensors."""
    write_folder(folder, "llava")
    tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    config = dataclasses.replace(make_config("vision"), vocab_size=300, max_length=400, family="llava+llama")
    opened = HuggingFaceFolder(folder)
    opened.config = dataclasses.replace(config, vision=ViTConfig(image_token=260))
    opened.tokenizer = tokenizer
    described = {"bos_token": "<bos>", "eos_token": "<eos>"} | (
        {"chat_template": template} if template else {}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    opened.source_files = SourceFiles(folder, opened.config_json)
    return opened


def asked(opened, monkeypatch, **options):
    """What the model is given."""
    monkeypatch.setattr(generate, "open_model", lambda path, **_: opened)
    monkeypatch.setattr(prompting, "prepare_batch", lambda batch, config: batch)
    monkeypatch.setattr(opened, "read", dict, raising=False)
    seen = []
    monkeypatch.setattr(answers, "stream", lambda params, batch, config, **_: seen.append(batch) or iter(()))
    generate.run(generate.Arguments(str(opened.path), **options))
    return seen[0]


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


IMAGES = (str(GOLDEN / "wide.png"), str(GOLDEN / "gray.png"))


@pytest.mark.parametrize("template", [PARTS, TEXTS, BLIND], ids=["parts", "texts", "blind"])
def test_images_stand_in_a_chat_where_the_family_has_them(tmp_path, monkeypatch, capsys, template):
    opened = vision_model(tmp_path, template)
    processor, tokenizer = load_processor(tmp_path), opened.tokenizer
    batch = asked(opened, monkeypatch, prompt="What?", image=IMAGES, system="Be.")
    same(batch, processor("SYSTEM: Be. USER: <image>\n<image>\nWhat? ASSISTANT:", IMAGES, tokenizer))
    # One that says where they are.
    batch = asked(opened, monkeypatch, prompt="A <image> and <image>", image=IMAGES)
    same(batch, processor("USER: A <image> and <image> ASSISTANT:", IMAGES, tokenizer))
    with pytest.raises(UserError, match="the chat holds 1 <image> for 2 images; write one for each"):
        asked(opened, monkeypatch, prompt="A <image>", image=IMAGES)
    capsys.readouterr()


def test_images_in_turns_from_a_file(tmp_path, monkeypatch, capsys):
    opened = vision_model(tmp_path, PARTS)
    words = lambda text: {"type": "text", "text": text}
    turns = [
        {"role": "user", "content": [{"type": "image", "path": "wide.png"}, words("What?")]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [words("And "), {"type": "image_url", "image_url": {"url": "gray.png"}}]},
    ]
    for name in ("wide.png", "gray.png"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, turns)))
    batch = asked(opened, monkeypatch, messages=str(tmp_path / "chat.jsonl"))
    text = "USER: <image>\nWhat? ASSISTANT: A cat. USER: And <image>\n ASSISTANT:"
    same(batch, load_processor(tmp_path)(text, IMAGES, opened.tokenizer))
    capsys.readouterr()


def test_a_first_token_of_the_template_is_not_doubled(tmp_path, monkeypatch, capsys):
    # As transformers' processors do: the tokenizer adds it where the template has not.
    for template, count in ((PARTS, 1), ("{{ bos_token }}" + PARTS, 1)):
        opened = vision_model(tmp_path, template)
        for image in ((), IMAGES):
            tokens = asked(opened, monkeypatch, prompt="What?", image=image)["tokens"][0].tolist()
            assert tokens.count(258) == count
            assert tokens[0] == 258
    capsys.readouterr()


def test_a_place_for_an_image_without_one_is_refused(tmp_path, monkeypatch):
    opened = vision_model(tmp_path, PARTS)
    for options in ({"raw": True}, {"chat": True}, {}):
        with pytest.raises(UserError, match="--prompt holds <image>, where an image goes, and no image is"):
            asked(opened, monkeypatch, prompt="What is <image>?", **options)
    (tmp_path / "preprocessor_config.json").unlink()
    opened = vision_model(tmp_path, None)
    with pytest.raises(UserError, match="--prompt holds <image>, where an image goes"):
        asked(opened, monkeypatch, prompt="What is <image>?")


@pytest.mark.slow
def test_a_chat_with_images_says_what_transformers_says(tmp_path, capsys):
    place = Path(__file__).parents[1] / "golden" / "chat"
    spec = importlib.util.spec_from_file_location("golden_chat_vision", place / "vision.py")
    vision = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vision)
    made = json.loads((place / "vision.json").read_text())
    tensors = families.make(tmp_path / "tensors", "llava") / "model.safetensors"
    (tmp_path / "model").mkdir()
    vision.write_model(tmp_path / "model", tensors)
    for name in ("wide.png", "gray.png"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps(vision.CONVERSATIONS[name]) for name in made))
    options = {"messages": str(file), "max_new_tokens": vision.NEW, "past_end": True}
    generate.run(generate.Arguments(str(tmp_path / "model"), **options))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, expected in zip(rows, made.values(), strict=True):
        assert row["prompt_tokens"] == expected["prompt_tokens"]
        assert row["text"] == expected["text"]


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
        read_prompt(video, opened, chat=False)
    batch = read_prompt(Prompt("--prompt", "What?"), opened, chat=False)
    assert batch.keys() == {"tokens"}
    messages = [{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}]}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(UserError, match=r"chat\.jsonl.*: videos are not read; give frames of it as images"):
        read_messages(tmp_path / "chat.jsonl")
