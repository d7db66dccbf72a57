"""The frozen weight: how often a step under autocast casts it, what is kept of it for backward, and that other strides
cost no copy."""

import functools

import peft
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lora_fast as lf

D_IN, D_OUT = 64, 48
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the tests on the kernels


class WeightCasts(TorchDispatchMode):
    """Counts the casts of a tensor of W's shape."""

    looks_inside = True
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._to_copy and args[0].shape == (D_OUT, D_IN):
            self.count += 1
        return func(*args, **(kwargs or {}))


def lora():
    return nn.Sequential(nn.Linear(D_IN, D_OUT)), lf.LoRAConfig(r=4)


def nb_lora():
    return nn.Sequential(nn.Linear(D_IN, D_OUT)), lf.NBLoRAConfig(r=4)


def sing_lora():
    return nn.Sequential(nn.Linear(D_IN, D_OUT)), lf.SingLoRAConfig(r=4, ramp_steps=0)


def injected(build):
    model, config = build()
    lf.inject_(model, config, progress=False)
    return model


def fused():
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(D_IN, D_OUT)), config)
    lf.fuse_(model)
    return model


MODELS = {
    "LoRALinear": lambda: injected(lora),
    "NBLoRALinear": lambda: injected(nb_lora),
    "SingLoRALinear": lambda: injected(sing_lora),
    "fused PEFT layer": fused,
}
recompute_all = functools.partial(
    create_selective_checkpoint_contexts, lambda *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE
)
RUNS = {
    "plain": lambda model, x: model(x),
    "non-reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "without early stop": lambda model, x: checkpoint(model, x, use_reentrant=False, early_stop=False),
    "selective": lambda model, x: checkpoint(model, x, use_reentrant=False, context_fn=recompute_all),
}
NESTED = {
    "non-reentrant in non-reentrant": (False, False),
    "reentrant in non-reentrant": (False, True),
    "reentrant in reentrant": (True, True),
    "non-reentrant in reentrant": (True, False),
}


def gradients(model, run, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    with WeightCasts() as casts:
        with torch.autocast("cpu", torch.bfloat16):
            y = run(model, x)
        y.float().square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)], casts.count


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", MODELS)
def test_step_under_autocast_casts_the_weight_at_most_twice(kind, run):
    torch.manual_seed(0)
    model, x = MODELS[kind](), torch.randn(8, D_IN)
    expected, _ = gradients(model, RUNS["plain"], x)
    got, count = gradients(model, RUNS[run], x)
    assert count <= 2
    for ours, plain in zip(got, expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("case", NESTED)
def test_nested_checkpoints_cast_the_weight_once_a_forward(case):
    outer, inner = NESTED[case]

    def run(model, x):
        return checkpoint(lambda x: checkpoint(model, x, use_reentrant=inner), x, use_reentrant=outer)

    torch.manual_seed(0)
    model, x, forwards = MODELS["LoRALinear"](), torch.randn(8, D_IN), []
    model[0].register_forward_pre_hook(lambda module, args: forwards.append(1))
    expected, _ = gradients(model, RUNS["plain"], x)
    forwards.clear()
    got, count = gradients(model, run, x)
    assert count == len(forwards)
    for ours, plain in zip(got, expected, strict=True):
        assert torch.equal(ours, plain)


def test_layer_whose_input_needs_no_gradient_casts_the_weight_once():
    model = MODELS["LoRALinear"]()
    with WeightCasts() as casts:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(8, D_IN))
        y.sum().backward()
    assert casts.count == 1


@pytest.mark.parametrize("kind", MODELS)
def test_no_copy_of_the_weight_lives_from_forward_to_backward(kind):
    model, saved = MODELS[kind](), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(8, D_IN, requires_grad=True))
    weights = {p.data_ptr() for p in model.parameters() if p.shape == (D_OUT, D_IN)}
    assert {t.data_ptr() for t in saved if t.shape == (D_OUT, D_IN)} == weights
    y.sum().backward()


