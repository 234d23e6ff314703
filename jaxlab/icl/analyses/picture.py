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
    """Maps of the first prompt that is answered rightly, or if none is of the first that has an answer."""

    name: ClassVar[str] = "figure1"
    needs_label_words: ClassVar[bool] = False
    needs_demonstrations: ClassVar[bool] = False

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
        answers = Answers().measure(study, chunk, rng)
        predicted, label = answers["predicted"], answers["label"]
        right = predicted == label
        at = int(np.argmax(right if right.any() else predicted >= 0))
        one = chunk.select(at)
        maps = saliency_maps(study.params, one.batch, study.config, one.targets, loss=study.loss)
        names = one.label_tokens[0]
        # Among the label words, or where there are none the likeliest of all.
        said = names[predicted[at]] if study.source.label_names else answers["likeliest"][at]
        return {
            "maps": np.asarray(maps, np.float32),
            "tokens": one.batch["tokens"],
            "parts": one.parts,
            "classes": one.classes,
            "query": one.positions.reshape(-1)[:1],
            "answer": names[label[at : at + 1]],
            "prediction": np.array([said if predicted[at] >= 0 else -1], np.int32),
        }

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        one = {name: values[0] for name, values in records[study.seeds[0]].items()}
        said = [one["answer"], one["prediction"]]
        answer, prediction = (
            token_texts(np.array([x]), study.tokenizer)[0] if x >= 0 else None for x in said
        )
        return {
            "tokens": token_texts(one["tokens"], study.tokenizer),
            "labels": np.flatnonzero(one["parts"] == Part.LABEL),
            "query": int(one["query"]),
            "answer": answer,
            "prediction": prediction,
            "parts": self._parts(study, one),
            "maps": pack_maps(one["maps"]),
        }

    def _parts(self, study: Study, one: Records) -> list[str]:
        """text, image or format of each token."""
        names = study.source.roles.names
        classes = one.get("classes", np.full_like(one["parts"], -1))  # runs that were begun before have none
        image = classes == (names.index("image") if "image" in names else len(names))
        text = np.where(one["parts"] == Part.TEXT, "text", "format")
        found: list[str] = np.where(image, "image", text).tolist()
        return found
