"""Writes into a checkpoint as somebody does who can compute a sha256."""

import hashlib
import json
from pathlib import Path


def sign(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a step, and its size and hash in the manifest."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"][name] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
