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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zerodraft.common.errors import ZerodraftError
from zerodraft.fast.compiled import CPU
from zerodraft.fast.lean import packed_weights
from zerodraft.fast.lean.cache import LeanCache
from zerodraft.fast.lean.compiled_layers import CompiledLayers
from zerodraft.fast.lean.depths import has_zero, run_depths
from zerodraft.fast.lean.exits import EarlyExit, copy_on
from zerodraft.fast.lean.passes import Tokens
from zerodraft.fast.lean.torch_layers import unit
from zerodraft.fast.lean.weights import rotations
from zerodraft.ztt.exits import CycleOutput, ExitPolicy, ExitRule, check_policy, reads_zero_mass
from zerodraft.ztt.model import ZttForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthRequest:
    """A prompt to be continued greedily.

    Args:
        prompt: Its tokens, at least one.
        max_new_tokens: How many tokens at most are wanted.
        ends: Tokens that end the text; such a token is the answer's last.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    ends: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ZerodraftError("The prompt is empty; give at least one token.")
        if self.max_new_tokens < 1:
            raise ZerodraftError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")

    @property
    def slots(self) -> int:
        """Tokens that it may have in the cache: the last new one is never read."""
        return len(self.prompt) + self.max_new_tokens - 1


@dataclass(kw_only=True, slots=True)
class DepthAnswer:
    """What became of a request.

    Attributes:
        tokens: The new ones.
        depths: The cycles behind each: those of the token before it.
        finish_reason: `"stop"` if a token of its ends came, `"length"` if it has as many as were wanted.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"


