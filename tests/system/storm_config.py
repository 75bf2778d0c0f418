"""The configurations that a storm reloads, good ones and broken ones."""

import random
from pathlib import Path

_POLLERS = ("auto", "epoll", "epoll-et", "poll", "select")
_WATERMARKS = (("16KiB", "4KiB"), ("256KiB", "64KiB"), ("1MiB", "256KiB"))


class Configurations:
    """Writes configurations that all serve the same clients, whatever else they change.

    Args:
        directory: for the UNIX sockets.
        port: of the TCP listener.
        metrics_port: of the exporter.
        taken: a port that somebody else listens on.
        dice: what decides.
    """

    def __init__(
        self, directory: Path, port: int, metrics_port: int, taken: int, dice: random.Random
    ) -> None:
        self._dice = dice
        self._taken = taken
        self._port = port
        self._metrics_port = metrics_port
        self.path = directory / "echo.sock"
        self.extra_path = directory / "extra.sock"

    def plain(self, count: int) -> str:
        """Return the one that a storm begins and ends with.

        It has a limit for each address, since the census for that is kept from the first time on.
        """
        return f"""\
[server]
workers = {count}
drain_timeout = "10s"
[limits]
max_connections_per_ip = 500
{self._addresses()}"""

    def changed(self, count: int, extra: bool) -> str:
        """Return one with other limits.

        Args:
            count: workers.
            extra: whether to listen on one more address.
        """
        pick = self._dice.choice
        high, low = pick(_WATERMARKS)
        return f"""\
[server]
workers = {count}
poller = "{pick(_POLLERS)}"
drain_timeout = "{pick(("10s", "15s"))}"
[limits]
max_frame = "{pick(("1MiB", "16MiB"))}"
max_connections = {pick((600, 900))}
max_connections_per_ip = {pick((0, 500))}
high_watermark = "{high}"
low_watermark = "{low}"
max_buffered = "{pick(("128MiB", "256MiB"))}"
[timeouts]
idle = "{pick(("30s", "5min"))}"
frame = "{pick(("20s", "30s"))}"
write = "{pick(("20s", "30s"))}"
lifetime = "{pick(("off", "2s", "5s"))}"
[log]
level = "{pick(("info", "debug"))}"
burst = {pick((10, 50))}
{self._addresses(pick((64, 4096)), extra)}"""

    def broken(self) -> str:
        """Return one that cannot be used."""
        # The last one makes a socket before it fails, and has to remove that.
        addresses = (f"unix:{self.path.with_name('other.sock')}", f"127.0.0.1:{self._taken}")
        return self._dice.choice(
            (
                "[server\n",
                '[server]\nworker = 2\npoller = "iocp"\n',
                '[limits]\nlow_watermark = "1GiB"\n',
                "".join(f'[[listen]]\naddress = "{each}"\n' for each in addresses),
            )
        )

    def _addresses(self, backlog: int = 4096, extra: bool = False) -> str:
        listen = [f"127.0.0.1:{self._port}", f"unix:{self.path}"]
        listen += [f"unix:{self.extra_path}"] * extra
        tables = (f'[[listen]]\naddress = "{each}"\nbacklog = {backlog}\n' for each in listen)
        return f'{"".join(tables)}[metrics]\naddress = "127.0.0.1:{self._metrics_port}"\n'
