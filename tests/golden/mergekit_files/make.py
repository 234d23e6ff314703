"""What mergekit 0.1.5 writes for the files in cases/, from the models of models.py.

    python make.py        # in an environment with mergekit 0.1.5, torch, transformers 5.24

Writes golden.json (for every tensor its dtype, shape and SHA-256; config.json's numbers; for files that build
a vocabulary its tokens) and golden.npz (the tensors of cases whose sums mergekit does in another order, or
whose thresholds fall on equal values, so that bytes differ). Rows of tables of a new vocabulary are in the
order of its tokens' words, since mergekit numbers new tokens at random; experts lie as on disk. Random
methods are not here.
"""

import hashlib
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import models  # noqa: E402

RANDOM = ("05", "13")
FAILS = ("32", "90")
"""transformers refuses the config of 32, whose layer_types mergekit leaves at four; 90 lacks its weights."""
NOT_BYTE_FOR_BYTE = (
    "09", "11", "12", "18", "19", "20", "21", "24", "25", "26",
    "27", "33", "36", "37", "38", "39", "41", "43", "44", "50", "51",
)  # fmt: skip


def run(case: Path, out: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge
    from mergekit.scripts import multimerge

    LoaderCache().loaders.clear()
    options = MergeOptions(
        quiet=True, copy_tokenizer=True, allow_crimes=True, write_model_card=False, lora_merge_cache="lora"
    )
    text = case.read_text()
    documents = list(yaml.safe_load_all(text))
    if len(documents) == 1:
        run_merge(MergeConfiguration.model_validate(documents[0]), str(out), options=options)
        return
    stages = out.with_name(f"{out.name}-stages")
    stages.mkdir()
    configs, needs = multimerge.load_config(text, str(stages))
    tasks = multimerge.make_tasks(configs, needs, options, str(stages), str(out), True)
    Executor(tasks, math_device="cpu", storage_device="cpu").execute(desc="stages")


def read(folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Their dtype, and all tensors as their bits, whole numbers without sign."""
    found, dtypes = {}, set()
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                bits = np.uint32 if entry["dtype"] == "F32" else np.uint16
                found[name] = np.frombuffer(raw[begin:end], bits).reshape(entry["shape"])
                dtypes.add(entry["dtype"])
    (dtype,) = dtypes
    return dtype, found


def on_disk(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts of Mixtral as its files have them."""
    found = {}
    for name, value in tensors.items():
        start, fused, what = name.partition(".mlp.experts.")
        if not fused:
            found[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = value
            continue
        for expert, part in enumerate(value):
            parts = (
                {"w2": part}
                if what == "down_proj"
                else dict(zip(("w1", "w3"), np.split(part, 2), strict=True))
            )
            for short, one in parts.items():
                found[f"{start}.block_sparse_moe.experts.{expert}.{short}.weight"] = one
    return found


def by_words(tensors: dict[str, np.ndarray], vocabulary: dict[str, int]) -> dict[str, np.ndarray]:
    """Tables with their rows in the order of the tokens' words, and the others behind."""
    order = [vocabulary[word] for word in sorted(vocabulary)]
    found = {}
    for name, value in tensors.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rest = [i for i in range(len(value)) if i not in set(order)]
            value = value[[*order, *rest]]
        found[name] = value
    return found


def main() -> None:
    logging.disable(logging.WARNING)
    os.environ["HF_HUB_OFFLINE"] = "1"
    golden, values = {}, {}
    with tempfile.TemporaryDirectory() as place:
        models.write(place)
        os.chdir(place)
        for case in sorted((HERE / "cases").glob("*.yaml")):
            number = case.stem[:2]
            if number in (*RANDOM, *FAILS):
                continue
            out = Path("out") / case.stem
            run(case, out)
            config = json.loads((out / "config.json").read_text())
            dtype, tensors = read(out)
            if config["model_type"] == "mixtral":
                tensors = on_disk(tensors)
            said = yaml.safe_load_all(case.read_text())
            entry = {
                "dtype": dtype,
                "layers": config.get("num_hidden_layers", config.get("n_layer")),
                "rows": config["vocab_size"],
            }
            if any("tokenizer" in one or "tokenizer_source" in one for one in said):
                from tokenizers import Tokenizer

                vocabulary = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab(True)
                tensors = by_words(tensors, vocabulary)
                entry["tokens"] = sorted(vocabulary)
            entry["tensors"] = {
                name: [list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()[:16]]
                for name, value in sorted(tensors.items())
            }
            if number in NOT_BYTE_FOR_BYTE:
                for name, value in tensors.items():
                    values[f"{case.stem}/{name}"] = value
            golden[case.stem] = entry
    text = json.dumps(golden, sort_keys=True, separators=(",", ":"))
    (HERE / "golden.json").write_text(text.replace('"layers"', '\n"layers"') + "\n")
    np.savez_compressed(HERE / "golden.npz", **values)


if __name__ == "__main__":
    main()
