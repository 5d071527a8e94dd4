"""Errors as OpenAI answers them: ``{"error": {"message", "type", "param", "code"}}``."""

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """What went wrong; ``param`` names the field of the request, ``code`` is for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is no success. Its message is read by strangers: no path, no trace."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.headers = status, dict(headers or {})
        self.answer = ErrorAnswer(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    def response(self) -> JSONResponse:
        return JSONResponse(self.answer.model_dump(), self.status, self.headers)


def install(app: FastAPI) -> None:
    """Everything that goes wrong in ``app`` is answered in this shape."""

    @app.exception_handler(ApiError)
    async def ours(_request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return _validation(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: "there is nothing under this path",
            405: f"{request.method} is not possible here",
            400: "the body could not be read: send JSON in UTF-8",
        }.get(error.status_code, HTTPStatus(error.status_code).phrase)
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unexpected(_request: Request, _error: Exception) -> JSONResponse:
        return internal().response()


def internal() -> ApiError:
    """Something is wrong with the server; what, its own log says."""
    return ApiError(500, "the server failed to answer this request", code="internal_error")


def _validation(error: RequestValidationError) -> ApiError:
    """The first thing wrong, with its place; of a union's branches, the one of the right type that came furthest."""
    found = max(error.errors(), key=lambda item: (not item["type"].endswith("_type"), len(item["loc"])))
    if found["type"] == "json_invalid":
        return ApiError(400, "the body is no valid JSON", code="invalid_json")
    # Names of a union's branches stand in the place of an error as well: 'messages', 0, 'content', 'list[TextPart]', 1
    place = [str(part) for part in found["loc"][1:] if isinstance(part, int) or part.isidentifier()]
    place = [part for part in place if part not in ("str", "int", "float", "bool")]
    param = ".".join(place)[:200] or None
    if param is None:
        return ApiError(400, "send a JSON object, with Content-Type: application/json", code="invalid_type")
    what = "unknown option" if found["type"] == "extra_forbidden" else found["msg"]
    return ApiError(400, f"{param}: {what}", param, "invalid_value")
