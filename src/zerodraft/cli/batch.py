"""`zerodraft generate --out`: answers a file of requests, line by line; what is there already is not made again."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from zerodraft.cli.console import LiteralConsole
from zerodraft.cli.decoding import check_prompt
from zerodraft.cli.progress import LiveProgress
from zerodraft.cli.requests import Answered, Request, figures, key_of, line_of
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import json_object
from zerodraft.models.tokenizers import encode, encode_messages


def kept_lines(out: Path, keys: Sequence[str]) -> int:
    """How many requests the file answers already; a line that was not written to its end is dropped.

    Args:
        out: The file; it need not be there.
        keys: Those of all requests, in order.

    Raises:
        ZerodraftError: the file holds something else than the first answers.
    """
    if not out.exists():
        return 0
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.decode("utf-8", "replace").split("\n")[:-1]
    for number, line in enumerate(lines, 1):
        found = key_of(json_object(line, f"Line {number} of '{out}'"))
        if number > len(keys) or found != keys[number - 1]:
            raise ZerodraftError(
                f"line {number} of '{out}' is not the answer to request {number} with these settings: name a new file, "
                "or give the same prompts and flags to go on"
            )
    if len(whole) < len(content):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return len(lines)


def prompts_of(tokenizer: Any, model: Any, requests: Iterable[Request], *, chat: bool) -> list[tuple[Request, Any]]:
    """Requests with the tensors of their prompts, and answers no longer than the model has positions for. One in
    OpenAI's form that cannot be read has an error instead.

    Raises:
        ZerodraftError: another one cannot be read.
    """
    found = []
    for request in requests:
        inputs = None
        try:
            if not request.error:
                if request.messages:
                    inputs = encode_messages(tokenizer, list(request.messages))
                else:
                    inputs = encode(tokenizer, request.prompt, chat)
                room = check_prompt(model, inputs["input_ids"])
                if room is not None and room < request.sampling.max_new_tokens:
                    request = replace(request, sampling=replace(request.sampling, max_new_tokens=room))
        except ZerodraftError as error:
            if request.custom_id is None:
                raise ZerodraftError(f"line {request.number}: {error}") from error
            request = replace(request, error=str(error))
        found.append((request, inputs))
    return found


def groups(prompts: Iterable[tuple[Request, Any]], rows: int) -> Iterator[list[tuple[Request, Any]]]:
    """Neighbours that are decoded together: greedy ones with the same settings. The draws of a row would depend on the
    others, and so would the end of one that ends with a text."""

    def alike(item: tuple[Request, Any]) -> Any:
        request, _ = item
        alone = request.error or request.sampling.temperature > 0 or request.sampling.stop
        return request.number if alone else replace(request.sampling, seed=0)

    for _, same in groupby(prompts, key=alike):
        block = list(same)
        yield from (block[start : start + rows] for start in range(0, len(block), rows))


def decode_over_depth(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[Request, Any]], rows: int, rule: Any
) -> Iterator[Answered | ZerodraftError | None]:
    """The answers to requests, in order, as soon as those before are there too; None to one with an error, and an error
    to one that fails."""
    from zerodraft.fast.depth_batching import DepthBatch
    from zerodraft.fast.depth_requests import DepthAnswer

    wanted = [(request, inputs["input_ids"]) for request, inputs in prompts if not request.error]
    slots = max((ids.shape[1] + request.sampling.max_new_tokens - 1 for request, ids in wanted), default=1)
    batch = DepthBatch(model, rows=max(min(rows, len(wanted)), 1), slots=slots, exit_rule=rule)
    keys = (batch.submit(_over_depth(model, tokenizer, request, ids)) for request, ids in wanted)
    # a reserve keeps the batch full, and the prompts of a long file need not all be prepared before its first answer
    submitted = deque(islice(keys, 2 * rows))
    found: dict[int, DepthAnswer] = {}
    for request, inputs in prompts:
        if request.error:
            yield None
            continue
        key = submitted.popleft()
        while key not in found:
            ended = batch.step()
            found.update(ended)
            submitted.extend(islice(keys, len(ended)))
        answer = found.pop(key)
        if answer.error is not None:
            if not isinstance(answer.error, ZerodraftError):
                raise answer.error
            yield answer.error
            continue
        yield Answered(
            text=tokenizer.decode(answer.tokens, skip_special_tokens=True),
            tokens=answer.tokens,
            finish_reason=str(answer.finish_reason),
            prompt_tokens=inputs["input_ids"].shape[1],
            stats={"rows": batch.rows, "cycles": sum(answer.depths) / len(answer.depths)},
        )


def _over_depth(model: Any, tokenizer: Any, request: Request, ids: Any) -> Any:
    import torch

    from zerodraft.generate.over_depth import depth_request

    sampling = request.sampling
    generator = torch.Generator().manual_seed(sampling.seed)
    pad = tokenizer.eos_token_id or 0
    return depth_request(model, ids, generator=generator, pad_token_id=pad, **sampling.arguments(tokenizer))


def decode_together(
    model: Any, tokenizer: Any, decode: Any, group: Sequence[tuple[Request, Any]], **options: Any
) -> list[Answered | None]:
    """The answers to a group; None to a request with an error."""
    import torch

    from zerodraft.models.loading import eos_ids

    if group[0][0].error:
        return [None] * len(group)
    prompts = [inputs["input_ids"][0] for _, inputs in group]
    width, pad = max(map(len, prompts)), tokenizer.eos_token_id or 0
    ids = torch.stack([torch.cat([row.new_full((width - len(row),), pad), row]) for row in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in prompts])
    sampling = group[0][0].sampling
    torch.manual_seed(sampling.seed)
    out = decode.generate(
        model, ids.to(model.device), attention_mask=mask.to(model.device), pad_token_id=pad,
        **sampling.arguments(tokenizer), **options,
    )  # fmt: skip
    ends = eos_ids(model)
    answers: list[Answered | None] = []
    for prompt, row in zip(prompts, out[:, width:].tolist(), strict=True):
        tokens = row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))]
        stopped = tokens[-1] in ends or any(stop in tokenizer.decode(tokens) for stop in sampling.stop)
        answers.append(
            Answered(
                text=tokenizer.decode(tokens, skip_special_tokens=True),
                tokens=tokens,
                finish_reason="stop" if stopped else "length",
                prompt_tokens=len(prompt),
                stats=figures(decode.last_stats),
            )
        )
    return answers


def decode_group(
    model: Any, tokenizer: Any, decode: Any, group: Sequence[tuple[Request, Any]], **options: Any
) -> Iterator[Answered | ZerodraftError | None]:
    """The same, and an error where one of them fails, which is no matter of the others."""
    try:
        found = decode_together(model, tokenizer, decode, group, **options)
    except ZerodraftError as error:
        if len(group) == 1:
            yield error
            return
        for one in group:
            yield from decode_group(model, tokenizer, decode, [one], **options)
        return
    yield from found


def answer_file(
    model: Any,
    tokenizer: Any,
    decode: Any,
    requests: Sequence[Request],
    out: Path,
    *,
    keys: Sequence[str],
    rows: int,
    chat: bool,
    name: str,
    over_depth: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Answers the requests that the file does not answer yet, in order.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        decode: How it decodes.
        requests: All of them.
        out: The file; lines are added to it as they come.
        keys: Of the requests.
        rows: Requests that are decoded together.
        chat: Put prompts into the chat template.
        name: What the model is called.
        over_depth: Whether they go into a batch over depth, without drafts.
        **options: Further ones of `generate`.

    Raises:
        ZerodraftError: a request that cannot be read, or a file with other answers.
    """
    import json

    def settled(request: Request, found: Answered | ZerodraftError | None) -> tuple[Request, Answered | None]:
        if not isinstance(found, ZerodraftError):
            return request, found
        if request.custom_id is None:
            raise ZerodraftError(f"line {request.number}: {found}") from found
        return replace(request, error=str(found)), None

    def in_turn() -> Iterator[Answered | ZerodraftError | None]:
        if over_depth:
            yield from decode_over_depth(model, tokenizer, prompts, rows, options.get("exit_rule"))
            return
        for group in groups(prompts, rows):
            yield from decode_group(model, tokenizer, decode, group, **options)

    done = kept_lines(out, keys)
    prompts = prompts_of(tokenizer, model, requests[done:], chat=chat)
    at, tokens, failed = done, 0, 0
    with out.open("ab") as file, LiveProgress(LiteralConsole(stderr=True)) as progress:
        progress.show("prompts answered", at, len(requests))
        for (asked, _), found in zip(prompts, in_turn(), strict=True):
            request, answered = settled(asked, found)
            line = line_of(request, answered, keys[at], name)
            file.write((json.dumps(line) + "\n").encode())
            file.flush()
            at, failed = at + 1, failed + (answered is None)
            tokens += 0 if answered is None else len(answered.tokens)
            progress.show("prompts answered", at, len(requests))
    return {"answered": at - done, "kept": done, "failed": failed, "new_tokens": tokens}
