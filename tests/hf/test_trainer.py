"""lora_fast.hf in transformers' Trainer: the optimizer's settings, the logged statistics, and resumed runs."""

import math
import re
import statistics
import warnings
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from transformers.trainer_callback import PrinterCallback

import lora_fast as lf
from lora_fast.layers.find import peft_layers

STEPS = 5


class Log(transformers.TrainerCallback):
    """Stands for wandb and similar callbacks: collects the logs with their steps."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **others):
        self.logs.append((state.global_step, dict(logs)))


class ScaLoRATrainer(lf.hf.ExactCheckpoints, transformers.Trainer):
    pass


def trainer_of(model, folder, methods=(), kind=transformers.Trainer, **changes):
    settings = {"learning_rate": 3e-3, "adam_beta2": 0.99, "weight_decay": 0.01, "max_steps": STEPS, "save_steps": 2}
    args = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, **(settings | changes)
    )
    choice = lf.hf.optimizer_cls_and_kwargs(model, args, methods)
    trainer = kind(model, args, train_dataset=tiny.Rows(), optimizer_cls_and_kwargs=choice)
    trainer.remove_callback(PrinterCallback)
    return trainer


def adapter_logs(logs_by_step):
    return {step: logs for step, logs in logs_by_step if "adapter/norm_a_mean" in logs}


def test_optimizer_has_the_trainer_s_settings(tmp_path):
    trainer = trainer_of(tiny.peft_llama(), tmp_path, [lf.methods.ILoRA(lam=0.5)])
    optimizer = trainer.create_optimizer()
    group = optimizer.param_groups[0]
    assert type(optimizer) is lf.optim.LoRAAdamW and group["methods"] == [repr(lf.methods.ILoRA(lam=0.5))]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-3, (0.9, 0.99), 0.01)


def test_statistics_are_logged_when_due_and_no_loss_is_lost(tmp_path):
    model, log = tiny.peft_llama(), Log()
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(lf.hf.AdapterStatsCallback(trainer, every=2))
    trainer.add_callback(log)
    trainer.train()
    assert list(adapter_logs(log.logs)) == [0, 2, 4, 5]
    assert [step for step, logs in log.logs if "loss" in logs] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in trainer.state.log_history if "adapter/rank_min" in row] == [0, 2, 4, 5]
    last = adapter_logs(log.logs)[5]
    norms = [layer.norm_b for layer in lf.metrics.adapter_stats(model).values()]
    assert last["adapter/norm_b_min"] == min(norms) and last["adapter/norm_b_max"] == max(norms)
    assert last["adapter/norm_b_mean"] == pytest.approx(sum(norms) / len(norms))


def test_used_bounds_are_logged_and_kept_on_the_callback(tmp_path):
    model = tiny.llama()
    lf.inject_(model, lf.NBLoRAConfig(r=4, norm="frobenius", bound=0.5))
    trainer = trainer_of(model, tmp_path, learning_rate=0.1)
    callback = lf.hf.AdapterStatsCallback(trainer, every=2)
    trainer.add_callback(callback)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "adapter/bound_used_mean" in row]
    assert rows[0]["adapter/bound_used_max"] == 0 < rows[-1]["adapter/bound_used_min"]
    assert callback.bounds == lf.metrics.bound_stats(model)
    assert rows[-1]["adapter/bound_used_max"] == max(layer.used for layer in callback.bounds.values())


@pytest.mark.parametrize(
    ("method", "kind"),
    [(lf.methods.BaLoRA(), transformers.Trainer), (lf.methods.ScaLoRA(interval=2), ScaLoRATrainer)],
    ids=["BaLoRA", "ScaLoRA"],
)
def test_resumed_run_logs_and_trains_as_the_whole_one(tmp_path, method, kind):
    runs, models = [], []
    for checkpoint in (None, tmp_path / "checkpoint-2"):
        models.append(tiny.peft_llama())
        trainer = trainer_of(models[-1], tmp_path, [method], kind)
        trainer.add_callback(lf.hf.AdapterStatsCallback(trainer, every=2))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        runs.append([row for row in trainer.state.log_history if "adapter/rank_min" in row])
    assert [row["step"] for row in runs[0]] == [0, 2, 4, 5]
    assert runs[0] == runs[1]
    tiny.assert_same_tensors(*(model.state_dict() for model in models))


class LabelledRows(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return {"input_ids": tiny.batch(i, rows=1)[0], "labels": i % 3}


def classifier(kind):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(num_key_value_heads=2, vocab_size=97, num_labels=3, pad_token_id=0, **shape)
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config)
    if kind == "peft":
        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
        )
        lf.fuse_(model)
    else:
        lf.inject_(model, lf.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
        model.score.requires_grad_(True)
    return model


@pytest.mark.parametrize("kind", ["peft", "injected"])
def test_classifier_s_run_with_scalora_resumes_to_the_same_bits(tmp_path, kind):
    """The head is trained too, so the checkpoint contains it (PEFT's modules_to_save)."""
    models = []
    for checkpoint in (None, tmp_path / "checkpoint-2"):
        models.append(classifier(kind))
        trainer = trainer_of(models[-1], tmp_path, [lf.methods.ScaLoRA(interval=2)], ScaLoRATrainer)
        trainer.train_dataset = LabelledRows()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    tiny.assert_same_tensors(*(model.state_dict() for model in models))
    trained = models[0].score if kind == "injected" else models[0].base_model.model.score.modules_to_save["default"]
    assert not torch.equal(trained.weight, classifier("injected").score.weight)


def experts():
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4)})
    model["layer"].weight = torch.nn.Parameter(torch.zeros(3, 4, 4))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=["layer.weight"]))


