"""Adapters of tiny models of many families, their numbers following from names; and as folders, for PEFT."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.checkpoints import LeafPath, load_model, save_adapter
from jaxlab.models import ModelConfig, Params
from jaxlab.training import LoraConfig, Trainable, find_trainable
from tests.checkpoints import folders

GOLDEN = Path(__file__).parents[1] / "golden" / "lora"
CASES: dict[str, LoraConfig] = {
    "llama3": LoraConfig(rank=4, alpha=10.0, targets=("q_proj", "self_attn.v_proj")),
    "llama2": LoraConfig(rank=3, alpha=6.0, targets=("all-linear", "embed_tokens", "lm_head"), rslora=True),
    "gpt2": LoraConfig(rank=2, alpha=5.0, targets=("c_attn", "c_fc", "c_proj")),
    "gpt_neox": LoraConfig(rank=2, alpha=3.0, rslora=True),
    "phi3": LoraConfig(rank=2, alpha=4.0, targets=("qkv_proj", "gate_up_proj", "down_proj")),
    "deepseek_v2": LoraConfig(rank=2, alpha=4.0, targets=("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
    "llava": LoraConfig(rank=2, alpha=4.0, parts=("language", "vision", "projector")),
    "qwen2_vl": LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "qkv"), parts=("language", "vision")),
    "idefics3": LoraConfig(rank=2, alpha=4.0, targets=("down_proj", "k_proj")),
    "paligemma": LoraConfig(rank=2, alpha=4.0),
}


def tree(trainable: Trainable) -> Params:
    """What is trained, drawn from the names of its leaves."""
    draw = folders._weights_module().tensor

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(draw(jax.tree_util.keystr(path), x.shape))

    return jax.tree_util.tree_map_with_path(leaf, trainable.abstract())


def opened(case: str, place: Path) -> tuple[ModelConfig, Params, Trainable]:
    """The model of a case, written to `place`, and what is trained of it."""
    config, params, _ = load_model(folders.make(place, case))
    return config, params, find_trainable(config, CASES[case])


def write_adapter(path: Path, trainable: Trainable, trained: Params, base: Path | str) -> None:
    settings = trainable.adapters
    assert settings is not None
    save_adapter(
        path,
        pairs(trainable, trained),
        trainable.targets,
        settings,
        trainable.shapes,
        base=str(base),
        base_identity="0",
        causal_lm=not trainable.model.has_vision,
    )


def pairs(trainable: Trainable, trained: Params) -> dict[LeafPath, tuple[Any, Any]]:
    found = {}
    for path, _ in trainable.adapted:
        node = trained
        for key in path:
            node = node[key]
        found[path] = (node["lora_a"], node["lora_b"])
    return found


def inputs(case: str) -> dict[str, np.ndarray]:
    """What the golden logits of the family are of."""
    golden = folders.golden(case)
    other = ("prompt", "greedy", "logits")
    return {n: v for n, v in golden.items() if n.partition(".")[0].removesuffix("_long") not in other}


def write_all(out: Path) -> None:
    for case in CASES:
        _, _, trainable = opened(case, out / case / "base")
        write_adapter(out / case / "adapter", trainable, tree(trainable), "base")
        (out / case / "inputs.json").write_text(json.dumps({n: v.tolist() for n, v in inputs(case).items()}))


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
