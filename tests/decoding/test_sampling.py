"""``draw`` equals the inverse CDF of ``transform``, its reference, and belongs to the row alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from rheostat.decoding import support
from rheostat.decoding.policy import Decision, SamplingParameters
from rheostat.decoding.recording import token_log_probabilities
from rheostat.decoding.sampling import argmax, draw
from rheostat.decoding.spaces import candidate_grid
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.support import supports, take_rows
from rheostat.decoding.transforms import support_size, transform
from rheostat.decoding.weights import exponentiate
from rheostat.seeding import Purpose, derive_seed, uniforms

SIGMAS = (
    Strategy(1.5, top_n_sigma=0.5),
    Strategy(3.0, top_n_sigma=2.1),
    Strategy(0.75, 10, 0.9, top_n_sigma=1.0),
    Strategy(1.25, None, 0.9, 0.1, top_n_sigma=2.1),
    Strategy(1.0, 5, top_n_sigma=100.0),
)
ALL = (*candidate_grid(), Strategy(0), *SIGMAS)
BOUNDARY = 1e-5  # decision 3: nearer to a CDF boundary than this, rounding may decide
BELOW_ONE = 1 - 2.0**-53
both_ways = pytest.mark.usefixtures("way")
SPREADS = {"flat": 0.01, "mild": 1.0, "usual": 3.0, "peaked": 12.0}


def some_logits(size: int, spread: float, seed: int, rounded: bool) -> Tensor:
    logits_V = spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return logits_V.bfloat16().float() if rounded else logits_V


def some_uniforms(count: int, *name: str | int) -> Tensor:
    stream = np.full(count, derive_seed("test", *name), dtype=np.uint64)
    return torch.from_numpy(uniforms(stream, np.arange(count), Purpose.TOKEN))


def reference(probability_SV: Tensor, uniform_S: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse CDF in vocabulary order, and where it is not a matter of rounding."""
    cdf_SV = probability_SV.cumsum(-1)
    token_S = torch.searchsorted(cdf_SV, (uniform_S * cdf_SV[:, -1])[:, None], right=True).squeeze(1)
    safe_S = ((cdf_SV - uniform_S[:, None]).abs() > BOUNDARY).all(-1)
    return token_S, safe_S


class Fallbacks:
    """Counts the distributions whose support a few candidates settled, and those that needed the whole vocabulary."""

    def __init__(self) -> None:
        self.settled = self.open = 0

    def __call__(self, top_BK: Tensor, *args: object, complete: bool, **kwargs: object) -> tuple[Tensor, Tensor]:
        size_B, known_B = support_size(top_BK, *args, complete=complete, **kwargs)  # type: ignore[arg-type]
        self.settled += 0 if complete else int(known_B.sum())
        self.open += 0 if complete else int((~known_B).sum())
        return size_B, known_B


@pytest.fixture
def fallbacks(monkeypatch: pytest.MonkeyPatch) -> Fallbacks:
    counter = Fallbacks()
    monkeypatch.setattr(support, "support_size", counter)
    return counter


def check_against_reference(logits_BV: Tensor, order: Order, per_strategy: int = 3) -> float:
    """Draw under every strategy on every row; returns the share of draws that could be compared."""
    compared = total = 0
    parameters = SamplingParameters.of(ALL)
    rows = len(logits_BV)
    for row in range(rows):
        probability_AV = transform(logits_BV[row].expand(len(ALL), -1), parameters, order)
        choice_S = torch.arange(len(ALL)).repeat(per_strategy)
        uniform_S = some_uniforms(len(choice_S), logits_BV.shape[1], row, order.value)
        uniform_S[: len(ALL)], uniform_S[len(ALL) : 2 * len(ALL)] = 0, BELOW_ONE
        row_S = torch.full_like(choice_S, row)
        token_S = draw(logits_BV, row_S, Decision(parameters, choice_S), uniform_S, order)
        assert (probability_AV[choice_S].gather(1, token_S[:, None]) > 0).all()
        expected_S, safe_S = reference(probability_AV[choice_S], uniform_S)
        torch.testing.assert_close(token_S[safe_S], expected_S[safe_S])
        # at the ends of the unit interval the tokens are the first and the last of the support
        support_AV = probability_AV > 1e-6
        first_A = support_AV.int().argmax(1)
        assert (token_S[: len(ALL)] <= first_A).all()
        last_A = support_AV.shape[1] - 1 - support_AV.flip(1).int().argmax(1)
        assert (token_S[len(ALL) : 2 * len(ALL)] >= last_A).all()
        compared, total = compared + int(safe_S.sum()), total + len(safe_S) - 2 * len(ALL)
    return compared / total


