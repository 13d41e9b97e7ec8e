"""One job that tells on a machine with a GPU whether this library is right there, and how fast.

    python benchmarks/gpu/truth.py --minutes 2.8 --out FOLDER
    python benchmarks/gpu/truth.py --rehearse --out FOLDER

It needs nobody. Each part is a process of its own with a limit, each step of a part stands alone, and everything that
is known is in `FOLDER/truth.json`, which is written whole whenever something new is. Parts that check run beside each
other; parts that measure come after them, one at a time. The exit code is 0 if everything that began passed.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# nothing of the library, nor torch: what is wrong with them is to be told, not to be fallen over
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    """A function of a module that takes a `Report`, and the seconds that it may take; what is measured later may need
    it."""

    module: str
    seconds: float
    needed: bool = False


CHECKS = {
    "facts": Part("checks_machine", 40),
    "weights": Part("speed", 100, needed=True),
    "attention": Part("checks_attention", 60),
    "ztt": Part("checks_looped", 80),
    "drafters": Part("checks_decoding", 80),
    "flex": Part("checks_attention", 80),
    "tests": Part("checks_machine", 80),
    "commands": Part("checks_machine", 80),
    "compiling": Part("speed", 80),
}
"""They run together."""
MEASUREMENTS = {"decode": Part("speed", 85), "depth": Part("speed", 25), "training": Part("speed", 45)}
"""Each has the machine for itself; what is most wanted comes first."""
PARTS = CHECKS | MEASUREMENTS
TOGETHER = 0.42
"""Share of the time after which the checks have to be over."""
LEAST = 8
"""Seconds with which no part is started any more."""
LINES = 15
"""Of what a process printed, its end."""


class Running:
    """A process at work on some parts, in a session of its own, so that what it starts ends with it."""

    def __init__(self, names: Sequence[str], folder: Path, seconds: float, *, small: bool) -> None:
        self.names, self.folder, self.seconds = names, folder, seconds
        self.began, self.ended = time.monotonic(), ""
        words = [sys.executable, __file__, "--part", *names, "--out", str(folder), "--minutes", str(seconds / 60)]
        # beside each other, processes with several threads would wait for one another
        threads = 1 if small or names[0] in CHECKS else 8
        self.log = folder / f"{names[0]}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*words, *["--rehearse"] * small],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                start_new_session=True,
            )

    def look(self, *, stop: bool) -> bool:
        """Whether it is over; its limit ends it, and so does `stop`."""
        if self.ended:
            return True
        code, taken = self.process.poll(), time.monotonic() - self.began
        if code is None and not stop and taken <= self.seconds:
            return False
        if code is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.ended = f"stopped after {taken:.0f} s" if code is None else f"ended with {code} after {taken:.0f} s"
        return True

    def told(self) -> dict[str, Any]:
        """What is known of its parts by now."""
        files = {name: self.folder / f"{name}.json" for name in self.names}
        steps = {name: json.loads(file.read_text("utf-8")) if file.is_file() else {} for name, file in files.items()}
        output = self.log.read_text("utf-8", "replace").rstrip().split("\n")[-LINES:]
        return {name: {"state": self.ended or "running", "steps": steps[name], "output": output} for name in self.names}


class Job:
    """All parts, and the file with what they found."""

    def __init__(self, out: Path, minutes: float, *, small: bool, only: Sequence[str]) -> None:
        self.out, self.small, self.only = out, small, only or list(PARTS)
        self.end, self.seconds = time.monotonic() + 60 * minutes, 60 * minutes
        self.result: dict[str, Any] = {"minutes": minutes, "rehearsal": small, "parts": {}}
        self.written = ""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def run(self) -> bool:
        """Everything that fits; whether all that began passed."""
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="truth-") as folder:
            if self.small:
                self.follow([self.start(self.only, Path(folder), self.left - 1)], self.end)
            else:
                checks = [[name] for name in CHECKS if name in self.only]
                limit = self.end - (1 - TOGETHER) * self.seconds
                self.follow([self.start(names, Path(folder), CHECKS[names[0]].seconds) for names in checks], limit)
                for name in MEASUREMENTS:
                    if name in self.only:
                        self.measure(name, Path(folder))
        outcomes = [step["outcome"] for part in self.result["parts"].values() for step in part["steps"].values()]
        counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
        self.result |= {"seconds": round(self.seconds - self.left, 1), "outcomes": counts}
        self.write()
        began = [part["state"] for part in self.result["parts"].values() if not part["state"].startswith("skipped")]
        return all("ended with 0" in state for state in began) and set(counts) <= {"passed", "skipped"}

    def start(self, names: Sequence[str], folder: Path, seconds: float) -> Running:
        """A process begins."""
        return Running(names, folder, seconds, small=self.small)

    def measure(self, name: str, folder: Path) -> None:
        """A part alone, if there is time."""
        if self.left < LEAST:
            self.result["parts"][name] = {"state": f"skipped, {self.left:.0f} s are left", "steps": {}}
            return
        self.follow([self.start([name], folder, min(MEASUREMENTS[name].seconds, self.left - 2))], self.end - 1)

    def follow(self, running: Sequence[Running], end: float) -> None:
        """Until all are over, or this moment has come."""
        while True:
            late = time.monotonic() > end
            over = [process.look(stop=late and not PARTS[process.names[0]].needed) for process in running]
            for process in running:
                self.result["parts"] |= process.told()
            self.write()
            if all(over):
                return
            time.sleep(0.3)

    def write(self) -> None:
        """Puts all on the disk, whole."""
        text = json.dumps(self.result, indent=1)
        if text != self.written:
            partial = self.out / ".truth.partial"
            partial.write_text(text + "\n", "utf-8")
            os.replace(partial, self.out / "truth.json")
            self.written = text


def run_parts(names: Sequence[str], out: Path, seconds: float, *, small: bool) -> None:
    """Some parts in this process."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    sys.path.append(str(ROOT / "benchmarks"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    end = time.monotonic() + seconds
    report = importlib.import_module("report")
    for name in names:
        run = getattr(importlib.import_module(PARTS[name].module), name)
        run(report.Report(out / f"{name}.json", end - time.monotonic(), small=small))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for truth.json")
    parser.add_argument("--minutes", type=float, default=2.8, help="time for everything (default 2.8)")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, one part after the other, for a CPU")
    parser.add_argument("--only", nargs="*", default=[], choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--part", nargs="*", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        run_parts(given.part, given.out, 60 * given.minutes, small=given.rehearse)
        return 0
    job = Job(given.out, given.minutes, small=given.rehearse, only=given.only)
    passed = job.run()
    for name, part in job.result["parts"].items():
        print(f"{name}: {part['state']}")
        for title, step in part["steps"].items():
            if step["outcome"] != "passed":
                print(f"  {title}: {step['outcome']} {step.get('error') or step.get('why', '')}"[:300])
    print(f"{job.result['seconds']} s, steps {job.result['outcomes']}, in {given.out / 'truth.json'}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
