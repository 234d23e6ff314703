"""Whether flows tell what their edges do: each layer's edges between two classes of tokens are cut, and the
change of the loss is set beside their flow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxlab.errors import ConfigError, UserError
from jaxlab.icl.analyses.base import PromptAnalysis, Records, Study, deviation, finite_prompts
from jaxlab.icl.analyses.flow_shares import FlowShares
from jaxlab.icl.cutting import (
    check_one_softmax,
    cut_logits,
    faithfulness,
    label_loss,
    single_cuts,
    vocabulary_loss,
)
from jaxlab.icl.prompts import Prompts
from jaxlab.icl.ranking import correlation
from jaxlab.icl.saliency import flows


@dataclass(frozen=True)
class Faithfulness(PromptAnalysis):
    """Correlation of the flow between two classes of tokens in a layer with what cutting it does to the loss:
    a forward pass for each layer and pair of classes. The loss is that of the flows: among the label words,
    or of prompts without them over the vocabulary."""

    batches: int = 1
    """Batches of each seed that are looked at."""
    layers: tuple[int, ...] = ()
    """Layers whose edges are cut, counted from 1; by default all."""

    name: ClassVar[str] = "faithfulness"
    needs_label_words: ClassVar[bool] = False
    needs_demonstrations: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ConfigError(f"must be at least 1, is {self.batches}", key="batches")
        if any(n < 1 for n in self.layers):
            raise ConfigError(f"are counted from 1, are {list(self.layers)}", key="layers")

    def check(self, study: Study) -> None:
        check_one_softmax(study.config, "faithfulness: edges are cut")
        layers = study.config.num_layers
        if any(n > layers for n in self.layers):
            raise UserError(f"faithfulness.layers: the model has {layers} layers, not {max(self.layers)}")
        if any(chunk.positions.ndim > 1 for seed in study.seeds for chunk in self.chunks(study, seed)):
            raise UserError("faithfulness: of answers of one token; set data.answer_tokens to 1")

    def memory(self, study: Study) -> int:
        """That of the flows; cuts and patches are forward passes."""
        return FlowShares().memory(study)

    def chunks(self, study: Study, seed: int) -> Sequence[Prompts]:
        return study.source.batches(seed, study.examples, study.batch_size)[: self.batches]

    def measure(self, study: Study, chunk: Prompts, rng: np.random.Generator) -> Records:
        count = study.source.roles.classes
        sums, edges = flows(
            study.params,
            chunk.batch,
            study.config,
            chunk.classes,
            chunk.targets,
            loss=study.loss,
            num_classes=count,
            not_finite="mark",
        )
        visible = np.asarray(edges)[chunk.real].sum(0) > 0
        if self.layers:
            visible &= np.isin(np.arange(len(visible)) + 1, self.layers)[:, None, None]
        cut = np.concatenate([np.zeros((1, *visible.shape), bool), single_cuts(visible)])
        classes = np.broadcast_to(chunk.classes, (len(cut), *chunk.classes.shape))
        logits = cut_logits(study.params, chunk.batch, chunk.positions, classes, cut, study.config)
        of_loss = label_loss if study.loss == "labels" else vocabulary_loss
        loss = of_loss(np.asarray(logits), chunk.label_tokens, chunk.labels)
        effects = np.full((len(chunk.labels), *visible.shape), np.nan)
        effects[:, visible] = (loss[1:] - loss[0]).T
        return {"flow": np.asarray(sums, np.float64), "effect": effects, "edges": np.asarray(edges)}

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        records, left_out = finite_prompts(records, "flow")
        found = [_of_prompts(seed["flow"], seed["effect"]) for seed in records.values()]
        flow, effect = (
            np.concatenate([seed[name] for seed in records.values()]) for name in ("flow", "effect")
        )
        mean = {"flow": flow.mean(0), "effect": np.abs(effect).mean(0)}  # NaN: not cut
        by_layer = [correlation(f, e, ranks=True) for f, e in zip(mean["flow"], mean["effect"], strict=True)]
        return {
            "prompts": len(flow),
            "left_out": left_out,
            "classes": list(study.source.roles.names),
            "of_means": faithfulness(mean["flow"], mean["effect"]),
            "of_prompts": {name: float(np.nanmean([x[name] for x in found])) for name in found[0]},
            "of_prompts_std": {name: deviation(np.array([x[name] for x in found])) for name in found[0]},
            "spearman_by_layer": by_layer,
            **mean,
        }


def _of_prompts(flow: np.ndarray, effect: np.ndarray) -> dict[str, float]:
    """Means over the prompts of a seed; a prompt without an effect counts nowhere."""
    each = [faithfulness(f, e) for f, e in zip(flow, effect, strict=True)]
    return {name: _mean([x[name] for x in each]) for name in ("pearson", "spearman")}


def _mean(values: Sequence[float]) -> float:
    known = [x for x in values if np.isfinite(x)]
    return float(np.mean(known)) if known else float("nan")
