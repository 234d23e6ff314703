"""Flow shares: S_wp, S_pq and S_ww by layer (Wang et al. 2023, section 2.1 and figure 3; claims I1 to I3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxlab.errors import UserError
from jaxlab.icl.analyses.base import PromptAnalysis, Records, Study, deviation, finite_prompts
from jaxlab.icl.prompts import Prompts
from jaxlab.icl.saliency import Loss, NsaEdges, Reduction, flow_memory, flows

MOST_PAIRS = 1024
"""Pairs of classes whose means go into results.json, for each layer."""


@dataclass(frozen=True)
class FlowShares(PromptAnalysis):
    """Means of the flow over the edge sets of the paper, and their shares, by layer."""

    reduction: Reduction = "abs_of_sum"
    """Over heads: the absolute value of the sum, or the sum of the absolute values."""
    loss: Loss | None = None
    """Cross-entropy among the label words (the paper), or over the whole vocabulary. Default: among the label
    words where there are any."""
    nsa_edges: NsaEdges = "token"
    """Flow from a compressed block of native sparse attention: in equal parts, or whole, to its tokens."""

    name: ClassVar[str] = "flows"
    needs_label_words: ClassVar[bool] = False

    def check(self, study: Study) -> None:
        if self.loss == "labels" and not study.source.label_names:
            raise UserError("flows.loss: these prompts have no label words; set it to vocabulary")

    def _loss(self, study: Study) -> Loss:
        return self.loss or study.loss

    def memory(self, study: Study) -> int:
        return flow_memory(
            study.config,
            study.batch_size,
            study.longest,
            max(1, len(study.source.label_names)),
            study.source.roles,
            params=study.params,
        )[1]

    def measure(self, study: Study, chunk: Prompts, rng: np.random.Generator) -> Records:
        sums, counts = flows(
            study.params,
            chunk.batch,
            study.config,
            chunk.classes,
            chunk.targets,
            reduction=self.reduction,
            loss=self._loss(study),
            nsa_edges=self.nsa_edges,
            num_classes=study.source.roles.classes,
            not_finite="mark",
        )
        return {"sums": np.asarray(sums, np.float32), "counts": np.asarray(counts, np.float32)}

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        """Means over all prompts, deviations over the means of the seeds."""
        roles = study.source.roles
        sets = roles.edge_sets()
        records, left_out = finite_prompts(records, "sums")
        each = {name: [_means(seed, edges) for seed in records.values()] for name, edges in sets.items()}
        seeds = {name: np.stack([values.mean(0) for values in each[name]]) for name in sets}
        shares = _shares(seeds, roles.shared)
        counts = np.concatenate([seed["counts"] for seed in records.values()]).astype(np.float64)
        sums = np.concatenate([seed["sums"] for seed in records.values()]).astype(np.float64)
        found: dict[str, Any] = {
            "reduction": self.reduction,
            "loss": self._loss(study),
            "mean": {name: values.mean(0) for name, values in seeds.items()},
            "mean_std_over_prompts": {name: np.concatenate(values).std(0) for name, values in each.items()},
            "share": {name: values.mean(0) for name, values in shares.items()},
            "share_std": {name: deviation(values) for name, values in shares.items()},
            "edges_per_prompt": {name: counts[..., edges].sum(-1).mean(0) for name, edges in sets.items()},
            "classes": list(roles.names),
            "left_out": left_out,
        }
        for other, replaced in (("ww_without_first", "ww"), ("ww_with_first", "ww")):
            if other in seeds:
                found[f"share_{other.removeprefix('ww_')}"] = {
                    name: values.mean(0)
                    for name, values in _shares({**seeds, replaced: seeds[other]}, roles.shared).items()
                }
        if roles.classes**2 <= MOST_PAIRS:
            found["pairs"] = {
                "mean": (sums / np.maximum(counts, 1.0)).mean(0),
                "total": sums.mean(0),
            }
        if roles.texts:
            found["by_demonstration"] = _by_demonstration(sums / np.maximum(counts, 1.0), study)
        return found


def _means(seed: Records, edges: np.ndarray) -> np.ndarray:
    """Mean flow over a set of edges [prompts, L]; 0 where none is visible."""
    sums, counts = (seed[name].astype(np.float64)[..., edges].sum(-1) for name in ("sums", "counts"))
    return sums / np.maximum(counts, 1.0)


def _shares(means: Mapping[str, np.ndarray], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    total = sum(means[name] for name in names)
    return {name: means[name] / np.where(total > 0.0, total, 1.0) for name in names}


def _by_demonstration(means: np.ndarray, study: Study) -> dict[str, Any]:
    """By layer and demonstration: from its words to its label word, and from that to q."""
    roles = study.source.roles
    labels, texts = np.array(roles.labels), np.array(roles.texts)
    return {
        "text_to_label": means[..., labels, texts].mean(0),
        "label_to_query": means[..., roles.query, :][..., labels].mean(0),
    }
