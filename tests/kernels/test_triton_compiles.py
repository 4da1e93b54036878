"""The Triton kernels compile for a GPU (compute capability 9.0) on a machine without one.

The interpreter runs the kernels as Python; this shows that Triton's compiler accepts them too. It
runs in a process of its own, because here triton may have been imported as the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
    import triton, triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from basinscope.kernels import cross_entropy_triton, noise_triton, sgld_triton

    def build(kernel, types, **constants):
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        fixed = {(names.index(n),): value for n, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
        assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
"""
NOISE = """
    build(noise_triton.fill_kernel, {"out": "*fp32"}, BLOCK=noise_triton.BLOCK)
"""
SGLD = """
    factors = "gradient_factor decay_factor pull_factor noise_factor box alpha eps".split()
    types = {**dict.fromkeys(factors, "fp32"), "table": "*i64", "blocks": "*i64", "sums": "*fp32"}
    for stored, rich in ((tl.float32, False), (tl.float32, True), (tl.bfloat16, True)):
        build(
            sgld_triton.langevin_kernel, types, STORED=stored, NOISE=True, RMSPROP=rich,
            METRICS=rich, BLOCK=sgld_triton.BLOCK,
        )
"""
LOSS = """
    for logits in ("*fp32", "*bf16"):
        types = {
            "logits": logits, "gradient": logits, "targets": "*i64", "loss": "*fp32",
            "lse": "*fp32", "upstream": "*fp32",
        }
        build(cross_entropy_triton.loss_kernel, types, BLOCK=4096)
        build(cross_entropy_triton.gradient_kernel, types, BLOCK=4096)
"""


@pytest.mark.slow
@pytest.mark.parametrize("body", [NOISE, SGLD, LOSS], ids=["noise", "sgld", "cross_entropy"])
def test_kernels_compile_for_a_gpu(body: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(body)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
