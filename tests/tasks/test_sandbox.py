"""The sandbox against programs that attack it; what they did is looked at from outside."""

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rheostat.errors import RheostatError
from rheostat.tasks import sandbox as sandbox_module
from rheostat.tasks import sandbox_connection
from rheostat.tasks.sandbox import Ending, Limits, Outcome, Sandbox, missing_protections

pytestmark = pytest.mark.skipif(bool(missing_protections()), reason="programs cannot be isolated here")

LIMITS = Limits(cpu_seconds=1, wall_seconds=4.0, memory_bytes=256 << 20)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(LIMITS)


def once(sandbox: Sandbox, program: str, given: str = "") -> Outcome:
    (outcome,) = sandbox.run(program, [given])
    return outcome


def sandboxed_processes() -> set[int]:
    """All descendants of the launcher, zombies aside."""
    parents, found = {}, set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    process = sandbox_connection._launcher._process
    assert process is not None
    wanted = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in wanted} - found:
        found |= more
        wanted = more
    return found


def command_lines_with(marker: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text(errors="replace")
        except OSError:
            continue
        if marker in line:
            found.append(line)
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After every test: no process, and no file in the temporary directory, of ours."""
    before = {path for path in Path(tempfile.gettempdir()).iterdir() if "MARK" in path.name}
    yield
    assert sandboxed_processes() == set()
    assert {path for path in Path(tempfile.gettempdir()).iterdir() if "MARK" in path.name} == before


def test_output_follows_input(sandbox: Sandbox) -> None:
    outcomes = list(sandbox.run("print(sum(map(int, open(0).read().split())))", ["1 2", "3 4 5", ""]))
    assert [(o.ending, o.exit_code, o.output) for o in outcomes] == [
        (Ending.EXITED, 0, "3\n"),
        (Ending.EXITED, 0, "12\n"),
        (Ending.EXITED, 0, "0\n"),
    ]


@pytest.mark.parametrize(
    "program",
    [
        "import os\nprint(os.read(0, os.fstat(0).st_size).decode())",
        "print(open('/dev/stdin').read())",
        "import sys, atexit, io\nold, sys.stdout = sys.stdout, io.StringIO()\n"
        "atexit.register(lambda: old.write(sys.stdout.getvalue()))\nprint(input())",
        "out = open(1, 'w', closefd=False)\nout.write(input())",
        "import threading\nthreading.stack_size(1 << 26)\nthreading.Thread(target=lambda: print(input())).start()",
        "print(input())\nexit()",
        "import os, sys\nclass Out:\n    def write(self, s): self.s = s\n    def flush(self): os.write(1, b'hello')\n"
        "sys.stdout = Out()\nsys.stdout.write(sys.stdin.read())",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\n"
        "if __name__ == '__main__': print(A(input()).x)",
    ],
)
def test_the_ways_in_which_contest_programs_read_and_write(sandbox: Sandbox, program: str) -> None:
    outcome = once(sandbox, program, "hello")
    assert (outcome.output.strip(), outcome.ending) == ("hello", Ending.EXITED), outcome.error


def test_leaving_the_loop_saves_the_remaining_runs(sandbox: Sandbox) -> None:
    given = []

    def inputs() -> Iterator[str]:
        for number in range(100):
            given.append(number)
            yield str(number)

    for outcome in sandbox.run("print(input())", inputs()):
        if outcome.output == "2\n":
            break
    assert given == [0, 1, 2]


@pytest.mark.parametrize(
    ("program", "ending"),
    [
        ("while True: pass", Ending.TIMED_OUT),
        ("import time; time.sleep(100)", Ending.TIMED_OUT),
        ("9**9**9**9", Ending.TIMED_OUT),
        ("import signal\nfor s in (15, 24, 2, 1): signal.signal(s, 1)\nwhile True: pass", Ending.TIMED_OUT),
        ("x = bytearray(10 << 30)", Ending.OVER_MEMORY),
        ("x = bytearray(300 << 20)", Ending.OVER_MEMORY),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", Ending.OVER_MEMORY),
        ("import os\nfor _ in range(2): os.fork()\nx = bytearray(100 << 20)\nx[::4096] = b'1' * len(x[::4096])\n"
         "import time; time.sleep(100)", Ending.OVER_MEMORY),
        ("while True: print('x' * 1000)", Ending.OVER_OUTPUT),
        ("import sys; sys.exit(3)", Ending.CRASHED),
        ("import os; os.abort()", Ending.CRASHED),
        ("1 / 0", Ending.CRASHED),
        ("def f(", Ending.CRASHED),
        ("print(1)\0", Ending.CRASHED),
        ("(" * 100_000, Ending.CRASHED),
    ],
)  # fmt: skip
def test_endings(sandbox: Sandbox, program: str, ending: Ending) -> None:
    outcome = once(sandbox, program)
    assert outcome.ending == ending, outcome.error
    assert len(outcome.output) <= LIMITS.file_bytes


def test_a_fork_bomb_stays_small_and_ends(sandbox: Sandbox) -> None:
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], len(sandboxed_processes()))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    sandboxed_processes()
    watcher.start()
    outcome = once(sandbox, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    done.set()
    watcher.join()
    assert outcome.ending is Ending.TIMED_OUT
    assert 3 < most[0] <= LIMITS.processes + 5


@pytest.mark.parametrize("ignoring", ["", "import signal; signal.signal(15, 1); signal.signal(1, 1); "])
def test_grandchildren_that_detach_die_with_the_program(sandbox: Sandbox, ignoring: str) -> None:
    marker = f"MARK{os.getpid()}"
    program = f"""
import os, subprocess, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "{ignoring}import time; time.sleep(1000) # {marker}"])
    os._exit(0)
