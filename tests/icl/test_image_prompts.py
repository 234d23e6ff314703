"""Prompts with images: their token classes, and flows between them, on tiny folders of real families."""

import json
import shutil

import numpy as np
import pytest

from jaxlab.checkpoints import open_model
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.icl import ImagePrompts, ImagePromptsConfig, Part, flows, make_prompts
from jaxlab.reporting.papers.label_words.plots import prompt_figure
from jaxlab.tasks import execute
from jaxlab.tasks import icl as task
from tests.icl import made
from tests.processing import test_end_to_end as tiny
from tests.processing.folders import GOLDEN

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %} w9 {% endfor %}{% if add_generation_prompt %}w10 {% endif %}"
)
ROWS = [
    {"image": "wide.png", "prompt": "w20 w21 w22", "answer": "w30 w31"},
    {"image": "turned.png", "prompt": "w23 w24", "answer": "w32"},
]


def table(folder, rows=ROWS):
    folder.mkdir(exist_ok=True)
    for name in ("wide.png", "turned.png"):
        shutil.copy(GOLDEN / name, folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    tiny.make(root / "smolvlm", "smolvlm")
    (root / "smolvlm" / "chat_template.jinja").write_text(TEMPLATE)
    return root, table(root / "data")


def prompts_of(place, **changes):
    root, data = place
    config = ImagePromptsConfig(path=str(data), file="prompts.jsonl", **changes)
    return make_prompts(config, open_model(root / "smolvlm"))


@pytest.mark.parametrize("chat", [True, False])
def test_token_classes(place, chat):
    source = prompts_of(place, chat=chat, **({"system": "w11 w12"} if chat else {}))
    assert isinstance(source, ImagePrompts)
    words = {f"w{n}": n for n in range(77)}
    chunks = source.batches(1, 8, 4)
    assert [chunk.rows.tolist() for chunk in chunks] == [[0], [1]]
    for chunk in (chunk.select(0) for chunk in chunks):
        tokens, classes = chunk.batch["tokens"][0], chunk.classes[0]
        image = tokens == source.model.image_token
        assert image.sum() > 9  # several tiles of 9 tokens
        assert image.sum() % 9 == 0
        np.testing.assert_array_equal(classes == 1, image)
        row = ROWS[0] if words["w20"] in tokens else ROWS[1]
        asked = [words[word] for word in row["prompt"].split()]
        if not chat:  # the last position is the last word of the prompt
            asked = asked[:-1]
            assert tokens[-1] == words[row["prompt"].split()[-1]]
        np.testing.assert_array_equal(tokens[classes == 2], asked)
        assert list(np.flatnonzero(classes == 3)) == [len(tokens) - 1] == chunk.positions.tolist()
        assert chunk.label_tokens.tolist() == [[words[row["answer"].split()[0]]]]
        if chat:
            assert tokens[-1] == words["w10"]
            assert {words["w9"], words["w11"], words["w12"]} <= set(tokens[classes == 0].tolist())


def test_several_tokens_of_an_answer(place):
    source = prompts_of(place, answer_tokens=2)
    (chunk,) = (c.select(0) for c in source.batches(1, 8, 1) if 30 in c.label_tokens)
    tokens = chunk.batch["tokens"][0]
    assert tokens[-2:].tolist() == [10, 30]
    assert chunk.positions.tolist() == [[len(tokens) - 2, len(tokens) - 1]]
    assert chunk.label_tokens[0, chunk.labels[0]].tolist() == [30, 31]
    assert chunk.classes[0, -2:].tolist() == [3, 3]
    opened = open_model(place[0] / "smolvlm")
    arguments = (opened.read(), chunk.batch, opened.config, chunk.classes, chunk.targets)
    sums, _ = flows(*arguments, loss="vocabulary", num_classes=4)
    assert sums.shape == (1, opened.config.num_layers, 4, 4)
    assert (np.asarray(sums)[0, :, 3, 1] > 0).all()


def test_prompts_are_of_few_lengths(place, tmp_path):
    rows = [{**ROWS[1], "prompt": " ".join(["w20"] * count)} for count in range(1, 17)]
    config = ImagePromptsConfig(path=str(table(tmp_path / "data", rows)), file="prompts.jsonl")
    chunks = make_prompts(config, open_model(place[0] / "smolvlm")).batches(1, 16, 1)
    assert len({int(chunk.lengths[0]) for chunk in chunks}) == 16
    assert len({chunk.parts.shape[1] for chunk in chunks}) <= 2
    for chunk in chunks:
        assert chunk.batch["tokens"].shape == chunk.parts.shape == chunk.classes.shape
        np.testing.assert_array_equal(chunk.parts == Part.PADDING, chunk.classes == -1)
        assert chunk.positions[0] == chunk.lengths[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize("case", ["smolvlm", "idefics2", "mistral3"])
def test_padding_changes_no_flow(tmp_path, case):
    tiny.make(tmp_path / case, case)
    opened = open_model(tmp_path / case)
    config = ImagePromptsConfig(path=str(table(tmp_path / "data")), file="prompts.jsonl", chat=False)
    for chunk in make_prompts(config, opened).batches(1, 8, 1):
        assert chunk.parts.shape[1] > chunk.lengths[0]
        params = opened.read()
        found = [
            flows(
                params, one.batch, opened.config, one.classes, one.targets, loss="vocabulary", num_classes=4
            )
            for one in (chunk, chunk.select(0))
        ]
        np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4, atol=1e-6 * np.max(found[1][0]))
        np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.slow
def test_from_the_command_to_results(place, tmp_path):
    root, data = place
    config = task.Config(
        model=str(root / "smolvlm"),
        data=ImagePromptsConfig(path=str(data), file="prompts.jsonl"),
        analyses=("flows", "figure1"),
        examples=8,
        seeds=(1,),
        batch_size=4,
    )
    found = execute("icl", config, outputs=tmp_path).results
    assert set(found["figure1"]["parts"]) == {"text", "image", "format"}
    names = {text.get_text() for text in prompt_figure(found).axes[0].get_legend().get_texts()}
    assert names == {"from the image", "instruction → last token", "all other flow"}
    assert found["examples"] == 2
    shares = np.array([found["flows"]["share"][name] for name in found["flows"]["share"]])
    assert len(shares) == 16
    np.testing.assert_allclose(shares.sum(0), 1.0, rtol=1e-6)
    assert min(found["flows"]["mean"]["image_to_answer"]) > 0.0
    assert max(found["flows"]["mean"]["answer_to_image"]) == 0.0, "the answer comes last"
    assert found["accuracy"] in (0.0, 0.5, 1.0)
    assert task.check(config)["prompts"] == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"image": "none.png", "prompt": "w1", "answer": "w2"},
            r"prompts\.jsonl line 1: no image .*none\.png",
        ),
        ({"image": "wide.png", "prompt": " ", "answer": "w2"}, r"line 1: the prompt is empty"),
        ({"image": "wide.png", "prompt": "w1", "answer": ""}, r"line 1: the answer is empty"),
        ({"image": "wide.png", "prompt": "w1"}, r"line 1: no column 'answer'"),
        ({"image": "prompts.jsonl", "prompt": "w1", "answer": "w2"}, r"line 1: .*prompts\.jsonl"),
        ({"image": "wide.png", "prompt": "w1 " * 3000, "answer": "w2"}, r"line 1: its prompt has \d+ tokens"),
    ],
)
def test_bad_rows_are_one_line(place, tmp_path, row, message):
    data = table(tmp_path / "data", [row])
    with pytest.raises(UserError, match=message) as caught:
        prompts_of((place[0], data)).batches(1, 1, 1)
    assert "\n" not in str(caught.value)


