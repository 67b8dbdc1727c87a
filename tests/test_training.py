"""`train`: plans followed, memory foretold, rows that are too long, and the tripwire."""

import contextlib
import io
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
import yaml

from qlora_nb import loop, preparation, trainer, watching
from qlora_nb.adapter import load_adapter, model_info
from qlora_nb.cards import Card
from qlora_nb.core import EMBEDDED_MODEL, PROFILES, UserError, file_sha256
from qlora_nb.engine.install import engine_of, install_engine
from qlora_nb.evidence import find_held_out, read_held_out
from qlora_nb.loop import make_loop
from qlora_nb.memory import CUDA_CONTEXT, estimate_memory
from qlora_nb.model import add_lora, load_model
from qlora_nb.plan import plan_training
from qlora_nb.preflight import encode_dataset
from qlora_nb.preparation import (
    estimate_run_memory,
    get_checkpointing,
    load_base_task,
    make_plan,
    set_checkpointing,
    warn_of_memory,
)
from qlora_nb.rows import load_sft_dataset
from qlora_nb.run import RunFolder, read_config, resolve_settings
from qlora_nb.safeguards import (
    TrainingDiverged,
    Tripwire,
    find_damage,
    last_checkpoint,
    likely_cause,
    tidy_checkpoints,
)
from qlora_nb.shapes import model_shape
from qlora_nb.signals import TrainingInterrupted
from qlora_nb.trainer import make_trainer
from qlora_nb.training import make_stop_watch, make_watch, run_trainer
from qlora_nb.watching import make_evaluation_watch, watch_held_out
from qlora_nb.workflow import load_run, train

TINY = PROFILES["tiny"]
SHORT = {"eval_rows": 0, "max_steps": 2, "warmup_steps": 1}


def lengths_of(data, tokenizer):
    return preparation.count_row_tokens(encode_dataset(data, tokenizer, 2048)[0])


def fresh(**more):
    model, tokenizer = load_model(TINY.model, max_seq_length=256, backend="transformers", **more)
    return add_lora(model, r=8), tokenizer


@pytest.fixture(scope="module")
def data():
    return load_sft_dataset(limit=120)


@pytest.fixture(scope="module")
def adapted():
    "A model for what changes nothing of it."
    return fresh()


def tight(mib):
    "A card with so many MiB beside the context."
    return Card(f"{mib} MiB", CUDA_CONTEXT + mib * 2**20)


# --- plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_is_followed_and_written_down(data, tmp_path, capsys):
    model, tokenizer = fresh()
    run = train(model, tokenizer, data, output=tmp_path / "run", plan=tight(80), **SHORT)
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("plan")]
    assert len(said) == 2 and said[0].startswith(f"plan for 80 MiB: {config['plan']['choice']}")
    batch, steps = config["per_device_train_batch_size"], config["gradient_accumulation_steps"]
    assert f"{batch} x {steps}" in config["plan"]["choice"] and batch * steps == 8 and batch < 8
    assert config["optim"] == "adamw_8bit" and config["packing"] is False
    assert (
        ("no checkpointing" in config["plan"]["choice"])
        != get_checkpointing(model)
        == config["use_gradient_checkpointing"]
    )
    assert run.summary["plan"] == {**config["plan"], "measured": None}
    assert run.summary["plan"]["predicted"]["total_bytes"] <= 0.94 * tight(80).bytes
    assert "Planned for 80 MiB" in run.report() and "not measured" in run.report()


@pytest.mark.parametrize("plan", [None, "L4"])
def test_a_row_is_rendered_and_tokenized_once(plan, data, tmp_path, monkeypatch):
    "With the check and a plan: each of the rows that are trained on, and no other."
    from qlora_nb.template import Encoder

    seen, encode = [], Encoder.encode

    def counted(self, rows, *arguments):
        seen.extend(json.dumps(row) for row in rows)
        return encode(self, rows, *arguments)

    monkeypatch.setattr(Encoder, "encode", counted)
    run = train(*fresh(), data, output=tmp_path / "run", plan=plan, **SHORT)
    assert sorted(seen) == sorted(json.dumps(messages) for messages in data["messages"])
    assert read_config(run.path / "config.yaml")["rows_read"]["rows"] == len(data)


def test_rows_that_a_plan_drops_are_those_of_a_shorter_limit(data, adapted):
    "Without rendering them again, and the report says so."
    tokenizer = adapted[1]
    settings = resolve_settings({"max_seq_length": 130})
    rows = preparation.prepare_rows(data, tokenizer, settings, None, check=True)
    limit = sorted(preparation.count_row_tokens(rows.rows))[len(rows.rows) // 2]
    kept = rows.keep_within(limit)
    wanted = encode_dataset(data, tokenizer, limit)
    assert (kept.rows.to_list(), kept.dropped) == (wanted[0].to_list(), wanted[1]) and rows.dropped and kept.dropped
    (finding,) = [f for f in kept.report.findings if f.code == "row_dropped" and "the plan chose" in f.cause]
    assert finding.count == len(kept.dropped) - len(rows.dropped) and kept.report.summary["max_seq_length"] == limit
    assert kept.report.summary["usable"] == len(kept.rows) and kept.report.long_rows == kept.dropped
    with pytest.raises(UserError, match="no row fits max_seq_length=3: the shortest has"):
        kept.keep_within(3)


def test_the_rows_of_one_conversation_stay_together_in_every_count():
    "A conversation may become several rows of tokens: what is held out, dropped or too long is counted by row."
    from datasets import Dataset

    from qlora_nb.preparation import TrainingRows

    lengths = {0: [4], 1: [3, 9], 3: [9, 9], 4: [5]}  # row of the data: lengths of its encoded rows; 2 was invalid
    numbers = [number for number, sizes in lengths.items() for _ in sizes]
    ids = [[number] * size for number, sizes in lengths.items() for size in sizes]
    encoded = Dataset.from_dict({"input_ids": ids, "labels": ids})
    rows = TrainingRows(None, encoded, [2], 5, numbers=numbers, left_out={"invalid": 1})
    found = rows.summary()
    assert (found["rows"], found["conversations"], found["left_out"], found["invalid"]) == (6, 4, 0, 1)
    held = rows.without([1])
    assert (held.numbers, held.dropped, held.total, held.rows["input_ids"][1][0]) == ([0, 3, 3, 4], [2], 4, 3)
    short = rows.keep_within(5)
    assert (short.numbers, short.dropped, short.too_long) == ([0, 1, 4], [2, 3], 1)  # 1 has lost a part, 3 is gone
    assert short.rows["input_ids"] == [[0] * 4, [1] * 3, [4] * 5] and "conversations" not in short.summary()


def test_the_replies_that_are_learned_are_those_of_the_setting(adapted):
    from datasets import Dataset

    from qlora_nb.run import Settings

    tokenizer = adapted[1]
    talk = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "Four."},
    ]
    data = Dataset.from_dict({"messages": [talk]})
    for check in (True, False):
        for train_on, wanted in [("all", "Two.<|eot_id|>Four.<|eot_id|>"), ("last", "Four.<|eot_id|>")]:
            rows = preparation.prepare_rows(data, tokenizer, Settings(train_on=train_on), None, check)
            learned = [label for label in rows.rows["labels"][0] if label != -100]
            assert tokenizer.decode(learned) == wanted and rows.summary()["learned_tokens"] == len(learned)


