"""Other programs judge what we write: GGUF files, merges, numbers, logs, scores (`make judges` fetches them)."""

import ctypes
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from gguf_models import byte_level, needed, random_model, sentencepiece
from processes import qlora_nb, run
from repository import JUDGES, judge, real_file, real_tokenizer

from qlora_nb import load_model
from qlora_nb.adapter import save_adapter
from qlora_nb.core import EMBEDDED_FOLDER, EMBEDDED_NAME
from qlora_nb.gguf_export import export_gguf
from qlora_nb.gguf_tokens import pin_date
from qlora_nb.llama import quiet_llama
from qlora_nb.merging import save_merged

gguf, llama_cpp = needed("gguf"), needed("llama_cpp")
pytestmark = pytest.mark.heavy


# --- ggufdoctor: what a file holds beside its numbers, its template rendered by two engines -------------------------


def findings(path):
    "What ggufdoctor says of a file: (id, severity, conversations it is about, message)."
    report = path.with_suffix(".json")
    done = judge("ggufdoctor")(path, "--json", report, "--fail-on", "never")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert {engine["name"] for engine in found["engines"]} == {"jinja2", "llama.cpp"}
    assert not found["coverage"]["checks_not_evaluated"]
    return [(f["id"], f["severity"], f["evidence"].get("fixtures"), f["message"]) for f in found["findings"]]


def errors(path):
    return [finding for finding in findings(path) if finding[1] == "error"]


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("source", ["model", "run"])
def test_ggufdoctor_finds_no_error_in_the_embedded_model(source, kind, tmp_path):
    assert not errors(export_gguf(EMBEDDED_FOLDER / source, None, tmp_path / "m.gguf", kind))


# A family's template, the tokenizer that it was written for, and a model of its shape that can be exported.
FAMILIES = {
    "qwen2.5": ("qwen3", "Qwen-Qwen2.5-7B-Instruct", "qwen2"),
    "qwen3": ("qwen3", "Qwen-Qwen3-0.6B", "qwen3"),
    "llama 3.2": ("llama3_1", "meta-llama-Llama-3.2-3B-Instruct", "llama 3 rope"),
}
# What ggufdoctor finds in makers' templates, which we leave as they are: Qwen3's can't write a message without content,
# and `ollama create` puts a template of its own in place of Gemma's, unless a Modelfile has one (as ours does).
MAKERS = {"qwen3": ["X002"], "gemma": ["X003", "X003"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_ggufdoctor_finds_no_error_of_ours_under_real_tokenizers(name, tmp_path):
    tokenizer, template, shape = FAMILIES[name]
    tokenizer = real_tokenizer(tokenizer, template)
    model = random_model(shape, len(tokenizer), num_hidden_layers=1)
    path = export_gguf(model, tokenizer, tmp_path / "m.gguf", "q8_0")
    assert [kind for kind, *_ in errors(path)] == MAKERS.get(name, [])
    held = gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents()
    assert held == pin_date(tokenizer.chat_template), "the maker's template, but for the date of training"


@pytest.mark.parametrize("name, shape", [("gemma", "llama"), ("mistral", "mistral")])
def test_ggufdoctor_finds_no_error_of_ours_with_sentencepiece(name, shape, tmp_path):
    tokenizer = sentencepiece(tmp_path)
    if name == "gemma":
        tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
        tokenizer.chat_template = real_file("templates/google-gemma-2-2b-it.jinja").read_text(encoding="utf-8")
    path = export_gguf(random_model(shape, len(tokenizer)), tokenizer, tmp_path / "m.gguf", "f16")
    assert [kind for kind, *_ in errors(path)] == MAKERS.get(name, [])


def test_ggufdoctor_sees_a_template_that_writes_none(tmp_path):
    "As ours did where a message has no content: jinja2 writes None, llama.cpp nothing."
    tokenizer = byte_level("llama3")
    tokenizer.chat_template = tokenizer.chat_template.replace(" if m.content else ''", "")
    path = export_gguf(random_model("llama", len(tokenizer)), tokenizer, tmp_path / "m.gguf", "f16")
    assert [(kind, where) for kind, _, where, _ in errors(path)] == [("X005", ["tool_roundtrip"])]


# --- deltalint: the adapter is in the merged weights, byte for byte as peft would put it there ----------------------


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 40}},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
}


