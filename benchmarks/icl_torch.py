"""Flows of GPT-2's shape in PyTorch, eager, from the formulas; timed for icl.py by a Python that has torch.

    torch/bin/python benchmarks/icl_torch.py '{"kind": "repaired", "length": 512}'

`released`: as the paper's code does it. Attention weights are multiplied by ones whose gradient is the
saliency, weights of the model are not frozen and get gradients too, logits are of all positions, and each of
the three sums goes over the n x n map anew. `repaired`: the same with the model frozen, a batch at once,
logits at the last position alone, and one reduction for all sums. Prints one line of JSON. Imports nothing of
this project.
"""

import json
import resource
import statistics
import sys
import time

import numpy as np

DEFAULTS = {"width": 768, "layers": 12, "heads": 12, "vocabulary": 50257, "batch": 1, "length": 512}
DEFAULTS |= {"kind": "repaired", "repeats": 3, "threads": 2, "classes": 3}


def draw(sizes):
    """Weights, tokens and classes: the same numbers in every process."""
    rng = np.random.default_rng(0)
    d, n, count = sizes["width"], sizes["length"], sizes["layers"]
    shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    normal = lambda *shape: rng.standard_normal(shape, np.float32) * np.float32(0.05)
    weights = {"tokens": normal(sizes["vocabulary"], d), "positions": normal(2048, d)}
    weights |= {name: normal(count, *shape) for name, shape in shapes.items()}
    tokens = rng.integers(0, sizes["vocabulary"], (sizes["batch"], n))
    classes = np.zeros((sizes["batch"], n), np.int64)
    classes[:, n // 5 :: n // 4], classes[:, -1] = 1, 2
    return weights, tokens, classes


def peak_bytes(reset=False):
    """The largest resident set since the last reset."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measured(call, repeats):
    """Seconds, processor seconds, and bytes beyond what there was: medians, after one call to warm up."""
    held = peak_bytes(reset=True)
    result = call()
    wall, cpu = [], []
    for _ in range(repeats):
        clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        result = call()
        after = resource.getrusage(resource.RUSAGE_SELF)
        wall.append(time.perf_counter() - clock)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    found = {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu)}
    return found | {"bytes": peak_bytes() - held}, result


def main(argument):
    import torch

    sizes = DEFAULTS | json.loads(argument)
    torch.set_num_threads(sizes["threads"])
    weights, tokens, classes = draw(sizes)
    released = sizes["kind"] == "released"
    tensors = {name: torch.from_numpy(x).requires_grad_(released) for name, x in weights.items()}
    del weights
    tokens, classes = torch.from_numpy(tokens), torch.from_numpy(classes)
    width, heads, length = sizes["width"], sizes["heads"], sizes["length"]
    mask = torch.tril(torch.ones(length, length, dtype=torch.bool))
    edges = torch.tril(torch.ones(length, length), -1)
    norm = lambda x: torch.nn.functional.layer_norm(x, (width,))

    def saliencies(tokens):
        batch = tokens.shape[0]
        x = tensors["tokens"][tokens] + tensors["positions"][:length]
        ones = []
        for layer in range(sizes["layers"]):
            q, k, v = (norm(x) @ tensors["qkv"][layer]).split(width, -1)
            q, k, v = (y.view(batch, length, heads, -1).transpose(1, 2) for y in (q, k, v))
            scores = q @ k.transpose(2, 3) * (width // heads) ** -0.5
            attention = torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), -1)
            ones.append(torch.ones_like(attention, requires_grad=True))
            y = ((attention * ones[-1]) @ v).transpose(1, 2).reshape(batch, length, width)
            x = x + y @ tensors["out"][layer]
            hidden = torch.nn.functional.gelu(norm(x) @ tensors["up"][layer], approximate="tanh")
            x = x + hidden @ tensors["down"][layer]
        x = norm(x if released else x[:, -1:])
        logits = (x @ tensors["tokens"].T)[:, -1, :3]
        loss = -torch.log_softmax(logits, -1)[:, 0].sum()
        if released:
            loss.backward()
            gradients = [one.grad for one in ones]
            for tensor in tensors.values():
                tensor.grad = None
        else:
            gradients = torch.autograd.grad(loss, ones)
        return [gradient.sum(1).abs() for gradient in gradients]

    def sums_of(maps, classes):
        hot = torch.nn.functional.one_hot(classes, sizes["classes"]).float()
        if not released:
            return torch.stack([hot.transpose(1, 2) @ ((m * edges) @ hot) for m in maps], 1)
        found = torch.zeros(classes.shape[0], len(maps), sizes["classes"], sizes["classes"])
        for number, saliency in enumerate(maps):  # each pair of classes in a pass of its own
            for to in range(sizes["classes"]):
                for source in range(sizes["classes"]):
                    pairs = hot[:, :, to, None] * hot[:, None, :, source] * edges
                    found[:, number, to, source] = (saliency * pairs).sum((1, 2))
        return found

    def flows():
        if not released:
            return sums_of(saliencies(tokens), classes)
        rows = [sums_of(saliencies(t[None]), c[None]) for t, c in zip(tokens, classes, strict=True)]
        return torch.cat(rows)

    found, sums = measured(flows, sizes["repeats"])
    print(json.dumps(found | {"sums": sums.detach().numpy().tolist(), "torch": torch.__version__}))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "{}")
