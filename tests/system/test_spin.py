"""A daemon whose loop spins, because the kernel says one thing and does another."""

import os
import signal
from pathlib import Path

from tests.system.daemon import Daemon, frame


def test_a_spin_is_logged_once_and_counted(tmp_path: Path) -> None:
    """A descriptor that is ready for ever is named in one line, and each second of it counted."""
    # The second readv(2) of the worker is its client's second frame. The supervisor's first one is
    # the request of the only scrape.
    inject = "inject=readv:error=EAGAIN:when=2+"
    options = ("-f", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=readv", "-e", inject)
    config = '[server]\ndrain_timeout = "0s"\n'
    with (
        Daemon(tmp_path, config, prefix=("strace", *options)) as daemon,
        daemon.connect() as client,
    ):
        client.echo(b"one")
        client.send(frame(b"two"))
        line = daemon.wait_for("loop_spinning")
        assert line["turns_per_second"] > 2000
        assert len(line["descriptors"]) == 1
        assert line["masks"] == ["readable"]

        # The line comes before the numbers are shown, and what a worker leaves behind is all of it.
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGTERM)
        daemon.wait_for("worker_ended", worker=worker)
        assert daemon.metric("lpechod_loop_spins_total") >= 1
    assert len(daemon.events("loop_spinning")) == 1
