"""A stop is a wish: what is under way is finished, whoever asks."""

import os
import signal

import pytest

from wanloom.signals import STOPS, StopSignal


@pytest.mark.parametrize("number", STOPS)
def test_the_first_signal_is_remembered_and_the_second_stops(number, capfd):
    with StopSignal("this step") as stop:
        os.kill(os.getpid(), number)
        assert stop.received == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert f"{number.name}: finishing this step" in capfd.readouterr().err


def test_a_closed_terminal_does_not_insist():
    """It sends several, and nobody is there to read what is said."""
    error, (reader, writer) = os.dup(2), os.pipe()
    os.close(reader)
    os.dup2(writer, 2)  # writing there is an error
    try:
        with StopSignal("this step") as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == signal.SIGHUP
    finally:
        os.dup2(error, 2)
        os.close(error)
        os.close(writer)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal("this step") as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
