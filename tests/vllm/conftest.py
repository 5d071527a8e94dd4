"""Everything here runs a real vLLM, in this process, on tiny random models; skipped where vLLM is not installed."""

import gc
import os
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from tiny_vllm import Plain, plain_of, save_model

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

HERE = Path(__file__).parent


def is_installed() -> bool:
    """Asked of the package index: ``import vllm`` would find this folder."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return True
    return False


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("vllm")
            if not is_installed():
                item.add_marker(pytest.mark.skip(reason="needs vLLM (make test-vllm)"))


@pytest.fixture(scope="session", params=["llama", "qwen2", "qwen3"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return plain_of(save_model(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return plain_of(save_model(tmp_path_factory.mktemp("llama"), "llama"))


OpenLLM = Callable[..., Any]


@pytest.fixture
def open_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenLLM]:
    """Makes offline LLMs, with the adapter of a folder or without; they are gone after the test."""
    opened: list[Any] = []

    def make(base: Path, adapter: Path | None = None, **fields: Any) -> Any:
        from rheostat.serving.vllm_entry import ADAPTER, register
        from vllm import LLM

        if adapter is None:
            monkeypatch.delenv(ADAPTER, raising=False)
        else:
            monkeypatch.setenv(ADAPTER, str(adapter))
        register()  # vLLM itself calls it once per process only
        usual = {"dtype": "float32", "enforce_eager": True, "seed": 0, "generation_config": "vllm"}
        opened.append(LLM(str(base), **usual | {"disable_log_stats": True, "use_tqdm_on_load": False} | fields))
        return opened[-1]

    yield make
    opened.clear()
    gc.collect()
