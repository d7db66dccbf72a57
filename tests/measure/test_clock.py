"""Spreads of repeated measurements, interleaved turns, and the clock on a CPU."""

import time

import torch

from lora_fast.measure.clock import Clock, Spread, host_microseconds, rotated, turns, wall_seconds

CPU = torch.device("cpu")


def test_spread_is_the_median_and_two_percentiles():
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert spread == Spread(median=3.5, p20=2.0, p80=5.0)
    assert spread.percentiles == (2.0, 3.5, 5.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_turns_start_each_item_first_equally_often():
    assert [rotated("abc", turn) for turn in (-1, 0, 1, 3)] == [list("cab"), list("abc"), list("bca"), list("abc")]
    schedule = list(turns("ab", 2, warm_up=1))
    assert schedule == [(-1, "b"), (-1, "a"), (0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_clock_times_the_parts_between_marks():
    clock = Clock(CPU)
    time.sleep(0.02)
    clock.mark()
    clock.mark()
    slept, nothing = clock.seconds()
    assert slept >= 0.02 > nothing >= 0
    assert wall_seconds(lambda: time.sleep(0.02), CPU) >= 0.02


def test_host_microseconds_prepare_every_round_and_count_calls():
    rounds, calls = [], []
    times = host_microseconds({"a": (rounds.append, lambda: calls.append(0))}, rounds=4, warm_up=2, calls=3)
    assert rounds == [0, 1, 2, 3, 4, 5] and len(calls) == 18
    assert list(times) == ["a"] and times["a"] >= 0
