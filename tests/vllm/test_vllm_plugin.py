"""Adapters inside an unmodified vLLM: against transformers and our own policies, and against vLLM without them."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vllm import CONTEXT, SPACE, TEXTS, Plain, make_adapter, rows_of

from rheostat.adapters.sequence import SequenceAdapter
from rheostat.adapters.token import Features, TokenAdapter, TokenInputs
from rheostat.decoding.policy import SamplingParameters
from rheostat.decoding.recording import row_statistics
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.errors import AdapterError, ConfigError
from rheostat.seeding import Purpose, derive_seed, uniforms

OpenLLM = Callable[..., Any]
CLOSE = 1e-4


def params_of(max_tokens: int = 12, mode: str | None = "adapt", **fields: Any) -> Any:
    from vllm import SamplingParams

    extra = (
        {}
        if mode is None
        else {"rheostat": mode}
        | {f"rheostat_{name}": fields.pop(name) for name in ("parallel_budget", "seed", "trace") if name in fields}
    )
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra or None, **fields)


def run(llm: Any, texts: list[list[int]], params: Any) -> list[Any]:
    return list(llm.generate([{"prompt_token_ids": ids} for ids in texts], params, use_tqdm=False))


def tokens_of(outputs: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(done.token_ids) for output in outputs for done in output.outputs]


def actions_of(llm: Any, name: str) -> dict[int, list[int]]:
    (found,) = llm.collective_rpc("rheostat_actions", args=(name,))
    return dict(found)


def held(llm: Any) -> int:
    """Requests that hold state after the next step: vLLM's worker learns with it who has finished."""
    run(llm, [[5]], params_of(1, None))
    gc.collect()
    return int(rows_of(llm).requests)


@dataclass
class Watched:
    """What the processor decided from: π of each stream and token."""

    pi: dict[tuple[int, int], np.ndarray]


def watch(llm: Any, monkeypatch: pytest.MonkeyPatch) -> Watched:
    rows, seen = rows_of(llm), Watched({})
    original = rows._pick

    def pick(pi_SA: Any, slot_S: Any, t_S: Any) -> Any:
        for row, (slot, t) in enumerate(zip(slot_S, t_S, strict=True)):
            seen.pi[int(rows._stream_R[slot]), int(t)] = pi_SA[row].clone().numpy()
        return original(pi_SA, slot_S, t_S)

    monkeypatch.setattr(rows, "_pick", pick)
    return seen


def expected_pi(
    plain: Plain, adapter: TokenAdapter, prompt: list[int], written: tuple[int, ...], b: int, B: int
) -> Any:
    """π at every token of a trajectory, by transformers and the adapter alone."""
    hidden_TH, logits_TV = plain.forward([*prompt, *written])
    steps = slice(len(prompt) - 1, len(prompt) - 1 + len(written))
    t = torch.arange(len(written))
    inputs = TokenInputs(
        hidden_TH[steps].bfloat16(),
        row_statistics(logits_TV[steps]).entropy_B,
        b - t,
        torch.full_like(t, b),
        torch.full_like(t, B),
    )
    with torch.no_grad():
        return adapter.log_probabilities(inputs).exp().numpy()


def check_actions(pi_TA: np.ndarray, stream: int, actions: list[int]) -> int:
    """Each action is the inverse CDF of its own uniform, but where that lies on a boundary; returns how many count."""
    uniform_T = uniforms(np.full(len(actions), stream, np.uint64), np.arange(len(actions)), Purpose.ACTION)
    firm = 0
    for pi_A, uniform, action in zip(pi_TA, uniform_T, actions, strict=True):
        cdf_A = pi_A.astype(float).cumsum()
        if np.abs(cdf_A - uniform).min() > 3 * CLOSE:
            assert action == np.searchsorted(cdf_A, uniform, side="right")
            firm += 1
    return firm


