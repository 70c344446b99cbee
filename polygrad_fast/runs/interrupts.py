"""What Ctrl-C does: it ends a training after its current update, and what comes before at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MESSAGE = b"\nstopping after the current update, press Ctrl-C again to stop at once\n"


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None], signals: Iterable[int]) -> Iterator[list[int]]:
    """Call `stop` at the first of the signals and say so on stderr; a second Ctrl-C raises
    KeyboardInterrupt at once.

    Signals that the process ignores, as one that a script started in the background does Ctrl-C,
    stay ignored. Outside the main thread, where Python takes no signals, this does nothing.

    Yields:
        A list that the signals which came are added to.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        received.append(number)
        stop()
        with contextlib.suppress(OSError):
            os.write(2, MESSAGE)  # print() may not be called again from within itself

    with _handled(signals, handle):
        yield received


@contextlib.contextmanager
def end_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once and in a sentence, where nothing is lost by that.

    A KeyboardInterrupt would do less: raised while torch is imported, or does what it puts off to
    its first use, it can abort the process, become an ImportError, or be swallowed.
    """

    def end(number: int, frame: object) -> None:
        with contextlib.suppress(OSError):
            os.write(2, b"polygrad-fast: interrupted\n")
        os._exit(130)

    with _handled([signal.SIGINT], end):
        yield


@contextlib.contextmanager
def _handled(signals: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle those of the signals that are not ignored, if this is the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in {*signals}:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
