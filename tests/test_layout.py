"""The shape of the code: which room may import which, and names that cannot shadow a dependency."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from tests.procs import ROOT

CODE = ROOT / "dist_lm"
# Each room may import rooms of its own or an earlier level; nothing imports a command.
# A wing (a folder) is named by its folder: its files may import each other.
LEVELS = [
    {"errors", "console", "outside", "disk", "channel", "launcher", "revision", "shipped"}
    | {"arithmetic", "environment", "nearest", "stop"},
    {"config", "lock", "safe_yaml"},
    {"explain", "helptext", "families", "pretrained"},
    {"cli", "metrics", "progress_line", "own_optimizers", "optim", "outcome"},
    {"curves", "goodput", "evals"},
    {"model", "data"},
    {"checkpoint"},
    {"runtime"},
    {"sample", "validate", "size"},
    {"scoring", "history", "planning", "checks", "publishing", "measuring", "reporting"},
    {"resume", "spikes", "safeguards", "evaluation", "saving", "loop"},
    {
        "prepare",
        "train",
        "generate",
        "score",
        "show",
        "report",
        "harness",
        "publish",
        "doctor",
        "plan",
        "__main__",
    },
]
STRANGERS = {"model", "data"}
MODULES = {
    path.relative_to(CODE).with_suffix("").as_posix().replace("/", "."): path
    for path in CODE.rglob("*.py")
    if path.stem != "__init__"
}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively: launching by path breaks that"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_of_ours(path: Path) -> set[str]:
    names = {name.removeprefix("dist_lm.") for name in imports(path)}
    return names & set(MODULES)


def test_every_module_has_its_room() -> None:
    assert {room_of(module) for module in MODULES} == set().union(*LEVELS)


def test_imports_never_point_right() -> None:
    level = {room: n for n, rooms in enumerate(LEVELS) for room in rooms}
    wrong, graph = [], {}
    for module, path in MODULES.items():
        graph[module] = imports_of_ours(path)
        room = room_of(module)
        for used in graph[module]:
            points_right = level[room_of(used)] > level[room]
            is_command = room_of(used) in LEVELS[-1]
            are_strangers = {room, room_of(used)} == STRANGERS
            if points_right or is_command or are_strangers:
                wrong.append(f"{module} -> {used}")
    assert wrong == []
    while graph:  # no cycles: what imports nothing that is left can always be taken away
        leaves = {module for module, used in graph.items() if not used & set(graph)}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {module: used for module, used in graph.items() if module not in leaves}


def test_accelerate_and_distributed_have_one_home() -> None:
    for module, path in MODULES.items():
        foreign = set()
        for name in imports(path):
            if name.split(".")[0] in ("accelerate", "deepspeed") or "distributed" in name:
                foreign.add(name)
        assert room_of(module) in ("runtime", "channel") or not foreign, (module, foreign)
    # optional
    for path in (CODE / "runtime").glob("*.py"):
        names = imports(path, top_level_only=True)
        assert not {name for name in names if name.startswith("deepspeed")}, path


def test_transformers_is_for_tests_only() -> None:
    assert [
        m
        for m, path in MODULES.items()
        if "transformers" in {n.split(".")[0] for n in imports(path)}
    ] == []


@pytest.mark.parametrize(
    ("module", "slow"),
    [
        ("dist_lm.train", {"torch", "numpy", "pydantic"}),  # die_with_launcher() comes first
        ("dist_lm.outcome", {"torch", "numpy"}),
        ("dist_lm.runtime.strategy", {"torch", "deepspeed"}),
    ],
)
def test_slow_packages_come_late(module: str, slow: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not slow & set(done.stdout.split())


def test_names_shadow_nothing() -> None:
    """`accelerate launch dist_lm/train.py` puts dist_lm/ first on sys.path."""
    installed = {name.lower() for name in importlib.metadata.packages_distributions()}
    assert not {room_of(module) for module in MODULES} & (installed | set(sys.stdlib_module_names))


def test_init_holds_only_the_version() -> None:
    (docstring, version) = ast.parse((CODE / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(version, ast.Assign)
    assert [path for path in CODE.rglob("*/__init__.py") if path.read_text()] == []


def test_no_pickle_and_no_code_from_files() -> None:
    banned = {
        "torch.load",
        "torch.save",
        "eval",
        "exec",
        "dist.all_gather_object",
        "dist.broadcast_object_list",
    }
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & banned and "pickle" not in imports(path), module
        assert "trust_remote_code" not in path.read_text(), module


def test_launch_files_hold_no_mathematics() -> None:
    for path in (ROOT / "launch").glob("*.yaml"):
        text = path.read_text()
        assert not [
            w for w in ("mixed_precision", "batch", "clip", "accumulation", "dtype") if w in text
        ], path


@pytest.mark.slow
@pytest.mark.parametrize("check", ["ruff check .", "ruff format --check .", "mypy"])
def test_linter_and_type_checker_are_clean(check: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *check.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
