"""The one place where models, configurations and tokenizers come from: transformers' `from_pretrained` without running
code that lies beside the files, and with one sentence for whatever is wrong with them.

transformers only warns where weights are missing, misshapen or not finite, and asks on standard input whether it may
run code; both are refused here. Sizes in `config.json` are compared with what the weight files hold before anything is
allocated by them.
"""

import math
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from zerodraft.common.errors import ZerodraftError, reading
from zerodraft.common.files import check_regular, read_json

Name = str | PathLike[str]

PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
DEEPEST = 1 << 12
"""Layers of an unrolled model at the most: every one has a step, and a slot in the cache."""
MOST_LABELS = 1 << 20
ROOM = 1 << 20
"""Parameters that may be missing from a checkpoint; the message then names them."""


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    # a CUDA build names its kind of accelerator on machines that have none, too
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def load_config(name: Name) -> PreTrainedConfig:
    """The configuration of a model.

    Raises:
        ZerodraftError: there is none, or it is none of a kind that transformers knows.
    """
    check_files(name)
    with reading(f"The configuration of {str(name)!r}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        check_depth(config, name)
    return config


def context_of(config: PreTrainedConfig) -> int | None:
    """Positions that a language model has; None where there is no limit."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    # XLNet says -1 for a length without a limit
    return None if positions is None or positions < 0 else positions


def eos_ids(model: Any) -> frozenset[int]:
    """The tokens that end a text, by the model's generation settings; empty where it names none."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([eos] if isinstance(eos, int) else eos or ())


def check_depth(config: PreTrainedConfig, name: Name) -> None:
    """Raise for more layers than a model has: each would be built, whatever the weight files hold."""
    text = config.get_text_config()
    layers = int(getattr(text, "stored_layers", getattr(text, "num_hidden_layers", None)) or 0)
    if layers > DEEPEST:
        raise ZerodraftError(
            f"The configuration of {str(name)!r} has num_hidden_layers={layers}; a model has at most {DEEPEST}."
        )


def load_tokenizer_files(name: Name, loader: Any = AutoTokenizer, **options: Any) -> Any:
    """A tokenizer as it was saved; `loader` is a class of transformers.

    Raises:
        ZerodraftError: nothing there that transformers can read.
    """
    check_files(name)
    folder = Path(name)
    if folder.is_dir() and not options and not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        raise ZerodraftError(
            f"There is no tokenizer in '{folder}': expected tokenizer.json or another one's files; save it there with "
            "its save_pretrained."
        )
    with reading(f"The tokenizer in {str(name)!r}"):
        return loader.from_pretrained(name, trust_remote_code=False, **options)


def load_pretrained(auto_class: Any, name: Name, **kwargs: Any) -> PreTrainedModel:
    """Load a model by a class with `from_pretrained` (an `AutoModelForCausalLM`, a `ZttForCausalLM`).

    Args:
        auto_class: Whose `from_pretrained` to call.
        name: Local directory or hub id.
        **kwargs: Passed on; `dtype` defaults to that of the checkpoint.

    Raises:
        ZerodraftError: nothing to load there, a corrupted file, weights missing or of another shape, NaN or infinite.
    """
    check_files(name)
    # GGUF files have their sizes inside, weights of a few bits are not of the sizes that the configuration says
    if Path(name).is_dir() and not kwargs.get("gguf_file"):
        check_sizes(auto_class, Path(name))
    # pickled weights are read by a reader that makes tensors and nothing else
    pickled = any((Path(name) / file).is_file() for file in PICKLED) and not any(Path(name).glob("*.safetensors*"))
    options = {"dtype": "auto", "use_safetensors": not pickled, "weights_only": True} | kwargs
    with reading(f"The model {str(name)!r}"):
        loaded = auto_class.from_pretrained(name, output_loading_info=True, trust_remote_code=False, **options)
    model, info = loaded
    for problem, what in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        if wrong := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[problem]):
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ZerodraftError(
                f"The checkpoint {str(name)!r} {what} {wrong[0]!r}{more}: it does not fit its config.json; save it "
                "again from the whole model."
            )
    check_finite(model.named_parameters(), str(name))
    return model


def check_sizes(auto_class: Any, folder: Path) -> None:
    """Raise where a model of the directory's `config.json` is far larger than what its weight files hold: what is
    missing in them would be allocated first and missed afterwards."""
    files = [file for file in weight_files(folder) if file.exists()]
    config = load_config(folder)
    if not files or getattr(config, "quantization_config", None) is not None:
        return
    stored = sum(_stored_numbers(file) for file in files)
    with reading(f"The model {str(folder)!r}"), torch.device("meta"):
        if hasattr(auto_class, "from_config"):
            model = auto_class.from_config(config, trust_remote_code=False)
        else:
            model = auto_class(config)
        wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > 2 * stored + ROOM:
        raise ZerodraftError(
            f"The checkpoint {str(folder)!r} holds {stored:,} numbers, a model of its config.json has {wanted:,}: they "
            "do not belong together."
        )


def _stored_numbers(file: Path) -> int:
    """How many numbers a safetensors file holds, by the shapes in its header."""
    with reading(f"The weight file '{file}'"), safe_open(file, framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118  # no mapping


def check_finite(tensors: Iterable[tuple[str, Tensor]], owner: str) -> None:
    """Raise unless every weight is a finite number."""
    for name, tensor in tensors:
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float32)) or torch.isfinite(tensor).all()):
            raise ZerodraftError(f"The weight {name!r} of {owner!r} holds NaN or infinity: the checkpoint is damaged.")


READ = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")
"""What transformers reads of a model's directory."""


TOKENIZERS = ("*token*", "*vocab*", "*merges*", "*.model", "*.bpe", "*.codes")
"""Names that files of tokenizers have."""


def check_files(name: Name) -> None:
    """Raise for a directory of which transformers would open something that is no file."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or folder.exists():
            raise ZerodraftError(f"There is no model directory at '{folder}'.")
        return
    for pattern in READ:
        for path in folder.glob(pattern):
            check_regular(path)
    if (folder / "config.json").exists():
        read_config(folder)
    for file in ("generation_config.json", "tokenizer_config.json"):
        if (folder / file).exists():
            read_json(folder / file)


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a directory's `config.json`.

    Raises:
        ZerodraftError: there is none, or transformers would make a name for each of far too many labels.
    """
    fields = read_json(folder / "config.json", "configuration")
    open_ones = [fields]
    while open_ones:
        part = open_ones.pop()
        labels = part.get("num_labels")
        if isinstance(labels, int) and labels > MOST_LABELS:
            raise ZerodraftError(f"The configuration in '{folder}' has num_labels={labels}, more than {MOST_LABELS}.")
        open_ones += [value for value in part.values() if isinstance(value, dict)]
    return fields


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
        ZerodraftError: neither is there, or a file is missing or damaged.
    """
    for file in weight_files(folder):
        if not file.exists():
            raise ZerodraftError(f"'{file}' is missing: fetch the whole checkpoint (safetensors are needed).")
        check_regular(file, "weight file")
        with reading(f"The weight file '{file}'"), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                yield name, tensors.get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: one, or the shards that an index names; they need not be there."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single]
    names = read_json(index, "index").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ZerodraftError(f"'{index}' is not an index of shards: it has no weight_map.")
    # an index may not lead out of its directory
    if odd := [name for name in names.values() if Path(name).name != name]:
        raise ZerodraftError(f"'{index}' names the file '{odd[0]}', which is not beside it.")
    return [folder / name for name in sorted(set(names.values()))]
