"""The files beside the tensors of a Hugging Face folder: config, tokenizer, processor, how texts end.

A model of ours that came from such a folder keeps them in huggingface/, to become one again.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlab.checkpoints.tensor_folder import CONFIG, copy_companions, inside, read_json
from jaxlab.errors import UserError

SOURCE, _TENSORS = "huggingface", "tensors.json"


@dataclass(frozen=True)
class SourceFiles:
    """A folder with config.json and, where there are any, COMPANIONS."""

    folder: Path
    config: dict[str, Any]
    """What its config.json holds."""
    copies: tuple[str, ...] = ()
    """Names under which a tied embedding is written once more."""

    @functools.cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text, by generation_config.json, else by config.json.

        Raises:
          UserError: a file that says so is damaged.
        """
        for said in (self._json("generation_config.json"), self.config):
            found = said.get("eos_token_id", (said.get("text_config") or {}).get("eos_token_id"))
            ids = found if isinstance(found, list) else [found]
            if all(type(token) is int for token in ids):
                return frozenset(ids)
        return frozenset()

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The default chat template, in Jinja; None without one.

        Raises:
          UserError: a file that says so is damaged.
        """
        if (self.folder / "chat_template.jinja").exists():
            path = inside(self.folder, "chat_template.jinja")
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                raise UserError(f"{path}: not a text file in UTF-8") from None
        for name in ("chat_template.json", "tokenizer_config.json"):
            found = self._json(name).get("chat_template")
            if isinstance(found, list):  # several, by name
                named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
                found = named.get("default")
            if isinstance(found, str):
                return found
        return None

    def _json(self, name: str) -> dict[str, Any]:
        return read_json(inside(self.folder, name)) if (self.folder / name).exists() else {}

    def copy_to(self, model: Path) -> None:
        """Put everything into a model folder of ours."""
        place = model / SOURCE
        place.mkdir()
        config = inside(self.folder, CONFIG)
        if read_json(config) == self.config:
            (place / CONFIG).write_bytes(config.read_bytes())
        else:  # it notes keys that were ignored
            (place / CONFIG).write_text(json.dumps(self.config, indent=2, ensure_ascii=False) + "\n")
        copy_companions(self.folder, place)
        if self.copies:
            (place / _TENSORS).write_text(json.dumps({"copies": list(self.copies)}) + "\n")


def read_source_files(model: Path) -> SourceFiles | None:
    """What a model folder of ours keeps; None if it was never one of Hugging Face.

    Raises:
      UserError: a file that says so is damaged.
    """
    place = model / SOURCE
    if not (place / CONFIG).is_file():
        return None
    copies: object = []
    if (place / _TENSORS).exists():
        copies = read_json(inside(place, _TENSORS)).get("copies")
    if not isinstance(copies, list) or not all(isinstance(name, str) for name in copies):
        raise UserError(f"{place / _TENSORS}: copies is not a list of names")
    return SourceFiles(place, read_json(inside(place, CONFIG)), tuple(copies))
