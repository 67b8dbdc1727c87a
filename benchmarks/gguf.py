"""How fast a folder becomes a GGUF, as a share of a plain copy of the same files, in one run.

    python benchmarks/gguf.py                        # the shape of Llama-3.2-1B, 2.5 GB, random numbers
    python benchmarks/gguf.py --layers 2 --runs 2    # smaller

Copy and exports take turns, and the best time of each counts. 100 % means: as fast as copying the model. The folder is
made in --place (the system's temporary folder; 8 GB) and removed in the end. Files lie in the system's cache when they
are read, and each run ends with a sync, so that what is written counts wherever it waits.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # else this file would stand for the gguf package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from gguf_models import large_tokenizer, write_llama_1b

from qlora_nb.gguf_export import export_gguf


def copy(model, out):
    out.mkdir()
    for file in model.glob("*.safetensors"):
        shutil.copyfile(file, out / file.name)


def timed(function, out):
    "Seconds, the disk's work included; what was written is removed."
    start = time.perf_counter()
    function()
    os.sync()
    seconds = time.perf_counter() - start
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    shutil.rmtree(out)
    return seconds, written


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--place", type=Path, default=None)
    parser.add_argument("--quantizations", nargs="+", default=["f16", "bf16", "q8_0", "q4_0"])
    a = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=a.place))
    try:
        model, out = place / "model", place / "out"
        model.mkdir()
        tokenizer = large_tokenizer()
        tokenizer.save_pretrained(model)
        write_llama_1b(model, layers=a.layers)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        tasks = {"copy": lambda: copy(model, out)}
        for name in [*a.quantizations, ",".join(a.quantizations)]:
            tasks[name] = lambda name=name: export_gguf(model, tokenizer, out, name.split(","))
        found = {name: [] for name in tasks}
        for _ in range(a.runs):
            for name, task in tasks.items():
                found[name].append(timed(task, out))
        best = {name: min(runs) for name, runs in found.items()}
        print(f"{size / 1e9:.2f} GB in bf16, {torch.get_num_threads()} threads, torch {torch.__version__}")
        print(f"best of {a.runs}                seconds   MB/s read   GB written   share of a copy's speed")
        for name, (seconds, written) in best.items():
            speed, share = size / seconds / 1e6, best["copy"][0] / seconds
            print(f"{name:22} {seconds:9.1f} {speed:11.0f} {written / 1e9:12.2f} {share:10.0%}")
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
