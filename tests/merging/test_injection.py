"""Injection on hand-made models: where each tensor comes from, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.checkpoints import host_tensors
from jaxlab.errors import UserError
from jaxlab.merging import (
    AFTERWARDS,
    OPERATORS,
    inject,
    merge_models,
    merge_tensors,
    operator_named,
    plan_injection,
    tensor_key,
)
from jaxlab.models import (
    LearnedPositions,
    ModelConfig,
    MoEConfig,
    PlainVisionConfig,
    abstract_params,
    cast_floats,
)

LM = ModelConfig(vocab_size=9, width=8, num_layers=3, num_heads=2, num_kv_heads=1, mlp_width=6)
VLM = dataclasses.replace(
    LM, vocab_size=11, vision=PlainVisionConfig(num_layers=1, width=8, num_heads=2, image_token=10)
)
UNTIED = {"tie_embeddings": False}


def make(config, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract_params(config))


def trio(**changes):
    vlm, lm = dataclasses.replace(VLM, **changes), dataclasses.replace(LM, **changes)
    return make(vlm, 0), make(lm, 1), make(lm, 2)


def few(params):
    """A part of the tensors: enough of every shape, quicker to compile."""
    layers = params["layers"]
    kept = {"attention": {"query": layers["attention"]["query"]}, "mlp": {"down": layers["mlp"]["down"]}}
    return {**params, "layers": kept}


def tensors(params):
    return dict(host_tensors(params))


NAMES = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.2.mlp.down_proj.weight",
    "model.norm.weight",
)
OPTIONS = {"layer_swap": {"bottom": 1}, "lines": {"alpha": 0.5, "beta": 1.0}, "nearswap": {"t": 0.1}}
WHOLE_MODEL = [name for name, entry in OPERATORS.items() if entry.scope("paper") == "model"]
ALONE = [name for name in (*OPERATORS, *AFTERWARDS) if name not in ("passthrough", *WHOLE_MODEL)]
QUICK = [
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "slerp",
    "ram",
    "nearswap",
    "nuslerp",
    "layer_swap",
    "fisher",
    "tall",
    "lines",
    "tsv_m",
]


def statistics_for(operator, tensors):
    """Statistics of random data, by name, for operators that need them."""
    rng = np.random.default_rng(5)
    found = {}
    for name, tensor in tensors.items():
        if operator == "fisher":
            found[name] = [np.float32(rng.uniform(size=tensor.shape)) for _ in range(2)]
        elif operator.startswith("regmean"):
            inputs = rng.normal(size=(2, 20, tensor.shape[-1]))
            found[name] = [np.float32(x.T @ x) for x in inputs] if tensor.ndim == 2 else [None, None]
        else:
            found[name] = [np.float32(x) for x in (0.3, 0.6)]
    return found


@pytest.mark.parametrize(
    "operator", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALONE]
)
def test_every_tensor_is_what_the_operator_gives_for_it_alone(operator):
    """The tensor under its own name, in Hugging Face's shape, its own key: stacking changes nothing."""
    vlm, expert, base = map(few, trio())
    entry = operator_named(operator)
    own = {"density": 0.5} if "density" in entry.parameters else OPTIONS.get(operator, {})
    v, e, b = (tensors(params) for params in (vlm, expert, base))
    statistics = statistics_for(operator, v) if entry.takes("statistics") else None
    merged, _ = inject(
        vlm, expert, base, operator=operator, lambda_v=0.9, lambda_e=0.4, seed=3, statistics=statistics,
        **own,
    )  # fmt: skip
    got = {t: tensors(params) for t, params in (merged if entry.per_task else {"": merged}).items()}
    weights = [np.float32(0.9), np.float32(0.4)]
    for name in NAMES:
        difference = [x[name] - b[name] for x in (v, e)]
        scaled = [d * w for d, w in zip(difference, weights, strict=True)]
        models, options = [v[name], e[name]], {"base": b[name], **own}
        if entry.takes("num_layers"):
            layer = int(name.split(".")[2]) if "layers" in name else None
            options |= {"layer": layer, "num_layers": 3}
        if entry.takes("statistics"):
            options["statistics"] = statistics[name]
        if entry.random:
            options["key"] = tensor_key(3, name)
        add = np.float32(0)
        if operator == "slerp":  # of the task vectors, 1.3 times as far out
            arc = merge_tensors("slerp", difference, t=np.float32(0.4 / 1.3))
            np.testing.assert_allclose(got[""][name], b[name] + 1.3 * np.asarray(arc), rtol=1e-5, atol=1e-6)
            continue
        if operator == "linear":
            want = merge_tensors("task_arithmetic", models, weight=[0.9, 0.4], base=b[name])
        elif entry.injection == "pair":
            want = merge_tensors(operator, [b[name] + scaled[1]], **options | {"base": b[name] + scaled[0]})
        elif entry.injection == "models" or (entry.of_models and not entry.takes("weights")):
            models = [b[name] + d for d in scaled]  # the two models, weighted equally
            if entry.base != "required":
                options.pop("base")
            want = merge_tensors(operator, models, **options)
        elif not entry.takes("weights"):  # of the weighted task vectors
            want = merge_tensors(operator, scaled, **options | {"base": np.zeros_like(b[name])})
            add = b[name]
        else:
            if "normalize" in entry.parameters:
                options["normalize"] = False
            want = merge_tensors(operator, models, weight=[0.9, 0.4], **options)
        for task, result in got.items():
            one = np.asarray(want[str(["vlm", "expert"].index(task))] if task else want) + add
            if entry.scope("paper") == "matrix":
                np.testing.assert_allclose(result[name], one, rtol=2e-5, atol=2e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(result[name], one, err_msg=name)


@pytest.mark.parametrize("operator", WHOLE_MODEL)
def test_operators_on_whole_models_see_all_tensors_as_one(operator):
    """What a model's tensors become together is what they become joined to one tensor."""
    vlm, expert, base = map(few, trio())
    own = (
        {"density": 0.3}
        if operator == "ties_global"
        else {"quantile": 0.7}
        if operator == "trust_region"
        else {}
    )
    merged, account = inject(vlm, expert, base, operator=operator, lambda_v=0.9, lambda_e=0.4, **own)
    names = [line.name for line in account.lines if line.action == "merged"]
    join = lambda params: np.concatenate([tensors(params)[name].reshape(-1) for name in names])
    options = own | ({"normalize": False} if operator == "ties_global" else {})
    want = merge_tensors(operator, [join(vlm), join(expert)], base=join(base), weight=[0.9, 0.4], **options)
    if operator == "emr":
        for task, name in (("vlm", "0"), ("expert", "1")):
            np.testing.assert_allclose(join(merged[task]), want[name], rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(join(merged), want)
        assert 0.05 < np.mean(join(merged) != join(base)) < 0.95
    whole, _ = merge_models("ties_global", [few(expert)], base=few(base), density=0.3)
    alone = merge_tensors("ties_global", [join_all(expert)], base=join_all(base), density=0.3)
    np.testing.assert_array_equal(join_all(whole), alone)


def join_all(params):
    return np.concatenate([x.reshape(-1) for _, x in sorted(tensors(params).items())])


def test_passing_through_is_no_injection():
    vlm, expert, base = map(few, trio())
    with pytest.raises(UserError, match="passthrough cannot be injected: it hands one model on"):
        inject(vlm, expert, base, operator="passthrough")
    with pytest.raises(UserError, match="fisher needs statistics="):
        inject(vlm, expert, base, operator="fisher")


@pytest.mark.parametrize("dense", [1, 2])
def test_dense_layers_before_others_with_experts_stay_apart(dense):
    """Their tensors have the same names but for the number of the layer."""
    moe = MoEConfig(num_experts=2, experts_per_token=1, width=4, first_dense=dense)
    vlm, expert, base = trio(num_layers=dense + 1, moe=moe)
    merged, account = inject(
        vlm, expert, base, lambda_v=[0.9] * (dense + 1), lambda_e=[float(i) for i in range(dense + 1)]
    )
    got, v, e, b = (tensors(params) for params in (merged, vlm, expert, base))
    seen = set()
    for line in account.lines:
        if line.action == "merged" and "layers." in (name := line.name):
            layer = int(name.split(".")[2])
            seen.add(layer)
            want = b[name] + 0.9 * (v[name] - b[name]) + layer * (e[name] - b[name])
            np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5, err_msg=name)
    assert seen == set(range(dense + 1))


def test_vision_and_projector_stay_byte_for_byte():
    vlm, expert, base = trio()
    merged, account = inject(vlm, expert, base, lambda_v=0.3, lambda_e=0.4)
    before, after = tensors(vlm), tensors(merged)
    assert before.keys() == after.keys()
    for name in before:
        language = name.startswith("model.") and name != "model.embed_tokens.weight"
        assert (before[name].tobytes() == after[name].tobytes()) != language, name
    actions = {line.name: line.action for line in account.lines if "vlm" in line.models}
    assert actions["vision_tower.layers.0.self_attn.q_proj.weight"] == "copied"
    assert actions["multi_modal_projector.linear_1.weight"] == "copied"
    assert actions["model.layers.1.mlp.up_proj.weight"] == "merged"


def test_ends_of_the_lambdas():
    vlm, expert, base = trio()
    ends = {(0.0, 0.0): base, (1.0, 0.0): vlm, (0.0, 1.0): expert}
    for (lambda_v, lambda_e), model in ends.items():
        merged, _ = inject(vlm, expert, base, lambda_v=lambda_v, lambda_e=lambda_e)
        np.testing.assert_allclose(merged["layers"]["mlp"]["up"], model["layers"]["mlp"]["up"], atol=1e-6)


def test_lambdas_by_layer_and_by_pattern():
    vlm, expert, base = trio(position=LearnedPositions(), max_length=5, **UNTIED)
    merged, _ = inject(vlm, expert, base, lambda_v=[1.0, 0.0, 0.5], lambda_e=0.0, embeddings="merge")
    v, b, got = tensors(vlm), tensors(base), tensors(merged)
    share = lambda name, w: b[name] + np.float32(w) * (v[name][: len(b[name])] - b[name])
    expected = {
        "model.embed_positions.weight": 1.0,
        "model.layers.0.mlp.up_proj.weight": 1.0,
        "model.layers.1.mlp.up_proj.weight": 0.0,
        "model.layers.2.mlp.up_proj.weight": 0.5,
        "model.norm.weight": 0.5,
    }
    for name, weight in expected.items():
        np.testing.assert_array_equal(got[name], share(name, weight), err_msg=name)
    for name, weight in {"model.embed_tokens.weight": 1.0, "lm_head.weight": 0.5}.items():
        np.testing.assert_array_equal(got[name][:9], share(name, weight), err_msg=name)
        np.testing.assert_array_equal(got[name][9:], v[name][9:], err_msg=name)
    rules = [
        {"pattern": "*.layers.1.*", "value": 0.25},
        {"pattern": "*.mlp.*", "value": 0.5},
        {"pattern": "*", "value": 1},
    ]
    merged, _ = inject(vlm, expert, base, lambda_v=rules, lambda_e=0.0)
    got = tensors(merged)
    for name, weight in {
        "model.layers.1.mlp.up_proj.weight": 0.25,
        "model.layers.0.mlp.up_proj.weight": 0.5,
        "model.layers.0.self_attn.q_proj.weight": 1.0,
    }.items():
        np.testing.assert_array_equal(got[name], share(name, weight), err_msg=name)
    with pytest.raises(UserError, match="4 values for 3 layers"):
        inject(vlm, expert, base, lambda_v=[1.0, 2.0, 3.0, 4.0])
    with pytest.raises(UserError, match=r"no pattern of the lambda matches model\.norm\.weight"):
        inject(
            vlm,
            expert,
            base,
            lambda_e=[{"pattern": "*.layers.*", "value": 1.0}, {"pattern": "*pos*", "value": 0.0}],
        )


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("policy", "rows", "merged_rows"), [("vlm", 4, 0), ("merge", 4, 9), ("merge_common_rows", 4, 4)]
)
def test_embedding_policies(policy, rows, merged_rows):
    vlm, expert, base = map(few, trio(**UNTIED))
    merged, account = inject(
        vlm, expert, base, lambda_v=0.0, lambda_e=1.0, embeddings=policy, common_rows=rows
    )
    v, e, got = (tensors(params) for params in (vlm, expert, merged))
    for name in (EMBED, HEAD):
        np.testing.assert_allclose(got[name][:merged_rows], e[name][:merged_rows], atol=1e-6)
        np.testing.assert_array_equal(got[name][merged_rows:], v[name][merged_rows:])
    lines = {(line.name, line.models): line for line in account.lines}
    if policy == "vlm":
        assert lines[EMBED, ("vlm",)].action == "copied"
        assert lines[EMBED, ("expert",)].action == lines[HEAD, ("base",)].action == "refused"
    else:
        assert (
            f"{merged_rows} of 11 rows merged, the other {11 - merged_rows} the vlm's"
            in lines[EMBED, ("vlm", "expert", "base")].reason
        )


