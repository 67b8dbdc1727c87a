"""Several processes share each step: the same gradients, the same adapter, and no process that hangs."""

import contextlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
from processes import COMMAND, Process, qlora_nb, wait_for
from repository import real_file
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from qlora_nb import parallel, preparation, processes, sharding
from qlora_nb.adapter import save_adapter
from qlora_nb.cli import name_flags
from qlora_nb.core import EMBEDDED_MODEL, PROFILES, UserError
from qlora_nb.engine.checkpointing import find_checkpointed_layers
from qlora_nb.engine.install import engine_of
from qlora_nb.forgetting import EncodedRows, encode_rows, row_losses
from qlora_nb.gguf_export import export_gguf
from qlora_nb.loop import choose_loop, count_learned, make_loop
from qlora_nb.model import add_lora, load_model
from qlora_nb.parallel import (
    StepShare,
    build_model,
    check_sharing,
    count_step_rows,
    describe_model,
    divide_batch,
    join_gradients,
    make_shared_loop,
    pass_share,
    share_out,
    split_gradients,
    start_workers,
)
from qlora_nb.preflight import encode_dataset
from qlora_nb.preparation import check_recorded_settings, check_same_processes, record_loops
from qlora_nb.processes import ProcessEnded, Rendezvous, count_processes, find_own_gpu
from qlora_nb.rows import load_sft_dataset
from qlora_nb.run import RunFolder, check_setting, read_config, resolve_settings
from qlora_nb.trainer import make_trainer, trainable_parameters

heavy = pytest.mark.heavy
EXACT = {
    "optim": "adamw_torch", "learning_rate": 2e-4, "max_steps": 12, "warmup_steps": 1, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4, "max_grad_norm": 1e9, "save_steps": 99,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    "Twenty-one: the last step of an epoch has three micro-batches, so that one process of four has none."
    tokenizer = load_model("qlora_nb:embedded", backend="transformers")[1]
    return encode_dataset(load_sft_dataset(limit=21), tokenizer)[0], tokenizer


class Gradients(TrainerCallback):
    "Keeps each step's gradients."

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in trainable_parameters(model).items()})


def make(workers):
    return partial(make_shared_loop, workers) if workers else make_loop


def settings_of(changed):
    return resolve_settings({**EXACT, **changed}, profile=PROFILES["tiny"])


def train_in(processes, rows, path, engine=False, dropout=0.0, **settings):
    "The trainer, with every step's gradients, losses and the adapter at its end."
    model = load_model("qlora_nb:embedded", backend="transformers", engine=engine)[0]
    model, seen = add_lora(model, r=8, lora_dropout=dropout), Gradients()
    with start_workers(processes) as workers:
        made = make(workers)(model, rows[1], rows[0], settings_of(settings), path, [seen])
        made.train()
    made.gradients = seen.steps
    made.losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    made.weights = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    return made


def furthest(found, wanted):
    "The largest difference, as a share of the largest number of its tensor."
    assert found.keys() == wanted.keys()
    apart = {name: (found[name] - one).abs().max() / one.abs().max().clamp(min=1e-30) for name, one in wanted.items()}
    return max(map(float, apart.values()))


MOST = [(2, True), *(pytest.param(*some, marks=heavy) for some in ((2, False), (4, True), (4, False)))]


@pytest.mark.parametrize("processes, engine", MOST)
def test_the_same_gradients_and_the_same_adapter(processes, engine, rows, tmp_path, monkeypatch):
    alone = train_in(1, rows, tmp_path / "alone", engine)
    learned = [sum(label != -100 for label in labels[1:]) for labels in rows[0]["labels"]]
    assert len(set(learned)) > 5, "rows of as many learned tokens each would hide a mean that is wrong"
    shared = train_in(processes, rows, tmp_path / str(processes), engine)
    assert max(abs(a - b) for a, b in zip(shared.losses, alone.losses)) < 1e-6
    assert furthest(shared.gradients[0], alone.gradients[0]) < 1e-6
    assert len(shared.gradients) == 12 and furthest(shared.weights, alone.weights) < 1e-5
    assert (int(shared.tokens), int(shared.targets)) == (int(alone.tokens), int(alone.targets))
    assert shared.state.global_step == 12 and abs(shared.state.epoch - alone.state.epoch) < 1e-9
    if (processes, engine) != (2, True):
        return
    # The control arm: each process takes the mean over its own tokens, and the gradients are averaged.
    deal = parallel.share_out

    def by_process(batches, processes, *given, **how):
        shares = deal(batches, processes, *given, **how)
        own = [sum(int(count_learned(batch)) for batch in share.batches) for share in shares]
        return [share._replace(learned=count * processes) for share, count in zip(shares, own)]

    monkeypatch.setattr(parallel, "share_out", by_process)
    wrong = train_in(2, rows, tmp_path / "wrong", engine, max_steps=1)
    assert furthest(wrong.gradients[0], alone.gradients[0]) > 0.01


@heavy
def test_a_resumed_run_is_the_whole_one_whatever_shares_it(rows, tmp_path):
    "With dropout, and from a checkpoint in the middle of an epoch; in as many processes to the same bytes."
    how = {"max_steps": 6, "save_steps": 4, "optim": "adamw_8bit"}
    whole = train_in(2, rows, tmp_path / "whole", dropout=0.1, **how)
    model = load_model("qlora_nb:embedded", backend="transformers", engine=False)[0]
    model = add_lora(model, r=8, lora_dropout=0.1)
    with start_workers(2) as workers:
        made = make(workers)(model, rows[1], rows[0], settings_of(how), tmp_path / "again", [])
        torch.manual_seed(77)
        made.train(str(tmp_path / "whole/checkpoint-4"))
    assert all(torch.equal(p, whole.weights[name]) for name, p in trainable_parameters(model).items())


