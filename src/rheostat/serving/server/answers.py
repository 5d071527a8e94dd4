"""Answers as OpenAI writes them: whole, and in pieces over server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from rheostat.engines.decode import Vocabulary
from rheostat.engines.jobs import Job, LogProbabilities, ServedEngine, TokenDetails, Written
from rheostat.serving.server.errors import ApiError
from rheostat.serving.server.models import ServedModel
from rheostat.serving.server.scheduler import Ticket
from rheostat.serving.server.schemas import Mode

_PIECE = "\ufffd"  # how half a character is shown


class TextStream:
    """The text of a completion, piece by piece.

    It holds back what a later token could change, or a stop string take away. The pieces together are the text of the
    whole completion.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str]) -> None:
        self._vocabulary, self._stop = vocabulary, stop
        self._tokens: list[int] = []
        self._first = self._read = 0  # tokens whose text is known, and where the window that shows new text begins
        self._text = ""
        self._sent = 0

    def push(self, token: int) -> str:
        """What may be sent after one token more, which did not end the completion."""
        self._tokens.append(token)
        before = self._vocabulary.decode(self._tokens[self._first : self._read])
        now = self._vocabulary.decode(self._tokens[self._first :])
        if len(now) > len(before) and not now.endswith(_PIECE):
            self._text += now[len(before) :]
            self._first, self._read = self._read, len(self._tokens)
        return self._release(len(self._text) - self._held())

    def finish(self, text: str) -> str:
        """The rest of the completion's text."""
        self._text = text
        return self._release(len(text))

    def _held(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        return max(
            (n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])),
            default=0,
        )

    def _release(self, end: int) -> str:
        piece = self._text[self._sent : max(end, self._sent)]
        self._sent += len(piece)
        return piece


