"""The files beside the tensors of a Hugging Face folder: config, tokenizer, processor, how texts end.

A model of ours that came from such a folder keeps them in huggingface/, to become one again. Those of a GGUF
file are made from its metadata.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlab.checkpoints.safetensors_file import parse_json
from jaxlab.checkpoints.tensor_folder import (
    CHAT_TEMPLATES,
    CONFIG,
    additional_chat_templates,
    copy_companions,
    inside,
    read_json,
)
from jaxlab.errors import UserError

SOURCE, _TENSORS = "huggingface", "tensors.json"
MAX_TEMPLATE = 1 << 20
"""Bytes of a chat template; real ones are a few kilobytes."""


@dataclass(frozen=True)
class SourceFiles:
    """A folder with config.json and, where there are any, COMPANIONS."""

    folder: Path | None
    """None: no folder holds them; `texts` are all there are."""
    config: dict[str, Any]
    """What its config.json holds."""
    copies: tuple[str, ...] = ()
    """Names under which a tied embedding is written once more."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Of files that are not in the folder, by name."""

    @functools.cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text, by generation_config.json, else by config.json.

        Raises:
          UserError: a file that says so is damaged.
        """
        inner = self.config.get("text_config") or self.config.get("llm_config")
        for said in (self.generation, self.config, inner if isinstance(inner, dict) else {}):
            found = said.get("eos_token_id")
            ids = found if isinstance(found, list) else [found]
            if all(type(token) is int for token in ids):
                return frozenset(ids)
        return frozenset()

    @functools.cached_property
    def generation(self) -> dict[str, Any]:
        """What generation_config.json says; nothing where there is none.

        Raises:
          UserError: it is damaged.
        """
        return self._json("generation_config.json")

    @property
    def chat_template(self) -> str | None:
        """The default chat template, in Jinja; None without one.

        Raises:
          UserError: a file that says so is damaged.
        """
        return self.chat_templates.get("default")

    @functools.cached_property
    def chat_templates(self) -> dict[str, str]:
        """All chat templates by name, in Jinja: files of their own go before what JSON files hold.

        Raises:
          UserError: a file that says so is damaged.
        """
        files = () if self.folder is None else additional_chat_templates(self.folder)
        texts = {name.removesuffix(".jinja"): self._text(name, CHAT_TEMPLATES) for name in files}
        if "chat_template.jinja" in self.texts:
            texts["default"] = self.texts["chat_template.jinja"]
        elif self.folder is not None and (self.folder / "chat_template.jinja").exists():
            texts["default"] = self._text("chat_template.jinja")
        for place in ("chat_template.json", "tokenizer_config.json"):
            found = self._json(place).get("chat_template")
            if isinstance(found, list):  # several, by name
                found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            named: dict[Any, Any] = found if isinstance(found, dict) else {"default": found}
            if "default" not in texts:
                named = {n: t for n, t in named.items() if isinstance(n, str) and isinstance(t, str)}
                texts = {**named, **texts}
        return texts

    @functools.cached_property
    def special_tokens(self) -> dict[str, str]:
        """Tokens by the names under which chat templates ask for them: bos_token, eos_token, ...

        Raises:
          UserError: a file that says so is damaged.
        """
        said = self._json("tokenizer_config.json")
        if "added_tokens_decoder" not in said:  # an older folder
            said = {**said, **self._json("special_tokens_map.json")}
        extra = said.get("extra_special_tokens")
        said = {**said, **(extra if isinstance(extra, dict) else {})}
        named = {key: value for key, value in said.items() if isinstance(key, str) and key.endswith("_token")}
        texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
        return {key: text for key, text in texts.items() if isinstance(text, str)}

    def _text(self, name: str, under: str = "") -> str:
        assert self.folder is not None
        path = inside(self.folder, name, under)
        try:
            if path.stat().st_size > MAX_TEMPLATE:
                raise UserError(f"{path}: too large for a chat template")
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{path}: not a text file in UTF-8") from None

    def _json(self, name: str) -> dict[str, Any]:
        if name in self.texts:
            return parse_json(self.texts[name], name)
        if self.folder is None or not (self.folder / name).exists():
            return {}
        return read_json(inside(self.folder, name))

    def copy_to(self, model: Path) -> None:
        """Put everything into a model folder of ours."""
        place = model / SOURCE
        place.mkdir()
        config = None if self.folder is None else inside(self.folder, CONFIG)
        if config is not None and read_json(config) == self.config:
            (place / CONFIG).write_bytes(config.read_bytes())
        else:  # it notes keys that were ignored, or was never a file
            (place / CONFIG).write_text(json.dumps(self.config, indent=2, ensure_ascii=False) + "\n")
        if self.folder is not None:
            copy_companions(self.folder, place)
        for name, text in self.texts.items():
            (place / name).write_text(text, encoding="utf-8")
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
