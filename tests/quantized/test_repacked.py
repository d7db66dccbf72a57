"""4-bit weights that bitsandbytes has repacked for a CPU's instructions are taken back as they were."""

import pytest
import torch

from lora_fast.quantized import quantized_weight

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.mark.parametrize("nested", [True, False], ids=["double-quantisation", "plain-scales"])
def test_a_repacked_weight_is_what_it_was_but_for_the_rounding_of_its_scales(nested):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4")
    layer.weight.data *= torch.arange(1, 65)[:, None]  # scales that differ from row to row
    layer.to("cpu")
    weight = quantized_weight(layer).dequantized(torch.float32)
    # What an evaluation's forward does on a CPU with AVX512-bf16.
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    again = quantized_weight(layer).dequantized(torch.float32)
    torch.testing.assert_close(again, weight, rtol=0, atol=0.02 * weight.abs().max().item())
