"""Ctrl-C while a loop runs: the first asks it to stop at the next whole step, the second aborts it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """A context manager; `asked` turns true at the first signal. Does nothing outside of the main thread."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.asked = False
        self._note = note
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._note("stopping after this step and saving; once more to abort at once")
