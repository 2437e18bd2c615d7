"""What harness does: it gives a checkpoint to lm-eval, once or for each new one of a run.

lm-eval asks a model for three things: how likely a text is after another one, how likely a whole
text is, and how a text goes on. Here these are answered by our own network, so that models without
a family of transformers can be measured too.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lm.checkpoint.folder import locate, step_folders, verify
from dist_lm.checkpoint.load import read_model
from dist_lm.checkpoint.state import read_state
from dist_lm.config import NO_TARGET
from dist_lm.console import notice, printable, say, warn
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import DataError, UserError, in_a_line
from dist_lm.evals import add_evals, read_evals
from dist_lm.model.gpt import GPT
from dist_lm.outcome import read as read_outcome
from dist_lm.sample import Sampling, sample

POLL_SECONDS = 5.0  # between two looks for a new checkpoint; a living run touches its lock in it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How a run has ended that does not go on by itself.
_FINAL = ("done", "config", "data", "checkpoint", "security", "diverged")
_NEW_TOKENS = 256  # where a task does not say how many

Continuation = tuple[list[int], list[int]]  # tokens of the context, and of what follows it


@dataclass(frozen=True)
class Wanted:
    """What is to be measured, and how."""

    tasks: list[str]
    include_path: str | None = None
    shots: int | None = None  # None: as the task has it
    limit: float | None = None
    batch_size: int = 16
    device: str = "auto"
    dtype: str = "fp32"


def measure(name: str, wanted: Wanted, follow: bool = False, as_json: bool = False) -> None:
    """Measure a checkpoint, or each new one of a run until the run ends."""
    evaluate = _evaluator(wanted)
    if not follow:
        folder = locate(name, warn)
        _measure_one(folder, wanted, evaluate, as_json)
        return
    run = Path(name)
    if (run / "config.json").is_file():
        raise UserError(f"--follow with --ckpt={name}: is one checkpoint; nearest: its run folder")
    seen: set[str] = set()
    lock: float | None = -1.0
    while True:
        # Asked for first: a step that is saved before the run ends is seen after it.
        touched = _touched(run)
        has_ended = read_outcome(run).get("class") in _FINAL and touched == lock
        lock = touched
        fresh = [folder for folder in step_folders(run) if folder.name not in seen]
        for folder in fresh:
            seen.add(folder.name)
            try:
                verify(folder)
                _measure_one(folder, wanted, evaluate, as_json)
            except (UserError, OSError) as error:
                if folder.is_dir():  # or else the run has deleted it, as it may
                    raise
                warn(f"{folder.name} is gone before it was measured: {in_a_line(error)}")
        if has_ended and not fresh:
            return
        time.sleep(POLL_SECONDS)


def _touched(run: Path) -> float | None:
    """When a living run last touched its lock, by the clock of its file system."""
    try:
        return (run / "run.lock").stat().st_mtime
    except OSError:
        return None


def _measure_one(
    folder: Path, wanted: Wanted, evaluate: Callable[[Any, Sequence[str]], Any], as_json: bool
) -> None:
    """Measure a checkpoint on the tasks that it was not measured on yet, and keep the results."""
    step = None
    if (folder / "state.json").is_file():
        step = int(read_state(folder)["step"])
    before = read_evals(folder.parent) if step is not None else []
    known = {line["task"] for line in before if _is_same(line, step, wanted)}
    tasks = [task for task in wanted.tasks if task not in known]
    if tasks:
        notice(f"{folder.name}: measuring {', '.join(tasks)}")
        lines = _lines(evaluate(_open(folder, wanted), tasks), step or 0, wanted)
        if step is not None:
            add_evals(folder.parent, lines)
            _tell_tensorboard(folder.parent, read_state(folder), lines)
        before = [*before, *lines]
    shown = [line for line in before if step is None or _is_same(line, step, wanted)]
    _show(folder, shown, as_json)


def _is_same(line: dict[str, Any], step: int | None, wanted: Wanted) -> bool:
    """Whether a line of evals.jsonl is of this step, measured in this way."""
    shots = wanted.shots if wanted.shots is not None else line.get("shots", 0)
    is_same_way = line.get("shots", 0) == shots and line.get("limit", 0) == (wanted.limit or 0)
    return line["step"] == step and is_same_way and line.get("dtype") == wanted.dtype


def _lines(results: dict[str, Any], step: int, wanted: Wanted) -> list[dict[str, Any]]:
    """Lines of evals.jsonl from what lm-eval returns."""
    lines = []
    for task, found in results["results"].items():
        metrics = {}
        for name, value in found.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                metrics[_metric(name)] = float(value)
        metrics.pop("sample_len", None)
        line = {"step": step, "task": task, "shots": int(results["n-shot"].get(task, 0))}
        if wanted.limit:
            line["limit"] = wanted.limit
        more = {"dtype": wanted.dtype, "lm_eval": version(), "time": time.time()}
        lines.append({**line, "metrics": metrics, **more})
    return lines


def version() -> str:
    """Of lm-eval."""
    import lm_eval  # optional

    return str(lm_eval.__version__)


def _metric(name: str) -> str:
    """acc_stderr,none as acc_stderr: "none" is the filter of tasks that have no other."""
    return name.removesuffix(",none")


def _show(folder: Path, lines: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        say(json.dumps({"checkpoint": str(folder), "results": lines}))
        return
    for line in lines:
        figures = []
        for name, value in line["metrics"].items():
            if not name.endswith("_stderr"):
                error = line["metrics"].get(f"{name}_stderr")
                figures.append(f"{name} {value:.4f}" + (f" ± {error:.4f}" if error else ""))
        say(printable(f"{folder.name}  {line['task']}: {', '.join(figures)}"))


def _tell_tensorboard(run: Path, state: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Write the figures under the step of the checkpoint, if the run has TensorBoard."""
    if "tensorboard" not in state["config"].get("run", {}).get("trackers", []):
        return
    from torch.utils.tensorboard import SummaryWriter  # slow

    try:
        # Accelerate puts what a run tells into a folder of the run's name.
        with SummaryWriter(run / "tensorboard" / f"{run.resolve().name}-evals") as writer:
            for line in lines:
                for name, value in line["metrics"].items():
                    writer.add_scalar(f"evals/{line['task']}/{name}", value, line["step"])
    except Exception as error:  # a tracker never stops what it looks at
        warn(f"TensorBoard did not get the results: {in_a_line(error)}")