def test_held_out_rows_are_asked_with_their_tools(adapted, monkeypatch):
    from qlora_nb import evaluation

    model, tokenizer = adapted
    tool = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}
    talk = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No."}]
    asked, generate = [], evaluation.generate_replies

    def noted(*arguments, tools=None, **how):
        asked.append((tools, how["template_kwargs"]))
        return generate(*arguments, tools=tools, **how)

    monkeypatch.setattr(evaluation, "generate_replies", noted)
    offer = "{% if tools %}{{ tools | tojson }}{% endif %}"
    rows = [{"messages": talk, "tools": [tool]}, {"messages": talk, "tools": None}]
    how = {"template": offer + tokenizer.chat_template, "template_kwargs": {"terse": True}, "max_new_tokens": 2}
    found = evaluation.evaluate(model, tokenizer, rows, **how)
    assert asked == [([[tool], None], {"terse": True})]
    assert found.rows[0]["tokens"] == found.rows[1]["tokens"] and found.rows[0]["loss"] != found.rows[1]["loss"]


def test_arguments_win_over_the_plan_and_the_file_over_it_too(data, adapted):
    model, tokenizer = adapted
    settings = resolve_settings({}, profile=TINY)
    for fixed, batch, steps in [
        ({"per_device_train_batch_size": 2}, 2, 4),
        ({"gradient_accumulation_steps": 4}, 2, 4),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, 3, 5),
        ({}, 8, 1),
    ]:
        c = make_plan(model, lengths_of(data, tokenizer), "L4", settings, fixed).choice
        assert (c.batch, c.accumulation, c.method, c.packing) == (batch, steps, "qlora", False)
    c = make_plan(
        model, lengths_of(data, tokenizer), "L4", settings, {"max_seq_length": 200, "optim": "adamw_torch"}
    ).choice
    assert (c.seq_length, c.optimizer) == (200, "adamw_torch")
    assert (
        resolve_settings(
            {"optim": "sgd"}, {"packing": True}, profile=TINY, plan={"optim": "x", "packing": False}
        ).packing
        is True
    )


def test_the_rank_is_that_of_the_model_and_the_rows_are_those_of_the_data(data, adapted):
    model, tokenizer = adapted
    plan = make_plan(model, lengths_of(data, tokenizer), "L4", resolve_settings({}, profile=TINY), {})
    assert plan.r == 8 and plan.shape == model_shape("qlora_nb:embedded") and len(plan.rows.lengths) == len(data)
    assert plan.choice.seq_length <= model_info(model)["max_seq_length"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card to plan for")
def test_auto_without_a_gpu_says_so_and_goes_on(data, tmp_path, capsys):
    model, tokenizer = fresh()
    run = train(model, tokenizer, data, output=tmp_path / "run", plan="auto", **SHORT)
    assert "there is no GPU here to plan for, so the profile decides" in capsys.readouterr().err
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config["per_device_train_batch_size"] == TINY.per_device_train_batch_size and "plan" not in config
    assert "plan" not in run.summary


def test_plans_that_do_not_suit_the_model(data, adapted, tmp_path):
    model, tokenizer = adapted
    ours = {"data": [200] * 50, "backend": "transformers", "r": 8}
    for plan, message in [
        (
            plan_training("qlora_nb:embedded", "T4", method="lora", **ours),
            "the plan is for method lora, but the model has qlora",
        ),
        (
            plan_training("qlora_nb:embedded", "T4", method="qlora", **{**ours, "r": 4}),
            "the plan is for r 4, but the model has 8",
        ),
        (
            plan_training("qlora_nb:embedded", "T4", method="qlora", **{**ours, "backend": "unsloth"}),
            "for backend unsloth",
        ),
        (
            plan_training({**model.config.to_dict(), "vocab_size": 800}, "T4", method="qlora", **ours),
            "a model of another shape",
        ),
        (plan_training("qlora_nb:embedded", tight(1), method="qlora", **ours), "nothing fits 1 MiB"),
        (tight(1), "nothing fits 1 MiB"),
        ("T5", "there is no card 'T5'"),
        ([1], "there is no card"),
    ]:
        with pytest.raises(UserError, match=message) as refused:
            train(model, tokenizer, data, output=tmp_path / "run", plan=plan, **SHORT)
        assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_a_plan_made_beforehand_is_taken(data, tmp_path):
    plan = plan_training("qlora_nb:embedded", tight(110), [200] * 50, method="qlora", backend="transformers", r=8)
    model, tokenizer = fresh()
    run = train(model, tokenizer, data, output=tmp_path / "run", plan=plan, max_seq_length=256, **SHORT)
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config["per_device_train_batch_size"] == plan.choice.batch and config["plan"]["choice"] == str(plan.choice)


def test_a_planned_run_goes_on_as_it_was_planned(data, tmp_path):
    def go(output=None, **more):
        model, tokenizer = fresh()
        return train(model, tokenizer, data, output=output, **more)

    whole = go(tmp_path / "run", plan=tight(80), eval_rows=0, max_steps=4, warmup_steps=1, save_steps=2)
    (whole.path / "summary.json").unlink()
    again = go(resume=whole.path)
    assert again.summary["plan"] == whole.summary["plan"]
    assert again.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    (whole.path / "summary.json").unlink()
    with pytest.raises(UserError, match="a resumed run keeps its settings"):
        go(resume=whole.path, plan="auto")


@pytest.mark.parametrize("mib, wanted", [(85, None), (400, False), (400, "selective"), (400, True)])
def test_a_plan_for_the_engine_is_followed(data, tmp_path, mib, wanted):
    model, tokenizer = load_model("qlora_nb:embedded", engine=True)
    model = add_lora(model, r=8)
    card = tight(mib)
    plan = card if wanted is None else plan_training(
        "qlora_nb:embedded", card, data, tokenizer=tokenizer, r=8, method="qlora", backend="engine",
        gradient_checkpointing=wanted)  # fmt: skip
    run = train(model, tokenizer, data, output=tmp_path / "run", plan=plan, max_steps=2, eval_rows=0)
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    kind, said = get_checkpointing(model), config["plan"]["choice"]
    assert config["engine"] is True and config["use_gradient_checkpointing"] == kind
    assert kind == wanted if wanted is not None else kind is not False
    words = {True: " checkpointing", "selective": "selective checkpointing", False: "no checkpointing"}
    assert words[kind] in said and engine_of(model).selective == (kind == "selective")
    assert config["plan"]["predicted"]["total_bytes"] <= 0.94 * card.bytes


def test_plans_of_the_engine_and_of_plain_transformers_are_not_mixed_up(data, adapted, tmp_path):
    plan = plan_training("qlora_nb:embedded", "T4", [200] * 50, method="qlora", backend="engine", r=8)
    with pytest.raises(UserError, match="the plan is for backend engine, but the model has transformers"):
        train(*adapted, data, output=tmp_path / "run", plan=plan, **SHORT)
    with pytest.raises(UserError, match="load the model with engine=True"):
        set_checkpointing(adapted[0], "selective")


def test_the_engines_memory_is_foretold():
    model = add_lora(load_model("qlora_nb:embedded", engine=True)[0], r=8, use_gradient_checkpointing="selective")
    settings = resolve_settings({"optim": "adamw_8bit"}, profile=TINY)
    expected = estimate_run_memory(model, settings, [200, 100, 50] * 10, tight(500))
    assert expected.settings["backend"] == "engine" and expected.settings["gradient_checkpointing"] == "selective"
    assert expected.settings["seq_length"] == 200 and not expected.settings["padded"]
    install_engine(model, replace(engine_of(model), dense=True))
    assert estimate_run_memory(model, settings, [200], tight(500)) is None


SWITCH = """
import sys, torch
from qlora_nb.adapter import model_info
from qlora_nb.model import add_lora, load_model
from qlora_nb.preparation import get_checkpointing, set_checkpointing
model, _ = load_model("qlora_nb:embedded", backend=sys.argv[1])
model = add_lora(model, use_gradient_checkpointing=False).train()
own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
def kept():
    seen = {}
    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t
        return t
    ids = torch.arange(10, 138)[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return sum(t.untyped_storage().nbytes() for t in seen.values()), loss.item()
kept()
first = kept()
found = []
for on in (True, False):
    set_checkpointing(model, on)
    assert get_checkpointing(model) == on == bool(model_info(model)["use_gradient_checkpointing"])
    found.append(kept())
print(first, *found)
assert found[1][0] == first[0], "switched off, it is what it was"
assert found[0][0] < first[0] / 4, "switched on, much less is kept"
assert abs(found[0][1] - first[1]) < 1e-5
"""


@pytest.mark.parametrize("backend", ["transformers", pytest.param("unsloth", marks=pytest.mark.heavy)])
def test_checkpointing_is_switched_on_and_off(backend, tmp_path):
    if backend == "unsloth":
        done = subprocess.run([sys.executable, "-c", SWITCH, backend], capture_output=True, text=True, timeout=300)
    else:
        done = processes.run(SWITCH, backend, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


# --- memory foretold ------------------------------------------------------------------------------------------------


def test_a_warning_where_the_card_is_too_small(adapted):
    model, _ = adapted
    settings = resolve_settings({"optim": "adamw_8bit"}, profile=TINY)
    expected = estimate_run_memory(model, settings, [200, 100, 50] * 10, tight(500))
    same = estimate_memory("qlora_nb:embedded", r=8, batch_size=8, seq_length=200, gradient_checkpointing=False,
                           padded=True,
                           backend="transformers", card=tight(500).bytes, hopper=False, max_seq_length=256)  # fmt: skip
    assert expected.by_component == same.by_component
    assert warn_of_memory(expected, tight(500)) is None
    said = warn_of_memory(expected, tight(1))
    assert re.search(r"should need \d+ MiB at its fullest, and 1 MiB has 768 MiB for it: use --plan auto", said), said
    assert warn_of_memory(None, tight(1)) is None
    assert estimate_run_memory(model, resolve_settings({"optim": "adafactor"}, profile=TINY), [200], tight(500)) is None


def test_several_processes_are_planned_and_foretold(data, adapted):
    "What is planned and expected is one process's share."
    model, tokenizer = adapted
    settings = resolve_settings({"optim": "adamw_8bit", "gpus": 2}, profile=TINY)
    plan = make_plan(model, lengths_of(data, tokenizer), "L4", settings, {})
    s, c = plan.choice.estimate.settings, plan.choice
    assert (plan.gpus, plan.shard, plan.settings["train"]["gpus"]) == (2, False, 2)
    assert (s["batch_size"], 2 * s["accumulation"]) == (c.batch, c.accumulation) and c.batch * c.accumulation == 8
    alone = resolve_settings({"optim": "adamw_8bit"}, profile=TINY)
    one, two, half = (
        estimate_run_memory(model, replace(given, **change), [200, 100, 50] * 10, tight(500))
        for given, change in ((alone, {}), (settings, {}), (alone, {"per_device_train_batch_size": 4}))
    )
    batches = [found.settings["batch_size"] for found in (one, two, half)]
    assert batches == [8, 4, 4] and two.settings["seq_length"] == 200
    assert one.total_bytes > two.total_bytes and two.by_component == half.by_component


# --- rows that are too long -----------------------------------------------------------------------------------------


def long_rows():
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Add. " * n + f"What is {n} + 1?"},
                {"role": "assistant", "content": f"It is {n + 1}."},
            ]
        }
        for n in [*range(1, 31), 120, 130]
    ]
    from datasets import Dataset

    return Dataset.from_list(
        [*rows, {"messages": [{"role": "user", "content": "Tell."}, {"role": "assistant", "content": "so " * 400}]}]
    )


