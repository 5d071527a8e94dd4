"""The routes."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from rheostat.decoding.strategy import Strategy
from rheostat.engines.jobs import Job, ServedEngine
from rheostat.errors import ModelError
from rheostat.seeding import derive_seed
from rheostat.serving.server import errors, limits
from rheostat.serving.server.answers import Asked
from rheostat.serving.server.errors import ApiError, ErrorAnswer
from rheostat.serving.server.guard import Guard
from rheostat.serving.server.metrics import Metrics
from rheostat.serving.server.models import Models, ServedModel
from rheostat.serving.server.playground import Playground
from rheostat.serving.server.scheduler import Scheduler, Ticket
from rheostat.serving.server.schemas import (
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Health,
    Mode,
    ModelCard,
    ModelList,
    Sampled,
)
from rheostat.types import Prompt


class Server:
    """An app and what it holds.

    Args:
        models: what requests may name.
        key: the API key; None: none is asked for, and only this machine's names are answered.
        rows: completions that run at a time.
        waiting: completions that may wait.
    """

    def __init__(
        self, models: Models, key: str | None = None, rows: int = limits.ROWS, waiting: int = limits.WAITING
    ) -> None:
        self.models = models
        self.engine: ServedEngine = models.engine
        self.metrics = Metrics()
        self.scheduler = Scheduler(self.engine, self.metrics, rows, waiting)
        self.playground = Playground()
        self.api = _routes(self)
        self.app = Guard(self.api, key, self.metrics)

    def drain(self) -> None:
        """Take no new work; what was accepted goes on."""
        self.app.is_draining = True
        self.scheduler.stop()

    def close(self) -> None:
        """End everything."""
        self.drain()
        self.playground.close()
        self.scheduler.close()

    # ---- from a request to jobs ----

    def model(self, name: str) -> ServedModel:
        found = self.models.by_id.get(name)
        if found is None:
            raise ApiError(404, "there is no such model: GET /v1/models lists them", "model", "model_not_found")
        return found

    async def ask_chat(self, request: ChatRequest) -> Asked:
        model = self.model(request.model)
        roles = {"developer": "system"}
        turns = [{"role": roles.get(m.role, m.role), "content": m.text} for m in request.messages]
        try:
            text = await asyncio.to_thread(self.engine.chat_text, turns)
        except ModelError:
            raise ApiError(
                400, "this model has no chat template: use /v1/completions", "messages", "no_chat_template"
            ) from None
        except Exception as error:  # whatever a template raises, as for roles that do not take turns
            raise ApiError(
                400, "the model's chat template does not take this conversation", "messages", "chat_template"
            ) from error
        top = (request.top_logprobs or 0) if request.logprobs else None
        budget = request.max_completion_tokens or request.max_tokens
        return await self._asked(request, model, [text], budget, limits.CHAT_TOKENS, top, is_chat=True)

    async def ask_completion(self, request: CompletionRequest) -> Asked:
        model = self.model(request.model)
        prompts, budget, default = request.prompts, request.max_tokens, limits.COMPLETION_TOKENS
        return await self._asked(request, model, prompts, budget, default, request.logprobs, is_chat=False)

    async def _asked(
        self,
        request: Sampled,
        model: ServedModel,
        prompts: list[Any],
        budget: int | None,
        default: int,
        top: int | None,
        is_chat: bool,
    ) -> Asked:
        if len(prompts) * request.n > limits.SAMPLES:
            raise ApiError(400, f"prompts times n must be at most {limits.SAMPLES}", "n", "invalid_value")
        mode = _mode(request, model)
        options = request.rheostat
        has_trace = options is not None and options.trace
        seed = secrets.randbits(48) if request.seed is None else request.seed
        jobs, probabilities = [], []
        for prompt in prompts:
            text, ids = await asyncio.to_thread(self._tokens, prompt)
            tokens = self._budget(len(ids), budget, default)
            asked = Prompt(f"prompt-{derive_seed(text):016x}", text, request.stops)
            job = Job(asked, ids, request.n, seed, tokens, request.n, details=has_trace, top=self._top(top))
            found: dict[str, float] = {}
            if mode == "static":
                job.strategy = _strategy(request)
            else:
                found = model.adapt(job, mode)
            jobs.append(job)
            probabilities.append(found)
        usage = request.stream_options is not None and request.stream_options.include_usage
        return Asked(model, self.engine, jobs, probabilities, mode, is_chat, has_trace, usage)

    def _top(self, top: int | None) -> int | None:
        return None if top is None else min(top, len(self.engine.vocabulary.texts))

    def _tokens(self, prompt: str | list[int]) -> tuple[str, list[int]]:
        vocabulary = self.engine.vocabulary
        last = len(vocabulary.texts) - 1
        if not isinstance(prompt, str) and max(prompt) > last:
            raise ApiError(400, f"prompt: this model's tokens are 0 to {last}", "prompt", "invalid_value")
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise ApiError(400, "the prompt holds half a surrogate pair", "prompt", "invalid_value") from None
        ids = self.engine.encode(prompt)
        if not ids:
            raise ApiError(400, "the prompt is empty: give the model some text", "prompt", "invalid_value")
        return (prompt if isinstance(prompt, str) else vocabulary.decode(prompt)), ids

    def _budget(self, length: int, budget: int | None, default: int) -> int:
        context = self.engine.info.context_length
        left = context - length
        wanted = min(default, left) if budget is None else budget
        if left < 1 or wanted > left:
            more = "" if budget is None else f" and max_tokens {budget}"
            raise ApiError(
                400,
                f"the prompt has {length} tokens{more}, and the model's context holds {context}",
                "max_tokens" if left >= 1 else "prompt",
                "context_length_exceeded",
            )
        return wanted


def _mode(request: Sampled, model: ServedModel) -> Mode:
    """Explicit sampling parameters switch the adapter off, unless the request says otherwise."""
    wanted = None if request.rheostat is None else request.rheostat.mode
    if wanted not in (None, "static") and model.adapter is None:
        raise ApiError(400, "rheostat.mode: this model has no adapter", "rheostat.mode", "no_adapter")
    if wanted is not None:
        return wanted
    return "static" if model.adapter is None or request.samples_explicitly else "adapt"


def _strategy(request: Sampled) -> Strategy:
    top_k = request.top_k if request.top_k is not None and request.top_k > 0 else None
    temperature = 1.0 if request.temperature is None else request.temperature
    return Strategy(temperature, top_k, request.top_p, request.min_p)


class EventStream(Response):
    """Server-sent events of one ticket. A client that goes away, or takes nothing for a minute, ends it."""

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, pieces: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._ticket, self._pieces = ticket, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_cancel_when_gone(receive, self._ticket))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for piece in self._pieces:
                async with asyncio.timeout(limits.SEND_SECONDS):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, OSError):
            pass  # gone, or as good as gone
        finally:
            self._ticket.cancel()
            watcher.cancel()


async def _cancel_when_gone(receive: Receive, ticket: Ticket) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    ticket.cancel()


async def _answer(server: Server, request: Request, asked: Asked, is_stream: bool) -> Response:
    ticket = server.scheduler.submit(asked.jobs)
    if is_stream:
        return EventStream(ticket, asked.pieces(ticket))
    watcher = asyncio.create_task(_cancel_when_gone(request.receive, ticket))
    try:
        answer = await asked.whole(ticket)
    finally:
        ticket.cancel()
        watcher.cancel()
    return Response(status_code=499) if answer is None else JSONResponse(answer)


def _describe(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer} for status in statuses}


def _routes(server: Server) -> FastAPI:
    api = FastAPI(title="Rheostat", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    errors.install(api)
    common = _describe(400, 401, 403, 404, 408, 413, 429, 500, 503)
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    stream = {"text/event-stream": {"schema": event}}

    @api.post(
        "/v1/chat/completions",
        response_model=ChatAnswer,
        responses=common | {200: {"content": stream}},
        operation_id="chat",
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answer(server, request, await server.ask_chat(body), body.stream)

    @api.post(
        "/v1/completions",
        response_model=CompletionAnswer,
        responses=common | {200: {"content": stream}},
        operation_id="complete",
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await _answer(server, request, await server.ask_completion(body), body.stream)

    @api.get("/v1/models", responses=_describe(401, 403), operation_id="models")
    async def models() -> ModelList:
        return ModelList(object="list", data=server.models.cards())

    @api.get("/v1/models/{model:path}", responses=_describe(400, 401, 403, 404), operation_id="model")
    async def model(model: str) -> ModelCard:
        return server.model(model).card(server.engine, server.models.created)

    @api.get("/health", responses=_describe(403), operation_id="health")
    async def health() -> Health:
        status = "draining" if server.app.is_draining else "ok"
        return Health(status=status, running=server.scheduler.running, waiting=server.scheduler.waiting)

    @api.get(
        "/metrics",
        response_class=Response,
        responses=_describe(401, 403) | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        operation_id="metrics",
    )
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    server.playground.install(api)
    _document_errors_as_400(api)
    return api


def _document_errors_as_400(api: FastAPI) -> None:
    """FastAPI documents 422 for invalid requests; ours are answered with 400."""
    made = api.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document

    api.openapi = openapi  # type: ignore[method-assign]
