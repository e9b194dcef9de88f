import errno
import multiprocessing
import os
import pickle
import uuid
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InfrastructureError, InputError
from pipeline.io.storage import open_storage
from pipeline.io.storage import s3 as storage_s3
from pipeline.io.storage.base import ObjectInfo, ObjectNotFoundError, Storage, check_store, put_hashed
from pipeline.io.storage.memory import MemoryStorage
from tests.s3_server import Fault, S3Server

BAD_KEYS = (
    "",
    "/a",
    "a/",
    "a//b",
    "../a",
    "a/../b",
    "./a",
    "a\0b",
    "a\nb",
    "x" * 256,
    "a/" * 600 + "b",
    ".tmp-x",
    "\ud800",
)


class TestEveryStore:
    def test_what_was_created_can_be_read(self, storage: Storage) -> None:
        assert storage.create("a/b", b"\x00data\xff")
        assert storage.read("a/b") == b"\x00data\xff"
        assert storage.create("a/empty", b"")
        assert storage.read("a/empty") == b""

    def test_create_never_overwrites(self, storage: Storage) -> None:
        assert storage.create("a", b"first")
        assert not storage.create("a", b"second")
        assert not storage.create("a", b"first")
        assert storage.read("a") == b"first"

    def test_missing_objects_are_told_apart(self, storage: Storage) -> None:
        storage.create("a/b", b"1")
        for key in ("nothing", "a", "a/b/c"):
            assert storage.head(key) is None
            with pytest.raises(ObjectNotFoundError):
                storage.read(key)
            with pytest.raises(ObjectNotFoundError):
                storage.open(key)

    def test_head_tells_size_and_a_tag_that_follows_the_content(self, storage: Storage) -> None:
        storage.create("a", b"12345")
        first = storage.head("a")
        assert first is not None
        assert (first.key, first.size) == ("a", 5)
        assert storage.head("a") == first
        storage.delete("a")
        storage.create("a", b"1234x")
        second = storage.head("a")
        assert second is not None
        assert second.etag != first.etag

    def test_list_is_by_prefix_in_order_of_key(self, storage: Storage) -> None:
        keys = ["b/1", "a", "b-c/2", "b/10", "b/sub/x", "c", "ä/ü ö"]
        for key in keys:
            storage.create(key, key.encode())
        assert [info.key for info in storage.list()] == sorted(keys)
        assert [info.key for info in storage.list("b")] == ["b-c/2", "b/1", "b/10", "b/sub/x"]
        assert [info.key for info in storage.list("b/")] == ["b/1", "b/10", "b/sub/x"]
        assert [info.key for info in storage.list("b/1")] == ["b/1", "b/10"]
        assert [info.key for info in storage.list("ä/")] == ["ä/ü ö"]
        assert storage.list("nothing/here") == []
        assert storage.list("b/") == [storage.head(key) for key in ("b/1", "b/10", "b/sub/x")]

    def test_list_goes_past_a_thousand_keys(self, storage: Storage) -> None:
        keys = [f"many/{number:05d}" for number in range(1_203)]
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda key: storage.create(key, b"x"), keys))
        assert [info.key for info in storage.list("many/")] == keys

    def test_delete_is_final_and_may_be_repeated(self, storage: Storage) -> None:
        storage.create("a/b", b"1")
        storage.delete("a/b")
        storage.delete("a/b")
        storage.delete("never/was")
        assert storage.head("a/b") is None
        assert storage.list() == []
        assert storage.create("a/b", b"2")

    def test_parquet_is_read_in_place(self, storage: Storage) -> None:
        table = pa.table({"x": list(range(1_000)), "y": ["word"] * 1_000})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=100)
        storage.create("t.parquet", sink.getvalue().to_pybytes())
        with storage.open("t.parquet") as source:
            file = pq.ParquetFile(source)
            assert file.read_row_group(7, columns=["x"]).column("x").to_pylist() == list(range(700, 800))

    def test_a_key_that_leads_elsewhere_is_refused(self, storage: Storage) -> None:
        calls: tuple[Callable[[str], object], ...] = (
            storage.read,
            storage.head,
            lambda key: storage.create(key, b""),
            storage.delete,
            storage.open,
        )
        for key in BAD_KEYS:
            for call in calls:
                with pytest.raises(InputError, match="is no key"):
                    call(key)

    def test_a_prefix_that_leads_elsewhere_is_refused(self, storage: Storage) -> None:
        for prefix in ("/", "/a", "../", "a/../", "a//b", "\0"):
            with pytest.raises(InputError):
                storage.list(prefix)

    def test_eight_threads_that_create_one_key_have_one_winner(self, storage: Storage) -> None:
        bodies = [f"writer {number}".encode() for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            for race in range(20):
                won = list(pool.map(lambda body, race=race: storage.create(f"race/{race:02d}", body), bodies))
                assert sum(won) == 1
                assert storage.read(f"race/{race:02d}") == bodies[won.index(True)]

    def test_a_large_object_survives(self, storage: Storage) -> None:
        data = os.urandom(9 << 20)
        assert storage.create("large", data)
        assert storage.read("large") == data

    def test_a_storage_is_pickled_as_its_uri(self, storage: Storage) -> None:
        storage.create("a", b"1")
        pickled = pickle.dumps(storage)
        assert os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret").encode() not in pickled
        assert pickle.loads(pickled).read("a") == b"1"  # noqa: S301
        assert open_storage(storage.uri).read("a") == b"1"

    def test_other_bytes_under_a_name_with_a_hash_are_replaced(self, storage: Storage) -> None:
        for data in (b"1", b"1", b"2", b"11"):
            put_hashed(storage, "a", data)
            assert storage.read("a") == data

    def test_an_honest_store_passes_the_probe_and_keeps_one_small_object(self, storage: Storage) -> None:
        check_store(storage)
        check_store(storage)
        again = open_storage(storage.uri)
        check_store(again)
        assert len(storage.list()) == 1


class LyingStorage(MemoryStorage):
    """Takes every create and overwrites, as some S3 servers do with If-None-Match."""

    def create(self, key: str, data: bytes) -> bool:
        self._objects[key] = data
        return True


class HalfLyingStorage(LyingStorage):
    """Says that the key was taken, and overwrites all the same."""

    def create(self, key: str, data: bytes) -> bool:
        return super().create(key, data) and False


@pytest.mark.parametrize("kind", [LyingStorage, HalfLyingStorage])
def test_a_store_that_overwrites_is_refused(kind: type[MemoryStorage]) -> None:
    with pytest.raises(InputError, match="two runs could publish over each other"):
        check_store(kind(uuid.uuid4().hex))


@pytest.mark.parametrize(
    "uri",
    ["", "ftp://host/x", "s3:/bucket/x", "memory://", "file://host/x", "s3://", "s3://UPPER/x", "s3://bucket/../x"],
)
def test_a_uri_of_no_store_is_refused(uri: str) -> None:
    with pytest.raises(InputError):
        open_storage(uri)


def test_secrets_in_a_uri_are_not_repeated() -> None:
    with pytest.raises(InputError) as refused:
        open_storage("s3://user:hunter2@bucket/x")
    assert "hunter2" not in str(refused.value)


def race_in_processes(uri: str, rounds: int) -> None:
    """Four processes create the same keys; each key has one winner, whose bytes lie there."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        won = list(pool.map(create_all, [uri] * 4, range(4), [rounds] * 4))
    storage = open_storage(uri)
    for number in range(rounds):
        winners = [writer for writer in range(4) if won[writer][number]]
        assert len(winners) == 1
        assert storage.read(f"race/{number}") == bytes([winners[0]])


def create_all(uri: str, writer: int, rounds: int) -> list[bool]:
    storage = open_storage(uri)
    return [storage.create(f"race/{number}", bytes([writer])) for number in range(rounds)]


class TestLocalFolder:
    def test_processes_that_create_one_key_have_one_winner(self, tmp_path: Path) -> None:
        race_in_processes(str(tmp_path), 50)

    def test_a_home_folder_and_a_file_uri_are_understood(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        open_storage("~/with space").create("a", b"1")
        assert open_storage(f"file://{tmp_path}/with%20space").read("a") == b"1"

    def test_half_written_files_are_no_objects(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / ".tmp-killed").write_bytes(b"half")
        assert open_storage(str(tmp_path)).list() == []

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        storage = open_storage(str(tmp_path))
        monkeypatch.setattr(os, "fsync", failing_with(errno.ENOSPC))
        with pytest.raises(InfrastructureError, match=r"No space left.* 5 bytes were to be written, \d+ are free"):
            storage.create("a", b"12345")
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_on_which_the_root_could_not_be_made_is_told_the_same_way(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage = open_storage(str(tmp_path / "not" / "yet"))
        monkeypatch.setattr(Path, "mkdir", failing_with(errno.ENOSPC))
        with pytest.raises(InfrastructureError, match=r"No space left.* 5 bytes were to be written, \d+ are free"):
            storage.create("a", b"12345")

    @pytest.mark.parametrize(
        ("code", "error", "says"),
        [
            (errno.EACCES, InputError, "Permission denied for user"),
            (errno.EROFS, InputError, "Read-only file system"),
            (errno.ENOTSUP, InputError, "has no hard links"),
            (errno.EIO, InfrastructureError, "Input/output error"),
        ],
    )
    def test_errors_of_the_disk_say_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception], says: str
    ) -> None:
        monkeypatch.setattr(os, "link", failing_with(code))
        with pytest.raises(error, match=says) as raised:
            open_storage(str(tmp_path)).create("a/b", b"1")
        assert str(tmp_path / "a/b") in str(raised.value)

    def test_a_link_whose_answer_was_lost_counts_as_created(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        link = os.link

        def link_and_forget(*args: Any) -> None:
            link(*args)
            raise FileExistsError

        monkeypatch.setattr(os, "link", link_and_forget)
        assert open_storage(str(tmp_path)).create("a", b"1")

    def test_a_file_in_the_place_of_a_folder_is_named(self, tmp_path: Path) -> None:
        storage = open_storage(str(tmp_path))
        storage.create("a", b"1")
        with pytest.raises(InputError, match="a file is where a folder must be"):
            storage.create("a/b", b"")

    def test_no_symbolic_link_is_followed(self, tmp_path: Path) -> None:
        outside, root = tmp_path / "outside", tmp_path / "root"
        for folder in (outside, root):
            folder.mkdir()
        (outside / "secret").write_bytes(b"1")
        (root / "out").symlink_to(outside)
        storage = open_storage(str(root))
        for call in (lambda: storage.read("out/secret"), lambda: storage.create("out/new", b"1"), storage.list):
            with pytest.raises(InputError, match="symbolic link"):
                call()
        assert not (outside / "new").exists()

    def test_a_link_inside_is_listed_once_by_its_true_name(self, tmp_path: Path) -> None:
        storage = open_storage(str(tmp_path))
        storage.create("ds=1/a", b"1")
        (tmp_path / "latest").symlink_to(tmp_path / "ds=1")
        assert [info.key for info in storage.list()] == ["ds=1/a"]

    def test_the_root_itself_may_be_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "root").symlink_to(tmp_path / "real")
        storage = open_storage(str(tmp_path / "root"))
        storage.create("a/b", b"1")
        assert [info.key for info in storage.list()] == ["a/b"]

    def test_list_walks_only_below_its_prefix(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        storage = open_storage(str(tmp_path))
        for key in ("a/b/1", "a/c/2", "d/3"):
            storage.create(key, b"")
        scandir, visited = os.scandir, []

        def watched(path: Path) -> Any:
            visited.append(Path(path).relative_to(tmp_path).as_posix())
            return scandir(path)

        monkeypatch.setattr(os, "scandir", watched)
        assert [info.key for info in storage.list("a/b/")] == ["a/b/1"]
        assert visited == ["a/b"]


def failing_with(code: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.s3
class TestS3:
    @pytest.fixture(autouse=True)
    def _short_pauses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage_s3, "LONGEST_PAUSE", 0.1)

    def test_processes_that_create_one_key_have_one_winner(self, s3_uri: str) -> None:
        race_in_processes(s3_uri, 20)

    def test_a_create_whose_answer_was_lost_is_known_as_ours(self, s3_uri: str, s3_server: S3Server) -> None:
        storage = open_storage(s3_uri)
        with s3_server.fault(Fault("PUT", "commit", "lose_answer")):
            assert storage.create("commit", b"ours")
        assert storage.read("commit") == b"ours"

    def test_a_create_that_arrives_after_we_looked_is_known_as_ours(self, s3_uri: str, s3_server: S3Server) -> None:
        storage = open_storage(s3_uri)
        with s3_server.fault(Fault("PUT", "commit", "arrive_late")):
            assert storage.create("commit", b"ours")
        assert storage.read("commit") == b"ours"

    def test_a_lost_answer_of_a_refusal_is_no_success(self, s3_uri: str, s3_server: S3Server) -> None:
        storage = open_storage(s3_uri)
        storage.create("commit", b"theirs")
        with s3_server.fault(Fault("PUT", "commit", "lose_answer")):
            assert not storage.create("commit", b"ours")

    @pytest.mark.parametrize("status", ["503 Slow Down", "500 Internal Error", "409 Conflict", "429 Too Many"])
    def test_a_create_that_was_not_taken_is_sent_again(self, s3_uri: str, s3_server: S3Server, status: str) -> None:
        storage = open_storage(s3_uri)
        with s3_server.fault(Fault("PUT", "commit", "refuse", status, times=2)):
            assert storage.create("commit", b"ours")

    def test_a_create_is_one_request(self, s3_uri: str, s3_server: S3Server) -> None:
        storage = open_storage(s3_uri)
        storage.head("a")
        before = len(s3_server.requests)
        storage.create("a", b"1")
        storage.create("a", b"2")
        assert [request.split()[0] for request in s3_server.requests[before:]] == ["PUT", "PUT"]

    def test_a_create_that_is_never_answered_gives_up(self, s3_uri: str, s3_server: S3Server) -> None:
        with (
            s3_server.fault(Fault("PUT", "commit", "refuse", times=6)),
            pytest.raises(InfrastructureError, match=r"commit: the store did not say .* run again"),
        ):
            open_storage(s3_uri).create("commit", b"1")

    def test_a_body_that_was_cut_off_is_read_again(self, s3_uri: str, s3_server: S3Server) -> None:
        storage = open_storage(s3_uri)
        storage.create("large", b"x" * 100_000)
        with s3_server.fault(Fault("GET", "large", "cut_body", times=2)):
            assert storage.read("large") == b"x" * 100_000

    def test_a_throttled_read_is_tried_again(self, s3_uri: str, s3_server: S3Server) -> None:
        storage = open_storage(s3_uri)
        storage.create("a", b"1")
        with s3_server.fault(Fault("GET", "/a", "refuse", times=2)):
            assert storage.read("a") == b"1"

    def test_a_store_that_stays_down_can_be_retried_later(
        self, s3_uri: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        storage = open_storage(s3_uri)
        with s3_server.fault(Fault("GET", "/a", "refuse", times=2)), pytest.raises(InfrastructureError, match="503"):
            storage.read("a")

    def test_an_endpoint_that_nobody_answers_can_be_retried(self, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        storage = open_storage(s3_uri)
        for call in (
            lambda: storage.read("a"),
            lambda: storage.list(),
            lambda: storage.head("a"),
            lambda: storage.open("a"),
        ):
            with pytest.raises(InfrastructureError, match=r"127\.0\.0\.1:9"):
                call()

    @pytest.mark.parametrize(
        "wrong", [{"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}], ids=["secret", "key"]
    )
    def test_wrong_credentials_are_named(
        self, s3_uri: str, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str]
    ) -> None:
        open_storage(s3_uri).create("a", b"1")
        for name, value in wrong.items():
            monkeypatch.setenv(name, value)
        storage = open_storage(s3_uri)
        calls: dict[str, Callable[[], object]] = {
            "s3:GetObject": lambda: storage.read("a"),
            "s3:GetObject ": lambda: storage.head("a"),
            "s3:GetObject  ": lambda: storage.open("a"),
            "s3:PutObject": lambda: storage.create("b", b"1"),
            "s3:ListBucket": lambda: storage.list(),
            "s3:DeleteObject": lambda: storage.delete("a"),
        }
        for action, call in calls.items():
            with pytest.raises(InputError, match="standard AWS chain") as raised:
                call()
            assert action.strip() in str(raised.value)
            assert s3_uri in str(raised.value)

    def test_no_credentials_at_all_are_asked_for(self, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(InputError, match="AWS_ACCESS_KEY_ID"):
            open_storage(s3_uri).create("a", b"1")

    def test_a_missing_bucket_is_named(self, s3_uri: str) -> None:
        storage = open_storage("s3://no-such-bucket/x")
        for call in (storage.list, lambda: storage.create("a", b"1"), lambda: storage.read("a")):
            with pytest.raises(InputError, match="there is no bucket 'no-such-bucket' at http"):
                call()

    def test_a_wrong_endpoint_or_profile_is_a_fault_of_the_environment(
        self, s3_uri: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "no url")
        with pytest.raises(InputError, match="AWS_ENDPOINT_URL"):
            open_storage(s3_uri).list()
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(InputError, match="nobody"):
            open_storage(s3_uri).list()

    def test_nothing_but_the_prefix_is_touched(self, s3_uri: str) -> None:
        bucket = s3_uri.removeprefix("s3://").partition("/")[0]
        whole, part = open_storage(f"s3://{bucket}"), open_storage(s3_uri)
        part.create("a", b"1")
        whole.create("below/hereafter", b"2")
        assert [info.key for info in part.list()] == ["a"]
        assert [info.key for info in whole.list()] == ["below/here/a", "below/hereafter"]

    def test_the_marker_of_a_folder_is_no_object(self, s3_uri: str) -> None:
        storage: Any = open_storage(s3_uri)
        storage.create("a/b", b"1")
        storage._open_clients().patient.put_object(Bucket=storage.bucket, Key=f"{storage.prefix}a/", Body=b"")
        assert storage.list() == [ObjectInfo("a/b", 1, storage.head("a/b").etag)]


def test_a_store_knows_what_time_it_is(storage: Storage) -> None:
    """Its own clock: here all stores share the clock of this machine."""
    before = datetime.now(UTC).replace(microsecond=0)
    assert before <= storage.clock() <= datetime.now(UTC)
