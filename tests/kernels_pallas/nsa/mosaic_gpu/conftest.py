"""Where reports of compiled kernels go."""

import pytest

from kernels_pallas.nsa.specs import h100


@pytest.fixture(scope="session")
def dump(tmp_path_factory):
    """One folder for all of them: its name is read when the first kernel is compiled."""
    folder = tmp_path_factory.mktemp("ptxas")
    h100.dump_to(folder)
    return folder
