"""Seeds: drawn from the device's own generator, and the same ones when a checkpointed region runs again."""

import itertools
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import lora_fast as lf
from lora_fast import regions
from lora_fast.ops import seeds

CPU = torch.device("cpu")
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


class GpuGenerator:
    """Stands in for the generator of a GPU, with the rules of torch's own (ATen/cuda/CUDAGeneratorImpl.cpp)."""

    def __init__(self, seed: int):
        self.seed, self.offset = seed, 0

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset


@pytest.fixture
def gpus(monkeypatch) -> list[GpuGenerator]:
    generators = [GpuGenerator(0), GpuGenerator(0)]
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(generators))
    return generators


def gpu(index: int) -> torch.device:
    return torch.device("cuda", index)


# ── a GPU's generator ────────────────────────────────────────────────────────────────────────────────────────────────


def test_gpus_seeds_come_from_its_own_generator_alone(gpus):
    before = torch.get_rng_state()
    drawn = [seeds.draw(gpu(0)) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before) and [g.offset for g in gpus] == [12, 0]
    assert [seeds.draw(gpu(1)) for _ in range(3)] == drawn  # equal seeds and offsets, as for nn.Dropout
    gpus[0].set_offset(4)  # as torch.cuda.set_rng_state does
    assert seeds.draw(gpu(0)) == drawn[1]


def test_gpus_seeds_are_distinct_and_have_62_even_bits(gpus):
    drawn = [seeds.draw(gpu(0)) for _ in range(4000)]
    gpus[0].seed, gpus[0].offset = 1, 0
    drawn += [seeds.draw(gpu(0)) for _ in range(4000)]
    assert len(set(drawn)) == 8000 and all(0 <= seed < seeds.SEEDS for seed in drawn)
    ones = torch.tensor([[seed >> bit & 1 for bit in range(62)] for seed in drawn], dtype=torch.float64).mean(0)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 8000**0.5


def test_threads_on_one_gpu_draw_distinct_seeds(gpus):
    drawn = []
    work = lambda: drawn.extend([seeds.draw(gpu(0)) for _ in range(500)])
    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(set(drawn)) == 2000 and gpus[0].offset == 8000


# ── a CPU's generator ────────────────────────────────────────────────────────────────────────────────────────────────


def test_cpus_seeds_follow_manual_seed_and_the_restored_state():
    torch.manual_seed(0)
    first, state = seeds.draw(CPU), torch.get_rng_state()
    second = seeds.draw(CPU)
    torch.set_rng_state(state)
    assert seeds.draw(CPU) == second != first
    torch.manual_seed(0)
    assert seeds.draw(CPU) == first


def test_rounding_draws_a_seed_only_where_it_is_random():
    before, weight = torch.get_rng_state(), torch.zeros(4, 6, dtype=torch.bfloat16)
    lf.functional.add_low_rank_(weight, torch.ones(2, 6), torch.ones(4, 2), 1.0)
    assert torch.equal(torch.get_rng_state(), before)
    lf.functional.add_low_rank_(weight, torch.ones(2, 6), torch.ones(4, 2), 1.0, "stochastic")
    assert not torch.equal(torch.get_rng_state(), before)


# ── regions that run again ───────────────────────────────────────────────────────────────────────────────────────────


def draw_in_another_thread() -> None:
    thread = threading.Thread(target=seeds.draw, args=(CPU,))
    thread.start(), thread.join()


class Region:
    """Draws seeds between operations. In its first run another thread draws from the same generator before."""

    def __init__(self, draws: int = 2, inner=None):
        self.draws, self.inner, self.runs = draws, inner, []

    def __call__(self, x):
        if not self.runs:
            draw_in_another_thread()
        self.runs.append(drawn := [])
        for _ in range(self.draws):
            drawn.append(seeds.draw(CPU))
            x = x.sin()
        if self.inner is not None:
            x = self.inner(x).exp()
        return x.cos()


def leaf() -> torch.Tensor:
    return torch.rand(3, requires_grad=True)


@REENTRANT
@pytest.mark.parametrize("preserve", [True, False])
def test_region_draws_the_same_seeds_again(reentrant, preserve):
    region = Region()
    checkpoint(region, leaf(), use_reentrant=reentrant, preserve_rng_state=preserve).sum().backward()
    assert region.runs[0] == region.runs[1] and len(set(region.runs[0])) == 2


@REENTRANT
def test_two_regions_of_one_function_draw_their_own_seeds(reentrant):
    """As R-Drop does: the same x twice, with two masks."""
    region, x = Region(), leaf()
    first, second = (checkpoint(region, x, use_reentrant=reentrant) for _ in range(2))
    (first + second).sum().backward()
    one, two, *again = region.runs
    assert one != two and sorted(again) == sorted([one, two])


@REENTRANT
def test_every_backward_of_a_kept_graph_draws_the_same_seeds(reentrant):
    region = Region()
    y = checkpoint(region, leaf(), use_reentrant=reentrant).sum()
    for _ in range(3):
        y.backward(retain_graph=True)
    assert len(region.runs) == 4 and all(run == region.runs[0] for run in region.runs)


