"""From a file of mergekit to folders: each of its merges prepared, those that others read among them.

A stage is written into a hidden folder beside the output, `.OUT.stages/NAME`, and read from there; the last
one done, these go. Until a stage is written its headers stand for it, so that all of a file is checked before
anything is read.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jaxlab.checkpoints import (
    HuggingFaceFolder,
    OpenModel,
    SourceFiles,
    Tensor,
    TensorFolder,
    check_output,
    hf_family,
    language_differences,
    model_tensors,
    read_json,
    remove_partial,
    wrong_shapes,
)
from jaxlab.errors import UserError
from jaxlab.merging.mergekit.config import output_config
from jaxlab.merging.mergekit.file import MergekitFile, MergekitMerge, ModelReference, stage_named
from jaxlab.merging.mergekit.plan import FilePlan, plan_file
from jaxlab.merging.mergekit.templates import TEMPLATES
from jaxlab.merging.mergekit.tokens import Rows, Vocabulary, vocabulary_of
from jaxlab.merging.output import prepared_digest, texts_beside, verify_folder, write_merge
from jaxlab.merging.plan import Input, dtype_of
from jaxlab.merging.preparing import Beside, Prepared

Open = Callable[[ModelReference], OpenModel]
_OF_VOCABULARY = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
)
"""Files that say again what is in tokenizer.json, and would be wrong beside another one."""
_UNREADABLE = "written as mergekit does, but no model can be read from it"
_STAGE = re.compile(r"\.?(\d+-[\w.-]+?)(?:\.partial|\.json)?")
"""What there is of a stage: a folder, one that is not complete, what the folder was made from."""


@dataclass(frozen=True)
class Stage:
    """One merge of a file, prepared."""

    name: str
    """In the file; of the last one nothing."""
    prepared: Prepared
    references: tuple[str, ...]
    """Of the inputs, as the file names them."""
    vocabulary: Vocabulary | None
    notes: tuple[str, ...]


class PlannedFolder(HuggingFaceFolder):
    """A folder that will be written: what its headers and files will say."""

    def __init__(self, path: Path, stage: Stage) -> None:
        super().__init__(path)
        self._stage = stage

    @property
    def inputs(self) -> tuple[Path, ...]:
        return ()

    @functools.cached_property
    def config_json(self) -> dict[str, Any]:
        assert self._stage.prepared.beside is not None
        return dict(self._stage.prepared.beside.config)

    @functools.cached_property
    def stored(self) -> TensorFolder:
        def unread(start: int, stop: int) -> np.ndarray:
            raise AssertionError(f"{self.path} is not written yet")

        planned = self._stage.prepared.plan.tensors
        tensors = {t.name: Tensor(t.name, dtype_of(t.dtype), t.shape, unread) for t in planned}
        return TensorFolder(self.path, self.config_json, tensors)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        stage = self._stage
        return (
            stage.prepared.inputs[0].model.tokenizer
            if stage.vocabulary is None
            else stage.vocabulary.tokenizer
        )

    @functools.cached_property
    def source_files(self) -> SourceFiles:
        beside = self._stage.prepared.beside
        assert beside is not None
        return SourceFiles(beside.copy_from, self.config_json, self.matched.copies, beside.texts)


def prepare_file(file: MergekitFile, open_reference: Open, out: Path) -> list[Stage]:
    """Every merge of a file, from headers alone, in the order in which they are carried out.

    Args:
      open_reference: opens a model that the file names and does not make.
      out: where the output will be.

    Raises:
      UserError: models that cannot be merged as the file says.
    """
    stages: list[Stage] = []
    for merge in file.stages:
        planned = {stage.name: PlannedFolder(stage_folder(out, stage.name), stage) for stage in stages}
        stages.append(_prepare(file, merge, _opening(open_reference, planned), stages))
    return stages


def write_file(
    file: MergekitFile,
    open_reference: Open,
    out: Path,
    *,
    overwrite: bool = False,
    done: Callable[[str], Any] = lambda name: None,
    **options: Any,
) -> Any:
    """Carries out every merge of a file; returns the account of the last one.

    A stage that is complete from a run that was killed is taken over, if it would be the same and its bytes
    are what its account says. After an error no stage is left.

    Args:
      done: called with the name of each stage that is complete.
      options: see `write_merge`.

    Raises:
      UserError: see `prepare_file` and `write_merge`.
    """
    written: dict[str, OpenModel] = {}
    stages: list[Stage] = []
    keep = False
    try:
        for merge in file.stages:
            stage = _prepare(file, merge, _opening(open_reference, written), stages)
            stages.append(stage)
            if merge is file.stages[-1]:
                account = write_merge(
                    stage.prepared, out, references=stage.references, overwrite=overwrite, **options
                )
                break
            folder = stage_folder(out, stage.name)
            _write_stage(stage, folder, **options)
            written[stage.name] = HuggingFaceFolder(folder)
            done(stage.name)
    except (KeyboardInterrupt, GeneratorExit):
        keep = True
        raise
    finally:
        if not keep:
            _remove_stages(file, out)
    return account


def stage_folder(out: Path, name: str) -> Path:
    """Where a stage is written."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:60]
    return out.parent / f".{out.name}.stages" / f"{len(name)}-{plain}"


