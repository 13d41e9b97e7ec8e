"""Verification does not change what the target says: greedily token by token, and in distribution.

Distributions are exact, not sampled: every random choice that drafting and verifying make goes through `Randomness`, so
a test can replay a step once for each outcome of each choice and add up the probabilities. The target is a table of
random logits over 4 tokens, one row for each prefix, behind transformers' own logits processors.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.decoding.paths import path_to
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding import verify
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.search import SearchConfig, sample_draft
from zerodraft.decoding.tree import ROOT, DraftTree
from zerodraft.decoding.verify import Dice, Randomness, Verdict

V = 4
PROMPT = (2, 0)

STACKS: dict[str, LogitsProcessorList] = {
    "plain": LogitsProcessorList(),
    "temperature": LogitsProcessorList([TemperatureLogitsWarper(0.6)]),
    "top_k": LogitsProcessorList([TopKLogitsWarper(2)]),
    "top_p": LogitsProcessorList([TopPLogitsWarper(0.7)]),
    "repetition": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8)]),
    "all": LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.8),
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(3),
            TopPLogitsWarper(0.9),
        ]
    ),
}

Step = Callable[[tuple[int, ...], Callable, Randomness], list[int]]
"""One step of decoding: the prefix, the target's distribution after a prefix, randomness -> the tokens emitted."""
Distribution = dict[tuple[int, ...], float]


def target(stack: str) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """The target's processed distribution after each prefix."""

    @cache
    def p(prefix: tuple[int, ...]) -> torch.Tensor:
        logits = torch.from_numpy(np.random.default_rng([7, *prefix]).normal(0, 1.5, (1, V)))
        return STACKS[stack](torch.tensor([prefix]), logits)[0].softmax(-1)

    return p


class Unforeseen(Exception):
    """A random choice that the script does not cover: its possible outcomes and their probabilities."""


@dataclass
class Script:
    """Randomness whose outcomes are given in advance."""

    outcomes: Sequence[int]
    position: int = field(default=0, init=False)

    def take(self, probabilities: Sequence[float]) -> int:
        if self.position == len(self.outcomes):
            raise Unforeseen(probabilities)
        self.position += 1
        return self.outcomes[self.position - 1]

    def draw(self, p: torch.Tensor) -> int:
        return self.take(p.tolist())

    def accept(self, p: torch.Tensor, q: float) -> bool:
        ratio = min(1.0, p.item() / q)
        return bool(self.take([1 - ratio, ratio]))

    def pick(self, q: np.ndarray) -> np.ndarray:
        return np.array([self.take(row.tolist()) for row in q], np.int64)


def enumerate_outcomes(run: Callable[[Randomness], list[int]]) -> Distribution:
    """The exact distribution of what `run` returns."""
    found: Distribution = {}
    scripts: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while scripts:
        script, weight = scripts.pop()
        try:
            result = tuple(run(Script(script)))
        except Unforeseen as choice:
            scripts += [((*script, i), weight * p) for i, p in enumerate(choice.args[0]) if p > 0]
        else:
            found[result] = found.get(result, 0.0) + weight
    return found


def decoded(step: Step, p: Callable, horizon: int) -> Distribution:
    """The exact distribution of the first tokens that a loop over `step` emits."""
    found: Distribution = {}
    unfinished: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    steps: dict[tuple[int, ...], Distribution] = {}
    while unfinished:
        tokens, weight = unfinished.pop()
        if len(tokens) >= horizon:
            found[tokens[:horizon]] = found.get(tokens[:horizon], 0.0) + weight
            continue
        if tokens not in steps:
            steps[tokens] = enumerate_outcomes(lambda dice, prefix=(*PROMPT, *tokens): step(prefix, p, dice))
        unfinished += [((*tokens, *new), weight * chance) for new, chance in steps[tokens].items()]
    return found


def plain(p: Callable, horizon: int) -> Distribution:
    """The same by plain sampling from the target: the product of its probabilities."""
    return {
        tokens: math.prod(float(p((*PROMPT, *tokens[:i]))[token]) for i, token in enumerate(tokens))
        for tokens in itertools.product(range(V), repeat=horizon)
    }


