"""Stores to test against, and one local Ray for all tests that need one."""

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage

if TYPE_CHECKING:
    from tests.radosgw import Radosgw
    from tests.s3_server import S3Server

# The verdict follows from the code alone: neither from the clock of a busy machine (deadline) nor from a draw (the same
# examples in every run; --hypothesis-profile=default draws new ones).
hypothesis.settings.register_profile("nightrails", deadline=None, derandomize=True)
hypothesis.settings.load_profile("nightrails")

STORES = (
    "memory",
    "local",
    pytest.param("s3", marks=pytest.mark.s3),
    pytest.param("radosgw", marks=pytest.mark.rgw),
)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: worlds this small are slower on more, most of all beside other processes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray with 4 logical CPUs."""
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(address="local", num_cpus=4, include_dashboard=False)
    yield
    if started:
        ray.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator["S3Server"]:
    """moto in this process, with authentication on and writes one at a time."""
    from tests.s3_server import S3Server

    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3_uri(s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix in a fresh bucket; the AWS_* variables of this process lead to it."""
    use_aws_environment(monkeypatch, s3_server.environment)
    return f"s3://{s3_server.make_bucket()}/below/here"


@pytest.fixture(scope="session")
def radosgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Radosgw"]:
    """A Ceph radosgw, where its programs are installed."""
    from tests.radosgw import Radosgw, missing_binaries

    if missing := missing_binaries():
        pytest.skip(f"needs Debian's radosgw, ceph-mon, ceph-osd and ceph-common: no {', '.join(missing)}")
    server = Radosgw(tmp_path_factory.mktemp("radosgw"))
    yield server
    server.stop()


@pytest.fixture(params=STORES)
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Each store in turn, empty."""
    if request.param == "memory":
        return open_storage(f"memory://{uuid.uuid4().hex}")
    if request.param == "local":
        return open_storage(str(tmp_path / "root"))
    if request.param == "s3":
        return open_storage(request.getfixturevalue("s3_uri"))
    server = request.getfixturevalue("radosgw")
    use_aws_environment(monkeypatch, server.environment)
    return open_storage(f"s3://{server.make_bucket()}/below/here")


def use_aws_environment(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    """Only these settings: nothing of the person who runs the tests."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