def merged(folder, dtype, settings):
    "Folders of a base, a random adapter that peft made for it, and our merge of the two."
    import peft

    base, tokenizer = load_model(EMBEDDED_NAME, load_in_4bit=False, dtype=dtype)
    base.save_pretrained(folder / "base")
    settings = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", **settings}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(model, tokenizer, folder / "adapter")
    save_merged(model, tokenizer, folder / "merged", dtype=dtype)


def deltalint(folder):
    places = [word for name in ("base", "adapter", "merged") for word in (f"--{name}", folder / name)]
    return judge("deltalint")("check", *places)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_deltalint_finds_the_adapter_in_the_merge(kind, dtype, tmp_path):
    merged(tmp_path, dtype, SETTINGS[kind])
    done = deltalint(tmp_path)
    layers = 8 if kind == "attention only" else 28
    assert done.returncode == 0 and f"PASS - {layers}/{layers} layers verified" in done.stdout, (
        done.stdout + done.stderr
    )


def test_deltalint_misses_an_adapter_that_is_not_there(tmp_path):
    merged(tmp_path, "bfloat16", {})
    shutil.copytree(tmp_path / "base", tmp_path / "merged", dirs_exist_ok=True)
    assert deltalint(tmp_path).returncode == 1


# --- llama.cpp's own quantization of the same numbers ---------------------------------------------------------------


def by_llama(source, target, kind):
    "llama.cpp's quantization of a file, as its program llama-quantize makes it."
    with quiet_llama() as native:
        settings = native.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = getattr(native, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}"), 1
        assert native.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)) == 0
    return tensors(target)


def tensors(path):
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
KINDS = ["f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen2, tied", "qwen3"])
def test_every_byte_is_llama_cpps(name, dtype, tmp_path):
    "All but the type of what makes the logits in Q4_0: ours has 8 bits there, llama.cpp's 6."
    tokenizer = byte_level("qwen2" if "qwen" in name else "llama3")
    model = random_model(name, len(tokenizer), **WIDE).to(getattr(torch, dtype))
    exact = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[dtype]
    kinds = list(dict.fromkeys([exact, *KINDS]))
    files = dict(zip(kinds, export_gguf(model, tokenizer, tmp_path / "m", kinds)))
    for kind in KINDS:
        ours, theirs = tensors(files[kind]), by_llama(files[exact], tmp_path / "theirs.gguf", kind)
        assert set(ours) == set(theirs)
        logits = "token_embd.weight" if "tied" in name else "output.weight"
        assert [part for part in ours if ours[part] != theirs[part]] == ([logits] if kind == "q4_0" else []), kind
        if kind == "q4_0":
            assert (ours[logits][0], theirs[logits][0]) == ("Q8_0", "Q6_K")


# --- lm-eval: questions with choices, answered by the model as it is, adapter included -------------------------------

LM_EVAL = """
import json, sys
sys.path.append(sys.argv[1])
from qlora_nb import add_lora, load_model
from qlora_nb.scorers import run_benchmarks
import torch

model, tokenizer = load_model()
model = add_lora(model)
with torch.no_grad():  # an adapter that changes what the base prefers
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
rows = [json.loads(line) for line in open(sys.argv[2])]
task = {"task": "apples", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": sys.argv[2]}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list":
        [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}

def ours():
    "The share of rows whose right choice has the highest log-likelihood, by one forward pass each."
    right = 0
    for row in rows:
        start = tokenizer(row["question"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            ids = tokenizer(row["question"] + " " + choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            scores.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(start), len(ids))))
        right += scores.index(max(scores)) == row["gold"]
    return right / len(rows)

def theirs():
    return run_benchmarks(model, tokenizer, [task])["apples"]["acc,none"]

tuned = [theirs(), ours()]
with model.disable_adapter():
    base = [theirs(), ours()]
print(json.dumps([base, tuned]))
"""


