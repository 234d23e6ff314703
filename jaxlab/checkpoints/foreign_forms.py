"""Forms of checkpoints that are not read, each by its name: other frameworks' files, packed integers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.checkpoints.safetensors_file import Tensor

_FILES = (
    ("consolidated*.safetensors", "Mistral's own form; take the repository's model*.safetensors"),
    ("consolidated*.pth", "Meta's own form, a pickle; take the repository's Hugging Face form"),
    ("*-00001-of-*.safetensors", "shards without their model.safetensors.index.json; fetch that too"),
    ("output*.safetensors", "ExLlama's packed integers; take the repository's model*.safetensors"),
    ("checkpoint-*", "a folder of a trainer with models in folders of their own; name one of these"),
    ("*.gguf", "GGUF; name the file itself"),
    ("flax_model*.msgpack", "Flax weights of transformers 4; take the repository's safetensors"),
    ("tf_model*.h5", "TensorFlow weights; take the repository's safetensors"),
    ("model.ckpt*", "a TensorFlow checkpoint; take the repository's safetensors"),
    ("rust_model.ot", "weights for tch; take the repository's safetensors"),
    ("weights*.npz", "an early form of MLX; take the repository's safetensors"),
    ("*.onnx", "an ONNX graph; take the repository's safetensors"),
    ("onnx", "ONNX graphs; take the repository's safetensors"),
    ("*.nemo", "a NeMo archive; convert it to Hugging Face's form there"),
    ("pytorch_model_fsdp_*", "shards of FSDP; merge them with accelerate merge-weights"),
    ("*.distcp", "shards of torch.distributed; merge them with accelerate merge-weights"),
    ("global_step*", "a DeepSpeed checkpoint; run its zero_to_fp32.py --safe_serialization"),
    ("model*.pt", "PyTorch pickles; save the model with save_pretrained"),
    ("*.pth", "PyTorch pickles; save the model with save_pretrained"),
    ("adapter_model.*", "an adapter, not a model: convert the model it is for, with --adapter"),
)

_PACKED = (
    # (what it is, endings of names that give it away)
    ("GPTQ (packed integers)", (".qweight", ".g_idx")),
    ("AWQ (packed integers)", (".qweight", ".qzeros")),
    ("bitsandbytes 8-bit", (".SCB", ".weight_format")),
    ("bitsandbytes 4-bit", (".quant_map", ".absmax")),
    ("NVFP4 (packed float4)", (".weight_scale_2",)),
    ("compressed-tensors, packed integers", (".weight_packed",)),
    ("HQQ (packed integers)", (".W_q",)),
    ("AQLM (codebooks)", (".codebooks",)),
)
_BYTES = (np.dtype(np.int8), np.dtype(np.uint8))


def foreign_files(folder: Path) -> str | None:
    """What a folder without safetensors holds instead; None: nothing that is known."""
    for pattern, what in _FILES:
        found = sorted(file.name for file in folder.glob(pattern))
        if found:
            return f"{found[0]}: {what}"
    return None


def packed_form(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str | None:
    """How the weights of a folder are packed; None: they are not."""
    for what, endings in _PACKED:
        if all(any(name.endswith(ending) for name in tensors) for ending in endings):
            return what
    groups = config.get("quantization")
    if isinstance(groups, Mapping) and any(name.endswith(".scales") for name in tensors):
        return f"MLX, {groups.get('bits', '?')}-bit packed integers"
    if any(t.dtype in _BYTES for name, t in tensors.items() if name.endswith(".weight")):
        return "8-bit integers"
    return None
