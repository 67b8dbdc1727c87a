"""Give the interactive figures that notebooks store the current program: python tools/refresh_figures.py

A stored figure holds its data, its picture and its program (`qlora_nb/templates`, and formulas written from the Python
source). The program alone is put in again; data and picture stay those of the notebook's own run.
"""

import json
import re
from pathlib import Path

from qlora_nb.figures import memory_calculator, nf4_figure, rank_figure

NBS = Path(__file__).resolve().parents[1] / "nbs"
FIGURE = re.compile(r'<div class="qnb-figure" data-figure="(\w+)"')
MAKERS = {"memory": memory_calculator, "nf4": nf4_figure, "rank": rank_figure}


def refresh(notebook, programs):
    "Change the stored figures in place; return how many had another program."
    changed = 0
    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        text = "".join(output.get("data", {}).get("text/html", ""))
        if match := FIGURE.match(text):
            made = text.partition("</div>")[0] + "</div>" + programs[match[1]]
            changed += made != text
            output["data"]["text/html"] = made.splitlines(keepends=True)
    return changed


def main():
    programs = {kind: make()._repr_html_().partition("</div>")[2] for kind, make in MAKERS.items()}
    for path in sorted(NBS.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if changed := refresh(notebook, programs):
            text = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
            print(f"{path.name}: {changed}")


if __name__ == "__main__":
    main()
