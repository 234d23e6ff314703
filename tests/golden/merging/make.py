"""Golden outputs of mergekit 0.1.5 for tests/merging/test_golden.py.

    python3.11 -m venv env && env/bin/pip install torch==2.13.0 && env/bin/pip install mergekit==0.1.5
    env/bin/python tests/golden/merging/make.py

Writes mergekit.safetensors (six methods, every switch) and mergekit_all.safetensors (all twenty, over shapes)
beside this file: inputs and outputs of `mergekit.merge_methods.api.merge_tensors`, one case per key of the
metadata entry "cases". The masks of DARE and DELLA are recorded from torch.bernoulli, so that another random
generator can be compared. mergekit is run, not copied.
"""

import json
from pathlib import Path

import torch
from mergekit.merge_methods.api import merge_tensors
from safetensors.torch import save_file

drawn = []
bernoulli = torch.bernoulli


def recording(*arguments, **options):
    mask = bernoulli(*arguments, **options)
    drawn.append(mask.to(torch.bool))
    return mask


torch.bernoulli = recording
tensors, cases = {}, {}


def case(name, method, inputs, parameters, has_base):
    """Runs one case; the first input is the base where has_base."""
    drawn.clear()
    output = merge_tensors(
        [tensors[i] for i in inputs], method, parameters=parameters, base_index=0 if has_base else None
    )
    tensors[f"{name}/output"] = output.clone()
    for model, mask in enumerate(drawn):
        tensors[f"{name}/mask{model}"] = mask.clone()
    cases[name] = {
        "method": method,
        "inputs": inputs,
        "parameters": parameters,
        "has_base": has_base,
        "masks": len(drawn),
    }


torch.manual_seed(0)
BASE = ["base", "x0", "x1", "x2"]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    tag = str(dtype).removeprefix("torch.")
    base = torch.randn(13, 37)
    for name in BASE:
        value = base if name == "base" else base + 0.1 * torch.randn(13, 37)
        tensors[f"{name}.{tag}"] = value.to(dtype)
    inputs = [f"{name}.{tag}" for name in BASE]
    weight = [0.9, 0.3, 0.55]
    for normalize in (True, False):
        case(
            f"linear.{tag}.{normalize}",
            "linear",
            inputs[1:],
            {"weight": weight, "normalize": normalize},
            False,
        )
        common = {"weight": weight, "lambda": 0.7, "normalize": normalize}
        case(f"task_arithmetic.{tag}.{normalize}", "task_arithmetic", inputs, common, True)
        for density in (1.0, 0.5, 0.21, 0.001):
            for rescale in (True, False):
                options = common | {"density": density, "rescale": rescale}
                case(f"ties.{tag}.{normalize}.{density}.{rescale}", "ties", inputs, options, True)
                for method in ("dare_linear", "dare_ties") if density < 1 else ():
                    case(f"{method}.{tag}.{normalize}.{density}.{rescale}", method, inputs, options, True)
    negative = {"weight": [1.0, -0.5], "density": 0.6}
    case(f"ties.{tag}.negative", "ties", inputs[:3], negative, True)
    case(f"ties.{tag}.densities", "ties", inputs, {"weight": weight, "density": [0.2, 0.5, 0.9]}, True)
    for method in ("ties", "dare_linear", "dare_ties", "task_arithmetic"):  # defaults
        case(f"{method}.{tag}.defaults", method, inputs, {"weight": weight}, True)
    tensors[f"far.{tag}"] = torch.randn(13, 37).to(dtype)
    tensors[f"near.{tag}"] = (base + 0.02 * torch.randn(13, 37)).to(dtype)
    tensors[f"zero.{tag}"] = torch.zeros(13, 37).to(dtype)
    for other in ("x0", "far", "near", "zero"):
        for t in (0.0, 0.35, 0.5, 1.0):
            case(f"slerp.{tag}.{other}.{t}", "slerp", [f"base.{tag}", f"{other}.{tag}"], {"t": t}, True)

# Small integers: exact ties of magnitude and of votes.
for name, values in {"base": [0, 0, 0, 0], "x0": [1, -2, 3, 0], "x1": [2, 2, -3, 1]}.items():
    tensors[f"{name}.small"] = torch.tensor(values, dtype=torch.float32)
small = ["base.small", "x0.small", "x1.small"]
for weight in ([1.0, 1.0], [1.0, -1.0], [0.0, 0.0]):
    case(f"ties.small.{weight}", "ties", small, {"weight": weight}, True)
case("ties.small.none", "ties", small, {"weight": 1.0, "density": 0.0}, True)


def write(name):
    place = Path(__file__).with_name(name)
    metadata = {"cases": json.dumps(cases), "made_with": f"mergekit 0.1.5, torch {torch.__version__}, CPU"}
    save_file({k: v.contiguous() for k, v in tensors.items()}, place, metadata=metadata)
    print(f"{place}: {len(cases)} cases, {place.stat().st_size} bytes")
    tensors.clear(), cases.clear()


