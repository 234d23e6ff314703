"""A folder of Hugging Face that can be talked to: its model goes on with the token that follows in the
vocabulary, so that what it says is known."""

import json

import jax
import jax.numpy as jnp
from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from jaxlab.checkpoints import save_model
from tests.models.tiny import draw_params, make_config

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", " ", "?", "\n"]
VOCABULARY = [*SPECIAL[:4], *LETTERS, SPECIAL[4]]
"""<|assistant|> is followed by "abc ..." """
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def write_chat_model(path, *, rows=None, max_length=64, template=TEMPLATE, generation=None):
    """A llama of one layer whose attention and MLP add nothing."""
    rows = rows or len(VOCABULARY)
    one = {"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_width": 1, "value_head_dim": None}
    model = make_config(
        vocab_size=rows, width=rows + rows % 2, tie_embeddings=False, max_length=max_length, **one
    )
    model = type(model)(**{**vars(model), "head_dim": None})
    params = jax.tree.map(jnp.zeros_like, draw_params(model))
    width = model.width
    params["embedding"]["table"] = jnp.eye(rows, width)
    params["final_norm"]["scale"] = jnp.ones(width)
    params["head"]["table"] = jnp.roll(jnp.eye(width), 1, axis=1)[:, :rows] * 2
    save_model(path, model, params, make_tokenizer(), form="huggingface")
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps(generation or {"eos_token_id": 1}))
    return path
