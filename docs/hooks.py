"""What mkdocs builds beside the files of docs/: pages of the repository, and the reference.

The README becomes the home page. Pages keep their paths below the repository's root, and those of
docs/ lose that folder, so links between them are rewritten. A link to a file that is no page (a
script, a recipe) stays text in backquotes in all guides, so there is none to rewrite. The reference
is made from the settings and commands themselves, so that it cannot differ from them.
"""

import contextlib
import importlib
import io
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "train",
    "prepare",
    "generate",
    "score",
    "show",
    "report",
    "harness",
    "publish",
    "plan",
    "doctor",
)
# Pages outside of docs/, by their path from the root.
OUTSIDE = (
    "CONTRIBUTING.md",
    "AGENTS.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "slurm/README.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("benchmarks/results/*.md"))),
)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the dated results to the navigation, newest first."""
    results = [path for path in OUTSIDE if path.startswith("benchmarks/")]
    assert config.nav is not None
    config.nav.append({"Results": sorted(results, reverse=True)})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere or are made."""
    pages = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    for path in OUTSIDE:
        if (ROOT / path).is_file():
            pages[path] = (ROOT / path).read_text(encoding="utf-8")
    license_text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    pages["LICENSE.md"] = f"# License\n\n```text\n{license_text}\n```\n"
    pages["settings.md"] = settings_page()
    pages["commands.md"] = commands_page()
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between files of the repository to links between pages."""
    site_path = page.file.src_uri
    place = site_path
    if site_path == "index.md":
        place = "README.md"
    elif site_path not in OUTSIDE:
        place = f"docs/{site_path}"

    def rewrite(match: re.Match[str]) -> str:
        target, hash_sign, anchor = match[2].partition("#")
        if not target or "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        goal = {"LICENSE": "LICENSE.md", "README.md": "index.md"}.get(path, path)
        goal = goal.removeprefix("docs/")
        relative = posixpath.relpath(goal, posixpath.dirname(site_path) or ".")
        return f"{match[1]}{relative}{hash_sign}{anchor}{match[3]}"

    return LINK.sub(rewrite, markdown)


def settings_page() -> str:
    """Every setting of a run: its name, what it takes, its default, its meaning."""
    from dist_lm.config import FIELDS, NESTED, SECTIONS, Config
    from dist_lm.helptext import name_of_type, spell

    defaults = Config().flat()
    lines = ["# All settings", ""]
    lines.append(
        "Give them in a YAML file (`--config FILE`) or on the command line"
        " (`--section.field VALUE`). A later one wins."
    )
    for section_name, section in SECTIONS.items():
        lines += ["", f"## {section_name}", "", section.__doc__ or "", ""]
        lines += ["| setting | takes | default | meaning |", "|---|---|---|---|"]
        for name, info in FIELDS.items():
            if name.startswith(f"{section_name}."):
                default = spell(defaults[name])
                lines.append(row(name, name_of_type(info), default, info.description))
    for nested in dict.fromkeys(NESTED.values()):
        users = [f"`{name}`" for name, section in NESTED.items() if section is nested]
        lines += ["", f"## Each of {' and '.join(users)}", "", nested.__doc__ or "", ""]
        lines += ["| field | takes | default | meaning |", "|---|---|---|---|"]
        for name, info in nested.model_fields.items():
            default = "(needed)" if info.is_required() else spell(info.default)
            lines.append(row(name, name_of_type(info), default, info.description))
    return "\n".join(lines) + "\n"


def row(name: str, takes: str, default: str, meaning: str | None) -> str:
    """A row of a table. A bar in backquotes does not end a cell."""
    return f"| `{name}` | `{takes}` | `{default}` | {meaning or ''} |"


def commands_page() -> str:
    """The page of --help of each command."""
    lines = ["# All commands", ""]
    lines.append(
        "`dist-lm NAME` and `python -m dist_lm.NAME` are the same. Flags that are settings of a"
        " run stand in [all settings](settings.md)."
    )
    for name in COMMANDS:
        page, _, _ = help_of(name).partition("\nmodel: ")
        lines += ["", f"## {name}", "", "```text", page.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def help_of(name: str) -> str:
    """What `python -m dist_lm.NAME --help` prints."""
    module = importlib.import_module(f"dist_lm.{name}")
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        module.main(["--help"])
    return output.getvalue()
