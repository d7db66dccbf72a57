"""The suite's ops, and the tests that must pass before an op is measured.

An op is a file ops/bench_<op>.py with the functions ``cases(scale)`` and ``build(case, setting)``, and a row here.
"""

import importlib
from types import ModuleType

import torch

from suite.cases import Case, Scale
from suite.comparison import Setting

LAYER = (
    "tests/linear/test_lora_linear.py::test_gradcheck",
    "tests/linear/test_lora_linear.py::test_same_mask_in_forward_and_backward",
)
# op → pytest node ids: tests of the torch twin, and of the kernels (native on a GPU, elsewhere interpreted)
TESTS: dict[str, tuple[str, ...]] = {
    "project": (*LAYER, "tests/linear/test_kernels.py::test_zero_or_one_token_gives_eagers_shapes"),
    "linear": (*LAYER, "tests/linear/test_kernels.py::test_zero_or_one_token_gives_eagers_shapes"),
    "grads": (*LAYER, "tests/linear/test_kernels.py::test_gradients_that_are_not_needed_are_none"),
    "layer": (*LAYER, "tests/linear/test_kernels.py::test_error_budget[0]"),
    "decode": (*LAYER, "tests/linear/test_kernels.py::test_zero_or_one_token_gives_eagers_shapes"),
    "dora": (
        "tests/dora/test_dora_linear.py::test_errors_are_at_most_pefts",
        "tests/dora/test_dora_kernels.py::test_launches_and_bytes",
    ),
    "experts": (
        "tests/experts/test_grouped_linear.py::test_results_are_those_of_the_dense_formula",
        "tests/experts/test_expert_kernels.py::test_results_are_those_of_float64",
    ),
    "gram": ("tests/pairs/test_pair_kernels.py::test_gram_computes_only_the_wanted_grams",),
    "solve": (
        "tests/pairs/test_reference.py::test_spd_solve_has_a_small_residual",
        "tests/pairs/test_reference.py::test_small_inverse_has_a_small_residual",
    ),
    "hadamard": (
        "tests/pairs/test_scalora_solution.py::test_nnls_minimises_the_objective",
        "tests/pairs/test_scalora_system.py::test_scalar_solver_follows_theorem_3",
    ),
    "cayley": (
        "tests/cayley/test_cayley.py::test_cayley_is_the_formula",
        "tests/cayley/test_cayley.py::test_cayley_is_within_the_error_budget",
    ),
    "step": (
        "tests/test_optim.py::test_step_without_methods_is_bitwise_torchs_fused_adamw",
        "tests/pairs/test_pair_kernels.py::test_step_agrees_with_torch_adamw",
    ),
    "merge": (
        "tests/methods/test_scalora.py::test_scaling_keeps_the_effective_weight",
        "tests/pairs/test_pair_kernels.py::test_merge_matches_float64_at_every_rank",
    ),
}
OPS = tuple(TESTS)


def module(op: str) -> ModuleType:
    return importlib.import_module(f"suite.ops.bench_{op}")


def cases(ops: tuple[str, ...], scale: Scale) -> list[Case]:
    return [case for op in ops for case in module(op).cases(scale)]


def here() -> Setting:
    """Returns the GPU with our kernels, or the CPU with their torch twins."""
    cuda = torch.cuda.is_available()
    return Setting(torch.device("cuda" if cuda else "cpu"), cuda)
