"""Golden flows of golden cases, from gradients of eager attention in float64; see README.md beside this file.

python flows.py [CASE ...]      all cases below, or the named ones; the others in flows.npz stay
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
FAMILIES = HERE.parent / "families"
sys.path[:0] = [str(FAMILIES), str(HERE)]

from case_inputs import LABEL_TOKENS, classes_of, labels_of  # noqa: E402
from make import CASES, load  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from weights import weights  # noqa: E402

LENGTH = 13
LANGUAGE = (
    *("gpt2", "gptj", "gpt_neox", "opt", "llama3", "mistral", "qwen2_window", "qwen3", "smollm3", "phi"),
    *("gemma2", "gemma3_text", "mixtral", "gpt_oss", "deepseek_v3", "cohere2", "olmo2", "granite"),
)
VISION = (
    *("llava", "llava_next", "llava_onevision_multi", "paligemma", "gemma3", "idefics2", "idefics3"),
    *("internvl", "mistral3", "mllama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
)


def in_float64() -> None:
    """transformers computes softmaxes, norms and angles in float32 whatever the model is in: here it goes
    on in float64."""
    softmax, to = torch.nn.functional.softmax, torch.Tensor.to

    def wide_softmax(x, *args, dtype=None, **more):
        return softmax(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **more)

    def wide_to(x, *args, **more):
        if x.dtype == torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            more = {key: torch.float64 if a is torch.float32 else a for key, a in more.items()}
        return to(x, *args, **more)

    torch.nn.functional.softmax = wide_softmax
    torch.Tensor.to = wide_to
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else to(x, torch.float32)


def inputs_of(name: str) -> dict[str, np.ndarray]:
    """Arguments of the forward: the first tokens of the case's batch; with images, the whole batch."""
    with np.load(FAMILIES / name / "golden.npz") as file:
        if name in LANGUAGE:
            return {"input_ids": file["tokens"][:, :LENGTH].astype(np.int64)}
        skipped = ("tokens", "logits", "prompt", "greedy")
        more = {key: file[key] for key in file.files if key not in skipped and "." not in key}
        return {"input_ids": file["tokens"].astype(np.int64)} | more


def by_class(flow: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """[L, B, *H, T, T] -> [B, L, *H, K, K] over the edges j < i."""
    hot = np.eye(3)[classes] * (classes >= 0)[..., None]
    below = np.tril(flow, -1)
    equation = "lbij,bix,bjy->blxy" if flow.ndim == 4 else "lbhij,bix,bjy->blhxy"
    return np.einsum(equation, below, hot, hot)


def make(name: str) -> dict[str, np.ndarray]:
    case, inputs = CASES[name], inputs_of(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text((FAMILIES / name / "config.json").read_text())
        save_file(weights(FAMILIES / name), folder / "model.safetensors", {"format": "pt"})
        model = load(case, folder).double()
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # the others know no float64
    batch, length = inputs["input_ids"].shape
    classes, labels = classes_of(batch, length), torch.from_numpy(labels_of(batch))
    tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
    tensors = {key: x.double() if x.is_floating_point() else x for key, x in tensors.items()}
    out = model(**tensors, use_cache=False, output_attentions=True)
    weights_of = [x for x in out.attentions if x.shape[-2:] == (length, length)]
    assert weights_of
    assert all(x.dtype == torch.float64 for x in weights_of), [x.dtype for x in weights_of]
    logits, rows = out.logits[:, -1], torch.arange(batch)
    among = torch.log_softmax(logits[:, LABEL_TOKENS], -1)[rows, labels]
    of_all = torch.log_softmax(logits, -1)[rows, torch.tensor(LABEL_TOKENS)[labels]]
    found = {}
    for loss, likely in (("labels", among), ("vocabulary", of_all)):
        gradients = torch.autograd.grad(-likely.sum(), weights_of, retain_graph=True)
        saliency = torch.stack([a.detach() * g for a, g in zip(weights_of, gradients, strict=True)]).numpy()
        found[f"{name}.{loss}"] = by_class(np.abs(saliency.sum(2)), classes)
        if loss == "labels":
            found[f"{name}.heads"] = by_class(saliency, classes)
    return found


def main() -> None:
    torch.manual_seed(0)
    in_float64()
    path = HERE / "flows.npz"
    kept: dict[str, np.ndarray] = {}
    if path.exists():
        with np.load(path) as file:
            kept = dict(file)
    for name in sys.argv[1:] or (*LANGUAGE, *VISION):
        found = make(name)
        kept |= found
        print(name, {key: value.shape for key, value in found.items()}, flush=True)
        np.savez_compressed(path, **kept)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
