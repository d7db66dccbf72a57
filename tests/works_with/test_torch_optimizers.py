"""torch's optimizers, schedulers and LoRAAdamW in their place."""

import pytest
import torch
from peft_blocks import LAYERS, build, loss_of
from side_by_side import adamw, assert_same, factors, fuse, train, trained
from torch import nn
from torch.optim import lr_scheduler
from workflows import workflow

import lora_fast as lf

peft = pytest.importorskip("peft", reason="pip install '.[works-with]'")

LIBRARY = "torch"
EXACT = 1e-12  # in float64


def weights(model):
    return [p for p in model.parameters() if p.requires_grad]


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "Adam amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "RAdam": lambda parameters: torch.optim.RAdam(parameters, lr=1e-2),
    "Rprop": lambda parameters: torch.optim.Rprop(parameters, lr=1e-3),
}


@workflow(
    "torch's optimizers: SGD, Adam, AdamW, Adagrad, RMSprop, Adafactor, RAdam, Rprop",
    "losses, factors: 1e-9, float64; also with `lf.inject_`",
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(kind):
    def run(prepare):
        model = prepare(build())
        return train(model, 5, OPTIMIZERS[kind](weights(model)), loss_of), factors(model)

    assert_same(run, LAYERS, atol=1e-9, injected=True)


@workflow("`LBFGS` with closures", "losses and factors: 1e-9, float64; also with `lf.inject_`")
def test_lbfgs():
    def run(prepare):
        model = prepare(build())
        optimizer = torch.optim.LBFGS(weights(model), max_iter=4, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        return [optimizer.step(closure).item() for _ in range(3)], factors(model)

    assert_same(run, LAYERS, atol=1e-9, injected=True)


@workflow(
    "`LoRAAdamW` with a closure, `clip_grad_norm_`, step hooks, beside AdamW", "losses and factors: the same bits"
)
def test_lora_adamw_with_closure_and_hooks():
    def run(ours):
        model, seen = fuse(build(torch.float32), LAYERS), []
        settings = {"lr": 1e-2, "weight_decay": 0.1}
        plain = torch.optim.AdamW(weights(model), fused=True, **settings)
        optimizer = lf.optim.LoRAAdamW(model, **settings) if ours else plain
        optimizer.register_step_post_hook(lambda *others: seen.append(factors(model)))

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, len(seen))
            loss.backward()
            seen.append(nn.utils.clip_grad_norm_(weights(model), 0.1))
            return loss

        return [optimizer.step(closure).item() for _ in range(3)], seen

    torch.testing.assert_close(run(True), run(False), atol=0, rtol=0)


SCHEDULERS = {
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=6),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.5)],
        [2],
    ),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
}


@workflow("`LoRAAdamW` under torch's schedulers, with `ILoRA`; without methods beside AdamW", "factors: the same bits")
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(kind):
    def run(make):
        model = fuse(build(torch.float32), LAYERS)
        optimizer = make(model)
        scheduler = SCHEDULERS[kind](optimizer)
        rates = []
        for step in range(5):
            train(model, 1, optimizer, lambda model, _, step=step: loss_of(model, step))
            scheduler.step()
            rates += [group["lr"] for group in optimizer.param_groups]
        return factors(model), rates

    ours = run(lambda model: lf.optim.LoRAAdamW(model, lr=1e-2))
    theirs = run(lambda model: torch.optim.AdamW(weights(model), lr=1e-2, weight_decay=0.0, fused=True))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    _, rates = run(lambda model: lf.optim.LoRAAdamW(model, lr=1e-2, methods=[lf.methods.ILoRA(lam=0.1)]))
    assert rates == theirs[1]


@workflow("`ReduceLROnPlateau` and `clip_grad_value_`", "losses and factors: 1e-12, float64; also with `lf.inject_`")
def test_plateau():
    def run(prepare):
        model = prepare(build())
        optimizer, losses = adamw(model), []
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        for step in range(5):
            loss = loss_of(model, step)
            loss.backward()
            nn.utils.clip_grad_value_(weights(model), 0.01)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(loss)
            losses.append(loss.item())
        return losses, factors(model)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow("`LoRAAdamW` under `GradScaler`, with a skipped step", "factors and scales of AdamW: 1e-6 relative, float32")
def test_lora_adamw_under_scaler():
    def run(ours):
        model = fuse(build(torch.float32), LAYERS)
        plain = torch.optim.AdamW(weights(model), lr=1e-2, weight_decay=0.0)
        optimizer = lf.optim.LoRAAdamW(model, lr=1e-2) if ours else plain
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step in range(5):
            scaler.scale(loss_of(model, step) * (float("inf") if step == 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return factors(model), scaler.get_scale()

    torch.testing.assert_close(run(True), run(False), atol=1e-7, rtol=1e-6)


@workflow(
    "Optimizers in backward (`register_post_accumulate_grad_hook`)", "factors: 1e-12, float64; also with `lf.inject_`"
)
def test_optimizer_in_backward():
    def run(prepare):
        model = prepare(build())
        optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in weights(model)}

        def step(parameter):
            optimizers[parameter].step()
            parameter.grad = None

        for parameter in optimizers:
            parameter.register_post_accumulate_grad_hook(step)
        for index in range(3):
            loss_of(model, index).backward()
        return factors(model)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow(
    "Accumulated gradients, SAM's two passes with perturbed weights",
    "losses and factors: 1e-12, float64; also with `lf.inject_`",
)
def test_sharpness_aware_steps():
    def run(prepare):
        model = prepare(build())
        optimizer, losses = adamw(model), []
        for step in range(3):
            loss = sum(loss_of(model, 10 * step + part) for part in range(2))
            loss.backward()
            with torch.no_grad():
                moves = [0.05 * p.grad / p.grad.norm() for p in weights(model)]
                torch._foreach_add_(weights(model), moves)
            optimizer.zero_grad()
            for part in range(2):
                loss_of(model, 10 * step + part).backward()
            with torch.no_grad():
                torch._foreach_sub_(weights(model), moves)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, factors(model)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow(
    "Frozen `lora_A` (LoRA-FA) and groups with rates of their own",
    "losses and trained factors: 1e-12, float64; also with `lf.inject_`",
)
def test_frozen_factor_and_groups():
    def run(prepare):
        model = prepare(build())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)
        groups = [{"params": [p], "lr": 1e-2 / (i + 1)} for i, p in enumerate(weights(model))]
        return train(model, 4, torch.optim.AdamW(groups), loss_of), trained(model)

    assert_same(run, LAYERS, atol=EXACT, injected=True)
