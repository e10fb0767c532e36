"""Whether a Host header names this service. A page of another site has another name in it."""

from __future__ import annotations

import ipaddress
import re

_HEADER = re.compile(r"(?:\[([^\]]*)\]|([^:\[\]]*))(?::[0-9]*)?")  # [address] or name, and a port
_NAMES = ("localhost", "ip6-localhost")


def is_own_host(header: str, configured: str) -> bool:
    """Whether the header is a loopback name or address, or the host that the service was told to listen on.

    A service that listens on every address accepts each address, but no other name: another site can make its own name
    lead to any address.
    """
    parts = _HEADER.fullmatch(header.strip().lower())
    if parts is None:
        return False
    host = (parts[1] or parts[2]).rstrip(".")
    address, own = _address(host), _address(configured.lower())
    if address is None:
        return host in _NAMES or host.endswith(".localhost") or host == configured.lower().rstrip(".")
    return address.is_loopback or address == own or (own is not None and own.is_unspecified)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a host is, or None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
