"""Batches over depth: every request gets what it gets alone, whatever its company, its cycles and its arrival."""

from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fast.cycled import over
from tests.ztt.tiny import gap, tiny, tokens
from zerodraft import ConfidenceExit, FixedExit, LatentExit, ZerodraftError, ZeroMassExit, ZttForCausalLM
from zerodraft.fast.depth_batching import DepthBatch
from zerodraft.fast.depth_requests import DepthAnswer, DepthRequest, check_count, tokens_of
from zerodraft.fast.lean import packed_weights
from zerodraft.fast.lean.compiled_layers import CompiledLayers
from zerodraft.fast.lean.depths import in_turn, run_depths
from zerodraft.ztt.exits import CycleOutput

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"input_injection": True, "cycle_gates": True, "cycle_scales": True, "edge_zero_tokens": True},
    "late zero tokens": {"zero_token_start": 2, "zero_rope": "none"},
    "no head": {"head_layers": 0, "input_injection": True},
    "no tail": {"tail_layers": 0, "zero_rope": "relative"},
    "no zero tokens": {"zero_tokens": False},
}


class ByState:
    """Stops some of the tokens after each cycle, as good as at random, but by their states alone."""

    reads_zero_mass = False

    def __call__(self, out: CycleOutput) -> torch.Tensor:
        return (2 * out.hidden[:, :4].sum(-1)).frac().abs() < 0.4


RULES: dict[str, Any] = {
    "off": None,
    "own": ByState(),
    "zero mass": ZeroMassExit(threshold=0.45),
    "latent": LatentExit(threshold=(0.6, None, 0.8)),
    "confidence": ConfidenceExit(threshold=0.2),
    "fixed": FixedExit(cycles=2),
}


def requests(count: int = 7) -> list[DepthRequest]:
    return [
        DepthRequest(prompt=tokens(1, 3 + 2 * i, seed=i)[0].tolist(), max_new_tokens=1 + (5 * i) % 8)
        for i in range(count)
    ]


def alone(model: Any, request: DepthRequest, rule: Any = None, policy: Any = "propagate") -> DepthAnswer:
    """By the model's own forward pass."""
    prompt = torch.tensor([request.prompt])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_new_tokens, do_sample=False,
        eos_token_id=list(request.ends) or None, pad_token_id=0, exit_rule=rule, exit_policy=policy,
    )  # fmt: skip
    new = out[0, prompt.shape[1] :].tolist()
    depths = [model.config.cycles] * len(new)
    if rule is not None:
        depths = model.last_exit[0, prompt.shape[1] - 1 :].tolist()
    return DepthAnswer(tokens=new, depths=depths, finish_reason="stop" if new[-1] in request.ends else "length")


