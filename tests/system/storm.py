"""A storm: clients that verify every byte while the daemon is reloaded, killed, stopped and broken.

    python tests/system/storm.py [--events 100] [--seed N] [--workers 2] [--no-kills]
    python tests/system/storm.py --reloads 200

A seeded sequence of events meets a daemon that serves 50 long-lived connections and a steady stream
of short-lived ones. At its end nothing may have been refused or mismatched, nothing reset but by a
kill -9, nothing leaked, and the daemon's counters have to agree with what the clients have seen.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.system.storm_events import KINDS, Result, Storm


def storm(directory: Path, seed: int, events: int, count: int, kills: bool = True) -> Result:
    """Run a storm of all kinds of events, each about as often as the others.

    Args:
        directory: for the daemon's files.
        seed: decides on everything that is left to chance.
        events: how many.
        count: workers at the start and at the end.
        kills: whether workers are killed. Without, the counters have to agree exactly.
    """
    kinds = [kind for kind in KINDS if kills or kind != "kill"]
    sequence = (kinds * (events // len(kinds) + 1))[:events]
    random.Random(seed).shuffle(sequence)  # noqa: S311 - to be repeatable is its purpose.
    return Storm(directory, seed, count).run(sequence)


def reloads(directory: Path, seed: int, times: int, count: int) -> Result:
    """Reload again and again, each time with other limits, and compare before and after."""
    return Storm(directory, seed, count).run(["reload"] * times)


def summary(result: Result) -> str:
    """Describe what a storm came to."""
    clients, probes = result.clients, result.probes
    wrong = clients["wrong"]
    restarts, least, most = result.restarts
    before, after = result.footprints
    sizes = [[len(each) for each in (it.supervisor, *it.workers)] for it in (before, after)]
    lines = {
        "seed": result.seed,
        "seconds": round(result.seconds),
        "events": _listed(result.events),
        "connections": f"{_listed(clients['opened'])}, probes: {probes.opened}",
        "ends": _listed(clients["ends"]),
        "frames verified": clients["frames"] + probes.frames,
        "bytes verified": clients["received"] + probes.received,
        "refused": wrong.get("refused", 0),
        "reset": wrong.get("reset", 0),
        "cut short": wrong.get("cut", 0),
        "of killed workers": _listed(clients["allowed"]),
        "timed out": wrong.get("timed out", 0),
        "mismatched": wrong.get("mismatched", 0),
        "scrapes": result.scrapes,
        "counters": "".join(f"\n    {each}" for each in result.compared),
        "kills": result.kills,
        "restarts": f"{restarts} ({least} to {most} expected)",
        "processes": f"{_listed(before.processes)} | {_listed(after.processes)}",
        "descriptors": "{} | {}".format(*sizes),
        "files": f"{', '.join(before.files)} | {', '.join(after.files)}",
        "supervisor's memory": f"{before.memory_kib} KiB | {after.memory_kib} KiB",
        "wrong": "".join(f"\n    {each}" for each in result.wrong) or "nothing",
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a storm and print what it came to."""
    parser = argparse.ArgumentParser(description="Storms against the life cycle of the daemon.")
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-kills", action="store_true", help="demand exact counters")
    parser.add_argument("--reloads", type=int, help="reload so many times, and nothing else")
    options = parser.parse_args(arguments)
    seed = random.randrange(1 << 32) if options.seed is None else options.seed  # noqa: S311
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        if options.reloads is not None:
            result = reloads(directory, seed, options.reloads, options.workers)
        else:
            result = storm(directory, seed, options.events, options.workers, not options.no_kills)
    print(summary(result))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
