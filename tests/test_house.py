"""The house's own rules: how lessons read, what is checked in place, which tests run when, what ran on a GPU."""

import json
import re

import pytest
from repository import NBS, NOTEBOOKS, ROOT, tool

pytestmark = pytest.mark.quick
HOUSE = tool("house")
GPU = tool("gpu_tests")
FIGURES = {path.stem: HOUSE["describe"](path) for path in NOTEBOOKS}


# --- notebooks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", HOUSE["LESSONS"])
def test_a_lesson_begins_with_its_result(stem):
    before = FIGURES[stem]["before"]
    assert before is not None and before <= 8, "the headline call and its result are on the first screen"


def test_lessons_stand_among_the_lessons():
    "In the overview's first table, and on the site in another section than the references."
    lessons, references = (
        "".join(json.dumps(output) for output in outputs)
        for _, source, _, outputs in HOUSE["read_cells"](NBS / "index.ipynb")
        if re.search(r"^list_notebooks\(", source, re.M)
    )
    section_of = tool("prepare_docs")["section_of"]
    for stem in HOUSE["LESSONS"]:
        assert f"({stem}.ipynb)" in lessons and f"({stem}.ipynb)" not in references, stem
        assert section_of(NBS / f"{stem}.ipynb") != "Reference", stem


@pytest.mark.parametrize("stem", FIGURES)
def test_exported_cells_are_seen_to_run(stem):
    assert FIGURES[stem]["run"] <= 3, "more than three exported cells in a row with nothing that runs between them"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_came_out(notebook):
    assert any(HOUSE["shows"](outputs) for *_, outputs in HOUSE["read_cells"](notebook)), "no output is stored"


def test_definitions_are_checked_where_they_are_made():
    for kind, least in (("checked", 0.5), ("public", 0.95)):
        done, whole = (sum(figures[kind][i] for figures in FIGURES.values()) for i in (0, 1))
        assert done >= least * whole, f"{kind}: {done} of {whole}"


def test_the_figures_can_tell(tmp_path):
    "A notebook made to fail each rule."

    def cell(source, kind="code", outputs=()):
        return {"cell_type": kind, "source": source, "outputs": list(outputs)}

    shown = [{"output_type": "stream", "text": "1"}]
    cells = [cell("#| export\ndef a(): return 1"), cell("#| exporti\ndef b(): return 2"), cell("word " * 9, "markdown")]
    cells += [cell("b()\nassert a() == 1"), cell("#| hide\nassert b() == 2"), cell("train(a())", outputs=shown)]
    path = tmp_path / "01_lora.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    read = list(HOUSE["read_cells"](path))
    assert HOUSE["longest_run"](read) == (2, 2)
    assert HOUSE["first_result"](read, "train") == 5 and HOUSE["first_result"](read, "b") is None
    assert HOUSE["checked_in_place"](read, ["a"]) == ([2, 2], [1, 1], [])
    assert HOUSE["checked_in_place"](read[:3], ["a"]) == ([0, 2], [0, 1], ["a", "b"])


# --- tests ----------------------------------------------------------------------------------------------------------


def test_every_test_file_is_in_one_part_of_test_all():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    parts = re.search(r"^PARTS := (.*)$", text, re.M)[1].split()
    listed = [name for part in parts for name in re.findall(rf"^{part} := (.*)$", text, re.M) for name in name.split()]
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert sorted(listed) == sorted(files - {"gpu", "house", "in_sync", "structure"})


def test_every_budget_is_of_a_file():
    budgets = dict(map(str.split, (ROOT / "tests/budgets.txt").read_text(encoding="utf-8").splitlines()))
    assert set(budgets) <= {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert sum(map(float, budgets.values())) <= 22 * 60  # those without a line are cheap


def test_only_code_counts_in_the_engines_hash():
    bare = GPU["bare"]
    code = 'def f(x):\n    return "# no comment"\n'
    assert bare(f'"A module."\n# {code!r}\n\n{code}') == bare(code) == code.rstrip()
    assert bare(code.replace(":\n", ':\n    "Say it,\n    at length."\n'.replace('"', '"""'), 1)) == bare(code)
    assert bare(code.replace("no", "a")) != bare(code)
    assert GPU["engine_files"](), "the engine is found"


def test_the_limits_say_when_the_engine_was_on_a_gpu():
    "Whether its code has changed since then is for `make release-check`."
    stored = json.loads((NBS / "results/gpu_tests.json").read_text(encoding="utf-8"))
    said = (NBS / "limits.md").read_text(encoding="utf-8")
    assert f"`make test-gpu` last ran on {stored['date']} on one {stored['gpu']}" in said
    assert re.fullmatch("[0-9a-f]{64}", stored["engine_sha256"]) and " passed" in stored["summary"]
    assert "failed" not in stored["summary"] and stored["versions"]["torch"]
