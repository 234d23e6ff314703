"""The task generate as a chat, with many prompts, stops, samples, and what the model's files say of them."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxlab.checkpoints import open_model, save_model
from jaxlab.errors import UserError, UserNote
from jaxlab.evaluation import answers, read_prompt, render_prompts
from jaxlab.models import stream
from jaxlab.processing import Prompt
from jaxlab.tasks import generate, main
from tests.evaluation.chat_models import VOCABULARY, make_tokenizer, write_chat_model

ALL = "abcdefghijklmnopqrstuvwxyz ?\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model")


def following(params, batch, config, *, max_new_tokens, **_):
    """What `stream` gives of the model, without compiling it."""
    lengths = np.sum(batch.get("segment_ids", np.ones_like(batch["tokens"])), axis=1)
    tokens = batch["tokens"][np.arange(len(lengths)), lengths - 1]
    for step in range(1, max_new_tokens + 1):
        yield (tokens + step) % config.vocab_size


@pytest.fixture
def ask(model, capsys, monkeypatch):
    """What is written for options of the task, with the notes; the model is computed if that is asked for."""

    def run(folder=model, computed=False, **options):
        monkeypatch.setattr(answers, "stream", stream if computed else following)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserNote)
            generate.run(generate.Arguments(str(folder), **options))
        notes = [str(w.message) for w in caught if issubclass(w.category, UserNote)]
        return capsys.readouterr().out, notes

    return run


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_plain_prompt_is_a_turn_of_a_chat(ask):
    text, notes = ask(prompt="hi", computed=True)
    assert text == f"{ALL}\n"
    assert notes == ["the model has a chat template, so the prompt is a user's turn; --raw takes it as it is"]
    assert ask(prompt="hi", chat=True) == (f"{ALL}\n", [])
    assert ask(prompt="hi", raw=True) == (f"{ALL[9:]}\n", [])  # goes on after the i
    assert ask(prompt="hi", system="be good", max_new_tokens=2) == ("ab\n", [])


def test_a_prompt_that_was_rendered_is_taken_as_it_is(ask):
    text, notes = ask(prompt="<|user|>w<|assistant|>", max_new_tokens=3)
    assert text == "abc\n"
    assert notes == ["--prompt holds <|user|>, so it is taken as it is; --chat puts it in a turn of its own"]


def test_a_file_of_rendered_and_plain_prompts_is_not_guessed_at(ask, tmp_path):
    """One rendered prompt took the template from all the others."""
    file = tmp_path / "prompts.txt"
    file.write_text("hi\n<|user|>w<|assistant|>\n")
    with pytest.raises(UserError, match=r"line 2: holds <\|user\|>, .*say --chat or --raw for all"):
        ask(prompts=str(file))
    assert len(ask(prompts=str(file), chat=True)[0].splitlines()) == 2
    file.write_text("<|user|>hi<|assistant|>\n<|user|>w<|assistant|>\n")
    assert "is taken as it is" in ask(prompts=str(file))[1][0]


def test_a_chat_is_encoded_without_a_second_first_token(model):
    opened = open_model(model)
    (prompt,) = render_prompts([Prompt("x", "hi")], opened.chat_template, opened, system="b")
    assert prompt.text == "<s><|system|>b<|user|>hi<|assistant|>"
    tokens = read_prompt(prompt, opened, chat=True)["tokens"][0].tolist()
    assert [VOCABULARY[token] for token in tokens] == [
        "<s>",
        "<|system|>",
        "b",
        "<|user|>",
        "h",
        "i",
        "<|assistant|>",
    ]
    raw = read_prompt(Prompt("x", "hi"), opened, chat=False)["tokens"][0].tolist()
    assert [VOCABULARY[token] for token in raw] == ["<s>", "h", "i"]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("fgh",), "abcde"),
        (("x", "ij"), "abcdefgh"),
        (("hij", "fghx"), "abcdefg"),
        (("<|system|>",), ALL),  # a special token, which no text holds
        (("abcdx",), ALL),
        (("a",), ""),
    ],
)
def test_stops_of_several_letters(ask, stop, text):
    assert ask(prompt="hi", chat=True, stop=stop)[0] == f"{text}\n"


def test_what_may_be_a_stop_is_held_back(model):
    from jaxlab.processing import StopTexts

    stops = StopTexts(["cde", "xyz"])
    assert [stops.add(letter) for letter in "abcdz"] == ["a", "b", "", "", "cdz"]
    assert [stops.add(letter) for letter in "xcdef"] == ["", "x", "", "", ""]
    assert stops.found
    stops = StopTexts(["aab"])
    assert [stops.add(letter) for letter in "aaab"] == ["", "", "a", ""]
    assert stops.found
    stops = StopTexts(["zz"])
    assert (stops.add("yz"), stops.end(), stops.found) == ("y", "z", False)


def test_many_prompts_are_as_one_by_one(ask, tmp_path):
    prompts = ["hi", "what is it", "a", "so", "hello there you", "b"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n\n")
    options = {"raw": True, "temperature": 4.0, "top_p": 0.9, "seed": 3, "max_new_tokens": 7, "samples": 2}
    options["computed"] = True
    together = lines(ask(prompts=str(file), batch_size=5, **options)[0])
    assert [(row["index"], row["sample"]) for row in together] == [(i, s) for i in range(6) for s in (0, 1)]
    for index in (0, 4):
        alone = lines(ask(prompt=prompts[index], **options)[0])
        assert [row["text"] for row in alone] == [r["text"] for r in together if r["index"] == index]
    assert together[0]["text"] != together[1]["text"]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    assert lines(ask(prompts=str(tmp_path / "same.jsonl"), batch_size=5, **options)[0]) == together
    plain = ask(prompts=str(file), format="text", raw=True, max_new_tokens=2)[0]
    assert plain.splitlines()[:2] == ["jk", "uv"]
    first = lines(ask(prompts=str(file), raw=True, max_new_tokens=2)[0])[0]
    assert first == {
        "index": 0,
        "sample": 0,
        "text": "jk",
        "finish_reason": "length",
        "prompt_tokens": 3,
        "new_tokens": 2,
    }


def test_prompts_near_the_end_of_the_context(ask, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps("a" * 60) + "\n" + json.dumps("b") + "\n")
    rows = lines(ask(prompts=str(file), raw=True, max_new_tokens=20)[0])
    assert [row["new_tokens"] for row in rows] == [3, 20]
    file.write_text(json.dumps("a") + "\n" + json.dumps("b" * 63) + "\n")
    with pytest.raises(UserError, match=r"prompts\.jsonl line 2 holds 64 tokens; the model takes 1 to 63"):
        ask(prompts=str(file), raw=True)


def test_conversations_from_a_file(ask, tmp_path):
    file = tmp_path / "chat.jsonl"
    turns = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "w"}, {"type": "text", "text": "x"}]},
    ]
    file.write_text("\n".join(map(json.dumps, turns)))
    text, notes = ask(messages=str(file), max_new_tokens=3)
    assert (text, notes) == ("abc\n", [])
    several = [{"messages": turns}, turns[1:2], {"messages": turns[:2]}]
    file.write_text("\n".join(map(json.dumps, several)))
    rows = lines(ask(messages=str(file), max_new_tokens=3)[0])
    assert [row["prompt_tokens"] for row in rows] == [12, 4, 7]
    for value, message in (
        ([turns[0], {"messages": turns}], "line 2: no message, as other lines are"),
        ([{"messages": []}], "line 1 holds no messages"),
        ([{"messages": turns[:3]}], "line 1: ends with what the assistant said"),
        ([turns[:2], 3], "line 2: neither a list of messages nor"),
        ([turns[:2], {"messages": turns, "tools": 3}], "line 2: tools and documents are lists"),
        ([[{"role": "user", "content": [{"type": "image"}]}]], "line 1: an image names no file"),
        ([[{"role": "user", "content": [{"type": "image", "url": "https://a/b"}]}]], "images are files here"),
        ([[{"role": "user", "content": [{"type": "image", "path": "a"}]}]], "type 'image'"),
    ):
        file.write_text("\n".join(map(json.dumps, value)))
        with pytest.raises(UserError, match=message):
            ask(messages=str(file))
    file.write_text(json.dumps(turns))
    with pytest.raises(UserError, match="begins with a system message; leave --system out"):
        ask(messages=str(file), system="x")
    file.write_bytes(b'{"role": "user", "content": "\xff"}')
    with pytest.raises(UserError, match=r"not valid UTF-8 \(at its byte 30\)"):
        ask(messages=str(file))
    file.write_text("{")
    with pytest.raises(UserError, match="line 1: not JSON"):
        ask(messages=str(file))


def test_templates_by_name_file_and_options(ask, tmp_path):
    several = [
        {"name": "default", "template": "{{ raise_exception('No ' + messages[0].role) }}"},
        {"name": "z", "template": "{{ 'y' if long else 'x' }}"},
        {"name": "tool_use", "template": "{{ tools[0].name }}"},
    ]
    folder = write_chat_model(tmp_path / "model", template=several)
    with pytest.raises(UserError, match=r"its chat template: No user$"):
        ask(folder, prompt="hi")
    assert ask(folder, prompt="hi", chat_template="z", max_new_tokens=2)[0] == "yz\n"
    assert (
        ask(folder, prompt="hi", chat_template="z", chat_options={"long": True}, max_new_tokens=2)[0]
        == "z \n"
    )
    (tmp_path / "tools.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "m"}]})
    )
    assert ask(folder, messages=str(tmp_path / "tools.jsonl"), max_new_tokens=1)[0] == "n\n"
    (tmp_path / "mine.jinja").write_text("c")
    assert ask(folder, prompt="hi", chat_template=str(tmp_path / "mine.jinja"), max_new_tokens=1)[0] == "d\n"
    with pytest.raises(UserError, match="the model's are default, tool_use, z"):
        ask(folder, prompt="hi", chat_template="other")
    (folder / "tokenizer_config.json").unlink()
    assert ask(folder, prompt="hi", max_new_tokens=1) == ("j\n", [])
    with pytest.raises(UserError, match="has no chat template; give one by --chat_template FILE"):
        ask(folder, prompt="hi", chat=True)


def test_a_converted_folder_is_still_talked_to(ask, model, tmp_path, capsys):
    from jaxlab.tasks import convert

    stored = (model / "tokenizer.json").read_bytes()
    convert.run(convert.Arguments(str(model), str(tmp_path / "ours")))
    convert.run(convert.Arguments(str(tmp_path / "ours"), str(tmp_path / "back")))
    capsys.readouterr()
    for folder in ("ours", "back"):
        assert ask(tmp_path / folder, prompt="hi", chat=True, max_new_tokens=3)[0] == "abc\n"
        assert (tmp_path / folder / "tokenizer.json").read_bytes() == stored


def test_the_end_of_a_turn_ends_an_answer(ask, tmp_path):
    folder = write_chat_model(tmp_path / "model", generation={"eos_token_id": [12, 40]})
    assert ask(folder, prompt="hi", chat=True)[0] == "abcdefgh\n"  # 12 is i
    assert ask(folder, prompt="hi", chat=True, past_end=True, max_new_tokens=10)[0] == "abcdefghij\n"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|system|>"}))
    assert ask(folder, prompt="xyz", raw=True, max_new_tokens=5)[0] == " ?\n\n"  # through the special token
    rows = lines(ask(folder, prompt="hi", chat=True, past_end=False, format="jsonl")[0])
    assert rows[0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("said", "asked", "options", "notes"),
    [
        ({}, {}, {}, []),
        ({"do_sample": False, "temperature": 0.6, "top_k": 5}, {}, {"top_k": 5}, []),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            {},
            {"temperature": 0.6, "top_k": 50, "top_p": 0.9},
            ["temperature 0.6, top_k 50, top_p 0.9;"],
        ),
        (
            {"do_sample": True, "top_k": 20, "min_p": None},
            {"temperature": 0.5},
            {"temperature": 0.5, "top_k": 20},
            ["says: top_k 20;"],
        ),
        ({"do_sample": True}, {"temperature": 0.0}, {"top_k": 50}, []),
        ({"repetition_penalty": 1.1}, {}, {"repetition_penalty": 1.1}, ["says: repetition_penalty 1.1;"]),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.0}, {}, []),
        ({"num_beams": 4, "typical_p": 1.0}, {}, {}, ["also says num_beams, which is not done here"]),
        ({"temperature": 0.8}, {"temperature": 0.3}, {"temperature": 0.3}, []),
    ],
)
def test_sampling_as_the_model_says(said, asked, options, notes):
    from jaxlab.checkpoints import OPTIONS, sampling_options

    found, told = sampling_options(said, {**dict.fromkeys(OPTIONS), **asked}, "generation_config.json")
    assert found == {**OPTIONS, **options}
    assert len(told) == len(notes)
    assert all(note in text for note, text in zip(notes, told, strict=True))


@pytest.mark.parametrize(
    "said",
    [
        {"top_k": 2.5},
        {"top_k": -1},
        {"top_p": 7},
        {"temperature": "hot", "do_sample": True},
        {"repetition_penalty": True},
        {"repetition_penalty": 0},
        {"stop_strings": [3]},
    ],
)
def test_nonsense_about_sampling_is_one_line(ask, tmp_path, said):
    folder = write_chat_model(tmp_path / "model", generation=said)
    with pytest.raises(UserError, match=r"generation_config\.json: "):
        ask(folder, prompt="hi")


def test_what_the_model_says_is_done(ask, tmp_path):
    said = {"do_sample": True, "temperature": 9.0, "top_k": 2, "stop_strings": ["c"]}
    folder = write_chat_model(tmp_path / "model", generation=said)
    text, notes = ask(folder, prompt="hi", chat=True, computed=True)
    assert "c" not in text
    assert notes == [
        "sampling as the model's generation_config.json says: temperature 9, top_k 2; --temperature 0 takes "
        "the most likely token"
    ]
    assert ask(folder, prompt="hi", chat=True, temperature=0.0) == ("ab\n", [])


def test_tokens_that_the_model_has_no_row_for(ask, tmp_path):
    folder = write_chat_model(tmp_path / "model", rows=30)
    assert ask(folder, prompt="hi", raw=True, max_new_tokens=1)[0] == "j\n"  # never used: no harm
    with pytest.raises(UserError, match=r"--prompt holds the token ' ', id 30, and the .* has 30 rows"):
        ask(folder, prompt="h i", raw=True)
    file = tmp_path / "p.txt"
    file.write_text("hi\nh?\n")
    with pytest.raises(UserError, match=r"p\.txt line 2 holds the token '\?', id 31"):
        ask(folder, prompts=str(file), raw=True)
    assert main(["generate", str(folder), "--prompt", "h i", "--raw"]) == 2


@pytest.mark.parametrize("stored", ["truncation", "padding"])
def test_stored_truncation_and_padding_do_nothing(ask, tmp_path, stored):
    folder = write_chat_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    if stored == "truncation":
        tokenizer.enable_truncation(3)
    else:
        tokenizer.enable_padding(length=40, pad_id=1, pad_token="</s>")
    tokenizer.save(str(folder / "tokenizer.json"))
    assert json.loads((folder / "tokenizer.json").read_text())[stored] is not None
    row = lines(ask(folder, prompt="abcdefgh", raw=True, stop=("no",), format="jsonl")[0])[0]
    assert row["prompt_tokens"] == 9
    assert row["text"] == "ijklm"
    save_model(tmp_path / "written", *open_parts(folder), form="huggingface")
    assert (tmp_path / "written" / "tokenizer.json").exists()


def open_parts(folder):
    opened = open_model(folder)
    return opened.config, opened.read(), opened.tokenizer


def test_repeated_words_of_the_command_line(model, capsys):
    words = ["generate", str(model), "--prompt", "hi", "--chat", "--stop", "[x]", "--stop=fg", "--stop", "h"]
    assert main(words) == 0
    assert capsys.readouterr().out == "abcde\n"
    assert main([*words, "--stop"]) == 2
    assert "--stop: needs a value" in capsys.readouterr().err
    assert main(["generate", "--help"]) == 0
    assert "--stop TEXT, may be repeated" in capsys.readouterr().out


def test_options_of_the_template_and_of_nothing_else(ask, tmp_path, capsys):
    folder = write_chat_model(
        tmp_path / "model", template="{{ 'b' if template else 'x' }}{{ messages[0].role[0] }}"
    )
    words = ["generate", str(folder), "--prompt", "hi", "--max_new_tokens", "1"]
    assert main([*words, "--chat_options.template", "true", "--chat_options.messages", "y"]) == 0
    assert main([*words, "--chat_options.template", "false"]) == 0
    assert capsys.readouterr().out == "v\nv\n"


@pytest.mark.parametrize("name", ["prompt", "system"])
def test_text_that_is_no_utf8_is_told_by_its_own_place(ask, name):
    options = {"prompt": "hi", name: "a\udcff"}
    with pytest.raises(UserError, match=rf"^--{name} is not valid UTF-8 \(at its character 2\)"):
        ask(**options)


def test_images_and_chunks_do_not_go_together(ask, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "hi", "images": ["a.png"]}))
    with pytest.raises(UserError, match="line 1: a prompt with images is read at once"):
        ask(prompts=str(file), raw=True, prefill_chunk=4)


def test_prompts_in_chunks(ask, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("hi\nwhat is that\n")
    options = {"prompts": str(file), "raw": True, "max_new_tokens": 4, "computed": True}
    assert ask(prefill_chunk=4, **options) == ask(**options)


def test_a_language_model_reads_no_images(ask, tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "hi", "images": ["a.png"]}))
    with pytest.raises(UserError, match=r"without vision cannot read .*a\.png"):
        ask(prompts=str(file), raw=True)


def test_the_python_of_the_page_runs(model, capsys):
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    made = code.replace("path/or/owner/name", str(model)).replace(
        "What is the capital of France?", "what is it?"
    )
    exec(compile(made.replace("max_new_tokens=40", "max_new_tokens=5"), "generation.md", "exec"), {})
    assert len(capsys.readouterr().out) == 6
