"""Objects in an S3-compatible bucket: boto3 writes and lists, pyarrow's filesystem reads Parquet.

Endpoint, region and credentials come from the standard AWS chain (environment, profile, role) in the process that
uses them, and from nowhere else.
"""

import functools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import boto3
import botocore.loaders
import botocore.session
import pyarrow as pa
from botocore.config import Config as ClientConfig
from botocore.exceptions import BotoCoreError, ClientError
from pyarrow import fs

from pipeline.errors import InfrastructureError, InputError, NightrailsError
from pipeline.io.storage.base import ObjectInfo, ObjectNotFoundError, Storage, check_key, check_prefix

BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
ATTEMPTS = 10  # the SDK's default of 3 is too few for a store that throttles
CREATE_ATTEMPTS = 6
CONNECT_SECONDS = 10
REQUEST_SECONDS = 60  # pyarrow's default of 3 s is too short under load
LONGEST_PAUSE = 20.0  # seconds

NOT_ALLOWED = {"403", "401", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
# Names of botocore's errors that mean "look at your environment"; they have no common base class.
UNCONFIGURED = re.compile(
    r"Credential|Profile|Token|SSO|Login|Config|Region|MissingDependency|ParamValidation|InvalidEndp"
)

log = logging.getLogger("nightrails")


@dataclass(frozen=True)
class _Clients:
    """The clients of one process. `patient` retries. `single` sends a request once, for conditional writes: if a write
    was applied but its answer was lost, a retry would report that somebody else was first."""

    pid: int
    patient: Any
    single: Any
    files: fs.S3FileSystem


class S3Storage(Storage):
    """A bucket, or the objects below a prefix of it."""

    def __init__(self, uri: str) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
        if not BUCKET.fullmatch(bucket):  # the URI itself is not repeated: it may hold a secret before an @
            raise InputError("root: write s3://bucket/prefix, with a bucket of lower-case letters, digits, - and .")
        self.bucket = bucket
        self.prefix = f"{check_key(prefix)}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._clients: _Clients | None = None
        self._lock = threading.Lock()

    def read(self, key: str) -> bytes:
        attempts = _attempts()
        for attempt in range(1, attempts + 1):
            with self._explained(key, "s3:GetObject"):
                body = self._open_clients().patient.get_object(Bucket=self.bucket, Key=self._full(key))["Body"]
                try:
                    data: bytes = body.read()
                    return data
                except BotoCoreError:  # the body was cut off: the SDK retries requests, not bodies
                    if attempt == attempts:
                        raise
            _pause(attempt)
        raise AssertionError

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self._explained(key, "s3:GetObject"):
                answer = self._open_clients().patient.head_object(Bucket=self.bucket, Key=self._full(key))
        except ObjectNotFoundError:
            return None
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"].strip('"'))

    def create(self, key: str, data: bytes) -> bool:
        """As Storage.create. When the answer is lost, read the key to learn whether our write was applied."""
        unknown: Exception | None = None
        for attempt in range(1, CREATE_ATTEMPTS + 1):
            try:
                self._open_clients().single.put_object(
                    Bucket=self.bucket, Key=self._full(key), Body=data, IfNoneMatch="*"
                )
                return True
            except (BotoCoreError, ClientError) as error:
                refused = _status(error) == 412
                if not refused and not _is_unknown(error):
                    raise self._explain(error, key, "s3:PutObject") from error
                if refused and unknown is None:
                    return False
                unknown = error
            existing = self._read_or_none(key)
            if existing is not None:
                return existing == data
            _pause(attempt)
        raise InfrastructureError(
            f"{self.uri}/{key}: the store did not say whether it took the object, {CREATE_ATTEMPTS} times in a row "
            f"({unknown}); run again"
        ) from unknown

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        with self._explained(prefix, "s3:ListBucket"):
            pages = self._open_clients().patient.get_paginator("list_objects_v2")
            objects = [
                ObjectInfo(item["Key"].removeprefix(self.prefix), item["Size"], item["ETag"].strip('"'))
                for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + check_prefix(prefix))
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")  # consoles make such objects to show a folder
            ]
        return sorted(objects)

    def clock(self) -> datetime:
        with self._explained("", "s3:ListBucket"):
            answer = self._open_clients().patient.list_objects_v2(Bucket=self.bucket, MaxKeys=1)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])

    def delete(self, key: str) -> None:
        with self._explained(key, "s3:DeleteObject"):
            self._open_clients().patient.delete_object(Bucket=self.bucket, Key=self._full(key))

    def open(self, key: str) -> pa.NativeFile:
        with self._explained(key, "s3:GetObject"):
            return self._open_clients().files.open_input_file(f"{self.bucket}/{self._full(key)}")

    def arrow_path(self, key: str) -> tuple[fs.FileSystem, str]:
        return self._open_clients().files, f"{self.bucket}/{self._full(key)}"

    def _full(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _read_or_none(self, key: str) -> bytes | None:
        try:
            return self.read(key)
        except ObjectNotFoundError:
            return None

    def _open_clients(self) -> _Clients:
        with self._lock:
            if self._clients is None or self._clients.pid != os.getpid():  # sockets do not survive a fork
                with self._explained("", "s3:ListBucket"):
                    self._clients = _make_clients()
            return self._clients

    @contextmanager
    def _explained(self, key: str, action: str) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError, OSError, ValueError) as error:
            if isinstance(error, NightrailsError):
                raise
            raise self._explain(error, key, action) from error

    def _explain(self, error: Exception, key: str, action: str) -> Exception:
        """Build our error for a request that failed in boto3 or pyarrow."""
        origin = f"{self.uri}/{key}".rstrip("/")
        code, status = _code(error), _status(error)
        reason = " ".join(str(error).split())
        if code == "NoSuchBucket":
            return InputError(
                f"{origin}: there is no bucket {self.bucket!r} at {self._endpoint()}; create it, or correct the URI"
            )
        if status == 404 or isinstance(error, FileNotFoundError):
            return ObjectNotFoundError(key)
        if (
            code in NOT_ALLOWED
            or status in (401, 403)
            or isinstance(error, PermissionError)
            or "ACCESS_DENIED" in reason
        ):
            return InputError(
                f"{origin}: the store refused ({reason}). The credentials came from the standard AWS chain (AWS_* "
                f"variables, profile or role): check that they are right and not expired, and that they allow {action} "
                f"on bucket {self.bucket!r}"
            )
        if status == 501:
            return InputError(f"{origin}: the store has no conditional writes ({reason}); use one that has")
        if UNCONFIGURED.search(type(error).__name__) or type(error) is ValueError:
            return InputError(
                f"{origin}: {reason}. Endpoint, region and credentials come from the standard AWS chain: set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role, and AWS_ENDPOINT_URL if it is not "
                "Amazon's"
            )
        if status in range(300, 429) and status not in (408, 409):
            return InputError(f"{origin}: the store refused ({reason})")
        return InfrastructureError(f"{origin}: the store at {self._endpoint()} failed: {reason}")

    def _endpoint(self) -> str:
        return self._clients.patient.meta.endpoint_url if self._clients else "its endpoint"


