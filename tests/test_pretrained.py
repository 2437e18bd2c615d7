"""A run takes over shape, context and tokenizer of the model that it starts from, or refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lm import families
from dist_lm.cli import load
from dist_lm.config import Config, DataConfig, ModelConfig, ModelSpec
from dist_lm.data.agreement import refuse_other_tokenizers
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import UserError
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.outcome import TRAIN
from tests.conftest import NO_RUN, text_of, write_step
from tests.procs import train
from tests.test_train import losses, tiny

BPE = train_tokenizer("bpe:300", [text_of(20)])


def settings(*argv: str) -> Config:
    where = () if "--run.dir" in argv else ("--run.dir", NO_RUN)
    config, _ = load((*argv, *where), TRAIN)
    return config


def write_run(folder: Path, steps: tuple[int, ...] = (2,), **model: Any) -> Path:
    """A run of ours with a context of 32 and its own BPE."""
    shape = ModelConfig(**({"layers": 3, "heads": 2, "width": 32} | model))
    spec = ModelSpec(shape, BPE.vocab_size, 32)
    network = GPT(spec)
    init_weights(network, 1)
    config = Config(model=shape, data=DataConfig(seq_len=32))
    for step in steps:
        texts = {
            "config.json": families.config_json(spec, BPE.eot),
            "state.json": {"step": step, "config": config.model_dump(mode="json")},
        }
        write_step(folder, step, network, texts, BPE)
    return folder


def write_gpt2(folder: Path) -> Path:
    """A folder as transformers saves it, with a context of 48."""
    import transformers  # slow

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=BPE.vocab_size, n_positions=48, n_embd=32, n_layer=2, n_head=4
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    BPE.save(folder)
    return folder


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        settings(*argv)
    return str(caught.value)


# --- taking along


def test_a_run_brings_shape_context_and_tokenizer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "base", (2, 10))
    config = settings("--run.init_from", str(run), "--run.dir", str(tmp_path / "new"))
    assert config.model == ModelConfig(layers=3, heads=2, width=32)
    assert config.data.seq_len == config.data.stride == 32
    assert config.data.tokenizer == str(run)
    assert load_tokenizer(str(run)).sha256 == BPE.sha256
    step = settings("--run.init_from", str(run / "step-00000002"))
    assert step.model == config.model
    assert step.data.tokenizer == str(run / "step-00000002")


def test_a_transformers_folder_brings_them_too(tmp_path: Path) -> None:
    config = settings("--run.init_from", str(write_gpt2(tmp_path / "gpt2")))
    assert config.model.positions == "learned"
    assert (config.model.layers, config.model.heads, config.model.width) == (2, 4, 32)
    assert config.data.seq_len == 48
    assert config.data.tokenizer == str(tmp_path / "gpt2")


def test_a_run_brings_what_its_config_json_cannot_say(tmp_path: Path) -> None:
    """Sinusoidal positions are written for transformers as a table that looks learned."""
    sinusoidal = {"positions": "sinusoidal", "norm": "layernorm", "activation": "gelu"}
    run = write_run(tmp_path / "base", **sinusoidal)
    in_file = json.loads((run / "step-00000002/config.json").read_text())
    assert families.from_config_json(in_file).config.positions == "learned"
    assert settings("--run.init_from", str(run)).model.positions == "sinusoidal"


def test_what_trained_weights_do_not_decide_stays_free(tmp_path: Path) -> None:
    run = write_run(tmp_path / "base", dropout=0.1)
    assert settings("--run.init_from", str(run)).model.dropout == 0
    config = settings(
        *("--run.init_from", str(run), "--model.dropout", "0.2", "--data.seq_len", "16"),
        *("--model.layers", "3", "--data.tokenizer", str(run / "step-00000002")),
    )
    assert (config.model.dropout, config.data.seq_len, config.model.layers) == (0.2, 16, 3)


def test_a_run_that_has_steps_needs_the_other_folder_no_more(tmp_path: Path) -> None:
    run = write_run(tmp_path / "new", (4,), width=64)
    flags = ("--run.init_from", str(tmp_path / "gone"), "--run.dir", str(run))
    assert settings(*flags).model.width == 64
    assert settings(*flags).data.tokenizer == str(tmp_path / "gone")
    assert "no such folder" in refusal(*flags, "--run.resume", "never")


# --- refusing


def test_all_disagreements_come_in_one_message(tmp_path: Path) -> None:
    folder = write_gpt2(tmp_path / "gpt2")
    (tmp_path / "my.yaml").write_text("model: {layers: 5, bias: true}\ndata: {tokenizer: byte}\n")
    message = refusal(
        *("--config", str(tmp_path / "my.yaml"), "--run.init_from", str(folder)),
        *("--model.width", "64", "--data.seq_len", "64", "--data.input", "nowhere.txt"),
    )
    assert message == (
        f"run.init_from={folder} is another model than these settings ask for: model.layers=5"
        " (there 2), model.width=64 (there 32), data.seq_len=64 (there at most 48, its positions"
        " are learned), data.tokenizer=byte (there another one of 300 tokens); rule: they come"
        " along from it; nearest: leave them out"
    )


def test_another_tokenizer_file_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "base")
    train_tokenizer("bpe:300", [text_of(20, seed=5)[::-1]]).save(tmp_path)
    message = refusal("--run.init_from", str(run), "--data.tokenizer", str(tmp_path))
    assert f"data.tokenizer={tmp_path} (there another one of 300 tokens)" in message


@pytest.mark.parametrize("config_json", ["", "[]", "{}", '{"model_type": "bert"}', "{" * 100_000])
def test_a_damaged_folder_is_refused_in_one_line(config_json: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config_json)
    assert re.fullmatch(r".*config\.json.*", refusal("--run.init_from", str(tmp_path)))


def test_a_state_without_a_model_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "base")
    (run / "step-00000002/state.json").write_text('{"config": {"model": {"layers": "many"}}}')
    assert refusal("--run.init_from", str(run)).endswith("its config has no model of ours")


def prepare(folder: Path, tokenizer: str) -> Path:
    folder.mkdir()
    (folder / "text.txt").write_text(text_of(120))
    data = DataConfig(input=str(folder / "text.txt"), separator="\n\n", tokenizer=tokenizer)
    prepare_dataset(data, folder / "shards", 1, lambda _: None)
    return folder / "shards"


def test_inputs_of_another_tokenizer_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    run = write_run(tmp_path / "base")
    flags = ("--run.init_from", str(run), "--run.dir", str(tmp_path / "new"))
    shards = prepare(tmp_path / "bytes", "byte")
    with pytest.raises(UserError, match=rf"\(300 tokens\) than data.input={shards} has \(257\)"):
        refuse_other_tokenizers(settings(*flags, "--data.input", str(shards)))
    text = ("--data.input", str(tmp_path / "bytes/text.txt"))
    for tokenizer in ("bpe:300", "char"):
        config = settings(*flags, *text, "--data.tokenizer", tokenizer)
        with pytest.raises(UserError, match=f"^data.tokenizer={tokenizer} would be made from the"):
            refuse_other_tokenizers(config)
    refuse_other_tokenizers(settings(*flags, *text))
    ours = prepare(tmp_path / "ours", str(run))
    assert Tokenizer.load(ours).sha256 == BPE.sha256
    refuse_other_tokenizers(settings(*flags, "--data.input", str(ours)))
    # Training on what is prepared uses its tokenizer, so a recipe may still say how it was made.
    named = settings(*flags, "--data.input", str(ours), "--data.tokenizer", "bpe:300")
    refuse_other_tokenizers(named)


def test_a_network_with_more_tokens_than_its_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_gpt2(tmp_path / "gpt2")
    train_tokenizer("byte", []).save(folder)
    config = settings("--run.init_from", str(folder))
    with pytest.raises(UserError, match="has 300 tokens in its config.json and 257 in its token"):
        refuse_other_tokenizers(config)


# --- in real processes


def test_a_refused_start_leaves_nothing_behind(tmp_path: Path) -> None:
    shards = prepare(tmp_path / "bytes", "byte")
    run = write_run(tmp_path / "base")
    flags = ("--run.init_from", str(run), "--run.trackers", "--data.input")
    output = train(tmp_path / "a", *flags, str(shards), code=2)
    assert "was trained with another tokenizer (300 tokens)" in output
    text = str(tmp_path / "bytes/text.txt")
    output = train(tmp_path / "b", *flags, text, "--data.tokenizer", "char", code=2)
    assert "data.tokenizer=char would be made from the new text" in output
    assert not (tmp_path / "a/data").exists()
    assert not (tmp_path / "b/data").exists()


def test_the_recipe_takes_any_model(tmp_path: Path) -> None:
    for folder in (write_run(tmp_path / "base"), write_gpt2(tmp_path / "gpt2")):
        config = settings("--config", "finetune", "--run.init_from", str(folder))
        assert config.data.tokenizer == str(folder)
        assert (config.run.epochs, config.run.steps) == (3, None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "transformers"])
def test_fine_tuning_on_own_text_at_the_first_start(kind: str, tmp_path: Path) -> None:
    """No setting of the model is given, and a resumed run needs the other folder no more."""
    (tmp_path / "mine.txt").write_text(text_of(150, seed=3))
    write = write_run if kind == "run" else write_gpt2
    model = write(tmp_path / "base")
    flags = [
        *("--data.input", str(tmp_path / "mine.txt"), "--run.init_from", str(model)),
        *"--data.global_batch 8 --run.steps 4 --run.eval_every 0 --run.trackers".split(),
    ]
    train(tmp_path / "new", *flags, world=2)
    (step,) = (tmp_path / "new").glob("step-*")
    theirs = model / "step-00000002" if kind == "run" else model
    assert (step / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()
    # Again from the new run, which is gone by the next start of this one.
    flags[3] = str(tmp_path / "new")
    train(tmp_path / "second", *flags, "--run.stop_after", "2", "--run.save_every", "1")
    (tmp_path / "new").rename(tmp_path / "gone")
    output = train(tmp_path / "second", *flags)
    assert "resuming step-00000002" in output
    assert len(losses(tmp_path / "second")) == 4


@pytest.mark.slow
def test_a_longer_context(tmp_path: Path, prepared: Path) -> None:
    """Rotary positions go on beyond the context that the weights were trained with."""
    train(tmp_path / "short", *tiny(prepared, "--run.steps", "30"))
    flags = [
        *("--data.input", str(prepared), "--run.init_from", str(tmp_path / "short")),
        *"--data.seq_len 128 --model.rope_theta 40000 --data.global_batch 2 --run.steps 2".split(),
        *"--run.eval_every 0 --run.trackers".split(),
    ]
    train(tmp_path / "long", *flags)
    first = losses(tmp_path / "long")[0]["loss"]
    assert first < losses(tmp_path / "short")[0]["loss"] - 0.5
    described = json.loads((tmp_path / "long/step-00000002/config.json").read_text())
    assert described["max_position_embeddings"] == 128
