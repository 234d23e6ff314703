"""The analyses as modes of the icl task: from prompts to results, stopped and taken up again, and refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxlab.checkpoints import open_model, save_model
from jaxlab.config import dump
from jaxlab.data.episodes import EpisodesConfig, EpisodesSource
from jaxlab.errors import ConfigError, UserError
from jaxlab.files import jsonable
from jaxlab.icl import (
    Baselines,
    Blocking,
    Compression,
    Diagnosis,
    Faithfulness,
    Heads,
    ManyShot,
    Reweighting,
    Study,
    make_prompts,
)
from jaxlab.icl.analyses.records import ChunkStore
from jaxlab.icl.reweighting import learning_memory
from jaxlab.models import ModelConfig, NSAConfig, SlidingAttentionConfig, init_params
from jaxlab.reporting import build_sections, read_runs
from jaxlab.tasks import execute, main
from jaxlab.tasks import icl as analyse
from tests.icl import made

EPISODES = EpisodesConfig(longer_from=(5,), classes=3, shots=1, sequence_length=16)
PAPER = ("attention", "reweighting", "compression", "blocking")
MORE = ("diagnosis", "faithfulness", "heads", "many_shot")

pytestmark = pytest.mark.usefixtures("quick")


def save(folder, **changes):
    tokenizer = EpisodesSource(EPISODES).tokenizer()
    size = {"vocab_size": tokenizer.get_vocab_size(), "width": 16, "num_layers": 2, "num_heads": 2}
    model = ModelConfig(**size, mlp_width=16, initializer_range=0.5, **changes)
    save_model(folder, model, jax.jit(init_params, static_argnums=0)(model, jax.random.key(3)), tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return analyse.Config(
        model=save(tmp_path_factory.mktemp("analyses") / "model"),
        data=EPISODES,
        examples=8,
        batch_size=8,
        seeds=(1, 2),
        analyses=PAPER,
        blocking=Blocking(layers=(1,)),
        reweighting=Reweighting(baseline_shots=(1,), epochs=2, train_per_class=1),
        compression=Compression(random_sets=3, repeats=1),
        many_shot=ManyShot(shots=(1,)),
    )


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    return execute("icl", config, outputs=tmp_path_factory.mktemp("done"))


def test_results(config, done):
    results = json.loads((done.path / "results.json").read_text())
    attention = results["attention"]
    assert len(attention["aucroc"]) == 2
    assert attention["r"][-1] == pytest.approx(1.0)
    learned = results["reweighting"]
    assert [(row["shots"], row["reweighted"]) for row in learned["table"]] == [(1, False), (1, True)]
    assert learned["loss"][1] < learned["loss"][0]
    assert min(learned["beta_size_by_layer"]) > 0.005
    assert learned["table"][0]["accuracy"] == pytest.approx(results["accuracy"])
    rows = {row["method"]: row for row in results["compression"]["table"]}
    assert rows["full"]["label_loyalty"] == rows["full"]["word_loyalty"] == 1.0
    assert rows["full"]["accuracy"] == pytest.approx(results["accuracy"])
    assert rows["hidden_random_top"]["label_loyalty"] >= rows["hidden_random"]["label_loyalty"]
    assert rows["hidden_anchor"]["word_loyalty"] < 1.0
    assert min(results["compression"]["seconds"].values()) > 0.0
    assert results["compression"]["tokens"]["kept"] < results["compression"]["tokens"]["demonstrations"]
    assert len(results["blocking"]["table"]) == 4


@pytest.mark.slow
def test_results_of_further_analyses(config, tmp_path):
    edges = Blocking(layers=(1,), edges=("into", "from", "to_last"))
    other = dataclasses.replace(config, analyses=(*MORE, "blocking"), blocking=edges)
    path = execute("icl", other, outputs=tmp_path).path
    results = json.loads((path / "results.json").read_text())
    diagnosis = results["diagnosis"]
    assert np.array(diagnosis["predicted"], float).shape == (3, 3)
    assert len(diagnosis["pearson_by_layer"]) == 2
    faithful = results["faithfulness"]
    assert faithful["of_means"]["spearman"] > 0.5
    heads = results["heads"]
    assert np.sum(heads["scores"]["pq"]) == pytest.approx(1.0)
    assert len(heads["top"]) == 4
    assert results["many_shot"]["table"][0]["accuracy"] == pytest.approx(results["accuracy"])
    blocked = {(r["edges"], r["words"], r["where"]): r for r in results["blocking"]["table"]}
    assert len(blocked) == 12
    # In the last layer nothing that label words hear matters; what q hears of them does.
    assert blocked["into", "label", "last"]["word_loyalty"] == 1.0
    same = ("word_loyalty", "label_loyalty", "accuracy")
    last = [[blocked[edges, "label", "last"][name] for name in same] for edges in ("from", "to_last")]
    assert last[0] == last[1]
    assert last[0][0] < 1.0
    (section,) = build_sections(read_runs([path]))
    page = " ".join(str(part) for part in section.body)
    for name in ("diagnosis", "faithfulness", "many-shot", "blocking"):
        assert f'id="figure-icl-{name}"' in page
    assert "function-vector score" in page


def test_the_page(done):
    (section,) = build_sections(read_runs([done.path]))
    page = " ".join(str(part) for part in section.body)
    for name in ("attention", "reweighting", "compression", "blocking"):
        assert f'id="figure-icl-{name}"' in page
    status = {v.claim.id: v.status for v in section.verdicts}
    assert [status[f"I{n}"] for n in (1, 2, 3)] == ["not examined"] * 3
    assert "not examined" not in [status[f"I{n}"] for n in (4, 5, 7)]
    # Label words that mean something else in each prompt have no factor and no key of their own.
    assert status["I6"] == status["I8"] == "not examined"
    other = done.path.with_name("other-12345678")
    shutil.copytree(done.path, other, ignore=shutil.ignore_patterns("records"))
    assert main(["report", str(done.path), str(other), "--out", str(done.path / "page.html")]) == 0
    text = (done.path / "page.html").read_text()
    assert "The verdicts on each run." in text
    assert 'id="figure-icl-compared-aucroc"' in text
    assert 'id="figure-icl-attention-2"' in text


def test_a_run_that_was_stopped_goes_on(config, done, tmp_path, monkeypatch):
    """What was measured is not measured again, and the learned factors are read back."""
    once = dataclasses.replace(config, analyses=("reweighting",))
    written = []
    keep = ChunkStore.write

    def write(self, *key_and_records):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(key_and_records[:3])
        keep(self, *key_and_records)

    monkeypatch.setattr(ChunkStore, "write", write)
    with pytest.raises(KeyboardInterrupt):
        execute("icl", once, outputs=tmp_path)
    monkeypatch.setattr(ChunkStore, "write", keep)
    monkeypatch.setattr(Reweighting, "_learn", None)
    results = json.loads((execute("icl", once, outputs=tmp_path).path / "results.json").read_text())
    assert results["reweighting"] == json.loads((done.path / "results.json").read_text())["reweighting"]


def test_one_predicted_label_leaves_measures_undefined(config, done):
    """A model that says one label to everything: no AUCROC, no verdict by accuracy or label loyalty."""
    run = read_runs([done.path])[0]
    opened = open_model(config.model)
    source = make_prompts(EPISODES, opened)
    study = Study(opened.config, {}, source, (1, 2), 8, 8, "paper", opened.tokenizer)
    with np.load(done.path / "records" / "attention.npz") as file:
        records = {
            seed: {n: file[f"{n}_{seed}"] for n in ("scores", "predicted", "shots")} for seed in (1, 2)
        }
    for one in records.values():
        one["predicted"] = np.zeros_like(one["predicted"])
    found = config.attention.summarize(study, records)
    assert found["undefined"] == ["aucroc"]
    assert found["single_class"] == "class 1"
    assert "aucroc" not in found
    run.results["attention"] = jsonable(found)
    run.results["blocking"]["undefined"] = ["accuracy", "label_loyalty"]
    (section,) = build_sections([run])
    told = {v.claim.id: v for v in section.verdicts}
    assert told["I5"].status == "not examined"
    assert "label loyalty is undefined" in told["I4"].evidence
    assert "AUCROC is undefined" in " ".join(map(str, section.body))


@pytest.mark.parametrize(
    ("analysis", "attention", "message"),
    [
        (
            "attention",
            NSAConfig(block_len=4, stride=2, block_size=4, num_blocks=3, window=3),
            "native sparse",
        ),
        (
            "reweighting",
            NSAConfig(block_len=4, stride=2, block_size=4, num_blocks=3, window=3),
            "native sparse",
        ),
        (
            "compression",
            NSAConfig(block_len=4, stride=2, block_size=4, num_blocks=3, window=3),
            "other caches",
        ),
        ("compression", SlidingAttentionConfig(window=4), "longer than the model's window of 4"),
    ],
)
def test_what_a_model_does_not_allow_is_refused_in_one_line(
    config, tmp_path, analysis, attention, message, capsys
):
    other = dataclasses.replace(config, model=save(tmp_path / "m", attention=attention), analyses=(analysis,))
    (tmp_path / "icl.yaml").write_text(dump(other))
    assert main(["icl", str(tmp_path / "icl.yaml"), "--outputs", str(tmp_path / "out"), "--check"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_mistakes(config):
    study = lambda **changes: dataclasses.replace(config, **changes)
    with pytest.raises(UserError, match="released code blocks edges into words alone"):
        analyse.check(
            study(
                mode="released_code", analyses=("blocking",), blocking=Blocking(layers=(1,), edges=("from",))
            )
        )
    with pytest.raises(UserError, match="2 layers, not 3"):
        analyse.check(study(analyses=("diagnosis",), diagnosis=Diagnosis(layers=(3,))))
    with pytest.raises(UserError, match="layer: 2, the one at two thirds of the depth, is none"):
        analyse.check(study(analyses=("diagnosis",), diagnosis=Diagnosis(layers=(1,))))
    with pytest.raises(UserError, match="2 layers, not 4"):
        analyse.check(study(analyses=("faithfulness",), faithfulness=Faithfulness(layers=(4,))))
    for make in (
        lambda: Reweighting(learning_rate=0.0),
        lambda: Compression(random_sets=0),
        lambda: Blocking(edges=()),
        lambda: ManyShot(shots=(0,)),
        lambda: Heads(top=0),
        lambda: Baselines(shots=(1, 1)),
        lambda: Reweighting(baseline_shots=(1, 1)),
        lambda: Blocking(layers=(1, 1)),
        lambda: Diagnosis(layer=-1),
    ):
        with pytest.raises(ConfigError):
            make()


def test_without_demonstrations_there_is_nothing_to_say(config, folder):
    source = made.prompts_of(folder, made.byte_level(), shots=0)
    study = Study(source.model, {}, source, (1,), examples=4, batch_size=4, mode="paper", tokenizer=None)
    check = lambda *analyses: analyse._check_analyses(dataclasses.replace(config, analyses=analyses), study)
    for name in ("flows", "blocking", "attention", "compression", "diagnosis", "heads"):
        with pytest.raises(UserError, match=f"{name} is about demonstrations, and data.shots is 0"):
            check(name)
    check("many_shot", "reweighting")


@pytest.mark.parametrize("analysis", ["attention", "compression", "blocking", "reweighting"])
@pytest.mark.slow
def test_the_released_code_differs(config, tmp_path, analysis):
    mode = "released_code"
    blocking = Blocking(layers=(1,))
    other = dataclasses.replace(config, mode=mode, analyses=(analysis,), blocking=blocking)
    plain = dataclasses.replace(config, analyses=(analysis,), blocking=blocking)
    found, paper = (
        json.loads((execute("icl", c, outputs=tmp_path).path / "results.json").read_text())[analysis]
        for c in (other, plain)
    )
    for results in (found, paper):
        results.pop("seconds", None), results.pop("speed_up", None)
    assert found != paper


@pytest.mark.slow
def test_learning_factors_takes_no_gradients_of_weights():
    """Temporaries are less than the embedding alone, whose gradient would be among them."""
    config = ModelConfig(
        vocab_size=40000, width=64, num_layers=2, num_heads=2, mlp_width=64, tie_embeddings=True
    )
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    needed = learning_memory(params, config, seeds=2, prompts=4, length=16, labels=2)
    assert 0 < needed < 4 * 40000 * 64


@pytest.mark.slow
def test_the_shipped_model_shows_the_claims_in_miniature(tmp_path):
    """I4 and I7 on 32 prompts of the model that learned in context."""
    config = analyse.Config(
        model="jaxlab/assets/icl_model",
        examples=16,
        batch_size=16,
        seeds=(42, 43),
        analyses=("blocking", "compression", "faithfulness"),
        blocking=Blocking(layers=(2,)),
    )
    path = execute("icl", config, outputs=tmp_path).path
    (section,) = build_sections(read_runs([path]))
    status = {verdict.claim.id: verdict.status for verdict in section.verdicts}
    assert status["I4"] == status["I7"] == "seen"
    results = json.loads((path / "results.json").read_text())
    rows = {row["method"]: row for row in results["compression"]["table"]}
    assert rows["hidden_anchor"]["label_loyalty"] > 0.9
    assert rows["hidden_random_top"]["label_loyalty"] < rows["hidden_anchor"]["label_loyalty"] - 0.2
    assert results["faithfulness"]["of_means"]["spearman"] > 0.9
