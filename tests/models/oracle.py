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
    if config.norm == "layer":
        x = x - x.mean()
        return x / np.sqrt((x**2).mean() + config.norm_eps) * p["scale"] + p["bias"]
    return x / np.sqrt((x**2).mean() + config.norm_eps) * p["scale"]


def rotate(x, position, theta):
    """Each pair (x[i], x[i + half]) is a complex number, turned by position * theta ** (-i / half)."""
    half = len(x) // 2
    turned = [
        complex(x[i], x[i + half]) * complex(math.cos(angle), math.sin(angle))
        for i in range(half)
        for angle in [position * theta ** (-i / half)]
    ]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def project(p, name, x, head):
    y = x @ p[name][:, head]
    return y + p[f"{name}_bias"][head] if f"{name}_bias" in p else y


def attention(p, xs, config):
    theta, share, outs = config.rope_theta, config.num_heads // config.kv_heads, []
    for t, x in enumerate(xs):
        total = p["output_bias"].copy() if config.attention_bias else np.zeros(config.width)
        for head in range(config.num_heads):
            first = max(0, t - config.window + 1) if config.attention == "sliding" else 0
            query, scores, values = project(p, "query", x, head), [], []
            for s in range(first, t + 1):
                key = project(p, "key", xs[s], head // share)
                if config.position == "rotary":
                    score = rotate(query, t, theta) @ rotate(key, s, theta)
                else:
                    score = query @ key
                scores.append(score / math.sqrt(config.key_dim))
                values.append(project(p, "value", xs[s], head // share))
            weights = np.exp(np.array(scores) - max(scores))
            total += (weights / weights.sum()) @ np.array(values) @ p["output"][head]
        outs.append(total)
    return outs


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


def logits(params, tokens, config, attend=attention):
    """[T, V] of one row; `attend(layer's attention parameters, normed inputs, config)` gives its outputs."""
    params = float64(params)
    xs = [params["embedding"]["table"][t] for t in tokens]
    if config.position == "learned":
        xs = [x + params["position"]["table"][t] for t, x in enumerate(xs)]
    for i in range(config.num_layers):
        p = layer_of(params["layers"], i)
        ys = attend(p["attention"], [norm(p["attention_norm"], x, config) for x in xs], config)
        xs = [x + y for x, y in zip(xs, ys, strict=True)]
        xs = [x + mlp(p["mlp"], norm(p["mlp_norm"], x, config), config) for x in xs]
    head = params["embedding"]["table"].T if config.tie_embeddings else params["head"]["table"]
    return np.array([norm(params["final_norm"], x, config) @ head for x in xs])
