"""Train a GPT: `accelerate launch dist_lm/train.py [--config FILE] [--section.field VALUE ...]`.

torchrun and plain python start it too. This file is only the command. It reads the command line and
listens to signals, and only then imports the loop, because torch takes seconds to import: a typing
mistake is answered at once, and a signal during the import is not lost. Running the same command
again goes on where the run folder stands.
"""

from dist_lm.errors import run_entry
from dist_lm.launcher import die_with_launcher


def main(argv: list[str]) -> None:
    """Train as the command line says; record how the run ended, and exit with its code."""
    # Slow: pydantic takes part of a second, and die_with_launcher() must have come before.
    from pathlib import Path

    from dist_lm.cli import load
    from dist_lm.environment import refuse_bad_environment
    from dist_lm.outcome import TRAIN, Attempt

    config, flags = load(argv, TRAIN)
    refuse_bad_environment()
    attempt = Attempt(Path(config.run.dir))
    attempt.listen()

    # Slow: torch and accelerate take seconds. From here on signals are heard.
    from dist_lm.loop import run_to_end

    attempt.run(
        lambda: run_to_end(config, attempt, launch=flags.launch, allow_change=flags.allow_change)
    )


if __name__ == "__main__":
    die_with_launcher()  # before all imports that take time: a launcher may be killed during them
    run_entry(main, prints_result=False)
