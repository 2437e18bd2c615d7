"""What publish does: it makes a copy of a checkpoint that may be shown, and uploads it.

The copy is made of hard links, so that a run that goes on may delete the step meanwhile. It is
verified, and gets the newest card: that of the step, with what was measured since. Settings that
name private places are replaced in it. Each upload is one commit.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_lm.checkpoint.card import CARD, PLACE, bare_facts, plain, table, write_card
from dist_lm.checkpoint.folder import newest_valid, step_folders, step_of, verify
from dist_lm.checkpoint.state import read_state
from dist_lm.console import count, gigabytes, say, warn
from dist_lm.data.public_facts import public_url
from dist_lm.disk import write_file, write_json
from dist_lm.errors import CheckpointError, RetryableError, UserError, in_a_line
from dist_lm.evals import read_evals

# What only a run needs that goes on.
OF_RESUMING = ("state.json", "manifest.json")
# Files of ours in a repository: those that a checkpoint no longer has are removed.
_OURS = re.compile(
    r"(model|optimizer)[\w.-]*\.safetensors(\.index\.json)?|state\.json|manifest\.json"
)
# Fields of a card that we never write. Somebody may have, on the hub.
FIELDS_OF_OTHERS = (
    "license",
    "license_name",
    "license_link",
    "language",
    "base_model",
    "thumbnail",
)
_HIDDEN = "not-published"  # instead of a private place


def publish(run: str, repo: str, which: str, public: bool, with_optimizer: bool) -> None:
    """Upload checkpoints to a repository, which is made if it does not exist."""
    steps, main = choose(Path(run), which)
    hub = _Hub(repo, public)
    for step in steps:
        with copy_of(step, hub.name, with_optimizer) as folder:
            if which == "all":
                hub.upload(folder, step.name, revision=step.name)
            if step == main:
                hub.upload(folder, step.name, revision="main")
    say(f"published: {hub.url}")


# --- which checkpoints


def choose(run: Path, which: str) -> tuple[list[Path], Path]:
    """The step folders to upload, the oldest first, and the one that is main."""
    if (run / "config.json").is_file():
        return [run], run
    steps = step_folders(run) if run.is_dir() else []
    if not steps:
        raise CheckpointError(f"{run}: holds no checkpoint (step-*); rule: a run or a step folder")
    newest, passed_over = newest_valid(run)
    for why in passed_over:
        warn(f"passed over {why}")
    assert newest is not None
    main = newest if which == "newest" else _best(steps, newest)
    if which == "all":
        return _valid(steps), main
    return [main], main


def _best(steps: list[Path], newest: Path) -> Path:
    """The valid step with the lowest validation loss; the newest one if none was evaluated."""
    losses = []
    for step in steps:
        with contextlib.suppress(UserError):
            loss = read_state(step)["val_loss"]
            if loss is not None and loss == loss:
                losses.append((loss, -step_of(step), step))
    for _, _, step in sorted(losses):
        if step == newest or _valid([step]):
            return step
    return newest


def _valid(steps: list[Path]) -> list[Path]:
    """The steps that are whole. Warns about the others."""
    valid = []
    for step in steps:
        try:
            verify(step)
        except UserError as error:
            warn(f"passed over {error}")
        else:
            valid.append(step)
    return valid


# --- the copy


@contextlib.contextmanager
def copy_of(step: Path, repo: str, with_optimizer: bool) -> Iterator[Path]:
    """A copy of a step as it is published. It is gone afterwards."""
    with _scratch(step.parent) as scratch:
        folder = scratch / step.name
        folder.mkdir()
        for file in sorted(step.iterdir()):
            _link_or_copy(file, folder / file.name)
        verify(folder)
        state = read_state(folder)
        _replace(folder / CARD, newest_card(step, folder, state, repo).encode())
        if with_optimizer:
            _replace(folder / "state.json", json.dumps(public_state(state), indent=1).encode())
            _sign(folder)
        else:
            for file in (*folder.glob("optimizer-*"), *(folder / name for name in OF_RESUMING)):
                file.unlink(missing_ok=True)
        yield folder


@contextlib.contextmanager
def _scratch(run: Path) -> Iterator[Path]:
    """A folder for the copy: in the run folder, where links are possible, or else elsewhere."""
    try:
        path = Path(tempfile.mkdtemp(prefix=".publish-", dir=run))
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="dist_lm-publish-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _replace(path: Path, content: bytes) -> None:
    """Write a file of the copy. What it was linked to stays as it is: the new one is renamed."""
    write_file(path, [content])


def _sign(folder: Path) -> None:
    """Write the manifest of the copy again, whose card and state are others."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    files = dict(manifest["files"])
    for name in (CARD, "state.json"):
        content = (folder / name).read_bytes()
        sha256 = write_file(folder / name, [content])
        files[name] = {"size": len(content), "sha256": sha256}
    write_json(folder / "manifest.json", {**manifest, "files": dict(sorted(files.items()))})


def public_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """state.json without the places where things lie, which a resumed run may choose anyway."""
    config = json.loads(json.dumps(state["config"]))
    data = config.get("data", {})
    holders = [data, *data.get("sources", {}).values(), *data.get("validation", {}).values()]
    for holder in holders:
        if "input" in holder:
            holder["input"] = _public_inputs(holder["input"])
    if "/" in data.get("tokenizer", ""):
        data["tokenizer"] = _HIDDEN
    run = config.get("run", {})
    for name in ("dir", "init_from", "resume", "sample_prompt"):
        if run.get(name) not in (None, "auto", "never"):
            run[name] = _HIDDEN
    return {**state, "config": config}


