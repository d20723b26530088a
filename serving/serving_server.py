"""The HTTP side of `vlbridge serve`: an ASGI app before our engine, and its checks as a middleware for vLLM's."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from .serving_engine import Answer, Engine, Job
from .serving_requests import (
    FAILED,
    Limits,
    RequestError,
    limits_of_environment,
    new_tokens,
    parsed,
    read_messages,
    read_request,
    refused,
)


CHAT = "/v1/chat/completions"
READERS = 4  # requests whose pictures are read at the same time
POLL_SECONDS = 0.25  # how often a waiting request looks whether its client is still there


def refusal(error: RequestError) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if error.status not in (429, 503) else "overloaded_error"
    content = {"error": {"message": str(error), "type": kind, "code": error.status, "param": None}}
    return JSONResponse(content, error.status)


async def read_body(chunks: AsyncIterator[bytes], max_bytes: int) -> bytes:
    """A request's body, as far as the limit.

    Raises:
        RequestError: It is longer.
    """
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > max_bytes:
            raise RequestError(
                f"The request has more than {max_bytes} bytes, the most that this server takes. Send smaller pictures.",
                413,
            )
    return bytes(body)


class App:
    """The endpoints: chat completions, models, health and metrics.

    Args:
        engine: What answers.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.readers = CapacityLimiter(READERS)
        self.started = int(time.time())

    def asgi(self) -> Starlette:
        """The app, for uvicorn."""
        return Starlette(
            routes=[
                Route(CHAT, self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ]
        )

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: the base and its bridges."""
        entry = {"object": "model", "created": self.started, "owned_by": "vlbridge"}
        return JSONResponse({"object": "list", "data": [{"id": name, **entry} for name in self.engine.names]})

    async def health(self, request: Request) -> Response:
        """`GET /health`: 200 if the engine works, else 503."""
        healthy = self.engine.healthy()
        return JSONResponse({"status": "ok" if healthy else "the engine has ended"}, 200 if healthy else 503)

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`: counters, in Prometheus' text format."""
        counts = {name: 0 for name in ("answered", "failed", "cancelled", "refused", "batches", "tokens", "seconds")}
        counts.update(self.engine.counts)
        lines = [f"vlbridge_{name}_total {value:g}" for name, value in counts.items()]
        return PlainTextResponse("\n".join([f"vlbridge_waiting {self.engine.waiting}", *lines, ""]))

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        limits = self.engine.limits
        try:
            body = await read_body(request.stream(), limits.max_bytes)
            asked = await to_thread.run_sync(partial(read_request, body, limits), limiter=self.readers)
            pieces: asyncio.Queue[str] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            on_text = partial(loop.call_soon_threadsafe, pieces.put_nowait) if asked.stream else None
            job = await to_thread.run_sync(self.engine.prepare, asked, on_text, limiter=self.readers)
            self.engine.submit(job)
        except RequestError as error:
            return refusal(error)
        about = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model or self.engine.name,
        }
        if asked.stream:
            return StreamingResponse(self.events(job, pieces, about), media_type="text/event-stream")
        return await self.whole(request, job, about)

    async def whole(self, request: Request, job: Job, about: dict) -> Response:
        """The answer at once; a client that leaves frees its place."""
        future = asyncio.wrap_future(job.done)
        while not (await asyncio.wait({future}, timeout=POLL_SECONDS))[0]:
            if await request.is_disconnected():
                job.cancelled.set()
                return Response(status_code=499)
        if future.cancelled():
            return Response(status_code=499)
        if (error := future.exception()) is not None:
            return failure(error)
        answer = future.result()
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": usage(job, answer)})

    async def events(self, job: Job, pieces: asyncio.Queue, about: dict) -> AsyncIterator[str]:
        """The answer as server-sent events."""

        def event(delta: dict, reason: str | None = None, **more) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            content = {**about, "object": "chat.completion.chunk", "choices": [choice], **more}
            return f"data: {json.dumps(content)}\n\n"

        future = asyncio.wrap_future(job.done)
        try:
            yield event({"role": "assistant", "content": ""})
            while not (future.done() and pieces.empty()):
                next_piece = asyncio.ensure_future(pieces.get())
                await asyncio.wait({future, next_piece}, return_when=asyncio.FIRST_COMPLETED)
                if next_piece.done():
                    yield event({"content": next_piece.result()})
                else:
                    next_piece.cancel()
                    await asyncio.sleep(0)  # pieces that the engine's thread has sent before it ended
            if future.cancelled() or future.exception() is not None:
                yield f"data: {json.dumps({'error': {'message': FAILED, 'code': 500}})}\n\n"
                return
            answer = future.result()
            yield event({}, answer.finish_reason, usage=usage(job, answer))
            yield "data: [DONE]\n\n"
        finally:
            job.cancelled.set()  # the client has left, or everything is sent


