"""Folders that are damaged where prompts are read: tokenizer, templates, what they say of generation, and
prompts that no tokenizer reads. Each ends with an answer, or with one line; nothing is printed past that."""

import copy
import json
import random
import shutil

import numpy as np
import pytest

from jaxlab.evaluation import answers
from jaxlab.tasks import main
from tests.evaluation.chat_models import TEMPLATE, VOCABULARY, write_chat_model

pytestmark = pytest.mark.filterwarnings("ignore::jaxlab.errors.UserNote")

VALUES = [
    None,
    True,
    "",
    "x",
    "<s>",
    "x" * 5000,
    "\ud800",
    -1,
    0,
    2.5,
    1e308,
    2**31,
    2**63,
    10**40,
    [],
    {},
    ["a"],
    {"a": 1},
    [[["a"]]],
    float("nan"),
]
PROMPTS = [
    "hi",
    "what is it?",
    "",
    " ",
    "<|user|>hi<|assistant|>",
    "<s>" * 9,
    "ZZZ",
    "日本\n\n",
    "a" * 70,
    "\udcff",
    "a\udc80b",
    "\0",
    "{{ 1 / 0 }}",
    "a" * 30 + "!",
]
SPLITS = ["(a+)+$", "(a|aa)+$", "(x+x+)+y", "((a*)*)*b", "(", "[", "(?<=a+)b", "\\p{Nope}", "", ".*"]
SLOW_DOWN = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TEMPLATES = [
    "{{ messages",
    "{% for m in messages %}",
    "{{ raise_exception('no') }}",
    "{{ messages[7].content }}",
    "{{ ''.__class__ }}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ range(10 ** 9) }}",
    "{{ messages.append(1) }}",
    "",
    "\ud800",
    "{{ bos_token * 40 }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ 1 / 0 }}",
    "{% include '/etc/passwd' %}",
    TEMPLATE.replace("bos_token", "nothing"),
]
STEPS = {
    "normalizer": [
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAA="},
        {"type": "Sequence", "normalizers": [DOUBLE] * 60},
        SLOW_DOWN,
        {"type": "Replace", "pattern": {"String": ""}, "content": "b"},
        {"type": "Nope"},
    ],
    "pre_tokenizer": [
        *(
            {
                **SLOW_DOWN,
                "type": "Split",
                "pattern": {"Regex": split},
                "behavior": "Isolated",
                "invert": False,
            }
            for split in SPLITS
        ),
        {"type": "FixedLength", "length": 0},
        {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "always"},
        {"type": "Digits"},
    ],
    "post_processor": [
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "?", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
        {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "B", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "?", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"?": {"id": "?", "ids": [2**32 - 1], "tokens": ["a", "b"]}},
        },
        {"type": "BertProcessing", "sep": ["</s>", 999], "cls": ["<s>", 998]},
    ],
    "decoder": [
        {"type": "Strip", "content": "a", "start": 5, "stop": 5},
        {"type": "Strip", "content": "a", "start": 0, "stop": 9},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
        {"type": "ByteFallback"},
        None,
    ],
    "truncation": [
        {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 9},
        {"direction": "Left", "max_length": 0, "strategy": "OnlySecond", "stride": 0},
    ],
    "padding": [
        {
            "strategy": {"Fixed": 10**12},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<s>",
        },
        {
            "strategy": "BatchLongest",
            "direction": "Left",
            "pad_to_multiple_of": 10**12,
            "pad_id": 10**9,
            "pad_type_id": 0,
            "pad_token": "",
        },
    ],
}
OPTIONS = [
    [],
    ["--raw"],
    ["--chat"],
    ["--system", "be"],
    ["--stop", "b", "--stop", "</s>"],
    ["--temperature", "1", "--top_k", "3"],
    ["--chat_template", "tool_use"],
    ["--samples", "2"],
    ["--stop", "\udcff"],
]


