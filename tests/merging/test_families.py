"""Injection into vision-language models of Hugging Face: from folders, to a folder, tensor by tensor."""

import dataclasses
import json

import numpy as np
import pytest

from jaxlab.checkpoints import families, open_model, save_model
from jaxlab.checkpoints.tensor_folder import open_folder
from jaxlab.errors import UserError
from jaxlab.merging import open_inputs
from jaxlab.merging.architecture import check_vision
from jaxlab.tasks import main
from tests.checkpoints import folders, test_internvl_chat

LAMBDA_V, LAMBDA_E = np.float32(0.9), np.float32(0.4)
VLMS = {  # case: where its language model's tensors are
    "gemma3": "language_model.",
    "idefics2": ("model.text_model.", "lm_head."),
    "idefics3": ("model.text_model.", "lm_head."),
    "internvl": "language_model.",
    "internvl_qk_norm": "language_model.",
    "llava": "language_model.",
    "llava_next": "language_model.",
    "llava_onevision": "language_model.",
    "llava_onevision_multi": "language_model.",
    "llava_siglip": "language_model.",
    "mistral3": "language_model.",
    "mllama": "language_model.",
    "paligemma": "language_model.",
    "paligemma2": "language_model.",
    "qwen2_5_vl": ("model.", "lm_head."),
    "qwen2_vl": ("model.", "lm_head."),
    "qwen3_vl": ("model.language_model.", "lm_head."),
    "qwen3_vl_moe": ("model.language_model.", "lm_head."),
    "smolvlm": ("model.text_model.", "lm_head."),
}
QUICK = ("llava", "mllama", "qwen2_vl", "qwen3_vl_moe")
CROSS = (".cross_attn.", "language_model.model.layers.1.", "language_model.model.layers.3.")
"""Of mllama: the layers that read the image are no part of the language model."""


def is_language(case, name):
    return name.startswith(VLMS[case]) and not (case == "mllama" and name.startswith(CROSS[1:]))


def test_every_vlm_is_tried():
    described = {
        case: families.find_by_model_type(folders.config(case)["model_type"]) for case in folders.CASES
    }
    vlms = {case for case in described if "vision_config" in folders.config(case)}
    assert vlms == set(VLMS)


def language_model(path, case, tensors, rows=None):
    """The language model of a VLM as a folder of its own, as a plain language model is laid out.

    Args:
      case: of the golden ones; or how the tensors of a folder become one, (config, tensors).
      rows: of its tables, where not the VLM's: others are cut off, or are a thousand.
    """
    whole = path.parent / f"{path.name}-whole"
    config, lay_out = (folders.config(case), dict) if isinstance(case, str) else case
    folders.write(whole, config, lay_out(tensors))
    opened = open_model(whole)
    params = {k: v for k, v in opened.read().items() if k not in ("vision", "projector")}
    config = dataclasses.replace(opened.config, vision=None, family="jaxlab")
    if opened.config.extra_embeddings:
        config = dataclasses.replace(config, extra_embeddings=0)
        table = params["embedding"]["table"][: -opened.config.extra_embeddings]
        params = {**params, "embedding": {"table": table}}
    if rows is not None:
        table = params["embedding"]["table"]
        resized = lambda x: np.pad(x, ((0, max(0, rows - len(x))), (0, 0)), constant_values=1000)[:rows]
        params = {**params, "embedding": {"table": resized(np.asarray(table))}}
        if "head" in params:
            params = {**params, "head": {"table": resized(np.asarray(params["head"]["table"]).T).T}}
        config = dataclasses.replace(config, vocab_size=rows)
    rope = dataclasses.replace(config.position, sections=(), sections_interleaved=False)
    save_model(path, dataclasses.replace(config, position=rope), params, form="huggingface")


def recipe(path, **more):
    roles = {role: str(path / role) for role in ("vlm", "expert", "base")}
    text = {"kind": "inject", "lambda_v": float(LAMBDA_V), "lambda_e": float(LAMBDA_E), **roles, **more}
    (path / "recipe.yaml").write_text(json.dumps(text))
    return str(path / "recipe.yaml")


