"""Compiling the Triton kernels of a program for GPUs that are absent, with the ``triton`` package."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ``ptxas`` says of one kernel; bytes are those of a thread, shared memory that of a program."""

    name: str
    registers: int
    spilled: int
    shared_memory: int
    matrix_units: bool  # whether products are done by tensor cores


def compile_kernels(lowered: jax.stages.Lowered, capability: int, folder: Path) -> list[Kernel]:
    """Every kernel of a program lowered for CUDA, compiled for a compute capability (90: Hopper)."""
    triton = pytest.importorskip("triton", reason="compiling for an absent GPU needs: pip install triton")
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

    kernels = []
    for index, (config, text) in enumerate(_sources(lowered)):
        file = folder / f"{index}.ttir"
        file.write_text(text, encoding="utf-8")
        options = {name: int(config[name]) for name in ("num_warps", "num_stages")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of defaults that it will change
            compiled = triton.compile(str(file), target=GPUTarget("cuda", capability, 32), options=options)
        said = _assemble(compiled.asm["ptx"], folder / f"{index}.ptx")
        registers = re.search(r"Used (\d+) registers", said)
        assert registers is not None, said
        kernels.append(
            Kernel(
                name=re.search(r"tt\.func public @(\w+)", text)[1],  # pyright: ignore[reportOptionalSubscript]
                registers=int(registers[1]),
                spilled=sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
                shared_memory=compiled.metadata.shared,
                matrix_units=re.search(r"\bw?g?mma\.", compiled.asm["ptx"]) is not None,
            )
        )
    return kernels


def _sources(lowered: jax.stages.Lowered) -> Iterator[tuple[dict[str, Any], str]]:
    """The settings and the program text of every call of a kernel."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    def calls(operation: Any) -> Iterator[Any]:
        for region in operation.regions:
            for block in region:
                for inner in block:
                    if inner.operation.name == "stablehlo.custom_call":
                        yield inner
                    yield from calls(inner.operation)

    for call in calls(lowered.compiler_ir("stablehlo").operation):  # pyright: ignore[reportOptionalMemberAccess]
        if "triton" in str(call.attributes["call_target_name"]):
            config = {a.name: a.attr for a in call.attributes["mhlo.backend_config"]}
            with ir.Context() as context:
                dialect.register_dialect(context)
                module = ir.Module.parse(config["ir"].value_bytes)
                yield config, str(module.operation.get_asm(enable_debug_info=False))


def _assemble(ptx: str, file: Path) -> str:
    """What the assembler says of a program, that for newer devices if the other does not know its dialect."""
    import triton  # pyright: ignore[reportMissingImports]

    file.write_text(ptx, encoding="utf-8")
    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture is not None
    for name in ("ptxas", "ptxas-blackwell"):
        program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        command = [program, "-v", f"--gpu-name={architecture[1]}", file, "-o", file.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode == 0:
            return done.stderr + done.stdout
    raise AssertionError(done.stderr)
