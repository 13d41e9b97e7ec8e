"""Windows of layers that run twice: an open gate is the unrolled model, a closed one the model itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from evidence_table import read_result
from evidence_windows import WindowTable, section
from tests.saved import save_target
from tests.ztt.tiny import tiny_plain, tokens
from windows import block_losses, main, sweep
from zerodraft.common.errors import ZerodraftError
from zerodraft.ztt.convert import restack, restack_weights


def test_the_second_run_is_that_of_the_unrolled_model() -> None:
    model, ids = tiny_plain(num_hidden_layers=4), tokens(3, 12)
    own = block_losses(model, ids)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    whole = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    assert torch.allclose(own, whole, atol=1e-6)
    given = (model, {"text": ids}, {"text": own})
    with pytest.raises(ZerodraftError, match="no window leaves a layer"):
        list(sweep(*given, widths=[3, 2], firsts=[0, 2], gates=[1.0]))
    # three layers after the first leave none behind
    closed, opened = sweep(*given, widths=[2, 3], firsts=[1], gates=[0.0, 1.0])
    assert (opened.first, opened.layers) == (1, 2)
    assert closed.increase["text"].mean == pytest.approx(0, abs=1e-6)
    order = [0, 1, 2, 1, 2, 3]
    unrolled = type(model)(restack(model.config, order)).eval()
    unrolled.load_state_dict(restack_weights(model.state_dict(), "model.layers", order))
    expected = block_losses(unrolled, ids) - own
    assert opened.increase["text"].mean == pytest.approx(float(expected.mean()), abs=1e-5)


def test_from_a_plan_to_the_page(
    plan_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(plan_file())]) == 2
    assert "has no model.start" in capsys.readouterr().err
    file = plan_file(recipe={"model": {"start": str(save_target(tmp_path / "start")), "num_hidden_layers": 4}})
    words = ["--widths", "2", "--firsts", "1", "--gates", "0.5", "--blocks", "2", "--results", str(tmp_path)]
    assert main([str(file), *words]) == 0
    found = read_result(WindowTable, tmp_path / "windows-tiny.json")
    assert {*found.losses} == {"validation", "other"}
    page = "\n".join(section(found))
    assert "| layers run twice | gate | validation loss | other loss |" in page
    assert "| 2 to 3 | 0.5 | " in page
