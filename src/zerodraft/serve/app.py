"""The endpoints: from a request to jobs for the scheduler, and from what it tells to an answer."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from llguidance import LLMatcher
from starlette.exceptions import HTTPException

from zerodraft.serve.api import ApiError, Asked, ChatRequest, CompletionRequest, TokenizeRequest, misfit
from zerodraft.serve.conversation import Prompts
from zerodraft.serve.grammar import Grammar, Grammars
from zerodraft.serve.guard import PAGE
from zerodraft.serve.metrics import Metrics
from zerodraft.serve.responses import Answer, Shape
from zerodraft.serve.sampling import Recorder, arguments_of
from zerodraft.serve.scheduler import End, Job, Scheduler
from zerodraft.serve.writer import Piece, Writer

FILES = Path(__file__).with_name("page")
"""The page at `/` and what it loads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A model that is served.

    Attributes:
        name: What clients call it.
        scheduler: Decodes.
        prompts: Reads what is asked.
        grammars: Know what answers in a form may hold.
        metrics: Counts.
        eos: Tokens that end a text.
        cycles: The most of a token, where the model is a looped one.
        exit_rule: When tokens stop before, as people write it.
        seconds: The longest that a request may take.
        created: When it was loaded.
    """

    name: str
    scheduler: Scheduler
    prompts: Prompts
    grammars: Grammars
    metrics: Metrics
    eos: frozenset[int]
    cycles: int | None
    exit_rule: str
    seconds: float
    created: int = field(default_factory=lambda: int(time.time()))

    def job(self, asked: Asked, ids: list[int], index: int, matcher: LLMatcher | None, tell: Any) -> Job:
        """What writes the answer with this number among a prompt's."""
        param = "max_tokens" if asked.max_tokens else "max_completion_tokens"
        new = self.prompts.limits.answer(len(ids), asked.longest, param)
        recorder = None if asked.alternatives is None else Recorder(asked.alternatives)
        grammar = None if matcher is None else Grammar(matcher.deep_copy(), len(ids))
        writer = Writer(
            self.prompts.tokenizer,
            self.eos,
            asked.stops,
            recorder,
            trace=asked.zerodraft.trace,
            cycles=self.cycles,
        )
        # far apart, so that the choices of neighbouring seeds are different ones
        seed = secrets.randbits(62) if asked.seed is None else (asked.seed + index * 0x9E3779B97F4A7C15) % 2**63
        return Job(
            ids=ids,
            arguments=arguments_of(asked, len(ids), new, recorder, grammar),
            seed=seed,
            writer=writer,
            tell=tell,
            deadline=time.monotonic() + self.seconds,
            drafts=asked.zerodraft.drafts,
        )

    def check(self, asked: Asked) -> None:
        """Raise `ApiError` for what is wrong with a request here, whatever its form."""
        if asked.model != self.name:
            raise ApiError(
                404, f"There is no such model here; this server has '{self.name}'.", "model", "model_not_found"
            )
        if wrong := [token for token in asked.logit_bias if int(token) >= self.prompts.vocabulary]:
            raise ApiError(400, f"'logit_bias' has token {wrong[0]}, which the model has not.", "logit_bias")


