"""Torch's attention and flash-linear-attention's NSA, timed for nsa.py by a Python that has torch.

    torch/bin/python benchmarks/nsa_torch.py '{"length": 4096, "device": "cuda"}'

Prints one line of JSON: rows as nsa.py has them; a peer that cannot run gives one with its reason. With
"serve" it says its name, and then answers each line that it reads, "forward" or "both", with the seconds of
one call of torch's dense attention. Imports nothing of this project.
"""

import contextlib
import json
import statistics
import sys
import time

DEFAULTS = {
    "batch": 1,
    "length": 1024,
    "heads": 64,
    "kv_heads": 4,
    "key_dim": 128,
    "value_dim": 128,
    "block_size": 64,
    "num_blocks": 16,
    "window": 512,
    "dtype": "bfloat16",
    "device": "cuda",
    "samples": 20,
    "seconds": 1.0,
    "serve": False,
}
L2_BYTES = 100e6


def dense(torch, backend, sizes):
    """q, k, v [B, T, H, D] -> [B, T, H, Dv]; V is padded to the head dim of the keys."""
    pad = sizes["key_dim"] - sizes["value_dim"]

    def run(q, k, v):
        v = torch.nn.functional.pad(v, (0, pad)) if pad else v
        if sizes["device"] == "cpu":  # flash attention on a CPU knows no groups of heads
            k, v = (x.repeat_interleave(sizes["heads"] // sizes["kv_heads"], dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        within = torch.nn.attention.sdpa_kernel(backend) if backend is not None else contextlib.nullcontext()
        with within:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)[..., : sizes["value_dim"]]

    return run


def flash_linear_attention(torch, sizes):
    """Its whole NSA: mean-pooled blocks of the selection's size, one key and value for all branches."""
    from fla.ops.nsa import parallel_nsa

    def run(q, k, v):
        gates = torch.ones(*q.shape[:3], dtype=q.dtype, device=q.device)
        return parallel_nsa(
            q,
            k,
            v,
            g_cmp=gates,
            g_slc=gates,
            g_swa=gates,
            block_counts=sizes["num_blocks"],
            block_size=sizes["block_size"],
            window_size=sizes["window"],
        )

    return run


def measure(torch, call, sets, sizes):
    """Median seconds of call(set), the sets taken in turn."""
    cuda = sizes["device"] == "cuda"

    def run(first, calls):
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        start = time.perf_counter()
        for i in range(first, first + calls):
            call(sets[i % len(sets)])
        if not cuda:
            return time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    for i in range(len(sets) + 1):  # the first calls compile and tune
        run(i, 1)
    one = run(0, 1)
    calls = max(1, min(50, round(0.02 / one)))
    samples = max(3 if cuda else 1, min(sizes["samples"], int(sizes["seconds"] / (one * calls))))
    taken = [run(i * calls, calls) / calls for i in range(samples)]
    return {"median_s": statistics.median(taken), "samples_s": taken, "calls_per_sample": calls}


def rows_of(torch, name, function, sizes):
    dtype = getattr(torch, sizes["dtype"])
    torch.manual_seed(0)

    def draw(heads, dim):
        shape = (sizes["batch"], sizes["length"], heads, dim)
        return torch.randn(shape, dtype=dtype, device=sizes["device"], requires_grad=True)

    def one_set():
        kv = [draw(sizes["kv_heads"], sizes[dim]) for dim in ("key_dim", "value_dim")]
        return [draw(sizes["heads"], sizes["key_dim"]), *kv]

    first = one_set()
    size = sum(x.numel() * x.element_size() for x in first)
    more = min(7, int(L2_BYTES // size)) if sizes["device"] == "cuda" else 0
    inputs = [first, *(one_set() for _ in range(more))]
    d_out = draw(sizes["heads"], sizes["value_dim"]).detach()

    def forward(args):
        with torch.no_grad():
            return function(*args)

    def gradients(out, args):
        return torch.autograd.grad(out, args, d_out, retain_graph=True)

    rows = [{"name": name, "part": "forward", **measure(torch, forward, inputs, sizes)}]
    graphs = [(function(*args), args) for args in inputs]
    rows.append({"name": name, "part": "backward", **measure(torch, lambda g: gradients(*g), graphs, sizes)})
    del graphs
    both = lambda args: torch.autograd.grad(function(*args), args, d_out)
    return [*rows, {"name": name, "part": "both", **measure(torch, both, inputs, sizes)}]


def serve(torch, sizes):
    """One sample for each line that is read."""
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    function = dense(torch, backend, sizes)
    q, k, v, d_out = inputs_of(torch, sizes)

    def forward():
        with torch.no_grad():
            function(q, k, v)

    calls = {
        "forward": forward,
        "both": lambda: torch.autograd.grad(function(q, k, v), (q, k, v), d_out),
    }
    about = {"name": "dense, torch flash_attention", "versions": {"torch": torch.__version__}}
    print(json.dumps(about | {"torch_threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        start, processor = time.perf_counter(), time.process_time()
        calls[line.strip()]()
        if sizes["device"] == "cuda":
            torch.cuda.synchronize()
        taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - processor}
        print(json.dumps(taken), flush=True)


def inputs_of(torch, sizes):
    """q, k, v and the output's cotangent, random."""
    kinds = (("heads", "key_dim"), ("kv_heads", "key_dim"), ("kv_heads", "value_dim"), ("heads", "value_dim"))
    dtype = getattr(torch, sizes["dtype"])
    made = []
    for heads, dim in kinds:
        shape = (sizes["batch"], sizes["length"], sizes[heads], sizes[dim])
        made.append(torch.randn(shape, dtype=dtype, device=sizes["device"], requires_grad=len(made) < 3))
    return made


def main(argument):
    sizes = DEFAULTS | json.loads(argument)
    import torch

    if sizes["serve"]:
        serve(torch, sizes)
        return
    padded = "" if sizes["key_dim"] == sizes["value_dim"] else f" (V padded to {sizes['key_dim']})"
    peers = {f"dense, torch sdpa{padded}": lambda: dense(torch, None, sizes)}
    if sizes["device"] == "cuda":
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            make = lambda b=backend: dense(torch, getattr(torch.nn.attention.SDPBackend, b), sizes)
            peers[f"dense, torch {backend.lower()}{padded}"] = make
    peers["flash-linear-attention nsa"] = lambda: flash_linear_attention(torch, sizes)
    rows = []
    for name, make in peers.items():
        try:
            rows += rows_of(torch, name, make(), sizes)
        except Exception as error:
            lines = str(error).splitlines()
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
            rows.append({"name": name, "part": "forward", "reason": reason})
    versions = {"torch": torch.__version__}
    print(json.dumps([{**row, "versions": versions} for row in rows]))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "{}")
