"""The model card of a step: valid for the hub, private, and the same after any interruption."""

import json
import math
import re
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from dist_lm.checkpoint.card import CardFacts, settings_text, write_card
from dist_lm.checkpoint.curve import MOST, Curve, CurveFacts
from dist_lm.checkpoint.state import TrainState, read_state
from dist_lm.cli import resolve
from dist_lm.config import Config, ModelSpec
from dist_lm.data.public_facts import LOCAL, PublicFacts, facts_of_files, public_url
from dist_lm.data.text.files import TextFile
from dist_lm.errors import UserError
from tests.conftest import state_of
from tests.procs import train
from tests.test_train import tiny

SETS = {"new": {"val_loss": 2.5, "val_bits_per_byte": 1.25}}


def curve_of(steps: int, start: int = 0, curve: Curve | None = None) -> Curve:
    """Losses and evaluations of so many steps; the loss of a step is its number."""
    curve = curve or Curve()
    for step in range(start + 1, steps + 1):
        curve.add_step(step, 100 * step, float(step))
        if step % 3 == 0:
            curve.add_evaluation(step, SETS | {"old": {"val_loss": step, "val_bits_per_byte": 1}})
    return curve


def facts_of(config: Config, **changes: Any) -> CardFacts:
    facts = CardFacts(
        config=config,
        spec=ModelSpec(config.model, 300, 64),
        parameters=41_152,
        flops_per_token=1e6,
        step=12,
        steps=40,
        tokens=1_200,
        sources=[PublicFacts("text", ("own/data",), hub=("own/data",), tokens=600)],
        held_out=[PublicFacts("new", (LOCAL,), held_out_tokens=77)],
        curve=curve_of(12),
    )
    return replace(facts, **changes)


# --- the curve


@pytest.mark.parametrize("steps", [1, 5, 31, 32, 33, 500, 2011])
def test_a_curve_is_the_same_however_often_it_was_read_back(steps: int) -> None:
    whole = curve_of(steps)
    cut = Curve()
    for start in range(0, steps, 7):
        facts = json.loads(json.dumps(asdict(cut)))
        CurveFacts.model_validate(facts)
        cut = curve_of(min(start + 7, steps), start, Curve.restored(facts))
    assert asdict(cut) == asdict(whole)


def test_a_long_curve_has_few_points_that_mean_all_steps() -> None:
    curve = curve_of(5000)
    assert MOST // 2 <= len(curve.points) < MOST
    assert MOST // 2 <= len(curve.evaluations) < MOST
    first = 1
    for step, tokens, loss, steps in curve.points:
        assert tokens == 100 * step
        assert steps == step - first + 1
        assert loss == pytest.approx((first + step) / 2)
        first = step + 1
    assert len({point[3] for point in curve.points}) == 1
    apart = {b["step"] - a["step"] for a, b in pairwise(curve.evaluations)}
    assert len(apart) == 1
    assert curve.newest is not None and curve.newest["step"] == 4998


def test_steps_without_a_loss_weigh_nothing() -> None:
    """Such as those that fp16 skips: the curve's mean is that of the others."""
    curve = Curve()
    skipped = (5, 2 * MOST + 1)
    for step in range(1, 4 * MOST + 1):
        curve.add_step(step, step, math.nan if step in skipped else float(step))
    assert sum(point[3] for point in curve.points) + curve.steps == 4 * MOST - 2
    total = sum(point[2] * point[3] for point in curve.points) + curve.loss_sum
    assert total == pytest.approx(sum(range(1, 4 * MOST + 1)) - sum(skipped))


def test_a_run_of_before_has_no_curve_and_begins_one(tmp_path: Path) -> None:
    facts = state_of(1001)
    (tmp_path / "state.json").write_text(json.dumps(facts))
    state = TrainState.restored(read_state(tmp_path))
    curve = curve_of(2000, 1001, state.curve)
    assert [point[0] for point in curve.points] == sorted({point[0] for point in curve.points})
    assert sum(point[3] for point in curve.points) + curve.steps == 999
    state.curve.add_step(2001, 1, math.nan)  # an overflow of fp16
    assert all(math.isfinite(point[2]) for point in state.curve.points)


@pytest.mark.parametrize(
    "curve",
    [
        {"every": 0},
        {"points": [[1, 2, 3]]},
        {"points": [[1, 2, 3, 4]] * (MOST + 1)},
        {"evaluations": [{"step": 1, "sets": {"a": [1]}}]},
        {"newest": {"step": 1}},
        {"more": 1},
    ],
)
def test_a_hostile_curve_is_refused(curve: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state_of(1, curve=curve)))
    with pytest.raises(UserError, match=r"state\.json: curve"):
        read_state(tmp_path)


# --- the card


