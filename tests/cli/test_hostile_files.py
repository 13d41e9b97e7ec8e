"""Files with anything in them, through whole commands: what is read is used, or refused with one sentence and code 2.

Every field of every file that a command reads is replaced by odd values, and files are cut, emptied and garbled. A
traceback here is a mistake of ours: a loader lets something through that only the computation stumbles over.
"""

import json
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.cli.hostile import (
    ODD,
    SHORT_AND_LONG,
    THEIR_WARNINGS,
    Kind,
    damage_and_run,
    odd_header,
    odd_json,
    places,
    replaced,
)
from tests.saved import TEXT, save_ztt
from zerodraft.cli.main import main
from zerodraft.decoding.ngram import PREAMBLE

CASES = 120

TEMPLATES = (
    "{{ 1/0 }}", "{{ raise_exception('no') }}", "{% for", "{{ messages[9].x.y }}",
    "{{ messages | tojson | length + 'a' }}", "{{ [] | first }}", "{{ range(10**12) | list }}", "{{ 'x' * 10**5 }}", "",
    "{{ messages[0]['content'] * -1 }}", "{{ ''.__class__.__mro__ }}", "\ud83d",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ undefined() }}", "\x1b[2J", "{{ namespace(x=1).y.z }}",
    "{{ messages[0].role.format(*[1]) }}", "{% include 'x' %}", "{{ strftime_now(5) }}",
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
                  "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
                  "base": {"rms_norm_eps": 0.001}, "ztt": {"zero_rope": "none"}, "cycles": 2,
                  "head_layers": 1, "tail_layers": 1, "family": "llama"},
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


KINDS = {
    "config": Kind(("plain/config.json",), odd_json, COMMANDS["plain"]),
    "ztt config": Kind(("ztt/config.json",), odd_json, COMMANDS["ztt"]),
    "generation config": Kind(("plain/generation_config.json",), odd_json, COMMANDS["plain"]),
    "ztt generation config": Kind(("ztt/generation_config.json",), odd_json, COMMANDS["ztt"]),
    "tokenizer config": Kind(("plain/tokenizer_config.json",), odd_json, COMMANDS["plain"]),
    "tokenizer": Kind(("plain/tokenizer.json",), odd_json, COMMANDS["plain"]),
    "header": Kind(("plain/model.safetensors",), odd_header, COMMANDS["plain"]),
    "table": Kind(("a.ngram",), odd_table, COMMANDS["ngram"]),
    "recipe": Kind(("recipe.json",), odd_json, COMMANDS["recipe"]),
    "template": Kind(("plain/chat_template.jinja",), odd_template, [COMMANDS["plain"][2]]),
}


@SHORT_AND_LONG
@THEIR_WARNINGS
def test_nothing_in_a_file_is_a_traceback(
    long: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_and_run(folder, tmp_path / "copy", capsys, monkeypatch, KINDS, CASES, long)
