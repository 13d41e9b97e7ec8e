"""Distillation data: a target's own completions, greedy and sampled, batch by batch, each batch published whole.

Everything is planned first, as a function of the prompts and the settings: which batch a prompt is in, at which
temperature, from which seed. So a run that was killed goes on with the batches that are missing and ends with the same
files as one that was not. The format on disk is that of `completions`; `manifest.json` says where it all came from.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import read_json, user_path
from zerodraft.common.lock import LOCK, locked
from zerodraft.common.outputs import remove_partials, write_json
from zerodraft.training.drafters.completions import Completion, read_shard, write_shard
from zerodraft.training.prompts import Prompt, PromptEncoder, fingerprint

MANIFEST = "manifest.json"

SMALLEST_TEMPERATURE = 1e-4
"""Logits over smaller ones are infinite; 0 is greedy."""

INVENTED_TOKENS = 192
"""Longest prompt that the target may invent."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DistillSettings:
    """How the target writes."""

    greedy: float = 0.5
    """Share of the completions that are greedy; the others are sampled."""
    temperatures: tuple[float, ...] = (0.7, 1.0)
    """Temperatures of the sampled ones, in equal shares."""
    top_k: int = 64
    """Sample from this many of the most probable tokens; 0: all."""
    top_p: float = 0.95
    """Sample from the most probable tokens that together have this probability."""
    max_new_tokens: int = 256
    """Longest completion."""
    max_prompt_tokens: int = 512
    """Skip longer prompts."""
    invent: int = 0
    """Let the target invent about this many prompts."""
    batch_size: int = 32
    """Completions written at once."""
    seed: int = 0
    """Random seed."""

    def __post_init__(self) -> None:
        if not 0 <= self.greedy <= 1:
            raise ZerodraftError(f"--greedy is {self.greedy}; it is a share between 0 and 1")
        if not self.temperatures or not all(SMALLEST_TEMPERATURE <= t < math.inf for t in self.temperatures):
            raise ZerodraftError(
                f"--temperatures is {self.temperatures}; expected numbers from {SMALLEST_TEMPERATURE} up (see --greedy)"
            )
        if not 0 < self.top_p <= 1:
            raise ZerodraftError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")
        least = {"top_k": 0, "max_new_tokens": 1, "max_prompt_tokens": 1, "invent": 0, "batch_size": 1, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ZerodraftError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {bound}"
                )


