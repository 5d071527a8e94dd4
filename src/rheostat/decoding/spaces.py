"""The paper's candidate pool (Table 10) and the action spaces it selected (Tables 11 to 14)."""

from itertools import product

from rheostat.decoding.strategy import ActionSpace, Strategy
from rheostat.errors import ConfigError


def candidate_grid() -> tuple[Strategy, ...]:
    """The 5 × 4 × 3 × 3 = 180 candidate strategies of Table 10 (greedy is not among them)."""
    return tuple(
        Strategy(temperature, top_k, top_p, min_p)
        for temperature, top_k, top_p, min_p in product(
            (0.3, 0.5, 0.75, 1.0, 1.25), (5, 10, 50, None), (0.9, 0.95, None), (0.1, 0.2, None)
        )
    )


GREEDY = Strategy(temperature=0)

TABLE_11 = ActionSpace(  # mathematics
    (
        Strategy(0.75, None, 0.9, 0.1),
        Strategy(1.0, None, 0.9),
        Strategy(1.25, 10, 0.9),
        Strategy(1.0, 5, 0.9),
        Strategy(1.25, 50, 0.9),
        Strategy(1.25),
    )
)
TABLE_12 = ActionSpace(  # code
    (
        Strategy(1.25, None, 0.95, 0.1),
        Strategy(1.25, None, 0.95, 0.2),
        Strategy(1.0, None, 0.95, 0.2),
        Strategy(1.25, 50, 0.9, 0.1),
        Strategy(1.25, 5, 0.9),
        Strategy(0.75, 5, None, 0.1),
    )
)
TABLE_13 = ActionSpace(  # mathematics and code together
    (
        Strategy(0.5),
        Strategy(1.0),
        Strategy(1.25),
        Strategy(0.75, 10),
        Strategy(0.75, 10, 0.95, 0.1),
        GREEDY,
    )
)
TABLE_14 = ActionSpace((GREEDY, Strategy(0.5), Strategy(1.0), Strategy(1.25)))  # token level, mathematics

NAMED_SPACES = {"table11": TABLE_11, "table12": TABLE_12, "table13": TABLE_13, "table14": TABLE_14}


def strategies_named(names: tuple[str, ...]) -> tuple[Strategy, ...]:
    """Strategies from a table's name (``table13``), from ``grid``, or from written strategies."""
    if len(names) == 1 and names[0] in NAMED_SPACES:
        return NAMED_SPACES[names[0]].strategies
    if names == ("grid",):
        return candidate_grid()
    for name in names:
        if "=" not in name and name != "greedy":
            known = ", ".join([*NAMED_SPACES, "grid"])
            raise ConfigError(f"strategies: unknown name {name!r}; use {known}, or write them like 'T=0.75,k=10'")
    return tuple(Strategy.parse(name) for name in names)
