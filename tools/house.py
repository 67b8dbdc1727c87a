"""Figures of the package: code lines and public names, module by module.

    python tools/house.py

A code line has code on it: blank lines and comments don't count, docstrings do. `__init__` and `__main__`, written by
hand, and nbdev's index are left out.
"""

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "qlora_nb"
LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def modules():
    "The exported modules, those of subpackages included, by their dotted names."
    for path in sorted(PACKAGE.rglob("*.py")):
        if not path.name.startswith("_"):
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


def code_lines(text: str) -> int:
    "How many lines of a source have code on them."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return len({line for t in tokens if t.type not in LAYOUT for line in range(t.start[0], t.end[0] + 1)})


def public_names(text: str) -> list[str]:
    "What `__all__` lists; nothing where there is none."
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


if __name__ == "__main__":
    texts = [(name, path.read_text(encoding="utf-8")) for name, path in modules()]
    rows = [(name, code_lines(text), len(public_names(text))) for name, text in texts]
    for name, lines, names in [*rows, ("in all", sum(row[1] for row in rows), sum(row[2] for row in rows))]:
        print(f"{name:<18} {lines:>6} code lines {names:>4} public names")
