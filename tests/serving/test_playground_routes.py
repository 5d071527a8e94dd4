"""The playground's page, and the problems that it asks and judges."""

import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

import rheostat
from conftest import Running, Serve  # type: ignore[import-not-found]
from rheostat.errors import RheostatError
from rheostat.reports.figures import svg
from rheostat.tasks.base import Split
from rheostat.tasks.procedural import PROCEDURAL, procedural_task
from rheostat.tasks.workers import Crashed, Hung, Raised, WorkerPool
from rheostat.types import Completion, FinishReason

FOLDER = Path(rheostat.__file__).parent / "serving" / "playground"
FILES = sorted(path.name for path in FOLDER.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]


def text(name: str) -> str:
    return (FOLDER / name).read_text()


def problem(server: Running, **fields: Any) -> Any:
    return httpx2.get(f"{server.url}/v1/playground/problem", params=fields, timeout=60).json()


def verdicts(server: Running, *completions: tuple[str, str], task: str = "gcd", number: Any = 1) -> httpx2.Response:
    written = [{"text": text, "finish_reason": reason} for text, reason in completions]
    return server.post("/v1/playground/verdicts", {"task": task, "number": number, "completions": written})


@pytest.mark.parametrize("name", FILES)
def test_files_are_served_as_they_are(server: Running, name: str) -> None:
    answer = httpx2.get(f"{server.url}/playground/{name}")
    assert answer.text == text(name)
    kind = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}[Path(name).suffix]
    assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_at_the_root(server: Running) -> None:
    page = httpx2.get(f"{server.url}/")
    assert page.text == text("index.html")
    assert "content-security-policy" in page.headers


def test_the_page_loads_its_own_files_only() -> None:
    named = re.findall(r'(?:src|href)="(?!data:)playground/([^"]+)"', text("index.html"))
    named += re.findall(r'from "\./([^"]+)"', "".join(map(text, SCRIPTS)))
    assert {*named, "index.html"} == set(FILES)
    for name in FILES:
        assert not re.search(r"https?:|//\w+\.|@import|url\(", text(name)), name
    assert not re.search(r"<script(?! type=\"module\" src=)|<style|style=|\son\w+=", text("index.html"))


def test_text_is_never_set_as_markup() -> None:
    ways = r"innerHTML|outerHTML|insertAdjacent|document\.write|setHTML|DOMParser|srcdoc|\beval\b|ContextualFragment"
    for name in SCRIPTS:
        assert not re.search(ways, text(name)), name


def test_colours_are_those_of_the_reports() -> None:
    used = set(re.findall(r"var\(--(\w+)\)", text("style.css"))) & svg.THEME.keys()
    assert {"paper", "ink", "accent"} <= used
    light, dark = text("style.css").split("prefers-color-scheme: dark")
    for name in used:
        for side, wanted in zip((light, dark), svg.THEME[name], strict=True):
            assert re.findall(rf"--{name}: (#\w+);", side) == [wanted], name


