"""Makes sentencepiece.json: two small SentencePiece models as GGUF files would hold them, texts, their ids.

    pip install sentencepiece && python tests/golden/gguf/make.py README.md

Byte pairs with bytes to fall back on, digits one by one, no normalisation, as Llama 2's model; `prefix` says
whether a space is put before a text (Llama 2), or not (Gemma).
"""

import io
import json
import sys
from pathlib import Path

import sentencepiece as spm

TEXTS = [
    "The capital of France is",
    " leading and  double   spaces ",
    "",
    " ",
    "12 345.6",
    "tabs\tand\nlines\n\n",
    "Café, naïve; 漢字 and 🙂",
    "<b>x</b> [s] kept",
    "e\u0301 \u00a0 \u200b",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "model.merge(models)",
]


def kind(model: spm.SentencePieceProcessor, token: int, user: set[str]) -> int:
    """Of llama.cpp's types of tokens."""
    if model.is_unknown(token):
        return 2
    if model.is_control(token):
        return 3
    if model.id_to_piece(token) in user:
        return 4
    return 6 if model.is_byte(token) else 1


def made(text: Path, prefix: bool) -> dict[str, object]:
    user = {"<tool>", "</tool>"}
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text.read_text().splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=prefix,
        user_defined_symbols=sorted(user),
        minloglevel=2,
    )
    model = spm.SentencePieceProcessor(model_proto=out.getvalue())
    tokens = range(model.vocab_size())
    return {
        "prefix": prefix,
        "tokens": [model.id_to_piece(token) for token in tokens],
        "scores": [model.get_score(token) for token in tokens],
        "types": [kind(model, token, user) for token in tokens],
        "texts": [
            {"text": text, "ids": model.encode(text), "decoded": model.decode(model.encode(text))}
            for text in TEXTS
        ],
    }


if __name__ == "__main__":
    models = [made(Path(sys.argv[1]), prefix) for prefix in (True, False)]
    out = Path(__file__).with_name("sentencepiece.json")
    out.write_text(
        json.dumps({"sentencepiece": spm.__version__, "models": models}, ensure_ascii=False) + "\n"
    )
