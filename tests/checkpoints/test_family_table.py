"""Families are loaded by themselves: the table of their modules says what these declare."""

import pkgutil
import subprocess
import sys

from jaxlab.checkpoints import families
from jaxlab.checkpoints.families.table import MODULES


def test_the_table_is_what_the_modules_declare():
    found = {}
    for module in pkgutil.iter_modules(families.__path__):
        if own := families.declared(module.name):
            found[module.name] = {name: family.model_types for name, family in own.items()}
    assert found == MODULES
    kinds = [kind for one in found.values() for own in one.values() for kind in own]
    assert len(kinds) == len(set(kinds))
    for module, own in found.items():
        for name, types in own.items():
            assert families.find(name) is families.declared(module)[name]
            assert all(families.find_by_model_type(kind) is families.find(name) for kind in types)


def test_a_family_loads_without_the_others():
    code = (
        "import sys; from jaxlab.checkpoints import families; families.find_by_model_type('llama');"
        "print(sum(name in families.table.MODULES for name in (m.rpartition('.')[2] for m in sys.modules"
        " if m.startswith('jaxlab.checkpoints.families.'))))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "1"
