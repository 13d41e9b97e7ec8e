"""Runs `compiled.py` where no annotations are checked: those checks are what the compiler would meet first."""

import os
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).with_name("compiled.py")


def test_compiled_models_compute_the_same() -> None:
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-x", "-p", "no:cacheprovider", str(FILE)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = FILE.parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
