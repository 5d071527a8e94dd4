"""The paper's candidate pool (Table 10), the action spaces it selected (Tables 11 to 14), and the demo's."""

import tomllib
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from rheostat.decoding.strategy import ActionSpace, Order, Strategy
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
DEMO = ActionSpace(  # SmolLM2 on the demo's mixture: what `rheostat select` chose on 480 validation problems
    (
        GREEDY,
        Strategy(1.25, 5, 0.9, 0.2),
        Strategy(1.0, None, 0.9, 0.1),
        Strategy(0.75, None, None, 0.1),
        Strategy(1.25, None, None, 0.1),
        Strategy(0.5, None, None, 0.2),
    )
)

NAMED_SPACES = {"table11": TABLE_11, "table12": TABLE_12, "table13": TABLE_13, "table14": TABLE_14, "demo": DEMO}


def strategies_named(names: Sequence[str]) -> tuple[Strategy, ...]:
    """Strategies from names of spaces (``table13``, ``demo``), ``grid``, files (see :func:`read_space`) and strings.

    Raises:
        ConfigError: an unknown name, or a file that cannot be read.
    """
    found: list[Strategy] = []
    for name in names:
        if name in NAMED_SPACES:
            found += NAMED_SPACES[name].strategies
        elif name == "grid":
            found += candidate_grid()
        elif name.endswith(".toml"):
            found += read_space(Path(name)).strategies
        elif "=" in name or name == "greedy":
            found.append(Strategy.parse(name))
        else:
            known = ", ".join([*NAMED_SPACES, "grid"])
            raise ConfigError(
                f"strategies: unknown name {name!r}; use {known}, FILE.toml, or write them like 'T=0.75,k=10'"
            )
    return tuple(found)


def space_named(names: Sequence[str], order: Order) -> ActionSpace:
    """The action space of these names (see :func:`strategies_named`) in this order of transforms.

    Raises:
        ConfigError: as there, no strategy, one of them twice, or a file that was written for the other order.
    """
    for name in names:
        if name.endswith(".toml") and (given := read_space(Path(name))).order != order:
            raise ConfigError(f"strategies: {name} was chosen under order {given.order}; set order to that")
    return ActionSpace(strategies_named(names), order)


def read_space(path: Path) -> ActionSpace:
    """An action space from a TOML file: ``strategies``, a list of names, or a ``[grid]`` of lists; and ``order``.

    A grid has ``temperature`` and where wanted ``top_k``, ``top_p``, ``min_p``, ``top_n_sigma``; 0 in these four means
    off.

    Raises:
        ConfigError: it cannot be read, or holds neither; names the file.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        order = Order(content.get("order", Order.VLLM))
        if "grid" in content:
            limits = (content["grid"].get(name, [0]) for name in ("top_k", "top_p", "min_p", "top_n_sigma"))
            grid = product(content["grid"]["temperature"], *limits)
            return ActionSpace(tuple(Strategy(t, *(limit or None for limit in own)) for t, *own in grid), order)
        return ActionSpace(tuple(Strategy.parse(name) for name in content["strategies"]), order)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path}: strategies = ['T=0.5', ...], or [grid] with temperature = [0.5, 1.0], top_k, top_p, min_p, "
            f"top_n_sigma; order = 'vllm' or 'transformers' ({type(error).__name__}: {error})"
        ) from error
