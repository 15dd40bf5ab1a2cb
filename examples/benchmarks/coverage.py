"""How much of timm, torchvision and other zoos torchcap compresses, with proofs for every model.

    python examples/benchmarks/coverage.py --out coverage.jsonl
    python examples/benchmarks/coverage.py --out reading.jsonl --analyze-only --all
    python examples/benchmarks/coverage.py --out zoo.jsonl --zoo transformers --zoo smp
    python examples/benchmarks/coverage.py --report coverage.jsonl

Without ``--all`` these are the smallest model of every family of timm, and all of torchvision but
its quantized ones. With ``--zoo`` they are small models of other libraries instead, which are not
needed otherwise: see ``zoos.py``. Every model runs in a process of its own, with a limit of time
and of memory (on systems other than Linux, of time alone). Times are those of the processor, on one
thread, so a busy machine does not change them much. Proofs are of a small model that keeps half of
the channels, and of wide spaces no more than 64. What is found is appended to a file, a line of
JSON for a model; models that the file has already are not run again. The status of a model is

    proven    it was compressed, and every proof that it allows holds
    read      its channel spaces were found, and some are free (with --analyze-only)
    declined  torchcap says why it cannot compress the model
    failed    a proof does not hold, or something else than torchcap's own errors was raised
    timeout, memory    it went over a limit
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
import torchvision
from tqdm import tqdm

import zoos
from coverage_proofs import PROOFS, Record, Wishes, examine, last_lines
from table import format_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from multiprocessing.process import BaseProcess

STATUSES = ("proven", "read", "declined", "failed", "timeout", "memory")
MIB = 2**20
PATIENCE = 10  # a model may wait for the processor so many times as long as it may use it

# The first part of these names says how, the second what.
PREFIXES = {"bat", "dm", "eca", "ese", "gc", "legacy", "nf", "test", "tf", "tiny", "wide"}
SIZES = {
    word: rank
    for rank, words in enumerate(
        (
            ("zepto",),
            ("atto",),
            ("femto",),
            ("pico",),
            ("nano",),
            ("xxxs", "xxs", "xxtiny"),
            ("xtiny", "tiny", "ti"),
            ("xs", "t"),
            ("wee", "pwee", "little"),
            ("small", "s"),
            ("medium", "mediumd", "m", "compact"),
            ("base", "b", ""),
            ("large", "l"),
            ("xlarge", "xl", "xxlarge", "huge", "h"),
            ("giant", "gigantic", "g", "enormous"),
        )
    )
    for word in words
}


def main() -> None:
    options = parse_options()
    if options.report:
        print(report(read(options.report)))
        return
    if options.peer and find_spec("torch_pruning") is None:
        raise SystemExit("--peer needs Torch-Pruning: pip install torch-pruning")
    share(options.zoo)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no worker stays behind
    done = {record["name"] for record in read(options.out)}
    names = [name for name in chosen(options) if name not in done]
    if options.list:
        print("\n".join(names))
        return
    with options.out.open("a") as file:
        for record in tqdm(sweep(names, options), total=len(names), unit="model"):
            file.write(json.dumps(record) + "\n")
            file.flush()
    print(report(read(options.out)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("coverage.jsonl"), help="file that results go to")
    add("--report", type=Path, help="print the tables of this file, and run nothing")
    add("--all", action="store_true", help="every model, not only the smallest of a family")
    add("--names", type=Path, help="file with a model a line: timm:NAME, tv:NAME or ZOO:NAME")
    add("--only", default="", metavar="TEXT", help="models with this in their names")
    add("--limit", type=int, help="the first so many models")
    add("--list", action="store_true", help="print the names of the models, and run nothing")
    add("--analyze-only", action="store_true", help="read the channel spaces, and nothing more")
    about = "models of other libraries, instead of timm and torchvision; may be given again"
    add("--zoo", action="append", choices=[*zoos.ZOOS, "all"], help=about)
    usual = [title for title in PROOFS if title != "export"]
    about = "proofs to make; all but export, which is slow"
    add("--proofs", nargs="+", choices=[*PROOFS], default=usual, help=about)
    add("--peer", action="store_true", help="let Torch-Pruning compress the same model")
    add("--timeout", type=float, default=120.0, help="seconds of processor time a model")
    add("--memory", type=float, default=12.0, help="GiB for each model")
    add("--jobs", type=int, default=1, help="models at a time, with one thread each")
    return parser.parse_args()


# --- which models


def chosen(options: argparse.Namespace) -> list[str]:
    """Return the names of the models to run, each with its library in front."""
    if options.names:
        lines = (line.strip() for line in options.names.read_text().splitlines())
        names = [line for line in lines if line and not line.startswith("#")]
    elif options.zoo:
        names = [name for zoo in installed(options.zoo) for name in zoos.names(zoo)]
    else:
        of_timm = timm.list_models() if options.all else smallest_of_families()
        of_torchvision = [
            name for name in torchvision.models.list_models() if not name.startswith("quantized_")
        ]
        names = [f"timm:{name}" for name in of_timm] + [f"tv:{name}" for name in of_torchvision]
    return [name for name in names if options.only in name][: options.limit]


def installed(wanted: Sequence[str]) -> Iterator[str]:
    """Yield the zoos that were asked for, and say which are left out."""
    for title, zoo in zoos.ZOOS.items():
        if not {title, "all"}.intersection(wanted):
            continue
        if zoo.is_installed:
            yield title
        else:
            package = zoo.package.partition(".")[0]
            print(f"{title} is left out: {package} is not installed", file=sys.stderr)


def smallest_of_families() -> list[str]:
    """Return one model of timm for each family, by the sizes that the names tell."""
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(family_of(f"timm:{name}"), []).append(name)
    return sorted(min(names, key=size_by_name) for names in families.values())


def family_of(name: str) -> str:
    """Return the library, the module that a model is defined in, and its family there.

    A family is what a name starts with: letters, with a version behind them.
    """
    source, _, short = name.partition(":")
    if source in zoos.ZOOS:
        return zoos.family_of(name)
    if source == "tv":
        home = torchvision.models.get_model_builder(short).__module__
        return "tv " + home.removeprefix("torchvision.models.")
    first, *rest = short.split("_")
    kind = f"{first}_{_stem(rest[0])}" if first in PREFIXES and rest else _stem(first)
    home = timm.models.model_entrypoint(short).__module__.rpartition(".")[2]
    return f"timm {home}" if kind == home else f"timm {home} {kind}"


def _stem(part: str) -> str:
    found = re.match(r"[a-z]+(\d[a-z]{3,})?", part)
    stem = found.group() if found else part
    version = re.match(r"\d(?!\d)", part.removeprefix(stem)) if stem.endswith("v") else None
    return stem + version.group() if version else stem


def size_by_name(name: str) -> tuple[object, ...]:
    """Return a key that sorts models of one family by size, as far as names tell.

    The first word of size comes first; then numbers, but for that of the image; then the image.
    """
    config = timm.models.get_pretrained_cfg(name)
    image = config.input_size[-1] if config is not None else 0
    spelled = name.replace("x_small", "xs")
    ranks = [SIZES[word] for part in spelled.split("_")[1:] for word in _words(part)]
    numbers = [
        -int(number) if label in {"p", "patch"} else int(number)  # larger patches are less work
        for label, number in re.findall(r"([a-z]*)(\d+)", name)
        if int(number) != image
    ]
    return (ranks[0] if ranks else SIZES[""], numbers or [10**6], image, len(name), name)


def _words(part: str) -> list[str]:
    """Return the words of size in a part of a name; ``1b`` and ``412m`` count parameters."""
    count = re.fullmatch(r"\d+([bm])", part)
    if count:
        return ["giant" if count.group(1) == "b" else "base"]
    return [word for word in re.findall(r"[a-z]+", part) if word in SIZES]


# --- one model, in its own process


def work(name: str, wishes: Wishes, folder: Path) -> None:
    """Examine one model and write what is found to a file, again after every step."""
    for stream, target in ((sys.stdout, os.devnull), (sys.stderr, folder / "errors")):
        with open(target, "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)

    def keep(record: Record) -> None:
        waiting = folder / "new"
        waiting.write_text(json.dumps(record))
        waiting.replace(folder / "record")  # whole, or as it was

    examine(name, wishes, keep)


@dataclass
class Worker:
    """The process of one model, and what it has used so far."""

    name: str
    process: BaseProcess
    folder: tempfile.TemporaryDirectory[str]
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0  # of processor time
    peak: int = 0

    def over(self, options: argparse.Namespace) -> str:
        """Return the limit that the process has gone over, or nothing."""
        if not self.process.is_alive():
            return ""
        use = usage(self.process.pid)
        waited = time.perf_counter() - self.began
        if use is None:
            self.seconds = waited
        else:
            self.seconds, self.peak = use.seconds, max(self.peak, use.peak)
            if use.now > options.memory * 2**30:
                return "memory"
        late = self.seconds > options.timeout or waited > PATIENCE * options.timeout
        return "timeout" if late else ""

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def record(self, reason: str) -> Record:
        """Return what the process has written, with the reason why it ended if not by itself."""
        found: Record = {"status": "", "message": "", "stage": "start", "proofs": {}}
        written = Path(self.folder.name, "record")
        if written.exists():
            found = json.loads(written.read_text())
        if found["stage"] == "peer" and "peer" not in found:
            found["peer"] = {"status": reason or "failed", "message": "its process ended"}
        elif not found["status"]:
            found["status"] = reason or "failed"
            found["message"] = f"stopped at {found['stage']}"
            errors = Path(self.folder.name, "errors")
            if not reason:
                found["message"] += f" with exit status {self.process.exitcode}\n"
            if not reason and errors.exists():
                found["message"] += last_lines(errors.read_text(errors="replace"))
        identity = {"name": self.name, "family": family_of(self.name)}
        used = {"seconds": found.get("seconds", self.seconds), "peak_mib": self.peak / MIB}
        self.folder.cleanup()
        return {**identity, **found, **used}


def share(wanted: Sequence[str] | None) -> None:
    """Let workers be forks of one process that has imported what they need, where that works.

    Imports take longer than many a model.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.getenv("PYTHONPATH"))))
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("forkserver")
        packages = [zoos.ZOOS[zoo].package for zoo in installed(wanted or ())]
        multiprocessing.set_forkserver_preload(["coverage_proofs", *packages])
    else:
        multiprocessing.set_start_method("spawn")