@pytest.mark.parametrize(
    "truncation, said",
    [
        ("drop", ["3 of 33 rows are longer than 256 tokens and were left out"]),
        ("cut_prompt", ["2 of 33 rows are longer than 256 tokens: their prompts were cut",
                        "1 of 33 rows are longer than 256 tokens and were left out"]),
    ],
)  # fmt: skip
def test_rows_that_are_too_long_are_counted_and_said(truncation, said, tmp_path, capsys):
    model, tokenizer = fresh()
    run = train(model, tokenizer, long_rows(), output=tmp_path / "run", truncation=truncation, **SHORT)
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if "rows are longer" in line and not line.startswith("warning")] == said
    assert yaml.safe_load((run.path / "config.yaml").read_text())["truncation"] == truncation


def test_an_unknown_truncation(adapted, data, tmp_path):
    with pytest.raises(UserError, match="truncation is 'left': choose drop or cut_prompt"):
        train(*adapted, data, output=tmp_path / "run", truncation="left", **SHORT)


# --- the tripwire ---------------------------------------------------------------------------------------------------


def test_a_learning_rate_of_ten_thousand_is_stopped(data, tmp_path):
    model, tokenizer = fresh()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(TrainingDiverged, match="lower the learning rate") as stopped:
        train(
            model,
            tokenizer,
            data,
            output=tmp_path / "run",
            eval_rows=0,
            max_steps=40,
            learning_rate=1e4,
            warmup_steps=5,
            save_steps=1,
        )
    assert "\n" not in str(stopped.value) and stopped.value.exit_code == 2
    found = json.loads((tmp_path / "run/stopped.json").read_text())
    assert found["loss"] == "nan" and found["step"] <= 20 and found["last_good"] is not None
    assert not (tmp_path / "run/summary.json").exists() and not (tmp_path / "run/adapter").exists()
    kept = tmp_path / f"run/adapter-step-{found['last_good']}"
    steps = [int(p.name.split("-")[1]) for p in (tmp_path / "run/checkpoints").glob("checkpoint-*")]
    assert all(step <= found["last_good"] for step in steps)
    again, _ = load_model(adapter=kept, backend="transformers", max_seq_length=256)
    saved = dict(again.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.isfinite().all() and torch.equal(saved[name].float(), p.data) and name in start
    metrics = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    assert len(metrics) == found["step"] - 1 and all(math.isfinite(m["loss"]) for m in metrics)


class Silent:
    "Shows nothing."

    def start(self, *args): ...

    def step(self, *args): ...

    def say(self, *args, **kwargs): ...

    def stop(self): ...


def rows_with(labels):
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": list(range(10, 40)), "labels": labels}] * 40)


def test_rows_whose_labels_are_all_masked(tmp_path):
    model, tokenizer = fresh()
    with pytest.raises(UserError, match="no row has a token with a label"):
        make_trainer(model, tokenizer, rows_with([-100] * 30), resolve_settings(SHORT, profile=TINY), tmp_path, [])


def test_batches_without_a_target_are_stopped_and_named(tmp_path):
    "The one label stands where nothing is predicted: at the first token. The mean over no tokens is NaN."
    model, tokenizer = fresh()
    watch, settings = (
        make_watch(RunFolder(tmp_path), Silent()),
        resolve_settings({**SHORT, "max_steps": 9}, profile=TINY),
    )
    rows = rows_with([10] + [-100] * 29)
    watch.trainer = trainer = make_trainer(model, tokenizer, rows, settings, tmp_path / "checkpoints", [watch])
    with pytest.raises(TrainingDiverged, match="at step 1, where the loss is nan: no token of its rows has a label"):
        trainer.train()
    found = json.loads((tmp_path / "stopped.json").read_text())
    assert (found["loss"], found["last_good"]) == ("nan", None)


def wire(fp16=False):
    layer = torch.nn.Linear(2, 2)
    return layer, Tripwire(layer, fp16)


def test_the_wire_stops_at_what_it_says_and_at_nothing_else():
    nan, inf = math.nan, math.inf
    for losses, norms, fp16, stops in [
        ([1.0, 0.9, nan], [1, 1, 1], False, 3),
        ([1.0, inf], [1, 1], False, 2),
        ([1.0, 0.9], [1, nan], False, 2),
        ([1.0] * 24, [inf] * 24, True, None),
        ([1.0] * 26, [inf] * 26, True, 26),
        ([1.0] * 40, [*[inf] * 20, 1, *[inf] * 19], True, None),
        ([0.0, 0.0, 0.0], [1, 1, 1], False, 3),
        ([0.0, 0.0, 0.1, 0.0, 0.0, 0.0], [1] * 6, False, None),
        ([0.5, 0.0, 0.0, 0.0], [1] * 4, False, None),
        ([3.0, 40.0, 2.0], [1, 900, None], False, None),
    ]:
        _, watch = wire(fp16)
        found = next((i for i, (loss, norm) in enumerate(zip(losses, norms), 1) if watch.wrong(i, loss, norm)), None)
        assert found == stops, (losses, found)


def test_only_what_the_next_loss_has_proved_is_kept():
    layer, watch = wire()
    for step, loss in enumerate([3.0, 2.9, 2.8, 9.0, 6.0], 1):
        with torch.no_grad():
            layer.weight.fill_(step)  # what the update of this step made
        assert not watch.wrong(step, loss, 1.0)
    assert watch.wrong(6, math.nan, 1.0)
    assert watch.put_back() == 2, "step 3's weights gave the loss of 9"
    assert layer.weight.eq(2).all()
    _, watch = wire()
    assert watch.wrong(1, math.nan, 1.0) and watch.put_back() is None


def test_copies_are_few_after_the_first_steps():
    _, watch = wire()
    taken = set()
    for step in range(1, 61):
        watch.wrong(step, 1.0, 1.0)
        taken.add(watch.newest[0])
    assert taken == {*range(1, 11), 20, 30, 40, 50, 60}


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((0, math.nan, 1e-3, True, False), "no token of its rows has a label"),
        ((9, 0.0, 1e-3, True, False), "nothing to learn"),
        ((9, math.nan, 1e-3, False, False), "base model's weights are damaged or overflow"),
        ((9, math.nan, 1e-3, True, False), "lower the learning rate .it was 0.001"),
        ((9, math.inf, 1e-3, True, True), "fp16 overflowed"),
    ],
)
def test_causes(arguments, said):
    assert re.search(said, likely_cause(*arguments))


