"""The methods that are measured against each other, each behind one call: a prompt in, new token ids out.

Ours is a table of variations of the decoder that the commands use (`make_decoder`): a new one is one line. The others
are transformers' own ways of decoding, and llama.cpp.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from zerodraft.cli.decoding import make_decoder
from zerodraft.decoding.huggingface import DiffuSpec
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.search import SearchConfig
from zerodraft.decoding.stats import DecodeStats
from zerodraft.drafters.block import BlockDrafter
from zerodraft.drafters.dflash import DFlashDrafter
from zerodraft.drafters.lookup import PromptLookupDrafter
from zerodraft.drafters.masked import MaskedDrafter
from zerodraft.errors import ZerodraftError
from zerodraft.training.strict import did_you_mean

BASE = "hf_plain"
"""What all others are compared with."""
FULL = "full"
OWN_PLAIN = "plain"
LOOKUP_TOKENS = 10
"""Tokens that transformers' prompt lookup proposes."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """New ids of each row, how long they took, the target's passes after the prompt's, and what a decoder of ours
    tells about itself."""

    tokens: list[list[int]]
    seconds: float
    passes: int | None = None
    stats: DecodeStats | None = None


@runtime_checkable
class Method(Protocol):
    """One way of decoding.

    `about` says what it is, for the report; `ours` whether it is a decoder of this package; `exact` whether its greedy
    tokens ought to be those of plain decoding.
    """

    @property
    def about(self) -> str: ...

    @property
    def ours(self) -> bool: ...

    @property
    def exact(self) -> bool: ...

    def decode(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Decoded:
        """Continue prompts (`input_ids` and `attention_mask`); `options` are those of `generate`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Equipment:
    """What there is to decode with.

    Attributes:
        model: The target.
        drafter: Ours.
        ngram: A table for the path search.
        assistant: A small causal model with the target's tokenizer.
        dflash: A drafter in transformers' DFlash format.
        gguf: The target for llama.cpp, in one or several precisions.
        threads: Of llama.cpp.
    """

    model: Any
    drafter: Any
    ngram: str = ""
    assistant: Any = None
    dflash: Any = None
    gguf: Sequence[str] = ()
    threads: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Variation:
    """A change of the decoder that the commands use.

    Attributes:
        about: What it is, in a few words.
        options: For `make_decoder`.
        drafter: Takes the place of the drafter at hand.
        settings: Attributes of the `DiffuSpec` to set, given its drafter.
        fits: Whether it makes sense with a drafter.
    """

    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    drafter: Callable[[], Any] | None = None
    settings: Callable[[Any], dict[str, Any]] = lambda drafter: {}
    fits: Callable[[Any], bool] = lambda drafter: True


class NoDrafter:
    """Drafts nothing: our engine's plain decoding."""

    taps: Sequence[int] = ()
    max_length = 1

    def check(self, config: Any) -> None:
        """Fits every target."""

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "NoDrafter":
        """Has no state."""
        return self

    def observe(self, progress: Any) -> None:
        """Learns nothing."""

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        """Nothing, for every row."""
        return [Lattice.empty() for _ in lengths]


def is_block(drafter: Any) -> bool:
    """Whether it fills several positions at once."""
    return isinstance(drafter, (BlockDrafter, DFlashDrafter, MaskedDrafter))


def is_model(drafter: Any) -> bool:
    """Drafts with a network, so that copies can be joined to its drafts."""
    return not isinstance(drafter, PromptLookupDrafter)


def fixed(length: int | None = None, **settings: Any) -> Callable[[Any], dict[str, Any]]:
    """Drafts of one length; None: the drafter's most."""
    return lambda drafter: {"length": FixedLength(drafter.max_length if length is None else length), **settings}


ALONE = {"hybrid": False}
FIRST = SearchConfig(m_max=1)
BEST_15 = SearchConfig(tau=0.95, m_max=8, expand="best_first", budget=15)

