"""What the model card of an adapter is made from: its part of the results of a run."""

from typing import Any

from rheostat.reports import reading
from rheostat.reports.reading import SINGLE, Results


def measured_of(results: Results, policy: str) -> dict[str, Any]:
    """The metrics of an adapter's folder: its rows beside BEST and the best single strategy, its paired differences
    to both, and what it costs.

    Args:
        results: of the level that judged it.
        policy: its name there.
    """
    shown = (policy, "BEST", SINGLE)
    return {
        "rows": [dict(row) for row in reading.items(results, "rows") if row.get("policy") in shown],
        "differences": [
            dict(row)
            for row in reading.items(results, "differences")
            if row.get("policy") == policy and row.get("baseline") in ("BEST", SINGLE)
        ],
        "costs": [dict(row) for row in reading.items(results, "costs") if row.get("policy") in (policy, SINGLE)],
    }