os.wait()
import time; time.sleep(0.5)
print(open("/proc/self/stat").read() != "")
"""
    seen = []
    watcher = threading.Thread(target=lambda: [seen.extend(command_lines_with(marker)) or time.sleep(0.05)
                                               for _ in range(30)])  # fmt: skip
    watcher.start()
    assert once(sandbox, program).output == "True\n"
    watcher.join()
    assert seen, "the grandchild never ran, so that its end proves nothing"
    assert command_lines_with(marker) == []


def test_a_grandchild_that_floods_and_holds_the_output_delays_nothing(sandbox: Sandbox) -> None:
    program = "import os\nif os.fork() == 0:\n    while True: os.write(1, b'x')\nprint('done', flush=True)"
    start = time.monotonic()
    assert "done" in once(sandbox, program).output
    assert time.monotonic() - start < LIMITS.wall_seconds


def attempt(action: str) -> str:
    return f"import os, sys, socket\ntry:\n    {action}\nexcept OSError as e: print('refused')\nelse: print('done')"


@pytest.mark.parametrize(
    "path",
    [
        f"{tempfile.gettempdir()}/MARK-escaped",
        str(Path.home() / "MARK-escaped"),
        f"{sys.base_prefix}/lib/MARK-escaped",
        "/dev/shm/MARK-escaped",
        "/MARK-escaped",
        "/usr/MARK-escaped",
    ],
)
def test_no_file_is_written_outside(sandbox: Sandbox, path: str) -> None:
    once(sandbox, attempt(f"open({path!r}, 'w').write('x')"))
    assert not Path(path).exists()


def test_the_working_directory_is_empty_limited_and_new_for_each_run(sandbox: Sandbox) -> None:
    program = "import os\nprint(os.listdir())\nopen('a', 'w').write('x')\nos.mkdir('b')"
    assert [o.output for o in sandbox.run(program, ["", ""])] == ["[]\n", "[]\n"]
    fill = "".join(f"open('{name}', 'wb').write(b'x' * {LIMITS.file_bytes})\n" for name in "abcdef")
    assert "No space left" in once(sandbox, fill).error
    assert (
        "File too large" in once(sandbox, f"with open('a', 'wb') as f: f.write(b'x' * {LIMITS.file_bytes + 1})").error
    )


def test_the_installation_cannot_be_changed(sandbox: Sandbox) -> None:
    outcome = once(sandbox, attempt("os.chmod(os.__file__, 0o777); open(os.__file__, 'a')"))
    assert outcome.output == "refused\n"


def test_the_hosts_files_are_not_there(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "answers.jsonl"
    secret.write_text("42")
    secret.chmod(0o644)
    for path in (str(secret), "/etc/passwd", __file__):
        assert once(sandbox, attempt(f"print(open({path!r}).read())")).output == "refused\n"


def test_the_parents_environment_is_out_of_reach(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHEOSTAT_SECRET", "MARK-secret")
    program = f"""
