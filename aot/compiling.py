# SPDX-License-Identifier: Apache-2.0
"""Compiles what the library embeds, and describes each kernel as a row of the table (build.py)."""

import hashlib
import os
import re
from contextlib import contextmanager
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: it would leave nothing to compile
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a third of a cubin

from triton import knobs
from triton.backends.nvidia import compiler as nvidia

from embedded import Case, kind_of, launches_of
from lora_fast.kernels import device
from lora_fast.kernels.inspection import compiler
from table import BLOCKS, key

# Arguments that the header's rules make multiples of 16. A stride is a length, or the rank that a kernel is built for.
LENGTHS = {"d_in", "d_out", "d_in_per_split"}
LENGTHS |= {f"stride_{name}" for name in ("x", "y", "a", "b", "dy", "left", "weight", "factor", "result")}
TARGETS = {100: "sm_100f", 120: "sm_120"}  # what ptxas assembles for; other archs: Triton's choice
SAME_CODE = ((80, 86, 89),)  # generations within which a later arch runs an earlier one's code
IMPLIED = {"strategy", "padding"}  # options with one value each, which keys leave out
OF_ALL_RANKS = {"SUM", "SCALORA_SCALES"}  # kinds whose key has rank 0


def compile_case(case: Case, archs: list[int], ptx: int | None) -> list[dict]:
    """Returns the rows of the table of a case, for archs in ascending order. An arch that would run the same code as an
    earlier one of its generation gets no row."""
    rows: list[dict] = []
    compiled: list[tuple[int, list[compiler.Launch], list[dict]]] = []
    for arch in archs:
        launches = launches_of(case, arch)
        if any(_serves(earlier, arch, launches) for earlier in compiled):
            continue
        of_arch = [_row(case, arch, each) for each in launches]
        compiled.append((arch, launches, of_arch))
        rows += of_arch
        if arch == ptx:
            rows += [row | {"is_ptx": True} for row in of_arch]
    return rows


def _serves(earlier: tuple[int, list[compiler.Launch], list[dict]], arch: int, launches: list[compiler.Launch]) -> bool:
    """Returns whether the code for an earlier arch is what Python would launch on this one, and fits there."""
    older, theirs, rows = earlier
    same_generation = any(older in generation and arch in generation for generation in SAME_CODE)
    fits = all(row["shared"] <= device.CARDS[arch].shared_memory for row in rows)
    return same_generation and fits and [*map(_constants, launches)] == [*map(_constants, theirs)]


def _constants(each: compiler.Launch) -> dict:
    """Returns what a launch is compiled with: constexprs, arguments that are None, and the compiler's options."""
    values = [(p.name, each.arguments[p.name], p.is_constexpr) for p in each.kernel.params]
    return {name: value for name, value, is_constexpr in values if is_constexpr or value is None} | each.options


def _row(case: Case, arch: int, each: compiler.Launch) -> dict:
    name, kind = each.kernel.__name__, kind_of(case.op, each.kernel.__name__)
    variant = {key: value for key, value in case.variant.items() if key not in IMPLIED}
    words = [f"{key}={value if isinstance(value, str) else int(bool(value))}" for key, value in variant.items()]
    row = {"text": " ".join([name, case.op, case.dtype, f"r{case.r}", *words]), "name": name, "arch": arch}
    with assembled_for(TARGETS.get(arch)):
        kernel, used = compiler.compile_as_launched(each, arch, LENGTHS)
    if used.stack or used.shared > device.CARDS[arch].shared_memory:  # what spills has a stack
        raise SystemExit(f"{row['text']}, sm_{arch}: stack {used.stack}, shared {used.shared}")
    if kernel.metadata.global_scratch_size or kernel.metadata.profile_scratch_size:
        raise SystemExit(f"{row['text']}, sm_{arch}: needs scratch memory, which the library does not pass")
    adapter = variant.pop("adapter", case.dtype)
    options = {name: value for name, value in kernel.metadata._asdict().items() if name in ("maxnreg", "num_warps")}
    constants = _constants(each) | options
    return row | {
        "key": key(kind, case.dtype, adapter, 0 if kind in OF_ALL_RANKS else case.r, variant),
        "is_ptx": False,
        "params": _params(kernel),
        "constants": " ".join(f"{name}={_text(value)}" for name, value in constants.items()),
        "threads": int(re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])[1]),
        "shared": kernel.metadata.shared,
        "tile": {name: value for name, value in constants.items() if name in BLOCKS},
        "maps": [dict(meta) for meta in getattr(kernel.metadata, "tensordesc_meta", None) or ()],
        "name_of_code": name_of_code(kernel, arch),
        "cubin": kernel.asm["cubin"],
        "ptx": retargeted(kernel.asm["ptx"], TARGETS.get(arch)),
    }


@contextmanager
def assembled_for(target: str | None):
    """A context in which Triton's PTX is assembled for this target in place of the arch alone. Triton's cache keeps
    both apart."""
    if target is None:
        yield
        return

    def hook(*arguments):
        if not arguments:
            return target, target  # of the cache's key
        stages = arguments[1]
        original = stages["cubin"]

        def assemble(ptx: str, metadata) -> bytes:
            with mock.patch.object(nvidia, "sm_arch_from_capability", lambda _: target):
                return original(retargeted(ptx, target), metadata)

        stages["cubin"] = assemble

    with mock.patch.object(knobs.runtime, "add_stages_inspection_hook", hook):
        yield


def retargeted(ptx: str, target: str | None) -> str:
    return ptx if target is None else re.sub(r"\.target sm_\w+", f".target {target}", ptx)


def name_of_code(kernel, arch: int) -> str:
    """Returns a hash of the kernel's PTX, which is the same in every process. The cubin is not, since ptxas may choose
    other registers from one run to the next, and Triton's own hash depends on the kernels compiled before."""
    return hashlib.sha256(retargeted(kernel.asm["ptx"], TARGETS.get(arch)).encode()).hexdigest()[:32]


def _text(value) -> str:
    """Returns a constant as the table has it."""
    return str(int(value)) if isinstance(value, bool) else "".join(str(value).split())


def _params(kernel) -> list[str]:
    """Returns name:type of every parameter."""
    params = [f"{name}:{_text(kind)}" for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    entry = re.search(r"\.entry[^{]*", kernel.asm["ptx"])[0]
    count = sum(5 if "tensordesc" in param else 1 for param in params)
    if entry.count(".param ") != count + 2:
        raise SystemExit(f"{kernel.metadata.name}: expected {count} parameters and two for scratch, got {entry}")
    return params


def generations(archs: list[int]) -> list[list[int]]:
    """Returns the archs, those together that may run each other's code."""
    together = [[arch for arch in archs if arch in generation] for generation in SAME_CODE]
    alone = [[arch] for arch in archs if not any(arch in generation for generation in SAME_CODE)]
    return [group for group in together if group] + alone
