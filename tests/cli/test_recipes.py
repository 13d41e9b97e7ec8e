"""`zerodraft pretrain` and `finetune`: the file, what wins over it, and what reaches the library."""

import json
from pathlib import Path
from typing import Any

import pytest

from zerodraft.cli.main import main
from zerodraft.training.recipe import Recipe
from zerodraft.training.ztt import run

RESULTS = {
    "parameters": 1234,
    "trained_parameters": 34,
    "trained": {"adapters": 30, "zero_tokens": 4},
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
    assert "trained 34 parameters (adapters 30, zero tokens 4) on 5,678 tokens in 2 s (2,839 tokens/s)" in out
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


def test_a_finetune_without_a_recipe_has_settings_of_its_own(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", "--model", "m", "--data", "a.txt", "b.jsonl", "--output", "o", "--training.steps", "7"]
    assert main(words) == 0
    ((name, found, _),) = calls
    assert (name, found.model.start, found.data.train, found.output) == ("finetune", "m", ("a.txt", "b.jsonl"), "o")
    assert (found.training.steps, found.training.learning_rate, found.loss.kind) == (7, 5e-5, "weighted")
    out = capsys.readouterr().out
    assert "no recipe, so data.validation_fraction 0.05, " in out
    assert "training.learning_rate 5e-05" in out
    assert "training.steps 200" not in out


def test_short_flags_win_over_a_recipe(recipe: str, calls: list[Any]) -> None:
    assert main(["finetune", recipe, "--model", "m", "--data", "a.txt"]) == 0
    ((_, found, _),) = calls
    assert (found.model.start, found.data.train, found.training.steps) == ("m", ("a.txt",), 20)


@pytest.mark.parametrize(
    ("words", "missing"),
    [([], "--model"), (["--model", "m"], "--data"), (["--model", "m", "--data", "a.txt"], "--output")],
)
def test_what_a_finetune_needs(
    words: list[str], missing: str, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", *words]) == 2
    assert f"needs --model, --data and --output: give {missing}" in capsys.readouterr().err
    assert calls == []


def test_a_plain_model_learns_from_a_text_file(
    plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("the little fox sat on the mat and could not sleep. " * 60, encoding="utf-8")
    words = ["--training.steps", "4", "--training.no-tensorboard", "--data.cache", str(tmp_path / "cache")]
    sizes = ["--data.context-length", "32", "--training.batch-size", "2"]
    where = ["--model", str(plain_dir), "--data", str(tmp_path / "notes.txt"), "--output", str(tmp_path / "run")]
    assert main(["finetune", *where, *words, *sizes, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"weights", "zero_tokens", "cycle_gates"} == set(result["trained"])
    assert "eval_validation_loss_2" in result["evaluation"]
    assert main(["generate", "the", "--model", str(tmp_path / "run" / "model"), "--max-new-tokens", "3"]) == 0


def test_the_deepening_recipe_runs_on_files_of_ones_own(
    plain_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its further evaluation text is only there with ZERODRAFT_DATA."""
    monkeypatch.delenv("ZERODRAFT_DATA", raising=False)
    (tmp_path / "notes.txt").write_text("the little fox sat on the mat and could not sleep. " * 90, encoding="utf-8")
    shipped = Path(__file__).parents[2] / "recipes" / "smollm2-deepen.yaml"
    words = ["--model.start", str(plain_dir), "--data.train", str(tmp_path / "notes.txt"), "--training.steps", "2"]
    words += ["--model.head-layers", "1", "--model.tail-layers", "1"]
    more = ["--data.context-length", "32", "--data.cache", str(tmp_path / "cache"), "--training.no-tensorboard"]
    assert main(["finetune", str(shipped), *words, *more, "--output", str(tmp_path / "run")]) == 0
    evaluation = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))["evaluation"]
    assert all(key.startswith("eval_validation_") for key in evaluation)
