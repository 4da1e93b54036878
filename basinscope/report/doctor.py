"""What this machine offers: versions, devices, and the kernel path of each operation."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from basinscope.native import kept_in, processor
from basinscope.report.console import install_hint

PACKAGES = (
    "basinscope", "numpy", "xarray", "dask", "zarr", "numcodecs", "torch", "triton", "numba",
    "datasets", "transformers", "matplotlib", "arviz-stats", "distributed",
)  # fmt: skip


def report(console: Console) -> None:
    """Print what is installed and what sampling would run on."""
    console.print(_versions())
    console.print()
    try:
        import torch
    except ModuleNotFoundError:
        console.print("torch is not installed: stores can be analysed, not sampled.")
        console.print(f"To sample: {install_hint('torch')}", markup=False, soft_wrap=True)
        return
    console.print(_devices())
    from basinscope.kernels.linear import uses_onednn

    layers = "oneDNN (torch's own choice leaves AVX-512 unused)" if uses_onednn() else "torch"
    console.print(f"\nfloat32 linear layers on the CPU: {layers}")
    console.print(f"compiled CPU kernels are kept in {kept_in() or 'memory'}", soft_wrap=True)
    console.print(
        f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads "
        "(OMP_NUM_THREADS or torch.set_num_threads change that)"
    )


def _versions() -> Table:
    table = Table(title="Versions", title_justify="left", show_edge=False)
    table.add_column("package")
    table.add_column("version")
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "[dim]not installed[/]")
    return table


def cpu_name() -> str:
    """Name of the processor as its maker calls it, where the system says so."""
    return processor().get("model name") or platform.processor() or platform.machine()


def _devices() -> Table:
    import torch

    from basinscope.kernels.paths import resolve

    table = Table(title="Devices", title_justify="left", show_edge=False)
    for heading in ("device", "name", "memory", "kernel path"):
        table.add_column(heading)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    table.add_row("cpu", cpu_name(), f"{memory / 2**30:.0f} GiB", resolve("auto", "cpu"))
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size = f"{found.total_memory / 2**30:.0f} GiB"
        table.add_row(f"cuda:{index}", found.name, size, resolve("auto", "cuda"))
    return table
