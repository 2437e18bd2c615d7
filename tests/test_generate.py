"""The command line of generate: what it prints, what it refuses, how it ends."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lm import families, generate
from dist_lm.cli import read_flags
from dist_lm.config import ModelConfig, ModelSpec
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import UserError, run_entry
from dist_lm.generate import GENERATE
from dist_lm.model import hf
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from tests.conftest import state_of, write_step
from tests.procs import PIPE, ROOT, Process, clean_env

LLAMA = ModelConfig(layers=2, heads=4, kv_heads=2, width=32)
GPT2 = ModelConfig(
    layers=2, heads=2, width=32, positions="learned", norm="layernorm", activation="relu", bias=True
)
FAMILIES = {
    "llama": LLAMA,
    "qwen3": LLAMA.model_copy(update={"qk_norm": True}),
    "gpt2": GPT2,
    "openai-gpt": GPT2.model_copy(update={"norm_placement": "post"}),
}
CONTEXT = 48


def write_random(
    run: Path, model: ModelConfig, tokenizer: Tokenizer, step: int = 10, seed: int = 9
) -> Path:
    """A step folder of a random model, as train writes it."""
    spec = ModelSpec(model, tokenizer.vocab_size, CONTEXT)
    gpt = GPT(spec)
    init_weights(gpt, seed)
    for parameter in gpt.parameters():  # a livelier text than GPT-2's small weights make
        parameter.data *= 8 if parameter.dim() == 2 else 1
    texts = {
        "config.json": families.config_json(spec, tokenizer.eot),
        "state.json": state_of(step),
        "generation_config.json": families.generation_config_json(tokenizer.eot),
    }
    return write_step(run, step, gpt, texts, tokenizer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of each family with a byte tokenizer, and one with a char tokenizer."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model in FAMILIES.items():
        write_random(folder / name, model, train_tokenizer("byte", []))
    write_random(
        folder / "ends", LLAMA, train_tokenizer("byte", []), seed=5
    )  # "hello" leads to end-of-text
    write_random(folder / "char", LLAMA, train_tokenizer("char", ["abcdefgh \n"]))
    return folder


class Cli:
    """generate in this process, on a run folder, with short greedy output unless told otherwise."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str], ckpt: Path):
        self.patch, self.capture, self.ckpt = patch, capture, ckpt

    def __call__(
        self, *words: str, stdin: bytes = b"", ckpt: Path | None = None
    ) -> tuple[int, str, str]:
        self.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        defaults = [
            "generate",
            "--ckpt",
            str(ckpt or self.ckpt),
            "--temperature",
            "0",
            "--max_new_tokens",
            "12",
        ]
        self.patch.setattr(sys, "argv", defaults + list(words))
        code = 0
        try:
            run_entry(generate.main)
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *self.capture.readouterr())

    def lines(self, *words: str, **more: Any) -> list[dict[str, Any]]:
        code, out, _ = self(*words, "--json", **more)
        assert code == 0
        return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path) -> Cli:
    return Cli(monkeypatch, capsys, runs / "llama")


def process(*words: str, **more: Any) -> Process:
    command = [sys.executable, "-m", "dist_lm.generate", *words]
    env = clean_env(PYTHONUNBUFFERED="")  # it must flush by itself
    return Process(command, env=env, text=False, stderr=PIPE, **more)


# --- the same as transformers


