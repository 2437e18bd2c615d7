"""Checkpoints: whole or not there, damage is seen, what must stay stays, and the files are what
they say.
"""

import hashlib
import itertools
import json
import math
import os
import queue
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dist_lm import families
from dist_lm.channel import Channel
from dist_lm.checkpoint import layout, retention, writing
from dist_lm.checkpoint.folder import newest_valid, set_aside_newer, step_folders, step_of, verify
from dist_lm.checkpoint.layout import OwnedSlice
from dist_lm.checkpoint.load import read_model, read_weights, restore
from dist_lm.checkpoint.save import Saver
from dist_lm.checkpoint.state import verify_state
from dist_lm.config import ModelConfig, ModelSpec, OptimConfig
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import UserError
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.optim import create_state, make_optimizer
from tests import procs
from tests.conftest import owned, state_of, write_step

MODEL, SEQ_LEN = ModelConfig(layers=2, heads=2, width=16), 8


@pytest.fixture(scope="module")
def trained() -> tuple[GPT, torch.optim.Optimizer, Tokenizer]:
    return training_of(MODEL)


def training_of(config: ModelConfig) -> tuple[GPT, torch.optim.Optimizer, Tokenizer]:
    """A model after two updates of each parameter."""
    tokenizer = train_tokenizer("byte", [])
    model = GPT(ModelSpec(config, tokenizer.vocab_size, SEQ_LEN))
    init_weights(model, 1)
    optimizer = make_optimizer(model, OptimConfig(), "fp32")
    for _ in range(2):
        tokens = torch.arange(16).view(2, 8)
        model(tokens, tokens).backward()
        optimizer.step()
    return model, optimizer, tokenizer


def write(run: Path, step: int, trained: Any, val_loss: float | None = None) -> Path:
    model, optimizer, tokenizer = trained
    texts = {
        "config.json": families.config_json(
            ModelSpec(MODEL, tokenizer.vocab_size, SEQ_LEN), tokenizer.eot
        ),
        "state.json": state_of(step, val_loss=val_loss),
    }
    return write_step(run, step, model, texts, tokenizer, optimizer)


