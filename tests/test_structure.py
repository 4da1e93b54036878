"""Imports go one way, and importing the package costs next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import basinscope

PACKAGE = Path(basinscope.__file__).parent
MAY_IMPORT = {
    "kernels": {"kernels", "jit", "native"},
    "io": {"io"},
    "models": {"models"},
    "sampling": {"sampling", "kernels", "io", "models"},
    "attribution": {"attribution", "sampling", "io", "models"},
    "analysis": {"analysis", "io", "jit", "native"},
    "report": {"report", "analysis", "io", "sampling", "kernels", "models", "native"},
}
NEVER = {"io": {"torch"}, "analysis": {"torch", "datasets", "transformers"}}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room: str) -> None:
    for file in (PACKAGE / room).rglob("*.py"):
        for module in imported_modules(file):
            top, _, rest = module.partition(".")
            assert top not in NEVER.get(room, set()), f"{file.name} imports {module}"
            if top == "basinscope" and rest:
                target = rest.partition(".")[0]
                assert target in MAY_IMPORT[room], f"{file.name} imports {module}"


def test_importing_the_package_is_inert_and_fast() -> None:
    code = """
import sys, time
start = time.perf_counter()
import basinscope
spent = time.perf_counter() - start
loaded = {"torch", "triton", "numba", "zarr", "xarray", "dask"} & set(sys.modules)
assert not loaded, loaded
assert spent < 0.2, spent
assert set(basinscope.__all__) <= set(dir(basinscope))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_analysis_takes_no_torch_and_under_two_seconds() -> None:
    code = """
import sys, time
start = time.perf_counter()
import basinscope.analysis, basinscope.analysis.bif, basinscope.analysis.susceptibilities
import basinscope.analysis.llc
spent = time.perf_counter() - start
loaded = {"torch", "numba", "transformers", "datasets"} & set(sys.modules)
assert not loaded, loaded
assert spent < 2, spent
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_load() -> None:
    for name in basinscope.__all__:
        assert getattr(basinscope, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = basinscope.nothing


def imported_modules(file: Path) -> list[str]:
    """Every import of a file that runs, wherever it stands; those for type checkers do not."""
    found: list[str] = []
    tree = ast.parse(file.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found.append(node.module or "")
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_the_kernels_and_the_store_name_the_same_metrics() -> None:
    from basinscope.io.schema import METRICS
    from basinscope.kernels.sgld import METRIC_NAMES

    assert tuple(METRICS) == METRIC_NAMES
