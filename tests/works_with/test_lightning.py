"""Lightning: a LightningModule with adapters, its Trainer's options and callbacks."""

import functools
import logging
import os
import warnings
from unittest import mock

import pytest
import torch
from side_by_side import assert_ran, assert_same, factors, fuse, trained
from tiny import batch, fill, llama, loss_of, peft_llama
from torch.utils.data import DataLoader
from workflows import workflow

import lora_fast as lf

lightning = pytest.importorskip("lightning", reason="pip install '.[works-with]'")
peft = pytest.importorskip("peft", reason="pip install '.[works-with]'")

from lightning.pytorch import callbacks  # noqa: E402

LIBRARY = "lightning"
TARGETS = ["q_proj", "up_proj"]
LONG = functools.partial(pytest.param, marks=pytest.mark.budget)
LAYERS = 4  # two in each of two layers
EXACT = 1e-12  # in float64


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Language(lightning.LightningModule):
    """A causal language model with adapters. ``make`` makes its optimizer; ``losses`` has the loss of each batch."""

    def __init__(self, model, make=None):
        super().__init__()
        self.model, self.make, self.losses = model, make, []

    def training_step(self, ids, index):
        loss = loss_of(self.model, ids)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, ids, index):
        self.log("held_out", loss_of(self.model, ids))

    def configure_optimizers(self):
        if self.make:
            return self.make(self.model)
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}


DATA = [batch(seed) for seed in range(4)]


def fit(module, folder, resume=None, **options):
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": str(folder)}
    trainer = lightning.Trainer(**(settings | options))
    trainer.fit(module, DataLoader(DATA, None), DataLoader(DATA[:2], None), ckpt_path=resume)
    return trainer


def run_with(folder, make=None, dtype=torch.float64, **options):
    """Returns a workflow that trains, and returns the losses and the trained values."""

    def run(prepare):
        torch.manual_seed(0)
        module = Language(prepare(peft_llama(dtype=dtype, targets=TARGETS)), make)
        trainer = fit(
            module, folder, **{name: value() if callable(value) else value for name, value in options.items()}
        )
        return module.losses, trained(module), trainer.callback_metrics["held_out"]

    return run


OPTIONS = {
    "plain": {},
    "gradient clipping": {"gradient_clip_val": 0.1},
    "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulation": {"accumulate_grad_batches": 4},
    "64-true": {"precision": "64-true"},
    "inference mode off": {"inference_mode": False},
    "deterministic": {"deterministic": True},
    "anomalies": {"detect_anomaly": True},
}
VARIATIONS = (
    "64-true",
    "stopping",
    "scheduled accumulation",
    "clipping by value",
    "inference mode off",
    "deterministic",
    "anomalies",
)


@workflow(
    "`fit` and validation with clipping, accumulation, `64-true`, `detect_anomaly`",
    "losses, factors: 1e-12, float64; also with `lf.inject_`",
)
@pytest.mark.parametrize("options", [LONG(kind) if kind in VARIATIONS else kind for kind in OPTIONS])
def test_fit(options, tmp_path):
    assert_same(run_with(tmp_path, **OPTIONS[options]), LAYERS, atol=EXACT, injected=True)


@workflow("`precision=` bf16-mixed, bf16-true", "losses: 2e-2 relative, over six steps; also with `lf.inject_`")
@pytest.mark.parametrize("precision", ["bf16-mixed", LONG("bf16-true")])
def test_precision(precision, tmp_path):
    def run(prepare):
        return run_with(tmp_path, dtype=torch.float32, precision=precision, max_epochs=1)(prepare)[0]

    assert_same(run, LAYERS, rtol=2e-2, injected=True)


CALLBACKS = {
    "SWA": lambda: callbacks.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1),
    "EMA": lambda: callbacks.EMAWeightAveraging(decay=0.5),
    "scheduled accumulation": lambda: callbacks.GradientAccumulationScheduler({0: 2, 1: 3}),
    "stopping": lambda: callbacks.EarlyStopping("held_out", patience=1),
}


@workflow(
    "`StochasticWeightAveraging`, `EMAWeightAveraging`, `EarlyStopping`",
    "losses, factors: 1e-12, float64; also with `lf.inject_`",
)
@pytest.mark.parametrize("callback", [LONG(kind) if kind in VARIATIONS else kind for kind in CALLBACKS])
def test_callback(callback, tmp_path):
    assert_same(
        run_with(tmp_path, callbacks=lambda: [CALLBACKS[callback]()], max_epochs=3), LAYERS, atol=EXACT, injected=True
    )


