"""The model card of a checkpoint: README.md, with the metadata that the hub reads.

It is written from facts alone. It depends on nothing but the run's mathematics, its data and its
figures: not on the time, the machine or the number of processes. So a run that was interrupted
writes the same card. Local paths, credentials and the query of a URL do not get into it.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from dist_lm import __version__
from dist_lm.checkpoint.curve import Curve
from dist_lm.cli import resolve
from dist_lm.config import Config, ModelSpec, flat
from dist_lm.console import count, printable, shorten
from dist_lm.data.public_facts import PublicFacts
from dist_lm.families import family
from dist_lm.model import hf
from dist_lm.model.init import flops_per_token
from dist_lm.pretrained import read_spec

CARD = "README.md"
FAMILY_NAMES = {"llama": "Llama", "qwen3": "Qwen3", "gpt2": "GPT-2", "openai-gpt": "openai-gpt"}
PLACE = "FOLDER"  # stands for the place of the model in commands, until it is published
# Settings of the data and the run that say how the model was trained, and not where anything lies.
DATA_SETTINGS = ("seq_len", "stride", "global_batch", "document_mask", "stream", "packing")
RUN_SETTINGS = ("steps", "epochs", "seed", "precision", "ema")


@dataclass(frozen=True)
class CardFacts:
    """What a card tells."""

    config: Config
    spec: ModelSpec
    parameters: int
    flops_per_token: float  # forward and backward
    step: int
    steps: int | None  # of the whole run, if it is known
    tokens: int  # trained on
    sources: Sequence[PublicFacts]
    held_out: Sequence[PublicFacts]  # validation sets
    curve: Curve

    @property
    def name(self) -> str:
        return f"dist_lm-{shorten(self.parameters)}"


def bare_facts(folder: Path, state: Mapping[str, Any]) -> CardFacts:
    """The facts of a step that was written without a card: all that its own files say."""
    config = resolve((str(folder), flat(state["config"])))
    spec = read_spec(folder)
    return CardFacts(
        config=config,
        spec=spec,
        parameters=hf.number_of_parameters(spec),
        flops_per_token=flops_per_token(spec),
        step=state["step"],
        steps=config.run.steps,
        tokens=state["tokens"],
        sources=[],
        held_out=[],
        curve=Curve.restored(state.get("curve", {})),
    )


def write_card(facts: CardFacts) -> str:
    """The whole text of README.md."""
    head = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{head}---",
        f"# {facts.name}, step {facts.step}",
        _what_it_is(facts),
        "## How to load it",
        _how_to_load(facts),
        "## Curve",
        _curve(facts.curve),
        "## Held-out text",
        _held_out(facts),
        "## Training data",
        _data(facts),
        "## Training",
        _training(facts),
    ]
    return printable("\n\n".join(parts) + "\n")


def metadata(facts: CardFacts) -> dict[str, Any]:
    """What the hub reads of the card."""
    has_family = family(facts.spec.config) is not None
    head: dict[str, Any] = {
        "library_name": "transformers" if has_family else "dist_lm",
        "pipeline_tag": "text-generation",
        "tags": ["dist_lm", "text-generation"],
    }
    datasets = dict.fromkeys(chain.from_iterable(source.hub for source in facts.sources))
    if datasets:
        head["datasets"] = list(datasets)
    results = _results(facts)
    if results:
        head["model-index"] = [{"name": facts.name, "results": results}]
    return head


def _results(facts: CardFacts) -> list[dict[str, Any]]:
    """The newest evaluation as the hub has results."""
    results = []
    for name, loss, bits in _newest(facts.curve):
        if not math.isfinite(loss) or not math.isfinite(bits):
            continue
        metrics = [
            {"type": "loss", "value": round(loss, 4), "name": "loss (nats a token)"},
            {"type": "bits_per_byte", "value": round(bits, 4), "name": "bits per byte"},
        ]
        results.append(
            {
                "task": {"type": "text-generation", "name": "Text generation"},
                "dataset": {"type": "held-out-text", "name": f"held-out text ({name})"},
                "metrics": metrics,
            }
        )
    return results


def _newest(curve: Curve) -> list[tuple[str, float, float]]:
    """Validation set, loss and bits per byte of the newest evaluation."""
    if curve.newest is None:
        return []
    return [(name, loss, bits) for name, (loss, bits) in curve.newest["sets"].items()]


def _what_it_is(facts: CardFacts) -> str:
    model = facts.spec.config
    kind = family(model)
    if kind:
        layout = f"in the {FAMILY_NAMES[kind]} layout of transformers"
    else:
        layout = "in a layout that only dist_lm reads"
    of_steps = f" of {facts.steps:,}" if facts.steps else ""
    text = (
        f"A language model with {facts.parameters:,} parameters, {layout}. It has"
        f" {count(model.layers, 'layer')} of width {model.width:,}, a vocabulary of"
        f" {facts.spec.vocab_size:,} tokens, and a context of {facts.spec.seq_len:,} tokens. It is"
        f" the checkpoint after step {facts.step:,}{of_steps}, trained by dist_lm {__version__}"
        f" on {facts.tokens:,} tokens."
    )
    if facts.config.run.init_from:
        text += " Its weights started from those of another model."
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _how_to_load(facts: CardFacts) -> str:
    """Commands, each of which a test runs on a folder that holds this card."""
    parts = [f"`{PLACE}` is this folder, or its name on the hub."]
    if family(facts.spec.config):
        parts.append(
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{PLACE}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}")\n'
            "```"
        )
    parts.append(
        "With dist_lm it generates text, and can be trained on:\n\n"
        "```\n"
        f'python -m dist_lm.generate --ckpt {PLACE} --prompt "..."\n'
        f"python -m dist_lm.train --run.init_from {PLACE} --data.input TEXT --run.dir RUN\n"
        "```"
    )
    return "\n\n".join(parts)


def _curve(curve: Curve) -> str:
    if not curve.points:
        return "No points of it were kept."
    rows = [("step", "tokens", "training loss")]
    for step, tokens, loss, _ in curve.points:
        rows.append((f"{step:,.0f}", f"{tokens:,.0f}", f"{loss:.4f}"))
    note = "Each loss is the mean since the step above it, in nats a token."
    return f"{table(rows)}\n\n{note}"


def _held_out(facts: CardFacts) -> str:
    curve = facts.curve
    if curve.newest is None:
        return "It was not evaluated."
    tokens = {source.name: source.held_out_tokens for source in facts.held_out}
    rows = [("set", "tokens", "step", "loss", "perplexity", "bits per byte")]
    for name, loss, bits in _newest(curve):
        perplexity = f"{math.exp(min(loss, 700)):.2f}"
        size = _amount(tokens.get(name))
        step = f"{curve.newest['step']:,}"
        rows.append((plain(name), size, step, f"{loss:.4f}", perplexity, f"{bits:.4f}"))
    most = facts.config.run.eval_batches * facts.config.data.global_batch
    note = f"An evaluation reads at most {count(most, 'sequence')} of a set, always the same ones."
    parts = [table(rows), note]
    if len(curve.evaluations) > 1:
        parts += ["Loss at earlier evaluations:", _earlier(curve)]
    return "\n\n".join(parts)


def _earlier(curve: Curve) -> str:
    """The losses of the evaluations that were kept, one row each."""
    names = dict.fromkeys(chain.from_iterable(facts["sets"] for facts in curve.evaluations))
    rows = [("step", *(plain(name) for name in names))]
    for facts in curve.evaluations:
        cells = []
        for name in names:
            loss, _ = facts["sets"].get(name, [math.nan, math.nan])
            cells.append(f"{loss:.4f}" if math.isfinite(loss) else "-")
        rows.append((f"{facts['step']:,}", *cells))
    return table(rows)


def _data(facts: CardFacts) -> str:
    if not facts.sources:
        return "It is not known: the step was written before cards told it."
    weights = {name: spec.weight for name, spec in facts.config.data.named_sources().items()}
    total = sum(weights.values())
    rows = [("source", "share", "from", "documents", "text", "tokens", "held out")]
    for source in facts.sources:
        share = weights.get(source.name, total) / total
        stored = _bytes(source.text_bytes)
        if source.files:
            stored = f"{count(source.files, 'file')} of {_bytes(source.file_bytes)}"
        rows.append(
            (
                source.name,
                f"{share:.1%}",
                ", ".join(plain(place) for place in source.places),
                _amount(source.documents),
                stored,
                _amount(source.tokens),
                _amount(source.held_out_tokens),
            )
        )
    parts = [table(rows)]
    if facts.config.data.stages:
        parts.append("The shares changed during training (`data.stages`).")
    sizes = [source.tokens for source in facts.sources]
    if len(sizes) == 1 and sizes[0]:
        parts.append(f"Training made {facts.tokens / sizes[0]:.2f} passes over its tokens.")
    return "\n\n".join(parts)


def _training(facts: CardFacts) -> str:
    flops = facts.flops_per_token * facts.tokens
    text = (
        f"{facts.tokens:,} tokens at {facts.flops_per_token:.4g} floating-point operations each"
        f" make {flops:.4g} in all (PaLM, appendix B; forward and backward, nothing computed"
        " twice). The settings:"
    )
    return f"{textwrap.fill(text, 100)}\n\n```yaml\n{settings_text(facts.config)}```"


def settings_text(config: Config) -> str:
    """The settings that decide the mathematics, as YAML."""
    dumped = config.model_dump(mode="json")
    chosen = {
        "model": dumped["model"],
        "data": {name: dumped["data"][name] for name in DATA_SETTINGS},
        "optim": dumped["optim"],
        "run": {name: dumped["run"][name] for name in RUN_SETTINGS},
    }
    return yaml.safe_dump(chosen, sort_keys=False)


def table(rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _amount(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _bytes(number: int | None) -> str:
    return "-" if number is None else f"{shorten(number)}B"


def plain(text: str) -> str:
    """Text from outside, which cannot end a cell or begin a format."""
    cleaned = "".join(" " if character in "|`\n\r<>[]" else character for character in text)
    return f"`{cleaned}`"
