"""Figures of the house: code lines and public names of the modules, and how the notebooks read.

    python tools/house.py

A code line has code on it: blank lines and comments don't count, docstrings do. `__init__` and `__main__`, written by
hand, and nbdev's index are left out.

Of each notebook: its cells; words of prose; code lines that are exported; the cells before its headline call (the call
the lesson is about, with its result on the page); the longest run of exported cells with no cell between them that the
reader sees run (and its lines); how many of the exported definitions, and of the public ones, are checked in place: a
cell at most four further on names them and asserts something.
"""

import ast
import io
import json
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, NBS = ROOT / "qlora_nb", ROOT / "nbs"
LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip

# The lessons, each with its headline call; every other notebook is a reference, or tells a story (index, takeaways).
LESSONS = {
    "01_lora": "LoRALinear",
    "02_nf4": "quantize_nf4",
    "03_qlora": "QLoRALinear",
    "04_memory": "estimate_memory",
    "05_recommend": "recommend",
    "06_engine": "install_engine",
    "07_kernels": "fused_swiglu",
    "08_plan": "plan_training",
    "09_preflight": "check_dataset",
    "10_model": "load_model",
    "11_template": "encode",
    "12_data": "load_sft_dataset",
    "13_generate": "chat",
    "14_evaluation": "evaluate",
    "15_training": "train",
    "16_merge": "merge_adapter",
    "17_gguf": "export_gguf",
    "18_ollama": "modelfile_for",
    "19_diagnose": "diagnose",
    "20_scorers": "find_scorer",
    "21_forgetting": "measure_perplexity",
    "22_certificate": "certify",
    "23_session": "ask",
    "24_answers": "answer_prompts",
    "25_publish": "push_to_hub",
    "27_manifest": "open_run",
    "30_quickstart": "load_run",
    "36_several_gpus": "start_workers",
    "39_sharded_base": "find_sharded",
    "53_loop": "make_loop",
    "60_forwards": "replace_forward",
    "61_line": "join_rows",
    "62_layers": "fused_forward",
    "63_passes": "mlp_forward",
    "64_loss": "labelled_loss",
    "65_checkpointing": "run_checkpointed",
    "66_replay": "Replay",
}
EXPORT = re.compile(r"^\s*#\s*\|\s*(?:export|exporti|exports)\b", re.M)
UNSEEN = re.compile(r"^\s*#\s*\|\s*(?:hide|eval:\s*false|include:\s*false|default_exp)\b", re.M)
UNRUN = re.compile(r"^\s*#\s*\|\s*(?:eval:\s*false|default_exp)\b", re.M)
NEAR = 4


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


# --- notebooks --------------------------------------------------------------------------------------------------------


def read_cells(path):
    "(kind, source, tree, outputs) of each cell; the tree is None for prose and cell magics."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        tree = None
        if cell["cell_type"] == "code" and not source.lstrip().startswith("%%"):
            lines = ("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())
            tree = ast.parse("\n".join(lines))
        yield cell["cell_type"], source, tree, cell.get("outputs") or []


def is_exported(source):
    return bool(EXPORT.search(source))


def is_import_alone(tree):
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body)


def names_in(tree):
    "Every name that a cell mentions, as a variable or behind a dot."
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def calls_in(tree):
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {getattr(func, "id", None) or getattr(func, "attr", None) for func in called}


def checks(source, tree):
    "Whether a cell asserts something, where the reader sees it."
    called = {str(name) for name in calls_in(tree)}
    asserts = any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    return (
        not is_exported(source)
        and not UNRUN.search(source)
        and (asserts or any(re.match("test_|assert_|raises$|shows_error$|check", name) for name in called))
    )


def shows(outputs):
    "Whether something but warnings is stored."
    return any(output.get("name") != "stderr" for output in outputs)


def first_result(cells, headline):
    "How many cells the reader has passed when the headline call shows its result; None if it never does."
    for i, (_, source, tree, outputs) in enumerate(cells):
        seen = tree and shows(outputs) and not is_exported(source) and not UNSEEN.search(source)
        if seen and headline in calls_in(tree):
            return i
    return None


