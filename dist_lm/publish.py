"""Publish a run's checkpoints on the hub; the command line, judged before anything is read."""

import re
from typing import Literal

from pydantic import Field

from dist_lm.cli import Command, read_flags
from dist_lm.config import Section
from dist_lm.errors import UserError, run_entry

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


class PublishFlags(Section):
    """Publish a run's checkpoints on the hub.

    The repository gets the weights, the tokenizer and the model card, with the evaluations of
    evals.jsonl. It is private unless you ask otherwise. The run folder is only read, and may belong
    to a run that goes on. A command that was interrupted can be given again: what was uploaded is
    not uploaded again.

    It logs in as `hf auth login` or HF_TOKEN say, at HF_ENDPOINT if that is set.
    """

    run: str = Field(description="A run folder, or a step folder.")
    repo: str = Field(description="The repository, owner/name or name; made if it does not exist.")
    steps: Literal["best", "newest", "all"] = Field(
        "best",
        description="Which checkpoint: by validation loss, the newest, or all of them. With all,"
        " each step is a revision of its own (step-00001000), and main is the best.",
    )
    public: bool = Field(False, description="A repository that is made is public.")
    optimizer: bool = Field(
        False, description="Upload also what a run needs to resume: the optimizer and its state."
    )


PUBLISH = Command("python -m dist_lm.publish RUN --repo OWNER/NAME", PublishFlags, positional="run")


def main(argv: list[str]) -> None:
    flags = read_flags(argv or ["--help"], PUBLISH)
    if not _NAME.fullmatch(flags.repo):
        raise UserError(f"--repo={flags.repo}: no name of a repository; rule: owner/name or name")
    from dist_lm.publishing import publish  # torch, which is slow to import

    publish(
        flags.run,
        flags.repo,
        which=flags.steps,
        public=flags.public,
        with_optimizer=flags.optimizer,
    )


if __name__ == "__main__":
    run_entry(main)
