"""torch's hooks, checkpointing, parametrizations and function transforms around fused layers."""

import random

import pytest
import torch
from fused_models import fused_layers
from peft_blocks import LAYERS, build, inputs, loss_of, net_of
from side_by_side import assert_ran, assert_same, factors, fuse, train
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from workflows import workflow

pytest.importorskip("peft", reason="pip install '.[works-with]'")

LIBRARY = "torch"
EXACT = 1e-12  # in float64


def layer_of(model, name="up"):
    return net_of(model).blocks[0].get_submodule(name)


def selective(policy):
    save = lambda ctx, op, *args, **kwargs: policy
    return lambda: checkpoint.create_selective_checkpoint_contexts(save)


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "early stop off": {"use_reentrant": False, "early_stop": False},
    "selective, nothing kept": {
        "use_reentrant": False,
        "context_fn": selective(checkpoint.CheckpointPolicy.MUST_RECOMPUTE),
    },
    "selective, all kept": {"use_reentrant": False, "context_fn": selective(checkpoint.CheckpointPolicy.MUST_SAVE)},
}


@workflow(
    "`torch.utils.checkpoint`, both kinds, selective, `checkpoint_sequential`",
    "losses, factors: 1e-12, float64; also with `lf.inject_`",
)
@pytest.mark.parametrize("kind", [*CHECKPOINTS, "sequential"])
def test_checkpointing(kind):
    def run(prepare):
        model = prepare(build())
        net = net_of(model)
        if kind == "sequential":
            net.forward = lambda x: checkpoint.checkpoint_sequential(net.blocks, 2, x, use_reentrant=False)
        else:
            net.run_block = lambda block, x: checkpoint.checkpoint(block, x, **CHECKPOINTS[kind])
        loss = lambda model, step: model(inputs(step).requires_grad_()).square().mean()
        return train(model, loss=loss), factors(model)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow(
    "Saved tensors on the CPU or packed (`save_on_cpu`, `saved_tensors_hooks`)",
    "losses, factors: 1e-12, float64; also with `lf.inject_`",
)
def test_saved_tensors():
    def run(prepare):
        model = prepare(build())

        def loss(model, step):
            packing = torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(force=True), torch.from_numpy)
            with torch.autograd.graph.save_on_cpu() if step % 2 else packing:
                return loss_of(model, step)

        return train(model, loss=loss), factors(model)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow("Stochastic depth", "losses and factors: 1e-12, float64; also with `lf.inject_`")
def test_stochastic_depth():
    def run(prepare):
        model, chance = prepare(build()), random.Random(4)
        net_of(model).run_block = lambda block, x: block(x) if chance.random() < 0.6 else x
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for step in range(8):
            loss = loss_of(model, step)
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses, factors(model)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow(
    "Hooks on the layer, its gradients and its output (probes, logging)",
    "all that the hooks see: 1e-12, float64; also with `lf.inject_`",
)
def test_hooks_on_the_layer():
    def run(prepare):
        model, seen = prepare(build()), []
        layer = layer_of(model)
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        layer.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
        layer.register_full_backward_hook(lambda module, dx, dy: seen.extend(g for g in (*dx, *dy) if g is not None))
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: seen.append(gradient))
        model(inputs(0).requires_grad_()).square().mean().backward()
        assert len(seen) == 6
        return sorted(seen, key=lambda x: (x.shape, x.sum().item()))

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow(
    "Hooks on `lora_A` or the base layer (activation caches)", "what the hooks see: the same bits, by PEFT's forward"
)
@pytest.mark.parametrize("name", ["lora_A.default", "lora_B.default", "base_layer", "lora_dropout.default"])
def test_hooks_inside_the_layer(name):
    reason = "hooks, or a replaced forward, on the base layer or the adapter"

    def run(prepare):
        model, seen = prepare(build()), []
        for layer in (module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "scaling")):
            layer.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y.detach()))
        loss_of(model, 0).backward()
        return seen

    assert_same(run, LAYERS, reason=reason)


@workflow(
    "`parametrize`, `weight_norm`, `orthogonal` on a factor", "losses, parameters: 1e-12, float64; that layer by PEFT's"
)
@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal", "scale"])
def test_parametrized_factor(kind):
    class Scale(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    models = []

    def run(prepare):
        model = build()
        prepare(model)
        models.append(model)
        factor = layer_of(model).lora_A["default"]
        if kind == "scale":
            parametrize.register_parametrization(factor, "weight", Scale())
        else:
            getattr(parametrizations, kind)(factor)
        losses = train(model, loss=loss_of)
        return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    torch.manual_seed(0)
    theirs = run(lambda model: model)
    torch.manual_seed(0)
    ours = run(lambda model: fuse(model, LAYERS))
    torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=0)
    reasons = [layer.fallback_reason for layer in fused_layers(models[1])]
    assert reasons[0] is not None and reasons[1:] == [None] * 3, reasons


@workflow("`prune` on the base weight", "losses and factors: 1e-12, float64; those layers by PEFT's forward")
def test_pruned_base():
    models = []

    def run(prepare):
        model = prepare(build())
        models.append(model)
        for module in model.modules():
            if hasattr(module, "base_layer"):
                prune.l1_unstructured(module.base_layer, "weight", amount=0.5)
                module.base_layer.weight_orig.requires_grad_(False)
        return train(model, loss=loss_of), factors(model)

    theirs, ours = run(lambda model: model), run(lambda model: fuse(model, LAYERS))
    torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=0)
    assert all(layer.fallback_reason not in (None, "not called yet") for layer in fused_layers(models[1]))


