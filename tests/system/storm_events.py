"""What happens to the daemon in a storm, and what has to hold after each event."""

import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.system.daemon import Daemon, EchoClient, frame
from tests.system.storm_balance import Comparison, Probes, compare
from tests.system.storm_config import Configurations
from tests.system.storm_metrics import RELOADED, RESTARTS, Scrape, Scraper, worker_states
from tests.system.storm_population import Population, unmeasured
from tests.system.storm_proc import (
    Footprint,
    looks,
    owned_connections,
    state,
    wait_for_state,
    workers,
)

KINDS = ("reload", "kill", "more", "fewer", "stop", "broken")

_ERRORS = ("worker_died", "reload_failed")
_MOST_WORKERS = 4
_MEMORY_NOISE_KIB = 1024
"""What two runs of the same reloads differ by: arenas of 256 KiB (of 1 MiB since Python 3.12), and
the free end of the heap. A leak in each of many reloads is far beyond."""
_PROBES_WHILE_STOPPED = 10


@dataclass
class Result:
    """What a storm came to; ``wrong`` is empty if all was well."""

    seed: int
    seconds: float = 0.0
    events: Counter[str] = field(default_factory=Counter)
    clients: dict[str, Any] = field(default_factory=dict)
    probes: Probes = field(default_factory=Probes)
    scrapes: int = 0
    compared: list[Comparison] = field(default_factory=list)
    kills: int = 0
    restarts: tuple[int, int, int] = (0, 0, 0)
    """By the daemon's account, and at least and at most by ours."""
    footprints: tuple[Footprint, Footprint] = field(default_factory=lambda: (Footprint(),) * 2)
    wrong: list[str] = field(default_factory=list)