@runtime_checkable
class Writer(Protocol):
    """A language model that continues a batch of prompts."""

    vocab_size: int
    context: int | None
    eos_ids: frozenset[int]

    def write(
        self, prompts: Sequence[Sequence[int]], settings: DistillSettings, *, temperature: float, limit: int, seed: int
    ) -> list[list[int]]:
        """Up to `limit` tokens after each prompt, the end-of-text token included; greedy at temperature 0."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """What is written at once: some prompts (by index), or `invent` prompts that are yet to be thought of."""

    number: int
    prompts: tuple[int, ...]
    invent: int
    temperature: float

    @property
    def name(self) -> str:
        """Of its shard."""
        return f"{self.number:06d}"


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """What `on_batch` is told: batches finished and in all, and what this run wrote in how many seconds."""

    batches: int
    total: int
    tokens: int
    seconds: float


def plan(lengths: Sequence[int], settings: DistillSettings) -> list[Batch]:
    """The batches in the order in which they are written.

    Prompts of one temperature and about one length go together, so that little is padded; the batches are shuffled, so
    that any part of the whole is a fair sample of it.
    """
    draw = np.random.default_rng(settings.seed)

    def temperatures(count: int) -> np.ndarray:
        sampled = draw.choice(np.array(settings.temperatures), count)
        return np.where(draw.random(count) < settings.greedy, 0.0, sampled)

    size, groups = settings.batch_size, []
    chosen = temperatures(len(lengths))
    for temperature in sorted(set(chosen.tolist())):
        members = np.flatnonzero(chosen == temperature)
        members = members[np.argsort(np.asarray(lengths)[members], kind="stable")].tolist()
        groups += [(tuple(members[i : i + size]), 0, temperature) for i in range(0, len(members), size)]
    counts = [min(size, settings.invent - i) for i in range(0, settings.invent, size)]
    groups += [((), count, t) for count, t in zip(counts, temperatures(len(counts)).tolist(), strict=True)]
    return [Batch(number, *groups[i]) for number, i in enumerate(draw.permutation(len(groups)).tolist())]


def distill(
    writer: Writer,
    encoder: PromptEncoder,
    prompts: Sequence[Prompt],
    out: str | os.PathLike[str],
    settings: DistillSettings,
    *,
    target: dict[str, Any],
    provenance: dict[str, Any] | None = None,
    on_batch: Callable[[Done], None] = lambda done: None,
) -> dict[str, Any]:
    """Write completions of all prompts into `out`, or those that are missing there.

    Args:
        writer: The target.
        encoder: Makes tokens of prompts.
        prompts: What it is asked; more of them are invented if the settings say so.
        out: New directory, or one that an earlier call with the same arguments left behind.
        settings: How it writes.
        target: What identifies the target, for the manifest; a directory with completions of another is refused.
        provenance: Further things worth knowing later (versions, command), for the manifest.
        on_batch: Called after each batch.

    Returns:
        The manifest.

    Raises:
        ZerodraftError: nothing to do, `out` holds something else or is being written to, or the disk is full.
    """
    room = settings.max_prompt_tokens
    if writer.context is not None:
        room = min(room, writer.context - settings.max_new_tokens)
    encoded = [(ids, prompt.source) for prompt in prompts if 0 < len(ids := encoder(prompt.text)) <= room]
    if not encoded and not settings.invent:
        raise ZerodraftError(
            f"None of the {len(prompts)} prompts fits into the {room} tokens that --max-prompt-tokens and the target's "
            "context leave for it."
        )
    turn = encoder.user_turn() if settings.invent else []
    largest = max((max(ids) for ids, _ in encoded if ids), default=-1)
    if largest >= writer.vocab_size:
        raise ZerodraftError(
            f"The prompts hold token {largest}, but the target's vocabulary has {writer.vocab_size}: take that token "
            "out, or the tokenizer that belongs to the target."
        )
    made_with = {
        "target": target,
        "chat": encoder.chat,
        "settings": dataclasses.asdict(settings) | {"temperatures": list(settings.temperatures)},
        "prompts": {"count": len(prompts), "used": len(encoded), "sha256": fingerprint(prompts)},
    }
    manifest = {"format": 1, "made_with": made_with, **(provenance or {}), "finished": False}
    folder, batches = user_path(out), plan([len(ids) for ids, _ in encoded], settings)
    with _claimed(folder):
        _check_same(folder, made_with)
        _write_manifest(folder, manifest)
        missing = [batch for batch in batches if not (folder / f"{batch.name}.jsonl").is_file()]
        started, tokens = time.perf_counter(), 0
        for count, batch in enumerate(missing, len(batches) - len(missing) + 1):
            rows = _complete(writer, encoder, encoded, turn, batch, settings, room)
            with _kept(folder):
                write_shard(folder, batch.name, rows, writer.vocab_size)
            tokens += sum(len(row.tokens) - row.prompt_length for row in rows)
            on_batch(Done(count, len(batches), tokens, time.perf_counter() - started))
        manifest |= {"finished": True, **_totals(folder, batches)}
        _write_manifest(folder, manifest)
    return manifest


def _complete(
    writer: Writer,
    encoder: PromptEncoder,
    encoded: Sequence[tuple[list[int], str]],
    turn: list[int],
    batch: Batch,
    settings: DistillSettings,
    room: int,
) -> list[Completion]:
    """The sequences of one batch: a function of its arguments alone."""
    seeds = np.random.SeedSequence([settings.seed, batch.number]).generate_state(2).tolist()
    rows = [encoded[index] for index in batch.prompts]
    if batch.invent:
        limit = max(1, min(INVENTED_TOKENS, room - len(turn)))
        spoken = writer.write([turn] * batch.invent, settings, temperature=1.0, limit=limit, seed=seeds[0])
        # a turn that was cut off is no question
        whole = (ids for ids in spoken if ids and ids[-1] in writer.eos_ids)
        texts = dict.fromkeys(encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in whole)
        rows = [(ids, "invented") for text in texts if text and len(ids := encoder(text)) <= room]
    if not rows:
        return []
    prompts = [ids for ids, _ in rows]
    written = writer.write(
        prompts, settings, temperature=batch.temperature, limit=settings.max_new_tokens, seed=seeds[1]
    )
    return [
        Completion([*ids, *completion], len(ids), batch.temperature, source)
        for (ids, source), completion in zip(rows, written, strict=True)
    ]


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The directory, made if need be, held against other processes; what killed ones left half-written is removed."""
    if not (folder / MANIFEST).is_file() and not (folder / LOCK).is_file() and _holds_anything(folder):
        raise ZerodraftError(f"'{folder}' holds other files: name a new directory for the completions.")
    with locked(folder, f"Another process is writing completions into '{folder}'."):
        remove_partials(folder)
        yield


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Around what is written into the directory."""
    try:
        yield
    except OSError as error:
        raise ZerodraftError(
            f"'{folder}' could not be written ({error.strerror or error}): make room and run the same command again; "
            "finished work is kept."
        ) from error


def _holds_anything(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _check_same(folder: Path, made_with: dict[str, Any]) -> None:
    """A directory holds the completions of one target, one set of prompts and one set of settings."""
    if not (folder / MANIFEST).is_file():
        return
    try:
        before = read_json(folder / MANIFEST, "manifest")["made_with"]
        known = {**before["settings"], **{key: before[key] for key in before if key != "settings"}}
    except (KeyError, TypeError, AttributeError) as error:
        raise ZerodraftError(f"'{folder / MANIFEST}' is not a completions manifest: name a new directory.") from error
    now = {**made_with["settings"], **{key: made_with[key] for key in made_with if key != "settings"}}
    if changed := [key for key in now if known.get(key) != now[key]]:
        raise ZerodraftError(
            f"'{folder}' holds completions that were made with other {', '.join(changed)}: give the same arguments "
            "again to continue it, or name a new directory."
        )


def _totals(folder: Path, batches: Sequence[Batch]) -> dict[str, int]:
    shards = [read_shard(folder / f"{batch.name}.jsonl") for batch in batches]
    tokens = sum(int(shard.lengths.sum()) for shard in shards)
    return {
        "sequences": sum(len(shard.lengths) for shard in shards),
        "tokens": tokens,
        "completion_tokens": tokens - sum(int(shard.prompt_lengths.sum()) for shard in shards),
    }


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with _kept(folder):
        write_json(folder / MANIFEST, manifest, indent=1)
