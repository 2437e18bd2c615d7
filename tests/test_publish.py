"""What is published is what others can load, and nothing more.

The real client talks to a hub on loopback.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_lm import families, publish
from dist_lm.checkpoint.card import CARD, bare_facts, write_card
from dist_lm.checkpoint.folder import verify
from dist_lm.checkpoint.load import read_model
from dist_lm.checkpoint.state import verify_state
from dist_lm.cli import load
from dist_lm.config import Config, DataConfig, ModelConfig, ModelSpec, OptimConfig, RunConfig
from dist_lm.data.tokenizer import load_tokenizer
from dist_lm.data.tokenizer_training import train_tokenizer
from dist_lm.errors import RetryableError, UserError
from dist_lm.evals import add_evals
from dist_lm.model.gpt import GPT
from dist_lm.model.init import init_weights
from dist_lm.optim import create_state, make_optimizer
from dist_lm.outcome import TRAIN
from tests.conftest import NO_RUN, state_of, write_step
from tests.faults.signing import sign
from tests.hub import TOKEN, USER, Hub, environment, faults_of_card, running_hub, use_here
from tests.procs import entry, train

# The client's own, of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

MODEL = ModelConfig(layers=2, heads=2, width=16, qk_norm=True)
TOKENIZER = train_tokenizer("byte", [])
SECRET = "/home/me/hunter2"
CONFIG = Config(
    model=MODEL,
    data=DataConfig(input=f"{SECRET}/text.txt", seq_len=16, tokenizer=f"{SECRET}/tokenizer.json"),
    run=RunConfig(dir=f"{SECRET}/run", init_from=f"{SECRET}/base", sample_prompt=SECRET),
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        use_here(hub, tmp_path / "cache", monkeypatch)
        yield hub


def write(run: Path, step: int, val_loss: float | None, seed: int = 1) -> Path:
    """A step as train writes it, with a card."""
    spec = ModelSpec(MODEL, TOKENIZER.vocab_size, 16)
    model = GPT(spec)
    init_weights(model, seed)
    optimizer = make_optimizer(model, OptimConfig(), "fp32")
    create_state(optimizer)
    state = state_of(step, val_loss=val_loss, config=CONFIG.model_dump(mode="json"), tokens=100)
    texts = {
        "config.json": families.config_json(spec, TOKENIZER.eot),
        "generation_config.json": families.generation_config_json(TOKENIZER.eot),
        "state.json": state,
    }
    folder = write_step(run, step, model, texts, TOKENIZER, optimizer)
    (folder / CARD).touch()
    sign(folder, CARD, write_card(bare_facts(folder, state)).encode())
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three steps, of which the second is the best."""
    for step, val_loss in ((2, 3.0), (4, 2.0), (6, None)):
        write(tmp_path / "run", step, val_loss, seed=step)
    return tmp_path / "run"


def published(run: Path, *flags: str, repo: str = "own/model") -> str:
    publish.main([str(run), "--repo", repo, *flags])
    return repo


def steps_of(hub: Hub, repo: str) -> dict[str, Any]:
    """The step that the card of each revision names."""
    found = {}
    for branch in hub.repos[repo].branches:
        card = hub.files(repo, branch).get(CARD, b"").decode()
        titles = [line for line in card.splitlines() if line.startswith("# ")]
        if titles:
            found[branch] = int(titles[0].split()[-1])
    return found