def norm_beside_adapters():
    model = tiny.peft_llama()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("build", "says"),
    [(experts, "ScaLoRA merges into the parameter of 3 experts"), (norm_beside_adapters, "got model.norm.weight")],
    ids=["experts", "norm"],
)
def test_run_whose_checkpoints_cannot_be_saved_is_refused_when_it_starts(tmp_path, build, says):
    trainer = trainer_of(build(), tmp_path, [lf.methods.ScaLoRA()], ScaLoRATrainer)
    with pytest.raises(lf.CheckpointError, match=says):
        trainer.train()


def test_exact_checkpoints_restore_the_generators_of_all_gpus(tmp_path, monkeypatch):
    """Two GPUs in one process, as with device_map="auto". A Trainer saves the state of the current one alone."""
    states = [torch.tensor([i], dtype=torch.uint8) for i in range(2)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    restored = {}
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.update({device: state.item()}))
    trainer = trainer_of(tiny.peft_llama(), tmp_path, kind=ScaLoRATrainer)
    trainer._save_rng_state(str(tmp_path / "checkpoint-1"))
    trainer._load_rng_state(str(tmp_path / "checkpoint-1"))
    assert restored == {0: 0, 1: 1}
    trainer._load_rng_state(None)


def test_readme_script_trains_with_lora_adamw_and_logs_statistics(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "lf.hf" in block)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert type(names["trainer"].optimizer.optimizer) is lf.optim.LoRAAdamW
    assert [row["step"] for row in names["trainer"].state.log_history if "adapter/rank_min" in row] == [0, 2]


def test_summary_has_geometric_means_and_only_finite_values():
    stats = lf.metrics.adapter_stats(tiny.peft_llama())
    ratios = [layer.rms_ratio for layer in stats.values()]
    assert lf.hf.summary(stats)["adapter/rms_ratio_mean"] == pytest.approx(statistics.geometric_mean(ratios))
    fresh = lf.hf.summary(lf.metrics.adapter_stats(tiny.peft_llama(filled=False)))
    assert fresh["adapter/norm_b_max"] == 0 and "adapter/rms_ratio_mean" not in fresh
    assert lf.hf.summary({}) == {}


def spoil(model, name):
    peft_layers(model)[name.rpartition(".")[0]].lora_A["default"].weight.data[0, 0] = math.nan


def test_nan_adapter_leaves_the_other_adapters_statistics_alone():
    model = tiny.peft_llama()
    before = lf.metrics.adapter_stats(model)
    name = next(iter(before))
    assert lf.metrics.not_finite(before) == []
    spoil(model, name)
    after = lf.metrics.adapter_stats(model)
    assert math.isnan(after[name].rank) and math.isnan(after[name].spectral)
    assert lf.metrics.not_finite(after) == [name]
    others = {k: v for k, v in before.items() if k != name}
    assert {k: v for k, v in after.items() if k != name} == others
    assert lf.hf.summary(after) == {"adapter/not_finite": 1} | lf.hf.summary(others)


def test_callback_names_adapters_that_are_not_finite_once(tmp_path):
    model = tiny.peft_llama()
    first, second, *_ = lf.metrics.adapter_stats(model)
    trainer = trainer_of(model, tmp_path)
    callback = lf.hf.AdapterStatsCallback(trainer, every=1)
    state, control = trainer.state, trainer.control
    spoil(model, first)
    with pytest.warns(UserWarning, match=rf"not finite, after step 0: {re.escape(first)}$"):
        callback.on_train_begin(trainer.args, state, control, model)
    spoil(model, second)
    with pytest.warns(UserWarning, match=rf"not finite, after step 0: {re.escape(second)}$"):
        callback.on_step_end(trainer.args, state, control, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.on_step_end(trainer.args, state, control, model)
    assert [row["adapter/not_finite"] for row in state.log_history] == [1, 2, 2]


def test_nan_layer_leaves_the_used_bounds_of_others_alone():
    model = tiny.llama()
    lf.inject_(model, lf.NBLoRAConfig(r=4, norm="frobenius", bound=0.5))
    tiny.fill(model)
    first = next(layer for layer in model.modules() if isinstance(layer, lf.NBLoRALinear))
    first.free_a.data[0, 0] = math.nan
    stats = lf.metrics.adapter_stats(model)
    figures = lf.hf.summary(stats, lf.metrics.bound_stats(model, stats))
    assert figures["adapter/not_finite"] == 1 and math.isfinite(figures["adapter/bound_used_mean"])


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_callback_refuses_a_bad_interval(every):
    with pytest.raises(lf.ArgumentError, match="every: expected an integer of at least 1"):
        lf.hf.AdapterStatsCallback(None, every)
