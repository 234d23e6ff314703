"""Adapters that jaxlab wrote, loaded by PEFT: its logits, and the names under which it would write them.

    python -m tests.training.lora_cases OUT      # jaxlab's environment: base and adapter of each case
    python tests/golden/lora/make.py OUT         # peft 0.21.2, transformers 5.24.0, torch 2.13.0

Writes CASE.npz (logits) and peft.json (versions; of each case names and shapes of the tensors) beside this
file. Ends with status 1 where an adapter does not load whole, or changes nothing.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors import safe_open

HERE = Path(__file__).parent
FAMILIES = HERE.parent / "families"


def shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, "np") as opened:
        return {name: opened.get_slice(name).get_shape() for name in sorted(opened.keys())}


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits.float().numpy()


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    told = {"peft": peft.__version__, "transformers": transformers.__version__, "cases": {}}
    for folder in sorted(path for path in out.iterdir() if (path / "adapter").is_dir()):
        name = folder.name
        about = json.loads((FAMILIES / name / "case.json").read_text())
        base = getattr(transformers, about["model"]).from_pretrained(
            folder / "base", dtype=torch.float32, attn_implementation="eager"
        )
        given = json.loads((folder / "inputs.json").read_text())
        given["input_ids"] = given.pop("tokens")
        inputs = {key: torch.tensor(np.asarray(value)) for key, value in given.items()}
        inputs = {k: v.float() if v.dtype == torch.float64 else v for k, v in inputs.items()}
        without = logits(base.eval(), inputs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
        keys = [str(w.message) for w in caught if "missing" in str(w.message).lower()]
        found = logits(model, inputs)
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place, save_embedding_layers=False)
            names = shapes(Path(place) / "adapter_model.safetensors")
        ours = shapes(folder / "adapter" / "adapter_model.safetensors")
        moved = float(np.abs(found - without).max())
        if keys or names != ours or moved < 1e-2:
            print(f"{name}: {keys[:1]} names equal {names == ours}, logits moved by {moved}")
            print(sorted(set(names) ^ set(ours))[:4])
            raise SystemExit(1)
        told["cases"][name] = {"moved": round(moved, 3), "tensors": names}
        np.savez_compressed(HERE / f"{name}.npz", logits=found)
        print(name, len(names), "tensors, logits moved by", moved)
    cases = ",\n".join(f" {json.dumps(n)}: {json.dumps(c)}" for n, c in told.pop("cases").items())
    (HERE / "peft.json").write_text(json.dumps(told)[:-1] + ', "cases": {\n' + cases + "\n}}\n")


if __name__ == "__main__":
    main()
