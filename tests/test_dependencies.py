"""The direction of dependencies, read from the imports: layers, faces, no circles, what kernels use."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]

LAYERS: tuple[tuple[str, ...], ...] = (
    ("tasks", "__main__"),
    ("reporting",),
    ("app",),
    ("merging", "icl", "training", "evaluation"),
    ("data", "retrofit"),
    ("checkpoints",),
    ("processing",),
    ("losses", "costs"),
    ("models",),
    ("config", "distributed"),
    ("errors", "files"),
)
"""What is in jaxlab from top to bottom; those of one layer may use each other, without a circle."""

KERNELS_MAY_USE = {"jax", "numpy", "jaxtyping"}


def build(*packages: str) -> grimp.ImportGraph:
    return grimp.build_graph(
        *packages, include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return build("jaxlab", "kernels_pallas")


def imports(graph: grimp.ImportGraph) -> Iterator[tuple[str, str]]:
    """Every import within the project: (importing module, imported module)."""
    for importer in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(importer)):
            yield importer, imported


def package_of(module: str) -> str:
    """`jaxlab.models` of `jaxlab.models.vision.vit`; of kernels the operator's package."""
    return ".".join(module.split(".")[:2])


def edges_up(graph: grimp.ImportGraph, root: str, layers: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports of a higher layer by a lower one, and modules that no layer names."""
    level = {f"{root}.{name}": number for number, names in enumerate(layers) for name in names}
    found = [
        f"{module} is in no layer"
        for module in sorted({package_of(m) for m in graph.modules if m.startswith(f"{root}.")} - set(level))
    ]
    for importer, imported in imports(graph):
        below, above = level.get(package_of(importer)), level.get(package_of(imported))
        if below is not None and above is not None and above < below:
            found.append(f"{importer} imports {imported}")
    return found


def circles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of more than one)."""
    out: dict[str, list[str]] = {}
    for source, target in edges:
        if source != target:
            out.setdefault(source, []).append(target)
            out.setdefault(target, [])
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for following in out[node]:
            if following not in index:
                visit(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], index[following])
        if low[node] == index[node]:
            at = stack.index(node)
            group = sorted(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    for node in sorted(out):
        if node not in index:
            visit(node)
    return found


def past_the_face(graph: grimp.ImportGraph) -> list[str]:
    """Imports of a module inside another package, where only the package itself, its face, may be named."""
    return [
        f"{importer} imports {imported}; take it from {package_of(imported)}"
        for importer, imported in imports(graph)
        if imported.count(".") > 1
        and package_of(importer) != package_of(imported)
        and imported.split(".")[0] in ("jaxlab", "kernels_pallas", "sample")
    ]


def names_at_run_time(root: Path, package: str, top: str) -> list[str]:
    """Modules below `top` that name it in a string, as for `importlib`."""
    found = []
    for file in sorted((root / package).rglob("*.py")):
        module = ".".join(file.relative_to(root).with_suffix("").parts)
        if module.startswith(top):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value.startswith(f"{top}.")
            ):
                found.append(f"{module}:{node.lineno} names {node.value}")
    return found


def externals(graph: grimp.ImportGraph, package: str) -> set[str]:
    """What a package imports from outside the standard library and the package itself."""
    return {
        imported.split(".")[0] for importer, imported in imports(graph) if importer.split(".")[0] == package
    } - {package, *sys.stdlib_module_names}


def test_no_edge_goes_up(graph: grimp.ImportGraph) -> None:
    assert edges_up(graph, "jaxlab", LAYERS) == []


def test_no_circles(graph: grimp.ImportGraph) -> None:
    """Neither between packages, nor between modules of one package but for its face, which is lazy."""
    ours = {
        (importer, imported)
        for importer, imported in imports(graph)
        if imported.split(".")[0] in ("jaxlab", "kernels_pallas")
    }
    packages = {(package_of(importer), package_of(imported)) for importer, imported in ours}
    assert circles({edge for edge in packages if "jaxlab" not in edge}) == []
    faces = {importer for importer, imported in ours if imported.startswith(f"{importer}.")}
    assert circles({(a, b) for a, b in ours if a not in faces}) == []


def test_packages_meet_at_their_faces(graph: grimp.ImportGraph) -> None:
    assert past_the_face(graph) == []


def test_no_task_is_named_from_below() -> None:
    assert names_at_run_time(ROOT, "jaxlab", "jaxlab.tasks") == []


def test_kernels_stand_on_jax_alone(graph: grimp.ImportGraph) -> None:
    assert externals(graph, "kernels_pallas") <= KERNELS_MAY_USE


def test_planted_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "sample/__init__.py": "",
        "sample/tasks/__init__.py": "",
        "sample/tasks/train.py": "from sample.models.inner import f\n",
        "sample/models/__init__.py": "",
        "sample/models/inner.py": "def f():\n    from sample.tasks import train\n",
        "sample/models/outer.py": "import requests\nNAME = 'sample.tasks.train'\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    graph = build("sample")
    assert edges_up(graph, "sample", (("tasks",), ("models",))) == [
        "sample.models.inner imports sample.tasks.train"
    ]
    assert edges_up(graph, "sample", (("tasks",),)) == ["sample.models is in no layer"]
    assert circles(set(imports(graph))) == [["sample.models.inner", "sample.tasks.train"]]
    assert "sample.tasks.train imports sample.models.inner; take it from sample.models" in past_the_face(
        graph
    )
    assert names_at_run_time(tmp_path, "sample", "sample.tasks") == [
        "sample.models.outer:2 names sample.tasks.train"
    ]
    assert externals(graph, "sample") == {"requests"}
