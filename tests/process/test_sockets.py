"""The daemon's listening sockets, real ones: bound, assigned, stored, handed on, let go."""

import os
import socket
import ssl
import stat
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpechod.net.entrance import EVERYBODY
from lpechod.net.listener import ListenError
from lpechod.ops.config import Config
from lpechod.ops.toml import KeyPath
from lpechod.process.sockets import ECHO, METRICS, Bound, Sockets, bind, missing, wanted_by
from lpechod.process.systemd import Notifier, descriptor_name
from tests.net.harness import RecordingLog
from tests.process.listening import backlog_of, close, listening, name_of, passed, want
from tests.system.manager import Manager

pytestmark = pytest.mark.usefixtures("whole")


# What is wanted, and what is missing.


def test_a_configuration_wants_all_its_addresses() -> None:
    """Every echo address is wanted with its backlog, then that of the metrics if there is one."""
    tables = [{"address": "127.0.0.1:1", "backlog": 5}, {"address": "unix:/x"}]
    config = Config.model_validate({"listen": tables, "metrics": {"address": ":3"}})
    echo, local, metrics = wanted_by(config, {})
    assert [echo] == want("127.0.0.1:1", backlog=5)
    assert [local] == want("unix:/x", backlog=4096)
    assert (str(metrics.address), metrics.purpose) == (":3", METRICS)
    off = Config.model_validate({"listen": tables, "metrics": {"address": "off"}})
    assert wanted_by(off, {}) == [echo, local]


def test_tls_is_wanted_where_the_configuration_says_so(tmp_path: Path) -> None:
    """Each address gets the context of its own table, keeps its lists, and gets it when bound."""
    table = {"certificate": "/a", "key": "/b"}
    listen = [
        {"address": "127.0.0.1:0", "allow": ["10.0.0.0/8"], "tls": table},
        {"address": "127.0.0.1:0"},
        {"address": "127.0.0.1:0", "tls": table},
    ]
    metrics = {"address": f"unix:{tmp_path}/m", "tls": table}
    config = Config.model_validate({"listen": listen, "metrics": metrics})
    keys: list[KeyPath] = [("listen", 0), ("listen", 2), ("metrics",)]
    contexts = {key: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for key in keys}
    expected = [contexts[keys[0]], None, contexts[keys[1]], contexts[keys[2]]]
    wanted = wanted_by(config, contexts)
    assert [each.entrance.tls for each in wanted] == expected
    assert wanted[0].entrance.access != EVERYBODY
    sockets = Sockets(bind(wanted))
    sockets.assign(wanted)
    listeners = sockets.listeners(ECHO) + sockets.listeners(METRICS)
    assert [each.entrance.tls for each in listeners] == expected
    close(sockets)


def test_no_address_with_tls_is_served_without() -> None:
    """That a context is missing is a defect, and no reason to serve in the clear."""
    table = {"certificate": "/a", "key": "/b"}
    for section in ({"listen": [{"tls": table}]}, {"metrics": {"tls": table}}):
        with pytest.raises(KeyError):
            wanted_by(Config.model_validate(section), {})


ADDRESSES = st.lists(st.sampled_from(["127.0.0.1:0", "[::1]:0", ":7", "unix:/a", "unix:/b"]))


@settings(deadline=None)
@given(ADDRESSES, ADDRESSES)
def test_what_is_missing(wanted: list[str], held: list[str]) -> None:
    """Missing is what is wanted more often than it is held, in order, the first ones satisfied."""
    lacking = missing(want(*wanted), held)
    assert Counter(str(each.address) for each in lacking) == Counter(wanted) - Counter(held)
    left = Counter(wanted) & Counter(held)
    for each in wanted:
        if left[each]:
            left[each] -= 1
        else:
            assert str(lacking.pop(0).address) == each
    assert lacking == []


# Binding.


