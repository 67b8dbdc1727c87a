"""The loop against TRL's trainer, bit for bit: fresh and resumed, packed and not, and what callbacks hear of either."""

import copy
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from repository import real_file
from transformers import TrainerCallback, set_seed

from qlora_nb import loop
from qlora_nb.adapter import set_model_info
from qlora_nb.core import PROFILES, UserError
from qlora_nb.loop import OTHER_LOOPS, check_checkpoint, find_loop, make_loop, make_optimizer
from qlora_nb.manifest import read_manifest, write_manifest
from qlora_nb.model import add_lora, load_model
from qlora_nb.preflight import encode_dataset
from qlora_nb.rows import load_sft_dataset
from qlora_nb.run import RunFolder, read_config, resolve_settings
from qlora_nb.safeguards import TrainingDiverged, make_sealer
from qlora_nb.signals import TrainingInterrupted
from qlora_nb.trainer import make_trainer, trainable_parameters, trainer_arguments
from qlora_nb.training import make_stop_watch, make_watch, run_trainer
from qlora_nb.workflow import train

heavy = pytest.mark.heavy
TINY = PROFILES["tiny"]
# Seven rows: the last micro-batch of an epoch has one, and an epoch is a step of three micro-batches and one of one.
UNEVEN = {
    "max_steps": 4, "warmup_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
    "save_steps": 1, "save_total_limit": 9,
}  # fmt: skip
ENGINE = {"engine": True}
PACKED = {**ENGINE, "packing": True, "max_seq_length": 256, "per_device_train_batch_size": 1}


@pytest.fixture(scope="module")
def rows():
    tokenizer = load_model("qlora_nb:embedded", backend="transformers")[1]
    return encode_dataset(load_sft_dataset(limit=7), tokenizer)[0], tokenizer


def train_by(
    make, rows, path, resume=None, callbacks=(), held_out=None, engine=False, dropout=0.1, again=False, **settings
):
    "The trainer after its run, with its history (no times) and the adapter's numbers. `again`: layers run again."
    model = load_model("qlora_nb:embedded", backend="transformers", engine=engine)[0]
    model = add_lora(model, r=8, lora_dropout=0.0 if engine else dropout, use_gradient_checkpointing=again)
    given = {**UNEVEN, **settings}
    if "num_train_epochs" in given:
        del given["max_steps"]
    settings = resolve_settings(given, profile=TINY)
    made = make(model, rows[1], rows[0], settings, path, list(callbacks), held_out)
    if resume:
        set_seed(1)  # what a resumed run draws comes from its checkpoint
    made.train(resume_from_checkpoint=resume and str(resume))
    made.weights = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    made.history = [{k: v for k, v in row.items() if k not in timed} for row in made.state.log_history]
    return made


