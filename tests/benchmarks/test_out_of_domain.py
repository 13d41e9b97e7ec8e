"""Losses by kind of token: the parts make the whole, markup is found and undone, and the page tells the differences."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evidence_domain import Domain, Domains, Part, section
from evidence_plan import Plan
from evidence_runs import make_runs
from evidence_table import read_result
from out_of_domain import (
    KINDS,
    TEMPERATURES,
    by_markup,
    calibrated,
    characters,
    kind_of,
    main,
    pair_counts,
    plain_text,
    splits,
    token_losses,
)
from tests.ztt.tiny import VOCABULARY, tiny
from tests.ztt.tiny import tokens as drawn
from zerodraft.common.errors import ZerodraftError
from zerodraft.training.data import PackedBlocks
from zerodraft.training.tokenizer import train_tokenizer

IDS = drawn(3, 24)

WIKITEXT = """
 = Lobster =

 It is 0 @.@ 7 cm ( 2 in ) long , isn 't it ? The " lobster 's " <unk> is red @-@ brown . It did n't eat .
 \n"""


def test_markup_is_undone() -> None:
    assert plain_text(WIKITEXT) == "It is 0.7 cm (2 in) long, isn't it? It didn't eat."


def test_text_without_markup_stays() -> None:
    text = "One (or two) don't.\n\nYes, it's \"so\"."
    assert plain_text(text) == text


def test_tokens_of_markup_and_those_after_it() -> None:
    tokens = ["a", "<", "unk", ">", " b", " ", ",", " @-@", " c", "\n"]
    row = [0, 1, 2, 3, 4, 5, 6, 4, 0, 7, 8, 9, 0]
    #      a  <  unk > ' b' ' '  ,  ' b' a ' @-@' ' c' \n a
    assert by_markup(torch.tensor([row]), tokens).tolist() == [[0, 1, 1, 1, 2, 1, 1, 2, 0, 1, 1, 2, 0]]


@pytest.mark.parametrize(
    ("token", "kind"),
    [(" the", "word begins"), ("ing", "word goes on"), (" 7", "digit"), (" ", "space or sign"), (",", "space or sign"),
     ("\n\n", "line break"), ("é", "outside ASCII"), ("<|bos|>", "special")],
)  # fmt: skip
def test_kinds_of_tokens(token: str, kind: str) -> None:
    assert KINDS[kind_of(token)] == kind


def test_characters_are_one_for_each_byte() -> None:
    tokenizer = train_tokenizer(["the fox jumps\nover the dog é"] * 20, 280, 64)
    text = "the fox\né"
    tokens = characters(tokenizer)
    joined = "".join(tokens[index] for index in tokenizer(text, add_special_tokens=False)["input_ids"])
    assert len(joined) == len(text.encode())
    assert joined.startswith("the fox\n")


def test_pairs_are_counted_in_the_training_text() -> None:
    blocks = PackedBlocks(np.array([0, 1, 0, 1, 2], np.uint16), 2)
    assert pair_counts(blocks, 3).view(3, 3).tolist() == [[0, 2, 0], [1, 0, 1], [0, 0, 0]]


def test_every_token_is_in_one_part_of_each_split() -> None:
    tokens = [f" {chr(97 + index % 26)}" for index in range(VOCABULARY)]
    counts = torch.zeros(VOCABULARY**2, dtype=torch.long)
    counts[IDS[0, 0] * VOCABULARY + IDS[0, 1]] = 100
    found = splits(IDS, tokens, counts)
    for names, part in found.values():
        assert part.shape == IDS[:, 1:].shape
        assert 0 <= int(part.min()) <= int(part.max()) < len(names)
    assert found["frequency"][1][0, 0] == 2
    assert found["position"][1][0].bincount().tolist() == [7, 16]


def test_losses_entropies_and_temperatures_by_hand() -> None:
    model = tiny()
    losses, entropies, heated = token_losses(model, IDS, batch_size=2)
    with torch.no_grad():
        logits = model(IDS).logits[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), IDS[:, 1:], reduction="none")
    assert torch.allclose(losses, expected, atol=1e-5)
    assert torch.allclose(entropies, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5)
    hot = F.cross_entropy(logits.transpose(1, 2) / TEMPERATURES[-1], IDS[:, 1:], reduction="none").mean(1)
    assert torch.allclose(heated[:, -1], hot, atol=1e-5)
    assert torch.allclose(heated[:, TEMPERATURES.index(1.0)], losses.mean(1), atol=1e-5)


def test_a_temperature_is_fitted_on_other_rows_than_it_is_measured_on() -> None:
    heated = torch.ones(4, len(TEMPERATURES))
    heated[::2, 3] = 0.0
    heated[1::2, 3] = 0.75
    assert calibrated(heated) == (TEMPERATURES[3], 0.75)


def domain(arm: str, seed: int, loss: float, markup: float) -> Domain:
    parts = {
        "markup": {"text": Part(share=0.75, loss=2.0, entropy=2.0), "markup": Part(share=0.25, loss=markup, entropy=3)}
    }
    return Domain(
        arm=arm, rate="1e-2", seed=seed, text="other", tokens=100, parts=parts,
        whole=Part(share=1, loss=loss, entropy=2.5), temperature=1.5,
        loss_at_temperature=loss - 0.5, loss_beside_it=loss,
    )  # fmt: skip


def test_differences_are_paired_by_seed() -> None:
    results = (domain("vanilla", 0, 4.0, 8.0), domain("vanilla", 1, 4.5, 9.0), domain("ztt", 0, 4.25, 9.0))
    page = "\n".join(section(Domains(table="tiny", results=results, provenance={})))
    assert "| other | vanilla | 2 | 4.2500 | 2.5000 | 1.50 | 4.2500, 3.7500 | - | - |" in page
    assert "| other | ztt | 1 | 4.2500 | 2.5000 | 1.50 | 4.2500, 3.7500 | 0.2500 | 0.2500 |" in page
    assert "| other | markup: markup | 0.250 | 8.5000 | 3.0000 | 1.0000 (+0.2500) |" in page


def test_from_runs_to_the_page(
    make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ELSEWHERE", str(tmp_path))
    evaluation = {"other": f"{tmp_path}/other.txt", "unset": "$ELSEWHERE/other.txt"}
    plan = make_plan(seeds=[0], recipe={"data": {"evaluation": evaluation}})
    (tmp_path / "other.txt").write_text((" The lazy dog , a <unk> , is quick @-@ brown . A fox jumps . \n") * 20)
    (tmp_path / "third.txt").write_text("small models learn " * 20)
    make_runs(plan, tmp_path / "tiny.json", tmp_path / "runs", words=["again"], tell=lambda text: None)
    monkeypatch.delenv("ELSEWHERE")
    monkeypatch.setenv("ZERODRAFT_DATA", str(tmp_path))
    words = [str(tmp_path / "runs" / "tiny"), "--results", str(tmp_path / "results"), "--text"]
    assert main([*words, f"third={tmp_path / 'third.txt'}"]) == 0
    found = read_result(Domains, tmp_path / "results" / "out-of-domain-tiny.json")
    assert found.texts() == ["validation", "other", "other without markup", "third"]
    for one in found.results:
        for parts in one.parts.values():
            assert sum(part.share for part in parts.values()) == pytest.approx(1, abs=1e-4)
            whole = sum(part.share * part.loss for part in parts.values())
            assert whole == pytest.approx(one.whole.loss, abs=1e-3)
    page = "\n".join(section(found))
    assert "| other | markup: after markup |" in page
    assert "| third | ztt | 1 |" in page
    assert found.provenance["command"] == (
        "python benchmarks/out_of_domain.py '$ZERODRAFT_DATA/runs/tiny' --results '$ZERODRAFT_DATA/results' "
        "--text 'third=$ZERODRAFT_DATA/third.txt'"
    )
    assert main([*words, "third"]) == 2

    longer = make_plan(seeds=[1], recipe={"data": {"evaluation": evaluation, "context_length": 24}})
    make_runs(longer, tmp_path / "longer.json", tmp_path / "runs", words=["again"], tell=lambda text: None)
    assert main(words[:-1]) == 2
    assert "vanilla/1e-2/1 has another data.context_length than vanilla/1e-2/0" in capsys.readouterr().err


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out-of-domain-x.json").write_text('{"benchmark": "evidence"}', encoding="utf-8")
    with pytest.raises(ZerodraftError, match=r"none of 'python benchmarks/out_of_domain\.py'"):
        read_result(Domains, tmp_path / "out-of-domain-x.json")
