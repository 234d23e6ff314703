"""Outputs of every analysis on a random GPT-2, in float64, by torch and from the formulas; see README.md.

python make.py        writes golden.json

The model is that of the golden case families/gpt2. Attention is written out here, with a matrix of factors
for each layer and head, logits set to a value, and weights kept for their gradients; nothing of this project
is imported but its golden weights.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

HERE = Path(__file__).parent
FAMILIES = HERE.parent / "families"
sys.path.insert(0, str(FAMILIES))

from make import CASES, load  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from weights import weights  # noqa: E402

PROMPTS, LENGTH, START, LABELS = 14, 21, 15, 3
LAYERS, HEADS, WORDS = 3, 3, 113
LABEL_TOKENS = [91, 75, 30]
SEEDS, LESSON, EPOCHS, RATE = 2, 6, 2, 0.01


class Seam:
    """What the written-out attention does in each layer."""

    def __init__(self) -> None:
        self.factors: torch.Tensor | None = None
        """[L, B, H, T, T], times the weights after the softmax."""
        self.hidden: torch.Tensor | None = None
        """bool [B, T, T]: edges that are not there."""
        self.released: torch.Tensor | None = None
        """bool [L, B, T, T]: edges whose logits are -10000."""
        self.outputs: dict[tuple[int, int], torch.Tensor] = {}
        """(layer, head): its output at q."""
        self.weights: list[torch.Tensor] = []
        self.queries: list[torch.Tensor] = []
        self.keys: list[torch.Tensor] = []
        self.heads: list[torch.Tensor] = []


SEAM = Seam()


def written_out(module, query, key, value, attention_mask=None, scaling=None, **_):
    layer, length = module.layer_idx, query.shape[2]
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if SEAM.released is not None:
        scores = torch.where(
            SEAM.released[layer][:, None], torch.tensor(-10000.0, dtype=scores.dtype), scores
        )
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if SEAM.hidden is not None:
        seen = seen & ~SEAM.hidden[:, None]
    weight = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
    if SEAM.factors is not None:
        weight = weight * SEAM.factors[layer]
    if weight.requires_grad:
        weight.retain_grad()
    SEAM.weights.append(weight)
    SEAM.queries.append(query.detach())
    SEAM.keys.append(key.detach())
    out = weight @ value
    SEAM.heads.append(out.detach())
    for (where, head), new in SEAM.outputs.items():
        if where == layer:
            out = out.clone()
            out[:, head, -1] = new
    return out.transpose(1, 2), weight


def run(model, tokens, **changes):
    """Logits [B, T, V] under some changes."""
    SEAM.__init__()
    for name, value in changes.items():
        setattr(SEAM, name, value)
    return model(torch.as_tensor(tokens), use_cache=False).logits


def prompts():
    """Random tokens; label words at 4, 9, 14 in another order for each prompt, format tokens before and after
    them and at the start; the query is from START on, q the last."""
    rng = np.random.default_rng(11)
    tokens = rng.integers(0, WORDS, (PROMPTS, LENGTH))
    tokens[:, :START] = tokens[:1, :START]
    words = np.full((PROMPTS, LENGTH), -1)
    order = rng.permutation(LABELS)
    for place, label in zip((4, 9, 14), order, strict=True):
        tokens[:, place], words[:, place] = LABEL_TOKENS[label], label
    anchors = np.zeros(LENGTH, bool)
    anchors[[0, 3, 4, 5, 8, 9, 10, 13, 14]] = True
    return tokens, words, anchors, rng.integers(0, LABELS, PROMPTS)


def label_logits(logits):
    return logits[:, -1, LABEL_TOKENS].detach().numpy()


def attention(logits, words):
    of_q = torch.stack([w[:, :, -1].sum(1) for w in SEAM.weights], 1).detach().numpy()  # [B, L, T]
    scores = np.stack([(of_q * (words == c)[:, None]).sum(-1) for c in range(LABELS)], -1)
    predicted = label_logits(logits).argmax(-1)
    there = np.unique(predicted)
    rest, one = [], []
    for layer in range(LAYERS):
        s = scores[:, layer]
        rest.append(np.mean([roc_auc_score(predicted == c, s[:, c]) for c in there]))
        share = s[:, there]
        if len(there) == 2:
            one.append(roc_auc_score(predicted == there[1], share[:, 1]))
        else:
            share = share / share.sum(-1, keepdims=True)
            one.append(roc_auc_score(predicted, share, multi_class="ovo"))
    accumulated = np.cumsum(np.array(rest) - 0.5) / np.sum(np.array(rest) - 0.5)
    return {
        "scores": scores,
        "predicted": predicted,
        "one_vs_rest": rest,
        "one_vs_one": one,
        "r": accumulated,
    }


def reweighting(model, tokens, words, labels):
    lessons, betas, losses = np.zeros((SEEDS, LESSON), int), [], []
    for seed in range(SEEDS):
        lessons[seed] = np.arange(seed * LESSON, (seed + 1) * LESSON)
        beta = torch.zeros(LAYERS, HEADS, LABELS, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([beta], lr=RATE)
        order, told = np.random.default_rng((seed, 3)), []
        for _ in range(EPOCHS):
            of_epoch = []
            for number in order.permutation(LESSON):
                at = int(lessons[seed][number])
                factors = torch.ones(LAYERS, 1, HEADS, LENGTH, LENGTH, dtype=torch.float64)
                for place in np.flatnonzero(words[at] >= 0):
                    factors[:, 0, :, -1, place] = beta[:, :, words[at, place]].exp()
                logits = run(model, tokens[at : at + 1], factors=factors)[:, -1, LABEL_TOKENS]
                loss = torch.nn.functional.cross_entropy(logits, torch.tensor([int(labels[at])]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                of_epoch.append(loss.item())
            told.append(np.mean(of_epoch))
        betas.append(beta.detach().numpy())
        losses.append(told)
    factors = torch.ones(LAYERS, PROMPTS, HEADS, LENGTH, LENGTH, dtype=torch.float64)
    for row in range(PROMPTS):
        for place in np.flatnonzero(words[row] >= 0):
            factors[:, row, :, -1, place] = torch.as_tensor(betas[0][:, :, words[row, place]]).exp()
    after = label_logits(run(model, tokens, factors=factors))
    return {"lessons": lessons, "beta": np.stack(betas), "losses": np.array(losses).T, "logits": after}


def compression(model, tokens, words, anchors):
    """The query sees of the demonstrations what is kept; they see each other as ever."""
    full = run(model, tokens)[:, -1]

    def kept(which):
        hidden = torch.zeros(PROMPTS, LENGTH, LENGTH, dtype=torch.bool)
        hidden[:, START:, :START] = ~torch.as_tensor(which[:, None, :START])
        return run(model, tokens, hidden=hidden)[:, -1]

    anchor = kept(np.tile(anchors, (PROMPTS, 1)))
    instead = np.tile(anchors, (PROMPTS, 1))
    instead[:, [4, 9, 14]] = False
    instead[:, [1, 6, 12]] = True
    text = np.concatenate([tokens[:, :START][:, anchors[:START]], tokens[:, START:]], 1)
    results = {"hidden_anchor": anchor, "random": kept(instead), "text_anchor": run(model, text)[:, -1]}
    told = {"random_places": np.flatnonzero(instead[0, :START])}
    best = full.topk(5).indices.tolist()
    for name, logits in results.items():
        mine = logits.topk(5).indices.tolist()
        jaccard = [len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in zip(mine, best, strict=True)]
        loyal = logits[:, LABEL_TOKENS].argmax(-1) == full[:, LABEL_TOKENS].argmax(-1)
        told[name] = {
            "logits": logits[:, LABEL_TOKENS].detach().numpy(),
            "word_loyalty": jaccard,
            "label_loyalty": loyal.double().mean().item(),
        }
    return told


def diagnosis(logits, words, labels):
    place = [int(np.flatnonzero(words[0] == c)[0]) for c in range(LABELS)]
    told = {"predicted": []}
    for layer in range(LAYERS):
        flat = lambda x: x.reshape(x.shape[0], -1).numpy()
        queries = flat(SEAM.queries[layer][:, :, -1])
        keys = flat(SEAM.keys[layer][0][:, place].transpose(0, 1))
        pca = PCA(n_components=10, svd_solver="full").fit(queries)
        features = keys @ pca.components_.T * pca.explained_variance_**0.5
        distance = np.linalg.norm(features[:, None] - features[None], axis=-1)
        told["predicted"].append(distance / distance.max())
    probability = torch.softmax(torch.as_tensor(label_logits(logits)), -1).numpy()
    real = np.ones((LABELS, LABELS))
    for i in range(LABELS):
        for j in range(LABELS):
            if i != j:
                mine = (labels == i) | (labels == j)
                share = probability[mine, i] / (probability[mine, i] + probability[mine, j])
                real[i, j] = roc_auc_score(labels[mine] == i, share)
    return {**told, "real": real}


def cutting(model, tokens, words):
    """Label words cut off in the first layer, or what flows from them, or to q alone."""
    told = {}
    label = torch.as_tensor(words >= 0)
    below = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)[None]
    last = torch.zeros(LENGTH, dtype=torch.bool)
    last[-1] = True
    edges = {
        "into": label[:, :, None] & below,
        "from": label[:, None] & below,
        "to_last": label[:, None] & last[None, :, None] & below,
    }
    for name, cut in edges.items():
        factors = torch.ones(LAYERS, PROMPTS, HEADS, LENGTH, LENGTH, dtype=torch.float64)
        factors[:2] *= (~cut).double()[None, :, None]
        told[name] = label_logits(run(model, tokens, factors=factors))
    released = torch.zeros(LAYERS, PROMPTS, LENGTH, LENGTH, dtype=torch.bool)
    released[:2] = edges["into"]
    told["into_released_code"] = label_logits(run(model, tokens, released=released))
    return told


def flow(model, tokens, words, labels):
    """Saliency by head, summed over pairs of classes (0 text, 1 label words, 2 q), and what cutting the edges
    of each pair in each layer does to the loss."""
    leaves = [p.requires_grad_(True) for p in model.parameters()]
    logits = run(model, tokens)
    target = torch.as_tensor(labels)
    torch.nn.functional.cross_entropy(logits[:, -1, LABEL_TOKENS], target, reduction="sum").backward()
    saliency = torch.stack([(w * w.grad).detach() for w in SEAM.weights], 1).numpy()  # [B, L, H, T, T]
    for leaf in leaves:
        leaf.requires_grad_(False)
    classes = (words >= 0).astype(int)
    classes[:, -1] = 2
    one_hot = np.eye(3)[classes]
    below = np.tri(LENGTH, k=-1)
    by_pair = lambda x, f: np.einsum(f"{f},bix,bjy->{f[:-2]}xy", x * below, one_hot, one_hot)
    heads, whole = by_pair(np.abs(saliency), "blhij"), by_pair(np.abs(saliency.sum(2)), "blij")
    loss = lambda x: torch.nn.functional.cross_entropy(x[:, -1, LABEL_TOKENS], target, reduction="none")
    plain, effects = loss(logits).detach(), np.zeros((LAYERS, 3, 3, PROMPTS))
    at = torch.as_tensor(one_hot, dtype=torch.float64)
    for layer in range(LAYERS):
        for i in range(3):
            for j in range(3):
                cut = at[:, :, None, i] * at[:, None, :, j] * torch.as_tensor(below)[None]
                factors = torch.ones(LAYERS, PROMPTS, HEADS, LENGTH, LENGTH, dtype=torch.float64)
                factors[layer] *= 1.0 - cut[:, None]
                effects[layer, i, j] = (loss(run(model, tokens, factors=factors)) - plain).numpy()
    return {"heads": heads.sum(0), "whole": whole.sum(0), "effects": effects.mean(-1)}


def heads(model, tokens, labels):
    rng = np.random.default_rng(5)
    once = rng.integers(0, WORDS, (2, 10))
    doubled = np.concatenate([once, once], 1)
    run(model, doubled)
    rows = np.arange(10, 19)
    induction = [w[:, :, rows, rows - 9].mean((0, 2)).numpy() for w in SEAM.weights]
    run(model, tokens)
    means = [h[:, :, -1].mean(0) for h in SEAM.heads]  # [H, D] of each layer
    other = tokens.copy()
    other[:, [4, 9, 14]] = np.roll(other[:, [4, 9, 14]], 1, axis=1)
    right = [LABEL_TOKENS[label] for label in labels]
    likely = lambda x: torch.softmax(x[:, -1], -1)[np.arange(PROMPTS), right]
    plain = likely(run(model, other))
    effects = np.zeros((LAYERS, HEADS))
    for layer in range(LAYERS):
        for head in range(HEADS):
            now = likely(run(model, other, outputs={(layer, head): means[layer][head]}))
            effects[layer, head] = (now - plain).mean().item()
    return {"doubled": doubled, "induction": induction, "shuffled": other, "indirect_effects": effects}


def plain_types(x):
    if isinstance(x, dict):
        return {name: plain_types(value) for name, value in x.items()}
    if isinstance(x, np.ndarray | np.generic):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [plain_types(value) for value in x]
    return float(f"{x:.9g}") if isinstance(x, float) else x


def main() -> None:
    transformers.AttentionInterface.register("written_out", written_out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text((FAMILIES / "gpt2" / "config.json").read_text())
        save_file(weights(FAMILIES / "gpt2"), folder / "model.safetensors", {"format": "pt"})
        model = load(CASES["gpt2"], folder).double().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tokens, words, anchors, labels = prompts()
    model.set_attn_implementation("eager")
    eager = model(torch.as_tensor(tokens), use_cache=False).logits
    model.set_attn_implementation("written_out")
    logits = run(model, tokens)
    assert torch.allclose(logits, eager, rtol=1e-10, atol=1e-10)
    assert len(SEAM.weights) == LAYERS
    found = {
        "tokens": tokens,
        "label_words": words,
        "anchors": np.flatnonzero(anchors),
        "start": START,
        "label_tokens": LABEL_TOKENS,
        "labels": labels,
        "label_logits": label_logits(logits),
        "attention": attention(logits, words),
        "diagnosis": diagnosis(logits, words, labels),
    }
    found["reweighting"] = reweighting(model, tokens, words, labels)
    found["compression"] = compression(model, tokens, words, anchors)
    found["cutting"] = cutting(model, tokens, words)
    found["flow"] = flow(model, tokens, words, labels)
    found["heads"] = heads(model, tokens, labels)
    assert len(set(found["attention"]["predicted"].tolist())) == LABELS, found["attention"]["predicted"]
    (HERE / "golden.json").write_text(json.dumps(plain_types(found)) + "\n")


if __name__ == "__main__":
    main()
