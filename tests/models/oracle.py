"""A decoder in plain loops of numpy, float64: one row, one token and one head at a time.

Written from the description in ModelConfig, without the package's functions.
"""

import math

import numpy as np

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
    "relu": lambda x: np.maximum(x, 0),
}


def norm(p, x, config):
    """Of the parameters `p`; of None, none."""
    if p is None:
        return x
    if config.norm == "layer":
        x = x - x.mean()
        return x / np.sqrt((x**2).mean() + config.norm_eps) * p["scale"] + p.get("bias", 0)
    return x / np.sqrt((x**2).mean() + config.norm_eps) * p["scale"]


def rotate(x, position, theta, dim=None):
    """Each pair (x[i], x[i + half]) of the first `dim` numbers is a complex one, turned by
    position * theta ** (-i / half)."""
    half = (len(x) if dim is None else dim) // 2
    turned = [
        complex(x[i], x[i + half]) * complex(math.cos(angle), math.sin(angle))
        for i in range(half)
        for angle in [position * theta ** (-i / half)]
    ]
    return np.array([z.real for z in turned] + [z.imag for z in turned] + [*x[2 * half :]])


def project(p, name, x, head):
    y = x @ p[name][:, head]
    return y + p[f"{name}_bias"][head] if f"{name}_bias" in p else y


def normed_head(p, name, x, head, config):
    """A query or key before its position."""
    if config.qk_norm == "width":
        every = np.array([project(p, name, x, other) for other in range(p[name].shape[1])])
        return norm(p[f"{name}_norm"], every.reshape(-1), config).reshape(every.shape)[head]
    y = project(p, name, x, head)
    if config.qk_norm == "each_head":
        return norm({"scale": p[f"{name}_norm"]["scale"][head]}, y, config)
    return norm(p[f"{name}_norm"], y, config) if config.qk_norm == "head" else y