# --- lm-eval


def _evaluator(wanted: Wanted) -> Callable[[Any, Sequence[str]], Any]:
    """Runs lm-eval's tasks on one of its models. The tasks are looked up once."""
    try:
        from lm_eval import simple_evaluate  # optional
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            'harness needs the package lm-eval; nearest: pip install "dist_lm[harness]"'
        ) from error
    if wanted.include_path and not Path(wanted.include_path).is_dir():
        raise UserError(f"--include_path={wanted.include_path}: no such folder")
    manager = None
    unknown = wanted.tasks
    if wanted.include_path:  # looking through lm-eval's own thousands of tasks takes seconds
        manager = TaskManager(include_path=wanted.include_path, include_defaults=False)
        unknown = [task for task in wanted.tasks if not manager.match_tasks([task])]
    if unknown:
        manager = TaskManager(include_path=wanted.include_path)
        unknown = [task for task in wanted.tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"--tasks: lm-eval has no task {', '.join(unknown)}; rule: a name that"
            " `lm-eval ls tasks` lists, or of a file in --include_path"
        )

    def evaluate(model: Any, tasks: Sequence[str]) -> Any:
        try:
            return simple_evaluate(
                model=model,
                tasks=list(tasks),
                num_fewshot=wanted.shots,
                limit=wanted.limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except UserError:
            raise
        except Exception as error:  # of a task's own code, of the data that it loads
            raise DataError(f"--tasks={','.join(tasks)}: {in_a_line(error)}") from error

    return evaluate


def _open(folder: Path, wanted: Wanted) -> Any:
    """The checkpoint as a model of lm-eval."""
    from lm_eval.api.model import TemplateLM  # optional

    has_cuda = torch.cuda.is_available()
    if wanted.device == "cuda" and not has_cuda:
        raise UserError("--device cuda: no CUDA device is visible to torch; nearest: --device cpu")
    model, tokenizer, _ = read_model(str(folder))
    device = "cuda" if has_cuda and wanted.device != "cpu" else "cpu"
    model.to(device, DTYPES[wanted.dtype])
    answers = Answers(model, tokenizer, wanted.batch_size)

    class Checkpoint(TemplateLM):  # type: ignore[misc]
        """lm-eval splits a text into context and continuation; the rest is in Answers."""

        eot_token_id = tokenizer.eot

        def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
            return tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return answers.likelihoods([(context, after) for _, context, after in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return answers.likelihoods_of_texts([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [answers.go_on(*request.args) for request in requests]

    return Checkpoint()


class Answers:
    """What lm-eval asks of a model."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int):
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.device = model.embed.weight.device

    @torch.inference_mode()
    def likelihoods(self, pairs: Sequence[Continuation]) -> list[tuple[float, bool]]:
        """Of each continuation its log-likelihood, and whether it is what greedy decoding gives.

        Pairs of like length are read together. What is longer than the context of the model loses
        its beginning.
        """
        order = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
        found: dict[int, tuple[float, bool]] = {}
        for begin in range(0, len(order), self.batch_size):
            numbers = order[begin : begin + self.batch_size]
            batch = [pairs[number] for number in numbers]
            found.update(zip(numbers, self._likelihoods_of_batch(batch), strict=True))
        return [found[number] for number in range(len(pairs))]

    def _likelihoods_of_batch(self, batch: Sequence[Continuation]) -> list[tuple[float, bool]]:
        rows = [(context + after)[-(self.model.seq_len + 1) :] for context, after in batch]
        longest = max(len(row) for row in rows) - 1
        tokens_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        targets_BT = torch.full((len(rows), longest), NO_TARGET)
        for number, (row, (_, after)) in enumerate(zip(rows, batch, strict=True)):
            tokens_BT[number, : len(row) - 1] = torch.tensor(row[:-1])
            first = len(row) - 1 - min(len(after), len(row) - 1)
            targets_BT[number, first : len(row) - 1] = torch.tensor(row[first + 1 :])
        logits_BTV = self.model(tokens_BT.to(self.device))
        return _sum_up(logits_BTV, targets_BT.to(self.device))

    def likelihoods_of_texts(self, texts: Sequence[str]) -> list[float]:
        """Of each whole text, cut into windows of the context, each token predicted once."""
        pairs = []
        counts = []
        for text in texts:
            windows = self._windows(self.tokenizer.encode(text))
            pairs += windows
            counts.append(len(windows))
        values = iter(self.likelihoods(pairs))
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def _windows(self, tokens: list[int]) -> list[Continuation]:
        """Windows as lm-eval cuts them: the last one reaches back, to be full."""
        length = self.model.seq_len
        windows: list[Continuation] = []
        for begin in range(0, len(tokens), length):
            end = min(begin + length, len(tokens))
            context = tokens[max(end - length - 1, 0) : begin] or [self.tokenizer.eot]
            windows.append((context, tokens[begin:end]))
        return windows

    def go_on(self, text: str, asked: dict[str, Any]) -> str:
        """How a text goes on, up to one of the texts that the task ends with."""
        until = asked.get("until") or []
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        most = next((int(asked[name]) for name in names if asked.get(name)), _NEW_TOKENS)
        most = min(most, self.model.seq_len - 1)
        temperature = float(asked.get("temperature") or 0.0) if asked.get("do_sample") else 0.0
        stop = tuple([until] if isinstance(until, str) else until)
        settings = Sampling(most, temperature, stop=tuple(one for one in stop if one))
        tokens = self.tokenizer.encode(text)[-(self.model.seq_len - most) :]
        *_, rows = sample(self.model, self.tokenizer, [tokens], settings, [0])
        return rows[0].text


def _sum_up(logits_BTV: Tensor, targets_BT: Tensor) -> list[tuple[float, bool]]:
    """Sums over the targets of each row, and whether all of them are the likeliest tokens."""
    is_target_BT = targets_BT != NO_TARGET
    wanted_BT = targets_BT.clamp(min=0)
    logprobs_BT = logits_BTV.log_softmax(-1).gather(-1, wanted_BT[..., None])[..., 0]
    sums_B = (logprobs_BT.double() * is_target_BT).sum(-1)
    is_greedy_B = ((logits_BTV.argmax(-1) == wanted_BT) | ~is_target_BT).all(-1)
    return list(zip(sums_B.tolist(), is_greedy_B.tolist(), strict=True))
