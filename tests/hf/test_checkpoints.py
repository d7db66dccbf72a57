"""lf.hf.ExactCheckpoints in Trainers, also of models without a PeftModel: resumed runs, the best model, refusals."""

import gc

import peft
import pytest
import tiny
import torch
import transformers
from torch import nn
from transformers.trainer_callback import PrinterCallback

import lora_fast as lf
from lora_fast.layers.find import peft_layers

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}
BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """A Trainer collects garbage, among all that the process has loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


class ExactTrainer(lf.hf.ExactCheckpoints, transformers.Trainer):
    pass


class Backbone(nn.Module):
    """A module of one's own: PEFT's layers in a part of it, running statistics, a trained head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.encoder = nn.Embedding(97, 16), nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.head = nn.Linear(16, 97)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        logits = self.head(self.encoder(x.flatten(0, -2)))
        return {"loss": nn.functional.cross_entropy(logits, labels.flatten()), "logits": logits}


def native():
    model = tiny.llama(hidden=16)
    model.add_adapter(peft.LoraConfig(**CONFIG))
    return model


def injected_by_peft():
    """Which transformers does not know of. The head is trained, too."""
    model = peft.inject_adapter_in_model(peft.LoraConfig(**CONFIG), tiny.llama(hidden=16))
    model.lm_head.requires_grad_(True)
    return model


def inside():
    model = Backbone()
    peft.inject_adapter_in_model(peft.LoraConfig(**CONFIG | {"target_modules": ["0"]}), model.encoder)
    return model


def peft_model():
    return peft.get_peft_model(tiny.llama(hidden=16), peft.LoraConfig(**CONFIG))


def injected():
    return tiny.injected_llama(hidden=16, dropout=0.1)


WHOLE = [inside, injected_by_peft]  # whose checkpoints have all weights: a Trainer knows of no adapter
BUILDS = [native, injected_by_peft, inside, peft_model, injected]


def fused(build):
    torch.manual_seed(3)
    model = build()
    if peft_layers(model):
        lf.fuse_(model)
    return model


def trainer_of(model, folder, method, kind=ExactTrainer, **changes):
    settings = {"learning_rate": 1e-2, "max_steps": 3, "save_steps": 2, **changes}
    args = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, **settings
    )
    choice = lf.hf.optimizer_cls_and_kwargs(model, args, [method])
    trainer = kind(model, args, train_dataset=tiny.Rows(), eval_dataset=tiny.Rows(), optimizer_cls_and_kwargs=choice)
    trainer.remove_callback(PrinterCallback)
    return trainer


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


SCALORA, PLUS = lf.methods.ScaLoRA(interval=2), lf.methods.LoRAPlus(2)


@pytest.mark.parametrize(("build", "method"), [*((build, SCALORA) for build in BUILDS), (native, PLUS)])
def test_resumed_run_is_the_whole_one(build, method, tmp_path):
    states = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = fused(build)
        if checkpoint and build in WHOLE:
            frozen = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
            frozen.data.add_(1)
        trainer_of(model, tmp_path, method).train(resume_from_checkpoint=checkpoint)
        states.append(state(model))
    tiny.assert_same_tensors(*states)
    changed = [name for name, tensor in state(fused(build)).items() if not torch.equal(tensor, states[0][name])]
    assert any("lora_B" in name for name in changed)
    assert any("base_layer" in name or name.endswith("q_proj.weight") for name in changed) == (
        type(method) is lf.methods.ScaLoRA
    )


class BestIsFirst(ExactTrainer):
    """Evaluates each step as worse than the one before, and notes the model at the first."""

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": float(self.state.global_step)}
        self.log(metrics)
        if self.state.global_step == 1:
            self.first = state(self.model)
        return metrics


@pytest.mark.parametrize(
    ("build", "keep"), [*((build, "weights") for build in BUILDS), (native, "terms"), (peft_model, "terms")]
)
def test_best_model_is_loaded_with_its_merges(build, keep, tmp_path):
    model = fused(build)
    trainer = trainer_of(model, tmp_path, lf.methods.ScaLoRA(interval=1, keep=keep), BestIsFirst, **BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    tiny.assert_same_tensors(state(model), trainer.first)
    # What the log knows of the merges is that of the best model, too: a file of terms is right.
    lf.save_adapter(model, tmp_path / "best")
    again = fused(build)
    lf.load_adapter(again, tmp_path / "best")
    ids = tiny.batch()
    with torch.no_grad():
        logits = [run.eval()(input_ids=ids, labels=ids)["logits"] for run in (model, again)]
    if build is not inside:  # whose statistics are in the checkpoint alone
        torch.testing.assert_close(*logits)


@pytest.mark.parametrize("build", [native, injected])
def test_checkpoint_before_the_first_merge_restores_what_was_merged_later(build, tmp_path):
    model = fused(build)
    trainer = trainer_of(model, tmp_path, SCALORA)
    trainer.create_optimizer()
    trainer.save_model(tmp_path / "checkpoint-0")
    before = state(model)
    lf.save_adapter(model, tmp_path / "adapter")  # without whole weights, because nothing has changed
    assert not any("base_layer" in key for key in lf.checkpoints.peft_format.read(tmp_path / "adapter").tensors())
    trainer.train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in state(model).items() if "lora_" not in name)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-0"))
    tiny.assert_same_tensors(state(model), before)