@pytest.mark.parametrize("policy", ["propagate", "latest"])
@pytest.mark.parametrize("rule", RULES)
def test_each_as_alone(rule: str, policy: Any) -> None:
    """Compiled, and with torch's operators (whose heads are too small for the kernels)."""
    for model in (over("llama", cycles=4, **OPTIONS["everything"]), tiny("llama", cycles=4, input_injection=True)):
        batch = DepthBatch(model, rows=3, slots=64, exit_rule=RULES[rule], exit_policy=policy)
        assert batch.run(requests()) == [alone(model, request, RULES[rule], policy) for request in requests()]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_family_and_option(family: str, options: str) -> None:
    """Mistral's window is shorter than the texts."""
    model = over(family, cycles=4, **OPTIONS[options])
    batch = DepthBatch(model, rows=4, slots=64, exit_rule=ByState())
    answers = batch.run(requests())
    assert answers == [alone(model, request, ByState()) for request in requests()]
    assert len({depth for answer in answers for depth in answer.depths}) > 2


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_one_call_for_all_cycles_is_one_for_each(options: str) -> None:
    model = over("qwen3", cycles=4, **OPTIONS[options])
    weights = packed_weights(model)
    assert weights is not None
    if not isinstance(weights.run, CompiledLayers):
        pytest.skip("no kernels on this machine")
    batch = DepthBatch(model, rows=6, slots=16)
    generator = torch.Generator().manual_seed(0)
    batch._kv.normal_(generator=generator)
    x, fed = (torch.randn(6, 32, generator=generator) for _ in range(2))
    batch._slot[:] = torch.tensor([0, 3, 15, 7, 7, 1])
    at, cycles = torch.tensor([4, 0, 2, 5, 1]), torch.tensor([2, 4, 1, 2, 3])
    found = []
    for run in (run_depths, in_turn):
        kv = batch._kv.clone()
        again = fed[at] if weights.feeds_again else None
        ran = run(weights, kv, x[at], batch._tokens(at), cycles, head_output=again, masses=True)
        found.append((ran.x, kv, torch.stack(ran.masses) if ran.masses else None))
    (ours, our_kv, mass), (theirs, their_kv, other) = found
    assert gap(ours, theirs) <= 1e-5
    assert gap(our_kv, their_kv) <= 1e-5
    assert (mass is None) == (other is None) == (model.zero_tokens is None)
    assert mass is None or gap(mass, other) <= 1e-6
    assert gap(ours, in_turn(weights, batch._kv.clone(), x[at], batch._tokens(at), cycles.flip(0),
                             head_output=again, masses=False).x) > 1e-3  # fmt: skip


MODEL: list[ZttForCausalLM] = []


class Drawn:
    """A choice that remembers: it draws with a generator of its own, and never what it drew last."""

    def __init__(self, seed: int) -> None:
        self.generator, self.last, self.seen = torch.Generator().manual_seed(seed), -1, 0

    def __call__(self, text: torch.Tensor, logits: torch.Tensor) -> int:
        assert self.seen in (0, text.shape[1] - 1)
        assert self.seen == 0 or int(text[0, -1]) == self.last
        self.seen = text.shape[1]
        p = logits.softmax(-1)
        if self.last >= 0:
            p = p.index_fill(0, torch.tensor([self.last]), 0)
        self.last = int(torch.multinomial(p, 1, generator=self.generator))
        return self.last


def drawn(request: DepthRequest, seed: int) -> DepthRequest:
    return replace(request, choose=Drawn(seed), stops=lambda text: int(text[0, -1]) % 16 == 0)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    rows=st.integers(1, 5),
    patience=st.sampled_from([0.0, 0.3, 1.0]),
    arrivals=st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0, 1, 2, 3])), min_size=1, max_size=8),
    cancelled=st.sets(st.integers(0, 7)),
)
def test_any_order_of_arrivals(
    rows: int, patience: float, arrivals: list[tuple[int, int]], cancelled: set[int]
) -> None:
    """Requests come at any time, greedy or drawn, read in pieces or at once, and some are given up; nobody else
    notices, and nothing is left behind."""
    if not MODEL:
        MODEL.append(over("llama", cycles=3, input_injection=True))
    model, rule, todo = MODEL[0], ByState(), requests(len(arrivals))
    batch = DepthBatch(model, rows=rows, slots=64, exit_rule=rule, patience=patience)
    found: dict[int, DepthAnswer] = {}
    keys = []
    for number, (request, (steps, kind)) in enumerate(zip(todo, arrivals, strict=True)):
        prompt = batch.prompt(drawn(request, number) if kind % 2 else request)
        while kind > 1 and not prompt.read(2):
            found.update(batch.step())
        keys.append(batch.submit(prompt))
        growing, tokens = batch.answer(keys[-1]), 0
        for _ in range(steps):
            found.update(batch.step())
            assert len(growing.tokens) - tokens in (0, 1)
            assert (growing.finish_reason is None) == (keys[-1] not in found)
            tokens = len(growing.tokens)
        if number in cancelled:
            assert batch.cancel(keys[-1]) == (keys[-1] not in found)
    while batch.busy:
        found.update(batch.step())
    assert sorted(batch._free) == list(range(rows))
    assert not batch._cycling
    assert not batch._waiting
    for number, (key, request, (_, kind)) in enumerate(zip(keys, todo, arrivals, strict=True)):
        if key not in found:
            assert number in cancelled
        elif kind % 2:
            assert [found[key]] == DepthBatch(model, rows=1, slots=64, exit_rule=rule).run([drawn(request, number)])
        else:
            assert found[key] == alone(model, request, rule)


