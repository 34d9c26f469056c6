"""Every kind of input gives exactly its documents, in order, from any cut; what cannot be read says why and where."""

import gzip
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest
import zstandard

from pretrain.prepare import readers
from pretrain.prepare.documents import Counts, Document, Piece, cut, read_documents, sha256_of
from pretrain.prepare.finding import InputFile, find_files
from tests.forked import ROOT

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402


def read(*paths: Path, text_key: str = "text", strict: bool = False) -> tuple[list[Document], Counts]:
    counts = Counts()
    return list(read_documents(find_files(paths).files, text_key, counts, strict)), counts


def triples(documents: list[Document], root: Path) -> list[tuple[str, int, str]]:
    return [(d.text, d.input_bytes, d.source.replace(f"{root}/", "")) for d in documents]


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def write_tar(path: Path, members: list[tuple[str, bytes]], **info: object) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in info.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))
    return path


def read_alone(folder: Path, max_bytes: int = readers.MAX_DOCUMENT_BYTES) -> tuple[str, int]:
    """In a process of its own: the characters read, or the error, and how many MB the peak of its memory grew."""
    code = (
        "import pyarrow.parquet, re, sys; from pretrain.prepare import documents as d, finding as f, readers\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "readers.MAX_DOCUMENT_BYTES, before = int(sys.argv[2]), peak()\n"
        "files = f.find_files([sys.argv[1]]).files\n"
        "try: print(sum(len(x.text) for x in d.read_documents(files, 'text', d.Counts())))\n"
        "except ValueError as error: print(error)\n"
        "print(peak() - before)"
    )
    run = [sys.executable, "-c", code, str(folder), str(max_bytes)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    told, growth = done.stdout.splitlines()
    return told, int(growth)


# Text and JSONL


def test_a_document_says_where_it_is_from_and_what_was_read_for_it(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    lines = jsonl("two", "", "three")
    (tmp_path / "b.jsonl").write_bytes(b"\n" + lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl("four"), mtime=0))
    (tmp_path / "d.md.zst").write_bytes(zstandard.compress(b"five"))
    documents, counts = read(tmp_path)
    first = lines.index(b"\n") + 1
    assert triples(documents, tmp_path) == [
        ("one", 3, "a.txt"),
        ("two", 1 + first, "b.jsonl, line 2"),
        ("three", len(lines) - first, "b.jsonl, line 4"),
        ("four", (tmp_path / "c.jsonl.gz").stat().st_size, "c.jsonl.gz, line 1"),
        ("five", (tmp_path / "d.md.zst").stat().st_size, "d.md.zst"),
    ]
    assert counts == Counts(documents=5, empty=1)
    assert counts.summary() == "1 empty documents left out"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst", "a.parquet", "a.tar"])
def test_an_empty_file_is_an_empty_document(tmp_path, name):
    (tmp_path / name).touch()
    assert read(tmp_path) == ([], Counts(empty=1))
    assert cut(find_files([tmp_path]).files, 100) == [Piece(str(tmp_path / name), 0, 0)]


def test_the_counts_of_parts_add_up():
    counts = Counts(documents=1, empty=2, invalid=2, invalid_files=["a", "b"])
    counts.merge(Counts(documents=10, empty=20, invalid=3, ignored_members=4, invalid_files=["b", "c", "d"]))
    assert counts == Counts(documents=11, empty=22, invalid=5, ignored_members=4, invalid_files=["a", "b", "c"])
    assert "5 documents with invalid UTF-8, replaced by U+FFFD (first: a, b, c)" in counts.summary()
    assert "4 members of tar files are not texts (.txt, .json) and were ignored" in counts.summary()


BAD_TEXT = {
    "a.txt": (b"caf\xc3\xa9 \xff!", "caf\u00e9 \ufffd!", r"a\.txt: invalid UTF-8 \(invalid start byte, byte 6 of it\)"),
    "a.txt.gz": (gzip.compress(b"\xff"), "\ufffd", r"a\.txt\.gz: invalid UTF-8"),
    "a.jsonl": (jsonl("x") + b'{"text": "\xc3"}\n', "\ufffd", r"a\.jsonl, line 2: invalid UTF-8 \(invalid cont"),
    "b.jsonl": (jsonl("x") + b'{"text": "a\\ud800"}\n', "a\ufffd", r"b\.jsonl, line 2: half a character"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_invalid_utf8_is_replaced_and_counted_or_refused(tmp_path, name):
    data, text, message = BAD_TEXT[name]
    (tmp_path / name).write_bytes(data)
    documents, counts = read(tmp_path)
    assert documents[-1].text == text
    assert (counts.invalid, counts.invalid_files) == (1, [str(tmp_path / name)])
    with pytest.raises(ValueError, match=message + ".*--strict refuses it"):
        read(tmp_path, strict=True)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"])
def test_a_text_without_an_end_is_refused(tmp_path, monkeypatch, name):
    """Seven kilobytes of gzip hold as much text as memory; the limit is lowered here."""
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(b"a" * 7_000_000))
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 6_999_999)
    place = ", line 1" if "jsonl" in name else ""
    with pytest.raises(ValueError, match=rf"{name}{place}: a text of more than .* GiB, which is no document"):
        read(tmp_path)
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 7_000_000)
    if "jsonl" not in name:
        assert len(read(tmp_path)[0][0].text) == 7_000_000


