"""Exported models contain operators of aten alone, so that they run where this package is not installed."""

import io
import subprocess
import sys

import pytest
import torch
from adapted_nets import IN, OURS
from torch import nn

import lora_fast as lf

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")
]
ROWS = torch.export.Dim("rows", min=2, max=64)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, IN), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(4, IN)), nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return lf.functional.lora_linear(x, self.weight, None, self.a, self.b, 2.0, 0.5 if self.training else 0.0)


def merged(model):
    lf.merge_(model)
    return model


def frozen_in_16_bits(model):
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


CALLS = {
    **{name: lambda build=build: build().eval() for name, build in OURS.items()},
    "functional": lambda: Functional().eval(),
    "fused, merged": lambda: merged(OURS["fused"]().eval()),
    "injected, merged": lambda: merged(OURS["LoRALinear"]().eval()),
    "fused, dropout": lambda: OURS["fused"](0.5).train(),
    "injected, dropout": lambda: OURS["LoRALinear"](0.5).train(),
    "functional, dropout": lambda: Functional().train(),
    "fused, 16 bits": lambda: frozen_in_16_bits(OURS["fused"]().eval()),
    "injected, 16 bits": lambda: frozen_in_16_bits(OURS["LoRALinear"]().eval()),
}


def example(name, rows=3):
    dtype = torch.bfloat16 if "16" in name else torch.float32
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows)).to(dtype)


def foreign(program):
    """Returns the functions that the graph calls besides aten's operators."""
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {name for name in names if not name.startswith(("aten.", "<built-in function"))}


def check(name, strict):
    model, x = CALLS[name](), example(name)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: ROWS},), strict=strict)
    assert not foreign(program)
    if "dropout" not in name:
        x, tolerance = example(name, 5), 0.05 if "16" in name else 1e-5
        torch.testing.assert_close(program.module()(x), model(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CALLS)
def test_exported_program_has_operators_of_aten_alone(name):
    check(name, strict=False)


@pytest.mark.parametrize("name", ["fused", "LoRALinear", "functional, dropout"])
def test_strictly_exported_program_has_operators_of_aten_alone(name):
    with lf.set_backend("triton"):
        check(name, strict=True)


def test_disabled_layers_are_exported_as_linear_layers():
    model, x = OURS["LoRALinear"]().eval(), example("")
    with lf.disable_adapters(model):
        program = torch.export.export(model, (x,))
        assert not foreign(program)
        assert torch.equal(program.module()(x), model(x))


def test_exported_program_runs_without_the_package(tmp_path):
    names, expected = ["fused", "LoRALinear", "NBLoRALinear", "functional"], {}
    for i, name in enumerate(names):
        model, x = CALLS[name](), example(name)
        torch.export.save(torch.export.export(model, (x,)), tmp_path / f"{i}.pt2")
        expected[i] = (x, model(x).detach())
    torch.save(expected, tmp_path / "expected.pt")
    code = (
        "import sys, torch; sys.modules.update(lora_fast=None, peft=None)\n"
        "for i, (x, y) in torch.load('expected.pt').items():\n"
        "    z = torch.export.load(f'{i}.pt2').module()(x)\n"
        "    torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)\n"
        "print(i + 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == str(len(names)), done.stderr


def onnx_values(proto, x):
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(proto)
    return torch.from_numpy(evaluator.run(None, {proto.graph.input[0].name: x.numpy()})[0])


@pytest.mark.parametrize("name", ["fused", "LoRALinear", "SingLoRALinear", "functional"])
def test_onnx_model_of_either_exporter_has_the_values(name):
    """ONNX has no inverse of a matrix, which NB-LoRA's factors need: such a model is exported merged."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, x = CALLS[name](), example(name)
    by_trace = io.BytesIO()
    torch.onnx.export(model, (x,), by_trace, dynamo=False)
    protos = [onnx.load_from_string(by_trace.getvalue())]
    if name == "fused":  # takes seconds; what it reads is the program of the tests above
        protos.append(torch.onnx.export(torch.export.export(model, (x,)), dynamo=True, verbose=False).model_proto)
    for proto in protos:
        assert {node.domain for node in proto.graph.node} == {""}
        torch.testing.assert_close(onnx_values(proto, x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_merged_nb_lora_is_exported_to_onnx():
    onnx = pytest.importorskip("onnx")
    model, x = OURS["NBLoRALinear"]().eval(), example("")
    expected, written = model(x).detach(), io.BytesIO()
    torch.onnx.export(merged(model), (x,), written, dynamo=False)
    proto = onnx.load_from_string(written.getvalue())
    torch.testing.assert_close(onnx_values(proto, x), expected, rtol=1e-4, atol=1e-5)
