"""Hub ids, offline: a cache in the hub's own layout, and what is said where something is missing."""

import sys

import pytest

from jaxlab.checkpoints.locate import hub_snapshot, resolve
from jaxlab.errors import UserError

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra hf)")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """owner/name at one commit, the main branch."""
    root = tmp_path / "models--owner--name"
    folder = root / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    for branch in ("main", "step143000"):  # Pythia's training checkpoints are branches
        (root / "refs" / branch).write_text(COMMIT)
    (root / "blobs" / "abc").write_text("{}")
    (folder / "config.json").symlink_to("../../blobs/abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return folder


@pytest.mark.parametrize("revision", [None, "main", "step143000", COMMIT])
def test_a_model_is_taken_from_the_cache(cache, revision):
    assert hub_snapshot("owner/name", revision=revision, offline=True) == cache
    if revision is not None:
        assert hub_snapshot(f"owner/name@{revision}", offline=True) == cache
        assert resolve(f"owner/name@{revision}", offline=True) == cache


def test_the_environment_can_forbid_the_network(cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_snapshot("owner/name") == cache


@pytest.mark.parametrize(
    ("reference", "revision", "message"),
    [
        ("owner/other", None, "not in the cache"),
        ("owner/name@v2", None, "not in the cache"),
        ("owner/name@main", "v2", "names one revision"),
        ("owner/name@", None, "names no revision"),
        ("owner/na--me", None, "cannot be fetched|not in the cache"),
    ],
)
def test_what_is_missing_is_one_line(cache, reference, revision, message):
    with pytest.raises(UserError, match=message) as error:
        hub_snapshot(reference, revision=revision, offline=True)
    assert "\n" not in str(error.value)


def test_only_tensors_and_settings_are_asked_for(cache, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", download)
    hub_snapshot("owner/name", revision="v1")
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("owner/name", "v1", False)
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow_patterns"])
    files = [
        "config.json",
        "model-1.safetensors",
        "model.safetensors.index.json",
        "spiece.model",
        "merges.txt",
        "modeling.py",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/x.safetensors",
        "a.gguf",
    ]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(hub.utils.filter_repo_objects(files, **patterns)) == files[:5]
    hub_snapshot("owner/name", allow_pickle=True)
    assert "pytorch_model*.bin" in asked["allow_patterns"]


def test_a_network_that_breaks_off_is_one_line(cache, monkeypatch):
    def download(name, **options):
        raise hub.errors.HTTPError("connection reset")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UserError, match="cannot be fetched: connection reset"):
        hub_snapshot("owner/name")


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'jaxlab\[hf\]'"):
        hub_snapshot("owner/name")
