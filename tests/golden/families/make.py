"""Golden cases of every model family, made by transformers; see README.md beside this file.

python make.py [CASE ...]      all cases, or the named ones, into folders beside this file
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from case import Case, Inputs
from language import LANGUAGE
from language_more import LANGUAGE_MORE
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers4 import config_of_transformers_4
from vision import VISION
from weights import other_layout, tensor, weights

HERE = Path(__file__).parent
CASES: dict[str, Case] = LANGUAGE | LANGUAGE_MORE | VISION
NEW_TOKENS = 12
MARGIN = 0.02
"""Least distance of the two best logits along a greedy path: far above what rounding can do."""


def load(case: Case, folder: Path, *, surplus: bool = False) -> torch.nn.Module:
    """The model of an HF folder, float32, with eager attention, on the CPU; all its tensors are used."""
    model_class = getattr(transformers, case.model)
    model, report = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {
        kind: found for kind, found in report.items() if found and not (surplus and kind == "unexpected_keys")
    }
    if problems:
        raise SystemExit(f"{folder}: transformers loaded it with {problems}")
    return model.eval()


def on_disk(case: Case, name: str) -> str:
    for pattern, replacement in case.disk_names:
        name = re.sub(pattern, replacement, name)
    return name


def write_skeleton(case: Case, folder: Path, out: Path) -> None:
    """config.json and keys.json as transformers writes them for a new model of the case's config."""
    model = getattr(transformers, case.model)._from_config(case.config(), dtype=torch.float32)
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        rows = sorted([on_disk(case, key), s.get_shape(), s.get_dtype()] for key, s in slices.items())
    for name, shape, _ in rows:
        if case.transposed and re.search(case.transposed, name):
            shape[-2:] = shape[:-3:-1]
    (out / "keys.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    config = (folder / "config.json").read_text()
    (out / "config.json").write_text(config.rstrip() + "\n")
    old = config_of_transformers_4(json.loads(config))
    (out / "config.transformers4.json").write_text(json.dumps(old, indent=2) + "\n")


def check_saved_names(case: Case, folder: Path, names: set[str]) -> None:
    """A folder that transformers loads and saves again keeps its names."""
    load(case, folder).save_pretrained(folder / "saved")
    with safe_open(folder / "saved" / "model.safetensors", "np") as file:
        if set(file.keys()) != names:
            raise SystemExit(f"{case.name}: saved again under other names: {set(file.keys()) ^ names}")


def check_layout(
    case: Case, folder: Path, values: dict, name: str, inputs: Inputs, logits: np.ndarray
) -> None:
    """transformers gives the same logits from another layout of the same model."""
    with tempfile.TemporaryDirectory() as other:
        (Path(other) / "config.json").write_text((folder / "config.json").read_text())
        save_file(values, Path(other) / "model.safetensors", {"format": "pt"})
        if not same(forward(load(case, Path(other), surplus=True), inputs), logits):
            raise SystemExit(f"{case.name}: other logits from the layout {name!r}")


def same(found: np.ndarray, logits: np.ndarray) -> bool:
    """Whether they are the same logits, but for the order of sums, which follows where tensors lie."""
    return bool(np.abs(found - logits).max() < 1e-5 * np.abs(logits).max())


def forward(model: torch.nn.Module, inputs: Inputs) -> np.ndarray:
    """Logits, float32[B, T, V]."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        return model(**tensors, use_cache=False).logits.float().numpy()


def generate(model: torch.nn.Module, inputs: Inputs) -> tuple[np.ndarray, float]:
    """Greedy tokens after a prompt, int32[1, N], and the least margin of a choice."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    length = inputs["input_ids"].shape[1]
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        result = model.generate(
            **tensors,
            attention_mask=torch.ones_like(tensors["input_ids"]),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    best = torch.stack(result.logits, 1).float().topk(2, dim=-1).values
    margin = (best[..., 0] - best[..., 1]).min().item()
    return result.sequences[:, length:].numpy().astype(np.int32), margin


def choose_prompt(case: Case, folder: Path, long: bool) -> tuple[Inputs, np.ndarray, float]:
    """The first prompt whose greedy continuation is clear-cut, has variety and no special tokens."""
    model = load(case, folder)
    for seed in range(200):
        inputs = case.prompt(np.random.default_rng(1000 + seed), long)
        if case.stateful:
            model = load(case, folder)
        tokens, margin = generate(model, inputs)
        special = set(case.special) & set(tokens.flatten().tolist())
        if margin > MARGIN and len(set(tokens.flatten().tolist())) >= case.variety and not special:
            return inputs, tokens, margin
    raise SystemExit(f"{case.name}: no prompt with a clear greedy path")


def without_effect(case: Case, folder: Path, values: dict, logits: np.ndarray, inputs: Inputs) -> list[str]:
    """Names of the tensors that the logits do not depend on."""
    found = []
    for name, value in values.items():
        changed = value + np.float32(0.3) * tensor(name, value.shape, 999, ".")
        save_file({**values, name: changed}, folder / "model.safetensors", {"format": "pt"})
        difference = np.abs(forward(load(case, folder), inputs) - logits).max() / np.abs(logits).max()
        if difference < 1e-5:
            found.append(name)
        elif difference < 1e-3:
            print(f"  weak: {name} {difference:.1e}")
    return found


def make(case: Case) -> None:
    out = HERE / case.name
    out.mkdir(exist_ok=True)
    about = {
        "model": case.model,
        "seed": case.seed,
        "centered_norms": case.centered_norms,
        "embedding": case.embedding,
        "awkward": case.awkward,
        "transformers": transformers.__version__,
    }
    (out / "case.json").write_text(json.dumps(about, indent=2) + "\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_skeleton(case, folder, out)
        (out / "layouts.json").write_text(json.dumps(case.layouts, indent=1) + "\n")
        if case.inputs is None:
            return
        values = weights(out)
        save_file(values, folder / "model.safetensors", {"format": "pt"})
        inputs = case.inputs(np.random.default_rng(7))
        logits = forward(load(case, folder), inputs)
        assert np.isfinite(logits).all()
        check_saved_names(case, folder, set(values))
        for layout in (layout for layout in case.layouts if layout.get("transformers", True)):
            check_layout(case, folder, other_layout(values, layout), layout["name"], inputs, logits)
        old = folder / "old"
        old.mkdir()
        (old / "config.json").write_text((out / "config.transformers4.json").read_text())
        save_file(values, old / "model.safetensors", {"format": "pt"})
        if not same(forward(load(case, old), inputs), logits):
            raise SystemExit(f"{case.name}: the config of transformers 4 gives other logits")
        arrays = {"tokens": inputs["input_ids"].astype(np.int32), "logits": logits}
        arrays |= {key: value for key, value in inputs.items() if key != "input_ids"}
        for name, change in case.others.items():
            arrays[f"logits.{name}"] = forward(load(case, folder), change(inputs))
            assert not np.allclose(arrays[f"logits.{name}"], logits, atol=1e-2)
        kinds = (("", False), ("_long", True)) if case.stateful else (("", False),)
        for suffix, long in kinds if case.prompt else ():
            prompt, greedy, margin = choose_prompt(case, folder, long)
            arrays |= {f"prompt{suffix}": prompt["input_ids"].astype(np.int32), f"greedy{suffix}": greedy}
            arrays |= {f"prompt{suffix}.{key}": v for key, v in prompt.items() if key != "input_ids"}
            about[f"greedy_margin{suffix}"] = round(margin, 4)
        about["without_effect"] = without_effect(case, folder, values, logits, inputs)
        about["logits_std"] = round(float(logits.std()), 4)
    np.savez(out / "golden.npz", **arrays)
    (out / "case.json").write_text(json.dumps(about, indent=2) + "\n")
    unexpected = [n for n in about["without_effect"] if not re.search(case.no_effect or "$^", n)]
    greedy = arrays.get("greedy", np.zeros(0)).flatten().tolist()
    print(f"{case.name}: {logits.shape} std {logits.std():.2f}, {len(values)} tensors, {greedy}")
    if unexpected:
        raise SystemExit(f"{case.name}: no effect on the logits: {unexpected}")


def defaults() -> dict[str, dict[str, object]]:
    """What a config.json that leaves a setting out means, by model_type, also of configs inside others."""
    left_out = {
        "transformers_version",
        "architectures",
        "dtype",
        "initializer_range",
        "initializer_factor",
        "output_hidden_states",
        "return_dict",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "problem_type",
        "_name_or_path",
        "output_attentions",
        "use_cache",
        "layer_types",
    }
    found: dict[str, dict[str, object]] = {}
    for case in CASES.values():
        whole = case.config()
        inside = [getattr(whole, name) for name in whole.sub_configs_defaults]
        for kind in (type(config) for config in (whole, *inside)):
            settings = kind().to_dict()
            found[kind.model_type] = {
                key: value
                for key, value in settings.items()
                if key not in left_out and "dropout" not in key and not isinstance(value, dict)
            }
    return dict(sorted(found.items()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in sys.argv[1:] or CASES:
        make(CASES[name])
    if not sys.argv[1:]:
        lines = [f"{json.dumps(kind)}: {json.dumps(settings)}" for kind, settings in defaults().items()]
        (HERE / "defaults.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
