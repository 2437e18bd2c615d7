"""Settings and command lines: precedence, help, every error as one line, the batch layout."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from dist_lm.cli import ONE_AT_A_TIME, Command, load, read_flags, read_yaml, resolve
from dist_lm.config import (
    FIELDS,
    FREE_ON_RESUME,
    Config,
    ModelConfig,
    Section,
    SourceConfig,
    Stage,
    batch_layout,
)
from dist_lm.errors import UserError
from dist_lm.nearest import OTHER_NAMES
from dist_lm.outcome import TRAIN
from tests.procs import ROOT, clean_env, train

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def settings(*argv: str) -> Config:
    config, _ = load(argv, TRAIN)
    return config


def test_fields() -> None:
    """All settings of the product. A new one must earn its place here."""
    expected = """
    model.layers model.heads model.kv_heads model.width model.ffn_width model.positions model.norm
    model.norm_placement model.activation model.bias model.qk_norm model.dropout
    model.tie_embeddings model.init model.norm_eps model.rope_theta
    data.input data.sources data.stages data.validation data.stream data.lanes data.packing
    data.bad_rows data.cache_gb data.text_column data.separator data.template
    data.filter data.dtype data.tokenizer data.val_fraction
    data.seq_len data.stride data.document_mask data.global_batch data.micro_batch data.workers
    optim.name optim.lr optim.min_lr optim.warmup_steps optim.schedule optim.betas optim.eps
    optim.weight_decay optim.clip
    run.dir run.steps run.epochs run.seed run.precision run.compile run.deterministic
    run.activation_checkpointing
    run.ema run.eval_every run.eval_batches run.save_every run.keep_last run.keep_every run.resume
    run.exact run.log_unit_hashes
    run.init_from run.stop_after run.timeout_seconds run.log_batch_hash run.profile_steps
    run.trackers run.sample_prompt run.on_spike run.check_every
    """
    assert set(expected.split()) == set(FIELDS)


def test_several_inputs_are_one_source(tmp_path: Path) -> None:
    """On the command line and in YAML; one in a list is that one, as before."""
    config = settings("--data.input", "b", "a/*.txt", "--run.steps", "3")
    assert config.data.input == config.data.as_source().inputs == ("b", "a/*.txt")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert settings("--config", str(tmp_path / "run.yaml")) == config
    assert settings("--data.input", "b").data.input == "b"
    (tmp_path / "one.yaml").write_text(
        "data: {sources: {a: {input: [x]}, b: {input: [y, z]}}, seq_len: 8}"
    )
    sources = settings("--config", str(tmp_path / "one.yaml")).data.sources
    assert [source.input for source in sources.values()] == ["x", ("y", "z")]
    with pytest.raises(UserError, match="data.input"):
        resolve(("file", {"data.input": []}))
    with pytest.raises(UserError, match="--data.seq_len takes one value, not '1 2'"):
        settings("--data.seq_len", "1", "2")


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
        ("--optim.learning_rate 1", "unknown flag --optim.learning_rate; did you mean --optim.lr?"),
        ("--batch-size 8", "unknown flag --batch_size; did you mean --data.global_batch?"),
        ("--bf16", "unknown flag --bf16; did you mean --run.precision bf16?"),
        ("--warmup 8", "unknown flag --warmup; did you mean --optim.warmup_steps?"),
        ("--nprocs 2", "unknown flag --nprocs; did you mean --nproc of launch/torchrun.sh?"),
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
            "--optim.betas 0.8",
            "command line: optim.betas=0.8 must have 2 values; nearest: 0.8 0.95",
        ),
        (
            "--optim.betas 0.8 0.9 0.95",
            "command line: optim.betas=0.8 0.9 0.95 must have 2 values; nearest: 0.8 0.9",
        ),
        (
            "--optim.lr 3e-4x",
            "command line: optim.lr='3e-4x' must be a valid number; nearest: 3e-4",
        ),
        (
            "--model.positions rotary",
            "command line: model.positions='rotary' must be one of learned, rope, sinusoidal,"
            " none; nearest: rope",
        ),
        (
            "--model.positions rop",
            "command line: model.positions='rop' must be one of learned, rope, sinusoidal, none;"
            " nearest: rope",
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
            "command line: model.width=128 with model.heads=128 gives an odd head size, which"
            " rope cannot rotate;"
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
            "command line: data.separator='' must not be empty; nearest: null (each file is one"
            " document)",
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
        ("learning_rate: 1", "FILE: unknown section 'learning_rate'; did you mean optim.lr?"),
        ("train: {n_layer: 3}", "FILE: unknown section 'train'"),
        ("model: {n_layer: 3}", "FILE: unknown field model.n_layer; did you mean model.layers?"),
        ("model: 3", "FILE: model must be a mapping of its fields, not 3"),
        ("- 3", "FILE: must be a mapping of the sections model, data, optim, run, not [3]"),
        ("model:\n  layers: 3\n  layers: 4", "FILE: layers is given twice (line 3); rule: once"),
        ("model: {layers: '3'}", "FILE: model.layers='3' must be a valid integer; nearest: 3"),
        ("model: {layers: [", "FILE: not valid YAML: "),
        (
            "run: !!python/object:os.system {}",
            "FILE: not valid YAML: could not determine a constructor",
        ),
        ("data: {input: 3}", "FILE: data.input=3 must be a valid string; nearest: stdlib"),
        (
            "data: {sources: {web: {input: a.csv, template: const, text_column: body}}}",
            "FILE: data.sources.web.template='const' must name columns in pairs of braces;"
            " nearest: '{body}'",
        ),
        (
            "data: {sources: {web: {input: a.csv, template: '{text:{n}}'}}}",
            "FILE: data.sources.web.template='{text:{n}}' has text with the layout '{n}'; rule: no"
            " braces in it and no width above 1000; nearest: {text}",
        ),
        (
            "data: {sources: {web: {input: a.csv, template: '{text:>1000000000}'}}}",
            "FILE: data.sources.web.template='{text:>1000000000}' has text with the layout"
            " '>1000000000'; rule: no braces in it and no width above 1000; nearest: {text}",
        ),
        (
            "data: {validation: {held: {input: a.csv, template: 'a}'}}}",
            "FILE: data.validation.held.template='a}' must name columns in pairs of braces;"
            " nearest: '{text}'",
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


def test_a_recipe_of_another_name_names_the_nearest() -> None:
    """Not the first file with the same ending."""
    with pytest.raises(UserError, match=r"; did you mean configs/char.yaml\?$"):
        settings("--config", "configs/chr.yaml")


def test_names_of_other_trainers_lead_to_settings_that_exist() -> None:
    for name, setting in OTHER_NAMES.items():
        field, _, value = setting.partition(" ")
        assert field in FIELDS, name
        assert name not in {known.rpartition(".")[2] for known in FIELDS}, name
        if value:
            settings(f"--{field}", value)
        with pytest.raises(UserError, match=re.escape(f"; did you mean --{setting}?")):
            settings(f"--{name}", "1")
    of_issue = """learning_rate lr batch_size epochs output_dir n_layer n_head n_embd block_size
        max_steps bf16 warmup gradient_accumulation_steps"""
    for name in of_issue.split():
        with pytest.raises(UserError, match=f"^unknown flag --{name}; did you mean --"):
            settings(f"--{name}", "1")


def test_a_typing_mistake_is_one_line_code_2_and_comes_before_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    output = train(tmp_path / "run", "--model.layerz", "3", code=2, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert output == "error: unknown flag --model.layerz; did you mean --model.layers?\n"
    assert (
        train(
            tmp_path / "run",
            "--model.layerz",
            "3",
            code=2,
            RANK="1",
            WORLD_SIZE="2",
            PYTHONPATH=f"{tmp_path}:{ROOT}",
        )
        == ""
    )


def help_of_train(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        settings("--help", *argv)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_shows_every_field_once_with_the_given_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text("model: {layers: 77}\n")
    monkeypatch.chdir(tmp_path)
    text = help_of_train(capsys, "--config", "a.yaml", "--model.heads", "2", "--launch", "zero2")
    for name in FIELDS:
        assert text.count(f"--{name} ") == 1, name
    for shown in (
        "  --config TEXT ... (a.yaml)\n",
        "  --launch TEXT (zero2)\n",
        "  --model.layers INT (77)\n",
        "  --model.heads INT (2)\n",
        "  --model.kv_heads INT (2)\n",  # follows
        "  --model.norm layernorm|rmsnorm (rmsnorm)\n",
        "  --model.bias true|false (false)\n",
        "  --optim.betas FLOAT FLOAT (0.9 0.95)\n",
        "  --run.epochs INT (unset)\n",
        "  --run.trackers TEXT ... (tensorboard)\n",
        "  --run.sample_prompt TEXT (unset)\n",
        "      Let FIELD differ from what the run was started with (repeatable).\n",
    ):
        assert text.count(shown) == 1, shown


def test_help_gives_each_field_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of_train(capsys).split())
    assert [
        name
        for name, info in FIELDS.items()
        if not info.description or info.description not in text
    ] == []


def test_help_shows_the_fields_of_a_source_and_a_stage_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("data: {sources: {web: {input: a.txt}}}\n")
    text = help_of_train(capsys, "--config", str(file))
    for section in (SourceConfig, Stage):
        for name in section.model_fields:
            assert len(re.findall(rf"^  {name} ", text, re.MULTILINE)) == 1, name
    assert '{"web": {"input": "a.txt", ' in " ".join(text.split())


@pytest.mark.parametrize("columns", [50, 300])
def test_help_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    longest = max(help_of_train(capsys).splitlines(), key=len)
    assert 40 < len(longest) <= min(columns, 100) or " " not in longest.strip(), longest


HEAVY = ("torch", "numpy", "pyarrow", "datasets", "tokenizers", "accelerate", "matplotlib")


@pytest.mark.parametrize("word", ["--help", "--hlep"])
@pytest.mark.parametrize(
    "command",
    ["train", "prepare", "generate", "score", "show", "verify", "report", "plan", "doctor"],
)
def test_help_and_mistakes_wait_for_nothing_slow(command: str, word: str) -> None:
    """What makes a start slow is imported after the command line is read."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['{command}', '{word}']\n"
        f"try: runpy.run_module('dist_lm.{command}', run_name='__main__', alter_sys=True)\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=clean_env(), capture_output=True, text=True
    )
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
    if word == "--help":
        assert (done.returncode, done.stderr) == (0, "")
        usage, _, _ = done.stdout.partition("\n")
        assert usage.startswith("usage: ") and f"dist_lm.{command}" in usage.replace("/", ".")
    else:
        assert done.returncode == 2 and done.stderr.startswith("error: unknown flag --hlep")
        assert done.stderr.count("\n") == 1


