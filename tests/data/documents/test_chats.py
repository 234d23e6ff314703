"""Conversations: only what the assistant says is learnt, to the token, whatever the template."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxlab.data import DataSet, DocumentsConfig, DocumentsSource
from jaxlab.data.documents import chats as encoder
from jaxlab.data.documents.chats import read_conversation
from jaxlab.errors import UserError
from jaxlab.processing import as_conversation, render_turns
from jaxlab.processing.template_worker import answer
from tests.data.documents.small import find_model, source, write_lines

GOLDEN = Path(__file__).parents[2] / "golden" / "chat"
MADE = json.loads((GOLDEN / "rendered.json").read_text(encoding="utf-8"))
TALK = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "First answer"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Second answer"},
]
ENDS = {
    "command_r": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "olmo2": "</s>",
    "parts": "<end_of_utterance>",
    "phi3": "<|end|>",
    "qwen2": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "smollm2": "<|im_end|>",
    "zephyr": "</s>",
}


def template(name):
    return (GOLDEN / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def said(text, conversation=TALK, **options):
    turns = rendered(text, conversation, **options)
    assert "problem" not in turns, turns
    return [turns["text"][begin:end] for begin, end in turns["turns"]]


def rendered(text, conversation, *, last_only=False, **own):
    """What the process of the template does, in this one."""
    request = {
        "turns": True,
        "template": text,
        "conversations": [{"messages": conversation, **own}],
        "variables": MADE["special_tokens"],
        "last_only": last_only,
    }
    [turns] = answer(request)["texts"]
    return turns


def test_all_templates_are_tried():
    assert {file.stem for file in (GOLDEN / "templates").glob("*.jinja")} == set(ENDS)


@pytest.mark.parametrize("name", ENDS)
def test_turns_are_found_in_every_family(name):
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""  # what it writes before the last turn
    first, second = said(template(name))
    assert first.strip() == "First answer" + ENDS[name]
    assert second.startswith(thought) or name == "mistral"
    assert second.removeprefix(thought).split("\n")[0].strip() == "Second answer" + ENDS[name]
    assert said(template(name), last_only=True) == [second]


def test_thoughts_that_a_template_leaves_out_of_earlier_turns():
    talk = [dict(message) for message in TALK]
    talk[1]["content"] = "<think>\none\n</think>\n\nFirst answer"
    talk[3]["content"] = "<think>\ntwo\n</think>\n\nSecond answer"
    assert (
        "cannot be told" in rendered(template("qwen3"), talk)["problem"]
    )  # the first turn is another text than was said
    assert said(template("qwen3"), talk, last_only=True) == [
        "<think>\ntwo\n</think>\n\nSecond answer<|im_end|>\n"
    ]


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}"
    "{% endfor %}"
)


def test_a_template_that_marks_what_is_said():
    assert said(MARKED) == ["First answer<|im_end|>", "Second answer<|im_end|>"]
    assert said(MARKED, last_only=True) == ["Second answer<|im_end|>"]
    # Marks are exact where prefixes would not do: here earlier turns are cut.
    cut = MARKED.replace(
        "{{ m.content }}<|im_end|>{% end", "{{ m.content[:5 + 99 * loop.last] }}<|im_end|>{% end"
    )
    assert said(cut) == ["First<|im_end|>", "Second answer<|im_end|>"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{{ loop.length }}{% endfor %}", "cannot be told"),
        ("{{ raise_exception('no') }}", "no"),
        ("{% for m in messages %}{{ m.content | upper }} {% endfor %}", None),
    ],
)
def test_a_template_whose_turns_cannot_be_told(text, message):
    if message is None:
        assert [turn.strip() for turn in said(text)] == ["FIRST ANSWER", "SECOND ANSWER"]
    else:
        assert message in rendered(text, TALK)["problem"]


def test_a_damaged_template_is_one_line():
    with pytest.raises(UserError, match="place: line 1"):
        render_turns([as_conversation(TALK, "")], "{% for %}", place="place")
    [turns] = render_turns([as_conversation(TALK[1:], "")], template("smollm2"))
    assert "begins with the assistant" in turns.problem


def chats(path, letters, **changes):
    return source(path, on={"content": "chat"}, tokenizer=str(letters), **{"sequence_length": 256, **changes})


def learnt(found):
    """The texts of the targets of each row, and of the rows."""
    words, batch = found.tokenizer(), found.batch(0, 0, found._open_parts("train")[0].pieces.row_ends.size)
    for tokens, mask, segments in zip(batch["tokens"], batch["loss_mask"], batch["segment_ids"], strict=True):
        for number in range(1, segments.max() + 1):
            of_one = segments == number
            decode = lambda kept: words.decode(kept.tolist(), skip_special_tokens=False)
            yield decode(tokens[of_one]), decode(tokens[of_one & mask])


def test_targets_are_the_assistants_turns_to_the_token(tmp_path, letters):
    other = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "€ 5"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": other}])
    found = chats(path, letters)
    assert dict(learnt(found)) == {
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nFirst answer<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nSecond answer<|im_end|>\n": (
            "First answer<|im_end|>Second answer<|im_end|>"
        ),
        "<|im_start|>user\né?<|im_end|>\n<|im_start|>assistant\n€ 5<|im_end|>\n": "€ 5<|im_end|>",
    }
    last = chats(path, letters, train_on="last")
    assert {text for _, text in learnt(last)} == {"Second answer<|im_end|>", "€ 5<|im_end|>"}
    assert last.identity != found.identity
    (tmp_path / "t.jinja").write_text(MARKED)
    marked = chats(path, letters, chat_template=str(tmp_path / "t.jinja"))
    assert dict(learnt(marked)) == dict(learnt(found))


def test_sharegpt_and_parquet_say_the_same(tmp_path, letters):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in TALK]
    write_lines(tmp_path / "a.jsonl", [{"messages": TALK}])
    write_lines(tmp_path / "b.jsonl", [{"conversations": shared}])
    parquet.write_table(pa.Table.from_pylist([{"messages": TALK}]), tmp_path / "c.parquet")
    parquet.write_table(pa.Table.from_pylist([{"talk": shared}]), tmp_path / "d.parquet")
    expected = list(learnt(chats(tmp_path / "a.jsonl", letters)))
    assert list(learnt(chats(tmp_path / "b.jsonl", letters))) == expected
    assert list(learnt(chats(tmp_path / "c.parquet", letters))) == expected
    data = DataSet(str(tmp_path / "d.parquet"), content="chat", column="talk")
    config = DocumentsConfig(sources=(data,), tokenizer=str(letters), sequence_length=256, held_out=0.0)
    assert list(learnt(DocumentsSource(config, find_model))) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "holds no messages"),
        ([{"role": "user"}, 3], "message 2 is not like"),
        ([{"role": "user", "content": 3}], "neither a text nor a list of parts"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of type 'image'; texts alone"),
        ([{"from": 3, "value": "x"}], "message 1 is not like"),
        ({"role": "user"}, "holds no messages"),
        ([*TALK[:3], TALK[3] | {"weight": 0.5}], "message 4: weight is '0.5'; a turn is learnt"),
        ([TALK[0] | {"train": True}, TALK[1]], "message 1 is of 'user' and has a weight"),
    ],
)
def test_what_is_no_conversation(tmp_path, letters, value, message):
    with pytest.raises(UserError, match=f"here.*{message}|here: .*{message}"):
        read_conversation(value, "here")
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": value}])
    with pytest.raises(UserError, match=f"a.jsonl line 2.*{message}"):
        chats(path, letters).prepare()


def test_turns_without_a_weight_are_read_and_not_learnt(tmp_path, letters):
    """OpenAI's `weight` and axolotl's `train`, in all forms of files, by prefixes and by marks."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    weighted = [TALK[0] | {"weight": 0}, TALK[1] | {"weight": 0}, TALK[2], TALK[3] | {"weight": 1}]
    shared = [{"from": m["role"], "value": m["content"], "train": n == 1} for n, m in enumerate(TALK)]
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    first = whole[: whole.index("And?")].rpartition("<|im_start|>")[0]
    write_lines(tmp_path / "a.jsonl", [{"messages": weighted}])
    write_lines(tmp_path / "b.jsonl", [{"conversations": shared}])
    parquet.write_table(pa.Table.from_pylist([{"messages": weighted}]), tmp_path / "c.parquet")
    (tmp_path / "t.jinja").write_text(MARKED)
    second, marked = [(whole, "Second answer<|im_end|>")], {"chat_template": str(tmp_path / "t.jinja")}
    assert list(learnt(chats(tmp_path / "a.jsonl", letters))) == second
    assert list(learnt(chats(tmp_path / "c.parquet", letters, **marked))) == second
    # What comes after the last turn that is learnt is left out.
    cut = [(first, "First answer<|im_end|>")]
    assert list(learnt(chats(tmp_path / "b.jsonl", letters, **marked))) == cut
    assert list(learnt(chats(tmp_path / "b.jsonl", letters, train_on="last"))) == cut
    none = write_lines(tmp_path / "d.jsonl", [{"messages": [m | {"weight": 0} for m in TALK]}])
    with pytest.warns(UserWarning, match=r"of 1 rows passed by: 1 no turn to learn \(weight 0, train: false"):
        chats(none, letters).prepare()
    joined = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    [problem] = [rendered(joined, TALK, learnt=[False, False, False, True])["problem"]]
    assert "marks 1 turns of 2" in problem


