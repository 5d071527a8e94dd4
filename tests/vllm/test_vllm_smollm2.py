"""The demo's model in vLLM, float32: the plug-in and the engine against transformers and the local engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_vllm_plugin import actions_of, check_actions, expected_pi, params_of, run, tokens_of, watch
from tiny_vllm import make_adapter, plain_of

from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter
from rheostat.decoding.spaces import TABLE_14
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Request
from rheostat.engines.local import LocalEngine
from rheostat.types import Prompt

TEXTS = (
    "Question: What is 17 * 3 + 5? Think step by step.\nAnswer:",
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea, there lived",
)


@pytest.fixture(scope="module")
def adapter_folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "adapter"
    make_adapter(folder, smollm2_path, space=TABLE_14, hidden_size=576, spread=0.3)
    return folder


def loaded(folder: Path) -> TokenAdapter:
    from rheostat.adapters.files import load_adapter

    return load_adapter(folder, kind="token").adapter


def test_plugin_along_its_trajectories(
    smollm2_path: Path, adapter_folder: Path, open_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, adapter = plain_of(smollm2_path), loaded(adapter_folder)
    llm = open_llm(smollm2_path, adapter_folder, max_model_len=512)
    seen = watch(llm, monkeypatch)
    prompts = [plain.ids(text) for text in TEXTS]
    params = [params_of(24, seed=i, trace=f"smollm2-{i}", parallel_budget=4) for i in range(len(prompts))]
    firm, differences = 0, []
    for i, (prompt, written) in enumerate(zip(prompts, tokens_of(run(llm, prompts, params)), strict=True)):
        pi_TA = expected_pi(plain, adapter, prompt, written, 24, 4)
        differences += [np.abs(seen.pi[i, t] - pi_A).max() for t, pi_A in enumerate(pi_TA)]
        firm += check_actions(pi_TA, i, actions_of(llm, f"smollm2-{i}")[0])
    assert max(differences) < 1e-4
    assert firm > 85


def test_engine_writes_what_the_local_engine_writes(smollm2_path: Path, adapter_folder: Path) -> None:
    from rheostat.engines.vllm import VllmEngine

    policy = AdaptiveDecoding(loaded(adapter_folder))
    requests = [Request(Prompt(text, text, ("\n\n",)), None, s, 3, 20, 2) for text in TEXTS for s in range(2)]
    ours = VllmEngine(smollm2_path, "smollm2", torch.float32).generate(requests, policy, Order.VLLM)
    theirs = LocalEngine(smollm2_path, "smollm2", torch.float32, "cpu").generate(requests, policy, Order.VLLM)
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= len(requests) - 1