def distance(one: Distribution, other: Distribution) -> float:
    """Total variation."""
    return sum(abs(one.get(x, 0.0) - other.get(x, 0.0)) for x in one.keys() | other.keys()) / 2


def emitted(tree: DraftTree, verdict: Verdict) -> list[int]:
    return [*tree.tokens[verdict.kept].tolist(), verdict.token]


def deterministic(draw_tree: Callable[[np.random.Generator], DraftTree]) -> Step:
    """Steps whose draft is a function of the prefix."""

    def step(prefix: tuple[int, ...], p: Callable, dice: Randomness) -> list[int]:
        tree = draw_tree(np.random.default_rng([3, *prefix]))
        return emitted(tree, verify.point_mass(tree, lambda node: p((*prefix, *path_to(tree, node))), dice))

    return step


def random_path(rng: np.random.Generator) -> DraftTree:
    return DraftTree.path(rng.integers(0, V, rng.integers(0, 4)).tolist())


def random_tree(rng: np.random.Generator) -> DraftTree:
    return DraftTree.from_paths(rng.integers(0, V, (3, 3)).tolist())


def drawn(width: int, *, m: int = 2, k: int = 2, chain: bool = False, eos: tuple[int, ...] = ()) -> Step:
    """Steps whose draft of `width` paths is drawn from a lattice."""

    def step(prefix: tuple[int, ...], p: Callable, dice: Randomness) -> list[int]:
        rng = np.random.default_rng([5, *prefix])
        ids = np.stack([rng.permutation(V)[:m] for _ in range(k)])
        q = -np.sort(-rng.dirichlet(np.ones(m), k), axis=1)
        lattice = Lattice(ids, np.log(q).astype(np.float32), chain)
        draft = sample_draft(lattice, SearchConfig(tau=1.0, beam=width), dice, eos)
        return emitted(draft.tree, verify.sampled(draft, lambda node: p((*prefix, *path_to(draft.tree, node))), dice))

    return step


def autoregressive(prefix: tuple[int, ...], p: Callable, dice: Randomness) -> list[int]:
    """A step whose drafter drew its chain itself, each token given the one before."""
    ids, log_q = [], []
    token = prefix[-1]
    for _ in range(2):
        # the candidates hold a part of the mass only
        row = np.log(0.8 * np.random.default_rng([11, token]).dirichlet(np.ones(3))).astype(np.float32)
        q = np.exp(row, dtype=np.float64)
        token = int(dice.pick(q[None] / q.sum())[0])
        order = [token, *(i for i in range(3) if i != token)]
        ids.append(order)
        log_q.append(row[order])
    lattice = Lattice(np.array(ids), np.array(log_q), chain=True, drawn=True)
    draft = sample_draft(lattice, SearchConfig(tau=0.1), dice, (1,))
    return emitted(draft.tree, verify.sampled(draft, lambda node: p((*prefix, *path_to(draft.tree, node))), dice))


DRAFTS: dict[str, tuple[Step, int]] = {
    "path": (deterministic(random_path), 3),
    "tree": (deterministic(random_tree), 3),
    "sampled path": (drawn(1), 3),
    "sampled path with an EOS": (drawn(1, m=3, eos=(1,)), 2),
    "sampled chain": (drawn(1, m=3, chain=True), 2),
    "sampled tree": (drawn(2), 2),
    "autoregressive": (autoregressive, 2),
}
"""Each with the number of tokens whose distribution is enumerated (the outcomes multiply)."""


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_output_distribution_is_the_targets(draft: str, stack: str) -> None:
    p = target(stack)
    step, horizon = DRAFTS[draft]
    found = decoded(step, p, horizon)
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert distance(found, plain(p, horizon)) < 1e-12


def test_three_paths_that_draw_the_same_tokens_again_and_again() -> None:
    p = target("all")
    assert distance(decoded(drawn(3, k=1), p, horizon=2), plain(p, horizon=2)) < 1e-12