@both_ways
@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("size", [2, 5, 17, 255, 256, 257, 272, 400])
@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bfloat16-ties"])
def test_equals_the_inverse_cdf(size: int, rounded: bool, order: Order) -> None:
    logits_BV = torch.stack([some_logits(size, spread, size, rounded) for spread in SPREADS.values()])
    assert check_against_reference(logits_BV, order) > 0.9


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("spread", SPREADS)
def test_fallback_to_the_whole_vocabulary(spread: str, order: Order, fallbacks: Fallbacks, way: str) -> None:
    """Flat logits keep more tokens than the candidates, and bfloat16 ties run past the last one."""
    logits_BV = torch.stack([some_logits(1200, SPREADS[spread], seed, rounded=True) for seed in range(2)])
    check_against_reference(logits_BV, order)
    if way == "compiled":
        assert fallbacks.settled == fallbacks.open == 0
    elif spread in ("flat", "mild"):
        assert fallbacks.open > {"flat": 50, "mild": 10}[spread]
    elif spread == "peaked":
        assert fallbacks.settled > 100
        assert fallbacks.open == 0


@pytest.mark.parametrize("order", Order)
def test_all_logits_equal(order: Order, fallbacks: Fallbacks, way: str) -> None:
    """Every cut falls among ties; top-p keeps the highest indices."""
    check_against_reference(torch.zeros(1, 700), order)
    assert fallbacks.open > 0 or way == "compiled"


@both_ways
@pytest.mark.parametrize("order", Order)
def test_impossible_tokens_are_never_drawn(order: Order) -> None:
    logits_BV = some_logits(600, 2.0, 5, rounded=False)[None].clone()
    logits_BV[0, 100:] = -torch.inf
    check_against_reference(logits_BV, order)
    logits_BV[0, :99] = -torch.inf
    check_against_reference(logits_BV, order)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("most", [4096, 280])
def test_top_k_beyond_the_candidates(
    order: Order, most: int, fallbacks: Fallbacks, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "_MOST_CANDIDATES", most)
    logits_BV = some_logits(900, 1.0, 8, rounded=True)[None]
    strategies = [
        Strategy(1.0, k, p, m)
        for k in (None, 1, 255, 256, 300, 899, 900, 5000)
        for p in (None, 0.9)
        for m in (None, 0.01)
    ]
    parameters = SamplingParameters.of(strategies)
    choice_S = torch.arange(len(strategies)).repeat(40)
    uniform_S = some_uniforms(len(choice_S), "k")
    token_S = draw(logits_BV, torch.zeros_like(choice_S), Decision(parameters, choice_S), uniform_S, order)
    probability_AV = transform(logits_BV.expand(len(strategies), -1), parameters, order)
    expected_S, safe_S = reference(probability_AV[choice_S], uniform_S)
    torch.testing.assert_close(token_S[safe_S], expected_S[safe_S])
    assert safe_S.float().mean() > 0.9
    # alone, or with a k below the candidates, a set looks at fewer candidates and must decide the same
    for index in range(len(strategies)):
        mine_S = choice_S == index
        alone = Decision(SamplingParameters.of([strategies[index]]), torch.zeros(40, dtype=torch.int64))
        again_S = draw(logits_BV, torch.zeros(40, dtype=torch.int64), alone, uniform_S[mine_S], order)
        torch.testing.assert_close(again_S[safe_S[mine_S]], token_S[mine_S & safe_S])
    assert fallbacks.open > 0 or way == "compiled"


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bfloat16-ties"])
def test_large_supports_are_those_of_the_reference(spread: float, rounded: bool, order: Order, way: str) -> None:
    """Thousands of tokens, in histograms whose bins hold hundreds, and beyond the last bin."""
    logits_BV = some_logits(6_000, spread, 4, rounded)[None]
    logits_BV[:, 5_000:5_500] -= 40
    logits_BV[:, 5_500:] = -torch.inf
    # no p lies where equal logits end, so that rounding decides nothing but the last two
    tails = [(None, p) for p in (0.30013, 0.90007, 0.99913, 1 - 1e-9, 1 - 2**-53)]
    tails += [(5_200, 0.90007), (5_000, 0.90007, 1e-3), (None, 0.90007, 1e-6), (4_500,), (5_800, 0.50009)]
    tails += [(None, None, 1e-5)]
    strategies = [Strategy(temperature, *tail) for temperature in (0.2, 1.0, 3.0) for tail in tails]
    parameters = SamplingParameters.of(strategies)
    if way == "compiled":
        token_S, row_S = torch.arange(6_000), torch.zeros(6_000, dtype=torch.int64)
        kept_DV = token_log_probabilities(logits_BV, row_S, token_S, parameters, order).T.isfinite()
    else:
        kept_DV = torch.zeros(len(strategies), 6_000, dtype=torch.bool)
        row_D = torch.zeros(len(strategies), dtype=torch.int64)
        for member_D, _, index_DK, kept_DK in supports(logits_BV, row_D, parameters, order):
            assert bool((index_DK.diff() > 0).all())
            kept_DV[member_D[:, None], index_DK] = kept_DK
    expected_DV = transform(logits_BV.expand(len(strategies), -1), parameters, order) > 0
    rounding_D = torch.tensor([s.top_p is not None and s.top_p > 1 - 1e-6 for s in strategies])
    assert torch.equal(kept_DV[~rounding_D], expected_DV[~rounding_D])
    whole = replace(parameters, top_p_K=torch.ones_like(parameters.top_p_K))
    probability_DV = transform(logits_BV.expand(len(strategies), -1), whole, order)
    assert float((probability_DV * (kept_DV != expected_DV)).sum(-1).max()) < 1e-12


