"""Golden outputs of mergekit 0.1.5 for tests/merging/test_golden.py.

    python3.11 -m venv env && env/bin/pip install torch==2.13.0 && env/bin/pip install mergekit==0.1.5
    env/bin/python tests/golden/merging/make.py

Writes mergekit.safetensors beside this file: inputs and outputs of
`mergekit.merge_methods.api.merge_tensors`, one case per key of the metadata entry "cases". DARE's masks are
recorded from torch.bernoulli, so that another random generator can be compared. mergekit is run, not copied.
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

place = Path(__file__).with_name("mergekit.safetensors")
metadata = {"cases": json.dumps(cases), "made_with": f"mergekit 0.1.5, torch {torch.__version__}, CPU"}
save_file({k: v.contiguous() for k, v in tensors.items()}, place, metadata=metadata)
print(f"{place}: {len(cases)} cases, {place.stat().st_size} bytes")
