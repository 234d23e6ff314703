"""What the parts of the page read out of results: scenarios, roles of data sets, fair comparisons."""

import pytest

from jaxlab.reporting import build_sections, compose, render
from jaxlab.reporting.folders import distinct_labels, read_runs
from jaxlab.reporting.formats import change, count, duration, percent, size
from jaxlab.reporting.markup import Markup
from jaxlab.reporting.other_runs import flat
from jaxlab.reporting.papers.label_words import section as icl
from jaxlab.reporting.papers.nsa import long_input, retrofit
from jaxlab.reporting.papers.nsa import section as nsa
from jaxlab.reporting.papers.skill_injection import section as injection
from tests.reporting import made

MEASURES = ("accuracy", "label_loyalty", "word_loyalty")


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, but not written as SVG: for tests of what is read out of results."""
    monkeypatch.setattr("jaxlab.reporting.plots.svg", lambda _, name, label: Markup(f"<svg>{name}</svg>"))


def statuses(section):
    return {v.claim.id: v.status for v in section.verdicts}


def test_nsa_compares_only_what_is_alike(tmp_path, undrawn):
    runs = [made.train(tmp_path, "f-11111111"), made.train(tmp_path, "s-22222222", "nsa", 1.96)]
    section = nsa.build(read_runs(runs))
    assert statuses(section) == {
        "N1": "seen",
        "N2": "not examined",
        "N3": "not seen",
        "N4": "not examined",
        "N5": "not examined",
    }
    assert section.headline[0] == "−1.9\u00a0%"
    read = read_runs(runs)
    read[1].config["steps"] = 300
    assert statuses(nsa.build(read))["N1"] == "not examined"
    read = read_runs(runs)
    read[1].results["parameters"] = 900_000
    assert statuses(nsa.build(read))["N1"] == "not examined"
    assert nsa.build(read_runs(runs[:1])) is None


def test_attention_timed_alone_has_a_section(tmp_path):
    section = nsa.build(read_runs([made.attention_speed(tmp_path, "speed-12345678")]))
    assert statuses(section) == {"N3": "seen"}
    assert section.headline[0] == "2.00 ×"
    assert any("Time of attention, by length." in part for part in section.body if part)


def test_longer_training_is_named_where_a_short_one_does_not_show_n1(tmp_path, undrawn):
    runs = [made.train(tmp_path, "f-11111111"), made.train(tmp_path, "s-22222222", "nsa", 2.2)]
    read = read_runs(runs)
    evidence = lambda: nsa.build(read).verdicts[0].evidence
    assert evidence().endswith("configs/nsa/n1_full.yaml and n1_nsa.yaml.")
    assert nsa.build(read).beyond.startswith("Not at this size: N1, N2, N4, N5.")
    read[1].results["tokens_per_step"] = 10**6
    assert "configs/" not in evidence()
    assert nsa.build(read).beyond.startswith("Not at this size: N2, N4, N5.")


def needle(root, name, model, found, method="none", attended=128.0, length=512):
    """An evaluation on needles, `found` at each depth."""
    last = max(len(found) - 1, 1)
    depths = [
        {"depth": i / last, "distance": 9, "sequences": 32, "exact_match": f} for i, f in enumerate(found)
    ]
    data = {"kind": "needle", "sequence_length": length}
    results = {
        "loss": 0.5,
        "exact_match": sum(found) / len(found),
        "attended_tokens": attended,
        "needle": {"length": length, "depths": depths},
    }
    config = {"model": f"outputs/train/{model}", "data": data, "sparsity": {"kind": method}}
    return made.write_run(root, "evaluate", name, config, results)


def needle_runs(tmp_path):
    runs = [
        made.train(tmp_path, "full-11111111", kind="needle"),
        made.train(tmp_path, "nsa-22222222", "nsa", kind="needle"),
        needle(tmp_path, "full_test-33333333", "full-11111111", [1.0, 1.0, 1.0], attended=256.0),
        needle(tmp_path, "quest-44444444", "full-11111111", [0.2, 0.5, 0.9], "quest"),
        needle(tmp_path, "nsa_test-55555555", "nsa-22222222", [1.0, 0.96, 1.0]),
        needle(tmp_path, "nsa_test-66666666", "nsa-22222222", [0.1, 0.5, 1.0], length=1024),
    ]
    read = read_runs(runs)
    for run in read[:2]:
        run.config["data"]["sequence_length"] = 512
    return read


def test_needles_and_sparsity_without_training(tmp_path):
    read = needle_runs(tmp_path)
    section = long_input.build(read)
    # What was found beyond the trained length says nothing of the claim.
    assert statuses(section) == {"N2": "seen", "N4": "seen", "N5": "not examined"}
    assert len(section.runs) == 6
    text = "".join(part for part in section.body if part)
    assert "Quest" in text
    assert "full attention" in text
    read[4].results["needle"]["depths"][1]["exact_match"] = 0.9
    read[3].results["attended_tokens"] = 150.0
    assert statuses(long_input.build(read)) == {
        "N2": "not seen",
        "N4": "not examined",
        "N5": "not examined",
    }
    assert long_input.build(read[:2]) is None


def test_variants_of_nsa_are_told_apart_and_kept_out_of_n1(tmp_path, undrawn):
    runs = [made.train(tmp_path, "full-11111111"), made.train(tmp_path, "nsa-22222222", "nsa", 1.99)]
    runs += [made.train(tmp_path, f"variant-{i}{i}333333", "nsa", 2.5) for i in range(3)]
    read = read_runs(runs)
    read[2].config["model"]["attention"]["selector"] = "min_max"
    read[3].config["model"]["attention"] |= {"branches": ["window"], "shared_kv": True}
    read[4].config["model"]["attention"]["selector"] = "auxiliary"
    assert [long_input.variant(r) for r in read] == [
        "full attention",
        "NSA",
        "min-max selector",
        "NSA without compression and selection, one K/V projection",
        "auxiliary-loss selector",
    ]
    assert statuses(nsa.build(read)) == {"N1": "seen", "N3": "not seen"}
    assert statuses(long_input.build(read)) == {
        "N2": "not examined",
        "N4": "not examined",
        "N5": "seen",
    }
    sections = build_sections(read)
    assert [section.key for section in sections] == ["nsa", "long"]
    page = compose(read, sections)
    assert "A paper in miniature" in page
    assert page.count("min-max selector") >= 2


def test_seeds_are_averaged(tmp_path):
    runs = [made.train(tmp_path, f"f-1111111{i}", loss=loss) for i, loss in enumerate((2.0, 2.2))]
    runs += [made.train(tmp_path, f"s-2222222{i}", "nsa", loss) for i, loss in enumerate((2.3, 1.9))]
    section = nsa.build(read_runs(runs))
    assert statuses(section)["N1"] == "seen"
    assert any("2 seeds" in part for part in section.body if part)


def test_evaluations_find_their_models_by_folder_and_by_config(tmp_path, undrawn):
    runs = read_runs(
        [
            made.train(tmp_path, "nsa_sparse-22222222", "nsa"),
            made.evaluate(tmp_path, "blocks-44444444", "nsa_sparse-22222222/model", nsa=True),
        ]
    )
    for name, found in (
        ("outputs/train/nsa_sparse-22222222", True),
        ("configs/a/nsa_sparse.yaml", True),
        ("outputs/train/nsa_sparse-33333333", False),
        ("nsa_sparse", False),
    ):
        assert runs[0].is_named_by(name) == found, name
    section = nsa.build(runs)
    assert any("The blocks that queries chose." in part for part in section.body if part)


def test_a_retrofit_has_a_part_of_its_own(tmp_path):
    coverage = {"chosen": [0.5, 0.7], "with_window": [0.6, 0.8], "random": [0.4, 0.3], "best": [0.9, 0.9]}
    measured = {
        "sequences": 8,
        "length": 1024,
        "choice": 0.875,
        "coverage": coverage,
        "loss": {"dense": 2.111, "retrofitted": 2.222, "trained": 2.055},
    }
    runs = [
        made.train(tmp_path, "full-11111111"),
        made.train(tmp_path, "made-22222222", "nsa", 1.5, init_from="full.yaml", retrofit=measured),
    ]
    read = read_runs(runs)
    assert nsa.build(read) is None  # it did not learn the same from the start
    section = retrofit.build(read)
    assert section.headline[0] == "60\u00a0%"
    assert section.runs == [read[1]]
    page = render(read)
    for said in (
        "2.111",
        "2.222",
        "2.055",
        "88\u00a0% of the queries",
        "blocks by lot",
        "share of attention",
    ):
        assert said in page
    assert retrofit.build(read[:1]) is None


def test_scenarios_and_roles_of_data_sets(tmp_path):
    run = read_runs([made.search(tmp_path, "any-12345678", "french", 0.9)])[0]
    scenario = injection.Scenario([run])
    assert scenario.name == "french"
    assert scenario.target == "image_french"
    assert scenario.donor_set == "text_french"
    assert scenario.own_sets == ["image_english"]
    transfer = scenario.transfer()
    assert (transfer.alone, transfer.injected, transfer.donor, transfer.own) == (0.01, 0.9, 0.98, 0.97)
    assert [claim for claim in injection.KINDS if scenario.speaks_about(claim)] == ["M2"]


def test_names_of_scenarios(tmp_path):
    run = read_runs([made.search(tmp_path, "any-12345678", "french", 0.9)])[0]
    for reference in (
        "outputs/train/digits_expert_french-0123abcd",
        "a/digits_expert_french-0123abcd/model",
        "configs/quickstart/digits_expert_french.yaml",
        "digits_expert_french",
    ):
        run.config["expert"] = reference
        assert injection.Scenario([run]).name == "french"


def test_runs_of_one_config_are_seeds(tmp_path):
    """Means over them, bands around them, and one scenario on the page."""
    paths = [made.search(tmp_path, f"any-{i}2345678", "french", peak) for i, peak in enumerate((0.9, 0.7))]
    paths.append(made.search(tmp_path, "other-12345678", "french", 0.5))
    runs = read_runs(paths)
    first, other = injection.scenarios_of(runs)
    assert (len(first.runs), len(other.runs)) == (2, 1)
    assert first.each_reached("task_arithmetic") == pytest.approx([0.9, 0.7])
    assert first.reached("task_arithmetic") == first.transfer().injected == pytest.approx(0.8)
    page = injection.build(runs[:2])
    text = "".join(str(part) for part in page.body if part)
    assert "(70–90)" in text
    assert "Means of 2 seeds" in text
    assert "Lines are means of 2 seeds" in text


def test_what_a_search_of_many_ways_shows(tmp_path):
    """Entries that compare ways of searching are no other operators; all figures of them are drawn."""
    run = read_runs([made.search(tmp_path, "any-12345678", "french", 0.9)])[0]
    operators = run.results["operators"]
    for name in ("ties", "task_arithmetic"):
        for point in [*operators[name]["points"], operators[name]["best"]]:
            point["kept"] = point["validation"]["image_english"]
    best = operators["task_arithmetic"]["best"]
    learned = {**best, "layers_e": [0.5, 1.0, 1.5], "score": 1.0, "test": {"image_french": 1.0}}
    operators["learned"] = {
        "operator": "task_arithmetic",
        "method": "gradient",
        "layers": "each",
        "points": [learned],
        "evaluations": 24,
        "best": learned,
        "chosen": {"labels": learned, "entropy": best},
    }
    run.results["task_vectors"] = [
        {"layer": layer, "module": module, "norm_v": 1.0, "norm_e": 2.0, "norm_base": 4.0, "cosine": 0.1}
        for layer in range(3)
        for module in ("attention", "mlp")
    ]
    section = injection.build([run])
    m4 = next(v for v in section.verdicts if v.claim.id == "M4")
    assert "learned" not in m4.evidence
    text = "".join(str(part) for part in section.body if part)
    for figure in ("curves", "front", "layers", "vectors"):
        assert f'id="figure-{figure}-any-12345678"' in text
    assert "Chosen with and without labels" in text


def test_injection_verdicts(tmp_path, undrawn):
    given = (("french", 0.9, 0.98), ("format", 0.1, 0.98), ("arithmetic", 0.2, 0.3))
    runs = [made.search(tmp_path, f"{skill}-12345678", skill, peak, donor) for skill, peak, donor in given]
    assert statuses(injection.build(read_runs(runs))) == {
        "M1": "not seen",
        "M2": "seen",
        "M3": "not examined",
        "M4": "seen",
        "M5": "seen",
    }
    read = read_runs(runs[:1])
    assert statuses(injection.build(read))["M1"] == "not examined"
    read[0].results["operators"]["ties"]["evaluations"] = 3
    assert statuses(injection.build(read))["M4"] == "not examined"


def test_icl_verdicts(tmp_path, undrawn):
    run = made.icl(tmp_path, "icl-12345678")
    assert list(statuses(icl.build(read_runs([run]))).values()) == ["seen"] * 4 + ["not examined"] * 4
    read = read_runs([run])
    for row in read[0].results["blocking"]["table"]:
        row["layers"] = 4  # of six: the first and the last overlap
    assert statuses(icl.build(read))["I4"] == "not examined"


def test_icl_of_a_damaged_model_does_not_kill_the_page(tmp_path, undrawn):
    """Every number that a model without predictions leaves undefined is null, and nothing is drawn of it."""
    rows = [
        {"method": name, **dict.fromkeys(m + s for m in MEASURES for s in ("", "_std"))}
        for name in ("full", "hidden_anchor", "text_anchor", "hidden_random", "hidden_random_top")
    ]
    shots = {"shots": 1, "accuracy": None, "accuracy_std": None, "accuracy_by_seed": [None, None]}
    clocks = dict.fromkeys(("whole_prompt", "full_cache", "anchor_cache"), 1.0)
    speed = {"against_the_whole_prompt": 2.0, "against_a_full_cache": 1.0}
    blank, pair = [None, None], {"pearson": None, "spearman": None}
    damaged = {
        "accuracy": None,
        "accuracy_std": None,
        "compression": {"table": rows, "seconds": clocks, "speed_up": speed, "batch": 1}
        | {"tokens": dict.fromkeys(("demonstrations", "kept", "query"), 3.0), "times_measured": 1}
        | {"random_sets": 1},
        "diagnosis": {"label_words": ["a", "b"], "predicted": [blank, blank], "real": [blank, blank]}
        | {"layer": 1, "directions": 1, "correlation": pair},
        "reweighting": {"table": [shots | {"reweighted": x} for x in (False, True)], "loss": [None]}
        | {"train_per_class": 1, "epochs": 1, "learning_rate": 0.1},
        "many_shot": {"table": [shots | {"share": {"wp": [None] * 6, "pq": [None] * 6}}]},
    }
    runs = [made.icl(tmp_path, "icl-12345678"), made.icl(tmp_path, "nan-12345678", **damaged)]
    read = read_runs(runs)
    for row in read[1].results["blocking"]["table"]:
        row.update(dict.fromkeys(m + s for m in MEASURES for s in ("", "_std")))
    read[1].results["flows"]["share"] = {name: [None] * 6 for name in ("wp", "pq", "ww")}
    icl.build(read)
    told = {v.claim.id: v for v in icl.verdicts(read[1])}
    assert {v.status for v in told.values()} == {"not examined"}
    assert "no prompt has a prediction" in told["I6"].evidence
    assert "no prompt has a prediction" in told["I7"].evidence


def test_runs_of_one_config_are_named_by_what_differs(tmp_path, undrawn):
    paths = [made.icl(tmp_path, f"own-{n}2345678") for n in (1, 2)]
    runs = read_runs(paths)
    assert distinct_labels(runs[:1]) == ["own"]
    assert distinct_labels(runs) == ["own-12345678", "own-22345678"]
    for run, model in zip(runs, ("models/one", "models/two"), strict=True):
        run.config["model"] = model
    assert distinct_labels(runs) == ["own (model one)", "own (model two)"]
    assert any("own (model two)" in part for part in icl.build(runs).body)


def test_the_card_says_where_one_label_alone_is_predicted(tmp_path, undrawn):
    (run,) = read_runs([made.icl(tmp_path, "icl-12345678", answers={"single_class": "Positive"})])
    assert icl.build([run]).headline[1].endswith("; it says Positive to every prompt")


def test_formats():
    assert percent(0.123, 1) == "12.3\u00a0%"
    assert percent(None) == "–"
    assert change(-0.019) == "−1.9\u00a0%"
    assert count(1234567) == "1\u202f234\u202f567"
    assert [duration(s) for s in (5, 75, 3725, None)] == ["5.0 s", "1 min 15 s", "1 h 2 min", "–"]
    assert [size(n) for n in (10, 2048, 3 * 2**30)] == ["10 B", "2 KiB", "3.00 GiB"]


def test_flat():
    assert flat({"a": {"b": 1, "c": [1, 2]}, "d": None}) == [("a.b", 1), ("d", None)]
