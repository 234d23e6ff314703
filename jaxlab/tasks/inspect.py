"""Task `inspect`: what models are, and what can be merged, from configs and headers alone; and, asked for it,
what speaks against a merge, from their tensors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxlab.app import model_folder
from jaxlab.checkpoints import ModelReport, OpenModel, compare_for_merging, inspect_model, open_model
from jaxlab.config import POSITIONAL
from jaxlab.errors import ConfigError, UserError
from jaxlab.files import output_path

if TYPE_CHECKING:
    from jaxlab.merging import Diagnosis

DATA, PAGE = "diagnosis.json", "diagnosis.html"


@dataclass(frozen=True)
class Arguments:
    """Tell what models are, and which can be merged."""

    models: Annotated[tuple[str, ...], POSITIONAL]
    """Folders of Hugging Face or of ours, hub ids, run folders, .gguf files, .bin files of llama2.c."""
    merge: bool = False
    """Read all tensors, and tell why a merge of these models would fail: task vectors, tokens, settings."""
    base: str = ""
    """The model that the others come from; only with --merge."""
    json: bool = False
    """Print all that --merge found as JSON."""
    out: str = ""
    """Folder to write what --merge found to, as JSON and as a page."""
    allow_pickle: bool = False
    """Look into PyTorch's .bin files where there are no safetensors."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of config.json that no family knows, to leave out."""
    ignore_tensors: tuple[str, ...] = ()
    """Tensors to leave out: names, with * and ? for what varies."""
    scan: bool = False
    """Read all tensors, and tell which hold NaN or infinities."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("which models? name at least one", key="models")
        for key in ("base", "json", "out"):
            if getattr(self, key) and not self.merge:
                raise ConfigError("is only for --merge", key=key)
        count = len(dict.fromkeys([*self.models, *([self.base] if self.base else [])]))
        if self.merge and count < 2:
            raise ConfigError("takes two models or more, or one and its --base", key="merge")


def run(arguments: Arguments) -> None:
    names = list(dict.fromkeys([*arguments.models, *([arguments.base] if arguments.base else [])]))
    opened = {name: _open(name, arguments) for name in names}
    if arguments.merge:
        if arguments.out:
            _check_out(output_path(arguments.out), list(opened.values()))
        if not arguments.json:
            _describe(opened, arguments)
        _diagnose(opened, arguments)
    else:
        _describe(opened, arguments)


def _describe(opened: dict[str, OpenModel], arguments: Arguments) -> None:
    models = [inspect_model(model, name, scan=arguments.scan) for name, model in opened.items()]
    for model in models:
        print(model.name)
        for key, value in model.lines:
            print(f"  {key:<16}{value}")
    for first, other in _pairs(models):
        print(f"{first.name} + {other.name}")
        for line in compare_for_merging(first, other):
            print(f"  {line}")
    for model in models:
        if model.problems:
            raise UserError(f"{model.name}: not the family {model.config.family}: {model.problems}")


def _diagnose(opened: dict[str, OpenModel], arguments: Arguments) -> None:
    from tqdm import tqdm

    from jaxlab.files import jsonable
    from jaxlab.merging import diagnose, diagnosis_table

    short = _short_names(list(opened))
    # The first model with vision goes first: it is what a merge makes anew.
    order = sorted(opened, key=lambda name: (name == arguments.base, not opened[name].described.has_vision))
    models = {short[name]: opened[name] for name in order}
    with tqdm(unit="B", unit_scale=True, disable=None, desc="compared") as bar:
        found = diagnose(models, short.get(arguments.base), progress=bar.update)
    if arguments.json:
        print(json.dumps(jsonable(found.to_json()), indent=2, allow_nan=False, ensure_ascii=False))
    else:
        print(diagnosis_table(found))
    if arguments.out:
        _write(output_path(arguments.out), found, quiet=arguments.json)


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """The last words of paths, where these tell them apart."""
    last = [next((p for p in reversed(Path(name).parts) if p != "model"), name) for name in names]
    return dict(zip(names, last if len(set(last)) == len(last) else names, strict=True))


def _check_out(out: Path, models: Sequence[OpenModel]) -> None:
    """Whether the two files may be written.

    Raises:
      UserError: into a model, over what is no folder, or over a file that this task did not write.
    """
    from jaxlab.merging import DIAGNOSIS_FORMAT

    for path in (path for model in models for path in model.inputs):
        if out.resolve() == path.resolve() or path.resolve() in out.resolve().parents:
            raise UserError(f"{out}: lies in the model {path}; write elsewhere")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is no folder; name another one with --out")
    held = [name for name in (DATA, PAGE) if (out / name).exists()]
    if held and not _is_ours(out / DATA, DIAGNOSIS_FORMAT):
        raise UserError(f"{out}: holds a {held[0]} that is not a diagnosis of a merge; name another folder")


def _is_ours(file: Path, form: str) -> bool:
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == form


def _write(out: Path, found: "Diagnosis", *, quiet: bool) -> None:
    from jaxlab.files import jsonable, write_atomic, write_json
    from jaxlab.reporting import diagnosis_page

    told = jsonable(found.to_json())
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / DATA, told)
        write_atomic(out / PAGE, diagnosis_page(told))
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    if not quiet:
        print(f"report: {out / PAGE}")


def _open(name: str, arguments: Arguments) -> OpenModel:
    return open_model(
        model_folder(name),
        allow_pickle=arguments.allow_pickle,
        ignore_keys=arguments.ignore_keys,
        ignore_tensors=arguments.ignore_tensors,
    )


def _pairs(models: Sequence[ModelReport]) -> list[tuple[ModelReport, ModelReport]]:
    """The first model with vision, else the first, beside each of the others."""
    first = next((m for m in models if m.config.has_vision), models[0])
    return [(first, model) for model in models if model is not first]
