"""A run knows its own bytes, and its base's: what is flipped, cut, zeroed, lost or swapped is named, or never read."""

import contextlib
import errno
import io
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml

from qlora_nb import add_lora, load_adapter, load_model, load_run, load_sft_dataset, open_run, safeguards, train
from qlora_nb.adapter import model_info
from qlora_nb.certificate_checks import open_subject
from qlora_nb.core import EMBEDDED_MODEL, UserError, file_sha256, write_json
from qlora_nb.diagnosis import diagnose
from qlora_nb.evidence import find_held_out
from qlora_nb.gguf_export import export_gguf
from qlora_nb.manifest import check_manifest, read_manifest, write_manifest
from qlora_nb.ollama_export import modelfile_for
from qlora_nb.publishing import push_to_hub
from qlora_nb.report import gather_facts, write_reports
from qlora_nb.run import RunFolder, copy_embedded_run
from qlora_nb.safeguards import find_damage
from qlora_nb.weights import check_same_base, describe_base

LOOPS = ("trl", "own")
SHORT = {"max_steps": 4, "warmup_steps": 0, "save_steps": 2, "eval_rows": 0, "check": False, "learning_rate": 3e-3}
SHORT |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def data():
    return load_sft_dataset(limit=8)


def fresh(model=str(EMBEDDED_MODEL)):
    loaded, tokenizer = load_model(model, backend="transformers", max_seq_length=256)
    return add_lora(loaded, r=4, target_modules=["q_proj"]), tokenizer


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    "A finished run by each loop, and another one, with another seed."
    place = tmp_path_factory.mktemp("runs")
    with contextlib.redirect_stderr(io.StringIO()):
        for loop in LOOPS:
            train(*fresh(), data, output=place / loop, loop=loop, **SHORT)
        train(*fresh(), data, output=place / "other", seed=1, **SHORT)
    return place


def copy_run(runs, loop, place, finished=True):
    "A copy of a run; unfinished as one that was killed when its last checkpoint was written."
    path = Path(shutil.copytree(runs / loop, place / loop, dirs_exist_ok=True))
    if not finished:
        for name in ("summary.json", "manifest.json"):
            (path / name).unlink()
        shutil.rmtree(path / "adapter")
    return path


def flip(file, twin, chance):
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


DAMAGE = {
    "flip": flip,
    "half": lambda file, twin, chance: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeros": lambda file, twin, chance: file.write_bytes(bytes(file.stat().st_size)),
    "gone": lambda file, twin, chance: file.unlink(),
    "swap": lambda file, twin, chance: file.write_bytes(twin.read_bytes()),
}
BLIND = ("manifest.json", "flip")  # a flipped bit in its white space, which JSON doesn't see, changes nothing


def damages(folder, twin, parts=("*",)):
    "Each file × each damage, with what undoes it. A swap with an equal file is none."
    for number, file in enumerate(sorted(file for part in parts for file in folder.rglob(part) if file.is_file())):
        other, before = twin / file.relative_to(folder), file.read_bytes()
        for how, damage in DAMAGE.items():
            if how == "swap" and (not other.is_file() or other.read_bytes() == before):
                continue
            damage(file, other, random.Random(f"{file.name} {how} {number}"))
            if not (file.exists() and file.read_bytes() == before):
                yield file.relative_to(folder).as_posix(), how
            file.write_bytes(before)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_all_of_a_checkpoint_is_in_its_manifest(runs, loop):
    for checkpoint in RunFolder(runs / loop).checkpoints:
        manifest, present = read_manifest(checkpoint), {file.name for file in checkpoint.iterdir()}
        assert set(manifest["files"]) == present - {"manifest.json"}
        needed = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
        assert needed <= present and not {"training_args.bin", "README.md"} & present
        assert manifest["step"] == int(checkpoint.name[11:]) and find_damage(checkpoint) is None
        assert manifest["settings"]["seed"] == 3407 and manifest["base"] == describe_base(
            {"model": str(EMBEDDED_MODEL)}
        )
        assert str(runs) not in (checkpoint / "manifest.json").read_text()


