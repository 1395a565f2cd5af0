"""Being asked to stop: a TERM, INT or USR1 is remembered until the step in hand is done."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any


class Signals:
    """Within this context a first TERM, INT or USR1 only sets `caught`; a second one ends the process within a second.

    What comes within a moment of the first is the same wish: a terminal or Slurm signals all processes, and then
    torchrun those that it started.
    """

    ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    MOMENT = 0.5  # seconds
    GRACE = 0.4  # seconds that a second one leaves for tidying up

    def __init__(self) -> None:
        self.caught, self.when = 0, 0.0
        self.before: dict[int, Any] = {}
        self.left = threading.Event()

    def __enter__(self) -> "Signals":
        try:
            for number in self.ASKED:
                self.before[number] = signal.signal(number, self._catch)
        except ValueError:  # only the main thread can catch them; elsewhere they stay with whoever has them
            return self
        heard, self.told = os.pipe()
        os.set_blocking(self.told, False)
        self.woken = signal.set_wakeup_fd(self.told, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(heard,), daemon=True).start()
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught and time.monotonic() - self.when > self.MOMENT:
            sys.exit(128 + number)
        if not self.caught:
            self.caught, self.when = number, time.monotonic()

    def _watch(self, heard: int) -> None:
        """End the process after a second signal also where `_catch` cannot: it waits for what the main thread computes.

        A write that this cuts short is one that a kill could have cut short.
        """
        first = 0.0
        while told := os.read(heard, 1):
            if told[0] not in self.ASKED:
                continue
            first = first or time.monotonic()
            if time.monotonic() - first > self.MOMENT and not self.left.wait(self.GRACE):
                os._exit(128 + told[0])
        os.close(heard)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.before:
            signal.set_wakeup_fd(self.woken)
            self.left.set()
            os.close(self.told)


def leave_to_parent() -> None:
    """For processes that end by themselves or are ended: what is sent to the whole group is not theirs to answer."""
    for number in Signals.ASKED:
        signal.signal(number, signal.SIG_IGN)
