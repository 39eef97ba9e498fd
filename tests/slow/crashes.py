"""Files whose writer is killed, or whose disk fills up: `python tests/slow/crashes.py --kills 200`.

Four operations write (saving, quantising, a batch, importing an article file), over older files or into an empty
folder. Their process is killed with SIGKILL at random moments, and just before and after each step of a write; half of
the random kills happen while a second process writes the same target. Then every file must be the old or the new one,
byte for byte, and the next write must leave nothing but its own result. Also tested: a full disk (a small tmpfs, if
mounting is allowed), a folder without permission (as nobody, if this runs as root), and files that are replaced, cut or
overwritten while they are loaded. For POSIX.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, sleep

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file

import nfq_core
from benchmarks.shared import argument_parser, gaussian, write_results
from nfq_core.checkpoints.article_import import import_article
from nfq_core.checkpoints.batch import convert_folders
from nfq_core.checkpoints.convert import quantize_file
from nfq_core.errors import NFQError
from nfq_core.files.article import write_article_file
from nfq_core.files.atomic import TEMPORARY_ENDING, AtomicFile
from nfq_core.files.container import NFQFile
from nfq_core.planning.settings import DEFAULTS, Formats, Settings

OPERATIONS = ("save", "quantize", "batch", "import")

AIMS = tuple((when, call) for call in ("write", "fsync", "replace") for when in ("before", "after"))
"""Steps of a write, and whether the process is killed before or after them."""

PRELOADED = ["nfq_core.checkpoints.article_import", "nfq_core.checkpoints.batch", "benchmarks.shared"]
"""Modules that take long to import."""

LEFTOVER = re.compile(rf"\..+({TEMPORARY_ENDING}|\.[0-9]+\.claim)")

OLD = Settings(Formats.of(7, 7))
"""Settings of the older files."""

Files = dict[str, bytes]
"""The files of a folder, leftovers aside, by name."""


@dataclass(frozen=True)
class Bench:
    """A folder with inputs for the operations."""

    folder: Path

    def prepare(self) -> None:
        """Make the inputs: two small models, one of them also packed and as an article file."""
        for seed, name in enumerate(("one", "two")):
            weights = {f"{i}.weight": gaussian((128, 256), 10 * seed + i) for i in range(4)}
            weights["conv.weight"] = gaussian((32, 32, 3, 3), 10 * seed + 5)
            weights["norm.bias"] = gaussian((1 << 18,), 10 * seed + 6)
            (self.folder / "models").mkdir(exist_ok=True)
            save_file(weights, self.folder / "models" / f"{name}.safetensors")
        write_article_file(self.folder / "article", weights, 16, 32)
        quantize_file(self.folder / "models" / "one.safetensors", self.folder / "packed")
        # All but writing is allowed to everybody, see `locked_folder`.
        for path in (self.folder, *self.folder.rglob("*")):
            path.chmod(0o755)

    def run(self, operation: str, out: Path, settings: Settings = DEFAULTS) -> None:
        """One operation, from its inputs into the folder `out`; may replace what is there."""
        target = out / "a"
        if operation == "save":
            nfq_core.save(nfq_core.load(self.folder / "packed"), target, settings=settings.as_dict(), overwrite=True)
        elif operation == "quantize":
            quantize_file(self.folder / "models" / "one.safetensors", target, settings, overwrite=True)
        elif operation == "import":
            import_article(self.folder / "article", target, overwrite=True)
        else:
            report = convert_folders([self.folder / "models"], out, settings, any_kind=True, overwrite=True)
            faults = [row["reason"] for row in report["files"] if row["result"] == "failed"]
            if faults:
                raise NFQError(faults[0])

    def results(self, operation: str) -> tuple[Files, Files]:
        """The files that `run` makes, and other ones under their names."""
        with tempfile.TemporaryDirectory(dir=self.folder) as new:
            self.run(operation, Path(new))
            made = contents(Path(new))
        return made, {name: self.old() for name in made}

    def old(self) -> bytes:
        """A sound file that no operation makes."""
        path = self.folder / "old"
        if not path.exists():
            quantize_file(self.folder / "models" / "two.safetensors", path, OLD)
        return path.read_bytes()


def contents(folder: Path) -> Files:
    """All files of a folder but leftovers."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not LEFTOVER.fullmatch(path.name)}


