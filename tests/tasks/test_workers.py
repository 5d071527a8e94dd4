"""Killable workers: calls that hang, crash or eat memory; threads, forks and ends of the interpreter."""

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rheostat.errors import RheostatError
from rheostat.tasks.workers import CallFailed, Crashed, Hung, Raised, WorkerPool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

FUNCTIONS = """
import ctypes, os, signal, subprocess, sys, time

def echo(value):
    return value

def pid(seconds=0):
    time.sleep(seconds)
    return os.getpid()

def act(what, value=None):
    match what:
        case "echo":
            return value
        case "loop":
            while True:
                pass
        case "c code":  # holds the interpreter's lock: no signal handler of Python's would run
            return len(str(9 ** 9 ** 9))
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(3)
        case "die once":
            if not os.path.exists(value):
                open(value, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return "second try"
        case "memory":
            return len(bytearray(value))
        case "noise":
            print('{"value": "not this"}', flush=True)
            os.write(1, b"nor this\\n")
            sys.stdout.write("x" * 100_000)
            return [sys.stdin.read(), "this"]
        case "raise":
            raise KeyError("lost")
        case "leave":
            sys.exit(5)
        case "child":
            child = subprocess.Popen(["sleep", "600"])
            open(value, "w").write(str(child.pid))
            time.sleep(600)
        case "no json":
            return object()
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def pool(functions: Path) -> Iterator[WorkerPool]:
    with WorkerPool(f"{functions}:act", timeout=30, workers=2) as pool:
        yield pool


@pytest.fixture
def hasty(functions: Path) -> Iterator[WorkerPool]:
    with WorkerPool(f"{functions}:act", timeout=1, workers=1) as pool:
        yield pool


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def workers_of(pid: int) -> set[int]:
    """Worker processes among the children of a process."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) if entry.name.isdigit() else 0
            if parent == pid and b"worker.py" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


_others: set[int] = set()


@pytest.fixture(autouse=True)
def _workers_of_other_tests() -> None:
    """A pool that another module's fixture still holds is none of these tests' business."""
    _others.clear()
    _others.update(workers_of(os.getpid()))


def own_workers() -> set[int]:
    """Workers that this process has started since the test began."""
    return workers_of(os.getpid()) - _others


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


