"""Whether transformers loads models that jaxlab fine-tuned on images, and finds the same loss.

    python -m tests.training.vlm_cases OUT           # jaxlab's environment
    python tests/golden/image_chats/verify.py OUT    # transformers 5.24.0, torch 2.13.0

Writes verified.json beside this file; ends with status 1 where a folder does not load whole or the loss of a
held-out batch differs by more than 1e-5 of it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
TAKEN = {
    "tokens": "input_ids",
    "segment_ids": "attention_mask",
    "images": "pixel_values",
    "image_grid_thw": "image_grid_thw",
    "image_sizes": "image_sizes",
    "pixel_attention_mask": "pixel_attention_mask",
    "token_type_ids": "token_type_ids",
}


def main() -> None:
    transformers.logging.set_verbosity_error()
    found = {}
    for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if (path / "tuned").is_dir()):
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            folder / "tuned", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        wrong = {kind: names for kind, names in report.items() if names}
        with np.load(folder / "batch.npz") as file:
            batch = dict(file)
        inputs = {theirs: torch.from_numpy(batch[ours]) for ours, theirs in TAKEN.items() if ours in batch}
        inputs["input_ids"] = inputs["input_ids"].long()
        if "image_grid_thw" in inputs:
            kinds = (inputs["input_ids"] == model.config.image_token_id).int()
            inputs["mm_token_type_ids"] = kinds
        labels = torch.where(torch.from_numpy(batch["loss_mask"]), inputs["input_ids"], -100)
        with torch.no_grad():
            logits = model.eval()(**inputs, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
        ours = json.loads((folder / "ours.json").read_text())["loss"]
        found[folder.name] = {"ours": ours, "transformers": loss, "difference": abs(loss - ours) / ours}
        print(folder.name, found[folder.name], wrong)
        if wrong or abs(loss - ours) > 1e-5 * ours:
            raise SystemExit(1)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    (HERE / "verified.json").write_text(json.dumps({**versions, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
