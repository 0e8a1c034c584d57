"""Signals set an event first; what a second one does."""

import os
import signal
import threading

import pytest

from training.interrupts import Terminated, stops_gently


def test_the_first_signal_sets_the_event_and_the_second_ends_at_once() -> None:
    stop = threading.Event()
    with stops_gently(stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_worker_that_saves_is_not_interrupted_by_a_second_signal() -> None:
    stop = threading.Event()
    try:
        with stops_gently(stop, quiet=True):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        pytest.fail("it was interrupted")
    assert stop.is_set()


def test_after_sigterm_the_interruption_is_a_termination() -> None:
    stop = threading.Event()

    def terminated() -> None:
        with stops_gently(stop, quiet=True):
            os.kill(os.getpid(), signal.SIGTERM)
            raise KeyboardInterrupt

    with pytest.raises(Terminated):
        terminated()


def test_the_handlers_of_before_are_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stops_gently(threading.Event()):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
