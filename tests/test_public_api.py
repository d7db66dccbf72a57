"""The public functions called with wrong arguments: each call is right, or refused by an error of this library that is
not too long, before anything has changed. Foreign errors and wrong results are faults."""

import random
import warnings
from collections import Counter

import pytest
from public_calls import rows

import lora_fast as lf

NAMED = (lf.ArgumentError, lf.BackendError, lf.MissingPackageError)
LONGEST = 2000  # characters of a message
CALLS = [  # backend and number of calls, which a seed chooses; None for all
    pytest.param("torch", 5000, id="torch"),
    pytest.param("triton", 700, id="triton"),
    pytest.param("torch", None, id="all-torch", marks=pytest.mark.budget),
    pytest.param("triton", None, id="all-triton", marks=pytest.mark.budget),
]


def test_every_public_function_is_called(tmp_path):
    named = {word for row in rows(tmp_path, "torch") for word in row.name.replace(".", " ").split()}
    modules = (lf, lf.functional, lf.methods, lf.metrics, lf.optim, lf.hf)
    public = {name: getattr(module, name) for module in modules for name in module.__all__}
    records = {"AdapterStats", "BoundStats", "LinearMember", "Report", "StepWork"}
    without_arguments = {"RefLoRA", "ExactCheckpoints"}  # the latter is a mixin of Trainer
    errors = {name for name, value in public.items() if isinstance(value, type) and issubclass(value, Exception)}
    functions = {name for name, value in public.items() if callable(value)}
    assert functions - records - without_arguments - errors <= named


def outcome(row, argument, replacement):
    """Returns "right", "named", "foreign" or "silent", and what tells more."""
    try:
        is_right, result = row.run(argument, replacement)
    except NAMED as error:
        return ("named", "") if len(str(error)) < LONGEST else ("foreign", f"a message of {len(str(error))} characters")
    except Exception as error:
        return "foreign", f"{type(error).__name__}: {str(error)[:200]}"
    return ("right", "") if is_right else ("silent", type(result).__name__)


@pytest.mark.parametrize("backend, number", CALLS)
def test_wrong_arguments_are_refused_by_name(backend, number, tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    counts, faults = Counter(), []
    with lf.set_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = [(row, *call) for row in rows(tmp_path, backend) for call in row.calls()]
        for row, argument, replacement in calls if number is None else random.Random(0).sample(calls, number):
            kind, detail = outcome(row, argument, replacement)
            counts[kind] += 1
            if kind in ("foreign", "silent"):
                faults.append(f"{kind}: {row.name}({argument}={replacement}): {detail}")
    record_property(f"public functions with wrong arguments, {backend}", dict(counts))
    assert sum(counts.values()) >= 500 and not faults, "\n".join(faults)
