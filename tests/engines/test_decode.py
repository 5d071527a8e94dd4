"""The decode loop, on a model whose distribution is known: who stops where, and who shares what."""

import random
from collections import Counter, deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from rheostat.adapters.token import AdaptiveDecoding, Features, TokenAdapter, TokenConfig
from rheostat.baselines.uniform import UniformMixture
from rheostat.decoding.policy import Decision, FixedStrategies, NamedPolicy, SamplingParameters, StepState
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.engines import decode
from rheostat.engines.base import Request
from rheostat.engines.fake import EOS, FakeEngine, _FakeRows
from rheostat.errors import ConfigError
from rheostat.seeding import Purpose, uniforms
from rheostat.types import Completion, FinishReason, Prompt

VOCABULARY = (EOS, "a", "b", "ab", "xaby", "\n", "é", "ba ")
STRATEGIES = (Strategy(1.0), Strategy(0), Strategy(1.25, 5, 0.9), Strategy(0.75, None, 0.95, 0.1))


def reference(engine: FakeEngine, request: Request, order: Order) -> Completion:
    """One request by itself, one token at a time, looking at the whole text after each."""
    tokens: list[int] = []
    stream = np.array([request.stream], dtype=np.uint64)
    while True:
        logits_BV = engine.logits(request.prompt.text, tokens)[None]
        probability_V = transform(logits_BV, SamplingParameters.of([request.strategy]), order)[0].numpy()
        uniform = uniforms(stream, len(tokens), Purpose.TOKEN)[0]
        tokens.append(int(np.searchsorted(probability_V.cumsum(), uniform, side="right")))
        ended = tokens[-1] == VOCABULARY.index(EOS)
        text = "".join(VOCABULARY[token] for token in (tokens[:-1] if ended else tokens))
        found = [at for at in (text.find(stop) for stop in request.prompt.stop) if at != -1]
        if found:
            return Completion(text[: min(found)], tuple(tokens), FinishReason.STOP)
        if ended:
            return Completion(text, tuple(tokens), FinishReason.STOP)
        if len(tokens) == request.max_tokens:
            return Completion(text, tuple(tokens), FinishReason.LENGTH)