def test_a_gpu_that_is_full_is_one_sentence(data, tmp_path):
    "The exception is torch's own; only where it comes from is played."
    model, tokenizer = fresh()

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    model.get_base_model().model.layers[0].register_forward_hook(full)
    with pytest.raises(UserError, match="ran out of memory at step 1: use plan='auto', a smaller batch") as refused:
        with contextlib.redirect_stderr(io.StringIO()):
            train(model, tokenizer, data, output=tmp_path / "run", **SHORT)
    assert "\n" not in str(refused.value)


def test_set_checkpointing_is_noted(adapted):
    model, _ = adapted
    before = get_checkpointing(model)
    set_checkpointing(model, True)
    assert model_info(model)["use_gradient_checkpointing"] is True
    set_checkpointing(model, before)


# --- logged a step late ---------------------------------------------------------------------------------------------


class Seen:
    "A run of the embedded model with the engine, four steps an epoch: what was written by when, the weights by step."

    def __init__(self, data, path, monkeypatch, late, act=lambda *_: None, resume=None, **settings):
        from transformers import TrainerCallback

        monkeypatch.setattr(loop, "LATE_LOGGING_DEVICES", ("cpu",) if late else ())
        model, tokenizer = load_model(TINY.model, max_seq_length=256, engine=True)
        settings = resolve_settings(
            {**SHORT, "max_steps": 7, "per_device_train_batch_size": 2, **settings}, profile=TINY
        )
        rows, interrupted = encode_dataset(data.select(range(8)), tokenizer, 256, None)[0], []
        self.path, self.written, self.weights, self.error = path, {}, {}, None
        path.mkdir(exist_ok=True)
        self.watch = make_watch(RunFolder(path), Silent())

        class Step(TrainerCallback):
            def on_step_end(_, args, state, control, **kwargs):
                self.weights[state.global_step] = {
                    n: p.detach().clone() for n, p in trainer.trainable_parameters(self.watch.trainer.model).items()
                }
                self.written[state.global_step] = [m["step"] for m in self.watch.metrics]
                act(state.global_step, self.watch, interrupted)

        model = add_lora(model, r=8)
        held = watch_held_out(model, tokenizer, data.select(range(8, 11)), settings)
        looks = [make_evaluation_watch(RunFolder(path), self.watch, Silent(), held)] if held else []
        self.trainer = make_loop(
            model,
            tokenizer,
            rows,
            settings,
            path / "checkpoints",
            [Step(), self.watch, make_stop_watch(interrupted), *looks],
            held and held.measure,
        )
        try:
            run_trainer(self.trainer, self.watch, Silent(), RunFolder(path), interrupted, resume)
        except (TrainingDiverged, TrainingInterrupted, KeyboardInterrupt) as error:
            self.error = error

    def rows(self):
        rows = [json.loads(line) for line in open(self.path / "metrics.jsonl")]
        return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_allocated")} for row in rows]

    def history(self):
        timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
        return [{k: v for k, v in row.items() if k not in timed} for row in self.trainer.state.log_history]


@pytest.fixture
def both(data, tmp_path, monkeypatch):
    "The same run at once and a step late."
    return lambda **more: [Seen(data, tmp_path / str(late), monkeypatch, late, **more) for late in (False, True)]


