"""Needles by depth, counted by hand."""

import numpy as np

from jaxlab.evaluation.needle import ByDepth


def batch(depths):
    positions = np.array([3, 9], np.int32)[np.array(depths)]
    return {
        "tokens": np.zeros((len(depths), 11), np.int32),
        "needle_depths": np.array(depths, np.int32),
        "needle_positions": positions,
    }


def test_accuracy_is_counted_by_depth_over_batches():
    needles = ByDepth()
    needles.add(batch([1, 0, 0]), np.array([True, False, True]))
    needles.add(batch([0, 0, 1]), np.array([False, False, True]))
    assert needles.results() == {
        "length": 11,
        "depths": [
            {"depth": 0.3, "distance": 7, "sequences": 4, "exact_match": 0.25},
            {"depth": 0.9, "distance": 1, "sequences": 2, "exact_match": 1.0},
        ],
    }


def test_other_data_has_none():
    needles = ByDepth()
    needles.add({"tokens": np.zeros((2, 4), np.int32)}, np.array([True, True]))
    assert needles.results() is None
