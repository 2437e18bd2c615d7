"""Sources in parts, and those of other programs: one source, in a fixed order, exact as any."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_lm.config import Config, DataConfig, SourceConfig
from dist_lm.data.dataset import Dataset, open_dataset
from dist_lm.data.prepared.found import prepared_folders
from dist_lm.data.prepared.parts import JoinedShards, open_shards
from dist_lm.data.prepared.preparing import prepare_dataset
from dist_lm.data.prepared.shards import TokenShards
from dist_lm.data.text.files import find_files
from dist_lm.data.text.formats import Reader
from dist_lm.errors import UserError
from tests.conftest import text_of
from tests.procs import train
from tests.test_train import assert_same_curve, losses, tiny

PARTS = 3


def quiet(_: str) -> None:
    pass


def documents(seed: int) -> list[str]:
    return [f"{seed} {text}" for text in text_of(110, seed).split("\n\n")]


def prepare(folder: Path, texts: list[str], tokenizer: str = "byte") -> None:
    file = folder.with_suffix(".jsonl")
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_dataset(DataConfig(input=str(file), tokenizer=tokenizer), folder, 1, quiet)
    file.unlink()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as slurm/prepare.sh makes it, with the links to the files of each part."""
    folder = tmp_path_factory.mktemp("array") / "shards"
    folder.mkdir()
    for number in range(PARTS):
        prepare(folder / f"part-{number:05d}", documents(number))
        (folder / f"part-{number:05d}.files").mkdir()
        (folder / f"part-{number:05d}.files/00000000-a.txt").write_text("a text")
    return folder


def folders_of(*inputs: Path | str) -> list[str]:
    return prepared_folders(SourceConfig(input=tuple(map(str, inputs))))


