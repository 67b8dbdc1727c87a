"""Writes tests/skipped_cells.txt: the cells that `make test` leaves out, one a line (`test-all` has heavy ones)."""

import json
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LISTED = ROOT / "tests/skipped_cells.txt"


def skip_flags():
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["tst_flags"].split()


def skipped_cells(notebooks=None):
    "`notebook: cell id: directive` for each cell that nbdev_test leaves out, and for notebooks that ask to be."
    words = "|".join(map(re.escape, skip_flags()))
    pattern = re.compile(rf"^\s*#\s*\|\s*({words}|eval\s*:\s*false)\b", re.M | re.I)
    found = []
    for path in sorted(notebooks or (ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code":
                directives = sorted({re.sub(r"\s*:\s*", ": ", d.lower()) for d in pattern.findall(source)})
                found += [f"{path.name}: {cell['id']}: {directive}" for directive in directives]
            elif re.search(r"^[\s-]*skip_exec\s*:", source, re.M):
                found.append(f"{path.name}: {cell['id']}: skip_exec")
    return found


if __name__ == "__main__":
    LISTED.write_text("".join(f"{line}\n" for line in skipped_cells()), encoding="utf-8")
