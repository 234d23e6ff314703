"""Real text for configs/train/real_text_*.yaml, from any Python installation.

    python docs/real_text.py                           # outputs/real_text: the corpus and a tokenizer
    python docs/real_text.py --docs /usr/share/doc     # with another folder's texts among the documents

The corpus is JSON Lines with a `text`, its `source` and its `path`: the standard library, packages that are
installed beside this Python, their documentation (.rst, .md, descriptions), and texts of the same files with
facts planted in them, which are asked for at the end. Files are taken in an order that follows from their
names and contents alone; of two equal ones the first. Held-out files are held out before facts are planted.

Of the test files are besides: `test.txt`, all of them, as filler of needles, and `choices.jsonl`, which asks
for the right one of four continuations.
"""

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxlab.data import draw_facts

FOLDER = Path("outputs/real_text")
END = "<|endoftext|>"
VOCABULARY = 4096
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "__pycache__", "_vendor"}
LONGEST, SHORTEST = 100_000, 200
"""Bytes of a file: longer ones are tables and generated code."""
OF_PACKAGE = 2_000_000
"""Bytes of one package at most."""
HELD_OUT = {"validation": range(0, 2), "test": range(2, 4)}
"""Files whose digest leaves one of these, modulo 100."""
FACTS = 12
"""In a text with facts."""
LETTERS = 2300
"""Of its text: with its facts about 1,024 tokens."""
ASKED, CHOICE = 1000, 100
"""Letters before a continuation, and of it at least."""


def texts(paths: Iterable[Path], seen: set[str]) -> Iterator[tuple[Path, str, int]]:
    """Files that are worth reading, with a number that follows from their content."""
    for path in paths:
        try:
            raw = path.read_bytes()
            text = raw.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(raw).hexdigest()
        if SHORTEST <= len(raw) <= LONGEST and "\0" not in text and digest not in seen:
            seen.add(digest)
            yield path, text, int(digest, 16)


def files(root: Path, *endings: str) -> list[Path]:
    """The files of a folder with these endings, in order of their names, tests left out."""
    found = (path for path in root.rglob("*") if path.name.endswith(endings) and path.is_file())
    return sorted(path for path in found if not SKIPPED & set(path.relative_to(root).parts))


def package_files(root: Path, most: int) -> Iterator[Path]:
    """Python files of the packages in a folder: of each in a mixed order the first two megabytes, all in all
    `most` bytes."""
    inside = sorted(path for path in root.iterdir() if path.is_dir() and (path / "__init__.py").exists())
    chosen: list[tuple[str, Path]] = []
    for package in inside:
        room = OF_PACKAGE
        for path in sorted(files(package, ".py"), key=lambda p: _mixed(p.relative_to(root))):
            if path.stat().st_size <= min(room, LONGEST):
                room -= path.stat().st_size
                chosen.append((_mixed(path.relative_to(root)), path))
    for _, path in sorted(chosen):
        most -= path.stat().st_size
        if most < 0:
            return
        yield path


def _mixed(path: Path) -> str:
    return hashlib.sha256(path.as_posix().encode()).hexdigest()


def with_facts(text: str, rng: np.random.Generator, split: str) -> str:
    """A stretch of a text with facts after some of its lines, which are asked for at its end."""
    start = int(rng.integers(0, max(1, len(text) - LETTERS)))
    lines = text[start : start + LETTERS].split("\n")
    facts = draw_facts(rng, FACTS, split)
    after = np.sort(rng.choice(len(lines), min(FACTS, len(lines)), replace=False))
    for fact, line in reversed(list(zip(facts, after, strict=False))):
        lines[line] += fact.text().rstrip("\n")
    planted = facts[: len(after)]
    asked = "".join(planted[i].text() for i in rng.permutation(len(planted)))
    return "\n".join(lines) + asked