@pytest.mark.parametrize("loop", LOOPS)
def test_each_damage_of_a_checkpoint_is_found(runs, tmp_path, loop):
    path = copy_run(runs, loop, tmp_path, finished=False)
    newest, older = RunFolder(path).checkpoints
    found = 0
    for name, how in damages(newest, runs / "other/checkpoints/checkpoint-4"):
        said = find_damage(newest)
        if (name, how) == BLIND and said is None:
            continue
        assert said and (
            "manifest.json" in said if name == "manifest.json" and how in ("half", "zeros", "gone", "flip") else True
        ), (name, how)
        assert name == "manifest.json" or said.startswith(name), (name, how, said)
        found += 1
    assert found >= 40
    assert find_damage(newest) is None


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_goes_on_from_the_newest_whole_checkpoint(runs, data, tmp_path, capsys, loop):
    path = copy_run(runs, loop, tmp_path, finished=False)
    flip(path / "checkpoints/checkpoint-4/optimizer.pt", None, random.Random(1))
    shutil.copytree(path / "checkpoints/checkpoint-2", path / "checkpoints/checkpoint-3")  # under another step's name
    run = train(*fresh(), data, resume=path, check=False)
    said = capsys.readouterr().err
    assert "checkpoint-4 is damaged (optimizer.pt was changed (sha256 " in said and "resuming from checkpoint-2" in said
    assert "checkpoint-3 is damaged (manifest.json belongs to step 2)" in said
    assert run.summary["adapter_sha256"] == load_run(runs / loop).summary["adapter_sha256"]
    assert check_manifest(path) == [] and [file.name for file in RunFolder(path).checkpoints] == [
        "checkpoint-4",
        "checkpoint-2",
    ]


@pytest.mark.heavy
@pytest.mark.parametrize("loop", LOOPS)
def test_whatever_is_damaged_a_resumed_run_has_the_same_bytes(runs, data, tmp_path, loop):
    "Each file of the newest checkpoint and of the unfinished run's folder × each damage, then a real resume."
    path = copy_run(runs, loop, tmp_path, finished=False)
    wanted, tried = load_run(runs / loop).summary["adapter_sha256"], 0
    for name, how in damages(path / "checkpoints/checkpoint-4", runs / "other/checkpoints/checkpoint-4"):
        copy = Path(shutil.copytree(path, tmp_path / "copy"))
        with contextlib.redirect_stderr(io.StringIO()):
            assert train(*fresh(), data, resume=copy, check=False).summary["adapter_sha256"] == wanted, (name, how)
        shutil.rmtree(copy)
        tried += 1
    assert tried >= 40


def test_a_checkpoint_goes_only_when_the_next_one_is_whole(data, tmp_path, capsys):
    from transformers import TrainerCallback

    seen = []

    class Look(TrainerCallback):  # it comes before the manifest is written
        def on_save(self, args, state, control, **kwargs):
            seen.append([find_damage(checkpoint) for checkpoint in RunFolder(tmp_path / "run").checkpoints])

    train(*fresh(), data, output=tmp_path / "run", callbacks=[Look], save_total_limit=1, **SHORT)
    torn = "it was not completed: it has no manifest.json"
    assert seen == [[torn], [torn, None]]
    assert [checkpoint.name for checkpoint in RunFolder(tmp_path / "run").checkpoints] == ["checkpoint-4"]


# --- a finished run -------------------------------------------------------------------------------------------------

# What reads each file of a finished run; adapter/* are read by all that use the model.
READERS = {
    "config.yaml": lambda folder: folder.config,
    "summary.json": lambda folder: folder.summary,
    "metrics.jsonl": lambda folder: folder.metrics,
    "evaluation.jsonl": lambda folder: folder.replies,
    "samples.jsonl": lambda folder: folder.samples,
    "preflight.json": lambda folder: folder.preflight,
    "versions.json": lambda folder: folder.versions,
    "heldout.jsonl": lambda folder: find_held_out(folder.path),
}
PRODUCTS = ("report.md", "report.html", "loss.png")  # nothing reads them: they are made again from the rest


