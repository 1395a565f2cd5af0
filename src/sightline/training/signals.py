"""Being asked to stop: a TERM or INT is remembered until the step in hand is done."""

import os
import signal
import sys
from types import FrameType
from typing import Any


class Signals:
    """Within this context a first TERM or INT only sets `caught`; a second one ends the process at once."""

    ASKED = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.caught = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        try:
            for number in self.ASKED:
                self.before[number] = signal.signal(number, self._catch)
        except ValueError:  # only the main thread can catch them; elsewhere they stay with whoever has them
            pass
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            sys.exit(128 + number)
        self.caught = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave_to_parent() -> None:
    """For helper processes: a signal to the whole group is the trainer's to answer, which then ends them.

    They leave the group instead of ignoring signals: a trainer that fails ends its helpers with TERM and waits.
    """
    os.setsid()