@pytest.mark.parametrize("name", [*FAMILIES, "ends"])
@pytest.mark.parametrize("penalty", ["1", "1.3"])
def test_greedy_is_what_transformers_generates_token_for_token(
    cli: Cli, runs: Path, name: str, penalty: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow

    (step,) = (runs / name).iterdir()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(step),
        AutoTokenizer.from_pretrained(step),
    )
    prompts = ["hello", "a", "Il était une fois"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    made = cli.lines(
        *words,
        "--max_new_tokens",
        "30",
        "--logprobs",
        "--repetition_penalty",
        penalty,
        ckpt=runs / name,
    )
    for prompt, line in zip(prompts, made, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            **ids, max_new_tokens=30, do_sample=False, repetition_penalty=float(penalty)
        )
        theirs = out[0, ids.input_ids.shape[1] :].tolist()
        assert line["tokens"] == theirs
        assert (
            line["text"] == tokenizer.decode(theirs, skip_special_tokens=True)
            and line["prompt"] == prompt
        )
    assert name != "ends" or made[0]["finish_reason"] == "end_of_text"


# --- what it prints


def test_plain_output_is_prompt_and_continuation(cli: Cli) -> None:
    (line,) = cli.lines("--prompt", "hello")
    assert cli("--prompt", "hello") == (0, "hello" + line["text"] + "\n", "")
    (other,) = cli.lines("--prompt", "")
    assert (
        cli("--prompt", "hello", "--prompt", "")[1]
        == f"hello{line['text']}\n---\n{other['text']}\n"
    )


def test_json_lines(cli: Cli) -> None:
    (line,) = cli.lines("--prompt", "hello", "--seed", "3")
    rate = line.pop("tokens_per_second")
    assert line == {
        "prompt": "hello",
        "text": line["text"],
        "new_tokens": 12,
        "finish_reason": "length",
        "seed": 3,
    }
    assert rate > 0 and not line["text"].startswith("hello")
    (long,) = cli.lines("--prompt", "hello", "--logprobs")
    assert len(long["logprobs"]) == len(long["tokens"]) == 12 and max(long["logprobs"]) < 0


def test_a_stop_text_ends_it(cli: Cli) -> None:
    (whole,) = cli.lines("--prompt", "hello")
    stop = whole["text"][3:5]
    (line,) = cli.lines("--prompt", "hello", "--stop", "never", "--stop", stop)
    assert (line["text"], line["finish_reason"]) == (
        whole["text"][: whole["text"].index(stop)],
        "stop",
    )
    assert line["new_tokens"] < 12


def test_samples_repeat_with_the_seed_and_do_not_know_their_neighbours(cli: Cli) -> None:
    how = ("--temperature", "1", "--seed", "7", "--num_samples", "3")
    rows = cli.lines("--prompt", "abc", "--prompt", "a longer prompt", *how)
    assert rows == [
        {**row, "tokens_per_second": old["tokens_per_second"]}
        for row, old in zip(
            cli.lines("--prompt", "abc", "--prompt", "a longer prompt", *how), rows, strict=True
        )
    ]
    assert [row["text"] for row in cli.lines("--prompt", "a longer prompt", *how)] == [
        row["text"] for row in rows[3:]
    ]
    flat = cli.lines(
        "--prompt", "abc", "--prompt", "a longer prompt", *how, "--temperature", "1e9"
    )  # only draws count
    assert len({row["text"] for row in flat}) == 6
    unseeded = [cli.lines("--prompt", "abc", "--temperature", "1")[0] for _ in range(2)]
    assert unseeded[0]["text"] != unseeded[1]["text"]
    again = cli.lines("--prompt", "abc", "--temperature", "1", "--seed", str(unseeded[0]["seed"]))
    assert again[0]["text"] == unseeded[0]["text"]


def test_more_sequences_than_fit_a_batch_are_the_same(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = (
        "--prompt",
        "a",
        "--prompt",
        "bcd",
        "--num_samples",
        "2",
        "--temperature",
        "1",
        "--seed",
        "1",
    )
    at_once = cli(*how)
    monkeypatch.setattr(generate, "AT_ONCE", 3)
    assert cli(*how) == at_once and at_once[1].count("---\n") == 3


def test_prompts_from_files_and_stdin(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("zwei\nZeilen é\r\n".encode())
    rows = cli.lines("--prompt-file", str(tmp_path / "p.txt"), "--prompt", "x", stdin=b"not read")
    assert [row["prompt"] for row in rows] == ["x", "zwei\nZeilen é"]
    assert cli.lines(stdin=b"from a pipe\n\n")[0]["prompt"] == "from a pipe\n"
    assert cli.lines(stdin=b"")[0]["prompt"] == ""  # a new document
    assert cli.lines("--prompt=--x", "--max-new-tokens=1")[0]["new_tokens"] == 1


def test_characters_that_a_vocabulary_lacks_are_a_warning(cli: Cli, runs: Path) -> None:
    code, out, err = cli("--prompt", "abc Xyz\x1b", ckpt=runs / "char")
    assert (code, out[:8]) == (0, "abc Xyz\x1b")
    assert err == (
        "warning: 4 characters of the prompt are not in the vocabulary and count as unknown:"
        " '\\x1bXyz'\n"
    )
    assert cli("--prompt", "abc", ckpt=runs / "char")[2] == ""


def test_a_text_beyond_the_context_slides_or_is_refused(cli: Cli) -> None:
    long = "x" * (2 * CONTEXT)
    assert cli.lines("--prompt", long, "--max_new_tokens", "60")[0]["new_tokens"] == 60
    assert cli("--prompt", long, "--context", "refuse") == (
        2,
        "",
        "error: a prompt of 96 tokens and 12 new ones do not fit the model's context of 48;"
        " nearest: a prompt of"
        " 48 tokens, or slide\n",
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_other_arithmetic(cli: Cli, dtype: str) -> None:
    assert cli.lines("--prompt", "hello", "--dtype", dtype)[0]["new_tokens"] == 12


def test_top_k_may_exceed_the_vocabulary(cli: Cli) -> None:
    how = ("--prompt", "hello", "--temperature", "1", "--seed", "1")
    assert cli.lines(*how, "--top_k", "100000")[0]["text"] == cli.lines(*how)[0]["text"]


@pytest.mark.campaign
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch's own, in what it imports to compile
def test_compiled(cli: Cli) -> None:
    assert cli("--prompt", "hello", "--compile") == cli("--prompt", "hello")


# --- what it refuses

REFUSED = [
    ("--temperature nan", "--temperature=nan must be a number of 0 or more; nearest: 0.8"),
    ("--temperature=-1", "--temperature=-1 must be a number of 0 or more; nearest: 0"),
    ("--temperature warm", "--temperature=warm must be a number of 0 or more; nearest: 0.8"),
    ("--temperature inf", "--temperature=inf must be a number from 0 to 1e+09; nearest: 1e+09"),
    ("--top_k -1", "--top_k=-1 must be a whole number of 0 or more; nearest: 0"),
    ("--top-k 1.5", "--top_k=1.5 must be a whole number of 0 or more; nearest: 0"),
    ("--top_p 0", "--top_p=0 must be a number from 1e-06 to 1; nearest: 1e-06"),
    ("--top_p 1.1", "--top_p=1.1 must be a number from 1e-06 to 1; nearest: 1"),
    ("--min_p 2", "--min_p=2 must be a number from 0 to 1; nearest: 1"),
    (
        "--repetition_penalty 0",
        "--repetition_penalty=0 must be a number of 1e-06 or more; nearest: 1e-06",
    ),
    ("--max_new_tokens 0", "--max_new_tokens=0 must be a whole number of 1 or more; nearest: 1"),
    ("--num_samples 0", "--num_samples=0 must be a whole number of 1 or more; nearest: 1"),
    ("--seed -5", "--seed=-5 must be a whole number of 0 or more; nearest: 0"),
    (
        "--seed 99999999999999999999",
        "--seed=99999999999999999999 must be a whole number from 0 to 9223372036854775807;"
        " nearest: 9223372036854775807",
    ),
    ("--top_k 1e3", "--top_k=1e3 must be a whole number of 0 or more; nearest: 0"),
    ("--stop=", "--stop '' must not be empty; nearest: no --stop"),
    ("--logprobs", "--logprobs is printed in JSON lines only; nearest: --json --logprobs"),
    ("--device tpu", "--device=tpu must be one of auto, cpu, cuda; did you mean cpu?"),
    ("--context slid", "--context=slid must be one of slide, refuse; did you mean slide?"),
    ("--dtype bf61", "--dtype=bf61 must be one of fp32, bf16, fp16; did you mean bf16?"),
    ("--tempreature 1", "unknown flag --tempreature; did you mean --temperature?"),
    ("--prompt", "--prompt needs a value"),
    (
        "--prompt \udcff",
        "the command line: byte 0xff at offset 0 is not UTF-8; rule: text is UTF-8",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_a_bad_command_line_is_one_line_and_2(cli: Cli, words: str, message: str) -> None:
    assert cli(*words.split(" ")) == (2, "", f"error: {message}\n")


def test_a_prompt_that_cannot_be_read(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"abc\xe9")
    problem = "byte 0xe9 at offset 3 is not UTF-8; rule: text is UTF-8"
    assert cli("--prompt_file", str(tmp_path / "bad")) == (
        65,
        "",
        f"error: --prompt_file {tmp_path}/bad: {problem}\n",
    )
    assert cli(stdin=b"abc\xe9") == (65, "", f"error: stdin: {problem}\n")
    gone = tmp_path / "gone"
    assert cli("--prompt_file", str(gone)) == (
        2,
        "",
        f"error: --prompt_file {gone}: No such file or directory\n",
    )


def test_cuda_where_there_is_none(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "error: --device cuda: no CUDA device is visible to torch; nearest: --device cpu\n"
    assert cli("--prompt", "a", "--device", "cuda") == (2, "", message)


def test_a_diverged_checkpoint(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random(tmp_path / "nan", LLAMA, train_tokenizer("byte", []))
    export = hf.Entry.from_flat
    monkeypatch.setattr(hf.Entry, "from_flat", lambda *args: export(*args) * float("nan"))
    write_random(tmp_path / "nan", LLAMA, train_tokenizer("byte", []), step=20)
    assert cli("--prompt", "a", ckpt=tmp_path / "nan") == (
        66,
        "",
        "error: the model's logits for new token 1 are not finite; rule: use an earlier"
        " checkpoint, or fp32"
        " where another type overflows\n",
    )
    assert cli("--prompt", "a", ckpt=tmp_path / "nan" / "step-00000010")[0] == 0


# --- which checkpoint


def test_run_step_and_transformers_folders_are_the_same_model(
    cli: Cli, runs: Path, tmp_path: Path
) -> None:
    (step,) = (runs / "llama").iterdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((step / name).read_bytes())
    outputs = {cli("--prompt", "hello", ckpt=folder) for folder in (runs / "llama", step, tmp_path)}
    assert len(outputs) == 1


def test_a_torn_checkpoint_is_passed_over_or_refused(cli: Cli, tmp_path: Path) -> None:
    good = write_random(tmp_path, LLAMA, train_tokenizer("byte", []), step=10)
    torn = write_random(tmp_path, LLAMA, train_tokenizer("byte", []), step=20, seed=6)
    newest = cli("--prompt", "hello", ckpt=tmp_path)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-1])
    code, out, err = cli("--prompt", "hello", ckpt=tmp_path)
    assert (code, out) == cli("--prompt", "hello", ckpt=good)[:2] != newest[:2]
    assert (
        err.startswith("warning: passed over step-00000020/model.safetensors: has ")
        and err.count("\n") == 1
    )
    code, out, err = cli("--prompt", "hello", ckpt=torn)
    assert (code, out) == (66, "") and err.startswith(
        "error: step-00000020/model.safetensors: has "
    )
    (torn / "manifest.json").unlink()  # torn before its manifest was written
    (good / "model.safetensors").write_bytes(b"")
    code, out, err = cli("--prompt", "hello", ckpt=tmp_path)
    assert (code, out, err.count("\n")) == (66, "", 1) and "holds no valid checkpoint" in err
    assert cli("--prompt", "hello", ckpt=tmp_path / "nowhere")[0] == 66


# --- how it starts and ends


def test_a_bad_flag_is_answered_before_torch_is_imported() -> None:
    script = (
        "import sys; from dist_lm import errors, generate; sys.argv = ['generate', '--ckpt',"
        " 'x', '--top_p', '0']\n"
        "try: errors.run_entry(generate.main)\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=clean_env(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (
        2,
        "error: --top_p=0 must be a number from 1e-06 to 1; nearest: 1e-06\n",
    )


def test_it_starts_soon_and_imports_neither_accelerate_nor_deepspeed(runs: Path) -> None:
    script = (
        "import sys, time, torch; start = time.perf_counter(); torch.set_num_threads(1)\n"
        "from dist_lm import errors, generate\n"
        f"sys.argv = ['generate', '--ckpt', {str(runs / 'llama')!r}, '--prompt', 'a',"
        " '--max_new_tokens', '1']\n"
        "errors.run_entry(generate.main)\n"
        "heavy = {'accelerate', 'deepspeed', 'transformers', 'datasets', 'torch._dynamo'} &"
        " set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(time.perf_counter() - start, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=clean_env(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stderr) < 3


def test_help_names_every_flag(cli: Cli) -> None:
    code, text, _ = cli("--help")
    assert code == 0
    flags = "ckpt prompt prompt_file max_new_tokens temperature top_k top_p min_p"
    flags += " repetition_penalty num_samples stop"
    for flag in f"{flags} context seed device dtype compile json logprobs raw".split():
        assert f"--{flag} " in text


@pytest.mark.slow
def test_an_interrupt_ends_it_with_130(runs: Path) -> None:
    # Greedy, it goes on for ever.
    words = (
        "--ckpt",
        str(runs / "llama"),
        "--prompt",
        "a",
        "--max_new_tokens",
        "1000000",
        "--temperature",
        "0",
    )
    child = process(*words)
    assert child.stdout is not None and child.stdout.read(1) == b"a"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (130, b"\n")


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(runs: Path) -> None:
    child = process(
        "--ckpt",
        str(runs / "llama"),
        "--prompt",
        "a",
        "--max_new_tokens",
        "1000000",
        "--temperature",
        "0",
    )  # greedy, it goes on for ever; sampled, it may end by itself
    assert child.stdout is not None and child.stdout.read(1) == b"a"
    child.stdout.close()
    assert child.stderr is not None
    assert (child.wait(20), child.stderr.read()) == (0, b"")
    child.stderr.close()


@pytest.mark.slow
def test_text_streams_in_whole_characters(runs: Path) -> None:
    """Every piece that is written is valid UTF-8, though the tokens are bytes; and the pieces come
    one by one.
    """
    child = process(
        "--ckpt", str(runs / "llama"), "--prompt", "é", "--max_new_tokens", "60", "--seed", "1"
    )
    assert child.stdout is not None
    pieces = []
    while piece := os.read(child.stdout.fileno(), 2**16):
        pieces.append(piece.decode())
    child.communicate(timeout=20)
    assert len(pieces) > 5 and "".join(pieces).startswith("é")


@pytest.mark.slow
def test_a_terminal_is_asked_and_never_driven(runs: Path) -> None:
    controller, terminal = pty.openpty()
    words = ("--ckpt", str(runs / "char"), "--max_new_tokens", "3", "--context", "refuse")
    child = process(*words, stdin=terminal)
    os.write(controller, b"ab\n" + b"a" * 60 + b"\ncd\n\x04")
    out, err = child.communicate(timeout=30)
    os.close(terminal)
    os.close(controller)
    said = (
        "A prompt a line; Ctrl-D ends.\n"
        "error: a prompt of 60 tokens and 3 new ones do not fit the model's context of 48;"
        " nearest: a prompt of 48"
        " tokens, or slide\n\n"
    )
    assert (child.returncode, err.decode()) == (0, said)
    assert out.startswith(b"> ab") and b"> cd" in out


def test_control_characters_are_escaped_on_a_terminal(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "a\x1b[2J\u202eé\t日\x9b\nb"
    assert cli("--prompt", prompt)[1].startswith(prompt)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli("--prompt", prompt)[1].startswith("a\\x1b[2J\\u202eé\t日\\x9b\nb")
    assert cli.lines("--prompt", prompt)[0]["prompt"] == prompt  # JSON has its own escapes
    assert cli("--prompt", prompt, "--raw")[1].startswith(prompt)


def test_errors_of_reading_are_user_errors() -> None:
    with pytest.raises(UserError, match="--ckpt"):
        read_flags([], GENERATE)
    started = time.perf_counter()
    flags = read_flags(
        ["--ckpt", "x", "--max-new-tokens", "5", "--stop", "a-b", "--stop=c-d"], GENERATE
    )
    assert time.perf_counter() - started < 1
    assert (flags.max_new_tokens, flags.stop) == (5, ("a-b", "c-d"))
