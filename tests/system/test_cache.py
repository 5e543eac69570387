"""The machine's cache of shards: bounded, whole, shared by processes, and none the worse for a kill."""

import fcntl
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.errors import InputError
from shards.storage import cache, outages
from shards.storage.cache import Cache
from shards.storage.urls import Url
from tests.conftest import ROOT

SIZE = 200_000


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cache, "_failed", {})
    monkeypatch.setattr(cache, "_mended", {})
    monkeypatch.setattr(outages, "FIRST_WAIT", 0.01)


@pytest.fixture
def shards(tmp_path) -> list[tuple[Url, bytes, str]]:
    """Eight files that only a command can read: where, what is in them, its sha256."""
    folder, rng = tmp_path / "remote", random.Random(0)
    folder.mkdir()
    found = []
    for number in range(8):
        data = rng.randbytes(SIZE)
        (folder / f"s{number}.tar").write_bytes(data)
        found.append((Url(f"pipe:cat {folder}/", f"s{number}.tar"), data, hashlib.sha256(data).hexdigest()))
    return found


def held(folder: Path) -> int:
    """Under the lock that room is reserved under: without it, files that come and go are added up over time."""
    if not (folder / "lock").exists():
        return 0
    sizes = []
    with cache._locked(folder / "lock"):
        for path in folder.glob("*[0-9a-f].*"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
    return sum(sizes)


READER = """
import hashlib, random, sys
from pathlib import Path
from shards.storage.cache import Cache
from shards.storage.urls import Url
remote, folder, limit, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
contents = [(remote / f"s{n}.tar").read_bytes() for n in range(8)]
names = [hashlib.sha256(data).hexdigest() for data in contents]
cache, rng = Cache(folder, limit), random.Random(seed)
for _ in range(40):
    n, at = rng.randrange(8), rng.randrange(190_000)
    url = Url(f"pipe:cat {remote}/", f"s{n}.tar")
    assert cache.read(url, 200_000, names[n], at, 5000) == contents[n][at : at + 5000]
"""


def test_processes_share_a_cache_that_is_smaller_than_what_they_read(shards, tmp_path):
    limit = 3 * SIZE + SIZE // 2
    folder = Cache(tmp_path / "cache").home
    arguments = [str(tmp_path / "remote"), str(folder.parent), str(limit)]
    readers = [subprocess.Popen([sys.executable, "-c", READER, *arguments, str(seed)], cwd=ROOT) for seed in range(4)]
    largest, deadline = 0, time.monotonic() + 200
    while any(reader.poll() is None for reader in readers):
        assert time.monotonic() < deadline, "a hang"
        largest = max(largest, held(folder))
        time.sleep(0.002)
    assert [reader.returncode for reader in readers] == [0] * 4
    assert 0 < largest <= limit
    assert not list(folder.glob("*.part"))


def test_a_killed_fetch_is_taken_over_and_its_rest_removed(shards, tmp_path):
    folder = Cache(tmp_path / "cache").home
    (url, data, name), (_, _, other) = shards[0], shards[1]
    for which in (name, other):
        slow = Url(f"pipe:head -c 100000 {tmp_path}/remote/", "s0.tar", "; sleep 20")
        script = (
            "import sys; from pathlib import Path\n"
            "from shards.storage.cache import Cache; from shards.storage.urls import Url\n"
            f"Cache(Path({str(folder.parent)!r})).read({slow!r}, {SIZE}, {which!r}, 0, 9)"
        )
        killed = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
        deadline = time.monotonic() + 60
        while not cache._has_size(folder / f"{which}.part", SIZE):
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        with (folder / f"{which}.part").open("rb") as rest:
            fcntl.flock(rest, fcntl.LOCK_EX)  # its command, when it was just being forked, holds the file until it runs
    assert [path.stem for path in folder.glob("*.part")] == [other], "the second fetch removed the first one's rest"
    assert Cache(folder.parent, 2 * SIZE).read(url, SIZE, name, 5, 100) == data[5:105]
    assert sorted(path.name for path in folder.glob("*[0-9a-f].*")) == [f"{name}.tar"]


def test_the_least_recently_read_go_first(shards, tmp_path):
    bounded = Cache(tmp_path / "cache", 2 * SIZE)
    for number in (0, 1, 0, 2):
        url, data, name = shards[number]
        assert bounded.read(url, SIZE, name, 0, 50) == data[:50]
        time.sleep(0.02)
    assert {path.stem for path in bounded.home.glob("*.tar")} == {shards[0][2], shards[2][2]}


def test_what_is_being_read_stays(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_PATIENCE", 0.3)
    bounded = Cache(tmp_path / "cache", SIZE)
    (url, data, name), (other, other_data, other_name) = shards[:2]
    bounded.read(url, SIZE, name, 0, 50)
    with cache._opened(bounded.home / f"{name}.tar") as file:
        with pytest.raises(OSError, match="full of shards in use"):
            bounded.read(other, SIZE, other_name, 0, 50)
        assert os.pread(file, 50, 0) == data[:50] and (bounded.home / f"{name}.tar").exists()
    monkeypatch.setattr(cache, "_failed", {})
    assert bounded.read(other, SIZE, other_name, 0, 50) == other_data[:50]


def test_only_the_shard_that_the_index_tells_of_gets_in(shards, tmp_path):
    whole = Cache(tmp_path / "cache")
    url, data, name = shards[0]
    with pytest.raises(OSError, match="not those that were packed"):
        whole.read(url, SIZE, shards[1][2], 0, 9)
    with pytest.raises(OSError, match="more than the"):
        whole.read(url, SIZE - 1, shards[2][2], 0, 9)
    with pytest.raises(OSError, match="the index says"):
        whole.read(url, SIZE + 1, shards[3][2], 0, 9)
    assert not list(whole.home.glob("*[0-9a-f].*"))
    (tmp_path / "remote" / "s0.tar").unlink()
    with pytest.raises(OSError, match="not those that were packed"):
        whole.read(url, SIZE, shards[1][2], 0, 9)  # not tried again at once
    (tmp_path / "remote" / "s0.tar").write_bytes(data)
    (whole.home / f"{name}.tar").write_bytes(data[:-1])  # cut short by whatever
    assert whole.read(url, SIZE, name, 0, SIZE) == data


def test_a_cache_smaller_than_a_shard_is_told(shards, tmp_path):
    url, _, name = shards[0]
    with pytest.raises(InputError, match=r"data\.cache_gb"):
        Cache(tmp_path, SIZE - 1).read(url, SIZE, name, 0, 9)


def test_nothing_of_others_is_touched(shards, tmp_path):
    """A folder full of somebody's own tars and half-written files, some named like ours, is given as cache_dir."""
    folder = tmp_path / "mine"
    bounded = Cache(folder, SIZE)
    bounded.home.mkdir(parents=True)
    names = ("train-000000.tar", "download.part", f"{'0' * 64}.tar", f"{'1' * 64}.part", "lock")
    theirs = {folder / other: other.encode() for other in names}
    for path, content in theirs.items():
        path.write_bytes(content)
    for number in (0, 1, 0):  # each fetch removes the other one
        place, content, sha256 = shards[number]
        assert bounded.read(place, SIZE, sha256, 0, 50) == content[:50]
    others = {bounded.home / other: b"other" for other in ("notes.tar", "half.part", "0" * 63 + ".tar")}
    for path, content in others.items():
        path.write_bytes(content)
    (bounded.home / f"{'2' * 64}.tar").mkdir()
    (bounded.home / f"{'3' * 64}.tar").symlink_to(folder / "train-000000.tar")
    assert bounded.read(shards[2][0], SIZE, shards[2][2], 0, 50) == shards[2][1][:50]
    assert {path: path.read_bytes() for path in [*theirs, *others]} == theirs | others
    assert (bounded.home / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


def test_a_folder_of_our_name_without_our_mark_is_refused(shards, tmp_path):
    url, _, name = shards[0]
    home = Cache(tmp_path / "mine").home
    home.mkdir(parents=True)
    (home / f"{'a' * 64}.tar").write_text("somebody's")
    with pytest.raises(InputError, match=r"no CACHEDIR\.TAG"):
        Cache(tmp_path / "mine", SIZE).read(url, SIZE, name, 0, 9)
    assert [path.name for path in home.iterdir()] == [f"{'a' * 64}.tar"]


@pytest.mark.parametrize("name", ["../../victim", "/etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", ""])
def test_a_name_that_is_no_sha256_opens_no_file(shards, tmp_path, name):
    victim = tmp_path / "victim.tar"
    victim.write_bytes(b"precious" * 1000)
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        Cache(tmp_path / "cache").read(shards[0][0], 8000, name, 0, 9)
    assert victim.read_bytes() == b"precious" * 1000


def test_a_damaged_copy_is_seen_dropped_and_fetched_again(shards, tmp_path, caplog):
    url, data, name = shards[0]
    whole = Cache(tmp_path / "cache")
    whole.read(url, SIZE, name, 0, 9)
    copy = whole.home / f"{name}.tar"
    assert whole.damage(name) is None
    copy.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    assert str(copy) in (whole.damage(name) or "")
    whole.mend(name)
    assert not copy.exists() and "was damaged" in caplog.text
    assert whole.read(url, SIZE, name, 0, SIZE) == data
    whole.mend(name)
    assert copy.exists(), "what is whole stays"


def test_a_fetch_that_brought_something_else_is_made_once_more(shards, tmp_path):
    """The command prints a page of a proxy the first time."""
    _, data, name = shards[0]
    command = f"pipe:cd {tmp_path}/remote; test -e told || {{ touch told; echo page; exit; }}; cat "
    assert Cache(tmp_path / "cache").read(Url(command, "s0.tar"), SIZE, name, 0, SIZE) == data