import glob, os
print(dict(os.environ))
for pid in [str(os.getppid()), "1", "{os.getpid()}", *(p[6:] for p in glob.glob("/proc/[0-9]*"))]:
    for name in ("environ", "mem", "maps"):
        try: print(open(f"/proc/{{pid}}/{{name}}", "rb").read(4096))
        except OSError: pass
"""
    outcome = once(sandbox, program)
    assert outcome.ending is Ending.EXITED
    assert "SECRET" not in outcome.output
    assert "PATH" not in outcome.output


def test_descriptors_are_three(sandbox: Sandbox) -> None:
    program = """
import os
for number in range(3, 4096):
    try: os.fstat(number)
    except OSError: continue
    print(number)
"""
    assert once(sandbox, program).output == ""


def test_thousands_of_open_files_are_refused(sandbox: Sandbox) -> None:
    program = """
files = []
try:
    while True: files.append(open("/dev/null"))
except OSError: print(len(files))
"""
    assert int(once(sandbox, program).output) == LIMITS.open_files - 3


def test_address_space_counts_before_it_is_touched(sandbox: Sandbox) -> None:
    assert once(sandbox, attempt("__import__('mmap').mmap(-1, 300 << 20)")).output == "refused\n"


def test_cpu_time_is_limited_apart_from_wall_time() -> None:
    outcome = once(Sandbox(Limits(cpu_seconds=1, wall_seconds=60.0)), "while True: pass")
    assert (outcome.ending, outcome.exit_code) == (Ending.TIMED_OUT, -signal.SIGXCPU)


@pytest.mark.parametrize("family", ["AF_INET", "AF_UNIX"])
def test_no_network_not_even_localhost(sandbox: Sandbox, family: str) -> None:
    with socket.socket(getattr(socket, family)) as listener:
        listener.bind(("127.0.0.1", 0) if family == "AF_INET" else f"\0MARK{os.getpid()}")
        listener.listen()
        listener.settimeout(0.3)
        with socket.socket(getattr(socket, family)) as check:
            check.connect(listener.getsockname())
            listener.accept()[0].close()
        connect = f"socket.socket(socket.{family}).connect({listener.getsockname()!r})"
        assert once(sandbox, attempt(connect)).output == "refused\n"
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    "target",
    ["os.getppid()", "1", "-1", "0", str(os.getpid())],
    ids=["parent", "first", "all", "group", "tests"],  # no process number, which differs between those that collect
)
def test_signals_reach_nobody_outside(sandbox: Sandbox, target: str) -> None:
    bystander = os.fork()
    if bystander == 0:
        time.sleep(60)
        os._exit(0)
    try:
        program = f"import os, signal\nfor s in (9, 15, 19, 2): os.kill({target}, s)"
        outcomes = list(sandbox.run(program, ["", ""]))
        assert len(outcomes) == 2
        assert all(outcome.ending is Ending.CRASHED for outcome in outcomes)
        assert os.waitpid(bystander, os.WNOHANG) == (0, 0)
    finally:
        os.kill(bystander, 9)
        os.waitpid(bystander, 0)


@pytest.mark.parametrize(
    "action",
    [
        "os.setuid(0)",
        "os.chroot('/usr')",
        "__import__('ctypes').CDLL(None).unshare(0x10000000) and open('/nothing')",
        "__import__('ctypes').CDLL(None).mount(b'a', b'/tmp', b'tmpfs', 0, None) and open('/nothing')",
        "__import__('ctypes').CDLL(None).ptrace(16, 1, 0, 0) and open('/nothing')",
    ],
)
def test_privileges_are_gone(sandbox: Sandbox, action: str) -> None:
    assert once(sandbox, attempt(action)).output == "refused\n"


def test_runs_do_not_see_each_other(sandbox: Sandbox) -> None:
    """One leaves a System V shared memory segment and a process; the next finds neither."""
    program = """
