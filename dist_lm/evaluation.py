"""An evaluation in the middle of a run: held-out loss, and samples of what the model writes."""

from dist_lm.checkpoint.folder import step_name
from dist_lm.console import dispensable
from dist_lm.disk import open_own
from dist_lm.resume import Run
from dist_lm.sample import Sampling, sample
from dist_lm.validate import validate

SAMPLE_TOKENS = 96  # of each text that an evaluation writes to samples.md
PROMPT_TOKENS = 16  # of held-out text, where run.sample_prompt is unset
SAMPLE_TEMPERATURES = (0.0, 0.8)


def evaluate(run: Run, is_saving: bool = False) -> None:
    """Measure the held-out text and write samples. All ranks, in step.

    `is_saving`: this step gets a checkpoint, which the samples name.
    """
    run.runtime.enter(run.state.step, "evaluation")
    with run.metrics.pause("evaluation", run.state.step):
        figures = {}
        for name in run.data.val:
            figures[name] = _evaluate_set(run, name, name)
            if run.config.run.ema:
                with run.runtime.engine.averaged():
                    figures[f"{name} of ema"] = _evaluate_set(run, name, f"{name} of ema")
        run.state.curve.add_evaluation(run.state.step, figures)
        first = next(iter(figures.values()))  # this set decides which checkpoint is the best
        run.state.val_loss = first["val_loss"]
        write_samples(run, first["val_loss"], is_saving)


def _evaluate_set(run: Run, name: str, label: str) -> dict[str, float]:
    """The figures of a validation set, recorded under a label. All ranks."""
    figures = validate(
        run.runtime,
        run.runtime.engine.model,
        run.data.val[name],
        run.config,
        run.layout,
        run.data.tokenizer,
    )
    run.metrics.evaluation(run.state.step, label, figures)
    return figures


def write_samples(run: Run, val_loss: float, is_saving: bool) -> None:
    """Continue a prompt at each temperature, for samples.md. All ranks; rank 0 writes.

    Where every rank holds all weights, rank 0 does it alone. The texts are one batch: half the
    forwards, in each of which ZeRO-3 gathers weights.
    """
    if run.runtime.engine.has_replicas and not run.runtime.is_main:
        return
    tokenizer = run.data.tokenizer
    tokens = prompt_of_samples(run)
    prompt = run.config.run.sample_prompt or tokenizer.decode(tokens)
    rows = len(SAMPLE_TEMPERATURES)
    settings = Sampling(SAMPLE_TOKENS, SAMPLE_TEMPERATURES)
    with run.runtime.engine.autocast():
        *_, continuations = sample(
            run.model, tokenizer, [tokens] * rows, settings, [0] * rows, stop_early=False
        )
    checkpoint = "no checkpoint of this step"
    if is_saving:
        checkpoint = f"checkpoint {step_name(run.state.step)}"
    texts = [f"## step {run.state.step}, loss {val_loss:.4f}, {checkpoint}", f"prompt {prompt!r}"]
    for temperature, continuation in zip(SAMPLE_TEMPERATURES, continuations, strict=True):
        texts.append(f"temperature {temperature}\n```\n{prompt}{continuation.text}\n```")
    if run.runtime.is_main:
        path = run.dir / "samples.md"
        with dispensable(path), open_own(path, "a", encoding="utf-8") as file:
            file.write("\n".join(texts) + "\n\n")


def prompt_of_samples(run: Run) -> list[int]:
    """The tokens of run.sample_prompt, or else the first ones of the held-out text."""
    tokenizer = run.data.tokenizer
    prompt = run.config.run.sample_prompt
    if prompt:
        return tokenizer.encode(prompt) or [tokenizer.eot]
    held_out = next(iter(run.data.val.values()))
    data = run.config.data
    (tokens,) = held_out.read([0], data.seq_len, data.stride)
    first = tokens[: min(PROMPT_TOKENS, data.seq_len)].tolist()
    if tokenizer.eot in first:  # of one document only
        first = first[: first.index(tokenizer.eot)]
    return first or [tokenizer.eot]
