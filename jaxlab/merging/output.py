"""From a recipe to a Hugging Face folder: the plan, what it needs, the merge itself, its account and card."""

import contextlib
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxlab import __version__
from jaxlab import config as configs
from jaxlab.checkpoints import (
    OpenModel,
    SourceFiles,
    TensorFolder,
    check_tied_heads,
    huggingface_form,
    open_folder,
    read_json,
    resumable_folder,
)
from jaxlab.errors import UserError
from jaxlab.files import jsonable, named
from jaxlab.merging.account import AccountLine, MergeAccount
from jaxlab.merging.planning import reason_of_heads
from jaxlab.merging.preparing import Beside, Prepared, prepared_statistics
from jaxlab.merging.recipe import ACCOUNT, InjectRecipe, MergeRecipe

CARD, RECIPE = "README.md", "recipe.yaml"
_DIGESTS = {
    "none": "",
    "sampled": "The digest is that of a list of lines sorted by name: a SHA-256, two spaces, the tensor's "
    "name. That SHA-256 is of 4 kB of every 256 kB of the tensor, from its first byte on: it tells models "
    "apart, not a bit that flipped (`--hash-inputs full` does).",
    "full": "The digest is that of a list of lines sorted by name: the SHA-256 of a tensor's bytes, two "
    "spaces, its name.",
}
_MADE_ANEW = "it was damaged or changed since it was written; --overwrite makes it anew"
_READ_BLOCK = 1 << 22


class Writing(NamedTuple):
    """A merge that is written."""

    prepared: Prepared
    out: str | os.PathLike[str]
    references: Sequence[str] = ()
    """Of the models as the user named them, for the card."""
    command: str = "python run.py merge recipe.yaml --out again --verify"
    """What makes it again, beside its own recipe.yaml; for the card."""
    statistics: Mapping[str, Any] | None = None
    """Of data, by the tensor's name; by default what the recipe says."""


def write_merge(
    prepared: Prepared,
    out: str | os.PathLike[str],
    *,
    references: Sequence[str] = (),
    command: str = Writing._field_defaults["command"],
    statistics: Mapping[str, Any] | None = None,
    **options: Any,
) -> MergeAccount:
    """Carries the plan out into a new Hugging Face folder, whole or not at all; a killed one is taken up.

    Args:
      references, command, statistics: see `Writing`.
      options: see `write_merges`.

    Returns:
      The account with digests.

    Raises:
      UserError: `out` may not be written (see `check_output`), no room, damaged inputs, a result that is not
        finite.
    """
    return write_merges([Writing(prepared, out, references, command, statistics)], **options)[0]


def write_merges(
    writings: Sequence[Writing],
    *,
    overwrite: bool = False,
    hash_inputs: Literal["none", "sampled", "full"] = "sampled",
    allow_not_finite: bool = False,
    **options: Any,
) -> list[MergeAccount]:
    """Carries several plans out, each into a folder of its own as `write_merge` does: what they have in
    common is read once. Killed ones are taken up.

    Args:
      overwrite: replaces folders that this tool wrote.
      allow_not_finite: whether NaN and infinities may be written; else they are counted, and nothing is.
      hash_inputs, options: see `jaxlab.merging.engine.execute_together`.

    Returns:
      The accounts with digests.

    Raises:
      UserError: as for `write_merge`.
    """
    from jaxlab.merging.engine import Merge, execute_together

    merges, folders, besides = [], [], []
    with contextlib.ExitStack() as stack:
        for prepared, out, _, _, statistics in writings:
            if statistics is None:
                statistics = prepared_statistics(prepared)
            for one in prepared.inputs:
                check_tied_heads(one.found)
            beside = prepared.beside or beside_first(prepared)
            begun = resumable_folder(
                out,
                prepared.shards,
                digest=prepared_digest(prepared),
                texts=[*beside.texts, ACCOUNT, CARD, RECIPE],
                inputs=[path for one in prepared.inputs for path in one.model.inputs],
                overwrite=overwrite,
            )
            folders.append(stack.enter_context(begun))
            merges.append(Merge(prepared.plan, prepared.inputs, folders[-1], statistics or {}))
            besides.append(beside)
        # Counted to the end: a line that names one of many tensors is of little use.
        results = execute_together(merges, hash_inputs=hash_inputs, allow_not_finite=True, **options)
        accounts = [
            writing.prepared.plan.account().with_records(records)
            for writing, records in zip(writings, results, strict=True)
        ]
        for account in () if allow_not_finite else accounts:
            account.check_finite()
        for writing, folder, beside, records, account in zip(
            writings, folders, besides, results, accounts, strict=True
        ):
            prepared = writing.prepared
            made = _made(prepared, writing.references, records, hash_inputs)
            written = {**made, "digest": prepared_digest(prepared), "tensors": account.to_json()}
            card = _card(prepared, made, account, writing.command, Path(writing.out).name)
            folder.complete(
                config=beside.config,
                copy_from=beside.copy_from,
                texts={
                    **beside.texts,
                    ACCOUNT: json.dumps(jsonable(written), indent=2, allow_nan=False) + "\n",
                    RECIPE: prepared.recipe_text,
                    CARD: card,
                },
                without=beside.without,
            )
    return accounts


