"""The two modules of a family of ops, kernels and torch twins, have the same functions with the same arguments."""

import inspect

import pytest

from lora_fast import backend


@pytest.mark.parametrize("family", ["linear", "pairs", "cayley"])
def test_families_have_the_same_functions_and_signatures(family):
    kernels, twins = (backend.load_ops(family, triton) for triton in (True, False))
    assert sorted(kernels.__all__) == sorted(twins.__all__)
    for name in kernels.__all__:
        arguments = [
            [(p.name, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]
            for module in (kernels, twins)
        ]
        assert arguments[0] == arguments[1], name