def test_sampled_drafts_over_the_whole_vocabulary() -> None:
    p = target("temperature")
    assert distance(decoded(drawn(2, m=4, k=1), p, 2), plain(p, 2)) < 1e-12


def redraw(prefix: tuple[int, ...], p: Callable, dice: Randomness) -> list[int]:
    """Wrong: accepts the drafted token with its probability, then draws again from all of p."""
    token = random_tree(np.random.default_rng([3, *prefix])).tokens[0].item()
    return [token] if dice.accept(p(prefix)[token], 1.0) else [dice.draw(p(prefix))]


def blind(prefix: tuple[int, ...], p: Callable, dice: Randomness) -> list[int]:
    """Wrong: the processors of every node see the prompt alone, not the draft before the node."""
    tree = random_tree(np.random.default_rng([3, *prefix]))
    return emitted(tree, verify.point_mass(tree, lambda node: p(prefix), dice))


@pytest.mark.parametrize("rule", [redraw, blind])
def test_wrong_rules_for_deterministic_drafts_are_found_out(rule: Step) -> None:
    p = target("repetition")
    assert distance(decoded(rule, p, 3), plain(p, 3)) > 0.01


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p, ids, q: p,  # the rest is drawn from all of p; a second try is measured against all of p
        lambda p, ids, q: (p - 0.25).clamp_min(1e-3) / (p - 0.25).clamp_min(1e-3).sum(),  # not the q that drew
    ],
)
@pytest.mark.parametrize("width", [1, 2])
def test_wrong_rules_for_sampled_drafts_are_found_out(
    wrong: Callable, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "residual", wrong)
    p = target("plain")
    assert distance(decoded(drawn(width), p, 2), plain(p, 2)) > 0.01


def test_a_draft_cut_before_a_drawn_token_is_found_out() -> None:
    """Why a drawn EOS stays in the draft: leaving it out is a choice that verification would have to know."""

    def step(prefix: tuple[int, ...], p: Callable, dice: Randomness) -> list[int]:
        row = np.array([[0.5, 0.5]])
        token = int(dice.pick(row)[0])
        draft = verify.SampledDraft.from_paths([[token]] if token else [[]], np.array([[0, 1]]), row)
        return emitted(draft.tree, verify.sampled(draft, lambda node: p((*prefix, *path_to(draft.tree, node))), dice))

    p = target("plain")
    assert distance(decoded(step, p, 2), plain(p, 2)) > 0.01


# The same with dice that really roll.


def chi_square(step: Step, p: Callable, dice: Randomness, n: int, horizon: int = 2) -> float:
    """How far the counts of n runs are from the target's distribution, in standard deviations of chi-square."""
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(n):
        tokens: tuple[int, ...] = ()
        while len(tokens) < horizon:
            tokens = (*tokens, *step((*PROMPT, *tokens), p, dice))
        counts[tokens[:horizon]] = counts.get(tokens[:horizon], 0) + 1
    expected = {x: n * chance for x, chance in plain(p, horizon).items() if chance > 0}
    assert counts.keys() <= expected.keys()
    statistic = sum((counts.get(x, 0) - e) ** 2 / e for x, e in expected.items())
    freedom = len(expected) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("draft", ["tree", "sampled path", "sampled tree"])
def test_dice_follow_the_distributions(draft: str) -> None:
    dice = Dice(generator=torch.Generator().manual_seed(0))
    assert chi_square(DRAFTS[draft][0], target("plain"), dice, 600) < 4


def test_loaded_dice_are_found_out() -> None:
    class Loaded(Dice):
        def accept(self, p: torch.Tensor, q: float) -> bool:
            return True

    dice = Loaded(generator=torch.Generator().manual_seed(0))
    assert chi_square(DRAFTS["sampled path"][0], target("plain"), dice, 600) > 8


