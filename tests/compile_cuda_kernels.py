"""Compiles the GPU's kernels for GPUs that need not be there, and prints what each takes: one JSON line a kernel.

TRITON_INTERPRET=0 python -m tests.compile_cuda_kernels
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from service.engine.cuda import attention_kernels, lora_kernels

CAPABILITIES = (80, 90)
"""A100 and H100."""
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
NUMBERS = {"scale": "fp32", "softcap": "fp32"}
TABLES = {"tiles": "*i32", "blocks": "*i32", "slots": "*i32", "ranks": "*i32"}
SUMS = {"low": "*fp32", "sums": "*fp32", "weights": "*fp32", "scales": "*fp32"}
TENSORS = ("x", "a", "b", "out", "query", "key", "value", "keys", "values")


def kernels(dtype: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each kernel with the constants of a Llama of 8 billion parameters; attention as several models have it."""
    yield "shrink", lora_kernels._shrink, {"PART_FEATURES": 1024, "TILE_ROWS": 16, "TILE_RANK": 16, "TILE_FEATURES": 64}
    yield "expand", lora_kernels._expand, {"PARTS": 4, "TILE_ROWS": 16, "TILE_RANK": 16, "TILE_OUT": 128}
    sizes = {"HEADS": 8, "KEY_DIM": 128, "VALUE_DIM": 128, "KEY_SIZE": 1024, "VALUE_SIZE": 1024}
    yield "write", attention_kernels._write, sizes
    for name, group, dim, window, has_softcap in (
        ("8B", 4, 128, 0, False),
        ("window and softcap", 2, 256, 4096, True),
        ("many queries to a key", 16, 64, 0, False),
        ("odd", 7, 80, 0, False),
    ):
        for kind, rows, parts in (("decode", 1, 16), ("prefill", attention_kernels.PREFILL_ROWS, 1)):
            sizes = attention_kernels.tile_sizes(rows, group, dim, dim, 4 if dtype == "float32" else 2)
            seen = {"WINDOW": window, "TILE_KEYS": sizes["TILE_KEYS"], "PARTS": parts, "LEAST_TILES": 4, "VALUE_DIM": dim}
            rest = {"HEADS": 8 * group, "KV_HEADS": 8, "DIM": dim, "BLOCK_TOKENS": 16, "HAS_SOFTCAP": has_softcap}
            yield f"{kind}, {name}", attention_kernels._attend, {**seen, **rest, **sizes}
            if parts > 1:
                yield f"combine, {name}", attention_kernels._combine, {**seen, "PAD_VALUE": sizes["PAD_VALUE"]}


def signature(kernel: Any, constants: Mapping[str, Any], dtype: str) -> dict[str, str]:
    """The type of each argument."""
    types = {
        **NUMBERS,
        **TABLES,
        **SUMS,
        **dict.fromkeys(TENSORS, f"*{DTYPES[dtype]}"),
        **dict.fromkeys(constants, "constexpr"),
    }
    return {name: types.get(name, "i32") for name in kernel.arg_names}


def aligned(kernel: Any, constants: Mapping[str, Any]) -> dict[tuple[int], list[list[Any]]]:
    """That addresses, strides and sizes are multiples of 16, as they are at a launch for such a model."""
    plain = {"rank", "scale", "softcap", "heads", "n_tiles", "width", *constants}
    return {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name not in plain}


def spilled_bytes(ptx: str, capability: int) -> int:
    """What does not fit the registers of a thread, by NVIDIA's assembler, which Triton brings."""
    assembler = max((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))  # the newest
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        command = [str(assembler), "-v", f"-arch={architecture}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill stores", said))


def main() -> None:
    """Compile all of them."""
    for capability in CAPABILITIES:
        for dtype in sys.argv[1:] or DTYPES:
            for name, kernel, constants in kernels(dtype):
                types = signature(kernel, constants, dtype)
                source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned(kernel, constants))
                warps = attention_kernels.warps_for(constants["QUERIES"]) if "QUERIES" in constants else 4
                target = GPUTarget("cuda", capability, 32)
                built = triton.compile(source, target=target, options={"num_warps": warps})
                spilled = spilled_bytes(built.asm["ptx"], capability)
                told = {"kernel": name, "dtype": dtype, "capability": capability, "shared_bytes": built.metadata.shared}
                print(json.dumps({**told, "spilled_bytes": spilled}), flush=True)


if __name__ == "__main__":
    main()
