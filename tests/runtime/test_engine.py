"""The engine of one process and DDP: where gradients lie, and what is compiled."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from dist_lm import loop
from dist_lm.cli import load
from dist_lm.model.gpt import GPT
from dist_lm.outcome import TRAIN, Attempt
from dist_lm.runtime.engine import ReplicatedEngine
from tests.procs import finish, start_ranks
from tests.test_train import losses, tiny


def in_ranks(world: int, function: str, *arguments: str) -> str:
    """What a function of this file prints in that many ranks."""
    listed = ", ".join(map(repr, arguments))
    code = f"from tests.runtime import test_engine; test_engine.{function}({listed})"
    got, output = finish(start_ranks(world, "-c", code))
    assert got == 0, output
    return output


def run(words: tuple[str, ...]) -> None:
    config, _ = load(list(words), TRAIN)
    loop.run_to_end(config, Attempt(Path(config.run.dir)))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", ["4", "2"])
def test_ddp_holds_gradients_once(prepared: Path, tmp_path: Path, micro_batch: str) -> None:
    """They are views of DDP's one bucket after each backward, also where several make up a step."""
    words = tiny(prepared, "--run.steps", "3", "--data.micro_batch", micro_batch)
    output = in_ranks(2, "train_looking_at_gradients", "--run.dir", str(tmp_path / "run"), *words)
    passes = 3 * 4 // int(micro_batch)
    # The first pass of the warm-up has the buckets that DDP then replaces.
    assert output.count(f"storages: {[1] * (2 + passes)}, after the warm-up 1\n") == 2, output


def train_looking_at_gradients(*words: str) -> None:
    """As a rank: after each backward count the storages that all gradients lie in."""
    counts, storages = [], []
    backward = ReplicatedEngine._backward

    def noted(engine: ReplicatedEngine, loss: Tensor) -> None:
        backward(engine, loss)
        grads = [p.grad for p in engine.bare.parameters()]
        found = {grad.untyped_storage().data_ptr() for grad in grads}
        counts.append(len(found))
        storages.append(found)

    ReplicatedEngine._backward = noted
    run(words)
    of_steps = set().union(*storages[2:])
    print(f"storages: {counts}, after the warm-up {len(of_steps)}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
def test_all_layers_share_one_graph_and_the_warm_up_compiles_it(
    prepared: Path, tmp_path: Path
) -> None:
    """With dropout and document masks; an evaluation needs one more."""
    words = ["--model.layers", "10", "--model.dropout", "0.1", "--data.document_mask", "true"]
    words += ["--run.steps", "2", "--run.eval_every", "2", "--data.micro_batch", "2"]
    words = tiny(prepared, *words)
    in_ranks(2, "train_eagerly", "--run.dir", str(tmp_path / "eager"), *words)
    output = in_ranks(2, "train_counting_graphs", "--run.dir", str(tmp_path / "run"), *words)
    assert output.count("graphs of the warm-up 1, of all 2\n") == 2, output
    figures = [[s["loss"], s["grad_norm"]] for s in losses(tmp_path / "run")]
    assert figures == [[s["loss"], s["grad_norm"]] for s in losses(tmp_path / "eager")]


def train_eagerly(*words: str) -> None:
    run(words)


def train_counting_graphs(*words: str) -> None:
    """As a rank: compile with a backend that only counts, and print how many graphs it got."""
    counter = CompileCounter()
    of_warm_up = []
    compile_blocks, warm_up = GPT.compile_for_training, ReplicatedEngine.warm_up

    def counted(model: GPT, loss: bool) -> None:
        assert not loss  # on a CPU
        compile_blocks(model, loss=False, backend=counter)

    def noted_warm_up(engine: ReplicatedEngine, loss: object) -> None:
        warm_up(engine, loss)
        of_warm_up.append(counter.frame_count)

    GPT.compile_for_training = counted
    ReplicatedEngine.warm_up = noted_warm_up
    run((*words, "--run.compile", "true"))
    assert not torch._dynamo.config.optimize_ddp
    print(f"graphs of the warm-up {of_warm_up[0]}, of all {counter.frame_count}")
