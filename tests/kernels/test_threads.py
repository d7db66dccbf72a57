"""Caches of the kernels' launchers that several threads use at once: each thread gets what it would get alone."""

import functools
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from launching import randn
from together import run_together

from lora_fast.kernels import cayley, compiled_launch, device, launch, pointer_table, tiles, tuned
from lora_fast.kernels.linear import signature
from lora_fast.kernels.pairs import gram

CPU = torch.device("cpu")
THREADS = 4


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch):
    for name, empty in (("_recent", {}), ("_captured", {}), ("_held_for_graphs", [])):
        monkeypatch.setattr(pointer_table, name, empty)


def test_cached_results_belong_to_their_keys():
    """First two keys in turns, which always move the last used entry, then more keys than are kept."""

    def look_up(first: int) -> None:
        for i in range(4000):
            key = (first + i) % (2 if i < 2000 else 2 * pointer_table.CACHE_SIZE)
            assert pointer_table.cached("squares", [CPU, key], lambda key=key: key**2) == key**2

    run_together(*[functools.partial(look_up, 11 * i) for i in range(THREADS)])


def test_captured_entry_is_kept_while_other_threads_use_the_cache(monkeypatch):
    """A graph reads the memory of the entries that its capture has looked up, whatever other threads do meanwhile."""
    captures, used = threading.local(), []

    def capturing() -> bool:
        time.sleep(0)  # lets another thread run
        return getattr(captures, "running", False)

    monkeypatch.setattr(pointer_table, "capturing", capturing)

    def capture() -> None:
        for i in range(300):
            captures.running = False
            built = pointer_table.cached("lists", [CPU, "captured", i], object)
            captures.running = True
            used.append((i, built, pointer_table.cached("lists", [CPU, "captured", i], object)))
        captures.running = False

    def look_up(name: str) -> None:
        for i in range(3000):
            pointer_table.cached("lists", [CPU, name, i % 8], object)

    run_together(capture, *[functools.partial(look_up, name) for name in "abc"])
    kept = {key[-1]: found for key, found in pointer_table._captured["lists", CPU].items()}
    assert all(built is captured is kept[i] for i, built, captured in used)


def test_each_stream_and_device_has_its_own_tables(monkeypatch):
    """Counters of one table must not be used by two launches at a time. A capture, which has a new stream, uses the
    table of the calls before it."""
    stream = [1]
    monkeypatch.setattr(device, "stream_on", lambda torch_device: stream[0])
    factor = torch.zeros(4, 16)
    find = lambda: pointer_table.find_tables([[factor]], [True])[0].factors
    first = find()
    stream[0] = 2
    second = find()
    assert second is not first and second.counters is not first.counters
    stream[0] = 1
    assert find() is first
    stream[0] = 3
    with monkeypatch.context() as patch:
        patch.setattr(pointer_table, "capturing", lambda: True)
        captured = find()
        assert captured in (first, second) and find() is captured
    stream[0] = 1 if captured is first else 2
    assert find() is not captured, "the graph's replays use its counters, on any stream"
    places = [torch.device("cuda", i) for i in range(2)]
    lists = [[pointer_table.cached("lists", [place, i], object) for i in range(40)] for place in places]
    kept = [pointer_table.cached("lists", [place, 39], object) for place in places]
    assert kept == [tables[-1] for tables in lists] and kept[0] is not kept[1]
    assert all(len(pointer_table._recent["lists", place]) == pointer_table.CACHE_SIZE for place in places)


def test_addresses_on_the_device_are_those_of_the_caller():
    """Two threads compute Grams of the same factors with gradients of their own."""
    addresses = pointer_table.DeviceAddresses(CPU)

    def update(first: int) -> None:
        for i in range(2000):
            wanted = [first, first + i % 3]
            assert addresses.update(wanted).tolist() == wanted

    run_together(*[functools.partial(update, 100 * i) for i in range(THREADS)])