def test_lm_eval_counts_the_right_choices_that_we_count(tmp_path):
    if not (JUDGES / "lm_eval").is_dir():
        pytest.skip(f"lm_eval is not in {JUDGES}: `make judges` fetches it, where the package registry can be reached")
    rows = [
        {"question": f"Tom has {i} apples and gets {j}. How many apples does Tom have now? The answer is",
         "choices": [str(i + j + k) for k in (0, 1, -1, 10)], "gold": 0}
        for i in range(3, 11) for j in (2, 5, 9)
    ]  # fmt: skip
    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", LM_EVAL, JUDGES, file], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    base, tuned = json.loads(done.stdout.splitlines()[-1])
    assert base[0] == base[1] and tuned[0] == tuned[1] != base[0]


# --- tensorboard: what `report_to` writes ---------------------------------------------------------------------------


def installed(*packages):
    "What to begin a program with, so that it has these; the test is skipped where they aren't there."
    for package in packages:
        if not (JUDGES / package).is_dir():
            pytest.skip(
                f"{package} is not in {JUDGES}: `make judges` fetches it, where the package registry can be reached"
            )
    return f"import sys; sys.path.append({str(JUDGES)!r})"


EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1])
events.Reload()
print(json.dumps({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""


def test_tensorboard_reads_the_losses_of_a_run(tmp_path):
    "And its learning rates and held-out losses, all at their steps, in the run's own folder."
    first = installed("tensorboard", "absl")
    how = ["--report-to", "tensorboard", "--eval-steps", "2", "--save-steps", "2", "--eval-rows", "3"]
    how += ["--max-new-tokens", "4", "--limit", "40", "-o", "run"]
    done = qlora_nb("train", "--max-steps", "4", *how, cwd=tmp_path, first=first)
    assert done.returncode == 0, done.stderr[-2000:]
    read = run(EVENTS, tmp_path / "run/tensorboard", cwd=tmp_path, first=first)
    assert read.returncode == 0, read.stderr[-2000:]
    found = json.loads(read.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for tag, name, count in (
        ("train/loss", "loss", 4),
        ("train/learning_rate", "learning_rate", 4),
        ("eval/loss", "eval_loss", 2),
    ):
        wanted = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        assert len(wanted) == count and [step for step, _ in found[tag]] == [step for step, _ in wanted], (tag, wanted)
        torch.testing.assert_close(torch.tensor([v for _, v in found[tag]]), torch.tensor([v for _, v in wanted]))


# --- evaluate: a metric by name --------------------------------------------------------------------------------------

METRIC = """
import datasets
import evaluate


class FirstWord(evaluate.Metric):
    def _info(self):
        texts = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=texts)

    def _compute(self, predictions, references):
        same = [one.split()[:1] == other.split()[:1] for one, other in zip(predictions, references)]
        return RESULT
"""


@pytest.mark.parametrize("place", ["first_word", "./first_word/", "first_word/first_word.py"])
@pytest.mark.parametrize("result", ['{"rows": 7, "first_word": sum(same) / len(same)}', "sum(same) / len(same)"])
def test_a_metric_of_ones_own_scores_a_run(result, place, tmp_path):
    "Loaded from a folder, as Hugging Face's are from the Hub: the figure of its name, or the number that it returns."
    first = installed("evaluate")
    (tmp_path / "first_word").mkdir()
    (tmp_path / "first_word/first_word.py").write_text(METRIC.replace("RESULT", result))
    rows = [("What is 3 + 4?", "The answer is 7."), ("What is 5 + 6?", "It is 11."), ("What is 2 + 2?", "The sum: 4")]
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    done = qlora_nb(
        "evaluate", "-m", EMBEDDED_NAME, "-d", "rows.jsonl", "--scorer", f"evaluate:{place}", "--max-new-tokens", "8",
        cwd=tmp_path, first=first, env={"HF_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["score"] == pytest.approx(2 / 3) and (found["exact"], found["scorer"]) == (None, f"evaluate:{place}")
    assert f"score (evaluate:{place})" in done.stderr


def test_a_metric_that_is_not_there_is_named(tmp_path):
    done = qlora_nb("evaluate", "-m", EMBEDDED_NAME, "--scorer", "evaluate:none", "--limit", "1", cwd=tmp_path,
                    first=installed("evaluate"))  # fmt: skip
    assert done.returncode == 2 and "evaluate can't load the metric 'none'" in done.stderr
