"""Task `merge`: models into one, by a recipe."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro
from tokenizers import Tokenizer

from jaxlab import __version__
from jaxlab.app import model_folder
from jaxlab.checkpoints.kept import Kept
from jaxlab.checkpoints.loading import kept_of, load_model
from jaxlab.checkpoints.native import save_model
from jaxlab.config import to_dict
from jaxlab.errors import UserError
from jaxlab.files import write_json
from jaxlab.merging import inject
from jaxlab.merging.account import Account
from jaxlab.merging.inputs import Trio, load_trio, same_architecture
from jaxlab.merging.models import merge_models
from jaxlab.merging.recipe import InjectRecipe, MergeRecipe, Recipe, load_recipe
from jaxlab.models import ModelConfig, Params

ACCOUNT = "account.json"


@dataclass(frozen=True)
class Arguments:
    """Merge models, or inject an expert into a VLM."""

    recipe: tyro.conf.Positional[str]
    """YAML file that begins with kind: inject or kind: merge."""
    out: str
    """Folder to write the model to."""
    verify: bool = False
    """Read the written model again and compare every tensor's hash with the account."""
    overwrite: bool = False
    """Replace the folder if it exists."""


def run(arguments: Arguments) -> None:
    recipe, out = load_recipe(arguments.recipe), Path(arguments.out)
    if out.exists() and not arguments.overwrite:
        raise UserError(f"{out}: exists already; choose another place or use --overwrite")
    account = _inject_to(recipe, out) if isinstance(recipe, InjectRecipe) else _merge_to(recipe, out)
    print(account.table())
    print(f"written: {out}")
    if arguments.verify:
        verify(out, account)
        print(f"verified: every tensor of {out} is what the account says")


def _inject_to(recipe: InjectRecipe, out: Path) -> Account:
    trio = load_trio(recipe.vlm, recipe.expert, recipe.base)
    params, account = inject_recipe(recipe, trio)
    kept = kept_of(model_folder(recipe.vlm))
    return save_merged(out, trio.config, params, trio.tokenizer, account, recipe, kept)


def inject_recipe(recipe: InjectRecipe, trio: Trio) -> tuple[Params, Account]:
    """What a recipe makes of its models."""
    options = {"density": recipe.density, "rescale": recipe.rescale}
    given = {name: value for name, value in options.items() if value is not None}
    return inject(
        trio.vlm,
        trio.expert,
        trio.base,
        operator=recipe.operator,
        lambda_v=recipe.lambda_v,
        lambda_e=recipe.lambda_e,
        embeddings=recipe.embeddings,
        common_rows=trio.common_rows,
        seed=recipe.seed,
        mode=recipe.mode,
        family=trio.config.family,
        **given,
    )


def _merge_to(recipe: MergeRecipe, out: Path) -> Account:
    folders = [model_folder(model.model) for model in recipe.models]
    loaded = [load_model(folder) for folder in folders]
    base = None if recipe.base is None else load_model(model_folder(recipe.base))
    config, _, tokenizer = loaded[0]
    for folder, (other, *_) in zip(folders, loaded, strict=True):
        same_architecture(str(folders[0]), config, str(folder), other)
    if recipe.base is not None and base is not None:
        same_architecture(str(folders[0]), config, recipe.base, base[0])
    params, account = merge_models(
        recipe.operator,
        [params for _, params, _ in loaded],
        base=None if base is None else base[1],
        mode=recipe.mode,
        seed=recipe.seed,
        family=config.family,
        **recipe.parameters(),
    )
    return save_merged(out, config, params, tokenizer, account, recipe, kept_of(folders[0]))


def save_merged(
    out: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    account: Account,
    recipe: Recipe,
    kept: Kept | None = None,
) -> Account:
    """Writes the model folder with the account in it, aside first, then renamed; returns the account with
    digests.
    """
    account = account.with_hashes(params)
    aside = out.absolute().with_name(f".{out.name}-merging-{os.getpid()}")
    try:
        save_model(aside, config, params, tokenizer, kept=kept)
        written = {"version": __version__, "recipe": to_dict(recipe), "tensors": account.to_json()}
        write_json(aside / ACCOUNT, written)
        if out.exists():
            shutil.rmtree(out)
        os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return account


def verify(out: Path, account: Account) -> None:
    """Raises RuntimeError if the model on disk is not what the account says."""
    _, params, _ = load_model(out)
    wrong = account.differences(params)
    if wrong:
        raise RuntimeError(f"{out}: {len(wrong)} tensors differ from the account: {', '.join(wrong[:3])}")
