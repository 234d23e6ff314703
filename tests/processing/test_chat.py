"""Chat templates: rendered as transformers does it, within limits, and found wherever a folder has them."""

import json
from pathlib import Path

import pytest

from jaxlab.checkpoints.source_files import SourceFiles
from jaxlab.checkpoints.tensor_folder import copy_companions
from jaxlab.errors import UserError
from jaxlab.processing import as_conversation, render_chat, render_chats
from jaxlab.processing.template_worker import answer

GOLDEN = Path(__file__).parents[1] / "golden" / "chat"
MADE = json.loads((GOLDEN / "rendered.json").read_text(encoding="utf-8"))
HELLO = [{"role": "user", "content": "Hello"}]


def template(name):
    return (GOLDEN / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def request(text, conversation, prompted):
    own = {"tools": None, "documents": None, "add_generation_prompt": prompted, **conversation}
    return {"template": text, "conversations": [own], "mark": None, "variables": MADE["special_tokens"]}


@pytest.mark.parametrize("name", sorted(MADE["made"]))
def test_conversations_are_rendered_as_by_transformers(name):
    text, made = template(name), MADE["made"][name]
    for case, expected in made.items():
        conversation, prompted = case.split()
        found = answer(request(text, MADE["conversations"][conversation], prompted == "True"))
        error = {"error": expected.get("error"), "at": 0}
        wanted = {"texts": [expected["text"]]} if "text" in expected else error
        assert found == wanted, case
    assert len({entry.get("text") for entry in made.values()}) > 1


def test_there_are_ten_families_and_more():
    assert len(MADE["made"]) > 10
    assert {file.stem for file in (GOLDEN / "templates").glob("*.jinja")} == set(MADE["made"])


def test_the_process_of_the_template_gives_the_same():
    conversations = [MADE["conversations"][name]["messages"] for name in ("one", "system_turns")]
    for prompted in (True, False):
        found = render_chats(
            conversations,
            template("qwen3"),
            special_tokens=MADE["special_tokens"],
            add_generation_prompt=prompted,
        )
        expected = [MADE["made"]["qwen3"][f"{name} {prompted}"]["text"] for name in ("one", "system_turns")]
        assert found == expected
    case = MADE["conversations"]["date"]
    found = render_chat(
        case["messages"],
        template("llama3"),
        special_tokens=MADE["special_tokens"],
        date_string=case["date_string"],
        add_generation_prompt=False,
    )
    assert found == MADE["made"]["llama3"]["date False"]["text"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('System role\nnot supported') }}", "MODEL: System role not supported"),
        ("{% if %}", "MODEL: line 1: Expected an expression"),
        ("{{ messages[0].a.b }}", "MODEL: 'dict object' has no attribute 'a'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'x' %}", "MODEL: "),
        ("{% import 'os' as os %}", "MODEL: "),
        ("{{ 1 / 0 }}", "MODEL: ZeroDivisionError"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ 'a' * 10 ** 11 }}", "takes more than 2 GiB"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself without end"),
        ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "makes a text of 99,899,001 characters"),
        ("{% nosuch %}", "unknown tag 'nosuch'"),
    ],
)
def test_a_bad_template_is_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        render_chat(HELLO, text, place="MODEL")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 8) }}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
def test_a_template_without_end_ends(text):
    with pytest.raises(UserError, match=r"too much time|more than 2 GiB"):
        render_chat(HELLO, text)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "holds no messages"),
        ("Hello", "holds no messages"),
        (["Hello"], "message 1 is not like"),
        ([*HELLO, {"content": "x"}], "message 2 is not like"),
        ([{"role": "user", "content": 3}], "neither a text nor a list"),
        ([{"role": "user", "content": ["x"]}], "a part of message 1 is not like"),
    ],
)
def test_what_is_no_conversation(messages, message):
    with pytest.raises(UserError, match=message):
        as_conversation(messages, "the file")


def test_contents_take_the_form_that_the_template_reads():
    say = lambda content: [{"role": "user", "content": content}]
    image, words = {"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}
    only_texts, only_parts = template("smollm2"), template("parts")
    flat = render_chat(say([image, words]), only_texts, image_mark="<image>\n")
    assert flat == render_chat(say("<image>\nWhat?"), only_texts)
    assert "user\n<image>\nWhat?<|im_end|>" in flat
    assert render_chat(say("What?"), only_parts) == render_chat(say([words]), only_parts)
    assert "What?" in render_chat(say("What?"), only_parts)
    with pytest.raises(UserError, match="takes texts only, a message holds a part of type 'image'"):
        render_chat(say([image, words]), only_texts)
    # A template that takes both is left to read what it is given.
    both = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
    assert render_chat(say([words]), both) == render_chat(say("What?"), both) == "What?"


def folder_with(path, **files):
    (path / "additional_chat_templates").mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    for name, value in files.items():
        place = {"jinja": "chat_template.jinja", "rag": "additional_chat_templates/rag.jinja"}.get(
            name, f"{name}.json"
        )
        (path / place).write_text(value if isinstance(value, str) else json.dumps(value))
    return SourceFiles(path, {"model_type": "llama"})


def test_templates_by_name(tmp_path):
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    source = folder_with(tmp_path / "list", tokenizer_config={"chat_template": several})
    assert source.chat_templates == {"default": "a", "tool_use": "b"}
    source = folder_with(tmp_path / "files", jinja="c", rag="d", tokenizer_config={"chat_template": several})
    assert source.chat_templates == {"default": "c", "rag": "d"}
    assert source.chat_template == "c"
    source = folder_with(tmp_path / "named", rag="d", tokenizer_config={"chat_template": several})
    assert source.chat_templates == {"default": "a", "tool_use": "b", "rag": "d"}
    (tmp_path / "copy").mkdir()
    copy_companions(tmp_path / "files", tmp_path / "copy")
    assert SourceFiles(tmp_path / "copy", {}).chat_templates == {"default": "c", "rag": "d"}


def test_a_template_outside_of_the_folder_is_not_read(tmp_path):
    (tmp_path / "secret.jinja").write_text("x")
    source = folder_with(tmp_path / "model")
    (tmp_path / "model" / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "secret.jinja")
    with pytest.raises(UserError, match="leads out of the folder"):
        _ = source.chat_templates
    other = folder_with(tmp_path / "other")
    (tmp_path / "other" / "additional_chat_templates").rmdir()
    (tmp_path / "other" / "additional_chat_templates").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out of the folder"):
        _ = other.chat_templates


def test_special_tokens_by_name(tmp_path):
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
        "pad_token": None,
        "add_bos_token": True,
        "image_token": "<image>",
        "extra_special_tokens": {"video_token": "<video>"},
    }
    older = folder_with(tmp_path / "a", tokenizer_config=config, special_tokens_map={"eos_token": "<|end|>"})
    tokens = {"bos_token": "<s>", "eos_token": "<|end|>", "image_token": "<image>", "video_token": "<video>"}
    assert older.special_tokens == tokens
    newer = {**config, "added_tokens_decoder": {}}
    source = folder_with(tmp_path / "b", tokenizer_config=newer, special_tokens_map={"eos_token": "<|end|>"})
    assert source.special_tokens == {**tokens, "eos_token": "</s>"}
    assert folder_with(tmp_path / "c").special_tokens == {}
