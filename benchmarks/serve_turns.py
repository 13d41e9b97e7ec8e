"""How much sooner the second turn of a long conversation starts where the first one's keys and values are kept.

python benchmarks/serve_turns.py --model smollm2 --output results/serve-turns.json
"""

import json
import sys
import time
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

from harness import emit, parser_of, ratio, settle, spread
from serve_load import Process


def first_word(server: Process, name: str, messages: list[dict[str, str]]) -> tuple[float, str, dict[str, Any]]:
    """Seconds until the answer's first word, the answer, and what the request took."""
    body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 16, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with closing(HTTPConnection(server.host, server.port, timeout=600)) as connection:
        started, first, text, usage = time.monotonic(), 0.0, "", {}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        while (line := response.readline().strip()) != b"data: [DONE]":
            if not line:
                continue
            event = json.loads(line[6:])
            piece = "".join(choice["delta"].get("content", "") for choice in event["choices"])
            first = first or (time.monotonic() - started if piece else 0.0)
            text, usage = text + piece, event.get("usage", usage)
        return first, text, usage


def main() -> None:
    parser = parser_of(__doc__ or "", conversations=5, words=1100)
    parser.add_argument("--model", default="smollm2", help="what is served")
    options = settle(parser)
    servers = {"kept": Process(options.model, 4), "anew": Process(options.model, 4, "--kept-mib", "0")}
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    tokens, cached = [], []
    for number in range(options.conversations):
        story = " ".join(f"{number * 7 + n} foxes" for n in range(options.words // 4))
        answers = set()
        for kind, server in servers.items():
            name = server.ask("/v1/models")["data"][0]["id"]
            messages = [{"role": "user", "content": f"Read this: {story}. What is it about?"}]
            _, answer, _ = first_word(server, name, messages)
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Say it again."}]
            first, again, usage = first_word(server, name, messages)
            answers.add((answer, again))
            seconds[kind].append(first)
            if kind == "kept":
                tokens.append(usage["prompt_tokens"])
                cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        print(
            f"{tokens[-1]} tokens, {cached[-1]} kept: {seconds['kept'][-1]:.2f} s, {seconds['anew'][-1]:.2f} s anew",
            file=sys.stderr,
        )
        if len(answers) > 1:
            raise SystemExit("the answers differ")
    result = {
        "benchmark": "serve_turns",
        "model": options.model,
        "prompt_tokens": tokens,
        "cached_tokens": cached,
        "first_token_seconds": {name: spread(of) for name, of in seconds.items()},
        "sooner": ratio(seconds["anew"], seconds["kept"]),
        "exit_codes": [server.end() for server in servers.values()],
    }
    emit(result, options)


if __name__ == "__main__":
    main()
