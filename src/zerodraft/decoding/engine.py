"""The loop that joins drafter, search, target and verification; it knows their protocols and no model.

A step: ask the drafter for k positions of every row, search its lattice for a draft, let the target score the draft
behind the last known token, verify, keep the accepted path in the target's cache, and tell the drafter. What is emitted
is always the target's own choice (see `verify`), whatever the draft.

Rows are independent: each accepts what it accepts, and a row that has ended waits (with an empty draft) for the others.
Where something that is called for tokens may remember, they go in step instead (`instep.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from zerodraft.decoding.choice import TokenChoice
from zerodraft.decoding.costs import Costs
from zerodraft.decoding.fallback import Fallback
from zerodraft.decoding.instep import InStep
from zerodraft.decoding.kept import Kept, Origin
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.lengths import DraftLength
from zerodraft.decoding.policy import Policy
from zerodraft.decoding.protocols import Drafter, DraftSession, LastingTarget, Progress, Target, TargetOutput, join
from zerodraft.decoding.rotary import Horizon
from zerodraft.decoding.scorers import CausalProxy, ProxySession
from zerodraft.decoding.search import SearchConfig, build_tree, sample_draft
from zerodraft.decoding.stats import DecodeStats, RowStep, Step
from zerodraft.decoding.stopping import Stopping
from zerodraft.decoding.text import Text
from zerodraft.decoding.tree import ROOT, DraftTree, SampledDraft
from zerodraft.decoding.verify import Randomness, Verdict, greedy, point_mass, sampled, walk

NOTHING = DraftTree.path([])


@dataclass(kw_only=True)
class Engine:
    """One call of generate.

    Args:
        target: Scores drafts; its cache is empty.
        drafter: Makes lattices.
        length: Decides how long drafts are; every row gets a fresh one.
        choice: How logits become tokens.
        stopping: When texts end.
        dice: All random choices.
        proxy: Judges which candidates go together.
        search: How a lattice becomes a draft.
        tree: Verify a tree of paths rather than the best one.
        sample_drafts: Draw drafts from the lattice (where tokens are sampled).
        in_step: How rows go in step; None: each at its own pace.
        context: Positions that the target has, or None.
        horizon: Where the target's rotary frequencies change, or None.
        chunk: Tokens of the prompt to read at once, or None for all.
        generator: Randomness of the drafter.
        trace: Keep every step in the statistics.
        costs: What steps take, known from call to call.
        fallback: Makes steps plain while drafts do not pay; None: never.
        beside: Leaves a model out beside copies while its drafts do not pay.
        kept: The target and a session of the drafter, which know the prompt's beginning already; None: nothing of it.
        held: Columns of the prompts that the target has in a cache of the caller.
    """

    target: Target
    drafter: Drafter
    length: DraftLength
    choice: TokenChoice
    stopping: Stopping
    dice: Randomness
    proxy: CausalProxy | None = None
    search: SearchConfig = field(default_factory=SearchConfig)
    tree: bool = True
    sample_drafts: bool = False
    in_step: InStep | None = None
    context: int | None = None
    horizon: Horizon | None = None
    chunk: int | None = None
    generator: torch.Generator | None = None
    trace: bool = False
    costs: Costs = field(default_factory=Costs)
    fallback: Fallback | None = None
    beside: Fallback = field(default_factory=Fallback)
    kept: Kept | None = None
    held: int = 0

    texts: list[Text] = field(init=False)
    stats: DecodeStats = field(init=False)
    session: DraftSession = field(init=False)

    def run(self, prompts: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Iterator[Step]:
        """Decode; yields what each pass of the target brought: nothing yet, where it read a piece of the prompts.
        `texts` and `stats` are up to date at every yield."""
        real = mask.sum(1).tolist()
        self.texts = [Text(prompt, n) for prompt, n in zip(prompts, real, strict=True)]
        known = len(self.kept.tokens) if self.kept else 0
        reused = int(mask[:, : known + self.held].sum())
        self.stats = DecodeStats(len(real), sum(real), reused, trace=[] if self.trace else None)
        device = self.target.device
        self.session = self.kept.session if self.kept else self.drafter.start(len(real), device, self.generator)
        self._lengths = [self.length.fresh(self.costs) for _ in real]
        self._policy = Policy(self.stats, self.costs, self.fallback, self.beside, self.session, device)
        self._proxies = [self.proxy.start() if self.proxy else None for _ in real]
        if self.kept:
            self._tell_proxies([self.kept.tokens])
        else:
            join(self.session, self.target)
        self._untold: list[list[Progress]] = []
        yield from self._read(prompts[:, known:], mask[:, known:])
        while any(self._goes_on(text) for text in self.texts):
            yield self._step()

    def _read(self, prompts: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Iterator[Step]:
        """The prompts' passes, one for each piece of them; the last brings every row its first token."""
        size, outs = self.chunk or prompts.shape[1], []
        for ids, real in zip(prompts.split(size, 1), mask.split(size, 1), strict=True):
            if outs:
                yield Step([None] * len(prompts))
            with self.stats.timed("prefill"):
                outs.append(
                    self.target.prefill(ids.to(self.target.device), real.to(self.target.device), self.drafter.taps)
                )
        taps = [out.taps for out in outs if out.taps is not None]
        out = TargetOutput(outs[-1].logits, torch.cat(taps, 1) if taps else None)
        step, _ = self._settle(out, [NOTHING] * len(prompts))
        self._finish(step, [0] * len(prompts), draft=False)
        self._untold = [
            [Progress(torch.cat([prompt[own], prompt.new_tensor(row.tokens)]), None if out.taps is None else taps[own])]
            for prompt, own, row, taps in zip(prompts, mask, step.rows, _rows(out.taps, len(prompts)), strict=True)
            if row is not None
        ]
        yield step

    def _step(self) -> Step:
        """Draft, search, verify, and tell everyone what came of it."""
        lattices, asked, unread = self._draft(self._policy.begin())
        most = max(asked)
        self._policy.drafted(most)
        with self.stats.timed("search"):
            drafts = [self._search(lattice, at) for at, lattice in enumerate(lattices)]
            drafts = self._filled_up(drafts)
        with self.stats.timed("verify"):
            trees = [draft if isinstance(draft, DraftTree) else draft.tree for draft in drafts]
            depths = [tree.depths() for tree in trees]
            out = self.target.score(*self._inputs(trees, depths), self.drafter.taps)
            step, kept = self._settle(out, drafts)
            self.target.keep(kept)
        self._policy.verified(most, max(len(tree) for tree in trees))
        for at, row in enumerate(step.rows):
            if row is not None and asked[at]:
                filled = _generated(lattices[at], self.stopping.eos_ids)
                self._lengths[at].update(asked[at], filled, len(row.accepted))
        for untold, news in zip(self._untold, self._news(step, kept, out.taps), strict=True):
            untold.append(news)
        if most:
            self._tell()
        self._finish(step, [max(of_nodes.tolist()) for of_nodes in depths], draft=True)
        self._policy.learn(step, most, unread)
        return step

    def keep(self, origin: Origin) -> Kept | None:
        """What the text, which is over or given up, leaves for the next one; None where the target cannot go on from
        it, or has not read the prompt."""
        if not isinstance(self.target, LastingTarget) or not self._untold:
            return None
        if any(self._untold):
            self._tell()
        (text,) = self.texts
        return Kept(tokens=text.ids()[0, :-1], target=self.target, session=self.session, origin=origin)

    def width(self) -> int:
        """Length of the longest text, as `generate` counts it."""
        return max(text.length if text.stopped_at is None else text.stopped_at for text in self.texts)

    # -- parts of a step ------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Hand on what became known since the last time: plain steps tell nobody, so that they cost no more."""
        known = [_joined(news) for news in self._untold]
        self._untold = [[] for _ in known]
        with self.stats.timed("draft"):
            self.session.observe(known)
        self._tell_proxies([progress.tokens for progress in known])

    def _tell_proxies(self, known: Sequence[Tensor]) -> None:
        if self.proxy:
            with self.stats.timed("search"):
                for proxy, tokens in zip(self._proxies, known, strict=True):
                    if proxy is not None and len(tokens):
                        proxy.observe(tokens.tolist())

    def _draft(self, longest: int) -> tuple[Sequence[Lattice], list[int], int]:
        """A lattice for every row, how many positions it was asked for (at most the longest), and how many tokens of a
        row the drafter had to read before."""
        asked = [self._room(at, longest) for at in range(len(self.texts))]
        if not any(asked):
            return [Lattice.empty()] * len(asked), asked, 0
        unread = max(sum(len(news.tokens) for news in untold) for untold in self._untold)
        if any(self._untold):
            self._tell()
        with self._policy.drafting(max(asked)):
            lattices = self.session.propose(asked)
        return lattices, asked, unread

    def _room(self, at: int, longest: int) -> int:
        """How many positions to draft for a row: at most the longest, and never beyond the longest text or the last
        position."""
        text = self.texts[at]
        if not longest or not self._goes_on(text):
            return 0
        k = min(self._lengths[at].next_length(), self.drafter.max_length, longest)
        if self.stopping.max_length is not None:
            k = min(k, self.stopping.max_length - text.length - 1)
        known = text.length - text.padding
        if self.context is not None and known <= self.context:
            k = min(k, self.context - known)
        if self.horizon is not None:
            # one pass has one set of frequencies, that of its longest row
            room = self.horizon.room(max(other.length - other.padding for other in self.texts))
            k = k if room is None else min(k, room)
        return max(k, 0)

    def _search(self, lattice: Lattice, at: int) -> DraftTree | SampledDraft:
        proxy: ProxySession | None = self._proxies[at]
        eos = self.stopping.eos_ids
        if self.sample_drafts and self.choice.sample and not self.in_step:
            return sample_draft(lattice, self.search, self.dice, eos, tree=self.tree)
        if not len(lattice):
            return NOTHING
        return build_tree(lattice, self.search, proxy, eos, tree=self.tree, worth=self._lengths[at].worth)

    def _filled_up(self, drafts: list[DraftTree | SampledDraft]) -> list[DraftTree | SampledDraft]:
        """The drafts, padding for rows that have ended where they go in step with the others."""
        if self.in_step is None or all(self._goes_on(text) for text in self.texts):
            return drafts
        deepest = max(max(draft.depths()) for draft in drafts if isinstance(draft, DraftTree))
        padding = self.in_step.padding(int(deepest))
        return [draft if self._goes_on(text) else padding for draft, text in zip(drafts, self.texts, strict=True)]

    def _inputs(
        self, trees: Sequence[DraftTree], depths: Sequence[Int64[np.ndarray, " _"]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The last known tokens and the drafts behind them, padded to the widest: ids, depths and who sees whom."""
        width = max(len(tree) for tree in trees) + 1
        ids = np.zeros((len(trees), width), np.int64)
        depth = np.zeros_like(ids)
        visible = np.zeros((len(trees), width, width), bool)
        visible[:, range(width), range(width)] = True
        for at, (tree, text) in enumerate(zip(trees, self.texts, strict=True)):
            n = len(tree) + 1
            ids[at, 0] = text.last
            if n > 1:
                ids[at, 1:n] = tree.tokens
                depth[at, :n] = depths[at]
                visible[at, :n, :n] = tree.visible()
        device = self.target.device
        return tuple(torch.from_numpy(x).to(device) for x in (ids, depth, visible))  # pyright: ignore[reportReturnType]  # three of them

    def _settle(self, out: TargetOutput, drafts: Sequence[DraftTree | SampledDraft]) -> tuple[Step, list[list[int]]]:
        """Verify every row's draft and add what it yields to the row's text, up to where the text ends. Returns that,
        and which of the pass's tokens every row keeps: the root and accepted nodes before the last token of its text,
        which has not been through the target."""
        if self.in_step is not None:
            trees = [draft for draft in drafts if isinstance(draft, DraftTree)]
            rows, kept = self.in_step.settle(self.texts, trees, out.logits)
            return Step(rows), kept
        choose = greedy(out.logits) if self.choice.plain else None
        rows: list[RowStep | None] = []
        for at, (text, draft) in enumerate(zip(self.texts, drafts, strict=True)):
            if not self._goes_on(text):
                rows.append(None)
                continue
            tree = draft if isinstance(draft, DraftTree) else draft.tree
            if choose is not None:
                verdict = walk(tree, partial(choose, at))
            else:
                verdict = self._processed(at, draft, out.logits[at])
            tokens = [*(int(tree.tokens[node]) for node in verdict.kept), verdict.token]
            count = self._add(at, tokens)
            own = tokens[-1] if count == len(tokens) else None
            nodes, parents = tree.tokens.tolist(), tree.parents.tolist()
            rows.append(RowStep(nodes, parents, verdict.kept[:count], tokens[:count], own))
        kept = [[] if row is None else [0, *(n + 1 for n in row.accepted)][: len(row.tokens)] for row in rows]
        return Step(rows), kept

    def _processed(self, at: int, draft: DraftTree | SampledDraft, logits: Tensor) -> Verdict:
        """Verify a row through the processors, which see the text and the path to the node."""
        text, choice = self.texts[at], self.choice
        tree = draft if isinstance(draft, DraftTree) else draft.tree
        length = text.length

        def scores(node: int) -> Tensor:
            nonlocal length
            if node != ROOT:
                text.write(length, int(tree.tokens[node]))
                length += 1
            return choice.process(at, text.ids(length), logits[node + 1])

        if not choice.sample:
            return walk(tree, lambda node: int(scores(node).argmax()))
        if isinstance(draft, SampledDraft):
            return sampled(draft, lambda node: scores(node).softmax(-1), self.dice)
        return point_mass(tree, lambda node: scores(node).softmax(-1), self.dice)

    def _add(self, at: int, tokens: list[int]) -> int:
        """Add tokens to a row until it ends; returns how many."""
        text = self.texts[at]
        count = 0
        for token in tokens:
            if not self._goes_on(text):
                break
            text.add(token)
            count += 1
            if text.stopped_at is None and self.stopping(token, text):
                text.stopped_at = text.length
        self.choice.cut(at, text.length - text.prompt_length)
        return count

    def _goes_on(self, text: Text) -> bool:
        """Whether a row takes part in the next pass."""
        if text.stopped_at is None:
            return True
        if self.in_step is not None:
            return self.in_step.goes_on(text) and any(other.stopped_at is None for other in self.texts)
        if self.stopping.pads or len(self.texts) == 1:
            return False
        # Without an EOS transformers lets rows that have ended go on until all have.
        ends = [other.stopped_at for other in self.texts]
        goal = max(end for end in ends if end is not None) if None not in ends else self.stopping.max_length
        return goal is None or text.length < goal

    def _finish(self, step: Step, depths: list[int], *, draft: bool) -> None:
        """Count a step, and end all texts if a criterion says that the time is up."""
        if self.in_step is None and self.stopping.time_is_up(self.texts[0]):
            # The others may still come up to the longest row, so that all have the same length.
            limit = self.width()
            self.stopping.max_length = min(limit, self.stopping.max_length or limit)
            for text in self.texts:
                if text.stopped_at is None and text.length >= limit:
                    text.stopped_at = text.length
        self._policy.count(step, depths, draft=draft)

    def _news(self, step: Step, kept: list[list[int]], taps: Tensor | None) -> list[Progress]:
        device = self.target.device
        news = []
        for at, row in enumerate(step.rows):
            # through numpy: torch takes ten times as long over a list
            tokens = torch.from_numpy(np.array([] if row is None else row.tokens, np.int64)).to(device)
            if taps is None:
                news.append(Progress(tokens, None))
                continue
            places = torch.from_numpy(np.array([] if row is None else kept[at][: len(row.tokens)], np.int64)).to(device)
            news.append(Progress(tokens, taps[at].index_select(0, places)))
        return news


def _joined(news: Sequence[Progress]) -> Progress:
    """What several steps brought, as one."""
    if len(news) == 1:
        return news[0]
    taps = [part.taps for part in news if part.taps is not None]
    return Progress(torch.cat([part.tokens for part in news]), torch.cat(taps) if taps else None)


def _rows(taps: Tensor | None, rows: int) -> Sequence[Any]:
    return [None] * rows if taps is None else list(taps)


def _generated(lattice: Lattice, eos_ids: frozenset[int]) -> int:
    """Positions that the drafter filled before its EOS."""
    for position, token in enumerate(lattice.ids[:, 0].tolist()):
        if token in eos_ids:
            return position
    return len(lattice)
