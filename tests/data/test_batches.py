"""Batches: every split of the global batch has the same rows, read ahead or not.

Fillers have no targets.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.config import NO_TARGET, Config, DataConfig, RunConfig, SourceConfig, batch_layout
from dist_lm.data.batches import Batch, Batches, document_bounds
from dist_lm.data.dataset import Dataset, open_dataset
from dist_lm.errors import UserError

CPU = torch.device("cpu")


def opened(prepared: Path, tmp_path: Path, run: Any = None, **data: Any) -> tuple[Config, Dataset]:
    fields = {"input": str(prepared), "seq_len": 16, "global_batch": 8, "workers": 0} | data
    of_run = {"dir": str(tmp_path), "seed": 3} | (run or {})
    config = Config(data=DataConfig(**fields), run=RunConfig(**of_run))
    return config, open_dataset(config, lambda work: work())


def batches(
    config: Config, dataset: Dataset, rank: int = 0, world: int = 1, **options: Any
) -> Batches:
    reader = dataset.open_reader(config.data, rank=rank, world=world)
    layout = batch_layout(config, world)
    return Batches(reader, config.data, layout, CPU, eot=dataset.tokenizer.eot, **options)


def rows(batch: Batch) -> np.ndarray:
    """Tokens and targets of the rows that have targets."""
    tokens = torch.cat([micro.tokens_BT for micro in batch.micros])
    targets = torch.cat([micro.targets_BT for micro in batch.micros])
    both = torch.cat([tokens, targets], 1)
    return both[(both != NO_TARGET).all(1)].numpy()


@settings(deadline=None, max_examples=25)
@given(
    world=st.integers(1, 9),
    batch=st.integers(9, 20),
    micro=st.integers(1, 9),
    step=st.integers(0, 500),
)
def test_all_splits_have_the_same_rows(
    prepared: Path,
    tmp_path_factory: pytest.TempPathFactory,
    world: int,
    batch: int,
    micro: int,
    step: int,
) -> None:
    config, dataset = opened(
        prepared, tmp_path_factory.getbasetemp(), global_batch=batch, micro_batch=micro
    )
    whole = batches(config, dataset, hash_rows=True).read(step)
    parts = []
    for rank in range(world):
        parts.append(batches(config, dataset, rank, world, hash_rows=True).read(step))
    together = np.concatenate([rows(part) for part in parts])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, rows(whole).tolist()))
    assert sum(part.targets for part in parts) == whole.targets == batch * 16
    assert (sum(part.row_hashes for part in parts) - whole.row_hashes) % 2**64 == 0
    assert len({(len(part.micros), part.micros[0].tokens_BT.shape) for part in parts}) == 1


def test_the_hash_knows_tokens_and_places(prepared: Path, tmp_path: Path) -> None:
    config, dataset = opened(prepared, tmp_path)
    made = [batches(config, dataset, hash_rows=True).read(step).row_hashes for step in range(50)]
    assert len(set(made)) == 50


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_ahead_changes_nothing(prepared: Path, tmp_path: Path, workers: int) -> None:
    config, dataset = opened(prepared, tmp_path)
    ahead_config, _ = opened(prepared, tmp_path, workers=workers)
    here = batches(config, dataset, first_step=60)
    ahead = batches(ahead_config, dataset, first_step=60)
    for _ in range(20):  # crosses a boundary of the steps whose order is computed at once
        assert np.array_equal(rows(here.take()), rows(ahead.take()))
    ahead.close()


def test_an_epoch_has_every_target_once_and_then_ends(prepared: Path, tmp_path: Path) -> None:
    epoch = {"steps": None, "epochs": 1}
    config, dataset = opened(prepared, tmp_path, run=epoch, global_batch=7)
    made = batches(config, dataset)
    assert dataset.sequences
    steps = -(-dataset.sequences // 7)
    assert dataset.steps(config) == steps
    seen = np.concatenate([rows(made.read(step))[:, 16:] for step in range(steps)])
    assert made.read(steps).targets == 0
    in_place = dataset.train.read(np.arange(dataset.sequences), 16, 16)[:, 1:]
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, in_place.tolist()))


def test_document_mask(prepared: Path, tmp_path: Path) -> None:
    config, dataset = opened(prepared, tmp_path, document_mask=True, seq_len=256)
    (micro,) = batches(config, dataset).read(0).micros
    assert micro.segments_BT is not None
    ends = micro.tokens_BT == dataset.tokenizer.eot
    assert ends.any() and (micro.targets_BT[ends] == NO_TARGET).all()
    assert torch.equal(micro.segments_BT[:, 1:] - micro.segments_BT[:, :-1], ends[:, :-1].long())


def test_dropout_keys_belong_to_positions(prepared: Path, tmp_path: Path) -> None:
    config, dataset = opened(prepared, tmp_path)
    (whole,) = batches(config, dataset, dropout_seed=3).read(5).micros
    (part,) = batches(config, dataset, 1, 2, dropout_seed=3).read(5).micros
    assert whole.dropout_keys_B is not None and part.dropout_keys_B is not None
    assert torch.equal(whole.dropout_keys_B[1::2], part.dropout_keys_B)
    assert len(whole.dropout_keys_B.unique()) == 8


def test_too_little_text(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"data.seq_len=10000000 needs 10000001 tokens in one shard, .* nearest: \d+",
    ):
        opened(prepared, tmp_path, seq_len=10_000_000)
    with pytest.raises(
        UserError,
        match=r"data.val_fraction=0.1 holds out \d+ tokens, .* least 20001; nearest: a larger",
    ):
        opened(prepared, tmp_path, seq_len=20_000)


def test_a_source_that_is_also_validation_has_nothing_to_train_on(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one line after another\n" * 300)
    rule = "text.txt has nothing left to train on; rule: the documents of data.validation"
    with pytest.raises(UserError, match=rule):
        opened(file, tmp_path, validation={"held": {"input": str(file)}})


def test_a_single_named_source_is_the_same_data(prepared: Path, tmp_path: Path) -> None:
    plain = opened(prepared, tmp_path)[1]
    named = opened(
        prepared, tmp_path, input="stdlib", sources={"one": SourceConfig(input=str(prepared))}
    )[1]
    assert named.identity == plain.identity and named.sequences == plain.sequences


def test_the_identity_is_that_of_the_tokens(prepared: Path, tmp_path: Path) -> None:
    first, again = opened(prepared, tmp_path)[1], opened(prepared, tmp_path)[1]
    assert first.identity == again.identity and len(first.identity) == 64


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("cuda:0", []), ("cuda:3", [3])])
def test_a_reading_thread_uses_its_rank_s_gpu(
    prepared: Path,
    tmp_path: Path,
    device: str,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Set before the thread reads a batch, whose memory it pins."""
    done: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(device.index))
    monkeypatch.setattr(Batches, "read", lambda self, step: done.append("read"))
    config, dataset = opened(prepared, tmp_path, workers=1)
    reader = dataset.open_reader(config.data, rank=0, world=1)
    monkeypatch.setattr(Batches, "take", lambda self: self._pool.submit(self.read, 0).result())
    ahead = Batches(reader, config.data, batch_layout(config, 1), torch.device(device), eot=0)
    ahead.take()
    ahead.close()
    assert done == [*expected, "read"]


