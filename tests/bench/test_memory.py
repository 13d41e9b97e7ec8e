"""`zerodraft bench memory`: a process for each method, and peaks that see what a method allocates."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zerodraft.cli.main import main


def test_methods_have_processes_of_their_own(
    target_dir: Path, drafter_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "memory.json"
    words = ["--target", str(target_dir), "--drafter", str(drafter_dir), "--prompts", str(prompts), "--json"]
    words += ["--max-new-tokens", "8", "--methods", "full", "--output", str(output)]
    assert main(["bench", "memory", *words]) == 0
    found = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    assert found == json.loads(output.read_text(encoding="utf-8"))
    assert list(found["memory"]) == ["hf_plain", "full"]
    for name, values in found["memory"].items():
        mib = values["mib"]
        assert (values["prompt_tokens"], values["new_tokens"]) == (found["settings"]["prompt_tokens"], 8), name
        assert 0 < mib["load_peak"] <= mib["peak"]
        assert values["ratio"] == pytest.approx(mib["peak"] / found["memory"]["hf_plain"]["mib"]["peak"])
    assert found["ratio"] == found["memory"]["full"]["ratio"]
    assert set(found["provenance"]["sha256"]) == {"target", "drafter", "prompts"}
    for page in ("report.html", "page.md"):
        assert main(["bench", "report", str(output), "--out", str(tmp_path / page)]) == 0
        assert f"{found['ratio']:.2f}x" in (tmp_path / page).read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["bench", "memory", *words[:-2], "--methods", "fast"]) == 2
    assert "'fast' is unknown" in capsys.readouterr().out


PEAKS = """
import torch
from zerodraft.bench.memory import forget_peak, peak, resident
assert forget_peak()
before, now = peak(), resident()
torch.ones(64 * 2**18)  # 64 MiB
print(before, now, peak())
assert forget_peak()
print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_peaks_see_what_is_gone() -> None:
    # a process of its own: of a large one the system takes more pages back meanwhile than are measured
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, timeout=120, check=True)
    before, now, with_ones, after = map(float, done.stdout.split())
    assert before == pytest.approx(now, rel=0.2)
    assert with_ones - before > 55
    assert after - before < 30