def test_a_decompression_bomb_does_not_fill_the_memory(tmp_path):
    """512 MB of text in 2 MB of gzip: refused at a limit of 8 MB, with the memory of a few times that."""
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b"\0" * 2**29, compresslevel=1))
    message, growth = read_alone(tmp_path, max_bytes=2**23)
    assert "bomb.jsonl.gz, line 1: a text of more than" in message
    assert growth < 64


# Byte ranges


def lines_of_all_lengths(count: int) -> list[str]:
    rng = random.Random(5)
    return ["".join(rng.choices("ab\u00e9\n\U0001f600", k=rng.choice((0, 1, 7, 60, 900)))) for _ in range(count)]


@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n\n"])
@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 64, 333, 1000, 10**9])
def test_any_cut_gives_the_same_documents(tmp_path, piece_bytes, ending):
    texts = lines_of_all_lengths(15)
    body = b"\r\n".join(json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts)
    (tmp_path / "a.jsonl").write_bytes(b"\n" + body.replace(b"\r\n", b"\n\n", 2) + ending)
    (tmp_path / "b.txt").write_bytes(b"not cut" * 100)
    files = find_files([tmp_path]).files
    pieces = cut(files, piece_bytes)
    size = files[0].bytes
    assert [(p.start, p.end) for p in pieces[:-1]] == [
        (start, min(start + piece_bytes, size)) for start in range(0, size, piece_bytes)
    ]
    assert pieces[-1] == Piece(str(tmp_path / "b.txt"), 0, 700)
    counts, each = Counts(), [list(read_documents([piece], "text", Counts())) for piece in pieces]
    together = list(read_documents(pieces, "text", counts))
    wanted = [text for text in texts if text] + ["not cut" * 100]
    assert [d.text for d in together] == wanted == [d.text for part in each for d in part]
    assert counts.documents == len(wanted) and counts.empty == texts.count("")
    for piece, documents in zip(pieces, each, strict=True):
        assert sum(d.input_bytes for d in documents) <= piece.end - piece.start
    assert sum(d.input_bytes for d in together) <= size + 700


def test_a_line_is_named_by_its_byte_in_a_range_and_an_error_by_its_line(tmp_path):
    lines = jsonl(*"abcdefghij")
    (tmp_path / "a.jsonl").write_bytes(lines + b'{"text": \n' + b'{"text": "\xff"}\n{"text": 5}\n')
    width = lines.index(b"\n") + 1
    path, size = tmp_path / "a.jsonl", (tmp_path / "a.jsonl").stat().st_size
    documents = list(read_documents([Piece(str(path), width + 1, 3 * width + 1)], "text", Counts()))
    assert triples(documents, tmp_path) == [
        ("c", 2 * width - 1, f"a.jsonl, byte {2 * width}"), ("d", 1, f"a.jsonl, byte {3 * width}"),
    ]  # fmt: skip
    for start, strict, message in (
        (10 * width, False, "line 11: not valid JSON"),
        (10 * width + 1, True, "line 12: invalid UTF-8"),
        (size - 1, False, None),
        (size - 13, False, "line 13: field 'text' is not text"),
    ):
        work = read_documents([Piece(str(path), start, size)], "text", Counts(), strict)
        if message is None:
            assert list(work) == []
            continue
        with pytest.raises(ValueError, match=f"a.jsonl, {message}"):
            list(work)


def test_a_piece_is_hashed_by_its_bytes(tmp_path):
    path, data = tmp_path / "a.jsonl", random.Random(3).randbytes(3_000_000)
    path.write_bytes(data)
    for start, end in ((0, 3_000_000), (0, 1), (1_999_999, 2_500_001), (7, 7)):
        assert sha256_of(Piece(str(path), start, end)) == sha256(data[start:end]).hexdigest()
    with pytest.raises(ValueError, match="a.jsonl has become shorter since it was listed"):
        sha256_of(Piece(str(path), 0, 3_000_001))


# Parquet


