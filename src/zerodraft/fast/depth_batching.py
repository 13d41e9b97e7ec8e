"""Batches over depth: many requests to a Zero Token Transformer share the batch of its cycled layers, each in a cycle
of its own.

A token that leaves its cycles early makes room at once: its request goes through tail and head with its next token and
comes back into the batch of the cycled layers, in which the others are further on. So the batch stays full where a
batch that waits for its deepest token would run the last cycles almost empty. New requests are taken in between any two
cycles. Idea: continuous depth batching (arXiv:2608.09444).

Keys and values lie in one buffer that is allocated ahead, with a place for each request in each execution of a layer.
What a request gets does not depend on its company, but for rounding.

Legend: R places for requests, n of them at work, S slots of tokens, E executions of layers, H hidden size.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zerodraft.common.errors import ZerodraftError
from zerodraft.fast.compiled import CPU
from zerodraft.fast.depth_requests import DepthAnswer, DepthPrompt, DepthRequest, DepthText, check_count
from zerodraft.fast.lean import packed_weights
from zerodraft.fast.lean.depths import has_zero, run_depths
from zerodraft.fast.lean.exits import EarlyExit, copy_on
from zerodraft.fast.lean.passes import Tokens
from zerodraft.fast.lean.weights import rotations
from zerodraft.ztt.exits import CycleOutput, ExitPolicy, ExitRule, check_policy, reads_zero_mass, stopping
from zerodraft.ztt.model import ZttForCausalLM


@dataclass(kw_only=True, slots=True)
class DepthWork:
    """What was computed so far, prompts left out.

    Attributes:
        calls: Calls of the cycled layers.
        rows: Rows in these calls.
        places: Rows that would have fitted into them.
        tokens: Tokens written.
    """

    calls: int = 0
    rows: int = 0
    places: int = 0
    tokens: int = 0

    @property
    def occupancy(self) -> float:
        """Share of the places in the cycled layers' calls that held a request."""
        return self.rows / max(self.places, 1)

    @property
    def cycles_per_token(self) -> float:
        """Mean over the tokens."""
        return self.rows / max(self.tokens, 1)


