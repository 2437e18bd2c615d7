"""The engine of run.exact, with simulated ranks in this process: sums in any order, one result."""

import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_lm.cli import resolve
from dist_lm.config import Config, ModelSpec, batch_layout, units_of
from dist_lm.data.order import rank_places
from dist_lm.errors import UserError
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.optim import make_optimizer, set_lr
from dist_lm.runtime.exact import ExactEngine
from dist_lm.runtime.fixed_point import BUCKET, COLUMNS, SCALE, FixedPointSums, Hash
from dist_lm.runtime.strategy import Strategy, refuse_combinations

VOCABULARY = 50


def config_of(**more: Any) -> Config:
    settings = {
        "model.layers": 2,
        "model.heads": 2,
        "model.width": 32,
        "data.seq_len": 16,
        "data.global_batch": 13,
        "data.micro_batch": 2,
        "run.exact": True,
    }
    return resolve(("test", settings | more))


def engine_of(config: Config, rank: int, world: int) -> ExactEngine:
    """A rank's engine, with a model as a run begins."""
    device = torch.device("cpu")
    accelerator: Any = SimpleNamespace(num_processes=world, process_index=rank, device=device)
    engine = ExactEngine(accelerator, config, Strategy())
    model = GPT(ModelSpec(config.model, VOCABULARY, config.data.seq_len))
    optimizer = make_optimizer(model, config.optim, config.run.precision)
    engine.prepare(model, optimizer, {}, channel=None)  # type: ignore[arg-type] # sends nothing
    init_weights(model, 1, ((part.name, part.start, part.weight) for part in engine.owned()))
    engine.start_average()
    return engine


def rows_of_step(config: Config, step: int) -> tuple[Tensor, Tensor]:
    """The global batch, and behind it a row without targets that fills the last unit."""
    generator = torch.Generator().manual_seed(step)
    shape = (config.data.global_batch + 1, config.data.seq_len)
    tokens = torch.randint(VOCABULARY, shape, generator=generator)
    targets = torch.randint(VOCABULARY, shape, generator=generator)
    targets[-1] = -100
    return tokens, targets


def run_units(engine: ExactEngine, step: int) -> None:
    """Forward and backward of a rank's units."""
    config = engine.config
    tokens, targets = rows_of_step(config, step)
    size = config.data.micro_batch or 1
    units = range(engine.rank, units_of(config), engine.world_size)
    for unit in units:
        rows = slice(unit * size, (unit + 1) * size)
        with engine.micro_step(last=unit == units[-1]):
            loss = engine.model(tokens[rows], targets[rows])
            engine.backward(loss / (targets != -100).sum().float())


def train(
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    world: int,
    steps: int = 3,
    after_units: Callable[[ExactEngine], None] = lambda engine: None,
) -> list[dict[str, Tensor]]:
    """Weights, state and the sums of each rank's engine after some steps."""
    engines = [engine_of(config, rank, world) for rank in range(world)]
    for step in range(steps):
        for engine in engines:
            run_units(engine, step)
            after_units(engine)
        order = random.Random(step).sample(engines, world)
        total = sum(engine.sums.sums_RC for engine in order)
        for engine in engines:
            engine.sums.sums_RC.copy_(total)
            monkeypatch.setattr(engine, "_finish_exchange", lambda: None)
            set_lr(engine.optimizer, 1e-2)
            engine.update()
    return [tensors(engine) for engine in engines]


def tensors(engine: ExactEngine) -> dict[str, Tensor]:
    found = {"sums": engine.sums.sums_RC}
    for part in engine.owned():
        found[part.name] = part.weight
        for key, value in {**part.state, **part.extra}.items():
            found[f"{part.name}.{key}"] = value
    return found


