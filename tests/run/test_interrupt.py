"""Signals ask a loop to stop; the second one aborts; a program that outlives its terminal does not heed its end."""

import os
import signal

import pytest

from satchel.run.interrupt import SIGNALS, Interrupt


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_aborts(number):
    notes = []
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Interrupt(notes.append) as interrupt:
        os.kill(os.getpid(), number)
        assert interrupt.asked and len(notes) == 1
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal here")
def test_a_program_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(print) as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.asked
    finally:
        signal.signal(signal.SIGHUP, before)
