"""Makes `.venv` with the tested versions, once: the part of every `make` target that needs nothing but Python.

The one thing to get right is torch. On Linux its default wheel is a CUDA build of gigabytes; the CPU build is a wheel
with the local version `+cpu`. pip finds that wheel where the machine is configured to offer it; elsewhere `uv` knows
where CPU builds are published. Nothing else is installed until one of the two worked, so nothing can pull the CUDA
build behind our back.
"""

from __future__ import annotations  # an old Python must get as far as the sentence that says it is too old

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "zerodraft-environment.txt"
CONSTRAINTS = ROOT / "constraints.txt"
INPUTS = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__).resolve())
OLDEST_PYTHON = (3, 10)
KENLM_SECONDS = 240.0
"""Building KenLM takes about a minute on an idle machine; nobody waits much longer for what they can do without."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes .venv; does nothing when it is up to date.")
    parser.add_argument("--torch", choices=("cpu", "cuda"), default="cpu", help="which build of torch (default: cpu)")
    build = parser.parse_args().torch
    wanted = fingerprint(build)
    if STAMP.is_file() and STAMP.read_text() == wanted and PYTHON.exists():
        return 0
    started = time.monotonic()
    try:
        make_venv()
        install_torch(build)
        say("installing zerodraft and the tools that it is tested with")
        pip("install", "-c", str(CONSTRAINTS), "-e", f"{ROOT}[all,dev]")
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    # the environment is whole without KenLM, so whatever becomes of that is not tried again
    STAMP.write_text(wanted)
    try_kenlm()
    say(f"ready ({time.monotonic() - started:.0f} s)")
    return 0


class Failure(Exception):
    """The environment cannot be made; the message says why and what to do."""


def fingerprint(build: str) -> str:
    """What the environment depends on; a different value means that it has to be brought up to date."""
    digest = hashlib.sha256()
    for path in INPUTS:
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()} torch={build}\n"


def say(text: str) -> None:
    print(f"[environment] {text}", flush=True)


def make_venv() -> None:
    if sys.version_info < OLDEST_PYTHON:
        raise Failure(
            f"this is Python {sys.version_info[0]}.{sys.version_info[1]}, and zerodraft needs 3.10 or newer; "
            "name a newer one, for example: make PYTHON=python3.12 test"
        )
    if PYTHON.exists() and run([str(PYTHON), "-m", "pip", "--version"]).returncode == 0:
        return
    say(f"creating {VENV.name} with Python {sys.version_info[0]}.{sys.version_info[1]}")
    shutil.rmtree(VENV, ignore_errors=True)
    made = run([sys.executable, "-m", "venv", str(VENV)])
    if made.returncode != 0:
        raise Failure(
            f"{sys.executable} cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv): "
            + last_line(made)
        )


def install_torch(build: str) -> None:
    version = re.search(r"^torch==([\w.]+)", CONSTRAINTS.read_text(), re.MULTILINE)
    if version is None:
        raise Failure(f"{CONSTRAINTS.name} names no torch version")
    requirement = f"torch=={version[1]}"
    if installed_build(version[1]) == build:
        return
    if build == "cuda" or sys.platform == "darwin":  # the wheels for macOS are CPU (and Metal) builds already
        say(f"installing {requirement}")
        pip("install", "--force-reinstall", "-c", str(CONSTRAINTS), requirement)
        return
    say(f"installing {requirement} (CPU build)")
    local = run([str(PYTHON), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), f"{requirement}+cpu"])
    if local.returncode == 0:
        return
    say("pip is not configured with CPU builds of torch; asking uv, which knows where they are")
    pip("install", "uv")
    command = [str(PYTHON), "-m", "uv", "pip", "install", "-q", "--python", str(PYTHON), "--torch-backend=cpu"]
    remote = run([*command, "-c", str(CONSTRAINTS), requirement])
    if remote.returncode != 0:
        raise Failure(
            f"no CPU build of {requirement} could be installed, neither by pip nor by uv ({last_line(remote)}); "
            f"install one into {VENV.name} yourself, or take the CUDA build with: make TORCH=cuda test"
        )


def try_kenlm() -> None:
    """KenLM, for the tests that read its files. There are no wheels, and not every machine can compile it."""
    say(f"building kenlm for its tests (optional, at most {KENLM_SECONDS / 60:.0f} minutes)")
    command = [str(PYTHON), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), "kenlm"]
    if run(command, seconds=KENLM_SECONDS).returncode != 0:
        say("kenlm could not be built here: the tests that need it will be skipped")


def installed_build(version: str) -> str | None:
    """`cpu` or `cuda` when this version of torch is in the environment, else None."""
    code = "import torch; print(torch.__version__, 'cuda' if torch.version.cuda else 'cpu')"
    answer = run([str(PYTHON), "-c", code])
    found, _, build = answer.stdout.strip().rpartition(" ")
    return build if answer.returncode == 0 and found.split("+")[0] == version else None


def pip(*arguments: str) -> None:
    done = run([str(PYTHON), "-m", "pip", arguments[0], "-q", *arguments[1:]])
    if done.returncode != 0:
        sys.stderr.write("".join(f"    {line}\n" for line in done.stderr.splitlines()[-12:]))
        raise Failure(f"pip {arguments[0]} {arguments[-1]} failed: {last_line(done)}")


def run(command: list[str], seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, or ends it with all that it has started once the time is over."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    # an environment that is active in the calling shell is not the one that we make
    for name in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"):
        environment.pop(name, None)
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=seconds)
    except BaseException as reason:
        # compilers that pip has started would hold the pipes open
        os.killpg(process.pid, signal.SIGKILL)
        out, error = process.communicate()
        if not isinstance(reason, subprocess.TimeoutExpired):
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    return (errors or lines or ["no message"])[-1].strip()


if __name__ == "__main__":
    sys.exit(main())