import ctypes, os, time
libc = ctypes.CDLL(None)
print(libc.shmget(4242, 4096, 0o600) == -1, len([p for p in os.listdir("/proc") if p.isdigit()]))
libc.shmget(4242, 4096, 0o1600)
if os.fork() == 0: os.setsid(); time.sleep(100)
"""
    assert [o.output for o in sandbox.run(program, ["", ""])] == ["True 2\n", "True 2\n"]


def test_threads_share_a_sandbox(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(4) as pool:
        outcomes = pool.map(lambda n: once(sandbox, "print(int(input()) ** 2)", str(n)).output, range(20))
        assert list(outcomes) == [f"{n * n}\n" for n in range(20)]


def test_the_launcher_is_started_again_when_it_died(sandbox: Sandbox) -> None:
    process = sandbox_connection._launcher._process
    assert process is not None
    process.kill()
    process.wait()
    assert once(sandbox, "print(1)").output == "1\n"


def test_order_of_sets_is_the_same_in_every_run(sandbox: Sandbox) -> None:
    program = "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'}))"
    first = once(sandbox, program).output
    sandbox_connection._launcher.stop()
    assert once(sandbox, program).output == first


def test_without_isolation_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "missing_protections", lambda: ("no namespaces here", "the network"))
    with pytest.raises(RheostatError, match=r"no namespaces here.*require_isolation=False"):
        Sandbox(LIMITS)
    with pytest.warns(RuntimeWarning, match="without isolation: no namespaces here; the network"):
        plain = Sandbox(LIMITS, require_isolation=False)
    assert once(plain, "print(input())", "5").output == "5\n"
    assert once(plain, "open('a', 'w').write('x')").ending is Ending.EXITED
    assert once(plain, "while True: pass").ending is Ending.TIMED_OUT
    assert plain.test("def f(x): return x + 1", "assert f(1) == 2", "f").ending is Ending.EXITED


def test_a_sandbox_that_does_not_start_is_an_error(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_connection, "_START", "raise SystemExit")
    sandbox_connection._launcher.stop()
    try:
        with pytest.raises(RheostatError, match="sandbox"):
            once(sandbox, "print(1)")
    finally:
        monkeypatch.undo()
        sandbox_connection._launcher.stop()
    assert once(sandbox, "print(1)").output == "1\n"


FORGERIES = {
    "right": ("def f(x): return x + 1", True),
    "wrong": ("def f(x): return x + 2", False),
    "exit at once": ("import os\nos._exit(0)", False),
    "exit politely": ("import sys\nsys.exit(0)", False),
    "SystemExit in the call": ("def f(x): raise SystemExit(0)", False),
    "_exit in the call": ("import os\ndef f(x): os._exit(0)", False),
    "an object equal to all": ("class A:\n    def __eq__(s, o): return True\ndef f(x): return A()", False),
    "a number equal to all": ("class A(int):\n    def __eq__(s, o): return True\ndef f(x): return A(9)", False),
    "a proxy equal to all": ("from unittest.mock import ANY\ndef f(x): return ANY", False),
    "printing success": ("print('passed', 'ok', True)\ndef f(x): return 0", False),
    "other built-ins": (
        "import builtins\nbuiltins.AssertionError = None\nbuiltins.len = builtins.sorted = lambda *a: 0\n"
        "builtins.isinstance = lambda *a: True\ndef f(x): return 0",
        False,
    ),
    "other modules": ("class math:\n    isclose = lambda *a: True\ndef f(x): return 0", False),
    "the tests' module": (
        "import sys\nfrom rheostat.tasks import sandbox_calls as c\nc.run_tests = lambda *a: None\n"
        "c.Remote.__eq__ = lambda *a: True\ndef f(x): return object()",
        False,
    ),
    "writing to all descriptors": (
        "import os\nfor fd in range(3, 64):\n    for text in (b'{\"ending\": \"exited\"}\\n', b'\\x80\\x05\\x88.'):\n"
        "        try: os.write(fd, text)\n        except OSError: pass\nos._exit(0)",
        False,
    ),
    "a pickle that runs code": (
        "import os\nos.write(3, b\"cposix\\n_exit\\n(I0\\ntR.\")\nimport time; time.sleep(100)", False),
    "a pickle that changes a class": (
        "import os\nos.write(3, b'\\x80\\x02cbuiltins\\nint\\n(N}X\\x06\\x00\\x00\\x00__eq__cbuiltins\\nbool\\nstb.')\n"
        "import time; time.sleep(100)", False),
    "killing the tests": ("import os\nos.kill(-1, 9)", False),
    "an exception that ends loops": ("def f(x): raise StopIteration", False),
    "nothing there": ("g = 1", False),
    "an endless generator": ("def f(x):\n    while True: yield 1", False),
}  # fmt: skip


TESTS = {
    "other built-ins": "assert isinstance(f(1), str) or len([f(1)]) == 0",
    "other modules": "assert math.isclose(f(1), 2)",
    "an exception that ends loops": "for x in map(f, [1]): assert x == 2",
    "an endless generator": "assert list(f(1)) == [1]",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_verdicts_on_calls_cannot_be_forged(sandbox: Sandbox, name: str) -> None:
    program, right = FORGERIES[name]
    tests = TESTS.get(name, "assert f(1) == 2")
    assert (sandbox.test(program, tests, "f").ending is Ending.EXITED) == right


def test_the_program_cannot_see_its_tests(sandbox: Sandbox) -> None:
    """It searches all that its interpreter still holds, and what it can read of processes."""
    program = """