@heavy
def test_a_real_model_has_the_same_gradients(tmp_path):
    found, folder = [], real_file("smollm2/config.json").parent
    for number in (1, 2):
        model, tokenizer = load_model(folder, backend="transformers", engine=False)
        data, seen = encode_dataset(load_sft_dataset(limit=60), tokenizer)[0], Gradients()
        settings = settings_of({"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2})
        with start_workers(number) as workers:
            path = tmp_path / str(number)
            make(workers)(add_lora(model, r=8), tokenizer, data, settings, path, [seen]).train()
        found.append(seen.steps[0])
    assert len(found[0]) > 400
    assert all(torch.allclose(found[1][name], wanted, rtol=1e-5, atol=1e-8) for name, wanted in found[0].items())


def test_a_scaled_batch_is_that_of_one_process_with_more_rows(rows, tmp_path, capsys):
    more = train_in(1, rows, tmp_path / "more", max_steps=2)
    capsys.readouterr()
    scaled = train_in(2, rows, tmp_path / "scaled", max_steps=2, gradient_accumulation_steps=2, scale_batch=True)
    said = "2 in each of 2 processes; 2 times the rows of one process (scale_batch=True), at the same learning rate"
    assert said in capsys.readouterr().err
    assert furthest(scaled.gradients[0], more.gradients[0]) < 1e-6 and furthest(scaled.weights, more.weights) < 1e-5
    assert abs(scaled.state.epoch - more.state.epoch) < 1e-9 and scaled.steps_in_epoch == 3  # 21 rows, by 8


@pytest.mark.quick
def test_a_scaled_run_goes_on_with_as_many_processes(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for began, scaled, gpus in (({"processes": 4}, True, 4), ({"processes": 4}, False, 2), ({}, True, 2)):
        check_same_processes(folder, began, settings_of({"gpus": gpus, "scale_batch": scaled}))
    with pytest.raises(UserError) as refused:
        check_same_processes(folder, {"processes": 4}, settings_of({"gpus": 2, "scale_batch": True}))
    words = "in 4 processes, 32 rows a step; 2 would make it 16: resume it with"
    assert f"with scale_batch=True {words} gpus=4" in str(refused.value)
    assert f"with --scale-batch {words} --gpus 4" in name_flags(str(refused.value), "train")
    assert count_step_rows(settings_of({"gpus": 2, "scale_batch": True})) == 16 == 2 * count_step_rows(settings_of({}))
    check_sharing(
        settings_of({"gpus": 3, "scale_batch": True}), {"backend": "transformers"}
    )  # 8 rows can't be divided by 3


@pytest.mark.quick
def test_which_loops_trained_a_run(tmp_path, capsys, monkeypatch):
    "Each that did, in their order; and a checkpoint of the first is one of the run."
    assert [record_loops(began, 1) for began in ("trl", "own", "trl, then own")] == ["trl", "own", "trl, then own"]
    assert [record_loops(began, 2) for began in ("own", "trl, then own")] == ["own", "trl, then own"]
    assert capsys.readouterr().err == ""
    assert record_loops("trl", 2) == "trl, then own" and "goes on in 2 processes" in capsys.readouterr().err
    assert [choose_loop(preparation.list_loops(record)[-1]) for record in ("trl", "trl, then own")] == [
        make_trainer,
        make_loop,
    ]
    for now, then, same in (("trl, then own", "trl", True), ("own", "trl", False), ("trl", "trl, then own", False)):
        monkeypatch.setattr(preparation, "read_trained_settings", lambda checkpoint, then=then: {"trained_by": then})
        with contextlib.nullcontext() if same else pytest.raises(UserError, match=f"trained_by is '{now}'"):
            folder, checkpoint = RunFolder(tmp_path), tmp_path / "checkpoint-2"
            check_recorded_settings(folder, {"trained_by": now, "max_steps": 4}, [checkpoint])


class Looks(TrainerCallback):
    "The losses of held-out rows after each step, of all processes and of this one."

    def __init__(self, workers, rows):
        self.workers, self.rows, self.shared, self.alone = workers, rows, [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.shared.append(self.workers.row_losses(model, None, self.rows, batch_size=3))
        assert torch.is_grad_enabled()
        self.alone.append(row_losses(model, None, self.rows, batch_size=3))


def test_held_out_rows_are_shared_out(rows, tmp_path):
    "Seven rows in two processes, one of them too long: the same losses in the same order, and the same training."
    model = add_lora(load_model("qlora_nb:embedded", backend="transformers", engine=False)[0], r=8)
    held = encode_rows(load_sft_dataset(limit=8).select(range(7)), rows[1], model)
    held = EncodedRows([*held[:3], None, *held[4:]])
    with start_workers(2) as workers:
        looks = Looks(workers, held)
        make(workers)(model, rows[1], rows[0], settings_of({"max_steps": 2}), tmp_path / "run", [looks]).train()
        outside = workers.row_losses(model, rows[1], held)
    for found, wanted in zip(looks.shared, looks.alone, strict=True):
        assert [one is None for one in found] == [False] * 3 + [True] + [False] * 3
        assert all(
            a == b or abs(a[0] - b[0]) < 1e-6 * b[0] and a[1] == b[1] for a, b in zip(found, wanted, strict=True)
        )
    assert looks.shared[0] != looks.shared[1] and len(outside) == 7
    without = train_in(2, rows, tmp_path / "without", max_steps=2)
    assert all(torch.equal(p, without.weights[name]) for name, p in trainable_parameters(model).items())


# --- pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "rows, steps, processes, wanted",
    [(2, 4, 2, (2, 4)), (2, 4, 4, (2, 4)), (2, 4, 8, (1, 8)), (8, 1, 2, (4, 2)), (8, 1, 8, (1, 8)), (6, 1, 3, (2, 3)),
     (6, 2, 4, (3, 4)), (1, 8, 8, (1, 8))],
)  # fmt: skip
def test_a_step_is_divided_by_micro_batches_and_then_by_rows(rows, steps, processes, wanted):
    assert divide_batch(rows, steps, processes) == wanted
    assert wanted[0] * wanted[1] == rows * steps and wanted[1] % processes == 0


@pytest.mark.quick
@pytest.mark.parametrize(
    "rows, steps, processes, words",
    [(8, 1, 3, "take 2, 4 or 8, or 6 or 9 rows"), (2, 4, 16, "take 2, 4 or 8, or 16 rows"),
     (1, 1, 2, "take one, or 2 rows"), (7, 1, 2, "take 7, or 6 or 8 rows")],
)  # fmt: skip
def test_a_step_that_cant_be_divided_is_refused_with_the_nearest_numbers(rows, steps, processes, words):
    with pytest.raises(UserError, match=words):
        divide_batch(rows, steps, processes)


@pytest.mark.quick
def test_every_micro_batch_is_dealt_once():
    for batches in range(9):
        shares = share_out([*range(batches)], 4, 5, seed=100)
        assert sorted(number for share in shares for number in share.batches) == [*range(batches)]
        assert [share.seed for share in shares] == [100, 101, 102, 103] and {share.learned for share in shares} == {5}


@pytest.mark.quick
def test_weights_without_a_gradient():
    "In one process, an expert that no token chose; in all, a weight out of use: an optimizer has to pass over it."

    def weights(*have):
        found = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3,), (2, 2), (1,))]
        for weight, value in zip(found, have):
            weight.grad = None if value is None else torch.full_like(weight, value)
        return found

    mine, other = weights(1.0, None, None), weights(2.0, 5.0, None)
    loss = split_gradients(mine, join_gradients(mine, torch.tensor(0.5)) + join_gradients(other, torch.tensor(0.25)))
    assert loss.item() == 0.75 and mine[0].grad.tolist() == [3.0] * 3 and mine[1].grad.tolist() == [[5.0] * 2] * 2
    assert mine[2].grad is None