def assert_same(ours, theirs):
    assert ours.history == theirs.history and ours.history
    assert (ours.tokens, ours.targets, ours.positions) == (theirs.tokens, theirs.targets, theirs.positions)
    assert ours.weights.keys() == theirs.weights.keys()
    assert all(torch.equal(ours.weights[name], weight) for name, weight in theirs.weights.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adamw_torch", "logging_steps": 3},
        {"optim": "adamw_8bit", **PACKED},
        pytest.param({"optim": "sgd", **ENGINE}, marks=heavy),
        pytest.param({"optim": "sgd", "again": True}, marks=heavy),
        pytest.param({"optim": "adamw_torch", **ENGINE, "again": True}, marks=heavy),
        pytest.param({"optim": "adamw_8bit"}, marks=heavy),
        pytest.param({"optim": "adafactor", "num_train_epochs": 1.5, "lr_scheduler_type": "cosine"}, marks=heavy),
        pytest.param({"optim": "adamw_torch", **PACKED}, marks=heavy),
        pytest.param({"optim": "paged_adamw_8bit"}, marks=heavy),
        pytest.param({"optim": "lion_8bit", "max_grad_norm": 0.1}, marks=heavy),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_losses_norms_and_weights_are_trls(rows, tmp_path, settings):
    "Step by step; then each is resumed by the other, within an epoch and at its end (TRL's not from one tensor)."
    theirs = train_by(make_trainer, rows, tmp_path / "trl", **settings)
    ours = train_by(make_loop, rows, tmp_path / "own", **settings)
    assert_same(ours, theirs)
    assert bool(ours.flat) == ("engine" in settings)
    steps = 1 if settings["optim"] == "adamw_torch" else 2
    for make, begun in ((make_loop, "trl"), *([] if ours.flat else [(make_trainer, "own")])):
        again = train_by(make, rows, tmp_path / "again", tmp_path / begun / f"checkpoint-{steps}", **settings)
        assert all(torch.equal(again.weights[name], weight) for name, weight in theirs.weights.items())
        rows_of = [[row for row in made.history if "loss" in row] for made in (again, theirs)]
        assert rows_of[0] == rows_of[1] or "logging_steps" in settings  # a mean over steps is one of this sitting's


class Events(TrainerCallback):
    "Writes down every event, with what is wanted then, and `ask` says what to ask for in it."

    def __init__(self, ask=lambda event, state, control: None):
        self.heard, self.ask = [], ask

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return object.__getattribute__(self, name)

        def on_event(args, state, control, logs=None, metrics=None, **kwargs):
            numbers = {
                k: v
                for k, v in (logs or {}).items()
                if "_per_second" not in k and k not in ("train_runtime", "total_flos")
            }
            self.heard.append(
                (name, state.global_step, state.epoch, dict(vars(control)), numbers, metrics, sorted(kwargs))
            )
            return self.ask(name, state, control)

        return on_event


@pytest.mark.parametrize(
    "ask, settings",
    [
        (
            None,
            {
                "eval_steps": 2,
                "gradient_accumulation_steps": 1,
                "max_steps": 3,
                "lr_scheduler_type": "reduce_lr_on_plateau",
            },
        ),
        pytest.param(("on_step_end", 2, "should_training_stop"), {}, marks=heavy),
        pytest.param(("on_step_end", 1, "should_epoch_stop"), {}, marks=heavy),
        pytest.param(("on_step_end", 2, "should_save"), {"save_steps": 50}, marks=heavy),
    ],
)
def test_callbacks_hear_what_trls_trainer_says(rows, tmp_path, ask, settings):
    def want(event, state, control):
        if ask and (event, state.global_step) == ask[:2]:
            setattr(control, ask[2], True)

    heard, states = {}, {}
    for make in (make_trainer, make_loop):
        events, losses = Events(want), iter([3.0, 2.0, 2.5])
        how = {
            "callbacks": [events],
            "held_out": (lambda losses=losses: {"eval_loss": next(losses)}) if "eval_steps" in settings else None,
        }
        made = train_by(make, rows, tmp_path / make.__name__, **how, **settings)
        heard[make], states[make] = (
            events.heard,
            (made.state.best_metric, made.state.best_global_step, made.state.epoch, made.state.global_step),
        )
    assert heard[make_loop] == heard[make_trainer] and len(heard[make_loop]) > 10
    assert states[make_loop] == states[make_trainer] and (ask or states[make_loop][:2] == (2.0, 3))
    saved = [sorted(path.name for path in (tmp_path / make.__name__).glob("checkpoint-*")) for make in heard]
    assert saved[0] == saved[1] and saved[0]


def test_rows_logged_late_are_the_same(rows, tmp_path, monkeypatch):
    "As on a GPU: a step later, but before a checkpoint is written, and all of them at the end."
    written = {}
    for late in ((), ("cpu",)):
        monkeypatch.setattr(loop, "LATE_LOGGING_DEVICES", late)
        events = Events()
        made = train_by(make_loop, rows, tmp_path / str(len(late)), callbacks=[events], save_steps=3, dropout=0.0)
        written[late] = (
            made,
            [(name, step) for name, step, *_ in events.heard if name in ("on_log", "on_step_begin", "on_save")],
        )
    now, a_step_later = written.values()
    assert_same(now[0], a_step_later[0])
    assert now[1][:4] == [("on_step_begin", 0), ("on_log", 1), ("on_step_begin", 1), ("on_log", 2)]
    assert a_step_later[1][:4] == [("on_step_begin", 0), ("on_step_begin", 1), ("on_log", 1), ("on_step_begin", 2)]
    assert a_step_later[1].index(("on_log", 3)) < a_step_later[1].index(("on_save", 3))


class Silent:
    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def test_a_signal_and_the_tripwire_end_the_loop_as_they_end_trls(rows, tmp_path):
    class Act(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                act(model)

    def go(name):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        model = add_lora(load_model("qlora_nb:embedded", backend="transformers")[0], r=8)
        settings = resolve_settings({**UNEVEN, "save_steps": 50}, profile=TINY)
        watch = make_watch(folder, Silent())
        made = make_loop(
            model,
            rows[1],
            rows[0],
            settings,
            folder.checkpoint_folder,
            [Act(), watch, make_stop_watch(interrupted), make_sealer(folder, {}, settings)],
        )
        run_trainer(made, watch, Silent(), folder, interrupted, None)

    interrupted, act = [], lambda model: interrupted.append(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="stopped at step 2, checkpoint saved"):
        go("signal")
    assert [row["step"] for row in RunFolder(tmp_path / "signal").metrics] == [1, 2]
    assert [path.name for path in RunFolder(tmp_path / "signal").checkpoints] == ["checkpoint-2"]
    interrupted, act = [], lambda model: [p.data.fill_(math_nan) for p in trainable_parameters(model).values()]
    math_nan = float("nan")
    with pytest.raises(TrainingDiverged, match="stopped at step 3, where the loss is nan"):
        go("diverged")
    assert json.loads((tmp_path / "diverged/stopped.json").read_text())["last_good"] == 1


def test_a_run_by_the_loop_is_the_run_by_trl(tmp_path):
    "All of `train`: the adapter's hash, the rows of metrics, the loss before and after; and the choice is recorded."
    runs = {}
    how = {
        "max_steps": 4,
        "warmup_steps": 1,
        "eval_rows": 4,
        "max_new_tokens": 8,
        "eval_steps": 2,
        "early_stopping": 1,
        "save_steps": 2,
    }
    for choice in ("trl", "own"):
        model, tokenizer = load_model("qlora_nb:embedded", backend="transformers")
        runs[choice] = train(
            add_lora(model, r=8), tokenizer, load_sft_dataset(limit=40), output=tmp_path / choice, loop=choice, **how
        )
    trl, own = runs.values()
    for name in (
        "adapter_sha256",
        "before",
        "after",
        "best_step",
        "best_eval_loss",
        "adapter_step",
        "mean_loss",
        "last_loss",
    ):
        assert own.summary[name] == trl.summary[name], name
    measured = ("tokens_per_second", "peak_allocated")
    bare = [[{k: v for k, v in row.items() if k not in measured} for row in run.metrics] for run in (trl, own)]
    assert bare[0] == bare[1] and read_config(own.path / "config.yaml")["trained_by"] == "own"
    files = [{str(file.relative_to(run.path)) for file in run.path.rglob("*")} for run in (trl, own)]
    assert files[0] == files[1]


@heavy
@pytest.mark.parametrize("four_bit", [False, True])
def test_a_real_model_learns_the_same(tmp_path, four_bit):
    found, folder = [], real_file("smollm2/config.json").parent
    how = {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    how |= {"eval_rows": 1, "max_new_tokens": 2}
    for choice in ("trl", "own"):
        model, tokenizer = load_model(folder, load_in_4bit=four_bit, backend="transformers")
        data = load_sft_dataset(limit=60)
        run = train(add_lora(model, r=8), tokenizer, data, output=tmp_path / choice, loop=choice, **how)
        found.append((run.summary["adapter_sha256"], [(row["loss"], row["grad_norm"]) for row in run.metrics]))
    assert found[0] == found[1]


@heavy
def test_a_stopped_run_of_the_loop_goes_on(tmp_path):
    def go(output=None, **more):
        model, tokenizer = load_model("qlora_nb:embedded", backend="transformers")
        return train(
            add_lora(model, r=8, lora_dropout=0.1), tokenizer, load_sft_dataset(limit=40), output=output, **more
        )

    how = {"max_steps": 4, "warmup_steps": 1, "eval_rows": 0, "save_steps": 2, "loop": "own", "save_total_limit": 2}
    whole = go(tmp_path / "run", **how)
    checkpoints = sorted(RunFolder(whole.path).checkpoint_folder.iterdir())
    assert [path.name for path in checkpoints] == ["checkpoint-2", "checkpoint-4"]
    (whole.path / "summary.json").unlink()
    for file in checkpoints[1].iterdir():
        file.unlink()
    checkpoints[1].rmdir()
    again = go(resume=whole.path)
    assert again.summary["adapter_sha256"] == whole.summary["adapter_sha256"] and again.summary["resumed_at"] == [2]


def test_what_the_loop_lacks_is_refused_before_the_run(tmp_path):
    model, tokenizer = load_model("qlora_nb:embedded", backend="transformers")
    model, data = add_lora(model, r=8), load_sft_dataset(limit=20)
    with pytest.raises(UserError, match="optim is 'galore_adamw', which loop='own' can't train with"):
        train(model, tokenizer, data, output=tmp_path / "run", loop="own", optim="galore_adamw")
    with pytest.raises(UserError, match="loop is 'mine': choose own or trl"):
        train(model, tokenizer, data, output=tmp_path / "run", loop="mine")
    assert not (tmp_path / "run").exists()
    unlabelled = encode_dataset(data, tokenizer)[0].map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(UserError, match="no row has a token with a label"):
        make_loop(model, tokenizer, unlabelled, resolve_settings({}, profile=TINY), tmp_path, [])


@pytest.fixture(scope="module")
def engine_run(tmp_path_factory):
    "A finished run of three steps with the engine, and how to go on with one."
    path = tmp_path_factory.mktemp("engine") / "run"

    def go(resume=None, **more):
        model, tokenizer = load_model("qlora_nb:embedded", backend="transformers", engine=True)
        how = {"resume": resume} if resume else {"output": path, "max_steps": 3, "warmup_steps": 1, "eval_rows": 0}
        data = load_sft_dataset(limit=40)
        return train(add_lora(model, r=8), tokenizer, data, **({} if resume else {"save_steps": 2}), **how, **more)

    return go(), go


def stopped_copy(run, place):
    "As a run that was killed before its last checkpoint."
    folder = RunFolder(shutil.copytree(run.path, place / "copy"))
    (folder.path / "summary.json").unlink()
    (folder.path / "manifest.json").unlink()
    shutil.rmtree(folder.checkpoints[0])
    return folder


def test_a_run_with_the_engine_says_what_trained_it_and_a_run_of_before_goes_on(engine_run, tmp_path):
    "Runs recorded loop: trl, the default, before the engine had this loop; their adapters were one tensor, too."
    run, go = engine_run
    folder = stopped_copy(run, tmp_path)
    config = dict(folder.config)
    assert (config["loop"], config["trained_by"]) == (None, "own")
    del config["trained_by"]
    folder.write("config.yaml", {**config, "loop": "trl"})
    checkpoint = folder.checkpoints[0]
    found = read_manifest(checkpoint)
    settings = {name: value for name, value in found["settings"].items() if name != "trained_by"}
    extra = {name: value for name, value in found.items() if name not in ("files", "checksum")}
    write_manifest(checkpoint, {**extra, "settings": {**settings, "loop": "trl"}})
    again = go(folder.path)
    assert again.summary["adapter_sha256"] == run.summary["adapter_sha256"]
    assert RunFolder(again.path).config["trained_by"] == "own"


def test_what_trained_a_run_goes_on_with_it(engine_run, tmp_path):
    run, go = engine_run
    folder = stopped_copy(run, tmp_path)
    with pytest.raises(UserError, match="loop is 'trl', but the run was started with 'own'"):
        go(folder.path, loop="trl")
    config = dict(folder.config)
    for name, old in (("trained_by", "own"), ("loop", None)):
        folder.write("config.yaml", {**config, name: "trl"})
        with pytest.raises(UserError, match=f"{name} is 'trl' in .*, but checkpoint-2 was trained with {old!r}"):
            go(folder.path)
    model, _ = load_model("qlora_nb:embedded", backend="transformers", engine=True)
    model = add_lora(model, r=8)
    for loop_, optim in (("trl", "sgd"), ("own", "adafactor")):
        with pytest.raises(UserError, match="holds all adapters in one tensor, but now .* by itself .*: start anew"):
            check_checkpoint(model, loop_, optim, folder.checkpoints[0], "start anew")
    check_checkpoint(model, "own", "sgd", folder.checkpoints[0], "start anew")
    set_model_info(model, backend="unsloth")
    assert find_loop(resolve_settings({}), model) == "trl"


def test_nothing_is_cached_while_it_trains(rows, tmp_path):
    "Keys and values are for generating; and the setting is as before afterwards."
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            layer = model.get_base_model().model.layers[0].self_attn
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs.get("past_key_values")), with_kwargs=True
            )

    made = train_by(make_loop, rows, tmp_path / "run", callbacks=[Look()], **ENGINE)
    assert seen and set(seen) == {None} and made.model.config.use_cache


def test_an_evaluation_that_is_nan_is_never_the_best(rows, tmp_path):
    best = []
    for make in (make_trainer, make_loop):
        losses = iter([float("nan"), 2.0, 1.0, 3.0])
        held_out = lambda losses=losses: {"eval_loss": next(losses)}  # noqa: E731
        made = train_by(make, rows, tmp_path / make.__name__, held_out=held_out, eval_steps=1)
        best.append((made.state.best_metric, made.state.best_global_step))
    assert best == [(1.0, 3)] * 2


def test_what_a_callback_asks_for_when_it_hears_of_a_late_row(rows, tmp_path, monkeypatch):
    "The checkpoint has the rows of its own steps, too."
    monkeypatch.setattr(loop, "LATE_LOGGING_DEVICES", ("cpu",))

    def ask(event, state, control):
        if (event, state.global_step) == ("on_log", 1):
            control.should_save = True

    train_by(make_loop, rows, tmp_path / "run", callbacks=[Events(ask)], save_steps=50)
    state = json.loads((tmp_path / "run/checkpoint-2/trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"]] == [1, 2]


def test_a_callback_that_asks_for_an_evaluation_without_rows(rows, tmp_path):
    def ask(event, state, control):
        control.should_evaluate |= event == "on_step_end"

    with pytest.raises(UserError, match="no rows are held out for one while it trains: give eval_steps="):
        train_by(make_loop, rows, tmp_path / "run", callbacks=[Events(ask)])


def test_the_last_row_and_the_special_tokens_are_trls(rows, tmp_path):
    last, ends = [], []
    for make in (make_trainer, make_loop):
        tokenizer = copy.deepcopy(rows[1])
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(200)
        made = train_by(make, (rows[0], tokenizer), tmp_path / make.__name__, max_steps=1)
        last.append(set(made.state.log_history[-1]) - {"total_flos"})
        ends.append((made.model.config.eos_token_id, made.model.generation_config.eos_token_id))
    assert (
        last[0] == last[1]
        and ends[0] == ends[1]
        and 200 in (ends[0][1] if isinstance(ends[0][1], list) else [ends[0][1]])
    )


def test_a_loop_that_trains_twice(rows, tmp_path):
    "The second time from where the first ended, with one optimizer."
    made = train_by(make_loop, rows, tmp_path / "run", max_steps=2)
    made.train()
    assert len(made.accelerator._optimizers) == 1 and made.state.global_step == 2


def test_every_other_optimizer_is_one_that_only_steps():
    "transformers' list, as far as packages are installed: what isn't refused is a class that takes groups of weights."
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    model, tried = add_lora(load_model("qlora_nb:embedded", backend="transformers")[0], r=8), []
    for name in (choice.value for choice in OptimizerNames if not choice.value.startswith(OTHER_LOOPS)):
        arguments = trainer_arguments(resolve_settings({"optim": name}), Path("unused"), torch.float32, False)
        try:
            kind, given = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        except (ImportError, ValueError):  # its package isn't installed, or it wants another device
            continue
        assert issubclass(kind, torch.optim.Optimizer) and not {"params", "model", "optimizer_dict"} & set(given), name
        tried.append(name)
    assert {"adamw_torch", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "sgd", "adafactor", "rmsprop"} <= set(tried)
    optimizer, flat = make_optimizer(
        model, trainer_arguments(resolve_settings({}), Path("unused"), torch.float32, False), in_one_tensor=True
    )
    assert flat is not None and [len(group["params"]) for group in optimizer.param_groups] == [
        1 + 56 - len(flat.weights)
    ]


def test_another_trainer_broken_off_in_a_step_leaves_no_trace(rows, tmp_path):
    "Accelerate keeps one state for a whole process: whether gradients are complete. If not, a step does nothing."
    from accelerate.state import GradientState

    whole = train_by(make_loop, rows, tmp_path / "whole", max_steps=2, dropout=0.0)
    GradientState().sync_gradients = False
    again = train_by(make_loop, rows, tmp_path / "again", max_steps=2, dropout=0.0)
    assert_same(again, whole)
