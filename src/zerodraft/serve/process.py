"""The server as a process: uvicorn around the application, and an orderly end."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from zerodraft.serve.app import Served, make_app
from zerodraft.serve.guard import Guard, is_loopback

LEAVE = 5
"""Seconds that connections get after the last answer was to be over."""


class Server(uvicorn.Server):
    """Takes nothing new once it is told to end, and gives what runs a grace time.

    Args:
        served: The model.
        host: Where to listen.
        port: 0: any that is free.
        key: The API key; nothing: none is asked for.
        cors: Origins whose pages may ask.
        body_bytes: The largest body.
        grace: Seconds for running requests at the end.

    Attributes:
        ready: Called with the address once it listens.
    """

    def __init__(
        self, served: Served, *, host: str, port: int, key: str, cors: tuple[str, ...], body_bytes: int, grace: float
    ) -> None:
        app: Any = Guard(make_app(served, cors=cors), key=key, local=is_loopback(host), body_bytes=body_bytes)
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                http="h11",
                lifespan="on",
                timeout_graceful_shutdown=int(grace) + LEAVE,
            )
        )
        self.served, self.grace = served, grace
        self.ready: Callable[[str], None] = lambda url: None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came: running requests get their grace time from now on."""
        self.served.scheduler.close(self.grace)
        super().handle_exit(sig, frame)

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def until_told(self) -> None:
        """Serve until SIGTERM or Ctrl-C, and return in order."""
        # uvicorn raises what it was told again, for whoever called it: we are, and it was the order to end well
        before = {sig: signal.signal(sig, lambda *_: None) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.run()
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self.ready(self.url)
