"""The adapter for lm-evaluation-harness, through the harness' own classes; skipped where there is none."""

import json
import math

import numpy as np
import pytest

from jaxlab.errors import UserError
from jaxlab.evaluation import QuestionsConfig, prepare_questions
from jaxlab.models import forward
from tests.evaluation.chat_models import write_chat_model
from tests.evaluation.harness_model import write_model
from tests.golden.harness.make import LETTERS, OUT, PAIRS, PROMPTS, TEXTS

pytest.importorskip("lm_eval", reason="needs pip install 'jaxlab[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from jaxlab.evaluation.harness import model as harness


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("random") / "model")
    return harness.HarnessModel(str(folder), batch_size=2)


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory):
    """As a chat it answers "abcd...", whatever is asked; as a text it goes on with the alphabet."""
    folder = write_chat_model(tmp_path_factory.mktemp("chat") / "model", max_length=32)
    return harness.HarnessModel(str(folder), batch_size=2, max_gen_toks=6)


def asked(kind, *arguments):
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def plain(model, tokens):
    """Log-probabilities of each token after the first, by one reading of the text."""
    logits = np.asarray(
        forward(model.params, {"tokens": np.asarray([tokens])}, model.config).logits[0], np.float64
    )
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    return [log_p[i, token] for i, token in enumerate(tokens[1:])], logits.argmax(-1)


def test_it_is_the_harness_model_called_jaxlab():
    assert get_model("jaxlab") is harness.HarnessModel


def test_log_likelihoods_are_those_of_one_reading(model):
    pairs = [("hello", " you"), ("hello", " me"), ("a", "b"), ("", "cde"), ("ab ", "cd"), ("z" * 30, "qx")]
    found = model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (log_p, greedy) in zip(pairs, found, strict=True):
        whole = model.tok_encode(context + continuation)[-25:]  # 24 are read, the last is not
        said, likeliest = plain(model, whole)
        count = len(model.tok_encode(continuation, add_special_tokens=False)) + (context == "ab ")
        assert log_p == pytest.approx(sum(said[-count:]), abs=1e-4)
        assert greedy == (likeliest[-count - 1 : -1].tolist() == whole[-count:])


def test_it_says_what_the_harness_own_hugging_face_model_says(model):
    """Recorded by tests/golden/harness/make.py."""
    golden = json.loads(OUT.read_text())
    found = model.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    np.testing.assert_allclose(
        *([x for x, _ in several] for several in (found, golden["loglikelihood"])), atol=1e-4
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in golden["loglikelihood"]]
    rolling = model.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in TEXTS)))
    np.testing.assert_allclose(rolling, golden["loglikelihood_rolling"], atol=1e-4, rtol=1e-6)
    assert model.generate_until(asked("generate_until", *PROMPTS)) == golden["generate_until"]


def test_a_long_text_is_predicted_once_in_windows(model):
    texts = ["ab", LETTERS * 2]
    found = model.loglikelihood_rolling(asked("loglikelihood_rolling", *((t,) for t in texts)))
    short, _ = plain(model, [0, *model.tok_encode("ab")])
    assert found[0] == pytest.approx(sum(short), abs=1e-4)
    tokens = model.tok_encode(texts[1])  # 53: two whole windows of 24, and one that predicts 5
    total = sum(plain(model, [0, *tokens[:24]])[0]) + sum(plain(model, tokens[23:48])[0])
    total += sum(plain(model, tokens[-25:])[0][-5:])
    assert len(tokens) == 53
    assert found[1] == pytest.approx(total, abs=1e-3)


def test_answers_end_where_they_are_told_to(alphabet):
    options = [{"until": ["f"]}, {"until": "x", "max_gen_toks": 3}, {}, {"until": ["e"], "do_sample": False}]
    prompts = [
        ("ab", options[0]),
        ("c", options[1]),
        ("d", options[2]),
        ("aabb", options[3]),
        ("q", options[0]),
    ]
    assert alphabet.generate_until(asked("generate_until", *prompts)) == [
        "cde",
        "def",
        "efghij",
        "cd",
        "rstuvw",
    ]
    with pytest.raises(
        UserError, match="generation_kwargs: beams is not known; it is one of do_sample, until"
    ):
        alphabet.generate_until(asked("generate_until", ("a", {"beams": 2})))
    with pytest.raises(UserError, match="99 tokens of an answer leave no room for a prompt in 32"):
        alphabet.generate_until(asked("generate_until", ("a", {"max_gen_toks": 99})))


def test_chats_are_rendered_by_the_models_template_and_begin_once(alphabet, model):
    chat = alphabet.apply_chat_template([{"role": "user", "content": "hi"}])
    assert chat == "<s><|user|>hi<|assistant|>"
    assert alphabet.tok_encode(chat).count(0) == 1
    assert alphabet.tok_encode("hi")[0] == 0
    assert alphabet.generate_until(asked("generate_until", (chat, {"until": ["d"]}))) == ["abc"]
    assert alphabet.chat_template(True) == alphabet.opened.chat_template
    with pytest.raises(UserError, match="has no chat template; leave --apply_chat_template out"):
        model.apply_chat_template([{"role": "user", "content": "hi"}])


def test_multiple_choice_as_the_task_evaluate_measures_it(model, tmp_path):
    rows = [
        {"prompt": "what is it", "choices": ["a dog", "the cat", "x"], "answer": 1},
        {"prompt": "hello", "choices": ["you", "me there"], "answer": 0},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = QuestionsConfig(path=str(tmp_path / "q.jsonl"), validation_share=0.0, measure="multiple_choice")
    ours = prepare_questions(config, model.opened, "test").measure(model.params, batch_size=2)
    pairs = [(row["prompt"], f" {choice}") for row in rows for choice in row["choices"]]
    found = [log_p for log_p, _ in model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)]
    of_first, of_second = found[:3], found[3:]
    right = [int(np.argmax(of_first)) == 1, int(np.argmax(of_second)) == 0]
    assert ours.measures["accuracy"] == np.mean(right)
    sizes = [len(choice) for row in rows for choice in row["choices"]]
    taken = [rows[0]["choices"][int(np.argmax(np.divide(of_first, sizes[:3])))]]
    taken.append(rows[1]["choices"][int(np.argmax(np.divide(of_second, sizes[3:])))])
    assert list(ours.answers) == taken
    assert all(math.isfinite(x) for x in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"max_length": 25}, "max_length: from 1 to 24, not 25"), ({"pretrained": "nowhere"}, "nowhere")],
)
def test_mistakes_are_one_line(model, changes, message):
    with pytest.raises(UserError, match=message):
        harness.HarnessModel(**{"pretrained": str(model.opened.path), **changes})