def test_no_common_row_copies_and_says_so():
    vlm, expert, base = map(few, trio())
    merged, account = inject(vlm, expert, base, embeddings="merge_common_rows", common_rows=0)
    np.testing.assert_array_equal(merged["embedding"]["table"], vlm["embedding"]["table"])
    reasons = {line.models: (line.action, line.reason) for line in account.lines if line.name == EMBED}
    assert reasons[("vlm",)][0] == "copied"
    assert reasons[("expert",)][0] == "refused"
    assert "no row is common" in reasons[("base",)][1]


def test_an_absent_head_is_the_embedding():
    vlm, _, base = map(few, trio(**UNTIED))
    expert = few(make(LM, 1))
    merged, account = inject(vlm, expert, base, lambda_v=0.0, lambda_e=1.0, embeddings="merge")
    np.testing.assert_allclose(tensors(merged)[HEAD][:9], tensors(expert)[EMBED], atol=1e-6)
    line = next(line for line in account.lines if line.name == HEAD)
    assert line.models == ("vlm", "base")
    assert "the expert's is its embedding" in line.reason


def test_a_head_that_the_vlm_has_not_is_refused():
    vlm, expert, base = map(few, (make(VLM, 0), make(dataclasses.replace(LM, **UNTIED), 1), make(LM, 2)))
    merged, account = inject(vlm, expert, base, embeddings="merge")
    assert "head" not in merged
    refused = [line for line in account.lines if line.action == "refused"]
    assert [(line.name, line.models) for line in refused] == [(HEAD, ("expert",))]