def inject(tmp_path, case):
    """Returns the VLM's tensors, the expert's and the base's under the VLM's names, and the merged folder."""
    vlm = folders.weights(case)
    folders.make(tmp_path / "vlm", case)
    others = []
    for seed, role in enumerate(("expert", "base")):
        rng = np.random.default_rng(seed)
        noise = {name: 0.1 * rng.standard_normal(x.shape).astype(np.float32) for name, x in vlm.items()}
        others.append({name: (x + noise[name]).astype(np.float32) for name, x in vlm.items()})
        language_model(tmp_path / role, case, others[-1])
    merged = str(tmp_path / "merged")
    assert main(["merge", recipe(tmp_path), "--out", merged, "--verify"]) == 0
    return vlm, *others, open_folder(merged)


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in VLMS])
def test_an_expert_reaches_the_language_model_and_nothing_else(tmp_path, case, capsys):
    vlm, expert, base, found = inject(tmp_path, case)
    capsys.readouterr()
    assert set(found) == set(vlm)
    changed = 0
    for name, before in vlm.items():
        after = found[name].read()
        if not is_language(case, name) or "embed_tokens" in name or "lm_head" in name:
            assert after.tobytes() == before.tobytes(), name
            continue
        vectors = LAMBDA_V * (before - base[name]), LAMBDA_E * (expert[name] - base[name])
        expected = base[name] + (vectors[0] + vectors[1])
        assert after.dtype == np.float32
        assert after.tobytes() == expected.tobytes(), name
        changed += 1
    assert changed > 15
    assert open_model(found.path).config == open_model(tmp_path / "vlm").config


@pytest.mark.parametrize(
    "case", [c if c in ("llava", "qwen3_vl") else pytest.param(c, marks=pytest.mark.slow) for c in VLMS]
)
def test_a_vision_tower_is_what_its_config_says(tmp_path, case):
    """From headers alone: one that is not would load in nothing."""
    folders.make(tmp_path / "vlm", case)
    check_vision(open_inputs([open_model(tmp_path / "vlm")], ["vlm"])[0])
    tensors = dict(folders.weights(case))
    name = next(name for name in tensors if name.endswith(("fc1.weight", "up_proj.weight")) and "vis" in name)
    tensors[name] = np.concatenate([tensors[name], tensors[name]])
    folders.write(tmp_path / "wrong", folders.config(case), tensors)
    with pytest.raises(
        UserError, match=r"is \[\d+, \d+\]: \d+ where the config of the vision tower says \d+"
    ):
        check_vision(open_inputs([open_model(tmp_path / "wrong")], ["vlm"])[0])


WIDTHS = {"wider": (5, -2), "narrower": (-3, 4)}
"""Rows that expert and base have more than the VLM's language model."""
QUICK_WIDTHS = (("mllama", "wider"),)
MATRIX = [(case, width) for case in VLMS for width in WIDTHS]


@pytest.mark.parametrize(
    ("case", "width"), [p if p in QUICK_WIDTHS else pytest.param(*p, marks=pytest.mark.slow) for p in MATRIX]
)
def test_vocabularies_of_other_sizes(tmp_path, case, width, capsys):
    """The rows that all have are merged; the others, images' tokens among them, stay the VLM's."""
    vlm = folders.weights(case)
    folders.make(tmp_path / "vlm", case)
    size, others = open_model(tmp_path / "vlm").config.vocab_size, []
    rows = [size + more for more in WIDTHS[width]]
    for seed, role in enumerate(("expert", "base")):
        rng = np.random.default_rng(seed)
        others.append(
            {name: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for name, x in vlm.items()}
        )
        language_model(tmp_path / role, case, others[-1], rows[seed])
    merged = str(tmp_path / "merged")
    assert main(["merge", recipe(tmp_path, embeddings="merge"), "--out", merged, "--verify"]) == 0
    printed, found, common = capsys.readouterr().out, open_folder(merged), min(size, *rows)
    tables = [name for name in vlm if "embed_tokens" in name or "lm_head" in name]
    for name in tables:
        expert, base = (other[name] for other in others)
        share = LAMBDA_V * (vlm[name] - base) + LAMBDA_E * (expert - base)
        want = np.concatenate([(base + share)[:common], vlm[name][common:]])
        assert found[name].read().tobytes() == want.tobytes(), name
        assert (
            f"{common:,} of {len(want):,} rows merged, the other {len(want) - common:,} the vlm's" in printed
        )
    assert tables


