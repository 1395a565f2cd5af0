"""Numbers as people read them."""

import math


def short(count: float, unit: str = "") -> str:
    """A large number with its prefix and unit, three digits: 7.06 GB."""
    power = min(int(math.log10(count) // 3), 5) if count >= 1000 else 0
    value = count / 1000**power
    digits = 0 if value >= 100 or power == 0 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {' kMGTP'[power].strip()}{unit}".strip()
