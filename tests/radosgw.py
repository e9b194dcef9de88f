"""A Ceph radosgw on one node, in memory: a real S3 server for the contract test.

Needs Debian's `radosgw ceph-mon ceph-osd ceph-common`. `cephx` stays on: without it radosgw exits with -13.
"""

import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path

import boto3
import botocore.exceptions

BINARIES = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")
ACCESS_KEY, SECRET_KEY = "TESTSTESTSTESTSTESTS", "secretsecretsecretsecretsecretsecretsecr"
START_SECONDS = 120

CONF = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
pid file = {folder}/$name.pid
crash dir = {folder}
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon data avail warn = 1
mon data avail crit = 0
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{rgw_port}
"""

CAPS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "client.rgw.tests": {"mon": "allow rwx", "osd": "allow rwx"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
}


def missing_binaries() -> list[str]:
    """Programs that are needed and not installed."""
    return [name for name in BINARIES if shutil.which(name) is None]


class Radosgw:
    """A mon, an OSD and a radosgw below `folder`. `environment` is what a client process must have set."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port = _free_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",  # else pyarrow's writes get 411 from this version
        }
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def make_bucket(self) -> str:
        name = f"test-{uuid.uuid4().hex[:16]}"
        self._client().create_bucket(Bucket=name)
        return name

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()

    def _start(self) -> None:
        fsid, osd, mon_port = str(uuid.uuid4()), str(uuid.uuid4()), _free_port()
        conf = CONF.format(fsid=fsid, folder=self._folder, mon_port=mon_port, rgw_port=self._port)
        (self._folder / "ceph.conf").write_text(conf)
        for name in ("mon", "osd", "rgw"):
            (self._folder / name).mkdir()
        self._make_keyring()
        monmap = str(self._folder / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._daemon("ceph-mon", "-i", "a")
        self._run("ceph", "osd", "new", osd, "0")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._daemon("ceph-osd", "-i", "0")
        user = ("--uid", "tests", "--display-name", "tests", "--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
        self._run("radosgw-admin", "user", "create", *user)
        self._daemon("radosgw", "-n", "client.rgw.tests")
        self._await_answer()

    def _make_keyring(self) -> None:
        keyring = str(self._folder / "keyring")
        for number, (name, caps) in enumerate(CAPS.items()):
            granted = [part for service, cap in caps.items() for part in ("--cap", service, cap)]
            create = [] if number else ["--create-keyring"]
            self._run("ceph-authtool", keyring, *create, "--gen-key", "-n", name, *granted)

    def _run(self, program: str, *arguments: str) -> None:
        command = [program, *arguments]
        if program.startswith(("ceph", "rados")) and program != "ceph-authtool":
            command[1:1] = ["-c", str(self._folder / "ceph.conf")]
        done = subprocess.run(command, capture_output=True, timeout=START_SECONDS, check=False, cwd=self._folder)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode()[-2000:]}")

    def _daemon(self, program: str, *arguments: str) -> None:
        with open(self._folder / f"{program}.out", "wb") as out:
            command = [program, "-f", "-c", str(self._folder / "ceph.conf"), *arguments]
            self._processes.append(subprocess.Popen(command, stdout=out, stderr=out, cwd=self._folder))

    def _client(self):  # type: ignore[no-untyped-def]
        environment = self.environment
        return boto3.session.Session(ACCESS_KEY, SECRET_KEY, region_name=environment["AWS_DEFAULT_REGION"]).client(
            "s3", endpoint_url=environment["AWS_ENDPOINT_URL"]
        )

    def _await_answer(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self._client().list_buckets()
            except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
                if time.monotonic() > deadline or self._processes[-1].poll() is not None:
                    raise
                time.sleep(0.2)
            else:
                return


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
