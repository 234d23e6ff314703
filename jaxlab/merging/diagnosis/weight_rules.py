"""Rules on measured tensors.

The thresholds lie between what fine-tunes of one base show (cosines above 0.9, task vectors of 0.001 to 0.3
of the base's length) and what models of two origins show (cosines near 0, lengths near 1.4).
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxlab.merging.diagnosis.facts import SHOWN, Facts, Finding, likeness, matrices_of, more
from jaxlab.merging.diagnosis.measures import Side, TensorDifference, in_other_order
from jaxlab.merging.diagnosis.tokens import listed

UNLIKE = 0.5
"""Below this cosine two tensors do not come from each other."""
FAR = 0.9
"""Below this, over all matrices, a model went far from its base."""
OUTLIER = 10.0
"""A tensor that changed so many times as much as its module does in the median layer stands out."""
LOPSIDED = 10.0
"""Task vectors whose lengths differ by this factor do not meet at equal weights."""
OPPOSED, EQUAL = -0.2, 0.95
"""Cosines of task vectors."""
SCALED = 0.05
"""Of the length of a model whose direction is its base's."""


def _not_finite(facts: Facts) -> Iterator[Finding]:
    order = [*facts.compared, facts.reference]
    for index, side in enumerate(order):
        counts = {
            t.name: int(t.sums.not_finite[index]) for t in facts.measured.tensors if t.sums.not_finite[index]
        }
        if counts:
            shown = [f"{name} ({count})" for name, count in list(counts.items())[:SHOWN]]
            said = f"{side.name} holds NaN or infinite values in {', '.join(shown)}{more(list(counts))}"
            remedy = f"the file is damaged, or was overflowing when it was saved: get {side.name} again"
            yield Finding("breaks", "not_finite", said, remedy, 8, tuple(counts))


def _origins(facts: Facts) -> Iterator[Finding]:
    matrices, whole = matrices_of(facts), facts.whole
    strange = []
    for index, side in enumerate(facts.compared):
        cosine = likeness(matrices, index)
        if _moved_layers(facts, index, _strange(matrices, index)):
            continue
        told = f"cosine {cosine:.2f}, difference {whole.relative[index]:.2g} times as long as the weights"
        if cosine < UNLIKE:
            strange.append((index, side, told))
        elif cosine < FAR:
            yield Finding(
                "harms",
                "far",
                f"{side.name} went far from {facts.origin} ({told}): such task vectors seldom add up",
                "use small lambdas, or an expert that was trained for less long",
                2 - cosine,
            )
    if not strange:
        return
    if facts.has_base and len(strange) == len(facts.compared) > 1:
        between = whole.between[strange[0][0], strange[1][0]]
        if between > FAR:
            names = " and ".join(side.name for _, side, _ in strange)
            said = (
                f"{facts.origin} is not what {names} come from ({strange[0][2]}), though these two have an "
                f"origin in common (cosine {between:.2f})"
            )
            yield Finding("breaks", "origin", said, "give the base that both were fine-tuned from", 7)
            return
    for _, side, told in strange:
        said = f"{side.name} does not come from {facts.origin}: their weights have nothing in common ({told})"
        remedy = "merge models that were fine-tuned from one base, and give that base"
        yield Finding("breaks", "origin", said, remedy, 7)


def _strange(matrices: Sequence[TensorDifference], index: int) -> list[int]:
    """Layers most of whose matrices are unlike the reference's."""
    unlike: dict[int, list[bool]] = {}
    for t in matrices:
        if t.layer is not None:
            unlike.setdefault(t.layer, []).append(bool(t.sums.to_reference[index] < UNLIKE))
    return sorted(layer for layer, found in unlike.items() if 2 * sum(found) > len(found))


def _moved_layers(facts: Facts, index: int, strange: Sequence[int]) -> dict[int, int]:
    """Of strange layers those that are other layers of the reference, by sketches of their matrices."""
    return {layer: other for layer in strange if (other := _nearest(facts, index, layer)) is not None}


def _layers(facts: Facts) -> Iterator[Finding]:
    """Layers, or matrices in them, that are unlike the base's in a model that is like it elsewhere."""
    matrices = matrices_of(facts)
    for index, side in enumerate(facts.compared):
        strange = _strange(matrices, index)
        moved = _moved_layers(facts, index, strange)
        if not moved and likeness(matrices, index) < UNLIKE:
            continue  # told as a whole
        unlike = [t for t in matrices if t.sums.to_reference[index] < UNLIKE]
        if strange:
            tensors = [t for t in unlike if t.layer in strange]
            yield _strange_layers(facts, index, side, strange, moved, tensors)
        if single := [t for t in unlike if t.layer not in strange]:
            yield _strange_tensors(facts, index, side, single)