def test_what_a_choice_raises_ends_its_request_alone() -> None:
    model, todo = over("llama", cycles=4), requests(4)

    def wrong(text: torch.Tensor, logits: torch.Tensor) -> int:
        if text.shape[1] > len(todo[1].prompt) + 1:
            raise InterruptedError
        return 64 * (len(text) - 1) + 5

    batch = DepthBatch(model, rows=3, slots=64)
    bad = [replace(todo[1], choose=wrong), replace(todo[2], choose=lambda text, logits: len(logits))]
    keys = [batch.submit(request) for request in (todo[0], *bad, todo[3])]
    found: dict[int, DepthAnswer] = {}
    while batch.busy:
        found.update(batch.step())
    assert [found[keys[0]], found[keys[3]]] == [alone(model, todo[0]), alone(model, todo[3])]
    raised, outside = found[keys[1]], found[keys[2]]
    assert (raised.tokens, raised.finish_reason) == ([5, 5], "error")
    assert isinstance(raised.error, InterruptedError)
    assert outside.tokens == []
    assert "choose gave token 64; expected one of the vocabulary of 64" in str(outside.error)
    with pytest.raises(ZerodraftError, match="choose gave token 64"):
        batch.run([todo[0], *bad])
    assert not batch.busy
    with pytest.raises(ZerodraftError, match=f"no request {keys[0]} in the batch"):
        batch.answer(keys[0])


@pytest.mark.parametrize("given", [5.0, None, "5", torch.tensor(5.0), torch.tensor([5, 6])], ids=repr)
def test_a_choice_that_is_no_token_ends_its_request_alone(given: Any) -> None:
    model, todo = over("llama", cycles=3), requests(3)
    batch = DepthBatch(model, rows=3, slots=64)
    keys = [batch.submit(request) for request in (todo[0], replace(todo[1], choose=lambda *_: given), todo[2])]
    found: dict[int, DepthAnswer] = {}
    while batch.busy:
        found.update(batch.step())
    assert [found[keys[0]], found[keys[2]]] == [alone(model, todo[0]), alone(model, todo[2])]
    assert "expected a token" in str(found[keys[1]].error)


def test_tokens_of_a_choice_are_whole_numbers() -> None:
    request = replace(requests(1)[0], max_new_tokens=3, choose=lambda text, logits: logits.argmax())
    (answer,) = DepthBatch(over("llama"), rows=1, slots=32).run([request])
    assert [type(token) for token in answer.tokens] == [int] * 3


def test_a_prompt_is_what_it_was_when_it_was_given() -> None:
    model, prompt = over("llama"), tokens(1, 9)[0]
    given = prompt.tolist()
    request = DepthRequest(prompt=given, max_new_tokens=4)
    given.clear()
    wanted = alone(model, DepthRequest(prompt=prompt.tolist(), max_new_tokens=4))
    assert DepthBatch(model, rows=1, slots=32).run([request]) == [wanted]


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("chooses", range(3))
def test_a_choice_may_cancel_any_request(after: int, chooses: int) -> None:
    model = over("llama", cycles=3)
    todo = [DepthRequest(prompt=tokens(1, 4, seed=i)[0].tolist(), max_new_tokens=6) for i in range(3)]
    for victim in range(3):
        batch, keys, seen = DepthBatch(model, rows=3, slots=16), list[int](), list[int]()

        def cancels(
            text: torch.Tensor, logits: torch.Tensor, batch: Any = batch, keys: Any = keys, seen: Any = seen,
            victim: int = victim,
        ) -> int:  # fmt: skip
            seen.append(text.shape[1])
            if len(seen) == after:
                assert batch.cancel(keys[victim])
            return int(logits.argmax())

        keys += [batch.submit(replace(one, choose=cancels) if i == chooses else one) for i, one in enumerate(todo)]
        found: dict[int, DepthAnswer] = {}
        while batch.busy:
            found.update(batch.step())
        assert found == {keys[i]: alone(model, one) for i, one in enumerate(todo) if i != victim}
        assert sorted(batch._free) == [0, 1, 2]


