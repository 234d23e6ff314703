"""The sets of the paper: their prompts are those of transformers, in files and in the hub's form."""

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from jaxlab.icl import AGNewsConfig, EmoCConfig, FewShotPrompts, Part, SST2Config, TRECConfig
from tests.icl import made
from tests.icl.made import rows

GOLDEN = Path(__file__).parents[1] / "golden" / "icl_prompts"
DATA = Path(os.environ.get("JAXLAB_DATA", "../shared/data"))
PAPER = {"sst2": SST2Config, "trec": TRECConfig, "agnews": AGNewsConfig, "emoc": EmoCConfig}


@pytest.mark.skipif(not (DATA / "gpt2_bpe").is_dir(), reason="needs the real data sets; set JAXLAB_DATA")
@pytest.mark.filterwarnings("ignore::jaxlab.errors.UserNote")
@pytest.mark.parametrize("name", PAPER)
def test_the_sets_of_the_paper_in_gpt2s_tokens(name):
    """Abbreviation alone has more than one token; each class is shown once."""
    plain = ByteLevelBPETokenizer(str(DATA / "gpt2_bpe/encoder.json"), str(DATA / "gpt2_bpe/vocab.bpe"))
    tokenizer = Tokenizer.from_str(plain.to_str())
    config = PAPER[name](path=str(DATA / name))
    source = FewShotPrompts(config, made.Opened(tokenizer, max_length=1024))
    sizes = {"sst2": 872, "trec": 500, "agnews": 7600, "emoc": 5509}
    assert source.count(10_000) == sizes[name]
    of_several = [
        word for word, ids in zip(config.label_words, source.label_ids, strict=True) if len(ids) > 1
    ]
    assert of_several == (["Abbreviation"] if name == "trec" else [])
    for word, ids in zip(config.label_words, source.label_ids, strict=True):
        assert tokenizer.decode(ids) == f" {word}"
    for prompt in rows(source, examples=20, batch_size=8):
        words = prompt.label_words[0][prompt.parts[0] == Part.LABEL]
        assert sorted(words.tolist()) == list(range(len(config.label_words)))


@pytest.mark.skipif(not (DATA / "gpt2_bpe").is_dir(), reason="needs the real data sets; set JAXLAB_DATA")
@pytest.mark.filterwarnings("ignore::jaxlab.errors.UserNote")
@pytest.mark.parametrize("name", PAPER)
def test_prompts_are_those_of_transformers(name):
    """tests/golden/icl_prompts/make.py builds them by hand."""
    golden = json.loads((GOLDEN / "digests.json").read_text())[name]
    plain = ByteLevelBPETokenizer(str(DATA / "gpt2_bpe/encoder.json"), str(DATA / "gpt2_bpe/vocab.bpe"))
    opened = made.Opened(Tokenizer.from_str(plain.to_str()), max_length=1024)
    source = FewShotPrompts(PAPER[name](path=str(DATA / name)), opened)
    classes = range(len(source.label_names))
    shown = [next(e for e in source.examples.train if e.label == number) for number in classes]
    (prompt,) = source._annotated([source.examples.test[0]], [shown])
    ids = json.dumps(prompt.tokens.tolist())
    assert len(prompt.tokens) == golden["tokens"]
    assert hashlib.sha256(ids.encode()).hexdigest() == golden["sha256"]
    assert np.flatnonzero(prompt.parts == Part.LABEL).tolist() == golden["label_words"]


def test_named_sets_take_the_form_of_the_hub(tmp_path, tokenizers, monkeypatch):
    """Folders that `datasets` saved have other columns than the files."""

    class Table:
        column_names = ("idx", "sentence", "label")

        def __init__(self, split):
            self.values = {
                "sentence": [f"{split} {n}" for n in range(4)], "label": [0, 1, 0, 1], "idx": list(range(4))
            }  # fmt: skip

        def __getitem__(self, name):
            return self.values[name]

    both = {split: Table(split) for split in ("train", "validation")}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_from_disk=lambda name: both))
    (tmp_path / "dataset_dict.json").write_text("{}")
    source = FewShotPrompts(SST2Config(path=str(tmp_path)), made.Opened(tokenizers["gpt2"]))
    assert source.texts(1, 1)[0].count("Review: train") == 2
    assert "Review: validation" in source.texts(1, 1)[0]
    assert dataclasses.replace(SST2Config(), path=str(tmp_path)) == source.config
