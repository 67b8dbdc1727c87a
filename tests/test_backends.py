"""Both backends, each in processes of its own: the same bytes twice, the same losses and replies, our labels."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import processes
import pytest

BACKENDS = ["transformers", pytest.param("unsloth", marks=pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed"))]  # fmt: skip


def python(code, cwd, **env):
    env = {**os.environ, "QLORA_NB_PROFILE": "tiny", **env}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def forked(code, cwd):
    done = processes.run(code, cwd=cwd)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


CAPTURE = """
import json, sys, torch
from qlora_nb import add_lora, load_model, load_sft_dataset
from qlora_nb.core import PROFILES
from qlora_nb.preflight import encode_dataset
model, tokenizer = load_model(backend=sys.argv[1] if len(sys.argv) > 1 else {backend!r})
model = add_lora(model)
from pathlib import Path
from qlora_nb.run import resolve_settings
from qlora_nb.trainer import make_trainer
rows, dropped = encode_dataset(load_sft_dataset(limit=40), tokenizer, 256)
assert not dropped and set(rows.column_names) == {{"input_ids", "labels"}}
settings = resolve_settings({{"max_steps": 1}}, profile=PROFILES["tiny"])
trainer = make_trainer(model, tokenizer, rows, settings, Path("c"), [])
seen, embedded = [], []
base = model.get_base_model()
forward = base.forward
def spy(*args, **kwargs):
    assert not args, "ids and labels come by name"
    seen.append({{name: kwargs[name].tolist() for name in ("input_ids", "labels", "attention_mask")}})
    return forward(**kwargs)
base.forward = spy
base.get_input_embeddings().register_forward_pre_hook(lambda layer, args: embedded.append(args[0].tolist()))
trainer.train()
assert len(seen) == len(embedded) == 1 and seen[0]["input_ids"] == embedded[0]
ours = {{tuple(row["input_ids"]): list(row["labels"]) for row in rows}}
found = 0
for batch in seen:
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
        n = sum(mask)
        assert mask == [1] * n + [0] * (len(mask) - n)
        assert ours[tuple(ids[:n])] == labels[:n] and set(labels[n:]) <= {{-100}}
        found += 1
print("checked", found, {{str(p.dtype) for p in model.parameters() if p.requires_grad}})
"""
PATCHED = """
from qlora_nb.core import UserError
try:
    load_model(backend="transformers")
except UserError as error:
    print(error)
"""
TRAIN = """
from qlora_nb.cli import main
try:
    main({arguments})
except SystemExit as end:
    assert not end.code, end.code
"""
GENERATE = """
import json, sys
import torch
from qlora_nb.model import add_lora, load_model
model, tokenizer = load_model("qlora_nb:embedded", backend="unsloth", max_seq_length=512)
from qlora_nb.evaluation import evaluate
from qlora_nb.generation import generate_replies
from qlora_nb.adapter import save_adapter
questions = json.loads(sys.argv[1])
plain = [r.text for r in generate_replies(model, tokenizer, questions, max_new_tokens=8)]
model = add_lora(model, r=8)
torch.manual_seed(0)
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.05)
together = generate_replies(model, tokenizer, questions, max_new_tokens=8)
def modes():
    return [(n, m.training, str(getattr(m, "gradient_checkpointing", None))) for n, m in model.named_modules()]
model.train()
before = modes()
reply = {"role": "assistant", "content": "The answer is 7."}
rows = [{"messages": [{"role": "user", "content": q}, reply]} for q in questions]
found = evaluate(model, tokenizer, rows, max_new_tokens=8, base_data=rows)
kept = modes() == before
ids = tokenizer("Ann has 3 apples.", return_tensors="pt")["input_ids"]
model(input_ids=ids, labels=ids).loss.backward()
moved = sum(float(p.grad.abs().max()) > 0 for p in model.parameters() if p.requires_grad)
sha = save_adapter(model, tokenizer, sys.argv[2])
print("RESULT", json.dumps({
    "plain": plain, "kept": kept, "moved": moved, "sha": sha,
    "adapted": [r.text for r in together], "again": [row["reply"] for row in found.rows], "base": found.base_perplexity,
}))
"""
QUESTIONS = [
    "What is 3 + 4?",
    "Ben has 23 pens. He loses 10. He gives 11 to Lina. How many pens does Ben have now?",
    "Work out 12 + 30.",
    "Hi",
]
# A model that brings code along is asked; then the same question again, when its weights are a pickle.
ASKED_TWICE = """
import io, sys
from pathlib import Path
from qlora_nb.cli import main
sys.stdin, sys.stderr = io.StringIO("y\\n"), sys.stdout
for question in (1, 2):
    try:
        main()
    except SystemExit as stop:
        print(f"exit {stop.code}", flush=True)
    if question == 1:
        Path("odd/model.safetensors").rename("odd/pytorch_model.bin")