def test_decisions_are_those_of_the_adapter_on_transformers(
    plain: Plain, open_llm: OpenLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter", plain.folder)
    assert isinstance(adapter, TokenAdapter)
    llm = open_llm(plain.folder, tmp_path / "adapter")
    seen = watch(llm, monkeypatch)
    prompts = [plain.ids(text) for text in TEXTS] * 3
    params = [params_of(4 + 3 * i, seed=100 + i, parallel_budget=1 + i % 3, trace=f"d{i}") for i in range(len(prompts))]
    firm = 0
    for i, (prompt, written) in enumerate(zip(prompts, tokens_of(run(llm, prompts, params)), strict=True)):
        assert len(written) == 4 + 3 * i
        pi_TA = expected_pi(plain, adapter, prompt, written, 4 + 3 * i, 1 + i % 3)
        for t, pi_A in enumerate(pi_TA):
            np.testing.assert_allclose(seen.pi[100 + i, t], pi_A, atol=CLOSE)
        actions = actions_of(llm, f"d{i}")[0]
        firm += check_actions(pi_TA, 100 + i, actions)
        # and the token is one that its action allows
        _, logits_TV = plain.forward([*prompt, *written])
        for t, action in enumerate(actions):
            p_V = transform(
                logits_TV[None, len(prompt) - 1 + t], SamplingParameters.of([SPACE.strategies[action]]), Order.VLLM
            )[0]
            assert p_V[written[t]] > 0
    assert firm > 300


@pytest.fixture(scope="module")
def spread(llama: Plain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenAdapter]:
    folder = tmp_path_factory.mktemp("adapters") / "token"
    adapter = make_adapter(folder, llama.folder)
    assert isinstance(adapter, TokenAdapter)
    return folder, adapter


def check_requests(
    llama: Plain, adapter: TokenAdapter, llm: Any, prompts: list[list[int]], params: list[Any], written: list[Any]
) -> int:
    """Every traced request decided as it would have alone: position, budget, stream."""
    firm = 0
    for prompt, param, tokens in zip(prompts, params, written, strict=True):
        extra = param.extra_args
        pi_TA = expected_pi(llama, adapter, prompt, tokens, param.max_tokens, extra.get("rheostat_parallel_budget", 1))
        actions = actions_of(llm, extra["rheostat_trace"])[0]
        assert len(actions) == len(tokens)
        firm += check_actions(pi_TA, extra["rheostat_seed"], actions)
    return firm


def traced(count: int, name: str, tokens: int = 20) -> list[Any]:
    return [params_of(tokens + i % 5, seed=7 * i, trace=f"{name}{i}", parallel_budget=2) for i in range(count)]


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_prefix_caching": True},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "max_num_seqs": 4},
        {"num_gpu_blocks_override": 8, "enable_prefix_caching": False, "block_size": 32, "max_model_len": 160},
    ],
    ids=["prefix-cache", "chunked-prefill", "preemption"],
)
def test_positions_and_budgets_whatever_the_schedule(
    llama: Plain, spread: tuple[Path, TokenAdapter], open_llm: OpenLLM, fields: dict[str, Any], request: Any
) -> None:
    folder, adapter = spread
    llm = open_llm(llama.folder, folder, **fields)
    name = request.node.callspec.id
    prompts = [llama.ids("Solve the problem. Think step by step and write. " * 2 + text) for text in TEXTS] * 3
    params = traced(len(prompts), name, 40 if name == "preemption" else 20)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted: list[object] = []
    original = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(None), original(*args, **kwargs))[1]
    written = tokens_of(run(llm, prompts, params))
    assert bool(preempted) == (name == "preemption")
    assert check_requests(llama, adapter, llm, prompts, params, written) > 200
    assert held(llm) == 0


