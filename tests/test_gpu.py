"""What only a GPU can show: `make test-gpu` runs these, and keeps what ran in nbs/results/gpu_tests.json.

The engine's kernels, CUDA graphs and streams against plain peft; NF4 against bitsandbytes' CUDA kernels; whole runs,
stopped and resumed.
"""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from test_engine import FAMILIES, apart, base_of, gradients, peft_of, rectangle, some_rows

from qlora_nb.engine import install
from qlora_nb.engine.install import Engine, engine_of, install_engine, remove_engine
from qlora_nb.engine.line import join_rows
from qlora_nb.run import RunFolder

pytestmark = pytest.mark.cuda


def on_gpu(batch):
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}


@pytest.fixture
def both():
    "Makes the same model twice on the GPU: as peft has it, and with the engine, which leaves no trace in the process."
    made = []

    def make(family="llama", four_bit=True, engine=None, checkpointing=True, **more):
        plain, ours = (peft_of(family, four_bit, **more).cuda() for _ in range(2))
        if checkpointing:
            ours.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        install_engine(ours, engine or Engine())
        made.append(ours)
        return plain, ours

    yield make
    for model in made:
        remove_engine(model)


def of_16_bits(model, dtype):
    "The model in fp32, with the numbers that it has when they are rounded."
    for weight in model.parameters():
        weight.data = weight.data.to(dtype).float()
    return model


# --- the engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_plain_peft(both, family, four_bit):
    plain, ours = both(family, four_bit)
    on = engine_of(ours)
    assert on.compiled and on.checkpoint, "the kernels are in use"
    assert not on.replayed, "in fp32 attention is one call a row, which can't be recorded"
    for rows in (some_rows()[:2], some_rows(), some_rows()[1:]):
        loss, wanted = gradients(plain, on_gpu(rectangle(rows)))
        found, grads = gradients(ours, on_gpu(join_rows(rows)))
        assert found == pytest.approx(loss, rel=1e-4) and apart(grads, wanted) < 1e-3


PARTS = [
    (Engine(compiled=False), True), (Engine(selective=True), True), (Engine(mlp=False), True),
    (Engine(loss=False), True), (Engine(mlp=False, loss=False), True), (Engine(adapters=False), True),
    (Engine(attention=False), True), (Engine(kernels=False), True), (Engine(checkpoint=False), True),
    (Engine(), False), (Engine(dense=True), False),
]  # fmt: skip


@pytest.mark.parametrize("engine, checkpointing", PARTS, ids=range(len(PARTS)))
def test_parts_with_and_without_them(both, engine, checkpointing):
    plain, ours = both(engine=engine, checkpointing=checkpointing)
    rows = some_rows()
    batch = join_rows(rows) if engine.attention else rectangle(rows)
    loss, wanted = gradients(plain, on_gpu(rectangle(rows)))
    found, grads = gradients(ours, on_gpu(batch))
    assert found == pytest.approx(loss, rel=1e-4) and apart(grads, wanted) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("replayed", [True, False])
def test_16_bits_are_within_the_spread_of_the_plain_path(both, monkeypatch, dtype, replayed):
    "Both against fp32 of the same (rounded) weights; layers that run again are recordings, or run as they are."
    rows = some_rows((40, 90, 60, 70))
    wanted = gradients(of_16_bits(peft_of(four_bit=False), dtype).cuda(), on_gpu(rectangle(rows)))[1]
    monkeypatch.setattr(install, "REPLAY_DEVICES", ("cuda",) if replayed else ())
    plain, ours = both(four_bit=False, dtype=dtype)
    assert engine_of(ours).checkpoint and engine_of(ours).replayed == replayed
    usual = apart(gradients(plain, on_gpu(rectangle(rows)))[1], wanted)
    assert apart(gradients(ours, on_gpu(join_rows(rows)))[1], wanted) < 2 * usual


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_layers_add_up_over_many_batches(both, monkeypatch, family):
    "Longer and shorter lines in turn, gradients added up: as from the same engine without recordings."
    _, ours = both(family, dtype=torch.bfloat16)
    monkeypatch.setattr(install, "REPLAY_DEVICES", ())
    _, again = both(family, dtype=torch.bfloat16)
    assert engine_of(again).checkpoint and not engine_of(again).replayed
    batches = [some_rows((30, 9, 47, 17, 60))[i % 3 : 3 + i % 3] for i in range(12)]
    for rows in batches:
        for model in (ours, again):
            model(**on_gpu(join_rows(rows)), use_cache=False).loss.backward()
    replay = ours.get_base_model().get_decoder().layers[0].qlora_nb.replay
    assert engine_of(ours).replayed and replay.copied and not replay.broken
    wanted, found = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (again, ours))
    assert apart(found, wanted) < 1e-2


