"""The suite's ops, and the tests that must be green before an op's numbers are taken.

An op is a file of its name in ops/ (bench_<op>.py), with ``cases(scale)`` and ``build(case, setting)``.
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
# op → pytest node ids: of the torch twins, of the kernels (run natively where there is a GPU, else interpreted)
TESTS: dict[str, tuple[str, ...]] = {
    "project": (*LAYER, "tests/linear/test_kernels.py::test_zero_or_one_token_gives_eagers_shapes"),
    "linear": (*LAYER, "tests/linear/test_kernels.py::test_zero_or_one_token_gives_eagers_shapes"),
    "grads": (*LAYER, "tests/linear/test_kernels.py::test_gradients_that_are_not_needed_are_none"),
    "layer": (*LAYER, "tests/linear/test_kernels.py::test_error_budget[0]"),
    "gram": ("tests/pairs/test_pair_kernels.py::test_subsets_of_grams",),
    "solve": (
        "tests/methods/test_step.py::test_spd_solve_by_lapacks_ratio",
        "tests/methods/test_step.py::test_small_inverse",
    ),
    "hadamard": (
        "tests/methods/test_step.py::test_nnls_is_the_optimum",
        "tests/pairs/test_scalora_system.py::test_theorem_3",
    ),
    "cayley": (
        "tests/cayley/test_cayley.py::test_is_the_formula",
        "tests/cayley/test_cayley.py::test_within_the_error_budget",
    ),
    "step": (
        "tests/test_optim.py::test_plain_is_torchs_fused_adamw_to_the_bit",
        "tests/pairs/test_pair_kernels.py::test_step_is_torchs_adamw",
    ),
    "merge": (
        "tests/methods/test_step.py::test_scaling_leaves_the_effective_weight",
        "tests/pairs/test_pair_kernels.py::test_merge_of_every_rank",
    ),
}
OPS = tuple(TESTS)


def module(op: str) -> ModuleType:
    return importlib.import_module(f"suite.ops.bench_{op}")


def cases(ops: tuple[str, ...], scale: Scale) -> list[Case]:
    return [case for op in ops for case in module(op).cases(scale)]


def here() -> Setting:
    """A GPU with our kernels, or the CPU with their torch twins."""
    cuda = torch.cuda.is_available()
    return Setting(torch.device("cuda" if cuda else "cpu"), cuda)
