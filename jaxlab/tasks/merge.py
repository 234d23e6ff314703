"""Task `merge`: models into one, by a recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from jaxlab.app import model_folder
from jaxlab.checkpoints import check_output, open_model
from jaxlab.config import POSITIONAL
from jaxlab.merging import load_recipe, merge_by_recipe, note_dequantized, save_merged, verify_merged


@dataclass(frozen=True)
class Arguments:
    """Merge models, or inject an expert into a VLM."""

    recipe: Annotated[str, POSITIONAL]
    """YAML file that begins with kind: inject or kind: merge."""
    out: str
    """Folder to write the model to."""
    verify: bool = False
    """Read the written model again and compare every tensor's hash with the account."""
    overwrite: bool = False
    """Replace the folder if this tool wrote it."""


def run(arguments: Arguments) -> None:
    recipe, out = load_recipe(arguments.recipe), Path(arguments.out)
    folders = [model_folder(reference) for reference in recipe.references()]
    check_output(out, folders, overwrite=arguments.overwrite)  # before anything is read
    models = [open_model(folder) for folder in folders]
    note_dequantized(models)
    params, account = merge_by_recipe(recipe, models)
    account = save_merged(out, recipe, models, params, account, overwrite=arguments.overwrite)
    print(account.table())
    print(f"written: {out}")
    if arguments.verify:
        verify_merged(out, account)
        print(f"verified: every tensor of {out} is what the account says")