VALUES = {
    "none": None,
    "nested": [1, 2.5, {"a": None}],
    "lines": "a\nb\r\n\u2028",
    "nul": "nul \0",
    "surrogate": "\ud800 alone",
    "scripts": "ﷺ 答案 ٣",
    "large": -(10**30),
    "megabytes": "é" * 1_000_000,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_come_back_as_they_went(pool: WorkerPool, value: object) -> None:
    assert pool.call("echo", value) == value


def test_modules_and_files_are_targets(functions: Path) -> None:
    with WorkerPool("operator:add", timeout=30, workers=1) as pool:
        assert pool.call(2, 3) == 5


def test_a_module_that_only_this_process_can_import(functions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(functions.parent)
    with WorkerPool("functions:echo", timeout=30, workers=1) as pool:
        assert pool.call("here") == "here"


def test_what_a_function_raises_is_a_value(pool: WorkerPool) -> None:
    assert pool.call("raise") == Raised("KeyError", "'lost'")
    assert pool.call("leave") == Raised("SystemExit", "5")
    lost = pool.call("no json")
    assert isinstance(lost, Raised)
    assert lost.type == "TypeError"


@pytest.mark.parametrize("what", ["loop", "c code"])
def test_what_hangs_is_killed_and_replaced(hasty: WorkerPool, what: str) -> None:
    hasty.call("echo")
    before = own_workers()
    start = time.monotonic()
    with pytest.raises(Hung, match=r"functions.py:act took longer than 1 s"):
        hasty.call(what)
    assert 1 <= time.monotonic() - start < 10
    assert not before & own_workers()
    assert hasty.call("echo", "next") == "next"


def test_what_a_hanging_call_started_ends_with_it(hasty: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(Hung):
        hasty.call("child", str(tmp_path / "pid"))
    child = int((tmp_path / "pid").read_text())
    assert eventually(lambda: not alive(child))


def test_a_request_that_nobody_reads_is_late_too(hasty: WorkerPool) -> None:
    hasty.call("echo")
    (worker,) = own_workers()
    os.kill(worker, 19)  # stopped: a megabyte does not fit into the pipe
    with pytest.raises(Hung):
        hasty.call("echo", "x" * 1_000_000)
    assert hasty.call("echo", "next") == "next"


@pytest.mark.parametrize("what", ["segfault", "exit"])
def test_a_call_that_crashes_twice(pool: WorkerPool, what: str) -> None:
    with pytest.raises(Crashed, match=r"functions.py:act ended its process") as caught:
        pool.call(what)
    assert isinstance(caught.value, CallFailed)
    assert pool.call("echo", "next") == "next"


def test_a_crash_that_was_not_the_calls_fault_is_forgiven(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.call("die once", str(tmp_path / "tried")) == "second try"
    for worker in own_workers():
        os.kill(worker, 9)
    assert pool.call("echo", "next") == "next"


def test_memory_has_a_limit(functions: Path) -> None:
    with WorkerPool(f"{functions}:act", timeout=30, workers=1, memory=300 << 20) as pool:
        assert pool.call("memory", 200 << 20) == 200 << 20
        with pytest.raises(Crashed):
            pool.call("memory", 400 << 20)
        assert pool.call("echo", "next") == "next"


def test_what_a_function_prints_and_reads_is_not_the_protocol(pool: WorkerPool) -> None:
    for _ in range(3):
        assert pool.call("noise") == ["", "this"]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("rheostat.no_such_module:f", "No module named"),
        ("operator:no_such_function", "no_such_function"),
        ("operator", "Empty module name"),
        ("no/such/file.py:f", "no/such/file.py"),
        ("sys:path", "is not a function"),
        ("BROKEN:f", "ZeroDivisionError: division by zero"),
        ("ENDS:f", "its worker process ended at the import"),
    ],
)
def test_a_target_that_cannot_be_called_is_one_clear_line(tmp_path: Path, target: str, reason: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "ends.py").write_text("import os; os._exit(1)")
    target = target.replace("BROKEN", f"{tmp_path}/broken.py").replace("ENDS", f"{tmp_path}/ends.py")
    with WorkerPool(target, timeout=5, workers=1) as pool:
        for _ in range(2):  # the slot is free again
            with pytest.raises(RheostatError) as caught:
                pool.call(1)
            assert not isinstance(caught.value, CallFailed)
            message = str(caught.value)
            assert message.startswith(target)
            assert reason in message
            assert "\n" not in message
    assert not own_workers()


def test_imports_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time; time.sleep(2)\ndef f(): return 'ready'")
    with WorkerPool(f"{tmp_path}/slow.py:f", timeout=1, workers=1) as pool:
        assert pool.call() == "ready"


def test_sixteen_threads_share_two_workers(functions: Path) -> None:
    with WorkerPool(f"{functions}:echo", timeout=30, workers=2) as pool, ThreadPoolExecutor(16) as threads:
        texts = [str(number) * 1000 for number in range(400)]
        assert list(threads.map(pool.call, texts)) == texts
        assert len(own_workers()) == 2


def test_workers_start_when_they_are_needed(functions: Path) -> None:
    with WorkerPool(f"{functions}:pid", timeout=30, workers=4) as pool:
        assert not own_workers()
        assert len({pool.call() for _ in range(3)}) == 1
        with ThreadPoolExecutor(4) as threads:
            assert len(set(threads.map(pool.call, [1.0] * 4))) == 4


def test_a_worker_outlives_the_thread_that_started_it(functions: Path) -> None:
    with WorkerPool(f"{functions}:pid", timeout=30, workers=1) as pool:
        with ThreadPoolExecutor(1) as thread:
            first = thread.submit(pool.call).result()
        assert pool.call() == first


def test_asyncio(pool: WorkerPool) -> None:
    async def calls() -> list[object]:
        return await asyncio.gather(*(asyncio.to_thread(pool.call, "echo", n) for n in range(20)))

    assert asyncio.run(calls()) == list(range(20))


def test_an_interrupted_call_does_not_answer_the_next(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(data: object) -> dict[str, object]:
        raise KeyboardInterrupt

    pool.call("echo")
    with monkeypatch.context() as patch:
        patch.setattr("rheostat.tasks.workers.json.loads", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.call("echo", "interrupted")
    assert pool.call("echo", "next") == "next"
    assert len(own_workers()) == 1


def test_closing_ends_idle_workers_calls_under_way_and_calls_to_come(functions: Path) -> None:
    pool = WorkerPool(f"{functions}:act", timeout=60, workers=2)
    pool.call("echo")
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(pool.call, "loop") for _ in range(3)]
        assert eventually(lambda: len(own_workers()) == 2)
        pool.close()
        for call in calls:
            with pytest.raises(RheostatError, match="is closed"):
                call.result(timeout=20)
    assert not own_workers()
    with pytest.raises(RheostatError, match="is closed"):
        pool.call("echo")


def test_a_forgotten_pool_ends_its_workers(functions: Path) -> None:
    pool = WorkerPool(f"{functions}:pid", timeout=30, workers=1)
    worker = pool.call()
    assert isinstance(worker, int)
    assert alive(worker)
    del pool
    gc.collect()
    assert eventually(lambda: not alive(worker))


SCRIPT = """
import os, sys, threading, time
from rheostat.tasks.workers import WorkerPool
print("imported", flush=True)  # twice, were this file imported by a worker
pool = WorkerPool(sys.argv[1] + ":pid", timeout=3, workers=2)
print(pool.call(), flush=True)
{then}
"""


def run(functions: Path, then: str) -> tuple["subprocess.Popen[str]", int]:
    """A script without a main guard that has called its pool; and its worker."""
    script = functions.with_name("script.py")
    script.write_text(SCRIPT.format(then=then))
    process = subprocess.Popen([sys.executable, script, functions], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "imported\n"
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("then", ["", "sys.exit(0)", "raise SystemExit", "threading.Thread(target=pool.call).start()"])
def test_the_end_of_the_interpreter_leaves_no_process(functions: Path, then: str) -> None:
    process, worker = run(functions, then)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 0
    assert eventually(lambda: not alive(worker))


def test_an_idle_worker_follows_a_killed_parent(functions: Path) -> None:
    process, worker = run(functions, "time.sleep(600)")
    assert alive(worker)
    process.kill()
    process.communicate()
    assert eventually(lambda: not alive(worker))


def test_a_hanging_worker_follows_a_killed_parent(functions: Path) -> None:
    then = (
        "pool.target = sys.argv[1] + ':act'; threading.Thread(target=pool.call, args=(600,)).start(); time.sleep(600)"
    )
    process, worker = run(functions, then)
    time.sleep(0.5)  # the call is under way
    process.kill()
    process.communicate()
    assert eventually(lambda: not alive(worker), seconds=30)  # its timeout of 3 s, and 5


FORK = """
child = os.fork()
if child == 0:
    mine = pool.call()
    print(mine, flush=True)
    sys.exit(0)  # runs what the interpreter has to do at its end
os.waitpid(child, 0)
print(pool.call(), flush=True)
"""


def test_a_fork_has_workers_of_its_own_and_leaves_its_parents_alone(functions: Path) -> None:
    process, worker = run(functions, FORK)
    childs, parents = map(int, process.communicate(timeout=60)[0].split())
    assert childs != worker
    assert parents == worker
    assert eventually(lambda: not alive(childs) and not alive(worker))


def test_a_fork_that_lives_on_does_not_keep_its_parents_workers(functions: Path) -> None:
    process, worker = run(functions, "if child := os.fork(): print(child, flush=True)\ntime.sleep(600)")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.kill()
        assert eventually(lambda: not alive(worker))
        assert alive(child)
    finally:
        os.kill(child, 9)
        process.communicate()
