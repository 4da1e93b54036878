"""The Triton kernels compile for a GPU (capability 9.0, some 8.9) on a machine without one.

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
    from basinscope.kernels import (
        cross_entropy_triton, linear_cross_entropy_triton, noise_triton, sgld_triton
    )

    def build(kernel, types, *, aligned=(), capability=90, options=None, **constants):
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        fixed = {(names.index(n),): value for n, value in constants.items()}
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attrs)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=options)
        assert "cubin" in compiled.asm
        return compiled
"""
NOISE = """
    build(noise_triton.fill_kernel, {"out": "*fp32"}, BLOCK=noise_triton.BLOCK)
"""
SGLD = """
    factors = "gradient_factor decay_factor pull_factor noise_factor box alpha eps".split()
    addresses = {"table": "*i64", "blocks": "*i64", "bits": "*u8", "sums": "*fp32"}
    for stored, rich in ((tl.float32, False), (tl.float32, True), (tl.bfloat16, True)):
        types = {
            **dict.fromkeys(factors, "fp32"), **addresses, "step": "*i64" if rich else "i32"
        }
        build(
            sgld_triton.langevin_kernel, types, STORED=stored, NOISE=True, RMSPROP=rich,
            METRICS=rich, STOCHASTIC=rich and stored == tl.bfloat16, ZERO_GRADS=rich,
            COUNTED=rich, BLOCK=sgld_triton.BLOCK,
        )
"""
LOSS = """
    for logits in ("*fp32", "*bf16"):
        types = {
            "logits": logits, "gradient": logits, "targets": "*i64", "loss": "*fp32",
            "level": "*fp32", "upstream": "*fp32",
        }
        build(cross_entropy_triton.loss_kernel, types, BLOCK=4096)
        build(cross_entropy_triton.gradient_kernel, types, BLOCK=4096)
"""
# As a launch sees them: pointers and sizes that are multiples of 16, so that loads are pipelined.
HEAD = """
    module = linear_cross_entropy_triton
    Head = module.Head
    pointers = "targets top_of total_of picked level upstream".split()
    matrices = ("hidden", "weight", "bias", "slopes")
    sizes = "tokens vocabulary width hidden_stride weight_stride start count".split()
    shared_memory = {89: 101_376, 90: 232_448}  # bytes that a program may have

    no, yes = False, True
    features = [(no, no, yes), (yes, no, no), (no, yes, no), (yes, yes, yes)]
    for number in ("bf16", "fp16"):
        types = {
            **dict.fromkeys(pointers, "*fp32"), **dict.fromkeys(matrices, f"*{number}"),
            "targets": "*i64", "scale": "fp32", "softcap": "fp32",
        }
        for kernel in (module.head_loss_kernel, module.head_slope_kernel):
            for bias, softcap, even in features:
                some = object()
                head = Head(None, some if bias else None, 1.0, 30.0 if softcap else None)
                tile = module._launch(head)
                options = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
                for capability, limit in shared_memory.items():
                    compiled = build(
                        kernel, types, aligned={*pointers, *matrices, *sizes},
                        capability=capability, options=options, BIAS=bias, SOFTCAP=softcap,
                        EVEN=even, WIDEN=False, **tile,
                    )
                    assert compiled.metadata.shared <= limit, (capability, compiled.metadata)
                    tensor_cores = "wgmma" if capability == 90 else "mma.sync"
                    assert tensor_cores in compiled.asm["ptx"]
"""
BODIES = {"noise": NOISE, "sgld": SGLD, "cross_entropy": LOSS, "linear head": HEAD}


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_kernels_compile_for_a_gpu(body: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(body)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
