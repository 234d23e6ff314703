"""The paper's figure 1: the flows of one prompt, token by token, in every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxlab.errors import UserError
from jaxlab.icl.analyses.answers import Answers
from jaxlab.icl.analyses.base import Analysis, Records, Study
from jaxlab.icl.packed_maps import pack_maps
from jaxlab.icl.prompts import Prompts, token_texts
from jaxlab.icl.roles import Part
from jaxlab.icl.saliency import saliency_maps

PICTURE_TOKENS = 512
"""Longest prompt whose maps go into results.json."""


@dataclass(frozen=True)
class Picture(Analysis[Prompts]):
    """Maps of the first prompt that is answered rightly, or of the very first if none is."""

    name: ClassVar[str] = "figure1"
    needs_label_words: ClassVar[bool] = False

    def check(self, study: Study) -> None:
        length = self.chunks(study, study.seeds[0])[0].parts.shape[1]
        if length > PICTURE_TOKENS:
            raise UserError(
                f"analyses: figure1 draws prompts of at most {PICTURE_TOKENS} tokens, these have {length}"
            )

    def chunks(self, study: Study, seed: int) -> Sequence[Prompts]:
        first = seed == study.seeds[0]
        return study.source.batches(seed, study.examples, study.batch_size)[:1] if first else []

    def measure(self, study: Study, chunk: Prompts, rng: np.random.Generator) -> Records:
        predicted = Answers().measure(study, chunk, rng)["predicted"]
        at = int(np.argmax(predicted == chunk.labels))  # the first right one, or 0
        one = chunk.select(at)
        maps = np.asarray(saliency_maps(study.params, one.batch, study.config, one.targets), np.float32)
        return {
            "maps": maps,
            "tokens": one.batch["tokens"],
            "parts": one.parts,
            "query": one.positions,
            "names": one.label_tokens,
            "label": one.labels,
            "predicted": predicted[at : at + 1],
        }

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        one = {name: values[0] for name, values in records[study.seeds[0]].items()}
        names = token_texts(one["names"], study.tokenizer)
        predicted = int(one["predicted"])
        return {
            "tokens": token_texts(one["tokens"], study.tokenizer),
            "labels": np.flatnonzero(one["parts"] == Part.LABEL),
            "query": int(one["query"]),
            "parts": ["text" if part == Part.TEXT else "format" for part in one["parts"]],
            "answer": names[int(one["label"])],
            "prediction": names[predicted] if predicted >= 0 else None,
            "maps": pack_maps(one["maps"]),
        }
