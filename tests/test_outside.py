"""JSON from outside is bounded and checked, or refused in one line."""

import json
import os
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from dist_lm.errors import CheckpointError, UserError
from dist_lm.outside import DEEPEST, CheckedModel, Count, check, parse_json, read_bytes, read_json


def refuse(why: str) -> UserError:
    return CheckpointError(f"a.json: {why}")


def nested(levels: int, begin: str = "[", end: str = "]") -> str:
    return begin * levels + "1" + end * levels


REFUSED = {
    "": "not valid JSON: Expecting value",
    '{"a": 1} x': "not valid JSON: Extra data",
    '{"a": 1, "b": 2, "a": 3}': "not usable JSON: 'a' stands twice in an object",
    '[{"\\u001b[2J": 1, "\\u001b[2J": 1}]': r"not usable JSON: '\x1b[2J' stands twice",
    nested(DEEPEST + 1): f"not usable JSON: deeper than {DEEPEST} levels",
    nested(DEEPEST + 1, '{"a":', "}"): f"not usable JSON: deeper than {DEEPEST} levels",
    nested(10**5): f"not usable JSON: deeper than {DEEPEST} levels",
    '{"a":' * 10**5: f"not usable JSON: deeper than {DEEPEST} levels",
    f"[{2**64}]": f"not usable JSON: {2**64} is not a number of 64 bits",
    f"[{-(2**63) - 1}]": f"not usable JSON: {-(2**63) - 1} is not a number of 64 bits",
    "9" * 5000: "not usable JSON: Exceeds the limit (4300 digits)",
    '["\\ud800"]': "not valid JSON: not UTF-8",
    '{"\\udfff": 1}': "not valid JSON: not UTF-8",
}


def refused(content: bytes | str) -> str:
    with pytest.raises(CheckpointError) as raised:
        parse_json(content, refuse)
    message = str(raised.value)
    assert message.isprintable() and len(message) < 200, message
    return message


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_is_refused(number: int) -> None:
    content, said = list(REFUSED.items())[number]
    assert refused(content).startswith(f"a.json: {said}")


def test_bytes_that_are_not_utf8_are_refused() -> None:
    assert refused(b'["\xff"]') == "a.json: not valid JSON: not UTF-8"


def test_what_lies_just_within_the_bounds() -> None:
    numbers = [-(2**63), 2**64 - 1, 1.5, 1e308]
    values = {"numbers": numbers, "text": "\U0001f600 é", "none": None, "yes": True}
    assert parse_json(json.dumps(values).encode(), refuse) == values
    assert parse_json(json.dumps(values, ensure_ascii=False), refuse) == values
    parse_json(nested(DEEPEST), refuse)
    parse_json(nested(DEEPEST, '{"a":', "}"), refuse)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    assert read_json(file, refuse, largest=8) == {"a": 1}
    with pytest.raises(CheckpointError, match=r"^a\.json: has more than 7 bytes$"):
        read_json(file, refuse, largest=7)
    os.truncate(file, 2**28)
    with pytest.raises(CheckpointError, match=r"^a\.json: has more than 134,217,728 bytes$"):
        read_bytes(file, refuse)
    file.write_text("[]")
    with pytest.raises(CheckpointError, match=r"^a\.json: must be a JSON object, not a list$"):
        read_json(file, refuse)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match=r"^a\.json: cannot be read \("):
            read_json(path, refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file or directory\)$"):
        read_json(tmp_path / "nothing", refuse)
    os.symlink(tmp_path / "real", tmp_path / "link")
    (tmp_path / "real").write_text("{}")
    assert read_json(tmp_path / "link", refuse) == {}  # hub caches are made of links


class Part(CheckedModel):
    size: Count


class Whole(CheckedModel):
    parts: dict[str, Part]
    rate: float = 1.0
    places: Annotated[list[Count], Field(max_length=2)] = Field(default=[])


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_model_refuses_numbers_that_are_not_finite(number: str) -> None:
    content = parse_json(f'{{"parts": {{}}, "rate": {number}}}', refuse)
    with pytest.raises(
        CheckpointError, match=r"^a\.json: rate=.*: Input should be a finite number$"
    ):
        check(content, Whole, refuse)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"a": 1}, "parts.a=1: Input should be"),
        ({"a": {"size": -1}}, "parts.a.size=-1: Input should be greater"),
        ({"a": {"size": True}}, "parts.a.size=True: Input should be a valid integer"),
        ({"a": {}}, "parts.a.size: Field required"),
        ({"\x1b[2J": 1}, r"parts.\x1b[2J=1: Input"),
        ({"x" * 10**6: 1}, f"parts.{'x' * 60}=1: Input"),
    ],
)
def test_a_model_says_what_is_wrong_in_one_line(parts: dict[str, object], said: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        check({"parts": parts}, Whole, refuse)
    message = str(raised.value)
    assert message.startswith(f"a.json: {said}")
    assert message.isprintable() and len(message) < 200


def test_a_model_reads_what_it_knows() -> None:
    whole = check({"parts": {"a": {"size": 3, "more": 1}}, "places": [1]}, Whole, refuse)
    assert whole == Whole(parts={"a": Part(size=3)}, places=[1])