def write_parquet(path: Path, column: object, row_group_size: int = 50, name: str = "text") -> Path:
    table = pyarrow.table({"id": list(range(len(column))), name: column})
    parquet.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_rows_are_documents(tmp_path, kind):
    texts = lines_of_all_lengths(170)
    types = {
        "string": pyarrow.string(), "large_string": pyarrow.large_string(), "string_view": pyarrow.string_view(),
        "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    }  # fmt: skip
    write_parquet(tmp_path / "a.parquet", pyarrow.array([*texts, None, "last"], types[kind]))
    documents, counts = read(tmp_path)
    wanted = [(text, f"a.parquet, row {n}") for n, text in enumerate([*texts, "", "last"], start=1) if text]
    assert [(text, source) for text, _, source in triples(documents, tmp_path)] == wanted
    assert counts == Counts(documents=len(wanted), empty=172 - len(wanted))
    assert sum(d.input_bytes for d in documents) == (tmp_path / "a.parquet").stat().st_size


def test_a_parquet_file_without_any_text_is_of_empty_documents(tmp_path):
    write_parquet(tmp_path / "a.parquet", pyarrow.nulls(3))
    write_parquet(tmp_path / "b.parquet", ["x"])
    documents, counts = read(tmp_path)
    assert [d.text for d in documents] == ["x"] and counts == Counts(documents=1, empty=3)


def test_parquet_by_another_column_and_without_rows(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x", "y"], name="body")
    assert [d.text for d in read(tmp_path, text_key="body")[0]] == ["x", "y"]
    write_parquet(tmp_path / "a.parquet", pyarrow.array([], pyarrow.string()))
    assert read(tmp_path) == ([], Counts())


def test_invalid_utf8_in_parquet(tmp_path):
    bad = pyarrow.array([b"fine", b"a\xffb"]).cast(pyarrow.binary())
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, bad.buffers())  # pyarrow itself would not write it so
    write_parquet(tmp_path / "a.parquet", bad)
    documents, counts = read(tmp_path)
    assert [d.text for d in documents] == ["fine", "a\ufffdb"] and counts.invalid == 1
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: invalid UTF-8"):
        read(tmp_path, strict=True)


def test_a_parquet_file_that_cannot_be_read_says_why(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["some text"] * 500)
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body' \(there is: id, text\); name it with --text-"):
        read(path, text_key="body")
    with pytest.raises(ValueError, match=r"a\.parquet: column 'id' is int64, not text"):
        read(path, text_key="id")
    data = path.read_bytes()
    for broken in (data[:-20], b"PAR1" + data[4:-8] + b"\0\0\0\0PAR1", b"text, not Parquet", data[:4] + data[900:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.parquet is damaged or not a Parquet file"):
            read(path)


def test_without_pyarrow_the_extra_to_install_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a\.parquet needs pyarrow: .* else pip install 'pretrain\[prepare\]'"):
        read(path)


def test_parquet_is_streamed(tmp_path):
    """One row group of 152 MB of text is read within 74 MB, most of it the library's own; whole it would take 181."""
    schema = pyarrow.schema([("text", pyarrow.string())])
    with parquet.ParquetWriter(tmp_path / "a.parquet", schema, compression="none", use_dictionary=False) as writer:
        text = random.Random(1).randbytes(5000).hex()
        writer.write_table(pyarrow.table({"text": [text[n % 999 :] for n in range(16_000)]}), row_group_size=16_000)
    size, growth = read_alone(tmp_path)
    assert int(size) > 150e6 and growth < 110


# WebDataset tars


def test_tar_members_are_documents(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("x/0001.txt", b"first"),
            ("x/0001.cls", b"7"),
            ("x/0001.jpg", b"\xff\xd8"),
            ("x/0002.json", b'{"text": "second", "url": "u"}'),
            ("x/0003.json", b'{"width": 9}'),  # about the text that follows
            ("x/0003.en.txt", b"third"),
            ("x/0004.txt", b""),
            ("x/._0005.txt", b"\0\5\x16\7"),
            ("README", b"no suffix"),
            ("x/0006.TXT", "vierte \u00e9".encode()),
        ],
    )
    documents, counts = read(path)
    position = 512 * 2
    assert triples(documents, tmp_path)[0] == ("first", position, "a.tar, member x/0001.txt")
    assert [(text, source) for text, _, source in triples(documents, tmp_path)] == [
        ("first", "a.tar, member x/0001.txt"),
        ("second", "a.tar, member x/0002.json"),
        ("third", "a.tar, member x/0003.en.txt"),
        ("vierte \u00e9", "a.tar, member x/0006.TXT"),
    ]
    assert counts == Counts(documents=4, empty=1, ignored_members=5)
    assert "5 members of tar files are not texts (.txt, .json) and were ignored" in counts.summary()
    assert sum(d.input_bytes for d in documents) <= path.stat().st_size


def test_a_tar_of_stock_webdataset_gives_its_texts(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    texts = [f"text {n} \u00e9" for n in range(20)]
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for n, text in enumerate(texts):
            part = {"txt": text} if n % 2 else {"json": {"text": text}}
            writer.write({"__key__": f"{n:05}", "cls": n, **part})
    documents, counts = read(tmp_path)
    assert [d.text for d in documents] == texts
    assert counts.ignored_members == 20


@pytest.mark.parametrize("name", ["a.pyd", "a.pkl", "a.pickle", "b.txt.pkl.gz", "dir.x/A.PKL"])
def test_pickles_in_a_tar_are_refused_and_not_run(tmp_path, name):
    marker = tmp_path / "ran"
    payload = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    path = write_tar(tmp_path / "a.tar", [("0.txt", b"fine"), (name, payload)])
    with pytest.raises(ValueError, match=rf"a\.tar: member '{name}' is a pickle.*refused"):
        read(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name, info, message",
    [
        ("../evil.txt", {}, "points out of the archive"),
        ("/etc/evil.txt", {}, "points out of the archive"),
        ("a/../../evil.txt", {}, "points out of the archive"),
        ("a.txt", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "not a plain file"),
        ("a.txt", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}, "not a plain file"),
        ("a.txt", {"type": tarfile.FIFOTYPE}, "not a plain file"),
    ],
)
def test_links_and_names_out_of_the_tar_are_refused(tmp_path, name, info, message):
    path = write_tar(tmp_path / "a.tar", [(name, b"")], **info)
    with pytest.raises(ValueError, match=rf"a\.tar: member.*{message}.*refused"):
        read(path)


def test_a_tar_bomb_is_refused(tmp_path):
    """A member of two gigabytes of zeros that take no room on the disk."""
    member = tarfile.TarInfo("a.txt")
    member.size = 2 * 2**30
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(member.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(512 + member.size + 10240)
    message, growth = read_alone(tmp_path)
    assert "a.tar: member 'a.txt': a text of more than 1 GiB, which is no document" in message
    assert growth < 20


def test_bad_texts_in_a_tar_name_their_member(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.json", b'{"text": "x"}'), ("1.json", b"{")])
    with pytest.raises(ValueError, match=r"a\.tar, member 1\.json: not valid JSON"):
        read(path)
    path = write_tar(tmp_path / "a.tar", [("1.json", b'{"body": "x"}')])
    with pytest.raises(ValueError, match=r"a\.tar, member 1\.json: no field 'text' \(there is: body\)"):
        read(path)
    path = write_tar(tmp_path / "a.tar", [("1.txt", b"\xff")])
    assert read(path)[1].invalid == 1
    with pytest.raises(ValueError, match=r"a\.tar, member 1\.txt: invalid UTF-8"):
        read(path, strict=True)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"a\.tar"):
        read(path)


# Which files


def test_a_folder_gives_its_files_of_known_kinds(tmp_path):
    names = ["a.txt", "b.parquet", "c.tar", "d.JSONL", "e.md.gz", "f.tar.gz", "g.parquet.zst", "h.png", "i.zip"]
    for name in names:
        (tmp_path / name).write_bytes(gzip.compress(b"x") if name.endswith("md.gz") else b"x")
    assert [file.path.name for file in find_files([tmp_path]).files] == names[:5]
    assert find_files([tmp_path / "h.png"]).files == [InputFile(str(tmp_path / "h.png"), 1)]


@pytest.mark.parametrize(
    "name, message",
    [
        ("a.tar.gz", r"a\.tar\.gz is compressed as a whole: run `gunzip -k .*a\.tar\.gz` first"),
        ("a.parquet.gz", r"is compressed as a whole: run `gunzip -k"),
        ("a.tar.zst", r"is compressed as a whole: run `zstd -d"),
        ("a.tgz", r"a\.tgz is of a kind that is not read: unpack it first"),
        ("a.zip", r"a\.zip is of a kind that is not read: unpack it first"),
        ("a.txt.bz2", r"is of a kind that is not read: unpack it first"),
    ],
)
def test_a_kind_that_is_not_read_is_refused_before_any_work(tmp_path, name, message):
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=message):
        find_files([tmp_path / name])
    with pytest.raises(ValueError, match=message):
        find_files([tmp_path], include=["a.*"])


def test_an_unreadable_file_is_an_error_before_any_work():
    with tempfile.TemporaryDirectory() as name:  # where another user may look, unlike tmp_path
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "a.txt").write_text("fine")
        (folder / "b.txt").write_text("secret")
        (folder / "b.txt").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            message = r"b\.txt cannot be read \(Permission denied\): see its permissions, or leave it out with --ex"
            with pytest.raises(ValueError, match=message):
                find_files([folder])
            assert [file.path.name for file in find_files([folder], exclude=["b.*"]).files] == ["a.txt"]
        finally:
            os.seteuid(user)
