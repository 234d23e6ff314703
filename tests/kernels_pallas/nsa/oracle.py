"""Dense float64 oracle of Native Sparse Attention in numpy: masks of queries times keys and plain loops.

Written from the definitions, without a line of the package under test. Everything is one row of a batch.
"""

import numpy as np


def texts(length, segments=None):
    """[(first row, end)] of the texts of a row: stretches of one segment that is not 0."""
    if segments is None:
        return [(0, length)]
    segments, found, start = np.asarray(segments), [], 0
    for row in range(1, length + 1):
        if row == length or segments[row] != segments[start]:
            if segments[start] != 0:
                found.append((start, row))
            start = row
    return found


def text_of(length, segments=None):
    """int [S]: first row of each row's text; -1 for padding."""
    start = np.full(length, -1)
    for begin, end in texts(length, segments):
        start[begin:end] = begin
    return start


def visible_tokens(length, segments=None, positions=None):
    """bool [T, S]: token s may be seen from query t."""
    queries = np.arange(length) if positions is None else np.asarray(positions)
    mask = queries[:, None] >= np.arange(length)[None, :]
    if segments is not None:
        segments = np.asarray(segments)
        mask &= (segments[queries][:, None] == segments[None, :]) & (segments[None, :] != 0)
    return mask


def compressed_slots(length, block_len, stride, segments=None):
    """{slot: first row of its block}: of a text from row s on, block i lies in slot ceil(s / stride) + i."""
    slots = {}
    for begin, end in texts(length, segments):
        for i, start in enumerate(range(begin, end - block_len + 1, stride)):
            slot = -(-begin // stride) + i
            assert slot not in slots
            slots[slot] = start
    return slots


def number_of_slots(length, block_len, stride, segments=None):
    """Of an unpacked row so many as blocks; of a packed one enough for any texts."""
    if length < block_len:
        return 0
    return 1 + (length - block_len + (stride - 1 if segments is not None else 0)) // stride


def visible_blocks(tokens, block_len, stride, segments=None):
    """bool [T, M] from `visible_tokens`: every token of the slot's block may be seen."""
    length = tokens.shape[1]
    mask = np.zeros((len(tokens), number_of_slots(length, block_len, stride, segments)), bool)
    for slot, start in compressed_slots(length, block_len, stride, segments).items():
        mask[:, slot] = tokens[:, start : start + block_len].all(axis=1)
    return mask


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


def log_sum_exp(q, k, mask, scale):
    """[T]; -inf where nothing is visible."""
    return np.logaddexp.reduce(np.where(mask, q @ k.T * scale, -np.inf), axis=1)


def attend(q, k, v, mask, scale, d_out, d_lse=None):
    """One head: its output [T, Dv], and the gradients of sum(output * d_out) for q, k, v; with d_lse [T]
    those of the sum of log_sum_exp * d_lse too."""
    weights = softmax(q, k, mask, scale)
    d_weights = d_out @ v.T + (0 if d_lse is None else d_lse[:, None])
    shift = (weights * (d_out @ v.T)).sum(axis=1, keepdims=True)
    d_scores = weights * (d_weights - shift) * scale
    return weights @ v, d_scores @ k, d_scores.T @ q, weights.T @ d_out


def importance(weights, length, block_len, stride, block_size, segments=None):
    """[T, M] -> [T, N]: a compressed block gives a selection block of its text its weight times the tokens
    they share. Of slots of other texts the weight must be 0."""
    weights, start_of = np.asarray(weights, np.float64), text_of(length, segments)
    scores = np.zeros((weights.shape[0], -(-length // block_size)))
    for slot, start in compressed_slots(length, block_len, stride, segments).items():
        first = start - start_of[start]
        for block in range(first // block_size, (first + block_len - 1) // block_size + 1):
            shared = min(first + block_len, (block + 1) * block_size) - max(first, block * block_size)
            scores[:, block] += shared * weights[:, slot]
    return scores / stride


def choose(scores, tokens, positions, block_size, num_blocks, num_init, num_local):
    """By brute force: the forced blocks, then one at a time the best, the lowest among equals. Blocks are
    counted from the first token that a query sees."""
    chosen = []
    for t in range(scores.shape[0]):
        seen = np.flatnonzero(tokens[t])
        if not seen.size:
            chosen.append([])
            continue
        newest = (int(positions[t]) - int(seen[0])) // block_size
        forced = [j for j in range(newest + 1) if j < num_init or j > newest - num_local]
        rest = [j for j in range(newest + 1) if j not in forced]
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
    mask = visible_blocks(tokens, sizes["block_len"], sizes["stride"], segments)
    geometry = [sizes[name] for name in ("block_len", "stride", "block_size")]
    rule = [sizes[name] for name in ("block_size", "num_blocks", "num_init", "num_local")]
    chosen, all_scores = [], []
    for group in range(kv_heads):
        heads = range(group * groups, (group + 1) * groups)
        weights = sum(softmax(q[:, head], k_cmp[:, group], mask, scale) for head in heads)
        all_scores.append(importance(weights, length, *geometry, segments))
        chosen.append(choose(all_scores[-1], tokens, places, *rule))
    return chosen, all_scores


def selected_tokens(tokens, rows, positions, block_size, segments=None):
    """bool [T, S]: tokens of the blocks `rows` [T, n] of each query's text."""
    start_of, found = text_of(tokens.shape[1], segments), np.zeros_like(tokens)
    for t, row in enumerate(np.asarray(rows)):
        for j in row[row >= 0]:
            begin = max(start_of[positions[t]], 0) + j * block_size
            found[t, begin : begin + block_size] = True
    return tokens & found


def nsa(a, indices, sizes, d_outputs, segments=None, positions=None, d_lse=None):
    """a: q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates of one row, and q_cmp where compression has its
    own queries; indices [Hkv, T, n] of its blocks.

    Returns (total, compression, selection, window), each [T, H, Dv], and the gradients of
    sum over the four of (output * d_output) for everything in `a`; with d_lse [T, H] that of the compressed
    branch's log-sum-exps times it is added.
    """
    length, kv_heads = a["k_slc"].shape[:2]
    heads, scale = a["q"].shape[1], a["q"].shape[-1] ** -0.5
    places = np.arange(length) if positions is None else np.asarray(positions)
    tokens = visible_tokens(length, segments, positions)
    blocks = visible_blocks(tokens, sizes["block_len"], sizes["stride"], segments)
    age = places[:, None] - np.arange(length)[None, :]
    gradients = {name: np.zeros_like(x) for name, x in a.items()}
    outputs = [np.zeros_like(d) for d in d_outputs]
    for head in range(heads):
        group = head // (heads // kv_heads)
        chosen = selected_tokens(tokens, indices[group], places, sizes["block_size"], segments)
        masks = {"cmp": blocks, "slc": chosen, "win": tokens & (age < sizes["window"])}
        for c, (name, mask) in enumerate(masks.items()):
            k, v = a[f"k_{name}"][:, group], a[f"v_{name}"][:, group]
            gate = a["gates"][:, head, c, None]
            d_out = d_outputs[c + 1][:, head] + gate * d_outputs[0][:, head]
            queries = "q_cmp" if name == "cmp" and "q_cmp" in a else "q"
            of_lse = d_lse[:, head] if name == "cmp" and d_lse is not None else None
            out, dq, dk, dv = attend(a[queries][:, head], k, v, mask, scale, d_out, of_lse)
            outputs[c + 1][:, head] = out
            outputs[0][:, head] += gate * out
            gradients[queries][:, head] += dq
            gradients[f"k_{name}"][:, group] += dk
            gradients[f"v_{name}"][:, group] += dv
            gradients["gates"][:, head, c] = (out * d_outputs[0][:, head]).sum(axis=1)
    return outputs, gradients


def batched_nsa(args, indices, sizes, d_outputs, segments=None, positions=None, d_lse=None):
    """`nsa` of every row, in float64."""
    args = {name: np.asarray(x, np.float64) for name, x in args.items()}
    d_outputs = [np.asarray(x, np.float64) for x in d_outputs]
    rows = []
    for b in range(args["q"].shape[0]):
        places = [None if x is None else np.asarray(x)[b] for x in (segments, positions, d_lse)]
        row = {name: x[b] for name, x in args.items()}
        rows.append(nsa(row, np.asarray(indices)[b], sizes, [d[b] for d in d_outputs], *places))
    outputs = [np.stack(column) for column in zip(*(row[0] for row in rows), strict=True)]
    return outputs, {name: np.stack([row[1][name] for row in rows]) for name in args}
