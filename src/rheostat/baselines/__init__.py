"""What is not learned, behind the same protocols as adapters."""

from enum import StrEnum


class Baseline(StrEnum):
    """A rival with something to choose, which `rheostat evaluate --baselines` does on validation."""

    TURN = "turn"
    EDT = "edt"
    DYNAMIC = "dynamic"
