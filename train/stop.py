"""Stopping a run from outside without losing it: Ctrl-C (SIGINT) and a scheduler's SIGTERM become a request."""

import os
import signal
import threading
import time

# torchrun passes on to its processes the Ctrl-C that the terminal has given them already: these two are one
_SAME = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0  # seconds


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; the second acts as it did before.

    The loop looks at `requested` between steps, so it always stops with whole weights. Outside the main thread,
    where Python takes no signals, nothing is caught and `requested` stays False.
    """

    def __init__(self):
        self.requested = False
        self._handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception):
        self._restore()

    def _request(self, number, frame):
        if self.requested:
            if time.monotonic() - self._first > _SAME:
                self._restore()
                signal.raise_signal(number)
            return
        self.requested, self._first = True, time.monotonic()
        if not _SAME:
            self._restore()
        # not print: the signal may have come in the middle of one, and a buffered stream cannot be entered twice
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step (again: at once)\n".encode())

    def _restore(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
