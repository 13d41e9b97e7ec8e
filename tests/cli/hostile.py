"""Damages files and runs a command over each damaged copy: what is read is used, or refused with one sentence.

For the tests of hostile files. `ZERODRAFT_FUZZ_MINUTES=10 pytest tests/cli/test_hostile_files.py -m fuzz` goes on for
ten minutes, from the seed `ZERODRAFT_FUZZ_START` on, with the kinds that `ZERODRAFT_FUZZ_KINDS` names (by commas)
alone.
"""

import json
import logging
import math
import os
import random
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from zerodraft.cli.main import main

MINUTES = os.environ.get("ZERODRAFT_FUZZ_MINUTES")
LONGEST = 60
"""Seconds that a command may take."""

HARM = "harm"
"""The file that code out of a damaged file would write, where a reader ran it."""

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 1.5, -0.5, 1e300, float("nan"), float("inf"), 10**6, 10**12, 2**63, 10**30, "",
    "x", "\x00", "\ud83d", "a\x1b[31mb", "[/red]", "../..", "x" * 5000, [], [0], [-1], [10**9], ["x"], [None], [[]],
    [1] * 50, {}, {"x": 1}, {"rope_type": "x"}, {"rope_type": "yarn"}, "nan", "float16", "bfloat16", "gpt2", "llama",
    "ztt", [{"x": []}],
)  # fmt: skip
"""Values of all kinds; most are wrong for any field."""

EXTRA = {
    "config.json": (
        "quantization_config", "auto_map", "sliding_window", "layer_types", "torch_dtype", "dtype", "rope_scaling",
        "attn_implementation", "_attn_implementation", "num_labels", "id2label", "pruned_heads", "architectures",
        "is_encoder_decoder", "use_cache", "tie_word_embeddings", "exit_rule", "return_dict", "output_attentions",
    ),
    "generation_config.json": (
        "num_beams", "stop_strings", "return_dict_in_generate", "max_length", "min_length", "top_k", "temperature",
        "top_p", "repetition_penalty", "bad_words_ids", "suppress_tokens", "sequence_bias", "cache_implementation",
        "penalty_alpha", "no_repeat_ngram_size", "forced_eos_token_id", "exponential_decay_length_penalty",
        "watermarking_config", "guidance_scale", "custom_generate", "num_return_sequences", "max_time",
        "begin_suppress_tokens", "dola_layers", "output_scores", "token_healing", "constraints", "eta_cutoff",
        "typical_p", "min_p", "compile_config", "use_cache",
    ),
    "tokenizer_config.json": (
        "model_max_length", "padding_side", "truncation_side", "added_tokens_decoder", "tokenizer_class",
        "chat_template", "model_input_names", "clean_up_tokenization_spaces", "extra_special_tokens", "auto_map",
        "bos_token", "unk_token", "additional_special_tokens", "add_bos_token", "add_prefix_space",
        "split_special_tokens", "legacy",
    ),
}  # fmt: skip
"""Fields that the files need not have, by file."""

THEIR_WARNINGS = pytest.mark.filterwarnings("ignore")
"""Other libraries warn about odd values in more ways than can be listed; here it counts how a command ends."""

SHORT_AND_LONG = pytest.mark.parametrize(
    "long",
    [
        pytest.param(False, id="short"),
        pytest.param(
            True,
            id="long",
            marks=[
                pytest.mark.fuzz,
                pytest.mark.timeout(0),
                pytest.mark.skipif(MINUTES is None, reason="as long as ZERODRAFT_FUZZ_MINUTES says"),
            ],
        ),
    ],
)
"""For a test that hands `long` on to `damage_and_run`."""

logger = logging.getLogger(__name__)

Change = Callable[[random.Random, Path], str]
"""Damages a file and says how."""


@dataclass(frozen=True)
class Kind:
    """Some files of one kind: what is done to one of them, and the commands that then run."""

    files: tuple[str, ...]
    change: Change
    commands: Sequence[Sequence[str]]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value something can be replaced."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def odd_json(rng: random.Random, file: Path) -> str:
    """Replace a field of a JSON file, or add one that another library reads."""
    value = json.loads(file.read_text(encoding="utf-8"))
    extra = [(name,) for name in EXTRA.get(file.name, ())]
    path = rng.choice([*places(value), *extra] if rng.random() < 0.6 or not extra else extra)
    new = rng.choice(ODD)
    file.write_text(json.dumps(replaced(value, path, new)), encoding="utf-8")
    return f"{file.name}: {path} = {str(new)[:40]!r}"