def assert_equal(ranks: Sequence[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for found in ranks:
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# --- sums


def test_a_sum_knows_no_order() -> None:
    """Of 1,024 simulated ranks: alone, in trees and in rings, from any first rank on."""
    ranks = 1024
    parameter = nn.Parameter(torch.zeros(37, 5))
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-12, -1, parameter.numel()).view_as(parameter)
    gradients = torch.randn(ranks, 37, 5, generator=generator) * spread
    integers = torch.stack([fixed(parameter, gradient, ranks) for gradient in gradients])
    expected = integers.sum(0)
    assert torch.equal(integers.flip(0).cumsum(0)[-1], expected)
    tree = integers
    while len(tree) > 1:
        tree = tree[::2] + tree[1::2]
    assert torch.equal(tree[0], expected)
    for world in (1, 2, 3, 7, 64, 1000, 1024):
        of_ranks = [integers[rank::world].sum(0) for rank in range(world)]
        random.Random(world).shuffle(of_ranks)
        assert torch.equal(sum(of_ranks, torch.zeros_like(expected)), expected)
    # Floats do know it, which is why there are integers.
    assert not torch.equal(one_after_another(gradients.flip(0)), one_after_another(gradients))
    exact = gradients.double().sum(0)
    total = expected.view(-1)[: parameter.numel()].view_as(exact).double() / SCALE
    error = (total - exact).abs().max()
    assert error <= ranks / 2 / SCALE + 1e-13  # what fp64 itself rounds
    one = nn.Parameter(torch.zeros(3))
    nearest = fixed(one, torch.tensor([0.75, -0.75, 0.25]) / SCALE, addends=1)
    assert nearest.view(-1)[:3].tolist() == [1, -1, 0]


def one_after_another(addends: Tensor) -> Tensor:
    total = torch.zeros_like(addends[0])
    for addend in addends:
        total += addend
    return total


def fixed(parameter: nn.Parameter, gradient: Tensor, addends: int) -> Tensor:
    """The integers of one gradient."""
    sums = FixedPointSums([parameter], addends, hashes_addends=False)
    parameter.grad = gradient.clone()
    sums.add(sums.buckets[0], 0, is_first=True, scale=SCALE)
    assert sums.sums_RC[sums.tail].sum() == 0, "it fits"
    return sums.sums_RC[: sums.tail.start].clone()


@pytest.mark.parametrize("value", [2.0**12 / 4, -(2.0**13), float("inf"), float("nan")])
def test_what_does_not_fit_is_not_finite(value: float) -> None:
    """Four addends of 2^10 would be 2^12, from where on a sum might wrap."""
    parameter = nn.Parameter(torch.zeros(3))
    sums = FixedPointSums([parameter], 4, hashes_addends=False)
    for number, of_unit in enumerate([0.5, value]):
        parameter.grad = torch.tensor([0.25, of_unit, 0.0])
        sums.add(sums.buckets[0], number, is_first=number == 0, scale=SCALE)
    sums.give(1 / SCALE)
    assert parameter.grad is not None
    assert bool(parameter.grad.isnan().all())


def test_the_largest_that_fits_does_not_wrap() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    largest = torch.nextafter(torch.tensor(2.0**10), torch.tensor(0.0))
    sums = FixedPointSums([parameter], 4, hashes_addends=False)
    for number in range(4):
        parameter.grad = torch.stack([largest, -largest])
        sums.add(sums.buckets[0], number, is_first=number == 0, scale=SCALE)
    sums.give(1 / SCALE)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [4 * largest.item(), -4 * largest.item()]


def test_a_hash_finds_each_bit_and_adds_up() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randint(-(2**62), 2**62, (5, COLUMNS), generator=generator)
    b = torch.randint(-(2**62), 2**62, (5, COLUMNS), generator=generator)
    hashes = Hash(torch.device("cpu"))
    of_a = hashes.of(a, 0)
    assert torch.equal(of_a + hashes.of(b, 0), hashes.of(a + b, 0))
    assert torch.equal(of_a, hashes.of(a[:2], 0) + hashes.of_parts(a[2:], 2))
    for place in random.Random(0).sample(range(a.numel()), 50):
        for bit in range(0, 64, 7):
            flipped = a.clone()
            flipped.view(-1)[place] ^= 1 << bit if bit < 63 else -(2**63)
            assert not torch.equal(hashes.of(flipped, 0), of_a)
    swapped = a[[1, 0, 2, 3, 4]]
    assert not torch.equal(hashes.of(swapped, 0), of_a)
    assert not torch.equal(hashes.of(a.roll(1, dims=1), 0), of_a)


# --- steps


def variants() -> Iterator[Any]:
    for optimizer in ("adamw", "muon", "lion", "sgd", "adafactor"):
        yield pytest.param({"optim.name": optimizer, "run.ema": 0.9}, id=optimizer)
    for precision in ("bf16", "fp16"):
        yield pytest.param({"run.precision": precision}, id=precision)
    yield pytest.param({"run.activation_checkpointing": True}, id="recomputed")
    yield pytest.param({"model.tie_embeddings": False, "model.bias": True}, id="untied")


@pytest.mark.parametrize("settings", list(variants()))
def test_any_world_makes_the_same_steps(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Seven units on one rank, and on three, which have three, two and two, in small buckets."""
    config = config_of(**settings)
    (expected,) = train(monkeypatch, config, world=1)
    monkeypatch.setitem(BUCKET, "cpu", 2 * COLUMNS)
    assert_equal(train(monkeypatch, config, world=3), expected)
    if "optim.name" in settings:
        assert_equal(train(monkeypatch, config, world=7), expected)
    if "run.activation_checkpointing" in settings:
        (plain,) = train(monkeypatch, config_of(), world=1)
        assert_equal([expected], plain)


def test_an_overflow_of_fp16_skips_the_update_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One rank alone has it; the scale falls alike, and the next steps are the same."""
    config = config_of(**{"run.precision": "fp16"})

    def overflow(engine: ExactEngine) -> None:
        if engine.rank == engine.world_size - 1 and engine.scaler.get_scale() == 2.0**16:
            engine.sums.sums_RC[engine.sums.tail].view(-1)[0] += 1

    (expected,) = train(monkeypatch, config, world=1, after_units=overflow)
    (undisturbed,) = train(monkeypatch, config, world=1)
    assert_equal(train(monkeypatch, config, world=2, after_units=overflow), expected)
    assert not torch.equal(expected["embed.weight"], undisturbed["embed.weight"])


def test_losses_add_up_in_any_order() -> None:
    engine = engine_of(config_of(), rank=0, world=1)
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(1024, generator=generator) * 10.0 ** torch.arange(-6, 6).repeat(86)[:1024]
    addends = engine.addend(losses)
    assert (addends - losses.double()).abs().max() <= 2.0**-21
    total = torch.zeros((), dtype=torch.float64)
    for addend in addends:
        total += addend
    backwards = torch.zeros((), dtype=torch.float64)
    for addend in addends.flip(0):
        backwards += addend
    assert torch.equal(total, backwards)


# --- what a rank has


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_units_stay_together(world: int) -> None:
    config = config_of()
    layout = batch_layout(config, world)
    assert (layout.unit, layout.micro_batch, layout.accumulation) == (2, 2, -(-7 // world))
    assert layout.filler_percent == pytest.approx(100 / 13)
    seen: list[int] = []
    for rank in range(world):
        places = rank_places(rank, world, 13, layout.unit).tolist()
        units = sorted({place // 2 for place in places})
        assert units == list(range(rank, 7, world))
        assert layout.rows(len(places)) == 2 * len(units)
        seen += places
    assert sorted(seen) == list(range(13))


def test_what_contradicts_is_refused() -> None:
    with pytest.raises(UserError, match=r"7 units of data.micro_batch=2, .* nearest: 7 processes"):
        batch_layout(config_of(), 8)
    with pytest.raises(UserError, match=r"data.micro_batch is unset; rule: .*; nearest: 4"):
        resolve(("test", {"run.exact": True}))
    with pytest.raises(UserError, match=r"run.log_unit_hashes=true .*; nearest: run.exact=true"):
        resolve(("test", {"run.log_unit_hashes": True}))
    with pytest.raises(UserError, match=r"run.exact=true is not available under zero2: DeepSpeed"):
        refuse_combinations(Strategy(stage=2), config_of())
    assert config_of().run.deterministic
    assert not batch_layout(resolve(("test", {})), 2).is_exact