@dataclass(eq=False)
class Asked:
    """A request on its way: its jobs, and what its answer says about them."""

    model: ServedModel
    engine: ServedEngine
    jobs: Sequence[Job]
    probabilities: Sequence[dict[str, float]]  # of each job
    mode: Mode
    is_chat: bool
    has_trace: bool
    include_usage: bool

    def __post_init__(self) -> None:
        self._created = int(time.time())
        self._id = ("chatcmpl-" if self.is_chat else "cmpl-") + secrets.token_hex(12)
        self._position = {job: number for number, job in enumerate(self.jobs)}
        self._prompt_tokens = sum(len(job.token_ids) for job in self.jobs)

    def index(self, event: Written) -> int:
        """Of the choice that a token belongs to."""
        return self._position[event.job] * event.job.samples + event.sample

    # ---- whole ----

    async def whole(self, ticket: Ticket) -> dict[str, Any] | None:
        """The answer; None where the client has gone."""
        count = sum(job.samples for job in self.jobs)
        written: list[list[Written]] = [[] for _ in range(count)]
        async for event in ticket.events():
            written[self.index(event)].append(event)
        if ticket.is_cancelled:
            return None
        choices = [self._choice(index, events) for index, events in enumerate(written)]
        usage = self._usage(sum(map(len, written)))
        return self._envelope("", choices) | {"usage": usage, "rheostat": self._info()}

    def _choice(self, index: int, events: Sequence[Written]) -> dict[str, Any]:
        completion = events[-1].completion
        assert completion is not None
        content = (
            {"message": {"role": "assistant", "content": completion.text}}
            if self.is_chat
            else {"text": completion.text}
        )
        logprobs = self._logprobs(events, 0)
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": str(completion.finish_reason)}
        extra = self._extra(events, len(self.jobs) > 1)
        return choice | ({"rheostat": extra} if extra else {})

    # ---- in pieces ----

    async def pieces(self, ticket: Ticket) -> AsyncIterator[bytes]:
        """The chunks of a stream, as server-sent events."""
        streams: dict[int, TextStream] = {}
        held: dict[int, list[Written]] = {}
        offsets: dict[int, int] = {}
        tokens, is_first = 0, True
        try:
            async for event in ticket.events():
                index = self.index(event)
                tokens += 1
                if index not in streams:
                    streams[index] = TextStream(self.engine.vocabulary, event.job.prompt.stop)
                    held[index], offsets[index] = [], 0
                    opening = self._piece(index, None, [], None, 0)
                    opening |= {"rheostat": self._info()} if is_first else {}
                    if self.is_chat or is_first:
                        yield _event(opening)
                    is_first = False
                if event.completion is None:
                    piece = streams[index].push(event.token_id)
                else:
                    piece = streams[index].finish(event.completion.text)
                held[index].append(event)
                # log-probabilities and traces go out with their own token, though its text may be held back
                if piece or self.has_trace or event.completion is not None:
                    yield _event(self._piece(index, piece, held[index], event, offsets[index]))
                    offsets[index] += len(piece)
                    held[index] = []
        except ApiError as error:
            yield _event(error.answer.model_dump())
            return
        if ticket.is_cancelled:
            return
        if self.include_usage:
            yield _event(self._envelope(".chunk", []) | {"usage": self._usage(tokens)})
        yield b"data: [DONE]\n\n"

    def _piece(
        self, index: int, text: str | None, events: Sequence[Written], last: Written | None, offset: int
    ) -> dict[str, Any]:
        """A chunk of one choice; without ``text`` the one that opens it."""
        if self.is_chat:
            delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
            choice: dict[str, Any] = {"index": index, "delta": delta}
        else:
            choice = {"index": index, "text": text or ""}
        completion = None if last is None else last.completion
        choice["logprobs"] = self._logprobs(events, offset) if events else None
        choice["finish_reason"] = None if completion is None else str(completion.finish_reason)
        extra = self._extra(events, bool(events) and len(self.jobs) > 1)
        return self._envelope(".chunk", [choice | ({"rheostat": extra} if extra else {})])

    # ---- both ----

    def _envelope(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.is_chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model.id, "choices": choices}

    def _usage(self, tokens: int) -> dict[str, int]:
        total = self._prompt_tokens + tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": tokens, "total_tokens": total}

    def _info(self) -> dict[str, Any]:
        is_adapted = self.mode != "static"
        job = self.jobs[0]
        return {
            "mode": self.mode,
            "adapter": self.model.name if is_adapted else None,
            "level": self.model.level if is_adapted else None,
            "seed": job.seed,
            "actions": self.model.actions if is_adapted else None,
            "strategy": None if job.strategy is None else str(job.strategy),
            "probabilities": self.probabilities[0] or None,
        }

    def _extra(self, events: Sequence[Written], says_strategy: bool) -> dict[str, Any]:
        """The choice's own ``rheostat``: strategies where prompts differ, and the trace."""
        extra: dict[str, Any] = {}
        if says_strategy:
            job = events[0].job
            extra["strategy"] = None if job.strategy is None else str(job.strategy)
            extra["probabilities"] = self.probabilities[self._position[job]] or None
        if self.has_trace and events:
            extra["trace"] = [self._trace(event) for event in events]
        return extra

    def _trace(self, event: Written) -> dict[str, Any]:
        details = event.details
        assert isinstance(details, TokenDetails)
        return {
            "text": self.engine.pieces([event.token_id])[0],
            "action": details.action,
            "temperature": round(details.temperature, 4),
            "top_p": round(details.top_p, 4),
            "entropy": round(details.entropy, 4),
            "p_max": round(details.p_max, 4),
            "pi": None if details.pi is None else [round(share, 4) for share in details.pi],
            "remaining": details.remaining,
        }

    def _logprobs(self, events: Sequence[Written], offset: int) -> dict[str, Any] | None:
        if events[0].job.top is None:
            return None
        own = [(event.token_id, event.log_probabilities) for event in events]
        found = [(token, likely) for token, likely in own if likely is not None]
        return {"content": [self._chat_logprob(*pair) for pair in found]} if self.is_chat else self._text(found, offset)

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        (text,) = self.engine.pieces([token])
        return {"token": text, "logprob": logprob, "bytes": None if _PIECE in text else list(text.encode())}

    def _chat_logprob(self, token: int, likely: LogProbabilities) -> dict[str, Any]:
        return self._token(token, likely.own) | {"top_logprobs": [self._token(*pair) for pair in likely.top]}

    def _text(self, found: Sequence[tuple[int, LogProbabilities]], offset: int) -> dict[str, Any]:
        """The older shape; ``text_offset`` counts the texts of the tokens."""
        texts = self.engine.pieces([token for token, _ in found])
        starts = [offset]
        for text in texts[:-1]:
            starts.append(starts[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [likely.own for _, likely in found],
            "top_logprobs": [
                dict(
                    zip(self.engine.pieces([token for token, _ in likely.top]), [p for _, p in likely.top], strict=True)
                )
                for _, likely in found
            ],
            "text_offset": starts,
        }


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
