"""What a token policy did, against an independent computation at every token."""

import math

import pytest
import torch

from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter, TokenConfig
from rheostat.decoding.policy import FixedStrategies, SamplingParameters
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.engines.base import Request
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.evaluation.behaviour import behaviour, traced
from rheostat.seeding import derive_seed
from rheostat.tasks.base import Split
from rheostat.types import Completion, Problem, Prompt, Verdict

SPACE = ActionSpace((Strategy(0), Strategy(1.0), Strategy(2.0), Strategy(1.0, top_k=2)))
SEED = 4


class WordTask:
    """Right is a completion of an even number of letters."""

    name = "words"
    max_tokens = 8

    def problems(self, split: Split, count: int, start: int = 0) -> list[Problem]:
        return [Problem(f"{split}-{i}", "words", "words", f"{i}?", "") for i in range(start, start + count)]

    def prompt(self, problem: Problem, epoch: int = 0) -> Prompt:
        return Prompt(problem.id, problem.question)

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        return Verdict(len(completion.text) % 2 == 0)


def logits(text: str, tokens: tuple[int, ...]) -> list[float]:
    scale = 30 if derive_seed("certain", text, str(tokens)) % 4 == 0 else 4
    return [scale * derive_seed(text, str(tokens), token) / 2**64 - (token == 0) for token in range(4)]


ENGINE = FakeEngine((EOS, "a", "b", "c"), logits, hidden_size=5)


def policy(commit: bool = False, budgets: tuple[int, ...] = (1, 4)) -> AdaptiveDecoding:
    """Weights that are not those of the uniform mixture."""
    adapter = TokenAdapter(TokenConfig(5, budgets=budgets), SPACE, seed=1).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        adapter.output.weight.copy_(torch.randn(adapter.output.weight.shape, generator=generator))
    return AdaptiveDecoding(adapter, commit)


def requests_of(problems: list[Problem], parallel: int) -> list[Request]:
    task = WordTask()
    return [Request(task.prompt(problem), None, 0, SEED, task.max_tokens, parallel) for problem in problems]


def test_counts_add_up_to_the_tokens() -> None:
    problems = WordTask().problems(Split.TEST, 20)
    found = behaviour(ENGINE, WordTask(), problems, policy(), "mine", SEED)
    requests = requests_of(problems, 4)
    entropy = found["entropy"]
    tokens = sum(len(done.token_ids) for done in ENGINE.generate(requests, policy(), SPACE.order))
    static = ENGINE.generate(requests, FixedStrategies([Strategy(1.0)] * 20), SPACE.order)
    assert sum(entropy["adapted"]["counts"]) == tokens > 20
    assert sum(entropy["static"]["counts"]) == sum(len(done.token_ids) for done in static)
    assert [sum(column) for column in zip(*entropy["by_action"], strict=True)] == entropy["adapted"]["counts"]
    assert len(entropy["by_action"]) == len(SPACE)
    assert all(sum(counts) > 0 for counts in entropy["by_action"])
    assert sum(cell["n"] for cell in entropy["grid"]) == tokens
    assert all(sum(cell["pi"]) == pytest.approx(1, abs=1e-3) for cell in entropy["grid"])
    assert len(entropy["edges"]) == len(entropy["adapted"]["counts"]) + 1
    assert entropy["edges"] == sorted(set(entropy["edges"]))
    assert (entropy["adapted"]["policy"], entropy["static"]["policy"]) == ("mine", "T=1")


def test_buckets_and_cells_hold_the_entropies_that_belong_there() -> None:
    """Recounted token by token from the engine's logits."""
    problems = WordTask().problems(Split.TEST, 12)
    found = behaviour(ENGINE, WordTask(), problems, policy(), "mine", SEED)["entropy"]
    done = ENGINE.generate(requests_of(problems, 4), policy(), SPACE.order)
    seen = [
        (entropy_of(problem.question, completion.token_ids[:t]), t / 8)
        for problem, completion in zip(problems, done, strict=True)
        for t in range(len(completion.token_ids))
    ]
    for low, high, count in zip(found["edges"], found["edges"][1:], found["adapted"]["counts"], strict=False):
        assert count == sum(low <= entropy < high for entropy, _ in seen)
    for cell in found["grid"]:
        low, high = cell["entropy"][0], cell["entropy"][1] or math.inf
        first, last = cell["position"]
        assert cell["n"] == sum(low <= entropy < high and first <= position < last for entropy, position in seen)
    assert len(found["grid"]) > 4