def test_dice_are_the_generators() -> None:
    def roll(seed: int) -> list:
        dice = Dice(generator=torch.Generator().manual_seed(seed))
        p = torch.full((50,), 0.02)
        return [dice.draw(p), dice.accept(torch.tensor(0.5), 1.0), *dice.pick(np.full((9, 8), 1 / 8)).tolist()]

    assert roll(1) == roll(1) != roll(2)


def test_picks_follow_their_rows_and_never_hit_padding() -> None:
    dice = Dice(generator=torch.Generator().manual_seed(0))
    q = np.array([[0.7, 0.3, 0.0], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]])
    picks = np.stack([dice.pick(q) for _ in range(2000)])
    shares = np.stack([(picks == column).mean(0) for column in range(3)], 1)
    np.testing.assert_allclose(shares, q, atol=0.04)
    assert (shares[q == 0] == 0).all()


# Greedy.


@settings(deadline=None)
@given(paths=st.lists(st.lists(st.integers(0, V - 1), max_size=4), max_size=5), seed=st.integers(0, 99))
def test_greedy_verification_emits_what_plain_greedy_decoding_does(paths: list[list[int]], seed: int) -> None:
    tree = DraftTree.from_paths(paths)

    @cache
    def best(path: tuple[int, ...]) -> int:
        return int(np.random.default_rng([seed, *path]).integers(V))

    logits = torch.zeros(2, len(tree) + 1, V)
    for node in range(-1, len(tree)):
        logits[1, node + 1, best(tuple(path_to(tree, node)))] = 1
    verdict = verify.walk(tree, partial(verify.greedy(logits), 1))
    tokens = emitted(tree, verdict)
    assert tokens == [best(tuple(tokens[:i])) for i in range(len(tokens))]
    # and it stops only where the tree has no such child
    assert tuple(tokens) not in {tuple(path_to(tree, node)) for node in range(len(tree))}
    assert verdict.kept == sorted(verdict.kept)


def test_only_nodes_of_the_accepted_path_are_asked() -> None:
    tree = DraftTree.from_paths([[0, 1, 2], [0, 3], [1]])
    asked = []

    def choose(node: int) -> int:
        asked.append(node)
        return [0, 3, 0, 0, 2, 0][node + 1]

    assert verify.walk(tree, choose) == Verdict([0, 3], 2)
    assert asked == [ROOT, 0, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # as on a CPU, and as elsewhere
def test_greedy_token_of_every_node_and_row(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=dtype)
    logits[..., 3] = -torch.inf  # a forbidden token is nothing unusual
    logits[1, 2] = 0.5  # the first of equals
    choose = verify.greedy(logits)
    assert [[choose(row, node) for node in range(-1, 4)] for row in range(2)] == logits.argmax(-1).tolist()
    assert choose(1, 1) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 3, 5, dtype=dtype)
    logits[1, 2, 4] = bad
    choose = verify.greedy(logits)
    assert choose(0, ROOT) == 0
    with pytest.raises(ZerodraftError, match="NaN or infinity"):
        choose(1, 1)


def test_probabilities_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ZerodraftError, match="not a distribution"):
        Dice().draw(torch.tensor([0.5, torch.nan]))


def rows() -> Iterator[tuple[list[float], list[float]]]:
    rng = np.random.default_rng(0)
    for _ in range(20):
        yield rng.dirichlet(np.ones(V)).tolist(), rng.dirichlet(np.ones(V)).tolist()


def test_accepting_and_the_rest_make_up_p() -> None:
    for p_row, q_row in rows():
        p, q = torch.tensor(p_row, dtype=torch.float64), np.array(q_row)
        accepted = np.minimum(p.numpy(), q)
        rest = verify.residual(p, np.arange(V), q)
        np.testing.assert_allclose(accepted + (1 - accepted.sum()) * rest.numpy(), p.numpy(), atol=1e-14)


def test_nothing_left_when_p_is_q() -> None:
    p = torch.tensor([0.25, 0.75])
    assert torch.equal(verify.residual(p, np.arange(2), p.double().numpy()), p)
