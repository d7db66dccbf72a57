"""Pairs without gradients rest in their batch: they train as if they were alone, the host waits for nothing and builds
nothing. And a step leaves nothing in memory but parameters, state and tables."""

import copy
import ctypes
import gc
import weakref

import pytest
import torch
from adapter_pairs import bits, pairs, same, set_gradients
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fast as lf
from lora_fast import methods as M

pytestmark = pytest.mark.gpu

SHAPES = [(12, 20, 4), (12, 20, 4), (9, 16, 4)]
METHODS = {
    "plain": [],
    "ilora lora+": [M.ILoRA(lam=1.0), M.LoRAPlus(4.0)],
    "pilora": [M.PiLoRA(damping=1e-2)],
    "balora": [M.BaLoRA(every=2, transport="mv")],
    "scale-reg": [M.ScaleReg(lam=0.05), M.ScaledAdamW(damping=1e-2)],
    "scale-reg decoupled": [M.ScaleReg(lam=0.05, decoupled=True)],
    "scalora": [M.ScaLoRA(kappa=1.0, interval=2, rounding="nearest")],
    "lora-muon": [M.LoRAMuon(), M.ILoRA()],
    "ref-lora": [M.RefLoRA()],
}
BOTH_BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


def rest(chosen, step):
    """Takes the gradients of one or two pairs away, others at each step from the second on."""
    for i, (a, b, *_) in enumerate(chosen):
        if step and (i + step) % 3 != 0:
            a.grad = b.grad = None


@BOTH_BACKENDS
@pytest.mark.parametrize("name", METHODS)
def test_resting_pairs_train_as_if_alone(name, backend):
    together, alone = pairs(shapes=SHAPES), pairs(shapes=SHAPES)
    with lf.set_backend(backend):
        optimizer = lf.optim.LoRAAdamW(together, lr=1e-2, methods=METHODS[name])
        single = [lf.optim.LoRAAdamW([pair], lr=1e-2, methods=METHODS[name]) for pair in alone]
        for step in range(5):
            for chosen in (together, alone):
                set_gradients(chosen, step)
                rest(chosen, step)
            optimizer.step()
            for (a, *_), own_optimizer in zip(alone, single, strict=True):
                if a.grad is not None:
                    own_optimizer.step()
    for got, want in zip(bits(together), bits(alone), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for (a, b, *_), (other, *_), own_optimizer in zip(together, alone, single, strict=True):
        for p in (a, b):
            assert optimizer.state[p]["step"].item() == own_optimizer.state[other]["step"].item()


@BOTH_BACKENDS
@pytest.mark.parametrize("name", METHODS)
def test_resting_pair_keeps_all_bits(name, backend):
    chosen = pairs(shapes=SHAPES)
    with lf.set_backend(backend):
        optimizer = lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=METHODS[name])
        set_gradients(chosen, 0)
        optimizer.step()
        before = bits(chosen[1:2]), [value.clone() for p in chosen[1][:2] for value in optimizer.state[p].values()]
        moving = bits(chosen[:1])
        for step in range(1, 4):
            set_gradients(chosen, step)
            chosen[1][0].grad = chosen[1][1].grad = None
            optimizer.step()
    assert same(bits(chosen[1:2]), before[0])
    assert same([value for p in chosen[1][:2] for value in optimizer.state[p].values()], before[1])
    assert not same(bits(chosen[:1]), moving)


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host. On a GPU each waits for the device."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)
        return function(*args, **(kwargs or {}))


@BOTH_BACKENDS
@pytest.mark.parametrize("name", ["plain", "ilora lora+", "balora", "lora-muon"])
def test_resting_pairs_need_no_host_read_and_no_new_batch(name, backend):
    chosen = pairs(shapes=SHAPES)
    with lf.set_backend(backend):
        optimizer = lf.optim.LoRAAdamW(chosen, methods=METHODS[name])
        set_gradients(chosen, 0)
        optimizer.step()
        batches = [*optimizer._batches, *optimizer._unpaired]
        for step in range(1, 5):
            set_gradients(chosen, step)
            rest(chosen, step)
            with HostReads() as reads:
                optimizer.step()
            assert reads.number == 0 and [*optimizer._batches, *optimizer._unpaired] == batches


