"""score.py: the same number as training's own evaluation, on its text and on any other."""

import contextlib
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_lm import families, scoring
from dist_lm.checkpoint.load import read_model
from dist_lm.config import (
    Config,
    DataConfig,
    ModelConfig,
    ModelSpec,
    RunConfig,
    SourceConfig,
    batch_layout,
)
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import UserError
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.score import main
from dist_lm.validate import validate
from tests.conftest import TINY, state_of, text_of, write_step
from tests.procs import entry, train

ONE_PROCESS = SimpleNamespace(
    rank=0,
    world_size=1,
    is_main=True,
    device=torch.device("cpu"),
    engine=SimpleNamespace(autocast=contextlib.nullcontext, addend=lambda loss: loss),
    sum=lambda tensor: tensor,
    refusal=None,
    refuse_together=lambda are_refusing: None,
    on_main=lambda work: work(),
    close=lambda: None,
)


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on `prepared` with one checkpoint, of an untrained model."""
    return write_run(tmp_path_factory.mktemp("run"), prepared)


def write_run(folder: Path, prepared: Path, **of_data: Any) -> Path:
    # Raw text is encoded with the checkpoint's own tokenizer, whatever the run's settings made it
    # from.
    data = DataConfig(
        tokenizer="bpe:300",
        seq_len=32,
        global_batch=8,
        workers=0,
        **(of_data or {"input": str(prepared)}),
    )
    config = Config(
        model=ModelConfig(layers=1, heads=2, width=16),
        data=data,
        run=RunConfig(steps=3, eval_batches=2),
    )
    tokenizer = Tokenizer.load(prepared)
    model = GPT(ModelSpec(config.model, tokenizer.vocab_size, data.seq_len))
    init_weights(model, seed=1)
    texts = {
        "config.json": families.config_json(
            ModelSpec(config.model, tokenizer.vocab_size, data.seq_len), tokenizer.eot
        ),
        "state.json": state_of(3, config=config.model_dump(mode="json")),
    }
    write_step(folder, 3, model, texts, tokenizer)
    return folder


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the start of a real runtime, which takes seconds and changes this process."""
    monkeypatch.setattr(scoring, "start", lambda config: ONE_PROCESS)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.chdir(tmp_path)


def expected(run: Path, shards: TokenShards, **data: int) -> dict[str, float]:
    model, tokenizer, _ = read_model(str(run))
    config = Config(
        data=DataConfig(**{"seq_len": 32, "global_batch": 8, **data}), run=RunConfig(eval_batches=2)
    )
    return validate(ONE_PROCESS, model, shards, config, batch_layout(config, 1), tokenizer)


def figures(printed: str) -> dict[str, float]:
    return {
        name: float(value) for name, value in (line.split() for line in printed.splitlines()[-3:])
    }


def test_the_runs_own_text(run, prepared, capsys):
    main(["--ckpt", str(run)])
    printed = capsys.readouterr().out
    assert figures(printed) == expected(run, TokenShards(prepared, "val"))  # to the last bit
    count = sum(TokenShards(prepared, "val").counts(32, 32))
    assert printed.splitlines()[0] == (
        f"{run}/step-00000003: 16 of {count} sequences of 32 tokens, the held-out part of"
        f" {prepared}"
    )


