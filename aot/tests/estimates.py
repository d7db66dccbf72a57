# SPDX-License-Identifier: Apache-2.0
"""The choices that the library makes by estimates of time are Python's: the fused GEMM or an update behind cuBLAS, and
S whole or in parts."""

import itertools
from ctypes import byref, c_int, c_size_t

import torch
from layer_refusals import has
from library import DTYPES, Layer, Library

from lora_fast.kernels import device, tiles
from lora_fast.kernels.linear.strategies import Call, CostModel, Way, best, estimate

N_TOKENS, WIDTHS = (1, 2, 16, 17, 100, 512, 2048, 8192), ((64, 1024), (4096, 4096), (4096, 14336), (14336, 4096))
DROP_LEVEL = 6554
GEMMS = (("linear", "add_to_y"), ("grad_x", "add_to_dx"))  # forward, backward


def estimates(library: Library, arch: int) -> int:
    """Returns how many choices were compared on the stub's card of this arch."""
    checked, has_split = 0, has(library, "project_parts")
    directions = [backward for backward, ops in enumerate(GEMMS) if all(has(library, op) for op in ops)]
    dtypes = [DTYPES[i] for i in library.built("dtypes")]
    ranks, adapters = library.built("ranks"), lambda dtype: {dtype, torch.float32}
    for dtype, r, n_tokens, (d_in, d_out) in itertools.product(dtypes, ranks, N_TOKENS, WIDTHS):
        for adapter, drop_level in itertools.product(adapters(dtype), (0, DROP_LEVEL)):
            kinds = DTYPES.index(dtype), DTYPES.index(adapter)
            layer = Layer(n_tokens, d_in, d_out, r, *kinds, 2.0, drop_level)
            call = Call(n_tokens, d_in, d_out, r, dtype, adapter, drop_level > 0)
            for backward in directions:
                _compare_gemm(library, layer, call, backward, arch)
            if has_split and not drop_level:
                _compare_split(library, layer, call, arch)
            checked += len(directions) + (has_split and not drop_level)
    return checked


def _compare_gemm(library: Library, layer: Layer, call: Call, backward: int, arch: int) -> None:
    strategy = c_int(-1)
    assert library.library.lora_fast_faster(byref(layer), backward, byref(strategy)) == 0, library.message
    theirs = best(("forward", "backward")[backward], call, device.CARDS[arch], "pass").gemm
    assert ("fused", "cublas")[strategy.value] == theirs, f"sm_{arch}, {call}: got {strategy.value}, Python {theirs}"


def _compare_split(library: Library, layer: Layer, call: Call, arch: int) -> None:
    size = c_size_t(1)
    assert library.library.lora_fast_adapter_workspace(byref(layer), byref(size)) == 0, library.message
    card = device.CARDS[arch]
    n_parts = CostModel(call, card).parts_of_few() if call.n_tokens <= tiles.FEW else 1
    whole = "short" if call.n_tokens <= tiles.SHORT else "pass"
    of_whole, of_parts = (estimate(Way("forward", thin, "cublas"), call, card) for thin in (whole, "split"))
    splits = n_parts > 1 and of_parts < of_whole
    expected = 4 * n_parts * call.n_tokens * call.r if splits else 0
    assert size.value == expected, f"sm_{arch}, {call}: {size.value} bytes of workspace, Python {expected}"
