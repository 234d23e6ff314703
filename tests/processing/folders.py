"""Folders of the golden cases, as a hub folder would have them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxlab import processing
from jaxlab.checkpoints import families

GOLDEN = Path(__file__).parents[1] / "golden" / "processors"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text())["cases"]


def write_folder(folder: Path, name: str, **changes: dict[str, Any]) -> Path:
    """The files of a case in `folder`; `changes`: values of its preprocessor, processor or config."""
    case = {k: {**v, **changes.get(k, {})} if isinstance(v, dict) else v for k, v in CASES[name].items()}
    around, pixels = case["processor"], case["preprocessor"]
    if case["nested"]:
        around = {**around, "image_processor": pixels}
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    (folder / "processor_config.json").write_text(json.dumps(around))
    (folder / "config.json").write_text(json.dumps(case["config"]))
    return folder


def load_processor(folder: Path, **overrides: Any) -> processing.Processor:
    """The processor of a folder by the family of its config.json; LLaVA's where there is none."""
    config = folder / "config.json"
    kind = json.loads(config.read_text())["model_type"] if config.exists() else "llava"
    kinds = families.processor_kinds(families.find_by_model_type(kind).name)
    return processing.load_processor(folder, kinds, **overrides)


def write_tokenizer(folder: Path, special: dict[int, str], size: int = 109) -> Tokenizer:
    """A tokenizer of the words w0, w1, ..., with others in some of their places."""
    words = {special.get(number, f"w{number}"): number for number in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer
