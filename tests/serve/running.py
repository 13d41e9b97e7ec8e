"""A real server in a thread, on a port that is free."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import Any

from zerodraft.serve.app import Served
from zerodraft.serve.process import Server, bound


@contextmanager
def running(served: Served, **options: Any) -> Iterator[str]:
    """Its address as long as it runs; it is ended in order."""
    settings = {"key": "", "cors": (), "body_bytes": 1 << 16, "grace": 20.0}
    server, listening = Server(served, bound("127.0.0.1", 0), **{**settings, **options}), threading.Event()
    found: list[str] = []

    def ready(url: str) -> None:
        found.append(url)
        listening.set()

    server.ready = ready
    thread = threading.Thread(target=server.run, args=([server.sock],))
    thread.start()
    try:
        assert listening.wait(60)
        yield found[0]
    finally:
        served.scheduler.close(0)
        server.should_exit = True
        thread.join()


def ask(url: str, path: str, body: Any = None, method: str = "", **headers: str) -> tuple[int, Any, dict[str, str]]:
    """One request: the status, the answer (JSON or text) and its headers. A body that is no bytes is sent as JSON."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    if body is not None and not isinstance(body, bytes):
        body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    with closing(HTTPConnection(host, int(port), timeout=60)) as connection:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        response = connection.getresponse()
        text = response.read().decode()
    found = {name.lower(): value for name, value in response.getheaders()}
    return response.status, json.loads(text) if "json" in found.get("content-type", "") else text, found


def say(url: str, data: bytes) -> bytes:
    """What the server answers to these bytes, until it closes or is silent."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(data)
        answer = b""
        while b"\r\n\r\n" not in answer and (part := connection.recv(65536)):
            answer += part
    return answer