"""
CODE = """
print('a model brought this along')
from transformers import LlamaConfig
class OddConfig(LlamaConfig):
    model_type = "odd"
"""


def odd_model(place):
    "A model that brings code along, and what asks it."
    from qlora_nb.core import EMBEDDED_MODEL

    shutil.copytree(EMBEDDED_MODEL, place / "odd")
    config = json.loads((place / "odd/config.json").read_text())
    config.update(model_type="odd", auto_map={"AutoConfig": "configuration_odd.OddConfig"})
    (place / "odd/config.json").write_text(json.dumps(config))
    (place / "odd/configuration_odd.py").write_text(CODE)
    return ["chat", "--model", "odd", "--message", "x", "--backend"]


# What a new interpreter with Unsloth costs is paid once: all that is asked of it comes after its training.
IN_TURN = """
import sys, traceback
stdout, stderr, stdin = sys.stdout, sys.stderr, sys.stdin
for name, code, arguments in {steps!r}:
    sys.argv[1:], sys.stdout = arguments, open(name + ".txt", "w")
    try:
        exec(code, {{"__name__": name}})
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    sys.stdout.close()
    sys.stdout, sys.stderr, sys.stdin = stdout, stderr, stdin
"""


def asked_of_unsloth(place):
    "What the interpreter with Unsloth does after its training: each step's stdout goes to a file of its name."
    steps = [
        ("labels", CAPTURE.format(backend="unsloth") + PATCHED, []),
        ("replies", GENERATE, [json.dumps(QUESTIONS), str(place / "adapter")]),
        ("odd", ASKED_TWICE, [*odd_model(place), "unsloth"]),
    ]
    return IN_TURN.format(steps=steps)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Short runs, made when first asked for: (backend, number) -> (folder, stderr)"
    place, made = tmp_path_factory.mktemp("runs"), {}

    def run(backend, number):
        if (backend, number) not in made:
            arguments = ["train", "--backend", backend, "--max-steps", "6", "--limit", "400"]
            arguments += ["--eval-rows", "2", "--max-new-tokens", "16"]
            program = TRAIN.format(arguments=[*arguments, "--output", f"{backend}{number}"])
            if backend == "unsloth" and number == 1:
                program += asked_of_unsloth(place)
            # In another interpreter sets have another order; test_merging.py tries that on each push.
            new = backend == "unsloth" or number == "new"
            made[backend, number] = place / f"{backend}{number}", (python if new else forked)(program, place)
        return made[backend, number]

    return run


@pytest.mark.parametrize(
    "backend, other",
    [
        ("transformers", 2),
        pytest.param("transformers", "new", marks=pytest.mark.heavy),
        pytest.param("unsloth", 2, marks=pytest.mark.heavy),
    ],
)
def test_the_same_command_gives_the_same_bytes(backend, other, runs):
    first, second = runs(backend, 1)[0], runs(backend, other)[0]
    files = sorted(path.name for path in (first / "adapter").iterdir())
    assert "adapter_model.safetensors" in files
    for name in files:
        assert (first / "adapter" / name).read_bytes() == (second / "adapter" / name).read_bytes(), name
    losses = [[json.loads(line)["loss"] for line in open(path / "metrics.jsonl")] for path in (first, second)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_stdout_holds_the_run_folder_alone(backend, runs):
    folder, done = runs(backend, 1)
    assert done.stdout == f"{folder}\n"
    assert json.loads((folder / "summary.json").read_text())["backend"] == backend


def test_unsloth_is_imported_in_time(runs):
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    assert "should be imported before" not in runs("unsloth", 1)[1].stderr
    left = {path.name for path in runs("unsloth", 1)[0].parent.iterdir()}
    assert not any("unsloth_compiled_cache" in name for name in left)


def test_the_backends_agree(runs):
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    pairs = [
        [json.loads(line) for line in open(runs(name, 1)[0] / "metrics.jsonl")] for name in ("transformers", "unsloth")
    ]
    for ours, theirs in zip(*pairs, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_labels_that_we_made_reach_the_model(backend, runs, tmp_path):
    """Token by token, label by label, in a real step; and the adapters that are trained are fp32.

    The batch is taken where the model's own forward gets it, and the ids once more where they are embedded: what a
    trainer, a collator or a patch does before that would show. Where Unsloth was loaded, the other backend is refused.
    """
    if backend == "unsloth":
        said = (runs(backend, 1)[0].parent / "labels.txt").read_text()
        assert "already patched this process" in said
    else:
        said = forked(CAPTURE.format(backend=backend), tmp_path).stdout
    assert "checked 8 {'torch.float32'}" in said


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed")
def test_replies_of_unsloth(runs):
    "The same replies, training goes on, and its adapter is read by the other backend."
    from qlora_nb.adapter import load_adapter
    from qlora_nb.evaluation import measure_perplexity
    from qlora_nb.generation import generate_replies
    from qlora_nb.model import load_model

    place = runs("unsloth", 1)[0].parent
    said = (place / "replies.txt").read_text()
    assert "RESULT " in said, said
    found = json.loads(said.split("RESULT ")[1])
    assert found["kept"], "a layer's mode was changed"
    assert found["moved"] == 4 * 7 * 2, "gradients are missing after an evaluation"
    assert found["adapted"] == found["again"]
    model, tokenizer = load_model("qlora_nb:embedded", backend="transformers")
    assert [r.text for r in generate_replies(model, tokenizer, QUESTIONS, max_new_tokens=8)] == found["plain"]
    model = load_adapter(model, place / "adapter")
    assert [r.text for r in generate_replies(model, tokenizer, QUESTIONS, max_new_tokens=8)] == found["adapted"]
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "The answer is 7."}]}
        for q in QUESTIONS
    ]
    assert measure_perplexity(model, tokenizer, rows) == pytest.approx(found["base"], rel=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_code_and_pickles_that_come_with_a_model_are_not_run(backend, runs, tmp_path):
    if backend == "unsloth":
        said = (runs(backend, 1)[0].parent / "odd.txt").read_text()
    else:
        said = processes.run(ASKED_TWICE, *odd_model(tmp_path), backend, cwd=tmp_path).stdout
    code, pickles = said.split("exit 2\n")[:2]
    assert "a model brought this along" not in said and "Traceback" not in code, said[-2000:]
    assert code.strip() and "holds no .safetensors weights" in pickles, said[-2000:]


@pytest.mark.heavy
def test_the_labels_reach_unsloths_first_step(tmp_path):
    "The same, in a process that has trained nothing before."
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    said = python(CAPTURE.format(backend="unsloth") + PATCHED, tmp_path).stdout
    assert "already patched this process" in said and "checked 8 {'torch.float32'}" in said


ORDER = """
from qlora_nb.core import UserError
import sys, trl
assert "unsloth" not in sys.modules
from qlora_nb.model import load_model
try:
    load_model(backend="unsloth")
