"""Remote shards through the cache: the right tokens under every fault, and nothing wrong is ever kept."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pretrain.shards import fetch, remote
from pretrain.shards import manifest as manifests
from pretrain.shards.cache import lock_file
from pretrain.shards.manifest import Manifest
from pretrain.shards.reader import ShardReader
from pretrain.shards.remote import CacheSettings, open_store
from tests.data_helpers import random_documents, write_dataset
from tests.http_store import HttpStore, serve

GB = 10**9
SECOND = "data/00000001.tar"
READ_ALL = """
import resource, sys
import numpy as np
from pathlib import Path
from pretrain.shards import fetch, manifest as manifests
from pretrain.shards.remote import CacheSettings
from pretrain.shards.reader import ShardReader
url, cache, command = sys.argv[1:]
fetch.BACKOFF_SECONDS = (0.01, 0.01)
manifest = manifests.load(url, CacheSettings(Path(cache), 10**9))
first = manifest.shards[0]
if command == "prefetch":
    manifest.store.prefetch(first.name, first.bytes, first.sha256)
    while not list(Path(cache).glob("*/*.tar.*.part")): pass
    print("prefetching", flush=True)
    raise SystemExit
if command == "small disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (first.bytes // 2, resource.RLIM_INFINITY))
reader = ShardReader(manifest)
print(sum(int(reader.read(np.full(n, s), np.arange(n), 64)[0].sum())
          for s, n in enumerate(manifest.windows_per_shard(64).tolist())))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("served") / "data"
    return write_dataset(folder, random_documents(100, 300))


