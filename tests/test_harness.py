"""What harness answers lm-eval, keeps and shows; lm-eval itself runs in tests/peers/."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_lm import families, harness, measuring, report
from dist_lm.config import Config, ModelConfig, ModelSpec
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import UserError
from dist_lm.evals import FILE, add_evals, read_evals
from dist_lm.measuring import Answers, Wanted, measure
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from tests.conftest import state_of, write_step

BYTES = train_tokenizer("byte", [])
CONTEXT = 12


def model_of(seed: int = 1) -> GPT:
    model = GPT(ModelSpec(ModelConfig(layers=2, heads=2, width=16), BYTES.vocab_size, CONTEXT))
    init_weights(model, seed)
    for parameter in model.parameters():
        parameter.data *= 3
    return model.eval()


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers(model_of(), BYTES, batch_size=3)


def plainly(model: GPT, context: list[int], after: list[int]) -> tuple[float, bool]:
    """Token by token, each from as much of the text before it as the model sees."""
    total = 0.0
    is_greedy = True
    tokens = (context + after)[-(CONTEXT + 1) :]
    for at in range(len(tokens) - min(len(after), len(tokens) - 1), len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:at]]))[0, -1]
        total += float(logits.log_softmax(-1)[tokens[at]])
        is_greedy &= int(logits.argmax()) == tokens[at]
    return total, is_greedy


def test_likelihoods_are_those_of_each_token_alone(answers: Answers) -> None:
    model = answers.model
    greedy = [5, 6]
    for _ in range(3):
        with torch.no_grad():
            greedy.append(int(model(torch.tensor([greedy]))[0, -1].argmax()))
    pairs = [
        ([1, 2, 3], [4]),
        ([1], [2, 3, 4, 5]),
        (list(range(9)), list(range(7))),  # longer than the context
        ([1], list(range(20))),
        (greedy[:2], greedy[2:]),
        ([7] * 3, [8, 9]),
    ]
    found = answers.likelihoods(pairs)
    for (context, after), (value, is_greedy) in zip(pairs, found, strict=True):
        expected, expected_greedy = plainly(model, context, after)
        assert value == pytest.approx(expected, rel=1e-5)
        assert is_greedy == expected_greedy
    assert [is_greedy for _, is_greedy in found] == [False] * 4 + [True, False]


@pytest.mark.parametrize("length", [1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 31])
def test_a_whole_text_has_each_token_once(answers: Answers, length: int) -> None:
    text = "abcdefghijklmnopqrstuvwxyz0123456789"[:length]
    tokens = BYTES.encode(text)
    expected = 0.0
    for at in range(length):
        begin = at - at % CONTEXT
        end = min(begin + CONTEXT, length)
        context = [BYTES.eot, *tokens[:at]] if begin == 0 else tokens[end - CONTEXT - 1 : at]
        expected += plainly(answers.model, context, tokens[at : at + 1])[0]
    short = answers.likelihoods_of_texts(["x", text, ""])
    assert short[1] == pytest.approx(expected, rel=1e-5)
    assert short[2] == 0.0


def test_a_text_goes_on_until_its_end(answers: Answers) -> None:
    whole = answers.go_on("ab", {"max_gen_toks": 8})
    assert answers.go_on("ab", {"max_gen_toks": 8, "temperature": 0.9}) == whole  # do_sample is not
    stop = whole[2:4]
    assert stop and answers.go_on("ab", {"max_gen_toks": 8, "until": [stop, ""]}) == whole[:2]
    assert answers.go_on("z" * 40, {"max_gen_toks": 4, "until": []})


# --- results


def write(run: Path, step: int) -> Path:
    model = model_of(step)
    config = Config(model=model.config).model_dump(mode="json")
    spec = ModelSpec(model.config, BYTES.vocab_size, CONTEXT)
    texts = {
        "config.json": families.config_json(spec, BYTES.eot),
        "state.json": state_of(step, config=config),
    }
    return write_step(run, step, model, texts, BYTES)


class Evaluated:
    """In the place of lm-eval: what it was asked, and figures."""

    def __init__(self, *_: Any) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, _: Any, tasks: list[str]) -> dict[str, Any]:
        self.asked.append(list(tasks))
        figures = {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.1, "f1,strict": 0.5}
        return {"results": dict.fromkeys(tasks, figures), "n-shot": dict.fromkeys(tasks, 2)}


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Evaluated:
    one = Evaluated()
    monkeypatch.setattr(measuring, "_evaluator", lambda wanted: one)
    monkeypatch.setattr(measuring, "_open", lambda folder, wanted: folder)
    monkeypatch.setattr(measuring, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(measuring, "version", lambda: "1.2")
    return one


def test_results_stand_under_their_step(
    evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (3, 5):
        write(tmp_path, step)
    measure(str(tmp_path), Wanted(["a"]))
    measure(str(tmp_path / "step-00000003"), Wanted(["a", "b"]))
    measure(str(tmp_path), Wanted(["b", "a"]))  # a is known
    measure(str(tmp_path), Wanted(["a"], limit=3), as_json=True)
    assert evaluated.asked == [["a"], ["a", "b"], ["b"], ["a"]]
    lines = read_evals(tmp_path)
    assert [(line["step"], line["task"]) for line in lines] == [
        (3, "a"),
        (3, "b"),
        (5, "a"),
        (5, "b"),
        (5, "a"),
    ]
    assert lines[0]["metrics"] == {"acc": 0.25, "acc_stderr": 0.1, "f1,strict": 0.5}
    assert (lines[0]["shots"], lines[0]["lm_eval"], lines[-1]["limit"]) == (2, "1.2", 3)
    output = capsys.readouterr().out.splitlines()
    assert output[0] == "step-00000005  a: acc 0.2500 ± 0.1000, f1,strict 0.5000"
    assert json.loads(output[-1])["results"][0]["metrics"]["acc"] == 0.25
    events = EventAccumulator(str(next(tmp_path.glob("tensorboard/*"))))
    events.Reload()
    assert [event.step for event in events.Scalars("evals/a/acc")] == [5, 3, 5]


def test_a_plain_folder_is_measured_and_nothing_is_written(
    evaluated: Evaluated, tmp_path: Path
) -> None:
    folder = write(tmp_path / "run", 3)
    folder = folder.rename(tmp_path / "plain")
    (folder / "state.json").unlink()
    (folder / "manifest.json").unlink()
    measure(str(folder), Wanted(["a"]))
    assert evaluated.asked == [["a"]] and not (tmp_path / FILE).exists()
    with pytest.raises(UserError, match="is one checkpoint; nearest: its run folder"):
        measure(str(folder), Wanted(["a"]), follow=True)


def test_following_ends_with_the_run(
    evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new checkpoint in its order; also one that is saved just before the end."""
    write(tmp_path, 1)
    outcome = {"class": "preempted", "step": 1, "reason": "", "attempt": 1, "failures": 0}
    (tmp_path / "outcome.json").write_text(json.dumps(outcome))
    (tmp_path / "run.lock").touch()
    turns = []

    def goes_on(_: float) -> None:
        turns.append(len(evaluated.asked))
        assert len(turns) < 10
        if len(turns) == 2:
            write(tmp_path, 2)
        if len(turns) == 3:
            write(tmp_path, 3)
            (tmp_path / "outcome.json").write_text(json.dumps(outcome | {"class": "done"}))

    monkeypatch.setattr(measuring.time, "sleep", goes_on)
    measure(str(tmp_path), Wanted(["a"]), follow=True)
    assert [line["step"] for line in read_evals(tmp_path)] == [1, 2, 3]
    assert len(turns) in (4, 5)