def test_each_damage_of_a_finished_run_is_found(runs, tmp_path):
    path = copy_run(runs, "trl", tmp_path)
    folder, found = RunFolder(path), 0
    files = {
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.is_file() and "checkpoints" not in file.parts
    }
    named = set(read_manifest(path)["files"])
    assert files - named == {*PRODUCTS, "manifest.json"}
    assert {name for name in named if not name.startswith("adapter/")} <= set(READERS)
    for name, how in damages(path, runs / "other"):
        if name in PRODUCTS or name.startswith("checkpoints/"):
            continue
        if (name, how) == ("summary.json", "gone"):  # then it isn't finished, and a resumed run writes it
            assert not folder.finished
        elif (name, how) != BLIND or check_manifest(path):
            with pytest.raises(UserError) as refused:
                READERS.get(name, lambda folder: folder.check_adapter())(folder)
            said = str(refused.value)
            assert name in said or name == "manifest.json", (name, how, said)
            assert said.count("\n") == 0 and str(tmp_path) in said and "restore" in said, said
        found += 1
    assert found >= 40
    folder.check_adapter()


@pytest.fixture
def noise(tmp_path):
    "The embedded run, with noise for an adapter: the file is well formed."
    from safetensors.torch import load_file, save_file

    path = copy_embedded_run(tmp_path)
    file = path / "adapter/adapter_model.safetensors"
    save_file({name: part + 0.01 for name, part in load_file(file).items()}, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    "use",
    [
        open_run,
        lambda path: load_adapter(load_model()[0], path, trainable=True),
        lambda path: load_model(adapter=path),
        lambda path: open_run(path / "adapter"),
        lambda path: export_gguf(path, None, path, "f16"),
        open_subject,  # what `certify` compares with
        lambda path: push_to_hub(path, "someone/name", dry_run=True),
        lambda path: modelfile_for(path, path / "x.gguf"),
    ],
)
def test_another_adapter_is_refused_wherever_one_is_used(noise, use):
    with pytest.raises(
        UserError, match=r"run/adapter is not what the run wrote: adapter/adapter_model.safetensors was changed"
    ) as refused:
        use(noise)
    assert "restore it, or manifest.json where that was changed, or copy the folder out of the run" in str(
        refused.value
    )
    assert not list(noise.glob("*.gguf")) and not (noise / "Modelfile").exists()


def test_the_way_on_is_one(noise, tmp_path, capsys):
    "What the message says: a copy of the folder is used as it is. And the report names what it can't vouch for."
    write_reports(noise)
    assert "adapter_model.safetensors was changed" in capsys.readouterr().err
    assert "adapter_model.safetensors was changed" in (noise / "report.md").read_text()
    copy = shutil.copytree(noise / "adapter", tmp_path / "copy")
    assert model_info(open_run(copy)[0])["adapter"] == str(copy)


def test_what_is_written_later_by_right_is_right(tmp_path):
    path = copy_embedded_run(tmp_path)
    folder = RunFolder(path)
    write_reports(path)
    folder.write("summary.json", {**folder.summary, "certified": True})
    write_json(path / "diagnosis.json", diagnose(path).to_dict())
    (path / "report.md").write_text("my own words")
    (path / "notes.txt").write_text("more of them")
    assert folder.summary["certified"] is True and gather_facts(path).problems == []
    folder.check_adapter()
    (path / "metrics.jsonl").write_text((path / "metrics.jsonl").read_text().replace("1", "2", 1))
    with pytest.raises(UserError, match="metrics.jsonl was changed"):
        diagnose(path)
    (path / "adapter/chat_template.jinja").rename(path / "adapter/another.jinja")
    with pytest.raises(UserError, match="adapter/chat_template.jinja is missing"):
        folder.check_adapter()


def test_a_manifest_is_right_before_and_after_a_file_is_replaced(tmp_path, monkeypatch):
    "Killed between the two, twice."
    folder = RunFolder(copy_embedded_run(tmp_path))
    before = folder.summary
    for number in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr("qlora_nb.run.write_aside", None)  # nothing after the manifest is written
            with pytest.raises(TypeError):
                folder.write("summary.json", {**before, "certified": number})
        assert folder.summary == before
    folder.write("summary.json", {**before, "certified": True})
    assert folder.summary["certified"] is True


