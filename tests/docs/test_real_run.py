"""docs/real_run.md is what docs/real_run.py makes of the committed results, byte for byte; and the corpus."""

import json

import numpy as np
import pytest

from jaxlab.data.facts import split_keys
from tests.docs.scripts import load


def test_the_page_follows_from_the_results():
    module = load("real_run")
    kept = json.loads(module.RESULTS.read_text(encoding="utf-8"))
    assert module.page(kept) == module.PAGE.read_text(encoding="utf-8")
    assert {path.stem for path in module.PICTURES.glob("*.svg")} == set(module.pictures(kept))
    # Other figures, another page: nothing is written by hand.
    page = module.page({"cooled": {"nsa": measured(1.2345, 0.5), "full": measured(1.3456, 1.0)}})
    assert "| NSA | 1,000,000 | 1.2345 | 50 / 75 % | 25 % of 8 |" in page
    assert "| full attention | 1,000,000 | 1.3456 | 100 / 100 % | 25 % of 8 |" in page
    assert "after 50 steps: 102,400 tokens, 0.10 for each parameter" in page
    drawn = module.pictures({"cooled": {"nsa": measured(1.2345, 0.5), "full": measured(1.3456, 1.0)}})
    assert set(drawn) == {"position", "needle"}


def measured(loss, worst):
    """What is kept of a model that was cooled down."""
    needle = [{"depth": d, "exact_match": x, "sequences": 8} for d, x in ((0.1, worst), (0.9, 1.0))]
    return {
        "steps": 50,
        "cool": 10,
        "parameters": 1_000_000,
        "tokens_per_step": 2048,
        "length": 1024,
        "validation": loss,
        "test": loss,
        "targets": 1000,
        "by_position": [[10, loss], [20, loss]],
        "needle": {"512": needle, "1024": needle},
        "choices": {"accuracy": 0.2, "accuracy_by_length": 0.25, "questions": 8},
    }


def test_claims_are_judged_by_what_was_measured():
    claims = load("claims")
    full, ours = measured(1.3456, 1.0), measured(1.2345, 0.5)
    n1, n2 = claims.real_run_records({"cooled": {"nsa": ours, "full": full}})
    assert (n1["claim"], n1["status"], n2["claim"], n2["status"]) == ("N1", "seen", "N2", "not seen")
    assert "0.10 tokens were read for each parameter" in n1["caveat"]
    [worse, _] = claims.real_run_records({"cooled": {"nsa": full, "full": ours}})
    assert worse["status"] == "not seen"
    assert claims.real_run_records({}) == []


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora of one Python: a library of thirty files, a package with an equal one, tests and
    documentation."""
    tmp_path = tmp_path_factory.mktemp("python")
    rng = np.random.default_rng(0)
    words = [f"name_{i}" for i in range(200)]
    text = lambda: "\n".join(" ".join(rng.choice(words, 8)) for _ in range(120))
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    (packages / "some" / "tests").mkdir(parents=True)
    for i in range(30):
        (library / f"file_{i:02}.py").write_text(text())
    (packages / "some" / "__init__.py").write_text(text())
    (packages / "some" / "copy.py").write_text((library / "file_00.py").read_text())
    (packages / "some" / "tests" / "test_it.py").write_text(text())
    (packages / "some" / "notes.md").write_text(text())
    (packages / "some" / "short.py").write_text("x = 1\n")
    (packages / "some" / "binary.py").write_bytes(b"\xff" * 500)
    module = load("real_text")
    paths = {"stdlib": str(library), "purelib": str(packages)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HELD_OUT", {"validation": range(0, 20), "test": range(20, 40)})
        patch.setattr(module.sysconfig, "get_paths", lambda: paths)
        for name in ("one", "two"):
            module.write_corpus(tmp_path / name, 1, [])
    return module, tmp_path


def test_a_corpus_follows_from_the_files(corpora):
    module, root = corpora
    files = sorted(p.relative_to(root / "one") for p in (root / "one").rglob("*") if p.is_file())
    for path in files:
        assert (root / "one" / path).read_bytes() == (root / "two" / path).read_bytes()
    rows = {
        str(path): [json.loads(line) for line in (root / "one" / path).read_text().splitlines()]
        for path in files
        if path.suffix == ".jsonl"
    }
    plain = [several for name, several in rows.items() if name not in ("train/facts.jsonl", "choices.jsonl")]
    texts = [row for several in plain for row in several]
    assert len({row["text"] for row in texts}) == len(texts) == 32  # no equal file, no test, no short one
    assert {row["source"] for row in texts} == {"stdlib", "packages", "documentation"}
    held_out = {row["path"] for name in ("validation.jsonl", "test.jsonl") for row in rows[name]}
    assert held_out
    facts = rows["train/facts.jsonl"]
    assert facts
    keys = set(split_keys("train"))
    for row in facts:
        assert row["path"] not in held_out
        told = [line for line in row["text"].split("\n") if line.startswith("# The ")]
        assert len(told) == 2 * module.FACTS  # each is told and asked for
        assert set(told[module.FACTS :]) == set(told[: module.FACTS])
        assert all(" ".join(line.split()[2:4]) in keys for line in told)
    for row in rows["choices.jsonl"]:
        assert len(set(row["choices"])) == 4
        assert row["prompt"] + row["choices"][row["answer"]] in (root / "one" / "test.txt").read_text()


def test_its_tokenizer_is_one_that_data_takes(corpora):
    from jaxlab.checkpoints import describe_model

    module, root = corpora
    module.write_tokenizer(root / "one", 400)
    described = describe_model(root / "one" / "tokenizer")
    tokenizer = described.tokenizer
    assert tokenizer.get_vocab_size() == 400
    assert described.special_tokens["eos_token"] == module.END
    assert tokenizer.token_to_id(module.END) == 0
    text = "name_12 é = 345\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
