"""Requests to stop: where they come from, and that the handlers are given back."""

import os
import signal
import threading

import pytest

from hiermpi.signals import STOP_SIGNALS, NeverStop, StopRequests


def handlers():
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_handlers_are_given_back(error):
    before = handlers()
    try:
        with StopRequests():
            assert handlers() != before
            if error:
                raise error
    except ZeroDivisionError:
        pass
    assert handlers() == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request(number):
    with StopRequests() as stopping:
        assert not stopping.requested()
        os.kill(os.getpid(), number)
        assert stopping.requested()
        assert stopping.reason == number.name


def test_the_second_interrupt_ends_the_process():
    with StopRequests(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_file_and_the_time():
    with StopRequests(lambda: True) as stopping:
        assert stopping.requested()
        assert stopping.reason == "the STOP file"
    with StopRequests(seconds=-1.0) as stopping:
        assert stopping.requested()
        assert stopping.reason == "run.time_limit"


def test_another_thread_takes_no_signals():
    before, found = handlers(), []

    def ask():
        with StopRequests() as stopping:
            found.append((stopping.requested(), handlers()))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_never():
    with NeverStop() as stopping:
        assert not stopping.requested()
