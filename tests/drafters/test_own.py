"""A looped model that drafts for itself: the drafts are those of its first cycles, the text that of all."""

import shutil
from collections.abc import Collection
from math import inf
from typing import Any

import numpy as np
import pytest
import torch

from tests.decoding.enumerating import OPTIONS, PROMPT, Enumerator, V, distance, exact, settings
from tests.fast.cycled import CYCLED, over
from tests.fast.test_compiled import PROCESSORS, library
from tests.ztt.tiny import gap, left_padded, tiny, tiny_plain, tokens
from zerodraft import CycleOutput, DiffuSpec, LatentExit, ZeroMassExit, ZttForCausalLM, decoder
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.protocols import Drafter, DraftSession, Progress
from zerodraft.decoding.search import SearchConfig
from zerodraft.drafters.autoregressive import choose
from zerodraft.drafters.hybrid import HybridDrafter
from zerodraft.drafters.own import SelfDrafter
from zerodraft.fast.compiled import kernels
from zerodraft.fast.lean import LeanTarget, lean_target, packed_weights
from zerodraft.fast.lean.compiled_layers import CompiledLayers
from zerodraft.fast.lean.exits import EarlyExit
from zerodraft.generate.drafters import find_drafter
from zerodraft.ztt.exits import ExitRule

NAMES = (
    "cycled llama",
    "cycled mistral, window of 5, no head and tail",
    "cycled qwen2, gates, no tail",
    "cycled qwen3, fed again and scaled, gates",
    "cycled llama, fed again and scaled, gates, keys turned",
)
PLAIN: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
TREE = SearchConfig(tau=1.0, m_max=4, expand="best_first", budget=9)


def prompts(rows: int) -> dict[str, Any]:
    return left_padded([tokens(1, n, seed=n)[0] for n in (9, 5, 7)[:rows]])


@torch.no_grad()
def drafted(model: Any, text: list[int], length: int, cycles: int) -> tuple[np.ndarray, np.ndarray]:
    """By the oracle, without a cache: all that is known runs all cycles, the last token and the drafted ones the first
    ones alone."""
    known, rows = len(text) - 1, []
    for _ in range(length):
        depth = torch.tensor([[model.config.cycles] * known + [cycles] * (len(text) - known)])
        logits = model(torch.tensor([text]), exit_depth=depth, use_cache=False).logits[0, -1]
        rows.append(logits.log_softmax(-1).topk(4))
        text = [*text, int(rows[-1].indices[0])]
    return torch.stack([row.indices for row in rows]).numpy(), torch.stack([row.values for row in rows]).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_those_of_the_first_cycles_over_the_whole_models_text(name: str) -> None:
    model, prompt = CYCLED[name](), tokens(1, 8)
    target = lean_target(model)
    assert target is not None
    target.prefill(prompt[:, :-1], prompt[:, :-1] >= 0, ())
    session = SelfDrafter(model, least=0).start(1, torch.device("cpu"), None)
    session.join(target)
    session.last = prompt[0, -1:].tolist()
    (lattice,) = session.propose([5])
    ids, log_q = drafted(model, prompt[0].tolist(), 5, 1)
    assert lattice.ids[:, 0].tolist() == ids[:, 0].tolist()
    assert lattice.log_q == pytest.approx(log_q, abs=1e-4)
    assert lattice.chain


