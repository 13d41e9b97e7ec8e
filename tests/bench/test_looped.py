"""`zerodraft bench decode` of looped models: exits are told apart from faults, drafts of its own are held to be exact,
batches over depth answer as others do, and all of it is in the report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.saved import TEXT, save, tiny_llama, tiny_tokenizer
from zerodraft import FixedExit, LatentExit, ZttConfig, ZttForCausalLM, exit_rule_to_dict
from zerodraft.bench.looped import batches, exit_rules, in_step
from zerodraft.bench.methods import Equipment, Exits, available, choose
from zerodraft.cli.main import main
from zerodraft.common.errors import ZerodraftError
from zerodraft.drafters.lookup import PromptLookupDrafter
from zerodraft.fast.depth_requests import DepthRequest
from zerodraft.ztt.info import model_info
from zerodraft.ztt.tradeoff import Ruler

Bench = Callable[..., dict[str, Any]]
LOSSY = ["calibrated", "cycles:1", "cycles:2", "zero-mass", "confidence", "entropy", "kl", "latent"]
CALIBRATED = LatentExit(threshold=0.9)


@pytest.fixture(scope="module")
def looped_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cycles that change what is written, with a calibrated rule."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    base = tiny_llama(tokenizer)
    base.initializer_range = 0.2
    config = ZttConfig(base_config=base, cycles=3, input_injection=True, exit_rule=exit_rule_to_dict(CALIBRATED))
    return save(ZttForCausalLM(config), tokenizer, tmp_path_factory.mktemp("looped"))


@pytest.fixture(scope="module")
def model(looped_dir: Path) -> Any:
    return ZttForCausalLM.from_pretrained(looped_dir).eval()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "unseen.txt"
    path.write_text("\n".join([TEXT] * 80), encoding="utf-8")
    return path


@pytest.fixture
def bench(looped_dir: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    def run(*words: str, code: int = 0) -> dict[str, Any]:
        given = ["--target", str(looped_dir), "--prompts", str(prompts), "--limit", "3", "--max-new-tokens", "8"]
        assert main(["bench", "decode", *given, "--json", *words]) == code
        return json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])

    return run


def test_all_of_a_looped_model_is_measured(
    bench: Bench, model: Any, looped_dir: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "looped.json"
    found = bench("--text", str(text), "--batches", "1", "3", "--output", str(output))
    assert [name for name in found["overall"] if name in LOSSY] == LOSSY
    exact = [name for name in found["overall"] if name not in LOSSY]
    assert {"hf_plain", "plain", "full", "self:1", "self:2"} <= set(exact)
    assert all(found["overall"][name]["equal"] == 3 for name in exact)
    # what leaves early writes other tokens, and that is no fault
    assert (found["equal"], found["identical"], found["subject"]) == (True, True, "full")
    assert found["differences"] == []
    assert not any("equal" in found["overall"][name] for name in LOSSY)
    exits = found["exits"]
    assert list(exits) == ["plain", "full", "self:1", "self:2", *LOSSY]
    assert all(exits[name]["agreement"] == 1 for name in ("plain", "full", "self:1", "self:2"))
    assert exits["cycles:1"]["agreement"] < 1
    assert [exits[name]["cycles_per_token"] for name in ("cycles:1", "cycles:2", "plain")] == [1, 2, 3]
    assert 1 < exits["calibrated"]["cycles_per_token"] < 3
    assert exits["self:1"]["cycles_per_token"] is None
    assert all(values["ms_per_token"] > 0 for values in exits.values())
    tokenizer = AutoTokenizer.from_pretrained(looped_dir)
    ids = tokenizer("\n".join([TEXT] * 80), return_tensors="pt").input_ids[0]
    ruler = Ruler(model, ids[: len(ids) // 256 * 256].reshape(-1, 256)[:64])
    assert exits["plain"]["loss"] == exits["self:1"]["loss"] == pytest.approx(ruler.full.loss, rel=1e-3)
    for name, rule in (("cycles:1", FixedExit(cycles=1)), ("calibrated", CALIBRATED)):
        point = ruler.measure(rule)
        assert exits[name]["loss"] == pytest.approx(point.loss, rel=1e-2), name
        assert exits[name]["flops"] == pytest.approx(point.flops, abs=0.02), name
    assert [size["rows"] for size in found["batches"]["sizes"]] == [1, 3]
    assert all(size["equal"] == size["requests"] for size in found["batches"]["sizes"])
    assert {"target", "prompts", "text"} == set(found["provenance"]["sha256"])
    written = json.loads(output.read_text(encoding="utf-8"))
    assert set(written["steps"]) == set(exact) - {"hf_plain", "hf_lookup"}
    drafted = [step for task in written["steps"]["self:2"].values() for step in task if step[0]]
    assert all(by_model for *_, by_model in drafted)
    report = ["bench", "report", str(output), "--plots", str(tmp_path / "plots"), "--out"]
    for name in ("page.html", "page.md"):
        assert main([*report, str(tmp_path / name)]) == 0
        page = (tmp_path / name).read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
        assert "Early exit" in page
        assert f"{exits['calibrated']['loss']:.4f}" in page
        assert f"{found['batches']['sizes'][1]['bound']:.2f}x" in page
    drawn = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert {
        "looped-speed-over-loss",
        "looped-time-of-a-token-over-its-depth",
        "looped-batches-over-depth",
    } <= drawn


def test_without_a_text_agreement_takes_the_place_of_loss(bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "looped.json"
    found = bench("--methods", "plain,cycles:1,latent:0.7", "--output", str(output))
    assert list(found["overall"]) == ["hf_plain", "plain", "cycles:1", "latent:0.7"]
    assert found["exits"]["cycles:1"]["loss"] is None
    assert "batches" not in found
    assert main(["bench", "report", str(output), "--out", str(tmp_path / "page.html"), "--plots", str(tmp_path)]) == 0
    assert (tmp_path / "looped-speed-over-agreement.png").is_file()
    assert not (tmp_path / "looped-speed-over-loss.png").exists()


def test_sampled_tokens_are_not_compared(bench: Bench) -> None:
    found = bench("--methods", "plain,cycles:1", "--temperature", "1")
    assert found["equal"] is None
    assert found["exits"]["cycles:1"]["agreement"] is None
    assert found["exits"]["cycles:1"]["cycles_per_token"] == 1


def method(model: Any, rule: Any) -> Exits:
    equipment = Equipment(model=model, drafter=PromptLookupDrafter(), rules={"mine": rule})
    made = choose(["mine"], available(equipment))["mine"]
    assert isinstance(made, Exits)
    return made


@pytest.mark.parametrize("rule", [FixedExit(cycles=1), CALIBRATED])
def test_agreement_and_depths_are_those_of_every_token_alone(model: Any, rule: Any) -> None:
    prompt = torch.tensor([[5, 17, 40, 9]])
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    full = model.generate(prompt, **options)[0, 4:].tolist()
    agreeing, exiting = 0, method(model, rule)
    for at, token in enumerate(full):
        ids = torch.tensor([[*prompt[0].tolist(), *full[:at]]])
        agreeing += int(model(ids, exit_rule=rule).logits[0, -1].argmax()) == token
    assert exiting.agreeing({"input_ids": prompt}, full) == agreeing < 10
    decoded = exiting.decode({"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, options)
    ids = torch.tensor([[*prompt[0].tolist(), *decoded.tokens[0]]])
    assert decoded.depths == model(ids, exit_rule=rule).exit_depth[:, 3:-1].tolist()
    assert decoded.tokens[0] == model.generate(prompt, **options, exit_rule=rule)[0, 4:].tolist()


def test_rules_are_those_that_the_model_can_use(model: Any) -> None:
    assert list(exit_rules(model, [])) == LOSSY
    assert exit_rules(model, ["latent:0.25,never", "plain"])["latent:0.25,never"] == LatentExit(threshold=(0.25, None))
    base = tiny_llama(tiny_tokenizer())
    plainer = ZttForCausalLM(ZttConfig(base_config=base, cycles=2, zero_tokens=False))
    assert list(exit_rules(plainer, [])) == ["cycles:1", "confidence", "entropy", "kl", "latent"]
    assert exit_rules(ZttForCausalLM(ZttConfig(base_config=base, cycles=1)), []) == {}
    ruler = Ruler(model, torch.randint(3, 60, (4, 16)))
    for name, rule in exit_rules(model, [], ruler).items():
        if name not in ("calibrated", "cycles:1", "cycles:2"):
            scores = ruler.scores(rule)
            assert float((scores >= rule.sign * rule.threshold).float().mean()) == pytest.approx(0.5, abs=0.02), name
    with pytest.raises(ZerodraftError, match="3 thresholds"):
        exit_rules(model, ["latent:0.1,0.2,0.3"])


def test_batches_tell_their_bound_and_what_they_answered(model: Any) -> None:
    prompts, seen = [[5, 17, 40], [9, 3], [22, 8, 31, 7]], []
    found = batches(model, prompts, CALIBRATED, (1, 2), new=6, repeats=1, on_size=seen.append)
    assert found["sizes"] == seen
    flops = model_info(model, context=3 + 3).flops_per_token
    assert found["share_of_cycles"] == pytest.approx(3 * (flops[1] - flops[0]) / flops[2])
    for size, rows in zip(seen, (1, 2), strict=True):
        assert (size["rows"], size["requests"], size["equal"]) == (rows, 4, 4)
        assert 1 < size["mean_cycles"] < 3
        assert size["bound"] == pytest.approx(
            1 / (1 - found["share_of_cycles"] * (1 - size["mean_cycles"] / 3))
        )  # fmt: skip
        assert list(size["tokens_per_second"]) == ["full depth", "over depth", "in step"]


def test_texts_in_step_end_where_they_end_alone(model: Any) -> None:
    prompts = [[5, 17, 40], [9, 3], [22, 8, 31, 7]]
    options = {"do_sample": False, "pad_token_id": 0, "exit_rule": CALIBRATED}
    alone = [model.generate(torch.tensor([p]), max_new_tokens=9, **options)[0, len(p) :].tolist() for p in prompts]
    ends = frozenset({alone[0][2]})
    todo = [DepthRequest(prompt=p, max_new_tokens=n, ends=ends) for p, n in zip(prompts, (9, 4, 7), strict=True)]
    expected = []
    for text, one in zip(alone, todo, strict=True):
        end = next((at + 1 for at, token in enumerate(text) if token in ends), len(text))
        expected.append(text[: min(end, one.max_new_tokens)])
    assert in_step(model, 2, todo, CALIBRATED) == expected
    assert len(expected[0]) < 9


def test_a_rule_with_a_threshold_for_each_cycle_is_one_method(bench: Bench, model: Any) -> None:
    each = ",".join(["0.7", "never", "0.5"][: model.config.cycles - 1])
    found = bench("--methods", f"plain,latent:{each},cycles:1", "--limit", "1")
    assert set(found["overall"]) == {"hf_plain", "plain", f"latent:{each}", "cycles:1"}


def test_a_place_for_no_file_is_refused_before_anything_is_measured(bench: Bench, tmp_path: Path) -> None:
    assert "a directory: name a file" in bench("--output", str(tmp_path), code=2)["error"]
    assert not any(tmp_path.iterdir())


def test_what_does_not_fit_is_told(bench: Bench, text: Path, target_dir: Path, prompts: Path, capsys: Any) -> None:
    assert "need not be equal: leave cycles:1 out" in bench("--equality-only", "--methods", "cycles:1", code=2)["error"]
    assert "measures neither" in bench("--equality-only", "--text", str(text), code=2)["error"]
    assert "are greedy" in bench("--temperature", "1", "--batches", "2", code=2)["error"]
    assert "at least 1" in bench("--batches", "0", code=2)["error"]
    found = bench("--equality-only")
    assert found["equal"] is True
    assert not set(found["overall"]) & set(LOSSY)
    plain = ["bench", "decode", "--target", str(target_dir), "--prompts", str(prompts), "--json"]
    for words, sentence in (
        (["--text", str(text)], "are for looped models"),
        (["--methods", "latent:0.3"], "needs a looped model"),
        (["--methods", "self:1"], "needs a looped model"),
    ):
        assert main([*plain, *words]) == 2
        assert sentence in json.loads(capsys.readouterr().out)["error"]