class DepthBatch:
    """Decodes requests together on the lean decode path. One thread at a time may step.

    Args:
        model: A Zero Token Transformer that the lean path computes: over Llama, Mistral, Qwen2 or Qwen3, float32, CPU.
            Its weights are taken as they are now; make a new batch after they have changed.
        rows: Requests at once, R.
        slots: Tokens that a request may have, prompt and answer, S.
        exit_rule: Decides after each cycle which tokens stop; None runs all cycles.
        exit_policy: See `ZttForCausalLM.forward`.
        patience: Tail and head run once this share of the requests at work waits for them: the more wait, the cheaper
            each is, but the emptier are the cycled layers meanwhile.

    Raises:
        ZerodraftError: a model that the lean path cannot compute, numbers below 1, a patience outside 0 to 1, a rule
            that does not fit the model, more keys and values than there is memory.
    """

    def __init__(
        self,
        model: ZttForCausalLM,
        *,
        rows: int = 32,
        slots: int = 1024,
        exit_rule: ExitRule | None = None,
        exit_policy: ExitPolicy = "propagate",
        patience: float = 0.5,
    ) -> None:
        for name, value in (("rows", rows), ("slots", slots)):
            check_count(name, value)
        if not 0 <= patience <= 1:
            raise ZerodraftError(f"patience={patience} must lie between 0 and 1.")
        check_policy(exit_policy)
        weights = packed_weights(model)
        if weights is None or weights.stages is None:
            raise ZerodraftError(
                f"Batches over depth need the lean decode path, which does not compute this {type(model).__name__}: "
                "use a float32 model on a CPU over Llama, Mistral, Qwen2 or Qwen3, with schedule='block', or decode "
                "with model.generate."
            )
        self.rows, self.slots = rows, slots
        self.work = DepthWork()
        self._weights, self._stages = weights, weights.stages
        self.exit_rule, self._patience = exit_rule, patience
        self._policy: ExitPolicy = exit_policy
        self._early = None if exit_rule is None else EarlyExit(weights, exit_rule, exit_policy)
        shape = len(weights.layers), rows, 2 * weights.kv_heads, slots, weights.head_dim
        try:
            # numpy leaves it to the system to find memory for what is written
            self._kv = torch.from_numpy(np.zeros(shape, np.float32))
        except (MemoryError, ValueError):
            raise ZerodraftError(
                f"rows={rows} of slots={slots} need {4 * math.prod(shape) / 2**30:.1f} GiB for keys and values, more "
                "than there is: ask for fewer rows at once, or for shorter texts."
            ) from None
        self._rope = rotations(torch.arange(slots, device=CPU), weights.frequencies, weights.rope_scale)
        self._windows = {layer.window for layer in weights.layers}
        hidden = weights.embedding.shape[1]
        # of each place: its stream, what the head made, which cycle comes next (from 1), and the slot of its token
        self._x = torch.zeros(rows, hidden, device=CPU)
        self._fed = torch.zeros(rows, hidden, device=CPU) if weights.feeds_again else None
        self._cycle = torch.ones(rows, dtype=torch.int64, device=CPU)
        self._slot = torch.zeros(rows, dtype=torch.int64, device=CPU)
        self._pending: deque[tuple[DepthText, DepthPrompt]] = deque()
        self._at_work: dict[int, DepthText] = {}  # by place
        self._ended: list[DepthText] = []  # in a step whose rule raised they wait for the next one
        self._free = list(range(rows))
        self._cycling: list[int] = []
        self._waiting: list[int] = []
        self._next_key = 0
        self._stepping = Lock()

    def prompt(self, request: DepthRequest) -> DepthPrompt:
        """A request whose prompt shall be read in pieces, by its `read`, before it is submitted.

        Raises:
            ZerodraftError: it is longer than a place.
        """
        if request.slots > self.slots:
            raise ZerodraftError(
                f"A prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones need {request.slots} "
                f"slots, and slots={self.slots}; make the batch with more."
            )
        vocabulary = len(self._weights.embedding)
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise ZerodraftError(f"The prompt has tokens outside of the vocabulary of {vocabulary}.")
        return DepthPrompt(self, request, self._weights, self._early)

    def submit(self, request: DepthRequest | DepthPrompt) -> int:
        """Adds a request, whose prompt may be read already; returns the key under which its answer will come.

        Raises:
            ZerodraftError: it is longer than a place, its prompt was made by another batch, or it is no request.
        """
        if not isinstance(request, (DepthRequest, DepthPrompt)):
            raise ZerodraftError(f"A {type(request).__name__} was submitted; give a DepthRequest, or a batch's prompt.")
        prompt = self.prompt(request) if isinstance(request, DepthRequest) else request
        if prompt.batch is not self:
            raise ZerodraftError("The prompt was made by another batch; make it by the prompt() of this one.")
        key = self._next_key
        self._next_key += 1
        self._pending.append((DepthText(key, prompt.request), prompt))
        return key

    def answer(self, key: int) -> DepthAnswer:
        """A request's answer, which grows with the steps.

        Raises:
            ZerodraftError: there is no such request, or `step` has told of its end.
        """
        for text in (*self._at_work.values(), *(text for text, _ in self._pending), *self._ended):
            if text.key == key:
                return text.answer
        raise ZerodraftError(
            f"There is no request {key} in the batch: it is unknown, or step() has returned its answer."
        )

    def cancel(self, key: int) -> bool:
        """Forgets a request; its place is free at once. Whether it was still there."""
        there = len(self._pending) + len(self._ended)
        self._pending = deque(item for item in self._pending if item[0].key != key)
        self._ended = [text for text in self._ended if text.key != key]
        for place, text in self._at_work.items():
            if text.key == key:
                self._leave(place)
                return True
        return there > len(self._pending) + len(self._ended)

    @property
    def busy(self) -> bool:
        """Whether requests are left."""
        return bool(self._pending or self._at_work or self._ended)

    def run(self, requests: Iterable[DepthRequest]) -> list[DepthAnswer]:
        """The answers to requests, in their order.

        Raises:
            ZerodraftError: others are under way, whose answers would be lost; a request is longer than a place.
            Exception: what the choice of a request has raised.
        """
        if self.busy:
            raise ZerodraftError("Requests are under way already; call step() until busy is False, or cancel them.")
        keys: list[int] = []
        found: dict[int, DepthAnswer] = {}
        try:
            keys += map(self.submit, requests)
            while self.busy:
                for key, answer in self.step():
                    if answer.error is not None:
                        raise answer.error
                    found[key] = answer
        finally:
            # where that broke off nothing is left behind
            for key in keys:
                self.cancel(key)
        return [found[key] for key in keys]

    def step(self) -> list[tuple[int, DepthAnswer]]:
        """One cycle of all that are in the cycled layers, and what has to come before it; the requests that ended. Each
        of the others may have one token more in its `answer`.

        Raises:
            ZerodraftError: another step is under way, in another thread or around a `choose`.
        """
        if not self._stepping.acquire(blocking=False):
            raise ZerodraftError("A step of this batch is under way: step in one thread, and not within a choice.")
        try:
            return self._step()
        finally:
            self._stepping.release()

    @torch.inference_mode()
    def _step(self) -> list[tuple[int, DepthAnswer]]:
        while self._free and self._pending:
            self._admit(*self._pending[0])
        if self._waiting and (not self._cycling or len(self._waiting) >= self._patience * len(self._at_work)):
            self._boundary()
        if self._cycling:
            self._one_cycle()
        ended, self._ended = self._ended, []
        return [(text.key, text.answer) for text in ended]

    # -- what a step is made of -----------------------------------------------------------------------------------

    def _admit(self, text: DepthText, prompt: DepthPrompt) -> None:
        """Takes a request in with its first token."""
        place = self._free[-1]
        logits, depth = prompt.settle(self._kv[:, place])
        # not before the rule was asked, which may raise
        self._pending.popleft()
        self._free.pop()
        self._slot[place] = len(text.request.prompt) - 1
        self._at_work[place] = text
        self._go_on([place], logits, [depth])

    def _boundary(self) -> None:
        """Tail and LM head of those that wait, and the head for their next tokens."""
        places, self._waiting = self._waiting, []
        at = torch.tensor(places, device=CPU)
        x, fed = self._x[at], None if self._fed is None else self._fed[at]
        x = self._weights.run.run(x, self._kv, self._tokens(at), self._stages.tail, head_output=fed).x
        self.work.tokens += len(places)
        self._go_on(places, self._weights.logits(x), self._cycle[at].tolist())

    def _go_on(self, places: list[int], logits: Float[Tensor, "n V"], depths: list[int]) -> None:
        """The next token of the requests at some places; those that are not over join the cycled layers with it."""
        texts, tokens = [self._at_work[place] for place in places], dict[int, int]()
        chosen = zip(texts, places, logits.argmax(-1).tolist(), logits, depths, strict=True)
        for text, place, likeliest, row, depth in chosen:
            if self._is_at(place, text):
                tokens[place] = text.add(likeliest, row, depth)
        # not before: a choice may have cancelled any of them
        staying: list[tuple[int, int]] = []
        for text, place in zip(texts, places, strict=True):
            if not self._is_at(place, text):
                continue
            if text.answer.finish_reason is None:
                staying.append((place, tokens[place]))
            else:
                self._leave(place)
                self._ended.append(text)
        if staying:
            self._enter(*map(list, zip(*staying, strict=True)))

    def _is_at(self, place: int, text: DepthText) -> bool:
        return self._at_work.get(place) is text

    def _leave(self, place: int) -> None:
        del self._at_work[place]
        self._free.append(place)
        for line in (self._cycling, self._waiting):
            if place in line:
                line.remove(place)

    def _enter(self, places: list[int], chosen: list[int]) -> None:
        """New tokens go through the head and join the cycled layers."""
        at = torch.tensor(places, device=CPU)
        self._slot[at] += 1
        self._cycle[at] = 1
        x = F.embedding(torch.tensor(chosen, device=CPU), self._weights.embedding)
        fed = torch.empty_like(x) if self._fed is not None else None
        x = self._weights.run.run(x, self._kv, self._tokens(at), self._stages.head, head_output=fed).x
        self._x[at] = x
        if self._fed is not None:
            self._fed[at] = x
        self._cycling += places

    def _one_cycle(self) -> None:
        """Every request in the cycled layers runs its next cycle; those that are through wait for the tail."""
        weights, stages = self._weights, self._stages
        at = torch.tensor(self._cycling, device=CPU)
        cycles, entered, tokens = self._cycle[at], self._x[at], self._tokens(at)
        fed = None if self._fed is None else self._fed[at]
        asks, reads = self.exit_rule is not None, self.exit_rule is not None and reads_zero_mass(self.exit_rule)
        ran = run_depths(
            weights, self._kv, entered.clone() if asks else entered, tokens, cycles,
            head_output=fed, masses=reads,
        )  # fmt: skip
        through = cycles == stages.cycles
        if self.exit_rule is not None:
            mass = torch.stack(ran.masses, 1) if ran.masses else None
            for cycle in cycles.unique().tolist():
                if cycle < stages.cycles:
                    rows = (cycles == cycle).nonzero()[:, 0]
                    shown = None if mass is None or not has_zero(weights, cycle) else mass[rows]
                    out = CycleOutput(cycle, ran.x[rows], entered[rows], shown, weights.logits)
                    stops = stopping(self.exit_rule, out)
                    if bool(stops.any()):
                        through[rows[stops]] = True
                        self._skip(ran.x, rows[stops], at, cycle)
        # not before: after a rule that raised, the same cycle can be run again
        self._x[at] = ran.x
        self.work.calls += 1
        self.work.rows += len(at)
        self.work.places += self.rows
        self._cycle[at[~through]] += 1
        gone = through.tolist()
        self._waiting += [place for place, done in zip(self._cycling, gone, strict=True) if done]
        self._cycling = [place for place, done in zip(self._cycling, gone, strict=True) if not done]

    def _skip(self, x: Tensor, rows: Tensor, at: Tensor, cycle: int) -> None:
        """Keys and values in the cycles that some rows skip after this one."""
        stages, tokens, source = self._stages, self._tokens(at[rows]), self._stages.cycle(cycle)
        if self._policy == "propagate":
            source = stages.cycle(cycle + 1)
            self._weights.run.keep(x[rows], self._kv, tokens, source)
        copy_on(self._kv, tokens, source, stages.tail.start)

    def _tokens(self, at: Int[Tensor, " n"]) -> Tokens:
        """One token each of the requests at some places."""
        places = self._slot[at]
        seen = int(places.max()) + 1
        slots = torch.arange(seen, device=CPU)
        biases: dict[int | None, Tensor | None] = {}
        for window in self._windows:
            biases[window] = None
            if window is not None and seen > window:
                hidden = (slots > places[:, None]) | (slots <= places[:, None] - window)
                bias = torch.zeros(hidden.shape, device=CPU).masked_fill_(hidden, -torch.inf)
                biases[window] = bias[:, None, None]
        return Tokens(turns=self._rope[places], biases=biases, past=0, seen=seen, causal=True, places=places, texts=at)
