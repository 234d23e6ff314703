"""A small llama of random parameters that reads letters, as a folder of Hugging Face."""

import json
from pathlib import Path

from jaxlab.checkpoints import save_model
from tests.evaluation.chat_models import make_tokenizer
from tests.models.tiny import draw_params, make_config


def write_model(folder: Path) -> Path:
    sizes = {"vocab_size": 34, "num_layers": 1, "max_length": 24, "value_head_dim": None}
    config = make_config(attention_bias=False, **sizes)
    save_model(folder, config, draw_params(config), make_tokenizer(), form="huggingface")
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder
