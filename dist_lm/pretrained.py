"""The shape, context and tokenizer that a run takes from the model that `run.init_from` names.

Only small JSON files are read, and torch is not imported. So a setting that disagrees with the
model is refused at once, before any text is read or prepared.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dist_lm.config import ModelConfig, ModelSpec, RunConfig
from dist_lm.errors import CheckpointError, UserError
from dist_lm.families import from_config_json
from dist_lm.outside import read_json

# A run may choose these itself: trained weights can go on with others.
FREE_OF_MODEL = ("dropout", "init")
_STEP_NAME = re.compile(r"step-[0-9]{8,}")
_SIZE_OF_BYTE = 257  # tokens of data.tokenizer=byte: the bytes and the end of text


@dataclass(frozen=True)
class Pretrained:
    """A model that a run starts from."""

    name: str  # as run.init_from has it
    folder: Path  # a step folder or a transformers folder
    spec: ModelSpec

    @property
    def has_tokenizer(self) -> bool:
        return (self.folder / "tokenizer.json").is_file()

    def settings(self) -> dict[str, Any]:
        """The settings that come along, unless they are given."""
        settings: dict[str, Any] = {}
        for field, value in self.spec.config:
            if field not in FREE_OF_MODEL:
                settings[f"model.{field}"] = value
        settings["data.seq_len"] = self.spec.seq_len
        if self.has_tokenizer:
            settings["data.tokenizer"] = self.name
        return settings

    def disagreements(self, given: Mapping[str, Any]) -> list[str]:
        """Each given setting with which this would be another model, with both values."""
        found = []
        for setting, theirs in self.settings().items():
            ours = given.get(setting)
            if ours is None:
                continue
            if setting == "data.seq_len":
                found += self._about_context(ours)
            elif setting == "data.tokenizer":
                found += self._about_tokenizer(str(ours))
            elif setting == "model.rope_theta" and self._is_extended(given):
                continue  # a longer context may want slower rotations
            elif ours != theirs:
                found.append(f"{setting}={ours} (there {theirs})")
        return found

    def _is_extended(self, given: Mapping[str, Any]) -> bool:
        seq_len = given.get("data.seq_len")
        return isinstance(seq_len, int) and seq_len > self.spec.seq_len

    def _about_context(self, seq_len: Any) -> list[str]:
        """A shorter context is a part of it, and a longer one needs no weights unless positions
        are learned.
        """
        is_too_long = isinstance(seq_len, int) and seq_len > self.spec.seq_len
        if not is_too_long or self.spec.config.positions != "learned":
            return []
        most = self.spec.seq_len
        return [f"data.seq_len={seq_len} (there at most {most}, its positions are learned)"]

    def _about_tokenizer(self, spec: str) -> list[str]:
        """Compare what needs no text; the rest is compared before text is prepared."""
        size = None
        if spec == "byte":
            size = _SIZE_OF_BYTE
        elif spec.startswith("bpe:") and spec[4:].isdecimal():
            size = int(spec[4:])
        vocab_size = self.spec.vocab_size
        if size is not None and size != vocab_size:
            return [f"data.tokenizer={spec} (there another one of {vocab_size} tokens)"]
        theirs = _hash_of_file(self.folder / "tokenizer.json")
        ours = _hash_of_file(find_tokenizer(spec))
        if spec == self.name or ours in (None, theirs):
            return []
        return [f"data.tokenizer={spec} (there another one of {vocab_size} tokens)"]


def settings_to_take(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that come from `run.init_from`, because they are not given.

    `given` has the settings of all levels. A run that already has steps goes on with its own shape,
    so the folder that it started from may be gone by then.
    """
    name = given.get("run.init_from")
    if not isinstance(name, str):
        return {}
    own = None
    if given.get("run.resume") != "never":
        own = newest_step(Path(str(given.get("run.dir", RunConfig.model_fields["dir"].default))))
    if own:
        model = Pretrained(name, own, read_spec(own))
    else:
        model = find_model(name)
        refuse_disagreements(model, given)
    return {
        setting: value for setting, value in model.settings().items() if given.get(setting) is None
    }


def refuse_disagreements(model: Pretrained, given: Mapping[str, Any]) -> None:
    """Refuse settings with which this would be another model, all of them in one message."""
    found = model.disagreements(given)
    if found:
        raise UserError(
            f"run.init_from={model.name} is another model than these settings ask for:"
            f" {', '.join(found)}; rule: they come along from it; nearest: leave them out"
        )


def find_model(name: str) -> Pretrained:
    """The model that a name means: a run's newest step, a step or transformers folder, or of the
    hub. Its weights are not looked at.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return Pretrained(name, path, read_spec(path))
    if path.is_dir():
        step = newest_step(path)
        if step is None:
            raise CheckpointError(f"{name}: holds neither a checkpoint (step-*) nor a config.json")
        return Pretrained(name, step, read_spec(step))
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise CheckpointError(
            f"run.init_from={name}: no such folder; rule: a run, a step folder, a transformers"
            " folder or hub name"
        )
    folder = download(name, ["*.json"], "run.init_from=")
    return Pretrained(name, folder, read_spec(folder))


def newest_step(run_dir: Path) -> Path | None:
    """The newest step folder of a run that has a config.json; its files are not checked."""
    steps = []
    for path in run_dir.glob("step-*/config.json"):
        if _STEP_NAME.fullmatch(path.parent.name):
            steps.append(path.parent)
    return max(steps, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def find_tokenizer(spec: str | Path) -> Path:
    """The tokenizer.json that a path means: itself, in a folder, or in a run's newest step."""
    path = Path(spec)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        path = newest_step(path) or path
    return path / "tokenizer.json" if path.is_dir() else path


def read_spec(folder: Path) -> ModelSpec:
    """The network of a folder.

    A step of ours says it exactly in its state.json. Its config.json describes the same function,
    but may show constants, such as sinusoidal positions, as if they were learned.
    """
    spec = from_config_json(_read_json(folder / "config.json"))
    if not (folder / "state.json").is_file():
        return spec
    try:
        model = ModelConfig.model_validate(_read_json(folder / "state.json")["config"]["model"])
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"{folder / 'state.json'}: its config has no model of ours"
        ) from error
    return replace(spec, config=model)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, lambda why: CheckpointError(f"{path}: {why}"))


def _hash_of_file(path: Path) -> str | None:
    if not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(name: str, patterns: list[str], label: str = "") -> Path:
    """A folder with these files of a model of the hub; owner/name@revision has a revision."""
    from huggingface_hub import snapshot_download  # slow, and only for hub names

    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # of the hub's client, of its HTTP library, of the system
        raise CheckpointError(
            f"{label}{name}: neither a folder here nor readable from the hub"
            f" ({type(error).__name__})"
        ) from error
