"""Questions put to a model whose answers are known, and likelihoods against a plain forward pass."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxlab.checkpoints import open_model, save_model
from jaxlab.errors import UserError
from jaxlab.evaluation import QuestionsConfig, prepare_questions, questions
from jaxlab.evaluation.question_files import Question
from jaxlab.evaluation.questions import exactly, token_f1
from jaxlab.models import continuation_log_probs, forward
from jaxlab.processing import Prompt
from jaxlab.tasks import main
from tests.evaluation.chat_models import write_chat_model
from tests.models.tiny import VISION, draw_params, make_config


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """As a chat it answers "abcd...", whatever is asked; as a text it goes on with the alphabet."""
    return open_model(write_chat_model(tmp_path_factory.mktemp("chat") / "model"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def measured(opened, tmp_path, rows, batch_size=2, **options):
    path = write(tmp_path / "questions.jsonl", rows)
    config = QuestionsConfig(path=path, validation_share=0.0, **options)
    questions = prepare_questions(config, opened, "test")
    return questions.measure(opened.read(), batch_size=batch_size)


def test_answers_are_compared_in_the_order_of_the_questions(opened, tmp_path):
    rows = [
        {"prompt": "hello there", "answer": "abc"},
        {"prompt": "hi", "answer": ["x", "ABC?"]},
        {"prompt": "what is it", "answer": "abd"},
    ]
    found = measured(opened, tmp_path, rows, max_new_tokens=3)
    assert found.answers == ["abc"] * 3
    assert list(found.each) == [1.0, 1.0, 0.0]
    assert found.measures["exact_match"] == found.score == 2 / 3
    plain = measured(opened, tmp_path, [{"prompt": "ab", "answer": "cd"}], max_new_tokens=2, chat=False)
    assert (plain.answers, plain.score) == (["cd"], 1.0)
    stopped = measured(opened, tmp_path, [{"prompt": "a", "answer": "bc"}], chat=False, stop=("d",))
    assert stopped.answers == ["bc"]


def test_rules_of_answers(opened, tmp_path):
    rules = [{"kind": "lower"}, {"kind": "upper"}], [{"kind": "starts", "text": "ab"}]
    rows = [{"prompt": "hi", "rules": list(one)} for one in rules]
    found = measured(opened, tmp_path, rows, measure="rules", max_new_tokens=4)
    assert found.measures == {"all_rules": 0.5, "each_rule": pytest.approx(2 / 3)}


def test_choices_by_their_likelihood(opened, tmp_path):
    rows = [
        {"prompt": "hi", "choices": ["abc", "xbc", "q"], "answer": "abc"},
        {"prompt": "hello", "choices": ["z", "ab"], "answer": 0},
    ]
    found = measured(opened, tmp_path, rows, measure="multiple_choice")
    assert found.answers == ["abc", "ab"]
    assert found.measures == {"accuracy": 0.5, "accuracy_by_length": 0.5}
    # Four likely letters are less likely than one, but not over their length.
    rows = [{"prompt": "hi", "choices": ["abcd", "a"], "answer": 0}]
    assert measured(opened, tmp_path, rows, measure="multiple_choice", normalize=False).answers == ["a"]


def test_perplexity_of_a_text_and_of_an_answer(opened, tmp_path):
    params, config = opened.read(), opened.config
    tokens = np.asarray(opened.tokenizer.encode("abc").ids)[None]
    log_p = jax.nn.log_softmax(forward(params, {"tokens": tokens}, config).logits[0], axis=-1)
    loss = -np.mean([log_p[i, tokens[0, i + 1]] for i in range(tokens.shape[1] - 1)])
    found = measured(opened, tmp_path, [{"text": "abc"}], measure="perplexity")
    np.testing.assert_allclose(found.measures["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(found.score, np.exp(-loss), rtol=1e-5)
    likely, unlikely = (
        measured(opened, tmp_path, [{"prompt": "hi", "answer": a}], measure="perplexity").measures["loss"]
        for a in ("abc", "cba")
    )
    assert likely < unlikely


@pytest.mark.parametrize(
    "variant",
    [
        "rotary",
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("other", "nsa", "vision")),
    ],
)
def test_continuations_are_as_likely_as_in_one_text(variant):
    config = make_config(variant)
    params = draw_params(config)
    rng = np.random.default_rng(0)
    lengths, sizes = [7, 4, 5], [[3, 1], [2, 3], [1, 2]]
    draw = lambda n: rng.integers(4, config.vocab_size, n).astype(np.int32)
    prompts, following = [draw(n) for n in lengths], [[draw(n) for n in row] for row in sizes]
    tokens, segments = np.zeros((3, 8), np.int32), np.zeros((3, 8), np.int32)
    continuations, mask = np.zeros((2, 3, 4), np.int32), np.zeros((2, 3, 4), bool)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        for i, more in enumerate(following[row]):
            continuations[i, row, : len(more)], mask[i, row, : len(more)] = more, True
    batch = {"tokens": tokens, "segment_ids": segments}
    log_p, likeliest, entropy = continuation_log_probs(params, batch, continuations, mask, config)
    # Every prompt with one of its continuations, a row each.
    texts = [np.concatenate([ids, more]) for ids, own in zip(prompts, following, strict=True) for more in own]
    rows = {name: np.zeros((len(texts), 10), np.int32) for name in ("tokens", "segment_ids")}
    for row, text in enumerate(texts):
        rows["tokens"][row, : len(text)], rows["segment_ids"][row, : len(text)] = text, 1
    logits = jax.jit(forward, static_argnames="config")(params, rows, config).logits
    whole = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for row, ids in enumerate(prompts):
        for i, more in enumerate(following[row]):
            text = whole[2 * row + i]
            for j, token in enumerate(more):
                want = text[len(ids) - 1 + j]
                np.testing.assert_allclose(log_p[i, row, j], want[token], rtol=2e-4, atol=2e-4)
                assert bool(likeliest[i, row, j]) == (int(want.argmax()) == token)
            assert not np.asarray(log_p)[i, row, len(more) :].any()
        before = whole[2 * row, len(ids) - 1]
        np.testing.assert_allclose(entropy[row], -(np.exp(before) * before).sum(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("measure", "more", "right"),
    [
        ("exact_match", {"answer": ["cd", "x"]}, ["cd", "cd", "cd"]),
        ("multiple_choice", {"choices": ["xyz", "cd"], "answer": 1}, ["cd", "cd", "cd"]),
        ("rules", {"rules": [{"kind": "lower"}]}, []),
    ],
)
def test_right_answers_as_batches_of_tokens(opened, tmp_path, measure, more, right):
    """For losses: what is marked is the answer and its end, and a model that knows it has no loss."""
    rows = [{"prompt": prompt, **more} for prompt in ("b", "ab", "hello")]
    config = QuestionsConfig(
        path=write(tmp_path / "q.jsonl", rows), validation_share=0.0, measure=measure, chat=False
    )
    questions = prepare_questions(config, opened, "test")
    batches = questions.batches(2)
    assert [batch["tokens"].shape for batch in batches] == ([(2, 32), (1, 32)] if right else [])
    found = []
    for batch in batches:
        for tokens, segments, mask in zip(
            batch["tokens"], batch["segment_ids"], batch["loss_mask"], strict=True
        ):
            (places,) = np.nonzero(mask)
            assert places.tolist() == list(range(places[0], int(segments.sum())))
            *answer, end = tokens[places].tolist()
            assert end in questions.ends
            found.append(opened.tokenizer.decode(answer).strip())
    assert found == right


def test_words_and_f1():
    assert exactly("The  Cat.", "a cat", True)
    assert not exactly("The cat", "a cat", False)
    assert token_f1("the big cat", "a cat") == pytest.approx(2 / 3)
    assert token_f1("", "") == 1.0
    assert token_f1("dog", "cat") == token_f1("", "cat") == 0.0


def test_a_file_holds_both_splits(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"prompt": str(i), "answer": "a"} for i in range(8)])
    splits = {
        share: [
            [q.prompt.text for q in QuestionsConfig(path=path, validation_share=share).questions(split)]
            for split in ("validation", "test")
        ]
        for share in (0.5, 0.25)
    }
    assert splits[0.5] == [["1", "3", "5", "7"], ["0", "2", "4", "6"]]
    assert splits[0.25][0] == ["3", "7"]
    other = write(tmp_path / "v.jsonl", [{"prompt": "v", "answer": "a"}])
    config = QuestionsConfig(path=path, validation_path=other, limit=3)
    assert [q.prompt.text for q in config.questions("validation")] == ["v"]
    assert [q.prompt.text for q in config.questions("test")] == ["0", "1", "2"]
    with pytest.raises(UserError, match="no question for the validation split"):
        QuestionsConfig(path=path, validation_share=0.0).questions("validation")


@pytest.mark.parametrize(
    ("row", "measure", "message"),
    [
        ("{", "exact_match", "line 1: not JSON"),
        ([1], "exact_match", "line 1: not an object"),
        ({"answer": "a"}, "exact_match", "needs a prompt"),
        ({"prompt": "a"}, "exact_match", "needs an answer"),
        ({"prompt": "a", "answer": ["", "b"]}, "token_f1", "needs an answer"),
        ({"prompt": "a", "answer": "b"}, "multiple_choice", "needs choices, at least two"),
        ({"prompt": "a", "choices": ["a", "b"], "answer": "c"}, "multiple_choice", "it is 'c'"),
        ({"prompt": "a", "choices": ["a", "b"], "answer": 2}, "multiple_choice", "it is 2"),
        ({"prompt": "a"}, "rules", "needs rules"),
        ({"prompt": "a", "rules": [{"kind": "x"}]}, "rules", "no such rule, 'x'"),
        ({"text": ["a", "b"]}, "perplexity", "of one text, not of 2"),
        ({"prompt": "a", "answer": "b", "image": "no.png"}, "exact_match", "no such image file"),
        ({"prompt": "a", "answer": {}}, "exact_match", "answer is neither a text nor"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path, row, measure, message):
    path = tmp_path / "q.jsonl"
    path.write_text((row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(UserError, match=message):
        QuestionsConfig(path=str(path), measure=measure).questions("test")


def test_evaluate_takes_questions(opened, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "q.jsonl", [{"prompt": "hi", "answer": "ab"}, {"prompt": "you", "answer": "b"}])
    text = f"model: {opened.path}\ndata: {{kind: questions, path: q.jsonl, max_new_tokens: 2}}\n"
    (tmp_path / "evaluate.yaml").write_text(text)
    words = ["evaluate", "evaluate.yaml", "--data.validation_share", "0"]
    assert main([*words, "--check"]) == 0
    assert "longest_prompt: 6" in capsys.readouterr().out
    assert main(words) == 0
    (run,) = (tmp_path / "outputs" / "evaluate").iterdir()
    results = json.loads((run / "results.json").read_text())
    assert (results["exact_match"], results["each"]) == (0.5, [1.0, 0.0])
    assert results["examples"][1] == {"question": "you", "expected": "b", "answer": "ab", "score": 0.0}
    capsys.readouterr()
    long = write(tmp_path / "q.jsonl", [{"prompt": "h" * 80, "answer": "ab"}])
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{long.split('/')[-1]} line 1: 83 tokens and 1 of an answer; the model takes 1 to 64" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_questions_about_images(tmp_path):
    """A model of ours: each question with its own image, beside one without."""
    config = make_config(
        "vision", vocab_size=256, vision=dataclasses.replace(VISION, channels=1, image_token=255)
    )
    save_model(tmp_path / "vlm", config, draw_params(config))
    for i in range(2):
        Image.fromarray(np.full((4, 4), 200 * i, np.uint8)).save(tmp_path / f"{i}.png")
    rows = [{"prompt": "a", "choices": ["b", "cd"], "answer": 0, "image": f"{i}.png"} for i in range(2)]
    rows.append({"prompt": "a", "choices": ["b", "cd"], "answer": 0})
    opened = open_model(tmp_path / "vlm")
    path = write(tmp_path / "q.jsonl", rows)
    config = QuestionsConfig(path=path, validation_share=0.0, measure="multiple_choice")
    questions = prepare_questions(config, opened, "test")
    assert questions.has_images
    assert [set(one.batch) >= {"images"} for one in questions.asked] == [True, True, False]
    found = questions.measure(opened.read())
    assert len(found.each) == 3


def test_a_model_without_numbers_chooses_nothing():
    """The first choice would be right by chance."""
    question = Question(Prompt("x:1", "x"), choices=("a", "b"), right=0)
    asked = [questions.Asked(question, {"tokens": np.zeros((1, 1), np.int32)})] * 2
    sums = [np.array([np.nan, -1.0]), np.array([-1.0, -2.0])]
    found = questions._choices(asked, sums, normalize=True)
    assert found.measures == {"accuracy": 0.5, "accuracy_by_length": 0.5}
    assert found.answers == ["", "a"]
