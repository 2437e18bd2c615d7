"""An S3 server on loopback that serves a folder, each folder in it as a bucket.

It can be killed and started again. `python -m tests.objectstore FOLDER PORT` uploads first and
listens after, so no request ever meets an empty server.
"""

import logging
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.procs import ROOT, free_port

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class ObjectStore:
    """`env` is what a client needs; `put` changes a file in the folder and in the server."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.env = {**KEYS, "AWS_ENDPOINT_URL": self.endpoint}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.objectstore", str(self.folder), str(self.port)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | KEYS, stdout=subprocess.DEVNULL
        )
        for _ in range(600):
            assert self.process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"{self.endpoint}/moto-api/", timeout=5).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def put(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if self.process is not None:
            bucket, _, key = name.partition("/")
            self.client().put_object(Bucket=bucket, Key=key, Body=content)

    def delete(self, name: str) -> None:
        (self.folder / name).unlink()
        if self.process is not None:
            bucket, _, key = name.partition("/")
            self.client().delete_object(Bucket=bucket, Key=key)

    def client(self) -> Any:
        import boto3

        keys = {
            "aws_access_key_id": "test",
            "aws_secret_access_key": "test",
            "region_name": "us-east-1",
        }
        return boto3.client("s3", endpoint_url=self.endpoint, **keys)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def serve(folder: Path, port: int) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    # both servers give what this process holds in memory
    upload = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    upload.start()
    client = boto3.client("s3", endpoint_url="http://{}:{}".format(*upload.get_host_and_port()))
    for bucket in sorted(folder.iterdir()):
        client.create_bucket(Bucket=bucket.name)
        for path in sorted(bucket.rglob("*")):
            if path.is_file():
                client.put_object(
                    Bucket=bucket.name,
                    Key=path.relative_to(bucket).as_posix(),
                    Body=path.read_bytes(),
                )
    ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False).start()
    threading.Event().wait()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
