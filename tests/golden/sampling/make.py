"""Logits after the processors of Hugging Face's generation, by its own choice and order of them.

    python tests/golden/sampling/make.py

Made with PyTorch 2.13.0 and transformers 5.24.0, which the project itself does not need.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).parent
CASES = {
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_k_of_all": {"temperature": 1.0, "top_k": 500},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "top_p_none": {"temperature": 1.0, "top_p": 0.0},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.3},
    "reward": {"temperature": 1.0, "repetition_penalty": 0.7},
    "penalty_alone": {"temperature": 0.0, "repetition_penalty": 1.3},
    "qwen": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
    "all": {"temperature": 0.8, "top_k": 24, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
}
"""By jaxlab's names; a temperature of 0 is do_sample=False."""


def main() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((4, 50)) * 2).astype(np.float32)
    logits[3, 10:14] = logits[3].max()  # a tie of the most likely
    tokens = rng.integers(0, 50, (4, 9))
    tokens[1, 4:] = tokens[1, 3]  # one token many times
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=50))
    found = {"logits": logits, "tokens": tokens.astype(np.int32)}
    for name, options in CASES.items():
        asked = {"top_k": 0, **options, "do_sample": options["temperature"] > 0}
        if not asked["do_sample"]:
            del asked["temperature"]
        processors = model._get_logits_processor(
            GenerationConfig(**asked), input_ids_seq_length=9, model_kwargs={}
        )
        found[name] = processors(torch.tensor(tokens), torch.tensor(logits)).numpy()
        print(name, [type(p).__name__ for p in processors], np.isfinite(found[name]).sum(1))
    np.savez_compressed(HERE / "logits.npz", **found)
    (HERE / "cases.json").write_text(json.dumps(CASES, indent=1) + "\n")


if __name__ == "__main__":
    main()
