"""Golden outputs of FusionBench 0.2.33 for tests/merging/test_references.py.

    python3.11 -m venv env && env/bin/pip install torch==2.13.0 numpy tqdm safetensors packaging
    env/bin/pip install --no-deps fusion_bench==0.2.33
    env/bin/python tests/golden/merging/make_fusionbench.py

Writes fusionbench.safetensors beside this file: three task vectors of a matrix and a vector, a base,
statistics, and what FusionBench's functions make of them. Only functions on tensors are called, so whatever
else the package imports is replaced by stand-ins. FusionBench is run, not copied.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

ABSENT = [
    "hydra",
    "lightning",
    "omegaconf",
    "transformers",
    "datasets",
    "rich",
    "huggingface_hub",
    "bidict",
    "peft",
    "accelerate",
]


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports what is not installed as objects that accept everything."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT or name == "fusion_bench":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        if spec.name != "fusion_bench":
            return MagicMock(name=spec.name, __path__=[], __spec__=spec)
        module = MagicMock(name=spec.name, __spec__=spec)
        where = next(Path(p) / "fusion_bench" for p in sys.path if (Path(p) / "fusion_bench").is_dir())
        module.__path__ = [str(where)]

        class Base:
            _config_mapping: dict = {}  # noqa: RUF012 (as the code that is run expects)

        module.BaseAlgorithm, module.auto_register_config = Base, lambda cls: cls
        return module

    def exec_module(self, module):
        pass


def function(module, name):
    """A function of the package from its own file, without the packages around it."""
    import fusion_bench

    path = Path(fusion_bench.__path__[0]) / "method" / f"{module}.py"
    parts = module.split("/")
    for i in range(len(parts)):
        package = ".".join(["fusion_bench", "method", *parts[:i]])
        if i and package not in sys.modules:  # a bare package, without its own __init__
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [
                str(Path(fusion_bench.__path__[0]) / "method" / "/".join(parts[:i]))
            ]
    found = importlib.util.spec_from_file_location(".".join(["fusion_bench", "method", *parts]), path)
    loaded = importlib.util.module_from_spec(found)
    found.loader.exec_module(loaded)
    return getattr(loaded, name)


sys.meta_path.insert(0, StandIns())
for name in ("utils", "utils.type", "utils.state_dict_arithmetic", "mixins", "modelpool", "method", "models",
             "models.modulator", "models.modulator.base", "models.parameter_dict", "compat", "dataset",
             "method.base_algorithm"):  # fmt: skip
    sys.modules[f"fusion_bench.{name}"] = MagicMock(__path__=[])


class _Context:
    def __init__(self, *a, **k): ...
    def __enter__(self): ...
    def __exit__(self, *a): ...


import fusion_bench  # noqa: E402

fusion_bench.StateDictType = dict
sys.modules["fusion_bench.utils"].timeit_context = _Context
arithmetic = sys.modules["fusion_bench.utils.state_dict_arithmetic"]
arithmetic.state_dict_sum = lambda dicts: {k: sum(d[k] for d in dicts) for k in dicts[0]}
for name in ("mixins", "method.base_algorithm"):
    sys.modules[f"fusion_bench.{name}"].auto_register_config = lambda cls: cls
for name in ("method", "method.base_algorithm"):
    sys.modules[f"fusion_bench.{name}"].BaseAlgorithm = type("BaseAlgorithm", (), {})
for name in ("LightningFabricMixin", "SimpleProfilerMixin"):
    setattr(sys.modules["fusion_bench.mixins"], name, type(name, (), {}))
for name in ("ModulatedModel", "TaskModulator"):
    generic = type(name, (), {"__class_getitem__": classmethod(lambda cls, item: cls)})
    setattr(sys.modules["fusion_bench.models.modulator"], name, generic)
    setattr(sys.modules["fusion_bench.models.modulator.base"], name, generic)

torch.manual_seed(0)
base = {"matrix": torch.randn(10, 8), "vector": torch.randn(8)}
vectors = [{k: 0.1 * torch.randn_like(v) for k, v in base.items()} for _ in range(3)]
tensors = {f"base.{k}": v for k, v in base.items()}
tensors |= {f"d{i}.{k}": v.clone() for i, d in enumerate(vectors) for k, v in d.items()}
copies = lambda: [{k: v.clone() for k, v in d.items()} for d in vectors]


def keep(method, result):
    tensors.update({f"{method}.{k}": v.detach().clone().float() for k, v in result.items()})


keep("iso_c", function("isotropic_merging/iso_utils", "iso_c")(copies(), "cpu"))
keep("iso_cts", function("isotropic_merging/iso_utils", "iso_cts")(copies(), 0.5, "cpu"))
tsv = function("task_singular_vector/utils/TSVM_utils", "compute_and_sum_svd_mem_reduction")
keep("tsv_m", tsv(copies(), accelerator="cpu"))
keep("wudi", function("wudi/wudi", "wudi_merging")(copies(), accelerator="cpu", iter_num=100))
keep("magmax", function("magmax/magmax", "_magmax_select")(copies()))
unified, masks, rescalers = function("emr_merging/utils", "emr_merge")(
    [{"matrix": d["matrix"]} for d in copies()]
)
for i in range(3):
    keep(f"emr{i}", {"matrix": unified["matrix"] * masks["matrix"][i] * rescalers[i]})
flat = torch.stack([d["matrix"].reshape(-1) for d in vectors])
ptm = base["matrix"].reshape(-1)
tall = function("tall_mask/utils", "generate_task_masks")(flat, ptm + flat, ptm[None], tall_mask_lambda=0.4)
tensors["tall.masks"] = tall.reshape(3, 10, 8)
ties = function("ties_merging/ties_merging_utils", "ties_merging")
tensors["ties.matrix"] = ties(flat.clone(), reset_thresh=30, merge_func="mean").reshape(10, 8)
svc = function("singular_value_calibration/utils", "subspace_consistency_spectral_calibration_accelerated")
merged = base["matrix"] + sum(d["matrix"] for d in vectors)
models = [base["matrix"] + d["matrix"] for d in vectors]
keep("svc", {"matrix": svc(base["matrix"], models, merged, alpha=1.0, accelerator="cpu") - base["matrix"]})
inputs = [torch.randn(50, 8) for _ in range(3)]
grams = [x.T @ x / 50 for x in inputs]
regmean = function("regmean/regmean", "merging_with_regmean_weights")
merged = regmean({"m.weight": models}, [{"m": g} for g in grams], reduce_non_diagonal_ratio=0.9)
tensors["regmean.matrix"] = merged["m.weight"].contiguous()
fishers = [torch.rand(10, 8) for _ in range(3)]
fisher = function("fisher_merging/fisher_merging", "merging_with_fisher_weights")
coefficients = torch.tensor([0.5, 0.3, 0.2])
merged = fisher({"m": models}, [{"m": f} for f in fishers], coefficients, normalize_fisher_weight=False)
tensors["fisher.matrix"] = merged["m"]
for i in range(3):
    tensors[f"gram{i}"], tensors[f"fisher{i}"] = grams[i], fishers[i]
logits = torch.randn(5, 7)
tensors["logits"] = logits
tensors["entropy"] = function("adamerging/entropy_loss", "entropy_loss")(logits).reshape(1)

# Later additions: nothing above draws other random numbers for them.
drop = function("dare/utils", "param_random_drop_")
for rescale in (True, False):
    torch.manual_seed(1)
    kept = [torch.nn.Parameter(d["matrix"].clone(), requires_grad=False) for d in vectors]
    for d in kept:
        drop(d, 0.6, rescale)
    for i, d in enumerate(kept):
        tensors[f"dare.mask{i}"] = d.data != 0
    tensors[f"dare.{'rescaled' if rescale else 'plain'}"] = sum(0.7 * d.data for d in kept)
angle, ratio, stock = (
    function("model_stock/model_stock", name) for name in ("compute_angle", "compute_ratio", "merge_weights")
)
near = [
    {"m": base["matrix"] + vectors[0]["matrix"] + f * vectors[i]["matrix"]} for i, f in ((1, 0.5), (2, 1))
]
anchor = {"m": base["matrix"]}
tensors["stock0"], tensors["stock1"] = near[0]["m"], near[1]["m"]
tensors["model_stock.matrix"] = stock(*near, anchor, ratio(angle(*near, anchor)))["m"]
slerp = function("slerp/slerp_utils", "slerp")
tensors["slerp.matrix"] = slerp(0.35, models[0], models[1])
tensors["slerp.apart"] = slerp(0.35, vectors[0]["matrix"], vectors[1]["matrix"])
expo = function("linear/expo", "expo_merge")
linear = [torch.nn.Linear(8, 10, bias=False) for _ in range(2)]
linear[0].weight.data, linear[1].weight.data = base["matrix"].clone(), models[0].clone()
tensors["expo.matrix"] = expo(*linear, 0.3).weight.data
tensors["ties.sum"] = ties(flat.clone(), reset_thresh=30, merge_func="sum").reshape(10, 8)

place = Path(__file__).with_name("fusionbench.safetensors")
metadata = {"made_with": f"fusion_bench 0.2.33, torch {torch.__version__}, CPU"}
save_file({k: v.contiguous() for k, v in tensors.items()}, place, metadata=metadata)
print(f"{place}: {len(tensors)} tensors, {place.stat().st_size} bytes")
