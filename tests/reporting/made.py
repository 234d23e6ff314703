"""Run folders written by hand: the files of runs that never ran, of the shape that tasks write."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ENV = {
    "command": "python run.py task config.yaml",
    "version": "0.1.0",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "changes": "",
    "dirty": False,
    "versions": {"python": "3.12.1", "jax": "0.11.2", "flax": "0.12.12", "numpy": "2.3.0"},
    "platform": "cpu",
    "device_kind": "cpu",
    "device_count": 1,
    "system": "Linux x86_64",
    "started": "2025-01-02T03:04:05+00:00",
    "seconds": 91.5,
}


def write_run(
    root: Path,
    task: str,
    name: str,
    config: dict[str, Any],
    results: dict[str, Any],
    metrics: list[dict[str, Any]] | None = None,
    **env: Any,
) -> Path:
    folder = root / task / name
    folder.mkdir(parents=True)
    facts = {**ENV, "task": task, "command": f"python run.py {task} configs/{name}.yaml", **env}
    (folder / "env.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text("# made by hand\n" + yaml.safe_dump(config))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics or []))
    return folder


def train(root: Path, name: str, attention: str = "full", loss: float = 2.0, **changes: Any) -> Path:
    config = {
        "model": {"attention": {"kind": attention} | ({"num_blocks": 6} if attention == "nsa" else {})},
        "data": {"kind": changes.pop("kind", "text"), "sequence_length": 1024},
        "init_from": changes.pop("init_from", None),
        "steps": 150,
        "batch_size": 4,
    }
    rng = np.random.default_rng(len(name))
    metrics: list[dict[str, Any]] = []
    for step in range(5, 155, 5):
        curve = loss + 3.5 * float(np.exp(-step / 25)) + 0.04 * float(rng.standard_normal())
        metrics.append({"step": step, "loss": curve, "tokens_per_second": 9000.0, "mfu": 0.2})
        if step % 25 == 0:
            metrics.append({"step": step, "eval_loss": curve + 0.05, "eval_exact_match": 0.0})
    results = {
        "model": "model",
        "parameters": 800_000,
        "steps": 150,
        "tokens_per_step": 4096,
        "validation": {"eval_loss": loss + 0.05, "eval_exact_match": 0.0},
        "test": {"eval_loss": loss + 0.06, "eval_exact_match": 0.0},
        "seconds_per_step": 0.5,
        "tokens_per_second": 8192.0 if attention == "full" else 7000.0,
        "mfu": 0.2,
        "mfu_of": "measured",
        "attended_tokens": 512.5 if attention == "full" else 290.0,
        **changes,
    }
    return write_run(root, "train", name, config, results, metrics)


def evaluate(root: Path, name: str, model: str, nsa: bool = False, loss: float = 2.0) -> Path:
    length, block = 1024, 32
    results: dict[str, Any] = {
        "loss": loss,
        "by_position": [
            {"first": i * 64 + 1, "last": (i + 1) * 64, "targets": 100, "loss": loss + 1.5 / (i + 1)}
            for i in range(16)
        ],
    }
    if nsa:
        rng = np.random.default_rng(0)
        layers = []
        for layer in range(4):
            favourites = rng.integers(1, length // block, 4)
            for group in range(2):
                queries = list(range(0, length, 16))
                chosen = []
                for query in queries:
                    own = query // block
                    free = [int(f) for f in favourites if f < own - 1] + [
                        int(x) for x in rng.integers(0, own + 1, 2)
                    ]
                    blocks = list(dict.fromkeys([0, own, max(own - 1, 0), *free]))[:6]
                    chosen.append(blocks + [-1] * (6 - len(blocks)))
                layers.append({"layer": layer, "group": group, "chosen": chosen, "queries": queries})
        results["nsa"] = {
            "length": length,
            "block_size": block,
            "layers": layers,
            "neighbour_overlap": [0.9, 0.8, 0.7, 0.6],
            "decoding": [
                {
                    "length": 1024,
                    "nsa_tokens": 500,
                    "dense_tokens": 1024,
                    "nsa_bytes": 256_000,
                    "dense_bytes": 524_288,
                },
            ],
        }
    return write_run(root, "evaluate", name, {"model": f"outputs/train/{model}"}, results)


def attention_speed(root: Path, name: str) -> Path:
    """NSA takes twice as long as dense attention at 2,048 tokens and half as long at 8,192."""
    rows = [
        {
            "attention": kind,
            "length": length,
            "part": part,
            "seconds": scale * taken,
            "processor_seconds": 1.5 * scale * taken,
        }
        for kind, at in (("nsa", {2048: 1.0, 8192: 4.0}), ("dense", {2048: 0.5, 8192: 8.0}))
        for length, taken in at.items()
        for part, scale in (("forward", 1.0), ("forward_backward", 3.0))
    ]
    tried = [
        {"name": name, "length": 2048, "seconds": taken, "processor_seconds": taken}
        for name, taken in (("chunked", 1.5), ("query_stretches", 2.5))
    ]
    config = {"lengths": [2048, 8192], "num_heads": 16, "num_kv_heads": 1, "head_dim": 64}
    results = {"dtype": "float32", "dense": "chunked", "dense_tried": tried, "rows": rows}
    return write_run(root, "attention-speed", name, config, results)


OPERATORS = {"task_arithmetic": 0.0, "ties": 0.12, "dare_linear": 0.02, "dare_ties": 0.1, "slerp": 0.2}


def search(
    root: Path, name: str, skill: str, peak: float, donor: float = 0.98, examples: bool = True
) -> Path:
    """A search in which accuracy peaks at lambda_v 0.8, lambda_e 1.0; each operator loses its own amount."""
    target, own = f"image_{skill}", "image_english"
    operators = {}
    for operator, lost in OPERATORS.items():
        density = None if operator in ("task_arithmetic", "slerp") else 0.5
        points = []
        for v in (0.4, 0.6, 0.8, 1.0):
            for e in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2):
                score = max(0.0, peak - lost - 1.2 * abs(v - 0.8) * peak - abs(e - 1.0) * peak)
                measured = {
                    target: score,
                    own: min(0.98, 0.6 + 0.4 * v),
                    f"text_{skill}": donor,
                    "text_english": 0.95,
                }
                points.append(
                    {"lambda_v": v, "lambda_e": e, "density": density, "validation": measured, "score": score}
                )
        best = max(points, key=lambda p: p["score"])
        operators[operator] = {
            "points": points,
            "evaluations": len(points),
            "best": {**best, "test": best["validation"]},
        }
    winner = max(operators, key=lambda o: operators[o]["best"]["score"])
    images = {target: 0.01, own: 0.97}
    texts = {f"text_{skill}": 0.05, "text_english": 0.99}
    both = lambda values: {"validation": values, "test": values}
    results: dict[str, Any] = {
        "operators": operators,
        "best": {"operator": winner, **operators[winner]["best"]},
        "chosen_by": [target],
        "unmerged": {
            "vlm": both(images | texts),
            "expert": both({f"text_{skill}": donor, "text_english": 0.9}),
            "base": both(texts),
        },
    }
    if examples:
        rng = np.random.default_rng(1)
        results["examples"] = [
            {
                "image": rng.random((8, 8)).round(2).tolist(),
                "question": "quel chiffre est-ce ?",
                "expected": f"c'est un {word}",
                "answers": {"VLM alone": "it is seven", "injected": f"c'est un {said}"},
            }
            for word, said in (("sept", "sept"), ("trois", "trois"), ("neuf", "huit"))
        ]
    config = {
        "vlm": "outputs/train/digits_vlm",
        "expert": f"outputs/train/digits_expert_{skill}",
        "base": "outputs/train/digits_base",
    }
    return write_run(root, "merge-search", name, config, results)


def icl(root: Path, name: str, **changes: Any) -> Path:
    """An analysis in which everything is as the paper says: five layers, label words early, answers late."""
    layers, tokens = 6, ["sun", "moon", ":", "bok", ";", "oak", "elm", ":", "dax", ";", "fir", "oak", ":"]
    labels, query = [3, 8], 12
    share = {"wp": [0.75, 0.6, 0.45, 0.3, 0.1, 0.0], "pq": [0.15, 0.3, 0.45, 0.62, 0.85, 0.95]}
    share["ww"] = [1 - a - b for a, b in zip(share["wp"], share["pq"], strict=True)]
    rows = []
    for where, kept in (("first", 0.3), ("last", 0.93)):
        for words in ("label", "random"):
            accuracy = kept if words == "label" else 0.9
            row = {"words": words, "where": where, "layers": 2, "accuracy": accuracy, "accuracy_std": 0.01}
            row |= {
                f"{kind}_loyalty{std}": v
                for kind in ("label", "word")
                for std, v in (("", accuracy), ("_std", 0.01))
            }
            rows.append(row)
    maps = []
    for layer in range(layers):
        strength = [[0.02 for _ in range(i)] for i in range(len(tokens))]
        for p in labels:
            strength[p][p - 3 : p] = [1.0 - layer / layers] * 3
            strength[query][p] = layer / layers
        maps.append(strength)
    results = {
        "made_by": {"config": "configs/quickstart/icl_model.yaml"},
        "layers": layers,
        "tokens": len(tokens),
        "labels": 2,
        "chance": 0.5,
        "examples": 640,
        "seeds": [42, 43, 44, 45, 46],
        "mode": "paper",
        "accuracy": 0.95,
        "accuracy_std": 0.01,
        "flows": {
            "reduction": "abs_of_sum",
            "mean": share,
            "share": share,
            "share_std": {k: [0.01] * layers for k in share},
        },
        "blocking": {"top_words": 5, "seconds": 1.0, "table": rows},
        "figure1": {
            "tokens": tokens,
            "labels": labels,
            "query": query,
            "answer": "dax",
            "prediction": "dax",
            "maps": maps,
        },
        **changes,
    }
    return write_run(root, "icl", name, {"model": "assets/icl_model"}, results)
