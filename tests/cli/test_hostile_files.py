# ruff: noqa: E501  # lists of odd values read better in long lines
"""Files with anything in them, through whole commands: what is read is used, or refused with one sentence and code 2.

Every field of every file that a command reads is replaced by odd values, and files are cut, emptied and garbled. A
traceback here is a mistake of ours: a loader lets something through that only the computation stumbles over.
"""

import json
import math
import os
import random
import shutil
import signal
import struct
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.saved import TEXT, save_ztt
from zerodraft.cli.main import main
from zerodraft.decoding.ngram import PREAMBLE

MINUTES = os.environ.get("ZERODRAFT_FUZZ_MINUTES")
CASES = 120
LONGEST = 60
"""Seconds that a command may take."""

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 1.5, -0.5, 1e300, float("nan"), float("inf"), 10**6, 10**12, 2**63, 10**30, "", "x",
    "\x00", "\ud83d", "a\x1b[31mb", "[/red]", "../..", "x" * 5000, [], [0], [-1], [10**9], ["x"], [None], [[]], [1] * 50, {},
    {"x": 1}, {"rope_type": "x"}, {"rope_type": "yarn"}, "nan", "float16", "bfloat16", "gpt2", "llama", "ztt", [{"x": []}],
)  # fmt: skip
"""Values of all kinds; most are wrong for any field."""

EXTRA = {
    "config.json": (
        "quantization_config", "auto_map", "sliding_window", "layer_types", "torch_dtype", "dtype", "rope_scaling",
        "attn_implementation", "_attn_implementation", "num_labels", "id2label", "pruned_heads", "architectures",
        "is_encoder_decoder", "use_cache", "tie_word_embeddings", "exit_rule", "return_dict", "output_attentions",
    ),
    "generation_config.json": (
        "num_beams", "stop_strings", "return_dict_in_generate", "max_length", "min_length", "top_k", "temperature", "top_p",
        "repetition_penalty", "bad_words_ids", "suppress_tokens", "sequence_bias", "cache_implementation", "penalty_alpha",
        "no_repeat_ngram_size", "forced_eos_token_id", "exponential_decay_length_penalty", "watermarking_config",
        "guidance_scale", "custom_generate", "num_return_sequences", "max_time", "begin_suppress_tokens", "dola_layers",
        "output_scores", "token_healing", "constraints", "eta_cutoff", "typical_p", "min_p", "compile_config", "use_cache",
    ),
    "tokenizer_config.json": (
        "model_max_length", "padding_side", "truncation_side", "added_tokens_decoder", "tokenizer_class", "chat_template",
        "model_input_names", "clean_up_tokenization_spaces", "extra_special_tokens", "auto_map", "bos_token", "unk_token",
        "additional_special_tokens", "add_bos_token", "add_prefix_space", "split_special_tokens", "legacy",
    ),
}  # fmt: skip
"""Fields that the files need not have, by file."""