@pytest.mark.parametrize(
    "settings, late_at_4",
    [
        ({}, [1, 2]),
        ({"logging_steps": 3, "gradient_accumulation_steps": 2}, []),
        ({"save_steps": 3}, [1, 2, 3]),
        pytest.param({"eval_steps": 3}, [1, 2, 3], marks=pytest.mark.heavy),
    ],
)
def test_rows_logged_late_are_the_same(both, settings, late_at_4):
    now, late = both(**settings)
    assert late.rows() == now.rows() and late.history() == now.history() and now.rows()
    every, last = settings.get("logging_steps", 1), now.trainer.state.global_step
    assert [row["step"] for row in late.rows()] == [*range(every, last, every), last]
    assert now.written[4] == [step for step in (1, 2, 3) if step % every == 0] and late.written[4] == late_at_4
    held = {row["step"]: row["eval_loss"] for row in late.rows() if "eval_loss" in row}
    assert list(held) == ([3, 6, 7] if "eval_steps" in settings else [])
    speeds = [m["tokens_per_second"] for m in late.watch.metrics]
    assert max(speeds) < 50 * min(speeds), "two rows that are written together have times of their own"


def test_a_late_run_that_was_stopped_goes_on(data, tmp_path, monkeypatch):
    def stop(step, watch, interrupted):
        if step == 5:
            interrupted.append(signal.SIGINT)

    whole = Seen(data, tmp_path / "whole", monkeypatch, False)
    run = Seen(data, tmp_path / "late", monkeypatch, True, stop, save_steps=2)
    assert isinstance(run.error, TrainingInterrupted) and [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5]
    for checkpoint in run.path.glob("checkpoints/checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert [row["step"] for row in state["log_history"]] == [1, 2, 3, 4, 5][: state["global_step"]]
    again = Seen(data, run.path, monkeypatch, True, resume=run.path / "checkpoints/checkpoint-4")
    assert again.rows() == whole.rows() and again.written[6] == [1, 2, 3, 4]
    assert all(torch.equal(again.weights[7][name], weight) for name, weight in whole.weights[7].items())


def test_nothing_is_lost_where_a_late_run_is_broken_off(both):
    def stop(step, *_):
        if step == 4:
            raise KeyboardInterrupt

    now, late = both(act=stop)
    assert isinstance(late.error, KeyboardInterrupt) and late.written[4] == [1, 2]
    assert [row["step"] for row in late.rows()] == [1, 2, 3] and late.rows() == now.rows()


def test_what_is_queued_is_written_before_the_sum_of_a_run_that_ends_without_a_checkpoint(both):
    def stop(step, watch, _):
        watch.trainer.control.should_training_stop = step == 3

    now, late = both(act=stop)
    assert late.history() == now.history() and [row["step"] for row in late.rows()] == [1, 2, 3]


@pytest.mark.parametrize("bad, good, good_late", [(2, None, None), (5, 3, 2), (7, 5, 4)])
def test_the_tripwire_names_the_right_step_where_rows_are_late(both, bad, good, good_late):
    def ruin(step, watch, _):
        if step == bad - 1:
            next(iter(trainer.trainable_parameters(watch.trainer.model).values())).data.fill_(math.nan)

    now, late = both(act=ruin)
    found = [json.loads((run.path / "stopped.json").read_text()) for run in (now, late)]
    assert [run.pop("last_good") for run in found] == [good, good_late] and found[0] == found[1]
    assert found[0]["step"] == bad and late.rows() == now.rows() and [row["step"] for row in late.rows()][-1] == bad - 1
    assert max(late.weights) == min(bad + 1, 7), "one step more was computed"
    assert f"stopped at step {bad}, where the loss is nan" in str(late.error)
    if good_late:
        assert (late.path / f"adapter-step-{good_late}").exists()
        for name, weight in trainer.trainable_parameters(late.watch.trainer.model).items():
            assert torch.equal(weight, late.weights[good_late][name]), name


def test_a_copy_is_judged_by_losses_of_its_own_weights():
    layer, watch = wire()
    losses = {1: 3.0, 2: 2.9, 3: 2.8, 4: 9.0, 5: 9.0, 6: 2.7, 7: 2.6}
    for step, loss in losses.items():
        with torch.no_grad():
            layer.weight.fill_(step + 1)  # the next step is over
        assert not watch.wrong(step, loss, 1.0, step + 1)
        good = watch.good and watch.good[0]
        assert good == {3: 2, 4: 2, 5: 2, 6: 2, 7: 6}.get(step), step
    assert watch.wrong(8, math.nan, 1.0, 9) and watch.put_back() == 6 and layer.weight.eq(6).all()


# --- checkpoints that are damaged -----------------------------------------------------------------------------------

NEEDED = ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt",
          "rng_state.pth")  # fmt: skip
DAMAGE = {
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "empty": lambda file: file.write_bytes(b""),
    "a page of zeros": lambda file: file.write_bytes(b"\0" * 256 + file.read_bytes()[256:]),
    "gone": Path.unlink,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.fixture(scope="module")
def stopped_run(data, tmp_path_factory):
    "A run of six steps with the checkpoints 4 and 6, as one that was killed in its last evaluation."
    model, tokenizer = fresh()
    path = tmp_path_factory.mktemp("stopped") / "run"
    with contextlib.redirect_stderr(io.StringIO()):
        run = train(model, tokenizer, data, output=path, save_steps=2, **{**SHORT, "max_steps": 6})
    (path / "summary.json").unlink()
    shutil.rmtree(path / "adapter")
    return run


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(stopped_run, tmp_path, capsys, name, how):
    path = Path(shutil.copytree(stopped_run.path, tmp_path / "run"))
    newest, older = RunFolder(path).checkpoints
    assert find_damage(newest) is find_damage(older) is None and last_checkpoint(RunFolder(path)) == newest
    assert capsys.readouterr().err == ""
    DAMAGE[how](newest / name)
    assert last_checkpoint(RunFolder(path)) == older
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"the checkpoint checkpoint-6 is damaged ({name}")
    assert said.endswith("resuming from checkpoint-4")
    DAMAGE[how](older / name)
    assert last_checkpoint(RunFolder(path)) is None  # the run begins again, and both are named
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is damaged")[0] for line in said] == [f"the checkpoint checkpoint-{step}" for step in (6, 4)]
    tidy_checkpoints(RunFolder(path))  # nothing in it trips


def test_checkpoints_are_known_by_their_names(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-8-copy", "checkpoint-", "damaged-checkpoint-12", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/checkpoint-11").write_text("a file")
    assert [folder.name for folder in RunFolder(tmp_path).checkpoints] == ["checkpoint-10", "checkpoint-9"]
    assert last_checkpoint(RunFolder(tmp_path / "nothing")) is None


@pytest.mark.parametrize("name, how", [("optimizer.pt", "half"), ("trainer_state.json", "gone")])
def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_bytes(stopped_run, data, tmp_path, capsys, name, how):
    path = Path(shutil.copytree(stopped_run.path, tmp_path / "run"))
    DAMAGE[how](path / "checkpoints/checkpoint-6" / name)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join([lines[0], *lines[2:]]) + "\n" if how == "half" else "[]\n[]\n")
    run = train(*fresh(), data, resume=path)
    said = capsys.readouterr().err
    assert f"checkpoint-6 is damaged ({name}" in said and "resuming from checkpoint-4" in said
    assert f"metrics.jsonl lacks {1 if how == 'half' else 4} of the rows up to step 4" in said
    assert run.summary["adapter_sha256"] == stopped_run.summary["adapter_sha256"]
    assert [m["loss"] for m in run.metrics] == [m["loss"] for m in stopped_run.metrics]
    assert [m["step"] for m in load_run(path).metrics] == [1, 2, 3, 4, 5, 6]
    assert run.metrics[1]["tokens_per_second"] is None and run.summary["mean_loss"] == stopped_run.summary["mean_loss"]
    assert [folder.name for folder in RunFolder(path).checkpoints] == ["checkpoint-6", "checkpoint-4"]
    assert all(find_damage(folder) is None for folder in RunFolder(path).checkpoints)
    assert not list((path / "checkpoints").glob("damaged-*"))