def test_pair_that_gets_its_first_gradient_late_joins():
    chosen = pairs(shapes=SHAPES)
    reference = [torch.nn.Parameter(p.detach().clone()) for a, b, *_ in chosen for p in (a, b)]
    optimizer, other = lf.optim.LoRAAdamW(chosen, lr=1e-2), torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.0)
    with lf.set_backend("triton"):
        for step in range(4):
            set_gradients(chosen, step)
            if step < 2:
                chosen[2][0].grad = chosen[2][1].grad = None
            for p, q in zip((p for a, b, *_ in chosen for p in (a, b)), reference, strict=True):
                q.grad = None if p.grad is None else p.grad.clone()
            optimizer.step(), other.step()
    for p, q in zip((p for a, b, *_ in chosen for p in (a, b)), reference, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"].item() == other.state[q]["step"].item()


def test_parameters_outside_pairs_rest_bitwise_as_in_torchs_adamw():
    ours = [torch.nn.Parameter(torch.full((3, 2), float(i))) for i in range(1, 4)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = lf.optim.LoRAAdamW(pairs(shapes=SHAPES))
    optimizer.add_param_group({"params": ours, "lr": 1e-2})
    other = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0, fused=True)
    for step in range(6):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = q.grad = None if step and (step + i) % 3 == 0 else torch.full((3, 2), 1.0 + step)
        if step == 4:
            for p, q in zip(ours, theirs, strict=True):
                p.grad = q.grad = None
        optimizer.step(), other.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert all(
        torch.equal(optimizer.state[p]["step"], other.state[q]["step"]) for p, q in zip(ours, theirs, strict=True)
    )


def test_stochastic_merges_differ_from_step_to_step_while_pairs_rest():
    """The seed follows the steps of all pairs, so it changes although the first pair rests."""
    chosen = pairs(shapes=SHAPES)
    with lf.set_backend("triton"):
        optimizer = lf.optim.LoRAAdamW(chosen, methods=[M.ScaLoRA(kappa=1.0, interval=1)])
        seeds = []
        for step in range(4):
            set_gradients(chosen, step)
            if step:
                chosen[0][0].grad = chosen[0][1].grad = None
            optimizer.step()
            seeds.append(optimizer._batches[0]._seed(0))
    assert len(set(seeds)) == len(seeds)


@BOTH_BACKENDS
@pytest.mark.parametrize("name", METHODS)
def test_step_leaves_only_parameters_and_state_in_memory(name, backend):
    """A square rank is unlike all other sizes here, so each r×r matrix that is still alive is seen."""
    r, chosen = 7, pairs(shapes=[(12, 20, 7)] * 3)
    with lf.set_backend(backend):
        optimizer = lf.optim.LoRAAdamW(chosen, methods=METHODS[name])
        for step in range(3):
            set_gradients(chosen, step)
            optimizer.step()
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.is_floating_point()]
    assert not [t.shape for t in alive if tuple(t.shape[-2:]) == (r, r)]


@BOTH_BACKENDS
@pytest.mark.parametrize(
    "methods", [[M.ILoRA()], [M.LoRARITE()], [M.LoRAMuon()]], ids=["ilora", "lora-rite", "lora-muon"]
)
def test_memory_is_free_once_parameters_and_state_are_moved_away(methods, backend):
    """As code does that offloads a model and its optimizer between phases. The next step uses what is there then."""
    moved, still = pairs(shapes=SHAPES), pairs(shapes=SHAPES)
    with lf.set_backend(backend):
        optimizers = [lf.optim.LoRAAdamW(chosen, methods=methods) for chosen in (moved, still)]
        for step in range(3):
            for chosen, optimizer in zip((moved, still), optimizers, strict=True):
                set_gradients(chosen, step)
                optimizer.step()
            factors = [p for a, b, *_ in moved for p in (a, b)]
            states = [optimizers[0].state[p] for p in factors]
            held = [weakref.ref(x.untyped_storage()) for state in states for x in state.values() if x.dim()]
            held += [weakref.ref(p.data.untyped_storage()) for p in factors]
            for p, state in zip(factors, states, strict=True):
                p.data = p.data.clone()
                state |= {name: value.clone() for name, value in state.items()}
            gc.collect()
            assert not any(reference() is not None for reference in held)
    assert same(bits(moved, optimizers[0]), bits(still, optimizers[1]))


@BOTH_BACKENDS
@pytest.mark.parametrize("name", ["ilora lora+", "balora", "scalora"])
def test_run_resumes_bitwise_where_pairs_rest(name, backend):
    """The first pair rests in the first step after the resume. Stochastic rounding needs the same noise there."""
    methods = [M.ScaLoRA(kappa=1.0, interval=2)] if name == "scalora" else METHODS[name]
    with lf.set_backend(backend):
        whole, resumed = (pairs(shapes=SHAPES, weight_dtype=torch.bfloat16) for _ in range(2))
        optimizers = [lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods) for chosen in (whole, resumed)]
        for step in range(6):
            if step == 3:
                fresh = lf.optim.LoRAAdamW(resumed, lr=1e-2, methods=methods)
                fresh.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
                optimizers[1] = fresh
            for chosen, optimizer in zip((whole, resumed), optimizers, strict=True):
                set_gradients(chosen, step)
                rest(chosen, step)
                optimizer.step()
    assert same(bits(whole, optimizers[0]), bits(resumed, optimizers[1]))


def test_slices_moved_one_by_one_to_the_old_addresses_are_stacked_anew():
    """An allocator may hand out the memory of a freed stack again, in the same order, to tensors with storages of
    their own."""

    def moved(x):
        memory = (ctypes.c_char * x.nbytes).from_address(x.data_ptr())
        return torch.frombuffer(memory, dtype=x.dtype).view(x.shape)

    chosen, others = pairs(shapes=SHAPES), pairs(shapes=SHAPES)
    optimizers = [lf.optim.LoRAAdamW(x, lr=1e-2, methods=[M.ILoRA()]) for x in (chosen, others)]
    for step in range(2):
        for x, optimizer in zip((chosen, others), optimizers, strict=True):
            set_gradients(x, step)
            optimizer.step()
        if step == 0:
            factors = [p for a, b, *_ in chosen for p in (a, b)]
            states = [optimizers[0].state[p] for p in factors]
            kept = [p.data for p in factors], [dict(state) for state in states]
            for p, state in zip(factors, states, strict=True):
                p.data = moved(p.data)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = moved(state[name])
    assert kept and same(bits(chosen, optimizers[0]), bits(others, optimizers[1]))