def garbled(rng: random.Random, file: Path) -> str:
    """Cut, empty or change bytes; or put something in its place that is no file."""
    data, how = bytearray(file.read_bytes()), rng.choice(["cut", "empty", "bytes", "pipe", "directory", "gone", "deep"])
    if how == "bytes":
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), 4000))] = rng.randrange(256)
    if how in ("pipe", "directory", "gone"):
        file.unlink()
        if how != "gone":
            (os.mkfifo if how == "pipe" else os.mkdir)(file)
    else:
        kept = {"cut": data[: rng.randrange(len(data))], "empty": b"", "deep": b'{"a":' * 100_000, "bytes": data}[how]
        file.write_bytes(kept)
    return f"{file.name}: {how}"


def odd_header(rng: random.Random, file: Path) -> str:
    """Change the header of safetensors, with a length that fits."""
    data = file.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    path, new = rng.choice(list(places(header))), rng.choice(ODD)
    text = json.dumps(replaced(header, path, new)).encode()
    length = rng.choice([len(text)] * 8 + [0, 2**62, len(data)])
    file.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])
    return f"{file.name}: header {path} = {str(new)[:40]!r}, length {length}"


def hostile(rng: random.Random, whole: Path, place: Path, kinds: Mapping[str, Kind]) -> tuple[Sequence[str], str]:
    """One damaged copy, the command to run in it, and what was done."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place, ignore=shutil.ignore_patterns("cache"))
    kind = kinds[rng.choice(list(kinds))]
    file = rng.choice(kind.files)
    if not (place / file).exists():
        (place / file).write_text("{}")
    what = (kind.change if rng.random() < 0.9 else garbled)(rng, place / file)
    return rng.choice(kind.commands), what


def run_cases(
    folder: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kinds: Mapping[str, Kind],
    seed: int,
    cases: int,
    seconds: float = math.inf,
) -> None:
    """Damaged copies one after another, as many as there are cases or time for."""

    def too_long(*_: object) -> None:
        # nothing that reads a file takes this for one of its own errors
        raise KeyboardInterrupt

    rng, started, found, runs = random.Random(seed), time.perf_counter(), [], 0
    place.mkdir()
    before = signal.signal(signal.SIGALRM, too_long)
    while runs < cases and time.perf_counter() - started < seconds:
        words, what = hostile(rng, folder, place, kinds)
        runs += 1
        monkeypatch.chdir(place)
        capsys.readouterr()
        try:
            signal.alarm(LONGEST)
            code: Any = main(list(words))
        except BaseException as error:
            end = traceback.extract_tb(error.__traceback__)[-1]
            code = f"{type(error).__name__} {str(error)[:150]!r} at {Path(end.filename).name}:{end.lineno}"
        finally:
            signal.alarm(0)
        last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
        if code == 2 and (not last.startswith("zerodraft: ") or not last.isprintable()):
            code = f"message {last!r}"
        if (place / HARM).exists():
            code = "code out of the file ran"
        if code not in (0, 2):
            found.append(f"{what} | {' '.join(words)} | {code}")
    signal.signal(signal.SIGALRM, before)
    monkeypatch.chdir(folder)
    logger.info("%d cases from seed %d", runs, seed)
    assert not found, f"{len(found)} of {runs} (seed {seed}):\n" + "\n".join(found)


def damage_and_run(
    folder: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kinds: Mapping[str, Kind],
    cases: int,
    long: bool,
) -> None:
    """So many cases, or as many as there is time for, from the seed and with the kinds that the environment says."""
    if not long:
        run_cases(folder, place, capsys, monkeypatch, kinds, 0, cases)
        return
    seed, seconds = int(os.environ.get("ZERODRAFT_FUZZ_START", "1000000")), 60 * float(MINUTES or 0)
    if names := os.environ.get("ZERODRAFT_FUZZ_KINDS"):
        kinds = {name: kinds[name] for name in names.split(",")}
    run_cases(folder, place, capsys, monkeypatch, kinds, seed, 1 << 30, seconds)
