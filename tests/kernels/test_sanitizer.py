"""Tests that the sanitizer detects planted faults of every kind, names their lines, and reports nothing for correct
kernels."""

import linecache

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("checked in Triton's interpreter, which a CUDA machine does not use", allow_module_level=True)

import triton
import triton.language as tl
from launching import randn
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from lora_fast.kernels import pointer_table
from lora_fast.kernels.inspection import sanitizer

# ---- Kernels with a fault, in the line whose comment begins with "fault"


@triton.jit
def load_beyond_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    b_x = tl.load(x + i + 1, mask=i < n, other=0.0)  # fault: the last lane
    tl.store(y + i, b_x, mask=i < n)


@triton.jit
def store_beyond_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, b_x, mask=i < n + 2)  # fault: two lanes of the last program


@triton.jit
def store_before_kernel(y):
    tl.store(y - 1, 0.0)  # fault


@triton.jit
def padding_kernel(y, n_rows, n_columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i_row, i_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (i_row < n_rows)[:, None] & (i_column <= n_columns)[None, :]
    tl.store(y + i_row[:, None] * stride + i_column[None, :], 0.0, mask=mask)  # fault: one column too many


@triton.jit
def table_kernel(entries, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    b_x = tl.load(pointer_table.tensor_at(entries, 0, 0, tl.float32, False) + i, mask=i < n, other=0.0)  # fault
    tl.store(y + i, b_x, mask=i < n)


@triton.jit
def wrong_size_kernel(y, BLOCK: tl.constexpr):
    tl.store(y.to(tl.pointer_type(tl.float16)) + tl.arange(0, BLOCK), 0.0)  # fault: y is float32


@triton.jit
def atomic_beyond_kernel(counter):
    tl.atomic_add(counter + 1, 1)  # fault


@triton.jit
def two_writers_kernel(y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(y + i, 1.0)  # fault: a block's last is the next one's first, be it the same value


@triton.jit
def reader_and_writer_kernel(x, y):
    i = tl.program_id(0)
    tl.store(y + i, tl.load(x + i))  # fault: y is x one further on


@triton.jit
def reload_kernel(x, y, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))
    if BARRIER:
        tl.debug_barrier()
    b_y = tl.load(y + i)  # fault without it
    tl.debug_barrier()
    tl.store(x + i, b_y)


@triton.jit
def reversed_kernel(x, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, BLOCK)
    b_x = tl.load(x + i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + BLOCK - 1 - i, b_x)  # fault without it: another lane may not have loaded yet


@triton.jit
def in_place_kernel(x, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i) + 1.0)  # fault in a tile with fewer lanes than threads


@triton.jit
def two_stores_kernel(y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, 0.0)
    tl.store(y + i // 2 * 2, 0.0)  # fault: other lanes


@triton.jit
def lanes_kernel(y, BLOCK: tl.constexpr, ALIKE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i // 2, i // 2 if ALIKE else i)  # fault where they are not alike


@triton.jit
def no_other_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    b_x = tl.load(x + i, mask=i < n)  # fault where n < BLOCK
    tl.store(y + i, b_x, mask=i < n)


@triton.jit
def float_atomics_kernel(x, y):
    tl.atomic_add(y, tl.load(x + tl.program_id(0)))


@triton.jit
def sum_kernel(
    x, parts, y, counter, BEFORE: tl.constexpr, AFTER: tl.constexpr, SEM: tl.constexpr, SCOPE: tl.constexpr
):  # fmt: skip
    """The last program to arrive adds the values that all programs have written."""
    i, n = tl.program_id(0), tl.num_programs(0)
    tl.store(parts + i, tl.load(x + i))
    if BEFORE:
        tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem=SEM, scope=SCOPE) == n - 1
    if AFTER:
        tl.debug_barrier()
    if last:
        total = 0.0
        for k in range(0, n):
            total += tl.load(parts + k)  # fault unless the counter orders it
        tl.store(y, total)


@triton.jit
def integer_atomics_kernel(counter):
    tl.atomic_add(counter, 1, sem="relaxed")


@triton.jit
def two_levels_kernel(x, parts, y, counters, GROUP: tl.constexpr):
    """The last program of the last group adds the values of all programs. It shares a counter with few of them, so the
    order must be derived through both levels of counters."""
    i, n = tl.program_id(0), tl.num_programs(0)
    tl.store(parts + i, tl.load(x + i))
    tl.debug_barrier()
    last_of_group = tl.atomic_add(counters + 1 + i // GROUP, 1) == GROUP - 1
    tl.debug_barrier()
    if last_of_group:
        last = tl.atomic_add(counters, 1) == n // GROUP - 1
        tl.debug_barrier()
        if last:
            total = 0.0
            for k in range(0, n):
                total += tl.load(parts + k)
            tl.store(y, total)


def within(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """Returns zeros with unused memory around them, so that a fault does no harm."""
    whole = torch.zeros(*(length + 8 for length in shape), dtype=dtype)
    return whole[tuple(slice(4, 4 + length) for length in shape)]


def launch_with_table(n: int, forget: bool = False) -> None:
    """Loads n numbers of a tensor of 5 numbers through a table of addresses. With ``forget`` the tensor was freed."""
    whole = torch.zeros(16)
    x = whole[4:9].view(5, 1)
    (table,) = pointer_table.find_tables([[x]], [False])
    if forget:
        del x
    table_kernel[(1,)](table.factors.entries, within(8), n, BLOCK=8)


def launch_shifted() -> None:
    x = within(9)
    reader_and_writer_kernel[(4,)](x, x[1:])


def launch_reload(barrier: bool) -> None:
    reload_kernel[(1,)](within(8), within(8), BLOCK=8, BARRIER=barrier)


def launch_reversed(barrier: bool) -> None:
    reversed_kernel[(1,)](within(256), BLOCK=256, BARRIER=barrier)


def launch_in_place(block: int, num_warps: int) -> None:
    in_place_kernel[(2,)](within(2 * block), BLOCK=block, num_warps=num_warps)


def launch_sum(before: bool = True, after: bool = True, sem: str = "acq_rel", scope: str = "gpu") -> None:
    parts, y, counter = within(4), within(1), within(1, dtype=torch.int32)
    sum_kernel[(4,)](torch.arange(4.0), parts, y, counter, BEFORE=before, AFTER=after, SEM=sem, SCOPE=scope)


def launch_two_levels() -> None:
    two_levels_kernel[(6,)](torch.arange(6.0), within(6), within(1), within(4, dtype=torch.int32), GROUP=2)


STORED_AND_LOADED = "store and load of two programs"
FAULTS = {
    "load": ("load out of bounds", lambda: load_beyond_kernel[(1,)](within(5), within(5), 5, BLOCK=8)),
    "store": ("store out of bounds", lambda: store_beyond_kernel[(2,)](within(6), within(6), 6, BLOCK=4)),
    "store before": ("store out of bounds", lambda: store_before_kernel[(1,)](within(5))),
    "padding": ("store out of bounds", lambda: padding_kernel[(1,)](within(3, 5), 3, 5, 13, ROWS=4, COLUMNS=8)),
    "table": ("load out of bounds", lambda: launch_with_table(6)),
    "table of a tensor that is gone": ("load out of bounds", lambda: launch_with_table(5, forget=True)),
    "element size": ("store out of bounds", lambda: wrong_size_kernel[(1,)](within(8), BLOCK=8)),
    "atomic": ("atomic out of bounds", lambda: atomic_beyond_kernel[(1,)](within(1, dtype=torch.int32))),
    "two writers": ("store and store of two programs", lambda: two_writers_kernel[(3,)](within(10), BLOCK=4)),
    "reader and writer": (STORED_AND_LOADED, launch_shifted),
    "no barrier": ("load after store without a barrier", lambda: launch_reload(barrier=False)),
    "overwritten": ("store after load without a barrier", lambda: launch_reversed(barrier=False)),
    "small tile in place": ("store after load without a barrier", lambda: launch_in_place(64, num_warps=4)),
    "two stores": ("store after store without a barrier", lambda: two_stores_kernel[(1,)](within(8), BLOCK=8)),
    "lanes": ("different values for one address", lambda: lanes_kernel[(1,)](within(4), BLOCK=8, ALIKE=False)),
    "no other": ("masked load without other", lambda: no_other_kernel[(1,)](within(5), within(5), 5, BLOCK=8)),
    "no barrier before a counter": (STORED_AND_LOADED, lambda: launch_sum(before=False)),
    "no barrier after a counter": (STORED_AND_LOADED, lambda: launch_sum(after=False)),
    "relaxed counter": (STORED_AND_LOADED, lambda: launch_sum(sem="relaxed")),
    "counter that only acquires": (STORED_AND_LOADED, lambda: launch_sum(sem="acquire")),
    "counter that only releases": (STORED_AND_LOADED, lambda: launch_sum(sem="release")),
    "counter within one block": (STORED_AND_LOADED, lambda: launch_sum(scope="cta")),
}


def source(words: str) -> str:
    """Returns the source line that a finding names."""
    file, _, line = words.rpartition(":")
    assert __file__.endswith(file)
    return linecache.getline(__file__, int(line))


@pytest.mark.parametrize("kind, launch", FAULTS.values(), ids=FAULTS)
def test_planted_fault_is_reported(kind, launch):
    with sanitizer.checked() as report:
        launch()
    (summary,) = report.launches
    assert kind in {finding.kind for finding in report.findings}
    for finding in report.findings:
        assert finding.kernel == summary.kernel and finding.n_lanes > 0 and finding.programs
        assert any("# fault" in source(line) for line in finding.lines), str(finding)


def test_finding_names_tensor_programs_and_lanes():
    y = within(6)
    with sanitizer.checked() as report:
        store_beyond_kernel[(2,)](within(6), y, 6, BLOCK=4)
    (finding,) = report.findings
    assert finding.programs == ((1, 0, 0),) and finding.n_lanes == 2
    assert finding.place == "1 bytes after y: float32 (6,)"
    assert y.eq(0).all() and y.storage_offset() == 4, "elements out of bounds are not written"
    assert all(part in str(finding) for part in ("store_beyond_kernel", finding.lines[0], "(1, 0, 0)", "2 lanes"))


def test_result_that_depends_on_the_order_of_programs_is_reported():
    """Atomics do not race with each other, so only the second run reveals the dependence."""
    with sanitizer.checked() as report:
        float_atomics_kernel[(64,)](randn(64), within(1))
    (finding,) = report.findings
    assert finding.kind == "result that depends on the order of programs"
    assert finding.place == "y: float32 (1,)" and finding.n_lanes == 1


CONTROLS = {
    "in bounds": lambda: store_beyond_kernel[(2,)](within(6), within(8), 6, BLOCK=4),
    "all columns of a view": lambda: padding_kernel[(1,)](within(3, 5), 3, 4, 13, ROWS=4, COLUMNS=8),
    "table": lambda: launch_with_table(5),
    "barrier before a load": lambda: launch_reload(barrier=True),
    "barrier before a store": lambda: launch_reversed(barrier=True),
    "in place": lambda: launch_in_place(64, num_warps=2),
    "lanes that write one value": lambda: lanes_kernel[(1,)](within(4), BLOCK=8, ALIKE=True),
    "nothing masked off": lambda: no_other_kernel[(1,)](within(8), within(8), 8, BLOCK=8),
    "counter": launch_sum,
    "counters of two levels": launch_two_levels,
    "integer atomics": lambda: integer_atomics_kernel[(5,)](within(1, dtype=torch.int32)),
}


@pytest.mark.parametrize("launch", CONTROLS.values(), ids=CONTROLS)
def test_correct_kernel_has_no_findings(launch):
    with sanitizer.checked() as report:
        launch()
    assert report.findings == [] and len(report.launches) == 1


def test_checked_run_gives_the_results_of_an_unchecked_run():
    x, y = randn(6), within(6)
    with sanitizer.checked():
        store_beyond_kernel[(2,)](x, y[:5], 3, BLOCK=4)
    assert torch.equal(y[:3], x[:3])


def test_interpreter_is_restored_after_a_check():
    owners = InterpreterBuilder, GridExecutor
    before = [dict(vars(owner)) for owner in owners]
    with pytest.raises(ZeroDivisionError), sanitizer.checked():
        _ = 1 / 0
    assert [dict(vars(owner)) for owner in owners] == before
    with sanitizer.checked() as report:
        pass
    no_other_kernel[(1,)](within(8), within(8), 8, BLOCK=8)
    assert report.launches == []
