"""How a run reports its progress where there is no terminal."""

import logging
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from zerodraft.training import callbacks
from zerodraft.training.callbacks import ProgressBar


@pytest.mark.parametrize(("seconds", "lines"), [(10.0, 0), (-1.0, 40)])
def test_in_a_pipe_progress_is_a_line_now_and_then(
    seconds: float,
    lines: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(callbacks, "SECONDS_BETWEEN_LINES", seconds)
    bar, state, control = ProgressBar(items_per_step=8), TrainerState(max_steps=40), TrainerControl()
    settings = TrainingArguments(output_dir=str(tmp_path), report_to=[])
    with caplog.at_level(logging.INFO, "zerodraft.training.callbacks"):
        bar.on_train_begin(settings, state, control)
        for step in range(1, 41):
            state.global_step = step
            bar.on_step_end(settings, state, control)
            bar.on_log(settings, state, control, logs={"loss": 2.0})
        bar.on_train_end(settings, state, control)
    assert capsys.readouterr().err == ""
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == lines
    assert all(line.startswith(f"step {at} of 40: loss 2.000, ") for at, line in enumerate(told, 1))
