"""Memory and cores as the system says them; what the C library is told shows in page faults."""

import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from rheostat.engines import machine
from rheostat.engines.machine import free_memory, steady, usable_cores, use_usable_cores

CPU = torch.device("cpu")

SCRIPT = """
import resource, sys, threading, torch
from rheostat.engines.machine import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def steps():
    for _ in range(50):
        parts = [torch.ones(1 << 19) for _ in range(20)]  # 40 MiB in all
        del parts
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt)

thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_steps_take_the_memory_that_they_freed() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", SCRIPT, mode]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    pages = 40 * 256
    assert faults("keep") < 3 * pages
    assert faults("leave") > 6 * pages


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Files of a control group, by name."""
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)

    def write(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text + "\n")

    return write


def test_free_memory_is_the_containers_where_it_has_a_limit(group: Callable[..., None]) -> None:
    machines = psutil.virtual_memory().available
    assert free_memory(CPU) == pytest.approx(machines, rel=0.1)
    group(memory_max="max", memory_current="123", memory_stat="inactive_file 5")
    assert free_memory(CPU) == pytest.approx(machines, rel=0.1)
    group(memory_max="70000000", memory_current="50000000", memory_stat="anon 7\ninactive_file 1000000\nfile 9")
    assert free_memory(CPU) == 21_000_000  # a file's pages are given up when somebody asks
    group(memory_max="70000000", memory_current="90000000", memory_stat="anon 7")
    assert free_memory(CPU) == 0


def test_steady_sizes() -> None:
    assert [steady(size) for size in (-5, 0, 1, 2, 3, 4, 1023, 1024, 9 << 30)] == [0, 0, 1, 2, 2, 4, 512, 1024, 8 << 30]


def test_cores_of_a_quota_and_of_hyperthreads(
    group: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "_TOPOLOGY", str(tmp_path / "cpu{}"))
    assert usable_cores() == 8  # nobody says who shares a core
    for cpu in range(8):
        (tmp_path / f"cpu{cpu}").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert usable_cores() == 4
    for quota, cores in (("max 100000", 4), ("250000 100000", 2), ("20000 100000", 1), ("900000 100000", 4)):
        group(cpu_max=quota)
        assert usable_cores() == cores, quota


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_follow_the_cores_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    torch.set_num_threads(7)
    use_usable_cores()
    assert torch.get_num_threads() == 7
    monkeypatch.delenv("OMP_NUM_THREADS")
    use_usable_cores()
    assert torch.get_num_threads() == 3
    monkeypatch.setattr(machine, "usable_cores", lambda: 64)
    use_usable_cores()
    assert torch.get_num_threads() == 3  # whoever has set fewer means it