CALLING = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tools_reach_the_template(tmp_path, letters):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tool = {"type": "function", "function": {"name": "sum", "parameters": {"a": {"type": "int"}}}}
    call = {"function": {"name": "sum", "arguments": {"a": 1}}}
    talk = [TALK[0], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1"}, TALK[3]]
    rows = [{"messages": talk, "tools": [tool]}, {"messages": talk, "tools": json.dumps([tool])}]
    (tmp_path / "t.jinja").write_text(CALLING)
    write_lines(tmp_path / "a.jsonl", rows[1:])
    parquet.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        [(whole, target)] = learnt(chats(tmp_path / name, letters, chat_template=str(tmp_path / "t.jinja")))
        assert whole.startswith(f"<|im_start|>system\n{json.dumps([tool])}<|im_end|>\n<|im_start|>user")
        assert target == f"{json.dumps(call['function'])}<|im_end|>Second answer<|im_end|>"
    for tools, message in (
        ([tool], "chat template: it knows no tools, and the conversation has some"),
        ("[", "its tools are not JSON"),
        ([3], "its tools are no list of functions"),
    ):
        path = write_lines(tmp_path / "bad.jsonl", [{"messages": TALK, "tools": tools}])
        with pytest.raises(UserError, match=f"bad.jsonl line 1: .*{message}"):
            chats(path, letters).prepare()


def test_conversations_without_an_answer_are_counted(tmp_path, letters):
    rows = [{"messages": TALK[:3]}, {"messages": TALK[:1]}, {"messages": []}, {"messages": None}]
    found = chats(write_lines(tmp_path / "a.jsonl", rows), letters)
    with pytest.warns(
        UserWarning, match="of 4 rows passed by: 1 without a value, 1 empty, 1 nothing that the assistant"
    ):
        found.prepare()
    assert [target for _, target in learnt(found)] == ["First answer<|im_end|>"]  # what follows is left out


def test_overlong_conversations_by_rule(tmp_path, letters):
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": short}])
    dropped = chats(path, letters, sequence_length=64)
    with pytest.warns(UserWarning, match="1 conversations of more than 64 tokens are dropped"):
        assert [target for _, target in learnt(dropped)] == ["b<|im_end|>"]
    assert dropped.describe()["train"]["a.jsonl"]["overlong"] == 1
    cut = chats(path, letters, sequence_length=64, overlong="truncate")
    with pytest.warns(UserWarning, match="are truncated"):
        [(whole, target)] = [one for one in learnt(cut) if one[1] != "b<|im_end|>"]
    assert len(cut.tokenizer().encode(whole, add_special_tokens=False).ids) == 64
    assert target == "First answer<|im_end|>"
    refused = chats(path, letters, sequence_length=64, overlong="refuse")
    with pytest.raises(UserError, match="1 of 2 conversations are longer than 64 tokens, the longest has"):
        refused.batch(0, 0, 1)


def test_a_conversation_that_takes_too_much_time_is_a_bad_row(tmp_path, letters, monkeypatch):
    """The others of its group are rendered apart from it."""
    calls = []

    def rendered(conversations, *arguments, **options):
        calls.append(len(conversations))
        if any(len(one.messages) > 2 for one in conversations):
            raise UserError("place: does not end: it takes too much time or memory")
        return render_turns(conversations, *arguments, **options)

    monkeypatch.setattr(encoder, "render_turns", rendered)
    short = TALK[:2]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in (short, TALK, short)])
    with pytest.raises(UserError, match=r"a\.jsonl line 2: place: does not end"):
        chats(path, letters).prepare()
    assert calls == [3, 1, 1, 1]
    monkeypatch.setattr(encoder, "MOST_WORK", 5)
    all_four = [as_conversation(talk, "") for talk in (short, short, TALK, short)]
    assert [len(group) for group in encoder._groups(all_four)] == [1, 1, 1, 1]