@workflow("`ModelCheckpoint`, resumed with `ckpt_path=`", "losses and factors of the whole run: the same bits")
@pytest.mark.parametrize("methods", [None, [], [lf.methods.ILoRA(lam=0.1)]], ids=["AdamW", "LoRAAdamW", "ILoRA"])
def test_resumed(methods, tmp_path):
    make = None if methods is None else lambda model: lf.optim.LoRAAdamW(model, lr=1e-2, methods=methods)
    build = lambda: Language(fuse(peft_llama(targets=TARGETS), LAYERS), make)
    whole, first, second = build(), build(), build()
    fit(whole, tmp_path)
    saving = {
        "enable_checkpointing": True,
        "callbacks": [callbacks.ModelCheckpoint(tmp_path, "first", save_last=False)],
    }
    fit(first, tmp_path, max_epochs=1, **saving)
    fit(second, tmp_path, resume=str(tmp_path / "first.ckpt"))
    assert_ran(second, LAYERS)
    assert first.losses + second.losses == whole.losses
    torch.testing.assert_close(trained(second), trained(whole), atol=0, rtol=0)


@workflow("`LoRAAdamW` without methods in `configure_optimizers`", "losses and factors: the same bits")
def test_lora_adamw(tmp_path):
    def run(ours):
        def make(model):
            parameters = [p for p in model.parameters() if p.requires_grad]
            settings = {"lr": 1e-2, "weight_decay": 0.1}
            return (
                lf.optim.LoRAAdamW(model, **settings) if ours else torch.optim.AdamW(parameters, fused=True, **settings)
            )

        return run_with(tmp_path, make, torch.float32)(lambda model: fuse(model, LAYERS))

    torch.testing.assert_close(run(True), run(False), atol=0, rtol=0)


@workflow(
    "`LoRAAdamW` with `ILoRA` in `configure_optimizers`, layers of `lf.inject_`",
    "losses and factors as in a plain loop: the same bits",
)
def test_ilora(tmp_path):
    def build():
        model = llama()
        torch.manual_seed(0)
        lf.inject_(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
        return fill(model)

    make = lambda model: lf.optim.LoRAAdamW(model, lr=1e-2, methods=[lf.methods.ILoRA(lam=0.1)])
    module, model = Language(build(), make), build()
    fit(module, tmp_path)
    optimizer, losses = make(model), []
    for ids in DATA * 2:
        losses.append(loss_of(model, ids))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert module.losses == [loss.item() for loss in losses]
    torch.testing.assert_close(factors(module.model), factors(model), atol=0, rtol=0)


@workflow(
    "`Fabric`: `setup`, `backward`, `clip_gradients`", "losses and factors: 1e-12, float64; also with `lf.inject_`"
)
def test_fabric():
    def run(prepare):
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="64-true")
        model = prepare(peft_llama(targets=TARGETS))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        wrapped, optimizer = fabric.setup(model, optimizer)
        losses = []
        for ids in DATA:
            loss = loss_of(wrapped, ids)
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, factors(model)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow("The rate finder (`Tuner.lr_find`)", "losses of its steps and factors: 1e-12, float64")
def test_rate_finder(tmp_path):
    def run(prepare):
        module = Language(prepare(peft_llama(dtype=torch.float64, targets=TARGETS)))
        module.lr, module.make = (
            1e-3,
            lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=module.lr),
        )
        quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"], False)
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=str(tmp_path), **quiet)
        data = DataLoader(DATA, None)
        finder = lightning.pytorch.tuner.Tuner(trainer).lr_find(module, data, num_training=4)
        return finder.results["loss"], trained(module)

    assert_same(run, LAYERS, atol=EXACT, injected=True)


@workflow(
    "Profilers and monitors: `profiler='simple'`, `ThroughputMonitor`, model summary", "losses, factors: 1e-12, float64"
)
def test_monitors(tmp_path):
    monitors = lambda: [callbacks.ThroughputMonitor(batch_size_fn=len)]
    run = run_with(tmp_path, callbacks=monitors, profiler="simple", enable_model_summary=True, max_epochs=1)
    assert_same(run, LAYERS, atol=EXACT)


@workflow("`strategy='ddp'` in one process", "losses, factors: 1e-12, float64")
def test_ddp(tmp_path):
    try:
        with mock.patch.dict(os.environ):  # its variables would make the next Trainer a distributed one
            assert_same(run_with(tmp_path, strategy="ddp", devices=1, max_epochs=1), LAYERS, atol=EXACT)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