def _strange_layers(
    facts: Facts,
    index: int,
    side: Side,
    strange: list[int],
    moved: dict[int, int],
    tensors: list[TensorDifference],
) -> Finding:
    names = tuple(t.name for t in tensors)
    if moved:
        told = ", ".join(f"its layer {i} is layer {j} of {facts.reference.name}" for i, j in moved.items())
        said = f"layers of {side.name} are in another order: {told}"
        remedy = f"put the layers of {side.name} into their order, or get it again"
        return Finding("breaks", "shuffled_layers", said, remedy, 6, names)
    order = _other_order(facts, index, tensors)
    listing = ", ".join(map(str, strange))
    if order:
        said = f"layers {listing} of {side.name} have {order} in another order than {facts.origin}"
        remedy = f"convert {side.name} again: heads or neurons were permuted"
        return Finding("breaks", "permuted", said, remedy, 6, names)
    said = f"layers {listing} of {side.name} have nothing in common with those of {facts.origin}"
    remedy = f"get {side.name} again, or keep these layers out by a lambda of 0"
    return Finding("breaks", "strange_layers", said, remedy, 6, names)


def _strange_tensors(facts: Facts, index: int, side: Side, tensors: list[TensorDifference]) -> Finding:
    names = tuple(t.name for t in tensors)
    shown = f"{', '.join(names[:SHOWN])}{more(names)}"
    order = _other_order(facts, index, tensors)
    if order:
        said = f"{shown} of {side.name} have {order} in another order than {facts.origin}"
        remedy = f"convert {side.name} again: heads, rotary pairs or neurons were permuted"
        return Finding("breaks", "permuted", said, remedy, 6, names)
    said = f"{shown} of {side.name} have nothing in common with those of {facts.origin}"
    return Finding("harms", "strange_tensors", said, "keep them out by a lambda of 0", 4, names)


def _nearest(facts: Facts, index: int, layer: int) -> int | None:
    """The layer of the reference that a layer of another model is, by sketches of its matrices."""
    sketches = facts.measured.sketches
    modules = {module for module, at in sketches if at == layer}
    scores: dict[int, list[float]] = {}
    for module, other in sketches:
        if module in modules:
            x, b = sketches[module, layer][index], sketches[module, other][-1]
            if x.shape == b.shape and (size := float(np.linalg.norm(x) * np.linalg.norm(b))):
                scores.setdefault(other, []).append(float(x @ b) / size)
    if not scores:
        return None
    best = max(scores, key=lambda other: float(np.median(scores[other])))
    return best if best != layer and float(np.median(scores[best])) > UNLIKE else None


def _other_order(facts: Facts, index: int, tensors: Sequence[TensorDifference]) -> str:
    """rows or columns, where the first few of these tensors have theirs in another order; else ""."""
    at = facts.sides.index(facts.compared[index])
    base = facts.sides.index(facts.reference)
    said: dict[str, None] = {}
    for tensor in tensors[:SHOWN]:
        held = facts.tensors[tensor.name]
        if order := in_other_order(held[at], held[base]):
            said[order] = None
    return " and ".join(said)


def _outliers(facts: Facts) -> Iterator[Finding]:
    """Tensors that changed far more than their module did elsewhere."""
    groups: dict[str, list[TensorDifference]] = {}
    for t in facts.measured.tensors:
        if t.layer is not None:
            groups.setdefault(t.module, []).append(t)
    for index, side in enumerate(facts.compared):
        found = {}
        for tensors in groups.values():
            sizes = np.array([t.sums.relative[index] for t in tensors])
            usual = float(np.nanmedian(sizes)) if len(sizes) > 2 and not np.isnan(sizes).all() else math.nan
            for t, size in zip(tensors, sizes, strict=True):
                like = t.sums.to_reference[index]
                if usual > 0 and size > OUTLIER * usual and size > 0.3 and not like < UNLIKE:
                    found[t.name] = size / usual
        if found:
            worst = sorted(found, key=lambda name: -found[name])
            shown = [f"{name} ({found[name]:.0f} times)" for name in worst[:SHOWN]]
            said = (
                f"tensors of {side.name} changed far more than the same ones of other layers: "
                f"{', '.join(shown)}{more(worst)}"
            )
            yield Finding(
                "harms", "outliers", said, "look at how they were trained, or give them a smaller lambda",
                found[worst[0]] / OUTLIER, tuple(worst),
            )  # fmt: skip