def mixed_requests(count: int = 64) -> list[Request]:
    """Prompts, stops, budgets, strategies and samples of every kind, in one call."""
    stops: list[tuple[str, ...]] = [(), ("ab",), ("\n", "bb"), ("é",), ("aba", "y"), ("never",), ("a ",)]
    draw = random.Random(5)
    return [
        Request(
            Prompt(f"p{i % 4}", f"prompt {i % 4}", draw.choice(stops)),
            draw.choice(STRATEGIES),
            sample=i // 3,
            seed=1,
            max_tokens=draw.choice((1, 2, 5, 12, 30)),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(VOCABULARY)


@pytest.fixture(params=[0, 1 / 8, 1], ids=["always-compact", "default", "never-compact"])
def idle_share(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "IDLE_SHARE", request.param)


@pytest.mark.parametrize("order", Order)
@pytest.mark.usefixtures("idle_share")
def test_mixed_call_equals_one_token_at_a_time(engine: FakeEngine, order: Order) -> None:
    requests = mixed_requests()
    expected = [reference(engine, request, order) for request in requests]
    assert engine.generate(requests, order=order) == expected
    by_reason = Counter(completion.finish_reason for completion in expected)
    assert min(by_reason[reason] for reason in FinishReason) > 10
    by_eos = sum(completion.token_ids[-1] == 0 for completion in expected)
    by_stop = by_reason[FinishReason.STOP] - by_eos
    assert min(by_eos, by_stop) > 5


@pytest.mark.parametrize("most", [1, 4, 20])
@pytest.mark.usefixtures("idle_share")
def test_batches_that_join_equal_one_token_at_a_time(engine: FakeEngine, most: int) -> None:
    """Whoever comes later, with stop strings of its own, is written as if it were alone; all but one wait at first."""
    requests = mixed_requests()
    waiting = deque(torch.randperm(len(requests), generator=torch.Generator().manual_seed(most)).split(3))
    together: list[int] = []

    def next_batch() -> decode.Batch:
        positions = waiting.popleft().tolist()
        texts = sorted({requests[position].prompt.text for position in positions})
        row_of = [texts.index(requests[position].prompt.text) for position in positions]
        return decode.Batch(_FakeRows(engine, texts), [requests[position] for position in positions], row_of, positions)

    def more(running_S: Tensor) -> decode.Batch | None:
        together.append(len(running_S))
        return next_batch() if waiting and len(running_S) <= most else None

    done: dict[int, Completion] = {}
    while waiting:
        policy = FixedStrategies([request.strategy for request in requests])
        done |= decode.decode(next_batch(), engine.vocabulary, engine._ending_tokens, Order.VLLM, policy, None, more)
    assert [done[position] for position in range(len(requests))] == [
        reference(engine, request, Order.VLLM) for request in requests
    ]
    assert max(together) > most or most == 1


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.usefixtures("idle_share")
def test_batch_size_and_order_of_arrival(engine: FakeEngine, size: int) -> None:
    requests = mixed_requests()
    expected = dict(zip(requests, engine.generate(requests), strict=True))
    arrived = random.Random(size).sample(requests, len(requests))
    for start in range(0, len(arrived), size):
        batch = arrived[start : start + size]
        assert engine.generate(batch) == [expected[request] for request in batch]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("stop", [(), ("ab",), ("\n", "ba")], ids=repr)
def test_frequencies_are_the_enumerated_ones(strategy: Strategy, stop: tuple[str, ...]) -> None:
    engine = FakeEngine((EOS, "a", "b", "ab", "\n"))
    prompt, count = Prompt("p", "frequencies", stop), 4000
    distribution = engine.distribution(prompt, strategy, max_tokens=3)
    completions = engine.generate([Request(prompt, strategy, sample, 3, 3) for sample in range(count)])
    observed = Counter(completion.text for completion in completions)
    assert set(observed) <= set(distribution)
    likely = [text for text, probability in distribution.items() if probability * count >= 8]
    rest = count - sum(observed[text] for text in likely)
    rest_expected = count * max(0.0, 1 - sum(distribution[text] for text in likely))
    f_observed = [*(observed[text] for text in likely), *([rest] if rest_expected > 1 else [])]
    f_expected = [*(count * distribution[text] for text in likely), *([rest_expected] if rest_expected > 1 else [])]
    if len(likely) > 1:
        scale = sum(f_observed) / sum(f_expected)
        assert scale == pytest.approx(1, abs=1e-3)
        assert chisquare(f_observed, [scale * f for f in f_expected]).pvalue > 1e-3
    else:
        assert observed == {likely[0]: count}


def scripted(*texts: str) -> FakeEngine:
    """An engine that writes these tokens, then ends."""
    ids = [VOCABULARY.index(text) for text in texts]

    def logits(_: str, tokens: tuple[int, ...]) -> list[float]:
        wanted = ids[len(tokens)] if len(tokens) < len(ids) else VOCABULARY.index(EOS)
        return [float(token == wanted) for token in range(len(VOCABULARY))]

    return FakeEngine(VOCABULARY, logits=logits)


@pytest.mark.parametrize(
    ("texts", "stop", "budget", "text", "written", "reason"),
    [
        (["xaby", "b"], ("ab",), 9, "x", 1, "stop"),  # inside a token
        (["b", "xaby", "b"], ("bxa",), 9, "", 2, "stop"),  # spanning tokens, ending inside one
        (["a", "a", "b", "b"], ("aabb",), 9, "", 4, "stop"),  # over four tokens
        (["b", "a", "b", "\n"], ("\n", "ab"), 9, "b", 3, "stop"),  # several: the first to be complete
        (["b", "xaby"], ("y", "xa"), 9, "b", 2, "stop"),  # several in one token: the earliest cut
        (["a", "é", "b"], ("é",), 9, "a", 2, "stop"),
        (["b", "ba ", "b"], ("a ",), 9, "bb", 2, "stop"),  # a blank at its end
        (["a", "b"], ("bb",), 9, "ab", 3, "stop"),  # EOS
        (["a", "b"], ("bb",), 3, "ab", 3, "stop"),  # EOS on the last token of the budget
        (["a", "b"], ("bb",), 2, "ab", 2, "length"),  # budget just before EOS
        (["a", "ab", "b"], ("ab",), 2, "a", 2, "stop"),  # a stop on the last token of the budget
        ([], (), 4, "", 1, "stop"),  # EOS at once
        (["a"], (), 1, "a", 1, "length"),
        (["b", "b", "a"], ("ab",), 3, "bba", 3, "length"),  # a stop begun, not finished
    ],
)
def test_endings(texts: list[str], stop: tuple[str, ...], budget: int, text: str, written: int, reason: str) -> None:
    request = Request(Prompt("p", "x", stop), Strategy(0), 0, 0, budget)
    (completion,) = scripted(*texts).generate([request])
    assert completion.text == text
    assert len(completion.token_ids) == written
    assert completion.finish_reason == reason
    assert [VOCABULARY[token] for token in completion.token_ids] == [*texts, EOS][:written]


def test_ending_tokens_are_the_ones_that_may_end_a_text(engine: FakeEngine) -> None:
    def marked(*stop: str) -> set[str]:
        mask_V = decode.ending_tokens(engine.vocabulary, stop)
        return {text for text, marked in zip(VOCABULARY, mask_V.tolist(), strict=True) if marked}

    assert marked() == {EOS}
    assert marked("ab") == {EOS, "b", "ab", "xaby", "ba "}
    assert marked("\n", "x y") == {EOS, "\n", "xaby"}


def test_pieces_of_characters_may_end_a_text() -> None:
    """Byte-level vocabularies show a piece of a character as U+FFFD."""

    class Pieces:
        eos_ids = frozenset[int]()
        texts = ("a", "\ufffd", "é", "b\ufffd")

    assert decode.ending_tokens(Pieces, ("é",)).tolist() == [False, True, True, True]  # type: ignore[arg-type]
    assert decode.ending_tokens(Pieces, ("a",)).tolist() == [True, False, False, False]  # type: ignore[arg-type]


def test_rows_are_shared_until_they_part(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy samples of one prompt stand on one row from the first token to the last."""
    rows: list[tuple[int, int]] = []

    class Watch:
        def decide(self, state: StepState) -> Decision:
            rows.append((len(state.logits_BV), len(state.row_S)))
            return Decision(SamplingParameters.of([Strategy(0)]), torch.zeros_like(state.row_S))

    monkeypatch.setattr(FakeEngine, "logits", lambda *_: torch.eye(len(VOCABULARY))[1])
    engine.generate([Request(Prompt("p", "x"), Strategy(0), sample, 0, 6) for sample in range(10)], Watch())
    assert rows == [(1, 10)] * 6


@pytest.mark.usefixtures("idle_share")
def test_policy_sees_each_sequence_on_its_own_row() -> None:
    """Hidden states and logits under ``row_S`` are those of the sequence's own prefix, budgets and steps too."""
    engine = FakeEngine((EOS, "a", "b", "ab"), hidden_size=6)
    requests = [
        Request(Prompt(f"p{i % 3}", f"prompt {i % 3}"), Strategy(), i, 2, max_tokens=2 + i % 7) for i in range(40)
    ]
    seen: list[StepState] = []

    class Watch:
        def decide(self, state: StepState) -> Decision:
            seen.append(state)
            return Decision(SamplingParameters.of([Strategy(1.25)]), torch.zeros_like(state.row_S))

    completions = engine.generate(requests, Watch())
    for t, state in enumerate(seen):
        alive = [i for i, completion in enumerate(completions) if len(completion.token_ids) > t]
        assert state.request_S.tolist() == alive
        assert state.t_S.tolist() == [t] * len(alive)
        assert state.budget_S.tolist() == [requests[i].max_tokens for i in alive]
        assert state.streams_S.tolist() == [requests[i].stream for i in alive]
        for position, i in enumerate(alive):
            text, tokens = requests[i].prompt.text, completions[i].token_ids[:t]
            row = int(state.row_S[position])
            torch.testing.assert_close(state.logits_BV[row], engine.logits(text, tokens))
            torch.testing.assert_close(state.hidden_BH[row], engine.features(text, tokens))


def test_a_policy_chooses_per_sequence_and_step(engine: FakeEngine) -> None:
    """Even requests are greedy, odd ones turn greedy after the first token."""
    requests = [Request(Prompt("p", "policy"), Strategy(), i, 0, 6) for i in range(60)]

    class Alternate:
        def decide(self, state: StepState) -> Decision:
            greedy_S = (state.request_S % 2 == 0) | (state.t_S > 0)
            return Decision(SamplingParameters.of([Strategy(2.0), Strategy(0)]), greedy_S.long())

    completions = engine.generate(requests, Alternate())
    greedy = engine.generate([replace(requests[0], strategy=Strategy(0))])[0]
    assert {completion.token_ids for completion in completions[::2]} == {greedy.token_ids}
    assert len({completion.token_ids[0] for completion in completions[1::2]}) > 3
    for completion in completions[1::2]:
        for t in range(1, len(completion.token_ids)):
            assert completion.token_ids[t] == int(engine.logits("policy", completion.token_ids[:t]).argmax())


def test_streams_belong_to_the_request() -> None:
    request = Request(Prompt("p", "x"), Strategy(0.5), 1, 2, 3)
    assert request.stream == replace(request, max_tokens=9, prompt=Prompt("p", "y", ("z",))).stream
    others = [
        replace(request, seed=3), replace(request, sample=2), replace(request, strategy=Strategy(0.75)),
        replace(request, prompt=Prompt("q", "x")),
    ]  # fmt: skip
    assert len({request.stream, *(other.stream for other in others)}) == 5


def test_strategies_equal_in_effect_are_sampled_once() -> None:
    """A top-k that never binds changes nothing: the same tokens, and not one more row of the model."""
    engine, prompt = FakeEngine(), Prompt("p", "equal")
    plain = [Request(prompt, Strategy(0.7, top_p=0.9), sample, 0, 6) for sample in range(8)]
    unbound = [replace(request, strategy=Strategy(0.7, top_k=10**6, top_p=0.9)) for request in plain]
    bound = [replace(request, strategy=Strategy(0.7, top_k=1)) for request in plain]
    rows: list[list[int]] = []

    class CountRows:
        def observe(self, state: StepState, decision: Decision, token_S: Tensor) -> None:
            rows[-1].append(len(torch.unique(state.row_S)))

    answers = []
    for requests in (plain, plain + unbound, plain + bound):
        rows.append([])
        answers.append([completion.token_ids for completion in engine.generate(requests, observer=CountRows())])
    assert answers[1] == answers[0] + answers[0]
    assert rows[1] == rows[0]
    assert answers[2][:8] == answers[0]
    assert len(set(answers[2][8:])) == 1 < len(set(answers[0]))


def test_budget_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        Request(Prompt("p", "x"), Strategy(), 0, 0, 0)


def test_an_empty_stop_string_is_refused(engine: FakeEngine) -> None:
    with pytest.raises(ConfigError, match="stop string is empty"):
        engine.generate([Request(Prompt("p", "x", ("a", "")), Strategy(), 0, 0, 1)])


SPACE = ActionSpace((Strategy(0), Strategy(2.0), Strategy(1.0, top_k=2), Strategy(0.75, None, 0.8)))


def adaptive(hidden_size: int) -> AdaptiveDecoding:
    """A policy that depends on everything a token policy may see."""
    config = TokenConfig(hidden_size, Features.BOTH, budgets=(1, 8), width=8, budget_width=4)
    adapter = TokenAdapter(config, SPACE, seed=1)
    generator = torch.Generator().manual_seed(3)
    torch.nn.init.normal_(adapter.output.weight, std=3.0, generator=generator)
    return AdaptiveDecoding(adapter.eval())


def policies(hidden_size: int) -> list[NamedPolicy]:
    return [UniformMixture(SPACE), adaptive(hidden_size)]


def policy_requests(count: int = 60) -> list[Request]:
    return [
        replace(request, strategy=None, sample=number, parallel_budget=1 + 7 * (number % 2))
        for number, request in enumerate(mixed_requests(count))
    ]


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("which", [0, 1], ids=["uniform", "adapter"])
@pytest.mark.usefixtures("idle_share")
def test_adapted_decoding_belongs_to_the_request(engine: FakeEngine, which: int, order: Order) -> None:
    """Alone, together, in any order, with and without compaction: the tokens of one request at a time."""
    policy, requests = policies(16)[which], policy_requests()
    alone = {request: engine.generate([request], policy, order)[0] for request in requests}
    assert engine.generate(requests, policy, order) == [alone[request] for request in requests]
    arrived = random.Random(which).sample(requests, len(requests))
    for start in range(0, len(arrived), 11):
        batch = arrived[start : start + 11]
        assert engine.generate(batch, policy, order) == [alone[request] for request in batch]
    assert len({completion.token_ids for completion in alone.values()}) > 30


class Sees:
    """Writes down what a policy decides, with the tokens that follow."""

    def __init__(self) -> None:
        self.steps: list[tuple[StepState, Decision, torch.Tensor]] = []

    def observe(self, state: StepState, decision: Decision, token_S: torch.Tensor) -> None:
        self.steps.append((state, decision, token_S))


@pytest.mark.parametrize("which", [0, 1], ids=["uniform", "adapter"])
def test_tokens_are_distributed_as_the_mixture(which: int) -> None:
    """μ(y) = Σ_a π(a|x) p_a(y) at the first token and, where it was the most frequent one, at the second."""
    engine, count = FakeEngine((EOS, "a", "b", "c", "d"), hidden_size=6), 8000
    policy, sees = policies(6)[which], Sees()
    requests = [Request(Prompt("p", "mixture"), None, sample, 3, 2, 8) for sample in range(count)]
    completions = engine.generate(requests, policy, observer=sees)
    first = Counter(completion.token_ids[0] for completion in completions if completion.token_ids[0] != 0)
    prefix = (first.most_common(1)[0][0],)
    for t, tokens in enumerate([(), prefix]):
        own = [i for i, done in enumerate(completions) if done.token_ids[:t] == tokens and len(done.token_ids) > t]
        state, decision, _ = sees.steps[t]
        own_S = torch.isin(state.request_S, torch.tensor(own))
        assert decision.log_pi_SK is not None
        log_pi_SK = decision.log_pi_SK[own_S]
        torch.testing.assert_close(log_pi_SK, log_pi_SK[:1].expand_as(log_pi_SK))  # one row, one π
        pi_A = log_pi_SK[0].double().exp()
        logits_AV = engine.logits("mixture", tokens).expand(len(SPACE), -1)
        p_AV = transform(logits_AV, SamplingParameters.of(SPACE.strategies), Order.VLLM)
        # jointly, so that the action's and the token's draw are seen to be independent
        joint_AV = (pi_A[:, None] * p_AV).numpy()
        observed_AV = np.zeros_like(joint_AV)
        for action, i in zip(decision.choice_S[own_S].tolist(), state.request_S[own_S].tolist(), strict=True):
            observed_AV[action, completions[i].token_ids[t]] += 1
        assert (observed_AV[joint_AV == 0] == 0).all()
        for observed, expected in (
            (observed_AV[joint_AV > 0], joint_AV[joint_AV > 0]), (observed_AV.sum(0), joint_AV.sum(0))
        ):  # fmt: skip
            often = expected * len(own) >= 5
            f_observed = np.array([*observed[often], observed[~often].sum()])
            f_expected = np.array([*expected[often], expected[~often].sum()])
            f_observed, f_expected = f_observed[f_expected > 0], f_expected[f_expected > 0]
            assert len(f_expected) >= 3
            assert chisquare(f_observed, f_expected / f_expected.sum() * len(own)).pvalue > 1e-3
    if which:
        assert float(pi_A.max()) > 0.4


def test_actions_and_tokens_draw_from_streams_of_their_own() -> None:
    """On a flat distribution at T = 1, the token is the token's uniform and the action the action's."""
    space = ActionSpace((Strategy(1.0), Strategy(2.0)))
    engine = FakeEngine((EOS, "a", "b", "c"), logits=lambda *_: [0.0] * 4)
    sees = Sees()
    requests = [Request(Prompt("p", "x"), None, sample, 0, 1) for sample in range(500)]
    completions = engine.generate(requests, UniformMixture(space), observer=sees)
    streams = np.array([request.stream for request in requests], dtype=np.uint64)
    token_N = np.floor(4 * uniforms(streams, 0, Purpose.TOKEN)).astype(int)
    action_N = np.floor(2 * uniforms(streams, 0, Purpose.ACTION)).astype(int)
    assert [completion.token_ids[0] for completion in completions] == token_N.tolist()
    assert sees.steps[0][1].choice_S.tolist() == action_N.tolist()


def test_what_the_policy_sees_of_the_parallel_budget(engine: FakeEngine) -> None:
    requests, sees = policy_requests(), Sees()
    engine.generate(requests, UniformMixture(SPACE), observer=sees)
    for state, decision, token_S in sees.steps:
        assert state.parallel_S.tolist() == [requests[i].parallel_budget for i in state.request_S.tolist()]
        assert len(state.row_S) == len(decision.choice_S) == len(token_S)


def test_streams_of_a_policy_depend_on_the_parallel_budget_only() -> None:
    request = Request(Prompt("p", "x"), None, 1, 2, 3)
    others = [replace(request, parallel_budget=2), replace(request, sample=2), replace(request, strategy=Strategy())]
    assert len({request.stream, *(other.stream for other in others)}) == 4


def test_requests_without_strategy_need_a_policy(engine: FakeEngine) -> None:
    with pytest.raises(ConfigError, match="a request names no strategy: give it one, or give the call a token policy"):
        engine.generate([Request(Prompt("p", "x"), None, 0, 0, 1)])
    with pytest.raises(ConfigError, match="parallel_budget must be at least 1, got 0"):
        Request(Prompt("p", "x"), None, 0, 0, 1, 0)
