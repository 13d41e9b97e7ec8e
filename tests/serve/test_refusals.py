"""What a server refuses, and how: broken requests, too much of anything, strangers."""

import json
import socket
from typing import Any

import pytest

from tests.serve.running import ask, running, say
from zerodraft.serve import protocol
from zerodraft.serve.app import Served
from zerodraft.serve.load import serve_model

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
ASKED: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 2}
TALK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2}
JSON = {"Content-Type": "application/json"}

WRONG: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "unknown field": (COMPLETE, {"best_of": 3}, "best_of"),
    "tools": (CHAT, {"tools": []}, "tools"),
    "no prompt": (COMPLETE, {"prompt": None}, "prompt"),
    "empty prompt": (COMPLETE, {"prompt": ""}, "prompt"),
    "no prompts": (COMPLETE, {"prompt": []}, "prompt"),
    "foreign token": (COMPLETE, {"prompt": [5, 10**6]}, "prompt"),
    "mixed prompt": (COMPLETE, {"prompt": [5, "x"]}, "prompt"),
    "half a character": (COMPLETE, {"prompt": "\ud800"}, "prompt"),
    "text for a number": (COMPLETE, {"max_tokens": "2"}, "max_tokens"),
    "fraction": (COMPLETE, {"max_tokens": 2.5}, "max_tokens"),
    "truth for a number": (COMPLETE, {"max_tokens": True}, "max_tokens"),
    "nothing to write": (COMPLETE, {"max_tokens": 0}, "max_tokens"),
    "more than fits": (COMPLETE, {"max_tokens": 10**6}, "max_tokens"),
    "hot": (COMPLETE, {"temperature": 3}, "temperature"),
    "nearly cold": (COMPLETE, {"temperature": 1e-9}, "temperature"),
    "no mass": (COMPLETE, {"top_p": 0}, "top_p"),
    "not a number": (COMPLETE, {"top_p": float("nan")}, "top_p"),
    "huge seed": (COMPLETE, {"seed": 2**64}, "seed"),
    "no answers": (COMPLETE, {"n": 0}, "n"),
    "many answers": (COMPLETE, {"n": 10**9}, "n"),
    "empty stop": (COMPLETE, {"stop": ["a", ""]}, "stop"),
    "stop number": (COMPLETE, {"stop": 4}, "stop"),
    "bias by text": (COMPLETE, {"logit_bias": {"cat": 1}}, "logit_bias"),
    "bias of a stranger": (COMPLETE, {"logit_bias": {"999999": 1}}, "logit_bias"),
    "penalty near nothing": (COMPLETE, {"repetition_penalty": 1e-300}, "repetition_penalty"),
    "large bias": (COMPLETE, {"logit_bias": {"5": 1000}}, "logit_bias"),
    "usage of no stream": (COMPLETE, {"stream_options": {"include_usage": True}}, "stream_options"),
    "nested unknown": (COMPLETE, {"zerodraft": {"tracing": True}}, "zerodraft.tracing"),
    "no messages": (CHAT, {"messages": []}, "messages"),
    "strange role": (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    "no content": (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    "a picture": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
    ),
    "two limits": (CHAT, {"max_completion_tokens": 3}, "max_tokens"),
    "top of nothing": (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    "form without schema": (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
    "text or talk": ("/tokenize", {}, "messages"),
}


def refused(answer: tuple[int, Any, dict[str, str]], status: int = 400) -> dict[str, Any]:
    """The error of an answer, which tells of no file and no code."""
    assert answer[0] == status, answer
    error = answer[1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for sign in ("Traceback", ".py", "/work", "/tmp", "site-packages"):
        assert sign not in error["message"]
    return error


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields_are_named(url: str, name: str) -> None:
    path, change, param = WRONG[name]
    body = (
        {"prompt": "x", "messages": TALK["messages"]}
        if path == "/tokenize"
        else {**(TALK if path == CHAT else ASKED), **change}
    )
    error = refused(ask(url, path, json.dumps(body).encode(), **JSON))
    if path != "/tokenize":
        assert error["param"] is not None
        assert error["param"].startswith(param or "")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": []}, "'prompt' does not fit: list should have at least 1 item"),
        ({"prompt": [-1]}, "'prompt' does not fit: input should be greater than or equal to 0"),
        ({"prompt": "\ud800"}, "'prompt' does not fit: half of a surrogate pair"),
        ({"prompt": 5}, "'prompt' does not fit: input should be a valid string"),
        ({"stop": ["a"] * 17}, "'stop' does not fit: list should have at most 16 items"),
    ],
)
def test_of_fields_with_several_types_the_nearest_is_told(url: str, change: dict[str, Any], said: str) -> None:
    assert refused(ask(url, COMPLETE, {**ASKED, **change}))["message"].startswith(said)


def test_null_counts_as_not_given(url: str) -> None:
    assert ask(url, COMPLETE, {**ASKED, "tools": None, "stop": None, "seed": None, "logit_bias": None})[0] == 200


def test_other_models_are_not_here(url: str) -> None:
    assert refused(ask(url, COMPLETE, {**ASKED, "model": "gpt-5"}), 404)["param"] == "model"


BODIES = {
    "nothing": b"",
    "no json": b"{'model': 1}",
    "half": b'{"model": "tiny", "prompt": "x"',
    "a list": b"[1, 2]",
    "a number": b"7",
    "bad utf-8": b'{"model": "tiny", "prompt": "\xff\xfe"}',
    "nested": b"[" * 30000,
    "long number": b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 20000 + b"}",
    "twice": json.dumps(ASKED).encode() * 2,
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request(url: str, name: str) -> None:
    refused(ask(url, COMPLETE, BODIES[name], "POST", **JSON))


def test_other_types_of_content_are_refused(url: str) -> None:
    """What a form on any web page can send without being asked first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        refused(ask(url, COMPLETE, json.dumps(ASKED).encode(), **{"Content-Type": kind}))
    refused(ask(url, COMPLETE, json.dumps(ASKED).encode()))


def test_bodies_that_are_too_large(url: str) -> None:
    refused(ask(url, COMPLETE, {**ASKED, "prompt": "x" * 70000}), 413)
    # even if nobody said so before
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b" 413 " in say(url, head + 5 * (b"4000\r\n" + b"x" * 0x4000 + b"\r\n"))
    # and before it comes
    assert b" 413 " in say(
        url, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
    )


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -4\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nBroken\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET /" + b"a" * 100000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["tls", "words", "negative", "header", "chunk", "long"],
)
def test_broken_http(url: str, data: bytes) -> None:
    head, _, body = until_closed(url, data, half=True).partition(b"\r\n\r\n")
    if head:
        status = int(head.split()[1])
        assert status in (400, 404)
        refused((status, json.loads(body), {}), status)
    assert ask(url, "/health")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_broken_http_behind_an_answer(url: str, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It is answered once more behind an answer, and not at all where the body was refused before its end."""
    body = json.dumps({**ASKED, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = until_closed(url, head + b"Content-Length: %d\r\n\r\n%s\x00\r\n\r\n" % (len(body), body))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 400 " in answer
    large = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    answer = until_closed(url, head + b"Transfer-Encoding: chunked\r\n\r\n" + 5 * large, b"no size\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert not [record for record in caplog.records if record.exc_info]


def test_clients_that_close_early(url: str) -> None:
    host, port = url.removeprefix("http://").rsplit(":", 1)
    for data in (
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
        b"GET / HTT",
    ):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(data)
    assert ask(url, COMPLETE, ASKED)[0] == 200


def test_addresses_and_methods(url: str) -> None:
    for path in (
        "/v1/nothing",
        "/page/../app.py",
        "/page/..%2fapp.py",
        "/page/%2e%2e/api.py",
        "/docs",
        "/openapi.json",
    ):
        refused(ask(url, path), 404)
    refused(ask(url, COMPLETE), 405)
    refused(ask(url, "/health", ASKED), 405)


def test_other_names_for_this_machine_are_refused(url: str) -> None:
    """A page of another site whose name was made to point here."""
    refused(ask(url, "/v1/models", Host="evil.example"), 403)
    refused(ask(url, "/v1/models", Host="127.0.0.1.evil.example:8000"), 403)
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"):
        assert ask(url, "/v1/models", Host=host)[0] == 200


def test_pages_of_other_sites_get_no_leave(url: str) -> None:
    asking = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    status, _, headers = ask(url, COMPLETE, method="OPTIONS", **asking)
    assert status == 405
    assert "access-control-allow-origin" not in headers


def test_keys_origins_and_limits(model: Any, tokenizer: Any) -> None:
    served: Served = serve_model(model, tokenizer, "tiny", "lookup", prompt_tokens=5, total_tokens=9)
    with running(served, key="secret", cors=("http://a.example",)) as url:
        for header in (
            {},
            {"Authorization": "Bearer secre"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer s\xe9"},
        ):
            for path in ("/v1/models", "/metrics"):
                error = refused(ask(url, path, **header), 401)
                assert error["code"] == "invalid_api_key"
            refused(ask(url, COMPLETE, ASKED, **header), 401)
        assert ask(url, "/health")[0] == 200
        assert ask(url, "/")[0] == 200
        key = {"Authorization": "Bearer secret"}
        asking = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
        _, _, headers = ask(url, COMPLETE, method="OPTIONS", **asking)
        assert headers["access-control-allow-origin"] == "http://a.example"
        status, _, headers = ask(url, COMPLETE, ASKED, Origin="http://a.example")
        assert (status, headers["access-control-allow-origin"]) == (401, "http://a.example")
        assert ask(url, COMPLETE, {**ASKED, "prompt": [5, 6, 7, 8, 9], "max_tokens": 4}, **key)[0] == 200
        error = refused(ask(url, COMPLETE, {**ASKED, "prompt": [5, 6, 7, 8, 9], "max_tokens": 5}, **key))
        assert error["code"] == "context_length_exceeded"
        error = refused(ask(url, COMPLETE, {**ASKED, "prompt": [5] * 6}, **key))
        assert error["param"] == "prompt"
        # without a limit of its own an answer has what is left
        answer = ask(url, COMPLETE, {"model": "tiny", "prompt": [5, 6], "temperature": 0}, **key)[1]
        assert answer["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize(("change", "param"), [({"n": 6}, "n"), ({"prompt": ["a"] * 6}, "prompt")])
def test_more_answers_than_there_are_places_are_never_taken(
    model: Any, tokenizer: Any, change: dict[str, Any], param: str
) -> None:
    """Asking again later, which 429 asks for, would not help."""
    with running(serve_model(model, tokenizer, "tiny", "lookup", parallel=2, queue=3)) as url:
        error = refused(ask(url, COMPLETE, {**ASKED, **change}))
        assert error["param"] == param
        assert error["message"] == f"'{param}' asks for 6 answers; at most 5 are taken at once."
        assert ask(url, COMPLETE, {**ASKED, "n": 5})[0] == 200


def test_a_model_without_a_template_has_no_chat(model: Any, tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with running(serve_model(model, bare, "tiny", "lookup")) as url:
        assert "no chat template" in refused(ask(url, CHAT, TALK))["message"]
        assert ask(url, COMPLETE, ASKED)[0] == 200


def until_closed(url: str, *parts: bytes, half: bool = False) -> bytes:
    """What the server answers until it closes; each of these parts is sent when it has said something to the last. With
    `half` the client's side is closed then."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        answer = b""
        for part in parts:
            connection.sendall(part)
            answer += connection.recv(65536)
        if half:
            connection.shutdown(socket.SHUT_WR)
        while more := connection.recv(65536):
            answer += more
    return answer


def test_a_head_that_never_ends_is_waited_for_no_longer(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.5)
    with running(serve_model(model, tokenizer, "tiny", "lookup")) as url:
        assert until_closed(url) == b""
        begun = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: y"
        answer = until_closed(url, begun)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == protocol.LATE.message
        # a second request on the connection, after one that was answered
        whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answer = until_closed(url, whole, begun)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 408 " in answer