def _make_clients() -> _Clients:
    core = botocore.session.Session()
    core.register_component("data_loader", _descriptions())
    session = boto3.session.Session(botocore_session=core)
    patient = session.client("s3", config=_client_config(_attempts()))
    single = session.client("s3", config=_client_config(1))
    scheme, _, host = patient.meta.endpoint_url.partition("://")
    files = fs.S3FileSystem(
        region=patient.meta.region_name,
        scheme=scheme,
        endpoint_override=None if host.endswith("amazonaws.com") else host,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_attempts()),
    )
    return _Clients(os.getpid(), patient, single, files)


@functools.cache
def _descriptions() -> Any:
    """botocore's description of S3 and its endpoints, read once: reading it takes most of the time to make a client."""
    return botocore.loaders.create_loader()


def _client_config(attempts: int) -> ClientConfig:
    return ClientConfig(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=REQUEST_SECONDS,
        max_pool_connections=32,
    )


def _attempts() -> int:
    """The number of attempts: AWS_MAX_ATTEMPTS, as for every AWS client, else ATTEMPTS."""
    return int(os.environ.get("AWS_MAX_ATTEMPTS", ATTEMPTS))


def _pause(attempt: int) -> None:
    time.sleep(random.uniform(0.05, 0.1) * min(LONGEST_PAUSE, 2.0**attempt))


def _status(error: Exception) -> int:
    """The HTTP status of an error; 0 when there was no answer."""
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: Exception) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def _is_unknown(error: Exception) -> bool:
    """Whether a write that ended with this error may have been applied, or may work when it is sent again."""
    if isinstance(error, ClientError):
        status = _status(error)
        return (status >= 500 and status != 501) or status in (408, 409, 429)
    return not UNCONFIGURED.search(type(error).__name__)