def start(name: str, options: argparse.Namespace) -> Worker:
    """Start the process of one model, with one thread."""
    folder = tempfile.TemporaryDirectory()
    wishes = Wishes(options.analyze_only, tuple(options.proofs), options.peer)
    process = multiprocessing.Process(target=work, args=(name, wishes, Path(folder.name)))
    process.start()
    return Worker(name, process, folder)


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds of processor time, and bytes of memory: held now, and the most so far."""

    seconds: float
    now: int
    peak: int


def usage(pid: int | None) -> Usage | None:
    """Return what a process has used; None if that is unknown."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:  # this is not Linux
        return None
    found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status))  # gone if it has just ended
    seconds = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return Usage(seconds, 1024 * int(found.get("VmRSS", 0)), 1024 * int(found.get("VmHWM", 0)))


def sweep(names: Iterable[str], options: argparse.Namespace) -> Iterator[Record]:
    """Run every model, a few at a time, and yield the records in the order in which they end."""
    waiting = iter(names)
    running: list[Worker] = []
    try:
        while True:
            while len(running) < options.jobs and (name := next(waiting, None)) is not None:
                running.append(start(name, options))
            if not running:
                return
            time.sleep(0.05)
            for worker in list(running):
                reason = worker.over(options)
                if reason:
                    worker.stop()
                if not worker.process.is_alive():
                    running.remove(worker)
                    yield worker.record(reason)
    finally:  # an interrupted sweep leaves nothing behind
        for worker in running:
            worker.stop()
            worker.folder.cleanup()


