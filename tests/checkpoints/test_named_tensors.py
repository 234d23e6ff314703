"""The tensors of a model by name, without jax: what `account` finds with it."""

import pytest

from jaxlab.checkpoints import model_tensors, open_model
from tests.checkpoints import folders

QUICK = ("deepseek_v3", "gpt2", "gpt_neox", "mllama", "qwen3_vl_moe", "stablelm_parallel")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in folders.CASES]
)
def test_kinds_are_the_entries_of_the_account(tmp_path, case):
    opened = open_model(folders.make(tmp_path / case, case))
    found, account = model_tensors(opened), opened.account
    assert found.family == account.family
    assert set(found.copies) == set(account.copies)
    assert set(found.ignored) == set(account.ignored)
    kinds = {kind.path: kind for kind in found.kinds if kind.names}
    assert kinds.keys() == {entry.path for entry in account.entries}
    for entry in account.entries:
        kind = kinds[entry.path]
        assert set(kind.names) == set(entry.names)
        assert kind.is_language == entry.is_language
        if kind.is_language:  # what is merged goes by the order of layers
            assert (kind.names, kind.layers, kind.paths) == (entry.names, entry.layers, entry.paths)
            assert (kind.pattern, kind.join, kind.runs) == (entry.pattern, entry.join, entry.runs)
