"""The walk over a tar: what Python, GNU tar and webdataset write is read; what is damaged or made up is refused."""

import io
import os
import random
import shutil
import subprocess
import tarfile
import tracemalloc

import pytest

from pretrain.shards import tar

NAMES = ["a.txt", "folder/b.c.txt", "x" * 90 + ".txt", "d/" * 60 + "deep.txt", "ä.txt", "empty.txt"]


def contents(name: str) -> bytes:
    return b"" if name == "empty.txt" else name.encode() * 7


def written(format: int, names: list[str] = NAMES) -> bytes:
    """A tar by Python's own writer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(contents(name)), 1.5
            archive.addfile(info, io.BytesIO(contents(name)))
    return out.getvalue()


def walk(data: bytes) -> list[tuple[str, bytes]]:
    file = io.BytesIO(data)
    found = []
    for member in tar.members(file, "x.tar"):
        assert member.end % tar.BLOCK == 0 and 0 <= member.end - member.offset - member.size < tar.BLOCK
        file.seek(member.offset)
        found.append((member.name, file.read(member.size)))
    return found


def one(kind: bytes = tarfile.REGTYPE, name: str = "a.npy", link: str = "", pax: dict | None = None) -> bytes:
    """A tar of one empty member of any kind, as a program with other aims could write it."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, pax or {}
    return info.tobuf(tarfile.PAX_FORMAT) + tar.end_of_archive(0)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_python_writes(format):
    names = [name for name in NAMES if format != tarfile.USTAR_FORMAT or name.isascii()]
    assert walk(written(format, names)) == [(name, contents(name)) for name in names]
    assert walk(written(format, [])) == []


def test_our_own_header_is_that_of_python():
    data = tar.header("a.txt", 35) + contents("a.txt").ljust(512, b"\0")
    data += tar.end_of_archive(len(data))
    assert walk(data) == [("a.txt", contents("a.txt"))] and len(data) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        (info,) = archive.getmembers()
    assert (info.name, info.size, info.mode, info.mtime, info.uid, info.uname) == ("a.txt", 35, 0o644, 0, 0, "")


@pytest.mark.skipif(not shutil.which("tar"), reason="needs the tar program")
def test_what_gnu_tar_writes_of_a_folder(tmp_path):
    """Folders are in such a tar too; they are passed over."""
    for name in NAMES:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents(name))
    command = ["tar", "-cf", tmp_path / "x.tar", "--sort=name", "-C", tmp_path / "in", "."]
    subprocess.run(command, check=True, timeout=600)
    found = walk((tmp_path / "x.tar").read_bytes())
    assert sorted(found) == sorted((f"./{name}", contents(name)) for name in NAMES)


@pytest.mark.parametrize(
    "data",
    [
        one(tarfile.SYMTYPE, link="/etc/passwd"), one(tarfile.LNKTYPE, link="a"), one(tarfile.CHRTYPE),
        one(tarfile.FIFOTYPE), one(tarfile.GNUTYPE_SPARSE), one(b"S"), one(b"?"),
        one(pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}),
        one(pax={"GNU.sparse.size": "9", "GNU.sparse.numblocks": "1"}),
    ],
)  # fmt: skip
def test_only_plain_files(data):
    with pytest.raises(ValueError, match=r"^x\.tar"):
        walk(data)


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "a\\b", "..", "/", ".", "//etc/x", "a/..", ""])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
def test_names_stay_inside(name, kind):
    if kind == tarfile.DIRTYPE and name in (".", "", "/"):
        assert walk(one(kind, name)) == []  # `tar -C folder .` begins with it; "/" loses its slash
        return
    for data in (one(kind, name), one(kind, "good.npy", pax={"path": name} if name else {"path": "/"})):
        with pytest.raises(ValueError, match=r"^x\.tar: member name .* points out of the archive: refused"):
            walk(data)