def usage(job: Job, answer: Answer) -> dict:
    """Lengths in tokens."""
    total = job.prompt_tokens + answer.completion_tokens
    return {"prompt_tokens": job.prompt_tokens, "completion_tokens": answer.completion_tokens, "total_tokens": total}


def failure(error: BaseException) -> JSONResponse:
    """An error of the model: what it refuses is the request's fault, the rest the server's."""
    if (said := refused(error)) is not None:
        return refusal(RequestError(said))
    return JSONResponse({"error": {"message": FAILED, "type": "server_error", "code": 500}}, 500)


class CheckedRequests:
    """Middleware that checks chat requests before vLLM's server sees them (`vllm serve --middleware`).

    Args:
        app: The app behind it.
        limits: What requests may ask for; by default what `vlbridge serve` has set.
    """

    def __init__(self, app, limits: Limits | None = None):
        self.app = app
        self.limits = limits or limits_of_environment()
        self.readers: CapacityLimiter | None = None
        self.running = 0

    async def __call__(self, scope, receive, send) -> None:
        """Answer bad requests, and pass the others on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if scope["path"] != CHAT:  # endpoints whose requests are not checked
            await refusal(RequestError(f"Only {CHAT} is served.", 404))(scope, receive, send)
            return
        if self.running >= self.limits.max_waiting:
            error = RequestError(f"{self.running} requests are waiting already; try again later.", 429)
            await refusal(error)(scope, receive, send)
            return
        self.running += 1
        try:
            self.readers = self.readers or CapacityLimiter(READERS)
            try:
                body = await read_body(Request(scope, receive).stream(), self.limits.max_bytes)
                body = await to_thread.run_sync(self.checked, body, limiter=self.readers)
            except RequestError as error:
                await refusal(error)(scope, receive, send)
                return
            await self.app(*self.replayed(scope, receive, body), send)
        finally:
            self.running -= 1

    def checked(self, body: bytes) -> bytes:
        """The request, with fetched pictures in it.

        Raises:
            RequestError: It is beyond the limits.
        """
        fields = parsed(body)
        read_messages(fields, self.limits)
        new_tokens(fields, self.limits, self.limits.max_new_tokens)
        if fields.get("n") not in (None, 1):
            raise RequestError(f"n is {fields['n']!r}; this server gives one answer per request.")
        return json.dumps(fields).encode()

    @staticmethod
    def replayed(scope: dict, receive, body: bytes) -> tuple:
        """The scope and a `receive` that gives a body that was read already."""
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def again():
            return messages.pop() if messages else await receive()

        return scope, again


def run(engine: Engine, host: str, port: int) -> None:
    """Serve until the process is told to end.

    Args:
        engine: What answers.
        host: Address to listen at.
        port: Its port.
    """
    import uvicorn

    uvicorn.run(App(engine).asgi(), host=host, port=port, log_level="warning")


__all__ = ["App", "CheckedRequests", "run"]