TEMPLATES = (
    "{{ 1/0 }}", "{{ raise_exception('no') }}", "{% for", "{{ messages[9].x.y }}", "{{ messages | tojson | length + 'a' }}",
    "{{ [] | first }}", "{{ range(10**12) | list }}", "{{ 'x' * 10**5 }}", "", "{{ messages[0]['content'] * -1 }}",
    "{{ ''.__class__.__mro__ }}", "\ud83d", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ undefined() }}", "\x1b[2J",
    "{{ namespace(x=1).y.z }}", "{{ messages[0].role.format(*[1]) }}", "{% include 'x' %}", "{{ strftime_now(5) }}",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, plain_dir: Path, tokenizer: Any, completions: Path) -> Path:
    """A plain model with a chat template, a Zero Token Transformer, an n-gram table and a recipe, whole."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(plain_dir, folder / "plain")
    save_ztt(folder / "ztt", tokenizer)
    (folder / "plain" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (folder / "text.txt").write_text(f"{TEXT}\n\n" * 60)
    (folder / "p.txt").write_text("the cat\nthe fox\n")
    words = ["ngram", "build", str(folder / "text.txt"), "--target", str(plain_dir), "--out", str(folder / "a.ngram")]
    assert main(words) == 0
    recipe = {
        "output": "run", "seed": 1,
        "model": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
                  "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "base": {"rms_norm_eps": 0.001},
                  "ztt": {"zero_rope": "none"}, "cycles": 2, "head_layers": 1, "tail_layers": 1, "family": "llama"},
        "tokenizer": {"vocab_size": 300, "path": None},
        "data": {"train": [str(folder / "text.txt")], "context_length": 8, "cache": str(folder / "cache"),
                 "document_chars": 100, "validation_fraction": 0.2, "validation_blocks": 2, "separator": "\n\n",
                 "template": None, "text_field": "text", "evaluation": {}},
        "loss": {"kind": "weighted", "weights": "linear", "token_depths": 0.0},
        "training": {"steps": 1, "batch_size": 2, "use_cpu": True, "tensorboard": False, "learning_rate": 0.01,
                     "betas": [0.9, 0.95], "warmup_steps": 1, "schedule": "wsd", "decay_fraction": 0.3, "save_every": 0,
                     "max_grad_norm": 1.0, "weight_decay": 0.1, "final_scale": 0.1, "optimizer": "muon"},
        "peft": {"rank": 0, "alpha": 8.0, "dropout": 0.0, "target_modules": []},
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


SHORT = ["--max-new-tokens", "3"]
COMMANDS: dict[str, list[list[str]]] = {
    "plain": [
        ["generate", "--target", "plain", "--drafter", "lookup", "the cat", *SHORT],
        ["generate", "--target", "plain", "--drafter", "plain", "the cat", "--temperature", "1", *SHORT],
        ["generate", "--target", "plain", "--drafter", "lookup", "--chat", "the cat", *SHORT],
        ["convert", "plain", "--output", "new", "--cycles", "2"],
        ["ngram", "build", "text.txt", "--target", "plain", "--out", "b.ngram", "--order", "2"],
        ["distill", "--target", "plain", "--prompts", "p.txt", "--out", "out", "--no-chat", *SHORT],
        ["info", "plain"],
    ],
    "ztt": [
        ["generate", "--model", "ztt", "the cat", *SHORT],
        ["generate", "--model", "ztt", "the cat", "--exit-rule", "calibrated", *SHORT],
        ["info", "ztt"],
        ["convert", "ztt", "--output", "new", "--mode", "to-base", "--unroll"],
        [
            "calibrate",
            "ztt",
            "--text",
            "text.txt",
            "--budget",
            "0.9",
            "--blocks",
            "1",
            "--block-length",
            "8",
            "--dry-run",
        ],
    ],
    "ngram": [
        ["ngram", "info", "a.ngram"],
        ["generate", "--target", "plain", "--drafter", "plain", "--ngram", "a.ngram", "the cat", *SHORT],
    ],
    "recipe": [["pretrain", "recipe.json"]],
}


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


def odd_table(rng: random.Random, file: Path) -> str:
    """Change an n-gram table's header or body, with a checksum that is right."""
    data = file.read_bytes()
    magic, version, size, total, vocabulary, _ = PREAMBLE.unpack_from(data)
    header, body = json.loads(data[PREAMBLE.size : PREAMBLE.size + size]), bytearray(data[PREAMBLE.size + size :])
    path, new = (
        rng.choice(list(places(header))),
        rng.choice([*ODD, 4, 64, 128, 200, "<u4", "<i8", "<f4", "|u1", "<f8", "O"]),
    )
    if rng.random() < 0.7:
        header = replaced(header, path, new)
    else:
        path, new = ("vocabulary",), rng.choice([0, 1, vocabulary, vocabulary + 1, 2**40, 2**64 - 1])
        vocabulary = new
        for _ in range(rng.randint(0, 60)):
            body[rng.randrange(len(body))] = rng.randrange(256)
    # spaces keep the arrays where they were
    text = json.dumps(header).encode().ljust(size)
    total = total if len(text) == size else total - size + len(text)
    start = PREAMBLE.pack(magic, version, len(text), total, vocabulary, 0)[:-4]
    file.write_bytes(start + struct.pack("<I", zlib.crc32(text, zlib.crc32(start))) + text + body)
    return f"{file.name}: {path} = {str(new)[:40]!r}"


