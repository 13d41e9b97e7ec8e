"""A server under load: clients with texts of mixed lengths, a third of which go away in the middle. Every answer that
was finished is compared with the same request alone.

python benchmarks/serve_load.py --model models/ztt-million --seconds 300 --output results/serve-load.json
"""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np

from harness import emit, parser_of, settle

WORDS = ("the", "fox", "cat", "moon", "river", "old", "who", "ran", "sat", "could", "not", "sleep", "upon", "a", "time")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Seen:
    """What the clients have seen."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    finished: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    cancelled: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Process:
    """A server of its own, for as long as the context lasts."""

    def __init__(self, model: str, parallel: int, *flags: str) -> None:
        command = ["serve", model, "--port", "0", "--parallel", str(parallel), *flags]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "zerodraft", *command], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        found = re.search(r"http://([\d.]+):(\d+)", self._process.stdout.readline())
        assert found is not None
        self.host, self.port = found[1], int(found[2])

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request and its answer's JSON."""
        data = None if body is None else json.dumps(body)
        return json.loads(self._read("GET" if body is None else "POST", path, data))

    def metric(self, name: str) -> float:
        """One of its metrics; 0 where it is not there."""
        lines = self._read("GET", "/metrics").decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"zerodraft_{name} "))

    def _read(self, method: str, path: str, data: str | None = None) -> bytes:
        with closing(HTTPConnection(self.host, self.port, timeout=600)) as connection:
            connection.request(method, path, data, {"Content-Type": "application/json"})
            return connection.getresponse().read()

    def memory(self) -> float:
        """Resident memory in MiB."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * PAGE / 2**20

    def end(self) -> int:
        """Told to end; its exit code."""
        self._process.terminate()
        return self._process.wait(60)


def request(dice: random.Random, name: str, context: int) -> dict[str, Any]:
    """A prompt and an answer of random lengths; half of them drawn, with a seed."""
    longest = min(context // 2, 600)
    words = [dice.choice(WORDS) for _ in range(dice.choice([3, 10, longest // 6, longest // 3]))]
    sampled = {"temperature": 0.8, "top_p": 0.95, "seed": dice.randrange(1000)} if dice.random() < 0.5 else {}
    most = dice.choice([2, 8, 24, min(context // 4, 96)])
    return {"model": name, "prompt": " ".join(words), "max_tokens": most, "temperature": 0, **sampled}


def client(server: Process, seen: Seen, number: int, until: float, name: str, context: int) -> None:
    """Asks, listens, and in a third of the cases hangs up after a few words, until the time is over."""
    dice = random.Random(number)
    while time.monotonic() < until:
        body = request(dice, name, context)
        patience = dice.randrange(4) if dice.random() < 1 / 3 else None
        started, text, pieces = time.monotonic(), "", 0
        with closing(HTTPConnection(server.host, server.port, timeout=600)) as connection:
            data = json.dumps({**body, "stream": True})
            connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                with seen.lock:
                    seen.refused += 1
                continue
            done = False
            while patience is None or pieces < patience:
                line = response.readline().strip()
                if line == b"data: [DONE]":
                    done = True
                    break
                if line.startswith(b"data: "):
                    if not pieces:
                        with seen.lock:
                            seen.first.append(time.monotonic() - started)
                    pieces += 1
                    text += json.loads(line[6:])["choices"][0]["text"]
        with seen.lock:
            if done:
                seen.whole.append(time.monotonic() - started)
                seen.finished.append((body, text))
            else:
                seen.cancelled += 1


def _share(server: Process) -> float | None:
    """Of the places in the calls of a batch over depth, those that held a request; None where it had none."""
    places = server.metric("depth_batch_places_total")
    return server.metric("depth_batch_rows_total") / places if places else None


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The median and what 99 of 100 stay below."""
    return {"p50": float(np.percentile(seconds, 50)), "p99": float(np.percentile(seconds, 99))}


def main() -> None:
    parser = parser_of(__doc__ or "", seconds=60, clients=16, parallel=8)
    parser.add_argument("--model", default="models/ztt-million", help="what is served")
    parser.add_argument("--exit-rule", default="off", help="of a looped model")
    options = settle(parser)
    server = Process(options.model, options.parallel, "--exit-rule", options.exit_rule)
    entry = server.ask("/v1/models")["data"][0]
    # memory is what it is once everything has run
    for number in range(8):
        server.ask("/v1/completions", request(random.Random(-1 - number), entry["id"], entry["max_model_len"]))
    before, seen = server.memory(), Seen()
    until = time.monotonic() + options.seconds
    arguments = (until, entry["id"], entry["max_model_len"])
    threads = [threading.Thread(target=client, args=(server, seen, n, *arguments)) for n in range(options.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = server.memory()
    # those that hung up last leave within a step
    time.sleep(2)
    left = {name: server.metric(f"num_requests_{name}") for name in ("running", "waiting")}
    print(f"{len(seen.finished)} answers, {seen.cancelled} hung up; asking each again alone", file=sys.stderr)
    alone: dict[str, str] = {}
    for body, text in seen.finished:
        key = json.dumps(body)
        if key not in alone:
            alone[key] = server.ask("/v1/completions", body)["choices"][0]["text"]
        if alone[key] != text:
            seen.wrong.append(key)
    result = {
        "benchmark": "serve_load",
        "model": entry["id"],
        "exit_rule": options.exit_rule,
        "clients": options.clients,
        "parallel": options.parallel,
        "seconds": options.seconds,
        "finished": len(seen.finished),
        "cancelled": seen.cancelled,
        "refused": seen.refused,
        "different_from_alone": len(seen.wrong),
        "left_in_the_server": left,
        "share_of_places_over_depth": _share(server),
        "time_to_first_token_seconds": percentiles(seen.first),
        "whole_answer_seconds": percentiles(seen.whole),
        "memory_mib": {"start": before, "end": after, "after_all_again": server.memory()},
        "exit_code": server.end(),
    }
    emit(result, options)


if __name__ == "__main__":
    main()
