"""The tokenizer that a GGUF file holds: byte-level pairs, cut by the rules of a name, or SentencePiece.

A file tells the name of a pre-tokenizer, not its rules; those are of the tokenizer.json of the model that the
name stands for. Tokens have a type (ggml-org/llama.cpp, enum llama_token_type).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from jaxlab.errors import UserError
from jaxlab.processing import make_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPECIAL = (UNKNOWN, CONTROL, USER_DEFINED)
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_PREFIX = "tokenizer.ggml."
_MAX_TOKENS = 1 << 22

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACE = r"[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ONE_DIGIT = f"{_CONTRACTIONS}|{_WORDS_AND_SPACE.replace('NUMBERS', r'\p{N}')}"
_THREE_DIGITS = f"{_CONTRACTIONS}|{_WORDS_AND_SPACE.replace('NUMBERS', r'\p{N}{1,3}')}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+END|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*END"
_AFTER_CASED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED.replace("END", "") + r"|\p{N}" + _AFTER_CASED
_O200K = _CASED.replace("END", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _AFTER_CASED
_DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
_GPT2: tuple[str, ...] = ()
"""No expressions: byte-level pairs split by their own."""
_DIGITS = (r"\p{N}",)
"""Each digit alone, then as GPT-2."""


@dataclasses.dataclass(frozen=True)
class _Rules:
    """How a text is cut before byte pairs are merged."""

    cuts: tuple[str, ...]
    """Regular expressions, each applied to the pieces of the one before."""
    then_gpt2: bool = False
    """Then by GPT-2's."""
    nfc: bool = False
    """Unicode is composed first."""
    whole_words: bool = False
    """A piece that is a token is not merged (`ignore_merges`); texts of these begin with a token, too."""


_PRE_TOKENIZERS: Mapping[str, _Rules] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "exaone4"), _Rules(_GPT2, then_gpt2=True)),
    "olmo": _Rules(_GPT2, then_gpt2=True, nfc=True),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"),
        _Rules(_DIGITS, then_gpt2=True),
    ),
    "command-r": _Rules(_DIGITS, then_gpt2=True, nfc=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Rules((_ONE_DIGIT,), nfc=True)),
    **dict.fromkeys(("stablelm2", "seed-coder"), _Rules((_ONE_DIGIT,))),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _Rules((_THREE_DIGITS,), whole_words=True)
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _Rules((_THREE_DIGITS,))),
    "tekken": _Rules((_TEKKEN,), whole_words=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _Rules((_O200K,))),
    "deepseek-coder": _Rules(_DEEPSEEK_CODER),
    "deepseek-v3": _Rules(_DEEPSEEK_3),
}


