"""Each trouble is provoked by a real run and named; a healthy run gives no finding; the rules, from both sides."""

import dataclasses
import json
import random
import shutil
from unittest.mock import patch

import pytest
import torch

from qlora_nb.core import UserError, write_json, write_jsonl
from qlora_nb.diagnosis import (
    DIAGNOSIS_RULES,
    diagnose,
    find_absurd_loss,
    find_divergence,
    find_early_end,
    find_endless_replies,
    find_falling_loss,
    find_flat_loss,
    find_forgetting,
    find_gradient_trouble,
    find_lost_rows,
    find_memory_trouble,
    find_nan,
    find_no_gain,
    find_odd_replies,
    find_overfitting,
    find_slow_steps,
    find_zero_loss,
)
from qlora_nb.evidence import EXPLAINED_CODES, average_fifths, read_evidence
from qlora_nb.run import copy_embedded_run

USUAL = {
    "per_device_train_batch_size": 4, "eval_rows": 8, "max_new_tokens": 64, "max_steps": 20, "learning_rate": 2e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    from qlora_nb.rows import load_sft_dataset

    return load_sft_dataset(split="train"), load_sft_dataset(split="heldout")


@pytest.fixture(scope="module")
def spoil(data, tmp_path_factory):
    "A real run in a folder of its own, and its diagnosis."
    from qlora_nb import preparation, workflow
    from qlora_nb.model import add_lora, load_model

    torch.set_num_threads(1)

    def make(rows=None, change=None, collator=None, fails=(), **settings):
        model, tokenizer = load_model("qlora_nb:embedded", backend="transformers", max_seq_length=256)
        output, encode = tmp_path_factory.mktemp("run") / "run", preparation.encode_conversations

        def changed(*arguments, **more):
            found = encode(*arguments, **more)
            return dataclasses.replace(found, rows=found.rows.map(change)) if change else found

        try:
            with patch.object(preparation, "encode_conversations", changed):
                workflow.train(
                    add_lora(model), tokenizer, data[0] if rows is None else rows, eval_data=data[1], output=output,
                    check=False, **{**USUAL, **settings},
                )  # fmt: skip
            assert not fails, f"training should have failed with {fails}"
        except fails:
            pass
        return diagnose(output)

    return make


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    "The run that comes with the package."
    return diagnose(copy_embedded_run(tmp_path_factory.mktemp("healthy")))


# --- real runs ------------------------------------------------------------------------------------------------------


def test_the_run_of_the_package_forgets_a_little(healthy):
    "300 steps at a high rate: what the base could do is predicted worse, and nothing else is found."
    assert [(f.code, f.severity) for f in healthy.findings] == [("forgetting", "info")] and healthy.ok
    assert healthy.evidence.of("after", "loss") < 0.5 * healthy.evidence.of("before", "loss")


@pytest.mark.heavy
def test_a_healthy_run_gives_no_finding(spoil):
    found = spoil(per_device_train_batch_size=8, max_steps=60, learning_rate=1e-3)
    assert found.codes == [] and found.ok
    assert found.table() == "no findings" and "no findings" in found._repr_html_()
    assert found.evidence.of("after", "loss") < 0.5 * found.evidence.of("before", "loss")


def test_a_rate_of_ten_diverges(spoil):
    found = spoil(learning_rate=10.0)
    assert found.codes == ["diverging"] and not found.ok
    assert "learning rate 10" in found.findings[0].cause and "lower the learning rate" in found.findings[0].fix


@pytest.mark.heavy
def test_a_rate_of_a_millionth_is_flat(spoil):
    found = spoil(learning_rate=1e-6)
    assert found.codes == ["flat"] and "raise the learning rate" in found.findings[0].fix


@pytest.mark.heavy
def test_rows_learnt_by_heart(spoil, data):
    found = spoil(rows=data[0].select(range(16)), max_steps=60, learning_rate=5e-3, max_new_tokens=96)
    assert "overfitting" in found.codes and not found.ok
    trouble = next(f for f in found.findings if f.code == "overfitting")
    assert "memorised" in trouble.cause and "epochs" in trouble.fix


@pytest.mark.heavy
def test_replies_that_lost_their_end(spoil):
    def half(row):
        learned = [i for i, label in enumerate(row["labels"]) if label != -100]
        return {name: row[name][: learned[len(learned) // 2]] for name in ("input_ids", "labels")}

    found = spoil(change=half, max_steps=40, learning_rate=5e-3)
    assert "never_stops" in found.codes and "overfitting" not in found.codes
    assert found.findings[0].severity == "error"


@pytest.mark.heavy
def test_a_limit_that_is_too_short_is_another_trouble(spoil):
    found = spoil(max_new_tokens=8)
    assert "limit_too_short" in found.codes and "never_stops" not in found.codes
    trouble = next(f for f in found.findings if f.code == "limit_too_short")
    longest = max(row["tokens"] for row in found.evidence.replies if row["stage"] == "after")
    assert trouble.fix.startswith(f"raise max_new_tokens to at least {longest}")


@pytest.mark.heavy
def test_a_base_that_forgets(spoil):
    found = spoil(learning_rate=1e-2, max_steps=40)
    assert "forgetting" in found.codes
    trouble = next(f for f in found.findings if f.code == "forgetting")
    after = found.evidence.of("after", "base_perplexity")
    assert f"{after:.4g}" in trouble.cause
    assert trouble.severity == ("warning" if after > 10 * found.evidence.of("before", "base_perplexity") else "info")


def test_a_loss_that_is_no_number(spoil):
    found = spoil(learning_rate=4e9, warmup_steps=0, max_steps=12, fails=(UserError,))
    assert found.evidence.stopped, "train says why it stopped"
    assert found.codes == ["nan_loss"] and "lower the learning rate" in found.findings[0].fix


def test_masked_labels(spoil):
    "Only the first token keeps a label, and the loss looks at none before the second: there is nothing to learn."
    found = spoil(
        change=lambda row: {"labels": [row["input_ids"][0], *[-100] * (len(row["labels"]) - 1)]},
        max_steps=12, fails=(UserError, ValueError),
    )  # fmt: skip
    assert found.evidence.stopped, "train says why it stopped"
    assert set(found.codes) & {"zero_loss", "nan_loss"}, found.codes
    assert "labels" in found.findings[0].fix
    assert found.findings[0].severity == "error"


@pytest.mark.heavy
def test_most_rows_left_out(spoil, data):

    found = spoil(max_seq_length=120, max_steps=4)
    assert found.evidence.data("rows") and found.evidence.data("left_out")
    assert "rows_left_out" in found.codes
    assert "max_seq_length=120" in str(found)


@pytest.mark.heavy
def test_padding(spoil, data):
    "One row of four is ten times as long as the others."
    import datasets

    short = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7"}]
    long = [{"role": "user", "content": "What is 3 + 4? " * 20}, {"role": "assistant", "content": "7"}]
    rows = datasets.Dataset.from_list([{"messages": long if i % 8 == 0 else short} for i in range(400)])
    found = spoil(rows=rows, per_device_train_batch_size=16, max_steps=6)
    assert found.evidence.data("padding") > 0.5 and "padding" in found.codes


@pytest.mark.heavy
def test_a_loader_that_is_waited_for(spoil):
    import time

    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Collator

    collate = Collator.torch_call

    def slowly(self, examples):
        time.sleep(0.5)
        return collate(self, examples)

    with patch.object(Collator, "torch_call", slowly):
        found = spoil(max_steps=6)
    assert found.evidence.summary["loader_seconds"] >= 5 * 0.5  # between six steps lie five waits
    assert "slow_loader" in found.codes


def test_a_run_that_was_stopped(healthy, tmp_path):
    "As Ctrl-C leaves it: settings and some steps, no summary."
    path = copied(healthy, tmp_path)
    (path / "summary.json").unlink()
    lines = (path / "metrics.jsonl").read_text().splitlines()[:30]
    (path / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:20]]))
    found = diagnose(path)
    assert "unfinished" in found.codes and found.ok
    assert "step 30 of 300" in str(found)


# --- the records of a GPU, added to a real run ----------------------------------------------------------------------


def copied(found, folder):
    "A copy of a run, to be changed on purpose."
    path = shutil.copytree(found.evidence.path, folder / "copy")
    (path / "manifest.json").unlink()
    return path


@pytest.mark.parametrize(
    "peak, checkpointing, codes",
    [
        (0.95, "unsloth", ["memory_full"]), (0.7, "unsloth", []), (0.3, "unsloth", ["memory_idle", "checkpointing"]),
        (0.3, False, ["memory_idle"]),
    ],
)  # fmt: skip
def test_memory(healthy, peak, checkpointing, codes):
    card = 16 * 2**30
    seen = changed(
        healthy.evidence, summary={**healthy.evidence.summary, "device_bytes": card},
        config={**healthy.evidence.config, "use_gradient_checkpointing": checkpointing},
        metrics=[{**row, "peak_allocated": int(peak * card)} for row in healthy.evidence.metrics],
    )  # fmt: skip
    found = find_memory_trouble(seen)
    assert [f.code for f in found] == codes
    if codes:
        assert "of 16.0 GiB" in found[0].cause


def changed(evidence, **values):
    return dataclasses.replace(evidence, **values)


# --- the rules, from both sides -------------------------------------------------------------------------------------


def run_of(healthy, losses, norms=None, rate=1e-3):
    norms = norms or [0.5] * len(losses)
    rows = [
        {"step": i, "loss": loss, "learning_rate": rate, "grad_norm": norm, "peak_allocated": None}
        for i, (loss, norm) in enumerate(zip(losses, norms), 1)
    ]
    return changed(healthy.evidence, metrics=rows)


def made_run(healthy, folder, losses, before, after, replies=(), **summary):
    "A run's folder with these losses, figures and replies."
    path = copied(healthy, folder)
    steps = [{"step": i, "loss": loss, "learning_rate": 1e-3, "grad_norm": 0.5} for i, loss in enumerate(losses, 1)]
    write_jsonl(path / "metrics.jsonl", steps)
    write_jsonl(path / "evaluation.jsonl", replies)
    old = json.loads((path / "summary.json").read_text())
    figures = {"exact": None, "form": None, "base_perplexity": None}
    write_json(
        path / "summary.json",
        {**old, "before": {**figures, "stops": 1.0, **before}, "after": {**figures, "stops": 1.0, **after}, **summary},
    )
    return diagnose(path)


@pytest.mark.parametrize(
    "losses, before, after, vocab, codes, said",
    [
        ([12.8, 12.79], 12.81, 12.8, 128_256, ["absurd_loss"], "the base doesn't understand the rows"),
        ([12.8] * 30, 12.8, 12.8, None, ["absurd_loss"], "12.8 before training already"),
        ([2.5, 6.0, 9.0, *[12.8] * 27], 2.6, 12.8, 32_000, ["diverging"], "learning rate"),
        ([2.5, 13.0, 12.8], 2.6, 12.8, 32_000, ["absurd_loss"], "so the training broke it"),
        ([10.4] * 4, 10.5, 10.4, 49_152, ["absurd_loss"], "10.8"),
        ([2.6, 2.4, 2.2], 2.6, 3.4, 49_152, ["heldout_rose"], "training made it worse"),
        ([2.6, 2.4, 2.2], 2.6, 4.4, 49_152, ["heldout_rose"], "was 2.6"),
        ([6.2, 5.9, 5.7], 6.2, 5.8, 49_152, [], ""),
    ],
)  # fmt: skip
def test_a_loss_that_is_absurd(healthy, tmp_path, losses, before, after, vocab, codes, said):
    found = made_run(healthy, tmp_path, losses, {"loss": before}, {"loss": after}, vocab_size=vocab)
    assert found.codes == codes and said in str(found) and found.ok is not bool(codes)


def test_far_above_ordinary_text(healthy, tmp_path):
    base = {"base_perplexity": 20.0, "base_text": "general text (24 passages, 10 languages)"}
    found = made_run(healthy, tmp_path, [8.0, 7.9], {"loss": 8.1, **base}, {"loss": 7.7, **base}, vocab_size=49_152)
    assert found.codes == ["absurd_loss"] and "ordinary text has 3 with this base" in found.findings[0].cause
    assert find_absurd_loss(changed(found.evidence, metrics=[], summary={})) is None


@pytest.mark.parametrize(
    "replies, codes",
    [
        ([("hello", False), ("hello", False)], ["same_replies", "score_constant"]),
        ([("", False), ("", False)], ["empty_replies", "score_constant"]),
        ([("spam", False), ("ham", True)], []),
    ],
)
def test_replies_that_tell_nothing(healthy, tmp_path, replies, codes):
    rows = [
        {"stage": stage, "stops": True, "expected": f"label {i % 3}"}
        for stage in ("before", "after")
        for i in range(12)
    ]
    for i, row in enumerate(rows):
        row["reply"], row["exact"] = replies[i % 2]
    found = made_run(healthy, tmp_path, [2.6, 2.4, 2.2], {"loss": 2.6}, {"loss": 2.0}, rows)
    assert found.codes == codes
    assert find_odd_replies(changed(found.evidence, replies=[])) == []


def test_replies_that_never_stopped(healthy, tmp_path):
    rows = [
        {"stage": stage, "stops": False, "reply": str(i), "tokens": 9}
        for stage in ("before", "after")
        for i in range(12)
    ]
    found = made_run(healthy, tmp_path, [2.6, 2.4, 2.2], {"loss": 2.6, "stops": 0.0}, {"loss": 2.0, "stops": 0.0}, rows)
    assert found.codes == ["never_stops"] and "100% didn't before training" in str(found)


@pytest.mark.quick
def test_fifths():
    assert average_fifths([1.0] * 9) == []
    assert average_fifths([float(i) for i in range(13)]) == pytest.approx([1.0, 3.5, 6.0, 8.5, 11.0], abs=0.6)
    assert len(average_fifths([1.0] * 11)) == 5


def test_losses_from_both_sides(healthy):
    down = [3.5 * 0.97**i + 0.3 for i in range(60)]
    assert not find_divergence(run_of(healthy, down)) and not find_flat_loss(run_of(healthy, down))
    assert find_divergence(run_of(healthy, down[:40] + [0.9 + 0.1 * i for i in range(20)]))
    assert find_divergence(run_of(healthy, [3.5, 3.6] + [4.2] * 28)), "above where it began, from the second step on"
    burst = [3.5, 3.4, 8.5, 7.4, 9.8, 5.8, 5.7, 5.7, 5.4, *[5.2] * 11]
    assert find_divergence(run_of(healthy, burst)), "the rise itself is not its noise"
    assert find_flat_loss(run_of(healthy, [3.5 + 0.02 * (i % 3) for i in range(30)]))
    assert not find_flat_loss(run_of(healthy, [0.01] * 30)), "a loss of nearly nothing can't fall"
    assert not find_flat_loss(run_of(healthy, [3.5] * 9)), "nine steps tell nothing"
    assert find_falling_loss(run_of(healthy, [4 * 0.93**i for i in range(50)]))
    assert not find_falling_loss(run_of(healthy, down))
    frozen = find_flat_loss(run_of(healthy, [3.5] * 30, norms=[0.0] * 30))
    assert "no weight gets a gradient" in frozen.cause and "trainable" in frozen.fix


def test_noise_is_no_divergence(healthy):
    "Sixty steps around 1.2 that neither fall nor rise: two lucky ones at the start make no rise of the others."
    draw, alarms, quiet = random.Random(0), 0, 0
    for _ in range(200):
        seen = run_of(healthy, [draw.gauss(1.2, 0.25) for _ in range(60)])
        alarms += find_divergence(seen) is not None
        quiet += find_flat_loss(seen) is not None
    assert alarms <= 2 and quiet > 100, (alarms, quiet)
    risen = [run_of(healthy, [draw.gauss(1.2 if i < 2 else 2.4, 0.25) for i in range(60)]) for _ in range(200)]
    assert sum(find_divergence(seen) is not None for seen in risen) >= 190, "twice as high is no noise"


def test_gradients_from_both_sides(healthy):
    losses = [3.0 - i / 30 for i in range(60)]
    assert find_gradient_trouble(run_of(healthy, losses, [0.5] * 60)) is None
    start = run_of(healthy, losses, [30.0] * 5 + [0.5] * 55)
    assert find_gradient_trouble(start) is None, "long ones at the start are usual"
    assert find_gradient_trouble(run_of(healthy, losses, [8.0] * 60)).code == "gradients_cut"
    spikes = find_gradient_trouble(run_of(healthy, losses, [0.5] * 40 + [40.0] + [0.5] * 19))
    assert spikes.code == "gradient_spikes" and "step 41" in spikes.cause
    end = run_of(healthy, losses, [0.1] * 40 + [3.0] + [0.1] * 19)
    assert find_gradient_trouble(end) is None, "hardly clipped, at its end"
    assert find_gradient_trouble(run_of(healthy, losses, [0.0] * 60)).code == "no_gradient"
    assert find_gradient_trouble(run_of(healthy, losses[:9], [8.0] * 9)) is None


def with_figures(healthy, before, after, **more):
    summary = {**healthy.evidence.summary, "before": before, "after": after}
    return changed(healthy.evidence, summary=summary, **more)


def test_held_out_from_both_sides(healthy):
    last = average_fifths(healthy.evidence.losses)[-1]
    assert find_overfitting(with_figures(healthy, {"loss": 3.4}, {"loss": 1.5 * last + 0.05})) is None
    assert find_overfitting(with_figures(healthy, {"loss": 3.4}, {"loss": 1.5 * last + 0.15}))
    assert find_overfitting(with_figures(healthy, {}, {})) is None
    assert find_no_gain(with_figures(healthy, {"loss": 3.4}, {"loss": 3.39}))
    assert not find_no_gain(with_figures(healthy, {"loss": 3.4}, {"loss": 3.0}))
    replies = [{"stage": "after", "exact": True, "stops": True}] * 200
    figures = {"loss": 3.4, "exact": 0.9}, {"loss": 1.0, "exact": 0.5}
    assert "50% of the held-out answers" in find_no_gain(with_figures(healthy, *figures, replies=replies)).cause
    figures = {"loss": 3.4, "exact": 0.5}, {"loss": 1, "exact": 0.48}
    assert not find_no_gain(with_figures(healthy, *figures, replies=replies))


def test_forgetting_from_both_sides(healthy):
    for factor, severity in ((1.4, None), (2, "info"), (20, "warning")):
        found = find_forgetting(with_figures(healthy, {"base_perplexity": 1.5}, {"base_perplexity": 1.5 * factor}))
        assert (found and found.severity) == severity
    assert find_forgetting(with_figures(healthy, {}, {"base_perplexity": 50.0})) is None


def test_stops_from_both_sides(healthy):
    def replies(cut, tokens):
        return [{"stage": "after", "stops": i >= cut, "tokens": tokens, "exact": None} for i in range(20)]

    for share, severity in ((1.0, None), (0.9, None), (0.6, "warning"), (0.2, "error")):
        cut = round(20 * (1 - share))
        said = find_endless_replies(with_figures(healthy, {}, {"stops": share}, replies=replies(cut, 40)))
        assert (said and (said.code, said.severity)) == (severity and ("never_stops", severity))
    short = with_figures(healthy, {}, {"stops": 0.0}, replies=replies(20, 900))
    assert find_endless_replies(short).code == "limit_too_short"
    assert find_endless_replies(with_figures(healthy, {}, {"stops": None}, replies=[])) is None
    uncounted = [{**row, "tokens": None if i % 4 == 0 else 900} for i, row in enumerate(replies(20, 900))]
    said = find_endless_replies(with_figures(healthy, {}, {"stops": 0.0}, replies=uncounted))
    assert said.code == "limit_too_short" and "to at least 900" in said.fix
    uncounted = [{**row, "tokens": None} for row in uncounted]
    assert find_endless_replies(with_figures(healthy, {}, {"stops": 0.0}, replies=uncounted)).code == "never_stops"


def test_rows_padding_and_loader_from_both_sides(healthy):
    def seen(seconds=10.0, **data):
        return changed(healthy.evidence, summary={**healthy.evidence.summary, "train_seconds": seconds, **data})

    whole = {"rows": 900, "left_out": 50, "cut": 40, "longest": 400}
    assert find_lost_rows(seen(data=whole)) == [] and find_lost_rows(seen()) == []
    most = find_lost_rows(seen(data={**whole, "left_out": 1000}))
    assert [(f.code, f.severity) for f in most] == [("rows_left_out", "error")] and "1000 of 1900" in most[0].cause
    assert [(f.code, f.severity) for f in find_lost_rows(seen(data={**whole, "cut": 200}))] == [("rows_cut", "warning")]
    waiting = seen(data={"padding": 0.5}, loader_seconds=3.0)
    assert [f.code for f in find_slow_steps(waiting)] == ["padding", "slow_loader"]
    assert find_slow_steps(seen(data={"padding": 0.3}, loader_seconds=1.0)) == []


@pytest.mark.parametrize(
    "stopped, code",
    [
        ({"step": 3, "loss": "nan", "grad_norm": "nan", "cause": "x"}, "nan_loss"),
        ({"step": 3, "loss": "2.5", "grad_norm": "inf", "cause": "x"}, "nan_loss"),
        ({"step": 3, "loss": "0.0", "grad_norm": "0.0", "cause": "x"}, "zero_loss"),
        ({"step": 3, "kind": "out_of_memory", "cause": "x"}, "out_of_memory"),
    ],
)
def test_runs_that_train_stopped(healthy, tmp_path, stopped, code):
    path = copied(healthy, tmp_path)
    (path / "summary.json").unlink()
    write_jsonl(path / "metrics.jsonl", healthy.evidence.metrics[:2])
    write_json(path / "stopped.json", stopped)
    found = diagnose(path)
    assert found.codes == [code] and "step" in found.findings[0].cause


def test_numbers_that_are_none_in_the_metrics(healthy):
    seen = run_of(healthy, [3.0, 2.0, None, None])
    assert "step 3" in find_nan(seen).cause
    assert find_zero_loss(run_of(healthy, [0.0] * 4)).code == "zero_loss"
    assert find_zero_loss(run_of(healthy, [1.0, 0.0, 1.0])) is None
    assert find_early_end(seen) is None


# --- the report -----------------------------------------------------------------------------------------------------


def test_display_is_escaped_and_ordered(healthy, tmp_path):
    path = copied(healthy, tmp_path)
    summary = json.loads((path / "summary.json").read_text())
    summary["after"].update(base_perplexity=3.0, stops=0.1)
    write_json(path / "summary.json", summary)
    rows = [{"stage": "after", "stops": False, "tokens": 5, "exact": None, "reply": "<b>"}] * 4
    write_jsonl(path / "evaluation.jsonl", rows)
    found = diagnose(path)
    assert found.codes == ["never_stops", "forgetting"], "errors come first"
    assert found.table().startswith("error: never_stops\n  ") and "\n  → " in found.table()
    assert found.to_dict()["findings"][0]["code"] == "never_stops"
    assert "<b>" not in found._repr_html_() and found._repr_html_().count("<tr>") == 3
    assert str(found) == found.table() and repr(found) == "<Diagnosis: ok=False, 1 error, 1 info>"


def test_the_plot_has_both_losses(healthy):
    import matplotlib

    matplotlib.use("agg")
    ax = healthy.plot()
    dots = ax.get_lines()[-1]
    assert list(dots.get_xdata()) == [0, 300]
    assert list(dots.get_ydata()) == [healthy.evidence.of(when, "loss") for when in ("before", "after")]


@pytest.mark.quick
def test_every_consequence_is_a_finding_of_a_rule():
    import inspect

    import qlora_nb.diagnosis as module

    source = inspect.getsource(module)
    for code in {*EXPLAINED_CODES, *set().union(*EXPLAINED_CODES.values())}:
        assert f'"{code}"' in source, code
    assert len(DIAGNOSIS_RULES) == len(set(DIAGNOSIS_RULES))


@pytest.mark.quick
def test_what_is_no_run_folder(tmp_path):
    with pytest.raises(UserError, match="no config.yaml"):
        diagnose(tmp_path)
    (tmp_path / "config.yaml").write_text("format: 3\nlearning_rate: 0.001\nmax_steps: 5\n")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_evidence(tmp_path)
    (tmp_path / "summary.json").unlink()
    assert diagnose(tmp_path).codes == ["unfinished"]


# --- damaged files --------------------------------------------------------------------------------------------------

BROKEN = {
    "half": b'{"after": {"loss": 1.0, "st',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "text": b'"loss"',
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "deep inside": b'{"step": ' + b"[" * 100_000,
    "too large": b'{"step": N, "seconds": N, "stage": "after"}'.replace(b"N", b"1" + b"0" * 400),
    "without its fields": b'{"other": 1}',
    "other kinds": json.dumps({
        "step": [1], "loss": "high", "grad_norm": {}, "before": 5, "after": [1], "data": "x", "train_seconds": "long",
        "stage": 1, "stops": "yes", "exact": 2, "tokens": "many", "cause": 7,
    }).encode(),
    "other kinds inside": json.dumps({
        "step": 1, "loss": [], "before": {"loss": "high"}, "after": {"loss": [1]}, "stage": "after", "stops": 1,
    }).encode(),
}  # fmt: skip

HARMLESS = {("summary.json", "without its fields"), ("stopped.json", "other kinds inside")}  # no field that is read


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "evaluation.jsonl", "stopped.json"])
def test_a_damaged_file_is_named(healthy, tmp_path, name):
    from qlora_nb.workflow import load_run

    path = copied(healthy, tmp_path)
    for kind, content in BROKEN.items():
        # a last line that was cut off, as a crash leaves it, is left out; so there is one behind it
        (path / name).write_bytes(content + b"\n" + content + b"\n" if name.endswith("l") else content)
        readers = [diagnose] if name in ("evaluation.jsonl", "stopped.json") else [diagnose, load_run]
        for read in readers:
            try:
                read(path)
            except UserError as error:
                assert f"{path / name}" in str(error) and "\n" not in str(error) and len(str(error)) < 400, kind
            else:
                assert (name, kind) in HARMLESS, (kind, read)
    (path / name).unlink()
    (path / name).mkdir()
    with pytest.raises(UserError, match=name):
        diagnose(path)


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "a: [", "[" * 3000, "learning_rate: high", "learning_rate: []", "max_steps: 5", "date: 2024-99-99",
     "learning_rate: 0.1\nrows_read: [1]", "learning_rate: 0.1\nrows_read: {rows: many}", "\x00",
     "learning_rate: null"],
)  # fmt: skip
def test_a_damaged_configuration_is_named(healthy, tmp_path, content):
    from qlora_nb.workflow import load_run

    path = copied(healthy, tmp_path)
    (path / "config.yaml").write_text(f"format: 3\n{content}" if ": " in content else content)
    for read in (diagnose, load_run):
        with pytest.raises(UserError, match="config.yaml") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_files_that_are_missing_are_not_there(healthy, tmp_path):
    path = copied(healthy, tmp_path)
    for name in ("evaluation.jsonl", "metrics.jsonl"):
        (path / name).unlink()
        diagnose(path)
    (path / "summary.json").unlink()
    assert diagnose(path).codes == ["unfinished"]


def test_figures_that_do_not_apply(healthy):
    "Support replies, another model: no answers to judge, no form, no task of the base."
    none = dict.fromkeys(("exact", "form", "base_perplexity"))
    replies = [{**row, "exact": None, "form": None} for row in healthy.evidence.replies]
    before, after = ({"loss": loss, "stops": 1.0, **none} for loss in (3.0, 1.0))
    seen = with_figures(healthy, before, after, replies=replies)
    assert find_no_gain(seen) is None and find_forgetting(seen) is None and find_endless_replies(seen) is None
    worse = with_figures(healthy, {"loss": 3.0, **none}, {"loss": 3.0, **none}, replies=replies)
    assert "held-out loss" in find_no_gain(worse).cause
