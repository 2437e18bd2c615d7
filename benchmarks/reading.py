"""How dense the code is to read: `python benchmarks/reading.py [FOLDER]`, by default dist_lm.

Prints, for all Python files below the folder: lines, lines of code, and per 1,000 lines of code the
nodes of the syntax tree, comprehensions, conditional expressions and tuple assignments. Comments
are in percent of the code. Functions of more than 60 lines are named.
"""

import ast
import sys
import tokenize
from collections import Counter
from pathlib import Path

LONG = 60  # lines of a function
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def is_tuple_assignment(node: ast.AST) -> bool:
    """Whether it is like `a, b = 1, 2`."""
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def lines_of_code(text: str, tree: ast.Module) -> int:
    """Lines that are neither empty, nor a comment, nor a docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            first = node.body[0]
            docstrings.update(range(first.lineno, (first.end_lineno or 0) + 1))
    code = 0
    for number, line in enumerate(text.splitlines(), 1):
        words = line.strip()
        code += bool(words) and not words.startswith("#") and number not in docstrings
    return code


def measure(path: Path, counts: Counter[str]) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    counts["files"] += 1
    counts["lines"] += len(text.splitlines())
    counts["code"] += lines_of_code(text, tree)
    with open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    counts["comments"] += len({t.start[0] for t in tokens if t.type == tokenize.COMMENT})
    for node in ast.walk(tree):
        counts["nodes"] += 1
        counts["comprehensions"] += isinstance(node, COMPREHENSIONS)
        counts["conditional expressions"] += isinstance(node, ast.IfExp)
        counts["tuple assignments"] += is_tuple_assignment(node)
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            if length > LONG:
                print(f"{path}:{node.lineno} {node.name} has {length} lines")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "dist_lm")
    counts = Counter[str]()
    for path in sorted(folder.rglob("*.py")):
        measure(path, counts)
    code = counts["code"]
    print(f"{counts['files']} files, {counts['lines']:,} lines, {code:,} of code")
    print(f"{counts['comments'] / code:.0%} comments")
    for name in ("nodes", "comprehensions", "conditional expressions", "tuple assignments"):
        print(f"{1000 * counts[name] / code:,.0f} {name} per 1,000 lines of code")


if __name__ == "__main__":
    main()