class Storm:
    """A daemon, its clients, and what happens to them.

    Args:
        directory: for the configuration and the sockets; nothing else may be in it.
        seed: decides on everything that is left to chance.
        count: workers at the start and at the end.
    """

    def __init__(self, directory: Path, seed: int, count: int) -> None:
        self.result = Result(seed)
        self._dice = random.Random(seed)  # noqa: S311 - to be repeatable is its purpose.
        self._base_count = self._count = count
        self._taken = socket.create_server(("127.0.0.1", 0))
        self._port, self._metrics_port = _free_ports()
        self._configurations = Configurations(
            directory,
            self._port,
            self._metrics_port,
            self._taken.getsockname()[1],
            self._dice,
        )
        self._extra = False
        self._good = self._configurations.plain(count)
        self._least_restarts = self._most_restarts = 0
        self._former: set[int] = set()
        """Workers of earlier generations, as far as known."""
        self._has_strangers = False
        """Whether one more may have been forked for a worker that was killed amid the reload."""

    def run(self, kinds: Sequence[str]) -> Result:
        """Let events of these kinds happen, and compare everything at the end."""
        begin = time.monotonic()
        result, configurations = self.result, self._configurations
        folder = configurations.path.parent
        with (
            self._taken,
            Daemon(folder, self._good, errors=_ERRORS, prefix=unmeasured()) as self._daemon,
        ):
            self._pid = self._daemon.pid
            # A supervisor that has taken over from itself has other memory than a fresh one.
            self._daemon.reload()
            with Scraper(self._metrics_port) as self._scraper:
                self._rest()
            before = self._footprint()
            with Scraper(self._metrics_port) as self._scraper:
                with Population(result.seed, self._port, configurations.path) as self._clients:
                    for number, kind in enumerate(kinds):
                        self._happen(number, kind)
                    result.clients = self._clients.ask("finish")
                self._wait_for_balance()
                self._reload(self._base_count, self._configurations.plain(self._base_count))
                # Now that the last workers have ended, their counts are the supervisor's.
                self._compare(self._rest())
            after = self._footprint(before)
            self._judge(before, after)
        self._check_log()
        result.seconds = time.monotonic() - begin
        return result

    def _happen(self, number: int, kind: str) -> None:
        self.result.events[kind] += 1
        {
            "reload": self._change,
            "kill": self._kill,
            "more": self._add_workers,
            "fewer": self._remove_workers,
            "stop": self._stop,
            "broken": self._break,
        }[kind]()
        self._serve()
        self._probe()
        totals = self._clients.ask("report")
        problems = [*totals["details"], *self._scraper.violations]
        assert not problems, f"after event {number}, {kind}: {problems}"

    # Events.

    def _change(self) -> None:
        self._reload(self._count)

    def _add_workers(self) -> None:
        self._reload(min(self._count + self._dice.randint(1, 2), _MOST_WORKERS))

    def _remove_workers(self) -> None:
        self._reload(max(self._count - self._dice.randint(1, 2), 1))

    def _reload(self, count: int, config: str | None = None) -> None:
        self._begin_reload(count, config)
        self._end_reload()

    def _begin_reload(self, count: int, config: str | None = None) -> None:
        self._former |= set(workers(self._pid))
        self._extra = config is None and self._dice.random() < 0.5
        self._good = config or self._configurations.changed(count, self._extra)
        self._count = count
        self._daemon.path.write_text(self._good)
        self._has_strangers = False
        self._hang_up()
        self._reloads = len(self._daemon.events("reloaded"))

    def _hang_up(self) -> None:
        """Request a reload, and read the log as far as that: what follows is about this one."""
        signals = len(self._daemon.events("signal"))
        self._daemon.signal(signal.SIGHUP)
        self._daemon.wait_for_count("signal", signals + 1)

    def _end_reload(self) -> None:
        self._daemon.wait_for_count("reloaded", self._reloads + 1)
        self._check_files()

    def _break(self) -> None:
        self._daemon.path.write_text(self._configurations.broken())
        self._hang_up()
        failed = len(self._daemon.events("reload_failed"))
        self._daemon.wait_for_count("reload_failed", failed + 1)
        self._scraper.wait_for("a failed reload", lambda scrape: scrape[RELOADED] == 0)
        self._daemon.path.write_text(self._good)
        self._check_files()

    def _kill(self) -> None:
        """Kill a worker; sometimes in the middle of a reload."""
        reloading = self._dice.random() < 0.4
        if reloading:
            self._begin_reload(self._count)
            for _ in range(self._dice.randrange(60)):
                self._clients.ask("report")
        victim = self._dice.choice(workers(self._pid))
        stopped_at = time.monotonic()
        if self._interrupt(victim):
            # Stopped, it accepts and ends no connection any more: now it is known whose they are.
            tcp, unix = owned_connections(victim, self._port)
            self._clients.ask("doom", stopped_at=stopped_at, tcp=tcp, unix=unix)
            os.kill(victim, signal.SIGKILL)
            self.result.kills += 1
            self._daemon.wait_for_count("worker_died", self.result.kills)
            is_current = victim not in self._former
            self._most_restarts += reloading or is_current
            self._least_restarts += is_current and not reloading and not self._has_strangers
        if reloading:
            self._end_reload()
            self._has_strangers = True

    def _interrupt(self, pid: int) -> bool:
        """Stop a process; False if it has just ended."""
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            return False
        wait_for_state(pid, "TZX")
        return state(pid) == "T"

    def _stop(self) -> None:
        """Stop the supervisor or a worker; whoever comes is served all the same."""
        self._rest()
        dice = self._dice
        victim = self._pid if dice.random() < 0.25 else dice.choice(workers(self._pid))
        assert self._interrupt(victim)
        if victim == self._pid or self._count > 1:
            for _ in range(_PROBES_WHILE_STOPPED):
                self._probe()
        if victim != self._pid:
            meanwhile = dice.choice((self._see_it_stall, self._change, self._probe_later))
            meanwhile()
        os.kill(victim, signal.SIGCONT)

    def _see_it_stall(self) -> None:
        self._scraper.wait_for(
            "a stalled worker", lambda scrape: worker_states(scrape).get("stalled", 0) == 1
        )

    def _probe_later(self) -> None:
        """Do nothing more while somebody is stopped; a probe follows every event."""

    # What holds.

    def _serve(self) -> None:
        """Wait until as many workers serve as should."""
        wanted = f"{self._count} workers ready"
        self._scraper.wait_for(wanted, self._is_serving)

    def _is_serving(self, scrape: Scrape) -> bool:
        return worker_states(scrape).get("ready") == self._count

    def _rest(self) -> Scrape:
        """Wait until nobody drains or starts any more."""
        return self._scraper.wait_for(
            f"{self._count} workers ready, and no others",
            lambda scrape: worker_states(scrape) == {"ready": self._count},
        )

    def _probe(self) -> None:
        """Be served, by any of the listeners."""
        paths = [self._configurations.path] + [self._configurations.extra_path] * self._extra
        addresses = [f"127.0.0.1:{self._port}", *(f"unix:{path}" for path in paths)]
        address = self._dice.choice(addresses)
        sent = frame(self._dice.randbytes(1000))
        echo, probes = b"", self.result.probes
        while echo != sent:
            with EchoClient(address) as client:
                probes.opened += 1
                client.send(sent)
                probes.sent += len(sent)
                client.socket.shutdown(socket.SHUT_WR)
                echo = b""
                while part := client.socket.recv(1 << 16):
                    echo += part
            # A worker that drains may have ended the stream before the frame came.
            assert echo in (sent, b"")
            probes.received += len(echo)
        probes.frames += 1

    def _check_files(self) -> None:
        folder = self._configurations.path.parent
        found = {path.name for path in folder.iterdir()}
        wanted = {"config.toml", "echo.sock", *(["extra.sock"] * self._extra)}
        assert found == wanted, f"files {sorted(found)}, not {sorted(wanted)}"

    # The end.

    def _footprint(self, before: Footprint | None = None) -> Footprint:
        """Take the footprint, as soon as it is as before: the last scrape may just be ending."""
        for _ in looks():
            footprint = Footprint.of(self._pid, self._daemon.path)
            if before is None or not before.difference(footprint):
                break
        return footprint

    def _wait_for_balance(self) -> None:
        try:
            self._scraper.wait_for("counters agree", self._compare)
        except AssertionError:
            self.result.wrong.append("the counters did not agree before the last reload")

    def _compare(self, scrape: Scrape) -> bool:
        result = self.result
        result.compared = compare(scrape, result.clients, result.probes)
        result.restarts = (int(scrape[RESTARTS]), self._least_restarts, self._most_restarts)
        return all(each.agrees for each in result.compared)

    def _judge(self, before: Footprint, after: Footprint) -> None:
        result = self.result
        result.footprints = before, after
        result.scrapes = self._scraper.count
        result.wrong += result.clients["details"] + self._scraper.violations
        result.wrong += [str(each) for each in result.compared if not each.agrees]
        result.wrong += [f"leaked: {each}" for each in before.difference(after)]
        if after.memory_kib > before.memory_kib + _MEMORY_NOISE_KIB:
            result.wrong.append("leaked: memory of the supervisor")
        restarts, least, most = result.restarts
        if not least <= restarts <= most:
            result.wrong.append(f"{restarts} restarts, not {least} to {most}")

    def _check_log(self) -> None:
        """Compare the errors in the log with those that were provoked."""
        died = self._daemon.events("worker_died")
        if len(died) != self.result.kills or any(each["signal"] != "SIGKILL" for each in died):
            self.result.wrong.append(f"workers died by themselves: {died}")
        if self._daemon.events("reload_failed") and not self.result.events["broken"]:
            self.result.wrong.append("reloads failed by themselves")


def _free_ports() -> list[int]:
    """Return two ports that nobody listens on; held together, so that they differ."""
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("127.0.0.1", 0)) as second,
    ):
        return [each.getsockname()[1] for each in (first, second)]
