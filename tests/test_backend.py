"""Which implementation runs, on stand-ins for tensors of devices that this machine does not have. The two modules of a
family of ops, kernels and torch twins, have the same functions with the same arguments."""

import functools
import inspect
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from together import run_together
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lora_fast as lf
from lora_fast import backend, platforms


@pytest.mark.parametrize("family", ["linear", "pairs", "cayley", "dora", "experts", "batched"])
def test_families_have_the_same_functions_and_signatures(family):
    kernels, twins = (backend.load_ops(family, triton) for triton in (True, False))
    assert sorted(kernels.__all__) == sorted(twins.__all__)
    for name in kernels.__all__:
        arguments = [
            [(p.name, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]
            for module in (kernels, twins)
        ]
        assert arguments[0] == arguments[1], name


def in_a_thread(function):
    """Returns what a function returns in a new thread, such as autograd's thread of a GPU."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.fixture
def process(monkeypatch):
    """Gives the process's backend back after the test."""
    monkeypatch.setattr(backend, "_process", "auto")


def test_block_holds_in_its_thread_alone(process):
    with backend.set_backend("torch"):
        assert (backend.chosen(), in_a_thread(backend.chosen)) == ("torch", "auto")
        with backend.set_backend("triton"):
            assert (backend.chosen(), in_a_thread(backend.chosen)) == ("triton", "auto")
        assert backend.chosen() == "torch"
    assert backend.chosen() == "auto"


def test_blocks_of_many_threads_never_show_in_another_thread(process):
    names, running = ("torch", "triton", "torch", "triton"), []

    def run(name: str) -> None:
        running.append(name)
        for _ in range(1000):
            with backend.set_backend(name):
                time.sleep(0)  # lets another thread run
                assert backend.chosen() == name
            assert backend.chosen() == "auto"
        running.remove(name)

    def watch() -> None:
        while not running:
            time.sleep(0)
        while running:
            assert backend.chosen() == "auto"

    run_together(watch, *[functools.partial(run, name) for name in names])
    assert backend.chosen() == "auto"


def test_call_that_is_no_block_holds_in_the_process(process):
    for name in ("torch", "triton"):
        backend.set_backend(name)
        assert (backend.chosen(), in_a_thread(backend.chosen)) == (name, name)
    in_a_thread(lambda: backend.set_backend("torch") and None)
    assert backend.chosen() == "torch"
    with backend.set_backend("auto"):
        backend.set_backend("triton")
        assert (backend.chosen(), in_a_thread(backend.chosen)) == ("auto", "triton")
    assert backend.chosen() == "triton"


def test_call_whose_result_is_kept_holds_in_the_process_once_it_is_shown(process):
    """An interactive session shows the result of a call and keeps it."""
    kept = backend.set_backend("torch")
    assert (backend.chosen(), in_a_thread(backend.chosen)) == ("torch", "auto")
    assert repr(kept) == "set_backend('torch')"
    assert (backend.chosen(), in_a_thread(backend.chosen)) == ("torch", "torch")
    with backend.set_backend("triton"), kept, kept:  # and it can still begin blocks
        assert backend.chosen() == "torch"
    assert backend.chosen() == "torch"


def test_wrong_name_changes_nothing(process):
    with pytest.raises(lf.ArgumentError, match="backend: expected one of"):
        backend.set_backend("tritton")
    assert backend.chosen() == "auto"


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_region_that_runs_again_in_another_thread_uses_the_backends_of_its_first_run(process, reentrant, monkeypatch):
    """On a GPU it runs again in autograd's thread. With another backend it would draw another dropout mask."""
    ran, load = [], backend.load_ops
    monkeypatch.setattr(backend, "load_ops", lambda family, triton: ran.append(triton) or load(family, triton))
    monkeypatch.setattr(platforms, "triton_obstacle", lambda: None)
    layer = lf.LoRALinear(8, 8, r=2, alpha=2, dropout=0.5)
    torch.nn.init.normal_(layer.lora_B)

    def region(x):
        with lf.set_backend("torch"):
            y = layer(x)
        return layer(y)

    def train(run):
        x = torch.ones(3, 8, requires_grad=True)
        torch.manual_seed(1)
        with lf.set_backend("triton"):
            loss = run(x).square().sum()
        ran.clear()
        layer.zero_grad()
        in_a_thread(loss.backward)
        return [x.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()]

    torch.manual_seed(0)
    expected = train(region)
    got = train(lambda x: checkpoint(lambda x: checkpoint(region, x, use_reentrant=False), x, use_reentrant=reentrant))
    assert ran[:2] == [False, True]
    torch.testing.assert_close(got, expected)


CAPABILITIES = {0: (7, 5), 1: (9, 0), 2: (7, 0), 3: (7, 5)}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Forgets what is known about this machine, and gives it the GPUs of CAPABILITIES."""
    monkeypatch.setattr(platforms, "_gpu_obstacles", {})
    monkeypatch.setattr(platforms, "triton_obstacle", platforms.triton_obstacle.__wrapped__)
    monkeypatch.setattr(backend, "_warned_of", {})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: CAPABILITIES[index])


def tensor_on(kind: str, index: int = 0, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """Returns a stand-in for a tensor on such a device."""
    where = {"is_cuda": kind == "cuda", "is_cpu": kind == "cpu", "is_meta": kind == "meta"}
    return SimpleNamespace(device=torch.device(kind, index), get_device=lambda: index, dtype=dtype, **where)


def warnings_of(*tensors) -> list[str]:
    """Returns the warnings while each tensor is asked for twice."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for tensor in tensors * 2:
            assert not backend.uses_triton(tensor)
    return [str(warning.message) for warning in caught]


def test_auto_decides_for_each_gpu():
    with lf.set_backend("auto"), pytest.warns(UserWarning, match="got sm_75"):
        assert [backend.uses_triton(tensor_on("cuda", index)) for index in (0, 1)] == [False, True]


def test_auto_warns_once_for_each_cause():
    with lf.set_backend("auto"):
        texts = warnings_of(*(tensor_on("cuda", index) for index in (0, 2, 3)))
    assert [text.partition(", got ")[2][:5] for text in texts] == ["sm_75", "sm_70"]
    assert all("lf.set_backend('torch')" in text for text in texts)


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_auto_warns_of_other_accelerators_and_not_of_a_cpu(kind):
    with lf.set_backend("auto"):
        assert [kind in text for text in warnings_of(tensor_on(kind), tensor_on("cpu"), tensor_on("meta"))] == [True]


def test_chosen_torch_runs_without_a_warning():
    with lf.set_backend("torch"):
        assert warnings_of(tensor_on("cuda", 0), tensor_on("xpu")) == []


def test_float64_runs_where_plain_torch_does():
    with lf.set_backend("auto"), pytest.warns(UserWarning):
        assert not backend.uses_triton(tensor_on("cuda", 0, torch.float64))
    with pytest.raises(lf.BackendError, match="float64"):
        backend.uses_triton(tensor_on("cuda", 1, torch.float64))


ABSENT = [
    ("sm_75", tensor_on("cuda", 0), {}, "; lf.set_backend('torch')"),
    ("ROCm", tensor_on("cuda", 1), {"hip": "6.4"}, "; lf.set_backend('torch')"),
    ("no triton package", tensor_on("cuda", 1), {"triton": None}, "; pip install 'triton"),
    ("xpu", tensor_on("xpu"), {}, "; lf.set_backend('torch')"),
]


def change_machine(monkeypatch, changes: dict) -> None:
    if "hip" in changes:
        monkeypatch.setattr(torch.version, "hip", changes["hip"])
    if "triton" in changes:
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.setitem(sys.modules, "triton.language", None)


@pytest.mark.parametrize(("got", "tensor", "changes", "remedy"), ABSENT, ids=[row[0] for row in ABSENT])
def test_chosen_triton_is_refused_by_name(monkeypatch, got, tensor, changes, remedy):
    change_machine(monkeypatch, changes)
    with lf.set_backend("triton"), pytest.raises(lf.BackendError, match=got) as raised:
        backend.uses_triton(tensor)
    assert remedy in str(raised.value) and "lf.set_backend('torch')" in str(raised.value)


@pytest.mark.parametrize(("got", "tensor", "changes", "remedy"), ABSENT, ids=[row[0] for row in ABSENT])
def test_report_says_what_auto_warns_of(monkeypatch, got, tensor, changes, remedy):
    change_machine(monkeypatch, changes)
    report = lf.Report("fused", {"q": "FusedLinear"})
    layer = SimpleNamespace(parameters=lambda: [tensor, tensor])
    with lf.set_backend("auto"):
        report.note_fallbacks([layer])
        assert warnings_of(tensor)[0].startswith(report.note) and got in report.note
    with lf.set_backend("torch"):
        report.note_fallbacks([layer])
    assert report.note == ""


def ops_on_triton() -> dict:
    """Returns a call of each kind of op, on parameters that the calls share."""
    layer = lf.LoRALinear(8, 6, r=2, alpha=4)
    pair = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 8), (6, 2))]
    for parameter in pair:
        parameter.grad = torch.ones_like(parameter)
    return {
        "layer": lambda: layer(torch.ones(3, 8)),
        "step": lf.optim.LoRAAdamW([tuple(pair)]).step,
        "step with a method": lf.optim.LoRAAdamW([tuple(pair)], methods=[lf.methods.ILoRA()]).step,
        "gram": lambda: lf.functional.gram([pair[0].detach()], 1),
        "cayley": lambda: lf.NBLoRALinear(8, 6, r=2)(torch.ones(3, 8)),
    }


@pytest.mark.parametrize("op", ops_on_triton())
@pytest.mark.parametrize("interpret", ["0", "1"], ids=["cpu", "no-triton"])
def test_every_op_refuses_triton_before_a_kernel(monkeypatch, op, interpret):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    if interpret == "1":
        change_machine(monkeypatch, {"triton": None})
    call = ops_on_triton()[op]
    with lf.set_backend("triton"), pytest.raises(lf.BackendError, match="backend 'triton' on cpu tensors: expected"):
        call()


def test_compiled_call_takes_the_decision_as_a_constant(monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def negate_unless_triton(x):
        return x if backend.uses_triton(x) else -x

    compiled = torch.compile(
        negate_unless_triton, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True
    )
    with lf.set_backend("auto"), FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            compiled(torch.empty(2, device="cuda"))
    assert len(graphs) == 1 and "neg" in graphs[0].code
    assert [str(w.message).partition(", got ")[2][:5] for w in caught if "lora_fast" in str(w.message)] == ["sm_75"]