@pytest.mark.parametrize("name", NAMES)
def test_verification_goes_on_from_the_drafted_states(name: str) -> None:
    """A tree of which some nodes were drafted one after the other and the others not, in any order."""
    model, prompt = CYCLED[name](), tokens(1, 8)
    targets = [lean_target(model) for _ in range(2)]
    for target in targets:
        assert target is not None
        target.prefill(prompt, prompt >= 0, ())
    ours, plain = targets
    assert ours is not None
    assert plain is not None
    ours.begin_draft(1)
    for token in (20, 21, 22, 23):
        ours.draft(torch.tensor([[token]]))
    # the root; 31 beside 21; 21; 22 behind it; 22 behind 31; 33 behind 22
    ids, depth = torch.tensor([[20, 31, 21, 22, 22, 33]]), torch.tensor([[0, 1, 1, 2, 2, 3]])
    visible = torch.eye(6, dtype=torch.bool)[None].clone()
    visible[0, 1:, 0] = visible[0, 3, 2] = visible[0, 4, 1] = True
    visible[0, 5, [2, 3]] = True
    found, expected = (target.score(ids, depth, visible, ()).logits for target in (ours, plain))
    assert gap(found, expected) < 2e-5
    for target in (ours, plain):
        target.keep([[0, 2, 3, 5]])
    following = torch.tensor([[40]]), torch.tensor([[0]]), torch.ones(1, 1, 1, dtype=torch.bool)
    assert gap(ours.score(*following, ()).logits, plain.score(*following, ()).logits) < 2e-5


