"""Which network interface leads to a host, as the kernel routes it. Linux."""

import array
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

SIOCGIFCONF = 0x8912  # <linux/sockios.h>: the IPv4 addresses of all interfaces
ENTRY = 16 + 24  # bytes of a struct ifreq: a name, an address
MOST = 1024  # addresses
LOCAL = ("localhost", "127.0.0.1", "::1")  # what means this host alone


def interface_to(host: str) -> str | None:
    """The interface that leads to `host` (a name or an address), or that owns its address where that is this host;
    None where nothing says so, or only that a name is this host's own. Nothing is sent.
    """
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    # Of this host's own name some systems make 127.0.1.1 beside its address, and nobody else can reach that.
    for family, _, _, _, address in sorted(found, key=lambda each: ipaddress.ip_address(each[4][0]).is_loopback):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)
                own = ipaddress.ip_address(probe.getsockname()[0])
        except OSError:
            continue
        if own.is_loopback and host not in LOCAL:
            return None
        if name := _interfaces().get(own):
            return name
    return None


def _interfaces() -> dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str]:
    """Address -> interface, of all that this host has."""
    listed = array.array("B", bytes(MOST * ENTRY))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        filled = fcntl.ioctl(asked, SIOCGIFCONF, struct.pack("iP", len(listed), listed.buffer_info()[0]))
    entries = [listed[start : start + ENTRY].tobytes() for start in range(0, struct.unpack("iP", filled)[0], ENTRY)]
    names = {ipaddress.ip_address(entry[20:24]): entry[:16].split(b"\0")[0].decode() for entry in entries}
    names = {address: name.partition(":")[0] for address, name in names.items()}  # eth0:1 is a second address of eth0
    table = Path("/proc/net/if_inet6")
    for line in table.read_text(encoding="ascii").splitlines() if table.is_file() else ():
        address, *_, name = line.split()
        names[ipaddress.ip_address(bytes.fromhex(address))] = name
    return names
