"""Modules on plain dicts: parameters that do not fit are refused; what forward returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import Block, Output, abstract_params, bind, forward
from jaxlab.models.layers import Norm
from tests.models.tiny import draw_params, make_config


def test_a_module_takes_the_parameters_of_its_names_and_no_others():
    config = make_config("nsa", attention_bias=False)
    layers = abstract_params(config)["layers"]
    attention = {**layers["attention"], "gate": {"output": layers["attention"]["gate"]["output"]}}
    with pytest.raises(ValueError, match=r"have no attention\.gate\.bias: they are not those of the config"):
        bind({**layers, "attention": attention}, Block, config)
    with pytest.raises(ValueError, match=r"have an unknown attention\.extra"):
        bind({**layers, "attention": {**layers["attention"], "extra": jnp.ones(3)}}, Block, config)
    # One for another, as many as there should be: the order alone would have passed.
    renamed = {"rest" if name == "mlp" else name: tree for name, tree in layers.items()}
    with pytest.raises(ValueError, match=r"have no mlp\.down"):
        bind(renamed, Block, config)


def test_bound_parameters_stand_where_they_are_named():
    params = {"scale": jnp.asarray([1.0, 2.0]), "bias": jnp.asarray([10.0, 20.0])}
    norm = bind(params, Norm, (2,), "layer", 1e-6)
    np.testing.assert_allclose(norm(jnp.asarray([[-3.0, 3.0]])), [[9.0, 22.0]], rtol=1e-5)


@pytest.fixture(scope="module")
def output():
    config = make_config("nsa", num_layers=1)
    shapes = lambda tokens: forward(draw_params(config), {"tokens": tokens}, config)
    return jax.eval_shape(shapes, jax.ShapeDtypeStruct((2, 5), jnp.int32))


def test_an_output_unpacks_and_is_a_tree(output):
    assert isinstance(output, Output)
    logits, intermediates = output
    assert logits.shape == output[0].shape == output.logits.shape == (2, 5, 13)
    assert set(intermediates) == set(output[1]) == {"hidden", "chosen_blocks"}
    assert intermediates["chosen_blocks"].shape == output.chosen_blocks.shape
    assert output.cache is None
    assert output.selector_loss is None
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(output)]
    assert names == [".logits", ".hidden", ".chosen_blocks"]
    assert jax.tree.map(lambda leaf: leaf.ndim, output).hidden == 3