def without_config():
    model = native()
    del model.peft_config
    model._hf_peft_config_loaded = False
    return model


def experts():
    model = nn.ModuleDict({"layer": nn.Linear(4, 4)})
    model["layer"].weight = nn.Parameter(torch.zeros(3, 4, 4))
    adapter = peft.LoraConfig(r=2, target_modules=[], target_parameters=["layer.weight"])
    return peft.inject_adapter_in_model(adapter, model)


@pytest.mark.parametrize(
    ("build", "says"),
    [(without_config, "config of the adapter 'default'"), (experts, "ScaLoRA merges into the parameter of 3 experts")],
)
def test_run_whose_checkpoints_could_not_be_saved_is_refused_before_a_step(build, says, tmp_path):
    trainer = trainer_of(build(), tmp_path, SCALORA)
    with pytest.raises(lf.CheckpointError, match=says):
        trainer.train()
    assert trainer.state.global_step == 0 and not any(tmp_path.glob("checkpoint-*"))


def sentence_model(folder):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules", reason="sentence-transformers")
    import sentence_transformers

    torch.manual_seed(1)
    parts = [modules.Transformer(str(folder)), modules.Pooling(16), modules.Dense(16, 8)]
    return sentence_transformers.SentenceTransformer(modules=parts, device="cpu")


@pytest.fixture(scope="module")
def sentence_base(tmp_path_factory):
    """Returns a folder with a tiny BERT and a tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50)).save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i + 2 for i in range(40)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def test_sentence_transformer_trains_on_and_its_checkpoint_is_one_of_its_own(sentence_base, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

    class ExactSentenceTrainer(lf.hf.ExactCheckpoints, sentence_transformers.SentenceTransformerTrainer):
        pass

    data = {"anchor": [f"w{i} w{i + 1}" for i in range(12)], "positive": [f"w{i + 2}" for i in range(12)]}
    states = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = sentence_model(sentence_base)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["query", "value"]))
        lf.fuse_(model)
        args = sentence_transformers.SentenceTransformerTrainingArguments(
            str(tmp_path),
            max_steps=3,
            save_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            learning_rate=0.01,
        )
        choice = lf.hf.optimizer_cls_and_kwargs(model, args, [lf.methods.ScaLoRA(interval=1)])
        loss = losses.MultipleNegativesRankingLoss(model)
        rows = datasets.Dataset.from_dict(data)
        trainer = ExactSentenceTrainer(model, args, train_dataset=rows, loss=loss, optimizer_cls_and_kwargs=choice)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append(state(model))
    tiny.assert_same_tensors(*states)
    want = model.encode(["w1 w2"], convert_to_tensor=True)
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "checkpoint-3"), device="cpu")
    torch.testing.assert_close(again.encode(["w1 w2"], convert_to_tensor=True), want)
    lf.save_adapter(model, tmp_path / "adapter")
    plain = sentence_model(sentence_base)
    lf.load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(plain.encode(["w1 w2"], convert_to_tensor=True), want)
    # The best checkpoint is loaded with its merges, and the model's card knows its step.
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    trainer._load_best_model()
    assert model.model_card_data.best_model_step == 2
    assert not torch.equal(model.encode(["w1 w2"], convert_to_tensor=True), want)


def test_the_active_one_of_two_adapters_is_saved_where_peft_has_it(tmp_path):
    """The second phase of a training: "default" is at the root of a checkpoint and stays as it is."""
    models = []
    for checkpoint in (None, tmp_path / "checkpoint-2"):
        torch.manual_seed(3)
        model = peft_model()
        model.add_adapter("second", peft.LoraConfig(**CONFIG))
        model.set_adapter("second")
        for name, p in model.named_parameters():
            if ".default." in name:
                p.data.fill_(0.25 if checkpoint is None else 0.5)
        lf.fuse_(model)
        trainer = trainer_of(model, tmp_path, SCALORA)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        models.append(state(model))
    tiny.assert_same_tensors(*models)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(hidden=16), tmp_path / "checkpoint-3")
    saved = [p for name, p in loaded.named_parameters() if "lora_" in name]
    assert all((p == 0.25).all() for p in saved)


@pytest.mark.parametrize("build", WHOLE)
def test_a_plain_trainers_checkpoint_of_all_weights_is_resumed(tmp_path, build):
    """A run that adopts ExactCheckpoints in its middle."""
    ends = []
    for kind in (transformers.Trainer, ExactTrainer):
        trainer = trainer_of(fused(build), tmp_path, PLUS, kind)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if kind is ExactTrainer else None)
        ends.append(state(trainer.model))
    tiny.assert_same_tensors(*ends)