def _write_stage(stage: Stage, folder: Path, **options: Any) -> None:
    digest, said = prepared_digest(stage.prepared), folder.with_name(f"{folder.name}.json")
    if folder.is_dir() and said.is_file():
        with contextlib.suppress(UserError, KeyError):
            if read_json(said)["digest"] == digest and verify_folder(folder) > 0:
                return
    write_merge(stage.prepared, folder, references=stage.references, overwrite=True, **options)
    said.write_text(json.dumps({"digest": digest}) + "\n", encoding="utf-8")


def _remove_stages(file: MergekitFile, out: Path) -> None:
    """What stages have left, those of the file as it was before a kill too; nothing else."""
    folders = {stage_folder(out, merge.name or "") for merge in file.stages[:-1]}
    for place in {folder.parent for folder in folders}:
        with contextlib.suppress(OSError):  # it was never made
            names = (_STAGE.fullmatch(entry.name) for entry in place.iterdir())
            folders |= {place / name[1] for name in names if name}
        for folder in folders:
            with contextlib.suppress(UserError):
                remove_partial(folder)
            with contextlib.suppress(UserError):
                check_output(folder, overwrite=True)
                shutil.rmtree(folder, ignore_errors=True)
                said = folder.with_name(f"{folder.name}.json")
                if said.is_file() and read_json(said).keys() == {"digest"}:
                    said.unlink()
        with contextlib.suppress(OSError):  # something else lies there, too
            place.rmdir()


def _opening(open_reference: Open, stages: Mapping[str, OpenModel]) -> Open:
    def opened(reference: ModelReference) -> OpenModel:
        name = stage_named(reference, stages)
        if name is None:
            return open_reference(reference)
        if reference.adapter is not None:
            raise UserError(
                f"{reference}: an adapter on a stage of the same file; merge it in a stage before"
            )
        return stages[name]

    return opened


def _prepare(
    file: MergekitFile, merge: MergekitMerge, open_reference: Open, before: Sequence[Stage]
) -> Stage:
    from jaxlab.merging.layout import layout

    references = merge.references()
    if merge.base_model is not None:  # it gives config and tokenizer
        references = [merge.base_model, *(one for one in references if one != merge.base_model)]
    inputs = [_input(str(reference), open_reference(reference)) for reference in references]
    notes = [note for one in inputs[1:] if (note := _difference(inputs[0], one))]
    vocabulary = rows = None
    if merge.tokenizer is not None:
        vocabulary = vocabulary_of(merge.tokenizer, references, inputs)
        rows = Rows(merge.tokenizer, vocabulary, references, inputs)
        notes += vocabulary.notes
    planned = plan_file(merge, references, inputs, rows)
    beside, more = _beside(merge, planned, inputs, vocabulary)
    names = tuple(map(str, references))
    made = tuple({"name": one.name, "inputs": list(one.references)} for one in before)
    prepared = Prepared(
        file, tuple(inputs), planned.plan, layout(planned.plan, inputs), beside=beside, stages=made
    )
    stage = Stage(merge.name or "", prepared, names, vocabulary, (*notes, *planned.notes, *more))
    return stage if more else dataclasses.replace(stage, notes=(*stage.notes, *_unreadable(stage)))


