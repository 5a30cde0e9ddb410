"""Warm-up and cosine decay, a function of the step alone."""

from math import cos, pi

import pytest

from hiermpi.optimizer.rules import cosine as warmup_cosine

PEAK, LOWEST, WARMUP, END = 1e-3, 1e-4, 10, 110
SETTINGS = {"learning_rate": PEAK, "min_learning_rate": LOWEST, "warmup_steps": WARMUP, "decay_steps": END}


def rate(step, **changes):
    return warmup_cosine(step, **(SETTINGS | changes))


def test_the_first_step_already_learns():
    assert 0 < rate(0) < PEAK


def test_warm_up_is_linear():
    steps = [rate(step) for step in range(WARMUP + 1)]
    assert steps == pytest.approx([PEAK * (step + 1) / (WARMUP + 1) for step in range(WARMUP + 1)])


def test_the_peak_ends_the_warm_up():
    assert rate(WARMUP) == PEAK
    assert max(range(END + 5), key=rate) == WARMUP


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75])
def test_decay_is_half_a_cosine(share):
    step = WARMUP + int(share * (END - WARMUP))
    assert rate(step) == pytest.approx(LOWEST + (PEAK - LOWEST) * (1 + cos(pi * share)) / 2)


def test_decay_never_rises():
    rates = [rate(step) for step in range(WARMUP, END + 20)]
    assert rates == sorted(rates, reverse=True)


def test_the_minimum_stays():
    assert [rate(step) for step in (END, END + 1, 10**9)] == [LOWEST] * 3


def test_no_warm_up():
    assert rate(0, warmup_steps=0) == PEAK


@pytest.mark.parametrize("end", [0, WARMUP - 1, WARMUP])
def test_a_decay_that_ends_within_the_warm_up(end):
    assert rate(WARMUP - 1, decay_steps=end) == pytest.approx(PEAK * WARMUP / (WARMUP + 1))
    assert rate(WARMUP, decay_steps=end) == LOWEST


def test_a_constant_rate():
    assert {rate(step, warmup_steps=0, min_learning_rate=PEAK) for step in range(200)} == {PEAK}
