"""A stop is a wish: what is under way is finished, whoever asks."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from wanloom.signals import STOPS, StopSignal, ended_by_ctrl_c


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


SWALLOWED = """
import os, signal
from wanloom.signals import ended_by_ctrl_c
with ended_by_ctrl_c(says={says}):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:  # as a library does
        print("swallowed")
print("went on")
"""


@pytest.mark.parametrize(("says", "code", "said"), [(True, 130, "\nwanloom: Stopped.\n"), (False, -signal.SIGINT, "")])
def test_before_there_is_anything_to_lose_ctrl_c_ends_the_process(says, code, said):
    """A KeyboardInterrupt would be lost in the middle of an import, and is not raised while a library waits."""
    found = subprocess.run([sys.executable, "-c", SWALLOWED.format(says=says)], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (code, "", said)


def test_ctrl_c_is_what_it_was_after_that():
    before = signal.getsignal(signal.SIGINT)
    with ended_by_ctrl_c():
        assert signal.getsignal(signal.SIGINT) != before
        with StopSignal("this step") as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == before
    entered = []

    def elsewhere() -> None:  # only the first thread of a process may say what a signal does
        with ended_by_ctrl_c():
            entered.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert entered == [before]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ended_by_ctrl_c():
            os.kill(os.getpid(), signal.SIGINT)  # ignored as before
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_of_another_program_may_train():
    """Python sets handlers in the main thread only: elsewhere the signals are left to whose thread it is."""
    found, before = [], signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with StopSignal("this step") as stop:
            found.append((stop.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]
