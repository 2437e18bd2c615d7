"""The checkpoints of a run that trains: collects all that one holds, and begins to write it."""

import json
from collections.abc import Callable
from typing import Any

from dist_lm import families
from dist_lm.checkpoint.card import CARD, CardFacts, write_card
from dist_lm.checkpoint.state import compose_state
from dist_lm.data.mix import count_left_out, merge_after
from dist_lm.data.prepared.progress import count_kinds
from dist_lm.errors import UserError
from dist_lm.model import hf
from dist_lm.model.init import flops_per_token
from dist_lm.resume import Run
from dist_lm.runtime.world import Runtime


def save(run: Run, last: bool) -> None:
    """Begin a checkpoint, which is written beside training; wait for the last one. All ranks."""
    config = run.config
    runtime = run.runtime
    runtime.enter(run.state.step, "save")
    tokenizer = run.data.tokenizer
    spec = config.model_spec(tokenizer.vocab_size)
    streams = merge_after(runtime.channel.gather(run.state.streams))
    if last:
        _say_left_out(runtime, streams)
    state = compose_state(
        run.state,
        streams=streams,
        strategy=runtime.strategy,
        world_size=runtime.world_size,
        scaler=runtime.engine.scaler.state_dict(),
        config=config,
        data_identity=run.data.identity,
    )
    contents = {
        "config.json": families.config_json(spec, tokenizer.eot),
        "generation_config.json": families.generation_config_json(tokenizer.eot),
        "state.json": state,
    }
    texts = {name: json.dumps(content, indent=1) for name, content in contents.items()}
    texts[CARD] = write_card(facts_of_card(run))
    with run.metrics.pause("save", run.state.step):
        report_saving(run, run.saver.finish)
        run.saver.begin(run.state.step, spec, runtime.engine.owned, texts, tokenizer)
        if last:
            run.saver.finish()


def facts_of_card(run: Run) -> CardFacts:
    """The facts that the model card of this step tells."""
    config = run.config
    spec = config.model_spec(run.data.tokenizer.vocab_size)
    sources, held_out = run.data.public_facts(config.data)
    return CardFacts(
        config=config,
        spec=spec,
        parameters=hf.number_of_parameters(spec),
        flops_per_token=flops_per_token(spec),
        step=run.state.step,
        steps=run.steps,
        tokens=run.state.tokens,
        sources=sources,
        held_out=held_out,
        curve=run.state.curve,
    )


def _say_left_out(runtime: Runtime, streams: dict[str, Any]) -> None:
    """Print how much the streams have left out in the whole run so far, by kind."""
    left_out = count_left_out(streams)
    if left_out:
        runtime.say(f"left out so far: {count_kinds(left_out)}")


def report_saving(run: Run, look: Callable[[], None]) -> None:
    """Warn about a checkpoint in mid-run that could not be written. It does not end the run."""
    try:
        look()
    except UserError as error:
        run.runtime.say(f"warning: {error}; training goes on")