def write_corpus(folder: Path, megabytes: int, more: Iterable[Path]) -> None:
    """The corpus: `train` with a file for each source, `validation.jsonl` and `test.jsonl`."""
    paths = sysconfig.get_paths()
    standard, packages = Path(paths["stdlib"]), Path(paths["purelib"])
    endings = (".rst", ".md", ".txt", "METADATA")
    documentation = [path for root in (packages, *more) for path in files(root, *endings)]
    groups = {
        "stdlib": (standard, files(standard, ".py")),
        "packages": (packages, package_files(packages, megabytes << 20)),
        "documentation": (None, documentation),
    }
    seen: set[str] = set()
    rows: dict[str, list[dict[str, str]]] = {}
    for source, (root, found) in groups.items():
        for path, text, number in texts(found, seen):
            split = next((s for s, parts in HELD_OUT.items() if number % 100 in parts), "train")
            name = path.name if root is None else path.relative_to(root).as_posix()
            row = {"text": text, "source": source, "path": name}
            rows.setdefault(f"train/{source}" if split == "train" else split, []).append(row)
    rng = np.random.default_rng(0)
    plain = [row for name, several in rows.items() if name.startswith("train/") for row in several]
    rows["train/facts"] = [
        {"text": with_facts(row["text"], rng, "train"), "source": "facts", "path": row["path"]}
        for row in plain
        if len(row["text"]) >= LETTERS
    ]
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for name, several in rows.items():
        _write(folder / f"{name}.jsonl", several)
        size = sum(len(row["text"].encode()) for row in several)
        print(f"{name}: {len(several):,} texts, {size / 1e6:.1f} MB", flush=True)
    (folder / "test.txt").write_text("\n".join(row["text"] for row in rows["test"]), encoding="utf-8")
    write_questions(folder, rows["test"])


def write_questions(folder: Path, rows: Sequence[dict[str, str]]) -> None:
    """Stretches of the test texts, each with the lines that follow it and those of three other texts."""
    texts = [row["text"] for row in rows if len(row["text"]) > 2 * ASKED]
    rng = np.random.default_rng(1)
    stretches = []
    for text in texts:
        for start in range(0, min(len(text) - ASKED, 8 * ASKED), 2 * ASKED):
            cut = text.find("\n", start + ASKED) + 1
            end = text.find("\n", cut + CHOICE)
            if 0 < cut < end <= cut + 2 * CHOICE and text[cut:end].strip():
                stretches.append((text[max(0, cut - ASKED) : cut], text[cut:end]))
    lines = []
    for number, (prompt, right) in enumerate(stretches if len(stretches) > 3 else []):
        others = rng.choice(len(stretches) - 1, 3, replace=False)
        choices = [stretches[i + (i >= number)][1] for i in others]
        if len({right, *choices}) == 4:
            place = int(rng.integers(4))
            choices.insert(place, right)
            lines.append({"prompt": prompt, "choices": choices, "answer": place})
    _write(folder / "choices.jsonl", lines)
    print(f"choices: {len(lines):,} questions", flush=True)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """A byte-level BPE tokenizer of the training texts, in a folder that `data.tokenizer` takes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts_of(sorted((folder / "train").glob("*.jsonl"))), trainer)
    out = folder / "tokenizer"
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    described = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
    described |= {"vocab_size": vocabulary, "max_position_embeddings": 1024, "eos_token_id": 0}
    (out / "config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    (out / "special_tokens_map.json").write_text(json.dumps({"eos_token": END}) + "\n", encoding="utf-8")


def _texts_of(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        with open(path, encoding="utf-8") as rows:
            for row in rows:
                yield json.loads(row)["text"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--megabytes", type=int, default=32, help="of packages")
    parser.add_argument("--docs", type=Path, action="append", default=[], help="a folder of more documents")
    arguments = parser.parse_args()
    write_corpus(arguments.folder, arguments.megabytes, arguments.docs)
    write_tokenizer(arguments.folder)


if __name__ == "__main__":
    main()
