"""Where ptxas' reports go."""

import os

import pytest


@pytest.fixture(scope="session")
def dump(tmp_path_factory):
    """A folder for `h100.compile_for_h100`; its name is read when the first kernel is compiled."""
    folder = tmp_path_factory.mktemp("ptxas")
    os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": str(folder)}
    return folder
