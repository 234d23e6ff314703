"""How well scores tell classes apart: the area under the ROC curve, ties counted by half."""

import numpy as np
from jaxtyping import Bool, Float, Int


def auc(scores: Float[np.ndarray, " N"], positive: Bool[np.ndarray, " N"]) -> float:
    """The chance that a positive has a higher score than a negative; a tie counts a half.

    NaN where there are no positives or no negatives, or a score is NaN.
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others or np.isnan(scores).any():
        return float("nan")
    ordered = np.sort(scores[~positive])
    below = np.searchsorted(ordered, scores[positive], side="left")
    not_above = np.searchsorted(ordered, scores[positive], side="right")
    return float((below + not_above).sum() / (2.0 * count * others))


def one_vs_rest(scores: Float[np.ndarray, "N C"], classes: Int[np.ndarray, " N"]) -> float:
    """The mean, over the classes that there are, of the AUC of a class's own score for it against the others.

    NaN where there is one class alone. A class of -1 is none and is left out.
    """
    scores, classes = _with_class(scores, classes)
    there = np.unique(classes)
    if len(there) < 2:
        return float("nan")
    return float(np.mean([auc(scores[:, c], classes == c) for c in there]))


def one_vs_one(scores: Float[np.ndarray, "N C"], classes: Int[np.ndarray, " N"]) -> float:
    """The mean over pairs of the classes that there are, each pair judged by either's score (Hand and Till
    2001); a score is its share in the scores of these classes. Of two classes, by the second one's score as
    it is.

    NaN where there is one class alone. A class of -1 is none and is left out.
    """
    scores, classes = _with_class(scores, classes)
    there = np.unique(classes)
    if len(there) < 2:
        return float("nan")
    scores = scores[:, there]
    if len(there) == 2:
        return auc(scores[:, 1], classes == there[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = scores / scores.sum(1, keepdims=True)
    found = []
    for a in range(len(there)):
        for b in range(a):
            mine = (classes == there[a]) | (classes == there[b])
            one = auc(scores[mine, a], classes[mine] == there[a])
            found.append((one + auc(scores[mine, b], classes[mine] == there[b])) / 2.0)
    return float(np.mean(found))


def correlation(x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."], ranks: bool = False) -> float:
    """Pearson's correlation, or Spearman's (of mean ranks), over the places where both are numbers.

    NaN where fewer than three are, or one of the two is constant.
    """
    x, y = (np.asarray(values, np.float64).ravel() for values in (x, y))
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    if len(x) < 3:
        return float("nan")
    if ranks:
        x, y = mean_ranks(x), mean_ranks(y)
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / size) if size > 0.0 else float("nan")


def mean_ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Ranks from 1; equal values share the mean of theirs."""
    ordered = np.sort(values)
    below = np.searchsorted(ordered, values, side="left")
    return (below + np.searchsorted(ordered, values, side="right") + 1) / 2.0


def _with_class(scores: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, classes = np.asarray(scores, np.float64), np.asarray(classes)
    return scores[classes >= 0], classes[classes >= 0]