def _zeros(facts: Facts) -> Iterator[Finding]:
    for index, side in enumerate(facts.compared):
        names = tuple(
            t.name
            for t in facts.measured.tensors
            if t.matrix and t.sums.reference > 0 and t.sums.squares[index] <= 1e-12 * t.sums.reference
        )
        if names:
            said = f"{side.name} is zero in {', '.join(names[:SHOWN])}{more(names)}"
            remedy = "keep these tensors out (embeddings: vlm for a head), or they pull towards zero"
            yield Finding("harms", "zeros", said, remedy, 3, names)


def _lengths(facts: Facts) -> Iterator[Finding]:
    whole, compared = facts.whole, facts.compared
    for index, side in enumerate(compared):
        scale = math.sqrt(whole.squares[index] / whole.reference) if whole.reference else 1.0
        if abs(scale - 1) > SCALED and whole.to_reference[index] > 1 - SCALED**2 / 8:
            said = (
                f"the weights of {side.name} are {scale:.2f} times those of {facts.origin}, in one direction"
            )
            yield Finding("harms", "scaled", said, f"find out what scaled {side.name}, and undo it", 3)
    if not facts.has_base:
        return
    lengths = {side.name: whole.norms[i] for i, side in enumerate(compared) if whole.norms[i]}
    if len(lengths) > 1:
        long, short = max(lengths, key=lengths.__getitem__), min(lengths, key=lengths.__getitem__)
        factor = lengths[long] / lengths[short]
        if factor > LOPSIDED:
            said = f"the task vector of {long} is {factor:.0f} times as long as that of {short}"
            remedy = (
                f"at equal lambdas {short} hardly counts: search over its lambda up to {factor:.0f} and more"
            )
            yield Finding("note", "lopsided", said, remedy, factor)


def _directions(facts: Facts) -> Iterator[Finding]:
    if not facts.has_base:
        return
    cosines, compared = facts.whole.cosines, facts.compared
    for i in range(len(compared)):
        for j in range(i + 1, len(compared)):
            names = f"{compared[i].name} and {compared[j].name}"
            if cosines[i, j] < OPPOSED:
                said = f"the task vectors of {names} point away from each other (cosine {cosines[i, j]:.2f})"
                yield Finding(
                    "harms", "opposed", said, "what one learned the other unlearned: merge other models", 1
                )
            elif cosines[i, j] > EQUAL:
                said = f"the task vectors of {names} are nearly the same (cosine {cosines[i, j]:.2f})"
                yield Finding("note", "equal", said, "a merge adds hardly anything; their lambdas add up", 1)


def _unchanged(facts: Facts) -> Iterator[Finding]:
    for index, side in enumerate(facts.compared):
        if facts.whole.changed[index] == 0:
            said = f"the language model of {side.name} is that of {facts.origin}, bit for bit"
            yield Finding("note", "unchanged", said, "its task vector is zero: its lambda has no effect", 2)


def _embeddings(facts: Facts) -> Iterator[Finding]:
    """Rows of tokens that do not stand where they stood, in a model whose layers did not move so."""
    rows, matrices = facts.measured.rows, matrices_of(facts)
    if rows is None:
        return
    for index, side in enumerate(facts.compared):
        cosines = rows.cosines[index]
        known = cosines[~np.isnan(cosines)]
        if not len(known) or likeness(matrices, index) < UNLIKE:
            continue
        strange = np.flatnonzero(cosines < UNLIKE)
        if 2 * len(strange) > len(known):
            said = (
                f"the embedding of {side.name} has other rows than that of {facts.origin}: "
                f"{len(strange):,} of {len(known):,} have nothing in common with those of the same id"
            )
            remedy = "use embeddings: vlm; without the rows that its layers were trained on an expert is lost"
            yield Finding("breaks", "embedding", said, remedy, 5)
        elif len(strange):
            words = _words(facts, strange)
            said = (
                f"{len(strange):,} rows of {side.name}'s embedding have nothing in common with those of "
                f"{facts.origin}: {words}"
            )
            yield Finding("harms", "embedding_rows", said, "use embeddings: vlm, or merge_common_rows", 2)


def _words(facts: Facts, ids: np.ndarray) -> str:
    tokenizer = None if any(t.problem for t in facts.tokens) else facts.sides[0].model.tokenizer
    words = [(tokenizer and tokenizer.id_to_token(int(i))) or f"id {i}" for i in ids]
    return listed(words)


RULES = (_not_finite, _origins, _layers, _outliers, _zeros, _lengths, _directions, _unchanged, _embeddings)
