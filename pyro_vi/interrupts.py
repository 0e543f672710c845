"""Ctrl-C as a request: the first ends what runs at its next step, a second one ends it at once."""

from __future__ import annotations

__all__ = ["Interruption", "interruptible"]

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


class Interruption:
    """Whether Ctrl-C was pressed.

    Attributes:
        requested: whether it was, since the outermost `interruptible` began.
    """

    def __init__(self) -> None:
        self.requested = False

    def handle(self, number: int, frame: Any) -> None:
        """Handles SIGINT.

        Raises:
            KeyboardInterrupt: it is the second one.
        """
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("interrupted: this step is the last one; Ctrl-C again stops at once")


_current: Interruption | None = None


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Within it the first SIGINT is a request, and the second one raises KeyboardInterrupt.

    What runs within asks `Interruption.requested` between its steps. Within another one it gives
    the same object. Outside of the main thread, and where SIGINT has a handler of the user's, it
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
        _current = Interruption()
        signal.signal(signal.SIGINT, _current.handle)
        try:
            yield _current
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _current = None
