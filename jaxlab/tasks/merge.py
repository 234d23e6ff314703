"""Task `merge`: models into one, by a recipe."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro
from tokenizers import Tokenizer

from jaxlab import __version__
from jaxlab.app import model_folder
from jaxlab.checkpoints import SourceFiles, load_model, open_model, save_model
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
    vlm, expert, base = (open_model(model_folder(m)) for m in (recipe.vlm, recipe.expert, recipe.base))
    trio = load_trio(vlm, expert, base)
    params, account = inject_recipe(recipe, trio)
    return save_merged(out, trio.config, params, trio.tokenizer, account, recipe, vlm.source_files)


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
    models = [open_model(model_folder(model.model)) for model in recipe.models]
    base = None if recipe.base is None else open_model(model_folder(recipe.base))
    first, config = models[0], models[0].config
    for other in [*models[1:], *([] if base is None else [base])]:
        same_architecture(str(first.path), config, str(other.path), other.config)
    params, account = merge_models(
        recipe.operator,
        [model.read() for model in models],
        base=None if base is None else base.read(),
        mode=recipe.mode,
        seed=recipe.seed,
        family=config.family,
        **recipe.parameters(),
    )
    return save_merged(out, config, params, first.tokenizer, account, recipe, first.source_files)


def save_merged(
    out: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    account: Account,
    recipe: Recipe,
    source_files: SourceFiles | None = None,
) -> Account:
    """Writes the model folder with the account in it, aside first, then renamed; returns the account with
    digests.
    """
    account = account.with_hashes(params)
    aside = out.absolute().with_name(f".{out.name}-merging-{os.getpid()}")
    try:
        save_model(aside, config, params, tokenizer, source_files=source_files)
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
