"""How the command line says what is wrong, and what installs what is missing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from basinscope.report.console import EXTRAS, TERMINATED, install_hint, readable_errors

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
BROUGHT_ALONG = {"pyarrow", "tokenizers"}  # by datasets and transformers


def test_a_missing_module_is_said_with_what_installs_it(capsys: pytest.CaptureFixture[str]) -> None:
    for name, extra in (("torch", "sampling"), ("transformers", "hf"), ("matplotlib", "report")):
        with pytest.raises(typer.Exit), readable_errors():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        said = capsys.readouterr().err
        assert f'No module named {name!r}: pip install "basinscope[{extra}]", or from' in said
        assert f'pip install -c constraints.txt ".[{extra}]"' in said
    assert install_hint("nothing") == ""


def test_the_hints_name_the_projects_extras() -> None:
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    for extra, brought in EXTRAS.items():
        packages = {requirement.partition(">")[0] for requirement in extras[extra]}
        assert set(brought) - BROUGHT_ALONG == packages


def test_a_name_of_the_package_says_what_installs_it() -> None:
    code = """
import sys
sys.modules["torch"] = None
import basinscope
try:
    basinscope.sample
except ModuleNotFoundError as error:
    assert 'pip install "basinscope[sampling]"' in str(error), error
    assert error.name == "torch"
    assert isinstance(error.__cause__, ModuleNotFoundError)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_stop_is_said_whatever_signal_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for stop, end in ((KeyboardInterrupt(), typer.Exit), (SystemExit(TERMINATED), SystemExit)):
        with pytest.raises(end), readable_errors():
            raise stop
        assert "stopped; the same command continues" in capsys.readouterr().err
    with pytest.raises(SystemExit), readable_errors():
        raise SystemExit(0)
    assert capsys.readouterr().err == ""
