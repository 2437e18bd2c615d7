"""The engine of one process and DDP: where gradients lie, and what is compiled."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dist_lm import loop, own_optimizers
from dist_lm.cli import load
from dist_lm.config import Config, ModelConfig, ModelSpec
from dist_lm.model.gpt import GPT
from dist_lm.outcome import TRAIN, Attempt
from dist_lm.runtime.engine import ReplicatedEngine
from dist_lm.runtime.start import _bucket_mb
from dist_lm.runtime.strategy import Strategy
from dist_lm.runtime.zero import ZeroEngine
from tests.procs import finish, start_ranks
from tests.test_train import assert_same_curve, losses, tiny


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
    from torch._dynamo.testing import CompileCounter  # slow

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


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(stage=1), Strategy(stage=2)])
def test_a_model_is_built_on_the_device(strategy: Strategy) -> None:
    """Whole models in host memory, one a rank, would not fit. The device here is torch's meta."""
    accelerator = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("meta"))
    make = ZeroEngine if strategy.stage else ReplicatedEngine
    settings = [{}] if strategy.stage else []
    spec = ModelSpec(ModelConfig(layers=1, width=32), vocab_size=11, seq_len=8)
    with make(accelerator, Config(), strategy, *settings).construction():
        model = GPT(spec)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {table.device.type for table in model.buffers()} == {"cpu"}


@pytest.mark.parametrize(
    ("recipe", "has_gpu", "expected"),
    [("gpt2-774m", True, 25), ("gpt2-1558m", True, 100), ("gpt2-1558m", False, 1024)],
)
def test_gradients_of_large_models_are_summed_in_large_buckets(
    recipe: str, has_gpu: bool, expected: int
) -> None:
    config, _ = load(["--config", f"configs/{recipe}.yaml"], TRAIN)
    assert _bucket_mb(config, has_gpu) == expected


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_divide_muon_s_matrices_on_gpus(prepared: Path, tmp_path: Path, world: int) -> None:
    """The curve of one process, and a third of the work at most; here on CPUs, which do not."""
    words = tiny(prepared, "--optim.name", "muon", "--optim.lr", "2e-3", "--run.steps", "6")
    output = in_ranks(world, "train_dividing", "--run.dir", str(tmp_path / "run"), *words)
    # Two layers have six parts of q, k, v, two matrices out, and two each of gate, up and down.
    made = {2: 3 + 1 + 2 + 1, 3: 2 + 1 + 2 + 1}[world]
    assert output.count(f"matrices a step: {made}\n") == world, output
    in_ranks(1, "train_eagerly", "--run.dir", str(tmp_path / "one"), *words)
    assert_same_curve(tmp_path / "run", tmp_path / "one", 1e-5)


def train_dividing(*words: str) -> None:
    """As a rank: divide the matrices as on GPUs, and print how many this rank orthogonalised."""
    counts: list[int] = []
    newton_schulz, wrap = own_optimizers.newton_schulz, ReplicatedEngine._wrap

    def counted(matrices_NRC: Tensor, dtype: torch.dtype) -> Tensor:
        counts.append(len(matrices_NRC))
        return newton_schulz(matrices_NRC, dtype)

    def as_on_gpus(engine: ReplicatedEngine, *arguments: object) -> None:
        engine.on_gpu = True
        wrap(engine, *arguments)
        engine.on_gpu = False

    own_optimizers.newton_schulz, ReplicatedEngine._wrap = counted, as_on_gpus
    run(words)
    print(f"matrices a step: {sum(counts) / 7:g}")  # create_state makes a seventh step