def test_bind_listens(tmp_path: Path) -> None:
    """Each address gets its sockets, its backlog and its purpose."""
    echo, metrics = bind(
        want("127.0.0.1:0", backlog=33) + want(f"unix:{tmp_path}/m", purpose=METRICS)
    )
    assert (echo.address, echo.purpose, echo.foreign) == ("127.0.0.1:0", ECHO, False)
    assert (metrics.address, metrics.purpose) == (f"unix:{tmp_path}/m", METRICS)
    assert backlog_of(echo.listeners[0].socket) == 33
    for bound in (echo, metrics):
        bound.close()
    assert not (tmp_path / "m").exists()


def test_bind_succeeds_with_all_or_none(tmp_path: Path) -> None:
    """If some addresses can't be listened on, each is named and nothing is left of the others."""
    with listening("127.0.0.1:0") as rival:
        with pytest.raises(ListenError) as caught:
            bind(want("127.0.0.1:0", f"unix:{tmp_path}/s", name_of(rival), f"unix:{tmp_path}/d/s"))
        taken, absent = caught.value.problems
        assert taken.startswith(f"cannot listen on {name_of(rival)}: Address already in use")
        assert absent.startswith(f"cannot listen on unix:{tmp_path}/d/s: No such file")
        assert list(tmp_path.iterdir()) == []


def test_only_what_is_missing_is_bound() -> None:
    """What is held already stays as it is, and what can't be bound changes nothing."""
    sockets = Sockets(bind(want("127.0.0.1:0")))
    (first,) = sockets.listeners(ECHO)
    sockets.bind_missing(want("127.0.0.1:0", "[::1]:0"))
    assert [bound.address for bound in sockets.bound] == ["127.0.0.1:0", "[::1]:0"]
    assert sockets.listeners(ECHO)[0] is first
    held = list(sockets.bound)
    with pytest.raises(ListenError):
        sockets.bind_missing(want("127.0.0.1:0", "127.0.0.1:0", first.name))
    assert sockets.bound == held
    close(sockets)


# Who needs what.


def test_assign_settles_purpose_and_backlog() -> None:
    """After a change of the configuration each socket does what it says there, and none is lost."""
    sockets = Sockets(bind(want("127.0.0.1:0", "[::1]:0", "127.0.0.2:0")))
    first, second, third = sockets.bound
    sockets.assign(
        want("127.0.0.2:0", purpose=METRICS, backlog=7) + want("127.0.0.1:0", backlog=99)
    )
    assert sockets.bound == [third, first]
    assert sockets.gone == [second]
    assert sockets.all == [third, first, second]
    assert sockets.listeners(ECHO) == first.listeners
    assert sockets.listeners(METRICS) == third.listeners
    assert [backlog_of(each.listeners[0].socket) for each in (first, third)] == [99, 7]
    close(sockets)


def test_own_sockets_are_stored_and_removed(
    manager: Manager, notifier: Notifier, log: RecordingLog, tmp_path: Path
) -> None:
    """Each socket of ours is kept by the manager until nobody wants it; a unit's never is."""
    path = tmp_path / "s"
    made = listening("127.0.0.1:0")
    unit = name_of(made)
    sockets = Sockets()
    sockets.inherit([passed(made)], want(unit), notifier, log)
    sockets.bind_missing(want("127.0.0.2:0", f"unix:{path}"))
    names = [each.name for each in sockets.listeners(ECHO)]
    sockets.store(notifier)
    sockets.store(notifier)  # As after a reload: the manager knows them already.
    manager.catch_up()
    assert list(manager.store) == [descriptor_name(name) for name in names[1:]]
    assert all(len(fds) == 1 for fds in manager.store.values())

    sockets.assign(want("127.0.0.2:0"))
    assert sorted(sockets.close_gone(notifier)) == sorted([unit, f"unix:{path}"])
    manager.catch_up()
    assert list(manager.store) == [descriptor_name(names[1])]
    assert not path.exists()
    assert sockets.gone == []
    assert sockets.close_gone(notifier) == []
    close(sockets)


# Over execve(2) and fork(2).