def _public_inputs(value: Any) -> Any:
    if isinstance(value, list):
        return [_public_inputs(one) for one in value]
    if value == "stdlib":
        return value
    ending = ".bin" if value.endswith(".bin") else ""  # the settings ask for a type where it is so
    return public_url(value) or _HIDDEN + ending


# --- the card


def newest_card(step: Path, folder: Path, state: Mapping[str, Any], repo: str) -> str:
    """The card of the step with what was measured since, as the hub shows it."""
    from huggingface_hub import EvalResult, ModelCard  # slow

    path = folder / CARD
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    else:  # a step of an earlier version
        text = write_card(bare_facts(folder, state))
    card = ModelCard(text.replace(PLACE, repo), ignore_metadata_errors=True)
    measured = [line for line in read_evals(step.parent) if line["step"] == state["step"]]
    if not measured:
        return str(card)
    head: Any = card.data  # its fields depend on the kind of card
    results = list(head.eval_results or [])
    rows = [("task", "shots", "metric", "value", "standard error")]
    for line in measured:
        for metric, value in line["metrics"].items():
            if metric.endswith("_stderr"):
                continue
            error = line["metrics"].get(f"{metric}_stderr")
            spread = f"{error:.4f}" if error is not None else "-"
            cells = (plain(line["task"]), str(line["shots"]), plain(metric), f"{value:.4f}", spread)
            rows.append(cells)
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=line["task"],
                    dataset_name=line["task"],
                    metric_type=metric,
                    metric_name=f"{metric} ({count(line['shots'], 'shot')})",
                    metric_value=round(value, 4),
                )
            )
    head.model_name = head.model_name or f"dist_lm-step-{state['step']}"
    head.eval_results = results
    note = f"Measured by lm-eval {measured[-1].get('lm_eval', '')}."
    if any(line.get("limit") for line in measured):
        note += " Some of these read only a part of their task."
    return f"{card}\n## Evaluations\n\n{table(rows)}\n\n{note}\n"


# --- the hub


class _Hub:
    """A repository of the hub."""

    def __init__(self, repo: str, public: bool):
        from huggingface_hub import HfApi  # slow

        self._repo = repo
        self._api = HfApi(library_name="dist_lm")
        with self._errors():
            self.url = self._api.create_repo(repo, private=not public, exist_ok=True)
            self.name = self.url.repo_id
            is_private = self._api.repo_info(self.name).private
        if not is_private and not public:
            raise UserError(
                f"--repo={self.name} exists and is public; rule: what is not to be public goes to a"
                " private repository; nearest: another name, or --public"
            )
        if is_private and public:
            warn(f"{self.name} exists and stays private; its settings on the hub can change that")

    def upload(self, folder: Path, step: str, revision: str) -> None:
        """Make the revision this folder, in one commit. Files that are not ours stay."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete  # slow

        with self._errors():
            if revision != "main":
                self._api.create_branch(self.name, branch=revision, exist_ok=True)
            there = self._api.list_repo_files(self.name, revision=revision)
            if CARD in there:
                self._keep_fields_of_others(folder / CARD, revision)
        files = {path.name: path for path in sorted(folder.iterdir())}
        size = sum(path.stat().st_size for path in files.values())
        say(
            f"{step}: {count(len(files), 'file')}, {gigabytes(size)} GB, to {self.name}"
            f" ({revision})"
        )
        with self._errors():
            operations: list[Any] = []
            for name in there:
                if name not in files and _OURS.fullmatch(name):
                    operations.append(CommitOperationDelete(name))
            for name, path in files.items():
                operations.append(CommitOperationAdd(name, path))
            self._api.create_commit(
                self.name, operations, commit_message=f"Upload {step}", revision=revision
            )

    def _keep_fields_of_others(self, card: Path, revision: str) -> None:
        """Take over what somebody has written into the head of the published card: a licence."""
        from huggingface_hub import ModelCard

        published = self._api.hf_hub_download(self.name, CARD, revision=revision)
        theirs = ModelCard.load(published, ignore_metadata_errors=True).data.to_dict()
        ours = ModelCard.load(card, ignore_metadata_errors=True)
        added = {field: theirs[field] for field in FIELDS_OF_OTHERS if field in theirs}
        if added:
            for field, value in added.items():
                setattr(ours.data, field, value)
            _replace(card, str(ours).encode())
            if (card.parent / "manifest.json").is_file():
                _sign(card.parent)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What the hub refuses, in one line; what it may do another time is told as that."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code
            why = in_a_line(error)
            if status in (401, 403):
                raise UserError(
                    f"--repo={self._repo}: the hub refuses it ({status}); nearest: hf auth login,"
                    " with a token that may write there"
                ) from error
            if status >= 500 or status == 429:
                raise RetryableError(
                    f"--repo={self._repo}: {why}; the same command goes on"
                ) from error
            raise UserError(f"--repo={self._repo}: {why}") from error
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise RetryableError(
                f"--repo={self._repo}: {in_a_line(error)}; the same command goes on"
            ) from error
        except Exception as error:  # of the client's HTTP library
            if not type(error).__module__.startswith("httpx"):
                raise
            raise RetryableError(
                f"--repo={self._repo}: the hub cannot be reached ({type(error).__name__}); the same"
                " command goes on"
            ) from error
