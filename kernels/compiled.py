"""Compile what the launchers launch, for any arch and without a GPU, and read what came out.

``recorded()`` runs launchers on tensors that need not hold data and keeps each launch instead of making it;
``compile_for`` compiles one for an arch; ``resources`` reads registers, stack, shared memory and instructions from the
cubin with the tools in Triton's wheel, from which occupancy is estimated. Not under ``TRITON_INTERPRET=1``: there is
nothing to compile then.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

OPTIONS = ("num_warps", "num_stages", "maxnreg")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use (CUDA programming guide)
MULTIPROCESSOR_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # 1024 of them go to each block
REGISTERS, WARPS, BLOCKS, TENSOR_MEMORY = 1 << 16, 64, 32, 512  # a multiprocessor's, the same for these archs
TENSOR_CORE = {80: r"HMMA", 90: r"HGMMA|HMMA", 100: r"UTC\w*MMA|HMMA"}
GEMM_TENSOR_CORE = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its arguments by name (constexprs included), grid and compiler options."""

    kernel: JITFunction
    arguments: dict
    grid: tuple[int, ...]
    options: dict


@dataclass(frozen=True)
class Resources:
    """What a cubin uses: registers a thread, stack bytes, shared memory bytes a block, columns of tensor memory, warps,
    and its instructions counted, with their modifiers (LDG.E.128)."""

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    warps: int
    instructions: Counter

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.count(r"LDL|STL")

    def occupancy(self, arch: int) -> float:
        """Share of a multiprocessor's warps that can be resident: an estimate from the limits alone."""
        blocks = min(BLOCKS, WARPS // self.warps)
        blocks = min(blocks, REGISTERS // (_round_up(self.registers, 8) * 32 * self.warps))
        blocks = min(blocks, MULTIPROCESSOR_SHARED[arch] // (_round_up(self.shared, 128) + 1024))
        if self.tensor_memory:
            blocks = min(blocks, TENSOR_MEMORY // self.tensor_memory)
        return blocks * self.warps / WARPS


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


@contextmanager
def recorded():
    """Within: launches are kept in the list that this yields, not made."""
    launches: list[Launch] = []

    def keep(self, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        arguments = self.signature.bind(*args, **kwargs).arguments
        launches.append(Launch(self, dict(arguments), grid, options))

    original, JITFunction.run = JITFunction.run, keep
    try:
        yield launches
    finally:
        JITFunction.run = original


def compile_for(launch: Launch, arch: int, lengths: Collection[str] | None = None):
    """The launch's kernel compiled for sm_<arch>, specialised as Triton's own launch would specialise it; with
    ``lengths``, for other calls too: of the integers only these are taken to stay multiples of 16 where they are."""
    signature, constexprs, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        special = special and (lengths is None or type(value) is not int or parameter.name in lengths)
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if special and not isinstance(value, (float, TensorDescriptor)):
            address = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if address % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def resources(compiled) -> Resources:
    """Of a kernel that ``compile_for`` made."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M))
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size,
        warps=compiled.metadata.num_warps,
        instructions=instructions,
    )


def _cuobjdump(flag: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
