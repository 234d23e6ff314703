"""Attention to selected blocks by XLA: ejkernel's beside ours, on the same numbers, each with its own Python.

`python benchmarks/nsa_ejkernel.py --python ENV/bin/python` with an environment that has ejkernel (jax 0.10).
Errors are against float64; seconds are the processor's, the least of three calls.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

DIM, BLOCK, BLOCKS, TIMES = 64, 64, 8, 3


def draw(length: int, heads: int) -> dict[str, np.ndarray]:
    """Queries choose their own block and others before it at random; missing slots are -1."""
    random = np.random.default_rng(0)
    indices = np.full((1, length, 1, BLOCKS), -1, np.int32)
    for t in range(length):
        own = t // BLOCK
        chosen = sorted([own, *random.permutation(own)[: BLOCKS - 1]])
        indices[0, t, 0, : len(chosen)] = chosen
    normal = lambda count: random.standard_normal((1, length, count, DIM)).astype(np.float32)
    return {"q": normal(heads), "k": normal(1), "v": normal(1), "d_out": normal(heads), "indices": indices}


def reference(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output and gradients in float64, one query and head after the other."""
    q, k, v, d_out = (x[name][0].astype(np.float64) for name in ("q", "k", "v", "d_out"))
    k, v, scale = k[:, 0], v[:, 0], DIM**-0.5
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for t in range(len(q)):
        blocks = [j for j in x["indices"][0, t, 0] if j >= 0]
        tokens = np.concatenate([np.arange(j * BLOCK, (j + 1) * BLOCK) for j in blocks])
        tokens = tokens[tokens <= t]
        for h in range(q.shape[1]):
            scores = scale * k[tokens] @ q[t, h]
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[t, h] = weights @ v[tokens]
            wanted = v[tokens] @ d_out[t, h]
            d_scores = scale * weights * (wanted - weights @ wanted)
            dq[t, h] = d_scores @ k[tokens]
            dk[tokens] += d_scores[:, None] * q[t, h]
            dv[tokens] += weights[:, None] * d_out[t, h]
    return {"out": out[None], "dq": dq[None], "dk": dk[None, :, None], "dv": dv[None, :, None]}


def attention(who: str, indices: jax.Array):
    """(q, k, v, indices, counts) -> output."""
    if who == "ours":
        from kernels_pallas.nsa import selected_attention

        return lambda q, k, v, indices, _: selected_attention(
            q, k, v, jnp.moveaxis(indices, 1, 2), block_size=BLOCK, implementation="xla"
        )
    from ejkernel.kernels._xla.native_sparse_attention import apply_native_sparse_attention

    with_counts = who == "theirs"
    return lambda q, k, v, indices, counts: apply_native_sparse_attention(
        q, k, v, indices, counts if with_counts else BLOCKS, BLOCK, DIM**-0.5
    )


def measure(who: str, folder: Path) -> dict[str, object]:
    """Seconds, memory and results of one implementation; the latter as a file."""
    x = {name: jnp.asarray(value) for name, value in np.load(folder / "inputs.npz").items()}
    counts = jnp.sum(x["indices"] >= 0, axis=-1, dtype=jnp.int32)
    attend = attention(who, x["indices"])

    def gradients(q, k, v, indices, counts, d_out):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, indices, counts), q, k, v)
        return out, pull(d_out)

    operands = (x["q"], x["k"], x["v"], x["indices"], counts)
    found: dict[str, object] = {"jax": jax.__version__}
    for part, function, args in (("forward", attend, operands), ("both", gradients, (*operands, x["d_out"]))):
        compiled = jax.jit(function).lower(*args).compile()
        taken = []
        for _ in range(TIMES + 1):
            start = time.process_time()
            result = jax.block_until_ready(compiled(*args))
            taken.append(time.process_time() - start)
        memory = compiled.memory_analysis().temp_size_in_bytes
        found[part] = {"cpu_seconds": min(taken[1:]), "temporary_bytes": memory}
    out, (dq, dk, dv) = result
    np.savez(folder / f"{who}.npz", out=out, dq=dq, dk=dk, dv=dv)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, help="of an environment with ejkernel")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("nsa_ejkernel.json"))
    parser.add_argument("--measure", nargs=2, metavar=("WHO", "FOLDER"), help="used by itself")
    a = parser.parse_args()
    if a.measure:
        print(json.dumps(measure(a.measure[0], Path(a.measure[1]))))
        return
    if a.python is None:
        parser.error("--python: name the Python of an environment with ejkernel")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder, inputs = Path(name), draw(a.length, a.heads)
        np.savez(folder / "inputs.npz", **inputs)
        expected = reference(inputs)
        for who in ("ours", "theirs", "theirs, no counts"):
            python = sys.executable if who == "ours" else str(a.python)
            command = [python, __file__, "--measure", who, name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{who}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            results = np.load(folder / f"{who}.npz")
            error = lambda x, y: float(np.linalg.norm(x - y) / np.linalg.norm(y))
            errors = {key: error(results[key], value) for key, value in expected.items()}
            found[who] = {**json.loads(done.stdout.splitlines()[-1]), "relative_errors": errors}
    a.out.write_text(json.dumps({"length": a.length, "heads": a.heads, "found": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
