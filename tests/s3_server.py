"""An S3 server in this process: moto with authentication on, one write at a time, and faults on demand.

    python -m tests.s3_server --port 5555

serves until it is interrupted, and prints what another process must set to use it.
"""

import argparse
import contextlib
import io
import os
import socket
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

WRITES = {"PUT", "POST", "DELETE"}
ADMIN_POLICY = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}'


@dataclass
class Fault:
    """What happens to the next `times` requests of this method whose path contains `part_of_path`."""

    method: str
    part_of_path: str
    action: Literal["refuse", "lose_answer", "arrive_late", "cut_body"]  # late: just before the next write
    status: str = "503 Slow Down"
    times: int = 1


@dataclass
class _App:
    """moto's conditional PUT looks and then writes, without a lock: here one write runs at a time."""

    inner: Callable[..., Iterable[bytes]]
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    late: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append(f"{method} {path}")
        fault = self._next_fault(method, path)
        if fault and fault.action == "refuse":
            start_response(fault.status, [("Content-Length", "0")])
            return []
        if fault and fault.action == "arrive_late":
            body_of_request = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            self.late.append(dict(environ) | {"wsgi.input": io.BytesIO(body_of_request)})
            return self._hang_up(environ, start_response)
        with self.lock if method in WRITES else contextlib.nullcontext():
            while method in WRITES and self.late:
                list(self.inner(self.late.pop(), lambda *_: None))
            if fault is None:
                return list(self.inner(environ, start_response))
            answer: list[Any] = []
            body = b"".join(self.inner(environ, lambda *given: answer.append(given)))
        if fault.action == "cut_body":
            start_response(*answer[-1])
            return [body[: len(body) // 2]]
        return self._hang_up(environ, start_response)  # the work is done, nobody hears of it

    def _hang_up(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start_response("500 Never Sent", [("Content-Length", "0")])
        return []

    def _next_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and fault.part_of_path in path:
                fault.times -= 1
                return fault
        return None


class _QuietHandler(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass


class S3Server:
    """Listens on 127.0.0.1. `environment` is what a client process must have set."""

    def __init__(self, port: int = 0) -> None:
        self._app = _App(DomainDispatcherApplication(create_backend_app))
        self._server = make_server("127.0.0.1", port, self._app, threaded=True, request_handler=_QuietHandler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        with mock.patch.dict(os.environ, self.environment):
            iam = boto3.session.Session().client("iam")
            iam.create_user(UserName="tests")
            iam.put_user_policy(UserName="tests", PolicyName="all", PolicyDocument=ADMIN_POLICY)
            key = iam.create_access_key(UserName="tests")["AccessKey"]
        self.environment["AWS_ACCESS_KEY_ID"] = key["AccessKeyId"]
        self.environment["AWS_SECRET_ACCESS_KEY"] = key["SecretAccessKey"]
        # From here on every request must be signed with that key.
        reset = urllib.request.Request(f"{self.endpoint}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
        urllib.request.urlopen(reset).close()

    @property
    def requests(self) -> list[str]:
        """`METHOD /path` of every request so far."""
        return self._app.requests

    @contextlib.contextmanager
    def fault(self, fault: Fault) -> Iterator[Fault]:
        """Let requests go wrong while the block runs; it must happen as often as was said."""
        self._app.faults.append(fault)
        try:
            yield fault
        finally:
            self._app.faults.remove(fault)
        assert fault.times == 0, f"{fault} never happened"

    def make_bucket(self, bucket: str | None = None) -> str:
        """A new bucket's name."""
        name = bucket or f"test-{uuid.uuid4().hex[:16]}"
        with mock.patch.dict(os.environ, self.environment):
            boto3.session.Session().client("s3").create_bucket(Bucket=name)
        return name

    def stop(self) -> None:
        self._server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description="an S3 server in memory, with authentication")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bucket", default="nightrails")
    arguments = parser.parse_args()
    server = S3Server(arguments.port)
    for name, value in server.environment.items():
        print(f"export {name}={value}")
    print(f"export NIGHTRAILS_ROOT=s3://{server.make_bucket(arguments.bucket)}/data", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


if __name__ == "__main__":
    main()
