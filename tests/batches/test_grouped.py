"""The optimizer on the Triton kernels, through the interpreter (natively on a CUDA machine): its results against the
transcription of the methods, its launches and torch operations, and what it does with state, gradients and graphs."""

import copy
import io
import weakref
from types import SimpleNamespace

import adapter_pairs
import method_runs
import pytest
import torch
import transcription as T
from step_launches import LAUNCHES
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fast as lf
from lora_fast import methods as M
from lora_fast.batches.grouped import GroupedBatch
from lora_fast.kernels import pointer_table
from lora_fast.kernels.inspection import interpreter
from lora_fast.kernels.records import Grams

pytestmark = pytest.mark.gpu

ONE_RANK, TWO_RANKS = [(24, 40, 4), (17, 33, 4)], [(24, 40, 4), (9, 50, 4), (17, 33, 3)]
LONG = {
    "ilora lora+": [M.ILoRA(lam=1.0), M.LoRAPlus(4.0)],
    "pilora": [M.PiLoRA(lam=1.0, damping=1e-2)],
    "scalora": [M.ScaLoRA(interval=5)],
    "balora mv": [M.BaLoRA(every=3, transport="mv"), M.ScaledAdamW(damping=1e-2)],
}
SHORT = {
    "plain": [],
    "ref-lora": [M.RefLoRA()],
    "lora-muon ilora": [M.LoRAMuon(), M.ILoRA(lam=1.0)],
    "scale-reg": [M.ScaleReg(lam=0.05), M.ScaledAdamW(damping=1e-2)],
    "scale-reg decoupled": [M.ScaleReg(lam=0.05, decoupled=True)],
    "ilora clipped": [M.ILoRA(lam=1e4, rho_scale=2.0)],
    "scalora paper": [M.ScaLoRA(kappa=30.0, interval=1, solver="paper"), M.LoRAPlus(2.0)],
}
CASES = [pytest.param(methods, 40, ONE_RANK, id=name) for name, methods in LONG.items()]
CASES += [
    pytest.param(methods, 100, ONE_RANK, id=f"{name} long", marks=pytest.mark.budget) for name, methods in LONG.items()
]
CASES += [pytest.param(methods, 12, TWO_RANKS, id=name) for name, methods in SHORT.items()]


@pytest.mark.parametrize("methods, steps, shapes", CASES)
def test_grouped_step_follows_the_float64_transcription(methods, steps, shapes, monkeypatch):
    monkeypatch.setattr(method_runs.layers, "__defaults__", (0, shapes, False))
    monkeypatch.setattr(method_runs.gradient_stream, "__defaults__", (shapes, 1))
    exact = method_runs.run(T.Run, torch.float64, methods, steps)
    formulas = method_runs.distance(method_runs.run(T.Run, torch.float32, methods, steps), exact)
    with lf.set_backend("triton"):
        work = method_runs.run(method_runs.Ours, torch.float32, methods, steps)
    batches = work.optimizer._batches
    assert all(isinstance(batch, GroupedBatch) for batch in batches) and len(batches) == len({r for *_, r in shapes})
    assert method_runs.distance(work, exact) <= 1.1 * formulas + method_runs.ULPS * torch.finfo(torch.float32).eps


class Operations(TorchDispatchMode):
    """Records the torch operations that compute something. Each would be a launch on a GPU."""

    FREE = ("empty", "empty_like", "empty_strided", "_record_function_enter_new", "_record_function_exit")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in self.FREE and not function.is_view:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


WITH_TORCH = ("balora", "ref-lora")  # methods whose eigenproblems run in torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts launches")
@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_do_not_grow_with_the_number_of_layers(name, monkeypatch):
    methods, expected = LAUNCHES[name]
    computed = []
    for n_pairs in (1, 24, 224):
        shapes = [(8 + 8 * (i % 2), 16 + 8 * (i % 3), 2) for i in range(n_pairs)]
        chosen = adapter_pairs.pairs(shapes=shapes)
        adapter_pairs.set_gradients(chosen, 0)
        with lf.set_backend("triton"):
            optimizer = lf.optim.LoRAAdamW(chosen, methods=methods)
            with monkeypatch.context() as patch:  # launches are counted and not executed
                patch.setattr(interpreter.InterpretedFunction, "run", lambda *args, **kwargs: None)
                for _ in range(2):  # the first steps build tables of addresses
                    optimizer.step()
                with interpreter.traffic() as counted, Operations() as operations:
                    optimizer.step()
        assert counted.launches == [f"lora_{kernel}_kernel" for kernel in expected]
        computed.append(operations.names)
    assert computed[0] == computed[1] == computed[2]
    if name not in WITH_TORCH:
        assert computed[0] == []


