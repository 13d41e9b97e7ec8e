"""The methods that are measured against each other, each behind one call: a prompt in, new token ids out.

Ours is a table of variations of `zerodraft.decoder`: a new one is one line. A looped model has more of them, and the
rules by which its tokens leave early (`looped`). The others are transformers' own ways of decoding, and llama.cpp.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from zerodraft.bench.decoded import Decoded, Method
from zerodraft.bench.llama_cpp import LlamaCpp
from zerodraft.common.errors import ZerodraftError, did_you_mean
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.lengths import CostAwareLength, FixedLength
from zerodraft.decoding.protocols import Target, join
from zerodraft.decoding.search import SearchConfig
from zerodraft.drafters.block import BlockDrafter
from zerodraft.drafters.dflash import DFlashDrafter
from zerodraft.drafters.lookup import PromptLookupDrafter
from zerodraft.drafters.masked import MaskedDrafter
from zerodraft.drafters.none import NoDrafter
from zerodraft.drafters.own import SelfDrafter
from zerodraft.generate import decoder as door
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.models.loading import eos_ids
from zerodraft.ztt.exits import ExitRule, exit_rule_to_dict
from zerodraft.ztt.rules import RULES, rule_text

BASE = "hf_plain"
"""What all others are compared with."""
FULL = "full"
OWN_PLAIN = "plain"
SELF = "self:"
LOOKUP_TOKENS = 10
"""Tokens that transformers' prompt lookup proposes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Equipment:
    """What there is to decode with.

    Attributes:
        model: The target.
        drafter: Ours.
        ngram: A table for the path search.
        assistant: A small causal model.
        tokenizers: The target's and the assistant's.
        dflash: A drafter in transformers' DFlash format.
        gguf: The target for llama.cpp, in one or several precisions.
        threads: Of llama.cpp.
        rules: By which a looped model's tokens leave early, by the method's name.
    """

    model: Any
    drafter: Any
    ngram: str = ""
    assistant: Any = None
    tokenizers: tuple[Any, Any] = (None, None)
    dflash: Any = None
    gguf: Sequence[str] = ()
    threads: int = 1
    rules: Mapping[str, ExitRule] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variation:
    """A change of the decoder that the commands use.

    Attributes:
        about: What it is, in a few words.
        drafter: Takes the place of the drafter at hand.
        hybrid: Copies from the text join its drafts.
        settings: Attributes of the `DiffuSpec` to set, given the most positions of its drafts.
        fits: Whether it makes sense with a drafter.
    """

    about: str
    drafter: Callable[[], Any] | None = None
    hybrid: bool = True
    settings: Callable[[int], dict[str, Any]] = lambda longest: {}
    fits: Callable[[Any], bool] = lambda drafter: True


class Watched:
    """A drafter that remembers in which steps it was asked for anything, row by row."""

    def __init__(self, drafter: Any) -> None:
        self.drafter, self.taps, self.max_length = drafter, drafter.taps, drafter.max_length
        self.asked: dict[int, list[bool]] = {}
        self.spec: DiffuSpec | None = None
        """The decoder that asks, which counts the steps."""

    def check(self, config: Any) -> None:
        """As the drafter says."""
        self.drafter.check(config)

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "WatchedSession":
        """Forgets the call before."""
        self.asked = {}
        return WatchedSession(self.drafter.start(batch, device, generator), self)

    def note(self, lengths: Sequence[int]) -> None:
        """Something is asked in the step that comes."""
        assert self.spec is not None
        assert self.spec.last_stats is not None
        self.asked[self.spec.last_stats.steps] = [length > 0 for length in lengths]


class WatchedSession:
    """Tells when it is asked."""

    def __init__(self, session: Any, watched: Watched) -> None:
        self.session, self.watched = session, watched

    def join(self, target: Target) -> None:
        """As the drafter does."""
        join(self.session, target)

    def observe(self, progress: Sequence[Any]) -> None:
        """As the drafter does."""
        self.session.observe(progress)

    def propose(self, lengths: Sequence[int]) -> Sequence[Lattice]:
        """It is asked."""
        self.watched.note(lengths)
        return self.session.propose(lengths)

    def rewind(self, row: int, length: int) -> None:
        """As the drafter does."""
        self.session.rewind(row, length)


def is_block(drafter: Any) -> bool:
    """Whether it fills several positions at once."""
    return isinstance(drafter, (BlockDrafter, DFlashDrafter, MaskedDrafter))


def is_model(drafter: Any) -> bool:
    """Drafts with a network, so that copies can be joined to its drafts."""
    return not isinstance(drafter, PromptLookupDrafter)


def fixed(length: int | None = None, **settings: Any) -> Callable[[int], dict[str, Any]]:
    """Drafts of one length, in every step; None: the drafter's most."""
    return lambda longest: {"length": FixedLength(longest if length is None else length), "fallback": None, **settings}