@pytest.mark.parametrize("run", ["plain", "non-reentrant"])
@pytest.mark.parametrize("kind", ["LoRALinear", "fused PEFT layer"])
def test_compiled_step_casts_the_weight_once_forward_and_once_backward(kind, run):
    """Counted in the graphs, in which the op gets a weight that is cast already. So no copy lives between them."""
    casts, model = [], MODELS[kind]()

    def record(graph, inputs):
        is_cast = lambda node: "_to_copy" in str(node.target) and node.meta["val"].shape == (D_OUT, D_IN)
        casts.append(sum(map(is_cast, graph.graph.nodes)))
        for node in graph.graph.nodes:
            if "lora_linear" in str(node.target):
                weight = next(x for x in node.args if getattr(x, "meta", {}).get("val", x).shape == (D_OUT, D_IN))
                assert weight.meta["val"].dtype == torch.bfloat16
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: RUNS[run](model, x), backend=backend, fullgraph=True)
    gradients = []
    for forward in (compiled, model):
        model.zero_grad()
        x = torch.linspace(-1, 1, 8 * D_IN, device="cpu").view(8, D_IN).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(x)
        y.float().square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert casts == [1, 1]
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=2**-6 * expected.abs().max().item())


def test_step_with_saved_tensors_on_the_cpu_has_the_same_gradients():
    torch.manual_seed(0)
    model, x = MODELS["LoRALinear"](), torch.randn(8, D_IN)
    expected, _ = gradients(model, RUNS["plain"], x)

    def run(model, x):
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    got, count = gradients(model, run, x)
    assert count == 2 and all(map(torch.equal, got, expected))


def test_saved_tensor_hook_without_a_module_is_no_checkpoint():
    model = MODELS["LoRALinear"]()
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, torch.Tensor.detach)  # no __module__
    with hooks, torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(8, D_IN, requires_grad=True))
    y.sum().backward()


# other strides


def weights(dtype):
    """Returns the strides by name as weights (D_OUT, D_IN) of equal values."""
    torch.manual_seed(0)
    values, place = torch.randn(D_OUT, D_IN, device=DEVICE).to(dtype), {"dtype": dtype, "device": DEVICE}
    strides = {
        "contiguous": torch.empty(D_OUT, D_IN, **place),
        "transposed": torch.empty(D_IN, D_OUT, **place).t(),
        "transposed, padded": torch.empty(D_IN, D_OUT + 3, **place)[:, :D_OUT].t(),
        "padded": torch.empty(D_OUT, D_IN + 8, **place)[:, :D_IN],
        "padded by one": torch.empty(D_OUT, D_IN + 1, **place)[:, :D_IN],
    }
    return {name: weight.copy_(values) for name, weight in strides.items()}


class WeightCopies(TorchDispatchMode):
    """Lists the ops that return a new tensor of at least W's size."""

    looks_inside = True

    def __init__(self, weight):
        super().__init__()
        self.weight, self.ops = weight, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.weight.numel() and not self._is_view(result):
            self.ops.append(str(func))
        return result

    def _is_view(self, result):
        return result.untyped_storage().data_ptr() == self.weight.untyped_storage().data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("name", weights(torch.float32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_with_other_strides_is_not_copied(name, dtype):
    bias, a, b, x = (
        torch.randn(shape, device=DEVICE).to(dtype) for shape in ((D_OUT,), (4, D_IN), (D_OUT, 4), (5, D_IN))
    )
    results = {}
    for kind in ("contiguous", name):
        weight = weights(dtype)[kind]
        inputs = [t.clone().requires_grad_() for t in (x, a, b)]
        with lf.set_backend("triton"), WeightCopies(weight) as copies:
            y = lf.functional.lora_linear(inputs[0], weight, bias, *inputs[1:], 2.0)
            y.sum().backward()
        results[kind] = [y.detach(), *(t.grad for t in inputs)]
        assert copies.ops == []
    tolerance = {} if dtype is torch.float32 else {"atol": 0.15, "rtol": 0.02}
    torch.testing.assert_close(results[name], results["contiguous"], **tolerance)


@pytest.mark.gpu
def test_gemm_alone_does_not_copy_a_transposed_weight():
    from lora_fast.kernels import linear as kernels

    weight = weights(torch.float32)["transposed"]
    x, dy, thin, a, b = (
        torch.randn(shape, device=DEVICE) for shape in ((5, D_IN), (5, D_OUT), (5, 4), (4, D_IN), (D_OUT, 4))
    )
    with WeightCopies(weight) as copies:
        y, dx = kernels.linear(x, weight, None, thin, b, 1.0), kernels.grad_x(dy, weight, thin, a)
    assert copies.ops == []
    torch.testing.assert_close(y, x @ weight.T + thin @ b.T)
    torch.testing.assert_close(dx, dy @ weight + thin @ a)