def test_what_is_described_is_restored(
    notifier: Notifier, log: RecordingLog, tmp_path: Path
) -> None:
    """After a re-execution each socket is what it was: its address, purpose, owner and file."""
    made = listening("127.0.0.1:0")
    sockets = Sockets()
    wanted = want(name_of(made))
    sockets.inherit([passed(made)], wanted, notifier, log)
    sockets.bound += bind(want("[::1]:0") + want(f"unix:{tmp_path}/s", purpose=METRICS))
    described = [bound.describe() for bound in sockets.all]
    for bound in sockets.all:
        for listener in bound.listeners:
            listener.socket.detach()  # The number stays, the object is gone.
    restored = [Bound.restore(each) for each in described]
    assert [bound.describe() for bound in restored] == described
    assert [bound.foreign for bound in restored] == [True, False, False]
    assert restored[2].listeners[0].name == f"unix:{tmp_path}/s"
    for bound in restored:
        bound.close()
    assert not (tmp_path / "s").exists()


def test_what_is_not_open_is_not_restored() -> None:
    """A descriptor that did not come along is an error, and not some socket or other."""
    (bound,) = bind(want("127.0.0.1:0"))
    described = bound.describe()
    bound.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        Bound.restore(described)


def test_the_file_of_another_stays_after_a_handover(tmp_path: Path) -> None:
    """A file that has taken the place of ours is somebody else's after a handover, too."""
    path = tmp_path / "s"
    (bound,) = bind(want(f"unix:{path}"))
    path.unlink()
    (other,) = bind(want(f"unix:{path}"))
    described = bound.describe()
    for each in described["sockets"]:
        each["fd"] = os.dup(each["fd"])
    bound.close()
    Bound.restore(described).close()
    assert path.exists()
    other.close()
    assert not path.exists()


@pytest.mark.parametrize("keep", [False, True])
def test_files_stay_if_somebody_has_a_copy(tmp_path: Path, keep: bool) -> None:
    """The file of a UNIX socket goes with it, unless a copy of the socket is kept elsewhere."""
    path = tmp_path / "s"
    sockets = Sockets(bind(want(f"unix:{path}")))
    assert stat.S_ISSOCK(path.stat().st_mode)
    if keep:
        sockets.keep_files()
    close(sockets)
    assert path.exists() is keep


def test_only_our_own_sockets_are_withdrawn(notifier: Notifier, log: RecordingLog) -> None:
    """Of the sockets that nobody wants, those of a socket unit get clients as before."""
    made = listening("127.0.0.1:0")
    sockets = Sockets()
    wanted = want(name_of(made))
    sockets.inherit([passed(made)], wanted, notifier, log)
    sockets.bound += bind(want("127.0.0.1:0", "[::1]:0"))
    sockets.assign([])
    sockets.withdraw_gone()
    (foreign,), *ours = [bound.listeners for bound in sockets.gone]
    with socket.create_connection(foreign.socket.getsockname()[:2]):
        foreign.socket.accept()[0].close()
    for listener in (each for listeners in ours for each in listeners):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.socket.getsockname()[:2])
    for bound in sockets.gone:
        bound.close()


def test_a_worker_keeps_what_it_accepts_from(tmp_path: Path) -> None:
    """In a worker only its own listeners stay open, and it will remove no file of the daemon's."""
    paths = [tmp_path / name for name in ("echo", "metrics", "gone")]
    sockets = Sockets(bind(want(*(f"unix:{path}" for path in paths))))
    sockets.assign(want(f"unix:{paths[0]}") + want(f"unix:{paths[1]}", purpose=METRICS))
    (echo,) = sockets.listeners(ECHO)
    (metrics,) = sockets.listeners(METRICS)
    (gone,) = sockets.gone[0].listeners
    sockets.abandon()
    assert echo.socket.fileno() >= 0
    assert metrics.socket.fileno() == gone.socket.fileno() == -1
    echo.close()
    assert all(path.exists() for path in paths)
