"""Few-shot prompts: the text, the tokens, and what each token is."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.errors import UserError
from jaxlab.icl import ExamplesConfig, FewShotPrompts, Part, TokenClasses
from tests.icl import made
from tests.icl.made import TOKENIZERS, prompts_of, rows


def decoded(prompt, tokenizer, which):
    return tokenizer.decode(prompt.batch["tokens"][0][which].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("shots", [0, 1, 3])
def test_prompts_are_the_template_by_hand(folder, tokenizers, name, shots):
    tokenizer = tokenizers[name]
    source = prompts_of(folder, tokenizer, shots=shots)
    texts = source.texts(1, 8)
    prompts = rows(source)
    assert len(prompts) == len(texts) == 8
    for text, prompt in zip(texts, prompts, strict=True):
        blocks = text.split("\nReview: ")
        assert len(blocks) == 2 * shots + 1
        assert text.endswith("\nSentiment:")
        ids = tokenizer.encode(text).ids
        ids = ids[:-1] if name == "llama2" else ids  # </s> at its end, after which nothing follows
        np.testing.assert_array_equal(prompt.batch["tokens"][0], ids)
        assert prompt.positions[0] == len(ids) - 1
        query = re.search(r"test (\d+)", blocks[-1])
        assert query is not None
        assert prompt.labels[0] == int(query.group(1)) % 2


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_each_token_is(folder, tokenizers, name):
    tokenizer = tokenizers[name]
    source = prompts_of(folder, tokenizer, shots=2)
    for prompt in rows(source):
        parts, words, shown = prompt.parts[0], prompt.label_words[0], prompt.demonstrations[0]
        assert list(np.flatnonzero(parts == Part.LAST)) == [len(parts) - 1]
        labels = np.flatnonzero(parts == Part.LABEL)
        np.testing.assert_array_equal(words >= 0, parts == Part.LABEL)
        assert len(labels) == 4
        assert sorted(words[labels].tolist()) == [0, 0, 1, 1]
        np.testing.assert_array_equal(shown[labels], range(4))
        # The token of a label word is the one that is answered, and it stands for that word.
        np.testing.assert_array_equal(
            prompt.batch["tokens"][0][labels], prompt.label_tokens[0][words[labels]]
        )
        for at in labels:
            following = decoded(prompt, tokenizer, range(at, len(parts))).strip()
            assert following.startswith(source.label_names[words[at]])
            assert decoded(prompt, tokenizer, range(at)).endswith("Sentiment:")
            assert parts[at - 1] == Part.FORERUNNER
        for number in range(5):  # the texts, that of the query too
            text = decoded(prompt, tokenizer, (parts == Part.TEXT) & (shown == number))
            assert re.fullmatch(r"(train|test) \d[\w ]+", text.strip()), text
            assert text.strip().startswith("test") == (number == 4)
        frame = decoded(prompt, tokenizer, (parts == Part.FORMAT) & (shown == 4))
        assert frame.replace(" ", "").startswith("Review:\nSentimen")


@settings(max_examples=40)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\n\r\t\u2028\u2029\x85")
                | st.sampled_from("ab é日🙂{}:"), min_size=1, max_size=12)
        .map(lambda text: " ".join(text.split())).filter(bool),
        min_size=4, max_size=4, unique_by=str.strip,
    ),
    name=st.sampled_from(sorted(TOKENIZERS)),
    position=st.sampled_from(["first", "last", "mean"]),
)  # fmt: skip
def test_label_words_are_found_among_any_texts(tmp_path_factory, tokenizers, texts, name, position):
    place = tmp_path_factory.mktemp("any")
    made.write_task(place, {"train": [(t, n % 2) for n, t in enumerate(texts[:3])], "test": [(texts[3], 1)]})
    tokenizer = tokenizers[name]
    options = {"label_position": position, "classes": TokenClasses("each")}
    source = prompts_of(place, tokenizer, options=options, label_words=("really slow", "quick and fine"))
    assert min(map(len, source.label_ids)) > 1
    (prompt,) = rows(source, examples=1)
    ids, parts, words = prompt.batch["tokens"][0], prompt.parts[0], prompt.label_words[0]
    for label, wanted in enumerate(source.label_ids):
        at = np.flatnonzero(words == label)
        chosen = {"first": wanted[:1], "last": wanted[-1:], "mean": wanted}[position]
        assert ids[at].tolist() == chosen
        whole = list(range(at[-1] - len(wanted) + 1, at[-1] + 1)) if position != "first" else list(
            range(at[0], at[0] + len(wanted))
        )  # fmt: skip
        assert decoded(prompt, tokenizer, whole).strip() == source.label_names[label]
        assert set(prompt.classes[0][at].tolist()) == {source.roles.labels[label]}
    assert parts[-1] == Part.LAST
    assert decoded(prompt, tokenizer, range(len(ids))).rstrip().endswith("Sentiment:")


def test_demonstrations_are_those_of_the_seed(folder, tokenizers):
    source = prompts_of(folder, tokenizers["gpt2"], shots=2)
    shown = lambda text: text.rpartition("Review: ")[0]
    first, again, other = (source.texts(seed, 8) for seed in (1, 1, 2))
    assert first == again
    assert len({shown(text) for text in first}) == 1
    assert shown(first[0]) != shown(other[0])
    assert {t.rpartition("Review: ")[2] for t in first} == {t.rpartition("Review: ")[2] for t in other}
    orders = {tuple(re.findall(r"Sentiment: (\w)", source.texts(seed, 1)[0])) for seed in range(20)}
    assert len(orders) > 3, "the order of the classes is drawn too"
    # With other numbers of shots the queries stay, and fewer demonstrations are some of more.
    fewer = source.with_shots(1).texts(1, 8)
    assert [t.rpartition("Review: ")[2] for t in fewer] == [t.rpartition("Review: ")[2] for t in first]
    of = lambda text: set(re.findall(r"Review: (.*)\n", shown(text)))
    assert of(fewer[0]) < of(first[0])
    with pytest.raises(UserError, match="4 demonstrations of Negative, and 5 are asked for"):
        source.with_shots(5)


def test_released_code_draws_for_each_query(folder, tokenizers):
    source = prompts_of(folder, tokenizers["gpt2"], shots=2, options={"mode": "released_code"})
    texts = source.texts(3, 8)
    assert len({text.rpartition("Review: ")[0] for text in texts}) > 4
    orders = {tuple(re.findall(r"Sentiment: (\w)", text)) for text in texts}
    assert orders in ({("N", "N", "P", "P")}, {("P", "P", "N", "N")})
    repeated = [len(set(re.findall(r"Review: (.*)\n", t.rpartition("Review: ")[0]))) < 4 for t in texts]
    assert any(repeated), "with replacement"


def test_validation_asks_what_is_not_shown(folder, tokenizers):
    source = prompts_of(folder, tokenizers["gpt2"], shots=2, options={"split": "validation"})
    assert source.count(100) == 4
    for text in source.texts(1, 100):
        before, _, query = text.rpartition("Review: ")
        assert query.startswith("train")
        assert query.partition("\n")[0] not in before


@pytest.mark.parametrize("mode", ["paper", "released_code"])
def test_validation_asks_the_same_with_any_shots_and_never_what_is_learned(folder, tokenizers, mode):
    source = prompts_of(folder, tokenizers["gpt2"], options={"split": "validation", "mode": mode})
    asked = lambda source: [text.rpartition("Review: ")[2] for text in source.texts(1, 100)]
    assert asked(source) == asked(source.with_shots(0)) == asked(source.with_shots(2))
    queries = {text.partition("\n")[0] for text in asked(source)}
    shown = {
        text for seed in (1,) for whole in source.texts(seed, 100) for text in whole.split("Review: ")[1:-1]
    }
    assert not queries & {text.partition("\n")[0] for text in shown}
    lessons = source.lessons(1, per_class=1)
    for at in range(len(lessons.rows)):
        text = tokenizers["gpt2"].decode(lessons.select(at).batch["tokens"][0].tolist())
        assert text.rpartition("Review: ")[2].partition("\n")[0] not in queries
    with pytest.raises(UserError, match="2 demonstrations of Negative, of 4 of which the others are queries"):
        source.with_shots(3)


def test_one_file_has_demonstrations_and_queries_of_validation(folder, tokenizers):
    one = {"test": ExamplesConfig()}
    source = prompts_of(folder, tokenizers["gpt2"], options={"split": "validation"}, **one)
    assert source.count(100) == 4
    with pytest.raises(UserError, match=r"from one file, train\.tsv; give test\.file"):
        prompts_of(folder, tokenizers["gpt2"], **one)


def test_batches_are_of_few_lengths_and_filled(folder, tokenizers):
    source = prompts_of(folder, tokenizers["gpt2"])
    chunks = source.batches(1, 8, 3)
    assert [chunk.real.tolist() for chunk in chunks] == [[True] * 3, [True] * 3, [True, True, False]]
    for chunk in chunks:
        assert chunk.parts.shape[1] % 16 == 0
        assert chunk.parts.shape[1] - chunk.lengths.max() < 16
        np.testing.assert_array_equal(chunk.parts == Part.PADDING, chunk.classes == -1)
        np.testing.assert_array_equal(chunk.lengths - 1, chunk.positions)
    assert max(chunks[0].lengths) <= min(chunks[1].lengths)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (TokenClasses(), ["text", "label words", "last", "first"]),
        (TokenClasses("each", forerunners=True),
         ["text", "label Negative", "label Positive", "last", "first", "forerunners"]),
        (TokenClasses("per_demonstration", sink=True),
         ["text", "label of demonstration 1", "label of demonstration 2", "last", "first",
          "text of demonstration 1", "text of demonstration 2"]),
    ],
)  # fmt: skip
def test_token_classes(folder, tokenizers, classes, names):
    source = prompts_of(folder, tokenizers["llama3"], options={"classes": classes})
    assert list(source.roles.names) == names
    prompt = rows(source)[0]
    found = [names[at] for at in prompt.classes[0]]
    parts, shown = prompt.parts[0], prompt.demonstrations[0]
    assert found[0] == "first"
    assert found[-1] == "last"
    for at in range(1, len(found) - 1):
        if parts[at] == Part.LABEL:
            word = source.label_names[prompt.label_words[0][at]]
            expected = {"together": "label words", "each": f"label {word}"}.get(
                classes.label_words, f"label of demonstration {shown[at] + 1}"
            )
        elif parts[at] == Part.FORERUNNER and classes.forerunners:
            expected = "forerunners"
        else:
            alone = classes.label_words == "per_demonstration" and shown[at] in (0, 1)
            expected = f"text of demonstration {shown[at] + 1}" if alone else "text"
        assert found[at] == expected
    sets = source.roles.edge_sets()
    assert ("sink" in sets) == classes.sink
    first = names.index("first")
    for name in ("wp", "pq", "ww"):
        assert sets[name][:, first].any() == (not classes.sink and name != "pq")
    outside = sets["ww_with_first"] if classes.sink else sets["ww"]
    assert outside[first].any()
    # The three sets share nothing, and with the sink they are everything.
    total = sets["wp"].astype(int) + sets["pq"] + sets["ww"] + sets.get("sink", 0)
    np.testing.assert_array_equal(total, np.ones_like(total))


def test_conversations(folder, tokenizers):
    tokenizer = tokenizers["gpt2"]
    opened = made.Opened(tokenizer, chat_template=made.CHAT)
    config = made.task(folder, chat=True, system="Be brief.", shots=2)
    source = FewShotPrompts(config, opened)
    text = source.texts(1, 1)[0]
    assert text.startswith("<|system|>Be brief.<|end|>\n<|user|>Review: train")
    assert re.search(r"Sentiment:<\|end\|>\n<\|assistant\|>(Negative|Positive)<\|end\|>", text)
    assert text.endswith("Sentiment:<|end|>\n<|assistant|>")
    for prompt in rows(source):
        labels = np.flatnonzero(prompt.parts[0] == Part.LABEL)
        assert len(labels) == 4
        for at in labels:
            assert decoded(prompt, tokenizer, [at - 1]) == "<|assistant|>"
            assert prompt.parts[0][at - 1] == Part.FORERUNNER
        ids = prompt.batch["tokens"][0]
        np.testing.assert_array_equal(ids[labels], prompt.label_tokens[0][prompt.label_words[0][labels]])
        assert decoded(prompt, tokenizer, [-1]) == "<|assistant|>"
    with pytest.raises(UserError, match=r"has no chat template; set data\.chat to false"):
        FewShotPrompts(config, made.Opened(tokenizer))
    last = "{{ messages[-1]['content'] }}"
    with pytest.raises(UserError, match="does not keep all turns of 4 demonstrations"):
        FewShotPrompts(config, made.Opened(tokenizer, chat_template=last)).batches(1, 1, 1)


@pytest.mark.parametrize("rule", ["refuse", "drop_demonstrations", "truncate_text"])
def test_prompts_that_are_too_long(folder, tokenizers, rule):
    tokenizer = tokenizers["llama3"]
    whole = rows(prompts_of(folder, tokenizer, shots=2))
    lengths = [len(prompt.parts[0]) for prompt in whole]
    limit = sorted(lengths)[4]
    config = made.task(folder, shots=2, too_long=rule)
    source = FewShotPrompts(config, made.Opened(tokenizer, max_length=limit))
    if rule == "refuse":
        with pytest.raises(
            UserError, match=rf"test\.tsv line \d+: its prompt has \d+ tokens, at most {limit}"
        ):
            source.batches(1, 8, 3)
        return
    shortened = rows(source)
    for long, one, length in zip(whole, shortened, lengths, strict=True):
        labels = int((one.parts[0] == Part.LABEL).sum())
        assert len(one.parts[0]) <= limit
        assert one.positions[0] == len(one.parts[0]) - 1
        if length <= limit:
            np.testing.assert_array_equal(one.batch["tokens"], long.batch["tokens"])
        elif rule == "drop_demonstrations":
            ids = one.batch["tokens"][0]  # those at the front are gone, what is left is as it was
            np.testing.assert_array_equal(ids[1:], long.batch["tokens"][0][-len(ids) + 1 :])
            assert labels < 4
        else:
            assert labels == 4
            assert len(one.parts[0]) > limit - 8, "cut as little as needed"
    told = {"drop_demonstrations": "dropped_demonstrations", "truncate_text": "shortened_texts"}[rule]
    assert source.facts()[told] > 0
    with pytest.raises(UserError, match=f"{rule} is not enough"):
        FewShotPrompts(config, made.Opened(tokenizer, max_length=9)).batches(1, 8, 3)


def test_columns_by_name_in_the_template(tmp_path, tokenizers):
    for split in ("train", "test"):
        lines = "".join(
            f'{{"premise": "{split} p{n}", "claim": "c{n}", "gold": "{"yn"[n % 2]}"}}\n' for n in range(4)
        )
        (tmp_path / f"{split}.jsonl").write_text(lines)
    train = ExamplesConfig("train.jsonl", text=("premise", "claim"), label="gold", label_values=("y", "n"))
    changes = {
        "template": "{premise}. {claim}? {label}",
        "label_words": ("Yes", "No"),
        "train": train,
        "test": ExamplesConfig("test.jsonl"),
    }
    source = prompts_of(tmp_path, tokenizers["gpt2"], **changes)
    for text in source.texts(1, 4):
        assert re.fullmatch(r"(train p\d\. c\d\? (Yes|No)\n){2}test p\d\. c\d\?", text)
    with pytest.raises(UserError, match=r"data.template: \{hypothesis\} is no column of the text"):
        prompts_of(tmp_path, tokenizers["gpt2"], **{**changes, "template": "{hypothesis}: {label}"})


def test_label_words_with_a_space_of_their_own(folder, tokenizers):
    """The paper writes the space into the label word; the prompts are the same."""
    one = prompts_of(folder, tokenizers["gpt2"])
    changes = {"template": "Review: {text}\nSentiment:{label}", "label_words": (" Negative", " Positive")}
    other = prompts_of(folder, tokenizers["gpt2"], **changes)
    assert one.texts(1, 8) == other.texts(1, 8)
    assert one.label_ids == other.label_ids
