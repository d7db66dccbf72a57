"""Modes of torch and profilers see the layers: FlopCounterMode counts what it counts with PEFT's, on both backends."""

import subprocess
import sys

import pytest
import torch
from adapted_nets import HIDDEN, IN, OURS, RANK, fused, plain
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import lora_fast as lf

TOKENS = 16
BOTH_BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
SQUARE = 2 * RANK * RANK  # operations of one column in a product with an (r, r) matrix
CAYLEY_FORWARD = sum(SQUARE * (2 * d_in - RANK + 2 * d_out) for d_in, d_out in ((IN, HIDDEN), (HIDDEN, IN)))
CAYLEY_BACKWARD = sum(SQUARE * (3 * d_in + 3 * d_out + RANK) for d_in, d_out in ((IN, HIDDEN), (HIDDEN, IN)))


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def backward_alone(model, x):
    loss = model(x).float().sum()
    return flops(loss.backward)


def whole(model, x):
    return flops(lambda: model(x).float().sum().backward())


def rerun_alone(model, x):
    loss = checkpoint(model, x, use_reentrant=False).float().sum()
    return flops(loss.backward)


def first_run_alone(model, x):
    loss = []
    counted = flops(lambda: loss.append(checkpoint(model, x, use_reentrant=False).float().sum()))
    loss[0].backward()
    return counted


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().sum()
    return flops(loss.backward)


def frozen_a(model, x):
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return whole(model, x)


RUNS = {
    "forward": (lambda model, x: flops(lambda: model(x)), 0.0),
    "backward alone": (backward_alone, 0.0),
    "backward alone, dropout": (backward_alone, 0.5),
    "x with a gradient": (lambda model, x: whole(model, x.requires_grad_()), 0.5),
    "three dimensions": (lambda model, x: whole(model, x.view(2, 8, IN)), 0.0),
    "bfloat16": (lambda model, x: backward_alone(model.bfloat16(), x.bfloat16()), 0.0),
    "autocast": (autocast, 0.5),
    "frozen lora_A": (frozen_a, 0.0),
    "checkpointed, first run": (first_run_alone, 0.5),
    "checkpointed, backward": (rerun_alone, 0.5),
}


@BOTH_BACKENDS
@pytest.mark.parametrize("name", RUNS)
def test_flops_are_pefts(name, backend):
    run, dropout = RUNS[name]
    expected = run(plain(dropout), torch.randn(TOKENS, IN))
    if name == "checkpointed, backward":  # PEFT's rerun stops before the last layer's product with lora_B
        expected += 2 * TOKENS * RANK * IN
    for kind in ("fused", "LoRALinear"):
        with lf.set_backend(backend):
            assert run(OURS[kind](dropout), torch.randn(TOKENS, IN)) == expected, kind


@BOTH_BACKENDS
def test_flops_of_other_layers_are_pefts_and_their_own_products(backend):
    x = torch.randn(TOKENS, IN)
    forward, backward = RUNS["forward"][0](plain(), x), backward_alone(plain(), x)
    own = {"SingLoRALinear": (0, 0), "NBLoRALinear": (CAYLEY_FORWARD, CAYLEY_BACKWARD)}
    for kind, (own_forward, own_backward) in own.items():
        with lf.set_backend(backend):
            assert RUNS["forward"][0](OURS[kind](), x) == forward + own_forward
            assert backward_alone(OURS[kind](), x) == backward + own_backward


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@BOTH_BACKENDS
def test_flops_of_compiled_layers_are_pefts(backend):
    x = torch.randn(TOKENS, IN)
    counted = []
    for build in (plain, fused, OURS["LoRALinear"]):
        torch.compiler.reset()
        model = torch.compile(build(), backend="aot_eager")
        with lf.set_backend(backend):
            model(x).sum().backward()
            loss = model(x).sum()  # by the compiled graph
            counted.append((flops(loss.backward), whole(model, x), backward_alone(model, x)))
    assert counted[1] == counted[2] == counted[0]


