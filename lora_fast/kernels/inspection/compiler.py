"""Compiles the package's launches for any arch without a GPU, and reads the resources and loops of the compiled code.

``recorded()`` runs launchers on tensors that need not hold data and records each launch instead of running it.
``compile_for`` compiles a recorded launch for an arch, and ``compile_as_launched`` as the package would launch it.
``resources`` reads registers, stack, shared memory and instructions from the cubin with the tools in Triton's wheel;
occupancy is estimated from them. ``main_loop`` reads how far the loop of a GEMM is pipelined. This does not work under
``TRITON_INTERPRET=1``, where nothing is compiled.
"""

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, mangle_type

from ..launch import MOST_REGISTERS, REGISTERS, takes_more_registers

OPTIONS = ("num_warps", "num_stages", "maxnreg")
# Limits of a multiprocessor (CUDA programming guide): bytes of shared memory (each block takes 1024 of them for the
# system), warps, blocks.
MULTIPROCESSOR_SHARED = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 32}
TENSOR_MEMORY = 512  # columns
TENSOR_CORE = dict.fromkeys(WARPS, r"HMMA") | {90: r"HGMMA|HMMA", 100: r"UTC\w*MMA|HMMA"}
GEMM_TENSOR_CORE = TENSOR_CORE | {90: r"HGMMA", 100: r"UTC\w*MMA"}


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its arguments by name (including constexprs), grid and compiler options."""

    kernel: JITFunction
    arguments: dict
    grid: tuple[int, ...]
    options: dict


@dataclass(frozen=True)
class Resources:
    """The resources that a compiled kernel uses."""

    registers: int  # of a thread
    stack: int  # bytes of a thread
    shared: int  # bytes of a block
    tensor_memory: int  # columns of a block
    warps: int  # of a block
    cubin: bytes = dataclasses.field(repr=False)

    @cached_property
    def instructions(self) -> Counter:
        """How often each instruction occurs, with its modifiers (LDG.E.128). Disassembling takes longer than all else
        that is read from a kernel."""
        sass = _run_tool("cuobjdump", "-sass", self.cubin)
        return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M))

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    @property
    def spills(self) -> int:
        """Returns the number of instructions that load or store local memory."""
        return self.count(r"LDL|STL")

    def occupancy(self, arch: int) -> float:
        """Returns the share of a multiprocessor's warps that can be resident, estimated from the limits alone."""
        blocks = min(BLOCKS[arch], WARPS[arch] // self.warps)
        blocks = min(blocks, REGISTERS // (_round_up(self.registers, 8) * 32 * self.warps))
        blocks = min(blocks, MULTIPROCESSOR_SHARED[arch] // (_round_up(self.shared, 128) + 1024))
        if self.tensor_memory:
            blocks = min(blocks, TENSOR_MEMORY // self.tensor_memory)
        return blocks * self.warps / WARPS[arch]


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


@contextmanager
def recorded():
    """Records the launches inside the context in the list that it yields, instead of running them."""
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
    """Returns the launch's kernel compiled for sm_<arch> and specialised as Triton's JIT would specialise it.

    With ``lengths`` the kernel also serves other calls: only the integers with these names are specialised, that is,
    assumed to be multiples of 16 in all calls if they are in this one.
    """
    signature, constexprs, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        special = special and (lengths is None or type(value) is not int or parameter.name in lengths)
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = parameter.annotation_type or mangle_type(value)
        if special and isinstance(value, (int, torch.Tensor)):
            address = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if address % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source_of = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = source_of(launch.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def compile_as_launched(launch: Launch, arch: int, lengths: Collection[str] | None = None):
    """Returns the kernel compiled as by ``compile_for``, and its resources. A kernel that spills is compiled again with
    more registers, as the package does when it launches it."""
    compiled = compile_for(launch, arch, lengths)
    used = resources(compiled)
    if used.stack and takes_more_registers(compiled, launch.options):
        with_more_registers = launch.options | {"maxnreg": MOST_REGISTERS}
        compiled = compile_for(dataclasses.replace(launch, options=with_more_registers), arch, lengths)
        used = resources(compiled)
    return compiled, used


def resources(compiled) -> Resources:
    """Returns the resources of a kernel compiled by ``compile_for``."""
    usage = _run_tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    return Resources(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[0]),
        shared=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size,
        warps=compiled.metadata.num_warps,
        cubin=compiled.asm["cubin"],
    )


@dataclass(frozen=True)
class MainLoop:
    """The compiled loop of a GEMM that loads and multiplies."""

    in_flight: int  # products that a step leaves unfinished (0 if the tensor cores are not asynchronous)
    ahead: int  # steps between a load and its use
    instructions: int  # of a step


_PRODUCT = r"ttng\.warp_group_dot %|ttng\.tc_gen5_mma|tt\.dot "
_TMA_COPY = r"async_tma_copy_global_to_local"
_COPY = rf"{_TMA_COPY}|async_copy_global_to_local"


def main_loop(compiled) -> MainLoop:
    """Returns the main loop of a GEMM, read from Triton's GPU dialect, or what holds of each of its main loops.

    It is the innermost loop with a product and copies; a kernel for a group has one for each member. In a
    warp-specialised kernel it is the last loop with a product, since the copies have their own loop. On sm_90 a step
    ends with a wait for all but ``pendings`` products. On sm_100 it ends with a wait for a barrier, and a product is in
    flight if that barrier is not the one of the step's own product. Copies are ahead by the number of steps issued
    before the loop (TMA) or left unfinished by a step's wait. In a warp-specialised kernel they are ahead by the number
    of buffers minus the one in use.
    """
    lines = compiled.asm["ttgir"].splitlines()
    multiplying = [loop for loop in _loops(lines) if _count(_PRODUCT, loop[0])]
    loops = [loop for loop in multiplying if _count(_COPY, loop[0])] or multiplying[-1:]
    in_flight = min(_in_flight(body) for body, _ in loops)
    return MainLoop(in_flight, min(_steps_ahead(lines, *loop) for loop in loops), _step_instructions(compiled))


def _in_flight(body: list[str]) -> int:
    text = "\n".join(body)
    pendings = [int(number) for number in re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", text)]
    barriers = re.findall(r"tc_gen5_mma .*?, (%\w+)\[", text)
    return min(pendings) if pendings else int(bool(barriers)) - any(f"wait_barrier {b}," in text for b in barriers)


def _steps_ahead(lines: list[str], body: list[str], first: int) -> int:
    copies = _count(_COPY, body)
    if not copies:
        fetching = next("\n".join(loop) for loop, _ in _loops(lines) if _count(_COPY, loop))
        return min(map(int, re.findall(r"memdesc_index .*?: !ttg\.memdesc<(\d+)x\d+x\d+x", fetching))) - 1
    left = [int(number) for number in re.findall(r"ttg\.async_wait .*?num = (\d+)", "\n".join(body))]
    # Those that a step needs first are issued after the loop before it.
    since = max((start + len(before) for before, start in _loops(lines) if start < first), default=0)
    by_tma = _count(_TMA_COPY, body)  # a loop may have copies of both kinds
    steps = [_count(_TMA_COPY, lines[since:first]) // by_tma] if by_tma else []
    return min(steps + ([min(left) // (copies - by_tma)] if copies > by_tma else []))


def _loops(lines: list[str]) -> Iterator[tuple[list[str], int]]:
    """Returns the bodies of the innermost loops and the lines where they start."""
    for start, line in enumerate(lines):
        if "scf.for" not in line and "scf.while" not in line:
            continue
        indent = line[: len(line) - len(line.lstrip())]
        end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(indent + "}"))
        body = lines[start + 1 : end]
        if not _count(r"scf\.(for|while)", body):
            yield body, start


def _count(pattern: str, lines: list[str]) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def machine_code(compiled) -> str:
    """Returns a kernel's machine code as text with labels."""
    return _run_tool("nvdisasm", "-c", compiled.asm["cubin"])


def _step_instructions(compiled) -> int:
    """Returns the number of instructions of the main loop in the machine code. It is the loop with the largest share of
    tensor-core instructions, among those that leave an asynchronous product in flight if there are any."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in machine_code(compiled).splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction[1])
            instructions.append(instruction[1])
            if target and target[1] in labels:
                loops.append(instructions[labels[target[1]] :])

    def score(loop: list[str]) -> tuple[bool, float]:
        leaves_one_in_flight = _count(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x[1-9]", loop) > 0
        return leaves_one_in_flight, _count(r"HGMMA|UTC\w*MMA|HMMA", loop) / len(loop)

    return len(max(loops, key=score))


def _run_tool(name: str, flag: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
