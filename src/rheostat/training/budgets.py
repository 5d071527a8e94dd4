"""The parallel budgets B that training draws from, as configurations hold them."""

from typing import Annotated

from pydantic import AfterValidator


def _rising(budgets: tuple[int, ...]) -> tuple[int, ...]:
    if not budgets or min(budgets) < 1 or list(budgets) != sorted(set(budgets)):
        raise ValueError("parallel budgets must be whole numbers of at least 1 in rising order")
    return budgets


ParallelBudgets = Annotated[tuple[int, ...], AfterValidator(_rising)]
"""Whole numbers of at least 1, each larger than the one before."""
