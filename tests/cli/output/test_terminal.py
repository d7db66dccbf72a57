"""The display of a run in a terminal."""

import io

import rich.console

from lora_fast.cli.output.terminal import Display


def test_display_shows_how_much_of_the_bounds_is_used():
    display = Display()
    display.console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=80)
    with display.training("nb-lora", ["nb-lora"], total=2, done=0):
        display.step(1, 1.0, 1.0)
        display.bounds([0.25, 0.75])
    assert "mean 50.0%, most 75.0%" in display.console.file.getvalue()
