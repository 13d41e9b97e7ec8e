"""The endpoints of a real server: what a client gets, alone and in company."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import LogitsProcessorList

from tests.saved import save_ztt
from tests.serve.running import ask, running
from zerodraft import ZerodraftError, ZttForCausalLM
from zerodraft.serve.api import ResponseFormat
from zerodraft.serve.app import Served
from zerodraft.serve.grammar import Grammar
from zerodraft.serve.load import serve_model
from zerodraft.ztt.rules import rule_of

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "the cat sat on the mat. the cat sat"
GREEDY: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
MESSAGES = [{"role": "system", "content": "a fox"}, {"role": "user", "content": "the cat sat on the mat"}]


def plain(model: Any, tokenizer: Any, ids: list[int], new: int, **options: Any) -> list[int]:
    """What `generate` writes by itself."""
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, **{"do_sample": False, **options}
    )
    return out[0, len(ids) :].tolist()


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def good(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    status, answer, _ = ask(url, path, body)
    assert status == 200, answer
    return answer


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_greedy_completions_are_plain_decoding(url: str, model: Any, tokenizer: Any) -> None:
    answer = good(url, COMPLETE, GREEDY)
    ids = tokenizer(PROMPT)["input_ids"]
    (choice,) = answer["choices"]
    assert choice["text"] == text_of(tokenizer, plain(model, tokenizer, ids, 12))
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (len(ids), 12, len(ids) + 12)
    timings = answer["timings"]
    assert 0 <= timings["draft_n_accepted"] <= timings["draft_n"]
    assert timings["predicted_n"] == 12
    # tokens are a prompt too, and several prompts have an answer each
    both = good(url, COMPLETE, {**GREEDY, "prompt": [ids, ids[:5]]})
    assert [c["text"] for c in both["choices"]] == [
        text_of(tokenizer, plain(model, tokenizer, i, 12)) for i in (ids, ids[:5])
    ]
    assert [c["index"] for c in both["choices"]] == [0, 1]


def test_a_chat_with_openais_client(client: openai.OpenAI, model: Any, tokenizer: Any) -> None:
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    expected = text_of(tokenizer, plain(model, tokenizer, ids, 10))
    options: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 10}
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 10
    assert chunks[-1].usage.prompt_tokens == len(ids)
    assert {c.id for c in chunks} == {chunks[0].id}
    assert client.models.list().data[0].id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(**options, tools=[{"type": "function", "function": {"name": "f"}}])


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_counts_once_however_many_answers_it_has(client: openai.OpenAI, tokenizer: Any, stream: bool) -> None:
    prompts = ["a cat and a fox", "the little fox could not sleep"]
    options: Any = {"model": "tiny", "prompt": prompts, "n": 3, "max_tokens": 4, "seed": 1}
    for _ in range(2):
        answer: Any = client.completions.create(**options)
        if stream:
            answer = [*client.completions.create(**options, stream=True, stream_options={"include_usage": True})][-1]
        usage = answer.usage
        assert usage.prompt_tokens == sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
        assert usage.completion_tokens == 24
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens / 2 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_streams_end_with_done(url: str) -> None:
    status, text, headers = ask(url, COMPLETE, {**GREEDY, "stream": True})
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    events = text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events[:-1])
    assert '"usage"' not in text


def test_company_changes_nothing(url: str, served: Served, model: Any, tokenizer: Any) -> None:
    """Greedy and seeded answers, prompts that begin alike, several turns, all at once."""
    seeded = {**GREEDY, "temperature": 1.3, "top_p": 0.95, "min_p": 0.01, "top_k": 40}
    bodies = [{**GREEDY, "prompt": PROMPT + " once" * n, "max_tokens": 6 + n} for n in range(4)]
    bodies += [{**seeded, "seed": n, "n": 2} for n in range(3)]
    alone = [[c["text"] for c in good(url, COMPLETE, body)["choices"]] for body in bodies]
    for body, (text, *_) in zip(bodies[:4], alone, strict=False):
        ids = tokenizer(body["prompt"])["input_ids"]
        assert text == text_of(tokenizer, plain(model, tokenizer, ids, body["max_tokens"]))
    assert len({text for texts in alone[4:] for text in texts}) == 6
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda body: good(url, COMPLETE, body), bodies * 2))
    assert [[c["text"] for c in answer["choices"]] for answer in together] == alone * 2
    assert sum(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in together) > 0


def test_conversations_go_on(url: str, model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "the little fox could not sleep. " * 8}]
    known = []
    for _ in range(3):
        answer = good(url, CHAT, {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 6})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert answer["choices"][0]["message"]["content"] == text_of(tokenizer, plain(model, tokenizer, ids, 6))
        usage = answer["usage"]
        known.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert usage["prompt_tokens"] == len(ids)
        messages += [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "and then?"}]
    assert known[0] < 10
    assert known[1] > 50
    assert known[2] > known[1]


def test_stop_texts_end_an_answer(url: str, model: Any, tokenizer: Any) -> None:
    whole = good(url, COMPLETE, {**GREEDY, "max_tokens": 20})["choices"][0]["text"]
    stop = whole[7:10]
    for stops in (stop, [stop, "never to be seen"]):
        (choice,) = good(url, COMPLETE, {**GREEDY, "max_tokens": 20, "stop": stops})["choices"]
        assert choice["text"] == whole[: whole.find(stop)]
        assert choice["finish_reason"] == "stop"


def test_an_end_token_ends_an_answer(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    written = plain(model, tokenizer, ids, 12)
    eos = written[5]
    at = written.index(eos)
    config = model.generation_config
    before, config.eos_token_id = config.eos_token_id, eos
    try:
        with running(serve_model(model, tokenizer, "tiny", "lookup")) as url:
            answer = good(url, COMPLETE, GREEDY)
    finally:
        config.eos_token_id = before
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == text_of(tokenizer, written[:at])
    assert answer["usage"]["completion_tokens"] == at + 1


SCHEMA = {
    "type": "object",
    "properties": {"fox": {"enum": ["red", "grey"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["fox", "age"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "fox", "schema": SCHEMA, "strict": True}}


def test_answers_keep_to_a_schema(model: Any, tokenizer: Any) -> None:
    """Whatever is drafted, the tokens are those of plain decoding under the same grammar."""
    config = model.generation_config
    before, config.eos_token_id = config.eos_token_id, tokenizer.eos_token_id
    try:
        served = serve_model(model, tokenizer, "tiny", "lookup")
        prompt = 'fox: {"fox":"red","age":7} {"fox":"red","age":7} then {'
        ids = tokenizer(prompt)["input_ids"]
        matcher = served.grammars.matcher(ResponseFormat.model_validate(FORM))
        assert matcher is not None
        processors = LogitsProcessorList([Grammar(matcher, len(ids))])
        expected = plain(model, tokenizer, ids, 60, logits_processor=processors)
        with running(served) as url:
            body = {**GREEDY, "prompt": prompt, "max_tokens": 60, "response_format": FORM}
            answer = good(url, COMPLETE, body)
            texts = [c["text"] for c in good(url, COMPLETE, {**body, "temperature": 1.5, "seed": 3, "n": 4})["choices"]]
            wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "fox"}}}
            status, refusal, _ = ask(url, COMPLETE, {**body, "response_format": wrong})
            anything = good(url, COMPLETE, {**body, "response_format": {"type": "json_object"}})["choices"][0]
    finally:
        config.eos_token_id = before
    (choice,) = answer["choices"]
    assert choice["text"] == text_of(tokenizer, expected)
    assert choice["finish_reason"] == "stop"
    assert answer["timings"]["draft_n"] > 0
    for text in (choice["text"], *texts):
        found = json.loads(text)
        assert set(found) == {"fox", "age"}
        assert found["fox"] in ("red", "grey")
        assert 1 <= found["age"] <= 99
    assert len(set(texts)) > 1
    assert status == 400
    assert refusal["error"]["param"] == "response_format"
    assert anything["text"].lstrip().startswith("{")


def test_log_probabilities_are_the_models(url: str, model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    tokens = plain(model, tokenizer, ids, 6)
    with torch.no_grad():
        scores = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    right = [float(row[token]) for row, token in zip(scores, tokens, strict=True)]
    # a temperature and penalties change what is drawn, not what the model says
    body = {**GREEDY, "max_tokens": 6, "logprobs": 3}
    found = good(url, COMPLETE, body)["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx(right, abs=1e-4)
    assert found["tokens"] == [tokenizer.decode([token]) for token in tokens]
    chat = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "seed": 1}
    content = good(url, CHAT, chat)["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    for entry in content:
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_biases_and_penalties(url: str, model: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    first = plain(model, tokenizer, ids, 1)[0]
    bias = {first: -100.0, 40: 3.5}
    expected = plain(model, tokenizer, ids, 12, sequence_bias={(token,): value for token, value in bias.items()})
    answer = good(url, COMPLETE, {**GREEDY, "logit_bias": {str(token): value for token, value in bias.items()}})
    assert answer["choices"][0]["text"] == text_of(tokenizer, expected)
    expected = plain(model, tokenizer, ids, 12, repetition_penalty=1.7)
    assert good(url, COMPLETE, {**GREEDY, "repetition_penalty": 1.7})["choices"][0]["text"] == text_of(
        tokenizer, expected
    )
    # by the definition: frequency times the count, and presence once
    text = list(ids)
    for _ in range(12):
        with torch.no_grad():
            scores = model(torch.tensor([text])).logits[0, -1]
        for token in set(text[len(ids) :]):
            scores[token] -= 0.4 * text[len(ids) :].count(token) + 0.7
        text.append(int(scores.argmax()))
    answer = good(url, COMPLETE, {**GREEDY, "frequency_penalty": 0.4, "presence_penalty": 0.7})
    assert answer["choices"][0]["text"] == text_of(tokenizer, text[len(ids) :])


@pytest.mark.parametrize("stream", [False, True])
def test_traces_tell_what_became_of_drafts(url: str, tokenizer: Any, stream: bool) -> None:
    body = {**GREEDY, "max_tokens": 16, "zerodraft": {"trace": True}, "stream": stream}
    if stream:
        _, text, _ = ask(url, COMPLETE, body)
        chunks = [json.loads(event[6:]) for event in text.strip().split("\n\n")[:-1]]
        steps = [step for chunk in chunks for step in chunk.get("zerodraft", {}).get("trace", [])]
        timings = chunks[-1]["timings"]
        written = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    else:
        answer = good(url, COMPLETE, body)
        steps, timings = answer["choices"][0]["zerodraft"]["trace"], answer["timings"]
        written = answer["choices"][0]["text"]
    assert sum(len(step["tokens"]) for step in steps) == 16
    assert text_of(tokenizer, [token["id"] for step in steps for token in step["tokens"]]) == written
    assert sum(len(step["drafted"]) for step in steps) == timings["draft_n"]
    assert sum(len(step["accepted"]) for step in steps) == timings["draft_n_accepted"]
    for step in steps:
        accepted = [step["drafted"][node]["id"] for node in step["accepted"]]
        assert accepted == [token["id"] for token in step["tokens"]][: len(accepted)]
        assert all(-1 <= node["parent"] < at for at, node in enumerate(step["drafted"]))


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1, "seed": 5}])
def test_the_same_answer_without_drafts(url: str, how: dict[str, Any]) -> None:
    asked = {**GREEDY, **how, "max_tokens": 16}
    drafted, plain = (good(url, COMPLETE, {**asked, "zerodraft": {"drafts": drafts}}) for drafts in (True, False))
    assert plain["choices"][0]["text"] == drafted["choices"][0]["text"]
    assert plain["timings"]["draft_n"] == 0
    assert plain["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_tokens_of_texts_and_conversations(url: str, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    answer = good(url, "/tokenize", {"prompt": PROMPT, "return_token_strs": True})
    assert answer["tokens"] == ids
    assert answer["count"] == len(ids)
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(ids)
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert good(url, "/tokenize", {"messages": MESSAGES})["tokens"] == expected


def test_metrics_count(url: str) -> None:
    def value(name: str) -> float:
        _, text, _ = ask(url, "/metrics")
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    names = ("zerodraft_generation_tokens_total", "zerodraft_prompt_tokens_total", "zerodraft_accepted_length_count")
    before = [value(name) for name in names]
    answer = good(url, COMPLETE, GREEDY)
    after = [value(name) for name in names]
    assert after[0] - before[0] == 12
    assert after[1] - before[1] == answer["usage"]["prompt_tokens"]
    assert 0 < after[2] - before[2] <= 11
    assert value("zerodraft_accepted_length_sum") >= value("zerodraft_accepted_length_count")


def test_health(url: str) -> None:
    assert ask(url, "/health")[:2] == (200, {"status": "ok"})


def test_a_full_queue_answers_429_and_clients_that_leave_free_their_place(model: Any, tokenizer: Any) -> None:
    served = serve_model(model, tokenizer, "tiny", "lookup", parallel=1, queue=1)
    endless = {**GREEDY, "max_tokens": 1500, "stream": True}
    with running(served) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        streams = [client.completions.create(**endless) for _ in range(2)]
        assert next(iter(streams[0])).choices
        status, answer, headers = ask(url, COMPLETE, GREEDY)
        assert status == 429
        assert answer["error"]["type"] == "rate_limit_error"
        assert headers["retry-after"] == "1"
        assert ask(url, COMPLETE, {**GREEDY, "n": 2})[0] == 429
        for stream in streams:
            stream.close()
        # a plain request that goes away counts as well
        wait_for(url, 'request_success_total{finished_reason="cancelled"} 2.0')
        leave_early(url, endless)
        wait_for(url, 'request_success_total{finished_reason="cancelled"} 3.0')
        assert ask(url, COMPLETE, {**GREEDY, "max_tokens": 1})[0] == 200


def wait_for(url: str, line: str) -> None:
    """Until `/metrics` says so."""
    deadline = time.monotonic() + 30
    while line not in ask(url, "/metrics")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def leave_early(url: str, body: dict[str, Any]) -> None:
    """Ask for a long answer in one piece, and do not wait for it."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    data = json.dumps({**body, "stream": False}).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {COMPLETE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        wait_for(url, "zerodraft_num_requests_running 1.0")


