"""`zerodraft pretrain` and `finetune`: the file, what wins over it, and what reaches the library."""

import json
from pathlib import Path
from typing import Any

import pytest

from zerodraft.cli.main import main
from zerodraft.training import run
from zerodraft.training.recipe import Recipe

RESULTS = {
    "parameters": 1234,
    "tokens": 5678,
    "seconds": 2.0,
    "tokens_per_second": 2839.0,
    "evaluation": {"eval_validation_loss_1": 2.0, "eval_validation_perplexity_1": 7.39},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Recipe, bool]]:
    """Stands in for training and records how it is called."""
    made: list[tuple[str, Recipe, bool]] = []

    def stand_in(name: str) -> Any:
        def train(recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
            made.append((name, recipe, resume))
            return RESULTS

        return train

    for name in ("pretrain", "finetune"):
        monkeypatch.setattr(run, name, stand_in(name))
    return made


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "small.yaml"
    file.write_text("output: runs/small\nseed: 3\ntraining: {steps: 20, learning_rate: 1e-3}\n", encoding="utf-8")
    return str(file)


def test_the_file_is_read_and_flags_win_over_it(recipe: str, calls: list[Any]) -> None:
    assert main(["pretrain", recipe, "--training.steps", "7", "--model.ztt.zero-rope", "none", "--resume"]) == 0
    ((name, found, resume),) = calls
    assert (name, resume) == ("pretrain", True)
    assert (found.seed, found.training.steps, found.training.learning_rate) == (3, 7, 1e-3)
    assert found.model.ztt == {"zero_rope": "none"}


def test_the_report_for_people_and_for_machines(
    recipe: str, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", recipe, "--model.start", "somewhere"]) == 0
    out = capsys.readouterr().out
    assert "trained 1,234 parameters on 5,678 tokens in 2 s (2,839 tokens/s)" in out
    assert "validation  1       2.0000  7.39" in out
    assert main(["finetune", recipe, "--model.start", "somewhere", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULTS
    assert [name for name, _, _ in calls] == ["finetune", "finetune"]


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("output: a\ntrainnig: {}", [], "unknown key 'trainnig' (did you mean 'training'?)"),
        ("output: a\ntraining: {step: 1}", [], "unknown key 'training.step' (did you mean 'steps'?)"),
        ("output: a\ntraining: {steps: ten}", [], "'training.steps' must be a whole number, got 'ten'"),
        ("output: a\nloss: {kind: lst}", [], "'loss.kind' must be one of"),
        ("seed: 1", [], "missing key 'output'"),
        ("- a list", [], "must hold a mapping"),
        ("output: [", [], "is not valid YAML"),
        ("output: a", ["--training.steps", "ten"], "'training.steps' must be a whole number, got 'ten'"),
        ("output: a", ["--training.step", "1"], "unknown flag '--training.step' (did you mean '--training.steps'?)"),
        ("output: a", ["--loss.kind", "weightd"], "'loss.kind' must be one of"),
    ],
)
def test_bad_recipes_and_flags_are_one_sentence(
    text: str, words: list[str], message: str, tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    assert main(["pretrain", str(file), *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert calls == []
