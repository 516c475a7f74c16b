"""Taking the address, before anything slow: a port that is not free is said at once and in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from dataclasses import dataclass

from edgeinfer.errors import EdgeInferError, UsageError

BACKLOG = 1024


class CannotListen(EdgeInferError):
    """The port is taken or not ours to take, or the address is not this machine's."""


@dataclass(frozen=True)
class Address:
    """Where the endpoint is. port: the real one, also where 0 was asked for."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """For a client on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def listen(host: str, port: int) -> tuple[Address, list[socket.socket]]:
    """Listening sockets on every address that `host` means (`localhost` often two), all on one port.

    They listen at once: only that keeps another program from the port. Clients that come before the
    server accepts wait. Raises CannotListen, UsageError.
    """
    sockets: list[socket.socket] = []
    real = port
    with contextlib.ExitStack() as undo:
        refused: OSError | None = None
        for family, address in _addresses(host, port):
            try:
                listening = _listen_on(family, address, real)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise _cannot_listen(host, real, error) from error
                refused = error  # ::1 for localhost, on a machine without IPv6
                continue
            undo.callback(listening.close)
            sockets.append(listening)
            real = listening.getsockname()[1]
        if not sockets:
            assert refused is not None  # _addresses gives at least one
            raise _cannot_listen(host, real, refused) from refused
        undo.pop_all()
    return Address(_bare(host), real), sockets


def _addresses(host: str, port: int) -> list[tuple[int, str]]:
    """Family and address, in the resolver's order, none twice."""
    if not 0 <= port < 65536:
        raise UsageError(f"--port {port} is not a port; it is a number from 0 (any free one) to 65535")
    try:
        found = socket.getaddrinfo(
            _bare(host) or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"--host {host!r} is no address of this machine"
            f" ({getattr(error, 'strerror', None) or error}); 127.0.0.1 is for this machine alone,"
            " 0.0.0.0 for the network"
        ) from error
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def _bare(host: str) -> str:
    """An IPv6 literal without the brackets it has in a URL."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _listen_on(family: int, address: str, port: int) -> socket.socket:
    # By its number: only to sockets that say TCP does asyncio give TCP_NODELAY, and without it every
    # answer on a kept connection waits 40 ms for an acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "nt":  # there SO_REUSEADDR would let another program take the port from us
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # `::` means every address there is, IPv4 included; the others themselves.
            dual = address == "::" and socket.has_dualstack_ipv6()
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        listening.bind((address, port))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening


def _cannot_listen(host: str, port: int, error: OSError) -> CannotListen:
    if error.errno == errno.EADDRINUSE:
        return CannotListen(
            f"port {port} on {host} is taken{_by_whom(port)}; stop that, or choose another with --port"
            " (0 takes any free one)"
        )
    if error.errno == errno.EACCES:
        return CannotListen(
            f"port {port} on {host} is reserved by the system; choose one above 1023 with --port"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return CannotListen(
            f"{host} is not an address of this machine; choose one of its own with --host"
        )
    return CannotListen(f"cannot listen on {host}, port {port}: {error.strerror or error}; see --host")


def _by_whom(port: int) -> str:
    """ " by python (process 123)", where the system tells; another user's processes it often hides."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections(kind="tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return f" by {psutil.Process(each.pid).name()} (process {each.pid})"
    return ""
