"""Stopping a run from outside without losing it: Ctrl-C (SIGINT) and a scheduler's SIGTERM become a request."""

import os
import signal
import threading


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
        self.requested = True
        self._restore()
        # not print: the signal may have come in the middle of one, and a buffered stream cannot be entered twice
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step (again: at once)\n".encode())

    def _restore(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