@pytest.mark.parametrize("size", [1, 512, 513, 10**6])
def test_cuts_are_seen(size):
    data = written(tarfile.USTAR_FORMAT, ["a.txt", "b.txt"])[: 4 * 512]
    with pytest.raises(ValueError, match=r"x\.tar"):
        walk(data[:-size])  # no end, half a member, nothing
    for end in (b"", b"\0" * 512, b"\0" * 1023):
        with pytest.raises(ValueError, match=r"x\.tar is cut short: it has no end-of-archive blocks at byte 2,048"):
            walk(data + end)
    assert len(walk(data + b"\0" * 1024)) == 2
    with pytest.raises(ValueError, match=r"x\.tar is damaged after byte 2,048"):
        walk(data + b"\0" * 1024 + b"x")


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"not a tar"])
def test_what_is_no_tar(magic):
    with pytest.raises(ValueError, match=r"x\.tar is not a whole, uncompressed tar file"):
        walk(magic.ljust(2048, b"\1"))


def base256(value: int, width: int = 12) -> bytes:
    return tarfile.itn(value, width, tarfile.GNU_FORMAT)


def with_size(data: bytes, field: bytes) -> bytes:
    """The first header with another size field, its checksum made right."""
    head = bytearray(data[:512])
    head[124:136] = field
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + data[512:]


@pytest.mark.parametrize("size", [2**25, 2**40, 2**62, 2**80, -1, -512, -(2**40)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_sizes_are_not_believed(tmp_path, kind, size):
    """A member, or a header that Python's reader would take into memory whole, of any claimed size."""
    data = with_size(tar.header("a", 0).replace(b"0", kind, 1) if kind == tarfile.REGTYPE else one(kind), base256(size))
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    os.truncate(path, 40 << 20)  # zeros; enough of them for the first size
    tracemalloc.start()
    with open(path, "rb") as file:
        if kind == tarfile.REGTYPE and size == 2**25:
            assert [member.size for member in tar.members(file, "x.tar")] == [size]
        else:
            with pytest.raises(ValueError, match=r"^x\.tar"):
                list(tar.members(file, "x.tar"))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("size", ["-512", "-1", "99999999999999999999"])
def test_sizes_of_pax_headers_are_not_believed(size):
    with pytest.raises(ValueError, match=r"^x\.tar"):
        walk(one(pax={"size": size}))


def test_a_chain_of_headers_does_not_end_the_stack():
    long_name = tarfile.TarInfo.create_pax_global_header({"comment": "x"})
    with pytest.raises(ValueError, match=r"x\.tar is not a whole, uncompressed tar file"):
        walk(long_name * 5000 + one())
    assert walk(long_name + one()) == [("a.npy", b"")]


def test_memory_stays_flat():
    """Neither members nor global headers pile up."""

    def peak(count: int) -> int:
        one_header = tarfile.TarInfo.create_pax_global_header
        parts = [one_header({f"key{i}": "x" * 400}) + tar.header(f"{i}", 0) for i in range(count)]
        data = b"".join(parts) + tar.end_of_archive(0)
        tracemalloc.start()
        assert sum(1 for _ in tar.members(io.BytesIO(data), "x.tar")) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(2000) < peak(500) + 100_000


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whatever_is_flipped_only_a_value_error_comes(format):
    """Bits in headers and cuts: refused, or the walk gives members that lie within the file."""
    data = written(format, [name for name in NAMES if name.isascii()])
    rng = random.Random(0)
    refused = 0
    for _ in range(3000):
        bad = bytearray(data)
        for _ in range(rng.choice([1, 1, 3])):
            bit = rng.randrange(8 * len(data))
            bad[bit // 8] ^= 1 << bit % 8
        if rng.random() < 0.1:
            del bad[rng.randrange(len(bad)) :]
        try:
            for member in tar.members(io.BytesIO(bytes(bad)), "x.tar"):
                assert 0 < member.offset <= member.offset + member.size <= len(bad)
        except ValueError as error:
            refused += 1
            assert str(error).startswith("x.tar")
    assert refused > 1000