@pytest.mark.parametrize("early_stop", [True, False])
def test_region_that_stops_early_draws_the_same_seeds(early_stop):
    region, x = Region(inner=torch.detach), leaf()
    with set_checkpoint_early_stop(early_stop):
        y = checkpoint(region, x, use_reentrant=False)
    y = y + x
    y.sum().backward()
    assert all(run == region.runs[0] for run in region.runs)


@pytest.mark.parametrize("outer", [True, False], ids=["outer reentrant", "outer not reentrant"])
@pytest.mark.parametrize("within", [True, False], ids=["inner reentrant", "inner not reentrant"])
def test_region_in_a_region_draws_the_same_seeds_again(outer, within):
    inner = Region()
    region = Region(inner=lambda x: checkpoint(inner, x, use_reentrant=within))
    checkpoint(region, leaf(), use_reentrant=outer).sum().backward()
    for runs in (region.runs, inner.runs):
        assert len(runs) >= 2 and all(run == runs[0] for run in runs)


@pytest.mark.parametrize("kinds", list(itertools.product([True, False], repeat=3)), ids=str)
def test_three_nested_regions_with_dropout_have_the_gradients_of_none(kinds):
    """A reentrant region's ctx that asks for its tensors may make an outer region run again, before its own turn."""
    torch.manual_seed(0)
    layers = [lf.LoRALinear(8, 8, r=2, alpha=4, dropout=0.5) for _ in kinds]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B)
    x, results = torch.randn(5, 8, requires_grad=True), []
    for checkpointed in (False, True):
        run = lambda h: h
        for layer, reentrant in zip(reversed(layers), kinds[::-1], strict=True):
            inner = lambda h, layer=layer, run=run: run(layer(h))
            run = (lambda h, f=inner, r=reentrant: checkpoint(f, h, use_reentrant=r)) if checkpointed else inner
        trained = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
        for p in trained:
            p.grad = None
        torch.manual_seed(1)
        run(x).square().sum().backward()
        results.append([p.grad.clone() for p in trained])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_other_saved_tensor_hooks_are_seen_past_and_kept():
    region, top = Region(), torch._C._autograd._top_saved_tensors_default_hooks

    def under_hooks(x):
        with torch.autograd.graph.save_on_cpu():
            before = top(False)
            y = region(x)
            assert top(False) == before
        return y.exp()  # saved by the checkpoint, which therefore runs the region again

    checkpoint(under_hooks, leaf(), use_reentrant=False).sum().backward()
    assert region.runs[0] == region.runs[1] and top(False) is None


@REENTRANT
def test_other_draws_of_a_region_are_the_same_again(reentrant):
    """The generator is advanced in the second run as well, so that an nn.Dropout that follows draws the same mask."""
    numbers = []

    def region(x):
        seeds.draw(CPU)
        numbers.append(torch.rand(4))
        return x.sin().cos()

    checkpoint(region, leaf(), use_reentrant=reentrant).sum().backward()
    assert torch.equal(*numbers)


@REENTRANT
def test_backward_with_a_region_leaves_the_generator_where_it_was(reentrant):
    y = checkpoint(Region(), leaf(), use_reentrant=reentrant)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@REENTRANT
def test_region_without_torchs_internals_uses_the_generator(reentrant, monkeypatch):
    """As with a version of torch whose objects are others: alone on its generator a region still draws the same."""
    monkeypatch.setattr(regions, "_Frame", ())
    monkeypatch.setattr(regions, "_REENTRANT", object())
    monkeypatch.setattr(regions, "_REENTRANT_FORWARD", lambda: None)
    monkeypatch.setattr(f"{__name__}.draw_in_another_thread", lambda: None)
    region = Region()
    checkpoint(region, leaf(), use_reentrant=reentrant).sum().backward()
    assert region.runs[0] == region.runs[1]


def products(layer: nn.Module, x: torch.Tensor, y: torch.Tensor, dy: torch.Tensor) -> list[float]:
    """Returns <dy, what the adapter added to y>, <b, db> and <a, da>, which are equal if all used one mask."""
    added = (dy * (y.detach() - x.detach() @ layer.weight.T)).sum()
    return [added.item(), *((p * p.grad).sum().item() for p in (layer.lora_B, layer.lora_A))]


@REENTRANT
def test_replicas_in_threads_get_right_gradients_with_checkpointing(reentrant):
    """nn.DataParallel runs its replicas like this. All of them share the CPU's generator."""
    wrong = []

    def train(start: threading.Barrier):
        layer = lf.LoRALinear(64, 64, r=4, alpha=8, dropout=0.5, bias=False, device=CPU)
        nn.init.normal_(layer.lora_B)
        start.wait()
        for _ in range(10):
            layer.zero_grad()
            x = torch.randn(16, 64, requires_grad=True)
            y = checkpoint(partial(later, layer), x, use_reentrant=reentrant)
            dy = torch.randn_like(y)
            y.backward(dy)
            added, *others = products(layer, x, y, dy)
            wrong.extend(value for value in others if abs(value - added) > 1e-3 * abs(added) + 1e-2)

    def later(layer, x):
        seeds.draw(CPU)
        draw_in_another_thread()
        return layer(x)

    start = threading.Barrier(2)
    threads = [threading.Thread(target=train, args=(start,)) for _ in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not wrong