def test_texts_and_conversations_mix(tmp_path, letters):
    write_lines(tmp_path / "a.jsonl", [{"text": "plain"}] * 3)
    write_lines(tmp_path / "b.jsonl", [{"messages": TALK}] * 3)
    sets = (DataSet(str(tmp_path / "a.jsonl")), DataSet(str(tmp_path / "b.jsonl"), content="chat"))
    config = DocumentsConfig(sources=sets, tokenizer=str(letters), sequence_length=256, held_out=0.0)
    found = DocumentsSource(config, find_model)
    batch = found.batch(0, 0, 4)
    assert sorted(batch["source_ids"]) == [0, 0, 1, 1]
    share = batch["loss_mask"].sum(1) / (batch["segment_ids"] > 0).sum(1)
    assert (share[batch["source_ids"] == 0] > 0.7).all()
    assert (share[batch["source_ids"] == 1] < 0.4).all()
    assert np.isin(batch["source_ids"], (0, 1)).all()


def test_no_template_is_one_line(tmp_path, letters):
    said = json.loads((letters / "tokenizer_config.json").read_text())
    del said["chat_template"]
    (letters / "tokenizer_config.json").write_text(json.dumps(said))
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TALK}])
    with pytest.raises(UserError, match=r"has no chat template; name a file by data\.chat_template"):
        chats(path, letters)
    with pytest.raises(UserError, match=r"nothing\.jinja: cannot be read"):
        chats(path, letters, chat_template=str(tmp_path / "nothing.jinja"))