def test_what_the_tripwire_kept_is_checked_too(runs, tmp_path):
    path = copy_run(runs, "trl", tmp_path)
    kept = RunFolder(path).adapter_of_step(2)
    shutil.copytree(path / "adapter", kept)
    with pytest.raises(UserError, match="manifest.json is missing"):
        open_run(kept)
    write_manifest(kept)
    open_run(kept)
    open_run(path / "checkpoints/checkpoint-2")
    flip(path / "checkpoints/checkpoint-2/adapter_model.safetensors", None, random.Random(2))
    with pytest.raises(
        UserError, match="checkpoint-2 is not what the run wrote: adapter_model.safetensors was changed"
    ):
        open_run(path / "checkpoints/checkpoint-2")


# --- the base -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def based(data, tmp_path_factory):
    "A run on a base in a folder."
    place = tmp_path_factory.mktemp("based")
    shutil.copytree(EMBEDDED_MODEL, place / "base")
    with contextlib.redirect_stderr(io.StringIO()):
        train(*fresh(str(place / "base")), data, output=place / "run", **{**SHORT, "max_steps": 2})
    return place


@pytest.fixture
def moved(based, tmp_path):
    "The run and its base where nothing is as it was; `config.yaml` names the base where it was trained."
    return Path(shutil.copytree(based, tmp_path / "elsewhere"))


def test_a_base_that_was_changed_is_refused(based, capsys):
    "Where its config.json or tokenizer can't be read at all, what reads it says so first."
    base, own = based / "base", 0
    for name, how in damages(base, EMBEDDED_MODEL):
        with pytest.raises(UserError) as refused:
            open_run(based / "run")
        said = str(refused.value)
        assert name in said and "\n" not in said, (name, how, said)
        own += "base is not what the run " in said and "base= (--base)" in said
    assert own >= 18
    open_run(based / "run")


def test_a_base_that_only_moved_is_named(moved, based, data, capsys):
    shutil.move(based / "base", based / "away")
    try:
        with pytest.raises(UserError, match="base"):
            open_run(moved / "run")
        model, _ = open_run(moved / "run", base=moved / "base")
        assert f"the base {moved / 'base'} has the bytes of {based / 'base'}" in capsys.readouterr().err
        (moved / "run/summary.json").unlink()
        run = train(*fresh(str(moved / "base")), data, resume=moved / "run", check=False)
        assert f"has the bytes of {based / 'base'}" in capsys.readouterr().err
        assert run.summary["adapter_sha256"] == load_run(based / "run").summary["adapter_sha256"]
    finally:
        shutil.move(based / "away", based / "base")


def test_another_base_is_used_where_it_is_named_and_never_resumed_on(moved, data, capsys):
    file = moved / "base/generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "top_k": 5}))
    open_run(moved / "run", base=moved / "base")
    assert "note: the base" in (said := capsys.readouterr().err) and "generation_config.json has" in said
    (moved / "run/summary.json").unlink()
    with pytest.raises(UserError, match="was trained on: generation_config.json has .* bytes"):
        train(*fresh(str(moved / "base")), data, resume=moved / "run", check=False)


def test_a_run_records_its_base(based):
    config = yaml.safe_load((based / "run/config.yaml").read_text())
    assert config["base_files"]["model.safetensors"]["sha256"] == file_sha256(based / "base/model.safetensors")
    assert set(config["base_files"]) == {file.name for file in EMBEDDED_MODEL.iterdir()}
    check_same_base(config, {"model": "qlora_nb:embedded"}, "the run")


@pytest.mark.parametrize("loop", LOOPS)
def test_a_checkpoint_that_cant_be_completed_ends_the_run_at_the_next_step(tmp_path, data, monkeypatch, loop):
    "It is completed in a thread: what goes wrong there isn't lost."

    def full(folder, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(safeguards, "write_manifest", full)
    with pytest.raises(UserError, match="no space left"):
        train(*fresh(), data, output=tmp_path / "run", loop=loop, **{**SHORT, "max_steps": 6})
    run = RunFolder(tmp_path / "run")
    assert not run.checkpoints, "what wasn't completed is removed"
    assert len(run.metrics) <= 3, "the step after the save was the last"
