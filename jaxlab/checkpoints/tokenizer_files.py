"""The tokenizer of a folder, through the `tokenizers` library."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxlab.checkpoints.folder import inside, read_json
from jaxlab.errors import UserError

TOKENIZER = "tokenizer.json"
_BYTE_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""Words and merges, as Hugging Face and as OpenAI name them."""
_OF_GPT2 = ("gpt2", "gptj", None)
"""Types of models whose byte pairs are split as GPT-2's; None: a folder without config.json."""
_SENTENCE_PIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def read_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a folder; None if it has none.

    Raises:
      UserError: files that are no tokenizer, or one that only another library reads.
    """
    folder = Path(folder)
    if (folder / TOKENIZER).exists():
        return _load(inside(folder, TOKENIZER))
    for words, merges in _BYTE_PAIRS:
        if (folder / words).exists() and (folder / merges).exists():
            return _byte_pairs(folder, inside(folder, words), inside(folder, merges))
    for name in _SENTENCE_PIECE:
        if (folder / name).exists():
            raise UserError(
                f"{folder}: {name} is SentencePiece's own format; make a {TOKENIZER} of it: python -c "
                f"\"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}')"
                f".save_pretrained('{folder}')\""
            )
    return None


def _load(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file}: not a tokenizer ({str(error)[:200]})") from error


def _byte_pairs(folder: Path, words: Path, merges: Path) -> Tokenizer:
    """GPT-2's: byte pairs within the pieces that its regular expression cuts."""
    config = read_json(inside(folder, "config.json")) if (folder / "config.json").exists() else {}
    if config.get("model_type") not in _OF_GPT2:
        raise UserError(
            f"{folder}: {words.name} and {merges.name} do not say how text is split before byte pairs; "
            f'a {TOKENIZER} does: python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(words), str(merges)))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{words}: not a vocabulary of byte pairs ({str(error)[:200]})") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [word for word in _special(folder) if tokenizer.token_to_id(word) is not None]
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    return tokenizer


def _special(folder: Path) -> list[str]:
    """Tokens that stand for themselves in text, by the folder's files; GPT-2's end of text always."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            found |= read_json(inside(folder, name))
    said = [found.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")]
    words = [value.get("content") if isinstance(value, dict) else value for value in said]
    return list(dict.fromkeys(["<|endoftext|>", *(word for word in words if isinstance(word, str))]))


def common_prefix(tokenizers: list[Tokenizer | None]) -> int | None:
    """How many token ids, from 0 on, stand for the same token in all; None if all read bytes."""
    if all(tokenizer is None for tokenizer in tokenizers):
        return None
    if any(tokenizer is None for tokenizer in tokenizers):
        return 0
    tables = [
        tokenizer.get_vocab(with_added_tokens=True) for tokenizer in tokenizers if tokenizer is not None
    ]
    names = [{index: token for token, index in table.items()} for table in tables]
    rows = 0
    while rows in names[0] and all(other.get(rows) == names[0][rows] for other in names[1:]):
        rows += 1
    return rows