def test_the_hub_s_own_library_takes_the_card() -> None:
    card = ModelCard(write_card(facts_of(Config())))
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.datasets == ["own/data"] and data.license is None
    assert data.model_name == "dist_lm-41.2k"
    figures = {}
    for result in data.eval_results:
        figures[result.dataset_name, result.metric_type] = result.metric_value
    assert figures["held-out text (new)", "loss"] == 2.5
    assert figures["held-out text (old)", "loss"] == 12
    assert len(figures) == 4
    again = ModelCard(str(card))  # as the library writes it
    assert again.data.to_dict() == data.to_dict() and again.text.strip() == card.text.strip()
    for name in data.datasets:
        huggingface_hub.utils.validate_repo_id(name)


def test_a_card_tells_its_figures() -> None:
    text = write_card(facts_of(Config()))
    unwrapped = text.replace("\n", " ")
    for words in (
        "41,152 parameters, in the Llama layout",
        "after step 12 of 40",
        "| 12 | 1,200 | 12.0000 |",
        "| `new` | 77 | 12 | 2.5000 | 12.18 | 1.2500 |",
        "| text | 100.0% | `own/data` | - | - | 600 | - |",
        "Training made 2.00 passes",
        "make 1.2e+09 in all",
    ):
        assert words in unwrapped, words
    settings = yaml.safe_load(settings_text(Config()))
    assert settings["model"] == Config().model.model_dump(mode="json")
    assert settings["data"]["seq_len"] == 256 and settings["run"]["seed"] == 1
    other = resolve(("test", {"model.qk_norm": True, "model.positions": "none"}))
    text = write_card(facts_of(other, curve=Curve()))
    assert "library_name: dist_lm" in text and "AutoModel" not in text
    assert "model-index" not in text and "It was not evaluated." in text


SECRETS = ("hunter2", "Signature", "me@", "/home", "private", "sekrit")


def test_nothing_private_gets_into_a_card() -> None:
    urls = [
        "https://me:hunter2@example.org/a/b.jsonl?X-Amz-Signature=sekrit#private",
        "s3://bucket/text/*.parquet",
        "file:///home/me/private.txt",
        "/home/me/private/*.txt",
        "private/notes",
    ]
    config = resolve(
        (
            "test",
            {
                "data.input": urls,
                "data.stream": True,
                "data.tokenizer": "/home/me/tokenizer.json",
                "run.dir": "/home/me/runs/private",
                "run.init_from": "/home/me/base",
                "run.sample_prompt": "sekrit",
            },
        )
    )
    files = [TextFile("b.jsonl", urls[0], 700), TextFile("private.txt", "/home/me/x", 300)]
    source = facts_of_files("text", config.data.as_source(), files)
    assert source.places == ("https://example.org/a/b.jsonl", "s3://bucket/text/*.parquet", LOCAL)
    assert source.hub == ()  # no file of that name: it is a folder here
    text = write_card(facts_of(config, sources=[source]))
    assert not [secret for secret in SECRETS if secret in text]
    assert "2 files of 1kB" in text
    assert "started from those of another model" in text


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://h:8080/a", "https://h:8080/a"),
        ("hf://datasets/own/data@main/x.parquet", "hf://datasets/own/data@main/x.parquet"),
        ("HTTPS://U:P@H/a?b=c", "https://h/a"),
        ("memory://h/x", ""),
        ("https://h:port/a", ""),
        ("local.txt", ""),
    ],
)
def test_what_is_public_of_a_url(url: str, public: str) -> None:
    assert public_url(url) == public


def test_names_from_outside_cannot_break_a_table() -> None:
    source = PublicFacts("text", ("a|b`c\n# d<script>\x1b[2J",))
    text = write_card(facts_of(Config(), sources=[source]))
    (row,) = re.findall(r"^\| text .*$", text, re.MULTILINE)
    assert row.count("|") == 8 and "<" not in row
    assert "\x1b" not in text and "# d<" not in text


def test_a_step_has_a_card_whose_code_runs(prepared: Path, tmp_path: Path) -> None:
    flags = tiny(prepared, "--run.steps", "4", "--run.eval_every", "2")
    train(tmp_path / "run", *flags)
    step = tmp_path / "run/step-00000004"
    text = (step / "README.md").read_text()
    manifest = json.loads((step / "manifest.json").read_text())
    assert "README.md" in manifest["files"]
    card = ModelCard.load(step / "README.md")
    state = json.loads((step / "state.json").read_text())
    losses = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert losses["loss"] == round(state["val_loss"], 4)
    assert str(tmp_path) not in text and str(prepared) not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(step)), scope)
    ids = scope["tokenizer"]("def", return_tensors="pt").input_ids
    assert torch.isfinite(scope["model"](ids).logits).all()