def leftovers(folder: Path) -> int:
    """Number of temporary files and claims in a folder."""
    return sum(bool(LEFTOVER.fullmatch(path.name)) for path in folder.iterdir())


def start(work: Callable[[], None], aim: tuple[str, str] | None = None) -> multiprocessing.process.BaseProcess:
    """Start work in a process of its own; returns when it begins."""
    # It forks from a process that has imported everything and has no threads: kills must hit the work, not the imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_begin, args=(sender, work, aim))
    process.start()
    sender.close()
    receiver.recv()
    return process


def _begin(sender: Connection, work: Callable[[], None], aim: tuple[str, str] | None) -> None:
    torch.set_num_threads(1)
    if aim is not None:
        _take_aim(*aim)
    sender.send(None)
    work()


def _take_aim(when: str, call: str) -> None:
    """Have this process killed at a step of its first write."""
    owner, name = (AtomicFile, "write_at") if call == "write" else (os, call)
    real = getattr(owner, name)

    def struck(*arguments: object) -> None:
        if when == "after":
            real(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, struck)


class Trial:
    """One kill, and what it left.

    Args:
        bench: the inputs.
        operation: one of OPERATIONS.
        over_old: whether older files have the names.
    """

    def __init__(self, bench: Bench, operation: str, expected: tuple[Files, Files], over_old: bool) -> None:
        self.bench, self.operation, self.over_old = bench, operation, over_old
        self.new, self.old = expected
        self.out = Path(tempfile.mkdtemp(dir=bench.folder))
        if over_old:
            for name, data in self.old.items():
                (self.out / name).write_bytes(data)

    def work(self) -> Callable[[], None]:
        """The operation, to be called in another process."""
        return partial(self.bench.run, self.operation, self.out)

    def duration(self) -> float:
        """Seconds that the operation takes undisturbed, and in company about twice."""
        process, started = start(self.work()), perf_counter()
        process.join()
        return perf_counter() - started

    def kill(self, after: float | None = None, aim: tuple[str, str] | None = None, rival: bool = False) -> Counter:
        """Kill the operation after some seconds, or where aimed; returns what was found, `faults` among it."""
        other = start(self.work()) if rival else None
        process = start(self.work(), aim)
        if after is not None:
            sleep(after)
            process.kill()
        process.join()
        found = Counter(kills=process.exitcode == -signal.SIGKILL, too_late=process.exitcode == 0)
        if aim is not None and process.exitcode != -signal.SIGKILL:
            found["faults"] += 1
        if other is not None:
            other.join()
            found["rivals"] += 1
            found["faults"] += other.exitcode != 0
        found["leftovers"] += leftovers(self.out)
        found += self.judge()
        # The next write makes the result whole and removes what the killed one left.
        self.bench.run(self.operation, self.out)
        found["faults"] += contents(self.out) != self.new or leftovers(self.out) != 0
        shutil.rmtree(self.out)
        return found

    def judge(self) -> Counter:
        """How many of the files are old, new, absent, or neither, which is a fault."""
        found, present = Counter(), contents(self.out)
        for name, data in self.new.items():
            if name not in present:
                found["faults" if self.over_old else "absent"] += 1
            elif present[name] == data:
                found["new"] += 1
            else:
                found["old" if self.over_old and present[name] == self.old[name] else "faults"] += 1
        found["faults"] += len(present.keys() - self.new.keys())
        return found


def random_kills(bench: Bench, operation: str, count: int, chance: random.Random) -> Counter:
    """Kill an operation at random moments; every other time over older files, every other time in company."""
    expected, found = bench.results(operation), Counter()
    seconds = max(Trial(bench, operation, expected, True).duration() for _ in range(2))
    number = 0
    while found["kills"] < count:
        trial = Trial(bench, operation, expected, over_old=number % 2 == 0)
        rival = number % 4 >= 2
        found += trial.kill(after=chance.uniform(0, seconds * (2 if rival else 1)), rival=rival)
        number += 1
    return found


def aimed_kills(bench: Bench, operation: str) -> Counter:
    """Kill an operation at every step of its first write, over older files and without."""
    expected, found = bench.results(operation), Counter()
    for aim in AIMS:
        for over_old in (True, False):
            found += Trial(bench, operation, expected, over_old).kill(aim=aim)
    return found


