"""Short questions and worked steps for reasoning-gym items: what a chain-of-thought prompt shows in its examples.

Each function reads an item's ``metadata``. Steps end where the answer can be read off them.
"""

from collections.abc import Mapping
from typing import Any

Metadata = Mapping[str, Any]


def ask_gcd(metadata: Metadata) -> str:
    first, second = metadata["numbers"]
    return f"Greatest common divisor of {first} and {second}?"


def ask_countdown(metadata: Metadata) -> str:
    return f"Make {metadata['target']} from {' and '.join(map(str, metadata['numbers']))}."


def ask_bits(metadata: Metadata) -> str:
    return f"How many 1 bits has {metadata['number']} in binary?"


def binary_digits(metadata: Metadata) -> str:
    """5: ``1 0 1``."""
    return " ".join(metadata["binary"])


def keep_or_remove(metadata: Metadata) -> str:
    """['11', '5', '15'] without what is larger than 12: ``11 keep, 5 keep, 15 remove``."""
    kept = set(metadata["result"])
    return ", ".join(f"{number} {'keep' if number in kept else 'remove'}" for number in metadata["original_numbers"])
