"""A chat with images in its turns, by transformers: the tiny LLaVA of tests/golden/families, in letters.

    python tests/golden/chat/vision.py

Made with PyTorch 2.13.0 and transformers 5.24.0. Its processor renders, tokenises and reads the images; the
model goes on greedily.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, processors

HERE = Path(__file__).parent
IMAGES = HERE.parent / "processors"
NEW = 8
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEXT = {"type": "text"}
CONVERSATIONS = {
    "turns": [
        {"role": "system", "content": [{**TEXT, "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "image", "path": "wide.png"}, {**TEXT, "text": "What is it?"}],
        },
        {"role": "assistant", "content": [{**TEXT, "text": "A cat."}]},
        {"role": "user", "content": [{**TEXT, "text": "And "}, {"type": "image", "path": "gray.png"}]},
    ],
    "texts": [{"role": "user", "content": [{**TEXT, "text": "Hello there"}]}],
}


def write_model(folder: Path, tensors: Path) -> None:
    """The files of the model; `tensors` holds them."""
    config = json.loads((HERE.parent / "families" / "llava" / "config.json").read_text())
    size, image = config["text_config"]["vocab_size"], config["image_token_index"]
    letters = ["<unk>", "<s>", "</s>", *map(chr, range(32, 127)), "\n"]
    words = [*letters[:image], "<image>", *letters[image:]]
    words += [f"<{number}>" for number in range(len(words), size)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    special = ["<unk>", "<s>", "</s>", "<image>"]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    crop = {"height": config["vision_config"]["image_size"], "width": config["vision_config"]["image_size"]}
    described = {
        "config": config,
        "generation_config": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "image_token": "<image>",
        },
        "processor_config": {
            "processor_class": "LlavaProcessor",
            "patch_size": config["vision_config"]["patch_size"],
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        "preprocessor_config": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": crop["height"]},
            "crop_size": crop,
        },
    }
    for name, value in described.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copyfile(tensors, folder / "model.safetensors")


def main() -> None:
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    sys.path.insert(0, str(HERE.parent / "families"))
    from weights import weights

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        folder.mkdir()
        save_file(weights(HERE.parent / "families" / "llava"), Path(place) / "t", metadata={"format": "pt"})
        write_model(folder, Path(place) / "t")
        processor = AutoProcessor.from_pretrained(folder)
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    made = {}
    for name, messages in CONVERSATIONS.items():
        for message in messages:
            for part in message["content"]:
                if "path" in part:
                    part["path"] = str(IMAGES / Path(part["path"]).name)
        batch = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None)[0].tolist()
        prompt = batch["input_ids"].shape[1]
        text = processor.tokenizer.decode(out[prompt:], skip_special_tokens=True)
        made[name] = {"prompt_tokens": prompt, "text": text, "prompt": out[:prompt]}
    (HERE / "vision.json").write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
