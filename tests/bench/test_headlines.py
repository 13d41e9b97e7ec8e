"""Figures that are written by hand, in the README and in docs/decoding.md, are those of results/decode.json."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return json.loads((ROOT / "results" / "decode.json").read_text(encoding="utf-8"))


def section() -> str:
    text = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    return text.partition("## Measured so far")[2].partition("\n## ")[0]


def test_the_table_of_the_documentation(result: dict[str, Any]) -> None:
    """If it fails after a new measurement: the expected table is what belongs there."""
    tasks = list(result["by_task"])
    header = ["method", "tokens/s", "speedup", "tokens per pass", *(task.replace("_", " ") for task in tasks)]
    rows = [header, ["---"] * len(header)]
    for name, values in result["overall"].items():
        speeds = (f"{result['by_task'][task][name]['speedup']:.2f}" for task in tasks)
        mat = "-" if values["mat"] is None else f"{values['mat']:.2f}"
        about = f"`{name}`: {result['methods'][name]}"
        rows.append([about, f"{values['tokens_per_second']:.1f}", f"{values['speedup']:.2f}x", mat, *speeds])
    expected = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    table = "\n".join(line for line in section().split("\n") if line.startswith("|"))
    assert table == expected, f"docs/decoding.md should have\n{expected}"


def test_figures_in_sentences(result: dict[str, Any]) -> None:
    readme, prose = (ROOT / "README.md").read_text(encoding="utf-8"), re.sub(r"(?m)^\|.*$", "", section())
    readme = re.sub(r"\s+", " ", readme)
    of_plain, of_own = (f"{result[f'speedup_over_{name}_plain']:.2f}" for name in ("hf", "own"))
    prompts = str(result["prompts_measured"])
    assert re.findall(r"(\d+\.\d+) times as fast as", readme) == [of_plain, of_own]
    assert f"{of_plain} times as fast as transformers' `generate`" in readme
    assert f"{of_own} times as fast as our own plain decoding" in readme
    assert re.findall(r"\[(\d+) prompts, (\w+) tasks\]", readme) == [(prompts, count_of(result["by_task"]))]
    assert re.findall(r"(\d+) prompts of Spec-Bench over its (\w+) tasks", prose) == [
        (prompts, count_of(result["by_task"]))
    ]
    known = {f"{value:.2f}" for key, value in result.items() if key.startswith("speedup_over") and value is not None}
    known |= {f"{values['speedup']:.2f}" for values in result["overall"].values()}
    said = re.findall(r"(\d+\.\d+)x", prose)
    assert set(said) <= known, f"docs/decoding.md says {sorted(set(said) - known)}, which is in no result"
    if "every method wrote the tokens of" in prose:
        assert result["identical"]


def count_of(things: Any) -> str:
    return ("no", "one", "two", "three", "four", "five", "six", "seven")[len(things)]