def test_a_step_within_a_step_is_refused() -> None:
    model, (one, two) = over("llama", cycles=3), requests(2)
    batch = DepthBatch(model, rows=2, slots=32)

    def steps(text: torch.Tensor, logits: torch.Tensor) -> int:
        batch.step()
        return 0

    keys = [batch.submit(replace(one, choose=steps)), batch.submit(two)]
    found: dict[int, DepthAnswer] = {}
    while batch.busy:
        found.update(batch.step())
    assert "A step of this batch is under way" in str(found[keys[0]].error)
    assert found[keys[1]] == alone(model, two)


def test_steps_of_another_thread_wait_for_nobody_and_change_nothing() -> None:
    model, (one, two) = over("llama", cycles=3), requests(2)
    batch, raised = DepthBatch(model, rows=2, slots=32), list[str]()

    def other() -> None:
        try:
            batch.step()
        except ZerodraftError as error:
            raised.append(str(error))

    def within(text: torch.Tensor, logits: torch.Tensor) -> int:
        thread = Thread(target=other)
        thread.start()
        thread.join()
        return int(logits.argmax())

    assert batch.run([replace(one, choose=within), two]) == [alone(model, one), alone(model, two)]
    assert len(raised) == one.max_new_tokens


def test_a_text_ends_with_one_of_its_ends() -> None:
    model, (request, *_) = over("llama"), requests(1)
    request = DepthRequest(prompt=request.prompt, max_new_tokens=12)
    whole = DepthBatch(model, rows=1, slots=32).run([request])[0].tokens
    for end in (0, 3, 11):
        ends = DepthRequest(prompt=request.prompt, max_new_tokens=12, ends=frozenset({whole[end]}))
        (answer,) = DepthBatch(model, rows=1, slots=32).run([ends])
        assert answer.tokens == whole[: whole.index(whole[end]) + 1]
        assert answer.finish_reason == "stop"


def test_what_was_computed_is_counted() -> None:
    model = over("llama", cycles=3)
    batch = DepthBatch(model, rows=2, slots=32, exit_rule=ByState())
    answers = batch.run(requests(5))
    behind = [depth for answer in answers for depth in answer.depths[1:]]  # the first comes with the prompt
    assert batch.work.tokens == len(behind)
    assert batch.work.rows == sum(behind)
    assert batch.work.cycles_per_token == sum(behind) / len(behind)
    assert batch.work.places == 2 * batch.work.calls
    assert 0.5 < batch.work.occupancy <= 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rows": 0}, "rows=0 must be a whole number of at least 1"),
        ({"slots": 0}, "slots=0 must be a whole number of at least 1"),
        ({"rows": True}, "rows=True must be a whole number"),
        (
            {"rows": 2, "slots": 10**17},
            r"rows=2 of slots=10{17} need \d+\.\d GiB for keys and values",
        ),
        ({"patience": 1.5}, r"patience=1\.5 must lie between 0 and 1"),
        ({"exit_rule": LatentExit(threshold=(0.1,))}, "threshold"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ZerodraftError, match=complaint):
        DepthBatch(over("llama", cycles=3), **options)


@pytest.mark.parametrize(
    "model",
    [lambda: tiny("gemma3"), lambda: tiny("llama", cycle_lora_rank=2), lambda: tiny("llama", schedule="layer")],
    ids=["family", "lora", "schedule"],
)
def test_models_that_are_not_for_it_are_refused(model: Any) -> None:
    with pytest.raises(ZerodraftError, match=r"need the lean decode path.*decode with model\.generate"):
        DepthBatch(model())


