"""Plain decoding against decoding with drafts, on random cases: model families, drafters and options of `generate`.

A case is made from one number, so whatever fails is had again by `run(draw(number))`. Greedy tokens must be equal but
for near ties: where they first differ, the written token's score must be within rounding of the best. Sampled tokens of
a single row must be equal for one seed, as both ways draw once for each token. What cannot be drafted must be told by a
`ZerodraftError` that is known here; any other exception is a failure.
"""

import copy
import random
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    FalconConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tests.decoding.drafters import NoisyDrafter
from tests.decoding.generating import letters
from tests.ztt.tiny import FAMILIES, SIZES, VOCABULARY, left_padded, randomise, tiny, tiny_plain
from zerodraft import (
    AutoregressiveDrafter,
    ContextProxy,
    CostAwareLength,
    CostAwareTree,
    DiffuSpec,
    FixedLength,
    HybridDrafter,
    PromptLookupDrafter,
    SearchConfig,
    ZerodraftError,
)
from zerodraft.drafters.block import BlockDrafter
from zerodraft.drafters.block_model import drafter_from_target
from zerodraft.drafters.masked import MaskedDrafter
from zerodraft.drafters.masked_model import masked_from_target
from zerodraft.models.caches import CACHE

MORE_FAMILIES: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "falcon": FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "phi": PhiConfig(**SIZES, partial_rotary_factor=0.5),
}
MODELS = [*FAMILIES, *MORE_FAMILIES, "ztt llama", "ztt qwen3", "ztt gpt2"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDING = {"float64": 1e-6, "float32": 2e-4, "bfloat16": 4e-2}
"""How far below the best a score may be, as a share of the largest, for its token to count as tied with the best."""
DRAFTERS = ["noisy", "noisy", "lookup", "autoregressive", "block", "masked", "hybrid"]
LENGTHS: dict[str, Any] = {
    "adaptive": lambda: None,
    "fixed": lambda: FixedLength(4),
    "long": lambda: FixedLength(9),
    "by cost": lambda: CostAwareLength(k_max=6),
    "tree by cost": lambda: CostAwareTree(k=5),
}
SEARCHES: dict[str, Any] = {
    "published": SearchConfig(),
    "best first": SearchConfig(expand="best_first", budget=9),
    "wide": SearchConfig(tau=1.0, beam=2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.6},
    "ngrams": {"no_repeat_ngram_size": 3},
    "bias": {"sequence_bias": [[[28], -2.0], [[5, 6], 4.0]]},
    "suppressed": {"suppress_tokens": [28, 32]},
    "bad words": {"bad_words_ids": [[17], [9, 11]]},
    "least": {"min_new_tokens": 5},
    "forced": {"forced_eos_token_id": 2},
    "decay": {"exponential_decay_length_penalty": (4, 1.3)},
    "prompt": {"encoder_no_repeat_ngram_size": 2},
}
CACHES: dict[str, dict[str, Any]] = {
    "chunks": {"prefill_chunk_size": 3},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "all": {"top_k": 0},
    "warm": {"temperature": 1.4, "top_k": 20},
    "nucleus": {"top_p": 0.8, "top_k": 0},
    "least share": {"min_p": 0.1, "temperature": 0.7},
}
REFUSALS = ["A block drafter takes its sizes from the target"]
"""What a case may be refused for: the beginning of its sentence."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """All that is random about a comparison."""

    number: int
    family: str
    dtype: str
    attention: str
    drafter: str
    own_forward: bool
    length: str
    search: str
    tree: bool
    proxy: bool
    draws_drafts: bool
    lengths: tuple[int, ...]
    padding: int
    new: int
    options: tuple[str, ...]
    eos: tuple[int, ...]
    sampling: str | None
    stops: bool
    own: str | None
    returns: bool
    cache: str | None


def draw(number: int) -> Case:
    """The case of a number."""
    dice = random.Random(number)
    rows = dice.choice([1, 1, 1, 2, 3])
    family = dice.choice(MODELS)
    sampling = dice.choice(sorted(SAMPLING)) if rows == 1 and dice.random() < 0.25 else None
    # experts have no kernel for doubles; a draw between two roundings is no tie that could be told
    dtypes = ["float32"] if family == "mixtral" else ["float64"] if sampling else list(DTYPES)
    dtype = dice.choices(dtypes, [4, 3, 1][: len(dtypes)])[0]
    eos = tuple(dice.sample(range(3, VOCABULARY), dice.choice([0, 1, 4])))
    own = dice.choice([None, None, None, "processor", "criterion", "both"])
    # without an EOS nothing decays; with two that forbid tokens none may be left
    idle = ({"forced"} if own in ("processor", "both") else set()) | (set() if eos else {"decay"})
    some = dice.sample(sorted(OPTIONS.keys() - idle), dice.choice([0, 0, 1, 1, 2]))
    if {"forced", "least"} <= set(some):
        some.remove("least")
    caches = [*[None] * 6, *CACHES, "own dynamic", "own bare", "own static", "own begun"]
    return Case(
        number=number,
        family=family,
        dtype=dtype,
        # transformers' own eager attention makes NaN of padding in doubles
        attention=dice.choice(["sdpa", "sdpa", "sdpa" if dtype == "float64" else "eager"]),
        drafter=dice.choice(DRAFTERS),
        own_forward=dice.random() < 0.5,
        length=dice.choice(sorted(LENGTHS)),
        search=dice.choice(sorted(SEARCHES)),
        tree=dice.random() < 0.7,
        proxy=dice.random() < 0.2,
        draws_drafts=dice.random() < 0.2,
        lengths=tuple(dice.randint(1, 14) for _ in range(rows)),
        padding=dice.choice([0, 0, 0, 2]),
        new=dice.randint(1, 26),
        options=tuple(some),
        eos=eos,
        sampling=sampling,
        stops=dice.random() < 0.15,
        own=own,
        returns=dice.random() < 0.3,
        cache=dice.choice(caches),
    )


class RowMemory(LogitsProcessor):
    """A processor that keeps a number for each row, moved on by the row's newest token at each call."""

    def __init__(self) -> None:
        self.state: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        newest = input_ids[:, -1].tolist()
        known = self.state or [0] * len(newest)
        self.state = [(state + token + 1) % 5 for state, token in zip(known, newest, strict=True)]
        scores = scores.clone()
        for row, state in enumerate(self.state):
            scores[row, torch.arange(scores.shape[1]) % 5 == state] = -torch.inf
        return scores


class RowsSeen(StoppingCriteria):
    """Stops all rows once each of them has written a token that a fifth of the vocabulary is."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.seen: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.seen |= {row for row, ids in enumerate(input_ids) if int(ids[-1]) % 5 == 0}
        return torch.full((len(input_ids),), len(self.seen) == len(input_ids))


@cache
def model_of(family: str, dtype: str, attention: str) -> Any:
    """A tiny random model; one of each kind is kept."""
    if family.startswith("ztt "):
        model = tiny(family[4:])
    elif family in FAMILIES:
        model = tiny_plain(family)
    else:
        torch.manual_seed(0)
        # the implementation is written into the configuration: each model has its own
        config = copy.deepcopy(MORE_FAMILIES[family])
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        randomise(model)
    model.to(DTYPES[dtype])
    if family not in MORE_FAMILIES:
        model.set_attn_implementation(attention)
    model.generation_config.pad_token_id = 0
    return model


def drafter_of(case: Case, model: Any, texts: list[list[int]]) -> Any:
    """The case's drafter; `texts` are the answers, for the one that knows them."""
    if case.drafter == "noisy":
        return NoisyDrafter(texts, VOCABULARY, right=0.8, seed=case.number, short=case.number % 2 == 0)
    if case.drafter == "lookup":
        return PromptLookupDrafter()
    if case.drafter == "autoregressive":
        small = model if case.number % 2 else tiny_plain("llama", num_hidden_layers=1)
        return AutoregressiveDrafter(small, max_length=5)
    torch.manual_seed(case.number)
    if case.drafter == "masked":
        return MaskedDrafter(masked_from_target(tiny_plain("qwen2"), 1, block_size=4), vocab_size=VOCABULARY)
    block = BlockDrafter(drafter_from_target(model, num_layers=1, block_size=4).eval(), model, candidates=6)
    return HybridDrafter(other=block) if case.drafter == "hybrid" else block


def generate_options(case: Case, start: int) -> dict[str, Any]:
    """Arguments of `generate`, made anew for each call since some of them remember."""
    options: dict[str, Any] = {
        "max_new_tokens": case.new,
        "do_sample": case.sampling is not None,
        "eos_token_id": list(case.eos) or None,
        "pad_token_id": 0,
        **(SAMPLING[case.sampling] if case.sampling else {}),
    }
    for name in case.options:
        options |= OPTIONS[name]
    options |= CACHES.get(case.cache or "", {})
    if case.stops:
        options |= {"stop_strings": [chr(33 + case.number % 40), chr(33 + 41)], "tokenizer": letters()}
    if case.own in ("processor", "both"):
        options["logits_processor"] = LogitsProcessorList([RowMemory()])
    if case.own in ("criterion", "both"):
        options["stopping_criteria"] = StoppingCriteriaList([RowsSeen(start)])
    if case.returns:
        options |= {"return_dict_in_generate": True, "output_scores": True}
    return options


def cache_of(case: Case, model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The caller's cache, if the case has one: empty, or with the beginning of the prompts in it."""
    if case.cache is None or case.cache in CACHES or model.config.model_type == "ztt":
        return {}
    if case.cache == "own static":
        return {CACHE: StaticCache(model.config, max_cache_len=96)}
    made = DynamicCache() if case.cache == "own bare" else DynamicCache(config=model.config)
    width = batch["input_ids"].shape[1]
    if case.cache == "own begun" and width > 2:
        begun = {name: value[:, : width - 2] for name, value in batch.items()}
        positions = (begun["attention_mask"].cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            model(**begun, position_ids=positions, **{CACHE: made})
    return {CACHE: made}


def run(case: Case) -> str:
    """Compare; says "same", "tied" or what the refusal was. Raises `AssertionError` for what must not be."""
    model = model_of(case.family, case.dtype, case.attention)
    dice = torch.Generator().manual_seed(case.number)
    # a few tokens again and again, so that lookups find something
    few = torch.randperm(VOCABULARY - 3, generator=dice)[:6] + 3
    rows = [few[torch.randint(6, (n,), generator=dice)] for n in case.lengths]
    batch = {name: value for name, value in left_padded(rows).items() if name != "position_ids"}
    if case.padding:
        batch = {name: torch.nn.functional.pad(value, (case.padding, 0)) for name, value in batch.items()}
    width = batch["input_ids"].shape[1]

    def decode(**more: Any) -> Any:
        torch.manual_seed(case.number)
        caches = cache_of(case, model, batch)
        return model.generate(**batch, **generate_options(case, width), **caches, **more)

    oracle = decode(**({} if case.returns else {"return_dict_in_generate": True, "output_scores": True}))
    texts = [
        row[int((mask == 0).sum()) :].tolist()
        for row, mask in zip(oracle.sequences, batch["attention_mask"], strict=True)
    ]
    try:
        spec = DiffuSpec(
            drafter_of(case, model, texts),
            make_target=None if case.own_forward else "auto",
            length=LENGTHS[case.length](),
            search=SEARCHES[case.search],
            tree=case.tree,
            proxy=ContextProxy(VOCABULARY) if case.proxy else None,
            # a drafted token that was drawn takes other dice
            sample_drafts=case.draws_drafts and case.sampling is None,
        )
        ours = decode(custom_generate=spec)
    except ZerodraftError as error:
        sentence = str(error)
        assert sentence.startswith(tuple(REFUSALS)), f"refused: {sentence}\n{case}"
        return f"refused: {sentence}"
    written = ours if isinstance(ours, Tensor) else ours.sequences
    return compare(case, oracle, written, width)


def compare(case: Case, oracle: Any, written: Tensor, width: int) -> str:
    """Row by row up to the first difference, which must be a tie."""
    expected = oracle.sequences
    if torch.equal(expected, written):
        return "same"
    length = min(expected.shape[1], written.shape[1])
    first: dict[int, int] = {}
    for row, column in (expected[:, :length] != written[:, :length]).nonzero().tolist():
        first.setdefault(row, column)
    # a tie may end a text elsewhere; without one nothing may
    assert first, describe(case, expected, written, "the lengths differ")
    for row, at in first.items():
        if case.own and at > min(first.values()):
            continue  # what remembers the batch makes other rows of a tie in one
        scores = oracle.scores[at - width][row]
        best, own = scores[expected[row, at]], scores[written[row, at]]
        slack = ROUNDING[case.dtype] * float(scores[scores.isfinite()].abs().max())
        told = describe(case, expected, written, f"row {row} differs at {at}: {best} and {own}")
        assert case.sampling is None, told
        assert best - own <= slack, told
    return "tied"


def describe(case: Case, expected: Tensor, written: Tensor, what: str) -> str:
    fields = ", ".join(f"{name}={value!r}" for name, value in asdict(case).items())
    return f"{what}\nCase({fields})\nplain {expected.tolist()}\nours  {written.tolist()}"