def refusal(*inputs: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        folders_of(*inputs)
    return str(caught.value)


def opened(folder: Path, **data: Any) -> tuple[Config, Dataset]:
    fields = {"seq_len": 16, "global_batch": 4, "workers": 0, "tokenizer": "byte"} | data
    run = {"dir": str(folder), "eval_batches": 2}
    config = Config.model_validate({"data": fields, "run": run})
    return config, open_dataset(config, lambda work: work(), quiet)


def rows_of(config: Config, data: Dataset, steps: range, world: int) -> list[bytes]:
    """The sequences of some steps, in the order of their places."""
    rows: list[bytes] = []
    readers = [data.open_reader(config.data, rank=rank, world=world) for rank in range(world)]
    for step in steps:
        of_step: dict[int, bytes] = {}
        for reader in readers:
            read = reader.read(step, len(reader.places))
            for place, tokens in zip(reader.places.tolist(), read.tokens, strict=True):
                of_step[place] = np.asarray(tokens, np.int64).tobytes()
        rows += [of_step[place] for place in sorted(of_step)]
    return rows


# --- which folders


def test_a_folder_a_glob_and_a_list_of_parts_are_the_same(parts: Path) -> None:
    expected = [str(parts / f"part-{number:05d}") for number in range(PARTS)]
    assert folders_of(parts) == expected
    assert folders_of(parts / "part-*") == expected
    assert folders_of(*expected) == expected
    assert folders_of(*reversed(expected)) == expected[::-1]  # in the order in which they are given
    assert folders_of(parts / "part-0000[01]") == expected[:2]
    assert folders_of(expected[1]) == expected[1:2]


@pytest.mark.parametrize("how", ["unfinished", "only links", "gap"])
def test_a_part_that_is_missing_is_refused(how: str, parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(parts, folder)
    number = 1 if how == "gap" else PARTS - 1
    missing = folder / f"part-{number:05d}"
    if how == "unfinished":
        (missing / "dataset.json").rename(missing / "progress.json")
    else:
        shutil.rmtree(missing)
    if how == "gap":
        (folder / f"{missing.name}.files/00000000-a.txt").unlink()
        (folder / f"{missing.name}.files").rmdir()
    for one in (folder, folder / "part-*"):
        assert f"{missing} is not prepared, but {folder}/part-00000 is" in refusal(one)


def test_parts_beside_text_are_refused_or_text(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    message = refusal(parts, tmp_path / "a.txt")
    assert f"{parts}/part-00000 is a prepared folder and {tmp_path}/a.txt is not" in message
    assert "is given twice" in refusal(parts, parts / "part-00001")
    # A corpus that was prepared into a folder inside it is still text.
    shutil.copytree(parts / "part-00000", tmp_path / "shards")
    assert folders_of(tmp_path) == []


def test_another_tokenizer_is_refused(parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts, tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards/part-00001")
    prepare(tmp_path / "shards/part-00001", documents(1), "char")
    first = f"{tmp_path}/shards/part-00000"
    with pytest.raises(UserError, match=f"part-00001 has another tokenizer than {first}; rule: "):
        opened(tmp_path / "run", input=str(tmp_path / "shards"))


# --- exact as any other


@pytest.mark.parametrize("world", [1, 2])
def test_every_sequence_of_every_part_comes_once(world: int, parts: Path, tmp_path: Path) -> None:
    config, data = opened(tmp_path, input=str(parts))
    assert isinstance(data.train, JoinedShards)
    expected: list[bytes] = []
    for number in range(PARTS):
        shards = TokenShards(parts / f"part-{number:05d}", "train")
        for row in shards.read(np.arange(shards.count(config.data)), 16, 16):
            expected.append(row.astype(np.int64).tobytes())
    assert data.sequences == len(expected)
    steps = -(-len(expected) // 4)
    rows = rows_of(config, data, range(steps), world)
    assert Counter(rows[: len(expected)]) == Counter(expected)
    _, again = opened(tmp_path, input=str(parts / "part-*"))
    assert again.identity == data.identity
    assert rows_of(config, again, range(7, 12), 3 - world) == rows[28:48]  # goes on anywhere


def test_documents_of_a_joined_sequence(parts: Path) -> None:
    data = DataConfig(seq_len=16)
    joined = open_shards(folders_of(parts), "train", data)
    alone = TokenShards(parts / "part-00001", "train")
    before = TokenShards(parts / "part-00000", "train").count(data)
    for number in (0, 1, alone.count(data) - 1):
        span = joined.documents_of(before + number, 16, 16)
        assert span == alone.documents_of(number, 16, 16) != []


def test_another_order_of_parts_is_other_data(parts: Path, tmp_path: Path) -> None:
    folders = folders_of(parts)
    _, data = opened(tmp_path, input=folders)
    _, other = opened(tmp_path, input=folders[::-1])
    assert data.identity != other.identity
    assert [len(val.files) for val in data.val.values()] == [PARTS]


# --- several inputs of text, and saved datasets


def test_several_inputs_are_read_in_that_order(tmp_path: Path) -> None:
    for name in ("b/one.txt", "a/one.txt", "a/two.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    several = SourceConfig(input=(f"{tmp_path}/b", f"{tmp_path}/a"))
    found = find_files(several)
    places = [file.path.removeprefix(f"{tmp_path}/") for file in found]
    assert places == ["b/one.txt", "a/one.txt", "a/two.txt"]
    assert len({file.name for file in found}) == 3  # readers tell files apart by name
    twice = SourceConfig(input=(f"{tmp_path}/a", f"{tmp_path}/a/*.txt"))
    with pytest.raises(UserError, match="a/one.txt is given twice"):
        find_files(twice)


def test_a_saved_dataset_has_its_rows_in_order(tmp_path: Path) -> None:
    import datasets  # slow

    rows = {split: [f"{split} {n}" for n in range(50)] for split in ("train", "test")}
    saved = {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in rows.items()}
    saved["train"].save_to_disk(tmp_path / "alone", num_shards=3)
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "both")
    for folder, split in (("alone", "train"), ("both", "train"), ("both", "test")):
        source = SourceConfig(input=str(tmp_path / folder), split=split)
        assert read_texts(source) == rows[split]
    missing = SourceConfig(input=str(tmp_path / "both"), split="tests")
    with pytest.raises(UserError, match="no split 'tests' among train, test; did you mean test"):
        find_files(missing)
    (tmp_path / "alone/data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match="names 'data-00001-of-00003.arrow', which is not there"):
        find_files(SourceConfig(input=str(tmp_path / "alone")))
    (tmp_path / "alone/state.json").write_text("[" * 10)
    with pytest.raises(UserError, match="is not as Dataset.save_to_disk writes it"):
        find_files(SourceConfig(input=str(tmp_path / "alone")))


def read_texts(source: SourceConfig) -> list[str]:
    reader = Reader(source, find_files(source))
    return ["".join(texts) for _, _, texts in reader.documents(Counter())]


# --- in real processes


def write_inputs(kind: str, parts: Path, tmp_path: Path) -> list[str]:
    """Flags that name a source of this kind."""
    if kind == "parts":
        return ["--data.input", str(parts)]
    if kind == "files":
        for number in range(2):
            (tmp_path / f"{number}.jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in documents(number))
            )
        return ["--data.input", str(tmp_path / "1.jsonl"), str(tmp_path / "0.jsonl")]
    import datasets  # slow

    saved = datasets.Dataset.from_dict({"text": documents(0) + documents(1)})
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    stream = ["--data.stream", "true"] if kind == "saved dataset, streamed" else []
    return ["--data.input", str(tmp_path / "saved"), *stream]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parts", "files", "saved dataset", "saved dataset, streamed"])
def test_a_run_goes_on_in_another_world(kind: str, parts: Path, tmp_path: Path) -> None:
    more = ("--data.tokenizer", "byte", "--run.steps", "8", "--run.save_every", "4")
    flags = [*write_inputs(kind, parts, tmp_path), *tiny(Path("unused"), *more)[2:]]
    train(tmp_path / "whole", *flags)
    train(tmp_path / "cut", *flags, "--run.stop_after", "4", world=2)
    assert "resuming step-00000004" in train(tmp_path / "cut", *flags)
    assert_same_curve(tmp_path / "cut", tmp_path / "whole", 1e-5)
    assert len(losses(tmp_path / "cut")) == 8
