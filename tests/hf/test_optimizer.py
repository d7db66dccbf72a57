"""lora_fast.hf.optimizer_cls_and_kwargs beside Trainer's own AdamW: model_init, trials, weight decay, and runs that
begin with one optimizer and are resumed with the other."""

import warnings

import peft
import pytest
import torch
import transformers
from tiny import assert_same_tensors, batch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

import lora_fast as lf
from lora_fast import methods as M

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
ROWS = [{"input_ids": batch(i, rows=1)[0], "labels": torch.tensor(i % 2)} for i in range(40)]


class ExactTrainer(lf.hf.ExactCheckpoints, Trainer):
    pass


class OwnDecay(Trainer):
    """As trainers of others do: leaves more out of the weight decay."""

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if "lora_A" not in name]


class LossTrainer(Trainer):
    """As sentence-transformers' Trainer does: trains a parameter of the loss, too, and a head at a rate of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.loss = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.loss.weight)

    def compute_loss(self, model, inputs, **options):
        self.loss.zero_grad()  # the Trainer zeros those of the model
        return super().compute_loss(model, inputs) * self.loss.weight.square().sum()

    def get_optimizer_cls_and_kwargs(self, args, model=None):
        kind, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {
                "params": [*(p for name, p in trained if "classifier" not in name), *self.loss.parameters()],
                "weight_decay": 0.0,
            },
            {"params": [p for name, p in trained if "classifier" in name], "lr": 1e-3, "weight_decay": 0.1},
        ]
        return kind, {**kwargs, "optimizer_dict": groups}


class OldTrainer(Trainer):
    """Calls what it takes for an optimizer's class with the groups, as transformers 5.0 does."""

    def create_optimizer(self, model=None):
        own = Trainer(self.model, self.args).create_optimizer()
        groups = [{name: group[name] for name in ("params", "weight_decay")} for group in own.param_groups]
        kind, kwargs = self.optimizer_cls_and_kwargs
        self.optimizer = kind(groups, **kwargs)
        return self.optimizer


def model(**settings):
    """Returns a classifier whose trained biases, norm and head have no zeros, with fused adapters."""
    torch.manual_seed(0)
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **without_dropout))
    torch.nn.init.constant_(base.classifier.bias, 1.0)
    saved = ["classifier", "bert.encoder.layer.0.output.LayerNorm"]
    chosen = {"r": 4, "target_modules": ["query", "value"], "bias": "lora_only", "modules_to_save": saved} | settings
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", **chosen))
    lf.fuse_(adapted, allow_empty="use_dora" in settings)
    return adapted


def trainer_of(folder, choice, kind=Trainer, trained=None, **changes):
    settings = {"learning_rate": 1e-2, "weight_decay": 0.5, "max_steps": 4, "save_strategy": "no"} | changes
    args = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, **settings
    )
    given = {"optimizer_cls_and_kwargs": choice} if choice else {}
    where = {"model_init": lambda: model()} if trained is None else {"model": trained}
    trainer = kind(args=args, train_dataset=ROWS, **where, **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def ours(**options):
    return lf.hf.optimizer_cls_and_kwargs(**options)


@pytest.mark.parametrize("kind", [Trainer, OwnDecay, LossTrainer, OldTrainer])
def test_training_without_methods_is_trainers_own_to_the_bit(tmp_path, kind):
    """With weight decay, beside adapters also biases, a norm and a head, which Trainer decays in part."""
    ends = []
    for choice in (None, ours()):
        own = Trainer if kind is OldTrainer and choice is None else kind
        unread = {"optim": "adamw_bnb_8bit"} if kind is LossTrainer and choice else {}
        trainer = trainer_of(tmp_path, choice, own, model(), **unread)
        trainer.train()
        ends.append(weights(trainer))
        if kind is LossTrainer:  # whose ``optim`` may need a package that is not there
            ends[-1]["loss"] = trainer.loss.weight.detach()
    assert type(trainer.optimizer.optimizer) is lf.optim.LoRAAdamW
    assert_same_tensors(*ends)


@pytest.mark.parametrize("settings", [{}, {"bias": "all"}, {"use_dora": True}, {"modules_to_save": None}], ids=str)
def test_groups_are_trainers_own(tmp_path, settings):
    optimizers = [trainer_of(tmp_path, choice, trained=model(**settings)) for choice in (None, ours())]
    names = {}
    for trainer in optimizers:
        names |= {id(p): name for name, p in trainer.model.named_parameters()}
    groups = [
        [
            (group["weight_decay"], [names[id(p)] for p in group["params"]])
            for group in trainer.create_optimizer().param_groups
        ]
        for trainer in optimizers
    ]
    assert groups[0] == groups[1] and len(groups[0]) == 2


def test_model_init_and_a_trial_train_the_trainers_own_model(tmp_path):
    """As hyperparameter_search does: each trial has a new model and writes its rate into the trainer's arguments. One
    choice serves all trainers."""
    choice, ends = ours(model=model(), methods=[]), []
    for given in (None, choice):
        trainer = trainer_of(tmp_path, given)
        for rate in (1e-2, 5e-2):
            trainer.args.learning_rate = rate
            trainer.train()
            ends.append(weights(trainer))
            assert trainer.optimizer.param_groups[0]["initial_lr"] == rate
    assert_same_tensors(ends[0], ends[2])
    assert_same_tensors(ends[1], ends[3])
    second = trainer_of(tmp_path, choice)
    second.train()
    assert_same_tensors(ends[0], weights(second))


def test_settings_are_those_of_the_trainers_arguments_when_it_begins(tmp_path):
    trained = model()
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    trainer = trainer_of(tmp_path, ours(model=trained, args=args), trained=trained, adam_beta2=0.9)
    trainer.args.learning_rate, trainer.args.adam_epsilon = 0.25, 1e-3
    group = trainer.create_optimizer().param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.25, (0.9, 0.9), 1e-3, 0.5)