def by_cost(**settings: Any) -> Callable[[int], dict[str, Any]]:
    """Drafts of the length that pays by measured costs, which are verified as a whole."""
    return lambda longest: {"length": CostAwareLength(k_max=longest), **settings}


FIRST = SearchConfig(m_max=1)
BEST_15 = SearchConfig(tau=0.95, m_max=8, expand="best_first", budget=15)

OURS = {
    OWN_PLAIN: Variation(about="our engine, no drafts", hybrid=False, drafter=NoDrafter, settings=fixed(0)),
    FULL: Variation(about="the command line's decoder, all parts"),
    "no_cps": Variation(about="full, no path search: likeliest candidates", settings=by_cost(search=FIRST)),
    "no_adl": Variation(about="full, drafts of fixed length", settings=fixed()),
    "no_tree": Variation(about="full, the best path alone", settings=by_cost(search=SearchConfig(), tree=False)),
    "no_hybrid": Variation(about="full, no copies from the text", hybrid=False, fits=is_model),
    "no_lean": Variation(about="full, the target run by transformers", settings=lambda longest: {"make_target": None}),
    "lookup": Variation(about="prompt lookup of 8", hybrid=False, drafter=PromptLookupDrafter, settings=fixed(8)),
    "block_path": Variation(
        about="the block's likeliest tokens", hybrid=False, settings=fixed(search=FIRST, tree=False), fits=is_block
    ),
    "block_tree": Variation(
        about="the block's best-first tree of 15", hybrid=False, settings=fixed(search=BEST_15), fits=is_block
    ),
}
"""Our methods by name."""

PARTS = ("no_cps", "no_adl", "no_tree", "no_hybrid", "no_lean")
"""Full with one part taken away."""

EXTRA = ("lookup", "block_path", "block_tree")
"""Measured only when asked for."""


