"""Config: precedence, every error as one line with the rule and the nearest good value, the plan."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.cli import help_text, load, read_yaml, resolve
from dist_lm.config import FIELDS, FREE_ON_RESUME, Config, ModelConfig, batch_layout
from dist_lm.errors import UserError
from tests.procs import ROOT, train

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def settings(*argv: str, **flags: str) -> Config:
    return load(argv, flags, "test")[0]


def test_fields() -> None:
    """All settings of the product. A new one must earn its place here."""
    expected = """
    model.layers model.heads model.kv_heads model.width model.ffn_width model.positions model.norm model.norm_placement
    model.activation model.bias model.qk_norm model.dropout model.tie_embeddings model.init model.norm_eps
    model.rope_theta
    data.input data.sources data.stages data.validation data.stream data.lanes data.packing data.bad_rows data.cache_gb
    data.text_column data.separator data.tokenizer data.val_fraction data.seq_len data.stride
    data.document_mask data.global_batch data.micro_batch data.workers
    optim.name optim.lr optim.min_lr optim.warmup_steps optim.schedule optim.betas optim.eps optim.weight_decay optim.clip
    run.dir run.steps run.epochs run.seed run.precision run.compile run.activation_checkpointing run.ema run.eval_every
    run.eval_batches run.save_every run.keep_last run.keep_every run.resume run.init_from run.stop_after
    run.timeout_seconds run.log_batch_hash run.profile_steps run.trackers run.sample_prompt
    """
    assert set(expected.split()) == set(FIELDS)


def test_every_field_is_read_by_code() -> None:
    code = "".join(p.read_text() for p in (ROOT / "dist_lm").rglob("*.py") if p.name != "config.py")
    unread = [name for name in FIELDS if f".{name.split('.')[1]}" not in code]
    assert unread == []


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {layers: 6, width: 256}\noptim: {lr: 1e-4}\n")
    config = settings("--config", str(file), "--model.layers", "8", "--run.log-batch-hash", "true")
    assert (config.model.layers, config.model.width, config.model.heads) == (8, 256, 4)
    assert config.optim.lr == 1e-4  # YAML 1.1 would read a string here
    assert config.run.log_batch_hash is True


def test_unset_fields_follow_the_last_level(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {heads: 8}\n")
    config = settings("--config", str(file), "--model.heads", "2", "--model.width", "64")
    assert (config.model.kv_heads, config.model.ffn_width, config.data.stride) == (2, 192, 256)
    assert ModelConfig(width=64, heads=2, activation="gelu").ffn_width == 256


def test_steps_or_epochs_the_later_level_stands(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("run: {epochs: 3}\n")
    assert settings("--config", str(file)).run.model_dump(include={"steps", "epochs"}) == {
        "steps": None,
        "epochs": 3,
    }
    config = settings("--config", str(file), "--run.steps", "7")
    assert (config.run.steps, config.run.epochs) == (7, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model.layerz 3", "unknown flag --model.layerz; did you mean --model.layers?"),
        ("--layers 4", "unknown flag --layers; did you mean --model.layers?"),
        ("--optim.dropout 0.1", "unknown flag --optim.dropout; did you mean --model.dropout?"),
        ("--cofig x", "unknown flag --cofig; did you mean --config?"),
        ("x", "'x' is not a flag; rule: --section.field VALUE"),
        ("--model.layers", "--model.layers needs a value: --model.layers 4"),
        ("--model.layers 3 --model.layers 4", "--model.layers is given twice; rule: once"),
        (
            "--model.layers 3 4",
            "--model.layers takes one value, not '3 4'; rule: quote a value with spaces",
        ),
        (
            "--model.layers 0",
            "command line: model.layers=0 must be greater than or equal to 1; nearest: 1",
        ),
        (
            "--model.layers 4.5",
            "command line: model.layers=4.5 must be a valid integer; nearest: 4",
        ),
        (
            "--model.layers true",
            "command line: model.layers=True must be a valid integer; nearest: 4",
        ),
        ("--model.bias 1", "command line: model.bias=1 must be a valid boolean; nearest: true"),
        ("--optim.lr nan", "command line: optim.lr='nan' must be a valid number; nearest: 0.004"),
        ("--optim.lr .inf", "command line: optim.lr=inf must be a finite number; nearest: 0.004"),
        ("--optim.lr -1", "command line: optim.lr=-1 must be greater than 0; nearest: 0.004"),
        (
            "--optim.betas 1 0.5",
            "command line: optim.betas=1 must be less than 1; nearest: (0.9, 0.95)",
        ),
        (
            "--model.positions rop",
            "command line: model.positions='rop' must be one of learned, rope, sinusoidal, none; nearest: rope",
        ),
        (
            "--model.heads 5",
            "command line: model.heads=5 does not divide model.width=128; nearest: 4, 8",
        ),
        (
            "--model.kv_heads 3",
            "command line: model.kv_heads=3 does not divide model.heads=4; nearest: 2, 4",
        ),
        (
            "--model.heads 128",
            "command line: model.width=128 with model.heads=128 gives an odd head size, which rope cannot rotate;"
            " nearest model.width: 256",
        ),
        (
            "--model.positions sinusoidal --model.width 3 --model.heads 3",
            "command line: model.width=3 must be even for sinusoidal positions; nearest: 4",
        ),
        (
            "--data.stride 500",
            "command line: data.stride=500 must be at most data.seq_len=256; nearest: 256",
        ),
        (
            "--data.separator=",
            "command line: data.separator='' must not be empty; nearest: null (each file is one document)",
        ),
        (
            "--optim.min_lr 1",
            "command line: optim.min_lr=1.0 must be at most optim.lr=0.004; nearest: 0.004",
        ),
        (
            "--data.micro_batch 64",
            "command line: data.micro_batch=64 must be at most data.global_batch=16; nearest: 16",
        ),
        (
            "--run.steps 3 --run.epochs 4",
            "command line: run.steps=3 and run.epochs=4 exclude each other; rule: give one",
        ),
        (
            "--run.steps null",
            "command line: run.steps=None and run.epochs=None: exactly one of them must be given",
        ),
    ],
)
def test_command_line_errors(argv: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        settings(*argv.split())
    assert str(error.value) == message and error.value.code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "FILE: unknown section 'modle'; did you mean model?"),
        ("model: {layer: 3}", "FILE: unknown field model.layer; did you mean model.layers?"),
        ("model: {lr: 3}", "FILE: unknown field model.lr; did you mean optim.lr?"),
        ("model: 3", "FILE: model must be a mapping of its fields, not 3"),
        ("- 3", "FILE: must be a mapping of the sections model, data, optim, run, not [3]"),
        ("model:\n  layers: 3\n  layers: 4", "FILE: layers is given twice (line 3); rule: once"),
        ("model: {layers: '3'}", "FILE: model.layers='3' must be a valid integer; nearest: 4"),
        ("model: {layers: [", "FILE: not valid YAML: "),
        (
            "run: !!python/object:os.system {}",
            "FILE: not valid YAML: could not determine a constructor",
        ),
        ("data: {input: 3}", "FILE: data.input=3 must be a valid string; nearest: stdlib"),
        (
            "data: {sources: {web: {input: a.csv, template: const, text_column: body}}}",
            "FILE: data.sources.web.template='const' must name columns in pairs of braces; nearest: '{body}'",
        ),
        (
            "data: {validation: {held: {input: a.csv, template: 'a}'}}}",
            "FILE: data.validation.held.template='a}' must name columns in pairs of braces; nearest: '{text}'",
        ),
        (
            "run: {steps: 3, epochs: 4}",
            "FILE: run.steps=3 and run.epochs=4 exclude each other; rule: give one",
        ),
    ],
)
def test_yaml_errors(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        settings("--config", str(file))
    assert str(error.value).replace(str(file), "FILE").startswith(message)


def test_missing_yaml_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "debug.yaml").write_text("")
    with pytest.raises(
        UserError,
        match=r"cannot be read \(No such file or directory\); did you mean .*/debug.yaml\?",
    ):
        read_yaml(tmp_path / "debgu.yaml")


def test_a_typing_mistake_is_one_line_code_2_and_comes_before_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    output = train(tmp_path / "run", "--model.layerz", "3", code=2, PYTHONPATH=str(tmp_path))
    assert output == "error: unknown flag --model.layerz; did you mean --model.layers?\n"
    assert (
        train(tmp_path / "run", "--model.layerz", "3", code=2, RANK="1", PYTHONPATH=str(tmp_path))
        == ""
    )


def test_help_shows_every_field_with_the_given_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {layers: 77}\n")
    with pytest.raises(SystemExit):
        settings("--help", "--config", str(file), allow_change="Let FIELD differ.")
    text = capsys.readouterr().out
    missing = [name for name in FIELDS if f"--{name.replace('_', '-')}" not in text]
    assert missing == [] and "(default: 77)" in text and "--allow_change: Let FIELD differ." in text


def test_help_gives_each_field_a_meaning() -> None:
    text = " ".join(help_text(Config(), {}, "x").split())
    assert [
        name
        for name, info in FIELDS.items()
        if not info.description or info.description[:20] not in text
    ] == []


def test_print_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings("--print_config", "--model.layers", "9")
    file = tmp_path / "a.yaml"
    file.write_text(capsys.readouterr().out)
    assert settings("--config", str(file)) == settings("--model.layers", "9")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_hold_only_what_differs(recipe: Path) -> None:
    given = read_yaml(recipe)
    config = resolve((str(recipe), given))
    assert batch_layout(config, 8).tokens_per_step == config.data.global_batch * config.data.seq_len
    assert [name for name, value in given.items() if FIELDS[name].default == value] == []


@given(
    batch=st.integers(1, 300),
    world=st.integers(1, 64),
    micro=st.one_of(st.none(), st.integers(1, 300)),
)
def test_plan_fits_the_batch(batch: int, world: int, micro: int | None) -> None:
    fields: dict[str, Any] = {
        "data.global_batch": batch,
        "data.micro_batch": micro and min(micro, batch),
    }
    config = resolve(("test", fields))
    if world > batch:
        with pytest.raises(
            UserError, match=f"at least the number of processes, {world}; nearest: {world}"
        ):
            batch_layout(config, world)
        return
    made = batch_layout(config, world)
    rows = made.micro_batch * made.accumulation
    assert rows >= made.share >= batch / world and rows - made.micro_batch < made.share
    assert made.filler_percent == pytest.approx(100 * (rows * world - batch) / batch)


def test_what_is_free_on_resume_exists() -> None:
    assert set(FIELDS) >= FREE_ON_RESUME
    mathematics = {
        "run.seed",
        "run.precision",
        "run.steps",
        "data.global_batch",
        "data.seq_len",
        "optim.lr",
        "model.layers",
    }
    assert not mathematics & FREE_ON_RESUME


def test_configs_cannot_be_changed_or_given_more() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().model.layers = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        Config.model_validate({"model": {"layer": 3}})


def test_yaml_round_trip() -> None:
    assert (
        Config.model_validate(
            {k: _tuples(v) for k, v in yaml.safe_load(Config().to_yaml()).items()}
        )
        == Config()
    )


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
