"""Runs functions in threads that switch as often as Python allows, so that races occur within a second."""

import sys
import threading
from collections.abc import Callable

SWITCH_SECONDS = 1e-6


def run_together(*functions: Callable) -> None:
    """Calls each function in a thread of its own, all at the same time, and raises the first error of any of them."""
    start, errors = threading.Barrier(len(functions)), []

    def run(function: Callable) -> None:
        start.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(function,)) for function in functions]
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(before)
    if errors:
        raise errors[0]