# --- 4 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", [64, 128])
def test_nf4_is_that_of_bitsandbytes(blocksize):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from qlora_nb.nf4 import quantize_nf4

    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).cuda()
    packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    ours, on_cpu = quantize_nf4(weight, blocksize, double_quant=False), quantize_nf4(weight.cpu(), blocksize, False)
    assert torch.equal(ours.packed.flatten(), packed.flatten()) and torch.equal(ours.packed.cpu(), on_cpu.packed)
    torch.testing.assert_close(ours.dequantize(), dequantize_4bit(packed, state))


def test_a_4_bit_model_says_on_the_gpu_what_it_says_on_the_cpu():
    model, ids = base_of("llama"), torch.arange(20)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        torch.testing.assert_close(model.cuda()(input_ids=ids.cuda()).logits.cpu(), wanted, rtol=1e-3, atol=1e-3)


# --- whole runs -----------------------------------------------------------------------------------------------------

SHORT = {"max_steps": 12, "eval_rows": 4, "max_new_tokens": 32, "save_steps": 4, "max_seq_length": 256}


def trained(output, engine, data=None, dtype=None, **more):
    from qlora_nb import add_lora, load_model, load_sft_dataset, train

    model, tokenizer = load_model("qlora_nb:embedded", backend="transformers", engine=engine, dtype=dtype)
    return train(add_lora(model), tokenizer, data or load_sft_dataset(), output=output, **{**SHORT, **more})


def resume(path, engine, dtype=None):
    from qlora_nb import add_lora, load_model, load_sft_dataset, train

    model, tokenizer = load_model("qlora_nb:embedded", backend="transformers", engine=engine, dtype=dtype)
    return train(add_lora(model), tokenizer, load_sft_dataset(), resume=path)


def losses(run):
    return [row["loss"] for row in run.metrics]


def test_a_run_learns_the_same_with_the_engine(tmp_path):
    plain, ours = (trained(tmp_path / str(on), on, eval_rows=0) for on in (False, True))
    assert losses(ours)[:8] == pytest.approx(losses(plain)[:8], rel=0.02)
    assert losses(ours) == pytest.approx(losses(plain), rel=0.05)  # in 16 bits small differences grow
    assert all(row["peak_allocated"] for row in ours.metrics)


@pytest.mark.parametrize("engine", [True, False])
def test_fp16_learns_what_bf16_does(tmp_path, engine):
    "As on a T4: the loss is scaled, and a step whose gradients overflow is left out, as its row says."
    half, usual = (trained(tmp_path / kind, engine, eval_rows=0, dtype=kind) for kind in ("float16", "bfloat16"))
    assert half.model.dtype == torch.float16 and RunFolder(half.path).config["trained_by"] == (
        "own" if engine else "trl"
    )
    left_out = [row["step"] for row in half.metrics if row["grad_norm"] is None]
    assert left_out == list(range(1, 1 + len(left_out))) and len(left_out) < 6, "the first ones alone"
    taken = [row["grad_norm"] for row in half.metrics[len(left_out) :]]
    assert all(0 < norm < 100 for norm in taken), "of gradients without the scale"
    found, wanted = losses(half)[len(left_out) :], losses(usual)[: 12 - len(left_out)]
    assert found[:8] == pytest.approx(wanted[:8], rel=0.02)
    assert found == pytest.approx(wanted, rel=0.05)  # in 16 bits small differences grow


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("engine", [True, False])
def test_a_resumed_run_is_the_whole_one(tmp_path, engine, dtype):
    whole = trained(tmp_path / "run", engine, dtype=dtype)
    path = whole.path / "adapter/adapter_model.safetensors"
    wanted = path.read_bytes()
    (whole.path / "summary.json").unlink()
    shutil.rmtree(max((whole.path / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])))
    shutil.rmtree(whole.path / "adapter")
    resume(whole.path, engine, dtype)
    assert path.read_bytes() == wanted