@pytest.mark.parametrize("how", ["gone", "another run's"])
def test_a_run_whose_steps_are_done_gets_its_metrics_back(stopped_run, data, tmp_path, capsys, how):
    path = Path(shutil.copytree(stopped_run.path, tmp_path / "run"))
    rows = [{**row, "loss": row["loss"] + (row["step"] < 4)} for row in RunFolder(path).metrics]
    if how == "gone":
        (path / "metrics.jsonl").unlink()
    else:
        RunFolder(path).write("metrics.jsonl", rows)
    run = train(*fresh(), data, resume=path)
    why = "lacks 6" if how == "gone" else "has other figures than the checkpoint in 3"
    assert f"metrics.jsonl {why} of the rows up to step 6" in capsys.readouterr().err
    assert run.summary["adapter_sha256"] == stopped_run.summary["adapter_sha256"]
    assert run.summary["mean_loss"] == stopped_run.summary["mean_loss"]
    assert [row["loss"] for row in run.metrics] == [row["loss"] for row in stopped_run.metrics]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("bias"), "bias is None in .*, but checkpoint-6 was trained with 'none'"),
        (lambda c: c.pop("fingerprints"), "the fingerprint of data in .* is not that of checkpoint-6"),
        (lambda c: c.update(fingerprints=[1]), "fingerprints is a list"),
        (lambda c: c.update(fingerprints={}), "the fingerprint of data in .* is not that of checkpoint-6"),
        (lambda c: c.update(learning_rate="high"), "learning_rate is 'high'"),
        (lambda c: c.update(r={"r": 8}), "config.yaml: r is"),
        (lambda c: c.clear(), "holds no settings of a run"),
    ],
)
def test_a_damaged_configuration_does_not_go_on(stopped_run, data, adapted, tmp_path, change, message):
    path = Path(shutil.copytree(stopped_run.path, tmp_path / "run"))
    config = yaml.safe_load((path / "config.yaml").read_text())
    change(config)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=message) as refused:
        train(*adapted, data, resume=path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert not list((path / "checkpoints").glob("damaged-*"))


# --- held-out rows while it trains ----------------------------------------------------------------------------------

LOOKS = {"max_steps": 4, "warmup_steps": 0, "eval_rows": 4, "max_new_tokens": 4, "check": False}
LOOKS |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 3e-3}


def dropping(**more):
    "A model whose dropout draws random numbers in each step; with the engine, which takes none, a plain one."
    model, tokenizer = load_model(TINY.model, max_seq_length=256, **more)
    return add_lora(model, r=8, lora_dropout=0.0 if more.get("engine") else 0.1), tokenizer


def stop_after(number):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == number - 1:
                signal.raise_signal(signal.SIGTERM)

    return Stop


class CountLooks:
    "Makes a callback that counts evaluations, and has the count saved with the checkpoints."

    def __new__(cls):
        from transformers import TrainerCallback
        from transformers.trainer_callback import ExportableState

        class Looks(TrainerCallback, ExportableState):
            losses = []

            def on_evaluate(self, args, state, control, metrics=None, **kwargs):
                self.losses = [*self.losses, metrics["eval_loss"]]

            def state(self):
                return {"args": {}, "attributes": {"losses": self.losses}}

        return Looks()


@pytest.mark.parametrize("how", [{"backend": "transformers"}, pytest.param({"engine": True}, marks=pytest.mark.heavy)])
def test_looking_changes_nothing_and_a_resumed_run_has_looked_as_often(how, data, tmp_path, capsys):
    "One that never looks, one that does, and one that does and is stopped and resumed: the same losses and bytes."
    few, held = data.select(range(12)), data.select(range(20, 24))
    blind = train(*dropping(**how), few, output=tmp_path / "blind", **{**LOOKS, "eval_rows": 0})
    looks = {"eval_steps": 2, "sample_prompts": 1, **LOOKS}
    counted = CountLooks()
    whole = train(*dropping(**how), few, eval_data=held, output=tmp_path / "whole", callbacks=[counted], **looks)
    with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM at step 3, checkpoint saved"):
        callbacks = [CountLooks(), stop_after(3)]
        train(*dropping(**how), few, eval_data=held, output=tmp_path / "part", callbacks=callbacks, **looks)
    capsys.readouterr()
    again = CountLooks()
    part = train(*dropping(**how), few, eval_data=held, resume=tmp_path / "part", check=False, callbacks=[again])
    said = capsys.readouterr().err
    for run in (whole, part):
        assert run.summary["adapter_sha256"] == blind.summary["adapter_sha256"]
        assert [row["loss"] for row in run.metrics] == [row["loss"] for row in blind.metrics]
    seen = {row["step"]: row["eval_loss"] for row in whole.metrics if "eval_loss" in row}
    assert list(seen) == [2, 4] and seen[4] < seen[2] and not any("eval_loss" in row for row in blind.metrics)
    assert {row["step"]: row.get("eval_loss") for row in part.metrics if "eval_loss" in row} == seen
    assert counted.losses == again.losses == [*seen.values()], "a callback's own state goes on, too"
    assert seen[4] == whole.summary["after"]["loss"] == whole.summary["best_eval_loss"]
    samples = [[(row["step"], row["reply"]) for row in RunFolder(run.path).samples] for run in (whole, part)]
    assert samples[0] == samples[1] and [step for step, _ in samples[0]] == [0, 2, 4]
    assert part.summary["resumed_at"] == [3] and "resumed_at" not in whole.summary
    assert part.summary["data"]["tokens"] == whole.summary["data"]["tokens"] == blind.summary["data"]["tokens"]
    assert part.summary["data"]["padding"] == whole.summary["data"]["padding"]
    state = json.loads((part.path / "checkpoints/checkpoint-4/trainer_state.json").read_text())
    counts = state["stateful_callbacks"]["RunClock"]["attributes"]["before"]
    assert part.summary["train_seconds"] >= round(counts["train_seconds"], 2) > 0  # both sittings, not one step's
    assert "step 4: held-out loss" in said and "weren't given again: Stop" in said
    assert yaml.safe_load((part.path / "config.yaml").read_text())["callbacks"] == ["Looks"]


