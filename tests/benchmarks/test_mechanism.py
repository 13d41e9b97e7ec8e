"""What is found in a model is what the model itself says, and what the page says about it is what was found."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evidence_mechanism import Mechanism, Mechanisms, draw_masses, figure, section
from evidence_plan import Plan
from evidence_runs import make_runs
from evidence_table import read_result
from mechanism import NO_ZERO_TOKEN, SAME_KEY, look_into, main, states_by_cycle, whole_loss
from tests.ztt.tiny import tiny, tokens
from zerodraft import ZttForCausalLM
from zerodraft.common.errors import ZerodraftError

IDS = tokens(3, 24)


def eager(**options: Any) -> ZttForCausalLM:
    """A random model that gives its attention away."""
    return tiny(attn_implementation="eager", **options)


def test_masses_and_losses_are_the_models_own() -> None:
    model = eager()
    found = look_into(model, IDS, batch_size=2)
    assert found["executions"] == ("1.1", "2.1", "3.1", "2.2", "3.2", "2.3", "3.3", "4.1")
    with torch.no_grad():
        out = model(IDS, labels=IDS, cycle_weights=(1, 1, 1))
        mass = model(IDS, output_zero_mass=True).zero_mass[:, 16:].mean((0, 1)).flatten(0, 1)
        first = model(IDS, output_attentions=True).attentions[3][:, :, 16:, 0].mean((0, 2))
    assert torch.tensor(found["losses"]) == pytest.approx(out.cycle_losses.numpy(), abs=1e-5)
    zero = torch.tensor(found["zero_mass"])
    assert zero[1:-1] == pytest.approx(mass.numpy(), abs=1e-5)
    assert not zero[[0, -1]].any(), "head and tail have no zero token"
    assert torch.tensor(found["first_mass"][3]) == pytest.approx(first.numpy(), abs=1e-5)
    assert found["even_mass"] == pytest.approx(sum(1 / (t + 1) for t in range(16, 24)) / 8)


def test_without_zero_tokens_no_mass_lies_on_them() -> None:
    found = look_into(eager(zero_tokens=False), IDS)
    assert not torch.tensor(found["zero_mass"]).any()


@pytest.mark.parametrize(
    "options", [{}, {"input_injection": True}, {"cycle_scales": True}, {"head_layers": 0}, {"tail_layers": 0}]
)
def test_states_are_those_between_the_cycles(options: dict[str, Any]) -> None:
    model = eager(**options)
    with torch.no_grad(), states_by_cycle(model) as states:
        out = model(IDS, output_hidden_states=True)
    scales = torch.ones(3) if model.cycle_scales is None else model.cycle_scales()
    shared, head = model.config.shared_layers, model.config.head_layers
    expected = [out.hidden_states[head]]
    expected += [scales[cycle] * out.hidden_states[head + shared * (cycle + 1)] for cycle in range(3)]
    assert len(states) == 4
    if not model.config.tail_layers:
        # what the model gives as its last state is behind the final norm
        states[-1] = model.family.model.norm(states[-1])
    for state, other in zip(states, expected, strict=True):
        assert torch.allclose(state, other, atol=1e-5)


def test_movement_by_hand() -> None:
    model = eager()
    with torch.no_grad(), states_by_cycle(model) as states:
        model(IDS)
    moved = (states[2] - states[1]).norm(dim=-1) / states[2].norm(dim=-1)
    turned = torch.cosine_similarity(states[2], states[1], dim=-1)
    found = look_into(model, IDS, batch_size=2)
    assert found["moved"][1] == pytest.approx(float(moved.mean()), abs=1e-5)
    assert found["turned"][1] == pytest.approx(float(turned.mean()), abs=1e-5)


def test_models_that_cannot_be_looked_into_are_refused() -> None:
    with pytest.raises(ZerodraftError, match='schedule="block" and without cycle_gates'):
        look_into(eager(schedule="layer"), IDS)
    with pytest.raises(ZerodraftError, match="blocks of 16 tokens are too short"):
        look_into(eager(), IDS[:, :16])


def test_from_runs_to_the_page(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan(seeds=[0], recipe={"data": {"context_length": 24}})
    make_runs(plan, tmp_path / "tiny.json", tmp_path / "runs", words=["again"], tell=lambda text: None)
    assert main([str(tmp_path / "runs" / "tiny"), "--results", str(tmp_path)]) == 0
    found = read_result(Mechanisms, tmp_path / "mechanism-tiny.json")
    assert [(one.arm, one.text) for one in found.results] == [
        ("vanilla", "validation"), ("vanilla", "other"), ("ztt", "validation"), ("ztt", "other"),
    ]  # fmt: skip
    vanilla, ztt = found.results[0], found.results[2]
    assert vanilla.without == {}
    assert {*ztt.without} == {SAME_KEY, NO_ZERO_TOKEN}
    assert ztt.without[NO_ZERO_TOKEN] != ztt.losses[-1]
    page = "\n".join(section(found))
    assert f"| validation | ztt | 1 | {ztt.losses[0]:.4f}, {ztt.losses[1]:.4f} |" in page
    draw_masses(found, tmp_path / "page.md")
    assert (tmp_path / figure(found.table)).stat().st_size > 1000


def test_whole_loss_is_that_of_all_rows() -> None:
    model = eager()
    with torch.no_grad():
        expected = model(IDS, labels=IDS).loss
    assert whole_loss(model, IDS, batch_size=2) == pytest.approx(float(expected), abs=1e-5)


def mechanism(arm: str, rate: str, seed: int, loss: float, mass: float) -> Mechanism:
    return Mechanism(
        arm=arm, rate=rate, seed=seed, text="validation", tokens=100, executions=("1.1", "1.2"),
        first_mass=((0.25, 0.5), (0.125, 0.0)), even_mass=0.02, zero_mass=((0.0, 0.0), (mass, 0.5)),
        losses=(loss + 1, loss), moved=(0.5, 0.25), turned=(0.9, 1.0), without={NO_ZERO_TOKEN: loss + 0.5},
    )  # fmt: skip


def test_the_page_shows_means_over_the_seeds_of_the_best_rate() -> None:
    results = (
        mechanism("ztt", "1e-2", 0, 3.0, 0.1),
        mechanism("ztt", "1e-2", 1, 2.0, 0.3),
        mechanism("ztt", "1e-3", 0, 3.5, 0.9),
    )
    found = Mechanisms(table="tiny", results=results, provenance={})
    page = "\n".join(section(found))
    assert "| validation | ztt | 2 | 3.5000, 2.5000 | 3.0000 | 0.500, 0.250 | 0.900, 1.000 |" in page
    assert "| ztt | 1.1 | - | 0.250, 0.500 |" in page
    assert "| ztt | 1.2 | 0.200, 0.500 | 0.125, 0.000 |" in page
    # on the seed that both rates have the other one is better; 1e-2 has the lower mean of all
    lower = replace(found, results=(*results[:2], mechanism("ztt", "1e-3", 0, 2.75, 0.9)))
    assert "| validation | ztt | 1 | 3.7500, 2.7500 |" in "\n".join(section(lower))


def test_folders_without_finished_runs_and_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no finished run in" in capsys.readouterr().err
    (tmp_path / "mechanism-x.json").write_text('{"benchmark": "evidence"}', encoding="utf-8")
    with pytest.raises(ZerodraftError, match=r"none of 'python benchmarks/mechanism\.py'"):
        read_result(Mechanisms, tmp_path / "mechanism-x.json")
