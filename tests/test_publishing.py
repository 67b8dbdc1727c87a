"""What is published, built without an upload: each of the three forms as someone would use it who has nothing else."""

import contextlib
import io
import json
import re

import pytest
from huggingface_hub import ModelCard
from repository import read

from qlora_nb import load_run
from qlora_nb.core import EMBEDDED_NAME
from qlora_nb.model import open_run
from qlora_nb.publishing import push_to_hub
from qlora_nb.run import copy_embedded_run, read_own_config, resolve_settings
from qlora_nb.session import ChatSession

NAME = "someone/apples"
FORMS = {"adapter": "adapter_model.safetensors", "merged": "model.safetensors", "gguf": "run-Q8_0.gguf"}
QUESTION = "Mia has 12 apples. She buys 5 bags of 3 apples. How many apples does Mia have now?"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "The embedded run with a GGUF file, a Modelfile and a certificate, and what is built of it: by form."
    place = tmp_path_factory.mktemp("published")
    run = load_run(copy_embedded_run(place))
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        run.export("q8_0")
        run.certify(rows=1, max_new_tokens=0)
        return run.path, {
            form: push_to_hub(run, NAME, what=form, dry_run=True, output=place / form, example=True, license="mit",
                              data_license="cc-by-4.0") for form in FORMS
        }  # fmt: skip


def section(card, title):
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_holds_one_form_and_what_it_takes(form, published):
    _, built = published
    found, folder = built[form], built[form].folder
    names = {name for name, _ in found.files}
    assert dict(found.files) == {name: (folder / name).stat().st_size for name in names} and found.url is None
    assert {"README.md", "training.yaml", FORMS[form]} <= names and (folder / "README.md").read_text() == found.card
    weights = {name for name in names if name.endswith((".safetensors", ".gguf"))}
    assert weights == {FORMS[form]}, "no form brings another with it"
    assert ("tokenizer.json" in names, "certificate.json" in names) == (form != "gguf", form == "gguf")
    if form == "gguf":
        assert f"FROM ./{FORMS[form]}" in (folder / "Modelfile").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_a_card_answers_what_a_stranger_asks(form, published):
    "Base, data, licences, figures, certificate, an example of the run's own rows, and how to train it again."
    run, built = published
    card, summary = built[form].card, read(run / "summary.json")
    head = ModelCard(card).data.to_dict()
    library = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}[form]
    assert (head["license"], head["library_name"], "gguf" in head["tags"]) == ("mit", library, form == "gguf")
    licences = section(card, "Data and licences")
    assert "- Base: The small model that comes with qlora_nb." in licences
    assert "the word problems that come with qlora_nb; licence cc-by-4.0." in licences
    assert "- Of what is published here: mit." in licences
    figures = section(card, "What training changed")
    assert "On 200 held-out rows" in figures
    for title, name, write in (("held-out loss", "loss", "{:.3f}"), ("exact answers", "exact", "{:.1%}")):
        (line,) = [line for line in figures.splitlines() if line.startswith(f"| {title}")]
        before, after = [cell.split(" (")[0].replace(" ", "") for cell in line.split("|")[2:4]]
        assert [before, after] == [write.format(summary[stage][name]) for stage in ("before", "after")]
    if form == "gguf":
        assert read(run / "certificate.json")["headline"] in figures
    assert ("**Certificate.**" in card) == (form == "gguf")
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    before, after = (next(row for row in rows if row["stage"] == stage) for stage in ("before", "after"))
    example = re.sub(r"^    ", "", section(card, "An example"), flags=re.M)
    for text in (after["problem"], after["expected"], before["reply"], after["reply"]):
        assert text.strip() in example
    assert "qlora_nb train --config training.yaml" in section(card, "How to train it again")
    config, again = read_own_config(run / "config.yaml"), read_own_config(built[form].folder / "training.yaml")
    assert (
        again["model"] == EMBEDDED_NAME
        and again["system"]
        and {"r", "learning_rate", "max_steps", "seed"} <= set(again)
    )
    assert {name: config[name] for name in again if name != "model"} == {
        name: again[name] for name in again if name != "model"
    }
    assert resolve_settings(config=again) == resolve_settings(config=config)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_the_code_on_a_card_answers_as_the_run_does(form, published, capsys):
    "As it stands there, with the folder in place of the name on the Hub."
    run, built = published
    (code,) = re.findall("```python\n(.*?)```", built[form].card, re.S)
    assert NAME in code and "…" in code
    exec(code.replace(NAME, str(built[form].folder)).replace("…", QUESTION), {})
    said = capsys.readouterr().out.strip()
    with ChatSession(*open_run(run), system=read_own_config(run / "config.yaml")["system"], temperature=0) as session:
        assert session.ask(QUESTION, show=False).text == said and "27" in said


def test_the_published_file_answers_as_the_run_does(published):
    "By its Modelfile's system text; its card says how llama.cpp and Ollama are given it."
    run, built = published
    folder, card = built["gguf"].folder, built["gguf"].card
    config = read_own_config(run / "config.yaml")
    assert f"llama-cli -hf {NAME} --hf-file {FORMS['gguf']} --jinja -sys " in card
    assert "ollama create apples -f Modelfile" in card and config["system"] in (folder / "Modelfile").read_text()
    with ChatSession.open(folder / FORMS["gguf"], system=config["system"], temperature=0) as session:
        assert session.ask(QUESTION, show=False).text.endswith("The answer is 27.")
