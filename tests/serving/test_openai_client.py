"""The official client against a server of the fake model."""

import asyncio

import openai
import pytest

from conftest import Running  # type: ignore[import-not-found]
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Request
from rheostat.seeding import derive_seed
from rheostat.serving.server.models import open_engine
from rheostat.types import Completion, Prompt

CHAT = [{"role": "system", "content": "Count."}, {"role": "user", "content": "12"}]
TEXT = "system: Count.\nuser: 12\nassistant:"


def expected(
    text: str, n: int, seed: int, tokens: int, stop: tuple[str, ...] = (), strategy: Strategy | None = None
) -> list[Completion]:
    prompt = Prompt(f"prompt-{derive_seed(text):016x}", text, stop)
    engine, strategy = open_engine("fake"), strategy or Strategy()
    return engine.generate([Request(prompt, strategy, sample, seed, tokens) for sample in range(n)])


def test_chat_gives_what_the_engine_gives(server: Running) -> None:
    answer = server.client.chat.completions.create(model="fake", messages=CHAT, n=3, max_tokens=9, seed=5)
    wanted = expected(TEXT, 3, 5, 9)
    assert [choice.message.content for choice in answer.choices] == [c.text for c in wanted]
    assert [choice.finish_reason for choice in answer.choices] == [str(c.finish_reason) for c in wanted]
    assert answer.usage.completion_tokens == sum(len(c.token_ids) for c in wanted)
    assert answer.usage.prompt_tokens == len(TEXT)
    assert answer.object == "chat.completion"


@pytest.mark.parametrize("stop", ["7", ["3", "55"]])
def test_completions_with_parameters_and_stop_strings(server: Running, stop: str | list[str]) -> None:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    answer = server.client.completions.create(
        model="fake", prompt="9 9", n=4, max_tokens=30, seed=1, stop=stop, temperature=0.8, top_p=0.9,
        extra_body={"top_k": 5, "min_p": 0.05},
    )  # fmt: skip
    wanted = expected("9 9", 4, 1, 30, stops, Strategy(0.8, 5, 0.9, 0.05))
    assert [choice.text for choice in answer.choices] == [c.text for c in wanted]
    assert any(c.finish_reason == "stop" for c in wanted)


def test_a_stream_is_the_answer_in_pieces(server: Running) -> None:
    fields = {"model": "fake", "messages": CHAT, "n": 3, "max_tokens": 60, "seed": 2, "stop": ["5", "11", "2 "]}
    whole = server.client.chat.completions.create(**fields)
    assert {choice.finish_reason for choice in whole.choices} == {"stop"}
    texts, reasons, usage = [""] * 3, [None] * 3, None
    for chunk in server.client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_several_prompts_and_token_prompts(server: Running) -> None:
    create = server.client.completions.create
    answer = create(model="fake", prompt=["1", "22"], n=2, max_tokens=5, seed=3)
    wanted = [*expected("1", 2, 3, 5), *expected("22", 2, 3, 5)]
    assert [choice.text for choice in answer.choices] == [c.text for c in wanted]
    by_ids = create(model="fake", prompt=[3, 3], max_tokens=5, seed=3)  # token 3 is "2"
    assert by_ids.choices[0].text == expected("22", 1, 3, 5)[0].text
    both = create(model="fake", prompt=[[2], [3, 3]], n=2, max_tokens=5, seed=3)
    assert [choice.text for choice in both.choices] == [c.text for c in wanted]


def test_log_probabilities_are_the_models(server: Running) -> None:
    engine = open_engine("fake")
    answer = server.client.chat.completions.create(
        model="fake", messages=CHAT, max_tokens=6, seed=5, logprobs=True, top_logprobs=2, temperature=0.5
    )
    written: list[int] = []
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    for token in answer.choices[0].logprobs.content:
        log_p_V = engine.logits(TEXT, written).log_softmax(0)
        index = engine.vocabulary.texts.index(token.token)
        assert token.logprob == pytest.approx(float(log_p_V[index]), abs=1e-5)
        best = log_p_V.topk(2).indices.tolist()
        assert [top.token for top in token.top_logprobs] == engine.pieces(best)
        written.append(index)
    older = server.client.completions.create(
        model="fake", prompt=TEXT, max_tokens=6, seed=5, logprobs=2, temperature=0.5
    )
    logprobs = older.choices[0].logprobs
    assert logprobs.tokens == engine.pieces(written)
    assert logprobs.token_logprobs == [token.logprob for token in answer.choices[0].logprobs.content]
    assert [len(top) for top in logprobs.top_logprobs] == [2] * len(written)
    chunks = server.client.completions.create(
        model="fake", prompt=TEXT, max_tokens=6, seed=5, logprobs=2, temperature=0.5, stream=True
    )
    found = [p for c in chunks if c.choices[0].logprobs for p in c.choices[0].logprobs.token_logprobs]
    assert found == logprobs.token_logprobs


def test_without_a_seed_answers_differ_and_say_which_it_was(server: Running) -> None:
    fields = {"model": "fake", "prompt": "1", "max_tokens": 30, "stop": []}
    answers = [server.client.completions.create(**fields) for _ in range(4)]
    assert len({answer.choices[0].text for answer in answers}) > 1
    seed = answers[0].model_extra["rheostat"]["seed"]
    again = server.client.completions.create(**fields, seed=seed)
    assert again.choices[0].text == answers[0].choices[0].text


def test_32_in_flight_get_what_they_get_alone(server: Running) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(number: int) -> str:
                text = ""
                stream = await client.completions.create(
                    model="fake", prompt=f"{number}", max_tokens=4 + number, seed=number, stream=True
                )
                async for chunk in stream:
                    text += chunk.choices[0].text
                return text

            return await asyncio.gather(*(ask(number) for number in range(32)))

    assert asyncio.run(ask_all()) == [expected(str(n), 1, n, 4 + n)[0].text for n in range(32)]
    server.settle()


def test_models(server: Running) -> None:
    found = server.client.models.list().data
    assert [model.id for model in found] == ["fake", "fake:demo", "fake:token"]
    assert server.client.models.retrieve("fake:token").model_extra["rheostat"]["level"] == "token"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt")


def test_errors_are_the_clients_own(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="no such model") as raised:
        server.client.chat.completions.create(model="gpt", messages=CHAT)
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="context"):
        server.client.completions.create(model="fake", prompt="1" * 5000)
