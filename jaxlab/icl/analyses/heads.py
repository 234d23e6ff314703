"""Heads: which of them carry label flow, beside their function-vector and induction scores
(jaxlab/icl/heads.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxlab.errors import ConfigError, UserError
from jaxlab.icl.analyses.base import Analysis, Records, Study, finite_prompts, mean
from jaxlab.icl.analyses.flow_shares import FlowShares
from jaxlab.icl.compression import last_logits
from jaxlab.icl.cutting import check_one_softmax
from jaxlab.icl.heads import (
    head_outputs,
    indirect_effects,
    induction_scores,
    patched_logits,
    repeated_tokens,
    shuffled_labels,
)
from jaxlab.icl.prompts import Prompts
from jaxlab.icl.ranking import correlation
from jaxlab.icl.roles import Part
from jaxlab.icl.saliency import flows

SCORES = ("wp", "pq", "function_vector", "induction")


class Work(NamedTuple):
    """A batch, and the layers (from 0) whose heads are patched; none: flows and induction."""

    prompts: Prompts
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Heads(Analysis[Work]):
    """Flow of each head into label words and from them to the last token, its indirect effect on prompts with
    shuffled labels, and its attention to what followed before."""

    batches: int = 1
    """Batches of each seed that are looked at; function vectors take one token for each head."""
    top: int = 10
    """Heads that are listed."""

    name: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        for name in ("batches", "top"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)

    def check(self, study: Study) -> None:
        check_one_softmax(study.config, "heads: weights are read")
        if not study.source.roles.labels:
            raise UserError("heads: prompts without label words have no label flow")

    def memory(self, study: Study) -> int:
        """That of the flows; cuts and patches are forward passes."""
        return FlowShares().memory(study)

    def chunks(self, study: Study, seed: int) -> Sequence[Work]:
        batches = study.source.batches(seed, study.examples, study.batch_size)[: self.batches]
        step = max(1, 64 // study.config.num_heads)
        groups = [
            tuple(range(first, min(first + step, study.config.num_layers)))
            for first in range(0, study.config.num_layers, step)
        ]
        return [Work(one, ()) for one in batches] + [Work(one, g) for one in batches for g in groups]

    def measure(self, study: Study, chunk: Work, rng: np.random.Generator) -> Records:
        """Flows, outputs at q and induction scores of one batch."""
        prompts, config, roles = chunk.prompts, study.config, study.source.roles
        sums, _ = flows(
            study.params,
            prompts.batch,
            config,
            prompts.classes,
            prompts.targets,
            num_classes=roles.classes,
            per_head=True,
            not_finite="mark",
        )
        sets, real = roles.edge_sets(), prompts.real
        of = {name: np.asarray(sums, np.float64)[..., sets[name]].sum(-1)[real] for name in ("wp", "pq")}
        doubled = repeated_tokens(rng, config)
        outputs = head_outputs(study.params, prompts.batch, config, prompts.positions)
        return {
            **self._nothing(study),
            **of,
            "output": np.asarray(outputs, np.float32)[real],
            "induction": np.asarray(induction_scores(study.params, doubled, config))[None],
        }

    def measure_after(
        self,
        study: Study,
        seed: int,
        chunk: Work,
        rng: np.random.Generator,
        earlier: Mapping[int, Sequence[Records]],
    ) -> Records:
        if not chunk.layers:
            return self.measure(study, chunk, rng)
        prompts, config, real = chunk.prompts, study.config, chunk.prompts.real
        outputs = np.concatenate([part["output"] for part in earlier[seed]])
        means = mean(np.where(np.isfinite(outputs).all((1, 2, 3), keepdims=True), outputs, np.nan))
        shuffle = np.random.default_rng((seed, 4))  # the same for every group of layers
        words = np.where(prompts.parts == Part.LABEL, prompts.label_words, -1)
        tokens = shuffled_labels(shuffle, prompts.batch["tokens"], words, prompts.label_tokens)
        heads = range(config.num_heads)
        chosen = np.array([(layer, head) for layer in chunk.layers for head in heads], np.int32)
        plain = np.asarray(last_logits(study.params, tokens, prompts.positions, config))
        patched = patched_logits(study.params, tokens, config, prompts.positions, means, chosen)
        right = prompts.label_tokens[np.arange(len(prompts.labels)), prompts.labels]
        effects = indirect_effects(plain[real], np.asarray(patched)[:, real], right[real])
        return {**self._nothing(study), "effect": effects, "of_head": chosen}

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        shape = (study.config.num_layers, study.config.num_heads)
        scores: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
        of_flows = {s: {name: one[name] for name in ("wp", "pq")} for s, one in records.items()}
        finite, left_out = finite_prompts(of_flows, "wp", "pq")
        for number, seed in records.items():
            effects, counts = np.zeros(shape), np.zeros(shape)
            np.add.at(effects, tuple(seed["of_head"].T), seed["effect"])
            np.add.at(counts, tuple(seed["of_head"].T), 1.0)
            scores["function_vector"].append(effects / counts)
            scores["induction"].append(seed["induction"].mean(0))
            for name in ("wp", "pq"):
                total = finite[number][name].mean(0)
                scores[name].append(total / max(total.sum(), np.finfo(np.float64).tiny))
        means = {name: np.mean(values, axis=0) for name, values in scores.items()}
        order = np.argsort(-means["pq"], axis=None)[: self.top]
        top = [
            {
                "layer": int(layer) + 1,
                "head": int(head) + 1,
                "pq_share": means["pq"][layer, head],
                "wp_share": means["wp"][layer, head],
                "function_vector": means["function_vector"][layer, head],
                "induction": means["induction"][layer, head],
            }
            for layer, head in zip(*np.unravel_index(order, shape), strict=True)
        ]
        pairs = [(a, b) for a in ("pq", "wp") for b in ("function_vector", "induction")]
        pairs += [("function_vector", "induction")]
        return {
            "prompts": sum(len(seed["pq"]) for seed in finite.values()),
            "left_out": left_out,
            "scores": means,
            "correlation": {f"{a}_{b}": correlation(means[a], means[b], ranks=True) for a, b in pairs},
            "top": top,
        }

    def _nothing(self, study: Study) -> Records:
        """Every record of no prompt."""
        layers, heads = study.config.num_layers, study.config.num_heads
        return {
            "wp": np.zeros((0, layers, heads)),
            "pq": np.zeros((0, layers, heads)),
            "output": np.zeros((0, layers, heads, study.config.value_dim), np.float32),
            "induction": np.zeros((0, layers, heads), np.float32),
            "effect": np.zeros(0),
            "of_head": np.zeros((0, 2), np.int32),
        }
