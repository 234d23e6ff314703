"""Tiny vision-language models with processors, and conversations about images, to fine-tune.

python -m tests.training.vlm_cases OUT [CASE ...]    # trained a little; a batch of each and its loss
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxlab.checkpoints import load_model, open_model, save_model
from jaxlab.data import ImageChatsConfig, ImageChatsSource
from jaxlab.losses import evaluate_step
from jaxlab.tasks import execute
from tests.checkpoints import folders
from tests.processing.folders import write_tokenizer

END = 2
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w90 "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}MARK{% else %} {{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %} w91 {% else %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w92 {% endif %}"
)
QWEN = {77: "<|image_pad|>", 78: "<|video_pad|>", 79: "<|vision_start|>", 80: "<|vision_end|>"}
IDEFICS = {77: "<image>", 78: "<fake_token_around_image>", 79: "<global-img>"} | {
    80 + 3 * row + column: f"<row_{row + 1}_col_{column + 1}>" for row in range(3) for column in range(3)
}
CASES: dict[str, dict[str, Any]] = {
    "llava": {
        "special": {77: "<image>"},
        "mark": "<image>",
        "processor": {"patch_size": 5, "num_additional_image_tokens": 1, "processor_class": "LlavaProcessor"},
        "pixels": {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}},
    },
    "llava_next": {
        "special": {77: "<image>"},
        "mark": "<image>",
        "processor": {
            "patch_size": 4,
            "num_additional_image_tokens": 1,
            "processor_class": "LlavaNextProcessor",
        },
        "pixels": {
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
            "image_grid_pinpoints": [[16, 32], [32, 16], [16, 48], [48, 16], [32, 32]],
        },
    },
    "qwen2_vl": {
        "special": QWEN,
        "mark": "<|vision_start|><|image_pad|><|vision_end|>",
        "processor": {"processor_class": "Qwen2VLProcessor"},
        "pixels": {"min_pixels": 256, "max_pixels": 900, "patch_size": 4, "merge_size": 2},
    },
    "idefics3": {
        "special": IDEFICS,
        "mark": "<image>",
        "processor": {"image_seq_len": 4, "processor_class": "Idefics3Processor"},
        "pixels": {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}},
    },
    "paligemma": {
        "special": {77: "<image>", END: "<bos>"},
        "mark": "",
        "processor": {"processor_class": "PaliGemmaProcessor"},
        "pixels": {"size": {"height": 20, "width": 20}, "image_seq_length": 16},
    },
}
"""By golden case of tests/golden/families. PaliGemma has no chat template."""


def make(path: Path, case: str) -> Path:
    """The folder of a case, with a tokenizer of words, a processor and a chat template."""
    about = CASES[case]
    folders.make(path, case)
    write_tokenizer(path, {**({} if case == "paligemma" else {END: "<end>"}), 1: "<s>", **about["special"]})
    (path / "processor_config.json").write_text(json.dumps(about["processor"]))
    (path / "preprocessor_config.json").write_text(json.dumps(about["pixels"]))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<s>" if case == "paligemma" else "<end>"})
    )
    if about["mark"]:
        (path / "chat_template.jinja").write_text(TEMPLATE.replace("MARK", about["mark"]))
    return path


def write_data(path: Path, count: int = 24) -> Path:
    """Images of two colors and two sizes, in LLaVA's form: the answer is the color's word."""
    path.mkdir()
    lines = []
    for i in range(count):
        color, size = i % 2, ((40, 24), (24, 40))[(i // 2) % 2]
        Image.new("RGB", size, ((220, 30, 30), (30, 60, 220))[color]).save(path / f"{i}.png")
        turns = [
            {"from": "human", "value": f"<image>\nw5 w{10 + i % 3}"},
            {"from": "gpt", "value": f"w{30 + color}"},
        ]
        lines.append(json.dumps({"image": f"{i}.png", "conversations": turns}))
    (path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return path / "chats.jsonl"


def train(folder: Path, data: Path, outputs: Path, **changes: Any) -> Any:
    """A short run on conversations about images."""
    file = outputs.parent / f"{folder.name}.yaml"
    file.write_text(
        f"init_from: {folder}\n"
        f"data: {{kind: image_chats, path: {data}, model: {folder}, sequence_length: 64, holdout_every: 3}}\n"
        "optimizer: {learning_rate: 0.003, warmup_steps: 0, schedule: constant, weight_decay: 0}\n"
        "steps: 12\nbatch_size: 2\nlog_every: 1\neval_every: 12\neval_batches: 4\nmesh: {data: 1}\n"
    )
    return execute("train", file, changes, outputs=outputs)


def write_all(out: Path, *cases: str) -> None:
    out.mkdir(exist_ok=True)
    for case in cases or CASES:
        place = out / case
        place.mkdir()
        folder, data = make(place / case, case), write_data(place / "data")
        found = train(folder, data, place / "out")
        opened = open_model(found.path / "model")
        config, params, tokenizer = load_model(found.path / "model")
        save_model(
            place / "tuned", config, params, tokenizer, form="huggingface", source_files=opened.source_files
        )
        source = ImageChatsSource(
            dataclasses.replace(
                ImageChatsConfig(path=str(data), model=str(place / "tuned")),
                sequence_length=64,
                holdout_every=3,
            )
        )
        (batch,) = source.held_out_batches(2, 1, "test")
        sums = evaluate_step(params, batch, config)
        np.savez(place / "batch.npz", **{n: np.asarray(v) for n, v in batch.items()})
        told = {"loss": float(sums["loss"] / sums["targets"]), "steps": found.results["steps"]}
        (place / "ours.json").write_text(json.dumps(told))
        print(case, told, found.results["validation"])


if __name__ == "__main__":
    write_all(Path(sys.argv[1]), *sys.argv[2:])
