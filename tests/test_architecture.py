"""The direction of imports, the docstrings of the public names, and the code of the README."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import torchcap

ROOT = Path(__file__).parents[1]

# A module may import what stands above it here, and its own entry; one that is not named belongs to
# the longest entry that its name starts with.
ORDER = (
    "torchcap.errors",
    "torchcap.nests",
    "torchcap.modes",
    "torchcap.processes",
    "torchcap.digest",
    "torchcap.batches",
    "torchcap.graph.sizes",
    "torchcap.graph.where",
    "torchcap.graph.calls",
    "torchcap.graph.channels",
    "torchcap.graph.inputs",
    "torchcap.graph.stand_ins",
    "torchcap.graph.copies",
    "torchcap.graph.surroundings",
    "torchcap.graph.records",
    "torchcap.graph.recorder",
    "torchcap.graph.trace",
    "torchcap.graph.escapes",
    "torchcap.graph.branches",
    "torchcap.graph.rewritten",
    "torchcap.graph.rewriting",
    "torchcap.graph.proof",
    "torchcap.graph.legend",
    "torchcap.graph.spaces",
    "torchcap.graph.kinds",
    "torchcap.graph.weights",
    "torchcap.graph.values",
    "torchcap.graph.numbers",
    "torchcap.graph.operators",
    "torchcap.graph.moving",
    "torchcap.graph.factories",
    "torchcap.graph.layers",
    "torchcap.graph.heads",
    "torchcap.graph.functional",
    "torchcap.graph.attention",
    "torchcap.graph.einsum",
    "torchcap.graph.rules",
    "torchcap.graph.folds",
    "torchcap.graph.taps",
    "torchcap.graph.findings",
    "torchcap.graph.interpret",
    "torchcap.graph.analyze",
    "torchcap.graph",
    "torchcap.plan.documents",
    "torchcap.plan.plan",
    "torchcap.plan",
    "torchcap.projection.polar",
    "torchcap.projection.maps",
    "torchcap.projection",
    "torchcap.transform.student",
    "torchcap.transform",
    "torchcap.training.taps",
    "torchcap.training.losses",
    "torchcap.training.rounds",
    "torchcap.training.recipe",
    "torchcap.training.progress",
    "torchcap.training.regression",
    "torchcap.training.replay",
    "torchcap.training.fit",
    "torchcap.training.norms",
    "torchcap.training.relax",
    "torchcap.training.state",
    "torchcap.training",
    "torchcap.budget",
    "torchcap.pipeline",
    "torchcap.report",
    "torchcap.plot",
    "torchcap.checkpoint",
    "torchcap.cli",
    "torchcap",
)
# What stands above and still may not be imported: the pieces know tensors and axes alone.
FORBIDDEN = {"torchcap.projection": ("torchcap.graph", "torchcap.plan")}


def starts_with(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def place(module: str) -> int:
    """Return where a module stands in ORDER; the last entry is the package's own file alone."""
    entries = [prefix for prefix in ORDER[:-1] if starts_with(module, prefix)]
    if not entries and module != "torchcap":
        raise LookupError(f"{module} has no place in ORDER; give it one")
    return ORDER.index(max(entries, key=len, default="torchcap"))


def may_import(importer: str, imported: str) -> bool:
    forbidden = [f for p, names in FORBIDDEN.items() if starts_with(importer, p) for f in names]
    if any(starts_with(imported, prefix) for prefix in forbidden):
        return False
    return place(imported) <= place(importer)


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted((ROOT / "torchcap").rglob("*.py"))}


def imports(source: str) -> set[str]:
    """Return the modules of torchcap that a source imports, wherever it does so."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"relative import in line {node.lineno}; write it in full")
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import name` imports a module, a name of the package, or some of both.
            found.update(members & MODULES.keys())
            if members - MODULES.keys():
                found.add(str(node.module))
    return {name for name in found if starts_with(name, "torchcap")}


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_stands_above_it(module: str) -> None:
    upward = [
        name
        for name in sorted(imports(MODULES[module].read_text("utf-8")))
        if not may_import(module, name)
    ]
    assert upward == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("torchcap.graph.trace", "from torchcap.graph import rules"),
        ("torchcap.graph.rules", "import torchcap.plan.plan"),
        ("torchcap.projection.polar", "from torchcap.graph.spaces import Port"),
        ("torchcap.transform.prepare", "def f():\n    from torchcap.training.taps import Tap"),
        ("torchcap.pipeline", "from torchcap import prepare"),
    ],
)
def test_import_in_the_wrong_direction_is_noticed(importer: str, source: str) -> None:
    (imported,) = imports(source)
    assert not may_import(importer, imported)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("torchcap", "torchcap.pipeline"),
        ("torchcap.graph.rules", "torchcap.graph.spaces"),
        ("torchcap.projection.initialize", "torchcap.projection.moments"),
        ("torchcap.training.losses", "torchcap.errors"),
    ],
)
def test_import_in_the_right_direction_is_allowed(importer: str, imported: str) -> None:
    assert may_import(importer, imported)


def test_module_without_a_place_is_noticed() -> None:
    with pytest.raises(LookupError, match=r"torchcap\.helpers"):
        place("torchcap.helpers")


@pytest.mark.parametrize("name", sorted(set(torchcap.__all__) - {"__version__"}))
def test_public_name_has_a_docstring(name: str) -> None:
    documentation = getattr(torchcap, name).__doc__ or ""
    # A data class without a docstring gets its signature for one.
    assert documentation.strip() != ""
    assert not documentation.startswith(f"{name}(")


def test_every_module_has_a_docstring() -> None:
    assert [m for m, f in MODULES.items() if not ast.get_docstring(ast.parse(f.read_text()))] == []


def test_public_names_are_sorted_and_complete() -> None:
    public = {
        name
        for name, value in vars(torchcap).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public | {"__version__"} == set(torchcap.__all__)
    # Constants and acronyms stand before classes, classes before functions, as the linter has it.
    kinds = [(not n.isupper(), not n[0].isupper(), n) for n in torchcap.__all__]
    assert kinds == sorted(kinds)


def test_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it saves a file
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    sizes = []
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        sizes.append([size_of(names[model]) for model in ("model", "small")])
    assert len(blocks) == 7
    assert all(model == sizes[0][0] for model, _ in sizes)
    assert all(small < model for model, small in sizes[:-1])
    assert sizes[1] == sizes[0]
    assert sizes[5] == sizes[4] == sizes[3]
    assert [space.name for space in names["graph"].free] == ["0"]
    assert names["small"][0].out_channels == 4


def size_of(model: object) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