class Flags(Section):
    """Flags of each kind."""

    texts: Annotated[tuple[str, ...], ONE_AT_A_TIME] = Field((), description="Texts.")
    names: tuple[str, ...] = Field((), description="Names.")
    count: int = Field(3, ge=1, description="A number.")
    share: float = Field(0.5, gt=0, le=1, description="A share.", examples=[0.4])
    kind: Literal["one", "two"] = Field("one", description="A choice.")
    quiet: bool = Field(False, description="Yes or no.")
    text: str | None = Field(None, description="A text.")


FLAGS = Command("python -m test", Flags)
FILES = Command("python -m test FILE [--text TEXT]", Flags, positional="names")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--count", "5"], "count", 5),
        (["--count=5"], "count", 5),
        (["--count", "5", "--count", "6"], "count", 6),
        (["--share", "1e-3"], "share", 0.001),
        (["--quiet"], "quiet", True),
        (["--quiet", "false"], "quiet", False),
        (["--quiet=false"], "quiet", False),
        (["--texts", "a", "--texts=b c"], "texts", ("a", "b c")),
        (["--texts", ""], "texts", ("",)),
        (["--texts", "-x"], "texts", ("-x",)),
        (["--texts=--foo"], "texts", ("--foo",)),
        (["--texts", "--foo bar-baz"], "texts", ("--foo bar-baz",)),
        (["--texts", "--"], "texts", ("--",)),
        (["--names", "a", "b", "--names", "c"], "names", ("a", "b", "c")),
        (["--text", "a=b"], "text", "a=b"),
    ],
)
def test_flags(argv: list[str], field: str, value: object) -> None:
    assert getattr(read_flags(argv, FLAGS), field) == value