@pytest.fixture
def server(data, monkeypatch) -> Iterator[HttpStore]:
    monkeypatch.setattr(fetch, "BACKOFF_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(fetch, "STALL_SECONDS", 0.4)
    with serve(data.folder.parent) as store:
        yield store


def load(server: HttpStore, cache: Path, max_bytes: int = GB) -> Manifest:
    return manifests.load(f"{server.url}/data", CacheSettings(cache, max_bytes))


def all_tokens(manifest: Manifest) -> np.ndarray:
    reader = ShardReader(manifest)
    counts = manifest.windows_per_shard(64).tolist()
    rows = [reader.read(np.full(n, shard), np.arange(n), 64)[0] for shard, n in enumerate(counts)]
    reader.close()
    return np.concatenate(rows)


def open_all(manifest: Manifest, *numbers: int) -> list:
    shards = [manifest.shards[number] for number in numbers]
    return [manifest.store.open(shard.name, shard.bytes, shard.sha256) for shard in shards]


def cached(cache: Path) -> set[str]:
    """The shards in a cache, and what is still on its way."""
    return {path.name[17:] for path in cache.glob("*/*.tar")} | {path.name for path in cache.glob("*/*.part")}


def reading_process(server: HttpStore, cache: Path, command: str = "read") -> subprocess.Popen:
    arguments = [sys.executable, "-c", READ_ALL, f"{server.url}/data", str(cache), command]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# What passes is tried again


@pytest.mark.parametrize("fault", ["busy", "slow_down", "reset", "stall", "short", "wrong", "endless"])
def test_every_token_is_right_whatever_passing_fault(data, server, tmp_path, capfd, fault):
    expected = all_tokens(data)
    files = [SECOND, "data/00000001.idx.npy"] if fault != "endless" else [SECOND]
    if fault not in ("wrong", "endless"):  # nothing says what the index should be, but the index itself
        files.append("data/index.json")
    for file in files:
        server.fail(file, fault, 2)
    np.testing.assert_array_equal(all_tokens(load(server, tmp_path)), expected)
    assert server.requests[SECOND] == 3
    assert server.requests["data/00000000.tar"] == 1
    told = capfd.readouterr().err.splitlines()
    assert sum("failed" in message for message in told) == 2 * len(files)  # others say that they wait
    assert told[-1].startswith(f"fetching {server.url}/{SECOND} failed (")
    assert "attempt 3 of 5 in 0.0 s" in told[-1]
    assert cached(tmp_path) == {shard.name for shard in data.shards}


@pytest.mark.parametrize("fault", ["busy", "short", "wrong"])
def test_a_fault_that_stays_is_an_error_and_leaves_nothing(data, server, tmp_path, fault):
    manifest = load(server, tmp_path)
    server.fail(SECOND, fault, 99)
    with pytest.raises(ValueError, match=rf"{server.url}/{SECOND} failed 5 times, the last time: \S.*; check the"):
        open_all(manifest, 1)
    assert server.requests[SECOND] == 5
    assert cached(tmp_path) == set()
    server.heal()
    np.testing.assert_array_equal(all_tokens(manifest), all_tokens(data))


def test_wrong_bytes_forever_are_never_accepted_for_a_small_file(server, tmp_path):
    manifest = load(server, tmp_path)
    server.fail("data/00000001.idx.npy", "wrong", 99)
    with pytest.raises(ValueError, match="00000001.idx.npy failed 5 times.*wrong content: sha256"):
        manifest.chunks(1)
    assert not list(tmp_path.glob("*/*.npy"))


@pytest.mark.parametrize("fault, told", [("gone", r"is not there \(404\)"), ("forbidden", "access is denied.*AWS_")])
def test_what_stays_so_is_told_at_once(server, tmp_path, fault, told):
    manifest = load(server, tmp_path)
    server.fail(SECOND, fault)
    with pytest.raises(ValueError, match=f"{server.url}/{SECOND}:? {told}"):
        open_all(manifest, 1)
    assert server.requests[SECOND] == 1


def test_exists_is_false_only_when_the_server_says_so(server, tmp_path):
    store = open_store(f"{server.url}/data", CacheSettings(tmp_path, GB))
    assert store.exists("index.json")
    assert not store.exists("train/index.json")
    assert server.requests["data/train/index.json"] == 1
    server.fail("data/index.json", "busy", 2)
    assert store.exists("index.json")
    for fault in ("forbidden", "busy"):
        server.fail("data/train/index.json", fault, 5)
        with pytest.raises(ValueError, match="train/index.json"):
            store.exists("train/index.json")
        server.heal()


def test_no_server(server, tmp_path):
    server.close()
    with pytest.raises(ValueError, match=rf"{server.url}/data/index.json failed 5 times.*Connect call failed"):
        load(server, tmp_path)


def test_the_index_is_fetched_anew_each_time(server, tmp_path):
    load(server, tmp_path)
    before = server.requests["data/index.json"]
    load(server, tmp_path)
    assert server.requests["data/index.json"] > before
    server.close()
    with pytest.raises(ValueError, match="index.json failed 5 times"):
        load(server, tmp_path)


# The cache


def test_what_is_cached_is_not_fetched_again(data, server, tmp_path):
    for _ in range(2):
        np.testing.assert_array_equal(all_tokens(load(server, tmp_path)), all_tokens(data))
    assert {count for path, count in server.requests.items() if "index.json" not in path} == {1}


@pytest.mark.parametrize("damage", ["flip", "cut", "sidecar"])
def test_a_file_damaged_in_the_cache_is_fetched_again(data, server, tmp_path, damage):
    expected = all_tokens(load(server, tmp_path))
    (path,) = tmp_path.glob("*/*00000001.idx.npy" if damage == "sidecar" else "*/*00000001.tar")
    if damage == "cut":
        os.truncate(path, 5000)
    else:
        flip_byte(path, 2000 if damage == "flip" else 130)
    np.testing.assert_array_equal(all_tokens(load(server, tmp_path)), expected)
    assert server.requests[f"data/{path.name[-16:] if damage == 'sidecar' else '00000001.tar'}"] == 2


def test_a_shard_cut_short_in_the_cache_is_not_opened(data, server, tmp_path):
    manifest = load(server, tmp_path)
    open_all(manifest, 1)[0].close()
    (path,) = tmp_path.glob("*/*00000001.tar")
    os.truncate(path, 5000)
    (file,) = open_all(manifest, 1)
    assert hashlib.sha256(file.read()).hexdigest() == data.shards[1].sha256
    file.close()


def test_a_data_set_written_anew_at_the_same_address(server, tmp_path):
    folder = server.folder / "again"
    for seed in (1, 2):
        shard = write_dataset(folder, random_documents(40, 300, seed=seed)).shards[0]
        manifest = manifests.load(f"{server.url}/again", CacheSettings(tmp_path, GB))
        (file,) = open_all(manifest, 0)
        assert hashlib.sha256(file.read()).hexdigest() == shard.sha256
        file.close()
        for file in folder.iterdir():
            file.unlink()


def test_the_shard_unused_for_longest_makes_room(data, server, tmp_path):
    size = data.shards[0].bytes
    manifest = load(server, tmp_path, max_bytes=3 * size)
    for number in (0, 1, 2, 0):
        (file,) = open_all(manifest, number)
        file.close()
        time.sleep(0.01)  # files' times are coarse
    open_all(manifest, 3)[0].close()
    assert cached(tmp_path) == {"00000000.tar", "00000002.tar", "00000003.tar"}


def test_what_is_not_of_the_cache_is_let_alone(data, server, tmp_path):
    for name in ("00000000.tar", "mine/00000000.tar", "mine/x.part", "0123456789abcdef/mine.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(10**6))
    before = set(tmp_path.glob("*/*")) | {tmp_path / "00000000.tar"}
    assert len(all_tokens(load(server, tmp_path, max_bytes=2 * data.shards[0].bytes)))
    assert all(path.stat().st_size == 10**6 for path in before if path.is_file()) and len(before) == 4


def test_a_shard_in_use_is_kept_and_one_dropped_stays_readable(data, server, tmp_path, capfd):
    size = data.shards[0].bytes
    manifest = load(server, tmp_path, max_bytes=2 * size)
    open_all(manifest, 0)[0].close()
    (first,) = open_all(manifest, 0)  # from the cache
    time.sleep(0.01)
    open_all(manifest, 1)[0].close()
    (third,) = open_all(manifest, 2)
    assert cached(tmp_path) == {"00000000.tar", "00000002.tar"}  # 0 is older than 1, but in use
    assert "smaller than the shards in use" not in capfd.readouterr().err
    fourth, second = open_all(manifest, 3, 1)
    assert len(cached(tmp_path)) == 2
    assert capfd.readouterr().err.count("smaller than the shards in use") == 1
    for number, file in enumerate((first, second, third, fourth)):
        assert hashlib.sha256(os.pread(file.fileno(), 2 * size, 0)).hexdigest() == data.shards[number].sha256
        file.close()


def test_the_limit_holds_at_every_moment_over_all_locations(data, server, tmp_path):
    size = data.shards[0].bytes
    assert len(data.shards) >= 4 and all(shard.bytes == size for shard in data.shards)
    (server.folder / "other").symlink_to(server.folder / "data")
    settings = CacheSettings(tmp_path / "cache", 3 * size + 100)
    sets = [manifests.load(f"{server.url}/{name}", settings) for name in ("data", "other")]
    server.pause_seconds = 0.005
    seen, results = [], []
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            with lock_file(settings.folder / ".lock"):  # so that nothing is renamed while we count
                sizes = []
                for path in [*settings.folder.glob("*/*.tar"), *settings.folder.glob("*/*.tar.*.part")]:
                    with suppress(FileNotFoundError):
                        sizes.append(path.stat().st_size)
            seen.append(sum(sizes))
            time.sleep(0.001)

    threads = [threading.Thread(target=lambda m=m: results.append(all_tokens(m))) for m in sets * 2]
    watcher = threading.Thread(target=watch)
    for thread in [watcher, *threads]:
        thread.start()
    for thread in threads:
        thread.join(600)
    stop.set()
    watcher.join()
    (server.folder / "other").unlink()
    assert len(results) == 4
    for tokens in results:
        np.testing.assert_array_equal(tokens, all_tokens(data))
    assert 2 * size < max(seen) <= settings.max_bytes
    assert len(list(settings.folder.glob("*/*.tar"))) == 3


def test_a_shard_larger_than_the_cache(data, server, tmp_path):
    manifest = load(server, tmp_path, max_bytes=data.shards[1].bytes - 1)
    with pytest.raises(ValueError, match="00000001.tar has .* set data.cache_gb"):
        open_all(manifest, 1)
    assert server.requests[SECOND] == 0


def test_no_room_on_the_disk(data, server, tmp_path):
    process = reading_process(server, tmp_path, "small disk")
    _, error = process.communicate(timeout=600)
    assert process.returncode == 1
    assert f"no room for {server.url}/data/00000000.tar in {tmp_path}" in error
    assert f"it needs {data.shards[0].bytes:,} bytes" in error
    assert server.requests["data/00000000.tar"] == 1
    assert cached(tmp_path) == set()


# Threads and processes


def test_two_processes_fetch_each_shard_once(data, server, tmp_path):
    server.pause_seconds = 0.02
    processes = [reading_process(server, tmp_path) for _ in range(2)]
    for process in processes:
        output, error = process.communicate(timeout=600)
        assert (process.returncode, output.strip()) == (0, str(int(all_tokens(data).sum()))), error
    assert {server.requests[f"data/{shard.name}"] for shard in data.shards} == {1}


def test_threads_fetch_each_shard_once(data, server, tmp_path):
    manifest = load(server, tmp_path)
    server.pause_seconds = 0.01
    found = []
    threads = [threading.Thread(target=lambda: found.extend(open_all(manifest, 0, 1, 2, 3))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    for file in found:
        file.close()
    assert len(found) == 24
    assert {server.requests[f"data/{shard.name}"] for shard in data.shards[:4]} == {1}


def test_a_forked_process_reads_too(data, server, tmp_path):
    manifest = load(server, tmp_path)
    expected = int(all_tokens(data).sum())
    open_all(manifest, 0)[0].close()
    one, two = data.shards[1:3]
    server.pause_seconds = 0.05
    manifest.store.prefetch(one.name, one.bytes, one.sha256)
    wait_for(lambda: server.requests[SECOND])  # a thread holds the lock of this shard now
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            manifest.store.prefetch(two.name, two.bytes, two.sha256)
            wait_for(lambda: two.name in cached(tmp_path))  # by the threads of this process
            manifest.store.discard(one.name)
            os._exit(0 if int(all_tokens(manifest).sum()) == expected else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert int(all_tokens(manifest).sum()) == expected


def test_after_kill_9_in_mid_download(data, server, tmp_path):
    server.fail(SECOND, "stall")
    process = reading_process(server, tmp_path)
    wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob("*/*00000001.tar.*.part")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert cached(tmp_path) > {"00000000.tar"}  # and the leftover
    np.testing.assert_array_equal(all_tokens(load(server, tmp_path)), all_tokens(data))
    assert cached(tmp_path) == {shard.name for shard in data.shards}
    assert server.requests["data/00000000.tar"] == 1


def test_prefetch(data, server, tmp_path, capfd):
    manifest = load(server, tmp_path)
    first, second = data.shards[:2]
    server.pause_seconds = 0.02
    for _ in range(5):
        manifest.store.prefetch(first.name, first.bytes, first.sha256)
    (file,) = open_all(manifest, 0)  # waits for the one on its way
    file.close()
    assert server.requests["data/00000000.tar"] == 1
    server.fail(SECOND, "wrong", 99)
    for _ in range(5):
        manifest.store.prefetch(second.name, second.bytes, second.sha256)
    prefetcher = remote._prefetcher(os.getpid())
    wait_for(lambda: prefetcher._queue.empty() and not prefetcher._pending)
    assert server.requests[SECOND] == 5  # one job, in vain, and nobody is told but of the attempts
    server.heal()
    assert capfd.readouterr().err.count("attempt") == 4
    open_all(manifest, 1)[0].close()
    assert cached(tmp_path) == {"00000000.tar", "00000001.tar"}


def test_prefetching_never_drops_a_shard_in_use(data, server, tmp_path):
    manifest = load(server, tmp_path, max_bytes=data.shards[0].bytes)
    (file,) = open_all(manifest, 0)
    entry = data.shards[1]
    manifest.store.prefetch(entry.name, entry.bytes, entry.sha256)
    wait_for(lambda: not remote._prefetcher(os.getpid())._pending)
    assert cached(tmp_path) == {"00000000.tar"}
    assert server.requests[SECOND] == 0
    file.close()


def test_a_prefetch_under_way_does_not_keep_the_process(server, tmp_path):
    server.fail("data/00000000.tar", "stall")
    process = reading_process(server, tmp_path, "prefetch")
    assert process.stdout.readline() == "prefetching\n"
    begun = time.monotonic()
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert time.monotonic() - begun < 25  # the stall would last 30 s


def test_a_long_wait_is_told_once(data, server, tmp_path, monkeypatch, capfd):
    manifest = load(server, tmp_path)
    monkeypatch.setattr(remote, "NOTICE_SECONDS", 0.1)
    server.pause_seconds = 0.05
    open_all(manifest, 0)[0].close()
    assert capfd.readouterr().err == f"fetching {server.url}/data/00000000.tar ({data.shards[0].bytes:,} bytes)\n"
    monkeypatch.setattr(remote, "NOTICE_SECONDS", 5)
    open_all(manifest, 1)[0].close()
    assert capfd.readouterr().err == ""


# Addresses


def test_local_addresses(data, tmp_path):
    for location in (data.location, data.folder, f"file://{data.location}", f"file://localhost{data.location}"):
        manifest = manifests.load(location)
        assert not manifest.store.is_remote and manifest.folder == data.folder
        np.testing.assert_array_equal(all_tokens(manifest), all_tokens(data))
    spaced = tmp_path / "a b"
    spaced.symlink_to(data.folder)
    assert manifests.load(f"file://{tmp_path}/a%20b").fingerprint == data.fingerprint


@pytest.mark.parametrize(
    "location",
    ["pipe:touch marker", "ftp://host/data", "zip://data.zip", "simplecache::http://host/data", "memory://data",
     "http:/host/data", "github://a:b@c/", "data::more", "file:data", "javascript:1", "s3a://bucket/x",
     "pipe://touch marker", "zip://x::file:///tmp/y.zip", "local:///tmp", "HTTPS:host", "unknown://x"],
)  # fmt: skip
def test_a_scheme_off_the_list_is_refused(location, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="refused: .*file://, http://, https://, s3://, gs://"):
        manifests.load(location, CacheSettings(tmp_path / "cache", GB))
    assert list(tmp_path.iterdir()) == []  # no marker, no cache


@pytest.mark.parametrize(
    "location",
    ["http://user:s3cret@host/data", "https://s3cret@host/data", "s3://key:s3cret@bucket/data", "http://user:a/s3cret@host/",
     "http://user:1#s3cret@host/", "http://user:1?s3cret@host/", "http://user:1\\s3cret@host/", "ftp://u:s3cret@host/",
     "http://host/data?signature=s3cret", "http://host/data#s3cret", "gs://bucket/data?s3cret", "file://u:s3cret@host/data",
     "simplecache::http://u:s3cret@host/data", "http://host/da\nta s3cret", "http://host\n/s3cret", "http:///s3cret"],
)  # fmt: skip
def test_an_address_with_more_than_a_place_is_refused_and_its_secret_not_repeated(location, tmp_path):
    with pytest.raises(ValueError, match="refused") as caught:
        open_store(location, CacheSettings(tmp_path, GB))
    assert "s3cret" not in str(caught.value)


def test_a_remote_address_needs_a_cache():
    with pytest.raises(ValueError, match="http://host/data is remote: set data.cache"):
        open_store("http://host/data")


def test_a_cache_folder_that_cannot_be(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot make the cache folder.*set data.cache"):
        load(server, tmp_path / "file")


def test_an_extra_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"pip install 'pretrain\[gs\]'"):
        manifests.load("gs://bucket/data", CacheSettings(tmp_path, GB))


# S3


@pytest.fixture(scope="module")
def s3_server(data) -> Iterator[str]:
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s"}
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
    client.create_bucket(Bucket="corpus")
    for file in data.folder.iterdir():
        client.put_object(Bucket="corpus", Key=f"a/data/{file.name}", Body=file.read_bytes())
    yield url
    server.stop()


def test_s3(data, s3_server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(fetch, "RANGE_BYTES", 6000)  # a shard in several ranges
    fetch._new_file_system.cache_clear()
    environment = {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    manifest = manifests.load("s3://corpus/a/data", CacheSettings(tmp_path, GB))
    np.testing.assert_array_equal(all_tokens(manifest), all_tokens(data))
    assert cached(tmp_path) == {shard.name for shard in data.shards}
    val = manifests.open_split("s3://corpus/a/data", "val", CacheSettings(tmp_path, GB))  # which it does not have
    assert val.fingerprint == data.fingerprint
    with pytest.raises(ValueError, match="s3://corpus/a/data/none.model is not there"):
        manifest.store.path("none.model")
    with pytest.raises(ValueError, match="s3://none/data has no index.json"):
        manifests.load("s3://none/data", CacheSettings(tmp_path, GB))
    fetch._new_file_system.cache_clear()


@pytest.mark.parametrize("fault", ["busy", "reset", "stall", "wrong"])
def test_passing_faults_of_s3(data, server, tmp_path, monkeypatch, capfd, fault):
    pytest.importorskip("s3fs")
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"} if fault == "busy" else {}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_ENDPOINT_URL_S3": server.url, "AWS_EC2_METADATA_DISABLED": "true"}.items() | keys.items():
        monkeypatch.setenv(name, value)
    fetch._new_file_system.cache_clear()
    manifest = manifests.load("s3://data", CacheSettings(tmp_path, GB))  # the bucket is a folder of our server
    server.fail(SECOND, fault, 2)
    np.testing.assert_array_equal(all_tokens(manifest), all_tokens(data))
    assert server.requests[SECOND] == 3
    assert server.authorized[SECOND] == (3 if keys else 0)  # anonymous where the environment has no credentials
    assert capfd.readouterr().err.count("fetching s3://data/00000001.tar failed (") == 2
    fetch._new_file_system.cache_clear()