def longest_run(cells):
    "The most exported cells in a row without one that is seen to run between them, and their lines."
    best, run, lines = (0, 0), 0, 0
    for _, source, tree, outputs in cells:
        if tree is None or not tree.body or is_import_alone(tree):
            continue
        if is_exported(source):
            run, lines = run + 1, lines + code_lines(source)
            best = max(best, (run, lines))
        elif not UNSEEN.search(source) and (shows(outputs) or checks(source, tree)):
            run, lines = 0, 0
    return best


def checked_in_place(cells, public):
    "(checked, all) of the exported definitions, and the same of the public ones; with the names that are not checked."
    counts, missing = {False: [0, 0], True: [0, 0]}, []
    for i, (_, source, tree, _) in enumerate(cells):
        if tree is None or not is_exported(source):
            continue
        near = [one for one in cells[i + 1 : i + 1 + NEAR] if one[2] and checks(one[1], one[2])]
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                good = any(node.name in names_in(one[2]) for one in near)
                if not good:
                    missing.append(node.name)
                for kind in {False, node.name in public}:
                    counts[kind][0] += good
                    counts[kind][1] += 1
    return counts[False], counts[True], missing


def describe(path):
    "The figures of one notebook."
    cells = list(read_cells(path))
    exported = [source for _, source, tree, _ in cells if tree and is_exported(source)]
    module = next(
        (m.group(1) for _, s, t, _ in cells if t and (m := re.search(r"#\s*\|\s*default_exp (\S+)", s))), None
    )
    public = public_names((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")) if module else []
    headline = LESSONS.get(path.stem)
    run, run_lines = longest_run(cells)
    everything, publics, missing = checked_in_place(cells, public)
    return {
        "cells": len(cells),
        "words": sum(len(source.split()) for kind, source, _, _ in cells if kind == "markdown"),
        "lines": sum(code_lines(source) for source in exported),
        "code": sum(code_lines(source) for _, source, tree, _ in cells if tree),
        "before": first_result(cells, headline) if headline else None,
        "run": run,
        "run_lines": run_lines,
        "checked": everything,
        "public": publics,
        "missing": missing,
    }


def share(pair):
    return f"{pair[0]}/{pair[1]}" if pair[1] else ""


def print_modules():
    texts = [(name, path.read_text(encoding="utf-8")) for name, path in modules()]
    rows = [(name, code_lines(text), len(public_names(text))) for name, text in texts]
    for name, lines, names in [*rows, ("in all", sum(row[1] for row in rows), sum(row[2] for row in rows))]:
        print(f"{name:<22} {lines:>6} code lines {names:>4} public names")


def print_notebooks(only=()):
    head = "notebook cells words words/line exported before run lines checked public"
    print("{:<22} {:>6} {:>6} {:>11} {:>9} {:>7} {:>4} {:>6} {:>9} {:>7}".format(*head.split()))
    sums = {"checked": [0, 0], "public": [0, 0]}
    for path in sorted(NBS.glob("*.ipynb")):
        if only and path.stem not in only:
            continue
        row = describe(path)
        for key in sums:
            sums[key] = [a + b for a, b in zip(sums[key], row[key])]
        before = "" if path.stem not in LESSONS else "never" if row["before"] is None else row["before"]
        density = row["words"] / max(row["code"], 1)
        print(
            f"{path.stem:<22} {row['cells']:>6} {row['words']:>6} {density:>11.1f} {row['lines']:>9}"
            f" {before:>7} {row['run']:>4} {row['run_lines']:>6} {share(row['checked']):>9} {share(row['public']):>7}"
        )
        if only:
            print("  not checked in place:", " ".join(row["missing"]))
    print("checked in place: " + ", ".join(f"{k} {a}/{b} ({a / max(b, 1):.0%})" for k, (a, b) in sums.items()))


if __name__ == "__main__":
    import sys

    if not sys.argv[1:]:
        print_modules()
        print()
    print_notebooks(sys.argv[1:])