def test_words_without_a_name() -> None:
    flags = read_flags(["a", "--text", "b", "c", "--quiet", "d"], FILES)
    assert (flags.names, flags.text, flags.quiet) == (("a", "c", "d"), "b", True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--count x", "--count=x must be a whole number of 1 or more; nearest: 3"),
        ("--count 0", "--count=0 must be a whole number of 1 or more; nearest: 1"),
        ("--share 40", "--share=40 must be a number above 0 and at most 1; nearest: 0.4"),
        ("--share nan", "--share=nan must be a number above 0 and at most 1; nearest: 0.4"),
        ("--kind tow", "--kind=tow must be one of one, two; did you mean two?"),
        ("--quiet=1", "--quiet=1 must be true or false; nearest: true"),
        ("--quiet 1", "'1' is not a flag; rule: --name VALUE"),
        ("--quite", "unknown flag --quite; did you mean --quiet?"),
        ("--texts a b", "--texts takes one value, not 'a b'; rule: quote a value with spaces"),
        ("--count", "--count needs a value: --count 3"),
        ("--texts --quiet", "--texts needs a value"),
        ("--run.quiet 3", "unknown flag --run.quiet; did you mean --quiet?"),
    ],
)
def test_mistakes_in_flags(argv: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_flags(argv.split(), FLAGS)
    assert (str(error.value), error.value.code) == (message, 2)


@pytest.mark.parametrize("argv", ["", "--text a", "a -x", "a --run.seed 3"])
def test_misuse_names_the_usage(argv: str) -> None:
    with pytest.raises(UserError) as error:
        read_flags(argv.split(), FILES)
    given = argv or "no argument"
    assert str(error.value) == f"{given}: rule: python -m test FILE [--text TEXT]"


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
