"""Every method follows the float64 transcription of its formulas, layer by layer."""

import pytest
import torch
import transcription as T
from method_runs import METHODS, STEPS, ULPS, Ours, distance, run


@pytest.mark.parametrize("steps", [60, pytest.param(STEPS, marks=pytest.mark.budget)])  # "balora svd" acts at step 50
@pytest.mark.parametrize("name", METHODS)
def test_method_follows_the_float64_transcription(name, steps):
    methods = METHODS[name]
    exact = run(T.Run, torch.float64, methods, steps)
    in_float64, in_float32 = run(Ours, torch.float64, methods, steps), run(Ours, torch.float32, methods, steps)
    formulas = distance(run(T.Run, torch.float32, methods, steps), exact)
    ours = distance(in_float32, exact)
    print(f"{name}: {ours:.3e} / {formulas:.3e} = {ours / formulas:.3f}; float64 {distance(in_float64, exact):.1e}")
    assert distance(in_float64, exact) <= 1e-9
    assert ours <= 1.1 * formulas + ULPS * torch.finfo(torch.float32).eps
