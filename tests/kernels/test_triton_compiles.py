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
    sizes = "tokens vocabulary width hidden_stride weight_stride start count pitch".split()
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
# The launchers themselves, in front of a driver that compiles for a GPU and launches nothing.
LAUNCHES = """
    import os, torch
    from basinscope.kernels.cross_entropy import next_token_cross_entropy
    from basinscope.kernels.linear_cross_entropy import linear_token_cross_entropy
    from basinscope.kernels.noise import fill_normal
    from basinscope.kernels.sgld import SgldUpdate

    class Launcher:
        def __init__(self, source, metadata):
            pass

        def __call__(self, x, y, z, *args):
            assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, (x, y, z)

    class Utils:
        def load_binary(self, *args):
            return object(), 1, 0, 0, 1024

        def get_device_properties(self, device):
            return {"max_shared_mem": 232_448}

    class Driver:
        launcher_cls, utils = Launcher, Utils()

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **kernel: compiled.append(kernel)
    os.environ["TRITON_INTERPRET"] = "1"  # lets tensors of a CPU pass; triton has been imported

    numbers = [(0, 0, 0), (1, 1, 1), (2**62, 5, 16), (2**33 + 7, 2**23, 2**31 + 4)]
    for seed, chain, step in numbers:
        address = {"seed": seed, "chain": chain, "step": step}
        fill_normal(torch.empty(3 + chain % 4), path="triton", param_index=chain, **address)
    assert len(compiled) == 1, compiled  # numbers that change from step to step compile nothing

    weights = [torch.zeros(5), torch.zeros(40, 50)]
    update = SgldUpdate(weights, anchors=weights, localization=1.0, lr=1e-3, n_beta=1.0,
                        path="triton")
    for seed, chain, step in numbers:
        gradients = [torch.ones_like(w) for w in weights]
        update.step(gradients, seed=seed, chain=chain, step=step)
    assert len(compiled) == 2, compiled

    # sizes of one, which Triton takes for constants, and sizes that are no multiple of anything
    for shape in ((1, 2, 1), (1, 2, 7), (3, 9, 50257)):
        logits = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
        ids = torch.zeros(shape[:2], dtype=torch.int64)
        next_token_cross_entropy(logits, ids, path="triton").sum().backward()
    features = linear_cross_entropy_triton._features
    linear_cross_entropy_triton._features = lambda *given: features(*given) | {"WIDEN": False}
    for tokens, width, vocabulary in ((1, 1, 1), (1, 64, 300), (257, 1, 300)):
        hidden = torch.zeros((tokens, width), dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros((vocabulary, width), dtype=torch.bfloat16)
        targets = torch.zeros(tokens, dtype=torch.int64)
        linear_token_cross_entropy(hidden, weight, targets, path="triton").sum().backward()
"""
BODIES = {
    "noise": NOISE, "sgld": SGLD, "cross_entropy": LOSS, "linear head": HEAD, "launches": LAUNCHES,
}  # fmt: skip


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