def test_the_best_adapter_is_kept_and_used(data, tmp_path, capsys):
    "A rate that is far too high: the first evaluation is the best, and two worse ones end the run."
    few, held = data.select(range(4)), data.select(range(20, 24))
    settings = {**LOOKS, "max_steps": 9, "learning_rate": 3e-2, "per_device_train_batch_size": 4}
    settings |= {"gradient_accumulation_steps": 1, "eval_steps": 1, "save_total_limit": 1, "save_steps": 9}
    run = train(*fresh(), few, eval_data=held, output=tmp_path / "run", early_stopping=2, **settings)
    said, summary = capsys.readouterr().err, run.summary
    losses = [row["eval_loss"] for row in run.metrics]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 9 and summary["stopped_early"] and summary["steps"] == best + 2
    assert (summary["best_step"], summary["best_eval_loss"], summary["adapter_step"]) == (best, min(losses), best)
    assert summary["after"]["loss"] == min(losses), "what is evaluated is what is saved"
    assert f"stopped early at step {best + 2}: no lower held-out loss in 2 evaluations" in said
    assert f"at step {best + 2}): the adapter of step {best} is taken" in said
    from safetensors.torch import load_file

    kept = run.path / "checkpoints" / f"checkpoint-{best}"
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (kept, run.path / "adapter")]
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())
    assert [path.name for path in RunFolder(run.path).checkpoints] == [f"checkpoint-{best + 2}", kept.name]
    (run.path / "summary.json").unlink()  # as if it had been killed in its last evaluation
    again = train(*fresh(), few, eval_data=held, resume=run.path, check=False)
    times = ("seconds", "train_seconds")
    assert (
        abs(again.summary["train_seconds"] - summary["train_seconds"]) < 1
    )  # all of it, but for the end of the last step
    figures = [{k: v for k, v in found.items() if k not in times} for found in (again.summary, summary)]
    assert figures[0] == figures[1], "nothing is trained again"


def test_without_early_stopping_the_last_adapter_is_kept_and_a_better_one_is_named(adapted, tmp_path, capsys):
    folder, metrics = (
        RunFolder(tmp_path),
        [{"step": n, "loss": 1.0, "eval_loss": loss} for n, loss in ((5, 1.0), (9, 1.5))],
    )
    found = watching.take_best_adapter(adapted[0], folder, metrics, resolve_settings({"eval_steps": 5}), 9)
    assert found == {"best_step": 5, "best_eval_loss": 1.0, "adapter_step": 9}
    said = capsys.readouterr().err
    assert (
        "lowest at step 5 (1.0000; 1.5000 at step 9), and the last adapter is kept" in said and "checkpoint-5" in said
    )


@pytest.mark.parametrize(
    "given, message",
    [
        ({"early_stopping": 2}, "early_stopping is 2, but nothing is evaluated while it trains: give eval_steps="),
        ({"sample_prompts": 2}, "sample_prompts is 2, but nothing is evaluated"),
        (
            {"eval_steps": 5, "eval_rows": 0},
            r"eval_steps is 5, but no rows are held out \(eval_rows is 0\): give eval_data=",
        ),
        ({"eval_steps": 0}, "eval_steps is 0: give a number above 0"),
        ({"report_to": "trakio"}, "report_to is 'trakio', which transformers doesn't know: choose for example trackio"),
        ({"callbacks": [print]}, "callbacks holds a builtin_function_or_method: give transformers' TrainerCallback"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "it needs eval_steps, or choose linear or cosine"),
    ],
)
def test_what_cannot_be_watched_is_said_before_the_first_step(given, message, adapted, data, tmp_path):
    with pytest.raises(UserError, match=message):
        train(*adapted, data.select(range(20)), output=tmp_path / "run", **{"max_steps": 1, **given})
    assert not (tmp_path / "run").exists()


def test_a_package_that_reports_must_be_installed(adapted, data, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["wandb"])
    with pytest.raises(UserError, match="report_to is tensorboard, which isn't installed: pip install tensorboard"):
        train(*adapted, data, output=tmp_path / "run", report_to=["wandb", "tensorboard"])


def test_a_function_that_scores_is_recorded_by_its_name(adapted, data, tmp_path):
    def likes(reply, expected, row):
        return 1.0

    def prepare(folder=None, config=None, resume=None, **given):
        given = {name: preparation.check_setting(name, value) for name, value in given.items()}
        return preparation.prepare_run(*adapted, few, None, given, config, None, resume, folder, True, {})

    few = data.select(range(30))
    found = prepare(tmp_path / "run", scorer=likes, base_data=[{"messages": []}], sample_prompts=["Who?"], eval_steps=1)
    assert found.settings.scorer is likes and found.settings.base_data == [{"messages": []}]
    assert [found.config[name] for name in ("scorer", "base_data", "sample_prompts")] == [
        "(given in Python) likes",
        "(given in Python)",
        ["Who?"],
    ]
    found.folder.write("config.yaml", found.config)
    with pytest.raises(UserError, match="scorer was the function likes, .* give it again as scorer="):
        prepare(resume=tmp_path / "run")
    with pytest.raises(UserError, match="base_data was rows given in Python, .* give them again"):
        prepare(resume=tmp_path / "run", scorer=likes)
    again = prepare(resume=tmp_path / "run", scorer=likes, base_data=[{"messages": []}])
    assert again.settings.scorer is likes and again.config == {**found.config, "rows_read": again.config["rows_read"]}
    with pytest.raises(UserError, match="scorer is 'rouge', but the run was started with .*likes'"):
        prepare(resume=tmp_path / "run", scorer="rouge")


def test_both_evaluations_say_how_long_they_take_and_which_they_are(data, tmp_path, capsys, monkeypatch):
    "On a machine where five seconds pass between two looks at the clock."
    import qlora_nb.evaluation as evaluation

    class Slow(evaluation.EvaluationProgress):
        def __init__(self, *given, **how):
            super().__init__(*given, **how, clock=partial(next, itertools.count(0, 5)))

    monkeypatch.setattr(evaluation, "EvaluationProgress", Slow)
    train(*fresh(), data, output=tmp_path / "run", **{**SHORT, "eval_rows": 3, "max_new_tokens": 12})
    said = capsys.readouterr().err
    for stage in ("before", "after"):
        assert re.search(rf"3 replies of at most 12 tokens, {stage} training: at most \d+ ", said), said


def test_a_held_out_row_is_asked_once_and_not_trained_on(adapted, data, capsys):
    "A file that repeats its rows, as some do for epochs: a held-out question is one row, and its copies are nowhere."
    from datasets import Dataset

    thrice = Dataset.from_list([*data.select(range(20))] * 3)
    settings = resolve_settings({"eval_rows": 4}, profile=TINY)
    trained, held, rows = preparation.encode_and_hold_out(thrice, None, adapted[1], settings, True)
    assert len(held) == 4 and len({str(row["messages"]) for row in held}) == 4
    assert len(trained) == len(rows.rows) == 48 and not {str(m) for m in trained["messages"]} & {
        str(m) for m in held["messages"]
    }
    assert "8 rows held out repeated another one and were left out: each is asked once" in capsys.readouterr().err
    preparation.encode_and_hold_out(thrice, data.select([3, 3, 30, 3, 31]), adapted[1], settings, False)
    said = capsys.readouterr().err
    assert "2 rows held out repeated another one" in said and "3 rows to train on ask what a held-out row asks" in said


# --- what a run starts from -----------------------------------------------------------------------------------------


def config_of(run):
    return yaml.safe_load((run.path / "config.yaml").read_text())


