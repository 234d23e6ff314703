"""Where a model is, by its name (a folder, a file, a run, an id on the Hugging Face hub), and its form."""

import os
import re
from pathlib import Path

from jaxlab.checkpoints.foreign_forms import foreign_files
from jaxlab.checkpoints.formats.base import Form
from jaxlab.checkpoints.tensor_folder import CONFIG
from jaxlab.errors import UserError

OWN_CONFIG, OWN_PARAMS = "config.yaml", "params"
"""What a model folder of ours holds."""
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja", "*.model")
"""What a model is made of: no code, no pickles."""
PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
IGNORED = ("*/*", "consolidated*")
"""Other forms of the same weights, in folders of their own or, with Mistral, beside ours."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


def resolve(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """The file or folder of a model: of a run its model; one on the hub is fetched into the cache.

    Args:
      revision: commit, tag or branch of a hub id that names none.
      offline: take it from the cache alone.
      allow_pickle: fetch PyTorch's .bin files too.

    Raises:
      UserError: there is none, and the name is no hub id.
    """
    path = os.path.expanduser(path)
    if os.path.exists(path):  # not Path.exists, which raises for names that are too long
        path = Path(path)
        is_run = (path / "model").is_dir() and not (path / CONFIG).exists()
        return path / "model" if is_run else path
    if not _HUB_ID.fullmatch(str(path)):
        raise UserError(
            f"{path}: no such model: a model folder, a run folder, the config of a train run, a .gguf file, "
            "a .bin file of llama2.c, or a hub id owner/name"
        )
    try:
        return hub_snapshot(str(path), revision=revision, offline=offline, allow_pickle=allow_pickle)
    except UserError as error:
        raise UserError(f"no such folder here, nor on the hub: {error}") from error


def split_adapter(reference: str) -> tuple[str, str | None]:
    """The model and the LoRA adapter of `model+adapter`; what exists under the whole name is a model alone.

    Raises:
      UserError: more than one +, or nothing beside it.
    """
    if "+" not in reference or os.path.exists(os.path.expanduser(reference)):
        return reference, None
    model, _, adapter = reference.partition("+")
    if not model or not adapter or "+" in adapter:
        raise UserError(f"{reference}: no such model: one with an adapter is named model+adapter")
    return model, adapter


def form_of(path: Path) -> Form:
    """The form of the model at `path`.

    Raises:
      UserError: it is no model.
    """
    if path.is_file():
        if path.suffix == ".bin":
            return "llama2c"
        if path.suffix == ".gguf":
            return "gguf"
        if path.suffix == ".safetensors":
            raise UserError(f"{path}: tensors without their config.json; name the folder that holds both")
        raise UserError(f"{path}: not a model: name its folder, a .gguf file, or a .bin file of llama2.c")
    if (path / OWN_CONFIG).is_file() or (path / OWN_PARAMS).is_dir():
        return "orbax"
    if (path / CONFIG).exists():
        return "huggingface"
    if not path.is_dir():
        raise UserError(f"{path}: no such model")
    if any(path.glob("*.gguf")):
        raise UserError(f"{path}: holds GGUF files; name one of them, of a split one the first")
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: an adapter, not a model: convert the model it is for, with --adapter {path}"
        )
    other = foreign_files(path)
    instead = "" if other is None else f"; it holds {other}"
    raise UserError(
        f"{path}: not a model folder: it needs {OWN_CONFIG} and {OWN_PARAMS}/ (ours), or {CONFIG} and "
        f"tensors (Hugging Face){instead}"
    )


def hub_snapshot(
    reference: str, *, revision: str | None = None, offline: bool = False, allow_pickle: bool = False
) -> Path:
    """The folder of `owner/name` or `owner/name@revision`, pinned to the commit that the revision stands for.

    Args:
      revision: commit, tag or branch, where the reference names none; by default the main branch.
      offline: take it from the cache alone; HF_HUB_OFFLINE in the environment does the same.
      allow_pickle: fetch PyTorch's .bin files too.

    Raises:
      UserError: huggingface_hub is not installed, the hub or the network has no such model.
    """
    name, at, named = reference.partition("@")
    if at and not named:
        raise UserError(f"{reference}: names no revision after the @")
    if named and revision and named != revision:
        raise UserError(f"{reference}: names one revision, and {revision!r} is another; give one")
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(
            f"{reference}: a model on the hub needs huggingface_hub; run: pip install 'jaxlab[hf]'"
        ) from None
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    try:
        folder = hub.snapshot_download(
            name,
            revision=named or revision,
            local_files_only=offline,
            allow_patterns=[*PATTERNS, *(PICKLES if allow_pickle else ())],
            ignore_patterns=list(IGNORED),
        )
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: has no revision {named or revision!r} on the hub") from None
    except errors.GatedRepoError:
        raise UserError(
            f"{name}: its owner grants access on the hub; ask there, then log in: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such model here or on the hub, or a private one (hf auth login)"
        ) from None
    except errors.LocalEntryNotFoundError:
        hint = (
            "it is not in the cache; run once without --offline" if offline else "the hub cannot be reached"
        )
        raise UserError(f"{reference}: {hint}") from None
    except (errors.HTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise UserError(f"{reference}: cannot be fetched: {error}"[:300]) from error
    return Path(folder)
