"""Dense float64 oracle of Native Sparse Attention in numpy: masks of queries times keys and plain loops.

Written from the definitions, without a line of the package under test. Everything is one row of a batch.
"""

import numpy as np


def visible_tokens(length, segments=None, positions=None):
    """bool [T, S]: token s may be seen from query t."""
    queries = np.arange(length) if positions is None else np.asarray(positions)
    mask = queries[:, None] >= np.arange(length)[None, :]
    if segments is not None:
        segments = np.asarray(segments)
        mask &= (segments[queries][:, None] == segments[None, :]) & (segments[None, :] != 0)
    return mask


def visible_blocks(tokens, block_len, stride):
    """bool [T, M] from `visible_tokens`: every token of the block may be seen."""
    starts = range(0, tokens.shape[1] - block_len + 1, stride)
    columns = [tokens[:, start : start + block_len].all(axis=1) for start in starts]
    return np.stack(columns, axis=1) if columns else np.zeros((len(tokens), 0), bool)


def compress(x, params, block_len, stride):
    """[S, Hkv, D] -> [M, Hkv, D], block by block."""
    blocks = []
    for start in range(0, x.shape[0] - block_len + 1, stride):
        tokens = x[start : start + block_len] + params["position"][:, None, :]
        hidden = np.einsum("jhd,jdf->hf", tokens, params["hidden"]) + params["hidden_bias"]
        hidden = hidden / (1 + np.exp(-hidden))
        blocks.append(hidden @ params["output"] + params["output_bias"])
    return np.stack(blocks) if blocks else np.zeros((0, *x.shape[1:]))


def softmax(q, k, mask, scale):
    """q [T, D], k [S, D], mask [T, S] -> weights [T, S]; all zeros where nothing is visible."""
    scores = np.where(mask, q @ k.T * scale, -np.inf)
    top = np.max(scores, axis=1, initial=-1e30, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    return weights / np.where(total == 0, 1.0, total)


def attend(q, k, v, mask, scale, d_out):
    """One head: its output [T, Dv], and the gradients of sum(output * d_out) for q, k, v."""
    weights = softmax(q, k, mask, scale)
    d_weights = d_out @ v.T
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True)) * scale
    return weights @ v, d_scores @ k, d_scores.T @ q, weights.T @ d_out


def importance(weights, length, block_len, stride, block_size):
    """[T, M] -> [T, N]: a compressed block gives a selection block its weight times the tokens they share."""
    weights = np.asarray(weights, np.float64)
    scores = np.zeros((weights.shape[0], -(-length // block_size)))
    for i in range(weights.shape[1]):
        for token in range(i * stride, i * stride + block_len):
            scores[:, token // block_size] += weights[:, i]
    return scores / stride


def choose(scores, tokens, positions, block_size, num_blocks, num_init, num_local):
    """By brute force: the forced blocks, then one at a time the best, the lowest among equals."""
    chosen = []
    for t in range(scores.shape[0]):
        candidates = sorted({int(s) // block_size for s in np.flatnonzero(tokens[t])})
        if not candidates:
            chosen.append([])
            continue
        first, newest = candidates[0], int(positions[t]) // block_size
        forced = [j for j in candidates if j < first + num_init or j > newest - num_local]
        rest = [j for j in candidates if j not in forced]
        rest.sort(key=lambda j, t=t: (-scores[t, j], j))
        chosen.append(sorted((forced + rest)[:num_blocks]))
    return chosen


def brute_force_choice(q, k_cmp, length, sizes, segments=None, positions=None):
    """Chosen blocks [Hkv][T] as lists, and the importances [Hkv][T, N] they were chosen by."""
    q, k_cmp = np.asarray(q, np.float64), np.asarray(k_cmp, np.float64)
    kv_heads, scale = k_cmp.shape[1], q.shape[-1] ** -0.5
    groups = q.shape[1] // kv_heads
    places = np.arange(length) if positions is None else np.asarray(positions)
    tokens = visible_tokens(length, segments, positions)
    mask = visible_blocks(tokens, sizes["block_len"], sizes["stride"])
    geometry = [sizes[name] for name in ("block_len", "stride", "block_size")]
    rule = [sizes[name] for name in ("block_size", "num_blocks", "num_init", "num_local")]
    chosen, all_scores = [], []
    for group in range(kv_heads):
        heads = range(group * groups, (group + 1) * groups)
        weights = sum(softmax(q[:, head], k_cmp[:, group], mask, scale) for head in heads)
        all_scores.append(importance(weights, length, *geometry))
        chosen.append(choose(all_scores[-1], tokens, places, *rule))
    return chosen, all_scores


def nsa(a, indices, sizes, d_outputs, segments=None, positions=None):
    """a: q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates of one row; indices [Hkv, T, n] of its blocks.

    Returns (total, compression, selection, window), each [T, H, Dv], and the gradients of
    sum over the four of (output * d_output) for everything in `a`.
    """
    length, kv_heads = a["k_slc"].shape[:2]
    heads, scale = a["q"].shape[1], a["q"].shape[-1] ** -0.5
    places = np.arange(length) if positions is None else np.asarray(positions)
    tokens = visible_tokens(length, segments, positions)
    blocks = visible_blocks(tokens, sizes["block_len"], sizes["stride"])
    age = places[:, None] - np.arange(length)[None, :]
    gradients = {name: np.zeros_like(x) for name, x in a.items()}
    outputs = [np.zeros_like(d) for d in d_outputs]
    for head in range(heads):
        group = head // (heads // kv_heads)
        chosen = np.zeros_like(tokens)
        for t, row in enumerate(indices[group]):
            for j in row[row >= 0]:
                chosen[t, j * sizes["block_size"] : (j + 1) * sizes["block_size"]] = True
        masks = {"cmp": blocks, "slc": tokens & chosen, "win": tokens & (age < sizes["window"])}
        for c, (name, mask) in enumerate(masks.items()):
            k, v = a[f"k_{name}"][:, group], a[f"v_{name}"][:, group]
            gate = a["gates"][:, head, c, None]
            d_out = d_outputs[c + 1][:, head] + gate * d_outputs[0][:, head]
            out, dq, dk, dv = attend(a["q"][:, head], k, v, mask, scale, d_out)
            outputs[c + 1][:, head] = out
            outputs[0][:, head] += gate * out
            gradients["q"][:, head] += dq
            gradients[f"k_{name}"][:, group] += dk
            gradients[f"v_{name}"][:, group] += dv
            gradients["gates"][:, head, c] = (out * d_outputs[0][:, head]).sum(axis=1)
    return outputs, gradients


def batched_nsa(args, indices, sizes, d_outputs, segments=None, positions=None):
    """`nsa` of every row, in float64."""
    args = {name: np.asarray(x, np.float64) for name, x in args.items()}
    d_outputs = [np.asarray(x, np.float64) for x in d_outputs]
    rows = []
    for b in range(args["q"].shape[0]):
        places = [None if x is None else np.asarray(x)[b] for x in (segments, positions)]
        row = {name: x[b] for name, x in args.items()}
        rows.append(nsa(row, np.asarray(indices)[b], sizes, [d[b] for d in d_outputs], *places))
    outputs = [np.stack(column) for column in zip(*(row[0] for row in rows), strict=True)]
    return outputs, {name: np.stack([row[1][name] for row in rows]) for name in args}