except UserError as error:
    print(error)
"""


def test_the_wrong_order_is_a_clear_error(tmp_path):
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    assert "before Unsloth, too late to patch" in forked(ORDER, tmp_path).stdout


def test_a_backend_that_is_not_installed(monkeypatch):
    from qlora_nb import backends
    from qlora_nb.core import UserError

    for name in ("unsloth", *backends._PATCHED):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Unsloth is not installed: pip install"):
        backends.choose_backend("unsloth")
    assert backends.choose_backend("auto")[0] == "transformers"


# --- what `auto` takes ----------------------------------------------------------------------------------------------

LLAMA = {"model_type": "llama"}


@pytest.fixture
def on_a_card(monkeypatch):
    "Fakes a GPU of some capability (None: none), what is installed and what this process has imported."
    import torch

    from qlora_nb import backends

    def fake(capability, installed=True, imported=()):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object() if installed else None)
        for name in ("unsloth", *backends._PATCHED):
            monkeypatch.delitem(sys.modules, name, raising=False)
        for name in imported:
            monkeypatch.setitem(sys.modules, name, sys)

    return fake


@pytest.mark.parametrize(
    "capability, installed, imported, backend, engine, why",
    [
        ((9, 0), True, (), "transformers", True, "measured the fastest"),
        ((9, 0), False, (), "transformers", True, "measured the fastest"),
        ((9, 0), True, ("trl",), "transformers", True, "measured the fastest"),
        ((9, 0), True, ("unsloth",), "unsloth", False, "already in this process"),
        ((10, 0), True, (), "unsloth", False, "not measured on this card; engine=True forces it"),
        ((8, 9), True, (), "unsloth", False, "not measured on this card; engine=True forces it"),
        ((7, 5), True, (), "unsloth", False, "not measured on this card; engine=True forces it"),
        ((8, 0), False, (), "transformers", False, "engine=True forces it; Unsloth is not installed"),
        ((8, 0), True, ("trl",), "transformers", False, "too late to patch"),
        (None, True, (), "transformers", False, "no CUDA GPU"),
    ],
)
def test_auto_takes_what_was_measured(on_a_card, capability, installed, imported, backend, engine, why):
    from qlora_nb.backends import choose_backend

    on_a_card(capability, installed, imported)
    found = choose_backend(model=LLAMA)
    assert (found.backend, found.engine) == (backend, engine) and why in found.why
    assert "\n" not in found.why


def test_auto_leaves_the_engine_out_with_an_older_torch(on_a_card, monkeypatch):
    import torch

    from qlora_nb.backends import choose_backend

    on_a_card((9, 0))
    for version, engine in (("2.6.0+cu124", False), ("2.10.1", False), ("2.11.0", True), ("3.0.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        found = choose_backend(model=LLAMA)
        assert found.engine == engine and (engine or f"torch {version} can't keep rows apart" in found.why)


@pytest.mark.parametrize(
    "config, why",
    [
        ({"model_type": "gemma2"}, "its architecture is gemma2"),
        ({"model_type": "llava", "text_config": LLAMA}, "its architecture is llava"),
        ({"model_type": "mistral"}, "a window of 4096 tokens"),
        ({"model_type": "mistral", "sliding_window": 1024}, "a window of 1024 tokens"),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, "a window of 64 tokens"),
        ({**LLAMA, "attention_dropout": 0.1}, "has dropout 0.1"),
        ("./nowhere", "there is no folder"),
    ],
)
def test_a_model_that_the_engine_does_not_train_goes_to_unsloth(on_a_card, config, why):
    from qlora_nb.backends import choose_backend

    on_a_card((9, 0))
    found = choose_backend(model=config)
    assert (found.backend, found.engine) == ("unsloth", False) and why in found.why
    on_a_card((9, 0), installed=False)
    assert choose_backend(model=config)[:2] == ("transformers", False)


def test_the_configuration_alone_says_what_the_model_does():
    "By the files that transformers writes, and with its defaults: what the engine says of the loaded configuration."
    from transformers import AutoConfig

    from qlora_nb.engine.install import config_refusal
    from qlora_nb.shapes import list_architectures

    for family in list_architectures("engine"):
        config = AutoConfig.for_model(family)
        window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
        assert bool(config_refusal(config.to_dict())) == bool(window), family
        assert bool(config_refusal({"model_type": family})) == bool(window), family


def test_what_is_asked_for_is_kept(on_a_card):
    from qlora_nb.backends import choose_backend
    from qlora_nb.core import UserError

    on_a_card((9, 0))
    assert choose_backend(engine=False, model=LLAMA)[:2] == ("unsloth", False)
    assert choose_backend("unsloth", model=LLAMA)[:2] == ("unsloth", False)
    assert choose_backend(engine=False, model=LLAMA, several=True) == (
        "transformers", False, "the engine was not asked for; several processes train, and Unsloth trains in one"
    )  # fmt: skip
    assert choose_backend("unsloth", model=LLAMA, several=True)[:2] == ("unsloth", False), (
        "what is asked for is refused later"
    )
    assert choose_backend("transformers", model=LLAMA)[:2] == ("transformers", False)
    on_a_card((7, 5))
    assert choose_backend(engine=True, model=LLAMA)[:2] == ("transformers", True)
    on_a_card((9, 0), imported=("unsloth",))
    with pytest.raises(UserError, match="already patched this process"):
        choose_backend(engine=True)


def test_an_adapter_that_is_only_used_needs_no_engine(monkeypatch, tmp_path):
    from qlora_nb import model
    from qlora_nb.core import EMBEDDED_MODEL

    asked = []

    class Chosen(Exception):
        pass

    def choose(backend, engine, *_):
        asked.append(engine)
        raise Chosen

    monkeypatch.setattr(model, "choose_backend", choose)
    for more in ({}, {"adapter": tmp_path}, {"adapter": tmp_path, "engine": True}):
        with pytest.raises(Chosen):
            model.load_model(EMBEDDED_MODEL, **more)
    assert asked == [None, False, True]


def test_a_model_that_the_engine_does_not_train_is_said_once(monkeypatch, capsys):
    from qlora_nb import model
    from qlora_nb.core import EMBEDDED_MODEL

    why = "the engine can't train this model: its architecture is gemma2"
    monkeypatch.setattr(model, "choose_backend", lambda *_: model.BackendChoice("transformers", False, why))
    model.load_model(EMBEDDED_MODEL)
    assert capsys.readouterr().err.splitlines() == [f"backend transformers: {why}"]


def test_an_engine_that_nobody_asked_for_gives_way(monkeypatch, tmp_path, capsys):
    "The run's configuration has what was used, and the run goes on from it."
    import yaml

    from qlora_nb import model
    from qlora_nb.adapter import model_info
    from qlora_nb.core import EMBEDDED_MODEL, UserError
    from qlora_nb.engine.install import engine_of
    from qlora_nb.rows import load_sft_dataset
    from qlora_nb.run import resolve_settings
    from qlora_nb.workflow import train

    def auto(**lora):
        with monkeypatch.context() as m:
            m.setattr(model, "choose_backend", lambda *_: model.BackendChoice("transformers", True, "faked"))
            base, tokenizer = model.load_model(EMBEDDED_MODEL)
        return model.add_lora(base, r=4, **lora), tokenizer

    fast, _ = auto()
    assert engine_of(fast) and model_info(fast)["engine"]
    capsys.readouterr()
    plain, tokenizer = auto(lora_dropout=0.1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("engine: left out, because its adapter has lora_dropout=0.1")
    assert engine_of(plain) is None and model_info(plain)["engine"] is False
    run = train(plain, tokenizer, load_sft_dataset(limit=30), output=tmp_path / "run", eval_rows=0, max_steps=1)
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert (config["backend"], config["engine"]) == ("transformers", False)
    settings = resolve_settings({}, config)
    assert model.choose_backend(settings.backend, settings.engine)[:2] == ("transformers", False)
    with pytest.raises(UserError, match="lora_dropout=0.1"):
        auto(lora_dropout=0.1, use_gradient_checkpointing="selective")
    base, _ = model.load_model(EMBEDDED_MODEL, engine=True)
    with pytest.raises(UserError, match="bias=all"):
        model.add_lora(base, bias="all")


@pytest.mark.heavy
def test_a_torchvision_that_does_not_fit_is_named(tmp_path):
    "transformers imports torchvision wherever it finds one; beside a torch of another build that ends in riddles."
    for name, text in {
        "torchvision/__init__.py": "raise RuntimeError('operator torchvision::nms does not exist')\n",
        "torchvision-0.28.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    code = "from qlora_nb.cli import main; main(['chat', '--backend', 'transformers', '--message', 'hi'])"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 2 and "pip uninstall torchvision" in done.stderr, done.stderr[-2000:]