def test_several_validation_sets_are_scored_by_name(prepared, run, tmp_path, capsys):
    """In the order of training, whose first one decides which checkpoint is the best."""
    for name in ("b", "c"):
        shutil.copytree(prepared, tmp_path / name)
    sources = {"c": SourceConfig(input="c"), "a": SourceConfig(input=str(prepared))}
    validation = {"b": SourceConfig(input="b")}
    write_run(tmp_path / "RUN", prepared, sources=sources, validation=validation)
    main(["--ckpt", "RUN", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] == "RUN/step-00000003"
    assert [(of["name"], of["decides"], of["input"]) for of in found["sets"]] == [
        ("b", True, "b"),
        ("c", False, "c"),
        ("a", False, str(prepared)),
    ]
    whole = expected(run, TokenShards(prepared, "val"))
    assert [of["figures"] for of in found["sets"]] == [whole] * 3
    main(["--ckpt", "RUN"])
    heads = capsys.readouterr().out.splitlines()[::4]
    assert heads[0].startswith("RUN/step-00000003: b: 16 of ")
    assert [head.endswith("decides which checkpoint is the best") for head in heads] == [
        True,
        False,
        False,
    ]


def test_settings_of_the_evaluation(run, prepared, capsys):
    main(["--ckpt", str(run / "step-00000003"), "--data.seq-len", "16", "--data.micro_batch", "3"])
    assert figures(capsys.readouterr().out) == expected(
        run, TokenShards(prepared, "val"), seq_len=16, micro_batch=3
    )


def test_raw_text_is_split_as_training_would(run, prepared, capsys, tmp_path):
    (tmp_path / "text.txt").write_text(text_of(300))  # what `prepared` was made of
    main(["--ckpt", str(run), "--data.input", "text.txt", "--data.separator", "\n\n"])
    assert figures(capsys.readouterr().out) == expected(run, TokenShards(prepared, "val"))
    main(
        [
            "--ckpt",
            str(run),
            "--data.input",
            "text.txt",
            "--data.separator",
            "\n\n",
            "--data.val_fraction",
            "0",
        ]
    )
    printed = capsys.readouterr().out
    assert " tokens, all of text.txt\n" in printed
    assert figures(printed) != expected(run, TokenShards(prepared, "val"))


def test_json_is_all_that_is_printed_as_the_result(run, capsys, tmp_path):
    """Also where text is prepared on the way: what is said of that goes to standard error."""
    (tmp_path / "text.txt").write_text("a line of text\n" * 500)
    main(["--ckpt", str(run), "--data.input", "text.txt", "--json"])
    printed = capsys.readouterr()
    (of_text,) = json.loads(printed.out)["sets"]
    assert (of_text["input"], of_text["name"]) == ("text.txt", "")
    assert "found 1 document, 7,500 bytes of text in text.txt\n" in printed.err


def test_a_folder_that_is_not_ours_needs_a_text(run, prepared, capsys, tmp_path):
    hf_folder = tmp_path / "hf"
    hf_folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (hf_folder / name).write_bytes((run / "step-00000003" / name).read_bytes())
    with pytest.raises(
        UserError,
        match=r"^--data\.input must be given: .*/hf does not say what text it was trained on$",
    ):
        main(["--ckpt", str(hf_folder)])
    main(
        [
            "--ckpt",
            str(hf_folder),
            "--data.input",
            str(prepared),
            "--data.global_batch",
            "8",
            "--run.eval_batches",
            "2",
        ]
    )
    assert figures(capsys.readouterr().out) == expected(run, TokenShards(prepared, "val"))


def test_another_tokenizer_is_refused(run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(text_of(300))
    entry_arguments = ["--input", "text.txt", "--tokenizer", "char", "--output", "chars"]
    from dist_lm.prepare import main as prepare

    prepare(entry_arguments)
    with pytest.raises(
        UserError,
        match=r"^data\.input=chars was prepared with another tokenizer than .*-00000003's$",
    ):
        main(["--ckpt", str(run), "--data.input", "chars"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--data.input x",
            "--ckpt must be given once: a run folder, .* or a folder in transformers' layout",
        ),
        (
            "--ckpt RUN --model.width 8",
            r"--model\.width: score takes it from --ckpt; rule: data\.\*, run\.precision,"
            r" run\.eval_batches",
        ),
        (
            "--ckpt RUN --data.tokenizer byte",
            r"--data\.tokenizer: score takes it from --ckpt; rule: .*",
        ),
        ("--ckpt RUN --ckp x", r"unknown flag --ckp; did you mean --ckpt\?"),
        ("--run RUN", r"unknown flag --run; did you mean --ckpt\?"),
        (
            "--ckpt RUN --data.seq_len 64",
            r"data\.seq_len=64 exceeds the context of .*-00000003; nearest: 32",
        ),
        ("--ckpt /no/where", r"/no/where: no such folder; rule: .*"),
    ],
)
def test_errors(run, arguments, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        main(arguments.replace("RUN", str(run)).split())


def test_too_little_text_is_held_out(run, tmp_path):
    (tmp_path / "short.txt").write_text("a line of text\n" * 20)
    message = (
        r"^data\.seq_len=32 needs 33 tokens in one shard, what is held out of .*=short\.txt has 31;"
        r" nearest: 30$"
    )
    with pytest.raises(UserError, match=message):
        main(["--ckpt", str(run), "--data.input", "short.txt"])


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "python -m dist_lm.score --ckpt" in capsys.readouterr().out


@pytest.mark.slow
def test_the_number_that_training_printed(prepared, tmp_path):
    flags = dict(zip(TINY[::2], TINY[1::2], strict=True)) | {
        "--run.eval_every": "12",
        "--run.eval_batches": "3",
    }
    train(
        tmp_path / "run",
        "--data.input",
        str(prepared),
        *(word for pair in flags.items() for word in pair),
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    evaluation = [line for line in lines if "val_loss" in line][-1]
    for name, value in figures(entry("score", "--ckpt", str(tmp_path / "run"))).items():
        assert f'"{name}": {value!r}' in evaluation