class Answers:
    """The jobs of one request, and what they tell, in the event loop."""

    def __init__(self, served: Served, asked: Asked, prompts: Sequence[list[int]], matcher: LLMatcher | None) -> None:
        self._events: asyncio.Queue[tuple[int, Piece | End]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._scheduler = served.scheduler
        self.jobs = [
            served.job(asked, ids, index, matcher, self._teller(number * asked.n + index))
            for number, ids in enumerate(prompts)
            for index in range(asked.n)
        ]
        self._scheduler.submit(self.jobs)

    def _teller(self, number: int) -> Any:
        def tell(event: Piece | End) -> None:
            # the loop may be closed, and then nobody waits
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        return tell

    async def events(self) -> AsyncIterator[tuple[int, Piece | End]]:
        """What comes, until all jobs are over."""
        going = len(self.jobs)
        while going:
            number, event = await self._events.get()
            going -= isinstance(event, End)
            yield number, event

    def cancel(self) -> None:
        """Nobody waits for the rest."""
        self._scheduler.cancel(self.jobs)


def make_app(served: Served) -> FastAPI:
    """The endpoints of a model. The scheduler runs as long as the application does.

    Args:
        served: The model.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.scheduler.start()
        yield
        served.scheduler.close(0)
        await asyncio.to_thread(served.scheduler.join)

    app = FastAPI(title="zerodraft", openapi_url=None, lifespan=lifespan, redirect_slashes=False)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def misfits(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, misfit(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        said = {404: "There is nothing at this address.", 405: "This address takes another method."}
        message = said.get(error.status_code, "The body cannot be read; it has to be JSON in UTF-8.")
        return await refused(request, ApiError(error.status_code, message))

    @app.exception_handler(Exception)
    async def failed(request: Request, _: Exception) -> Response:
        return await refused(request, ApiError(500, "The server failed over this request; its log says more."))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(FILES / "index.html")

    app.mount(PAGE, StaticFiles(directory=FILES))

    @app.get("/health")
    async def health() -> Response:
        closing = served.scheduler.closing
        return JSONResponse({"status": "shutting down" if closing else "ok"}, 503 if closing else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != served.name:
            raise ApiError(404, f"There is no such model here; this server has '{served.name}'.", "model")
        return entry()

    def entry() -> dict[str, Any]:
        limits = served.prompts.limits
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "zerodraft",
            "max_model_len": limits.total_tokens,
            "zerodraft": {
                "chat": bool(served.prompts.tokenizer.chat_template),
                "cycles": served.cycles,
                "exit_rule": served.exit_rule,
            },
        }

    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> dict[str, Any]:
        prompts = served.prompts
        if asked.messages is not None:
            ids = await asyncio.to_thread(prompts.of_messages, asked.messages)
        else:
            ids = await asyncio.to_thread(prompts.of_text, asked.prompt or "", special=asked.add_special_tokens)
        answer = {"count": len(ids), "max_model_len": prompts.limits.total_tokens, "tokens": ids}
        return answer | (
            {"token_strs": prompts.tokenizer.convert_ids_to_tokens(ids)} if asked.return_token_strs else {}
        )

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        served.check(asked)
        ids = await asyncio.to_thread(served.prompts.of_messages, asked.messages)
        return await answered(asked, [ids], request)

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        served.check(asked)
        ids = [await asyncio.to_thread(served.prompts.of_text, prompt) for prompt in asked.prompts]
        return await answered(asked, ids, request)

    async def answered(asked: Asked, prompts: Sequence[list[int]], request: Request) -> Response:
        count, room = len(prompts) * asked.n, served.scheduler.room
        if count > room:
            param = "n" if asked.n > 1 else "prompt"
            raise ApiError(400, f"'{param}' asks for {count} answers; at most {room} are taken at once.", param)
        shape = Shape(
            chat=isinstance(asked, ChatRequest),
            model=served.name,
            prompts=prompts,
            n=asked.n,
            tokenizer=served.prompts.tokenizer,
            scored=asked.alternatives is not None,
            traced=asked.zerodraft.trace,
        )
        matcher = await asyncio.to_thread(served.grammars.matcher, asked.response_format)
        answers = Answers(served, asked, prompts, matcher)
        if asked.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return Streamed(answers, events_of(answers, shape, asked), media_type="text/event-stream", headers=headers)
        return JSONResponse(shape.whole(await collected(answers, request)))

    return app


async def collected(answers: Answers, request: Request) -> list[Answer]:
    """All that comes, unless the client goes away before.

    Raises:
        ApiError: the model failed.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answers.cancel()

    listener = asyncio.create_task(gone())
    found = [Answer() for _ in answers.jobs]
    try:
        async for number, event in answers.events():
            if isinstance(event, Piece):
                found[number].add(event)
            else:
                found[number].piece.text += event.text
                found[number].end = event
    finally:
        listener.cancel()
        answers.cancel()
    if any(answer.end is not None and answer.end.reason == "error" for answer in found):
        raise failure()
    return found


class Streamed(StreamingResponse):
    """A stream whose jobs are given up with it, even if the client went away before its first word."""

    def __init__(self, answers: Answers, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def events_of(answers: Answers, shape: Shape, asked: Asked) -> AsyncIterator[str]:
    """Server-sent events, as they come."""
    if shape.chat:
        for number in range(len(answers.jobs)):
            yield sse(shape.opening(number))
    ends = []
    async for number, event in answers.events():
        if isinstance(event, Piece):
            if event.text or event.scores or event.steps:
                yield sse(shape.part(number, event))
        elif event.reason == "error":
            yield sse(failure().body())
        else:
            ends.append(event)
            yield sse(shape.last(number, event))
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield sse(shape.closing(ends))
    yield "data: [DONE]\n\n"


def failure() -> ApiError:
    """What a client is told where the model fails."""
    return ApiError(500, "The model failed over this request; the server's log says more.")


def sse(event: dict[str, Any]) -> str:
    """One event."""
    return f"data: {json.dumps(event, ensure_ascii=False, allow_nan=False)}\n\n"