def test_time_limits_end_answers(model: Any, tokenizer: Any) -> None:
    with running(serve_model(model, tokenizer, "tiny", "lookup", seconds=0.4)) as url:
        answer = good(url, COMPLETE, {**GREEDY, "max_tokens": 1900})
    assert answer["choices"][0]["finish_reason"] == "timeout"
    assert 0 < answer["usage"]["completion_tokens"] < 1900


def test_exit_rules_stop_tokens_early_and_traces_tell(tokenizer: Any, tmp_path: Path) -> None:
    """As `generate` with the rule, in company too."""
    looped = ZttForCausalLM.from_pretrained(save_ztt(tmp_path / "looped", tokenizer)).eval()
    prompts, rule = [PROMPT, "once upon a time there was"], "latent:0.405"
    wanted = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        new = plain(looped, tokenizer, ids, 24, exit_rule=rule_of(looped, rule))
        assert looped.last_exit is not None
        wanted.append((new, looped.last_exit[0, len(ids) - 1 :].tolist()))
    assert len({depth for _, depths in wanted for depth in depths}) > 1
    with running(serve_model(looped, tokenizer, "tiny", "lookup", exit_rule=rule)) as url:
        told = ask(url, "/v1/models")[1]["data"][0]["zerodraft"]
        body = {**GREEDY, "prompt": prompts, "max_tokens": 24, "zerodraft": {"trace": True}}
        choices = good(url, COMPLETE, body)["choices"]
    assert told == {"chat": True, "cycles": 3, "exit_rule": rule}
    for choice, expected in zip(choices, wanted, strict=True):
        steps = choice["zerodraft"]["trace"]
        tokens = [token["id"] for step in steps for token in step["tokens"]]
        assert (tokens, [depth for step in steps for depth in step["cycles"]]) == expected


def test_plain_models_have_no_exits(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ZerodraftError, match="exit rule 'latent:1' is for Zero Token Transformers"):
        serve_model(model, tokenizer, "tiny", "lookup", exit_rule="latent:1")
