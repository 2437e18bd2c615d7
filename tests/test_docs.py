"""The guides name files, functions, settings and commands that exist.

The convention of docs/design.md and of the README: a file stands in backquotes with its path from
the root, or from dist_lm/; `path.py: name` also names a function, class, method or constant in it.
Results under benchmarks/results/ are dated and stay as they were.
"""

import ast
import re
from pathlib import Path

import pytest

from dist_lm.config import FIELDS, SECTIONS
from tests.procs import ROOT

CODE = ROOT / "dist_lm"
DESIGN = ROOT / "docs" / "design.md"
README = ROOT / "README.md"
GUIDES = [
    README,
    ROOT / "AGENTS.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "slurm" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
NAMED_FILE = re.compile(r"([\w./-]+\.(?:py|sh|yaml|md))(?:: ([\w.]+))?")
# Files of a run and of its checkpoints. The checkout has none of them.
OF_A_RUN = {"config.yaml", "samples.md", "RUN/config.yaml", "RUN/samples.md"}
# They look like settings.
FILES = {"run.lock", "optim.py", "model.safetensors"}


def quoted(text: str) -> list[str]:
    """What stands in backquotes, in prose and tables."""
    prose = FENCED.sub("", text)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def find_file(name: str) -> Path | None:
    for folder in (ROOT, CODE):
        if (folder / name).is_file():
            return folder / name
    return None


def names_in(path: Path) -> set[str]:
    """The functions, classes, methods and constants of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names.add(node.name)
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    names.add(f"{node.name}.{inner.name}")
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def wrong_names(text: str) -> list[str]:
    """Files, and names in files, that a text names and that are not there."""
    wrong = []
    for span in quoted(text):
        found = NAMED_FILE.fullmatch(span)
        if not found or span in OF_A_RUN:
            continue
        path = find_file(found[1])
        is_there = path is not None and (found[2] is None or found[2] in names_in(path))
        if not is_there:
            wrong.append(span)
    return wrong


def tree_of(text: str) -> set[str]:
    """The files of the tree in docs/design.md, by their paths from the root."""
    blocks = [block for block in FENCED.findall(text) if block.startswith("```\ndist_lm/\n")]
    assert len(blocks) == 1, "docs/design.md has one tree"
    folders: list[str] = []
    files = set()
    for line in blocks[0].splitlines()[1:-1]:
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = [*folders[:depth], name]
        if not name.endswith("/"):
            files.add("".join(folders))
    return files


def modules() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in CODE.rglob("*.py")
        if path.name != "__init__.py"
    }


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_that_a_guide_names_exist(guide: Path) -> None:
    assert wrong_names(guide.read_text()) == []


def test_the_design_follows_a_step_through_functions() -> None:
    """The test above would pass if nobody kept to the convention."""
    spans = quoted(DESIGN.read_text())
    named = {span for span in spans if (found := NAMED_FILE.fullmatch(span)) and found[2]}
    assert len(named) > 30
    assert "dist_lm/loop.py: train" in named


def test_the_tree_of_the_design_has_every_module() -> None:
    assert tree_of(DESIGN.read_text()) == modules()


def test_the_map_of_the_readme_has_every_room() -> None:
    text = README.read_text()
    section = text[text.index("## A map") : text.index("## Results")]
    rows = {row for row in re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)}
    rooms = {path for path in modules() if path.count("/") == 1}
    rooms |= {f"dist_lm/{path.parent.name}/" for path in CODE.glob("*/__init__.py")}
    folders = {"configs/", "launch/", "slurm/", "tests/", "benchmarks/"}
    assert rows == rooms | folders
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(guide: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", guide.read_text())
    local = [link.partition("#")[0] for link in links if not link.startswith("http")]
    assert [link for link in local if not (guide.parent / link).exists()] == []


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_settings_and_commands_that_a_guide_names_exist(guide: Path) -> None:
    text = guide.read_text()
    sections = "|".join(SECTIONS)
    settings = set(re.findall(rf"(?<![\w./'-])(?:--)?((?:{sections})\.[a-z]\w*)", text))
    assert sorted(settings - FILES - set(FIELDS)) == []
    commands = set(re.findall(r"-m dist_lm\.(\w+)", text))
    assert [name for name in sorted(commands) if not (CODE / f"{name}.py").is_file()] == []
    scripts = set(re.findall(r"\b(?:benchmarks|configs|launch|slurm|tests)/[\w/-]+\.\w+", text))
    assert [name for name in sorted(scripts) if not (ROOT / name).is_file()] == []