def test_what_is_saved_is_read_back(trained: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, 3, trained)
    assert sorted(verify(folder)["files"]) == [
        "config.json",
        "model.safetensors",
        "optimizer-00001-of-00001.safetensors",
        "state.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model, optimizer, _ = trained
    again, tokenizer, found = read_model(str(tmp_path))
    assert found == folder and tokenizer.vocab_size == 257
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    other = make_optimizer(again, OptimConfig(), "fp32")
    create_state(other)
    restore(folder, ModelSpec(MODEL, 257, SEQ_LEN), owned(again, other), optimizer=True)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert all(
            torch.equal(optimizer.state[p][key], other.state[q][key]) for key in optimizer.state[p]
        )


def test_files_are_what_safetensors_writes_and_split_the_same_everywhere(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SMALLEST_FILE", {"model": 4000, "optimizer": 4000})
    folder = write(tmp_path, 3, trained)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    for file in files:
        tensors = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(
            tensors
        )
    again, _, _ = read_model(str(folder))
    assert torch.equal(again.embed.weight, trained[0].embed.weight)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: os.truncate(f / "model.safetensors", 100),
            "model.safetensors: has 100 bytes, the manifest says",
        ),
        (
            lambda f: _flip(f / "model.safetensors"),
            "model.safetensors: does not match its hash in the manifest",
        ),
        (lambda f: _flip(f / "state.json"), "state.json: does not match its hash in the manifest"),
        (lambda f: (f / "state.json").unlink(), "state.json: is missing"),
        (lambda f: (f / "extra.bin").write_text(""), "extra.bin: is not in the manifest"),
        (lambda f: (f / "manifest.json").write_text(""), "manifest.json: not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: must be a JSON object"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json: is not of format 1"),
        (
            lambda f: (f / "manifest.json").unlink(),
            "manifest.json: cannot be read (No such file or directory)",
        ),
        (lambda f: _edit(f, step=4), "manifest.json: belongs to step 4"),
        (lambda f: _edit(f, step=True), "manifest.json: its step is not a number >= 0"),
        (lambda f: _edit(f, step=-2), "manifest.json: its step is not a number >= 0"),
        (lambda f: _edit(f, files=[]), "manifest.json: is not of format 1"),
        (lambda f: _edit(f, files={"../x": {}}), "manifest.json: '../x' is not a file name"),
        (lambda f: _edit(f, files={"-x": {}}), "manifest.json: '-x' is not a file name"),
        (lambda f: _edit(f, files={"x\n": {}}), r"manifest.json: 'x\n' is not a file name"),
        (lambda f: _edit(f, files={"\x1b[2J": {}}), r"manifest.json: '\x1b[2J' is not a file name"),
        (
            lambda f: _edit(f, files={"x": "text"}),
            "manifest.json: x must have a size and a sha256, nothing else",
        ),
        (
            lambda f: _edit(f, files={"x": {"sha256": "0" * 64}}),
            "x must have a size and a sha256, nothing else",
        ),
        (
            lambda f: _edit_entry(f, mode=1),
            "state.json must have a size and a sha256, nothing else",
        ),
        (
            lambda f: _edit_entry(f, size=-1),
            "manifest.json: the size of state.json is not a number >= 0",
        ),
        (
            lambda f: _edit_entry(f, size=2.0),
            "manifest.json: the size of state.json is not a number >= 0",
        ),
        (
            lambda f: _edit_entry(f, sha256="0" * 63),
            "the sha256 of state.json is not 64 hexadecimal digits",
        ),
        (
            lambda f: _edit_entry(f, sha256="A" * 64),
            "the sha256 of state.json is not 64 hexadecimal digits",
        ),
        (
            lambda f: _edit_entry(f, sha256=None),
            "the sha256 of state.json is not 64 hexadecimal digits",
        ),
        (
            lambda f: (f / "manifest.json").write_text("[" * 100_000),
            "manifest.json: not usable JSON: deeper than 64 levels",
        ),
        (
            lambda f: (f / "manifest.json").write_text('{"step": ' + "9" * 5000 + "}"),
            "manifest.json: not usable JSON: Exceeds the limit",
        ),
        (
            lambda f: (f / "manifest.json").write_bytes(b'{"\xff": 1}'),
            "manifest.json: not valid JSON",
        ),
        (
            lambda f: (f / "manifest.json").write_text("{}" + " " * 2**20),
            "manifest.json: has more than 1,048,576 bytes",
        ),
        (
            lambda f: _pipe(f / "manifest.json"),
            "manifest.json: cannot be read (not a regular file)",
        ),
        (lambda f: _pipe(f / "state.json"), "state.json: cannot be read (not a regular file)"),
        (
            lambda f: _link(f / "config.json", to="/dev/zero"),
            "config.json: cannot be read (not a regular file)",
        ),
    ],
)
def test_damage_is_seen_and_the_step_before_is_taken(
    trained: Any, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    older, newer = write(tmp_path, 1, trained), write(tmp_path, 2, trained)
    damage(newer)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        verify(newer)
    assert error.value.code == 66 and str(error.value).isprintable()
    found, passed_over = newest_valid(tmp_path)
    assert found == older and len(passed_over) == 1 and message in passed_over[0]
    shutil.rmtree(older)
    with pytest.raises(
        UserError,
        match=r"holds no valid checkpoint: step-00000002/.*; rule: never restart silently",
    ):
        newest_valid(tmp_path)


def test_a_link_is_followed(trained: Any, tmp_path: Path) -> None:
    """A cache of the hub is made of links."""
    folder = write(tmp_path, 1, trained)
    _link(folder / "state.json")
    assert newest_valid(tmp_path, verify_state) == (folder, [])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


def _edit(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def _edit_entry(folder: Path, **changes: Any) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    _edit(folder, files=files | {"state.json": files["state.json"] | changes})


def _link(file: Path, to: str | None = None) -> None:
    elsewhere = file.parent.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(to or elsewhere)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_json_as_a_manifest_is_right_or_damaged(
    trained: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One value of a right manifest is replaced by any other: nothing but UserError comes of it."""
    run = tmp_path_factory.getbasetemp() / "any-json"
    folder = run / "step-00000001"
    if not folder.exists():
        write(run, 1, trained)
        shutil.copy(folder / "manifest.json", run / "right.json")
    right = (run / "right.json").read_text()
    manifest, new = json.loads(right), data.draw(JSON)
    places = [(manifest, key) for key in manifest]
    places += [
        (manifest["files"], "state.json"),
        (manifest["files"], data.draw(st.text(max_size=5))),
    ]
    places += [
        (manifest["files"]["state.json"], "size"),
        (manifest["files"]["state.json"], "sha256"),
    ]
    inside, key = data.draw(st.sampled_from(places))
    inside[key] = new
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        assert verify(folder) == json.loads(right)
    except UserError as error:
        assert error.code == 66 and str(error).isprintable()


def test_a_manifest_that_is_a_dangling_link_is_damage(trained: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, 1, trained)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"manifest.json: cannot be read \(No such file"):
        read_model(str(folder))


def test_a_step_under_another_name_is_the_step_that_its_manifest_says(
    trained: Any, tmp_path: Path
) -> None:
    folder = write(tmp_path, 2, trained)
    best = tmp_path / "best"
    folder.rename(best)
    assert verify(best)["step"] == 2
    assert read_model(str(best))[2] == best
    best.rename(tmp_path / "step-00000003")
    with pytest.raises(UserError, match="step-00000003/manifest.json: belongs to step 2"):
        read_model(str(tmp_path / "step-00000003"))


def test_a_folder_that_is_no_step_is_left_alone(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "step-99").mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    assert newest_valid(tmp_path) == (None, [])


@pytest.mark.slow
def test_nothing_is_there_until_all_is_written(trained: Any, tmp_path: Path) -> None:
    """Die at every file operation of a save: the older checkpoint or the whole new one is found,
    never a mix.
    """
    write(tmp_path / "run", 1, trained)
    script = """
import os, shutil, sys
from pathlib import Path
import tests.checkpoint.test_checkpoint as t
armed, left = False, 0
def count(event, arguments):
    global left
    changes = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")
    if event in changes and armed:
        left -= 1
        if left < 0:
            os._exit(9)
older = Path(sys.argv[1])
trained = t.training_of(t.MODEL)
sys.addaudithook(count)
code, points = 9, 0
while code == 9:
    run = older.with_name(f"run-{points}")
    shutil.copytree(older, run)
    pid = os.fork()
    if pid == 0:
        armed, left = True, points
        t.write(run, 2, trained)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(run, flush=True)
    points += 1 if points < 4 else 3
sys.exit(code)
"""
    done = procs.run([sys.executable, "-c", script, str(tmp_path / "run")], timeout=120)
    assert done.returncode == 0, done.stdout
    deaths = set()
    for run in map(Path, done.stdout.split()):
        found, passed_over = newest_valid(run)
        assert found is not None and passed_over == []
        deaths.add(found.name)
        write(run, 3, trained)  # the next save clears what was left over
        assert not list(run.glob(".step-*"))
    assert deaths == {"step-00000001", "step-00000002"} and len(done.stdout.split()) > 6


def test_a_full_disk_leaves_the_older_checkpoint(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = write(tmp_path, 1, trained)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "optimizer-00001-of-00001.safetensors")

    monkeypatch.setattr(writing, "write_tensors", full)
    with pytest.raises(UserError) as error:
        write(tmp_path, 2, trained)
    assert str(error.value) == (
        "checkpoint of step 2 was not written: rank 0: No space left on device"
        " (optimizer-00001-of-00001.safetensors);"
        " older checkpoints are untouched"
    )
    assert [p.name for p in tmp_path.iterdir()] == [older.name]


LARGER = ModelConfig(layers=2, heads=2, width=128)


def size_of_one(tmp_path: Path, larger: Any) -> int:
    folder = Saves(tmp_path / "one", larger, 1)(1)
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize("keep_last", [1, 2, 4])
def test_saves_go_on_with_fewer_old_steps_where_not_all_fit(
    small_disk: Callable[[int], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keep_last: int,
) -> None:
    """There is room for two and a half; one valid step is always there."""
    larger = training_of(LARGER)
    run = small_disk(int(2.5 * size_of_one(tmp_path, larger)))
    save = Saves(run, larger, keep_last)
    for step in range(1, 7):
        save(step)
        found, passed_over = newest_valid(run, verify_state)
        assert found == run / f"step-{step:08d}" and not passed_over
    said = capsys.readouterr().err
    assert ("fewer old ones will stay; nearest: 1" in said) == (keep_last > 1)
    assert said.count("has room for 2 checkpoints") == (keep_last > 1)
    assert ("is deleted: the next checkpoint does not fit beside it" in said) == (keep_last > 1)


def test_the_only_valid_step_stays_where_no_other_fits(
    small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    larger = training_of(LARGER)
    run = small_disk(int(1.7 * size_of_one(tmp_path, larger)))
    save = Saves(run, larger, 2)
    save(1)
    with pytest.raises(UserError, match="No space left on device"):
        save(2)
    assert steps(run) == [1] and not list(run.glob(".step-*"))
    verify(run / "step-00000001")


def test_what_every_so_many_steps_keeps_is_not_given_up(
    small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    larger = training_of(LARGER)
    run = small_disk(int(3.5 * size_of_one(tmp_path, larger)))
    save = Saves(run, larger, 9, keep_every=2)
    for step in range(1, 5):
        save(step)
    assert steps(run) == [2, 3, 4]


def test_the_best_is_given_up_last(small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    larger = training_of(LARGER)
    run = small_disk(int(3.5 * size_of_one(tmp_path, larger)))
    save = Saves(run, larger, 9)
    for step in range(1, 6):
        save(step, val_loss=1.0 if step == 2 else 2.0)
    assert steps(run) == [2, 4, 5]


# --- what stays


class Saves:
    """Saves one step after another with the same Saver, as a run does. `write` has a new one each
    time.
    """

    def __init__(
        self,
        run: Path,
        trained: Any,
        keep_last: int,
        keep_every: int = 0,
        resumed: Path | None = None,
        reach: int = 0,
    ):
        more: dict[str, Any] = {"resumed": resumed} if resumed else {}
        if reach:
            more["reach"] = reach
        self.run, self.trained = run, trained
        self.saver = Saver(run, Channel(0, 1, torch.device("cpu")), keep_last, keep_every, **more)

    def __call__(self, step: int, val_loss: float | None = None) -> Path:
        model, optimizer, tokenizer = self.trained
        config = families.config_json(
            ModelSpec(model.config, tokenizer.vocab_size, SEQ_LEN), tokenizer.eot
        )
        texts = {
            "config.json": json.dumps(config),
            "state.json": json.dumps(state_of(step, val_loss=val_loss)),
        }
        self.saver.begin(
            step,
            ModelSpec(model.config, tokenizer.vocab_size, SEQ_LEN),
            lambda: owned(model, optimizer),
            texts,
            tokenizer,
        )
        self.saver.finish()
        return self.run / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    return [step_of(folder) for folder in step_folders(run)]


@pytest.mark.parametrize("restarted", [False, True])
def test_what_stays(trained: Any, tmp_path: Path, restarted: bool) -> None:
    """The best, every third and the last two stay, also where all were saved by earlier starts."""
    losses = [math.nan, 1.5, 2.0, None, 2.5, 2.2, 2.1, None]
    for step, loss in enumerate(losses[:-1], 1):
        write(tmp_path, step, trained, loss)
    newest = tmp_path / "step-00000007"
    Saves(tmp_path, trained, keep_last=2, keep_every=3, resumed=newest if restarted else None)(
        8, losses[-1]
    )
    assert steps(tmp_path) == [2, 3, 6, 7, 8]


def test_what_a_run_may_go_back_to_stays(trained: Any, tmp_path: Path) -> None:
    """After step 12, step 13 may go back to 5 at the latest, so 5 stays with all that follow it."""
    save = Saves(tmp_path, trained, keep_last=1, reach=8)
    stays = []
    for step in (3, 5, 10, 12, 17, 19, 40):
        save(step)
        stays.append(steps(tmp_path))
    assert stays[3:] == [[5, 10, 12], [10, 12, 17], [12, 17, 19], [19, 40]]


def test_damaged_newer_steps_take_no_place_of_a_valid_one(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        write(tmp_path, step, trained)
    for step in (30, 40):
        os.truncate(write(tmp_path, step, trained) / "model.safetensors", 100)
    save = Saves(tmp_path, trained, keep_last=2)
    save(3)
    save(4)
    assert steps(tmp_path) == [3, 4, 30, 40]
    assert newest_valid(tmp_path)[0] == tmp_path / "step-00000004"
    # Each is read once, and there is one warning for each.
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "step-00000040/model.safetensors: has 100 bytes" in warnings[0]


def test_what_was_just_saved_stays_below_valid_newer_steps(trained: Any, tmp_path: Path) -> None:
    for step in (30, 40):
        write(tmp_path, step, trained)
    save = Saves(tmp_path, trained, keep_last=1)
    save(3)
    assert steps(tmp_path) == [3, 40]
    save(4)
    assert steps(tmp_path) == [4, 40]


def test_a_step_of_an_earlier_start_is_verified_once(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 7):
        write(tmp_path, step, trained, val_loss=float(step))
    os.truncate(tmp_path / "step-00000003" / "model.safetensors", 100)
    looked_at: list[str] = []

    def look(folder: Path) -> dict[str, Any]:
        looked_at.append(folder.name)
        return verify(folder)

    monkeypatch.setattr(retention, "verify_state", look)
    save = Saves(tmp_path, trained, keep_last=2, resumed=tmp_path / "step-00000006")
    for step in (7, 8, 9):
        save(step)
    assert steps(tmp_path) == [1, 3, 8, 9]
    assert sorted(looked_at) == [f"step-0000000{step}" for step in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, '{"val_loss": "x"}', '{"val_loss": [1]}']
)
def test_a_damaged_state_does_not_stop_the_pruning(trained: Any, tmp_path: Path, text: str) -> None:
    save = Saves(tmp_path, trained, keep_last=2)
    save(1)
    (save(2) / "state.json").write_text(text)
    for step in (3, 4, 5):
        save(step)
    assert {4, 5} <= set(steps(tmp_path)) <= {2, 4, 5}


def test_links_and_files_in_the_way_of_saving(trained: Any, tmp_path: Path) -> None:
    """What a link points to is never touched; a linked step stays, a link or a file under a name of
    ours goes.
    """
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save = Saves(run, trained, keep_last=1)
    save(1).rename(elsewhere)
    (run / "step-00000001").symlink_to(elsewhere)
    (run / "step-00000004").symlink_to(elsewhere)
    (run / "step-00000005").symlink_to("nowhere")
    (run / "step-00000006").write_text("a file")
    (run / ".step-00000009.tmp").write_text("a file")
    (run / ".step-00000008.tmp").symlink_to(elsewhere)
    (run / ".step-00000002.tmp").symlink_to(elsewhere)
    (run / ".step-00000001.old.tmp").symlink_to("nowhere")
    before = sorted((path.name, path.read_bytes()) for path in elsewhere.iterdir())
    for step in range(2, 8):
        verify(save(step))
    assert sorted(path.name for path in run.iterdir()) == ["step-00000001", "step-00000007"]
    assert (run / "step-00000001").is_symlink()
    assert sorted((path.name, path.read_bytes()) for path in elsewhere.iterdir()) == before


def test_what_cannot_be_deleted_is_a_warning(
    trained: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    really = shutil.rmtree

    def stuck(path: Path, *args: Any, **more: Any) -> None:
        if "step-00000001" in str(path):
            raise OSError(16, "Device or resource busy", str(path))
        really(path, *args, **more)

    save = Saves(tmp_path, trained, keep_last=1)
    save(1)
    monkeypatch.setattr(shutil, "rmtree", stuck)
    for step in (2, 3):
        save(step)
    assert steps(tmp_path) == [3]
    said = capsys.readouterr().err
    assert "warning: step-00000001 stays: [Errno 16] Device or resource busy" in said
    assert "warning: .step-00000001.old.tmp stays: [Errno 16] Device or resource busy" in said


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda f: os.truncate(f / "model.safetensors", 100),
    "flipped": lambda f: _flip(f / "optimizer-00001-of-00001.safetensors"),
    "deep state": lambda f: (f / "state.json").write_text("[" * 100_000),
    "deep manifest": lambda f: (f / "manifest.json").write_text("[" * 100_000),
    "piped manifest": lambda f: _pipe(f / "manifest.json"),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "empty": lambda f: _instead(f, Path.mkdir),
    "renamed": lambda f: _edit(f, step=99),
    "signed text": lambda f: _sign(f, "state.json", b"[1]"),
    "link": lambda f: f.rename(f.parent.parent / f.name) and f.symlink_to(f.parent.parent / f.name),
    "dangling": lambda f: _instead(f, lambda f: f.symlink_to("nowhere")),
    "file": lambda f: _instead(f, lambda f: f.write_text("x")),
}


def _instead(folder: Path, make: Callable[[Path], object]) -> None:
    """Put something else in the place of a folder."""
    shutil.rmtree(folder)
    make(folder)


LOSSES = st.sampled_from([None, 1.0, 2.0, 3.0])


def _sign(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    _edit(
        folder,
        files=files | {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
    )


def plant(folder: Path, template: Path, step: int, loss: float | None, damage: str | None) -> None:
    shutil.copytree(template, folder)
    _sign(folder, "state.json", json.dumps(state_of(step, val_loss=loss)).encode())
    _edit(folder, step=step)
    if damage:
        DAMAGES[damage](folder)


def look_at(path: Path) -> Any:
    """What lies at a path: where a link points, what a file holds, what a folder has."""
    if path.is_symlink():
        return os.readlink(path)
    if path.is_dir():
        return {inside.name: look_at(inside) for inside in path.iterdir()}
    return path.read_bytes() if path.is_file() else "a pipe"


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    planted=st.dictionaries(
        st.integers(1, 12),
        st.tuples(LOSSES, st.sampled_from([None, None, None, *DAMAGES])),
        max_size=7,
    ),
    saves=st.lists(st.tuples(st.integers(1, 12), LOSSES, st.booleans()), min_size=1, max_size=4),
    keep_last=st.integers(1, 3),
    keep_every=st.sampled_from([0, 0, 4]),
)
def test_whatever_lies_there_the_right_steps_stay(
    trained: Any,
    tmp_path_factory: pytest.TempPathFactory,
    planted: Any,
    saves: Any,
    keep_last: int,
    keep_every: int,
) -> None:
    """Any folders, any saves and restarts: what was just saved stays, nothing damaged or linked is
    touched, and of the valid steps those stay that should.
    """
    top = tmp_path_factory.mktemp("retention")
    template = write(top, 1, trained)
    run = top / "runs" / "run"
    run.mkdir(parents=True)
    valid: dict[int, float | None] = {}
    for step, (loss, damage) in planted.items():
        plant(run / f"step-{step:08d}", template, step, loss, damage)
        if damage is None:
            valid[step] = loss
    save = Saves(run, trained, keep_last, keep_every)
    for step, loss, restart in saves:
        if restart:
            save = Saves(run, trained, keep_last, keep_every)
        others = {
            path.name: look_at(path)
            for path in run.iterdir()
            if int(path.name[5:]) not in {*valid, step}
        }
        linked = {path.name: look_at(path) for path in run.parent.iterdir() if path != run}
        verify(save(step, loss))
        valid[step] = loss
        best = min(
            (s for s in sorted(valid) if valid[s] is not None),
            key=lambda s: valid[s] or 0,
            default=0,
        )
        staying = {step, best, *sorted(valid)[-keep_last:]}
        valid = {s: valid[s] for s in valid if s in staying or (keep_every and s % keep_every == 0)}
        assert {path.name for path in run.iterdir()} == {*others, *(f"step-{s:08d}" for s in valid)}
        assert {name: look_at(run / name) for name in others} == others
        assert {path.name: look_at(path) for path in run.parent.iterdir() if path != run} == linked
        for s in valid:
            verify(run / f"step-{s:08d}")
    shutil.rmtree(top)


def test_going_back_sets_newer_steps_aside(trained: Any, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, trained)
    said: list[str] = []
    set_aside_newer(tmp_path, 1, said.append)
    assert [f.name for f in step_folders(tmp_path)] == ["step-00000001"] and len(said) == 2
    assert (tmp_path / "replaced-0-step-00000003").is_dir()


def test_no_model_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither a checkpoint"):
        read_model(str(tmp_path))
    with pytest.raises(UserError, match="no such folder; rule: a run, a step folder"):
        read_model(str(tmp_path / "x"))


def test_a_step_that_is_gone_names_those_that_exist(trained: Any, tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path / "runs/mine", step, trained)
    steps = r"; .*/runs/mine has step-00000001, step-00000002$"
    with pytest.raises(UserError, match=steps):
        read_model(str(tmp_path / "runs/mine/step-00000003"))
    with pytest.raises(UserError, match=r"; did you mean .*/runs/mine\?$"):
        read_model(str(tmp_path / "runs/mien"))


def test_a_run_that_is_gone_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^runs/mien: no such folder; .*mean runs/mine\?$"):
        read_model("runs/mien")


def test_a_missing_tensor_is_named(trained: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, 1, trained)
    (folder / "manifest.json").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="the model file lacks"):
        read_model(str(folder))
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "optimizer-00001-of-00001.safetensors").unlink()
    model, optimizer, _ = trained
    with pytest.raises(
        UserError,
        match=r"step-00000001 lacks embed.weight.exp_avg of the optimizer; rule: resume with",
    ):
        restore(folder, ModelSpec(MODEL, 257, SEQ_LEN), owned(model, optimizer), optimizer=True)


def test_a_torn_safetensors_file_is_refused(trained: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, 1, trained)
    (folder / "manifest.json").unlink()
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(UserError, match="model.safetensors: not a whole safetensors file"):
        read_model(str(folder))


def test_a_checkpoint_is_a_transformers_folder(trained: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write(tmp_path, 1, trained)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)("a b\n  c", return_tensors="pt").input_ids
    assert tokens.tolist() == [trained[2].encode("a b\n  c")]
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, trained[0](tokens), atol=1e-5)


def test_only_safetensors_and_json_are_read(trained: Any, tmp_path: Path) -> None:
    """A pickle that would run code lies under every name a loader might touch; it never runs."""
    folder = write(tmp_path, 1, trained)
    (folder / "manifest.json").unlink()
    marker = tmp_path / "marker"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    for name in (
        "pytorch_model.bin",
        "model.bin",
        "optimizer.bin",
        "random_states_0.pkl",
        ".metadata",
        "__0_0.distcp",
        "custom_checkpoint_0.pkl",
        "mp_rank_00_model_states.pt",
        "dl_state_dict.bin",
        "tok.py",
    ):
        (folder / name).write_bytes(payload)
    (folder / "config.json").write_text(
        json.dumps(
            json.loads((folder / "config.json").read_text())
            | {"auto_map": {"AutoModelForCausalLM": "tok.X"}}
        )
    )
    read_model(str(folder))
    assert not marker.exists()


# --- many ranks


class Messages:
    """What ranks of one process, each a thread, have sent each other."""

    def __init__(self, world: int):
        self.world, self.barrier = world, threading.Barrier(world)
        self.said: list[Any] = [None] * world
        self.mail: dict[tuple[int, int, int], queue.Queue[torch.Tensor]] = {}
        self.lock = threading.Lock()
        self.sent = 0

    def box(self, sender: int, receiver: int, tag: int) -> "queue.Queue[torch.Tensor]":
        with self.lock:
            return self.mail.setdefault((sender, receiver, tag), queue.Queue())


class ThreadChannel:
    """A Channel between threads: the same words, no processes."""

    def __init__(self, rank: int, messages: Messages):
        self.rank, self.world_size, self.messages = rank, messages.world, messages

    def gather(self, value: Any) -> list[Any]:
        self.messages.said[self.rank] = json.loads(json.dumps(value))
        self.messages.barrier.wait(timeout=20)
        said = list(self.messages.said)
        self.messages.barrier.wait(timeout=20)
        return said

    def send(self, tensor: torch.Tensor, to: int, tag: int) -> Any:
        self.messages.sent += tensor.numel()
        self.messages.box(self.rank, to, tag).put(tensor.clone())
        return self

    def wait(self) -> None:
        """What send() returns is over at once."""

    def receive(self, tensor: torch.Tensor, sender: int, tag: int) -> None:
        tensor.copy_(self.messages.box(sender, self.rank, tag).get(timeout=20))


def cut(everything: list[OwnedSlice], world: int, cuts: random.Random) -> list[list[OwnedSlice]]:
    """Each parameter cut at random places among the ranks, in any order; some ranks get nothing of
    it.
    """
    by_rank: list[list[OwnedSlice]] = [[] for _ in range(world)]
    for h in everything:
        places = [0, *sorted(cuts.choices(range(h.stop + 1), k=world - 1)), h.stop]
        for rank, (start, stop) in zip(
            cuts.sample(range(world), world), itertools.pairwise(places), strict=True
        ):
            if stop > start:
                state = {key: value[start:stop] for key, value in h.state.items()}
                by_rank[rank].append(
                    OwnedSlice(h.name, start, stop, h.weight[start:stop], state, h.extra)
                )
    return by_rank


def save_together(
    run: Path,
    trained: Any,
    by_rank: list[list[OwnedSlice]],
    step: int = 7,
    messages: Messages | None = None,
    lost: Callable[[], str] = str,
    attempts: int = 0,
) -> tuple[list[Any], int]:
    """Save as many ranks; what each of them raised, or None, and how many elements they sent."""
    model, _, tokenizer = trained
    messages = messages or Messages(len(by_rank))
    texts = {
        "config.json": json.dumps(
            families.config_json(
                ModelSpec(model.config, tokenizer.vocab_size, SEQ_LEN), tokenizer.eot
            )
        ),
        "state.json": "{}",
    }
    outcome: list[Any] = [None] * len(by_rank)

    def work(rank: int) -> None:
        saver = Saver(run, ThreadChannel(rank, messages), lost=lost)
        saver._attempts = attempts
        try:
            saver.begin(
                step,
                ModelSpec(model.config, tokenizer.vocab_size, SEQ_LEN),
                lambda: by_rank[rank],
                texts,
                tokenizer,
            )
            saver.finish()
        except UserError as error:
            outcome[rank] = str(error)

    ranks = [threading.Thread(target=work, args=(rank,)) for rank in range(len(by_rank))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=30)
    return outcome, messages.sent


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "ours"])
@pytest.mark.parametrize("world", [2, 5])
def test_files_are_the_same_bytes_however_what_they_hold_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, world: int
) -> None:
    """Held whole by each rank, or in slices: the same files, hashes included; and read back in
    slices again.
    """
    monkeypatch.setattr(layout, "SMALLEST_FILE", {"model": 3000, "optimizer": 3000})
    # GPT-2's biases are constants of the file.
    gpt2 = {"positions": "learned", "norm": "layernorm", "activation": "gelu"}
    updates = {
        "llama": {"kv_heads": 1},
        "qwen3": {"kv_heads": 1, "qk_norm": True},
        "gpt2": gpt2,
        "ours": {"qk_norm": True, "positions": "none"},
    }
    model_config = MODEL.model_copy(update=updates[family])
    model, optimizer, tokenizer = some = training_of(model_config)
    everything = owned(model, optimizer)
    assert save_together(tmp_path / "alone", some, [everything]) == ([None], 0)
    replicas = [everything] * world
    assert save_together(tmp_path / "replicas", some, replicas) == ([None] * world, 0)
    outcome, sent = save_together(
        tmp_path / "slices", some, cut(everything, world, random.Random(world))
    )
    assert outcome == [None] * world and sent > 0
    manifests = [
        verify(tmp_path / run / "step-00000007") for run in ("alone", "replicas", "slices")
    ]
    assert manifests[0] == manifests[1] == manifests[2]
    assert len(manifests[0]["files"]) > 8
    for h in itertools.chain(*cut(everything, 3, random.Random(1))):
        state = {key: torch.full_like(value, 7.0) for key, value in h.state.items()}
        extra = {key: torch.full_like(value, 7.0) for key, value in h.extra.items()}
        blank = OwnedSlice(h.name, h.start, h.stop, torch.full_like(h.weight, 7.0), state, extra)
        restore(
            tmp_path / "slices/step-00000007",
            ModelSpec(model_config, tokenizer.vocab_size, SEQ_LEN),
            [blank],
            optimizer=True,
        )
        columns = math.prod(dict(model.named_parameters())[h.name].shape[1:])
        unpadded = (257 if h.name in ("embed.weight", "head.weight") else 10**9) * columns
        kept = slice(0, max(0, unpadded - h.start))  # what pads the vocabulary is not saved
        for ours, theirs in [
            (blank.weight, h.weight),
            *((state[key], h.state[key]) for key in state),
        ]:
            assert torch.equal(ours[kept], theirs[kept])
        assert all(torch.equal(extra[key], h.extra[key]) for key in extra) and extra


def test_a_folder_from_before_its_model_had_a_family_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions wrote models with qk_norm under our own names, as of no family."""
    some = training_of(MODEL.model_copy(update={"qk_norm": True}))
    model, optimizer, tokenizer = some
    spec = ModelSpec(model.config, tokenizer.vocab_size, SEQ_LEN)
    old = {
        "model_type": "dist_lm",
        "vocab_size": tokenizer.vocab_size,
        "seq_len": SEQ_LEN,
        "model": model.config.model_dump(mode="json"),
    }
    with monkeypatch.context() as patched:
        patched.setattr(layout.hf, "layout", layout.hf.own_layout)
        texts = {"config.json": old, "state.json": state_of(7)}
        folder = write_step(tmp_path, 7, model, texts, tokenizer, optimizer)
    assert "blocks.0.attn.q_norm.weight" in load_file(folder / "model.safetensors")
    again, _, _ = read_model(str(folder))
    for name, parameter in again.named_parameters():
        parameter_before = model.get_parameter(name)
        assert torch.equal(parameter, parameter_before)
        parameter.data.fill_(7.0)
    restore(folder, spec, owned(again), optimizer=False)
    assert torch.equal(again.blocks[1].attn.k_norm.weight, model.blocks[1].attn.k_norm.weight)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_writing_evenly(
    trained: Any, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    monkeypatch.setattr(layout, "SMALLEST_FILE", {"model": 3000, "optimizer": 1000})
    model, optimizer, _ = trained
    index = [[h.name, h.start, h.stop, sorted(h.state), {}] for h in owned(model, optimizer)]
    items = layout.plan_tensors(ModelSpec(MODEL, 257, SEQ_LEN), [index] * world)
    loads = [
        sum(item.entry.bytes for item in items if item.writer == rank) for rank in range(world)
    ]
    assert max(loads) <= sum(loads) / world + max(item.entry.bytes for item in items)
    assert min(loads) > 0.7 * sum(loads) / world


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            lambda path: OSError(28, "No space left on device", str(path)),
            "No space left on device (model.safetensors)",
        ),
        (lambda path: RuntimeError("not enough memory"), "not enough memory (.step-00000007.tmp)"),
    ],
    ids=["disk", "memory"],
)
def test_one_rank_that_cannot_write_fails_all_and_the_next_save_is_whole(
    trained: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[[Path], Exception],
    message: str,
) -> None:
    write_all = writing.write_tensors

    def full(path: Path, *args: Any) -> Any:
        if path.name.startswith("model"):
            raise failure(path)
        return write_all(path, *args)

    model, optimizer, tokenizer = some = training_of(MODEL)
    older = write(tmp_path, 1, trained)
    messages, slices = Messages(3), cut(owned(model, optimizer), 3, random.Random(3))
    with monkeypatch.context() as broken:
        broken.setattr(writing, "write_tensors", full)
        said, _ = save_together(tmp_path, some, slices, messages=messages)
    assert len(set(said)) == 1 and message in said[0]
    assert [p.name for p in tmp_path.iterdir()] == [older.name]
    for (
        parameter
    ) in model.parameters():  # what was sent for the failed file must not end up in the next
        parameter.data += 1
    assert save_together(tmp_path, some, slices, step=8, messages=messages)[0] == [None] * 3
    again = read_weights(
        tmp_path / "step-00000008", ModelSpec(MODEL, tokenizer.vocab_size, SEQ_LEN)
    )
    assert all(torch.equal(again[name][:16], p[:16]) for name, p in model.named_parameters())


def test_a_rank_that_cannot_assemble_a_tensor_leaves_nothing_for_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It receives no more of what was sent for its files: all of that must stay unread for ever."""
    model, optimizer, tokenizer = some = training_of(MODEL)
    messages, slices = Messages(3), cut(owned(model, optimizer), 3, random.Random(3))

    def fail(*_: Any) -> Any:
        raise RuntimeError("not enough memory")

    with monkeypatch.context() as broken:
        broken.setattr(writing.CheckpointWriter, "_assemble", fail)
        errors, _ = save_together(tmp_path, some, slices, messages=messages)
    assert len(set(errors)) == 1 and "not enough memory" in errors[0]
    for parameter in model.parameters():
        parameter.data += 1
    said, _ = save_together(tmp_path, some, slices, step=8, messages=messages, attempts=1)
    assert said == [None] * 3
    spec = ModelSpec(MODEL, tokenizer.vocab_size, SEQ_LEN)
    again = read_weights(tmp_path / "step-00000008", spec)
    assert all(torch.equal(again[name][:16], p[:16]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("looks", "left"), [(0, {".step-00000006.tmp"}), (1, {".step-00000007.tmp"}), (2, set())]
)
def test_a_run_that_lost_its_folder_commits_nothing_and_deletes_nothing(
    trained: Any, tmp_path: Path, looks: int, left: set[str]
) -> None:
    """At the first, second or third look: before the temporary folder, the rename, the deletion of
    older ones.
    """
    model, optimizer, _ = some = training_of(MODEL)
    older = {write(tmp_path, step, trained).name for step in (1, 2)}
    (tmp_path / ".step-00000006.tmp").mkdir()  # of whoever has the folder now
    answers = iter([""] * looks)
    said, _ = save_together(
        tmp_path,
        some,
        [owned(model, optimizer)] * 2,
        lost=lambda: next(answers, "run.lock was deleted"),
    )
    if looks < 2:
        reason = "rank 0: run.lock was deleted; older checkpoints are untouched"
        assert said == [f"checkpoint of step 7 was not written: {reason}"] * 2
    else:
        assert said == [None, None]
        older |= {"step-00000007"}
    assert {path.name for path in tmp_path.iterdir()} == older | left


def test_a_failed_write_is_raised_at_the_next_look(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, tokenizer = trained
    saver = Saver(tmp_path, Channel(0, 1, torch.device("cpu")))
    monkeypatch.setattr(
        Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    saver.begin(
        1,
        ModelSpec(MODEL, tokenizer.vocab_size, SEQ_LEN),
        lambda: owned(model, optimizer),
        {},
        tokenizer,
    )
    deadline = time.monotonic() + 20
    with pytest.raises(
        UserError, match="checkpoint of step 1 was not written: rank 0: Read-only file system"
    ):
        while time.monotonic() < deadline:
            saver.poll()
            time.sleep(0.01)
    saver.poll()  # said once