@pytest.mark.parametrize("size", [200, 700, 5_000, 9_999, 49_152])
@pytest.mark.parametrize("kind", ["usual", "ties", "equal", "mostly impossible", "rising"])
def test_the_largest_logits_are_found(size: int, kind: str) -> None:
    logits_RV = torch.stack([some_logits(size, 3.0, seed, rounded=kind == "ties") for seed in range(7)])
    if kind == "ties":
        logits_RV = logits_RV.round()
    elif kind == "equal":
        logits_RV = torch.zeros_like(logits_RV)
    elif kind == "mostly impossible":
        logits_RV[:, 20:] = -torch.inf
    elif kind == "rising":  # the largest stand side by side, at the end
        logits_RV = logits_RV.sort(-1).values
    for count in (1, 17, 200):
        index_RK = support._largest(logits_RV, count)
        assert all(len(set(row)) == count for row in index_RK.tolist())
        found_RK = logits_RV.gather(1, index_RK).sort(-1, descending=True).values
        assert torch.equal(found_RK, logits_RV.topk(count).values)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000, 49_152])
@pytest.mark.parametrize("kind", ["usual", "ties", "equal", "impossible", "last"])
def test_the_largest_logit_is_found_where_it_stands_first(size: int, kind: str) -> None:
    logits_RV = torch.stack([some_logits(size, 3.0, seed, rounded=kind == "ties") for seed in range(5)])
    if kind == "ties":
        logits_RV = logits_RV.div(4).round()  # so that most of a block is the largest
    elif kind == "equal":
        logits_RV = torch.zeros_like(logits_RV)
    elif kind == "impossible":
        logits_RV[:, : size // 2] = -torch.inf
    elif kind == "last":
        logits_RV[:, -1] = 100
    assert torch.equal(argmax(logits_RV), logits_RV.argmax(-1))


@pytest.mark.parametrize("rows", [[], [2], [1, 2, 3], [1, 3], [0, 1, 1, 2], [0, 0, 2], [3, 2, 1], [0, 2, 1, 3]])
def test_rows_are_taken_as_indexing_takes_them(rows: list[int]) -> None:
    logits_BV = torch.randn(4, 5)
    taken_NV = take_rows(logits_BV, torch.tensor(rows, dtype=torch.int64))
    assert torch.equal(taken_NV, logits_BV[rows])
    shares_memory = taken_NV.untyped_storage().data_ptr() == logits_BV.untyped_storage().data_ptr()
    assert shares_memory == (rows in ([2], [1, 2, 3]))


@both_ways
@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-40, 1e-300, 5e-324])
def test_small_temperatures_draw_the_argmax(temperature: float) -> None:
    logits_BV = some_logits(300, 3.0, 1, rounded=False)[None]
    tails = [(), (5, 0.9, 0.1), (None, 0.9), (None, 5e-324), (None, None, 0.1)]
    strategies = [Strategy(temperature, *tail) for tail in tails]
    decision = Decision(SamplingParameters.of(strategies), torch.arange(5))
    for order in Order:
        token_S = draw(logits_BV, torch.zeros(5, dtype=torch.int64), decision, torch.full((5,), 0.5).double(), order)
        assert token_S.tolist() == [int(logits_BV.argmax())] * 5


@pytest.mark.parametrize("temperature", [1e-310, 1e-30, 0.02, 0.1, 0.7, 1.0, 2.0])
def test_exponentials(temperature: float) -> None:
    """Where results have less than the smallest normal number, too; 1e-310 is no float32."""
    below_RV = -torch.linspace(0, 150, 6000).view(3, -1)
    found_RV = exponentiate(below_RV, torch.tensor(temperature, dtype=torch.float64))
    exact_RV = (below_RV.double() / temperature).exp()
    torch.testing.assert_close(found_RV.double(), exact_RV, rtol=3e-5, atol=1e-37)


