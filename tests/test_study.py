"""The study: its stored results, its list of runs, and real small runs that can be made again."""

import importlib.util
import json

import processes
import pytest
import torch
from repository import NBS, ROOT

SCRIPT = ROOT / "benchmarks" / "study.py"
STORED = NBS / "results" / "study.json"
REAL_SCRIPT = ROOT / "benchmarks" / "study_real.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text(encoding="utf-8"))


def call(*arguments):
    return processes.run_script(SCRIPT, *arguments, cwd=ROOT)


# --- what is stored -------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_results_say_where_they_come_from(stored):
    for said in (stored, stored["cpu"]):
        assert said["versions"]["torch"] and said["versions"]["peft"] and said["date"]
        assert said["command"].startswith("python benchmarks/study.py ")
    assert stored["gpu"] in {run["device"] for run in stored["runs"]} and stored["cpu"]["processor"]


@pytest.mark.quick
def test_every_run_is_there_once_and_whole(study, stored):
    keys = [study.key(run) for run in stored["runs"]]
    assert len(keys) == len(set(keys))
    for run in stored["runs"]:
        assert run["method"] in study.METHODS and isinstance(run["seed"], int), run
        assert run["part"] == "before" or run["steps"] <= run["rows"] * run["epochs"] // run["batch"]
        for name in ("exact", "form", "stops", "base_exact", "base_direct"):
            assert run.get(name) is None or 0 <= run[name] <= 1, (name, run)


@pytest.mark.quick
def test_three_seeds_of_every_method_at_the_rate_that_the_search_chose(study, stored):
    rates = study.rates_from([run for run in stored["runs"] if run["device"] == stored["gpu"]])
    for device, methods in ((stored["gpu"], study.METHODS), ("cpu", ("full", "lora", "qlora"))):
        for method in methods:
            runs = [r for r in stored["runs"] if (r["device"], r["part"], r["method"]) == (device, "base", method)]
            assert len({run["seed"] for run in runs}) >= 3, (device, method)
            assert {run["learning_rate"] for run in runs} == {rates[method]}
            assert study.SEARCH_SEED not in {run["seed"] for run in runs}
            assert {run["eval_rows"] for run in runs} == {400}


@pytest.mark.quick
def test_every_method_was_searched_alike(study, stored):
    for method in study.METHODS:
        runs = [r for r in stored["runs"] if r["part"] == "search" and r["method"] == method]
        assert sorted(run["learning_rate"] for run in runs) == sorted(study.GRID)
        assert {run["seed"] for run in runs} == {study.SEARCH_SEED}


@pytest.mark.quick
def test_costs_by_another_count(stored):
    "The embedded model's weights, and adapters of rank 16 on seven projections of four layers, counted by hand."
    adapters = 4 * 16 * (512 + 384 + 384 + 512 + 3 * 768)
    for run in stored["runs"]:
        if run["part"] != "base":
            continue
        trained = 2_558_208 if run["method"] == "full" else adapters
        assert run["trainable"] == trained and run["gradient_bytes"] == 4 * trained
        assert 8 * trained <= run["optimizer_bytes"] <= 8 * trained + 4096
        assert 4 * trained < run["checkpoint_bytes"] < 4 * trained + 20_000
        weights = 4 * (2_558_208 + (0 if run["method"] == "full" else adapters))
        if run["method"] == "qlora":
            projections = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
            weights -= 4 * projections
            assert weights + projections * 0.5 < run["weight_bytes"] < weights + projections * 0.53
        else:
            assert run["weight_bytes"] == weights


# --- the list -------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_no_run_is_listed_twice(study):
    rates = dict.fromkeys(study.METHODS, 1e-3)
    a = study.arguments(["--part", "all"])
    runs = [
        {**run, "device": "x"}
        for p in ("search", "before", "base", "factors")
        for run in study.listed(p, rates, "cuda", a)
    ]
    keys = [study.key(run) for run in runs]
    assert len(keys) == len(set(keys)) > 150
    assert all(set(run) <= {*study.DEFAULTS, "device"} for run in runs)


@pytest.mark.quick
def test_rates_are_the_best_of_the_search(study):
    def run(method, rate, loss, part="search"):
        return {"part": part, "method": method, "learning_rate": rate, "loss": loss}

    runs = [
        run("full", 1, 0.5),
        run("full", 2, 0.4),
        run("lora", 3, None),
        run("lora", 4, 9.0),
        run("full", 5, 0.1, "base"),
    ]
    assert study.rates_from(runs) == {"full": 2, "lora": 4}


