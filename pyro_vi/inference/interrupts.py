"""Ctrl-C: the first press stops training after the current step, the second stops at once."""

from __future__ import annotations

__all__ = ["Interruption", "interruptible"]

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interruption:
    """Whether Ctrl-C was pressed.

    Attributes:
        requested: whether it was pressed since the outermost `interruptible` began.
    """

    def __init__(self) -> None:
        self.requested = False

    def handle(self, number: int, frame: Any) -> None:
        """Handles SIGINT.

        Raises:
            KeyboardInterrupt: it is the second one. Python's own handler is back by then.
        """
        if self.requested:
            _reset()
            raise KeyboardInterrupt
        self.requested = True


_current: Interruption | None = None


def _reset() -> None:
    """Makes Python's own handler that of SIGINT again.

    In this order: a signal that arrives in between finds a handler that leaves nothing behind.
    """
    global _current
    _current = None
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Within it the first SIGINT is a request, and the second one raises KeyboardInterrupt.

    Code inside checks `Interruption.requested` between its steps. A nested call gives the outer
    object. Outside of the main thread, and where the user has installed a handler of SIGINT, it
    changes nothing.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield Interruption()
    elif _current is not None:
        yield _current
    elif signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield Interruption()
    else:
        interruption = Interruption()
        try:
            signal.signal(signal.SIGINT, interruption.handle)
            _current = interruption
            yield interruption
        finally:
            if signal.getsignal(signal.SIGINT) == interruption.handle:
                _reset()
