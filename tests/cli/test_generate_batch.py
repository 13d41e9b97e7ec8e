"""`zerodraft generate --out`: each line as if it were asked alone, in order, on from where a run stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.saved import save, save_target
from zerodraft import LatentExit
from zerodraft.cli.decoding import Sampling
from zerodraft.cli.main import main
from zerodraft.common.lock import locked_file

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
PROMPTS = ["the cat", "once upon a time", "a fox", "the little fox could", "mat"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A Llama that says more than one token and ends some of its texts, with a chat template."""
    folder = save_target(tmp_path_factory.mktemp("target"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    model.generation_config.eos_token_id = int(model.generate(ids, max_new_tokens=5, do_sample=False)[0, -1])
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    return folder


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def run(target: Path, prompts: str, out: Path, *flags: str) -> list[dict[str, Any]]:
    words = ["--target", str(target), "--drafter", "lookup", "--prompt-file", prompts, "--out", str(out)]
    assert main(["generate", *words, "--max-new-tokens", "8", *flags]) == 0
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def alone(target: Path, tokenizer: Any) -> list[list[int]]:
    """What transformers writes after each prompt."""
    model = AutoModelForCausalLM.from_pretrained(target)
    inputs = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    texts = [model.generate(**one, max_new_tokens=8, do_sample=False) for one in inputs]
    return [text[0, one.input_ids.shape[1] :].tolist() for one, text in zip(inputs, texts, strict=True)]


@pytest.mark.parametrize("rows", [1, 3])
def test_every_line_is_answered_as_if_it_were_alone(
    rows: int, target: Path, alone: list[list[int]], tokenizer: Any, tmp_path: Path
) -> None:
    prompts = write(tmp_path / "a.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    found = run(target, prompts, tmp_path / "new" / "b.jsonl", "--batch", str(rows))
    assert [line["tokens"] for line in found] == alone
    assert [line["text"] for line in found] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in alone]
    assert [line["finish_reason"] for line in found] == ["length" if len(ids) == 8 else "stop" for ids in alone]
    assert {line["finish_reason"] for line in found} == {"length", "stop"}
    assert [line["prompt_tokens"] for line in found] == [len(tokenizer.encode(prompt)) for prompt in PROMPTS]
    assert [line["stats"]["rows"] for line in found] == ([1] * 5 if rows == 1 else [3, 3, 3, 2, 2])


def test_an_interrupted_run_goes_on(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write(tmp_path / "a.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    out, flags = tmp_path / "b.jsonl", ("--temperature", "1.5", "--json")
    whole = run(target, prompts, out, *flags)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1] + lines[2][:20])
    capsys.readouterr()
    again = run(target, prompts, out, *flags)
    assert [line["tokens"] for line in again] == [line["tokens"] for line in whole]
    printed = json.loads(capsys.readouterr().out)
    assert (printed["answered"], printed["kept"]) == (3, 2)
    run(target, prompts, out, *flags)
    assert json.loads(capsys.readouterr().out)["answered"] == 0
    for other in (("--temperature", "1.4"), ("--temperature", "1.5", "--seed", "1")):
        words = ["--target", str(target), "--prompt-file", prompts, "--out", str(out), "--max-new-tokens", "8", *other]
        assert main(["generate", *words]) == 2
        assert "is not the answer to request 1 with these settings: name a new file" in capsys.readouterr().err


def test_a_run_that_is_killed_leaves_whole_lines_and_goes_on(target: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "a.jsonl", *({"prompt": f"{prompt} {i}"} for i in range(200) for prompt in PROMPTS))
    out = tmp_path / "b.jsonl"
    words = [sys.executable, "-m", "zerodraft", "generate", "--target", str(target), "--drafter", "lookup"]
    words += ["--prompt-file", prompts, "--out", str(out), "--max-new-tokens", "8"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = out.read_bytes()
    kept = before[: before.rfind(b"\n") + 1].splitlines()
    assert 0 < len(kept) < 1000
    # the rest need not be written for it to be seen that the run goes on
    write(tmp_path / "a.jsonl", *Path(prompts).read_text("utf-8").splitlines()[: len(kept) + 2])
    run(target, prompts, out, "--batch", "2")
    assert out.read_bytes().splitlines()[: len(kept)] == kept
    assert len(out.read_bytes().splitlines()) == len(kept) + 2


def test_each_sampled_line_has_a_seed(target: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "the cat", "temperature": 1.5}] * 2 + [{"prompt": "the cat", "temperature": 1.5, "seed": 5}] * 2
    prompts = write(tmp_path / "a.jsonl", *rows)
    one, two, three, four = (line["tokens"] for line in run(target, prompts, tmp_path / "b.jsonl", "--batch", "4"))
    assert one != two
    assert three == four
    # the seeds count on from the flag's
    (again, _) = run(target, write(tmp_path / "c.jsonl", *rows[:2]), tmp_path / "d.jsonl", "--seed", "1")
    assert again["tokens"] == two


def test_a_line_goes_before_the_flags(target: Path, alone: list[list[int]], tokenizer: Any, tmp_path: Path) -> None:
    stop = next(letter for letter in tokenizer.decode(alone[0]) if letter.isalnum())
    rows = [{"prompt": PROMPTS[0], "max_tokens": 3}, {"prompt": PROMPTS[0], "stop": [stop]}, {"prompt": PROMPTS[0]}]
    cut, stopped, full = run(target, write(tmp_path / "a.jsonl", *rows), tmp_path / "b.jsonl", "--batch", "3")
    assert (cut["tokens"], cut["finish_reason"]) == (alone[0][:3], "length")
    assert full["tokens"] == alone[0]
    assert stopped["finish_reason"] == "stop"
    assert stop in stopped["text"]
    assert stopped["tokens"] == alone[0][: len(stopped["tokens"])]
    assert stop not in tokenizer.decode(stopped["tokens"][:-1])


def test_conversations_are_put_into_the_template(target: Path, tmp_path: Path) -> None:
    messages = [
        {"role": "developer", "content": "sat"},
        {"role": "user", "content": [{"type": "text", "text": "a cat"}]},
    ]
    rows = [{"messages": messages}, {"prompt": "system: sat\nuser: a cat\n"}]
    first, second = run(target, write(tmp_path / "a.jsonl", *rows), tmp_path / "b.jsonl")
    assert first["tokens"] == second["tokens"]


def asked(custom_id: str, body: dict[str, Any], url: str = "/v1/chat/completions") -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def test_openais_form(target: Path, alone: list[list[int]], tokenizer: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a cat"}]
    rows = [
        asked("chat", {"model": "any", "messages": messages, "max_completion_tokens": 4}),
        asked("text", {"model": "any", "prompt": PROMPTS[0], "user": "me", "top_p": None}, "/v1/completions"),
        asked("unknown field", {"messages": messages, "tools": []}),
        asked("unknown place", {"input": "the cat"}, "/v1/embeddings"),
        asked("too hot", {"prompt": "the cat", "temperature": -1}, "/v1/completions"),
        asked("too long", {"prompt": "the cat " * 2000}, "/v1/completions"),
        asked("wrong place", {"prompt": "the cat"}),
    ]
    out = tmp_path / "b.jsonl"
    found = run(target, write(tmp_path / "a.jsonl", *rows), out, "--batch", "2")
    assert [line["custom_id"] for line in found] == [row["custom_id"] for row in rows]
    assert len({line["id"] for line in found}) == len(rows)
    chat, text, *refused = (line["response"] for line in found)
    assert chat["status_code"] == text["status_code"] == 200
    assert chat["body"]["object"] == "chat.completion"
    assert chat["body"]["choices"][0]["message"]["role"] == "assistant"
    assert chat["body"]["usage"]["completion_tokens"] <= 4
    assert text["body"]["object"] == "text_completion"
    assert text["body"]["choices"][0]["text"] == tokenizer.decode(alone[0], skip_special_tokens=True)
    assert text["body"]["usage"]["total_tokens"] == len(tokenizer.encode(PROMPTS[0])) + len(alone[0])
    assert {one["status_code"] for one in refused} == {400}
    said = [one["body"]["error"]["message"] for one in refused]
    parts = ["unknown key 'tools'", "expected POST to", "temperature is -1", "at most 2048", "'messages' is missing"]
    assert all(part in message for part, message in zip(parts, said, strict=True))
    # errors are answers too, and are not made again
    before = out.read_bytes()
    run(target, str(tmp_path / "a.jsonl"), out, "--batch", "2")
    assert out.read_bytes() == before


@pytest.mark.parametrize("looped", [False, True])
def test_what_fails_while_it_is_decoded_is_a_matter_of_its_line(
    looped: bool, target: Path, ztt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores that overflow, say: OpenAI's form has an error for that, the plain form ends there."""
    good, bad = {"prompt": PROMPTS[0]}, {"prompt": PROMPTS[0], "repetition_penalty": 1e-300}
    rows = [asked(str(at), body, "/v1/completions") for at, body in enumerate((good, bad, bad, good))]
    model, drafts = (ztt_dir, []) if looped else (target, ["--drafter", "lookup"])

    def answers(prompts: str, out: Path) -> int:
        words = ["--model", str(model), *drafts, "--prompt-file", prompts, "--out", str(out), "--batch", "2"]
        return main(["generate", *words, "--max-new-tokens", "8"])

    out = tmp_path / "b.jsonl"
    assert answers(write(tmp_path / "a.jsonl", *rows), out) == 0
    found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line["response"]["status_code"] for line in found] == [200, 400, 400, 200]
    assert "NaN" in found[1]["response"]["body"]["error"]["message"]
    before = out.read_bytes()
    assert answers(str(tmp_path / "a.jsonl"), out) == 0
    assert out.read_bytes() == before
    assert answers(write(tmp_path / "c.jsonl", good, bad, good), tmp_path / "d.jsonl") == 2
    assert "line 2: The target's scores hold NaN" in capsys.readouterr().err
    (line,) = (tmp_path / "d.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["text"] == found[0]["response"]["body"]["choices"][0]["text"]


def test_one_process_writes_a_file_of_answers(target: Path, tmp_path: Path, capsys: Any) -> None:
    prompts, out = write(tmp_path / "a.jsonl", {"prompt": "the cat"}), tmp_path / "new" / "b.jsonl"
    words = ["generate", "--target", str(target), "--prompt-file", prompts, "--out", str(out)]
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    with locked_file(out, "mine"):
        for name in (out, link):
            assert main([*words[:-1], str(name)]) == 2
            assert f"Another process is writing answers into '{name}'." in capsys.readouterr().err
        assert not out.exists()
    assert main([*words, "--max-new-tokens", "2"]) == 0
    assert [file.name for file in out.parent.iterdir()] == ["b.jsonl"]


@pytest.mark.parametrize("kind", ["plain", "looped"])
@pytest.mark.parametrize("rows", [1, 2])
def test_no_answer_is_longer_than_the_model_has_positions_for(
    kind: str, rows: int, target: Path, ztt_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(target if kind == "plain" else ztt_dir)
    model.config.get_text_config().max_position_embeddings = 24
    model.generation_config.eos_token_id = None
    folder = save(model, tokenizer, tmp_path / "short")
    lines = [
        {"prompt": "the cat", "max_tokens": 10**9},
        {"prompt": "once upon a time"},
        {"prompt": "a", "max_tokens": 2},
    ]
    prompts = write(tmp_path / "a.jsonl", *lines)
    out = tmp_path / "b.jsonl"
    words = ["--target", str(folder), "--prompt-file", prompts, "--out", str(out), "--max-new-tokens", "100"]
    assert main(["generate", *words, "--batch", str(rows)]) == 0
    found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert all(("cycles" in line["stats"]) == (kind == "looped" and rows > 1) for line in found)
    room = [24 - line["prompt_tokens"] for line in found]
    assert [len(line["tokens"]) for line in found] == [*room[:2], 2]
    assert {line["finish_reason"] for line in found} == {"length"}


def test_exit_rules(ztt_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    from zerodraft import FixedExit

    prompts = write(tmp_path / "a.jsonl", {"prompt": "the cat"}, {"prompt": "once upon a time"})
    found = run(ztt_dir, prompts, tmp_path / "b.jsonl", "--exit-rule", "cycles:1", "--batch", "2")
    model = AutoModelForCausalLM.from_pretrained(ztt_dir)
    inputs = tokenizer("the cat", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False, exit_rule=FixedExit(cycles=1))
    assert found[0]["tokens"] == plain[0, inputs.input_ids.shape[1] :].tolist()
    assert torch.equal(plain[:, : inputs.input_ids.shape[1]], inputs.input_ids)


@pytest.mark.parametrize("change", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}])
def test_looped_models_are_batched_over_depth(
    change: dict[str, Any], ztt_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Lines share a batch whatever they ask for, each is answered as alone, and all are in order. What the model's own
    generation settings ask for holds there too."""
    model = AutoModelForCausalLM.from_pretrained(ztt_dir)
    model.generation_config.update(**change)
    folder = save(model, tokenizer, tmp_path / "changed")
    lines: list[dict[str, Any]] = [
        {"prompt": "the cat"},
        {"prompt": "once upon a time", "max_tokens": 3},
        {"prompt": "the dog", "temperature": 1.0, "seed": 5},
        {"prompt": "a house", "max_tokens": 11},
        {"prompt": "the cat and the dog", "temperature": 0.7, "top_p": 0.9, "seed": 2, "repetition_penalty": 1.2},
        {"prompt": "a little fox", "repetition_penalty": 1.7},
        {"prompt": "on the mat", "temperature": 1.3, "seed": 9, "max_tokens": 20},
    ]
    whole = tokenizer.decode(alone_over_depth(model, tokenizer, lines[6]))
    lines.append({**lines[6], "stop": next(sign for sign in whole[5:] if sign.isalpha())})
    prompts, out = write(tmp_path / "a.jsonl", *lines), tmp_path / "b.jsonl"
    words = ["generate", "--model", str(folder), "--prompt-file", prompts, "--out", str(out), "--max-new-tokens", "8"]
    words += ["--exit-rule", "latent:0.9", "--batch", "3"]
    assert main(words) == 0
    found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    for line, answer in zip(lines, found, strict=True):
        assert answer["tokens"] == alone_over_depth(model, tokenizer, line)
        start = answer["prompt_tokens"] - 1
        depths = model.last_exit[0, start : start + len(answer["tokens"])].float()
        assert answer["stats"] == {"rows": 3, "cycles": pytest.approx(depths.mean().item())}
    assert [answer["finish_reason"] for answer in found] == ["length"] * 7 + ["stop"]
    # one at a time, as with drafts, the tokens are the same
    one = tmp_path / "c.jsonl"
    assert main([str(one) if word == str(out) else word for word in words][:-2]) == 0
    assert [json.loads(line)["tokens"] for line in one.read_text("utf-8").splitlines()] == [
        answer["tokens"] for answer in found
    ]
    # cut off behind the second line, it goes on
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:2]) + b'{"text')
    assert main(words) == 0
    again = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line["tokens"] for line in again] == [line["tokens"] for line in found]


@pytest.mark.parametrize(
    ("flags", "drafter"),
    [
        (["--batch", "2", "--dtype", "float32"], None),
        (["--batch", "2", "--drafter", "lookup"], "lookup"),
        ([], "lookup"),
    ],
)
def test_only_what_drafted_is_told(
    flags: list[str], drafter: str | None, ztt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = write(tmp_path / "a.jsonl", {"prompt": "the cat"}, {"prompt": "a dog"}), tmp_path / "b.jsonl"
    words = ["generate", "--model", str(ztt_dir), "--prompt-file", prompts, "--out", str(out), "--max-new-tokens", "4"]
    assert main([*words, *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["drafter"] == drafter
    for line in out.read_text("utf-8").splitlines():
        assert ("cycles" in json.loads(line)["stats"]) == (drafter is None)


def alone_over_depth(model: Any, tokenizer: Any, line: dict[str, Any]) -> list[int]:
    """By the model's own `generate`."""
    sampling = Sampling(
        max_new_tokens=line.get("max_tokens", 8),
        **{name: line[name] for name in ("temperature", "top_p", "repetition_penalty") if name in line},
        stop=(line["stop"],) if "stop" in line else (),
    )
    inputs = tokenizer(line["prompt"], return_tensors="pt")
    torch.manual_seed(line.get("seed", 0))
    out = model.generate(**inputs, exit_rule=LatentExit(threshold=0.9), **sampling.arguments(tokenizer))
    return out[0, inputs.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "temprature": 1},
            "line 2 of 'a.jsonl': unknown key 'temprature' (did you mean 'temperature'?)",
        ),
        (
            {"prompt": "a", "temperature": "hot"},
            "line 2 of 'a.jsonl': 'temperature' must be a number or null, got 'hot'",
        ),
        ({"prompt": "a", "max_tokens": 0}, "line 2 of 'a.jsonl': max_tokens is 0; it must be at least 1"),
        (
            {"prompt": "a", "max_tokens": 4, "max_completion_tokens": 5},
            "line 2 of 'a.jsonl': 'max_tokens' and 'max_completion_tokens' differ",
        ),
        ({"prompt": "a", "top_p": 2}, "line 2 of 'a.jsonl': top_p is 2.0; it must be above 0 and at most 1"),
        ({"prompt": " "}, "line 2 of 'a.jsonl': give either a 'prompt' that is a text or 'messages'"),
        ({"prompt": "a", "messages": [{}]}, "line 2 of 'a.jsonl': give either a 'prompt'"),
        ({"prompt": ["a"]}, "line 2 of 'a.jsonl': 'prompt' must be a text"),
        ({"messages": [{"role": "user"}]}, "line 2 of 'a.jsonl': a message has a 'role' and a 'content'"),
        ({"messages": "a"}, "line 2 of 'a.jsonl': 'messages' must be a list"),
        ({"messages": [{"role": "user", "content": 3}]}, "line 2 of 'a.jsonl': the content of a message is a text"),
        ({"prompt": "a", "n": 2}, "line 2 of 'a.jsonl': one answer is written for each line"),
        ({"custom_id": "a", "body": {}}, "line 2 of 'a.jsonl': 'method' is missing: OpenAI's form has body, custom_id"),
        ({**asked("a", {}), "more": 1}, "line 2 of 'a.jsonl': unknown key 'more'"),
        (asked(3, {}), "line 2 of 'a.jsonl': 'custom_id' must be a text"),  # pyright: ignore[reportArgumentType]
        ("{", "Line 2 of 'a.jsonl' is not JSON"),
        ("[1]", "Line 2 of 'a.jsonl' must be an object"),
        ({"prompt": "the cat " * 2000}, "line 2: the prompt has"),
    ],
)
def test_a_line_that_is_no_request_is_named(
    row: Any, message: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", {"prompt": "the cat"}, row)
    assert main(["generate", "--target", str(target), "--prompt-file", "a.jsonl", "--out", "b.jsonl"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "b.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "b.jsonl"], "--out needs a file of prompts"),
        (["--batch", "2", "hi"], "--batch is for a file of prompts"),
        (["--prompt-file", "a.jsonl", "--out", "b.jsonl", "--batch", "0"], "--batch is 0"),
        (["--prompt-file", "a.jsonl", "--out", "a.jsonl"], "--out is the file of prompts"),
        (["--prompt-file", "a.jsonl", "--out", "b.jsonl", "--trace"], "--trace is for one text"),
        (["--prompt-file", "a.jsonl", "--out", "b.jsonl", "hi"], "give prompts either as a word or with --prompt-file"),
        (["--prompt-file", "a.jsonl", "--out", "c.jsonl"], "line 1 of 'c.jsonl' is not the answer to request 1"),
        (["--prompt-file", "a.jsonl", "--out", "."], "The file of answers '.' is a directory; expected a file."),
        (["--prompt-file", "d.jsonl", "--out", "b.jsonl"], "custom_id 'a' is that of line 1 as well"),
        (["--prompt-file", "e.jsonl", "--out", "b.jsonl"], "holds no prompts"),
        (["--prompt-file", "nowhere.jsonl", "--out", "b.jsonl"], "nowhere.jsonl' cannot be read"),
        (["--prompt-file", "a.jsonl", "--out", "b.jsonl", "--exit-rule", "cycles:1"], "is for Zero Token Transformers"),
    ],
)
def test_flags_that_do_not_go_together(
    words: list[str], message: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", {"prompt": "the cat"})
    write(tmp_path / "c.jsonl", {"note": "mine"})
    write(tmp_path / "d.jsonl", *[asked("a", {"prompt": "a"})] * 2)
    write(tmp_path / "e.jsonl")
    assert main(["generate", "--target", str(target), *words]) == 2
    assert message in capsys.readouterr().err
