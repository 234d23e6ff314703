"""Maps in results.json: right where they are strong, small however long the prompt is."""

import json

import numpy as np
import pytest

from jaxlab.icl import pack_maps, unpack_maps


@pytest.fixture(scope="module")
def maps():
    rng = np.random.default_rng(0)
    return np.tril(np.exp(rng.normal(0.0, 2.0, (3, 60, 60)))).astype(np.float32) * 1e-4


def test_maps_come_back(maps):
    found = unpack_maps(json.loads(json.dumps(pack_maps(maps))))
    expected = np.tril(maps, k=-1)
    largest = expected.max(axis=(1, 2), keepdims=True)
    assert found.shape == maps.shape
    np.testing.assert_allclose(found, expected, atol=float(largest.max()) * 4e-3)
    strong = expected > 0.01 * largest
    np.testing.assert_allclose(found[strong], expected[strong], rtol=0.04)
    assert not np.triu(found).any()


def test_what_is_too_long_loses_its_weakest_flows(maps):
    whole, short = pack_maps(maps), pack_maps(maps, most=2000)
    assert whole["least"] == 0.0 < short["least"] < 1.0
    assert len(short["data"]) <= 2000 < len(whole["data"])
    lost = unpack_maps(short) == 0.0
    part = unpack_maps(whole) / np.array(whole["scale"])[:, None, None]
    np.testing.assert_array_equal(lost, part <= short["least"] * (1 + 1e-5))


@pytest.mark.parametrize("maps", [np.zeros((2, 5, 5), np.float32), np.full((1, 1, 1), np.nan, np.float32)])
def test_maps_of_nothing(maps):
    assert not unpack_maps(pack_maps(maps)).any()
