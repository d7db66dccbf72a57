"""Keeps the trainers' garbage collections short."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """Freezes what a module's imports have made. Every run of a Trainer collects garbage several times, which would
    search through all imported libraries and take longer than the run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