MIXED = [M.PiLoRA()], [M.ScaLoRA(interval=3)], [M.ScaleReg(lam=0.05)], []


@pytest.mark.parametrize("methods", MIXED, ids=["pilora", "scalora", "scale-reg", "plain"])
def test_steps_are_bitwise_equal_on_repeat_and_after_resume(methods):
    straight, again, resumed = (adapter_pairs.pairs(weight_dtype=torch.bfloat16) for _ in range(3))
    with lf.set_backend("triton"):
        for chosen in (straight, again):
            adapter_pairs.train(whole := lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods), chosen, 4)
        assert adapter_pairs.same(adapter_pairs.bits(straight), adapter_pairs.bits(again))
        adapter_pairs.train(before := lf.optim.LoRAAdamW(resumed, lr=1e-2, methods=methods), resumed, 2)
        torch.save(before.state_dict(), file := io.BytesIO())
        file.seek(0)
        after = lf.optim.LoRAAdamW(resumed, lr=1e-2, methods=methods)
        after.load_state_dict(torch.load(file))
        adapter_pairs.train(after, resumed, 2, first=2)
    assert adapter_pairs.same(adapter_pairs.bits(straight, whole), adapter_pairs.bits(resumed, after))


RESUMED = {
    "plain": [],
    "scale-reg": [M.ScaleReg(lam=0.05)],
    "scaled adamw": [M.ScaledAdamW()],
    "ilora lora+": [M.ILoRA(lam=1.0), M.LoRAPlus(4.0)],
    "balora": [M.BaLoRA()],
    "scalora": [M.ScaLoRA(interval=2)],
    "lora-rite": [M.LoRARITE()],
    "lora-muon": [M.LoRAMuon()],
    "ref-lora": [M.RefLoRA()],
}


@pytest.mark.parametrize("name", RESUMED)
def test_16_bit_factors_resume_bitwise(name):
    """Half of the cases are bfloat16 with moments in float32, half float16 throughout."""
    dtype = (torch.bfloat16, torch.float16)[list(RESUMED).index(name) % 2]
    settings = {"lr": 1e-2, "methods": RESUMED[name], "rounding": "stochastic"}
    settings["state_dtype"] = torch.float32 if dtype == torch.bfloat16 else None
    shapes = [(9, 12, 3), (5, 7, 3)]
    straight, resumed = (adapter_pairs.pairs(dtype=dtype, shapes=shapes) for _ in range(2))
    with lf.set_backend("triton"):
        adapter_pairs.train(whole := lf.optim.LoRAAdamW(straight, **settings), straight, 3)
        adapter_pairs.train(before := lf.optim.LoRAAdamW(resumed, **settings), resumed, 2)
        torch.save(before.state_dict(), file := io.BytesIO())
        file.seek(0)
        after = lf.optim.LoRAAdamW(resumed, **settings)
        after.load_state_dict(torch.load(file))
        adapter_pairs.train(after, resumed, 1, first=2)
    assert adapter_pairs.same(adapter_pairs.bits(straight, whole), adapter_pairs.bits(resumed, after))


def test_backend_may_change_between_steps():
    """State is per parameter, so steps on one backend continue those on the other."""
    ours, torchs = adapter_pairs.pairs(), adapter_pairs.pairs()
    mixed, reference = (lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=[M.ILoRA()]) for chosen in (ours, torchs))
    for i in range(4):
        with lf.set_backend("triton" if i % 2 else "torch"):
            adapter_pairs.train(mixed, ours, 1, first=i)
        adapter_pairs.train(reference, torchs, 1, first=i)
    for got, want in zip(adapter_pairs.bits(ours, mixed), adapter_pairs.bits(torchs, reference), strict=True):
        assert (got - want).norm() <= 8 * torch.finfo(torch.float32).eps * want.norm()


