"""The server as a process: uvicorn around the application, and an orderly end."""

import os
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi.middleware.cors import CORSMiddleware

from zerodraft.common.errors import ZerodraftError, why
from zerodraft.serve.app import Served, make_app
from zerodraft.serve.guard import Guard, is_loopback
from zerodraft.serve.protocol import ImpatientProtocol

LEAVE = 5
"""Seconds that connections get after the last answer was to be over."""


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address (port 0: any that is free), on which nobody listens yet.

    Raises:
        ZerodraftError: the address is none, or taken.
    """
    if not host:
        raise ZerodraftError(
            "the host is empty; give an address, such as 127.0.0.1, or 0.0.0.0 for all of this machine's"
        )
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":
            # what an earlier server has left behind is in nobody's way
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise _refused(host, port, error) from None
    return sock


def _refused(host: str, port: int, error: OSError) -> ZerodraftError:
    return ZerodraftError(f"cannot listen on {host}, port {port}: {why(error)}; choose another address or port")


class Server(uvicorn.Server):
    """Takes nothing new once it is told to end, and gives what runs a grace time.

    Args:
        served: The model.
        sock: Where to listen; see `bound`.
        key: The API key; nothing: none is asked for.
        cors: Origins whose pages may ask.
        body_bytes: The largest body.
        grace: Seconds for running requests at the end.

    Attributes:
        url: Its address.
        ready: Called with the address once it listens.
    """

    def __init__(
        self, served: Served, sock: socket.socket, *, key: str, cors: tuple[str, ...], body_bytes: int, grace: float
    ) -> None:
        host, port = sock.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        app: Any = Guard(make_app(served), key=key, local=is_loopback(host), body_bytes=body_bytes)
        if cors:
            # around the guard, so that a page can read why it was refused
            app = CORSMiddleware(app, allow_origins=cors, allow_methods=["*"], allow_headers=["*"])
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                http=ImpatientProtocol,
                lifespan="on",
                timeout_graceful_shutdown=int(grace) + LEAVE,
            )
        )
        self.served, self.sock, self.grace = served, sock, grace
        self.ready: Callable[[str], None] = lambda url: None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came: running requests get their grace time from now on."""
        self.served.scheduler.close(self.grace)
        super().handle_exit(sig, frame)

    def until_told(self) -> None:
        """Serve until SIGTERM or Ctrl-C, and return in order."""
        # uvicorn raises what it was told again, for whoever called it: we are, and it was the order to end well
        before = {sig: signal.signal(sig, lambda *_: None) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.run([self.sock])
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say so.

        Raises:
            ZerodraftError: another server, which began at the same time, has the address by now.
        """
        try:
            await super().startup(sockets)
        except OSError as error:
            await self.lifespan.shutdown()
            host, port = self.sock.getsockname()[:2]
            raise _refused(host, port, error) from None
        if self.started:
            self.ready(self.url)