def odd_template(rng: random.Random, file: Path) -> str:
    template = rng.choice(TEMPLATES)
    file.write_text(template, encoding="utf-8", errors="surrogatepass")
    return f"{file.name}: {template!r}"


KINDS: dict[str, tuple[str, str, Callable[[random.Random, Path], str]]] = {
    "config": ("plain", "plain/config.json", odd_json),
    "ztt config": ("ztt", "ztt/config.json", odd_json),
    "generation config": ("plain", "plain/generation_config.json", odd_json),
    "ztt generation config": ("ztt", "ztt/generation_config.json", odd_json),
    "tokenizer config": ("plain", "plain/tokenizer_config.json", odd_json),
    "tokenizer": ("plain", "plain/tokenizer.json", odd_json),
    "header": ("plain", "plain/model.safetensors", odd_header),
    "table": ("ngram", "a.ngram", odd_table),
    "recipe": ("recipe", "recipe.json", odd_json),
    "template": ("plain", "plain/chat_template.jinja", odd_template),
}
GARBLED = [*{kind[1]: kind for kind in KINDS.values()}.values()]


def hostile(rng: random.Random, whole: Path, place: Path) -> tuple[list[str], str]:
    """One damaged copy, the command to run in it, and what was done."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place, ignore=shutil.ignore_patterns("cache"))
    name = rng.choice([*KINDS, "garbled"])
    room, file, change = KINDS[name] if name != "garbled" else (*rng.choice(GARBLED)[:2], garbled)
    if not (place / file).exists():
        (place / file).write_text("{}")
    what = change(rng, place / file)
    words = rng.choice(COMMANDS[room])
    if name == "template":
        words = COMMANDS["plain"][2]
    return words, what


def run_cases(
    folder: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    cases: int,
    seconds: float,
) -> None:
    """Damaged copies one after another, as many as there are cases or time for."""

    def too_long(*_: object) -> None:
        # nothing that reads a file takes this for one of its own errors
        raise KeyboardInterrupt

    rng, started, found, runs = random.Random(seed), time.perf_counter(), [], 0
    place.mkdir()
    before = signal.signal(signal.SIGALRM, too_long)
    while runs < cases and time.perf_counter() - started < seconds:
        words, what = hostile(rng, folder, place)
        runs += 1
        monkeypatch.chdir(place)
        capsys.readouterr()
        try:
            signal.alarm(LONGEST)
            code: Any = main(words)
        except BaseException as error:
            end = traceback.extract_tb(error.__traceback__)[-1]
            code = f"{type(error).__name__} {str(error)[:150]!r} at {Path(end.filename).name}:{end.lineno}"
        finally:
            signal.alarm(0)
        last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
        if code == 2 and (not last.startswith("zerodraft: ") or not last.isprintable()):
            code = f"message {last!r}"
        if code not in (0, 2):
            found.append(f"{what} | {' '.join(words)} | {code}")
    signal.signal(signal.SIGALRM, before)
    monkeypatch.chdir(folder)
    assert not found, f"{len(found)} of {runs} (seed {seed}):\n" + "\n".join(found)


@pytest.mark.filterwarnings("ignore")
def test_nothing_in_a_file_is_a_traceback(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cases(folder, tmp_path / "copy", capsys, monkeypatch, seed=0, cases=CASES, seconds=math.inf)


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.skipif(MINUTES is None, reason="as long as ZERODRAFT_FUZZ_MINUTES says")
@pytest.mark.filterwarnings("ignore")
def test_nothing_in_many_files_is_a_traceback(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, seconds = int(os.environ.get("ZERODRAFT_FUZZ_START", "1000000")), 60 * float(MINUTES or 0)
    run_cases(folder, tmp_path / "copy", capsys, monkeypatch, seed=seed, cases=1 << 30, seconds=seconds)