def places(value, path=()):
    """Every place in nested JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(value, rng):
    """JSON with another value, or none, in one place."""
    value = copy.deepcopy(value)
    *outer, last = rng.choice([path for path in places(value) if path])
    inner = value
    for key in outer:
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[last]
    else:
        inner[last] = rng.choice(VALUES)
    return value


def damage_bytes(file, rng):
    raw = bytearray(file.read_bytes())
    kind = rng.randrange(6)
    if kind == 0:
        raw = raw[: rng.randrange(len(raw))]
    elif kind == 1:
        for _ in range(rng.randrange(1, 9)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif kind == 2:
        raw = bytearray(rng.randbytes(rng.randrange(200)))
    elif kind == 3:
        raw = bytearray(rng.choice([b"", b"{}", b"[]", b"null", b"{" * 5000, b"[" * 99_999, b"\xff\xfe"]))
    elif kind == 4:
        file.unlink()
        return "removed"
    else:
        raw = raw + raw
    file.write_bytes(bytes(raw))
    return f"bytes, kind {kind}"


def damage(folder, rng):
    """Damages a folder in one place; tells how."""
    kind = rng.randrange(8)
    file = folder / rng.choice(["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
    if kind == 0:
        return f"{file.name}: {damage_bytes(file, rng)}"
    if kind == 1:
        text = rng.choice(TEMPLATES).encode("utf-8", "surrogatepass")
        (folder / "chat_template.jinja").write_bytes(text)
        return f"template {text!r}"
    if kind in (2, 3, 4):
        file, step = folder / "tokenizer.json", rng.choice(list(STEPS))
        tokenizer = json.loads(file.read_text())
        tokenizer[step] = rng.choice(STEPS[step])
        file.write_text(json.dumps(tokenizer))
        return f"{step}: {tokenizer[step]}"
    value = mutated(json.loads(file.read_text()), rng)
    file.write_text(json.dumps(value))
    return f"{file.name}: a value changed"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    said = {"eos_token_id": 1, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "stop_strings": ["q"]}
    path = write_chat_model(tmp_path_factory.mktemp("hostile") / "model", generation=said)
    shutil.rmtree(path / "__pycache__", ignore_errors=True)
    return path


def says_one_line(model, folder, seed, monkeypatch, capfd):
    rng = random.Random(seed)
    shutil.copytree(model, folder)
    told = []
    for _ in range(rng.choice([1, 1, 2])):
        try:
            told.append(damage(folder, rng))
        except (ValueError, FileNotFoundError, IndexError, RecursionError):  # damaged already: no JSON now
            continue
    words = ["generate", str(folder), "--prompt", rng.choice(PROMPTS), *rng.choice(OPTIONS)]

    def stream(params, batch, config, *, max_new_tokens, **_):
        assert 0 <= np.min(batch["tokens"]) <= np.max(batch["tokens"]) < config.vocab_size
        draw = np.random.default_rng(seed)
        for _ in range(min(max_new_tokens, 12)):
            yield draw.integers(0, len(VOCABULARY), len(batch["tokens"])).astype(np.int32)

    monkeypatch.setattr(answers, "stream", stream)
    capfd.readouterr()
    code = main(words)
    shown = capfd.readouterr().err
    lines = shown.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    case = (seed, told, words, shown)
    assert code in (0, 2), case
    assert len(errors) == (1 if code else 0), case
    assert all(line.startswith(("error: ", "note: ")) and len(line) < 1200 for line in lines), case
    return code


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_folder_is_an_answer_or_one_line(model, tmp_path, monkeypatch, capfd, seed):
    says_one_line(model, tmp_path / "model", seed, monkeypatch, capfd)


@pytest.mark.slow
def test_a_hundred_damaged_folders(model, tmp_path, monkeypatch, capfd):
    codes = [says_one_line(model, tmp_path / str(s), s, monkeypatch, capfd) for s in range(100, 250)]
    assert 20 < codes.count(2) < 140  # some are refused, some do no harm


def test_the_folder_itself_is_well(model, monkeypatch, capfd):
    assert main(["generate", str(model), "--prompt", "hi", "--temperature", "0"]) == 0
    assert capfd.readouterr().out == "abcdefghijklmnop\n"  # up to the stop of its generation_config.json


def test_a_panic_of_the_library_is_caught_and_its_trace_is_not_shown(model, tmp_path, capfd):
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["pre_tokenizer"] = STEPS["pre_tokenizer"][0]
    file.write_text(json.dumps(tokenizer))
    assert main(["generate", str(tmp_path / "model"), "--prompt", "a" * 40 + "b", "--raw"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: --prompt: the tokenizer fails on it (Onig: Regex search error: retry-limit")
    assert err.count("\n") == 1
