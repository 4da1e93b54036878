"""Compiled functions as files: made once, loaded without the compiler, never trusted blindly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basinscope import native

MODULE = """
import numba
from basinscope.jit import FLOAT64, view

FACTORS = {
    "double": 2.0, "triple": 3.0, "fivefold": 5.0, "sevenfold": 7.0, "elevenfold": 11.0,
    "thirteenfold": 13.0,
}

def scaled(word):
    factor = FACTORS[word]

    def scale(count, values):
        x = view(values, 0, count, FLOAT64)
        for i in range(count):
            x[i] *= factor

    return scale

def reshaped():
    def double(count, values):
        view(values, 0, count, FLOAT64).reshape(2, count // 2)[:] *= 2

    return double
"""
CALL = """
import json, sys
import numpy as np
from basinscope import native

values = np.arange(5.0)
functions = [native.function("made_up", "scaled", word) for word in sys.argv[1].split()]
for function in functions:
    function(4, native.address(values))
print(json.dumps([values.tolist(), sorted({"numba", "llvmlite"} & set(sys.modules))]))
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "made_up.py").write_text(MODULE)
    return tmp_path


def call(home: Path, word: str, **environment: str) -> tuple[list[float], list[str]]:
    """Call the function in a process of its own: its result, and which compilers that loaded."""
    settings = {"XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(home / "source")}
    done = subprocess.run(
        [sys.executable, "-c", CALL, word],
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    values, loaded = json.loads(done.stdout)
    return values, loaded


def files(home: Path) -> list[str]:
    return sorted(f.name for f in (home / "cache").rglob("*") if f.is_file())


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_later_process_loads_the_library_and_no_compiler(home: Path) -> None:
    doubled = [0.0, 2.0, 4.0, 6.0, 4.0]
    assert call(home, "double") == (doubled, ["llvmlite", "numba"])
    assert files(home) == ["made_up.scaled-double.so"]
    assert call(home, "double") == (doubled, [])
    assert call(home, "triple")[0] == [0.0, 3.0, 6.0, 9.0, 4.0]


def test_without_a_c_compiler_llvm_loads_the_code(home: Path) -> None:
    empty = str(home / "source")
    first = call(home, "double", PATH=empty)
    assert files(home) == ["made_up.scaled-double.o"]
    assert call(home, "double", PATH=empty) == (first[0], ["llvmlite"])
    assert first[0] == [0.0, 2.0, 4.0, 6.0, 4.0]
    assert call(home, "double triple", PATH=empty)[0] == [0.0, 6.0, 12.0, 18.0, 4.0]


def test_a_changed_source_is_compiled_anew(home: Path) -> None:
    call(home, "double")
    source = home / "source" / "made_up.py"
    source.write_text(MODULE.replace('"double": 2.0', '"double": 20.0'))
    assert call(home, "double")[0] == [0.0, 20.0, 40.0, 60.0, 4.0]


@pytest.mark.parametrize("compiler", [True, False], ids=["library", "object code"])
def test_damaged_files_are_made_anew(compiler: bool, home: Path) -> None:
    """Code that was cut or zeroed, as by a power cut, would end the process that loads it."""
    words, times = "double triple fivefold sevenfold elevenfold thirteenfold", 30_030.0
    result = [0.0, times, 2 * times, 3 * times, 4.0]
    path = {} if compiler else {"PATH": str(home / "source")}
    call(home, words, **path)
    made = [file for file in (home / "cache").rglob("*") if file.is_file()]
    damaged = [damage(file.read_bytes()) for file, damage in zip(made, DAMAGES, strict=True)]
    for file, content in zip(made, damaged, strict=True):
        file.write_bytes(content)
    assert call(home, words, **path) == (result, ["llvmlite", "numba"])
    for file, content in zip(made, damaged, strict=True):
        assert file.read_bytes() != content
    assert call(home, words, **path) == (result, [] if compiler else ["llvmlite"])


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda code: b"",
    lambda code: b"no code",
    lambda code: code[: len(code) // 2],
    lambda code: code[: len(code) // 4] + bytes(len(code) // 4) + code[len(code) // 4 * 2 :],
    lambda code: code[:-1],
    lambda code: code + b"more",
]


def test_code_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, really, sizes = tmp_path / "made.so", os.fsync, list[int]()

    def fsync(descriptor: int) -> None:
        really(descriptor)
        assert not file.exists()
        sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    native._write(b"code", file)
    assert sizes == [file.stat().st_size]


def test_a_cache_that_cannot_be_written_is_done_without(home: Path) -> None:
    (home / "cache").write_text("a file where the directory would be")
    assert call(home, "double")[0] == [0.0, 2.0, 4.0, 6.0, 4.0]


def test_a_function_that_needs_python_is_refused(home: Path, monkeypatch: Any) -> None:
    """It would be linked, and end the process when it is called."""
    monkeypatch.syspath_prepend(str(home / "source"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    with pytest.raises(TypeError, match=r"made_up\.reshaped.*calls.*numba_attempt_nocopy_reshape"):
        native.function("made_up", "reshaped")
    assert files(home) == []


def test_an_address_is_that_of_the_first_element() -> None:
    values = np.arange(10.0)
    assert native.address(values[3:]) == native.address(values) + 24