def entropy_of(text: str, tokens: tuple[int, ...]) -> float:
    p_V = ENGINE.logits(text, tokens).double().softmax(0)
    return -float((p_V * p_V.log()).nan_to_num().sum())


def test_two_traces_the_longest_right_and_the_longest_wrong() -> None:
    problems = WordTask().problems(Split.TEST, 20)
    found = behaviour(ENGINE, WordTask(), problems, policy(), "mine", SEED)["traces"]
    done = ENGINE.generate(requests_of(problems, 4), policy(), SPACE.order)
    assert [trace["correct"] for trace in found] == [True, False]
    for trace in found:
        alike = [d for d in done if (len(d.text) % 2 == 0) == trace["correct"]]
        assert len(trace["tokens"]) == max(len(d.token_ids) for d in alike)
        text = "".join(token["text"] for token in trace["tokens"]).removesuffix(EOS)
        assert text == trace["text"]
        own = next(d for d, p in zip(done, problems, strict=True) if p.question == trace["prompt"])
        assert (text, str(own.finish_reason)) == (own.text, trace["finish_reason"])
        assert (trace["policy"], trace["budget"], trace["parallel_budget"]) == ("mine", 8, 4)
        assert trace["actions"] == [str(strategy) for strategy in SPACE]


@pytest.mark.parametrize("commit", [False, True])
def test_a_trace_says_of_every_token_what_was_decided(commit: bool) -> None:
    prompt = Prompt("p", "how?")
    completions, traces = traced(ENGINE, prompt, policy(commit), "mine", 4, 8, SEED)
    requests = [Request(prompt, None, sample, SEED, 8, 4) for sample in range(4)]
    assert completions == ENGINE.generate(requests, policy(commit), SPACE.order)
    assert len(traces) == 4
    for completion, trace in zip(completions, traces, strict=True):
        assert trace["correct"] is None
        assert len(trace["tokens"]) == len(completion.token_ids)
        for t, (token, shown) in enumerate(zip(completion.token_ids, trace["tokens"], strict=True)):
            assert shown["text"] == ENGINE.vocabulary.texts[token]
            assert shown["remaining"] == 8 - t
            logits_V = ENGINE.logits("how?", completion.token_ids[:t])
            assert shown["p_max"] == pytest.approx(float(logits_V.softmax(0).max()), abs=1e-4)
            assert shown["entropy"] == pytest.approx(entropy_of("how?", completion.token_ids[:t]), abs=1e-4)
            parameters = SamplingParameters.of(SPACE.strategies)
            p_A = transform(logits_V.expand(len(SPACE), -1), parameters, Order.VLLM)[:, token]
            pi_A = torch.tensor(shown["pi"])
            assert float(pi_A.sum()) == pytest.approx(1, abs=1e-3)
            if commit:
                assert shown["action"] == int(pi_A.argmax())
                assert shown["probability"] == pytest.approx(float(p_A[shown["action"]]), abs=1e-3)
            else:
                assert shown["probability"] == pytest.approx(float(pi_A @ p_A.float()), abs=1e-3)


def test_at_most_48_problems_from_first_to_last_are_looked_at() -> None:
    problems = WordTask().problems(Split.TEST, 100)
    asked: list[str] = []

    class Watched(FakeEngine):
        def generate(self, requests, *rest):  # type: ignore[no-untyped-def]
            asked.extend(request.prompt.problem_id for request in requests)
            return super().generate(requests, *rest)

    behaviour(Watched((EOS, "a", "b", "c"), logits, hidden_size=5), WordTask(), problems, policy(), "mine", SEED)
    assert len(set(asked)) == 48
    assert {problems[0].id, problems[-1].id} <= set(asked)


def test_an_adapter_blind_to_b_is_looked_at_under_b_of_one() -> None:
    problems = WordTask().problems(Split.TEST, 6)
    found = behaviour(ENGINE, WordTask(), problems, policy(budgets=()), "mine", SEED)
    assert {trace["parallel_budget"] for trace in found["traces"]} == {1}