def test_counter_that_is_imported_later_has_the_formulas():
    code = (
        "import importlib.util, sys, torch, lora_fast; name = 'torch.utils.flop_counter';"
        "assert name not in sys.modules;"
        "importlib.util.find_spec(name);"  # as libraries do that only ask whether it is there
        "from torch.utils.flop_counter import flop_registry as known;"
        "print(sum(op in known for op in (torch.ops.lora_fast.lora_linear, torch.ops.lora_fast.cayley_backward)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "2"


class Names(TorchDispatchMode):
    """A log of all calls."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", OURS)
def test_observed_calls_have_the_same_bits(kind):
    """Those of the kernels go through the registered ops."""
    results = []
    for observer in (torch.enable_grad(), Names(), profile(activities=[ProfilerActivity.CPU], record_shapes=True)):
        model, x = OURS[kind](0.5), torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(1))
        with lf.set_backend("triton"), observer:
            torch.manual_seed(3)
            y = model(x)
            y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
        if isinstance(observer, Names):
            assert {"lora_fast.lora_linear.default", "lora_fast.lora_linear_backward.default"} <= set(observer.seen)
        elif isinstance(observer, profile):
            names = {event.key for event in observer.key_averages(group_by_input_shape=True)}
            assert {"lora_fast::lora_linear", "lora_fast::lora_linear_backward"} <= names
            assert kind != "NBLoRALinear" or {"lora_fast::cayley", "lora_fast::cayley_backward"} <= names
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_profiler_names_the_ops_of_the_torch_backend():
    model, x = fused(), torch.randn(TOKENS, IN)
    with profile(activities=[ProfilerActivity.CPU], with_stack=True, with_flops=True) as observer:
        model(x).sum().backward()
    counts = {event.key: event.count for event in observer.key_averages()}
    assert counts["lora_fast::lora_linear"] == counts["lora_fast::lora_linear_backward"] == 2


def test_selective_checkpointing_may_keep_the_ops_of_the_kernels():
    op, runs = torch.ops.lora_fast.lora_linear.default, []
    contexts = {None: None, "kept": lambda: create_selective_checkpoint_contexts([op])}
    for name, context in contexts.items():
        model, x = OURS["LoRALinear"](0.5), torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(1))
        calls = lambda x, model=model: model(x).square()
        with lf.set_backend("triton"):
            torch.manual_seed(3)
            y = checkpoint(calls, x, use_reentrant=False, context_fn=context) if name else calls(x)
            with Names() as log:
                y.sum().backward()
        runs.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *runs))
    assert str(op) not in log.seen  # and is not computed again


@BOTH_BACKENDS
def test_profiler_names_the_operations_of_a_step(backend):
    model = fused()
    optimizer = lf.optim.LoRAAdamW(model, methods=[lf.methods.ILoRA(), lf.methods.ScaledAdamW()])
    model(torch.randn(TOKENS, IN)).sum().backward()
    with lf.set_backend(backend), profile(activities=[ProfilerActivity.CPU]) as observer:
        optimizer.step()
    names = {event.key for event in observer.key_averages()}
    assert {"lora_fast::precondition", "lora_fast::adamw", "lora_fast::transform"} <= names


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_mode_that_looks_inside_sees_what_an_op_does(backend):
    """As the meter of memory and the tests that count an op's own products and casts."""

    class Inside(Names):
        looks_inside = True

    layer, x = lf.LoRALinear(8, 6, r=2, alpha=2), torch.ones(3, 8)
    with lf.set_backend(backend):
        for kind, has_op in ((Names, backend == "triton"), (Inside, False)):
            with kind() as mode:
                layer(x)
            assert any("lora_fast" in str(name) for name in mode.seen) == has_op


@pytest.mark.parametrize("config", [lf.LoRAConfig(r=2), lf.NBLoRAConfig(r=2)], ids=["lora", "nb-lora"])
def test_compiled_model_goes_on_after_a_call_under_a_mode(config):
    """torch.compile does not compile a call under a mode, and must not begin again in what launches the kernels."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 6)), torch.randn(3, 8)
    lf.inject_(model, config)
    torch.compiler.reset()
    with lf.set_backend("triton"):
        compiled = torch.compile(model, backend="aot_eager")
        with Names():
            compiled(x).sum().backward()
        torch.testing.assert_close(compiled(x), model(x))
