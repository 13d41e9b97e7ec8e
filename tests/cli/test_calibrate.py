"""`zerodraft calibrate`: the rule lands in config.json, the measurements beside it, and bad input is one sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from zerodraft import ZttForCausalLM, exit_rule_from_dict
from zerodraft.cli.main import main
from zerodraft.ztt.rules import RULES, RuleEntry

SIZES = ["--blocks", "2", "--block-length", "16"]


@pytest.fixture
def model(ztt_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ztt_dir, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "held-back.txt"
    file.write_text("the little fox sat on the mat and could not sleep. " * 20, encoding="utf-8")
    return file


def calibrate(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main(["calibrate", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_rule_is_written_and_generate_finds_it(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = calibrate(capsys, model, "--text", text, *SIZES, "--mean-cycles", "2", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["chosen"]["mean_cycles"] <= 2
    assert result["text"]["name"] == "held-back.txt"
    assert str(model) not in json.dumps({key: value for key, value in result.items() if key != "written"})
    rule = exit_rule_from_dict(json.loads((model / "config.json").read_text())["exit_rule"])
    assert rule == exit_rule_from_dict(result["rule"]) == ZttForCausalLM.from_pretrained(model).calibrated_exit_rule()
    stored = json.loads((model / "calibration.json").read_text())
    assert stored["rules"]["zero-mass"]["curve"] == result["rules"]["zero-mass"]["curve"]
    assert len(stored["fixed"]) == 3
    assert (model / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert not list(model.glob(".*partial"))
    assert (
        main(["generate", "the cat", "--model", str(model), "--exit-rule", "calibrated", "--max-new-tokens", "3"]) == 0
    )


def test_rules_are_compared_and_the_best_one_taken(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [model, "--text", text, *SIZES, "--max-loss-nats", "1", "--rule", "best", "--rules", "latent", "zero-mass"]
    code, out, err = calibrate(capsys, *words, "--output", model / "new", "--dry-run")
    assert code == 0, err
    stored = json.loads((model / "new" / "calibration.json").read_text())
    assert set(stored["rules"]) == {"zero-mass", "zero-mass, each cycle", "latent", "latent, each cycle"}
    assert "on blocks that neither was placed on" in " ".join(out.split())
    assert stored["chosen"]["flops"] == min(rule["chosen"]["flops"] for rule in stored["rules"].values())
    assert json.loads((model / "config.json").read_text())["exit_rule"] is None
    assert not (model / "calibration.json").exists()
    assert "latent:" in out
    assert "zero-mass:" in out


def test_a_rule_of_ones_own_is_measured_beside_the_others(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, "small", RuleEntry(where="tests.ztt.test_rules:SmallExit", example=3.5))
    words = [model, "--text", text, *SIZES, "--mean-cycles", "2", "--rules", "small", "--json"]
    code, out, err = calibrate(capsys, *words, "--dry-run")
    assert code == 0, err
    assert {*json.loads(out)["rules"]} == {"zero-mass", "zero-mass, each cycle", "small", "small, each cycle"}


def test_without_matplotlib_everything_else_is_done(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = calibrate(capsys, model, "--text", text, *SIZES, "--mean-cycles", "2")
    assert code == 0, err
    assert "no plot: Plots need matplotlib" in out
    assert (model / "calibration.json").is_file()
    assert not (model / "calibration.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give exactly one target"),
        (["--budget", "0.5", "--mean-cycles", "2"], "give exactly one target"),
        (["--budget", "1.5"], "1.5 of the FLOPs is not above 0 and at most 1"),
        (["--budget", "0.01"], "A budget of 0.01 of the FLOPs cannot be reached with this rule: the least is"),
        (["--mean-cycles", "2", "--rules", "latnet"], "unknown rule 'latnet' (did you mean 'latent'?)"),
        (["--mean-cycles", "2", "--block-length", "1"], "--block-length is 1; it must be at least 2"),
        (["--mean-cycles", "2", "--block-length", "4096"], "--block-length is 4096; the model reads at most 2048"),
        (["--mean-cycles", "2", "--block-length", "2000"], "fewer than one block of 2000"),
        (["--mean-cycles", "2", "--text", "none.txt"], "no data at 'none.txt'"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(
    words: list[str], message: str, model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    code, _, err = calibrate(capsys, model, "--text", text, *SIZES, *words)
    assert code == 2
    assert message in err
    assert err.startswith("zerodraft: ")
    assert err.count("\n") == 1
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_a_plain_model_is_sent_to_convert(plain_dir: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = calibrate(capsys, plain_dir, "--text", text, "--budget", "0.7")
    assert (code, "zerodraft convert" in err) == (2, True)


@pytest.fixture
def deepened(plain_dir: Path, tmp_path: Path) -> Path:
    assert main(["convert", str(plain_dir), "--output", str(tmp_path / "deepened")]) == 0
    return tmp_path / "deepened"


def test_a_conversion_is_to_be_trained_first(deepened: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = calibrate(capsys, deepened, "--text", text, *SIZES, "--mean-cycles", "1.5")
    assert code == 2
    assert "All gates of the model are closed" in err
    assert "zerodraft finetune --model" in err


def test_a_trained_conversion_has_no_masses_to_go_by(
    deepened: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ZttForCausalLM.from_pretrained(deepened)
    assert model.cycle_gates is not None
    with torch.no_grad():
        model.cycle_gates.weight.fill_(0.3)
    model.save_pretrained(deepened)
    code, out, err = calibrate(capsys, deepened, "--text", text, *SIZES, "--mean-cycles", "1.5", "--json")
    assert code == 0, err
    assert json.loads(out)["rule"]["rule"] == "latent"
    both = ["--rule", "best", "--rules", "zero-mass", "latent"]
    code, out, err = calibrate(capsys, deepened, "--text", text, *SIZES, "--mean-cycles", "1.5", *both, "--dry-run")
    assert code == 0, err
    assert "zero-mass: The model has no zero tokens in the cycles" in out
    code, _, err = calibrate(capsys, deepened, "--text", text, *SIZES, "--mean-cycles", "1.5", "--rule", "zero-mass")
    assert (code, "choose another rule than zero-mass, such as latent" in err) == (2, True)


def test_fixed_depths_are_compared(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--blocks", "4", "--block-length", "16"]
    code, out, err = calibrate(capsys, model, "--text", text, *sizes, "--mean-cycles", "2", "--dry-run", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert [depth["cycles"] for depth in result["against_fixed"]] == [1, 2, 3]
    best = result["against_fixed"][result["best_fixed"] - 1]
    assert best["loss"] == min(depth["loss"] for depth in result["against_fixed"][:2])
    difference = best["difference"]
    assert difference["mean"] == pytest.approx(result["chosen"]["loss"] - best["loss"], abs=1e-9)
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert result["verdict"] in err
    assert result["verdict"].startswith(f"Best fixed depth: cycles:{result['best_fixed']} at ")
