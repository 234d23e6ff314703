"""docs/real_run.md is what docs/real_run.py makes of the committed results, byte for byte; and the corpus."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from jaxlab.data.facts import split_keys

DOCS = Path(__file__).parents[2] / "docs"


def script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_follows_from_the_results():
    module = script("real_run")
    kept = json.loads(module.RESULTS.read_text(encoding="utf-8"))
    assert module.page(kept) == module.PAGE.read_text(encoding="utf-8")
    assert {path.stem for path in module.PICTURES.glob("*.svg")} == set(module.pictures(kept))
    # Other figures, another page: nothing is written by hand.
    kept["runs"]["nsa"]["held_out"].append([99999, 1.2345])
    assert "1.234 (step 99,999)" in module.page(kept) or "1.235 (step 99,999)" in module.page(kept)


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A Python with a library of thirty files, a package with an equal one, tests and documentation."""
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
    module = script("real_text")
    paths = {"stdlib": str(library), "purelib": str(packages)}
    monkeypatch.setattr(module, "HELD_OUT", {"validation": range(0, 20), "test": range(20, 40)})
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: paths)
    return module, tmp_path


def test_a_corpus_of_an_installation(installation):
    module, root = installation
    for name in ("one", "two"):
        module.write_corpus(root / name, 1, [])
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


def test_its_tokenizer_is_one_that_data_takes(installation):
    from jaxlab.checkpoints import describe_model

    module, root = installation
    module.write_corpus(root / "one", 1, [])
    module.write_tokenizer(root / "one", 400)
    described = describe_model(root / "one" / "tokenizer")
    tokenizer = described.tokenizer
    assert tokenizer.get_vocab_size() == 400
    assert described.special_tokens["eos_token"] == module.END
    assert tokenizer.token_to_id(module.END) == 0
    text = "name_12 é = 345\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
