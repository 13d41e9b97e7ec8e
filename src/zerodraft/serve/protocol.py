"""HTTP/1.1 of uvicorn, with an end to waiting: uvicorn itself keeps a connection whose request never comes."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from zerodraft.serve.api import ApiError

HEAD_SECONDS = 30.0
"""From a connection, or the first bytes of a further request on it, to the end of the request's head."""

LATE = ApiError(408, "The request's head took too long to come.")

BROKEN = ApiError(400, "What came is no HTTP/1.1 request.")


class ImpatientProtocol(H11Protocol):
    """Answers 408 to a request whose head takes too long, and closes; where nothing came at all it only closes."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls over broken HTTP."""
        self._close_with(BROKEN)

    def _wait(self) -> None:
        """Set the clock if a head is missing and it does not run yet; stop it if there is one."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self._late)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _late(self) -> None:
        self._waiting = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._close_with(LATE)
        self.transport.close()

    def _close_with(self, error: ApiError) -> None:
        """Say why, unless an answer has begun or is over, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            reason = HTTPStatus(error.status).phrase.encode()
            head = h11.Response(status_code=error.status, headers=headers, reason=reason)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