@dataclass(slots=True)
class Ours:
    """A variation at work; the decoder is kept, so that its controller learns from prompt to prompt."""

    model: Any
    spec: DiffuSpec
    about: str
    watched: Watched | None = None
    ours: bool = True
    exact: bool = True

    def decode(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Decoded:
        """Through `generate`, as a user would."""
        found = _generate(self.model, inputs, {**options, "custom_generate": self.spec})
        stats = self.spec.last_stats
        assert stats is not None
        return Decoded(found.tokens, found.seconds, stats.steps, stats, self.watched.asked if self.watched else {})


@dataclass(slots=True, kw_only=True)
class Exits(Ours):
    """Our engine without drafts, from whose cycles tokens leave by a rule: lossy, so it is told how often it agrees."""

    rule: ExitRule
    exact: bool = False

    def decode(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Decoded:
        """With the cycles behind each token: those of the position before it."""
        found = Ours.decode(self, inputs, {**options, "exit_rule": self.rule})
        behind = self.model.last_exit[:, inputs["input_ids"].shape[1] - 1 :].tolist()
        depths = [row[: len(tokens)] for row, tokens in zip(behind, found.tokens, strict=True)]
        return replace(found, depths=depths)

    def agreeing(self, inputs: Mapping[str, Any], tokens: list[int]) -> int:
        """Of tokens that were chosen at full depth, how many are chosen with exits, each after the same text."""
        prompt = inputs["input_ids"]
        ids = torch.cat([prompt, prompt.new_tensor([tokens[:-1]])], 1)
        with torch.no_grad():
            logits = self.model(input_ids=ids, exit_rule=self.rule, logits_to_keep=len(tokens)).logits
        return int((logits[0].argmax(-1) == prompt.new_tensor(tokens)).sum())


@dataclass(slots=True)
class HuggingFace:
    """transformers' own `generate`, with passes of the target counted."""

    model: Any
    about: str
    options: dict[str, Any] = field(default_factory=dict)
    ours: bool = False
    exact: bool = True

    def decode(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Decoded:
        """One call."""
        passes = 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        hook = self.model.register_forward_pre_hook(count)
        try:
            found = _generate(self.model, inputs, {**options, **self.options})
        finally:
            hook.remove()
        return Decoded(found.tokens, found.seconds, passes - 1)


def available(equipment: Equipment) -> dict[str, Callable[[], Method]]:
    """All methods that this equipment allows, made when asked for, in the order of a report."""
    model = equipment.model
    found: dict[str, Callable[[], Method]] = {
        BASE: lambda: HuggingFace(model, "transformers, plain"),
        "hf_lookup": lambda: HuggingFace(
            model, f"transformers, prompt lookup of {LOOKUP_TOKENS}", {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        ),
    }
    if equipment.assistant is not None:
        options = {"assistant_model": equipment.assistant, **through_text(equipment)}
        found["hf_assisted"] = lambda: HuggingFace(model, "transformers, assisted by a small model", options)
    if equipment.dflash is not None:
        flash = {"assistant_model": equipment.dflash, "speculation_type": "dflash"}
        found["hf_dflash"] = lambda: HuggingFace(model, "transformers, DFlash with the exported drafter", flash)
    if importlib.util.find_spec("llama_cpp") is not None:
        for path in equipment.gguf:
            engine = LlamaCpp(path, context=4096, threads=equipment.threads, eos_ids=eos_ids(model))
            found[f"llama_cpp_{engine.precision}"] = lambda engine=engine: engine
    for name, variation in (OURS | by_itself(model)).items():
        if variation.fits(equipment.drafter):
            found[name] = lambda variation=variation: ours(equipment, variation)
    for name, rule in equipment.rules.items():
        found[name] = lambda name=name, rule=rule: exits(equipment, name, rule)
    return found


def by_itself(model: Any) -> dict[str, Variation]:
    """A looped model drafts with each number of its cycles but all."""
    return {
        f"{SELF}{cycles}": Variation(
            about=f"drafts by its first {cycles} of {cycles_of(model)} cycles",
            hybrid=False,
            drafter=partial(SelfDrafter, model, cycles=cycles),
        )
        for cycles in range(1, cycles_of(model))
    }


def cycles_of(model: Any) -> int:
    """After how many cycles at most a token leaves; 1 for what is no looped model, or has no exits."""
    config = model.config
    return config.cycles if config.model_type == "ztt" and config.schedule == "block" else 1


def writes_the_same(name: str) -> bool:
    """Whether this is a decoder of ours whose greedy tokens ought to be those of plain decoding."""
    return name in OURS or name.startswith(SELF)


def through_text(equipment: Equipment) -> dict[str, Any]:
    """What transformers' assisted decoding wants where the assistant has another vocabulary."""
    own, other = (model.config.get_text_config().vocab_size for model in (equipment.model, equipment.assistant))
    if own == other:
        return {}
    return dict(zip(("tokenizer", "assistant_tokenizer"), equipment.tokenizers, strict=True))


def choose(names: Sequence[str], found: Mapping[str, Callable[[], Method]]) -> dict[str, Method]:
    """The methods of these names, the base first; without names all but the extra ones.

    Raises:
        ZerodraftError: a name that is unknown, or of a method that needs something that was not given.
    """
    wanted = list(names) or [name for name in found if name not in EXTRA]
    for name in names:
        if name not in found:
            needs = {
                "hf_assisted": "--assistant",
                "hf_dflash": "--dflash",
                "llama_cpp": "--gguf and the package llama-cpp-python",
                "no_hybrid": "a drafter other than lookup",
                "block_path": "a block drafter",
                "block_tree": "a block drafter",
                SELF: "a looped model of more cycles as the target",
                "calibrated": "a looped model with a calibrated exit rule as the target",
                **dict.fromkeys(RULES, "a looped model as the target, and the threshold in this form: latent:0.3"),
            }
            need = next((value for key, value in needs.items() if name.startswith(key)), None)
            hint = f" needs {need}" if need else f" is unknown{did_you_mean(name, found)}"
            raise ZerodraftError(f"--methods: '{name}'{hint}")
    return {name: found[name]() for name in dict.fromkeys([BASE, *wanted])}


def ours(equipment: Equipment, variation: Variation) -> Ours:
    """A variation of the decoder, at work."""
    drafter = equipment.drafter if variation.drafter is None else variation.drafter()
    watched = Watched(drafter) if is_model(drafter) and not isinstance(drafter, NoDrafter) else None
    spec = decoder(equipment, variation, watched or drafter)
    if watched is not None:
        watched.spec = spec
    return Ours(equipment.model, spec, variation.about, watched)


def exits(equipment: Equipment, name: str, rule: ExitRule) -> Exits:
    """Decoding with a rule, at work."""
    spec = decoder(equipment, OURS[OWN_PLAIN], NoDrafter())
    written = rule_text(exit_rule_to_dict(rule))
    return Exits(equipment.model, spec, "exits" if written == name else f"exits, {written}", rule=rule)


def decoder(equipment: Equipment, variation: Variation, drafter: Any) -> DiffuSpec:
    """The decoder of the commands, varied."""
    spec = door.decoder(equipment.model, drafter, ngram=equipment.ngram, hybrid=variation.hybrid, trace=True)
    for name, value in variation.settings(spec.drafter.max_length).items():
        setattr(spec, name, value)
    return spec


def _generate(model: Any, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Decoded:
    start, ends = inputs["input_ids"].shape[1], eos_ids(model)
    began = time.perf_counter()
    out = model.generate(**inputs, **options)
    seconds = time.perf_counter() - began
    return Decoded([_until_end(row, ends) for row in out[:, start:].tolist()], seconds)


def _until_end(row: list[int], ends: frozenset[int]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
