"""Compile the fused kernels as they would be launched on a GPU; a line of JSON for each."""

import json
import sys
from typing import Any

import torch

from interp.stream import fused
from interp.stream.plan import Plan

KINDS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def written(name: str, fixed: dict[str, Any], kind: torch.dtype) -> str:
    """The type of a kernel's argument, as Triton writes it."""
    if name in fixed:
        return "constexpr"
    if name in ("query", "key"):
        return KINDS[kind]
    if name in ("at", "low", "high", "key_out"):
        return "*i32"
    if name == "log_sum" or name.endswith("_out"):
        return "*fp32"
    return "fp32" if name in ("scaling", "softcap") else "i32"


def main(capability: int) -> None:
    """Narrow and wide heads in two types, each kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from interp.stream import kernels

    for width, kind in ((128, torch.bfloat16), (256, torch.bfloat16), (32, torch.float32),
                        (128, torch.float32)):
        query, key = (torch.zeros(1, heads, 9, width, dtype=kind) for heads in (4, 2))
        work = fused._Work(Plan(query, key, None, None, None, 0, None, 1 << 20), (1, 0), 1.0, 9.0)
        for kernel in (kernels.rows_kernel, kernels.keys_kernel):
            fixed = {name: value for name, value in {**work.fixed, "OTHERS": False}.items()
                     if name in kernel.arg_names}
            source = ASTSource(
                kernel, {name: written(name, fixed, kind) for name in kernel.arg_names},
                {(kernel.arg_names.index(name),): value for name, value in fixed.items()})
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                                  options={"num_warps": work.fixed["num_warps"]})
            print(json.dumps({
                "kernel": kernel.__name__, "width": width, "bytes": len(made.asm["cubin"]),
                "tensor cores": "mma" in made.asm["ptx"], "shared memory": made.metadata.shared}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