def test_rows_without_an_image_are_told(place, tmp_path):
    data = table(tmp_path / "data", [*ROWS, {"image": "", "prompt": "w1", "answer": "w2"}])
    with pytest.warns(UserNote, match=r"1 of 3 rows name no image .*the first: .*prompts\.jsonl line 3"):
        prompts = prompts_of((place[0], data))
    assert [len(row.images) for row in prompts.rows] == [1, 1, 0]


def test_models_and_analyses_that_do_not_fit_are_refused(place, tmp_path):
    root, data = place
    config = ImagePromptsConfig(path=str(data), file="prompts.jsonl")
    with pytest.raises(UserError, match="without vision; data of kind images is for VLMs"):
        make_prompts(config, made.Opened(made.byte_level()))
    with pytest.raises(UserError, match=r"a folder; set data\.file"):
        make_prompts(ImagePromptsConfig(path=str(data)), open_model(root / "smolvlm"))
    tiny.make(tmp_path / "mllama", "mllama")
    with pytest.raises(UserError, match="its images are no tokens of the text"):
        make_prompts(config, open_model(tmp_path / "mllama"))
    with pytest.raises(ConfigError, match="answer_tokens"):
        ImagePromptsConfig(path="x", answer_tokens=0)
    for changes in (
        {"sink": True},
        {"label_classes": "each"},
        {"forerunners": True},
        {"label_position": "last"},
    ):
        (name,) = changes
        with pytest.raises(
            UserError, match=f"^{name}: is of prompts with label words; those of data.kind im"
        ):
            task.check(task.Config(model=str(root / "smolvlm"), data=config, seeds=(1,), **changes))
    with pytest.raises(UserError, match="split: data of kind images has one table"):
        make_prompts(config, open_model(root / "smolvlm"), split="validation")
    with pytest.raises(UserError, match="blocking is about label words, and these prompts have none"):
        task.check(task.Config(model=str(root / "smolvlm"), data=config, analyses=("blocking",), seeds=(1,)))