def test_requests_that_do_not_opt_in(llama: Plain, spread: tuple[Path, TokenAdapter], open_llm: OpenLLM) -> None:
    prompts = [llama.ids(text) for text in TEXTS] * 4
    plain_params = [params_of(16, None, temperature=0.9, top_p=0.9, seed=i) for i in range(len(prompts))]
    without = tokens_of(run(open_llm(llama.folder), prompts, plain_params))
    llm = open_llm(llama.folder, spread[0])
    assert tokens_of(run(llm, prompts, plain_params)) == without
    mixed_prompts = [prompt for prompt in prompts for _ in range(2)]
    mixed = [p for i, param in enumerate(plain_params) for p in (param, params_of(5 + i, seed=i))]
    assert tokens_of(run(llm, mixed_prompts, mixed))[::2] == without


def test_several_completions_of_one_request(llama: Plain, spread: tuple[Path, TokenAdapter], open_llm: OpenLLM) -> None:
    folder, adapter = spread
    llm = open_llm(llama.folder, folder)
    prompt = llama.ids(TEXTS[0])
    for seed, name in ((None, "none"), (5, "seed")):
        (output,) = run(llm, [prompt], params_of(24, n=4, trace=name, **({} if seed is None else {"seed": seed})))
        actions = actions_of(llm, name)
        assert sorted(actions) == [0, 1, 2, 3]
        assert len({tuple(of) for of in actions.values()}) == 4  # streams of their own
        if seed is None:
            continue
        for done in output.outputs:  # B is n
            pi_TA = expected_pi(llama, adapter, prompt, tuple(done.token_ids), 24, 4)
            stream = derive_seed(seed, done.index) if done.index else seed
            assert check_actions(pi_TA, stream, actions[done.index]) > 15