def finished_account(prepared: Prepared, out: str | os.PathLike[str]) -> MergeAccount | None:
    """The account of a folder that has been made of the same plan and the same files; None: there is none."""
    path = Path(out) / ACCOUNT
    if not path.is_file():
        return None
    found = read_json(path)
    return _account_of(found) if found.get("digest") == prepared_digest(prepared) else None


def _account_of(found: Mapping[str, Any]) -> MergeAccount:
    listed = ("models", "shape")
    lines: list[dict[str, Any]] = [
        {k: tuple(v) if k in listed else v for k, v in line.items()} for line in found["tensors"]
    ]
    return MergeAccount(tuple(AccountLine(**line) for line in lines))


def beside_first(prepared: Prepared) -> Beside:
    """config.json of the first input, with the dtype of what is written, and the files beside it."""
    first = prepared.inputs[0].model
    largest = max(prepared.plan.tensors, key=lambda tensor: math.prod(tensor.shape))
    config, source = huggingface_form(first, largest.dtype)
    return Beside(config, None if source is None else source.folder, texts_beside(first, source))


def texts_beside(model: OpenModel, source: SourceFiles | None) -> dict[str, str]:
    """Files beside a model that no folder of Hugging Face holds."""
    texts = dict({} if source is None else source.texts)
    if model.tokenizer is not None and (source is None or source.folder is None):
        texts.setdefault("tokenizer.json", model.tokenizer.to_str(pretty=True))
    return texts


def prepared_digest(prepared: Prepared) -> str:
    """Of what decides the bytes: the plan, and the files as they are now."""
    files: list[Any] = [__version__, prepared.plan.digest()]
    recipe = prepared.recipe
    if isinstance(recipe, InjectRecipe | MergeRecipe) and (recipe.data or recipe.statistics):
        sources = [named(recipe.statistics or "")] if recipe.data is None else recipe.data.files()
        files.append([configs.to_plain(recipe.data), *([s, *_state(s)] for s in map(str, sources))])
    for one in prepared.inputs:
        found = {tensor.file for tensor in one.found.tensors.values()}
        paths = _all_files(one.model) if None in found else [path for path in found if path is not None]
        for path in sorted(paths):
            files.append([str(path), *_state(path)])
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _state(path: str | Path) -> list[int]:
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _all_files(model: OpenModel) -> list[Path]:
    found = []
    for path in model.inputs:
        found += [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return found


def _made(
    prepared: Prepared, references: Sequence[str], records: Mapping[str, Mapping[str, Any]], hashed: str
) -> dict[str, Any]:
    """What made the folder: versions, the recipe, the inputs with a digest of the bytes that were read."""
    import jax

    read: list[dict[str, str]] = [{} for _ in prepared.inputs]
    for record in records.values():
        for source, sha256 in record["sources"].items():
            model, _, name = source.partition(":")
            read[int(model)][name] = sha256
    inputs = []
    for i, one in enumerate(prepared.inputs):
        named = references[i] if references else str(one.model.path)
        line: dict[str, Any] = {"role": one.role, "model": named}
        line["tensors_read"] = len(read[i]) if hashed != "none" else None
        text = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(read[i].items()))
        line["sha256"] = hashlib.sha256(text.encode()).hexdigest() if hashed != "none" else None
        inputs.append(line)
    return {
        "version": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "recipe": prepared.recipe_tree,
        "hashed": hashed,
        "inputs": inputs,
        **({"differences": prepared.differences} if prepared.differences else {}),
        **({"stages": list(prepared.stages)} if prepared.stages else {}),
    }


