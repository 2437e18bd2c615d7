"""The list of all sections: what each is called, where it is, how long it takes.

Estimates are seconds on one H100 with 16 processor cores. They were reasoned, not measured, until a
result file under benchmarks/results/gpu/ says otherwise. The order is that of starting: first what
may not be skipped.
"""

from dataclasses import dataclass, replace

from benchmarks.gpu.scheduler import Task


@dataclass(frozen=True)
class Section:
    """A section: its task, the function that does it, and what it shows."""

    task: Task
    function: str  # module and function below benchmarks/gpu/sections/
    title: str
    warm_share: float = 0.0  # of the card's memory, for a run that fills the compile cache before


def _check(
    name: str,
    function: str,
    title: str,
    *,
    seconds: float,
    must: bool = False,
    gigabytes: float = 4,
) -> Section:
    """A section of checks. They run side by side."""
    task = Task(
        name,
        "correctness",
        seconds=seconds,
        timeout=2.5 * seconds,
        must=must,
        gigabytes=gigabytes,
    )
    return Section(task, function, title)


def _timing(
    name: str,
    function: str,
    title: str,
    *,
    seconds: float,
    must: bool = False,
    warm_share: float = 0.0,
) -> Section:
    """A section that measures time. It runs alone."""
    task = Task(
        name,
        "speed",
        seconds=seconds,
        timeout=3 * seconds,
        must=must,
        alone=True,
        gigabytes=10_000,
    )
    return Section(task, function, title, warm_share)


SECTIONS = [
    _check("C1", "precision.cpu_and_cuda", "CPU against CUDA, fp32", seconds=40, must=True),
    _check("C2", "precision.bf16_and_fp32", "bf16 against fp32", seconds=30, must=True),
    _check("C3", "precision.compiled", "compiled against eager", seconds=60, must=True),
    _check("C4", "resuming.resume", "twice the same; stop and resume", seconds=60, must=True),
    _check("C5", "ranks.ddp", "DDP against one process", seconds=50, must=True, gigabytes=8),
    _check("C6", "ranks.zero", "ZeRO against one process", seconds=60, must=True, gigabytes=8),
    _check("C7", "kernels.attention_and_loss", "attention and loss", seconds=30, gigabytes=8),
    _check("C10", "syncs.no_host_sync", "no host sync in a step", seconds=40),
    _check("C9", "generation.generate", "generate against transformers", seconds=25),
    _check("C8", "variants.dropout_and_optimizers", "dropout, Muon, fp16, EMA", seconds=30),
    _timing("M1", "card.basics", "matrix products, copies, attention kernels", seconds=12),
    _timing(
        "S1",
        "training.against_plain_loop",
        "124M: train against a bare loop and a nanoGPT-style one",
        seconds=60,
        must=True,
        warm_share=0.55,
    ),
    _timing(
        "S2-1558m", "sizes.m1558", "1558M: MFU, memory", seconds=60, must=True, warm_share=0.85
    ),
    _timing("S5", "saving.stall", "checkpoint: how long training waits", seconds=40),
    _timing("S4", "decoding.small", "decoding, 124M", seconds=30),
    _timing("S2-350m", "sizes.m350", "350M: MFU, memory", seconds=35),
    _timing("S4-1558m", "decoding.large", "decoding, 1558M", seconds=45),
    _timing("S3", "ablations.ablate", "what each choice is worth, 124M", seconds=60),
    _timing("S2-774m", "sizes.m774", "774M: MFU, memory", seconds=40),
    _timing("S1-hf", "training.against_transformers", "124M: against transformers", seconds=60),
    _timing("S6", "scaling.cards", "124M: all cards against one", seconds=60),
]
BY_NAME = {section.task.name: section for section in SECTIONS}


def choose(only: list[str]) -> list[Section]:
    """The sections of these names. `S2` also means `S2-350m`. Raises ValueError for others."""
    if not only:
        return SECTIONS
    chosen = []
    for word in only:
        found = [name for name in BY_NAME if is_meant(word, name)]
        if not found:
            raise ValueError(f"--only {word} must be one of: {', '.join(BY_NAME)}")
        chosen += found
    return [section for section in SECTIONS if section.task.name in chosen]


def is_meant(word: str, name: str) -> bool:
    """Whether a word of the command line names this section."""
    return name.lower() == word.lower() or name.lower().startswith(f"{word.lower()}-")


def tasks_of(sections: list[Section], card_gigabytes: float) -> list[Task]:
    """The tasks of sections in the order of starting.

    Compiling takes long and needs few of the card's units, so it is done beside the checks.
    """
    checks = [section.task for section in sections if not section.task.alone]
    timings = [section.task for section in sections if section.task.alone]
    must = [task for task in checks if task.must]
    others = [task for task in checks if not task.must]
    warming = []
    if checks:  # otherwise nothing runs beside which it could be done
        for section in sections:
            if section.warm_share:
                warming.append(_warming_of(section, card_gigabytes))
    return [*warming[:1], *must, *warming[1:], *others, *timings]


def _warming_of(section: Section, card_gigabytes: float) -> Task:
    """One step of a section that measures, for the compile cache alone."""
    task = section.task
    return replace(
        task,
        name=f"{task.name}-warm",
        kind="warm",
        must=False,
        alone=False,
        gigabytes=section.warm_share * card_gigabytes,
    )