@pytest.mark.parametrize("name", ["app.py", "..%2Fserver%2Fapp.py", "%2e%2e/server/app.py", "", "__pycache__"])
def test_nothing_else_is_served(server: Running, name: str) -> None:
    answer = httpx2.get(f"{server.url}/playground/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_tasks_are_those_that_need_no_network(server: Running) -> None:
    listed = httpx2.get(f"{server.url}/v1/playground/tasks").json()
    assert listed == {"tasks": list(PROCEDURAL), "problems": 200}


@pytest.mark.parametrize("name", PROCEDURAL)
def test_problems_are_the_tasks_own(server: Running, name: str) -> None:
    """Members take turns; the test split of a task gives them one after the other."""
    task = procedural_task(name)
    members = len(task.members)
    each = -(-200 // members)
    every = task.problems(Split.TEST, members * each)
    for number in (1, 2, 7, 200):
        turn, member = divmod(number - 1, members)
        wanted = every[member * each + turn]
        prompt = task.prompt(wanted)
        assert problem(server, task=name, number=number) == {
            "task": name,
            "number": number,
            "member": wanted.member,
            "question": wanted.question,
            "answer": wanted.answer,
            "prompt": prompt.text,
            "stop": list(prompt.stop),
            "max_tokens": task.max_tokens,
        }


@pytest.mark.parametrize("name", ["gcd", "steps"])
def test_verdicts_are_the_tasks_own(server: Running, name: str) -> None:
    task = procedural_task(name)
    members = len(task.members)
    for number in range(1, members + 1):
        wanted = task.problems(Split.TEST, members)[number - 1]
        texts = [f" {wanted.answer} ", wanted.answer + "0", "", "(" * 5000, f"so\nAnswer: {wanted.answer}"]
        written = [(text, reason) for text in texts for reason in ("stop", "length")]
        answer = verdicts(server, *written, task=name, number=number)
        assert answer.status_code == 200
        found = [verdict["correct"] for verdict in answer.json()["verdicts"]]
        expected = [task.verify(wanted, Completion(t, (), FinishReason(r))).correct for t, r in written]
        assert found == expected
        assert found[1] is False  # cut by the budget


def test_right_and_wrong(server: Running) -> None:
    answer = problem(server, task="gcd", number=4)["answer"]
    found = verdicts(server, (answer, "stop"), (answer, "length"), (f"{answer}1", "stop"), number=4).json()
    assert [verdict["correct"] for verdict in found["verdicts"]] == [True, False, False]
    assert "token budget" in found["verdicts"][1]["detail"]


@pytest.mark.parametrize(
    ("failure", "wanted"),
    [(Hung("late"), False), (Crashed("gone"), False), (Raised("ValueError", "/secret/path"), None)],
)
def test_what_a_completion_does_to_its_verifier(
    server: Running, monkeypatch: pytest.MonkeyPatch, failure: Any, wanted: bool | None
) -> None:
    def call(_pool: WorkerPool, *_arguments: object) -> object:
        if isinstance(failure, Exception):
            raise failure
        return failure

    monkeypatch.setattr(WorkerPool, "call", call)
    answer = verdicts(server, ("1", "stop"))
    assert answer.json()["verdicts"][0]["correct"] is wanted
    assert "secret" not in answer.text


def test_a_verifier_that_cannot_start_is_503(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(_pool: WorkerPool, *_arguments: object) -> object:
        raise RheostatError("no such file: /secret/path")

    monkeypatch.setattr(WorkerPool, "call", call)
    for answer in (
        verdicts(server, ("1", "stop")),
        httpx2.get(f"{server.url}/v1/playground/problem?task=gcd&number=1"),
    ):
        assert answer.status_code == 503
        assert "secret" not in answer.text


def test_others_are_answered_while_a_verifier_thinks(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    release, begun = threading.Event(), threading.Event()

    def call(_pool: WorkerPool, *_arguments: object) -> object:
        begun.set()
        release.wait(20)
        return {"correct": True, "detail": ""}

    monkeypatch.setattr(WorkerPool, "call", call)
    waiting = [threading.Thread(target=verdicts, args=(server, ("1", "stop"))) for _ in range(40)]
    for thread in waiting:
        thread.start()
    try:
        assert begun.wait(10)
        time.sleep(0.1)
        start = time.monotonic()
        assert httpx2.get(f"{server.url}/health").json()["status"] == "ok"
        assert server.complete().status_code == 200  # its prompt is read by a thread, of which some are free
        assert time.monotonic() - start < 5
    finally:
        release.set()
        for thread in waiting:
            thread.join(20)


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "nothing", "number": 1},
        {"task": "/etc/passwd", "number": 1},
        {"task": "task.py:Task", "number": 1},
        {"task": "math", "number": 1},
        {"task": "demo+steps", "number": 1},
        {"task": "x" * 5000, "number": 1},
        {"task": "gcd", "number": 0},
        {"task": "gcd", "number": 201},
        {"task": "gcd", "number": "one"},
        {"task": "gcd"},
        {"number": 1},
    ],
)
def test_problems_that_are_not_there(server: Running, fields: dict[str, Any]) -> None:
    whole = {"completions": [{"text": "1", "finish_reason": "stop"}]} | fields
    for answer in (
        httpx2.get(f"{server.url}/v1/playground/problem", params=fields),
        server.post("/v1/playground/verdicts", whole),
    ):
        assert answer.status_code in (400, 404), answer.text
        assert answer.json()["error"]["message"]
        assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "completions",
    [
        [],
        [{"text": "1", "finish_reason": "stop"}] * 129,
        [{"text": "1", "finish_reason": "later"}],
        [{"text": 1, "finish_reason": "stop"}],
        [{"text": "1" * 100_001, "finish_reason": "stop"}],
        ["1"],
        None,
    ],
)
def test_completions_that_are_none(server: Running, completions: object) -> None:
    body = {"task": "gcd", "number": 1, "completions": completions}
    answer = server.post("/v1/playground/verdicts", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("completions")


def test_half_a_surrogate_pair_is_no_text(server: Running) -> None:
    body = '{"task": "gcd", "number": 1, "completions": [{"text": "\\ud800", "finish_reason": "stop"}]}'
    headers = {"Content-Type": "application/json"}
    answer = httpx2.post(f"{server.url}/v1/playground/verdicts", content=body, headers=headers, timeout=60)
    assert answer.status_code == 400


def test_the_page_is_open_and_what_works_needs_the_key(serve: Serve) -> None:
    server = serve(key="secret")
    for path in ("/", "/playground/main.js"):
        assert httpx2.get(f"{server.url}{path}").status_code == 200
    paths = ("/v1/playground/tasks", "/v1/playground/problem?task=gcd&number=1")
    headers = {"Authorization": "Bearer secret"}
    assert [httpx2.get(f"{server.url}{path}").status_code for path in paths] == [401, 401]
    assert verdicts(server, ("1", "stop")).status_code == 401
    assert [httpx2.get(f"{server.url}{path}", headers=headers, timeout=60).status_code for path in paths] == [200, 200]