def test_factory_is_for_trainers_alone():
    factory, kwargs = ours()
    with pytest.raises(lf.ArgumentError, match="expected a call by transformers' Trainer"):
        factory()(model(), **kwargs)


def resumed(folder, first, second, **changes):
    """Returns the weights after four steps, of which ``first`` makes two and ``second`` the others."""
    changes |= {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    trainer_of(folder, first, trained=model(bias="none"), **changes).train()  # PEFT 0.18 does not save biases
    trainer = trainer_of(folder, second, trained=model(bias="none"), **changes)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return weights(trainer)


@pytest.mark.parametrize("first", ["AdamW", "LoRAAdamW"])
def test_a_run_goes_on_with_the_other_optimizer_to_the_same_bits(tmp_path, first):
    whole = trainer_of(tmp_path / "whole", None, trained=model(bias="none"), lr_scheduler_type="cosine")
    whole.train()
    choices = (None, ours()) if first == "AdamW" else (ours(), None)
    assert_same_tensors(weights(whole), resumed(tmp_path, *choices))


@pytest.mark.parametrize("method", [M.ILoRA(lam=0.1), M.LoRAMuon(), M.LoRARITE()], ids=lambda m: type(m).__name__)
def test_methods_begin_where_adamw_stopped(tmp_path, method):
    """What of AdamW's moments a method has no use for is named."""
    with pytest.warns(UserWarning, match=f"the state is AdamW's; {type(method).__name__}.* begin at this step") as told:
        end = resumed(tmp_path, None, ours(methods=[method]))
    anew = any("query.default.lora_A', " in str(warning.message) for warning in told)
    assert anew == (type(method) is M.LoRARITE)
    assert all(value.isfinite().all() for value in end.values())
    assert not torch.equal(end[name := next(iter(end))], resumed(tmp_path, None, ours())[name])


def test_exact_checkpoints_have_what_is_trained_outside_the_model(tmp_path):
    class ExactLossTrainer(lf.hf.ExactCheckpoints, LossTrainer):
        pass

    ends = []
    for checkpoint in (None, tmp_path / "checkpoint-2"):
        options = {"save_strategy": "steps", "save_steps": 2}
        trainer = trainer_of(tmp_path, ours(), ExactLossTrainer, model(bias="none"), **options)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        ends.append({**weights(trainer), "loss": trainer.loss.weight.detach()})
    assert ends[0]["loss"].item() != 1
    assert_same_tensors(*ends)


@pytest.mark.parametrize("last", [[], [M.ScaLoRA(interval=2)]], ids=["plain", "scalora"])
def test_a_run_may_change_its_optimizer_twice(tmp_path, last):
    """AdamW keeps what it has loaded of a method and knows nothing of, and saves it again."""
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    choices = [ours(methods=[M.ScaLoRA(interval=2)]), None, ours(methods=last)]
    for i, choice in enumerate(choices):
        trainer = trainer_of(tmp_path, choice, trained=model(bias="none"), **{**options, "max_steps": 2 * i + 2})
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{2 * i}") if i else None)
    assert any("ScaLoRA" in str(w.message) and "begin at this step" in str(w.message) for w in told) == bool(last)
    assert "amsgrad" not in trainer.optimizer.param_groups[0]


def test_groups_that_adamw_has_not_are_refused_by_name(tmp_path):
    with pytest.raises(lf.ArgumentError, match=r"expected groups of \[\d, \d, \d+\] parameters .*LoRAPlus"):
        resumed(tmp_path, None, ours(methods=[M.LoRAPlus(4.0)]))


class ReferenceTrainer(Trainer):
    """As TRL's DPOTrainer with a PeftModel: the reference is the model without its adapters."""

    ref_model, beta = None, 0.1


@pytest.mark.parametrize(("beta", "warns"), [(0.1, True), (0.0, False)])
def test_a_reference_that_changes_is_named(tmp_path, beta, warns):
    trainer = trainer_of(tmp_path, ours(methods=[M.ScaLoRA()]), ReferenceTrainer, model())
    trainer.beta = beta
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.create_optimizer()
    assert any("the reference of ReferenceTrainer changes" in str(warning.message) for warning in told) == warns


@pytest.mark.parametrize("form", ["params", "settings", "parameters"])
def test_trainers_may_call_the_choice_as_torchs_classes(tmp_path, form):
    class OwnTrainer(Trainer):
        def create_optimizer(self, model=None):
            kind, kwargs = self.optimizer_cls_and_kwargs
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = {
                "params": lambda: kind(params=[{"params": trained}], **kwargs),
                "settings": lambda: kind([{"params": trained}], lr=0.5, **kwargs),
                "parameters": lambda: kind(iter(trained), **kwargs),
            }[form]()
            return self.optimizer

    (group,) = trainer_of(tmp_path, ours(), OwnTrainer, model()).create_optimizer().param_groups
    assert group["lr"] == (0.5 if form == "settings" else 1e-2) and group["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("kind", "strategy", "warns"), [(Trainer, "steps", True), (Trainer, "no", False), (ExactTrainer, "steps", False)]
)
def test_checkpoints_that_lack_changed_weights_are_named_when_training_starts(tmp_path, kind, strategy, warns):
    trainer = trainer_of(tmp_path, ours(methods=[M.ScaLoRA()]), kind, model(bias="none"), save_strategy=strategy)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.create_optimizer()
    assert any("ScaLoRA changes frozen weights" in str(warning.message) for warning in told) == warns