@both_ways
def test_greedy_takes_the_lowest_index_among_ties() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    decision = Decision(SamplingParameters.of([Strategy(0)]), torch.zeros(2, dtype=torch.int64))
    uniform_S = torch.tensor([0.0, BELOW_ONE], dtype=torch.float64)
    assert draw(logits_BV, torch.zeros(2, dtype=torch.int64), decision, uniform_S, Order.VLLM).tolist() == [1, 1]


@both_ways
@pytest.mark.parametrize("size", [40, 300])
@pytest.mark.parametrize("order", Order)
def test_draws_do_not_depend_on_neighbours(order: Order, size: int) -> None:
    """Permuted, dropped, duplicated and shared rows, and sequences in any company, draw the same tokens."""
    generator = torch.Generator().manual_seed(4)
    rows, sequences = 12, 400
    logits_BV = torch.stack([some_logits(size, (0.5, 2.0, 6.0)[i % 3], i, rounded=i % 2 == 0) for i in range(rows)])
    parameters = SamplingParameters.of(ALL)
    row_S = torch.randint(rows, (sequences,), generator=generator)
    choice_S = torch.randint(len(ALL), (sequences,), generator=generator)
    uniform_S = some_uniforms(sequences, "neighbours")
    token_S = draw(logits_BV, row_S, Decision(parameters, choice_S), uniform_S, order)
    probability_SV = transform(logits_BV[row_S], parameters[choice_S], order)
    expected_S, safe_S = reference(probability_SV, uniform_S)
    torch.testing.assert_close(token_S[safe_S], expected_S[safe_S])
    assert safe_S.float().mean() > 0.9

    def redraw(
        keep_S: Tensor, logits_BV: Tensor, row_S: Tensor, parameters: SamplingParameters, choice_S: Tensor
    ) -> None:
        again_S = draw(logits_BV, row_S, Decision(parameters, choice_S), uniform_S[keep_S], order)
        torch.testing.assert_close(again_S[safe_S[keep_S]], token_S[keep_S][safe_S[keep_S]])

    everyone_S = torch.arange(sequences)
    shuffled_S = torch.randperm(sequences, generator=generator)
    redraw(shuffled_S, logits_BV, row_S[shuffled_S], parameters, choice_S[shuffled_S])
    new_B = torch.randperm(rows, generator=generator)  # old row r is now row new_B[r]
    redraw(everyone_S, logits_BV[new_B.argsort()], new_B[row_S], parameters, choice_S)
    redraw(everyone_S, logits_BV[row_S], everyone_S, parameters, choice_S)  # nobody shares a row
    redraw(everyone_S, logits_BV, row_S, parameters[choice_S], everyone_S)  # nobody shares a parameter set
    some_S = shuffled_S[:100]
    redraw(some_S, logits_BV, row_S[some_S], parameters, choice_S[some_S])
    here_S = everyone_S[row_S == 3]
    redraw(here_S, logits_BV[3:4], torch.zeros_like(here_S), parameters, choice_S[here_S])
    for lonely in shuffled_S[:20].split(1):
        redraw(lonely, logits_BV, row_S[lonely], parameters, choice_S[lonely])


@both_ways
@pytest.mark.parametrize(
    "strategy",
    [
        Strategy(1.25),
        Strategy(1.0, 5),
        Strategy(0.75, None, 0.9),
        Strategy(1.25, 50, 0.95, 0.1),
        Strategy(2, top_n_sigma=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", Order)
def test_frequencies(strategy: Strategy, order: Order) -> None:
    """Chi-square of 20,000 draws, each from its own stream."""
    count, size = 20_000, 12
    logits_BV = some_logits(size, 1.0, 21, rounded=False)[None]
    streams = np.array([derive_seed("frequencies", i) for i in range(count)], dtype=np.uint64)
    uniform_S = torch.from_numpy(uniforms(streams, 0, Purpose.TOKEN))
    zeros_S = torch.zeros(count, dtype=torch.int64)
    decision = Decision(SamplingParameters.of([strategy]), zeros_S)
    observed_V = draw(logits_BV, zeros_S, decision, uniform_S, order).bincount(minlength=size).numpy()
    probability_V = transform(logits_BV, decision.parameters, order)[0].numpy()
    support_V = probability_V > 0
    assert observed_V[~support_V].sum() == 0
    assert chisquare(observed_V[support_V], count * probability_V[support_V]).pvalue > 1e-3
