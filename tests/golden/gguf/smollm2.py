"""Makes smollm2.npz from SmolLM2-135M-Instruct.Q4_1.gguf, by transformers' own dequantisation.

pip install torch==2.13.0 transformers==5.24.0 gguf accelerate
python tests/golden/gguf/smollm2.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = [504, 3575, 282, 4649, 314]
"""The capital of France is"""

if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=FILE, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 49152, (2, 24))
    tokens[0, : len(PROMPT)] = PROMPT
    columns = np.sort(rng.choice(49152, 64, replace=False))
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()[..., columns]
    out = Path(__file__).with_name("smollm2.npz")
    np.savez_compressed(out, tokens=tokens.astype(np.int32), columns=columns.astype(np.int32), logits=logits)
