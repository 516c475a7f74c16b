"""Names: by which ones this endpoint may be called, and whose web pages may call it.

A page of a foreign site can make a browser send requests here. It cannot read the answers, unless its
own name resolves to our address (DNS rebinding). The browser then names the foreign host in Host, and
the page in Origin; these two headers a page cannot choose.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from edgeinfer.errors import UsageError

IpAddress = IPv4Address | IPv6Address

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9_.-]{1,254}))(?::([0-9]{0,5}))?")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]{0,31})://([^/?#@*\s]{1,300})")
_DEFAULT_PORT = {"http": 80, "https": 443}

# Desktop shells whose pages are part of an installed program; no site can have these origins.
_APP_ORIGINS = frozenset({"app://obsidian.md", "tauri://localhost", "capacitor://localhost"})
_APP_SCHEMES = frozenset({"vscode-webview"})


@dataclass(frozen=True)
class Authority:
    """host: a name in lower case without a final dot, or an IP address as `ipaddress` writes it."""

    host: str
    port: int | None
    address: IpAddress | None


def parse_authority(text: str) -> Authority | None:
    """The value of a Host header, or what follows `://` in an origin. None: malformed."""
    match = _AUTHORITY.fullmatch(text.lower())
    if match is None:
        return None
    bracketed, name, digits = match.groups()
    port = int(digits) if digits else None
    if port is not None and not 0 < port < 65536:
        return None
    address = _address(bracketed or name)
    if bracketed is not None:
        return Authority(str(address), port, address) if isinstance(address, IPv6Address) else None
    if address is not None:
        return Authority(str(address), port, address) if isinstance(address, IPv4Address) else None
    name = name.removesuffix(".")
    if not all(_LABEL.fullmatch(label) for label in name.split(".")):
        return None
    return Authority(name, port, None)


def _address(text: str) -> IpAddress | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound to `host` (a name or an IP address)."""
    return host.lower() == "localhost" or _is_loopback_address(_address(host.strip("[]")))


def _is_local_name(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


def _is_loopback_address(address: IpAddress | None) -> bool:
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address is not None and address.is_loopback


def own_names() -> frozenset[str]:
    """What machines of the local network call this one. Its first label alone and under .local are
    resolved by nobody's DNS server out there."""
    name = socket.gethostname().lower().removesuffix(".")
    label = name.partition(".")[0]
    return frozenset({name, label, f"{label}.local"}) - {"", ".local"}


class HostRules:
    """An IP address cannot be rebound, so every literal is right; of names only those known to be ours.

    Raises UsageError for an allowed name that is none.
    """

    def __init__(self, allow_hosts: Iterable[str] = ()) -> None:
        names = {"host.docker.internal", *own_names()}
        for text in allow_hosts:
            authority = parse_authority(text)
            if authority is None or authority.port is not None:
                raise UsageError(
                    f"--allow-host {text!r} is not a host name; write it without scheme and port,"
                    " for example llm.example.com"
                )
            names.add(authority.host)
        self._names = frozenset(names)

    def allows(self, host: Authority) -> bool:
        return host.address is not None or _is_local_name(host.host) or host.host in self._names


class OriginRules:
    """Pages of this machine, of known desktop programs, of this endpoint itself, and those allowed.

    Raises UsageError for an allowed origin that is none.
    """

    def __init__(self, allow_origins: Iterable[str] = ()) -> None:
        given = {text.strip().lower().removesuffix("/") for text in allow_origins}
        self.allows_any = "*" in given
        for text in sorted(given - {"*"}):
            if not _ORIGIN.fullmatch(text) and text != "file://":
                raise UsageError(
                    f"--allow-origin {text!r} is not an origin; write scheme, host and port without a"
                    " path, for example https://chat.example.com, or '*' for every web page"
                )
        self._given = frozenset(given)

    def allows(self, origin: str, host: Authority) -> bool:
        """host: the request's own, which is allowed already."""
        if self.allows_any:
            return True
        origin = origin.lower()
        if origin in self._given or origin in _APP_ORIGINS:
            return True
        match = _ORIGIN.fullmatch(origin)
        if match is None:  # "null" too: any page can have it, by a sandboxed frame
            return False
        scheme = match[1]
        if scheme in _APP_SCHEMES:
            return True
        page = parse_authority(match[2])
        if page is None or scheme not in _DEFAULT_PORT:
            return False
        if _is_local_name(page.host) or _is_loopback_address(page.address):
            return True
        default = _DEFAULT_PORT[scheme]
        return page.host == host.host and (page.port or default) == (host.port or default)