def test_tile_maps_are_right_in_all_threads():
    table = pointer_table.find_table([torch.zeros(4, 64)], [True])

    def look_up() -> None:
        for chunk in range(1, 64):
            assert table.tile_map(chunk).programs == -(-64 // chunk)

    run_together(*[look_up] * THREADS)
    assert len(table._tile_maps) == 63


def test_plans_belong_to_their_keys(monkeypatch):
    """With so few plans kept that threads drop each other's."""
    monkeypatch.setattr(launch, "MAX_PLANS", 3)
    plans: dict = {}

    def use() -> None:
        for i in range(2000):
            key = (i % 7,)
            assert launch.plan(plans, key, 0, lambda key=key: ("plan", *key)) == ("plan", *key)

    run_together(*[use] * THREADS)
    assert len(plans) <= 3


class SlowKernel:
    """Triton's compiled kernel, as far as a launch uses it: its launcher exists before its module is loaded."""

    def __init__(self, maxnreg: int | None):
        self.maxnreg, self._run, self.function, self.n_spills = maxnreg, None, None, 0 if maxnreg else 8
        self.metadata = SimpleNamespace(num_warps=4)

    @property
    def run(self):
        if self._run is None:
            self._run = object()
            threading.Event().wait(0.01)  # Triton releases the GIL while the driver loads the module
            self.function = object()
        return self._run


class SlowJit:
    """Triton's JIT: it compiles each variant once."""

    def __init__(self):
        self.variants: dict = {}

    def warmup(self, *arguments, grid, maxnreg=None):
        return self.variants.setdefault(maxnreg, SlowKernel(maxnreg))


def test_first_launches_of_several_threads_are_right(monkeypatch):
    """The kernel spills, so every thread must end with the variant that has more registers, and no thread may launch a
    function before it is loaded."""
    launched = []

    def prepare(compiled, *arguments):
        def go(stream, tensors, numbers):
            launched.append((compiled.maxnreg, compiled.function is not None))

        return go

    monkeypatch.setattr(compiled_launch, "prepare", prepare)
    for _ in range(20):
        shared = launch.Launch(SlowJit(), (1,), (), {})
        run_together(*[lambda shared=shared: shared.go(7, (torch.zeros(1),), ())] * THREADS)
        shared.go(7, (torch.zeros(1),), ())
    assert set(launched[THREADS :: THREADS + 1]) == {(launch.MOST_REGISTERS, True)}
    assert all(loaded for _, loaded in launched)


def test_error_of_a_failed_load_is_raised_each_time():
    """Triton stores a function that raises the error in place of the launcher, and no module."""

    class Failing(SlowKernel):
        @property
        def run(self):
            if self._run is None:
                self._run = functools.partial(fail, "shared memory")
                fail("shared memory")
            return self._run

    def fail(name: str):
        raise launch.OutOfResources(204800, 101376, name)

    kernel = SlowJit()
    kernel.__name__ = "lora_grad_a_kernel"
    kernel.variants[None] = Failing(None)
    for _ in range(2):
        with pytest.raises(launch.LaunchError, match=r"lora_grad_a_kernel .* needs 204800 bytes of shared memory"):
            launch.Launch(kernel, (1,), (), {}).go(7, (torch.zeros(1),), ())


def test_overlapping_assumptions_and_tables_end_in_any_order():
    table, other = ({tuned.key("linear", torch.float32, 1, 1, 1, r): "cublas"} for r in (1, 2))
    for first, second, seen in (
        (tiles.assume(arch=90), tiles.assume(arch=80), lambda: tiles.assumed("arch")),
        (tuned.using(table), tuned.using(other), lambda: tuned._used.values and tuned._used.values[-1]),
    ):
        before = seen()
        first.__enter__()
        alone = seen()
        second.__enter__()
        both = seen()
        first.__exit__(None, None, None)
        assert seen() == both != alone
        second.__exit__(None, None, None)
        assert seen() == before and not tiles.is_assumed()


def test_assumptions_of_other_threads_leave_none_behind():
    def assume(arch: int) -> None:
        for _ in range(500):
            with tiles.assume(arch=arch), tuned.using({}):
                assert tiles.limits(CPU).arch in (80, 90) and tiles.is_assumed()
                assert tuned.find("linear", torch.zeros(1, 1), 1, 1, 1) is None

    before = tuned.changes()
    run_together(*[functools.partial(assume, arch) for arch in (80, 90, 80, 90)])
    assert not tiles.is_assumed() and not tuned._used.values
    assert tuned.changes() == before + 2 * 4 * 500


def test_table_read_before_a_change_is_not_kept(monkeypatch):
    """A thread reads the file, another one writes it, and only then does the first one cache what it has read."""
    tables = [{"a card": {"old": 1}}, {"a card": {"new": 1}}]

    def read() -> dict:
        table = tables[0]
        if len(tables) > 1:
            tables.pop(0)
            tuned._changed()  # as ``tuned.write`` in another thread
        return table

    monkeypatch.setattr(tuned, "read", read)
    monkeypatch.setattr(tuned, "device_name", lambda _: "a card")
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, shape=(1, 1))
    seen = []
    monkeypatch.setattr(tuned, "key", lambda *arguments: "new")
    for _ in range(2):
        seen.append(tuned.find("linear", x, 1, 1, 1))
    assert seen == [None, 1]


def test_plan_made_during_a_change_of_settings_is_not_kept(monkeypatch):
    """Parts of such a plan may be made for the old settings and others for the new ones."""
    x, plans = torch.zeros(1), {}
    monkeypatch.setattr(signature, "plans", plans)
    key = "signature", signature.settings(x)
    assert signature.keep(key, "plan", x) == "plan" and plans == {key: "plan"}
    plans.clear()
    with tuned.using({}):
        assert signature.keep(key, "plan", x) == "plan" and not plans


@pytest.mark.gpu
def test_threads_with_gradients_of_their_own_share_factors():
    """Each computes Grams of the same factors with its own gradients, again and again, on the kernels."""
    a, b = [randn(4, 16, seed=1)], [randn(24, 4, seed=2)]
    gradients = [([randn(4, 16, seed=3 + i)], [randn(24, 4, seed=7 + i)]) for i in range(THREADS)]
    compute = lambda i: gram.gram(a, b, *gradients[i], gram.Grams._fields)
    expected = [compute(i) for i in range(THREADS)]

    def run(i: int) -> None:
        for _ in range(8):
            assert all(map(torch.equal, compute(i), expected[i]))

    run_together(*[functools.partial(run, i) for i in range(THREADS)])


@pytest.mark.gpu
def test_threads_transform_pairs_of_their_own():
    """NB-LoRA's transform and its backward, whose lists of addresses move at every call."""
    pairs = [([randn(3, 20, seed=i)], [randn(12, 3, seed=10 + i)]) for i in range(THREADS)]

    def compute(i: int) -> list[torch.Tensor]:
        a, b, inverses = cayley.cayley(*pairs[i])
        grad_a, grad_b, _ = cayley.cayley_backward(*pairs[i], None, inverses, [a[0].cos()], [b[0].sin()])
        return [*a, *b, *grad_a, *grad_b]

    expected = [compute(i) for i in range(THREADS)]

    def run(i: int) -> None:
        for _ in range(4):
            assert all(map(torch.equal, compute(i), expected[i]))

    run_together(*[functools.partial(run, i) for i in range(THREADS)])
