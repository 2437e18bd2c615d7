"""Tools of others on our checkpoints, with the packages from PyPI: lm-eval, TRL and peft.

.ci/run gives them an environment of their own: `.venv-peers/bin/python -m pytest -m peers tests/peers`.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_lm import harness, report
from dist_lm.checkpoint.load import read_model
from dist_lm.cli import load
from dist_lm.evals import read_evals
from dist_lm.outcome import TRAIN
from tests.conftest import text_of
from tests.procs import ROOT, clean_env

# Their warnings are theirs.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]

FLAGS = (
    "--model.layers 2 --model.heads 2 --model.width 32 --model.qk_norm true --data.seq_len 64"
    " --data.global_batch 8 --data.tokenizer bpe:300 --optim.lr 3e-3 --optim.warmup_steps 5"
    " --run.steps 30 --run.save_every 15 --run.keep_last 9 --run.eval_every 0"
).split()
STEP = "runs/mine/step-00001000"  # in the recipes
QUESTIONS = [
    {"question": f"the {animal} sees the", "choices": [" dog and runs", " tree"], "answer": answer}
    for animal, answer in (("cat", 0), ("bird", 1), ("old dog", 0), ("big red cat", 1))
]


def start_training(run: Path, text: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "dist_lm/train.py", "--run.dir", str(run), *FLAGS]
    words += ["--data.input", str(text), "--data.separator", "\n\n"]
    return subprocess.Popen(words, cwd=ROOT, env=clean_env(PYTHONPATH=str(ROOT)))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of lm-eval with local data: multiple choice, perplexity, generated answers."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    texts = [{"text": text_of(3, seed=seed)} for seed in range(4)] + [{"text": "a"}]
    (folder / "texts.json").write_text("\n".join(map(json.dumps, texts)))
    common: dict[str, Any] = {"dataset_path": "json", "test_split": "test"}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    perplexity = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    answer = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": " cat",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, data, task in (
        ("our_choice", "questions", choice),
        ("our_perplexity", "texts", perplexity),
        ("our_answer", "questions", answer),
    ):
        files = {"data_files": {"test": str(folder / f"{data}.json")}}
        content = common | task | {"task": name, "dataset_kwargs": files}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def run(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose checkpoints were measured while it trained."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "text.txt").write_text(text_of(300))
    training = start_training(folder / "run", folder / "text.txt")
    try:
        follow(folder / "run", tasks)
        assert training.wait(200) == 0
    finally:
        training.kill()
    yield folder / "run"


def follow(run: Path, tasks: Path) -> None:
    harness.main(
        [
            *("--ckpt", str(run), "--tasks", "our_choice,our_perplexity", "--follow"),
            *("--include_path", str(tasks), "--batch_size", "3"),
        ]
    )


def test_each_checkpoint_is_measured_while_the_run_goes_on(
    run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [(line["step"], line["task"]) for line in read_evals(run)]
    assert found == [(step, task) for step in (15, 30) for task in ("our_choice", "our_perplexity")]
    begun = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["time"]
    assert all(line["time"] > begun for line in read_evals(run))
    perplexity = [
        line["metrics"]["word_perplexity"]
        for line in read_evals(run)
        if line["task"] == "our_perplexity"
    ]
    assert perplexity[1] < perplexity[0]  # it has learned
    report.main([str(run)])
    output = capsys.readouterr().out
    assert re.search(r"run step +our_choice +our_perplexity", output)
    before = (run / "evals.jsonl").read_bytes()
    follow(run, tasks)  # ends at once, and measures nothing again
    assert (run / "evals.jsonl").read_bytes() == before


def test_the_figures_are_those_of_lm_eval_s_own_model(run: Path, tasks: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = ["our_choice", "our_perplexity", "our_answer"]
    step = run / "step-00000030"
    harness.main(["--ckpt", str(step), "--tasks", "our_answer", "--include_path", str(tasks)])
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(step), "dtype": "float32"},
        tasks=names,
        device="cpu",
        batch_size=2,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=False,
        bootstrap_iters=1000,
    )
    assert theirs is not None
    ours = {line["task"]: line["metrics"] for line in read_evals(run) if line["step"] == 30}
    assert sorted(ours) == sorted(names)
    for task, figures in ours.items():
        for metric, value in figures.items():
            found = theirs["results"][task][f"{metric},none"]
            assert value == pytest.approx(found, rel=1e-5), (task, metric)
    assert ours["our_perplexity"]["word_perplexity"] > 1
    assert 0 <= ours["our_choice"]["acc"] <= 1


def recipe(number: int, run: Path, folder: Path) -> dict[str, Any]:
    """Run a Python block of the guide on the checkpoint; its names afterwards."""
    text = (ROOT / "docs/handover.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number]
    assert STEP in code
    code = code.replace(STEP, str(run / "step-00000030")).replace('"runs/', f'"{folder}/')
    scope: dict[str, Any] = {"lines": text_of(64, seed=9).split("\n\n")}
    exec(code, scope)
    return scope


def assert_it_is_taken_back(folder: Path) -> None:
    """By generate and init_from."""
    model, _, _ = read_model(str(folder))
    assert model.config.qk_norm
    config, _ = load(("--run.init_from", str(folder)), TRAIN)
    assert (config.model.layers, config.data.seq_len) == (2, 64)


def test_trl_trains_on(run: Path, tmp_path: Path) -> None:
    scope = recipe(0, run, tmp_path)
    losses = [line["loss"] for line in scope["trainer"].state.log_history if "loss" in line]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.1
    assert_it_is_taken_back(tmp_path / "sft/final")


def test_peft_trains_small_matrices(run: Path, tmp_path: Path) -> None:
    scope = recipe(1, run, tmp_path)
    assert scope["losses"][-1] < scope["losses"][0] - 0.1
    assert_it_is_taken_back(tmp_path / "lora")
