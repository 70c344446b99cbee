"""Signals that end a training after its current update instead of in the middle of it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

MESSAGE = b"\nstopping after the current update, press Ctrl-C again to stop at once\n"


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None], signals: Iterable[int]) -> Iterator[list[int]]:
    """Call `stop` at the first of the signals and say so on stderr; a second Ctrl-C raises
    KeyboardInterrupt at once.

    Outside the main thread, where Python takes no signals, this does nothing.

    Yields:
        A list that the signals which came are added to.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        received.append(number)
        stop()
        with contextlib.suppress(OSError):
            os.write(2, MESSAGE)  # print() may not be called again from within itself

    before = {number: signal.signal(number, handle) for number in {*signals}}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
