"""torch's optimizers, schedulers, scalers, averages and checkpoints around fused layers."""

import copy
import io

import pytest
import torch
from peft_blocks import LAYERS, build, inputs, loss_of, plain_net
from side_by_side import adamw, assert_same, factors, fuse, train, trained
from torch import nn
from torch.optim import lr_scheduler, swa_utils
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


@workflow(
    "`AveragedModel` (SWA and EMA), `SWALR`", "outputs of the average, factors: 1e-12, float64; also with `lf.inject_`"
)
@pytest.mark.parametrize("kind", ["SWA", "EMA"])
def test_averages(kind):
    def run(prepare):
        model = prepare(build())
        options = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.5)} if kind == "EMA" else {}
        average, optimizer = swa_utils.AveragedModel(model, **options), adamw(model)
        scheduler = swa_utils.SWALR(optimizer, swa_lr=1e-3, anneal_epochs=2)
        for step in range(4):
            train(model, 1, optimizer, lambda model, _, step=step: loss_of(model, step))
            average.update_parameters(model)
            scheduler.step()
        swa_utils.update_bn([inputs(0)], average)
        return average(inputs(1)), factors(model), factors(average)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow(
    "`GradScaler` and autocast in bfloat16 and float16, `unscale_`, a skipped step",
    "scales, losses: 2e-2 relative; also with `lf.inject_`",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scaler(dtype):
    def run(prepare):
        model = prepare(build(torch.float32))
        optimizer, results = adamw(model), []
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step in range(5):
            with torch.autocast("cpu", dtype):
                loss = loss_of(model, step) * (float("inf") if step == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(weights(model), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            results += [loss.detach().float(), torch.tensor(scaler.get_scale())]
        return results

    assert_same(run, LAYERS, rtol=2e-2, injected=True)


@workflow("`LoRAAdamW` under `GradScaler`, with a skipped step", "factors and scales of AdamW: the same bits")
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
    "`state_dict` through `torch.save`, `load_state_dict(assign=True)`, resumed",
    "losses, factors: 1e-12, float64; also with `lf.inject_`",
)
@pytest.mark.parametrize("assign", [False, True])
def test_resumed(assign):
    def run(prepare):
        model = prepare(build())
        optimizer = adamw(model)
        train(model, 2, optimizer, loss_of)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        other = prepare(build())
        other.load_state_dict(state["model"], assign=assign)
        if assign:  # as torch documents, the new parameters have the saved ones' requires_grad
            other.requires_grad_(False)
            for name, parameter in other.named_parameters():
                parameter.requires_grad_("lora_" in name)
        resumed = adamw(other)
        resumed.load_state_dict(state["optimizer"])
        return train(other, 2, resumed, loss_of), factors(other), train(model, 2, optimizer, loss_of)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow("`torch.distributed.checkpoint` of model and `LoRAAdamW`", "factors of the uninterrupted run: the same bits")
def test_distributed_checkpoint(tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def make():
        model = fuse(build(torch.float32), LAYERS)
        return model, lf.optim.LoRAAdamW(model, lr=1e-2, methods=[lf.methods.ILoRA(lam=0.1)])

    model, optimizer = make()
    train(model, 2, optimizer, loss_of)
    parts = get_state_dict(model, optimizer)
    checkpoint.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=str(tmp_path), no_dist=True)
    other, resumed = make()
    state = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
    checkpoint.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    set_state_dict(other, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for trained_model, steps in ((model, optimizer), (other, resumed)):
        train(trained_model, 2, steps, loss_of)
    torch.testing.assert_close(factors(other), factors(model), atol=0, rtol=0)


@workflow(
    "`parameters_to_vector`, `vector_to_parameters` (evolution strategies)",
    "losses and factors: 1e-12, float64; also with `lf.inject_`",
)
def test_vectors():
    def run(prepare):
        model = prepare(build())
        center, losses = nn.utils.parameters_to_vector(weights(model)).detach(), []
        for step in range(3):
            noise = torch.randn(len(center), generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            both = []
            for sign in (1, -1):
                nn.utils.vector_to_parameters(center + 0.01 * sign * noise, weights(model))
                both.append(loss_of(model, step).item())
            center = center - 0.1 * (both[0] - both[1]) / 0.02 * noise
            losses += both
        return losses, center

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


@workflow(
    "A student of its own frozen copy (distillation, mean teachers)",
    "losses and factors: 1e-12, float64; also with `lf.inject_`",
)
def test_distillation():
    def run(prepare):
        model = prepare(build())
        teacher = copy.deepcopy(model).requires_grad_(False).eval()

        def loss(model, step):
            with torch.no_grad():
                for slow, fast in zip(teacher.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
                wanted = teacher(inputs(step) + 0.1)
            return (model(inputs(step)) - wanted).square().mean()

        return train(model, 4, loss=loss), factors(model), factors(teacher)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow("Layers of `lf.inject_` in place of `get_peft_model`, from one seed", "losses and factors: 1e-12, float64")
def test_injected():
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"])
    results = []
    for engine in ("PEFT", "ours"):
        model = plain_net()
        torch.manual_seed(3)
        if engine == "PEFT":
            model = peft.get_peft_model(model, config)
        else:
            lf.inject_(model, config)
        losses = train(model, 4, loss=loss_of)
        results.append((losses, [p.detach() for p in weights(model)]))
    torch.testing.assert_close(results[1], results[0], atol=EXACT, rtol=0)