@pytest.mark.parametrize("name", ["cycled llama, fed again", "cycled qwen3, fed again and scaled, gates"])
def test_what_was_drafted_is_not_computed_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels, and (gated FFNs) without: keys, values and states of the first cycles stay those of the draft, and
    the rest follows from them."""
    model, prompt = CYCLED[name](), tokens(1, 8)
    target, early = lean_target(model), EarlyExit.run
    assert target is not None
    assert target._weights.stages is not None
    first = target._weights.stages.cycle(1).stop
    target.prefill(prompt, prompt >= 0, ())
    depths = []

    def exits(self: Any, *given: Any, **how: Any) -> Any:
        ran, depth = early(self, *given, **how)
        depths.append(depth.tolist())
        return ran, depth

    monkeypatch.setattr(EarlyExit, "run", exits)
    causal = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    found = []
    for factor in (1.0, 1.0, -1.0):
        target.begin_draft(1)
        for token in (20, 21, 22):
            target.draft(torch.tensor([[token]]))
        draft, kv = target._draft, target._cache.kv[:, 0, :, 8:11]
        assert draft is not None
        with torch.inference_mode():
            draft.states[1] *= factor
            kv[:first, :, 0] *= factor
        before = kv.clone()
        found.append(target.score(torch.tensor([[20, 21, 22, 23]]), torch.arange(4)[None], causal, ()).logits)
        assert torch.equal(kv[:first], before[:first])
        assert not torch.equal(kv[first:], before[first:])
    assert torch.equal(found[0], found[1])
    assert gap(found[0][:, 1], found[2][:, 1]) > 1e-2  # of whom the state was another
    assert gap(found[0][:, 3], found[2][:, 3]) > 1e-3  # and who saw other keys
    assert depths == [[1]] * 9


RULES = {
    "no rule": None,
    "latent": LatentExit(threshold=0.8),
    "zero mass": ZeroMassExit(threshold=0.0995),
    "two thresholds": LatentExit(threshold=(-1.0, 1e9)),
}


@pytest.mark.skipif(kernels() is None, reason="needs compiled kernels")
@pytest.mark.parametrize("cycles", [1, 2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name", ["cycled llama, fed again and scaled, gates, keys turned", "cycled qwen3, keys turned"]
)
def test_the_compiled_pass_drafts_what_python_does(name: str, rule: str, cycles: int) -> None:
    """Logits and states of what is drafted, and what verification makes of them."""
    model, prompt, chosen = CYCLED[name](), tokens(1, 8), RULES[rule]
    compiled, asked = lean_target(model), lean_target(model)
    assert compiled is not None
    assert asked is not None
    depths: list[int] = []

    def by_python(out: CycleOutput) -> Any:
        assert out.cycle >= cycles
        stops = torch.ones(len(out.hidden), dtype=torch.bool) if chosen is None else chosen(out)
        depths.extend([out.cycle] * bool(stops.all()))
        return stops

    for target, given in ((compiled, chosen), (asked, by_python)):
        target.prefill(prompt, prompt >= 0, ())
        target.begin_draft(cycles, given)
    ours, theirs = compiled._draft, asked._draft
    assert ours is not None
    assert theirs is not None
    assert ours.early.compiled is not None
    assert theirs.early.compiled is None
    for token in (20, 21, 22, 23, 24):
        ids = torch.tensor([[token]])
        assert gap(compiled.draft(ids), asked.draft(ids)) < 2e-5
        assert gap(ours.states[-1], theirs.states[-1]) < 2e-5
    if chosen is None:
        assert depths == [cycles] * 5
    elif rule == "two thresholds":
        assert depths == [2] * 5
    elif cycles == 1:
        assert 1 in depths
        assert depths != [1] * 5
    visible = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    again = torch.tensor([[20, 21, 22, 31]]), torch.arange(4)[None], visible
    plain = lean_target(model)
    assert plain is not None
    plain.prefill(prompt, prompt >= 0, ())
    expected = plain.score(*again, ()).logits
    for target in (compiled, asked):
        assert gap(target.score(*again, ()).logits, expected) < 2e-5
    for target in (compiled, asked, plain):
        target.keep([[0, 1, 2]])
    following = torch.tensor([[40]]), torch.tensor([[0]]), torch.ones(1, 1, 1, dtype=torch.bool)
    expected = plain.score(*following, ()).logits
    assert gap(compiled.score(*following, ()).logits, expected) < 2e-5


Draft = tuple[list[list[int]], list[list[float]]]


def token_by_token(
    target: LeanTarget, first: int, length: int, *, candidates: int, least: float, eos: Collection[int]
) -> Draft:
    """The oracle of a draft in one call."""
    rows: Draft = [], []
    token, chance = first, 0.0
    while len(rows[0]) < length and not (rows[0] and token in eos) and not chance < least:
        ids, log_q = choose(target.draft(torch.tensor([[token]]))[0], candidates, 0.0, None)
        token, chance = int(ids[0]), chance + float(log_q[0])
        rows[0].append(ids.tolist())
        rows[1].append(log_q.tolist())
    return rows


def assert_one_call_is_token_by_token(
    model: Any, cycles: int = 1, rule: ExitRule | None = None, *, length: int = 6, **how: Any
) -> Draft:
    """The same candidates, and all that verification goes on from."""
    how = {"candidates": 4, "least": -inf, "eos": (), **how}
    prompt, targets = tokens(1, 8) % model.config.get_text_config().vocab_size, [lean_target(model) for _ in range(2)]
    for target in targets:
        assert target is not None
        target.prefill(prompt, prompt >= 0, ())
        target.begin_draft(cycles, rule)
    ours, theirs = targets
    assert ours is not None
    assert theirs is not None
    found, expected = ours.draft_likeliest(20, length, **how), token_by_token(theirs, 20, length, **how)
    assert found is not None
    assert found[0].tolist() == expected[0]
    assert found[1] == pytest.approx(np.array(expected[1]), abs=2e-5)
    mine, other, end = ours._draft, theirs._draft, 8 + len(expected[0])
    assert mine is not None
    assert other is not None
    assert mine.ids == other.ids
    assert gap(torch.cat(mine.states), torch.cat(other.states)) < 2e-5
    assert len(mine.fed) == len(other.fed)
    for one, fed in zip(mine.fed, other.fed, strict=True):
        assert gap(one, fed) < 2e-5
    assert gap(ours._cache.kv[:, :, :, 8:end], theirs._cache.kv[:, :, :, 8:end]) < 2e-5
    return expected


@pytest.mark.skipif(kernels() is None, reason="needs compiled kernels")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "cycled llama, fed again and scaled, gates, keys turned",
        "cycled qwen3, keys turned",
        "cycled qwen2, gates, no tail",
    ],
)
def test_one_call_drafts_what_calls_token_by_token_do(name: str, narrow: bool, rule: str) -> None:
    model = CYCLED[name]()
    if narrow:
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.bfloat16())
    for cycles in (1, 2):
        assert_one_call_is_token_by_token(model, cycles, RULES[rule])


@pytest.mark.skipif(kernels() is None, reason="needs compiled kernels")
@pytest.mark.parametrize("candidates", [1, 3, 35, 99])
def test_one_call_of_any_number_of_candidates(candidates: int) -> None:
    """Of a vocabulary that fills no vector, and more than there are."""
    ids, _ = assert_one_call_is_token_by_token(over("llama", {"vocab_size": 35}), candidates=candidates)
    assert len(ids[0]) == min(candidates, 35)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_one_call_on_other_processors(
    processor: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = over("llama", {"vocab_size": 35}, input_injection=True)
    weights = packed_weights(model)
    assert weights is not None
    assert isinstance(weights.run, CompiledLayers)
    monkeypatch.setattr(weights.run, "functions", library(PROCESSORS[processor], tmp_path_factory))
    assert_one_call_is_token_by_token(model)


@pytest.mark.skipif(kernels() is None, reason="needs compiled kernels")
def test_one_call_ends_where_token_by_token_does() -> None:
    model = over("llama", cycles=3)
    ids, log_q = assert_one_call_is_token_by_token(model)
    path = [row[0] for row in ids]
    end = path.index(path[3])
    assert len(assert_one_call_is_token_by_token(model, eos=(999, path[3]))[0]) == end + 1
    # the root is no part of the draft, though it may be the end of a text
    assert assert_one_call_is_token_by_token(model, eos=(999,))[0] == ids
    least = sum(row[0] for row in log_q[:2]) - 1e-3
    assert len(assert_one_call_is_token_by_token(model, least=least)[0]) == 3


@pytest.mark.skipif(kernels() is None, reason="needs compiled kernels")
def test_where_python_has_a_part_in_it_there_is_no_single_call() -> None:
    def found(model: Any, ids: torch.Tensor, length: int = 3, rule: Any = None, first: int = 20) -> Any:
        target = lean_target(model)
        assert target is not None
        target.prefill(ids, torch.ones_like(ids, dtype=torch.bool), ())
        target.begin_draft(1, rule)
        return target.draft_likeliest(first, length, candidates=4, least=-inf, eos=())

    llama, windows = over("llama"), CYCLED["cycled mistral, window of 5, no head and tail"]()
    assert found(llama, tokens(1, 2)) is not None
    assert found(llama, tokens(2, 2)) is None
    assert found(llama, tokens(1, 2), rule=lambda out: torch.ones(len(out.hidden), dtype=torch.bool)) is None
    assert found(llama, tokens(1, 2), first=llama.config.get_text_config().vocab_size) is None
    assert found(windows, tokens(1, 2)) is not None
    assert found(windows, tokens(1, 2), length=4) is None
    assert found(CYCLED["cycled qwen3, fed again and scaled, gates"](), tokens(1, 2)) is None  # gated FFNs


MAKE: dict[str, Any] = {"lean": lean_target, "the model's forward": None}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("where", MAKE)
@pytest.mark.parametrize("rule", [None, LatentExit(threshold=0.4)])
def test_greedy_texts_are_those_of_plain_decoding(where: str, rows: int, rule: Any) -> None:
    model = over("qwen3", input_injection=True, cycles=3)
    drafter = SelfDrafter(model, rule=rule, least=0)
    assert isinstance(drafter, Drafter)
    assert isinstance(drafter.start(1, torch.device("cpu"), None), DraftSession)
    answers = model.generate(**prompts(rows), **PLAIN)
    for search in (None, TREE) if where == "lean" else (TREE,):
        spec = DiffuSpec(drafter, length=FixedLength(3), make_target=MAKE[where], search=search)
        assert torch.equal(model.generate(**prompts(rows), **PLAIN, custom_generate=spec), answers)
        assert spec.last_stats is not None
        assert spec.last_stats.steps < 12


def test_with_copies_and_a_text_that_goes_on() -> None:
    model = over("llama", cycles=3)
    decode = decoder(model, "self:2", reuse=True)
    assert isinstance(decode.drafter, HybridDrafter)
    text = prompts(1)["input_ids"]
    for _ in range(3):
        answers = model.generate(text, **PLAIN)
        assert torch.equal(model.generate(text, **PLAIN, custom_generate=decode), answers)
        text = torch.cat([answers, tokens(1, 3)], 1)
    assert decode.last_stats is not None
    assert decode.last_stats.reused_tokens


def four_tokens() -> ZttForCausalLM:
    return over("llama", {"vocab_size": V, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}, cycles=3)


@pytest.mark.parametrize("where", MAKE)
@pytest.mark.parametrize(("temperature", "option"), [(0.0, "top_k"), (0.8, "top_k")])
def test_sampled_texts_have_the_distribution_of_plain_decoding(where: str, temperature: float, option: str) -> None:
    model, enumerator = four_tokens(), Enumerator()
    drafter = SelfDrafter(model, candidates=V, temperature=temperature)
    # a drafter's own draws are no choices of the enumeration: they are made by a seed for each text
    seeds = range(2 if temperature else 1)
    for seed in seeds:

        def outcome(seed: int = seed) -> tuple[int, ...]:
            spec = DiffuSpec(
                drafter, dice=enumerator, length=FixedLength(2), make_target=MAKE[where],
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            return tuple(model.generate(PROMPT, custom_generate=spec, **settings(OPTIONS[option]))[0, 2:].tolist())

        assert distance(enumerator.run(outcome), exact(model, OPTIONS[option])) < 1e-5


def test_a_draft_ends_where_it_is_not_likely() -> None:
    model, prompt = over("llama", cycles=3), tokens(1, 8)
    for make in MAKE.values():
        lengths = []
        for least in (0.0, 1.0):
            target = make(model) if make else None
            session = SelfDrafter(model, least=least).start(1, torch.device("cpu"), None)
            if target is not None:
                target.prefill(prompt, prompt >= 0, ())
                session.join(target)
            session.observe([Progress(prompt[0], None)])
            lengths.append(len(session.propose([6])[0]))
        assert lengths == [6, 1]


def test_what_cannot_draft_for_itself_is_one_sentence() -> None:
    with pytest.raises(ZerodraftError, match="cannot draft for itself"):
        SelfDrafter(tiny_plain())
    with pytest.raises(ZerodraftError, match="fewer than the model has"):
        SelfDrafter(tiny("llama", cycles=2), cycles=2)
    for cycles in (0, 3):
        with pytest.raises(ZerodraftError, match=rf"The first {cycles!r} of 3 cycles"):
            SelfDrafter(tiny("llama", cycles=3), cycles=cycles)
    for least in (-0.1, 2.0, float("nan")):
        with pytest.raises(ZerodraftError, match=rf"least={least} must lie between"):
            SelfDrafter(tiny("llama"), least=least)
    with pytest.raises(ZerodraftError, match="schedule"):
        SelfDrafter(tiny("llama", schedule="layer"))
    with pytest.raises(ZerodraftError, match="another target"):
        SelfDrafter(tiny("llama")).check(tiny("llama").config)
    with pytest.raises(ZerodraftError, match="after 'self:' comes the number of cycles"):
        find_drafter("self:x", tiny("llama"), "")
    drafter, name = find_drafter("self:2", tiny("llama", cycles=3), "")
    assert isinstance(drafter, SelfDrafter)
    assert (drafter.cycles, name) == (2, "self:2")


def test_a_target_that_exits_early_can_draft_for_itself() -> None:
    model = over("llama", cycles=3)
    options = {**PLAIN, "exit_rule": LatentExit(threshold=0.55)}
    answers, depths = model.generate(**prompts(1), **options), model.last_exit
    for make in MAKE.values():
        spec = DiffuSpec(SelfDrafter(model), length=FixedLength(3), make_target=make, tree=False)
        assert torch.equal(model.generate(**prompts(1), **options, custom_generate=spec), answers)
        assert torch.equal(model.last_exit, depths)