def _unreadable(stage: Stage) -> list[str]:
    """Why no model could be read from what will be written, if that is so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said of the inputs already
        folder = PlannedFolder(Path("output"), stage)
        try:
            model_tensors(folder)
            wrong = wrong_shapes(folder.tensors, folder.matched, folder.described)
        except UserError as error:
            return [f"{_UNREADABLE}: {error}"]
    return [f"{_UNREADABLE}: {'; '.join(wrong[:3])}"] if wrong else []


def _input(role: str, model: OpenModel) -> Input:
    if model.form in ("huggingface", "gguf"):
        return Input(role, model, model_tensors(model))
    return Input(role, model, model_tensors(model, hf_family(model.config, model.source_files)))


def _difference(first: Input, other: Input) -> str | None:
    """What two models do otherwise, which mergekit does not look at."""
    one, two = first.model.described, other.model.described
    fields = [name for name in language_differences(one, two) if name != "num_layers"]
    shaped = [name for name in fields if isinstance(getattr(one, name), int | float | str | bool | None)]
    if not fields:
        return None
    field = (shaped or fields)[0]
    said = [str(getattr(config, field)) for config in (one, two)]
    values = f" ({said[0]} and {said[1]})" if max(map(len, said)) < 60 else ""
    return f"{first.role} and {other.role} differ in {field}{values}: the output has the former's"


def _beside(
    merge: MergekitMerge, planned: FilePlan, inputs: Sequence[Input], vocabulary: Vocabulary | None
) -> tuple[Beside, list[str]]:
    """config.json, tokenizer, chat template: the first input's, but for what the file asks for."""
    config, notes = output_config(planned, inputs, None if vocabulary is None else vocabulary.size)
    first = inputs[0].model
    owner = first if vocabulary is None else inputs[vocabulary.owner].model
    source = owner.source_files
    texts = texts_beside(owner, source)
    without: set[str] = set()
    if owner is not first and first.generation:
        texts["generation_config.json"] = json.dumps(dict(first.generation), indent=2) + "\n"
    tokenizer_config = dict(_tokenizer_config(owner))
    if vocabulary is not None and vocabulary.changed:
        texts["tokenizer.json"] = vocabulary.tokenizer.to_str(pretty=True)
        without.update(_OF_VOCABULARY)
        if "added_tokens_decoder" in tokenizer_config:
            tokenizer_config["added_tokens_decoder"] = _added(vocabulary.tokenizer)
            texts["tokenizer_config.json"] = _json(tokenizer_config)
    template = _template(merge, inputs)
    if template is not None:
        texts["chat_template.jinja"] = template
        without |= {"chat_template.json"}
        if "chat_template" in tokenizer_config:
            del tokenizer_config["chat_template"]
            texts["tokenizer_config.json"] = _json(tokenizer_config)
    folder = None if source is None else source.folder
    return Beside(config, folder, texts, frozenset(without)), notes


def _template(merge: MergekitMerge, inputs: Sequence[Input]) -> str | None:
    """The chat template that the file asks for; auto: the one that most of its models have."""
    asked = merge.chat_template
    if asked != "auto":
        return None if asked is None else TEMPLATES.get(asked, asked)
    found = [template.strip() for one in inputs if (template := one.model.chat_template)]
    return collections.Counter(found).most_common(1)[0][0] if found else None


def _tokenizer_config(model: OpenModel) -> Mapping[str, Any]:
    source = model.source_files
    if source is None:
        return {}
    if "tokenizer_config.json" in source.texts:
        return dict(json.loads(source.texts["tokenizer_config.json"]))
    if source.folder is None or not (source.folder / "tokenizer_config.json").exists():
        return {}
    return read_json(source.folder / "tokenizer_config.json")


def _added(tokenizer: Tokenizer) -> dict[str, Any]:
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        str(index): {key: getattr(token, key) for key in keys}
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
