"""The tokenizer of a folder, through the `tokenizers` library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxlab.checkpoints.tensor_folder import inside, read_json
from jaxlab.errors import UserError
from jaxlab.processing import make_tokenizer

TOKENIZER = "tokenizer.json"
_BYTE_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""Vocabulary and merges, as Hugging Face and as OpenAI name them."""
_OF_GPT2 = ("gpt2", "gptj", None)
"""Types of models whose byte pairs are split as GPT-2's; None: a folder without config.json."""
_SENTENCE_PIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def read_tokenizer(folder: str | Path, config: Mapping[str, Any] | None = None) -> Tokenizer | None:
    """The tokenizer of a folder; None if it has none.

    Args:
      config: the folder's config.json, which says how byte pairs are split; None: it has none.

    Raises:
      UserError: files that are no tokenizer, or one that only another library reads.
    """
    folder = Path(folder)
    if (folder / TOKENIZER).exists():
        return load_tokenizer_file(inside(folder, TOKENIZER))
    for vocabulary, merges in _BYTE_PAIRS:
        if (folder / vocabulary).exists() and (folder / merges).exists():
            return _byte_pairs(folder, inside(folder, vocabulary), inside(folder, merges), config or {})
    for name in _SENTENCE_PIECE:
        if (folder / name).exists():
            raise UserError(
                f"{folder}: {name} is SentencePiece's own format; make a {TOKENIZER} of it: python -c "
                f"\"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}')"
                f".save_pretrained('{folder}')\""
            )
    return None


def load_tokenizer_file(file: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json.

    Raises:
      UserError: it is none.
    """
    return make_tokenizer(lambda: Tokenizer.from_file(str(file)), file)


def _byte_pairs(folder: Path, vocabulary: Path, merges: Path, config: Mapping[str, Any]) -> Tokenizer:
    """GPT-2's: byte pairs within the pieces that its regular expression cuts."""
    if config.get("model_type") not in _OF_GPT2:
        raise UserError(
            f"{folder}: {vocabulary.name} and {merges.name} do not say how text is split before byte pairs; "
            f'a {TOKENIZER} does: python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    tokenizer = make_tokenizer(
        lambda: Tokenizer(models.BPE.from_file(str(vocabulary), str(merges))),
        vocabulary,
        "a vocabulary of byte pairs",
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in _special(folder) if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def _special(folder: Path) -> list[str]:
    """Tokens that stand for themselves in text, by the folder's files; GPT-2's end of text always."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            found |= read_json(inside(folder, name))
    said = [found.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")]
    tokens = [value.get("content") if isinstance(value, dict) else value for value in said]
    return list(dict.fromkeys(["<|endoftext|>", *(token for token in tokens if isinstance(token, str))]))
