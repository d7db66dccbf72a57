"""torch.compile of models with PEFT's layers, in each of its ways."""

import functools

import pytest
import torch
from peft_blocks import LAYERS, build, net_of
from side_by_side import adamw, factors, fuse, plain
from tiny import batch, fill, loss_of, peft_llama
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from workflows import workflow

peft = pytest.importorskip("peft", reason="pip install '.[works-with]'")

LIBRARY = "torch"
EXACT = 1e-12  # in float64
EAGER = "aot_eager"  # traces forward and backward as inductor does, and needs no C++ compiler


@pytest.fixture(autouse=True)
def reset():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def steps(call, model, sizes=(5, 5, 5), dtype=torch.float64):
    """Trains, and returns the losses and the factors. ``call`` is the compiled model."""
    optimizer, losses = adamw(model), []
    for rows in sizes:
        losses.append(call(torch.randn(rows, 8, dtype=dtype)).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses], factors(model)


def assert_same_as_eager(run, atol=EXACT, rtol=0.0):
    """Asserts that ``run`` returns the same with PEFT's layers in eager mode, with fused ones in eager mode, and with
    fused ones as ``run`` compiles them."""
    results = []
    for prepare, compiles in ((plain, False), (fuse, False), (fuse, True)):
        model = build()
        if prepare is fuse:
            fuse(model, LAYERS)
        torch.manual_seed(1)
        results.append(run(model, compiles))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=atol, rtol=rtol)


def ops_in(graphs):
    return sum("lora_fast" in str(node.target) for graph in graphs for node in graph.graph.nodes)


@workflow("`torch.compile(fullgraph=True)`, training", "losses, factors: 1e-12, float64; one graph with all calls")
def test_full_graph():
    def run(model, compiles):
        counter = CompileCounterWithBackend(EAGER)
        result = steps(torch.compile(model, backend=counter, fullgraph=True) if compiles else model, model)
        if compiles:
            assert counter.frame_count == 1
            assert ops_in(counter.graphs) == LAYERS
        return result

    assert_same_as_eager(run)


@pytest.mark.budget
@workflow(
    "`torch.compile(dynamic=True)`, five sizes",
    "losses, factors: 1e-12, float64; PEFT's two graphs",
)
def test_dynamic_shapes():
    def run(model, compiles):
        counter = CompileCounterWithBackend(EAGER)
        call = torch.compile(model, backend=counter, dynamic=True) if compiles else model
        result = steps(call, model, sizes=(5, 6, 7, 9, 13))
        assert counter.frame_count <= 2 * compiles  # two with PEFT's layers
        return result

    assert_same_as_eager(run)


@workflow("Regional compilation: each block by itself", "losses, factors: 1e-12, float64; the blocks share one graph")
def test_regional():
    def run(model, compiles):
        counter = CompileCounterWithBackend(EAGER)
        if compiles:
            for block in net_of(model).blocks:
                block.compile(backend=counter, fullgraph=True)
        result = steps(model, model)
        assert counter.frame_count <= 2 * compiles
        return result

    assert_same_as_eager(run)


@pytest.mark.budget
@workflow("Compiled autograd", "losses and factors: 1e-12, float64")
def test_compiled_autograd():
    def run(model, compiles):
        if not compiles:
            return steps(model, model)
        with compiled_autograd._enable(torch.compile(backend=EAGER, fullgraph=True)):
            result = steps(torch.compile(model, backend=EAGER), model)
        assert counters["compiled_autograd"]["captures"] >= 1
        return result

    assert_same_as_eager(run)


@workflow("Compiled activation checkpointing", "losses and factors: 1e-12, float64")
def test_checkpointed():
    def run(model, compiles):
        net_of(model).run_block = functools.partial(checkpoint, use_reentrant=False)
        return steps(torch.compile(model, backend=EAGER, fullgraph=True) if compiles else model, model)

    assert_same_as_eager(run)


@pytest.mark.budget
@workflow("A compiled model whose adapters are switched, merged, disabled", "outputs of each: 1e-12, float64")
def test_adapters_of_compiled_model():
    def run(model, compiles):
        model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["up", "down"]))
        fill(model).eval()
        call = torch.compile(model, backend=EAGER) if compiles else model
        x = torch.randn(5, 8, dtype=torch.float64)
        outputs = [call(x)]
        model.set_adapter("other")
        outputs.append(call(x))
        with model.disable_adapter():
            outputs.append(call(x))
        model.merge_adapter()
        return [*outputs, call(x)]

    assert_same_as_eager(run)


@workflow("`hotswap_adapter` of a compiled model", "outputs: 1e-12, float64; it is not compiled again")
def test_hotswap(tmp_path):
    from peft.utils import hotswap

    for name, seed in (("first", 3), ("second", 4)):
        fill(build(), seed).save_pretrained(str(tmp_path / name))

    def run(model, compiles):
        counter = CompileCounterWithBackend(EAGER)
        hotswap.prepare_model_for_compiled_hotswap(model.eval(), target_rank=4)
        call = torch.compile(model, backend=counter, fullgraph=True) if compiles else model
        x, outputs = torch.randn(5, 8, dtype=torch.float64), []
        with torch.no_grad():
            for name in ("first", "second"):
                hotswap.hotswap_adapter(model, str(tmp_path / name), "default")
                outputs.append(call(x))
        assert counter.frame_count == compiles
        return outputs

    assert_same_as_eager(run)


@pytest.mark.budget
@workflow("inductor, also with `mode='reduce-overhead'`", "losses and factors: 1e-9, float64")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_inductor(mode):
    def run(model, compiles):
        return steps(torch.compile(model, mode=mode, fullgraph=True) if compiles else model, model)

    assert_same_as_eager(run, atol=1e-9)


@pytest.mark.budget
@workflow("A compiled Llama", "losses and factors: 1e-12, float64")
def test_llama():
    def run(compiles):
        model = fuse(peft_llama(dtype=torch.float64, targets=["q_proj", "up_proj"]), LAYERS)
        call = (
            torch.compile(lambda ids: loss_of(model, ids), backend=EAGER)
            if compiles
            else lambda ids: loss_of(model, ids)
        )
        optimizer, losses = adamw(model), []
        for step in range(3):
            losses.append(call(batch(step)))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses, factors(model)

    torch.testing.assert_close(run(True), run(False), atol=EXACT, rtol=0)