def test_requests_that_do_not_fit_are_refused() -> None:
    batch = DepthBatch(over("llama"), rows=1, slots=8)
    with pytest.raises(ZerodraftError, match="A prompt of 5 tokens and 5 new ones need 9 slots, and slots=8"):
        batch.submit(DepthRequest(prompt=[3] * 5, max_new_tokens=5))
    with pytest.raises(ZerodraftError, match="outside of the vocabulary of 64"):
        batch.submit(DepthRequest(prompt=[3, 64], max_new_tokens=1))
    with pytest.raises(ZerodraftError, match="The prompt is empty"):
        DepthRequest(prompt=[], max_new_tokens=1)
    for count in (0, True):
        with pytest.raises(ZerodraftError, match=f"max_new_tokens={count} must be a whole number of at least 1"):
            DepthRequest(prompt=[3], max_new_tokens=count)
    for count in (2.5, None, "3"):
        with pytest.raises(ZerodraftError, match=f"rows={count!r} must be a whole number of at least 1"):
            check_count("rows", count)
    for prompt in ("text", [2.0], [[3, 4]], torch.tensor([[3, 4]]), None, 3):
        with pytest.raises(ZerodraftError, match="is no list of tokens"):
            tokens_of("prompt", prompt)
    assert tokens_of("prompt", torch.tensor([3, 4])) == tokens_of("prompt", range(3, 5)) == [3, 4]
    with pytest.raises(ZerodraftError, match="tokens=-1 must be a whole number"):
        batch.prompt(DepthRequest(prompt=[3] * 4, max_new_tokens=1)).read(-1)
    with pytest.raises(ZerodraftError, match="made by another batch"):
        batch.submit(DepthBatch(over("llama"), rows=1, slots=9).prompt(DepthRequest(prompt=[3] * 9, max_new_tokens=1)))
    assert not batch.busy
    assert not batch.cancel(7)
    # exactly full
    request = DepthRequest(prompt=[3] * 5, max_new_tokens=4)
    assert batch.run([request]) == [alone(over("llama"), request)]


class Raising(ByState):
    """Every seventh time that it is asked it raises."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, out: CycleOutput) -> torch.Tensor:
        self.asked += 1
        if self.asked % 7 == 0:
            raise InterruptedError
        return super().__call__(out)


@pytest.mark.parametrize("over_llama", [over, tiny], ids=["compiled", "torch"])
def test_a_rule_that_raises_changes_no_answer(over_llama: Any) -> None:
    model, todo = over_llama("llama", cycles=4, input_injection=True), requests()
    batch = DepthBatch(model, rows=3, slots=64, exit_rule=Raising())
    keys, found, raised = [batch.submit(request) for request in todo], {}, 0
    while batch.busy:
        try:
            found.update(batch.step())
        except InterruptedError:
            raised += 1
    assert raised > 5
    assert [found[key] for key in keys] == [alone(model, request, ByState()) for request in todo]


def test_a_run_that_breaks_off_leaves_nothing_behind() -> None:
    batch, (one, two) = DepthBatch(over("llama", cycles=4), rows=2, slots=24, exit_rule=Raising()), requests(2)
    with pytest.raises(InterruptedError):
        batch.run([one, two])
    with pytest.raises(ZerodraftError, match="slots"):
        batch.run([one, DepthRequest(prompt=[3] * 30, max_new_tokens=1)])
    assert not batch.busy
    assert sorted(batch._free) == [0, 1]


def test_a_run_takes_no_answers_of_others() -> None:
    batch, (one, two) = DepthBatch(over("llama"), rows=2, slots=24), requests(2)
    key = batch.submit(one)
    with pytest.raises(ZerodraftError, match="under way already"):
        batch.run([two])
    assert batch.cancel(key)
    assert len(batch.run([two])[0].tokens) == two.max_new_tokens