@workflow(
    "`functional_call` with other factors (hypernetworks, MAML's inner step)",
    "losses and meta-gradients: 1e-12, float64",
)
def test_functional_call():
    def run(prepare):
        model = prepare(build())
        start = {name: p for name, p in model.named_parameters() if p.requires_grad}
        params = dict(start)
        for step in range(2):
            loss = (functional_call(model, params, (inputs(step),)) - 1).square().mean()
            gradients = torch.autograd.grad(loss, params.values(), create_graph=True)
            params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), gradients, strict=True)}
        outer = (functional_call(model, params, (inputs(3),)) - 1).square().mean()
        return [loss.detach(), outer.detach(), *torch.autograd.grad(outer, start.values())]

    theirs, models = run(lambda model: model), []
    ours = run(lambda model: models.append(fuse(model, LAYERS)) or model)
    torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=0)


@workflow("`torch.func`: `grad`, `vmap` of per-sample gradients, `jvp`", "gradients: 1e-12, float64; by PEFT's forward")
def test_function_transforms():
    def run(prepare):
        model = prepare(build())
        params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        loss = lambda params, x: functional_call(model, params, (x,)).square().mean()
        samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, inputs(0)[:, None])
        return samples, torch.func.jvp(lambda x: loss(params, x), (inputs(0),), (inputs(1),))

    models = []
    theirs, ours = run(lambda model: model), run(lambda model: models.append(fuse(model, LAYERS)) or model)
    torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=0)
    assert all(layer.fallback_reason not in (None, "not called yet") for layer in fused_layers(models[0]))


@workflow(
    "Gradients of inputs, gradient penalties, Hessian-vector products",
    "all of them: 1e-12, float64; also with `lf.inject_`",
)
def test_higher_derivatives():
    def run(prepare):
        model, x = prepare(build()), inputs(0).requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (dx.norm() - 1).square().backward()
        product = torch.autograd.functional.hvp(lambda x: model(x).square().sum(), inputs(1), inputs(2))[1]
        return dx.detach(), x.grad, product, [p.grad for p in model.parameters() if p.requires_grad]

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow("`detect_anomaly`, `use_deterministic_algorithms`, `inference_mode`", "losses and outputs: 1e-12, float64")
def test_modes():
    def run(prepare):
        model = prepare(build())
        torch.use_deterministic_algorithms(True)
        try:
            with torch.autograd.detect_anomaly(check_nan=True):
                losses = train(model, 2, loss=loss_of)
        finally:
            torch.use_deterministic_algorithms(False)
        with torch.inference_mode():
            return losses, model(inputs(3)).clone()

    theirs, models = run(lambda model: model), []
    ours = run(lambda model: models.append(fuse(model, LAYERS)) or model)
    torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=0)
    assert_ran(models[0], LAYERS)


@workflow("One layer used twice in a forward", "losses and factors: 1e-12, float64")
def test_shared_layers():
    def run(prepare):
        model = build()
        blocks = net_of(model).blocks
        blocks[1].up = blocks[0].up
        return train(prepare(model), loss=loss_of), factors(model)

    assert_same(run, LAYERS - 1, atol=EXACT)


@workflow(
    "Inputs of other shapes and strides: none, one, three batch dimensions, transposed, empty",
    "results: 1e-12, float64",
)
def test_inputs():
    def run(prepare):
        layer = layer_of(prepare(build()))
        x = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return [layer(y) for y in (x[0, 0, 0], x, x.transpose(0, 2), x[:, ::2], x[:0], x.expand(2, 2, 3, 5, 8))]

    theirs = run(lambda model: model)
    torch.testing.assert_close(run(lambda model: fuse(model, LAYERS)), theirs, atol=EXACT, rtol=0)


@workflow("Torch function and dispatch modes (loggers, counters)", "losses and factors: 1e-12, float64")
@pytest.mark.parametrize("mode", ["function", "dispatch"])
def test_torch_modes(mode):
    kind, method = (TorchFunctionMode, "function") if mode == "function" else (TorchDispatchMode, "dispatch")
    call = lambda self, func, types, args=(), kwargs=None: func(*args, **(kwargs or {}))
    logger = type("Logger", (kind,), {f"__torch_{method}__": call})

    def run(prepare):
        model = prepare(build())
        with logger():
            return train(model, loss=loss_of), factors(model)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow("Batched gradients (`is_grads_batched`, vectorized Jacobians and Hessians)", "all of them: 1e-12, float64")
def test_batched_gradients():
    def run(prepare):
        model, x = prepare(build()), inputs(0, rows=2).requires_grad_()
        y = model(x)
        directions = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
        rows = torch.autograd.grad(y, x, directions, is_grads_batched=True)[0]
        jacobian = torch.autograd.functional.jacobian(model, inputs(1, rows=2), vectorize=True)
        squares = lambda x: model(x).square().sum()
        return rows, jacobian, torch.autograd.functional.hessian(squares, inputs(2, rows=1), vectorize=True)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow("`register_multi_grad_hook`, `allow_mutation_on_saved_tensors`, `retain_graph`", "gradients: 1e-12, float64")
def test_graph_tools():
    def run(prepare):
        model, seen = prepare(build()), []
        weights = [p for p in model.parameters() if p.requires_grad]
        keep = lambda gradients: seen.extend(g.clone() for g in gradients)
        torch.autograd.graph.register_multi_grad_hook(weights, keep)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            x = inputs(0).requires_grad_()
            loss = model(x).square().mean()
            with torch.no_grad():
                x.mul_(2)
            loss.backward(retain_graph=True)
            loss.backward()
        return seen, [p.grad for p in weights]

    assert_same(run, LAYERS, atol=EXACT, injected=True)
