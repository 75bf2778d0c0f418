"""The least that an echo server in Python can do, for comparison; prints its port.

    python tests/bench/bare.py

A loop of three system calls: epoll_wait(2), readv(2) and write(2). It knows neither frames nor
time, and limits, counts and logs nothing. What lpechod takes beyond it is the price of all that.
"""

import os
import select
import socket

BUFFER_BYTES = 256 * 1024


def serve(listener: socket.socket) -> None:
    """Serve for ever."""
    poller = select.epoll()
    poller.register(listener, select.EPOLLIN)
    listening = listener.fileno()
    clients: dict[int, socket.socket] = {}
    unsent: dict[int, bytes] = {}
    buffer = memoryview(bytearray(BUFFER_BYTES))
    into, poll, readv, write = (buffer,), poller.poll, os.readv, os.write
    size, echo = 0, buffer[:0]
    while True:
        for fd, _mask in poll():
            if fd == listening:
                client = listener.accept()[0]
                client.setblocking(False)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                clients[client.fileno()] = client
                poller.register(client, select.EPOLLIN)
            elif fd in unsent:
                send_rest(poller, fd, unsent)
            else:
                try:
                    count = readv(fd, into)
                except OSError:
                    count = 0
                if not count:
                    clients.pop(fd).close()
                    continue
                if count != size:
                    size, echo = count, buffer[:count]
                try:
                    sent = write(fd, echo)
                except OSError:
                    sent = 0  # There is no room, or nobody: then the next call tells.
                if sent != count:
                    unsent[fd] = bytes(echo[sent:])
                    poller.modify(fd, select.EPOLLOUT)


def send_rest(poller: select.epoll, fd: int, unsent: dict[int, bytes]) -> None:
    """Send what the kernel has had no room for, and go on with receiving when it is gone."""
    try:
        unsent[fd] = unsent[fd][os.write(fd, unsent[fd]) :]
    except BlockingIOError:
        return
    except OSError:
        unsent[fd] = b""  # Nobody is there: the next read tells.
    if not unsent[fd]:
        del unsent[fd]
        poller.modify(fd, select.EPOLLIN)


def main() -> None:
    """Listen, print the port, and serve."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(listener.getsockname()[1], flush=True)
    serve(listener)


if __name__ == "__main__":
    main()
