"""accelerate in a plain training loop, and models that it places."""

import math

import pytest

pytest.importorskip("accelerate", reason="pip install '.[works-with]'")
import accelerate
import tiny
import torch
from accelerate.state import AcceleratorState
from paired_runs import adapted, assert_same, gradients, is_fused, language_model, trained
from safetensors.torch import load_file
from workflows import workflow

import lora_fast as lf

LIBRARY = "accelerate"
PAIRED = "losses, norms of the gradients and trained factors: 1e-12"
ROWS = list(tiny.batch(rows=8, length=8))


@pytest.fixture(autouse=True)
def own_state():
    """Each test gets an Accelerator with settings of its own, which accelerate keeps for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def base():
    return language_model(tiny.VOCABULARY)


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)


def lora_adamw(model, *methods):
    return lf.optim.LoRAAdamW(model, lr=1e-3, weight_decay=0.1, methods=methods)


def prepared(change, make_optimizer=adamw, dtype=torch.float64, **options):
    """Returns an Accelerator and what it has prepared: model, optimizer, batches and a schedule."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, **options)
    torch.manual_seed(0)
    model = change(adapted(base().to(dtype)))
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    batches = torch.utils.data.DataLoader(ROWS, batch_size=2)
    return accelerator, *accelerator.prepare(model, optimizer, batches, schedule)


def step(accelerator, model, optimizer, schedule, ids, max_norm=math.inf):
    """Makes a step and returns the loss and the norm of the gradients before they were clipped."""
    norm = None
    with accelerator.accumulate(model):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return accelerator.gather(loss.detach()), norm


def loop(change, make_optimizer=adamw, max_norm=math.inf, **options):
    accelerator, model, optimizer, batches, schedule = prepared(change, make_optimizer, **options)
    steps = [step(accelerator, model, optimizer, schedule, ids, max_norm) for ids in batches]
    return steps, trained(model)


@workflow("`prepare(model, optimizer, data, schedule)` and `backward`", PAIRED)
def test_plain_loop():
    assert_same(loop)


@workflow("`accumulate` with `gradient_accumulation_steps=2` and `clip_grad_norm_`", PAIRED)
def test_accumulation_and_clipping():
    assert_same(lambda change: loop(change, max_norm=0.1, gradient_accumulation_steps=2))


@workflow('`mixed_precision="bf16"`', "losses, norms of the gradients and trained factors: 5e-3")
def test_mixed_precision():
    assert_same(lambda change: loop(change, mixed_precision="bf16", dtype=torch.float32), 5e-3)


@workflow(
    "`LoRAAdamW` prepared, with accumulation and clipping", "torch's AdamW; losses, norms, trained factors: 1e-12"
)
def test_lora_adamw():
    either = lambda model: (lora_adamw if is_fused(model) else adamw)(model)
    assert_same(lambda change: loop(change, either, 0.1, gradient_accumulation_steps=2))


@workflow("`LoRAAdamW` with ScaLoRA prepared", PAIRED)
def test_scalora():
    assert_same(lambda change: loop(change, lambda model: lora_adamw(model, lf.methods.ScaLoRA(interval=2))))


@workflow("`save_state` and `load_state` in the middle of a run", "the whole run: the same bits; PEFT's run: 1e-12")
@pytest.mark.parametrize(
    "make_optimizer", [adamw, lambda model: lora_adamw(model, lf.methods.ILoRA())], ids=["AdamW", "LoRAAdamW"]
)
def test_saved_state(tmp_path, make_optimizer):
    def workflow(change):
        whole = loop(change, make_optimizer)
        accelerator, model, optimizer, batches, schedule = prepared(change, make_optimizer)
        for ids in ROWS[:2], ROWS[2:4]:
            step(accelerator, model, optimizer, schedule, torch.stack(ids))
        accelerator.save_state(str(tmp_path / "state"))
        accelerator, model, optimizer, batches, schedule = prepared(change, make_optimizer)
        accelerator.load_state(str(tmp_path / "state"))
        for ids in accelerator.skip_first_batches(batches, 2):
            step(accelerator, model, optimizer, schedule, ids)
        tiny.assert_same_tensors(trained(model), whole[1])
        return whole

    assert_same(workflow)


@workflow("`unwrap_model(model).save_pretrained(…, state_dict=…)`", "all tensors: 1e-12")
def test_saved_adapter(tmp_path):
    def workflow(change):
        accelerator, model, optimizer, batches, schedule = prepared(change)
        for ids in batches:
            step(accelerator, model, optimizer, schedule, ids)
        state = accelerator.get_state_dict(model)
        accelerator.unwrap_model(model).save_pretrained(tmp_path, state_dict=state)
        return load_file(tmp_path / "adapter_model.safetensors")

    assert_same(workflow)


PLACED = "loss and gradients of all factors: 1e-12"


def placed(change, place):
    """Returns the loss and the gradients of a model that accelerate has placed before or after it is fused."""
    model = place(change, adapted(base()))
    loss = model(input_ids=torch.stack(ROWS[:2]), labels=torch.stack(ROWS[:2])).loss
    loss.backward()
    return loss.detach(), gradients(model)


@workflow("`dispatch_model` with a `device_map`, before and after `lf.fuse_`", PLACED)
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_dispatched_model(is_first):
    def place(change, model):
        names = {name: "cpu" for name, _ in model.named_children()}
        dispatch = lambda model: accelerate.dispatch_model(model, names, main_device="cpu", force_hooks=True)
        return change(dispatch(model)) if is_first else dispatch(change(model))

    assert_same(lambda change: placed(change, place))


@workflow("`cpu_offload` before `lf.fuse_`: the weights are on the CPU between calls", "logits: 1e-12")
def test_cpu_offload():
    def workflow(change):
        model = change(accelerate.cpu_offload(adapted(base()), execution_device=torch.device("cpu")))
        return model(input_ids=torch.stack(ROWS)).logits.detach()

    assert_same(workflow)


@workflow("`disk_offload` after `lf.fuse_`", "logits: 1e-12")
def test_disk_offload(tmp_path):
    def workflow(change):
        model = change(adapted(base()))
        accelerate.disk_offload(model, tmp_path / str(is_fused(model)), execution_device=torch.device("cpu"))
        return model(input_ids=torch.stack(ROWS)).logits.detach()

    assert_same(workflow)


@workflow("`init_empty_weights`, `load_checkpoint_and_dispatch`, then PEFT and `lf.fuse_`", PLACED)
def test_loaded_and_dispatched(tmp_path):
    base().save_pretrained(tmp_path)

    def workflow(change):
        with accelerate.init_empty_weights():
            model = base()
        model = accelerate.load_checkpoint_and_dispatch(model, tmp_path, device_map={"": "cpu"})
        return placed(change, lambda change, _: change(adapted(model)))

    assert_same(workflow)