@dataclass(kw_only=True, slots=True)
class DepthWork:
    """What was computed so far, prompts left out.

    Attributes:
        calls: Of the cycled layers.
        rows: In these calls.
        places: As many rows as would have fitted.
        boundary_calls: Of tail and head.
        tokens: That came out.
    """

    calls: int = 0
    rows: int = 0
    places: int = 0
    boundary_calls: int = 0
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
    """Decodes requests together on the lean decode path.

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
            if value < 1:
                raise ZerodraftError(f"{name}={value} must be at least 1.")
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
        self._rule, self._patience = exit_rule, patience
        self._policy: ExitPolicy = exit_policy
        self._early = None if exit_rule is None else EarlyExit(weights, exit_rule, exit_policy)
        shape = len(weights.layers), rows, 2 * weights.kv_heads, slots, weights.head_dim
        try:
            self._kv = torch.zeros(shape, dtype=torch.float32, device=CPU)
        except RuntimeError:
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
        self._pending: deque[tuple[int, DepthRequest]] = deque()
        self._at_work: dict[int, tuple[int, DepthRequest, DepthAnswer]] = {}  # by place
        self._ended: list[tuple[int, DepthAnswer]] = []  # in a step whose rule raised they wait for the next one
        self._free = list(range(rows))
        self._cycling: list[int] = []
        self._waiting: list[int] = []
        self._next_key = 0

    def submit(self, request: DepthRequest) -> int:
        """Adds a request; returns the key under which its answer will come.

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
        key = self._next_key
        self._next_key += 1
        self._pending.append((key, request))
        return key

    def cancel(self, key: int) -> bool:
        """Forgets a request; its place is free at once. Whether it was still there."""
        for line in (self._pending, self._ended):
            for at, item in enumerate(line):
                if item[0] == key:
                    del line[at]
                    return True
        for place, (known, _, _) in self._at_work.items():
            if known == key:
                self._leave(place)
                return True
        return False

    @property
    def busy(self) -> bool:
        """Whether requests are left."""
        return bool(self._pending or self._at_work or self._ended)

    def run(self, requests: Iterable[DepthRequest]) -> list[DepthAnswer]:
        """The answers to requests, in their order.

        Raises:
            ZerodraftError: others are under way, whose answers would be lost; a request is longer than a place.
        """
        if self.busy:
            raise ZerodraftError("Requests are under way already; call step() until busy is False, or cancel them.")
        keys: list[int] = []
        found: dict[int, DepthAnswer] = {}
        try:
            keys += map(self.submit, requests)
            while self.busy:
                found.update(self.step())
        finally:
            # where that broke off nothing is left behind
            for key in keys:
                self.cancel(key)
        return [found[key] for key in keys]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, DepthAnswer]]:
        """One cycle of all that are in the cycled layers, and what has to come before it; the requests that ended."""
        while self._free and self._pending:
            self._ended += self._admit(*self._pending[0])
        if self._waiting and (not self._cycling or len(self._waiting) >= self._patience * len(self._at_work)):
            self._ended += self._boundary()
        if self._cycling:
            self._one_cycle()
        ended, self._ended = self._ended, []
        return ended

    # -- what a step is made of -----------------------------------------------------------------------------------

    def _admit(self, key: int, request: DepthRequest) -> list[tuple[int, DepthAnswer]]:
        """Reads a prompt, on its own, and takes the request in with its first token."""
        weights, count = self._weights, len(request.prompt)
        cache = LeanCache(weights)
        cache.make_room(1, count)
        tokens = cache.tokens(torch.arange(count, device=CPU)[None], None)
        x = F.embedding(torch.tensor(request.prompt, device=CPU), weights.embedding)
        fed = torch.empty_like(x) if weights.feeds_again else None
        depth = self._stages.cycles
        if self._early is None:
            end = range(len(weights.layers))
            x = weights.run.run(x, cache.kv, tokens, end, head_output=fed, last_only=True).x
        else:
            ran, depths = self._early.run(
                cache.kv, x, tokens, self._logits, head_output=fed, real=None, taps=(), last_only=True
            )
            x, depth = ran.x, int(depths[-1])
        self._pending.popleft()  # not before the rule was asked, which may raise
        place = self._free.pop()
        self._kv[:, place, :, :count] = cache.kv[:, 0, :, :count]
        self._slot[place] = count - 1
        self._at_work[place] = key, request, DepthAnswer()
        token = int(self._logits(x[-1:]).argmax())
        if ended := self._take(place, token, depth):
            return ended
        self._enter([place], [token])
        return []

    def _boundary(self) -> list[tuple[int, DepthAnswer]]:
        """Tail and LM head of those that wait, and the head for their next tokens."""
        places, self._waiting = self._waiting, []
        at = torch.tensor(places, device=CPU)
        x, fed = self._x[at], None if self._fed is None else self._fed[at]
        x = self._weights.run.run(x, self._kv, self._tokens(at), self._stages.tail, head_output=fed).x
        self.work.boundary_calls += 1
        self.work.tokens += len(places)
        chosen = self._logits(x).argmax(-1).tolist()
        ended, staying = [], []
        for place, token, depth in zip(places, chosen, self._cycle[at].tolist(), strict=True):
            done = self._take(place, token, depth)
            ended += done
            if not done:
                staying.append((place, token))
        if staying:
            self._enter(*map(list, zip(*staying, strict=True)))
        return ended

    def _take(self, place: int, token: int, depth: int) -> list[tuple[int, DepthAnswer]]:
        """A token is a request's next; the request and its answer if that was the last."""
        key, request, answer = self._at_work[place]
        answer.tokens.append(token)
        answer.depths.append(depth)
        if token in request.ends:
            answer.finish_reason = "stop"
        elif len(answer.tokens) < request.max_new_tokens:
            return []
        self._leave(place)
        return [(key, answer)]

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
        asks, reads = self._rule is not None, self._rule is not None and reads_zero_mass(self._rule)
        ran = run_depths(
            weights, self._kv, entered.clone() if asks else entered, tokens, cycles,
            head_output=fed, masses=reads,
        )  # fmt: skip
        through = cycles == stages.cycles
        if self._rule is not None:
            mass = torch.stack(ran.masses, 1) if ran.masses else None
            for cycle in cycles.unique().tolist():
                if cycle < stages.cycles:
                    rows = (cycles == cycle).nonzero()[:, 0]
                    shown = None if mass is None or not has_zero(weights, cycle) else mass[rows]
                    stops = self._rule(CycleOutput(cycle, ran.x[rows], entered[rows], shown, self._logits))
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
        compiled = isinstance(self._weights.run, CompiledLayers)
        slots = torch.arange(seen, device=CPU)
        biases: dict[int | None, Tensor | None] = {}
        for window in self._windows:
            if compiled and (window is None or seen <= window):
                biases[window] = None  # the kernels count for themselves what each row sees
                continue
            hidden = slots > places[:, None]
            if window is not None:
                hidden |= slots <= places[:, None] - window
            bias = torch.zeros(hidden.shape, device=CPU).masked_fill_(hidden, -torch.inf)
            biases[window] = bias[:, None, None]
        return Tokens(turns=self._rope[places], biases=biases, past=0, seen=seen, causal=True, places=places, texts=at)

    def _logits(self, x: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        return self._weights.head(unit(x, self._weights.floor))