def _card(prepared: Prepared, made: Mapping[str, Any], account: MergeAccount, command: str, name: str) -> str:
    """README.md: what this model is and how it is made again."""
    inputs = made["inputs"]
    hub = [
        line["model"] for line in inputs if line["model"].count("/") == 1 and line["model"][0] not in "./~"
    ]
    front = ["---", "tags:", "- merge", "- jaxlab"]
    if hub:
        front += ["base_model:", *(f"- {reference}" for reference in dict.fromkeys(hub))]
    counts = account.counts()
    recipe = prepared.recipe_text.rstrip()
    rows = [
        f"| {line['role']} | {line['model']} | {line['tensors_read']} | {line['sha256'] or 'not asked for'} |"
        for line in inputs
    ]
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {name}",
            "",
            f"A merge made by jaxlab {made['version']} (jax {made['jax']}, Python {made['python']}): "
            f"{counts['merged']} tensors merged, {counts['copied']} copied, {counts['refused']} of the "
            f"inputs left out. `{ACCOUNT}` lists every one, with the SHA-256 of what was written.",
            "",
            "## Recipe",
            "",
            "```yaml",
            recipe,
            "```",
            "",
            "## Inputs",
            "",
            "| role | model | tensors read | SHA-256 |",
            "|---|---|---|---|",
            *rows,
            "",
            _DIGESTS[made["hashed"]],
            "",
            *_differences(prepared.differences),
            "## Made again, bit for bit",
            "",
            f"With the `{RECIPE}` that lies here, from the folder in which its paths mean the same models:",
            "",
            "```",
            command,
            "```",
            "",
        ]
    )


def _differences(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a card about settings in which the models differ."""
    if not settings:
        return []
    others = {name: [f"{v} ({path})" for path, v in s["others"].items()] for name, s in settings.items()}
    rows = [f"| {name} | {s['kept']} | {', '.join(others[name])} |" for name, s in settings.items()]
    return ["## Settings that differ", "", "| setting | kept | not kept |", "|---|---|---|", *rows, ""]


def verify_folder(out: str | os.PathLike[str], account: MergeAccount | None = None) -> int:
    """Reads a folder again and compares shape, dtype and SHA-256 of every tensor with the account.

    Args:
      account: by default that which lies in the folder.

    Returns:
      How many tensors there are.

    Raises:
      UserError: something is not what the account says, or cannot be read.
    """
    folder = open_folder(out)
    if account is None:
        account = _account_of(read_json(Path(out) / ACCOUNT))
    wrong = account.wrong({name: (t.shape, t.dtype.name, _hash(folder, name)) for name, t in folder.items()})
    if wrong:
        raise UserError(differing(out, wrong))
    return len(folder)


def differing(out: str | os.PathLike[str], wrong: Sequence[str]) -> str:
    """The line about a folder whose tensors are not its account's."""
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{out}: {len(wrong)} tensors differ from the account: {', '.join(wrong[:3])}{more}; {_MADE_ANEW}"


def _hash(folder: TensorFolder, name: str) -> str:
    tensor = folder[name]
    assert tensor.file is not None
    digest, left = hashlib.sha256(), tensor.nbytes
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.offset)
        while left:
            block = file.read(min(_READ_BLOCK, left))
            if not block:
                raise UserError(f"{tensor.file}: cut off while it was read; {_MADE_ANEW}")
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def notes_of(prepared: Prepared) -> list[str]:
    """What is allowed and probably not meant."""
    inputs, notes = prepared.inputs, []
    for name, values in prepared.differences.items():
        others = " and ".join(str(value) for value in dict.fromkeys(values["others"].values()))
        notes.append(f"{name}: {values['kept']} is kept, {others} is not")
    heads = [line for line in prepared.plan.refused if line.reason == reason_of_heads(inputs[0].role)]
    if heads:
        injected = isinstance(prepared.recipe, InjectRecipe)
        remedy = (
            "; to merge heads, write the VLM with a head of its own (tie_word_embeddings: false)"
            if injected
            else "; to merge it, list a model with a head of its own first"
        )
        paths_of = {one.role: one.model.path for one in inputs}
        roles = dict.fromkeys(role for line in heads for role in line.models)
        owners = " and ".join(f"{role} ({paths_of[role]})" for role in roles)
        notes.append(f"{heads[0].name} of {owners} goes nowhere, trained or not: {heads[0].reason}{remedy}")
    if isinstance(prepared.recipe, InjectRecipe):
        paths = [one.model.path.resolve() for one in inputs]
        inputs_of = [one.model.inputs for one in inputs]
        for i, one in enumerate(inputs[1:-1], 1):
            if inputs_of[i] == inputs_of[-1] or (len(inputs_of[i]) == 1 and paths[i] == paths[-1]):
                notes.append(f"the {one.role} is the base: its task vector is zero")
            if inputs_of[i] == inputs_of[0]:
                notes.append(f"the {one.role} is the VLM: both are {one.model.path}")
        if paths[0] == paths[-1]:
            notes.append("the VLM is the base: its task vector is zero")
        if not any(kind.names for kind in inputs[0].found.kinds if not kind.is_language):
            notes.append(f"{inputs[0].model.path}: the vlm is a language model alone, without vision")
    return notes