def test_step_without_methods_takes_gradients_of_single_factors():
    """A factor without its partner's gradient is trained by plain AdamW, and refused by methods that use both."""
    chosen = adapter_pairs.pairs()
    adapter_pairs.set_gradients(chosen, 0)
    chosen[0][0].grad = chosen[1][0].grad = chosen[1][1].grad = None
    before = adapter_pairs.bits(chosen)
    with lf.set_backend("triton"):
        (optimizer := lf.optim.LoRAAdamW(chosen)).step()
        moved = [not torch.equal(x, y) for x, y in zip(adapter_pairs.bits(chosen), before, strict=True)]
        assert moved == [False, True, False] + [False] * 3 + [True, True, False] * 2
        with pytest.raises(lf.ArgumentError, match=r"lora_A\.grad"):
            lf.optim.LoRAAdamW(chosen, methods=[M.ILoRA()]).step()
    assert optimizer.state[chosen[0][1]]["step"].item() == 1


def test_step_takes_strided_parameters_and_tensor_learning_rates():
    chosen = adapter_pairs.pairs()
    with torch.no_grad():
        chosen[0][0].data = chosen[0][0].data.T.contiguous().T
    adapter_pairs.set_gradients(chosen, 0)
    twin = copy.deepcopy(chosen)
    adapter_pairs.set_gradients(twin, 0)
    with lf.set_backend("triton"):
        lf.optim.LoRAAdamW(chosen, lr=torch.tensor(1e-2), methods=[M.ILoRA(lam=1.0)]).step()
    lf.optim.LoRAAdamW(twin, lr=1e-2, methods=[M.ILoRA(lam=1.0)]).step()
    for got, want in zip(adapter_pairs.bits(chosen), adapter_pairs.bits(twin), strict=True):
        assert (got - want).norm() <= 8 * torch.finfo(torch.float32).eps * want.norm()


class Recorded:
    """Records the launches of the interpreter and repeats them, as a CUDA graph replays them."""

    def __init__(self, monkeypatch):
        self.calls, run = [], interpreter.InterpretedFunction.run

        def record(function, *args, **kwargs):
            self.calls.append(lambda: run(function, *args, **kwargs))
            return run(function, *args, **kwargs)

        monkeypatch.setattr(interpreter.InterpretedFunction, "run", record)

    def replay(self):
        for call in self.calls:
            call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="bench/gpu.py captures real graphs")
