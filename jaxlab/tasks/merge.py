"""Task `merge`: models into one, by a recipe."""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from jaxlab.app import command_line, model_folder, open_reference, reference_folders
from jaxlab.config import POSITIONAL, REPEATED
from jaxlab.files import output_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxlab.checkpoints import OpenModel
    from jaxlab.merging import InjectRecipe, MergeAccount, MergekitFile, MergekitReference, MergeRecipe
    from jaxlab.merging.preparing import Prepared

# jax and what imports it are loaded when the task runs: its help needs none of it.


@dataclass(frozen=True)
class Arguments:
    """Merge models, or inject an expert into a VLM."""

    recipes: Annotated[tuple[str, ...], POSITIONAL]
    """YAML files that begin with kind: inject or kind: merge, or are mergekit's; several in one pass."""
    out: str
    """Folder to write the model to; of several recipes the folder that holds theirs."""
    sweep: Annotated[tuple[str, ...], REPEATED] = ()
    """lambda_e=[0.2,0.4]: a model for each value, of several sweeps for each combination, in one pass."""
    to: Literal["hf", "orbax"] | None = None
    """Hugging Face's form or ours; by default Hugging Face's, but for models of ours that no family there can
    describe."""
    check: bool = False
    """Make all checks, print the account and what the merge takes; read headers alone, write nothing."""
    verify: bool = False
    """Read the written model again and compare every tensor's hash with the account."""
    overwrite: bool = False
    """Replace the folder if this tool wrote it."""
    allow_nonfinite: bool = False
    """Write NaN and infinities where they come out."""
    hash_inputs: Literal["none", "sampled", "full"] = "sampled"
    """What of the inputs is hashed for the card: 4 kB of every 256 kB, or all that is read."""
    threads: int = 0
    """Tensors that are merged at once; 0: one more than there are cores, up to five."""


def run(arguments: Arguments) -> None:
    from jaxlab.checkpoints import check_output, hf_family, open_model
    from jaxlab.errors import UserError, UserNote
    from jaxlab.merging import (
        InjectRecipe,
        MergeRecipe,
        check_room,
        describe,
        described_recipe,
        load_recipes,
        needs_of,
        note_dequantized,
        notes_of,
        prepare_merge,
    )

    recipes, out = load_recipes(arguments.recipes, arguments.sweep), output_path(arguments.out)
    if len(recipes) > 1 or arguments.sweep:
        _together(arguments, recipes, out)
        return
    (recipe,) = recipes.values()
    if not isinstance(recipe, InjectRecipe | MergeRecipe):  # so that mergekit's are not loaded for ours
        _of_mergekit(arguments, recipe, out)
        return
    references = recipe.references()
    folders = [reference_folders(reference) for reference in references]
    given = [path for pair in folders for path in pair if path is not None]
    check_output(out, given, overwrite=arguments.overwrite)  # before anything is read
    models = [open_model(folder, adapter=adapter) for folder, adapter in folders]
    note_dequantized(models)
    to = arguments.to
    if to is None:
        to = "hf"
        if models[0].form not in ("huggingface", "gguf"):
            try:
                hf_family(models[0].config, models[0].source_files)
            except UserError as error:
                to = "orbax"
                warnings.warn(f"written in our own form: {error}", UserNote, stacklevel=2)
    prepared = prepare_merge(recipe, models, to=to)
    for note in notes_of(prepared):
        warnings.warn(note, UserNote, stacklevel=2)
    check_room(out, prepared.shards)
    print(described_recipe(recipe))
    print(prepared.plan.account().table())
    print(describe(needs_of(prepared, threads=arguments.threads or None), out))
    if arguments.check:
        return
    sys.stdout.flush()
    if to == "orbax":
        _to_orbax(arguments, recipe, models, out)
    else:
        _to_huggingface(arguments, prepared, references, out)


def _together(
    arguments: Arguments, recipes: "dict[str, InjectRecipe | MergeRecipe | MergekitFile]", out: Path
) -> None:
    """Several recipes, each into a folder of its own below `out`."""
    from jaxlab.checkpoints import OpenModel, check_output
    from jaxlab.errors import UserError, UserNote
    from jaxlab.merging import (
        MergekitFile,
        Writing,
        check_room,
        describe,
        finished_account,
        needs_of,
        note_dequantized,
        notes_of,
        prepare_merge,
        write_merges,
    )

    if arguments.to == "orbax":
        raise UserError("several recipes at once make Hugging Face folders; convert those")
    opened: dict[str, OpenModel] = {}
    writings, size = [], 0
    for name, recipe in recipes.items():
        if isinstance(recipe, MergekitFile):
            raise UserError(f"{name}: several recipes at once have a kind; mergekit's files run one by one")
        for reference in recipe.references():
            if reference not in opened:
                opened[reference] = open_reference(reference)
        models = [opened[reference] for reference in recipe.references()]
        prepared = prepare_merge(recipe, models)
        account = None if arguments.overwrite else finished_account(prepared, out / name)
        if account is not None:
            print(f"done before: {out / name}")
            if arguments.verify:
                _verify(out / name, account)
            continue
        inputs = [path for model in models for path in model.inputs]
        check_output(out / name, inputs, overwrite=arguments.overwrite)
        for note in notes_of(prepared):
            warnings.warn(f"{name}: {note}", UserNote, stacklevel=2)
        check_room(out / name, prepared.shards, beside=size)
        size += prepared.plan.nbytes
        print(f"{name}:")
        print(prepared.plan.account().table())
        print(describe(needs_of(prepared, threads=arguments.threads or None), out / name))
        writings.append(Writing(prepared, out / name, recipe.references(), _again(out / name)))
    note_dequantized(opened.values())
    if arguments.check or not writings:
        return
    sys.stdout.flush()
    accounts = _with_progress(arguments, out, size, lambda **options: write_merges(writings, **options))
    for writing, account in zip(writings, accounts, strict=True):
        _written(arguments, Path(writing.out), account)


