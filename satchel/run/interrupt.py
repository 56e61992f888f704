"""Ctrl-C while a loop runs: the first asks it to stop at the next whole step, the second aborts it.

So do SIGTERM, and SIGHUP: the terminal was closed. A program that was started to outlive it (nohup) goes on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupt:
    """A context manager; `asked` turns true at the first signal. Does nothing outside of the main thread."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.asked = False
        self._note = note
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._ask) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._note("stopping after this step and saving; once more to abort at once")