@pytest.mark.quick
@pytest.mark.parametrize("value, found", [("2", 2), (4, 4), ("all", "all"), (None, None), ("1", 1)])
def test_the_setting(value, found):
    assert check_setting("gpus", value) == found


@pytest.mark.quick
@pytest.mark.parametrize("value", ["two", "2.5", 0, -1, 1.5, True, "0", "9" * 30])
def test_a_setting_that_is_none(value):
    with pytest.raises(UserError, match="gpus is"):
        check_setting("gpus", value)


def test_what_several_processes_cant_train_with(monkeypatch):
    for given, backend, words in (
        ({"loop": "trl"}, "transformers", "loop='trl'"), ({}, "unsloth", "the backend unsloth"),
        ({"optim": "galore_adamw"}, "transformers", "optim='galore_adamw'"),
        ({"gpus": 3}, "transformers", "8 rows a step"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            check_sharing(resolve_settings({"gpus": 2, **given}, profile=PROFILES["tiny"]), {"backend": backend})
    check_sharing(resolve_settings({"gpus": 2}, profile=PROFILES["tiny"]), {"backend": "transformers"})
    monkeypatch.setattr(processes, "_launched", [Rendezvous("127.0.0.1", 1, 0, 4)])
    assert [count_processes(given) for given in (None, "all", 4)] == [4, 4, 4]
    with pytest.raises(UserError, match="4 processes were started"):
        count_processes(2)


@heavy
def test_another_base_in_another_process(rows, tmp_path, monkeypatch):
    "Whatever differs is named by the process that finds it, and ends all of them."
    describe = parallel.describe_model

    def other_bytes(found):
        name, (shape, dtype, total) = next(iter(found["weights"].items()))
        return {**found, "weights": {**found["weights"], name: (shape, dtype, total + 1)}}

    def another_weight(found):
        return {**found, "weights": {**found["weights"], "head": ((3,), "torch.float32", None)}}

    for change, words in (
        (other_bytes, "has other numbers"), (another_weight, "head is missing"),
    ):  # fmt: skip
        monkeypatch.setattr(parallel, "describe_model", lambda *given, change=change: change(describe(*given)))
        with pytest.raises(ProcessEnded, match=f"process 1 of 2.*{words}"):
            train_in(2, rows, tmp_path, max_steps=1)
        assert not torch.distributed.is_initialized()
        assert not others(os.getpid())


# --- what other reviewers would try ----------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "seen, local, wanted",
    [(None, 1, "1"), ("", 1, ""), ("4,5", 1, "5"), ("GPU-8f,GPU-2c", 0, "GPU-8f"), ("3", 1, "3")],
)
def test_the_gpu_of_a_launched_process(seen, local, wanted):
    "Hidden GPUs stay hidden; one that Slurm gave to each process is kept."
    assert find_own_gpu(seen, local) == wanted


@pytest.mark.quick
def test_more_launched_processes_than_gpus():
    with pytest.raises(UserError, match="names 2 GPUs, and process 2 .* start 2"):
        find_own_gpu("4,5", 2)


TASK = {
    "SLURM_JOB_ID": "871", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_JOB_NODELIST": "login,gpu[08-09]",
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(
    "changed, wanted",
    [
        ({}, ("gpu08", 3, 4, 1)),
        ({"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gpu08"}, ("127.0.0.1", 3, 4, 1)),
        ({"SLURM_STEP_NUM_TASKS": None, "SLURM_STEP_NODELIST": None}, ("login", 3, 4, 1)),
        ({"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000", "WORLD_SIZE": "4"}, ("10.0.0.7", 3, 4, 1)),
        ({"SLURM_STEP_ID": None, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": None}, None),  # a batch script
        ({"SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"}, None),  # a batch script of newer versions
        ({"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}, None),  # the shell of salloc
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_PROCID": None}, None),  # a login into an allocation
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),  # torchrun in each task
    ],
)
def test_which_task_of_slurm(changed, wanted):
    seen = {name: value for name, value in {**TASK, **changed}.items() if value is not None}
    found = processes.read_slurm(seen)
    assert found == (found and Rendezvous(wanted[0], found.port, *wanted[1:3], local=wanted[3])) and bool(
        found
    ) == bool(wanted)
    assert not found or found.port == (4000 if "MASTER_PORT" in seen else 15000 + 31 * 871 % 15000)


@pytest.mark.quick
def test_a_shell_that_srun_opened_is_one_process(monkeypatch):
    "`srun -n 4 --pty bash`: three of the four shells have ended. What srun starts from there has no terminal."
    seen = {**TASK, "SLURM_PTY_PORT": "40000"}
    for terminal in (True, False):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda found=terminal: found))
        assert bool(processes.read_slurm(seen)) != terminal


@pytest.mark.quick
def test_launchers_variables_win(monkeypatch):
    "And no library sees several processes afterwards."
    launcher = {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "here",
        "PMI_SIZE": "4",
        "PMI_RANK": "3",
    }
    for name, value in {**TASK, **launcher, "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_launched", [])
    assert processes.find_launch() == Rendezvous("here", 29500, 1, 2)
    assert processes.find_launch() == Rendezvous("here", processes.read_slurm(TASK).port, 3, 4, local=1)
    assert processes.find_launch(tasks=False) is None
    assert not {"WORLD_SIZE", "RANK", "PMI_SIZE", "PMI_RANK"} & set(os.environ)


@pytest.mark.quick
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use(host):
    with socket.create_server((host, 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {number} of {host}, .* is in use: .* MASTER_PORT"):
            processes.open_store(Rendezvous(host, number, 0, 2))


@pytest.mark.quick
def test_a_port_of_another_run(monkeypatch):
    "Two jobs on one machine may come to the same number: a process doesn't wait for another's process 0."
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    store = processes.open_store(Rendezvous("127.0.0.1", 0, 0, 2))
    there = Rendezvous("127.0.0.1", store.underlying_store.port, 1, 2)
    processes.open_store(there, seconds=1)
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    with pytest.raises(torch.distributed.DistStoreError):
        processes.open_store(there, seconds=1)


@pytest.mark.quick
def test_process_0_hears_why_another_one_ended(monkeypatch):
    "On another machine, where it can't see it; but not of one that only lost its connection."
    store = torch.distributed.HashStore()
    monkeypatch.setattr(processes, "_launched", [Rendezvous("gpu08", 1, 0, 4)])
    group = processes.ProcessGroup(4, "x:y")
    group.store = store
    for error in (ProcessEnded(processes.CONNECTION_LOST), torch.OutOfMemoryError("CUDA out of memory\nand more")):
        assert group.find_cause(0.0) is None
        with pytest.raises(type(error)), processes.telling_end(Rendezvous("gpu08", 1, 2, 4), store):
            raise error
    why = "process 2 of 4 (counted from 0) ended: OutOfMemoryError: CUDA out of memory"
    assert group.find_cause(0.0) == why
    with pytest.raises(ProcessEnded, match=re.escape(why)):
        group.wait_for_all()


LONELY = """
import sys
from qlora_nb import processes
place = processes.Rendezvous("127.0.0.1", 0, 0, 2)
store = processes.open_store(place)
processes.SECONDS_TO_CONNECT = float(sys.argv[1])
processes.join_processes(place, store, lambda: store.check(["ended"]) and "that" or sys.argv[2] or None)
"""


@pytest.mark.parametrize("seconds, why", [("0.5", ""), ("600", "process 1 was killed")])
def test_a_process_that_came_and_never_connects(seconds, why, tmp_path):
    "gloo would wait for ever."
    command = [sys.executable, "-c", LONELY, seconds, why]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    words = (
        f"ProcessEnded: {why}" if why else "met the others at 127.0.0.1, but they can't reach each other (not within"
    )
    assert words in done.stderr and done.returncode == 1


KILLED = """
from qlora_nb import processes
group = processes.ProcessGroup(2, "math:sqrt")
group.start()
group.wait_for_all()
group.children[0].kill()
group.meet()
"""


def test_a_process_that_is_killed_before_it_connects(tmp_path):
    command = [sys.executable, "-c", KILLED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "ProcessEnded: process 1 of 2 (counted from 0) ended by SIGKILL" in done.stderr


class Sums(TorchDispatchMode):
    "The number of bytes in each sum."

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function is torch.ops.aten.sum.default:
            self.sizes.append(arguments[0].numel())
        return function(*arguments, **(named or {}))


@pytest.mark.quick
def test_bytes_are_added_up_in_pieces(monkeypatch):
    "Torch takes eight bytes for each byte of a sum: 8 GB for the embedding of an 8B model at once."
    weight = torch.randn(100, 37).bfloat16()
    monkeypatch.setattr(sharding, "BYTES_AT_ONCE", 1000)
    with Sums() as seen:
        found = parallel.add_bytes(weight)
    assert found == int(weight.view(torch.uint8).long().sum()) and max(seen.sizes) == 1000 and len(seen.sizes) == 8


@pytest.mark.quick
def test_adapters_stay_cast_in_the_backward():
    "Layers that run again there look for them, too."
    weight, here, found = torch.nn.Parameter(torch.ones(2)), [], []
    weight.register_hook(lambda grad: found.append(list(here)))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, scale, num_items_in_batch):
            assert here
            return SimpleNamespace(loss=(self.weight * scale).sum() / num_items_in_batch)

    @contextlib.contextmanager
    def cast():
        here.append("cast")
        yield
        here.clear()

    loss = pass_share(Model(), StepShare([{"scale": torch.tensor(3.0)}] * 2, 4, seed=1), cast=cast)
    assert found == [["cast"]] * 2 and not here and loss.item() == 3.0 and weight.grad.tolist() == [1.5] * 2


NO_CUDA = """
import torch
def refuse(*given, **named): raise SystemExit("CUDA was asked before the process chose its GPU")
for name in ("is_available", "device_count", "_lazy_init"): setattr(torch.cuda, name, refuse)
import qlora_nb.cli
from qlora_nb.processes import find_launch
print(find_launch().rank)
"""


def test_a_launched_process_chooses_its_gpu_before_cuda_is_asked():
    "CUDA reads CUDA_VISIBLE_DEVICES once."
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    done = subprocess.run([sys.executable, "-c", NO_CUDA], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.quick
def test_who_ended_first():
    "Not the one that ended because another had; and an error counts, not what a library said after it."
    lost = f"print('qlora_nb: {processes.CONNECTION_LOST}'); raise SystemExit(1)"
    cause = "print('torch.OutOfMemoryError: CUDA out of memory'); print('[W] a warning of NCCL'); raise SystemExit(1)"
    with contextlib.ExitStack() as files:
        children = []
        for code in (lost, cause, lost):
            said = files.enter_context(tempfile.TemporaryFile())
            children.append(subprocess.Popen([sys.executable, "-S", "-c", code], stdout=said))
            children[-1].said = said
        [child.wait() for child in children]
        why = processes.find_ended(children)
    assert why == ("process 2 of 4 (counted from 0) ended with exit code 1: torch.OutOfMemoryError: CUDA out of memory")


def addresses():
    "Where this process listens or speaks, but not by files of the system."
    return {one.laddr.ip.removeprefix("::ffff:") for one in psutil.Process().net_connections("inet") if one.laddr}


@pytest.mark.quick
def test_a_process_that_is_alone_listens_to_this_machine_alone():
    before = addresses()
    store = processes.open_store(Rendezvous("127.0.0.1", 0, 0, 2))
    assert "127.0.0.1" in addresses() and addresses() - before <= {"127.0.0.1"}
    other = processes.open_store(Rendezvous("127.0.0.1", store.underlying_store.port, 1, 2))
    other.set("a", "b")
    assert store.get("a") == b"b"


@pytest.mark.quick
def test_a_process_where_torch_distributed_is_in_use():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="torch.distributed is in use"):
            check_sharing(resolve_settings({"gpus": 2}, profile=PROFILES["tiny"]), {"backend": "transformers"})
    finally:
        torch.distributed.destroy_process_group()


def with_adapter(kind, tmp_path):
    "A model as it may come to the loop."
    if kind == "continued":
        first, tokenizer = load_model("qlora_nb:embedded", backend="transformers", engine=False)
        save_adapter(
            add_lora(first, r=4, use_rslora=True, bias="all", target_modules=["q_proj", "down_proj"]),
            tokenizer,
            tmp_path / "a",
        )
        return load_model(adapter=tmp_path / "a", backend="transformers", engine=False)[0]
    base = EMBEDDED_MODEL
    if kind == "gguf":
        base = tmp_path / "there/base.gguf"
        base.parent.mkdir()
        export_gguf(EMBEDDED_MODEL, None, base, quantization="f16")
    how = {"engine": kind != "plain", "backend": "transformers"}
    return add_lora(load_model(base, **how)[0], r=4, use_gradient_checkpointing=kind in ("plain", "engine"))


@pytest.mark.parametrize("kind", ["plain", "engine", "continued", "gguf"])
def test_another_process_builds_the_same_model(kind, rows, tmp_path, monkeypatch):
    "With the layers that run again, or it would take more memory than process 0; and from any kind of base."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = with_adapter(kind, tmp_path)
    loop = make_loop(model, rows[1], rows[0], settings_of({}), tmp_path / "run", [])
    loop.start(None)
    there = pickle.loads(pickle.dumps(describe_model(model)))
    built = build_model(there)
    assert list(trainable_parameters(built)) == list(trainable_parameters(model))
    assert engine_of(built) == engine_of(model)
    found, wanted = (len(find_checkpointed_layers(one.get_base_model())) for one in (built, model))
    assert found == wanted and (wanted > 0) == (kind in ("plain", "engine"))


@pytest.fixture
def asleep(tmp_path, monkeypatch):
    "New interpreters sleep before they import anything."
    (tmp_path / "first").mkdir()
    (tmp_path / "first/sitecustomize.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "first"))


def open_files():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_a_process_that_hangs_in_an_import(asleep, monkeypatch):
    "It is named, and nothing is left: no process, no port, no file."
    monkeypatch.setattr(processes, "SECONDS_TO_COME", 0.3)
    before = None
    for number in range(3):
        with (
            pytest.raises(ProcessEnded, match="process 1 of 3 .* didn't come within 0 seconds"),
            start_workers(3) as workers,
        ):
            children = [psutil.Process(child.pid) for child in workers.children]
            workers.wait_for_all()
        assert len(children) == 2 and not any(child.is_running() for child in children)
        before = before if number else open_files()
    assert open_files() == before


def test_a_fork_that_ends_leaves_the_others_alone(asleep):
    with start_workers(2) as workers:
        if (child := os.fork()) == 0:
            workers.stop()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0 and workers.children[0].poll() is None


def test_a_process_in_a_folder_with_modules_of_the_users(tmp_path, monkeypatch):
    "It imports what process 0 imports; and a signal that nohup keeps away stays away."
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')\n")
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with start_workers(2) as workers:
            workers.wait_for_all()
            for number in (signal.SIGHUP, signal.SIGTERM):
                workers.children[0].send_signal(number)
            workers.store.wait(["signal"], timedelta(seconds=60))
            assert workers.find_signal() == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


STARTS = """
from qlora_nb.parallel import start_workers
with start_workers(2) as workers:
    print(workers.children[0].pid, flush=True)
    workers.store.get("never")
"""


@heavy
def test_process_0_is_killed_while_another_one_imports():
    process = subprocess.Popen([sys.executable, "-c", STARTS], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.communicate()
    assert_gone([child])


class Kills(TrainerCallback):
    "Kills a process after the second step."

    def __init__(self, rank):
        self.rank, self.workers = rank, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.workers.children[self.rank - 1].kill()


@heavy
def test_one_of_four_is_killed_and_named(rows, tmp_path):
    kills = Kills(3)
    model = add_lora(load_model("qlora_nb:embedded", backend="transformers", engine=False)[0], r=8)
    with pytest.raises(ProcessEnded, match="process 3 of 4 .* ended by SIGKILL"), start_workers(4) as kills.workers:
        make(kills.workers)(model, rows[1], rows[0], settings_of({}), tmp_path, [kills]).train()
    assert not others(os.getpid())


# --- whole processes ------------------------------------------------------------------------------------------------

SHORT = ["--max-steps", "6", "--save-steps", "2", "--eval-rows", "2", "--max-new-tokens", "4", "--limit", "100",
         "--optim", "adamw_torch", "--learning-rate", "2e-4", "--per-device-train-batch-size", "2",
         "--gradient-accumulation-steps", "4", "--output", "run"]  # fmt: skip


def adapter(run):
    return load_file(run / "adapter/adapter_model.safetensors")


def sha(run):
    return json.loads((run / "summary.json").read_text())["adapter_sha256"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run of two processes, beside that of one."
    place = tmp_path_factory.mktemp("whole")
    for name, more in (("shared", ["--gpus", "2"]), ("alone", [])):
        (place / name).mkdir()
        done = qlora_nb("train", *SHORT, *more, cwd=place / name)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("2 in each of 2 processes" in done.stderr) == (name == "shared")
    assert furthest(adapter(place / "shared/run"), adapter(place / "alone/run")) < 1e-5
    assert (place / "shared/run/metrics.jsonl").read_text().count("\n") == 6
    return place / "shared/run"


def others(pid):
    "The processes that share another's steps."
    children = psutil.Process(pid).children()
    return [child for child in children if "run_worker_process" in " ".join(child.cmdline())]


def assert_gone(children):
    assert not psutil.wait_procs(children, 60)[1]


def goes_on(place, run, *more):
    "The command that the last sentence names."
    again = qlora_nb("train", "--resume", "run", *more, cwd=place)
    assert again.returncode == 0, again.stderr[-3000:]
    return place / "run"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=heavy) for seed in range(1, 20))])
def test_a_process_that_is_killed_ends_all_of_them(seed, whole, tmp_path):
    "At a random step, the one or the other: one sentence with its number and why; the run goes on to the same adapter."
    draw = random.Random(seed)
    process = Process(COMMAND, "train", *SHORT, "--gpus", "2", cwd=tmp_path)
    wait_for(process, tmp_path / "run/metrics.jsonl", draw.randint(1, 4))
    children = others(process.pid)
    assert len(children) == 1
    if first := draw.random() < 0.3:
        process.send_signal(signal.SIGKILL)
    else:
        children[0].kill()
    err = process.communicate(60)[1]
    assert_gone(children)
    if first:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 1 and "Traceback" not in err, err[-3000:]
        last = err.strip().splitlines()[-1]
        assert "process 1 of 2 (counted from 0) ended by SIGKILL" in last and "--resume" in last, last
    assert sha(goes_on(tmp_path, "run")) == sha(whole)


def test_ctrl_c_saves_one_checkpoint_and_one_process_goes_on(whole, tmp_path):
    process = Process(COMMAND, "train", *SHORT, "--gpus", "2", cwd=tmp_path)
    wait_for(process, tmp_path / "run/metrics.jsonl", 1)
    children = others(process.pid)
    process.send_signal(signal.SIGINT)
    err = process.communicate(120)[1]
    assert process.returncode == 130 and "checkpoint saved" in err.strip().splitlines()[-1], err[-3000:]
    assert_gone(children)
    run = goes_on(tmp_path, "run", "--gpus", "1")
    assert furthest(adapter(run), adapter(whole)) < 1e-5
    assert sha(run) != "" and json.loads((run / "summary.json").read_text())["steps"] == 6


@heavy
def test_a_run_of_one_process_goes_on_in_two(whole, tmp_path):
    "Begun by TRL's trainer, and continued by this package's loop; then it goes on by that in one process, too."
    process = Process(COMMAND, "train", *SHORT, cwd=tmp_path)
    wait_for(process, tmp_path / "run/metrics.jsonl", 3)
    process.send_signal(signal.SIGKILL)
    process.communicate(60)
    assert read_config(tmp_path / "run/config.yaml")["trained_by"] == "trl"
    run = goes_on(tmp_path, "run", "--gpus", "2")
    assert read_config(run / "config.yaml")["trained_by"] == "trl, then own"
    assert furthest(adapter(run), adapter(whole)) < 1e-5
    assert json.loads((run / "summary.json").read_text())["steps"] == 6
    more = qlora_nb("train", "--resume", "run", "--extend", "2", "--gpus", "1", cwd=tmp_path)
    assert more.returncode == 0 and "TRL" not in more.stderr, more.stderr[-3000:]
    assert read_config(run / "config.yaml")["trained_by"] == "trl, then own"
    assert json.loads((run / "summary.json").read_text())["steps"] == 8


@heavy
def test_a_run_that_is_watched_has_the_held_out_losses_of_one_process(tmp_path):
    found = {}
    for gpus in ("1", "2"):
        more = ["--eval-rows", "5", "--eval-steps", "3", "--gpus", gpus, "--output", gpus]
        done = qlora_nb("train", *SHORT, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [json.loads(line) for line in (tmp_path / gpus / "metrics.jsonl").read_text().splitlines()]
        found[gpus] = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(found["1"]) == 2 and max(abs(a - b) for a, b in zip(found["1"], found["2"], strict=True)) < 1e-5


@heavy
def test_a_scaled_run_is_stopped_and_resumed(tmp_path):
    short = [*SHORT, "--gradient-accumulation-steps", "2", "--eval-rows", "0", "--scale-batch"]
    process = Process(COMMAND, "train", *short, "--gpus", "2", cwd=tmp_path)
    wait_for(process, tmp_path / "run/metrics.jsonl", 1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(120)[0] is not None and process.returncode == 130
    refused = qlora_nb("train", "--resume", "run", "--gpus", "1", cwd=tmp_path)
    words = "started with --scale-batch in 2 processes, 8 rows a step; 1 would make it 4: resume it with --gpus 2"
    assert refused.returncode == 2 and words in refused.stderr.splitlines()[-1], refused.stderr[-3000:]
    run = goes_on(tmp_path, "run")
    config = read_config(run / "config.yaml")
    assert (config["processes"], config["scale_batch"], config["gradient_accumulation_steps"]) == (2, True, 2)
    assert json.loads((run / "summary.json").read_text())["steps"] == 6


@heavy
def test_ctrl_c_twice_ends_all_at_once(tmp_path):
    process = Process(COMMAND, "train", *SHORT, "--max-steps", "60", "--gpus", "2", cwd=tmp_path)
    wait_for(process, tmp_path / "run/metrics.jsonl", 1)
    children = others(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    err = process.communicate(60)[1]
    assert process.returncode == 130 and "Traceback" not in err, err[-3000:]
    assert_gone(children)


@heavy
def test_two_trainings_in_a_row(rows, tmp_path):
    "By the same processes: each builds the second model, too."
    found = []
    with start_workers(2) as workers:
        for number in range(2):
            model = add_lora(load_model("qlora_nb:embedded", backend="transformers", engine=False)[0], r=8)
            make(workers)(model, rows[1], rows[0], settings_of({"max_steps": 2}), tmp_path / str(number), []).train()
            found.append({name: p.detach().clone() for name, p in trainable_parameters(model).items()})
    assert all(torch.equal(found[0][name], weight) for name, weight in found[1].items())


@heavy
def test_a_signal_to_another_process_alone(whole, tmp_path):
    process = Process(COMMAND, "train", *SHORT, "--gpus", "2", cwd=tmp_path)
    wait_for(process, tmp_path / "run/metrics.jsonl", 1)
    others(process.pid)[0].send_signal(signal.SIGTERM)
    err = process.communicate(120)[1]
    last = err.strip().splitlines()[-1]
    assert process.returncode == 143 and "stopped by SIGTERM at step" in last and "checkpoint saved" in last, err[
        -3000:
    ]
    assert sha(goes_on(tmp_path, "run")) == sha(whole)


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(port, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return [*launcher, "-m", "qlora_nb", *arguments]


def launch(place, port, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        torchrun(port, *arguments), cwd=place, capture_output=True, text=True, timeout=300, env=environment
    )


@heavy
@pytest.mark.parametrize("who", ["launcher", "process 0", "process 1"])
def test_a_signal_under_torchrun_saves_one_checkpoint(who, tmp_path, port):
    "Whoever gets it; Slurm tells the launcher, a cluster each process."
    command = torchrun(port, "train", *SHORT, "--max-steps", "40", "--save-steps", "50", "--eval-rows", "0")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        metrics = tmp_path / "run/metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        started = [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
        by_rank = {f"process {child.environ()['RANK']}": child for child in started}
        ({"launcher": process} | by_rank)[who].send_signal(signal.SIGTERM)
        err = process.communicate(timeout=120)[1]
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("checkpoint-*")
    step = checkpoint.name.split("-")[1]
    assert f"stopped by SIGTERM at step {step}, checkpoint saved: resume it with" in err, err[-3000:]
    assert_gone(by_rank.values())


def srun(place, *arguments, tasks=2, **changed):
    "The tasks of a step on this machine, as Slurm starts them: return code, output and errors of each."
    step = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "here",
        "OMP_NUM_THREADS": "1",
    }
    started = []
    for rank in map(str, range(tasks)):
        task = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_NNODES": "1"}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "qlora_nb", *arguments], cwd=place, env={**step, **task, **changed},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, said)]


@heavy
def test_srun_starts_the_same_run(whole, tmp_path):
    first, second = srun(tmp_path, "train", *SHORT, "--gpus", "all")
    assert first[0] == second[0] == 0, (first[2][-3000:], second)
    assert "2 in each of 2 processes" in first[2] and second[1] == ""
    assert sha(tmp_path / "run") == sha(whole)


@heavy
def test_a_batch_script_starts_one_process(tmp_path):
    "Slurm's variables are there, too, and nobody else comes."
    short = ["--max-steps", "1", "--eval-rows", "0", "--limit", "20", "--gpus", "all", "--output", "run"]
    ((code, _, err),) = srun(tmp_path, "train", *short, tasks=1, SLURM_STEP_ID="4294967291", SLURM_NTASKS="4")
    assert code == 0 and "each of" not in err, err[-3000:]


@heavy
def test_a_step_that_trains_in_each_task_is_told_how_to_share(tmp_path):
    first, second = srun(tmp_path, "train", "--limit", "0")
    assert "srun has started 2 tasks, and each trains by itself: with --gpus all" in first[2]
    assert "srun" not in second[2] and first[0] == second[0] == 2 and "limit is 0" in second[2]


@heavy
@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--gpus", "3"),
        ("train", "--gpus", "all", "--help"),
        ("train", "--gpus", "all", "--data", "none.jsonl"),
    ],
)
def test_a_step_that_ends_early(arguments, tmp_path):
    "No task waits for process 0."
    first, second = srun(tmp_path, *arguments)
    assert (first[0], second[0]) == (0 if "--help" in arguments else 2, 0), (first, second)


@heavy
def test_torchrun_starts_the_same_run(whole, tmp_path, port):
    done = launch(tmp_path, port, "train", *SHORT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sha(tmp_path / "run") == sha(whole) and done.stdout.count(str(tmp_path / "run")) == 1


TWO_HOSTS = """
ip link set lo up && ip link add v0 type veth peer name v1 || exit 99
unshare -n sleep 300 & other=$!
until ip link set v1 netns $other 2> /dev/null && [ "$(nsenter -t $other -n ip -o link show v1)" ]; do sleep 0.1; done
ip addr add 10.77.0.1/24 dev v0; ip link set v0 up
nsenter -t $other -n sh -c "ip link set lo up; ip addr add 10.77.0.2/24 dev v1; ip link set v1 up"
(cd b; SLURM_PROCID=1 nsenter -t $other -n "$@") & task=$!
(cd a; SLURM_PROCID=0 "$@"); first=$?
wait $task; second=$?
kill $other
exit $((first + second))
"""


@heavy
def test_two_hosts_whose_names_stand_for_themselves_alone(whole, tmp_path):
    "Two network namespaces: each host's own name is its loopback's, at which gloo would listen."
    if shutil.which("ip") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("no network of one's own can be made here: needs Linux, ip and unshare")
    step = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    step |= {"SLURM_STEP_NODELIST": "10.77.0.[1-2]", "SLURM_LOCALID": "0", "OMP_NUM_THREADS": "1"}
    for name in "ab":
        (tmp_path / name).mkdir()
    command = ["unshare", "-rn", "bash", "-c", TWO_HOSTS, "hosts", sys.executable, "-m", "qlora_nb", "train", *SHORT]
    done = subprocess.run(
        [*command, "--gpus", "all"],
        cwd=tmp_path,
        env={**os.environ, **step},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sha(tmp_path / "a/run") == sha(whole) and not (tmp_path / "b/run").exists()


@heavy
@pytest.mark.parametrize("meeting", ["static", "c10d"])
def test_launchers_of_two_machines_start_one_run(meeting, whole, tmp_path, port):
    "Each in a folder of its own, as on another machine. The second way names the machine by its host name."
    static = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    where = static if meeting == "static" else ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    launchers = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        node = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number), *where]
        command = [sys.executable, "-m", "torch.distributed.run", *node, "-m", "qlora_nb", "train", *SHORT]
        launchers.append(
            subprocess.Popen(
                command, cwd=tmp_path / str(number), env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    said = [launcher.communicate(timeout=300) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    (run,) = tmp_path.glob("*/run")
    assert sha(run) == sha(whole) and sum("2 in each of 2 processes" in err for _, err in said) == 1


@heavy
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "no-such-file.jsonl"),
        ("--version",),
        ("train", "--max-steps", "0"),
        ("train", "--gpus", "3"),
        ("train", "--help"),
        ("check", "train"),
    ],
)
def test_torchrun_with_a_command_that_ends_early(arguments, tmp_path, port):
    "No process waits for one that has left."
    done = launch(tmp_path, port, *arguments)
    assert (done.returncode == 0) == (arguments[-1] in ("--version", "--help")), done.stderr[-3000:]
