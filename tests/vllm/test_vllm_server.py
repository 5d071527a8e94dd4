"""vLLM's OpenAI server with the plug-in, over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_vllm import SPACE, TEXTS, Plain, make_adapter

from rheostat.adapters.token import Features


def command(base: Path, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name"),
        *("tiny", "--dtype", "float32", "--enforce-eager", "--port", str(port), "--host", "127.0.0.1"),
        *("--generation-config", "vllm", "--max-num-seqs", "8"),
    ]


def environment(adapter: Path) -> dict[str, str]:
    own = {"RHEOSTAT_ADAPTER": str(adapter), "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return os.environ | own


@pytest.fixture(scope="module")
def served(llama: Plain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("served")
    adapter, log = folder / "adapter", folder / "log"
    make_adapter(adapter, llama.folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as file:
        process = subprocess.Popen(
            command(llama.folder, port), env=environment(adapter), stdout=file, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield address, adapter
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def client(served: tuple[str, Path]) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


def ask(client: Any, text: str, tokens: int = 8, **fields: Any) -> Any:
    extra = {"vllm_xargs": fields.pop("xargs")} if "xargs" in fields else {}
    return client.completions.create(
        model="tiny", prompt=text, max_tokens=tokens, extra_body=extra | {"ignore_eos": True}, **fields
    )


def actions(address: str, name: str) -> dict[str, list[int]]:
    body = json.dumps({"method": "rheostat_actions", "args": [name]}).encode()
    request = urllib.request.Request(f"{address}/collective_rpc", body, {"Content-Type": "application/json"})
    (found,) = json.loads(urllib.request.urlopen(request).read())["results"]
    return dict(found)


@pytest.mark.timeout(400)
def test_adapted_and_plain_requests_side_by_side(client: Any, served: tuple[str, Path]) -> None:
    greedy = {text: ask(client, text, temperature=0).choices[0].text for text in TEXTS}
    jobs = [(text, adapted) for text in TEXTS for adapted in (True, False)] * 2

    def one(job: tuple[int, tuple[str, bool]]) -> Any:
        number, (text, adapted) = job
        if not adapted:
            return ask(client, text, temperature=0)
        return ask(
            client, text, xargs={"rheostat": "adapt", "rheostat_seed": 2**63 + 9, "rheostat_trace": f"h{number}"}
        )

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, enumerate(jobs)))
    for number, ((text, adapted), answer) in enumerate(zip(jobs, answers, strict=True)):
        assert answer.usage.completion_tokens == 8
        if not adapted:
            assert answer.choices[0].text == greedy[text]
            continue
        chosen = actions(served[0], f"h{number}")["0"]
        assert len(chosen) == 8
        assert set(chosen) <= set(range(len(SPACE)))
    first = {text: actions(served[0], f"h{n}")["0"][0] for n, (text, adapted) in enumerate(jobs) if adapted}
    again = {
        text: actions(served[0], f"h{n}")["0"][0] for n, (text, adapted) in reversed(list(enumerate(jobs))) if adapted
    }
    assert first == again  # the same stream and state, another batch


def test_n_and_streaming(client: Any, served: tuple[str, Path]) -> None:
    answer = ask(client, TEXTS[0], n=3, xargs={"rheostat": "adapt", "rheostat_trace": "n3"})
    assert len(answer.choices) == 3
    assert sorted(actions(served[0], "n3")) == ["0", "1", "2"]
    pieces = list(ask(client, TEXTS[0], stream=True, xargs={"rheostat": "commit"}))
    assert len(pieces) > 1


@pytest.mark.parametrize(
    ("xargs", "fields", "message"),
    [
        ({"rheostat": "adapt", "rheostat_sed": 3}, {}, "unknown extra argument 'rheostat_sed'"),
        ({"rheostat": "on"}, {}, "must be 'adapt' or 'commit'"),
        ({"rheostat": "adapt"}, {"temperature": 0.3}, "send temperature=1"),
    ],
)
def test_bad_requests_are_answered_400(
    client: Any, xargs: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, TEXTS[0], xargs=xargs, **fields)


def test_a_changed_adapter_is_answered_400(client: Any, served: tuple[str, Path], llama: Plain) -> None:
    """Last: the server's adapter is another one afterwards."""
    import openai

    ask(client, TEXTS[0], xargs={"rheostat": "adapt"})
    make_adapter(served[1], llama.folder, features=Features.HIDDEN)
    with pytest.raises(openai.BadRequestError, match="has changed since this server started"):
        ask(client, TEXTS[0], xargs={"rheostat": "adapt"})
    assert ask(client, TEXTS[0], temperature=0).usage.completion_tokens == 8


@pytest.mark.timeout(240)
def test_a_foreign_adapter_keeps_the_server_from_starting(llama: Plain, tmp_path: Path) -> None:
    make_adapter(tmp_path / "foreign", llama.folder, fingerprint="0" * 32)
    done = subprocess.run(
        command(llama.folder, 1), env=environment(tmp_path / "foreign"), capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0
    assert "this adapter was trained for" in done.stderr.strip().splitlines()[-1]
