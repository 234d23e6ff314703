"""Hidden states and attentions of golden cases, as transformers gives them; see README.md beside this file.

python make.py [CASE ...]      all cases below, or the named ones
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
FAMILIES = HERE.parent / "families"
sys.path.insert(0, str(FAMILIES))

from make import CASES, load  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from weights import weights  # noqa: E402

LENGTH = 13
"""Tokens of a language model's case: more than any window of the cases."""
LANGUAGE = (
    *("gpt2", "gptj", "llama2", "llama3", "llama_bias", "llama_tied", "mistral", "qwen2_window", "qwen3"),
    *("gemma", "gemma2", "gemma3_text", "mixtral", "mixtral_window", "qwen3_moe"),
)
VISION = (
    *("llava", "paligemma", "gemma3", "idefics3", "internvl"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
)


def inputs_of(name: str) -> dict[str, np.ndarray]:
    """Arguments of the forward: the first tokens of the case's batch; with images, its whole prompt."""
    with np.load(FAMILIES / name / "golden.npz") as file:
        if name in LANGUAGE:
            return {"input_ids": file["tokens"][:1, :LENGTH].astype(np.int64)}
        more = {key.removeprefix("prompt."): file[key] for key in file.files if key.startswith("prompt.")}
        return {"input_ids": file["prompt"].astype(np.int64)} | more


def make(name: str) -> None:
    case = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text((FAMILIES / name / "config.json").read_text())
        save_file(weights(FAMILIES / name), folder / "model.safetensors", {"format": "pt"})
        model = load(case, folder)
    tensors = {key: torch.from_numpy(value) for key, value in inputs_of(name).items()}
    with torch.no_grad():
        out = model(**tensors, use_cache=False, output_hidden_states=True, output_attentions=True)
        plain = model(**tensors, use_cache=False)
    assert torch.equal(out.logits, plain.logits), name
    hidden, attentions = (torch.stack(list(x)).numpy() for x in (out.hidden_states, out.attentions))
    layers = len(out.attentions)
    assert hidden.dtype == attentions.dtype == np.float32
    assert hidden.shape[0] == layers + 1
    assert attentions.shape[-1] == attentions.shape[-2] == hidden.shape[2], attentions.shape
    np.testing.assert_allclose(attentions.sum(-1), 1, rtol=1e-5)
    np.savez_compressed(HERE / f"{name}.npz", hidden_states=hidden, attentions=attentions)
    size = (HERE / f"{name}.npz").stat().st_size
    print(f"{name}: hidden_states {hidden.shape}, attentions {attentions.shape}, {size / 1024:.0f} KiB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in sys.argv[1:] or (*LANGUAGE, *VISION):
        make(name)