def test_a_step_that_the_run_has_deleted_is_left_out(
    evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, stays = write(tmp_path, 1), write(tmp_path, 2)
    folders = measuring.step_folders(tmp_path)
    monkeypatch.setattr(measuring, "step_folders", lambda _: folders)
    subprocess.run(["rm", "-r", str(gone)], check=True)
    outcome = {"class": "done", "step": 2, "reason": "", "attempt": 1, "failures": 0}
    (tmp_path / "outcome.json").write_text(json.dumps(outcome))
    measure(str(tmp_path), Wanted(["a"]), follow=True)
    assert [line["step"] for line in read_evals(tmp_path)] == [2]
    with open(stays / "model.safetensors", "r+b") as file:
        file.write(b"\x77")
    with pytest.raises(UserError, match="does not match its hash"):
        measure(str(tmp_path), Wanted(["b"]), follow=True)


def test_broken_lines_are_left_out(tmp_path: Path) -> None:
    line = {"step": 1, "task": "a", "metrics": {"acc": 0.5}}
    add_evals(tmp_path, [line])
    with open(tmp_path / FILE, "a") as file:
        file.write('{"step": 2, "task": "a", "metr')
    add_evals(tmp_path, [line | {"step": 3}, line | {"metrics": {"acc": 0.75}}])
    with open(tmp_path / FILE, "a") as file:
        file.write('[]\n{"step": -1, "task": "a", "metrics": {}}\n{"metrics": {"acc": "x"}}\n')
    found = read_evals(tmp_path)
    assert [(line["step"], line["metrics"]["acc"]) for line in found] == [(1, 0.75), (3, 0.5)]
    assert read_evals(tmp_path / "nowhere") == []


def test_report_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    step = {"step": 1, "loss": 4.0, "tokens": 10, "tokens_per_second": 5.0}
    (run / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    add_evals(run, [{"step": 1, "task": "a", "metrics": {"acc_stderr": 0.1, "acc": 0.5}}])
    add_evals(run, [{"step": 2, "task": "b", "metrics": {"f1": 0.75}}])
    report.main([str(run)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["run", "step", "a", "b"] in lines
    assert ["1", "acc", "0.5000", "-"] in lines and ["2", "-", "f1", "0.7500"] in lines
    report.main([str(run), "--json"])
    assert len(json.loads(capsys.readouterr().out)["runs"][0]["evals"]) == 2


def test_without_lm_eval_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r'lm-eval; nearest: pip install "dist_lm\[harness\]"'):
        harness.main(["--ckpt", str(tmp_path), "--tasks", "a"])
    with pytest.raises(UserError, match="names none"):
        harness.main(["--ckpt", str(tmp_path), "--tasks", " ,"])
