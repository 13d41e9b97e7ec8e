"""The same for what training leaves: run folders that are resumed, drafters of every kind, completions and their
manifest. See `test_hostile_files`."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.hostile import (
    HARM,
    ODD,
    SHORT_AND_LONG,
    THEIR_WARNINGS,
    Kind,
    damage_and_run,
    garbled,
    odd_header,
    odd_json,
)
from tests.drafters.masked_hub import DREAM, LLADA, dream_tensors, llada_tensors, write
from tests.saved import TEXT
from zerodraft.cli.main import main

CASES = 100

BLOCK = "--drafter.layers 1 --drafter.block-size 3 --drafter.coupling 4 --drafter.draft-vocab 0 --loss.anchors 2"
DFLASH = "--kind dflash --recipe dflash.json --drafter.layers 1 --drafter.block-size 3 --loss.anchors 2"
MASKED = "--kind masked --masked.layers 1 --masked.block-size 3 --masked.blocks 2"
SHORT = "--training.warmup-steps 1 --training.save-every 1 --training.no-tensorboard --held-back.sequences 2"


def training(kind: str, out: str, steps: int, more: str = "") -> list[str]:
    words = f"train-drafter --target plain --data written --out {out} {kind} {SHORT} --training.steps {steps} {more}"
    return words.split()


def pretraining(steps: int, more: str = "") -> list[str]:
    return f"pretrain recipe.json --training.steps {steps} --training.save-every 1 {more}".split()


def evaluating(name: str) -> list[str]:
    return f"eval-drafter {name} --target plain --data written --limit 2".split()


def generating(name: str) -> list[str]:
    return f"generate --target plain --drafter {name} --max-new-tokens 3 the-cat".split()


def exporting(name: str, out: str, more: str = "") -> list[str]:
    return f"export-drafter {name} {out} {more}".split()


DISTILLING = "distill --target plain --prompts p.txt --out written --no-chat --max-new-tokens 12 --batch-size 2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, plain_dir: Path) -> Path:
    """A target, its completions, drafters of three kinds, and runs that can be resumed, whole."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(plain_dir, folder / "plain")
    (folder / "text.txt").write_text(f"{TEXT}\n\n" * 60)
    (folder / "p.txt").write_text("".join(f"the {word}\n" for word in TEXT.split()))
    recipe = {
        "output": "run",
        "model": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
                  "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "cycles": 2},
        "tokenizer": {"vocab_size": 300},
        "data": {"train": ["text.txt"], "context_length": 8, "cache": str(folder / "cache"), "validation_blocks": 2},
        "training": {"batch_size": 2, "use_cpu": True, "tensorboard": False, "warmup_steps": 1, "keep_checkpoints": 1},
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "dflash.json").write_text(json.dumps({"drafter": {"taps": 2}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            DISTILLING.split(),
            training(BLOCK, "block", 1),
            training(DFLASH, "dflash", 1),
            training(MASKED, "masked", 1),
            exporting("dflash", "exported"),
            exporting("dflash", "exported-z", "--layout z-lab"),
            pretraining(1),
        ):
            assert main(words) == 0, words
    size = json.loads((folder / "plain" / "config.json").read_text())["vocab_size"]
    write(folder / "dream", DREAM | {"vocab_size": size}, dream_tensors(size))
    write(folder / "llada", LLADA, llada_tensors())
    for run in ("block", "run"):
        # as if it had been killed before its end
        (folder / run / "results.json").unlink()
    (folder / "written" / "000000.jsonl").unlink()
    return folder


def odd_line(rng: random.Random, file: Path) -> str:
    """Replace a field of one line of JSON lines."""
    lines = file.read_text(encoding="utf-8").splitlines()
    at, new = rng.randrange(len(lines)), rng.choice([*ODD, 12, 13, 14])
    row = json.loads(lines[at])
    key = rng.choice([*row, None])
    if key is None:
        lines[at] = json.dumps(new)
    else:
        lines[at] = json.dumps({**row, key: new})
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{file.name}: line {at} {key} = {str(new)[:40]!r}"


class Harmful:
    """A pickle that would run a program where it is read by a reader that runs things."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (__import__("pathlib").Path.touch, (Path(HARM),))


def odd_pickle(rng: random.Random, file: Path) -> str:
    """Replace something in what torch saved, or all of it."""
    new = rng.choice([*ODD, Harmful(), torch.zeros(0), torch.zeros(3, 3), torch.full((2,), float("nan"))])
    held = torch.load(file, weights_only=False)
    paths = _places(held) if rng.random() < 0.8 else []
    path = rng.choice(paths) if paths else ()
    inner: Any = held
    for key in path[:-1]:
        inner = inner[key]
    if path:
        inner[path[-1]] = new
    torch.save(held if path else new, file)
    return f"{file.name}: {path} = {type(new).__name__} {str(new)[:40]!r}"


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in dictionaries and lists something can be replaced."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*path, key), *_places(item, (*path, key)))][:200]


PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
STATES = ("trainer_state.json", "config.json", "sums.json")
PRETRAIN, DRAFT = [pretraining(2, "--resume")], [training(BLOCK, "block", 2, "--resume")]
DATA = [evaluating("block"), training(BLOCK, "new", 1), training(MASKED, "new", 1)]
START = training(BLOCK, "new", 1, "--drafter.start block/model")

KINDS = {
    "run": Kind(("run/recipe.json",), odd_json, PRETRAIN),
    "run state": Kind(tuple(f"run/checkpoint-1/{name}" for name in STATES), odd_json, PRETRAIN),
    "run weights": Kind(("run/checkpoint-1/model.safetensors",), odd_header, PRETRAIN),
    "run pickles": Kind(tuple(f"run/checkpoint-1/{name}" for name in PICKLES), odd_pickle, PRETRAIN),
    "run log": Kind(("run/log.jsonl",), odd_line, PRETRAIN),
    "drafter run": Kind(("block/recipe.json",), odd_json, DRAFT),
    "drafter run state": Kind(tuple(f"block/checkpoint-1/{name}" for name in STATES), odd_json, DRAFT),
    "drafter run pickles": Kind(tuple(f"block/checkpoint-1/{name}" for name in PICKLES), odd_pickle, DRAFT),
    "block": Kind(("block/model/config.json",), odd_json, [generating("block"), evaluating("block"), START]),
    "block weights": Kind(("block/model/model.safetensors",), odd_header, [generating("block"), evaluating("block")]),
    "dflash": Kind(
        ("dflash/model/config.json",),
        odd_json,
        [generating("dflash"), evaluating("dflash"), exporting("dflash", "new")],
    ),
    "dflash weights": Kind(
        ("dflash/model/model.safetensors",), odd_header, [generating("dflash"), exporting("dflash", "new")]
    ),
    "exported": Kind(("exported/config.json",), odd_json, [generating("exported"), exporting("exported", "new")]),
    "exported elsewhere": Kind(
        ("exported-z/config.json",), odd_json, [generating("exported-z"), exporting("exported-z", "new")]
    ),
    "exported weights": Kind(("exported/model.safetensors",), odd_header, [generating("exported")]),
    "masked": Kind(("masked/model/config.json",), odd_json, [generating("masked"), evaluating("masked")]),
    "masked weights": Kind(("masked/model/model.safetensors",), odd_header, [generating("masked")]),
    "published Dream": Kind(("dream/config.json",), odd_json, [generating("dream")]),
    "published LLaDA": Kind(("llada/config.json",), odd_json, [generating("llada")]),
    "index": Kind(("written/000001.jsonl",), odd_line, DATA),
    "tokens": Kind(("written/000001.bin",), garbled, DATA),
    "manifest": Kind(("written/manifest.json",), odd_json, [DISTILLING.split()]),
}


def test_the_harmful_pickle_does_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is read by a reader that runs things, so that the cases below can fail."""
    monkeypatch.chdir(tmp_path)
    torch.save(Harmful(), "file")
    assert not Path(HARM).exists()
    torch.load("file", weights_only=False)
    assert Path(HARM).exists()


@SHORT_AND_LONG
@THEIR_WARNINGS
def test_nothing_in_a_run_is_a_traceback(
    long: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_and_run(folder, tmp_path / "copy", capsys, monkeypatch, KINDS, CASES, long)