def test_every_tensor_of_every_input_is_in_the_account_once():
    vlm, base = trio()[0], make(VLM, 2)  # the base has a vision tower of its own
    expert = make(dataclasses.replace(LM, **UNTIED), 1)
    account = plan_injection(vlm, expert, base).account()
    for role, params in {"vlm": vlm, "expert": expert, "base": base}.items():
        assert sorted(line.name for line in account.lines if role in line.models) == sorted(tensors(params))


def test_account_of_a_result_finds_a_changed_bit():
    vlm, expert, base = trio()
    merged, account = inject(vlm, expert, base)
    account = account.with_hashes(merged)
    assert account.differences(merged) == []
    assert [line["sha256"] for line in account.to_json()] == [line.sha256 for line in account.lines]
    norm = np.asarray(merged["final_norm"]["scale"]).copy()
    norm[3] = np.nextafter(norm[3], 9)
    other = {**merged, "final_norm": {"scale": jnp.asarray(norm)}}
    assert account.differences(other) == ["model.norm.weight"]
    assert "model.norm.weight" in account.differences({k: v for k, v in merged.items() if k != "final_norm"})
    with pytest.raises(ValueError, match="unaccounted"):
        account.with_hashes({**merged, "head": {"table": jnp.zeros((8, 11))}})
    table = account.table()
    assert "merged   3        model.layers.{i}.mlp.up_proj.weight" in table
    assert all(line.action in table for line in account.lines)
    assert len(table.splitlines()) < len(account.lines)


