"""MIXED as a token policy: actions uniform, tokens distributed as the mean of the strategies' distributions."""

from math import log

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rheostat.baselines.uniform import UniformMixture
from rheostat.decoding.policy import StepState
from rheostat.decoding.strategy import ActionSpace, Strategy
from rheostat.seeding import derive_seed

SPACE = ActionSpace((Strategy(0), Strategy(1.0, top_k=2), Strategy(2.0)))


def state_of(count: int, t: int = 0) -> StepState:
    zeros_S = torch.zeros(count, dtype=torch.int64)
    streams_S = np.array([derive_seed("uniform", i) for i in range(count)], dtype=np.uint64)
    return StepState(
        torch.zeros(1, 2),
        torch.zeros(1, 5),
        zeros_S,
        torch.arange(count),
        zeros_S + t,
        zeros_S + 9,
        zeros_S + 1,
        streams_S,
    )


def test_actions_are_uniform_and_say_so() -> None:
    decision = UniformMixture(SPACE).decide(state_of(6000))
    assert decision.parameters.temperature_K.tolist() == [0, 1, 2]
    assert decision.parameters.top_k_K.tolist() == [0, 2, 0]
    assert decision.log_pi_SK is not None
    torch.testing.assert_close(decision.log_pi_SK, torch.full((6000, 3), -log(3)))
    assert chisquare(torch.bincount(decision.choice_S, minlength=3).numpy()).pvalue > 1e-3


def test_actions_change_from_step_to_step_and_belong_to_the_stream() -> None:
    policy = UniformMixture(SPACE)
    choice_TS = torch.stack([policy.decide(state_of(2000, t)).choice_S for t in range(2)])
    pairs = torch.bincount(3 * choice_TS[0] + choice_TS[1], minlength=9)
    assert chisquare(pairs.numpy()).pvalue > 1e-3
    assert torch.equal(policy.decide(state_of(50, 1)).choice_S, choice_TS[1, :50])


def test_the_key_names_the_actions() -> None:
    keys = {UniformMixture(ActionSpace(SPACE.strategies[:n])).key for n in (2, 3)}
    assert len(keys) == 2
    assert UniformMixture(SPACE).key in keys


@pytest.mark.parametrize("actions", [1, 2])
def test_any_number_of_actions(actions: int) -> None:
    decision = UniformMixture(ActionSpace(SPACE.strategies[:actions])).decide(state_of(200))
    assert set(decision.choice_S.tolist()) == set(range(actions))
