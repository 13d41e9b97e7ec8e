"""A looped model under many requests: each answer is the one that it is alone with drafts, and places are freed."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.serve.running import ask, running
from tests.serve.test_server import COMPLETE, GREEDY, PROMPT, good, leave_early, wait_for
from zerodraft.serve.load import serve_model

RULE = "latent:0.9"
ON = {"logit_bias": {"0": -100, "1": -100, "2": -100}}
"""No end of the text."""
SEEDED: dict[str, Any] = {**GREEDY, **ON, "temperature": 1.2, "top_p": 0.95, "min_p": 0.01, "max_tokens": 20}
FORM = {"type": "json_schema", "json_schema": {"name": "fox", "schema": {"enum": ["red", "grey", "brown"]}}}
TRACE = {"trace": True}


def bodies(stop: str) -> list[dict[str, Any]]:
    """One of each kind, with prompts of a few tokens up to several pieces."""
    return [
        {**GREEDY, "zerodraft": TRACE},
        {**GREEDY, "prompt": PROMPT * 20, "zerodraft": TRACE},
        *({**SEEDED, "seed": seed, "zerodraft": TRACE} for seed in range(3)),
        {**SEEDED, "seed": 7, "n": 2, "prompt": PROMPT * 9},
        {**SEEDED, "seed": 1, "stop": [stop, "never to be seen"]},
        {**GREEDY, "frequency_penalty": 0.8, "presence_penalty": 0.5, "logit_bias": {"40": 3.5}},
        {**SEEDED, "seed": 5, "repetition_penalty": 1.4, "logprobs": 2},
        {**SEEDED, "seed": 6, "response_format": FORM, "max_tokens": 40, "logit_bias": {}},
    ]


def told(url: str, body: dict[str, Any], *, stream: bool) -> list[dict[str, Any]]:
    """Texts, ends, and what else was asked for, of each choice; whole or put together from a stream's pieces."""
    if not stream:
        events = [good(url, COMPLETE, body)]
        for choice in events[0]["choices"]:
            events.append({"choices": [choice], "zerodraft": choice.get("zerodraft", {})})
        events = events[1:]
    else:
        status, text, _ = ask(url, COMPLETE, {**body, "stream": True})
        assert status == 200
        assert text.endswith("data: [DONE]\n\n")
        events = [json.loads(event[6:]) for event in text.strip().split("\n\n")[:-1]]
    found: list[dict[str, Any]] = [
        {"text": "", "end": None, "tokens": [], "cycles": [], "scores": []} for _ in range(body.get("n", 1))
    ]
    for event in events:
        (choice,) = event["choices"]
        one = found[choice["index"]]
        one["text"] += choice["text"]
        one["end"] = choice["finish_reason"] or one["end"]
        one["scores"] += [round(p, 2) for p in (choice["logprobs"] or {}).get("token_logprobs", [])]
        for step in event.get("zerodraft", {}).get("trace", []):
            one["tokens"] += [token["id"] for token in step["tokens"]]
            one["cycles"] += step["cycles"]
    return found


@pytest.mark.parametrize("rule", ["off", RULE])
def test_company_changes_nothing(looped: Any, tokenizer: Any, rule: str) -> None:
    """Clients of all kinds at once, streams among them, and some that go away."""
    served = serve_model(looped, tokenizer, "tiny", "lookup", parallel=1, batch=6, exit_rule=rule)
    assert served.scheduler.over_depth is not None
    batch = served.scheduler.over_depth.batch
    with running(served) as url:
        whole = good(url, COMPLETE, {**SEEDED, "seed": 1})["choices"][0]["text"]
        todo = bodies(next(sign for sign in whole[6:] if sign != "\ufffd"))
        alone = [told(url, body, stream=False) for body in todo if body.get("n", 1) == 1]
        # one that has taken turns alone has never been in the batch
        assert batch.work.calls == 0
        alone.insert(5, told(url, todo[5], stream=False))
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        endless: dict[str, Any] = {**GREEDY, **ON, "max_tokens": 1500}
        streams = [client.completions.create(**endless, stream=True) for _ in range(4)]
        assert all(next(iter(stream)).choices for stream in streams)
        with ThreadPoolExecutor(8) as threads:
            kinds = [(body, stream) for stream in (False, True) for body in todo]
            together = threads.map(lambda kind: told(url, kind[0], stream=kind[1]), kinds)
            for stream in streams[:2]:
                stream.close()
            assert list(together) == alone * 2
        for stream in streams[2:]:
            stream.close()
        wait_for(url, 'request_success_total{finished_reason="cancelled"} 4.0')
        wait_for(url, "zerodraft_num_requests_running 0.0")
        leave_early(url, endless)
        wait_for(url, 'request_success_total{finished_reason="cancelled"} 5.0')
        text = ask(url, "/metrics")[1]
    assert alone[6][0]["end"] == "stop"
    assert {json.loads(one["text"]) for one in alone[9]} <= {"red", "grey", "brown"}
    assert len(alone[8][0]["scores"]) == 20
    depths = {depth for one in (*alone[0], *alone[1]) for depth in one["cycles"]}
    assert depths == {3} if rule == "off" else len(depths) > 1
    assert not batch.busy
    assert sorted(batch._free) == list(range(6))
    assert f"zerodraft_depth_batch_rows_total {float(batch.work.rows)}" in text
    assert f"zerodraft_depth_batch_places_total {float(batch.work.places)}" in text
    assert "zerodraft_num_requests_over_depth 0.0" in text
    assert batch.work.rows > 500


def test_limits_hold_over_depth(looped: Any, tokenizer: Any) -> None:
    """Time that is over, and a queue that is full."""
    served = serve_model(looped, tokenizer, "tiny", "lookup", parallel=1, batch=2, queue=0, seconds=1.5)
    endless = {**SEEDED, "max_tokens": 1900}
    with running(served) as url:
        status, refusal, _ = ask(url, COMPLETE, {**endless, "n": 4})
        assert status == 400
        assert "at most 3 are taken at once" in refusal["error"]["message"]
        with ThreadPoolExecutor(1) as threads:
            three = threads.submit(good, url, COMPLETE, {**endless, "n": 3})
            wait_for(url, "zerodraft_num_requests_running 3.0")
            assert ask(url, COMPLETE, endless)[0] == 429
            answer = three.result()
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["timeout"] * 3
    assert served.scheduler.over_depth is not None
    assert served.scheduler.over_depth.batch.work.rows > 0
    assert not served.scheduler.over_depth.batch.busy


def test_a_server_that_ends_tells_those_in_the_batch(looped: Any, tokenizer: Any) -> None:
    served = serve_model(looped, tokenizer, "tiny", "lookup", parallel=1, batch=4)
    with ThreadPoolExecutor(1) as threads, running(served) as url:
        answer = threads.submit(good, url, COMPLETE, {**SEEDED, "max_tokens": 1900, "n": 4})
        wait_for(url, "zerodraft_num_requests_over_depth 4.0")
        served.scheduler.close(0)
        assert [choice["finish_reason"] for choice in answer.result()["choices"]] == ["shutdown"] * 4
    assert served.scheduler.over_depth is not None
    assert not served.scheduler.over_depth.batch.busy
