"""What stands before every endpoint: who may ask, how much and for how long, and headers for browsers."""

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from zerodraft.serve.api import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health")
"""What needs no key: that the server lives is no secret, and a page asks for the key itself."""
PAGE = "/page/"
"""Where its files are."""

HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    # an older page's script would not know what a newer server tells
    b"cache-control": b"no-cache",
    b"content-security-policy": b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """An ASGI application around another one.

    Args:
        app: The endpoints.
        key: What `Authorization: Bearer KEY` has to hold; nothing: everybody may ask.
        local: Answer only requests to this machine's own names: a page of another site whose name was made to point
            here (DNS rebinding) is refused.
        body_bytes: The largest body.
        body_seconds: How long it may take to come.
    """

    def __init__(self, app: Asgi, *, key: str, local: bool, body_bytes: int, body_seconds: float = 30.0) -> None:
        self.app, self.local, self.body_bytes, self.body_seconds = app, local, body_bytes, body_seconds
        self._wanted = b"Bearer " + key.encode() if key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = message.get("headers", [])
                names = {name.lower() for name, _ in given}
                message["headers"] = [*given, *((k, v) for k, v in HEADERS.items() if k not in names)]
            await send(message)

        try:
            self._check(scope)
            body = await asyncio.wait_for(self._body(scope, receive), self.body_seconds)
        except asyncio.TimeoutError:
            await _refuse(send_with_headers, ApiError(408, "The body took too long to come."))
        except ApiError as error:
            await _refuse(send_with_headers, error)
        else:
            if body is not None:
                await self.app(scope, _replayed(body, receive), send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.local and not is_loopback(_host(headers.get(b"host", b"").decode("latin-1"))):
            raise ApiError(403, "This server answers to localhost alone; start it with --host to be reached by name.")
        path, preflight = scope["path"], scope["method"] == "OPTIONS"
        if not self._wanted or preflight or path in OPEN or path.startswith(PAGE):
            return
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._wanted):
            raise ApiError(401, "Give the server's key: 'Authorization: Bearer KEY'.", code="invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of it; None if the client has gone."""
        too_large = ApiError(413, f"The body is too large; at most {self.body_bytes} bytes are read.")
        told = dict(scope["headers"]).get(b"content-length", b"")
        if told.isdigit() and int(told) > self.body_bytes:
            raise too_large
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.body_bytes:
                raise too_large
            more = message.get("more_body", False)
        return bytes(body)


def _host(header: str) -> str:
    """`[::1]:8000` and `localhost:8000` without the port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What hands over the whole body, and after it what else comes."""
    message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replay() -> Message:
        nonlocal message
        if message is None:
            return await receive()
        first, message = message, None
        return first

    return replay


async def _refuse(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
