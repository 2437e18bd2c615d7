"""Make a prepared folder of text or of files of raw tokens: shards that training reads from.

Invariant: the folder has the same bytes from any number of processes, killed in between or not.
"""

from collections.abc import Container
from pathlib import Path
from typing import Any

from dist_lm.config import DataConfig
from dist_lm.console import notice
from dist_lm.data.prepared.phases import Preparation
from dist_lm.data.prepared.progress import Say
from dist_lm.data.prepared.token_files import TokenPreparation
from dist_lm.data.prepared.writer import PROGRESS, write_manifest
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.disk import disk_may_fail


def prepare_dataset(
    data: DataConfig,
    folder: str | Path,
    processes: int = 1,
    say: Say = notice,
    name: str = "text",
    excluded: Container[int] = (),
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Make a prepared folder of a source (else of `data.input`), or go on with one.

    Returns the manifest. One process calls it. Documents whose hash is among `excluded` are left
    out, because they are validation documents of another source. A tokenizer is learned as
    `data.tokenizer` says, unless one is given.
    """
    # Errors of the text that is read are DataErrors already, by file and row.
    with disk_may_fail(Path(folder), "the text is not prepared"):
        return _prepare(data, Path(folder), processes, say, name, excluded, tokenizer)


def _prepare(
    data: DataConfig,
    folder: Path,
    processes: int,
    say: Say,
    name: str,
    excluded: Container[int],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    work = preparation_of(data, folder, name, say)
    finished = work.look()
    if finished:
        # A kill after the manifest was written leaves this file behind.
        (folder / PROGRESS).unlink(missing_ok=True)
        return finished
    for stray in work.folder.glob("tmp-*"):
        stray.unlink()
    state = work.state or work.begin(tokenizer)
    tokenizer = Tokenizer.load(folder)
    splits, skipped = work.write_shards(state, tokenizer, excluded, processes)
    more = {"settings": work.settings, "skipped": dict(sorted(skipped.items()))}
    manifest = write_manifest(work.folder, data, tokenizer, work.reader, splits, more)
    work.say_result(manifest)
    return manifest


def preparation_of(data: DataConfig, folder: Path, name: str, say: Say) -> Preparation:
    """The preparation of a source, by what it holds."""
    if data.named_sources()[name].holds_tokens:
        return TokenPreparation(data, folder, name, say)
    return Preparation(data, folder, name, say)