def test_dtype_is_the_vlms():
    vlm, expert, base = map(few, trio())
    vlm = cast_floats(vlm, jnp.bfloat16)
    merged, _ = inject(vlm, expert, base, lambda_v=0.5, lambda_e=0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


def test_masks_depend_on_seed_and_name_alone():
    vlm, expert, base = map(few, trio())
    options = {"operator": "dare_linear", "density": 0.5}
    one, same, other = (inject(vlm, expert, base, seed=seed, **options)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one["layers"]["mlp"]["down"], same["layers"]["mlp"]["down"])
    assert np.any(one["layers"]["mlp"]["down"] != other["layers"]["mlp"]["down"])
    # The first two layers alone: the same names, the same bits.
    short = [{**p, "layers": jax.tree.map(lambda x: x[:2], p["layers"])} for p in (vlm, expert, base)]
    np.testing.assert_array_equal(
        inject(*short, **options)[0]["layers"]["mlp"]["down"], one["layers"]["mlp"]["down"][:2]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_width": 7}, r"mlp\.down_proj\.weight is \[8, 6\] in the vlm, \[8, 7\] in the expert"),
        ({"num_layers": 2}, "and .* more"),
        ({"attention_bias": True}, "only the expert has"),
        ({"norm": "layer"}, "only the expert has"),
        (
            {"width": 6, "head_dim": 4},
            r"embed_tokens\.weight is \[11, 8\] in the vlm, \[9, 6\] in the",
        ),
    ],
)
def test_models_that_differ_are_refused_by_name(change, message):
    vlm, _, base = trio()
    with pytest.raises(UserError, match=message):
        inject(vlm, make(dataclasses.replace(LM, **change), 1), base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operator": "tie"}, "no operator 'tie'"),
        ({"operator": "ties"}, "density: ties needs it"),
        ({"density": 0.5}, "density: task_arithmetic has none"),
        ({"operator": "ties", "density": 1.5}, "between 0 and 1"),
        ({"operator": "ties", "density": [0.1, 0.2, 0.3]}, "not 3"),
        ({"gamma": 0.5}, "gamma: task_arithmetic has none"),
        (
            {"lambda_e": [{"pattern": "*mlpp*", "value": 1.0}, {"pattern": "*", "value": 0.5}]},
            r"the pattern '\*mlpp\*' of the lambda matches no tensor that is merged",
        ),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        inject(*trio(), **options)
