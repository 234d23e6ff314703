"""Models on the Hugging Face hub: fetched into its cache, or taken from it."""

import os
from pathlib import Path

from jaxlab.errors import UserError

PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja", "*.model")
"""What a model is made of: no code, no pickles."""
PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
IGNORED = ("*/*", "consolidated*")
"""Other forms of the same weights, in folders of their own or, with Mistral, beside ours."""


def snapshot(
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
