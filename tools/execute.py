"""Run notebooks from top to bottom and store their outputs: python tools/execute.py nbs/01_lora.ipynb …

Cells marked `#| eval: false`, `#| cuda` or `#| slow` are left alone (with `--flags cuda slow` the named kinds run
too), as `nbdev_test` does; those marked `#| heavy`, which `make test` leaves to `make test-all`, run here. A notebook
that fails is not written.

Figures are stored as SVG in the style of tools/matplotlibrc; one of more than SVG_LIMIT bytes as PNG, at twice the
screen's resolution.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

STYLE = Path(__file__).with_name("matplotlibrc")
SVG_LIMIT = 150_000
# No date and no version in an SVG: it changes when what it shows does.
INLINE = {
    "figure_formats": {"svg", "retina"},
    "print_figure_kwargs": {"bbox_inches": "tight", "metadata": {"Date": None, "Creator": None}},
}
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(cuda|slow|eval\s*:\s*false)\b", re.M)


class Client(NotebookClient):
    "Runs what the tests run."

    flags: tuple = ()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == "code" and set(DIRECTIVE.findall(cell.source)) - set(self.flags):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def keep_one_picture(output):
    "A figure comes as SVG and as PNG: keep the SVG unless it is large."
    if {"image/svg+xml", "image/png"} <= set(output.get("data", {})):
        large = len(output.data["image/svg+xml"].encode()) > SVG_LIMIT
        kind = "image/svg+xml" if large else "image/png"
        del output.data[kind]
        output.metadata.pop(kind, None)


def join_streams(outputs):
    "What a cell printed in many pieces, as one output a stream."
    joined = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def tidy(notebook):
    "No execution counts, no streams of noise, no metadata of this run: what a rerun would not change."
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = join_streams(cell.outputs)
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = None
                keep_one_picture(output)
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    notebook.metadata = {k: v for k, v in notebook.metadata.items() if k in ("kernelspec", "accelerator", "colab")}
    return notebook


def drop_stderr(notebook):
    "Leave out what was said on stderr while it ran: progress, and where files were put."
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def execute(path, flags=(), limit=3600, quiet=False):
    notebook = nbformat.read(path, 4)
    client = Client(notebook, timeout=limit, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    client.flags = tuple(flags)
    client.extra_arguments = [f"--InlineBackend.{name}={value!r}" for name, value in INLINE.items()]
    client.execute(env={**os.environ, "MATPLOTLIBRC": str(STYLE)})
    notebook = tidy(notebook)
    if quiet:
        drop_stderr(notebook)
    beside = path.with_suffix(".tmp")
    nbformat.write(notebook, beside)
    os.replace(beside, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--flags", nargs="*", default=[])
    parser.add_argument("--quiet", action="store_true", help="store nothing of stderr: for stories that show progress")
    args = parser.parse_args()
    failed = []
    for path in args.notebooks:
        start = time.time()
        try:
            execute(path.resolve(), args.flags, quiet=args.quiet)
            print(f"{path}: {time.time() - start:.0f} s", file=sys.stderr)
        except CellExecutionError as error:
            failed.append(path)
            print(f"{path}: {re.sub(chr(27) + '[^m]*m', '', str(error))[-3000:]}", file=sys.stderr)
    sys.exit(len(failed))


if __name__ == "__main__":
    main()
