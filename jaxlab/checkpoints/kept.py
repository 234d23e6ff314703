"""What a model keeps of the Hugging Face folder that it came from, so that it can be written as one again."""

import json
from dataclasses import dataclass
from pathlib import Path

from jaxlab.checkpoints.folder import CONFIG, inside, read_json
from jaxlab.checkpoints.write import copy_companions
from jaxlab.errors import UserError

KEPT, _TENSORS = "huggingface", "tensors.json"


@dataclass(frozen=True)
class Kept:
    """A folder with config.json and, where there are any, files of tokenizer and processor."""

    folder: Path
    copies: tuple[str, ...] = ()
    """Names under which a tied embedding is written once more."""

    def write(self, model: Path) -> None:
        """Put everything into a model folder of ours."""
        place = model / KEPT
        place.mkdir()
        (place / CONFIG).write_bytes(inside(self.folder, CONFIG).read_bytes())
        copy_companions(self.folder, place)
        if self.copies:
            (place / _TENSORS).write_text(json.dumps({"copies": list(self.copies)}) + "\n")


def read_kept(model: Path) -> Kept | None:
    """What a model folder of ours keeps; None if it was never one of Hugging Face. Raises UserError."""
    place = model / KEPT
    if not (place / CONFIG).is_file():
        return None
    copies: object = []
    if (place / _TENSORS).exists():
        copies = read_json(inside(place, _TENSORS)).get("copies")
    if not isinstance(copies, list) or not all(isinstance(name, str) for name in copies):
        raise UserError(f"{place / _TENSORS}: copies is not a list of names")
    return Kept(place, tuple(copies))
