"""The playground: a page that shows what an adapter does, and the problems that it asks and judges.

The page is plain files; it talks to the API as any client does. Its own routes stand under ``/v1``, where the API key
counts, and are no part of the API's document.
"""

import asyncio
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from fastapi import FastAPI, Query
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from rheostat.errors import RheostatError
from rheostat.serving.server import limits
from rheostat.serving.server.errors import ApiError
from rheostat.tasks.procedural import PROCEDURAL
from rheostat.tasks.workers import CallFailed, Raised, WorkerPool

PROBLEMS: Final = 200  # of each task
_SECONDS: Final = 5.0  # for one verdict
_FOLDER: Final = Path(__file__).parent.parent / "playground"
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

Number = Annotated[int, Field(ge=1, le=PROBLEMS)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Written(_Request):
    """A completion to judge: its text without the stop string, and why it ended."""

    text: Annotated[str, Field(max_length=100_000)]
    finish_reason: Literal["stop", "length"]


class VerdictsRequest(_Request):
    """Completions of one problem."""

    task: Annotated[str, Field(max_length=100)]
    number: Number
    completions: Annotated[list[Written], Field(min_length=1, max_length=limits.SAMPLES)]


class Playground:
    """The routes and the worker process behind them, which starts when it is first needed."""

    def __init__(self) -> None:
        self._files = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _TYPES}
        self._pool = WorkerPool("rheostat.serving.server.problems:consult", timeout=_SECONDS, workers=1)
        self._turn = asyncio.Lock()  # who waits for the worker takes no thread from others

    def close(self) -> None:
        """End the worker; what is being judged gets 503."""
        self._pool.close()

    def install(self, api: FastAPI) -> None:
        """Add the routes to ``api``."""

        @api.get("/", include_in_schema=False)
        async def page() -> Response:
            return self._file("index.html")

        @api.get("/playground/{name}", include_in_schema=False)
        async def file(name: str) -> Response:
            return self._file(name)

        @api.get("/v1/playground/tasks", include_in_schema=False)
        async def tasks() -> dict[str, Any]:
            return {"tasks": PROCEDURAL, "problems": PROBLEMS}

        @api.get("/v1/playground/problem", include_in_schema=False)
        async def problem(task: Annotated[str, Query(max_length=100)], number: Annotated[Number, Query()]) -> Any:
            found = await self._consult("ask", _known(task), number)
            if isinstance(found, Raised):
                raise RuntimeError(f"{found.type}: {found.message}")  # a defect of ours: 500, and logged
            return found

        @api.post("/v1/playground/verdicts", include_in_schema=False)
        async def verdicts(body: VerdictsRequest) -> dict[str, Any]:
            _known(body.task)
            return {"verdicts": [await self._verdict(body, written) for written in body.completions]}

    def _file(self, name: str) -> Response:
        if name not in self._files:
            raise ApiError(404, "there is nothing under this path")
        return Response(self._files[name], media_type=_TYPES[Path(name).suffix], headers=_HEADERS)

    async def _verdict(self, body: VerdictsRequest, written: Written) -> object:
        try:
            found = await self._consult("judge", body.task, body.number, written.text, written.finish_reason)
        except CallFailed:
            return {"correct": False, "detail": "the verifier did not get through it"}
        return {"correct": None, "detail": "the verifier failed"} if isinstance(found, Raised) else found

    async def _consult(self, *arguments: object) -> object:
        async with self._turn:
            try:
                return await asyncio.to_thread(self._pool.call, *arguments)
            except CallFailed:
                raise
            except RheostatError as error:
                raise ApiError(503, "the tasks are not available", code="tasks_unavailable") from error


def _known(task: str) -> str:
    if task not in PROCEDURAL:
        raise ApiError(404, "there is no such task: GET /v1/playground/tasks lists them", "task", "task_not_found")
    return task
