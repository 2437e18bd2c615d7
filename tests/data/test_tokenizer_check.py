"""A tokenizer.json from a stranger ends in one line, not in a panic or the end of the process."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import DataError

Edit = Callable[[dict[str, Any]], object]


def write(folder: Path, change: Edit) -> Path:
    content = json.loads(train_tokenizer("bpe:300", ["some text to learn from"]).stored)
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


def normalizer(*steps: dict[str, Any]) -> Edit:
    return lambda content: content.update(normalizer={"type": "Sequence", "normalizers": [*steps]})


def pre_tokenizer(step: dict[str, Any]) -> Edit:
    return lambda content: content.update(pre_tokenizer=step)


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def charsmap(text: str) -> Edit:
    return normalizer({"type": "Precompiled", "precompiled_charsmap": text})


REFUSED: dict[str, tuple[Edit, str]] = {
    "a trie without end": (charsmap("/////wAAAAAAAAAA"), "a trie of 4294967295 bytes in 12"),
    "a trie that is cut": (charsmap("AQA="), "a trie of 1 bytes in 2"),
    "no base64": (charsmap("%%%"), "precompiled_charsmap: no base64"),
    "an explosion": (
        normalizer(*[replace("a", "a" * 30)] * 8),
        "normalizer: its replacements make a text 6.56e+11 times as long",
    ),
    "an explosion in the decoder": (
        lambda content: content.update(decoder=replace("a", "b" * 100)),
        "decoder: its replacements make a text 100 times as long",
    ),
    "many steps": (normalizer(*[{"type": "NFC"}] * 64), "normalizer: 65 steps; rule: at most 64"),
    "a large id": (
        lambda content: content["model"]["vocab"].update(x=4_000_000_000),
        "id 4000000000 of a token; rule: 0 to 16777215",
    ),
    "a large special id": (
        lambda content: content["added_tokens"][0].update(id=2**24),
        "id 16777216 of a token; rule: 0 to 16777215",
    ),
    "a long value": (lambda content: content["model"].update(type="x" * 10**6), "not a usable"),
    "no model": (lambda content: content.pop("model"), "not a usable tokenizer ("),
    "a list": (lambda content: content.update(model=[]), "not a usable tokenizer ("),
    "deep": (lambda content: content.update(deep=json.loads("[" * 70 + "]" * 70)), "deeper than"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_out_of_proportion_is_refused(name: str, tmp_path: Path) -> None:
    change, said = REFUSED[name]
    file = write(tmp_path, change)
    with pytest.raises(DataError) as raised:
        Tokenizer.load(file)
    message = str(raised.value)
    assert message.startswith(f"{file}: not a usable tokenizer (") and said in message
    assert message.isprintable() and len(message) < 600


@pytest.mark.parametrize(
    "step",
    [
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "FixedLength", "length": 0},
    ],
)
def test_a_panic_is_an_error_like_others(
    step: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, pre_tokenizer(step))
    with pytest.raises(DataError, match="the tokenizer gave up|not a usable tokenizer"):
        Tokenizer.load(file).encode("a" * 10_000 + "!")
    assert "panicked" in capfd.readouterr().err  # the test is one of a panic


def test_real_parts_pass(tmp_path: Path) -> None:
    steps = [
        {"type": "NFKC"},
        replace("``", '"'),
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
        {"type": "Prepend", "prepend": "▁"},
        replace(" ", "▁"),
    ]
    assert Tokenizer.load(write(tmp_path, normalizer(*steps))).encode("a  b")


def test_a_file_that_never_ends(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"cannot be read \(not a regular file\)"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("eos", [7, ["a"], {"content": {}}, {}])
def test_a_configuration_of_another_shape(eos: Any, tmp_path: Path) -> None:
    write(tmp_path, lambda content: None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    try:
        assert Tokenizer.load(tmp_path).eot_token == "<|endoftext|>"
    except DataError as error:
        assert "not a usable tokenizer" in str(error)