@pytest.mark.quick
@pytest.mark.parametrize("rows, epochs, batch", [(32, 1, 8), (20, 3, 8), (8, 4, 2)])
def test_batches(study, rows, epochs, batch):
    "Every epoch has each row once, in an order of its own; the seed decides it."
    data = [{"input_ids": [i + 1] * (i % 5 + 1), "labels": [i + 1] * (i % 5 + 1)} for i in range(rows)]
    run = {"rows": rows, "epochs": epochs, "batch": batch, "seed": 1}
    made = list(study.batches(data, run, pad=0))
    assert len(made) == rows * epochs // batch
    seen = [int(row[0]) for part in made for row in part["input_ids"]]
    for start in range(0, len(seen) - rows + 1, rows):
        assert sorted(seen[start : start + rows]) == list(range(1, rows + 1))
    again = [int(row[0]) for part in study.batches(data, run, pad=0) for row in part["input_ids"]]
    other = [int(row[0]) for part in study.batches(data, {**run, "seed": 2}, pad=0) for row in part["input_ids"]]
    assert seen == again != other
    for part in made:
        assert torch.equal(part["attention_mask"].bool(), part["labels"] != -100)


@pytest.mark.quick
def test_small_things(study):
    assert study.thinned([1.0] * 45, 20)[-1] == [45, 1.0] and len(study.thinned([1.0] * 45, 20)) <= 20
    assert study.number(float("nan")) is None and study.number(0.123456789) == 0.123457
    assert study.plain("/a/b/study.json") == "study.json" and study.plain("--part") == "--part"


@pytest.mark.quick
def test_merging_takes_the_newer_run(study, tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    run = {"part": "base", "method": "lora", "seed": 1, "device": "cpu", "loss": 1.0}
    old.write_text(json.dumps({"gpu": "X", "date": "1", "runs": [run, {**run, "seed": 2}]}))
    new.write_text(json.dumps({"gpu": None, "date": "2", "cpu": {"processor": "Y"}, "runs": [{**run, "loss": 2.0}]}))
    study.merge(study.arguments(["--merge", str(new), "--out", str(old)]))
    found = json.loads(old.read_text())
    assert (found["gpu"], found["date"], found["cpu"]) == ("X", "1", {"processor": "Y"}), "a CPU file leaves the GPU's"
    assert [(r["seed"], r["loss"]) for r in found["runs"]] == [(1, 2.0), (2, 1.0)]


# --- real runs ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("given, said", [('{"colour": 1}', "colour"), ('{"method": "prefix"}', "prefix")])
def test_a_run_that_cannot_be(given, said):
    done = call("--device", "cpu", "--one", given)
    assert done.returncode != 0 and f"a run has no {'method ' if said == 'prefix' else ''}{said}" in done.stderr


@pytest.mark.heavy
def test_the_driver_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "study.json"
    command = ("--part", "base", "--device", "cpu", "--methods", "lora", "full", "--seeds", 1, "--small", "--out", out)
    done = call(*command)
    assert done.returncode == 0 and "2 of 2 runs to do" in done.stderr, done.stderr
    first = out.read_text()
    runs = json.loads(first)["runs"]
    assert {run["method"] for run in runs} == {"lora", "full"} and all(run["device"] == "cpu" for run in runs)
    assert json.loads(first)["gpu"] is None and json.loads(first)["cpu"]["processor"]
    done = call(*command)
    assert "0 of 2 runs to do" in done.stderr
    assert json.loads(out.read_text())["runs"] == runs


def test_a_seed_gives_the_same_numbers_and_another_one_others():
    def result(seed):
        run = {"method": "qlora", "seed": seed, "rows": 16, "eval_rows": 2, "learning_rate": 5e-3}
        done = call("--device", "cpu", "--one", json.dumps(run))
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.split("RESULT ", 1)[1])

    first, second, other = result(1), result(1), result(2)
    same = ("loss", "curve", "exact", "length", "base_perplexity", "base_exact", "weight_bytes", "train_loss")
    assert [first[name] for name in same] == [second[name] for name in same]
    assert first["loss"] != other["loss"] and first["curve"] != other["curve"]


# --- on a real model ------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_no_run_on_the_real_model_is_missing():
    listed = processes.run_script(REAL_SCRIPT, "--list", cwd=ROOT)
    assert listed.stdout.splitlines() == [
        "search: 15 of 15 stored", "before: 2 of 2 stored", "base: 15 of 15 stored", "factors: 51 of 51 stored",
    ]  # fmt: skip
    stored = json.loads((NBS / "results" / "study_real.json").read_text(encoding="utf-8"))
    assert len(stored["runs"]) == 15 + 2 + 15 + 51 and {run["device"] for run in stored["runs"]} == {stored["gpu"]}
    assert {"python", "torch", "transformers", "peft", "bitsandbytes"} <= set(stored["versions"]) and stored["date"]
