"""Functions compiled by numba, kept as machine code that later processes load without it.

Numba and LLVM cost a process half a second and 100 MiB, even where numba's own cache holds the
code. Here the object code of a function is kept in a file; the system's C compiler links it into a
library, once, that loads like any other. Where there is no such compiler, LLVM alone loads the
object code.

A function takes integers only, counts and addresses of arrays (:func:`address`), and must not
allocate. It comes from a factory in a module that imports numba: the factory takes what the
function is specialised to, as words, and is called only where the code is not at hand.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

_ENTRY = "basinscope_entry"  # what the function is called in its object code
_PYTHONS = ("Py", "_Py", "NRT_", "numba_")  # what symbols of Python's and numba's begin with
# what numba would call for an array that nobody refers to any more: the arrays here own nothing
_FREEING = re.compile(r"^declare (void @NRT_MemInfo_call_dtor)\((ptr|i8\*).*$", re.MULTILINE)

Function = Callable[..., None]


@functools.cache
def function(module: str, factory: str, *kind: str) -> Function:
    """Give the function that ``factory(*kind)`` of a module defines, compiled.

    It releases the interpreter while it runs. Made once per machine and version of the code:
    compiling takes a second or so, loading a millisecond.

    Parameters
    ----------
    module : str
        Full name of the module that holds the factory.
    factory : str
        Name of a function that takes words and gives a function that numba can compile.
    *kind : str
        The words; they become part of a file's name.
    """
    with _compiling:
        return _load(module, factory, kind)


_compiling = threading.Lock()


def address(array: np.ndarray) -> int:
    """Give where an array's first element is, for a compiled function."""
    return int(array.__array_interface__["data"][0])


def processor() -> dict[str, str]:
    """Give what Linux says of one of the processors, in its words; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (row.partition(":") for row in lines)}


def kept_in() -> Path | None:
    """Give the directory of the machine code, in the user's cache; None without a home."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(cache or Path.home() / ".cache").absolute() / "basinscope" / "native"
    except RuntimeError:
        return None


def _load(module: str, factory: str, kind: tuple[str, ...]) -> Function:
    directory = kept_in()
    if directory is None:
        return _load_by_llvm(_compile(module, factory, kind))
    stem = "-".join((f"{module.rpartition('.')[2]}.{factory}", *kind))
    library, code = (directory / _digest(module) / (stem + ending) for ending in (".so", ".o"))
    with suppress(OSError, AttributeError):  # not made yet, or damaged
        return _load_library(library)
    with suppress(OSError, RuntimeError):
        return _load_by_llvm(_read(code))
    made = _compile(module, factory, kind)
    with suppress(OSError, AttributeError, subprocess.CalledProcessError):
        _write(_link(made), library)
        return _load_library(library)
    with suppress(OSError):
        _write(made, code)
    return _load_by_llvm(made)


@functools.cache
def _digest(module: str) -> str:
    """Tell apart all that the code depends on: sources, the compiler, the processor."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    made_of = [f"numba {version('numba')} llvmlite {version('llvmlite')} {_processor()}".encode()]
    ours = [Path(__file__), Path(__file__).with_name("jit.py")]
    sources = [*ours, *sorted(Path(spec.origin).parent.glob("*.py"))]
    made_of += [source.read_bytes() for source in sources]
    return hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]


def _processor() -> str:
    """Name the instructions that this machine has: a home directory may serve several."""
    named = processor()
    if not named:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(named.get(key, "") for key in ("model name", "flags", "Features", "isa"))


def _compile(module: str, factory: str, kind: tuple[str, ...]) -> bytes:
    """Give the object code, optimised again with nothing but the entry to be called from outside.

    That leaves nothing of what reports Python's exceptions, so the code needs no symbol of
    Python's or numba's.
    """
    import llvmlite.binding as llvm  # type: ignore[import-untyped]
    import numba

    from basinscope import jit

    definition = getattr(importlib.import_module(module), factory)(*kind)
    takes = definition.__code__.co_argcount
    made = numba.cfunc(numba.void(*[numba.int64] * takes), **jit.OPTIONS)(definition)
    code = llvm.parse_assembly(_FREEING.sub(r"define \1(\2 %0) { ret void }", made.inspect_llvm()))
    for defined in code.functions:
        if defined.name == made.native_name:
            defined.name = _ENTRY
        elif not defined.is_declaration:
            defined.linkage = "internal"
    machine = _machine()
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.slp_vectorization = True
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(code, builder)
    needed = [f.name for f in code.functions if f.is_declaration and f.name.startswith(_PYTHONS)]
    if needed:
        raise TypeError(
            f"what {module}.{factory} defines cannot be kept: compiled, it calls "
            f"{', '.join(needed)}. It must not allocate, nor do what may raise an error"
        )
    return bytes(machine.emit_object(code))


def _machine() -> Any:
    """Give LLVM's description of this machine."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="default",
    )


def _link(code: bytes) -> bytes:
    """Make a library of object code."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler to link with")
    with tempfile.TemporaryDirectory() as directory:
        parts = Path(directory) / "code.o", Path(directory) / "library.so"
        parts[0].write_bytes(code)
        command = [compiler, "-shared", "-o", str(parts[1]), str(parts[0]), "-lm"]
        subprocess.run(command, check=True, capture_output=True)
        return parts[1].read_bytes()


def _write(code: bytes, file: Path) -> None:
    """Keep code with its checksum: damaged code would end the process that loads it.

    The checksum is at the end, where the system's loader takes no notice of it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as directory:
        part = Path(directory) / file.name
        with part.open("wb") as out:
            out.write(code + hashlib.sha256(code).digest())
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)


def _read(file: Path) -> bytes:
    kept = file.read_bytes()
    code, checksum = kept[:-32], kept[-32:]
    if hashlib.sha256(code).digest() != checksum:
        raise OSError(f"{file} is damaged")
    return code


def _load_library(library: Path) -> Function:
    _read(library)  # an error if it is damaged
    return _of_integers(getattr(ctypes.CDLL(str(library)), _ENTRY))


def _load_by_llvm(code: bytes) -> Function:
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)  # what it loaded goes when it does
    return _of_integers(ctypes.CFUNCTYPE(None)(engine.get_function_address(_ENTRY)))


_engines: list[Any] = []


def _of_integers(symbol: Any) -> Function:
    symbol.restype = None

    def call(*numbers: int) -> None:
        if not symbol.argtypes:
            symbol.argtypes = [ctypes.c_int64] * len(numbers)
        symbol(*numbers)

    return call