write("mergekit.safetensors")

# All twenty, over shapes: a matrix, a vector as in norms, one element, a convolution's, a scalar.
torch.manual_seed(1)
WEIGHT = [0.9, 0.3, 0.55]
THINNED = ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear")
SHAPES = {"matrix": (7, 10), "vector": (9,), "one": (1,), "cube": (3, 4, 5), "scalar": ()}
for shape_name, shape in SHAPES.items():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tag = f"{shape_name}.{str(dtype).removeprefix('torch.')}"
        base = torch.randn(shape)
        tensors[f"base.{tag}"] = base.to(dtype)
        for i in range(3):  # some elements unchanged, as RAM and arcee_fusion expect
            change = 0.1 * torch.randn(shape) * (torch.rand(shape) < 0.7)
            tensors[f"x{i}.{tag}"] = (tensors[f"base.{tag}"].float() + change).to(dtype)
        names = [f"base.{tag}", *(f"x{i}.{tag}" for i in range(3))]

        def add(label, method, inputs, parameters, has_base, tag=tag):
            try:
                case(f"{method}.{tag}.{label}", method, inputs, parameters, has_base)
            except ValueError as error:  # directions that cancel out, epsilon beyond the density
                print(f"left out: {method}.{tag}.{label}: {error}")

        add("plain", "linear", names[1:], {"weight": WEIGHT}, False)
        add("plain", "task_arithmetic", names, {"weight": WEIGHT, "lambda": 0.7}, True)
        for method in THINNED:
            if method.startswith("della") and shape_name in ("one", "scalar"):
                continue  # mergekit divides by zero there
            options = {"weight": WEIGHT, "density": 0.5, "lambda": 0.7}
            add("plain", method, names, options, True)
            if method.startswith("breadcrumbs"):
                add("wide", method, names, options | {"gamma": 0.2, "density": [0.3, 0.5, 0.9]}, True)
                add("rescaled", method, names, options | {"rescale": True, "normalize": True}, True)
            if method.startswith("della"):
                add("narrow", method, names, options | {"epsilon": 0.05}, True)
                add("raw", method, names, options | {"rescale": False}, True)
                add("switched", method, names, options | {"normalize": method != "della"}, True)
                add("all", method, names, {"weight": WEIGHT}, True)
        for topk in (1.0, 0.5, 0.1):
            add(f"{topk}", "sce", names, {"select_topk": topk}, True)
        for epsilon in (1e-5, 0.05):
            add(f"{epsilon}", "ram", names, {"epsilon": epsilon}, True)
            add(f"{epsilon}", "ramplus_tl", names, {"epsilon": epsilon, "r": 0.3, "alpha": 0.9}, True)
        add("defaults", "ramplus_tl", names, {}, True)
        for by_row in (False, True):
            add(f"{by_row}", "model_stock", names, {"filter_wise": by_row}, True)
        add("two", "model_stock", names[:3], {}, True)
        for t in (0.35, 1.0):
            add(f"{t}", "slerp", names[:2], {"t": t}, True)
        for has_base in (False, True):
            pair, three = (names[:3], names) if has_base else (names[1:3], names[1:])
            for label, options in {
                "flat": {},
                "columns": {"nuslerp_flatten": False},
                "rows": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
            }.items():
                add(f"{label}.{has_base}", "nuslerp", pair, {"weight": [0.4, 0.9]} | options, has_base)
            for normalize in (True, False):
                options = {"weight": WEIGHT, "normalize_weights": normalize}
                add(f"{normalize}.{has_base}", "multislerp", three, options, has_base)
        add("zero sum", "nuslerp", names[1:3], {"weight": [0.5, -0.5]}, False)
        tensors[f"far.{tag}"] = torch.randn(shape).to(dtype)
        tensors[f"zero.{tag}"] = torch.zeros(shape).to(dtype)
        apart = [names[0], f"far.{tag}", names[1]]
        for steps in (1, 10):
            add(f"{steps}", "karcher", apart, {"max_iter": steps}, False)
        add("tol", "karcher", names, {"tol": 0.05}, False)
        add("zero", "karcher", [*apart, f"zero.{tag}"], {}, False)
        for t in (0.01, 0.1):
            add(f"{t}", "nearswap", names[:2], {"t": t}, True)
        add("plain", "arcee_fusion", names[:2], {}, True)
        add("far", "arcee_fusion", [names[0], f"far.{tag}"], {}, True)
        add("plain", "passthrough", names[:1], {}, False)
        add("scaled", "passthrough", names[:1], {"scale": 0.3}, False)

write("mergekit_all.safetensors")