class GGUFTokens:
    """The keys of a header that are about tokens."""

    def __init__(self, metadata: Mapping[str, Any], where: object) -> None:
        self.metadata, self.where = metadata, where

    def value(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(_PREFIX + key, default)

    def wrong(self, key: str, what: str) -> UserError:
        return UserError(f"{self.where}: {_PREFIX}{key} {what}")

    @functools.cached_property
    def texts(self) -> list[str]:
        """Of each token, by its id; [] where the file has none."""
        found = self.value("tokens", [])
        if not isinstance(found, list) or len(found) > _MAX_TOKENS:
            raise self.wrong("tokens", "is no list of strings, or too long")
        return found

    def id_of(self, key: str) -> int | None:
        """The token that a key names.

        Raises:
          UserError: there is no such token.
        """
        found = self.value(key)
        if found is None:
            return None
        if type(found) is not int or not 0 <= found < max(len(self.texts), 1):
            raise self.wrong(key, f"is {str(found)[:40]}, not one of {len(self.texts)} tokens")
        return found

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text or a turn, the first the end of a text."""
        found = (self.id_of(key) for key in _ENDS)
        return list(dict.fromkeys(token for token in found if token is not None))

    @property
    def chat_template(self) -> str | None:
        found = self.metadata.get("tokenizer.chat_template")
        return found if isinstance(found, str) else None

    def adds(self, name: str) -> bool:
        """Whether a text gets the token `name`, bos or eos, by the file or by what its kind does.

        Raises:
          UserError: the key is neither true nor false.
        """
        usual = name == "bos" and (self.word("model") == "llama" or self._rules_whole_words)
        return self.flag(f"add_{name}_token", usual)

    def flag(self, key: str, default: bool) -> bool:
        found = self.value(key, default)
        if type(found) is not bool:
            raise self.wrong(key, f"is {str(found)[:40]}, not true or false")
        return found

    def word(self, key: str) -> str | None:
        found = self.value(key)
        if found is not None and not isinstance(found, str):
            raise self.wrong(key, f"is {str(found)[:40]}, not a word")
        return found

    @property
    def _rules_whole_words(self) -> bool:
        rules = _PRE_TOKENIZERS.get(self.word("pre") or "")
        return rules is not None and rules.whole_words

    def types(self) -> list[int]:
        found = self.value("token_type")
        if found is None:
            return [NORMAL] * len(self.texts)
        whole = isinstance(found, np.ndarray) and found.dtype.kind in "iu"
        if not whole or len(found) != len(self.texts):
            raise self.wrong("token_type", f"does not hold a number for each of {len(self.texts)} tokens")
        return [int(kind) for kind in found]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None: the file has no tokens.

        Raises:
          UserError: a kind that is not known, or lists that are no tokenizer.
        """
        kind = self.word("model")
        if kind in (None, "none", "no_vocab") and not self.texts:
            return None
        build = {"gpt2": self._byte_level, "llama": self._sentence_piece}.get(kind or "")
        if build is None:
            raise self.wrong("model", f"is {str(kind)[:40]!r}; only gpt2 and llama are read")
        if not self.texts:
            raise self.wrong("tokens", "is missing")
        types = self.types()
        return make_tokenizer(lambda: self._with_special(build(types), types), str(self.where))

    def _with_special(self, tokenizer: Tokenizer, types: list[int]) -> Tokenizer:
        """With the tokens that stand for themselves in text, and those around a text."""
        special = {text: t for text, t in zip(self.texts, types, strict=True) if t in _SPECIAL and text}
        added = [
            AddedToken(text, normalized=False, special=kind != USER_DEFINED, rstrip=self._strips(text))
            for text, kind in special.items()
        ]
        tokenizer.add_tokens(added)
        self._surround(tokenizer)
        return tokenizer

    def _strips(self, text: str) -> bool:
        """Phi-3's own tokens take the space after them; a GGUF file cannot say so."""
        phi3 = self.metadata.get("general.architecture") == "phi3" and self.value("model") == "llama"
        return phi3 and text not in ("<unk>", "<s>", "<|endoftext|>")

    def _vocabulary(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self.texts) if text}

    def _byte_level(self, types: list[int]) -> Tokenizer:
        name = self.word("pre")
        if name is None or name not in _PRE_TOKENIZERS:
            told = "is missing" if name is None else f"is {str(name)[:40]!r}"
            raise self.wrong(
                "pre", f"{told}; text is split in the ways of {', '.join(sorted(_PRE_TOKENIZERS))}"
            )
        rules = _PRE_TOKENIZERS[name]
        merges = self.value("merges")
        if not isinstance(merges, list):
            raise self.wrong("merges", "is missing, or no list of strings")
        vocabulary = self._vocabulary()
        pairs = [tuple(merge.split(" ")) for merge in merges]
        for merge, pair in zip(merges, pairs, strict=True):
            if len(pair) != 2 or not all(part in vocabulary for part in (*pair, "".join(pair))):
                raise self.wrong("merges", f"holds {merge[:40]!r}, which is no pair of tokens that make one")
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=rules.whole_words))
        if rules.nfc:
            tokenizer.normalizer = normalizers.NFC()
        cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in rules.cuts]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.then_gpt2)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentence_piece(self, types: list[int]) -> Tokenizer:
        """Pairs whose better scores merge first, with single bytes to fall back on."""
        scores = self.value("scores")
        if not isinstance(scores, np.ndarray) or len(scores) != len(self.texts):
            raise self.wrong("scores", f"does not hold a number for each of {len(self.texts)} tokens")
        vocabulary = self._vocabulary()
        merges = []
        for text, kind, score in zip(self.texts, types, scores.tolist(), strict=True):
            if kind not in (NORMAL, USER_DEFINED):
                continue
            for cut in range(1, len(text)):
                if text[:cut] in vocabulary and text[cut:] in vocabulary:
                    merges.append((score, cut, len(text) - cut, text[:cut], text[cut:]))
        merges.sort(key=lambda merge: merge[:3], reverse=True)
        unknown = self.id_of("unknown_token_id")
        tokenizer = Tokenizer(
            models.BPE(
                vocabulary,
                [(left, right) for *_, left, right in merges],
                unk_token=None if unknown is None else self.texts[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        space: normalizers.Normalizer = normalizers.Replace(" ", "▁")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.flag("add_space_prefix", True):
            space = normalizers.Sequence([normalizers.Prepend("▁"), space])
            steps.append(decoders.Strip(" ", 1, 0))
        tokenizer.normalizer = space
        tokenizer.decoder = decoders.Sequence(steps)
        return tokenizer

    def _surround(self, tokenizer: Tokenizer) -> None:
        """The tokens around a text."""
        around = {name: self.id_of(f"{name}_token_id") for name in ("bos", "eos") if self.adds(name)}
        for name, token in around.items():
            if token is None:
                raise self.wrong(f"add_{name}_token", f"is true, but {_PREFIX}{name}_token_id is missing")
        if around:
            special = [(self.texts[token], token) for token in around.values() if token is not None]
            parts = {name: self.texts[token] for name, token in around.items() if token is not None}
            template = [
                *([parts["bos"]] if "bos" in parts else []),
                "$A",
                *([parts["eos"]] if "eos" in parts else []),
            ]
            tokenizer.post_processor = processors.TemplateProcessing(template, None, special)

    def companions(self) -> dict[str, Any]:
        """What generation_config.json and tokenizer_config.json of Hugging Face say of tokens."""
        ids = {
            "bos_token_id": self.id_of("bos_token_id"),
            "eos_token_id": self.ends[0] if len(self.ends) == 1 else self.ends or None,
            "pad_token_id": self.id_of("padding_token_id"),
        }
        named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        texts: dict[str, Any] = {
            f"{theirs}_token": self.texts[token]
            for theirs, ours in named.items()
            if (token := self.id_of(f"{ours}_token_id")) is not None
        }
        return {
            "generation_config.json": {key: value for key, value in ids.items() if value is not None},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                **texts,
            },
        }