OURS = {
    OWN_PLAIN: Variation(about="our engine, no drafts", options=ALONE, drafter=lambda: NoDrafter(), settings=fixed(0)),
    FULL: Variation(about="the command line's decoder, all parts"),
    "no_cps": Variation(about="full, no path search: likeliest candidates", options={"search": False}),
    "no_adl": Variation(about="full, drafts of fixed length", options={"adaptive": False}),
    "no_tree": Variation(about="full, the best path alone", options={"tree": False}),
    "no_hybrid": Variation(about="full, no copies from the text", options=ALONE, fits=is_model),
    "no_lean": Variation(about="full, the target run by transformers", options={"lean": False}),
    "lookup": Variation(about="prompt lookup of 8", options=ALONE, drafter=PromptLookupDrafter, settings=fixed(8)),
    "block_path": Variation(
        about="the block's likeliest tokens", options=ALONE, settings=fixed(search=FIRST, tree=False), fits=is_block
    ),
    "block_tree": Variation(
        about="the block's best-first tree of 15", options=ALONE, settings=fixed(search=BEST_15), fits=is_block
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
    ours: bool = True
    exact: bool = True

    def decode(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Decoded:
        """Through `generate`, as a user would."""
        found = _generate(self.model, inputs, {**options, "custom_generate": self.spec})
        stats = self.spec.last_stats
        assert stats is not None
        return Decoded(found.tokens, found.seconds, stats.steps, stats)


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


class LlamaCpp:
    """llama.cpp through its Python package, greedy."""

    ours = False
    exact = False
    PRECISIONS = {"0": "f32", "1": "f16", "2": "q4_0", "3": "q4_1", "7": "q8_0", "15": "q4_k_m", "32": "bf16"}

    def __init__(self, path: str, *, context: int, threads: int, eos_ids: frozenset[int]) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]  # optional

        if not Path(path).expanduser().is_file():
            raise ZerodraftError(f"--gguf: no file at '{path}'")
        self.llm = llama_cpp.Llama(
            model_path=str(Path(path).expanduser()),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        kind = str(self.llm.metadata.get("general.file_type"))
        self.precision = self.PRECISIONS.get(kind, f"type{kind}")
        same = self.precision == "f32"
        self.about = f"llama.cpp, {'equal precision (f32)' if same else f'quantised ({self.precision})'}"
        self.eos_ids = eos_ids

    def decode(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Decoded:
        """One row after another."""
        if options.get("do_sample"):
            raise ZerodraftError("llama.cpp is measured with greedy decoding only: leave it out of --methods")
        started, rows = time.perf_counter(), []
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            self.llm.reset()  # else the last call's prompt would count as read already
            tokens: list[int] = []
            for token in self.llm.generate(ids[mask.bool()].tolist(), temp=0.0, repeat_penalty=1.0):
                tokens.append(int(token))
                if token in self.eos_ids or len(tokens) == options["max_new_tokens"]:
                    break
            rows.append(tokens)
        return Decoded(rows, time.perf_counter() - started)


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
        options = {"assistant_model": equipment.assistant}
        found["hf_assisted"] = lambda: HuggingFace(model, "transformers, assisted by a small model", options)
    if equipment.dflash is not None:
        flash = {"assistant_model": equipment.dflash, "speculation_type": "dflash"}
        found["hf_dflash"] = lambda: HuggingFace(model, "transformers, DFlash with the exported drafter", flash)
    if importlib.util.find_spec("llama_cpp") is not None:
        for path in equipment.gguf:
            engine = LlamaCpp(path, context=4096, threads=equipment.threads, eos_ids=eos_ids(model))
            found[f"llama_cpp_{engine.precision}"] = lambda engine=engine: engine
    for name, variation in OURS.items():
        if variation.fits(equipment.drafter):
            found[name] = lambda variation=variation: Ours(model, decoder(equipment, variation), variation.about)
    return found


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
            }
            need = next((value for key, value in needs.items() if name.startswith(key)), None)
            hint = f" needs {need}" if need else f" is unknown{did_you_mean(name, found)}"
            raise ZerodraftError(f"--methods: '{name}'{hint}")
    return {name: found[name]() for name in dict.fromkeys([BASE, *wanted])}


def eos_ids(model: Any) -> frozenset[int]:
    """The tokens that end a text."""
    eos = model.generation_config.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or ())


def decoder(equipment: Equipment, variation: Variation) -> DiffuSpec:
    """The decoder of the commands, varied."""
    drafter = equipment.drafter if variation.drafter is None else variation.drafter()
    spec = make_decoder(equipment.model, drafter, ngram=equipment.ngram, trace=True, **variation.options)
    for name, value in variation.settings(drafter).items():
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
