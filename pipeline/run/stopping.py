"""SIGTERM and SIGHUP do what Ctrl-C does, from a command's first moment to its last, and the end comes in time.

Ray installs handlers of its own for SIGTERM, the last of them in C++: a stack dump and abort(). So the signals are
blocked in every thread, which no handler can change, and a thread waits for them and wakes the main one. The standard
library alone is imported here: this comes before all that takes seconds to import.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

END_SECONDS = 7.5  # after the signal the process is ended, whatever it hangs in: it is to be gone after ten
WAKE_SECONDS = 1.0  # between two attempts to wake the main thread: a library may swallow an exception
WAKE = signal.SIGUSR2
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end. Ray may make a plain KeyboardInterrupt of it."""


_received: list[int] = []  # the signal that ends this process, once there is one
_last_words: list[Callable[[], str | None]] = []  # of what is at work, the outermost first


@contextlib.contextmanager
def at_the_last(leave: Callable[[], str | None]) -> Iterator[None]:
    """Within it, `leave` is called, in another thread, if the process is ended while it hangs; it may say how to go
    on."""
    _last_words.append(leave)
    try:
        yield
    finally:
        _last_words.remove(leave)


def interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C, or the signal, that `error` comes from; None if it comes from none."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def exit_code() -> int:
    """What a shell reports for a process ended by the signal that came; 130, that of Ctrl-C, if none did."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def how_to_go_on(error: BaseException) -> str | None:
    """What was noted on the interruption behind `error` by the outermost of what was at work."""
    return next(reversed(getattr(interruption(error), "__notes__", [])), None)


@contextlib.contextmanager
def raising_on_signals() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise Stopped in this thread, which must be the main one, wherever it is.

    Those that this process was started deaf to (nohup) stay unheard. While it ends no signal interrupts it any more,
    and after END_SECONDS it is ended.
    """
    waited = {number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, waited))
    listener = _Listener(waited)
    signal.signal(WAKE, listener.wake)
    threading.Thread(target=listener.listen, name="espalier-signals", daemon=True).start()
    try:
        yield
    finally:
        listener.over.set()


class _Listener:
    """Waits for the first of the signals, and sees to it that the process ends."""

    def __init__(self, waited: set[signal.Signals]) -> None:
        self.waited = waited
        self.over = threading.Event()  # nothing is to be interrupted any more
        self._main = threading.get_ident()

    def listen(self) -> None:
        _received.append(signal.sigwait(self.waited))
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            if not self.over.is_set():
                signal.pthread_kill(self._main, WAKE)
            time.sleep(WAKE_SECONDS)
        said: str | None = None
        for leave in reversed(_last_words):
            with contextlib.suppress(Exception):  # one that fails does not keep the others from it
                said = leave() or said
        line = f"espalier: interrupted; {said or 'give the same command again'}\n"
        os.write(2, line.encode())  # the main thread may hold the lock of sys.stderr
        os._exit(exit_code())

    def wake(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two of its steps: raises unless it is ending already."""
        if not _received or self.over.is_set():
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if interruption(sys.exception()) is None:
            raise Stopped(signal.Signals(_received[0]).name)