def _of_mergekit(arguments: Arguments, file: "MergekitFile", out: Path) -> None:
    """A file of mergekit, all of its stages."""
    from jaxlab.checkpoints import OpenModel, check_output, open_model
    from jaxlab.errors import UserError, UserNote
    from jaxlab.merging import check_room, describe, needs_of, prepare_mergekit_file, write_mergekit_file

    if arguments.to == "orbax":
        raise UserError(
            f"{arguments.recipes[0]}: a file of mergekit makes a Hugging Face folder; convert that one"
        )
    folders = {str(one): model_folder(one.path) for one in file.references()}
    adapters = {str(one): model_folder(one.adapter) for one in file.references() if one.adapter is not None}
    check_output(out, [*folders.values(), *adapters.values()], overwrite=arguments.overwrite)
    opened: dict[str, OpenModel] = {}

    def open_reference(reference: "MergekitReference") -> OpenModel:
        key = str(reference)
        if key not in opened:
            opened[key] = open_model(folders[key], adapter=adapters.get(key))
        return opened[key]

    stages = prepare_mergekit_file(file, open_reference, out)
    notes = [*file.notes, *(note for stage in stages for note in stage.notes)]
    for note in dict.fromkeys(notes):
        warnings.warn(note, UserNote, stacklevel=2)
    check_room(out, [shard for stage in stages for shard in stage.prepared.shards])
    for stage in stages:
        if len(stages) > 1:
            print(f"{stage.name or out.name}:")
        print(stage.prepared.plan.account().table())
        print(describe(needs_of(stage.prepared, threads=arguments.threads or None), out))
    if arguments.check:
        return
    sys.stdout.flush()
    size = sum(stage.prepared.plan.nbytes for stage in stages)
    account = _with_progress(
        arguments,
        out,
        size,
        lambda **options: write_mergekit_file(file, open_reference, out, command=_again(out), **options),
    )
    _written(arguments, out, account)


def _to_huggingface(arguments: Arguments, prepared: "Prepared", references: list[str], out: Path) -> None:
    from jaxlab.merging import write_merge

    command = _again(out)
    account = _with_progress(
        arguments,
        out,
        prepared.plan.nbytes,
        lambda **options: write_merge(prepared, out, references=references, command=command, **options),
    )
    _written(arguments, out, account)


def _again(out: Path) -> str:
    return command_line("merge", "recipe.yaml", "--out", f"{out.name}-again", "--verify")


def _with_progress[T](arguments: Arguments, out: Path, size: int, write: "Callable[..., T]") -> T:
    from tqdm import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, disable=None, desc=out.name) as bar:
        return write(
            overwrite=arguments.overwrite,
            threads=arguments.threads or None,
            allow_not_finite=arguments.allow_nonfinite,
            hash_inputs=arguments.hash_inputs,
            progress=bar.update,
        )


def _written(arguments: Arguments, out: Path, account: "MergeAccount") -> None:
    from jaxlab.errors import UserNote

    if bad := account.not_finite():
        warnings.warn(f"{out}: NaN or infinite values in {bad}", UserNote, stacklevel=2)
    print(f"written: {out}")
    if arguments.verify:
        _verify(out, account)


def _verify(out: Path, account: "MergeAccount") -> None:
    from jaxlab.merging import verify_folder

    print(f"verified: all {verify_folder(out, account)} tensors of {out} are what the account says")


def _to_orbax(
    arguments: Arguments, recipe: "InjectRecipe | MergeRecipe", models: "list[OpenModel]", out: Path
) -> None:
    from jaxlab.merging import merge_by_recipe, save_merged, verify_merged

    params, account = merge_by_recipe(
        recipe, models, threads=arguments.threads or None, allow_not_finite=arguments.allow_nonfinite
    )
    account = save_merged(out, recipe, models, params, account, overwrite=arguments.overwrite)
    print(f"written: {out}")
    if arguments.verify:
        verify_merged(out, account)
        print(f"verified: every tensor of {out} is what the account says")
