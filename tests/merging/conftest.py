import pytest

from tests.merging import mergekit_desk


@pytest.fixture(scope="session")
def desk_of_mergekit(tmp_path_factory):
    """A folder with small models of several families, as files of mergekit name them; nobody writes there."""
    place = tmp_path_factory.mktemp("mergekit")
    mergekit_desk.models_module().write(place)
    return place


@pytest.fixture
def at_desk(desk_of_mergekit, monkeypatch):
    """The same, as the current folder."""
    monkeypatch.chdir(desk_of_mergekit)
    return desk_of_mergekit
