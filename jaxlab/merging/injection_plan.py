"""The plan of an injection as models in memory have it, leaf by leaf. planning.py decides."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxlab.checkpoints import Entry, SameTokens, entries, tensors_of_shapes
from jaxlab.merging.account import AccountLine, Action, MergeAccount
from jaxlab.merging.plan import Input
from jaxlab.merging.planning import plan_injection_of
from jaxlab.merging.vocabulary import CommonRows

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
    rows: CommonRows | None = None
    """Merge only these rows of the table; the others stay the VLM's. None: all."""


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


@dataclass(frozen=True)
class _Tree(Input):
    """A tree of arrays, or of shapes, in place of an opened model."""

    model: Any = dataclasses.field(default=None, kw_only=True)


def plan_injection(
    vlm: Mapping[str, Any],
    expert: Mapping[str, Any],
    base: Mapping[str, Any],
    *,
    embeddings: Embeddings = "vlm",
    common_rows: SameTokens | int | None = None,
    family: str = "jaxlab",
) -> InjectionPlan:
    """Decides from names and shapes alone.

    Args:
      embeddings: vlm: embedding and head stay the VLM's. merge: they are merged as far as all three have
        rows. merge_common_rows: the rows of tokens that all have, which `common_rows` says. The other rows
        stay the VLM's.
      common_rows: for each id of the VLM those of the same token in all three, -1 where one has none; or how
        many first ids are the same; None: all.

    Raises:
      UserError: language models that differ in more than the rows of their tables; the message names the
        tensors.
    """
    trees = dict(zip(ROLES, (vlm, expert, base), strict=True))
    plan = plan_injection_of(
        [_Tree(role, tensors_of_shapes(dict(tree), family)) for role, tree in trees.items()],
        operator="task_arithmetic",
        mode="paper",
        parameters={},
        lambdas={"lambda_v": 1.0, "lambda_e": 1.0},
        embeddings=embeddings,
        tokens=common_rows,
        seed=0,
    )
    planned = {tensor.name: tensor for tensor in plan.tensors}
    leaves = []
    for entry in entries(vlm, family):
        one = planned[entry.names[0]]
        leaves.append(PlannedLeaf(entry, one.action, one.models, one.reason, one.common_rows))
    return InjectionPlan(tuple(leaves), plan.refused, family)
