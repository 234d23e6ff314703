"""Which tensor of a Hugging Face folder goes where: every one is used, ignored by a rule, or an error.

All of it follows from names, shapes and dtypes: nothing is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlab.checkpoints import families
from jaxlab.checkpoints.names import Entry, entries
from jaxlab.checkpoints.rows import EMBEDDING, HEAD
from jaxlab.checkpoints.safetensors_file import Tensor
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, Params

_SHOWN = 8


@dataclass(frozen=True)
class Account:
    """What becomes of every tensor of a folder."""

    family: str
    """With the variant whose names the folder has."""
    entries: tuple[Entry, ...]
    """Their names are all those that are used."""
    copies: tuple[str, ...] = ()
    """Heads written out although they are tied: the embedding once more."""
    ignored: tuple[str, ...] = ()
    """No parameters, by a rule of the family."""
    missing: tuple[str, ...] = ()
    unmapped: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    """Sentences about shapes and dtypes."""

    @property
    def problems(self) -> int:
        return len(self.missing) + len(self.unmapped) + len(self.wrong)

    def check(self, where: object) -> None:
        """Raises UserError that lists what is missing, not known, or of a wrong shape or dtype."""
        said = []
        if self.missing:
            said.append(f"{_count(self.missing, 'tensor')} missing: {_listed(self.missing)}")
        if self.unmapped:
            said.append(f"{_count(self.unmapped, 'tensor')} not known: {_listed(self.unmapped)}")
        if self.wrong:
            said.append(_listed(self.wrong))
        if said:
            hint = self._hint()
            raise UserError(f"{where}: not the family {self.family}: {'; '.join(said)}{hint}")

    def _hint(self) -> str:
        head = next((e.names[0] for e in self.entries if e.path == HEAD), None)
        if head in self.missing:
            return f" ({head} may be absent only where config.json says tie_word_embeddings)"
        return ""


def account(tensors: Mapping[str, Tensor], config: ModelConfig, template: Params) -> Account:
    """The account of a folder under the variant of the family that fits it best.

    Args:
      tensors: by their names in the folder.
      template: shapes of our parameters (`abstract_params(config)`).
    """
    best: Account | None = None
    for name in families.names_of(config.family):
        found = _account(tensors, config, template, name)
        if best is None or found.problems < best.problems:
            best = found
        if not found.problems:
            break
    assert best is not None
    return best


def _account(tensors: Mapping[str, Tensor], config: ModelConfig, template: Params, name: str) -> Account:
    known = entries(template, name)
    missing, wrong = [], []
    for entry in known:
        shape = entry.shape(template)
        for tensor_name in entry.names:
            tensor = tensors.get(tensor_name)
            if tensor is None:
                missing.append(tensor_name)
            elif tuple(tensor.shape) != shape:
                wrong.append(f"{tensor_name} is {list(tensor.shape)}, expected {list(shape)}")
            elif not is_float(tensor.dtype):
                wrong.append(f"{tensor_name} is {tensor.dtype}, expected a floating-point dtype")
    used = {tensor_name for entry in known for tensor_name in entry.names}
    left = [tensor_name for tensor_name in tensors if tensor_name not in used]
    copies = [n for n in left if config.tie_embeddings and n == families.head_name(name)]
    for copy in copies:
        embedding = next(entry for entry in known if entry.path == EMBEDDING)
        if tuple(tensors[copy].shape) != embedding.shape(template):
            wrong.append(
                f"{copy} is {list(tensors[copy].shape)}, but config.json says it is the embedding, "
                f"{list(embedding.shape(template))}"
            )
    ignored = [n for n in left if n not in copies and families.ignored(name).fullmatch(n)]
    unmapped = [n for n in left if n not in copies and n not in set(ignored)]
    return Account(name, known, tuple(copies), tuple(ignored), tuple(missing), tuple(unmapped), tuple(wrong))


def is_float(dtype: Any) -> bool:
    """Whether parameters can have a dtype; bfloat16 and float8 are numpy's by way of ml_dtypes."""
    return np.dtype(dtype).kind == "f" or np.dtype(dtype).name.startswith(("bfloat16", "float8"))


def _count(names: tuple[str, ...], noun: str) -> str:
    return f"1 {noun} is" if len(names) == 1 else f"{len(names)} {noun}s are"


def _listed(parts: tuple[str, ...]) -> str:
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more