def test_a_second_training_says_what_it_goes_on_from(data, tmp_path, capsys):
    model, tokenizer = fresh()
    first = train(model, tokenizer, data, output=tmp_path / "first", **SHORT)
    assert "continues from" not in capsys.readouterr().err and not config_of(first).get("started_from")
    sha = first.summary["adapter_sha256"]
    second = train(model, tokenizer, data, output=tmp_path / "second", **SHORT)
    said = f"continues from the trained adapter that the model carries (sha256 {sha[:12]}…, {first.path / 'adapter'})"
    assert said in capsys.readouterr().err
    assert (
        config_of(second)["started_from_adapter"]
        == second.summary["started_from_adapter"]
        == str(first.path / "adapter")
    )
    assert config_of(second)["started_from"] == sha == file_sha256(first.path / "adapter/adapter_model.safetensors")
    assert f"SHA-256 {sha}" in second.report() and "trained one" not in first.report()
    base, tokenizer = load_model(TINY.model, max_seq_length=256, backend="transformers")
    loaded = load_adapter(base, first.path / "adapter", trainable=True)
    again = train(loaded, tokenizer, data, output=tmp_path / "again", **SHORT)
    assert config_of(again)["started_from"] == sha, "from a folder as from the same process"
    assert again.summary["adapter_sha256"] == second.summary["adapter_sha256"]
    # taken up again, it is the same run: from its checkpoint, and without one only from the same adapter
    (again.path / "summary.json").unlink()
    capsys.readouterr()
    resumed = train(*fresh(), data, resume=again.path)
    assert resumed.summary["adapter_sha256"] == second.summary["adapter_sha256"]
    assert config_of(resumed)["started_from_adapter"] == str(first.path / "adapter")
    assert config_of(resumed)["started_from"] == sha and "continues from the trained" not in capsys.readouterr().err
    (again.path / "summary.json").unlink()
    shutil.rmtree(again.path / "checkpoints")
    with pytest.raises(UserError, match=f"no checkpoint yet, and the model has a new adapter: give it .*{sha}"):
        train(*fresh(), data, resume=again.path)
    (first.path / "summary.json").unlink()
    shutil.rmtree(first.path / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet, and the model has a trained adapter .*give it a new"):
        train(loaded, tokenizer, data, resume=first.path)


@pytest.mark.parametrize("engine", [False, True])
def test_the_hash_is_that_of_the_saved_adapter(data, tmp_path, engine):
    from qlora_nb.adapter import save_adapter

    model, tokenizer = load_model(TINY.model, max_seq_length=256, engine=engine)
    model = add_lora(model, r=4)
    assert preparation.hash_trained_adapter(model) is None
    with torch.no_grad():
        [p for name, p in model.named_parameters() if "lora_B" in name][-1].view(-1)[-1] = 1e-6
    assert preparation.hash_trained_adapter(model) == save_adapter(model, tokenizer, tmp_path / "adapter")


@pytest.mark.parametrize("four_bit", [True, False])
def test_add_lora_without_its_result(data, tmp_path, four_bit):
    base, tokenizer = load_model(TINY.model, max_seq_length=256, backend="transformers", load_in_4bit=four_bit)
    with pytest.raises(UserError, match="put one on with add_lora"):
        train(base, tokenizer, data, output=tmp_path / "run", **SHORT)
    add_lora(base, r=8)
    with pytest.raises(UserError, match=r"returns the model with the adapter: write model = add_lora\(model\)"):
        train(base, tokenizer, data, output=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()


# --- what is judged -------------------------------------------------------------------------------------------------


def test_support_replies_of_another_model_are_told_by_their_loss(tmp_path):
    "No number that ends a reply, no <think>, no sums of the embedded model: null in summary.json, and nowhere else."
    from datasets import Dataset

    model, tokenizer = load_model(shutil.copytree(EMBEDDED_MODEL, tmp_path / "model"), max_seq_length=256)
    assert load_base_task(model) is None
    rows = [
        {"messages": [
            {"role": "user", "content": f"I want to send back order {i}."},
            {"role": "assistant", "content": f"You get it back within 30 days. I've opened ticket #{i} for you."},
        ]}
        for i in range(40)
    ]  # fmt: skip
    settings = {**SHORT, "eval_rows": 4, "max_new_tokens": 6}
    run = train(add_lora(model, r=4), tokenizer, Dataset.from_list(rows), output=tmp_path / "run", **settings)
    for stage in ("before", "after"):
        figures = json.loads((run.path / "summary.json").read_text())[stage]
        assert [figures[name] for name in ("exact", "score", "scorer", "form")] == [None] * 4
        assert figures["base_perplexity"] > 1 and figures["base_text"].startswith("general text (59 passages")
        assert figures["loss"] > 0 and 0 <= figures["stops"] <= 1
    table = run.report().partition("## Before and after")[2].partition("## Use it")[0]
    assert "| held-out loss |" in table and "stops by itself" in table and "that of general text" in table
    for word in ("exact", "form ", "base task", "right", "wrong", "number expected"):
        assert word not in table, word
    page = (run.path / "report.html").read_text()
    assert f'<p class="big">{run.summary["after"]["loss"]:.3f}</p>' in page and "Right answers" not in page
    assert (
        find_held_out(run) == find_held_out(run.path / "adapter") == read_held_out(run)
        and len(read_held_out(run, 3)) == 3
    )
    asked = [row["problem"] for row in RunFolder(run.path).replies if row["stage"] == "after"]
    assert [row["messages"][0]["content"] for row in find_held_out(run)] == asked


def test_only_the_embedded_model_is_asked_for_its_sums(adapted):
    assert len(load_base_task(adapted[0])) == 200
    wanted = load_sft_dataset(split="base_task", limit=3)
    assert load_base_task(adapted[0], 3)["messages"] == wanted["messages"]


def test_what_is_held_out_is_the_same_for_every_length(adapted, tmp_path, monkeypatch):
    "A plan that chooses another length, or a run that is resumed with it, must not train on held-out rows."
    from datasets import Dataset

    model, tokenizer = adapted
    long_rows = {4, 11, 17, 30}
    talks = []
    for i in range(40):
        reply = f"They are {2 * i}." + " Yes." * 100 * (i in long_rows)
        talk = [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": reply}]
        talks.append(talk[:1] if i in (3, 21) else talk)
    data = Dataset.from_dict({"messages": talks})
    found = []
    for limit in (60, 2000):
        for check in (True, False):
            settings = resolve_settings({"max_seq_length": limit, "drop_invalid": True, "eval_rows": 7})
            trained, held, rows = preparation.encode_and_hold_out(data, None, tokenizer, settings, check)
            asked = {messages[0]["content"] for messages in held["messages"]}
            assert rows.held == [i for i, talk in enumerate(talks) if talk[0]["content"] in asked]
            assert not {*rows.held} & {*rows.numbers, *rows.dropped, 3, 21} and len(trained) == rows.total == 33
            assert (limit == 60) == bool({*rows.dropped} & long_rows)
            found.append(rows.held)
    assert found == found[:1] * 4

    def replan(model, plan, rows, settings, decide, encode, given):
        return settings, encode(replace(settings, max_seq_length=60)), None

    monkeypatch.setattr(preparation, "plan_run", replan)
    chosen, output = {"drop_invalid": True, "eval_rows": 7}, tmp_path / "run"
    run = preparation.prepare_run(model, tokenizer, data, None, chosen, None, "auto", None, output, True, {})
    assert run.rows.held == found[0] and not {*run.rows.held} & {*run.rows.numbers} and len(run.eval_data) == 7


def test_a_common_system_text_may_be_the_developers():
    from datasets import Dataset

    def talk(role):
        return [{"role": role, "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]

    for roles, wanted in (
        (["developer"], "Be brief."),
        (["system", "developer"], "Be brief."),
        (["user", "system"], None),
    ):
        data = Dataset.from_dict({"messages": [talk(role) for role in roles]})
        assert preparation.find_common_system(data) == wanted
