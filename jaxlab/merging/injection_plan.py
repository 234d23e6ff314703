"""Which tensors of a VLM, an expert and their base an injection merges, and which it copies or refuses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxlab.checkpoints import EMBEDDING, HEAD, Entry, entries
from jaxlab.errors import UserError
from jaxlab.merging.account import AccountLine, Action, MergeAccount

Embeddings = Literal["vlm", "merge_common_rows", "merge"]
ROLES = ("vlm", "expert", "base")


@dataclass(frozen=True)
class PlannedLeaf:
    """What happens to the tensors of one leaf of the VLM."""

    entry: Entry
    action: Action
    models: tuple[str, ...]
    """The inputs whose tensors of this name go into it."""
    reason: str
    rows: int | None = None
    """Merge only the first rows of the table; the others stay the VLM's. None: all."""


@dataclass(frozen=True)
class InjectionPlan:
    """A decision for every tensor of every input; hashable."""

    leaves: tuple[PlannedLeaf, ...]
    refused: tuple[AccountLine, ...]
    family: str = "jaxlab"
    """Whose names the tensors have: the VLM's."""

    @property
    def merged(self) -> tuple[Entry, ...]:
        """The leaves that are merged, at least in part."""
        return tuple(leaf.entry for leaf in self.leaves if leaf.action == "merged")

    @property
    def num_layers(self) -> int:
        """Of the language model."""
        return 1 + max((i for entry in self.merged for i in entry.layers if i is not None), default=-1)

    def account(self) -> MergeAccount:
        """The account, without digests."""
        lines = [
            AccountLine(name, p.entry.pattern, p.action, p.models, p.reason)
            for p in self.leaves
            for name in p.entry.names
        ]
        return MergeAccount((*lines, *self.refused), self.family)


def plan_injection(
    vlm: Mapping[str, Any],
    expert: Mapping[str, Any],
    base: Mapping[str, Any],
    *,
    embeddings: Embeddings = "vlm",
    common_rows: int | None = None,
    family: str = "jaxlab",
) -> InjectionPlan:
    """Decides from names and shapes alone.

    Args:
      embeddings: vlm: embedding and head stay the VLM's. merge: they are merged as far as all three have
        rows. merge_common_rows: as far as their tokenizers agree, too, which `common_rows` says. The other
        rows stay the VLM's.

    Raises:
      UserError: language models that differ in more than the rows of their tables; the message names the
        tensors.
    """
    if embeddings not in ("vlm", "merge_common_rows", "merge"):
        raise UserError(f"embeddings is vlm, merge_common_rows or merge, not {embeddings!r}")
    inputs = {"vlm": vlm, "expert": expert, "base": base}
    # By place in our tree: the same language model has other names in a VLM, in an expert and in a base.
    known = {role: {e.path: e for e in entries(params, family)} for role, params in inputs.items()}
    leaves, problems = [], []
    for entry in known["vlm"].values():
        if not entry.is_language:
            leaves.append(PlannedLeaf(entry, "copied", ("vlm",), "not part of the language model"))
            continue
        # A model without a head of its own has its embedding there.
        tied = tuple(role for role in ROLES if entry.path == HEAD and HEAD not in known[role])
        found = {role: known[role].get(EMBEDDING if role in tied else entry.path) for role in ROLES}
        shapes = {role: _shape(inputs[role], e) for role, e in found.items() if e is not None}
        if len(shapes) < len(ROLES):
            problems += [f"the {role} has no {entry.pattern}" for role in ROLES if role not in shapes]
            continue
        is_table = entry.path in (EMBEDDING, HEAD)
        if len({shape[1:] if is_table else shape for shape in shapes.values()}) > 1:
            sizes = ", ".join(f"{list(shape)} in the {role}" for role, shape in shapes.items())
            problems.append(f"{entry.pattern} is {sizes}")
        elif is_table:
            leaves.append(_table(entry, [s[0] for s in shapes.values()], embeddings, common_rows, tied))
        else:
            leaves.append(PlannedLeaf(entry, "merged", ROLES, "language model"))
    taken = {(role, leaf.entry.path) for leaf in leaves for role in leaf.models}
    left = [(role, e) for role in ROLES for e in known[role].values() if (role, e.path) not in taken]
    tables = {leaf.entry.path: leaf.reason for leaf in leaves if leaf.action == "copied"}
    refused: list[AccountLine] = []
    for role, entry in left:
        if not entry.is_language:
            refused += _refusal(role, entry, "not part of the language model")
        elif entry.path in tables:
            refused += _refusal(role, entry, tables[entry.path])
        elif entry.path == HEAD and HEAD not in known["vlm"]:
            refused += _refusal(role, entry, "the VLM's head is its embedding")
        elif entry.path not in known["vlm"]:
            problems.append(f"only the {role} has {entry.pattern}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"the language models cannot be merged: {'; '.join(problems[:3])}{more}")
    plan = InjectionPlan(tuple(leaves), tuple(refused), family)
    _check_complete(plan, {role: [e for e in known[role].values()] for role in ROLES})
    return plan


def _shape(params: Mapping[str, Any], entry: Entry) -> tuple[int, ...]:
    """A table's rows and columns; of other leaves the number of their tensors, then the shape of one."""
    shape = entry.shape(params)
    return shape if entry.path in (EMBEDDING, HEAD) else (len(entry.names), *shape)


def _table(
    entry: Entry, rows: list[int], embeddings: Embeddings, common_rows: int | None, tied: tuple[str, ...]
) -> PlannedLeaf:
    shared = min(rows)
    if embeddings == "merge_common_rows" and common_rows is not None:
        shared = min(shared, common_rows)
    if embeddings == "vlm":
        return PlannedLeaf(entry, "copied", ("vlm",), "embeddings: vlm")
    if shared == 0:
        return PlannedLeaf(entry, "copied", ("vlm",), f"embeddings: {embeddings}, and no row is common")
    reason = f"embeddings: {embeddings}"
    reason += "".join(f", the {role}'s is its embedding" for role in tied)
    models = tuple(role for role in ROLES if role not in tied)
    if shared == rows[0]:
        return PlannedLeaf(entry, "merged", models, reason)
    return PlannedLeaf(entry, "merged", models, f"{reason}, rows from {shared} on the VLM's", rows=shared)


def _refusal(role: str, entry: Entry, reason: str) -> list[AccountLine]:
    return [AccountLine(name, entry.pattern, "refused", (role,), reason) for name in entry.names]


def _check_complete(plan: InjectionPlan, inputs: Mapping[str, list[Entry]]) -> None:
    """Checks that every tensor of every input is merged, copied or refused exactly once.

    Raises:
      ValueError: one is not.
    """
    lines = plan.account().lines
    for role, known in inputs.items():
        names = sorted(name for entry in known for name in entry.names)
        counted = sorted(line.name for line in lines if role in line.models)
        if names != counted:
            raise ValueError(f"unaccounted tensors of the {role}: {sorted(set(names) ^ set(counted))[:3]}")
