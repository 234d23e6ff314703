"""A model that is opened but has no tensors, tokenizers of several makes, and small task files."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxlab.checkpoints import OpenModel
from jaxlab.icl import ClassificationConfig, ExamplesConfig, FewShotPrompts
from jaxlab.models import ModelConfig

CORPUS = [
    "Review: a good film, really good and funny\nSentiment: Positive\n",
    "Review: a bad film, really bad and boring\nSentiment: Negative\n",
    "Question: who is the best of the two, and why?\nAnswer Type: Abbreviation Entity Number\n",
]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level(bos: bool = False, size: int = 400) -> Tokenizer:
    """As GPT-2's; with `bos` as Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2's: spaces are letters, bytes where a letter is not known, a token at both ends."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    letters = sorted({letter for text in CORPUS for letter in text.replace(" ", "▁")})
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))],
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator([word for text in CORPUS for word in text.split()] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


class Opened(OpenModel):
    """A model of which only config and tokenizer are known."""

    form = "huggingface"

    def __init__(self, tokenizer, *, max_length=512, end_tokens=(), chat_template=None, vocab_size=None):
        super().__init__(Path("some/model"))
        self._tokenizer, self._ends, self._chat = tokenizer, frozenset(end_tokens), chat_template
        size = vocab_size or (256 if tokenizer is None else tokenizer.get_vocab_size())
        self._config = ModelConfig(
            vocab_size=size, width=8, num_layers=2, num_heads=2, mlp_width=8, max_length=max_length
        )

    config = property(lambda self: self._config)
    tokenizer = property(lambda self: self._tokenizer)
    end_tokens = property(lambda self: self._ends)
    chat_template = property(lambda self: self._chat)
    special_tokens = property(lambda self: {})
    source_files = property(lambda self: None)

    def shapes_in(self, dtype):
        raise AssertionError("no test reads them")

    def _read(self, shardings, dtype, not_finite):
        raise AssertionError("no test reads them")


def write_task(folder: Path, texts: dict[str, list[tuple[str, int]]]) -> None:
    for name, rows in texts.items():
        lines = "".join(f"{text}\t{label}\n" for text, label in rows)
        (folder / f"{name}.tsv").write_text(f"text\tlabel\n{lines}", encoding="utf-8")


def sentiment(folder: Path, count: int = 8) -> None:
    """Texts of several lengths, two classes in turn."""
    rng = np.random.default_rng(0)
    words = ["a", "good", "bad", "film", "really", "funny", "boring", "best", "two"]

    def rows(split: str) -> list[tuple[str, int]]:
        return [
            (f"{split} {n} " + " ".join(rng.choice(words, rng.integers(1, 12))), n % 2) for n in range(count)
        ]

    write_task(folder, {split: rows(split) for split in ("train", "test")})


def task(folder: Path, **changes) -> ClassificationConfig:
    given = {
        "path": str(folder),
        "template": "Review: {text}\nSentiment: {label}",
        "label_words": ("Negative", "Positive"),
        "train": ExamplesConfig("train.tsv"),
        "test": ExamplesConfig("test.tsv"),
        **changes,
    }
    return ClassificationConfig(**given)


TOKENIZERS = {"gpt2": byte_level, "llama3": lambda: byte_level(bos=True), "llama2": sentencepiece}


def prompts_of(folder: Path, tokenizer: Tokenizer, *, options=None, **changes) -> FewShotPrompts:
    return FewShotPrompts(task(folder, **changes), Opened(tokenizer), **(options or {}))


def rows(source, seed=1, examples=8, batch_size=3):
    """The prompts of a seed one by one, in their order, without padding."""
    found = {}
    for chunk in source.batches(seed, examples, batch_size):
        for at, row in enumerate(chunk.rows.tolist()):
            if row >= 0:
                assert row not in found
                found[row] = chunk.select(at)
    return [found[row] for row in range(len(found))]
