"""Strategies and action spaces: what can be written, read back, and what is refused by name."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rheostat.decoding.spaces import candidate_grid
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.errors import ConfigError

ANY_STRATEGY = st.builds(
    Strategy,
    temperature=st.floats(0, 1e6),
    top_k=st.none() | st.integers(1, 10**9),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    min_p=st.none() | st.floats(0, 1),
    top_n_sigma=st.none() | st.floats(0, 1e6, exclude_min=True),
)


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        (Strategy(0), "greedy"),
        (Strategy(), "T=1"),
        (Strategy(0.75, 10, 0.95, 0.1), "T=0.75,k=10,p=0.95,m=0.1"),
        (Strategy(1.25, None, 0.9), "T=1.25,p=0.9"),
        (Strategy(0.1234567), "T=0.1234567"),
        (Strategy(1.5, top_n_sigma=1), "T=1.5,s=1"),
        (Strategy(0.75, 10, 0.95, 0.1, 1.5), "T=0.75,k=10,p=0.95,m=0.1,s=1.5"),
    ],
)
def test_text(strategy: Strategy, text: str) -> None:
    assert str(strategy) == text
    assert Strategy.parse(text) == strategy


@given(st.sampled_from(candidate_grid()) | ANY_STRATEGY)
def test_text_and_dict_round_trips(strategy: Strategy) -> None:
    assert Strategy.parse(str(strategy)) == strategy
    assert Strategy.from_dict(strategy.to_dict()) == strategy


@given(ANY_STRATEGY, ANY_STRATEGY)
def test_different_strategies_have_different_texts(left: Strategy, right: Strategy) -> None:
    """A request's random stream is keyed by the text."""
    assert (str(left) == str(right)) == (left == right)


def test_a_dict_without_top_n_sigma_is_as_it_was_before_there_was_one() -> None:
    """Keys of stored rollouts and adapters' files hold these."""
    assert Strategy(1, 5).to_dict() == {"temperature": 1.0, "top_k": 5, "top_p": None, "min_p": None}
    assert Strategy(1, top_n_sigma=2).to_dict()["top_n_sigma"] == 2


def test_neighbouring_temperatures_have_different_texts() -> None:
    assert str(Strategy(0.75)) != str(Strategy(math.nextafter(0.75, 1)))


def test_long_names_and_blanks_are_read() -> None:
    assert Strategy.parse(" temperature=0.5 , top_k=3, top_p=0.8 ,min_p=0.05") == Strategy(0.5, 3, 0.8, 0.05)
    assert Strategy.parse(" greedy ") == Strategy(0)
    assert Strategy.parse("T=0") == Strategy(0)
    assert Strategy.parse("k=4") == Strategy(1.0, 4)
    assert Strategy.parse("T=2,top_n_sigma=1.5") == Strategy(2, top_n_sigma=1.5)


def test_greedy_drops_the_truncations() -> None:
    greedy = Strategy(0, 5, 0.9, 0.1, 1.0)
    assert greedy == Strategy(temperature=0.0)
    assert hash(greedy) == hash(Strategy(0))
    assert greedy.is_greedy
    assert not greedy.is_truncated
    assert greedy.to_dict() == {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}


def test_what_is_off_is_none() -> None:
    assert Strategy(1, None, 1, 0) == Strategy(1.0)
    assert not Strategy(1, None, 1, 0).is_truncated
    assert Strategy(1, 5.0) == Strategy(1, 5)  # type: ignore[arg-type]
    assert isinstance(Strategy(1, 5.0).top_k, int)  # type: ignore[arg-type]
    for strategy in (Strategy(1, 5), Strategy(1, None, 0.9), Strategy(1, None, None, 0.1), Strategy(1, top_n_sigma=9)):
        assert strategy.is_truncated
        assert not strategy.is_greedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", v) for v in (-0.1, math.nan, math.inf, "1", None, True, [1])],
        *[("top_k", v) for v in (0, -1, 2.5, math.nan, math.inf, "5", False)],
        *[("top_p", v) for v in (0, -0.1, 1.0001, math.nan, math.inf, "0.9", True)],
        *[("min_p", v) for v in (-0.1, 1.1, math.nan, math.inf, "0.1", False)],
        *[("top_n_sigma", v) for v in (0, -1, math.nan, math.inf, "1", True)],
    ],
)
def test_a_bad_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        Strategy(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=field):
        Strategy.from_dict({field: value})


@pytest.mark.parametrize(
    "text", ["", "T", "hot", "T=", "T=a", "k=2.5", "q=1", "T=1,,k=2", "T=1 k=2", "GREEDY", "T=1;k=2"]
)
def test_text_that_is_no_strategy(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(text))):
        Strategy.parse(text)


def test_a_field_written_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        Strategy.parse("T=1,temperature=0.5")


def test_out_of_range_text_names_the_field() -> None:
    with pytest.raises(ConfigError, match="top_p"):
        Strategy.parse("T=1,p=2")


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ConfigError, match="topk"):
        Strategy.from_dict({"temperature": 1.0, "topk": 5})


def test_a_strategy_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Strategy(1.0).temperature = 2.0  # type: ignore[misc]


def test_action_space_keeps_its_order() -> None:
    strategies = (Strategy(1), Strategy(0), Strategy(0.5))
    space = ActionSpace(strategies)
    assert tuple(space) == strategies
    assert len(space) == 3
    assert space.order is Order.VLLM


def test_action_space_refuses_nothing_and_repetition() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        ActionSpace(())
    with pytest.raises(ConfigError, match=re.escape("'greedy' is listed twice")):
        ActionSpace((Strategy(0), Strategy(1), Strategy(0, 5)))  # the same one after normalisation


def test_action_space_order_is_checked() -> None:
    assert ActionSpace((Strategy(),), "transformers").order is Order.TRANSFORMERS  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"llama\.cpp"):
        ActionSpace((Strategy(),), "llama.cpp")  # type: ignore[arg-type]
