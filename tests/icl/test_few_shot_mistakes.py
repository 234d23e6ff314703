"""Few-shot prompts: one line for each mistake, in configs, label words, data and models."""

import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.icl import ExamplesConfig, FewShotPrompts
from tests.icl import made
from tests.icl.made import prompts_of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "Review: {text}"}, r"template: must hold \{text\}"),
        ({"template": "{label}: {text}"}, r"template: must hold \{text\}"),
        ({"template": "{text} {label}"}, r"template: needs words between"),
        ({"label_words": ("Yes",)}, "at least two label words"),
        ({"label_words": ("Yes", "Yes")}, "holds 'Yes' twice"),
        ({"label_words": ("Yes", " ")}, "must not be empty"),
        ({"train": ExamplesConfig()}, "which file are demonstrations"),
        ({"train": ExamplesConfig("a", label_values=(1, 2, 3))}, "has 3 values for 2 label words"),
        ({"train": ExamplesConfig("a", label_values=(1, "1"))}, "has one of them twice"),
        ({"shots": -1}, "must be at least 0"),
        ({"max_tokens": 0}, "must be at least 1"),
        ({"system": "Be brief."}, "set chat to true"),
        ({"path": ""}, "path: must be given"),
    ],
)
def test_configs_that_are_refused(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        made.task(folder, **changes)


@pytest.mark.parametrize(
    ("words", "position", "message"),
    [
        (("Good", "Goodness"), "first", r"Good and Goodness have in common the first token"),
        (("very bad", "very good"), "first", r"very bad and very good have in common the first token"),
        (("the best", "a best"), "last", r"the best and a best have in common the last token"),
    ],
)
def test_label_words_of_one_token_are_refused(folder, tokenizers, words, position, message):
    options = {"label_position": position}
    with pytest.raises(UserError, match=message):
        prompts_of(folder, tokenizers["gpt2"], label_words=words, options=options)


def test_label_words_that_the_tokenizer_does_not_know_are_refused(folder):
    words = {word: n for n, word in enumerate(["?", "Review:", "Sentiment:", "Positive", "a", "text"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match=r"Negative holds '\?', which stands for words that .* does not know"):
        prompts_of(folder, tokenizer)


def test_label_words_that_only_share_a_later_token(folder, tokenizers):
    source = prompts_of(folder, tokenizers["gpt2"], label_words=("the best", "a best"))
    assert source.label_ids[0][-1] == source.label_ids[1][-1]


def test_a_label_word_that_is_glued_to_the_template_is_refused(tmp_path, tokenizers):
    made.sentiment(tmp_path)
    changes = {"template": "Review: {text} Sent{label}", "label_words": ("iment", "bad")}
    with pytest.raises(UserError, match=r"data\.template: .*put a space"):
        prompts_of(tmp_path, tokenizers["gpt2"], **changes)
    source = prompts_of(tmp_path, tokenizers["gpt2"], template="Review: {text}\nSentiment: {label}ness")
    with pytest.raises(UserError, match=r"data\.template: .*put a space"):
        source.batches(1, 1, 1)


@pytest.mark.parametrize(
    ("rows_of", "changes", "message"),
    [
        ({"train": [("a", 0), ("b", 2)]}, {}, r"train\.tsv line 3: unknown label '2'; labels are 0, 1"),
        ({"train": [("a", 0), (" ", 1), ("b", 7)]}, {}, r"line 3: the text is empty, and 1 more such rows"),
        ({"train": [("a", 0)]}, {}, r"0 examples of Positive in train\.tsv, and 1 are needed"),
        ({}, {"test": ExamplesConfig("other.tsv")}, r"other\.tsv: cannot be read: No such file"),
        ({}, {"test": ExamplesConfig("train.tsv")}, r"drawn from one file, train\.tsv"),
        ({}, {"train": ExamplesConfig("train.tsv", text=("sentence",))}, r"no column 'sentence'"),
        ({}, {"train": ExamplesConfig("train.tsv", text=(0,), label=1)}, r"line 1: unknown label .*header"),
        ({}, {"subset": "sst2"}, r"holds files, .* leave data\.subset out"),
        ({}, {"path": "no/such/folder"}, r"no/such/folder: no such folder; set data\.path"),
    ],
)  # fmt: skip
def test_bad_data_is_one_line(tmp_path, tokenizers, rows_of, changes, message):
    made.sentiment(tmp_path)
    made.write_task(tmp_path, rows_of)
    with pytest.raises(UserError, match=message) as caught:
        prompts_of(tmp_path, tokenizers["gpt2"], **changes)
    assert "\n" not in str(caught.value)


def test_labels_that_a_tool_wrote_as_floats_are_read(tmp_path, tokenizers):
    made.sentiment(tmp_path)
    whole = prompts_of(tmp_path, tokenizers["gpt2"]).examples
    file = tmp_path / "train.tsv"
    file.write_text(re.sub(r"(\t\d)$", r"\1.0", file.read_text(), flags=re.MULTILINE))
    assert prompts_of(tmp_path, tokenizers["gpt2"]).examples == whole


def test_rows_that_are_left_out_are_told(tmp_path, tokenizers):
    both = ("shown and asked", 0)
    train = [("a", 0), ("b", 1), ("a", 0), ("", 1), ("c", 9), both]
    made.write_task(tmp_path, {"train": train, "test": [("d", 1), both]})
    with pytest.warns(UserNote) as caught:
        source = prompts_of(tmp_path, tokenizers["gpt2"], bad_rows="skip")
    told = [str(note.message) for note in caught]
    assert any(
        "2 rows are left out; the first:" in line and "line 5: the text is empty" in line for line in told
    )
    assert any(
        "1 rows are left out, they are there twice" in line and "line 4 repeats 2" in line for line in told
    )
    assert any("1 rows of the demonstrations are queries too" in line for line in told)
    assert [example.text for example in source.examples.train] == ["a", "b"]


@pytest.mark.parametrize(
    ("opened", "message"),
    [
        (lambda t: made.Opened(None), "has no tokenizer"),
        (
            lambda t: made.Opened(t, vocab_size=50257),
            "has 361 tokens, the model 50257: it is another model's",
        ),
        (lambda t: made.Opened(t, end_tokens=(390,), vocab_size=400), "texts end with token 390"),
        (lambda t: made.Opened(t, vocab_size=300), "the model's embedding has 300 rows"),
    ],
)
def test_a_model_with_another_tokenizer_is_refused(folder, tokenizers, opened, message):
    with pytest.raises(UserError, match=message) as caught:
        FewShotPrompts(made.task(folder), opened(tokenizers["gpt2"])).batches(1, 8, 3)
    assert "\n" not in str(caught.value)
