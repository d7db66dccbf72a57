"""torch's averages, scalers, checkpoints and other parts of training around fused layers."""

import copy
import io

import pytest
import torch
from peft_blocks import LAYERS, build, inputs, loss_of, plain_net
from side_by_side import adamw, assert_same, factors, fuse, train
from torch import nn
from torch.optim import swa_utils
from workflows import workflow

import lora_fast as lf

peft = pytest.importorskip("peft", reason="pip install '.[works-with]'")

LIBRARY = "torch"
EXACT = 1e-12  # in float64


def weights(model):
    return [p for p in model.parameters() if p.requires_grad]


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
