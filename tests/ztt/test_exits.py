"""Early exit equals running everything and selecting, whatever the batch, padding and chunks; and it does less work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ztt.tiny import base_config, gap, left_padded, tiny, tokens
from tests.ztt.unrolled import unroll
from zerodraft import (
    ConfidenceExit,
    CycleOutput,
    DepthBatch,
    DepthRequest,
    EntropyExit,
    ExitRule,
    FixedExit,
    KlExit,
    LatentExit,
    ReadingRule,
    ZerodraftError,
    ZeroMassExit,
    ZttForCausalLM,
    decoder,
    exit_rule_from_dict,
    exit_rule_to_dict,
)
from zerodraft.ztt.exits import check_rule

POLICIES = ["propagate", "latest"]
# Rules with a score, and whether a token stops above (+1) or below (-1) the threshold.
SCORED: dict[str, tuple[Callable[..., Any], int]] = {
    "zero-mass": (ZeroMassExit, 1),
    "confidence": (ConfidenceExit, 1),
    "entropy": (EntropyExit, -1),
    "kl": (KlExit, -1),
    "latent": (LatentExit, -1),
}


@torch.no_grad()
def splitting(model: ZttForCausalLM, name: str = "zero-mass", **options: Any) -> ExitRule:
    """The rule with a threshold in the widest gap between the middle scores after the first cycle: far from all."""
    make, sign = SCORED[name]
    rule, scores = make(threshold=0.0, **options), []

    def spy(out: CycleOutput) -> Tensor:
        scores.append(rule.score(out))
        return torch.zeros_like(scores[-1], dtype=torch.bool)

    model(tokens(3, 12), exit_rule=spy)
    middle = scores[0].sort().values
    middle = middle[len(middle) // 3 : -len(middle) // 3]
    widest = middle.diff().argmax()
    return make(threshold=sign * middle[widest : widest + 2].mean().item(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"input_injection": True, "cycle_scales": True, "cycle_gates": True},
        {"residual_streams": 3, "input_injection": True, "cycle_gates": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "smollm3", "gpt2", "opt", "gpt_neox"])
@torch.no_grad()
def test_propagate_equals_the_unrolled_model_with_frozen_tokens(family: str, options: dict[str, bool]) -> None:
    model, ids = tiny(family, **options), tokens(3, 10)
    out = model(ids, exit_rule=splitting(model))
    assert len(out.exit_depth.unique()) > 1, "the rule must tell tokens apart for this to prove anything"
    assert gap(out.logits, unroll(model, out.exit_depth)(ids).logits) <= 1e-5
    assert gap(out.logits, unroll(model, out.exit_depth.flip(1))(ids).logits) > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "opt", "gpt_neox"])
@torch.no_grad()
def test_equals_running_everything_and_selecting(family: str, policy: str) -> None:
    model, ids = tiny(family), tokens(3, 10)
    out = model(ids, exit_rule=splitting(model), exit_policy=policy)
    slow = model(ids, exit_depth=out.exit_depth, exit_policy=policy)
    assert len(out.exit_depth.unique()) > 1
    assert gap(out.logits, slow.logits) <= 1e-5
    other = model(ids, exit_depth=out.exit_depth, exit_policy=POLICIES[policy == "propagate"])
    assert gap(out.logits, other.logits) > 1e-4, "the two policies must differ"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SCORED)
@torch.no_grad()
def test_every_rule_equals_running_everything_and_selecting(name: str, policy: str) -> None:
    model, ids = tiny("llama"), tokens(3, 10)
    out = model(ids, exit_rule=splitting(model, name), exit_policy=policy)
    assert len(out.exit_depth.unique()) > 1
    assert gap(out.logits, model(ids, exit_depth=out.exit_depth, exit_policy=policy).logits) <= 1e-5


OPTIONS = [
    {"ffn_gate": True},
    {"cycle_gates": True},
    {"input_injection": True},
    {"cycle_scales": True},
    {"residual_streams": 2},
    {"residual_streams": 3, "cycle_lora_rank": 2, "cycles": 5},
    {"input_injection": True, "cycle_lora_rank": 2},
    {"cycle_lora_rank": 2},
    {"cycle_lora_rank": 2, "cycles": 5},
    {"edge_zero_tokens": True},
    {"head_layers": 0, "tail_layers": 0},
    {"zero_rope": "none"},
    {"zero_rope": "relative"},
    {"zero_token_start": 2},
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
@torch.no_grad()
def test_every_option_with_exits(options: dict[str, Any], policy: str) -> None:
    """Selecting, chunks and batch composition at once, for each option of the model."""
    model, ids = tiny("llama", **options), tokens(3, 10)
    settings = {"exit_rule": splitting(model, "latent"), "exit_policy": policy}
    out = model(ids, **settings)
    assert len(out.exit_depth.unique()) > 1
    assert gap(out.logits, model(ids, exit_depth=out.exit_depth, exit_policy=policy).logits) <= 1e-5
    logits, depth = in_chunks(model, ids, [4, 1, 3, 1, 1], **settings)
    assert gap(logits, out.logits) <= 1e-5
    assert torch.equal(depth, out.exit_depth)


def in_chunks(model: ZttForCausalLM, ids: Tensor, sizes: list[int], **settings: Any) -> tuple[Tensor, Tensor]:
    """Logits and depths of a text that is read piece by piece."""
    past, outs = None, []
    for piece in ids.split(sizes, dim=1):
        outs.append(model(piece, past_key_values=past, use_cache=True, **settings))
        past = outs[-1].past_key_values
    return torch.cat([out.logits for out in outs], 1), torch.cat([out.exit_depth for out in outs], 1)


class StopsIn:
    """Stops some tokens, by the sign of one entry of their state, but only in some of the cycles."""

    reads_zero_mass = False

    def __init__(self, *cycles: int) -> None:
        self.cycles = cycles

    def __call__(self, out: CycleOutput) -> Tensor:
        return (out.hidden[:, 0] > 0) & (out.cycle in self.cycles)


SCALARS = {"input_injection": True, "cycle_scales": True}
EVERYTHING = {"cycle_lora_rank": 2, "residual_streams": 2, "ffn_gate": True, "cycle_gates": True} | SCALARS


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", [{}, {"cycle_lora_rank": 2}, EVERYTHING], ids=["plain", "lora", "everything"])
@pytest.mark.parametrize("stops", [(1,), (1, 3), (2, 4), (1, 2, 3, 4)], ids=str)
@torch.no_grad()
def test_cycles_in_which_nobody_stops(stops: tuple[int, ...], options: dict[str, Any], policy: str) -> None:
    """Whether anybody stops in a cycle depends on who else is in the pass; what a token gets must not."""
    model, ids = tiny("llama", cycles=5, **options).double(), tokens(3, 5)
    settings: dict[str, Any] = {"exit_rule": StopsIn(*stops), "exit_policy": policy}
    out = model(ids, **settings)
    assert len(out.exit_depth.unique()) > 1
    assert gap(out.logits, model(ids, exit_depth=out.exit_depth, exit_policy=policy).logits) <= 1e-9
    for index, row in enumerate(ids):
        logits, depth = in_chunks(model, row[None], [1] * ids.shape[1], **settings)
        assert torch.equal(depth[0], out.exit_depth[index])
        assert gap(logits[0], out.logits[index]) <= 1e-9


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SCORED)
@torch.no_grad()
def test_every_rule_with_everything(name: str, policy: str) -> None:
    """Whole batch = one token at a time = a batch of one = running everything and selecting."""
    model, ids = tiny("llama", cycles=4, **EVERYTHING).double(), tokens(3, 5)
    settings: dict[str, Any] = {"exit_rule": splitting(model, name), "exit_policy": policy}
    out = model(ids, **settings)
    assert len(out.exit_depth.unique()) > 1
    assert gap(out.logits, model(ids, exit_depth=out.exit_depth, exit_policy=policy).logits) <= 1e-9
    for index, row in enumerate(ids):
        logits, depth = in_chunks(model, row[None], [1] * ids.shape[1], **settings)
        assert torch.equal(depth[0], out.exit_depth[index])
        assert gap(logits[0], out.logits[index]) <= 1e-9


MODELS: dict[str, ZttForCausalLM] = {}


def model_of(family: str) -> ZttForCausalLM:
    """One model for all examples that hypothesis makes."""
    return MODELS.setdefault(family, tiny(family))


texts = st.lists(st.integers(1, 11), min_size=1, max_size=4)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["llama", "gemma3", "gpt2"]), texts, st.sampled_from(POLICIES), st.integers(0, 99))
@torch.no_grad()
def test_a_row_does_not_know_its_batch_or_its_padding(family: str, lengths: list[int], policy: str, seed: int) -> None:
    model = model_of(family)
    settings = {"exit_rule": splitting(model), "exit_policy": policy}
    rows = [tokens(1, length, seed + i)[0] for i, length in enumerate(lengths)]
    batch = left_padded(rows)
    out = model(**batch, **settings)
    assert torch.equal(out.exit_depth == 0, batch["attention_mask"] == 0)
    for index, row in enumerate(rows):
        alone = model(row[None], **settings)
        assert gap(out.logits[index, -len(row) :], alone.logits[0]) <= 1e-5
        assert torch.equal(out.exit_depth[index, -len(row) :], alone.exit_depth[0])


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["llama", "gemma3", "gpt2"]), texts, st.sampled_from(POLICIES), st.integers(0, 99))
@torch.no_grad()
def test_chunks_do_not_matter(family: str, sizes: list[int], policy: str, seed: int) -> None:
    model = model_of(family)
    settings = {"exit_rule": splitting(model), "exit_policy": policy}
    ids = tokens(2, sum(sizes), seed)
    whole = model(ids, **settings)
    logits, depth = in_chunks(model, ids, sizes, **settings)
    assert gap(logits, whole.logits) <= 1e-5
    assert torch.equal(depth, whole.exit_depth)


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_exits() -> None:
    model, ids = tiny("llama"), tokens(2, 10)
    rule, changed = splitting(model), tokens(2, 10)
    changed[:, 6:] = tokens(2, 4, seed=5)
    a, b = model(ids, exit_rule=rule), model(changed, exit_rule=rule)
    assert torch.equal(a.exit_depth[:, :6], b.exit_depth[:, :6])
    assert gap(a.logits[:, :6], b.logits[:, :6]) <= 1e-6


@pytest.mark.parametrize("cycles", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_fixed_exit_is_the_model_with_fewer_cycles(family: str, cycles: int) -> None:
    model, ids = tiny(family), tokens(2, 10)
    fewer = model(ids, cycles=cycles).logits
    for policy in POLICIES:
        out = model(ids, exit_rule=FixedExit(cycles=cycles), exit_policy=policy)
        assert gap(out.logits, fewer) <= 1e-5
        assert out.exit_depth.unique().tolist() == [cycles]
        logits, _ = in_chunks(model, ids, [3, 4, 1, 2], exit_rule=FixedExit(cycles=cycles), exit_policy=policy)
        assert gap(logits, fewer) <= 1e-5


@torch.no_grad()
def test_depths_may_change_within_a_text() -> None:
    """A prompt read at depth 1 leaves keys and values in every slot, so that what follows can go deeper."""
    model, ids = tiny("llama"), tokens(2, 9)
    past = model(ids[:, :5], exit_rule=FixedExit(cycles=1), use_cache=True).past_key_values
    assert [past.get_seq_length(slot) for slot in range(8)] == [5] * 8
    deep = model(ids[:, 5:], past_key_values=past).logits
    depth = torch.tensor([[1] * 5 + [3] * 4]).expand(2, -1)
    assert gap(deep, model(ids, exit_depth=depth).logits[:, 5:]) <= 1e-5


@torch.no_grad()
def test_a_rule_sees_the_state_before_the_input_is_fed_again() -> None:
    model, ids, seen = tiny("llama", **SCALARS), tokens(2, 5), []

    def spy(out: CycleOutput) -> Tensor:
        seen.append((out.previous, out.hidden))
        return torch.zeros(len(out.hidden), dtype=torch.bool)

    model(ids, exit_rule=spy)
    assert torch.equal(seen[1][0], seen[0][1]), "what a cycle starts from is what the one before has made"


@torch.no_grad()
def test_exited_tokens_are_not_computed() -> None:
    """The layers see in every cycle only the tokens that still run."""
    model, ids = tiny("llama"), tokens(3, 12)
    rule, seen = splitting(model), []
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda _, args, out: seen.append(out.shape[0] * out.shape[1]))
    depth = model(ids, exit_rule=rule).exit_depth
    running = [int((depth >= cycle).sum()) for cycle in (1, 2, 3)]
    assert seen == [36, 36, 36, running[1], running[1], running[2], running[2], 36]
    assert 36 > running[1] > running[2] > 0
    seen.clear()
    model(ids, exit_rule=FixedExit(cycles=1), use_cache=True)
    assert seen == [36] * 4
    seen.clear()
    batch = left_padded([row[: 4 + 4 * i] for i, row in enumerate(ids)])
    model(**batch, exit_rule=FixedExit(cycles=2))
    assert seen[-1] == 36
    assert sum(seen) <= 36 * 6


@torch.no_grad()
def test_the_mass_is_there_unless_the_rule_does_not_read_it() -> None:
    model, seen = tiny("llama"), []

    class Spy:
        """Stops nobody, and notes what it is given."""

        def __call__(self, out: CycleOutput) -> Tensor:
            seen.append(out.zero_mass is None)
            return torch.zeros(len(out.hidden), dtype=torch.bool)

    class Blind(Spy):
        reads_zero_mass = False

    class Derived(Spy, ReadingRule):
        """Says nothing, as its base class has said it."""

    for rule in (Spy(), Blind(), Derived()):
        model(tokens(), exit_rule=rule)
    assert seen == [False, False, True, True, False, False]
    blind = [name for name, (rule, _) in SCORED.items() if not getattr(rule, "reads_zero_mass", True)]
    assert blind == ["confidence", "entropy", "kl", "latent"]


@torch.no_grad()
def test_exits_in_bfloat16() -> None:
    model, ids = tiny("llama").bfloat16(), tokens(3, 10)
    for policy in POLICIES:
        out = model(ids, exit_rule=splitting(model), exit_policy=policy)
        assert len(out.exit_depth.unique()) > 1
        assert out.logits.dtype == torch.bfloat16
        slow = model(ids, exit_depth=out.exit_depth, exit_policy=policy).logits
        assert gap(out.logits, slow) <= 0.05 * slow.abs().max()


@torch.no_grad()
def test_eager_and_sdpa_exit_alike() -> None:
    model, ids = tiny("gemma3"), tokens(3, 10)
    rule = splitting(model)
    expected = model(ids, exit_rule=rule)
    model.set_attn_implementation("eager")
    out = model(ids, exit_rule=rule)
    assert torch.equal(out.exit_depth, expected.exit_depth)
    assert gap(out.logits, expected.logits) <= 1e-5


# -- the rules by themselves ------------------------------------------------------------------------------------------


def cycle_output(**changes: Any) -> CycleOutput:
    """Three tokens with a state of four, which is at the same time their logits; two layers of two heads."""
    hidden = torch.tensor([[9.0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    mass = torch.tensor([[[0.1, 0.3], [0.5, 0.7]], [[0.9, 0.9], [0.1, 0.1]], [[0.0, 1.0], [1.0, 0.0]]])
    parts = {"cycle": 1, "hidden": hidden, "previous": hidden, "zero_mass": mass, "readout": lambda x: x}
    return CycleOutput(**{**parts, **changes})


@pytest.mark.parametrize(
    ("pool", "layers", "scores"),
    [
        ("mean", "all", [0.4, 0.5, 0.5]),
        ("max", "all", [0.7, 0.9, 1.0]),
        ("min", "all", [0.1, 0.1, 0.0]),
        ("mean", "first", [0.2, 0.9, 0.5]),
        ("max", "last", [0.7, 0.1, 1.0]),
        ("min", "last", [0.5, 0.1, 0.0]),
    ],
)
def test_pools_of_the_zero_mass(pool: Any, layers: Any, scores: list[float]) -> None:
    rule = ZeroMassExit(threshold=0.5, pool=pool, layers=layers)
    torch.testing.assert_close(rule.score(cycle_output()), torch.tensor(scores))
    assert rule(cycle_output()).tolist() == [score >= 0.5 for score in scores]


def test_nobody_exits_on_a_zero_mass_that_is_not_there() -> None:
    assert not ZeroMassExit(threshold=0.0)(cycle_output(zero_mass=None)).any()


def test_readout_rules_against_the_formulas() -> None:
    out = cycle_output(previous=torch.eye(3, 4))
    p, q = out.hidden.softmax(-1), out.previous.softmax(-1)
    torch.testing.assert_close(ConfidenceExit(threshold=0.5).score(out), p.max(-1).values)
    entropy = torch.distributions.Categorical(p).entropy()
    torch.testing.assert_close(-EntropyExit(threshold=0.5).score(out), entropy)
    kl = torch.distributions.kl_divergence(*map(torch.distributions.Categorical, (p, q)))
    torch.testing.assert_close(-KlExit(threshold=0.5).score(out), kl)
    assert ConfidenceExit(threshold=0.9)(out).tolist() == [True, False, False]
    assert EntropyExit(threshold=0.1)(out).tolist() == [True, False, False]
    assert KlExit(threshold=1e-3)(cycle_output()).all()


def test_latent_difference_is_relative_and_survives_a_zero_state() -> None:
    out = cycle_output(previous=torch.tensor([[9.0, 0, 0, 0], [0.5, 0, 0, 0], [0.0, 0, 0, 0]]))
    torch.testing.assert_close(-LatentExit(threshold=0.5).score(out), torch.tensor([0.0, 0.5, 0.0]))
    assert LatentExit(threshold=0.25)(out).tolist() == [True, False, True]


def test_fixed_exit() -> None:
    rule = FixedExit(cycles=2)
    assert [rule(cycle_output(cycle=c)).tolist() for c in (1, 2, 3)] == [[False] * 3, [True] * 3, [True] * 3]


@pytest.mark.parametrize(
    "rule",
    [
        ZeroMassExit(threshold=0.3, pool="max", layers="first"),
        ConfidenceExit(threshold=0.9),
        EntropyExit(threshold=1.5),
        KlExit(threshold=0.01),
        LatentExit(threshold=0.05),
        FixedExit(cycles=2),
    ],
)
def test_rules_can_be_stored_in_a_configuration(rule: ExitRule) -> None:
    stored = exit_rule_to_dict(rule)
    assert exit_rule_from_dict(stored) == rule
    model = tiny("llama", base=base_config("llama"), exit_rule=stored)
    assert model.calibrated_exit_rule() == rule
    assert type(model.config).from_dict(model.config.to_dict()).exit_rule == stored


def test_rules_that_cannot_be_stored_or_read_are_refused() -> None:
    with pytest.raises(ZerodraftError, match="can be stored"):
        exit_rule_to_dict(lambda out: torch.zeros(len(out.hidden), dtype=torch.bool))
    with pytest.raises(ZerodraftError, match="'magic' is unknown; choose one of zero-mass"):
        exit_rule_from_dict({"rule": "magic"})
    with pytest.raises(ZerodraftError, match="does not fit its parameters"):
        exit_rule_from_dict({"rule": "confidence", "treshold": 0.5})
    with pytest.raises(ZerodraftError, match="does not fit its parameters"):
        exit_rule_from_dict({"rule": "confidence"})
    with pytest.raises(ZerodraftError, match="No token can stop after 0 cycles"):
        exit_rule_from_dict({"rule": "cycles", "cycles": 0})
    with pytest.raises(ZerodraftError, match="does not fit its parameters"):
        exit_rule_from_dict({"rule": "cycles", "cycles": "2"})


EACH = LatentExit(threshold=(None, 0.35, 0.3, None, 0.25))


def far_from(model: ZttForCausalLM, ids: Tensor, cycles: int) -> LatentExit:
    """A threshold for each cycle amid its own scores, none after the first one, far from all scores."""
    scores: list[Tensor] = []

    def spy(out: CycleOutput) -> Tensor:
        scores.append(LatentExit(threshold=0.0).score(out).sort().values)
        return torch.zeros(len(out.hidden), dtype=torch.bool)

    model(ids, exit_rule=spy)
    middles = [one[len(one) // 4 : -len(one) // 4] for one in scores[1:]]
    each = [-middle[(at := int(middle.diff().argmax())) : at + 2].mean().item() for middle in middles]
    return LatentExit(threshold=[None, *each])


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_a_threshold_for_each_cycle_holds_selected_cached_and_padded(policy: str) -> None:
    model, ids = tiny("llama", cycles=5), tokens(3, 10)
    rule = far_from(model, ids, 5)
    settings = {"exit_rule": rule, "exit_policy": policy}
    out = model(ids, **settings)
    assert len(out.exit_depth.unique()) > 2
    assert int(out.exit_depth.min()) > 1, "nobody stops after the first cycle"
    assert gap(out.logits, model(ids, exit_depth=out.exit_depth, exit_policy=policy).logits) <= 1e-5
    logits, depth = in_chunks(model, ids, [4, 1, 3, 1, 1], **settings)
    assert gap(logits, out.logits) <= 1e-5
    assert torch.equal(depth, out.exit_depth)
    batch = left_padded([ids[0], ids[1, :6]])
    assert torch.equal(model(**batch, **settings).exit_depth[1, 4:], model(ids[1:2, :6], **settings).exit_depth[0])


@torch.no_grad()
def test_equal_thresholds_are_one_threshold_and_none_computes_no_score() -> None:
    model, ids = tiny("llama"), tokens(2, 10)
    rule = splitting(model)
    again = type(rule)(threshold=(rule.threshold, rule.threshold))
    assert torch.equal(model(ids, exit_rule=rule).exit_depth, model(ids, exit_rule=again).exit_depth)
    asked = 0

    class Counting(LatentExit):
        def score(self, out: CycleOutput) -> Tensor:
            nonlocal asked
            asked += 1
            return LatentExit.score(self, out)

    assert model(ids, exit_rule=Counting(threshold=(None, 1e9))).exit_depth.unique().tolist() == [2]
    assert asked == 1


def test_thresholds_are_stored_as_lists_and_come_back() -> None:
    stored = exit_rule_to_dict(EACH)
    assert stored == {"rule": "latent", "threshold": [None, 0.35, 0.3, None, 0.25]}
    assert exit_rule_from_dict(stored) == EACH


@pytest.mark.parametrize(
    "threshold", [(), (0.1, "a"), "0.3", None, [[0.1]], float("nan"), (0.1, float("nan"))], ids=str
)
def test_what_is_no_threshold_is_refused(threshold: Any) -> None:
    with pytest.raises(ZerodraftError):
        exit_rule_from_dict({"rule": "latent", "threshold": threshold})
    with pytest.raises(ZerodraftError, match="neither a number nor one number for each cycle but the last"):
        LatentExit(threshold=())


def test_a_wrong_count_of_thresholds_is_refused() -> None:
    model = tiny("llama")
    for count, said in ((1, "has 1 threshold, and the model's 3 cycles want 2"), (3, "has 3 thresholds, and the")):
        with pytest.raises(ZerodraftError, match=said):
            model(tokens(), exit_rule=LatentExit(threshold=[0.1] * count))
    short = LatentExit(threshold=(None,))
    with pytest.raises(ZerodraftError, match="has 1 threshold, and it is asked after cycle 2"):
        model(tokens(), exit_rule=lambda out: short(out))


@pytest.mark.parametrize("rule", ["latent:0.3", LatentExit, 0.5], ids=repr)
def test_what_is_no_rule_is_refused(rule: Any) -> None:
    with pytest.raises(ZerodraftError, match="is no exit rule: give an object such as LatentExit"):
        check_rule(rule, 3)


@pytest.mark.parametrize(
    "answer",
    [True, torch.tensor(True), torch.ones(7, dtype=torch.bool), torch.ones(3), torch.ones(3, 1, dtype=torch.bool)],
    ids=repr,
)
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_a_rule_that_answers_otherwise_is_refused(answer: Any, lean: bool, batch: str) -> None:
    model, prompt = tiny(cycles=3), tokens(1, 3)
    mask = torch.ones_like(prompt)
    if batch == "padded":
        prompt = torch.cat([prompt, tokens(1, 3, seed=1)])
        mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    how: dict[str, Any] = {"custom_generate": decoder(model)} if lean else {}
    with pytest.raises(ZerodraftError, match=r"The exit rule gave .* for 3 tokens: make it return"):
        model.generate(
            prompt, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0,
            exit_rule=lambda out: answer, **how,
        )  # fmt: skip
    if batch == "one":
        with pytest.raises(ZerodraftError, match="The exit rule gave"):
            DepthBatch(model, rows=1, slots=8, exit_rule=lambda out: answer).run(
                [DepthRequest(prompt=prompt[0].tolist(), max_new_tokens=2)]
            )
