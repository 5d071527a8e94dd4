"""Short questions and worked steps for reasoning-gym items: what a chain-of-thought prompt shows in its examples.

Each function reads an item's ``metadata``. Steps end where the answer can be read off them.
"""

from collections.abc import Mapping
from typing import Any

Metadata = Mapping[str, Any]


def ask_gcd(metadata: Metadata) -> str:
    first, second = metadata["numbers"]
    return f"Greatest common divisor of {first} and {second}?"


def ask_sum(metadata: Metadata) -> str:
    return f"{metadata['expression']} = ?"


def partial_sums(metadata: Metadata) -> str:
    """4 - 1 - 7: ``4 - 1 = 3, 3 - 7 = -4``."""
    first, *rest = metadata["expression"].split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        value = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {value}")
        total = value
    return ", ".join(steps)


def keep_or_remove(metadata: Metadata) -> str:
    """['11', '5', '15'] without what is larger than 12: ``11 keep, 5 keep, 15 remove``."""
    kept = set(metadata["result"])
    return ", ".join(f"{number} {'keep' if number in kept else 'remove'}" for number in metadata["original_numbers"])
