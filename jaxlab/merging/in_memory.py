"""Merges that become a model of ours, which is made in memory and written whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab import __version__
from jaxlab import config as configs
from jaxlab.checkpoints import OpenModel, entries, from_hf, open_model, tree_of
from jaxlab.errors import UserError
from jaxlab.files import jsonable
from jaxlab.merging.account import MergeAccount
from jaxlab.merging.architecture import check_same_architecture
from jaxlab.merging.engine import execute
from jaxlab.merging.memory import Memory
from jaxlab.merging.output import differing
from jaxlab.merging.preparing import prepare_merge, prepared_statistics
from jaxlab.merging.recipe import ACCOUNT, Recipe
from jaxlab.models import Params


def merge_by_recipe(
    recipe: Recipe, models: Sequence[OpenModel], *, allow_not_finite: bool = False, **options: Any
) -> tuple[Params, MergeAccount]:
    """What a recipe makes of its models, opened in the order of `recipe.references()`, on the host, and the
    account; the bits of `write_merge`.

    Args:
      allow_not_finite: whether there may be NaN and infinities; else they are counted and refused.
      options: see `jaxlab.merging.engine.execute`.

    Raises:
      UserError: models that are damaged or cannot be merged.
    """
    prepared = prepare_merge(recipe, models, to="orbax")
    options.setdefault("statistics", prepared_statistics(prepared))
    memory = Memory(prepared.plan)
    options |= {"hash_inputs": "none", "allow_not_finite": True}
    records = execute(prepared.plan, prepared.inputs, memory, **options)
    first = models[0]
    account = prepared.plan.account(first.config.family).with_records(records)
    if not allow_not_finite:
        account.check_finite()
    leaves: dict[Any, Any] = {}
    for entry in entries(first.shapes, first.config.family):
        stacked = np.stack([memory.array(name) for name in entry.names])
        leaves |= from_hf(stacked, entry, first.shapes)
    return tree_of(leaves), account


def save_merged(
    out: Path,
    recipe: Recipe,
    models: Sequence[OpenModel],
    params: Params,
    account: MergeAccount,
    *,
    overwrite: bool,
) -> MergeAccount:
    """Writes what a recipe made of `models` as the first of them, the account beside it; whole or not at all.

    Returns:
      The account with digests.

    Raises:
      UserError: `out` may not be written (see `check_output`).
    """
    from jaxlab.checkpoints import save_model  # Orbax and Flax come with it

    account = account.with_hashes(params)
    written = {"version": __version__, "recipe": configs.to_dict(recipe), "tensors": account.to_json()}
    if recipe.differences:
        written["differences"] = check_same_architecture(models, recipe.differences)
    save_model(
        out,
        models[0].config,
        params,
        models[0].tokenizer,
        source_files=models[0].source_files,
        extra_files={ACCOUNT: json.dumps(jsonable(written), indent=2, allow_nan=False) + "\n"},
        inputs=[model.path for model in models],
        overwrite=overwrite,
    )
    return account


def verify_merged(out: Path, account: MergeAccount) -> None:
    """Checks that the model on disk is what the account says.

    Raises:
      UserError: it is not.
    """
    wrong = account.differences(open_model(out).read())
    if wrong:
        raise UserError(differing(out, wrong))
