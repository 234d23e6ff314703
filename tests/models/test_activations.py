"""Named activations of every kind of layer: what they are to each other, patches, gradients, refusals.

Programs are compiled once for each kind of model: one that reads every name and holds a patch of every name,
whose layers, positions, heads and values are data. A patch of no layer and no position is off.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import (
    ACTIVATIONS,
    FullAttentionConfig,
    MoEConfig,
    NoPositions,
    Patch,
    Probe,
    Quest,
    SlidingAttentionConfig,
    activation_names,
    activations,
    forward,
    init_cache,
    interpretability,
    taps,
)
from jaxlab.models.taps import Sizes
from tests.models.tiny import draw_params, draw_tokens, make_config

LENGTH, AT, LAYER = 11, 6, 1
"""Tokens of a row; the position and the layer that patches change."""
CHUNKED = FullAttentionConfig(implementation="chunked")
MODELS = {
    "full": make_config(num_layers=3),
    "parallel": make_config("other", parallel=True),
    "post_norms": make_config(
        num_layers=3,
        attention=SlidingAttentionConfig(window=3, pattern=("sliding", "full")),
        post_norms=True,
        attention_softcap=2.0,
        logit_softcap=3.0,
    ),
    "experts": make_config(moe=MoEConfig(num_experts=3, experts_per_token=2, width=6, first_dense=1)),
    "nsa": make_config("nsa"),
    "nsa_min_max": make_config("nsa_min_max"),
    "vision": make_config("vision"),
}


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Programs that run a few times are compiled in half the time without optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_batch(config):
    batch = {"tokens": draw_tokens(config, 2, LENGTH)}
    if config.has_vision:
        vision, rng = config.vision, np.random.default_rng(3)
        shape = (2, 1, vision.image_size, vision.image_size, vision.channels)
        batch["images"] = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        batch["tokens"] = batch["tokens"].at[:, 1 : 1 + vision.num_patches].set(vision.image_token)
    return batch


class Model:
    """A model with one program for every patch of one activation."""

    def __init__(self, config, names=None):
        self.config, self.batch, self.params = config, make_batch(config), draw_params(config)
        self.names = activation_names(config) if names is None else names
        self.sizes = Sizes(config, 2, LENGTH)
        self.run = jax.jit(
            lambda params, patches: activations(params, self.batch, config, self.names, patches=patches)
        )
        self.off = tuple(self.patch(name, positions=()) for name in self.names)
        self.clean = self(())

    def patch(self, name, value=None, layers=None, positions=None, heads=None):
        """A patch, of everything by default, by `value` of all layers; shapes of arrays never change."""
        padded = lambda chosen, size: np.asarray(
            [*(range(size) if chosen is None else chosen), *[-1] * size][:size], np.int32
        )
        shape, count = self.sizes.shape(name), self.config.num_layers
        layered = ACTIVATIONS[name].layered
        kind = np.int32 if name == "chosen_blocks" else np.float32
        if value is None:
            value = np.zeros((count, *shape) if layered else shape, kind)
        if layered and layers is not None:  # values stand in the order of the layers
            value = np.resize(value[list(layers)], value.shape)
        return Patch(
            name,
            layers=padded(layers, count) if layered else None,
            value=value,
            positions=padded(positions, LENGTH),
            heads=padded(heads, self.heads(name)) if self.heads(name) else None,
        )

    def heads(self, name):
        axes = self.sizes.axes(name)
        found = [
            size for axis, size in zip(axes, self.sizes.shape(name), strict=True) if axis in ("H", "Hkv")
        ]
        return found[0] if found else 0

    def __call__(self, patches, params=None):
        on = {patch.name: patch for patch in patches}
        every = tuple(on.get(patch.name, patch) for patch in self.off)
        return jax.tree.map(np.asarray, self.run(self.params if params is None else params, every))


@functools.cache
def model_of(kind):
    return Model(MODELS[kind])


SLOW = {"nsa_min_max"}
KINDS = [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in MODELS]


@pytest.fixture(params=KINDS, scope="module")
def model(request):
    return model_of(request.param)


def token_axis(model, name):
    return model.sizes.axes(name).index("T") + ACTIVATIONS[name].layered


def take(value, axis, what):
    return value[(slice(None),) * axis + (what,)]


def equal(got, want, names):
    for name in names:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def test_every_name_has_its_shape(model):
    for name in model.names:
        shape = model.sizes.shape(name)
        whole = (model.config.num_layers, *shape) if ACTIVATIONS[name].layered else shape
        assert model.clean[name].shape == whole, name


def test_the_stream_is_the_sum_of_what_is_added(model):
    a = model.clean
    np.testing.assert_array_equal(a["residual_pre"][0], a["embedding"])
    np.testing.assert_array_equal(a["residual_pre"][1:], a["residual_post"][:-1])
    if model.config.parallel:
        close(a["residual_post"], a["residual_pre"] + (a["attention_output"] + a["mlp_output"]), 1e-6)
        np.testing.assert_array_equal(a["mlp_input"], a["attention_input"])
    else:
        close(a["residual_mid"], a["residual_pre"] + a["attention_output"], 1e-6)
        close(a["residual_post"], a["residual_mid"] + a["mlp_output"], 1e-6)


@pytest.mark.parametrize("kind", ["full", "nsa"])
def test_logits_are_those_of_forward(kind):
    model = model_of(kind)
    want = jax.jit(forward, static_argnames="config")(model.params, model.batch, model.config)
    close(model.clean["logits"], want.logits)
    close(model.clean["final_hidden"], want.hidden)


def test_patterns_weigh_values(model):
    a, c = model.clean, model.config
    groups = c.num_heads // c.kv_heads
    if c.attention.kind != "nsa":
        close(jax.nn.softmax(a["attention_scores"], axis=-1), a["attention_pattern"])
        assert not np.triu(a["attention_pattern"], 1).any()
        values = np.repeat(a["values"], groups, axis=3)
        close(np.einsum("lbhts,lbshd->lbthd", a["attention_pattern"], values), a["head_output"])
        return
    behind = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
    for i, branch in enumerate(("selection", "window"), 1):
        pattern = a[f"{branch}_pattern"]
        assert not np.triu(pattern, 1).any()
        close(pattern.sum(-1), np.ones(pattern.shape[:-1]))
        values = np.repeat(a["values"][:, :, :, i], groups, axis=3)
        close(np.einsum("lbhts,lbshd->lbthd", pattern, values), a[f"{branch}_output"])
    assert not a["window_pattern"][..., behind >= c.nsa.window].any()
    blocks = np.arange(LENGTH) // c.nsa.block_size
    read = (a["chosen_blocks"][..., None] == blocks).any(-2)
    np.testing.assert_array_equal(a["selection_pattern"] > 0, np.repeat(read, groups, axis=2) & (behind >= 0))
    whole = sum(
        a["gates"][..., i, None] * a[f"{branch}_output"]
        for i, branch in enumerate(("compression", "selection", "window"))
        if branch in c.nsa.branches
    )
    close(whole, a["head_output"])
    if "compression" in c.nsa.branches:
        ends = np.arange(a["compression_pattern"].shape[-1]) * c.nsa.stride + c.nsa.block_len - 1
        seen = ends[None] <= np.arange(LENGTH)[:, None]
        assert not a["compression_pattern"][..., ~seen].any()
        close(
            a["compression_pattern"].sum(-1),
            np.broadcast_to(seen.any(-1), a["compression_pattern"].shape[:-1]),
        )


def test_a_patch_by_its_own_value_changes_no_bit(model):
    for name in model.names:
        equal(model([model.patch(name, model.clean[name])]), model.clean, model.names)


def test_a_patch_changes_its_layer_and_position_and_what_follows(model):
    rng = np.random.default_rng(1)
    for name in model.names:
        clean, layered = model.clean[name], ACTIVATIONS[name].layered
        noise = np.asarray(rng.standard_normal(clean.shape), np.float32)
        value = np.full_like(clean, -1) if name == "chosen_blocks" else clean + noise
        got = model([model.patch(name, value, layers=[LAYER] if layered else None, positions=[AT])])
        axis = token_axis(model, name)
        if layered:
            np.testing.assert_array_equal(got[name][:LAYER], clean[:LAYER], err_msg=name)
            got_here, want_here = got[name][LAYER], value[LAYER]
            axis -= 1
        else:
            got_here, want_here = got[name], value
        np.testing.assert_array_equal(take(got_here, axis, AT), take(want_here, axis, AT), err_msg=name)
        for other in model.names:
            before = slice(0, AT)
            where = token_axis(model, other)
            np.testing.assert_array_equal(
                take(got[other], where, before),
                take(model.clean[other], where, before),
                err_msg=f"{name} {other}",
            )
        if name != "chosen_blocks":
            assert (got["logits"][:, AT] != model.clean["logits"][:, AT]).any(), name


def test_a_patch_of_one_head_leaves_the_others(model):
    for name in (name for name in model.names if model.heads(name)):
        got = model([model.patch(name, layers=[0], heads=[1])])[name][0]
        axis = next(i for i, axis in enumerate(model.sizes.axes(name)) if axis in ("H", "Hkv"))
        others = [head for head in range(model.heads(name)) if head != 1]
        assert not take(got, axis, 1).any(), name
        np.testing.assert_array_equal(take(got, axis, others), take(model.clean[name][0], axis, others))


def without(params, layer, *path, head=None):
    """Parameters with a leaf of one layer, or of one of its heads, set to zero."""
    leaf = params
    for key in path[:-1]:
        if key not in leaf:
            return params
        leaf = leaf[key]
    if path[-1] not in leaf:
        return params
    at = (layer,) if head is None else (layer, head)
    zeroed = leaf[path[-1]].at[at].set(0)
    return jax.tree_util.tree_map(lambda x: zeroed if x is leaf[path[-1]] else x, params)


@pytest.mark.parametrize("kind", ["full", "parallel", "nsa"])
def test_zeros_are_what_zero_weights_give(kind):
    model = model_of(kind)
    silent = {
        "attention_output": "attention/output attention/output_bias",
        "mlp_output": "mlp/down mlp/down_bias",
    }
    for name, leaves in silent.items():
        params = model.params
        for leaf in leaves.split():
            params = without(params, LAYER, "layers", *leaf.split("/"))
        got = model([model.patch(name, layers=[LAYER])])
        close(got["logits"], model((), params)["logits"], 1e-6)
    params = without(model.params, LAYER, "layers", "attention", "output", head=2)
    got = model([model.patch("head_output", layers=[LAYER], heads=[2])])
    close(got["logits"], model((), params)["logits"], 1e-6)
    assert np.abs(got["logits"] - model.clean["logits"]).max() > 1e-3


def test_an_off_by_one_layer_is_caught(monkeypatch):
    right = taps._slots

    def shifted(patch, count):
        slots = right(patch, count)
        return None if slots is None else jnp.roll(slots, 1)

    monkeypatch.setattr(taps, "_slots", shifted)
    model = Model(MODELS["full"], ("residual_pre", "residual_post", "logits"))
    with pytest.raises(AssertionError):
        test_a_patch_changes_its_layer_and_position_and_what_follows(model)


# One program: modes, positions of each row, sources, chosen layers


@functools.cache
def edited():
    """Of a small model: activations with three patches, as one jitted function of their data."""
    config = MODELS["full"]
    params, batch = draw_params(config), make_batch(config)

    @jax.jit
    def run(layer, add, positions, sources):
        patches = (
            Patch("residual_mid", layer, add, positions=positions, mode="add"),
            Patch("attention_pattern", layer, sources=sources, positions=positions, mode="zero"),
        )
        return activations(
            params, batch, config, ("attention_pattern", "residual_mid"), layers=[2, 0], patches=patches
        )

    return run, model_of("full").clean


def test_positions_of_each_row_sources_and_chosen_layers():
    run, clean = edited()
    positions, sources = np.asarray([[3, 5], [4, -1]], np.int32), np.asarray([0, 2], np.int32)
    add = np.full((12,), 2.0, np.float32)
    got = jax.tree.map(np.asarray, run(2, add, positions, sources))
    assert got["residual_mid"].shape == (2, 2, LENGTH, 12)
    equal({"x": got["residual_mid"][1]}, {"x": clean["residual_mid"][0]}, "x")
    want = clean["attention_pattern"][2].copy()
    for row, at in ((0, 3), (0, 5), (1, 4)):
        want[row, :, at, [0, 2]] = 0
    close(got["attention_pattern"][0], want, 1e-6)
    moved = np.zeros((2, LENGTH), bool)
    moved[[0, 0, 1], [3, 5, 4]] = True
    change = got["residual_mid"][0] - clean["residual_mid"][2]
    close(change[~moved], np.zeros_like(change[~moved]) + 0.0, 1e-6)
    # Both patches met at these positions: attention without two of its sources, then 2 was added.
    assert (np.abs(change[moved]) > 1e-4).all()


def test_a_sweep_over_layers_and_positions_is_one_program():
    model = model_of("full")
    config, params, batch = model.config, model.params, model.batch
    value = model.clean["residual_post"][::-1] * 0.5

    def patched(layer, position):
        patch = Patch("residual_post", layer, value[0], positions=position)
        return activations(params, batch, config, "logits", patches=patch)["logits"]

    over_positions = jax.vmap(patched, in_axes=(None, 0))
    swept = jax.jit(jax.vmap(over_positions, in_axes=(0, None)))(jnp.arange(3), jnp.arange(LENGTH))
    assert swept.shape == (3, LENGTH, 2, LENGTH, config.vocab_size)
    for layer, position in ((0, 0), (1, 7), (2, 10)):
        want = model(
            [model.patch("residual_post", np.broadcast_to(value[:1], value.shape), [layer], [position])]
        )
        close(swept[layer, position], want["logits"])


def test_other_layers_positions_and_values_compile_nothing():
    model, sizes = model_of("full"), []
    for layer, position, scale in ((0, 1, 1.0), (2, 5, 2.0), (1, 0, 0.0)):
        value = np.full((12,), scale, np.float32)
        patch = Patch("residual_mid", np.int32(layer), value, positions=np.asarray([position], np.int32))
        activations(model.params, model.batch, model.config, "final_hidden", patches=patch)
        sizes.append(interpretability._activations._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]


def directional(config, names):
    """Analytic and numerical derivative of a loss along random directions of patches that add zero."""
    params, batch = draw_params(config), make_batch(config)
    sizes, rng = Sizes(config, 2, LENGTH), np.random.default_rng(5)
    lead = lambda name: (config.num_layers,) if ACTIVATIONS[name].layered else ()
    zero = {name: jnp.zeros((*lead(name), *sizes.shape(name)), jnp.float32) for name in names}
    weights = jnp.asarray(rng.standard_normal((2, LENGTH, config.vocab_size)), jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(values):
        patches = tuple(Patch(name, value=value, mode="add") for name, value in values.items())
        logits = activations(params, batch, config, "logits", patches=patches)["logits"]
        return jnp.mean(weights * jax.nn.log_softmax(logits, axis=-1))

    gradients = loss(zero)[1]
    for name in names:
        direction = jnp.asarray(rng.standard_normal(zero[name].shape), jnp.float32)
        step = 2e-3 / jnp.sqrt(jnp.mean(direction**2))
        at = [float(loss({**zero, name: i * step * direction})[0]) for i in (-2, -1, 1, 2)]
        numeric = (8 * (at[2] - at[1]) - (at[3] - at[0])) / (12 * float(step))
        yield name, float(jnp.sum(gradients[name] * direction)), numeric


SMOOTH = ("embedding", "queries", "attention_pattern", "head_output", "mlp_hidden")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("full", SMOOTH),
        pytest.param(
            "nsa", ("residual_mid", "gates", "window_pattern", "selection_output"), marks=pytest.mark.slow
        ),
        pytest.param(
            "post_norms", ("attention_output", "keys", "values", "attention_scores"), marks=pytest.mark.slow
        ),
        pytest.param("experts", ("residual_mid", "mlp_output"), marks=pytest.mark.slow),
    ],
)
def test_gradients_are_directional_derivatives(kind, names):
    config = MODELS[kind]
    if config.moe is not None:  # all of them: another choice would be a jump
        moe = dataclasses.replace(config.moe, experts_per_token=config.moe.num_experts)
        config = dataclasses.replace(config, moe=moe)
    for name, analytic, numeric in directional(config, names):
        assert abs(analytic - numeric) < 2e-2 * max(abs(analytic), 1e-2), (name, analytic, numeric)


def test_chunked_attention_shows_the_same_patterns():
    config = dataclasses.replace(MODELS["full"], attention=CHUNKED)
    want = model_of("full").clean
    got = activations(draw_params(config), make_batch(config), config, ("attention_pattern", "logits"))
    close(got["attention_pattern"], want["attention_pattern"])
    close(got["logits"], want["logits"])


def equations(jaxpr):
    """Those of a program and of all that is inside of it."""
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield from equations(part)


def program(config, batch, *names):
    """The equations of reading names in layer 0; nothing is compiled."""
    run = lambda params: activations(params, batch, config, names, layers=0)
    return list(equations(jax.make_jaxpr(run)(draw_params(config)).jaxpr))


@pytest.mark.parametrize("kind", ["full", "nsa"])
def test_nothing_of_two_lengths_is_built_unless_a_pattern_is_asked_for(kind):
    length = 1031
    config = dataclasses.replace(MODELS[kind], position=NoPositions())
    if kind == "full":
        config = dataclasses.replace(config, attention=CHUNKED)
    batch = {"tokens": np.zeros((1, length), np.int32)}
    names = [name for name in activation_names(config) if "pattern" not in name and "scores" not in name]
    square = lambda found: any(v.aval.shape.count(length) > 1 for e in found for v in e.outvars)
    assert not square(program(config, batch, *names))
    assert square(program(config, batch, "attention_pattern" if kind == "full" else "window_pattern"))


def test_names_that_nobody_asks_for_add_nothing_to_the_program():
    config, batch = MODELS["full"], make_batch(MODELS["full"])
    writes = lambda *names: [e.primitive.name for e in program(config, batch, *names)].count("scatter")
    assert [writes("logits"), writes("logits", "queries"), writes("keys", "queries")] == [0, 1, 2]


def test_patches_of_the_forward_pass():
    model = model_of("full")
    patch = Patch("residual_post", 1, mode="zero", positions=AT)
    got = jax.jit(lambda p: forward(p, model.batch, model.config, patches=[patch]).logits)(model.params)
    want = model([model.patch("residual_post", layers=[1], positions=[AT])])["logits"]
    close(got, want)


# Refusals: one line, before anything is compiled

ZERO = np.zeros(12, np.float32)
REFUSED = {
    "no activation is called 'residual_posts'; did you mean residual_post": ("full", "residual_posts", {}),
    "no activation is called 'x'; there are embedding, ": ("full", "x", {}),
    "layers: 3 is outside of 0..2": ("full", "keys", {"layers": [3]}),
    "layers: -1 is outside of 0..2": ("full", "keys", {"layers": -1}),
    "layers: name at least one, and each once": ("full", "keys", {"layers": [1, 1]}),
    "attention_pattern: the model has none in layer 0: NSA has compression_pattern, ": (
        "nsa",
        "attention_pattern",
        {},
    ),
    "gates: the model has none in layer 0: its attention is full, not nsa": ("full", "gates", {}),
    "compression_output: the model has none in layer 0: it goes without the branch": (
        "nsa_min_max",
        "compression_output",
        {},
    ),
    "residual_mid: the model has none in layer 0: attention and MLP are parallel": (
        "parallel",
        "residual_mid",
        {},
    ),
    "mlp_hidden: the model has none in layer 1: it has experts": ("experts", "mlp_hidden", {}),
    "layers of a patch: 5 is outside of 0..2": ("full", "keys", Patch("residual_post", 5, mode="zero")),
    "positions of a patch: 11 is outside of 0..10": (
        "full",
        "keys",
        Patch("keys", positions=11, mode="zero"),
    ),
    "positions of a patch: -1 is outside of 0..10": (
        "full",
        "keys",
        Patch("keys", positions=[-1], mode="zero"),
    ),
    "positions of a patch are one number, \\[P\\] or \\[2, P\\], not \\[3, 1\\]": (
        "full",
        "keys",
        Patch("keys", positions=np.zeros((3, 1), int), mode="zero"),
    ),
    "positions of a patch are whole numbers": ("full", "keys", Patch("keys", positions=1.5, mode="zero")),
    "heads of a patch: 2 is outside of 0..1": ("full", "keys", Patch("keys", heads=2, mode="zero")),
    "residual_mid \\[B T D\\] has no heads": ("full", "keys", Patch("residual_mid", heads=0, mode="zero")),
    "queries \\[B T H Dk\\] has no sources": ("full", "keys", Patch("queries", sources=0, mode="zero")),
    "logits is not of layers": ("full", "keys", Patch("logits", 0, mode="zero")),
    "a patch of keys by replace needs a value": ("full", "keys", Patch("keys")),
    "a patch of keys by zero takes no value": ("full", "keys", Patch("keys", value=ZERO, mode="zero")),
    "a patch of residual_post has shape \\[5\\], which does not broadcast to \\[2, 11, 12\\] \\[B T D\\]": (
        "full",
        "keys",
        Patch("residual_post", 0, np.zeros(5, np.float32)),
    ),
    "has shape \\[2, 2, 11, 12\\], which does not broadcast to \\[3, 2, 11, 12\\] \\[L B T D\\]": (
        "full",
        "keys",
        Patch("residual_post", value=np.zeros((2, 2, 11, 12), np.float32)),
    ),
    "chosen_blocks are numbers of blocks": ("nsa", "gates", Patch("chosen_blocks", mode="zero")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_there_is_refused_in_one_line(message, monkeypatch):
    kind, name, more = REFUSED[message]
    config = MODELS[kind]
    monkeypatch.setattr(interpretability, "_activations", lambda *_, **__: pytest.fail("it was traced"))
    more = {"patches": more} if isinstance(more, Patch) else more
    with pytest.raises(ValueError, match=message) as error:
        activations({}, make_batch(config), config, name, **more)
    assert "\n" not in str(error.value)


def test_a_head_is_patched_behind_a_cache():
    """As in the whole sequence, where nothing before the last token changes with it."""
    config = MODELS["full"]
    batch = {"tokens": make_batch(config)["tokens"]}
    params = draw_params(config)
    patch = lambda **more: Patch("head_output", layers=1, heads=0, value=0.5, **more)
    at = np.full((len(batch["tokens"]), 1), LENGTH - 1)
    whole = forward(params, batch, config, patches=[patch(positions=at)], logit_positions=at).logits
    size = (len(batch["tokens"]), LENGTH)
    before = {"tokens": batch["tokens"][:, :-1]}
    cache = forward(params, before, config, cache=init_cache(config, *size)).cache
    last = {"tokens": batch["tokens"][:, -1:]}
    continued = forward(params, last, config, patches=[patch()], cache=cache).logits
    np.testing.assert_allclose(continued, whole, rtol=1e-4, atol=1e-5)
    plain = forward(params, last, config, cache=cache).logits
    assert np.abs(plain - whole).max() > 1e-3


def test_what_does_not_go_together_is_refused():
    config, nsa = MODELS["full"], MODELS["nsa"]
    batch = make_batch(config)
    patch = Patch("keys", 0, mode="zero")
    streaming = Probe(blocked=np.zeros((config.num_layers, *batch["tokens"].shape), bool))
    with pytest.raises(ValueError, match="mode of a patch is replace, add or zero, not 'double'"):
        Patch("keys", 0, mode="double")
    with pytest.raises(ValueError, match="cannot be used with a cache"):
        forward({}, batch, config, patches=[patch], cache=init_cache(config, 2, LENGTH))
    with pytest.raises(ValueError, match="attention_pattern: a probe streams attention"):
        forward({}, batch, config, patches=[Patch("attention_pattern", mode="zero")], probe=streaming)
    with pytest.raises(ValueError, match="one text a row"):
        activations({}, batch | {"segment_ids": batch["tokens"]}, nsa, "window_pattern")
    sparse = dataclasses.replace(config, sparsity=Quest(num_blocks=4, num_local=1))
    with pytest.raises(ValueError, match=r"sparsity at inference \(quest\) keeps no weights"):
        activations({}, batch, sparse, "attention_pattern")
    with pytest.raises(ValueError, match="the model has no vision"):
        activations({}, batch | {"images": 0}, config, "logits")


@pytest.mark.parametrize("kind", ["full", "nsa"])
def test_16_bits_and_recomputed_layers_trace(kind):
    """Every name read, every float patched by adding, and differentiated; nothing is compiled."""
    config = dataclasses.replace(MODELS[kind], compute_dtype="bfloat16", remat="layer")
    batch, sizes = make_batch(config), Sizes(config, 2, LENGTH)
    names = activation_names(config)
    values = {n: jnp.zeros(sizes.shape(n)) for n in names if n != "chosen_blocks"}

    def run(values):
        patches = [Patch(name, value=value, mode="add") for name, value in values.items()]
        return activations(draw_params(config), batch, config, names, patches=patches)

    wide = {"logits": jnp.float32, "attention_scores": jnp.float32, "chosen_blocks": jnp.int32}
    for name, found in jax.eval_shape(run, values).items():
        assert found.dtype == wide.get(name, jnp.bfloat16), name
    gradients = jax.eval_shape(jax.grad(lambda values: jnp.sum(run(values)["logits"])), values)
    assert gradients.keys() == values.keys()
