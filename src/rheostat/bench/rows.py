"""The rows of a benchmark's result."""

import statistics
from collections.abc import Sequence
from typing import Any


def row(case: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    """The median of the repetitions' values, and their range."""
    value, low, high = (round(number, 4) for number in (statistics.median(values), min(values), max(values)))
    return {"case": case, "value": value, "unit": unit, "low": low, "high": high}