def attention(p, xs, config, rotary=True):
    theta, dim = (config.rope.theta, config.rotary_dim) if rotary else (None, None)
    share, outs = config.num_heads // config.kv_heads, []
    for t, x in enumerate(xs):
        total = p["output_bias"].copy() if config.attention_bias else np.zeros(config.width)
        for head in range(config.num_heads):
            first = max(0, t - config.sliding.window + 1) if config.attention.kind == "sliding" else 0
            query, scores, values = normed_head(p, "query", x, head, config), [], []
            for s in range(first, t + 1):
                key = normed_head(p, "key", xs[s], head // share, config)
                score = rotate(query, t, theta, dim) @ rotate(key, s, theta, dim) if rotary else query @ key
                scores.append(score / math.sqrt(config.key_dim))
                values.append(project(p, "value", xs[s], head // share))
            weights = np.exp(np.array(scores) - max(scores))
            total += (weights / weights.sum()) @ np.array(values) @ p["output"][head]
        outs.append(total)
    return outs


def softmax_sum(query, keys, values):
    """Attention of one query, and its weights; nothing to see gives zeros."""
    if not len(keys):
        return np.zeros(values.shape[-1]), np.zeros(0)
    scores = keys @ query / math.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    return weights @ values, weights


def compress(p, y, n):
    """[T, D] of one head -> [M, D]: an MLP with SiLU over each whole block of tokens."""
    blocks = [np.zeros((0, y.shape[1]))]
    for start in range(0, len(y) - n.block_len + 1, n.stride):
        if p is None:
            blocks.append(y[start : start + n.block_len].mean(axis=0)[None])
            continue
        hidden = p["hidden_bias"].copy()
        for j in range(n.block_len):
            hidden += (y[start + j] + p["position"][j]) @ p["hidden"][j]
        blocks.append((ACTIVATIONS["silu"](hidden) @ p["output"] + p["output_bias"])[None])
    return np.concatenate(blocks)


def importance(weights, t, n):
    """Of the selection blocks up to t's own, from the weights on compressed blocks."""
    scores = np.zeros(t // n.block_size + 1)
    for i, weight in enumerate(weights):
        for token in range(i * n.stride, i * n.stride + n.block_len):
            scores[token // n.block_size] += weight
    return scores


def bounds(queries, keys, t, n):
    """Of the selection blocks up to t's own: what no score of a query with a key of the block exceeds."""
    blocks = [keys[j : j + n.block_size] for j in range(0, t + 1, n.block_size)]
    return np.array(
        [
            sum(max(x * c.min(), x * c.max()) for q in queries for x, c in zip(q, block.T, strict=True))
            for block in blocks
        ]
    )


def auxiliary(p, x, group, t, n):
    """Of the selection blocks up to t's own: the mean score of a query of its own with keys of their own."""
    query, keys = x[t] @ p["query"][:, group], x @ p["key"][:, group]
    blocks = [keys[j : j + n.block_size] for j in range(0, t + 1, n.block_size)]
    return np.array([(block @ query).mean() / math.sqrt(len(query)) for block in blocks])


def indexer(p, xs, group, t, n, turn):
    """Of the selection blocks up to t's own: the best score of a token. turn(vector, position)."""
    scores = []
    for s in range(t + 1):
        key, score = turn(xs[s] @ p["key"], s), 0.0
        for head in range(group * n.selector_heads, (group + 1) * n.selector_heads):
            product = turn(xs[t] @ p["query"][:, head], t) @ key / math.sqrt(len(key))
            if n.selector_score == "relu":
                product = max(product, 0.0) * (xs[t] @ p["weight"][:, head]) / math.sqrt(n.selector_heads)
            score += product
        scores.append(score)
    return np.array([max(scores[j : j + n.block_size]) for j in range(0, t + 1, n.block_size)])


def choose(scores, t, n):
    """Selection blocks that the query at t reads."""
    own = t // n.block_size
    forced = [j for j in range(own + 1) if j < n.num_init or j > own - n.num_local]
    rest = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-scores[j], j))
    return (forced + rest)[: n.num_blocks]


def nsa(p, xs, config, rotary):
    """Native Sparse Attention: three branches with their own keys and values, gated."""
    rotate = globals()["rotate"] if rotary else lambda x, *_: x
    n, theta, x, share = config.nsa, config.rope.theta, np.array(xs), config.num_heads // config.kv_heads
    gates = np.ones((len(x), config.num_heads, 3))
    if n.gated:
        gates /= 1 + np.exp(-(np.einsum("td,dhc->thc", x, p["gate"]["output"]) + p["gate"]["bias"]))
    gates *= [name in n.branches for name in ("compression", "selection", "window")]
    outs = np.zeros((len(x), config.width)) + p["output_bias"]
    for group in range(config.kv_heads):
        key, value = (
            [
                x @ (p[name] if n.shared_kv else p[name][c])[:, group]
                + (p[f"{name}_bias"] if n.shared_kv else p[f"{name}_bias"][c])[group]
                for c in range(3)
            ]
            for name in ("key", "value")
        )
        k_cmp, v_cmp = (
            compress(p.get(f"compress_{name}"), y[0], n) for name, y in (("key", key), ("value", value))
        )
        k_cmp = np.array([rotate(k, i * n.stride, theta) for i, k in enumerate(k_cmp)])
        k_slc, k_win = (np.array([rotate(k, s, theta) for s, k in enumerate(key[c])]) for c in (1, 2))
        for t in range(len(x)):
            heads = range(group * share, (group + 1) * share)
            queries = [rotate(project(p, "query", x[t], head), t, theta) for head in heads]
            seen = max(0, (t + 1 - n.block_len) // n.stride + 1)
            compressed = [softmax_sum(q, k_cmp[:seen], v_cmp[:seen]) for q in queries]
            if n.selector == "auxiliary":
                scores = auxiliary(p["selector"], x, group, t, n)
                chosen = choose(scores, t, n)
            elif n.selector == "min_max":
                chosen = choose(bounds(queries, k_slc, t, n), t, n)
            elif n.selector == "indexer":
                turned = min(config.rotary_dim, n.selector_dim - n.selector_dim % 2)
                turn = lambda y, at, dim=turned: np.concatenate([rotate(y[:dim], at, theta), y[dim:]])
                chosen = choose(indexer(p["indexer"], x, group, t, n, turn), t, n)
            else:
                chosen = choose(importance(sum(weights for _, weights in compressed), t, n), t, n)
            selected = [s for s in range(t + 1) if s // n.block_size in chosen]
            recent = range(max(0, t - n.window + 1), t + 1)
            for head, query, (first, _) in zip(heads, queries, compressed, strict=True):
                second, _ = softmax_sum(query, k_slc[selected], value[1][selected])
                third, _ = softmax_sum(query, k_win[recent], value[2][recent])
                mixed = sum(gates[t, head, c] * out for c, out in enumerate((first, second, third)))
                outs[t] += mixed @ p["output"][head]
    return list(outs)


def mlp(p, x, config):
    def linear(name, y):
        return y @ p[name] + (p[f"{name}_bias"] if config.mlp_bias else 0)

    hidden, act = linear("up", x), ACTIVATIONS[config.activation]
    return linear("down", act(linear("gate", x)) * hidden if config.mlp == "gated" else act(hidden))


def float64(tree):
    if isinstance(tree, dict):
        return {name: float64(inner) for name, inner in tree.items()}
    return np.asarray(tree, np.float64)


def layer_of(tree, i):
    return {k: layer_of(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}


def logits(params, tokens, config):
    """[T, V] of one row."""
    params, attend = float64(params), nsa if config.attention.kind == "nsa" else attention
    xs = [params["embedding"]["table"][t] for t in tokens]
    if config.position.kind == "learned":
        xs = [x + params["position"]["table"][t] for t, x in enumerate(xs)]
    for i in range(config.num_layers):
        p = layer_of(params["layers"], i)
        read = [norm(p.get("attention_norm"), x, config) for x in xs]
        ys = attend(p["attention"], read, config, config.rotary_layers[i])
        ys = [norm(p.get("attention_post_norm"), y, config) for y in ys]
        if not config.parallel:
            read = xs = [x + y for x, y in zip(xs, ys, strict=True)]
        if "mlp_norm" in p:
            read = [norm(p["mlp_norm"], x, config) for x in xs]
        zs = [norm(p.get("mlp_post_norm"), mlp(p["mlp"], x, config), config) for x in read]
        xs = [x + y * config.parallel + z for x, y, z in zip(xs, ys, zs, strict=True)]
    head = params["embedding"]["table"].T if config.tie_embeddings else params["head"]["table"]
    return np.array([norm(params["final_norm"], x, config) @ head for x in xs])