def full_disks(bench: Bench, operation: str) -> dict:
    """Write onto disks that are too small by more and less."""
    new, _ = bench.results(operation)
    needed = max(map(len, new.values()))
    found: Counter = Counter()
    for part in (0.02, 0.3, 0.6, 0.95):
        with tempfile.TemporaryDirectory() as folder:
            size = f"size={int(needed * part) >> 10}k"
            mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True)
            if mounted.returncode:
                return {"not_run": "mounting is not allowed here"}
            try:
                found["disks"] += 1
                found["faults"] += not _refused(partial(bench.run, operation, Path(folder)), "No space left on device")
                found["faults"] += bool(os.listdir(folder))
            finally:
                subprocess.run(["umount", folder], check=True)
    return dict(found)


def locked_folder(bench: Bench, operation: str) -> dict:
    """Write into a folder without the permission to; root needs to become nobody for that."""
    old = bench.results(operation)[1]
    out = bench.folder / "locked"
    out.mkdir()
    for name, data in old.items():
        (out / name).write_bytes(data)
    os.chmod(out, 0o555)
    process = start(partial(_locked, bench, operation, out))
    process.join()
    faults = int(process.exitcode != 0) + (contents(out) != old) + leftovers(out)
    os.chmod(out, 0o755)
    shutil.rmtree(out)
    return {"folders": 1, "faults": faults}


def _locked(bench: Bench, operation: str, out: Path) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    if not _refused(partial(bench.run, operation, out), "Permission denied"):
        sys.exit(1)


def _refused(work: Callable[[], None], reason: str) -> bool:
    """Whether work ends with our error, for a reason."""
    try:
        work()
    except NFQError as error:
        return reason in str(error)
    return False


def changes_while_loading(bench: Bench, count: int, chance: random.Random) -> Counter:
    """Replace, cut or overwrite a file between two tensors of its loading, or after it; right numbers or our error."""
    whole, other = (bench.folder / "packed").read_bytes(), bench.old()
    wanted = nfq_core.load(bench.folder / "packed")
    path, spare = bench.folder / "changing", bench.folder / "spare"

    def replace() -> None:
        spare.write_bytes(other)
        os.replace(spare, path)

    def cut() -> None:
        os.truncate(path, chance.randrange(len(whole)))

    def overwrite() -> None:
        start = chance.randrange(len(whole))
        with open(path, "rb+") as file:
            file.seek(start)
            file.write(bytes(255 - byte for byte in whole[start : start + 100_000]))

    found: Counter = Counter()
    for number in range(count):
        path.write_bytes(whole)
        moment, loaded = chance.randrange(len(wanted) + 1), {}
        with NFQFile(path) as file:
            try:
                for index, key in enumerate(wanted):
                    if index == moment:
                        (replace, cut, overwrite)[number % 3]()
                    loaded[key] = file.load(key)
            except NFQError:
                found["refused"] += 1
        if moment == len(wanted):
            (replace, cut, overwrite)[number % 3]()
        right = all(torch.equal(_bytes(tensor), _bytes(wanted[key])) for key, tensor in loaded.items())
        found["right"] += right and len(loaded) == len(wanted)
        found["faults"] += not right
    return found


def _bytes(tensor: nfq_core.NFTensor | torch.Tensor) -> torch.Tensor:
    return tensor.data if isinstance(tensor, nfq_core.NFTensor) else tensor.view(torch.uint8)


def measure(kills: int, seed: int = 0) -> dict:
    """Everything; at least `kills` random kills in all."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        bench.prepare()
        results = {
            "random_kills": {name: random_kills(bench, name, -(-kills // 4), chance) for name in OPERATIONS},
            "aimed_kills": {name: aimed_kills(bench, name) for name in OPERATIONS},
            "full_disk": {name: full_disks(bench, name) for name in OPERATIONS},
            "locked_folder": {name: locked_folder(bench, name) for name in OPERATIONS},
            "changed_while_loaded": {"load": changes_while_loading(bench, 3 * kills, chance)},
        }
    groups = [group for kind in results.values() for group in kind.values()]
    return results | {
        "killed": sum(group.get("kills", 0) for group in groups),
        "faults": sum(group.get("faults", 0) for group in groups),
    }


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="random kills in all, at least (default: 100)")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/crashes.json)")
    options = parser.parse_args()
    outcome = measure(options.kills)
    print(write_results("crashes", outcome, options.out))
    print(f"{outcome['killed']} kills, {outcome['faults']} faults in all")
    sys.exit(outcome["faults"] > 0)