@pytest.mark.parametrize("methods", [[], [M.PiLoRA()], [M.LoRAMuon(), M.ILoRA()]], ids=["plain", "pilora", "lora-muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replay_reads_the_new_step_count_and_learning_rate(methods, dtype, monkeypatch):
    """The learning rate is a tensor that a schedule fills. Launches read it and the step count from memory."""
    rates = [1e-2, 3e-3, 2e-2]
    replayed, stepped = adapter_pairs.pairs(), adapter_pairs.pairs()
    ours, theirs = ([p for a, b, *_ in chosen for p in (a, b)] for chosen in (replayed, stepped))
    for p in ours:
        p.grad = torch.zeros_like(p)
    lr = torch.tensor(rates[0], dtype=dtype)
    with lf.set_backend("triton"):
        optimizer = lf.optim.LoRAAdamW(replayed, lr=lr, weight_decay=0.1, methods=methods)
        reference = lf.optim.LoRAAdamW(stepped, lr=rates[0], weight_decay=0.1, methods=methods)
        recorded = None
        for i, rate in enumerate(rates):
            adapter_pairs.set_gradients(stepped, i)
            torch._foreach_copy_([p.grad for p in ours], [p.grad for p in theirs])
            lr.fill_(rate)
            reference.param_groups[0]["lr"] = rate
            reference.step()
            if recorded:
                recorded.replay()
                continue
            with monkeypatch.context() as patch:
                recorded = Recorded(patch)
                optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).norm() <= 4 * torch.finfo(torch.float32).eps * q.norm()
        assert optimizer.state[p]["step"].item() == len(rates)


@pytest.mark.parametrize("methods", [[], [M.PiLoRA()], [M.LoRAMuon()]], ids=["plain", "pilora", "lora-muon"])
def test_gradients_are_freed_after_the_step(methods):
    """A gradient is not contiguous, so the kernels read a copy. The copy is freed, too."""
    chosen = adapter_pairs.pairs()
    with lf.set_backend("triton"):
        optimizer = lf.optim.LoRAAdamW(chosen, methods=methods)
        adapter_pairs.set_gradients(chosen, 0)
        chosen[0][0].grad = chosen[0][0].grad.T.contiguous().T
        optimizer.step()
        held = [weakref.ref(p.grad) for a, b, *_ in chosen for p in (a, b)]
        optimizer.zero_grad()
    assert not any(reference() for reference in held)


def test_moved_gradient_is_an_error_while_a_graph_is_captured(monkeypatch):
    """A step whose tensors have not moved is captured without a copy from the host, and its batch is never freed."""
    chosen = adapter_pairs.pairs()
    adapter_pairs.set_gradients(chosen, 0)
    with lf.set_backend("triton"):
        optimizer = lf.optim.LoRAAdamW(chosen, methods=[M.PiLoRA()])
        optimizer.step()
        monkeypatch.setattr(pointer_table, "capturing", lambda: True)
        monkeypatch.setattr(pointer_table, "_captured", {})
        monkeypatch.setattr(pointer_table, "_held_for_graphs", [])
        with monkeypatch.context() as patch:
            patch.setattr(pointer_table, "to_device", None)
            optimizer.step(), optimizer.step()
        assert optimizer._batches[0] in pointer_table._held_for_graphs and len(pointer_table._held_for_graphs) == len(
            set(map(id, pointer_table._held_for_graphs))
        )
        before = adapter_pairs.bits(chosen)
        held = [p.grad for a, b, *_ in chosen for p in (a, b)]  # held, so that no new gradient gets an old address
        adapter_pairs.set_gradients(chosen, 1)
        with pytest.raises(RuntimeError, match="has moved since the last step"):
            optimizer.step()
    assert adapter_pairs.same(adapter_pairs.bits(chosen), before) and held


def adamw_of(chosen, **settings):
    return torch.optim.AdamW([p for a, b, *_ in chosen for p in (a, b)], lr=1e-2, **settings)


def test_factors_of_a_pair_may_have_different_step_counts():
    """b alone has gradients for two steps, then both. Each has its own bias correction, as in torch's AdamW."""
    ours, theirs = adapter_pairs.pairs(), adapter_pairs.pairs()
    with lf.set_backend("triton"):
        optimizer, reference = lf.optim.LoRAAdamW(ours, lr=1e-2), adamw_of(theirs, weight_decay=0.0)
        for i in range(4):
            for chosen in (ours, theirs):
                adapter_pairs.set_gradients(chosen, i)
                for a, *_ in chosen if i < 2 else ():
                    a.grad = None
            optimizer.step(), reference.step()
    for x, y in zip(adapter_pairs.bits(ours), adapter_pairs.bits(theirs), strict=True):
        assert (x - y).norm() <= 1e-5 * y.norm()
    assert [optimizer.state[p]["step"].item() for p in ours[0][:2]] == [2, 4]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("methods", [[], [M.ILoRA()]], ids=["plain", "ilora"])
@pytest.mark.parametrize("change", ["dict", "entry", "popped", "missing", "cleared"])
def test_next_step_uses_state_that_the_user_replaced(change, methods, backend):
    """The state of one parameter is replaced by other tensors, as on the way to a CPU and back, or removed."""
    chosen = adapter_pairs.pairs()
    with lf.set_backend(backend):
        adapter_pairs.train(optimizer := lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=methods), chosen, 2)
        adapter_pairs.train(
            twin := lf.optim.LoRAAdamW(others := adapter_pairs.pairs(), lr=1e-2, methods=methods), others, 2
        )
        for opt, p in ((optimizer, chosen[0][0]), (twin, others[0][0])):
            state = opt.state[p]
            fresh = {name: torch.zeros_like(x) if name != "step" else x.clone() for name, x in state.items()}
            if opt is twin:  # the reference changes the same values in place, then builds its batches anew
                for name, x in state.items():
                    x.copy_(fresh[name])
                if change in ("popped", "missing", "cleared"):
                    state["step"].zero_()
                opt._forget_batches()
            elif change == "dict":
                opt.state[p] = fresh
            elif change == "entry":
                state |= fresh
            elif change == "popped":
                opt.state.pop(p)
            elif change == "missing":
                del state["exp_avg"], state["exp_avg_sq"], state["step"]
            elif change == "cleared":
                state.clear()
        adapter_pairs.train(optimizer, chosen, 2, first=2), adapter_pairs.train(twin, others, 2, first=2)
    assert adapter_pairs.same(adapter_pairs.bits(chosen, optimizer), adapter_pairs.bits(others, twin))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_next_step_uses_state_that_was_moved_inside_its_tensors(backend):
    chosen, others = adapter_pairs.pairs(), adapter_pairs.pairs()
    with lf.set_backend(backend):
        optimizers = [lf.optim.LoRAAdamW(pairs, lr=1e-2, methods=[M.ILoRA()]) for pairs in (chosen, others)]
        for optimizer, pairs in zip(optimizers, (chosen, others), strict=True):
            adapter_pairs.train(optimizer, pairs, 2)
        for state in optimizers[0].state.values():
            for x in state.values():
                x.data = x.data.clone()
        for optimizer, pairs in zip(optimizers, (chosen, others), strict=True):
            adapter_pairs.train(optimizer, pairs, 2, first=2)
    assert adapter_pairs.same(adapter_pairs.bits(chosen, optimizers[0]), adapter_pairs.bits(others, optimizers[1]))