def chat(text):
    """InternVL in its authors' layout, whose InternLM2 packs queries, keys and values."""

    def lay_out(tensors):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folders, "weights", lambda case: tensors)
            return test_internvl_chat.chat_tensors("internvl", text)

    return test_internvl_chat.chat_config("internvl", text), lay_out


def original():
    """LLaVA as its authors' code has it."""
    return folders.config("llava"), lambda tensors: folders.laid_out(tensors, folders.layouts("llava")[-1])


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("llava", original), marks=pytest.mark.slow),
        pytest.param(("internvl", lambda: chat("qwen2")), marks=pytest.mark.slow),
        ("internvl", lambda: chat("internlm2")),
    ],
    ids=["llava-original", "internvl_chat-qwen2", "internvl_chat-internlm2"],
)
def test_layouts_of_the_authors(tmp_path, layout, capsys):
    case, (config, lay_out) = layout[0], layout[1]()
    vlm, others = folders.weights(case), []
    folders.write(tmp_path / "vlm", config, lay_out(vlm))
    for seed, role in enumerate(("expert", "base")):
        rng = np.random.default_rng(seed)
        others.append(
            {name: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for name, x in vlm.items()}
        )
        language_model(tmp_path / role, (config, lay_out), others[-1])
    merged = str(tmp_path / "merged")
    assert main(["merge", recipe(tmp_path), "--out", merged, "--verify"]) == 0
    capsys.readouterr()
    expert, base = others
    want = dict(vlm)
    for name in vlm:
        if is_language(case, name) and "embed_tokens" not in name and "lm_head" not in name:
            vectors = LAMBDA_V * (vlm[name] - base[name]), LAMBDA_E * (expert[name] - base[name])
            want[name] = base[name] + (vectors[0] + vectors[1])
    found, want = open_folder(merged), lay_out(want)
    assert set(found) == set(want)
    for name, value in want.items():
        assert found[name].read().tobytes() == value.tobytes(), name


LANGUAGE = ("gpt_neox", "stablelm_parallel", "gpt_oss")
SLOW = (
    "phi3_longrope",
    "deepseek_v3",
    "opt",
    "olmo2",
    "olmo3",
    "smollm3",
    "phi",
    "cohere_qk_norm",
    "exaone4",
    "glm4_moe",
    "granitemoe",
    "olmoe",
)


@pytest.mark.parametrize("case", [*LANGUAGE, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_two_models_of_a_family_merge_tensor_by_tensor(tmp_path, case, capsys):
    """Fused tensors and norms of single heads too, as the folders have them."""
    rng = np.random.default_rng(0)
    one = folders.weights(case)
    other = {name: value + 0.1 * rng.standard_normal(value.shape, np.float32) for name, value in one.items()}
    for name, tensors in (("one", one), ("other", other)):
        folders.write(tmp_path / name, folders.config(case), tensors)
    models = [{"model": str(tmp_path / name), "weight": 0.5} for name in ("one", "other")]
    (tmp_path / "r.yaml").write_text(json.dumps({"kind": "merge", "operator": "linear", "models": models}))
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), "--verify"]) == 0
    capsys.readouterr()
    found = open_folder(tmp_path / "out")
    assert set(found) == set(one)
    half = np.float32(0.5)
    for name in one:
        assert found[name].read().tobytes() == (half * one[name] + half * other[name]).tobytes(), name
