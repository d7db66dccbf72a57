"""Kernels run natively on a CUDA machine and through Triton's interpreter elsewhere; no test needs a network."""

import gc
import os
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# bench/gpu_sections/compile_cache.py sets LORA_FAST_STUB_ARCH.
INTERPRETED = not torch.cuda.is_available() and "LORA_FAST_STUB_ARCH" not in os.environ
SLOW = (  # files that take half a minute of one core or more each, and nine tenths of the suite's time together
    "aot/test_library.py",
    "batches/test_batch.py",
    "batches/test_grouped.py",
    "batches/test_grouped_experts.py",
    "bench/test_gpu.py",
    "cayley/test_cayley_kernels.py",
    "cli/test_finetune.py",
    "cli/test_finetune_methods.py",
    "cli/test_finetune_quantized.py",
    "cli/test_inspect.py",
    "groups/test_architectures.py",
    "hf/test_checkpoints.py",
    "hf/test_optimizer.py",
    "kernels/test_compiler.py",
    "kernels/test_launch.py",
    "kernels/test_sanitized_kernels.py",
    "layers/test_nb_lora.py",
    "linear/test_gluon_gemm.py",
    "linear/test_kernels.py",
    "linear/test_strategies.py",
    "linear/test_traffic.py",
    "methods/test_balora.py",
    "methods/test_edges.py",
    "methods/test_rounding.py",
    "methods/test_transcription.py",
    "pairs/test_inverse_mean.py",
    "pairs/test_pair_kernels.py",
)
FIRST = (
    SLOW[0],
    "kernels/test_compiler.py",
    "kernels/test_launch.py",
)  # single tests of minutes: at the end one would run alone
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from lora_fast.kernels.inspection import interpreter

    interpreter.patch_once()
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def pytest_collection_finish():
    """Leaves what has been imported out of the garbage collections of the tests, each of which takes half a second
    otherwise."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Prints how often each result of a sweep came. Its tests record the counts as properties, which reach this
    process from the workers of a parallel run, as their output does not."""
    recorded = [entry for report in terminalreporter.stats.get("passed", []) for entry in report.user_properties]
    for sweep in dict.fromkeys(name for name, _ in recorded):
        counts = sum((Counter(results) for name, results in recorded if name == sweep), Counter())
        terminalreporter.write_line(f"{sweep}: {', '.join(f'{n} {result}' for result, n in counts.items())}")


def pytest_collection_modifyitems(items):
    """Marks the tests of slow files, runs the longest first, and skips kernels that Triton 3.6's interpreter cannot
    run: it makes numbers of arrays with one element, which numpy refuses from 2.4 on."""
    import triton

    name = lambda item: item.path.relative_to(Path(__file__).parent).as_posix()
    for item in items:
        if name(item) in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: name(item) not in FIRST)
    release = lambda version: tuple(map(int, version.split(".")[:2]))
    if INTERPRETED and release(triton.__version__) < (3, 7) and release(numpy.__version__) >= (2, 4):
        reason = f"Triton {triton.__version__} cannot interpret with numpy {numpy.__version__}: install numpy<2.4"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))