def test_batches_follow_parameters_to_another_device(monkeypatch):
    """Under backend "auto", parameters move from a CPU to what stands for a GPU."""
    from lora_fast import backend

    chosen = adapter_pairs.pairs()
    optimizer = lf.optim.LoRAAdamW(chosen, lr=1e-2, methods=[M.ILoRA()])
    adapter_pairs.train(optimizer, chosen, 1)
    assert not any(isinstance(batch, GroupedBatch) for batch in optimizer._batches)
    for p in (p for a, b, *_ in chosen for p in (a, b)):
        p.data = p.data.clone()
    monkeypatch.setattr(backend, "uses_triton", lambda tensor: True)
    adapter_pairs.train(optimizer, chosen, 1, first=1)
    assert all(isinstance(batch, GroupedBatch) for batch in optimizer._batches)


@pytest.mark.parametrize("on_device", ["lora_A", "lora_B"])
def test_number_keeps_its_precision_beside_a_tensor_learning_rate(on_device):
    """A learning rate is a tensor and the other one a number. The result is bitwise that of two numbers."""
    ends = []
    for numbers in (True, False):
        chosen = adapter_pairs.pairs()
        adapter_pairs.set_gradients(chosen, 0)
        with lf.set_backend("triton"):
            optimizer = lf.optim.LoRAAdamW(chosen, methods=[M.LoRAPlus(ratio=2.0)])
            for group, name, lr in zip(optimizer.param_groups, ("lora_A", "lora_B"), (0.1, 0.3), strict=True):
                group["lr"] = lr if numbers or name != on_device else torch.tensor(lr, dtype=torch.float64)
            optimizer.step()
        ends.append(adapter_pairs.bits(chosen))
    assert adapter_pairs.same(*ends)


def test_float64_is_refused_by_name():
    chosen = adapter_pairs.pairs(dtype=torch.float64)
    adapter_pairs.set_gradients(chosen, 0)
    with lf.set_backend("triton"), pytest.raises(lf.BackendError, match="float64"):
        lf.optim.LoRAAdamW(chosen, methods=[M.ILoRA()]).step()


def test_scalora_keeps_seed_and_kappa_in_memory_on_a_gpu():
    """A CUDA graph reads them at these addresses at every replay. The seed in memory is the number used on a CPU."""
    steps = torch.tensor([7.0, 7.0, 5.0, 7.0, 7.0, 5.0])  # of a pair of two experts, then of one that rests
    group = SimpleNamespace(products=3, _steps=steps, _device=SimpleNamespace(type="cuda"), rests=[False, True])
    group.pairs, group.counts = [SimpleNamespace(experts=2), SimpleNamespace(experts=1)], lambda: [8, 5]
    in_memory = GroupedBatch._seed(group, 3)
    group._device = torch.device("cpu")
    assert in_memory.dtype == torch.int64 and in_memory.item() == GroupedBatch._seed(group, 3)
    method, memory, addresses = M.ScaLoRA(), {}, set()
    for value in (4.0, 9.0):
        solved = [(torch.full((2, 4), value), torch.ones(2, 4, dtype=torch.bool))]
        kappa = method._calibrate(solved, [Grams(*torch.ones(5, 2, 2, 2))], memory)
        addresses.add(kappa.data_ptr())
        assert kappa is memory["kappa"] and kappa.item() == pytest.approx(4.0)
    assert len(addresses) == 1
