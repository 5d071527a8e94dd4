"""What an answer says about the adapter, and whose word counts."""

import json
from typing import Any

import pytest
import torch

from conftest import Running  # type: ignore[import-not-found]
from rheostat.adapters.files import load_adapter
from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter
from rheostat.engines.base import Request
from rheostat.engines.fake import FakeEngine
from rheostat.evaluation.behaviour import traced
from rheostat.generate import generate
from rheostat.seeding import derive_seed
from rheostat.types import Prompt


def test_sequence_level_answers_are_those_of_generate(server: Running, adapter_folders: dict[str, Any]) -> None:
    for budget in (1, 4):
        wanted = generate(
            "12 ", model="fake", adapter=str(adapter_folders["demo"]), budget=budget, max_tokens=9, seed=3
        )
        answer = server.complete(model="fake:demo", prompt="12 ", n=budget, max_tokens=9, seed=3).json()
        assert [choice["text"] for choice in answer["choices"]] == [c["text"] for c in wanted["completions"]]
        info = answer["rheostat"]
        assert info["strategy"] == wanted["strategy"]
        assert info["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
        assert (info["mode"], info["adapter"], info["level"]) == ("adapt", "demo", "sequence")


@pytest.mark.parametrize("mode", ["adapt", "commit"])
def test_token_level_traces_are_those_of_generate(server: Running, adapter_folders: dict[str, Any], mode: str) -> None:
    engine = FakeEngine()
    adapter = load_adapter(adapter_folders["token"], kind="token").adapter
    prompt = Prompt(f"prompt-{derive_seed('12 '):016x}", "12 ")
    completions, traces = traced(engine, prompt, AdaptiveDecoding(adapter, mode == "commit"), "x", 4, 9, 3)
    options = {"mode": mode, "trace": True}
    answer = server.complete(model="fake:token", prompt="12 ", n=4, max_tokens=9, seed=3, rheostat=options).json()
    assert [choice["text"] for choice in answer["choices"]] == [c.text for c in completions]
    assert answer["rheostat"]["actions"] == traces[0]["actions"]
    assert answer["rheostat"]["strategy"] is None
    for choice, trace in zip(answer["choices"], traces, strict=True):
        for token, wanted in zip(choice["rheostat"]["trace"], trace["tokens"], strict=True):
            assert token["pi"] == pytest.approx(wanted["pi"], abs=2e-4)
            assert token["entropy"] == pytest.approx(wanted["entropy"], abs=2e-4)
            for name in ("text", "action", "remaining"):
                assert token[name] == wanted[name]
            assert token["temperature"] == adapter.space.strategies[token["action"]].temperature


def test_streams_carry_the_same_traces(server: Running) -> None:
    fields = {"model": "fake:token", "n": 2, "max_tokens": 9, "seed": 3, "rheostat": {"trace": True}}
    whole = server.chat(**fields).json()
    chunks = events(server.chat(**fields, stream=True).text)
    traces: list[list[Any]] = [[], []]
    for chunk in chunks:
        for choice in chunk["choices"]:
            traces[choice["index"]] += choice.get("rheostat", {}).get("trace", [])
    assert traces == [choice["rheostat"]["trace"] for choice in whole["choices"]]
    assert chunks[0]["rheostat"] == whole["rheostat"]
    assert not any("rheostat" in chunk for chunk in chunks[1:])


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("field", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}])
def test_explicit_sampling_parameters_switch_the_adapter_off(server: Running, field: dict[str, float]) -> None:
    for model in ("fake:demo", "fake:token"):
        off = server.complete(model=model, seed=1, max_tokens=20, **field).json()
        bare = server.complete(model="fake", seed=1, max_tokens=20, **field).json()
        assert off["rheostat"]["mode"] == "static"
        assert off["rheostat"]["adapter"] is None
        assert off["choices"] == bare["choices"]
        on = server.complete(model=model, seed=1, max_tokens=20, rheostat={"mode": "adapt"}, **field).json()
        adapted = server.complete(model=model, seed=1, max_tokens=20).json()
        assert on["choices"] == adapted["choices"]
        assert on["rheostat"] == adapted["rheostat"]
        assert on["rheostat"]["mode"] == "adapt"


def test_a_null_parameter_is_no_parameter(server: Running) -> None:
    assert server.complete(model="fake:demo", temperature=None).json()["rheostat"]["mode"] == "adapt"


def test_static_leaves_the_adapter_out(server: Running) -> None:
    static = server.complete(model="fake:token", seed=1, rheostat={"mode": "static"}).json()
    assert static["rheostat"]["mode"] == "static"
    assert static["choices"] == server.complete(seed=1).json()["choices"]
    assert server.complete(rheostat={"mode": "adapt"}).json()["error"]["code"] == "no_adapter"


def test_prompts_of_one_request_each_have_their_choice(server: Running) -> None:
    answer = server.complete(model="fake:demo", prompt=["12", "7 7 7"], n=2, seed=0).json()
    singles = [server.complete(model="fake:demo", prompt=text, n=2, seed=0).json() for text in ("12", "7 7 7")]
    for index, choice in enumerate(answer["choices"]):
        single = singles[index // 2]
        assert choice["text"] == single["choices"][index % 2]["text"]
        assert choice["rheostat"]["strategy"] == single["rheostat"]["strategy"]
        assert choice["rheostat"]["probabilities"] == single["rheostat"]["probabilities"]
    assert singles[0]["rheostat"]["probabilities"] != singles[1]["rheostat"]["probabilities"]


def test_the_budgets_are_the_requests_own(server: Running, adapter_folders: dict[str, Any]) -> None:
    """n is B and max_tokens is b, for the token level as well."""
    adapter = load_adapter(adapter_folders["token"]).adapter
    assert isinstance(adapter, TokenAdapter)
    torch.nn.init.normal_(adapter.output.weight, generator=torch.Generator().manual_seed(4))
    prompt = Prompt(f"prompt-{derive_seed('12'):016x}", "12")
    for n, tokens in ((1, 5), (4, 5), (4, 12)):
        answer = server.complete(model="fake:token", n=n, max_tokens=tokens, seed=0).json()
        requests = [Request(prompt, None, sample, 0, tokens, n) for sample in range(n)]
        wanted = FakeEngine().generate(requests, AdaptiveDecoding(adapter), adapter.space.order)
        assert [choice["text"] for choice in answer["choices"]] == [c.text for c in wanted]
