"""Where this program keeps what it can make again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/sightline`, or `~/.cache/sightline` where that is unset or, against its rules, relative.

    RuntimeError for a user without a home folder.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "sightline"