import gc, glob, sys
MARK = "MARK" + "-expected"
def f(x):
    for path in glob.glob("/proc/[0-9]*/mem") + glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/fd/*"):
        try: open(path, "rb").close()
        except OSError: continue
        if not path.startswith(f"/proc/{__import__('os').getpid()}/"): return "read " + path
    frame, start = sys._getframe(), []
    while frame: start, frame = start + [frame.f_locals, frame.f_globals], frame.f_back
    seen, todo = set(), start + list(sys.modules.values()) + gc.get_objects()
    while todo:
        value = todo.pop()
        if id(value) in seen: continue
        seen.add(id(value))
        if isinstance(value, str) and MARK in value and value is not MARK: return "found"
        if not isinstance(value, str): todo += gc.get_referents(value)
    return len(seen) > 10_000
"""
    generous = Sandbox(Limits(cpu_seconds=10))
    outcome = generous.test(program, "assert f(1) is True  # MARK-expected", "f")
    assert outcome.ending is Ending.EXITED, outcome.error


def test_what_tests_can_do_with_a_programs_objects(sandbox: Sandbox) -> None:
    program = """
from collections import Counter, namedtuple
import itertools
class Node:
    def __init__(self, value): self.value, self.next = value, None
def total(node): return node.value + (total(node.next) if node.next else 0)
def squares(): return (n * n for n in range(3))
def counts(text): return Counter(text)
def point(): return [namedtuple("P", "x y")(1, 2.5), {3}, frozenset("a"), 1j, b"b", None, True]
def fails(): raise KeyError("k")
def sum(a, b=1): return a * b
"""
    tests = """
a = Node(1); a.next = Node(2)
assert total(a) == 3 and a.next.value == 2
assert list(squares()) == [0, 1, 4]
assert counts("aab") == {"a": 2, "b": 1}
assert point() == [(1, 2.5), {3}, frozenset("a"), 1j, b"b", None, True]
try: fails()
except KeyError: pass
else: assert False
assert sum(3, b=4) == 12 and max(1, 2) == 2 and math.floor(2.5) == 2
"""
    outcome = sandbox.test(program, tests, "sum")
    assert outcome.ending is Ending.EXITED, outcome.error
