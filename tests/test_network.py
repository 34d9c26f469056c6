"""Which interface leads to a host: in a network of its own, where it is known."""

import shutil
import subprocess
import sys

import pytest

from pretrain.network import interface_to
from tests.forked import ROOT

NETWORK = """
ip link set lo up; ip -6 addr flush dev lo scope link
ip link add d0 type bridge; ip addr add 10.9.8.7/24 dev d0; ip addr add 10.9.8.77/24 dev d0; ip link set d0 up
ip link add d1 type bridge; ip addr add 10.6.5.4/24 dev d1; ip addr add fd00:6::4/64 dev d1 nodad; ip link set d1 up
mount --bind "$1" /etc/hosts; shift
exec "$@"
"""
ASK = "import sys; from pretrain.network import interface_to; print(*map(interface_to, sys.argv[1:]))"


def can_have_networks() -> bool:
    tried = (
        shutil.which("ip") and shutil.which("unshare") and subprocess.run(["unshare", "-nm", "true"]).returncode == 0
    )
    return (
        bool(tried) and subprocess.run(["unshare", "-n", "ip", "link", "add", "d0", "type", "bridge"]).returncode == 0
    )


@pytest.mark.skipif(not can_have_networks(), reason="needs iproute2, and the right to make a network namespace")
def test_it_is_the_one_that_the_kernel_routes_by_and_the_owner_of_an_own_address(tmp_path):
    asked = {
        "10.9.8.9": "d0", "10.6.5.9": "d1", "10.9.8.7": "d0", "10.9.8.77": "d0", "10.6.5.4": "d1", "127.0.0.1": "lo",
        "fd00:6::9": "d1", "fd00:6::4": "d1", "203.0.113.5": "None", "no-such-host.invalid": "None",
        "me": "d1",
    }  # fmt: skip
    (tmp_path / "hosts").write_text("127.0.1.1 me\n10.6.5.4 me\n")  # as some systems have it
    line = ["unshare", "-nm", "sh", "-c", NETWORK, "sh", tmp_path / "hosts", sys.executable, "-c", ASK, *asked]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert dict(zip(asked, done.stdout.split(), strict=True)) == asked


def test_a_name_that_only_this_host_knows_by_itself_leads_nowhere():
    """Debian has 127.0.1.1 for a host's own name: other nodes would not find it there."""
    assert interface_to("127.0.1.1") is None and interface_to("127.0.0.1") == "lo"
