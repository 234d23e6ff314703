"""The task inspect: what a model is, and what can be merged with what, from headers alone."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tokenizers import Tokenizer, models

from jaxlab.checkpoints import compare_for_merging, families, inspect_model, open_model, save_model
from jaxlab.checkpoints.safetensors_file import Tensor
from jaxlab.checkpoints.unexpected_tensors import account, match
from jaxlab.models import abstract_params
from jaxlab.tasks import main
from tests.checkpoints import folders
from tests.models.tiny import draw_params, make_config

ROOT = Path(__file__).parents[2]


def layouts_of(case):
    return [{}, *folders.layouts(case)]


@pytest.mark.parametrize("case", folders.CASES)
def test_names_are_matched_as_they_are_when_loading(case):
    """Without shapes, and so without jax, to the same family, variant, copies and ignored tensors."""
    config = families.read_config(folders.config(case), case)
    template = abstract_params(config)
    for layout in layouts_of(case):
        held = folders.laid_out(folders.weights(case), layout)
        tensors = {name: Tensor(name, x.dtype, x.shape, lambda *_, x=x: x) for name, x in held.items()}
        found, expected = match(tensors, config), account(tensors, config, template)
        names = {name: ".".join(entry.path) for entry in expected.entries for name in entry.names}
        assert (found.family, found.paths) == (expected.family, names)
        assert (found.copies, found.ignored) == (expected.copies, expected.ignored)
        assert found.problems == 0


@pytest.mark.parametrize("case", ["gpt2", "llama_bias", "qwen3_moe", "gemma3_text", "llava"])
def test_each_tensor_that_is_missing_or_too_many_is_named(case):
    config = families.read_config(folders.config(case), case)
    names = list(folders.weights(case))
    alone = (
        "multi_modal_projector",
        "embeddings",
        "layernorm",
        "layrnorm",
    )  # a config does not tell of these
    for name in [n for n in names if "language" in n or not any(word in n for word in alone)][::3]:
        found = match([n for n in names if n != name], config)
        assert (found.missing, found.unmapped) == ((name,), ())
        found = match([*names, f"{name}_more"], config)
        assert (found.missing, found.unmapped) == ((), (f"{name}_more",))


def test_a_model_in_lines(tmp_path, capsys):
    path = folders.make(tmp_path / "model", "qwen2_window")
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(path),
        "  family          qwen2",
        "  language model  3 layers, width 32, 4 heads (2 key/value) of 8",
        "  attention       1 full, 2 sliding (8)",
        "  context         64 tokens",
        "  vocabulary      131 rows, head of its own",
        "  parameters      30,688",
        "  stored          122,752 bytes of float32",
        "  tensors         39 used",
        "  tokenizer       none",
    ]


def test_experts_sinks_and_latents_are_told(tmp_path):
    told = {}
    for case in ("gpt_oss", "deepseek_v3"):
        path = folders.make(tmp_path / case, case)
        told[case] = dict(inspect_model(open_model(path), case).lines)
    assert told["gpt_oss"]["attention"] == "2 sliding (8), 1 full, sinks"
    assert told["gpt_oss"]["experts"] == "3 of 6 of 20"
    assert told["deepseek_v3"]["attention"] == "keys and values from a latent (14)"
    assert told["deepseek_v3"]["experts"] == "2 of 6 of 20, 20 shared, 1 layers without"


def test_a_model_of_ours(tmp_path):
    config = make_config(num_layers=1)
    params = draw_params(config)
    save_model(tmp_path / "ours", config, params)
    lines = dict(inspect_model(open_model(tmp_path / "ours"), "ours").lines)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert lines["parameters"] == f"{count:,}"
    assert lines["stored"] == f"{4 * count:,} bytes of float32, ours (Orbax)"


def words(*tokens):
    return Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))


def pair(tmp_path, tokens=None, others=None, **changes):
    """LLaVA and a language model beside it, of the same sizes but for `changes`."""
    vlm = folders.make(tmp_path / "vlm", "llava")
    text = {**folders.config("llava")["text_config"], **changes}
    tensors = {
        name.removeprefix("language_model."): value
        for name, value in folders.weights("llava").items()
        if name.startswith("language_model.")
    }
    if "vocab_size" in changes:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][: changes["vocab_size"]]
    expert = folders.write(tmp_path / "expert", text, tensors)
    for path, vocabulary in ((vlm, tokens), (expert, others)):
        if vocabulary is not None:
            words(*vocabulary).save(str(path / "tokenizer.json"))
    return tuple(inspect_model(open_model(path), str(path)) for path in (expert, vlm))


def test_one_architecture_and_vocabularies_of_two_sizes(tmp_path):
    expert, vlm = pair(tmp_path, ["a", "b", "c", "<image>"], ["a", "b", "d"], vocab_size=100)
    assert compare_for_merging(vlm, expert) == [
        "can be merged: the language models are of one architecture",
        "vocabulary: 109 and 100 rows",
        "tokens: 2 are in both, 0 of them under other ids",
        f"embeddings: vlm keeps those of {vlm.name}",
        "embeddings: merge_common_rows merges 2 rows by token",
        "embeddings: merge would mix 98 rows of different or unknown tokens",
    ]


def test_without_tokenizers_nothing_is_said_of_ids(tmp_path):
    expert, vlm = pair(tmp_path)
    assert compare_for_merging(vlm, expert)[2:] == [
        f"embeddings: vlm keeps those of {vlm.name}",
        "embeddings: merge merges 109 rows; whether their tokens agree is unknown without tokenizers",
    ]


def test_the_first_model_with_vision_is_compared_with_the_others(tmp_path, capsys):
    expert, vlm = pair(
        tmp_path, rms_norm_eps=0.5, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    assert main(["inspect", expert.name, vlm.name]) == 0
    said = capsys.readouterr().out.splitlines()
    start = said.index(f"{vlm.name} + {expert.name}")
    assert said[start + 1 : start + 4] == [
        "  cannot be merged: the language models are not the same function",
        "  norm_eps: 1e-06 and 0.5",
        "  position: () and (theta 500000.0)",
    ]


def test_what_is_wrong_is_one_line_after_the_rest(tmp_path, capsys):
    tensors = dict(folders.weights("llama2")) | {"extra": folders.weights("llama2")["model.norm.weight"]}
    del tensors["lm_head.weight"]
    path = folders.write(tmp_path / "model", folders.config("llama2"), tensors)
    assert main(["inspect", str(path)]) == 2
    captured = capsys.readouterr()
    assert "20 used, 1 not known, 1 missing" in captured.out
    head = "lm_head.weight"
    hint = f"{head} may be absent only where config.json says tie_word_embeddings"
    problems = f"1 tensor is missing: {head}; 1 tensor is not known: extra ({hint})"
    assert captured.err == f"error: {path}: not the family llama: {problems}\n"
    assert main(["inspect"]) == 2


def test_jax_is_not_imported(tmp_path):
    path = folders.make(tmp_path / "model", "llava")
    program = (
        "import sys; from jaxlab.tasks import main; "
        f"assert main(['inspect', {str(path)!r}]) == 0; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True)
