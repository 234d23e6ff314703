"""Merges on a mesh of all devices, beside the streaming merge of the host: prints what differs.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.merging.on_mesh FOLDER OPERATOR...
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from jaxlab.checkpoints import open_model
from jaxlab.config import build
from jaxlab.merging import InjectRecipe, MergeRecipe, merge_by_recipe, merge_on_mesh
from jaxlab.models.sharding import MeshConfig, make_mesh

PARAMETERS = {
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
    "ties_global": {"density": 0.3},
    "slerp": {},
    "nearswap": {"t": 0.01},
    "layer_swap": {"bottom": 1},
    "consensus_ta": {"k": 1},
    "sce": {"select_topk": 0.3},
}


def recipes(folder: Path, operator: str):
    """An injection and, where it can be one, a merge."""
    roles = {role: str(folder / name) for role, name in (("vlm", "one"), ("expert", "two"), ("base", "base"))}
    own = PARAMETERS.get(operator, {})
    both = {**roles, "operator": operator, "lambda_v": 0.9, "lambda_e": 0.4, "embeddings": "merge", **own}
    yield "inject", build(InjectRecipe, both)
    if operator in ("slerp", "nearswap"):
        return
    models = [{"model": str(folder / name)} for name in ("one", "two")]
    base = {} if operator == "linear" else {"base": roles["base"]}
    yield "merge", build(MergeRecipe, {"operator": operator, "models": models, **base, **own})


def differences(folder: Path, operators: list[str], sizes: tuple[int, int]) -> dict[str, list[str]]:
    """By operator and kind of recipe: the leaves that differ in a bit, or do not lie where the model's do."""
    fsdp, model = sizes
    mesh = make_mesh(MeshConfig(fsdp=fsdp, model=model))
    result = {}
    for operator in operators:
        for kind, recipe in recipes(folder, operator):
            models = [open_model(reference) for reference in recipe.references()]
            want, _ = merge_by_recipe(recipe, models)
            got, account = merge_on_mesh(recipe, models, mesh)
            assert account.counts()["merged"]
            where = models[0].read(shardings=shardings_of(got, models[0], mesh))
            found = []
            pairs = zip(
                jax.tree_util.tree_leaves_with_path(want),
                jax.tree.leaves(got),
                jax.tree.leaves(where),
                strict=True,
            )
            for (path, x), y, there in pairs:
                if np.asarray(x).tobytes() != np.asarray(y).tobytes():
                    found.append(jax.tree_util.keystr(path))
                if y.sharding != there.sharding:
                    found.append(f"{jax.tree_util.keystr(path)} lies elsewhere")
            result[f"{operator} {kind}"] = found
    return result


def shardings_of(got, model, mesh):
    from jaxlab.models import param_shardings

    return param_shardings(model.config, mesh)


if __name__ == "__main__":
    count = len(jax.devices())
    print(json.dumps(differences(Path(sys.argv[1]), sys.argv[2:], (count // 2, 2))))
