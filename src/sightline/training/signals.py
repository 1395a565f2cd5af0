"""Being asked to stop: a TERM or INT is remembered until the step in hand is done."""

import signal
import sys
import time
from types import FrameType
from typing import Any


class Signals:
    """Within this context a first TERM or INT only sets `caught`; a second one ends the process at once.

    What comes within a moment of the first is the same wish: a terminal or Slurm signals all processes, and then
    torchrun those that it started.
    """

    ASKED = (signal.SIGTERM, signal.SIGINT)
    MOMENT = 0.5  # seconds

    def __init__(self) -> None:
        self.caught, self.when = 0, 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        try:
            for number in self.ASKED:
                self.before[number] = signal.signal(number, self._catch)
        except ValueError:  # only the main thread can catch them; elsewhere they stay with whoever has them
            pass
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught and time.monotonic() - self.when > self.MOMENT:
            sys.exit(128 + number)
        if not self.caught:
            self.caught, self.when = number, time.monotonic()

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave_to_parent() -> None:
    """For helper processes: a signal to the whole group is the trainer's to answer, which then ends them."""
    for number in Signals.ASKED:
        signal.signal(number, signal.SIG_IGN)
