"""Lines of JSON that ask for a text, and the lines that answer them: a plain form, and OpenAI's for batches.

A plain line is `{"prompt": ...}` or `{"messages": [...]}`; OpenAI's has `custom_id`, `method`, `url` and a `body` that
is such a line. What a line says about sampling goes before the flags.
"""

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from zerodraft.cli.decoding import Sampling
from zerodraft.common.errors import ZerodraftError, did_you_mean
from zerodraft.common.files import json_object, read_text
from zerodraft.decoding.stats import DecodeStats
from zerodraft.training.strict import from_mapping, shown

URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
"""What OpenAI's endpoints are asked with."""

FORM = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """What a line may hold."""

    prompt: str = ""
    messages: Any = ()
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: str | tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    stream: bool = False
    # what changes no answer
    model: str = ""
    user: str = ""
    metadata: Any = None

    def sampling(self, flags: Sampling, number: int) -> Sampling:
        """How this line is answered; without a seed of its own each one has the next."""
        given = {
            "max_new_tokens": self.max_completion_tokens if self.max_tokens is None else self.max_tokens,
            "stop": ((self.stop,) if isinstance(self.stop, str) else self.stop) or None,
            "seed": flags.seed + number - 1 if self.seed is None else self.seed,
        }
        names = {field.name for field in fields(flags)} & {field.name for field in fields(self)} - given.keys()
        given |= {name: getattr(self, name) for name in names}
        return replace(flags, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One line.

    Attributes:
        number: Of the line, from 1.
        prompt: The text to continue, if it is one.
        messages: The conversation, if it is one.
        sampling: How it is answered.
        custom_id: Its name in OpenAI's form; None in the plain one.
        error: Why it cannot be answered; then there is nothing to answer.
    """

    number: int
    sampling: Sampling
    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()
    custom_id: str | None = None
    error: str = ""

    def key(self, *settings: str) -> str:
        """A digest of the request and of what else its answer depends on, by which an answer is known again."""
        text = json.dumps([self.prompt, self.messages, self.custom_id, asdict(self.sampling), self.error, *settings])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_requests(path: Path, flags: Sampling) -> list[Request]:
    """The requests of a file.

    Args:
        path: JSON lines.
        flags: What lines leave open.

    Raises:
        ZerodraftError: a line that is no request. In OpenAI's form only if it has no name or no body; what is wrong
            with its body is told in the answer.
    """
    requests: list[Request] = []
    names: dict[str, int] = {}
    for number, line in enumerate(read_text(path, "prompt file").split("\n"), 1):
        if not line.strip():
            continue
        row, where = json_object(line, f"Line {number} of '{path}'"), f"line {number} of '{path}'"
        try:
            custom_id = _custom_id(row) if FORM & row.keys() else None
        except ZerodraftError as error:
            raise ZerodraftError(f"{where}: {error}") from error
        if custom_id is not None and names.setdefault(custom_id, number) != number:
            raise ZerodraftError(f"{where}: its custom_id '{custom_id}' is that of line {names[custom_id]} as well")
        try:
            request = _request(row, number, flags) if custom_id is None else _request_of_form(row, number, flags)
        except ZerodraftError as error:
            if custom_id is None:
                raise ZerodraftError(f"{where}: {error}") from error
            request = Request(number=number, sampling=flags, error=str(error))
        requests.append(replace(request, custom_id=custom_id))
    if not requests:
        raise ZerodraftError(f"'{path}' holds no prompts: expected a JSON object in every line")
    return requests


def _custom_id(row: dict[str, Any]) -> str:
    if missing := sorted(FORM - row.keys()):
        raise ZerodraftError(f"'{missing[0]}' is missing: OpenAI's form has {', '.join(sorted(FORM))}")
    if unknown := sorted(row.keys() - FORM):
        raise ZerodraftError(f"unknown key '{unknown[0]}'{did_you_mean(unknown[0], FORM)}")
    if not isinstance(row["custom_id"], str) or not isinstance(row["body"], dict):
        raise ZerodraftError("'custom_id' must be a text and 'body' an object with fields")
    return row["custom_id"]


def _request_of_form(row: dict[str, Any], number: int, flags: Sampling) -> Request:
    asked = URLS.get(row["url"]) if isinstance(row["url"], str) else None
    if row["method"] != "POST" or asked is None:
        raise ZerodraftError(f"expected POST to {' or '.join(URLS)}, got {shown(row['method'])} to {shown(row['url'])}")
    if row["body"].get(asked) is None:
        raise ZerodraftError(f"'{asked}' is missing, which {row['url']} needs")
    return _request(row["body"], number, flags)


def _request(given: dict[str, Any], number: int, flags: Sampling) -> Request:
    """From a line in the plain form, or a body in OpenAI's; a field that is null is not given."""
    body = from_mapping(Body, {name: value for name, value in given.items() if value is not None})
    if bool(body.prompt.strip()) == bool(body.messages):
        raise ZerodraftError("give either a 'prompt' that is a text or 'messages' that are a conversation")
    if body.n != 1 or body.stream:
        raise ZerodraftError("one answer is written for each line, and all at once: leave out 'n' and 'stream'")
    if None not in (limits := {body.max_tokens, body.max_completion_tokens}) and len(limits) > 1:
        raise ZerodraftError("'max_tokens' and 'max_completion_tokens' differ: give one of them")
    sampling = body.sampling(flags, number)
    try:
        sampling.check()
    except ZerodraftError as error:
        # the sentence names flags
        said = re.sub(r"--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), str(error))
        raise ZerodraftError(said.replace("max_new_tokens", "max_tokens")) from error
    messages = tuple(map(_message, body.messages)) if isinstance(body.messages, list) else body.messages
    if not isinstance(messages, tuple):
        raise ZerodraftError(f"'messages' must be a list, got {shown(messages)}")
    return Request(number=number, sampling=sampling, prompt=body.prompt, messages=messages)


def _message(given: Any) -> dict[str, str]:
    """As templates know them; OpenAI's may have their text in parts, and a role that no template knows."""
    if not isinstance(given, dict) or given.keys() != {"role", "content"} or not isinstance(given["role"], str):
        raise ZerodraftError(f"a message has a 'role' and a 'content', got {shown(given)}")
    parts = given["content"] if isinstance(given["content"], list) else [{"type": "text", "text": given["content"]}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise ZerodraftError(f"the content of a message is a text, got {shown(given['content'])}")
    role = "system" if given["role"] == "developer" else given["role"]
    return {"role": role, "content": "".join(map(str, texts))}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """What came of a request.

    Attributes:
        text: The new text.
        tokens: Its tokens.
        finish_reason: `stop`, or `length` where it could have gone on.
        prompt_tokens: Tokens that it goes on from.
        stats: Figures of how it was written.
    """

    text: str
    tokens: Sequence[int]
    finish_reason: str
    prompt_tokens: int
    stats: dict[str, Any]


def line_of(request: Request, answered: Answered | None, key: str, model: str) -> dict[str, Any]:
    """The line that answers a request; without an answer it tells the request's error."""
    if request.custom_id is not None:
        status, body = (400, _refusal(request.error)) if answered is None else (200, _body(request, answered, model))
        response = {"status_code": status, "request_id": f"req_{key}", "body": body}
        return {
            "id": f"batch_req_{request.number}",
            "custom_id": request.custom_id,
            "response": response,
            "error": None,
        }
    assert answered is not None
    return {
        "request": key,
        "text": answered.text,
        "tokens": list(answered.tokens),
        "finish_reason": answered.finish_reason,
        "prompt_tokens": answered.prompt_tokens,
        "stats": answered.stats,
    }


def key_of(line: dict[str, Any]) -> str:
    """The key of the request that a line answers; empty for a line that is no answer."""
    response = line.get("response")
    found = response.get("request_id") if isinstance(response, dict) else line.get("request")
    return found.removeprefix("req_") if isinstance(found, str) else ""


def _refusal(error: str) -> dict[str, Any]:
    return {"error": {"message": error, "type": "invalid_request_error", "param": None, "code": None}}


def _body(request: Request, answered: Answered, model: str) -> dict[str, Any]:
    chat = bool(request.messages)
    said = {"message": {"role": "assistant", "content": answered.text}} if chat else {"text": answered.text}
    new = len(answered.tokens)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{request.number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": answered.finish_reason}],
        "usage": {
            "prompt_tokens": answered.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": answered.prompt_tokens + new,
        },
    }


def figures(stats: DecodeStats) -> dict[str, Any]:
    """How a call with drafts went, for all its rows together."""
    return {"rows": stats.rows, "mat": stats.mat, "tokens_per_second": stats.tokens_per_second}