@pytest.mark.parametrize("engine", [True, False])
def test_looking_on_the_way_changes_nothing(tmp_path, engine):
    "Evaluations, replies to a prompt and the best adapter's file, late log and all: the same losses, the same bytes."
    whole = trained(tmp_path / "whole", engine)
    looks = {"eval_steps": 3, "early_stopping": 9, "load_best_model_at_end": False, "sample_prompts": 1}
    looked = trained(tmp_path / "looked", engine, **looks)
    assert RunFolder(looked.path).config["trained_by"] == ("own" if engine else "trl")
    held = {row["step"]: row["eval_loss"] for row in looked.metrics if row.get("eval_loss") is not None}
    assert list(held) == [3, 6, 9, 12] and held[12] < held[3]
    assert losses(looked) == losses(whole)
    assert looked.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert [row["step"] for row in looked.metrics] == list(range(1, 13))


def test_a_run_that_no_longer_improves_is_stopped_and_takes_its_best(tmp_path):
    run = trained(tmp_path / "run", True, eval_steps=1, early_stopping=1, learning_rate=0.5, warmup_steps=0)
    held = [row["eval_loss"] for row in run.metrics if row.get("eval_loss") is not None]
    assert len(run.metrics) < 12 and run.summary["best_eval_loss"] == min(held)
    assert run.summary["adapter_step"] == 1 + held.index(min(held))


def test_trls_trainer_learns_the_same_with_the_engine(tmp_path):
    "By its public methods alone: adapters one by one, logged at once."
    ours, theirs = (trained(tmp_path / loop, True, eval_rows=0, loop=loop) for loop in ("own", "trl"))
    assert losses(theirs)[:8] == pytest.approx(losses(ours)[:8], rel=0.02)
    assert losses(theirs) == pytest.approx(losses(ours), rel=0.05)


def test_the_run_of_the_package_answers_as_on_a_cpu(tmp_path):
    from qlora_nb.evaluation import evaluate
    from qlora_nb.model import open_run
    from qlora_nb.rows import load_sft_dataset
    from qlora_nb.run import copy_embedded_run

    path = copy_embedded_run(tmp_path)
    model, tokenizer = open_run(path)
    assert next(model.parameters()).is_cuda
    found = evaluate(model, tokenizer, load_sft_dataset(split="heldout", limit=100), max_new_tokens=112)
    stored = [json.loads(line) for line in open(path / "evaluation.jsonl")]
    right = [row["exact"] for row in stored if row["stage"] == "after"][:100]
    assert abs(found.exact - sum(right) / 100) <= 0.05 and found.stops >= 0.98


UNSLOTH = """
import json, sys
from qlora_nb import add_lora, load_model, load_sft_dataset, train
model, tokenizer = load_model("qlora_nb:embedded", backend="unsloth", max_seq_length=256)
run = train(add_lora(model), tokenizer, load_sft_dataset(), output="run", max_steps=8, eval_rows=0, max_seq_length=256)
print("RESULT", json.dumps([row["loss"] for row in run.metrics]))
"""


def test_unsloth_learns_the_same(tmp_path):
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    done = subprocess.run([sys.executable, "-c", UNSLOTH], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = json.loads(done.stdout.split("RESULT ")[1])
    plain = trained(tmp_path / "plain", False, eval_rows=0, max_steps=8)
    assert theirs == pytest.approx(losses(plain), rel=0.02)