def test_the_same_seed_gives_the_same_actions_and_none_others(
    llama: Plain, spread: tuple[Path, TokenAdapter], open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_llm(llama.folder, spread[0])
    seen = watch(llm, monkeypatch)
    drawn = {}
    for name, fields in {"a": {"seed": 3}, "b": {"seed": 3}, "c": {"seed": 4}, "d": {}, "e": {}}.items():
        seen.pi.clear()
        run(llm, [llama.ids(TEXTS[0])], params_of(1, trace=name, **fields))
        ((drawn[name], _),) = seen.pi
    assert drawn["a"] == drawn["b"] == 3
    assert len(set(drawn.values())) == 4


def test_commit_takes_the_most_probable_action(
    llama: Plain, spread: tuple[Path, TokenAdapter], open_llm: OpenLLM
) -> None:
    folder, adapter = spread
    llm = open_llm(llama.folder, folder)
    prompt = llama.ids(TEXTS[1])
    (written,) = tokens_of(run(llm, [prompt], params_of(40, "commit", trace="commit")))
    pi_TA = expected_pi(llama, adapter, prompt, written, 40, 1)
    top_T2 = np.sort(pi_TA)[:, -2:]
    firm_T = top_T2[:, 1] - top_T2[:, 0] > CLOSE
    assert firm_T.sum() > 30
    assert (np.array(actions_of(llm, "commit")[0])[firm_T] == pi_TA.argmax(1)[firm_T]).all()


def test_aborted_requests_leave_nothing(llama: Plain, spread: tuple[Path, TokenAdapter], open_llm: OpenLLM) -> None:
    folder, adapter = spread
    llm = open_llm(llama.folder, folder)
    engine, rows = llm.llm_engine, rows_of(llm)
    prompts = [llama.ids(text) for text in TEXTS]
    for i, prompt in enumerate(prompts):
        engine.add_request(f"r{i}", {"prompt_token_ids": prompt}, params_of(30, seed=i, trace=f"abort{i}"))
    for _ in range(6):
        engine.step()
    assert rows.requests == len(prompts)
    engine.abort_request(["r0", "r3"])
    done = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            done[output.request_id] = output
    assert held(llm) == 0
    for i in (1, 2, 4):
        written = tuple(done[f"r{i}"].outputs[0].token_ids)
        pi_TA = expected_pi(llama, adapter, prompts[i], written, 30, 1)
        assert check_actions(pi_TA, i, actions_of(llm, f"abort{i}")[0]) > 20


def test_a_thousand_requests_leave_nothing(llama: Plain, spread: tuple[Path, TokenAdapter], open_llm: OpenLLM) -> None:
    folder, adapter = spread
    llm = open_llm(llama.folder, folder, max_num_seqs=32)
    rows = rows_of(llm)
    prompts = [llama.ids(TEXTS[i % len(TEXTS)]) for i in range(1000)]
    params = [params_of(1 + i % 7, "adapt" if i % 3 else None, **({"seed": i} if i % 3 else {})) for i in range(1000)]
    assert len(run(llm, prompts, params)) == 1000
    assert held(llm) == 0
    assert len(rows._name_R) <= 64  # slots were used again
    params = traced(5, "after")
    written = tokens_of(run(llm, prompts[:5], params))
    assert check_requests(llama, adapter, llm, prompts[:5], params, written) > 60


def test_features_and_spaces(llama: Plain, open_llm: OpenLLM, tmp_path: Path) -> None:
    """An adapter of temperatures alone that reads entropy alone."""
    space = ActionSpace((Strategy(0), Strategy(0.5), Strategy(1), Strategy(1.25)))
    adapter = make_adapter(tmp_path / "a", llama.folder, space=space, features=Features.ENTROPY)
    assert isinstance(adapter, TokenAdapter)
    llm = open_llm(llama.folder, tmp_path / "a")
    prompts, params = [llama.ids(text) for text in TEXTS], traced(len(TEXTS), "entropy")
    assert check_requests(llama, adapter, llm, prompts, params, tokens_of(run(llm, prompts, params))) > 60


# --- the sequence level ------------------------------------------------------------------------------------------


def test_sequence_level(llama: Plain, open_llm: OpenLLM, tmp_path: Path) -> None:
    """One action per prompt, by its last hidden state and B, kept over all completions, chunks and preemptions."""
    adapter = make_adapter(tmp_path / "s", llama.folder, "sequence")
    assert isinstance(adapter, SequenceAdapter)
    fields = {"num_gpu_blocks_override": 8, "block_size": 32, "enable_prefix_caching": False, "max_model_len": 160}
    llm = open_llm(llama.folder, tmp_path / "s", max_num_batched_tokens=32, **fields)
    prompts = [llama.ids(text * 2) for text in TEXTS]
    for B in (1, 8):
        params = [params_of(60, seed=50 + i, parallel_budget=B, trace=f"s{B}-{i}") for i in range(len(prompts))]
        run(llm, prompts, params)
        commit = [params_of(3, "commit", parallel_budget=B, trace=f"c{B}-{i}") for i in range(len(prompts))]
        run(llm, prompts, commit)
        for i, prompt in enumerate(prompts):
            pi_PA = adapter.probabilities(llama.forward(prompt)[0][-1:], torch.tensor([B]))
            (uniform,) = uniforms(np.array([50 + i], np.uint64), 0, Purpose.ACTION)
            assert set(actions_of(llm, f"s{B}-{i}")[0]) == {int(np.searchsorted(pi_PA[0].cumsum(0), uniform))}
            assert set(actions_of(llm, f"c{B}-{i}")[0]) == {int(pi_PA.argmax())}
    run(llm, [prompts[0]], params_of(4, n=3, seed=1, trace="n"))
    assert len({tuple(of) for of in actions_of(llm, "n").values()}) == 1  # one action serves all completions
    assert held(llm) == 0


# --- refusals ------------------------------------------------------------------------------------------------------


REFUSED = [
    ({"rheostat": "adapt", "rheostat_sed": 1}, {}, "unknown extra argument 'rheostat_sed'"),
    ({"rheostat_seed": 1}, {}, "must be 'adapt' or 'commit', got None"),
    ({"rheostat": "yes"}, {}, "must be 'adapt' or 'commit', got 'yes'"),
    ({"rheostat": "adapt", "rheostat_parallel_budget": 0}, {}, "at least 1, got 0"),
    ({"rheostat": "adapt", "rheostat_parallel_budget": 2.5}, {}, "whole number"),
    ({"rheostat": "adapt", "rheostat_ticket": 3}, {}, "unknown extra argument"),
    ({"rheostat": "adapt"}, {"temperature": 0.7}, "send temperature=1, not 0.7"),
    ({"rheostat": "adapt"}, {"top_p": 0.9}, "send top_p=1, not 0.9"),
    ({"rheostat": "adapt"}, {"top_k": 20}, "send top_k=0, not 20"),
    ({"rheostat": "adapt"}, {"presence_penalty": 0.5}, "send presence_penalty=0, not 0.5"),
]


def test_requests_that_are_refused(llama: Plain, spread: tuple[Path, TokenAdapter], open_llm: OpenLLM) -> None:
    from vllm.exceptions import VLLMValidationError

    from vllm import SamplingParams

    llm = open_llm(llama.folder, spread[0])
    for extra, fields, message in REFUSED:
        with pytest.raises(VLLMValidationError, match=message):
            run(llm, [llama.ids("a")], SamplingParams(max_tokens=1, extra_args=extra, **fields))


def test_an_adapter_that_changes_under_the_server(
    llama: Plain, open_llm: OpenLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.exceptions import VLLMValidationError

    from rheostat.serving import vllm_plugin

    monkeypatch.setattr(vllm_plugin, "_loaded", {})
    make_adapter(tmp_path / "a", llama.folder)
    llm = open_llm(llama.folder, tmp_path / "a")
    run(llm, [llama.ids("a")], params_of(2))
    make_adapter(tmp_path / "a", llama.folder, features=Features.HIDDEN)
    with pytest.raises(VLLMValidationError, match="has changed since this server started: restart"):
        run(llm, [llama.ids("a")], params_of(2))
    assert run(llm, [llama.ids("a")], params_of(2, None))


def refused(open_llm: OpenLLM, base: Path, folder: Path, error: type[Exception], match: str, **fields: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        open_llm(base, folder, **fields)
    assert "\n" not in str(caught.value)


def test_engines_and_adapters_that_are_refused(
    llama: Plain, spread: tuple[Path, TokenAdapter], open_llm: OpenLLM, tmp_path: Path
) -> None:
    base = llama.folder
    make_adapter(tmp_path / "foreign", base, fingerprint="0" * 32)
    refused(open_llm, base, tmp_path / "foreign", AdapterError, "was trained for")
    make_adapter(tmp_path / "wide", base, hidden_size=128)
    refused(open_llm, base, tmp_path / "wide", AdapterError, "hidden size 128")
    make_adapter(tmp_path / "order", base, space=ActionSpace(SPACE.strategies, Order.TRANSFORMERS))
    refused(open_llm, base, tmp_path / "order", AdapterError, "order of transforms of transformers")
    make_adapter(tmp_path / "mean", base, "sequence", pooling="mean")
    refused(open_llm, base, tmp_path / "mean", AdapterError, "--pooling last")
    refused(open_llm, base, tmp_path / "nothing", AdapterError, "is no adapter")
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    refused(open_llm, base, spread[0], ConfigError, "speculative decoding: switch it off", speculative_config=ngram)
    refused(open_llm, base, spread[0], ConfigError, "LoRA", enable_lora=True)


def test_an_unsupported_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from rheostat.engines.vllm_rows import require_vllm

    require_vllm()
    monkeypatch.setattr(vllm, "__version__", "0.10.2")
    with pytest.raises(ConfigError, match=r"vLLM 0\.10\.2 is not supported, use 0\.\d+"):
        require_vllm()


def test_context(llama: Plain) -> None:
    assert llama.model.config.max_position_embeddings == CONTEXT