# --- the report


def read(path: Path) -> list[Record]:
    """Return the records of a file, none if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def report(records: Sequence[Record]) -> str:
    """Return all tables and lists of a sweep as text."""
    if not records:
        return "no models"
    parts = [
        families(records),
        kinds(records),
        f"The slowest ten\n{slowest(records)}",
        *listed("Declined", [r for r in records if r["status"] == "declined"]),
        *listed("Not proven", [r for r in records if r["status"] in {"failed", *STATUSES[-2:]}]),
        *skipped(records),
        *held(records),
    ]
    return "\n\n".join(parts)


def families(records: Sequence[Record]) -> str:
    """Return the table with a row for each family, and the totals below."""
    used = [status for status in STATUSES if any(r["status"] == status for r in records)]
    peer = any("peer" in record for record in records)
    headers = ["family", "models", *used, "spaces", "free", "reachable"]
    headers += ["MACs left", "seconds", "peak MiB"] + ["Torch-Pruning"] * peer
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record["family"]):
        groups.setdefault(record["family"], []).append(record)
    rows = [family_row(name, group, used, peer=peer) for name, group in groups.items()]
    rows.append(family_row("all", records, used, peer=peer))
    return format_table(headers, rows) + "\nShares, MACs left and seconds are medians."


def family_row(
    name: str, records: Sequence[Record], used: Sequence[str], *, peer: bool
) -> list[object]:
    statuses = Counter(record["status"] for record in records)
    row: list[object] = [name, len(records), *(statuses[status] for status in used)]
    row += [sum(record.get(key, 0) for record in records) for key in ("spaces", "free")]
    row += [median(records, "reachable", "{:.1%}"), median(records, "macs_left", "{:.1%}")]
    row += [median(records, "seconds", "{:.1f}"), f"{max(r['peak_mib'] for r in records):.0f}"]
    if peer:
        found = Counter(r["peer"]["status"] for r in records if "peer" in r)
        row.append(f"{found['compressed']} of {found.total()}")
    return row


def median(records: Sequence[Record], key: str, form: str) -> str:
    values = [record[key] for record in records if record.get(key) is not None]
    return form.format(statistics.median(values)) if values else "-"


def kinds(records: Sequence[Record]) -> str:
    """Return what is left of the MACs by kind of network."""
    headers = ("kind", "models", "compressible", "reachable", "MACs left")
    rows = []
    for kind in ("cnn", "transformer"):
        group = [record for record in records if record.get("kind") == kind]
        free = [record for record in group if "macs_left" in record]
        shares = (median(free, key, "{:.1%}") for key in ("reachable", "macs_left"))
        rows.append((kind, len(group), len(free), *shares))
    note = (
        "A transformer has attention (by the names of its classes) and more than half of its MACs "
        "in linear layers.\nMedians at ratio 0.5, where something is free."
    )
    return f"{format_table(headers, rows)}\n{note}"


def slowest(records: Sequence[Record]) -> str:
    ordered = sorted(records, key=lambda record: -record["seconds"])[:10]
    rows = [
        (r["name"], r["status"], f"{r['seconds']:.1f}", f"{r.get('analyze_seconds', 0):.1f}")
        for r in ordered
    ]
    return format_table(("model", "status", "seconds", "of these analyze"), rows)


def listed(title: str, records: Sequence[Record]) -> Iterator[str]:
    """Yield a list of models with their messages, each cut to a line or two."""
    if records:
        lines = (f"  {r['name']}  [{r['status']}] {shortened(r)}" for r in records)
        yield "\n".join([f"{title} ({len(records)})", *lines])


def shortened(record: Record, width: int = 240) -> str:
    text = " ".join(record["message"].split())
    if record["status"] == "failed" and len(text) > width:  # what a traceback says stands last
        return f"… {text[-width:]}"
    return text if len(text) <= width else f"{text[:width]} …"


def skipped(records: Sequence[Record]) -> Iterator[str]:
    """Yield how often each proof passed, failed and was skipped, with the reasons."""
    counts: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    for record in records:
        for title, proof in record["proofs"].items():
            counts.setdefault(title, Counter())[proof["outcome"]] += 1
            if proof["outcome"] == "skipped":
                reasons[f"{title}: {re.sub(r'[0-9]+', '#', proof['detail'])}"] += 1
    if counts:
        outcomes = ("passed", "failed", "skipped")
        rows = [(title, *(found[o] for o in outcomes)) for title, found in counts.items()]
        notes = [f"  skipped {count} times, {reason}" for reason, count in reasons.most_common()]
        yield "\n".join([format_table(("proof", *outcomes), rows), *notes])


def held(records: Sequence[Record]) -> Iterator[str]:
    """Yield the reasons of fixed spaces by the share of a model's MACs that touch such a space."""
    shares: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for record in records:
        for reason, macs in record.get("fixed", ()):
            shares[reason] += macs / max(1, record["macs"])
            models[reason] += 1
    if shares:
        lines = [
            f"  {share:5.1f}  {models[reason]:4d} models  {reason}"
            for reason, share in shares.most_common(15)
        ]
        yield "\n".join(["What is fixed, by MACs (1.0 is all of one model's)", *lines])


if __name__ == "__main__":
    main()