def test_bounds_of_documents_have_few_lengths() -> None:
    """A row begins a document, whatever the number of the one before."""
    rows = np.array([[0, 0, 1, 1], [1, 1, 1, 2]])
    bounds = document_bounds(rows)
    assert bounds.dtype == np.int32
    assert bounds[:5].tolist() == [0, 2, 4, 7, 8]
    assert len(bounds) == 256
    assert set(bounds[4:].tolist()) == {8}  # a document of no length, again and again
    many = document_bounds(np.arange(300)[None])
    assert len(many) == 1024
    assert many[:301].tolist() == list(range(301))
    assert len(document_bounds(np.arange(255)[None])) == 256  # the end needs a place too
    assert len(document_bounds(np.arange(256)[None])) == 1024


def test_only_gpus_get_bounds(prepared: Path, tmp_path: Path) -> None:
    config, dataset = opened(prepared, tmp_path, document_mask=True, micro_batch=4)
    for device, is_there in (("cpu", False), ("cuda:0", True)):
        reader = dataset.open_reader(config.data, rank=0, world=1)
        layout = batch_layout(config, 1)
        found = Batches(reader, config.data, layout, torch.device(device), eot=0)
        found._tensor = torch.from_numpy  # type: ignore[method-assign]
        for micro in found.read(0).micros:
            assert (micro.bounds_N is not None) == is_there
            if micro.bounds_N is not None:
                expected = document_bounds(micro.segments_BT.numpy())
                assert np.array_equal(micro.bounds_N.numpy(), expected)
        found.close()
