"""Judges the problems beside it: many answers are right, so no comparison with one of them would do."""

import re


def verify(problem: dict, completion: str) -> bool:
    """Whether the first number of the completion is even and larger than the one that the problem names."""
    number = re.search(r"\d+", completion)
    return number is not None and int(number[0]) % 2 == 0 and int(number[0]) > problem["metadata"]["above"]