def test_the_best_step_goes_to_a_private_repository(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    published(run)
    assert hub.repos["own/model"].private
    assert steps_of(hub, "own/model") == {"main": 4}
    files = hub.files("own/model")
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in set(files) - {CARD, ".gitattributes"}:
        assert files[name] == (run / "step-00000004" / name).read_bytes(), name
    assert not [name for name, content in files.items() if b"hunter2" in content]
    card = files[CARD].decode()
    assert faults_of_card(card) == [] and "own/model" in card and "FOLDER" not in card
    assert f"published: {hub.endpoint}/own/model" in capsys.readouterr().out
    # The run is as it was, and nothing is left in it.
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert not list(run.glob(".*"))


def test_what_is_downloaded_again_works(hub: Hub, run: Path, tmp_path: Path) -> None:
    """By its name, and as a folder: of links as in the cache, or with what a clone has besides."""
    repo = published(run)
    ours, tokenizer, _ = read_model(str(run / "step-00000004"))
    tokens = torch.arange(12).view(1, 12)
    expected = ours(tokens)
    snapshot = Path(huggingface_hub.snapshot_download(repo))
    assert (snapshot / "model.safetensors").is_symlink() and (snapshot / ".gitattributes").exists()
    plain = Path(huggingface_hub.snapshot_download(repo, local_dir=tmp_path / "plain"))
    assert (plain / ".cache").is_dir()
    for name in (repo, str(snapshot), str(plain)):
        model, its_tokenizer, _ = read_model(name)
        assert torch.equal(model(tokens), expected)
        assert its_tokenizer.sha256 == tokenizer.sha256
        config, _ = load(("--run.init_from", name, "--run.dir", NO_RUN), TRAIN)
        assert config.model == MODEL and config.data.seq_len == 16
        assert load_tokenizer(config.data.tokenizer).sha256 == tokenizer.sha256
    theirs = AutoModelForCausalLM.from_pretrained(snapshot)
    assert (theirs(tokens).logits - expected).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(snapshot)("a").input_ids == tokenizer.encode("a")


def test_every_step_is_a_revision(hub: Hub, run: Path) -> None:
    repo = published(run, "--steps", "all")
    names = ["step-00000002", "step-00000004", "step-00000006"]
    assert steps_of(hub, repo) == {"main": 4, names[0]: 2, names[1]: 4, names[2]: 6}
    hub.repos[repo].commit("main", {})  # nothing of a revision is taken from there
    for name in names:
        model, _, _ = read_model(f"{repo}@{name}")
        ours, _, _ = read_model(str(run / name))
        assert torch.equal(model.embed.weight, ours.embed.weight)
    assert load_tokenizer(f"{repo}@{names[0]}").sha256 == TOKENIZER.sha256
    config, _ = load(("--run.init_from", f"{repo}@{names[0]}", "--run.dir", NO_RUN), TRAIN)
    assert config.model == MODEL
    with pytest.raises(UserError, match="own/model@step-9: neither a folder here nor readable"):
        read_model(f"{repo}@step-9")


def test_the_newest_or_a_named_step(hub: Hub, run: Path) -> None:
    published(run, "--steps", "newest")
    assert steps_of(hub, "own/model") == {"main": 6}
    published(run / "step-00000002", repo="mine")
    assert steps_of(hub, f"{USER}/mine") == {"main": 2}


def test_a_damaged_step_is_passed_over(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(run / "step-00000004/model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x77")
    published(run)
    assert steps_of(hub, "own/model") == {"main": 2}
    assert "passed over step-00000004/model.safetensors" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not match its hash"):
        published(run / "step-00000004", repo="own/other")


def test_it_goes_on_after_a_failure(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.failing = "POST /api/models/own/model/commit/step-00000004"
    with pytest.raises(RetryableError, match="--repo=own/model: .*; the same command goes on"):
        published(run, "--steps", "all")
    assert steps_of(hub, "own/model").get("step-00000002") == 2
    assert hub.count("PUT /lfs/") == 2
    hub.failing = ""
    published(run, "--steps", "all")
    assert steps_of(hub, "own/model")["step-00000006"] == 6
    assert hub.count("PUT /lfs/") == 3  # nothing twice
    commits = hub.count("POST /api/models/own/model/commit/")
    published(run, "--steps", "all")
    assert hub.count("POST /api/models/own/model/commit/") == commits
    assert hub.count("PUT /lfs/") == 3


def test_a_repository_follows_the_run(hub: Hub, run: Path) -> None:
    """Files of ours that a newer step lacks go; what others have put there stays."""
    repo = hub_with(hub, {"model-00001-of-00002.safetensors": b"old", "LICENSE": b"theirs"})
    published(run, repo=repo)
    names = hub.files(repo).keys()
    assert "model-00001-of-00002.safetensors" not in names
    assert {"LICENSE", "model.safetensors"} <= names


def hub_with(hub: Hub, files: dict[str, bytes], private: bool = True) -> str:
    """A repository that is there already."""
    hub.create({"organization": "own", "name": "there", "private": private})
    stored = {name: hub.put(content, is_lfs=False) for name, content in files.items()}
    hub.repos["own/there"].commit("main", stored)
    return "own/there"


def test_a_licence_that_somebody_wrote_on_the_hub_stays(hub: Hub, run: Path) -> None:
    theirs = b"---\nlicense: mit\nlanguage: [en, de]\nlibrary_name: other\n---\n# Mine\n"
    repo = hub_with(hub, {CARD: theirs})
    published(run, repo=repo)
    card = ModelCard(hub.files(repo)[CARD].decode())
    assert (card.data.license, card.data.language) == ("mit", ["en", "de"])
    assert card.data.library_name == "transformers" and "# Mine" not in card.text
    commits = hub.count("POST /api/models/own/there/commit/")
    published(run, repo=repo)
    assert hub.count("POST /api/models/own/there/commit/") == commits
    published(run, "--optimizer", repo=repo)
    assert verify(Path(huggingface_hub.snapshot_download(repo)))["step"] == 4


def test_a_public_repository_is_only_written_when_asked(hub: Hub, run: Path) -> None:
    repo = hub_with(hub, {}, private=False)
    with pytest.raises(UserError, match="--repo=own/there exists and is public; .* or --public"):
        published(run, repo=repo)
    assert hub.files(repo) == {}
    published(run, "--public", repo=repo)
    published(run, "--public")
    assert not hub.repos["own/model"].private and CARD in hub.files(repo)


def test_the_optimizer_goes_along_only_when_asked(hub: Hub, run: Path, tmp_path: Path) -> None:
    repo = published(run, "--optimizer")
    folder = Path(huggingface_hub.snapshot_download(repo, local_dir=tmp_path / "again"))
    facts = verify_state(folder)  # a run can go on from it, .gitattributes and all
    assert facts["step"] == 4
    assert "optimizer-00001-of-00001.safetensors" in verify(folder)["files"]
    assert not [
        path for path in folder.iterdir() if path.is_file() and b"hunter2" in path.read_bytes()
    ]
    assert facts["config"]["data"]["input"] == "not-published"
    assert facts["config"]["model"] == MODEL.model_dump(mode="json")
    verify(Path(huggingface_hub.snapshot_download(repo)))  # links of the cache
    published(run)
    assert not [name for name in hub.files(repo) if name.startswith(("opt", "state", "mani"))]


def test_evaluations_are_in_the_card(hub: Hub, run: Path) -> None:
    line = {"step": 4, "task": "maths|x", "shots": 2, "lm_eval": "1.2"}
    add_evals(run, [line | {"metrics": {"acc,none": 0.5, "acc,none_stderr": 0.1}}])
    add_evals(run, [line | {"step": 6, "task": "of another step", "metrics": {"acc,none": 0.9}}])
    card = ModelCard(hub.files(published(run))[CARD].decode())
    assert "| `maths x` | 2 | `acc,none` | 0.5000 | 0.1000 |" in card.text
    assert "of another step" not in card.text
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_value) == ("maths|x", 0.5)
    assert faults_of_card(str(card)) == []


def test_what_the_hub_or_the_user_gets_wrong_is_one_line(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for repo in ("a/b/c", "-x", "own/"):
        with pytest.raises(UserError, match="no name of a repository; rule: owner/name"):
            published(run, repo=repo)
    with pytest.raises(UserError, match="holds no checkpoint"):
        published(tmp_path / "nowhere")
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(UserError, match=r"the hub refuses it \(401\); nearest: hf auth login"):
        published(run)


@pytest.mark.slow
def test_in_processes_of_their_own(hub: Hub, run: Path, tmp_path: Path) -> None:
    """As a user types it: generate from the name of what was published, and train on from it."""
    env = environment(hub, tmp_path / "cache of others")
    published(run)
    shutil.rmtree(run)
    generated = ["--ckpt", "own/model", "--prompt", "ab", "--max_new_tokens", "4", "--seed", "1"]
    assert entry("generate", *generated, **env).startswith("ab")
    (tmp_path / "mine.txt").write_text("some words of mine. " * 200)
    flags = ["--run.init_from", "own/model", "--data.input", str(tmp_path / "mine.txt")]
    flags += "--run.steps 2 --data.global_batch 2 --run.eval_every 0 --run.trackers".split()
    train(tmp_path / "on", *flags, **env)
    step = tmp_path / "on/step-00000002"
    assert "started from those of another model" in (step / CARD).read_text().replace("\n", " ")
    assert TOKEN not in (step / "state.json").read_text()


def test_help_comes_without_the_client() -> None:
    code = "import sys, dist_lm.publish; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "huggingface_hub"} & set(done.stdout.split())


def test_the_state_that_is_published_can_be_read(run: Path) -> None:
    from dist_lm.cli import resolve
    from dist_lm.config import flat
    from dist_lm.publishing import public_state

    state = json.loads((run / "step-00000004/state.json").read_text())
    config = resolve(("state.json", flat(public_state(state)["config"])))
    assert config.optim == CONFIG.optim and config.run.seed == CONFIG.run.seed
