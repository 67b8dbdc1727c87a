"""What leaves the repository: the front page, the wheel's metadata, the release; with an owner and without one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import yaml
from packaging.metadata import Metadata
from repository import NBS, NOTEBOOKS, ROOT, cells, read, settings, tool

PLACEHOLDER = "OWN" + "ER"  # what stood for the owner once
STATES = {
    "no owner": {"user": "", "published": ""},
    "a repository": {"user": "somebody", "repo": "fork", "branch": "dev", "published": ""},
    "an older version on PyPI": {"user": "somebody", "published": "0.0.9"},
    "on PyPI": {"user": "somebody", "published": settings()["version"]},
}


def set_up(place, **changes):
    "A copy of what heads, front page and metadata are made of, with other settings; and what follows from them."
    for name in ("settings.ini", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, place)
    ignored = shutil.ignore_patterns("__pycache__", "results", "images", "runs", ".ipynb_checkpoints")
    for name in ("tools", "nbs"):
        shutil.copytree(ROOT / name, place / name, ignore=ignored, symlinks=True)
    (place / "nbs/images").mkdir()
    (place / "qlora_nb").symlink_to(ROOT / "qlora_nb")
    text = (place / "settings.ini").read_text(encoding="utf-8")
    for name, value in changes.items():
        text, found = re.subn(rf"^{name} =.*$", f"{name} = {value}", text, flags=re.M)
        assert found == 1, name
    (place / "settings.ini").write_text(text, encoding="utf-8")
    for script in ("notebook_heads", "make_readme"):  # with nbdev's own export, `make export`
        subprocess.run([sys.executable, f"tools/{script}.py"], cwd=place, check=True, capture_output=True)
    return place


@pytest.fixture(scope="module", params=STATES)
def state(request, tmp_path_factory):
    "(name, folder) of a copy in each of the states."
    return request.param, set_up(tmp_path_factory.mktemp("state"), **STATES[request.param])


def notebook_sources(place):
    return {
        path.stem: "\n".join(source for _, source in cells(path)) for path in sorted((place / "nbs").glob("*.ipynb"))
    }


def test_everything_follows_the_settings(state):
    name, place = state
    found, readme = notebook_sources(place), (place / "README.md").read_text(encoding="utf-8")
    cited = yaml.safe_load((place / "CITATION.cff").read_text(encoding="utf-8"))
    install = {
        stem: re.findall(r'^%pip install -q "qlora_nb|^%pip install -q "\./qlora_nb', text, re.M)
        for stem, text in found.items()
    }
    assert {stem for stem, lines in install.items() if len(lines) != 1} == {"index"}
    assert len(found) == len(NOTEBOOKS)
    if name == "no owner":
        for text in (*found.values(), readme):
            assert "colab-badge" not in text and "In Colab: upload" in text
            assert "git+https" not in "".join(re.findall(r"^%pip .*$", text, re.M))
            assert not re.search(r"github\.com//|//\.github\.io|github\.com/somebody", text)
        wheel = f"./qlora_nb-{settings()['version']}-py3-none-any.whl[unsloth,serve]"
        assert f'%pip install -q "{wheel}"' in found["30_quickstart"]
        assert "repository-code" not in cited and 'pip install ".[serve]"' in readme
        return
    repo, branch = (STATES[name].get(key, settings()[key]) for key in ("repo", "branch"))
    address = f"https://github.com/somebody/{repo}"
    for stem, text in found.items():
        target = "30_quickstart" if stem == "index" else stem
        badge = f"colab.research.google.com/github/somebody/{repo}/blob/{branch}/nbs/{target}.ipynb"
        assert text.count(badge) == 1 and "In Colab: upload" not in text, stem
    asked = "qlora_nb[{}]" if name == "on PyPI" else f"qlora_nb[{{}}] @ git+{address}@{branch}"
    assert f'%pip install -q "{asked.format("unsloth,serve")}"' in found["30_quickstart"]
    assert f'%pip install -q "{asked.format("unsloth")}"' in found["01_lora"]
    assert f'pip install "{asked.format("serve")}"' in readme and f"git clone {address} " in readme
    assert cited["repository-code"] == address and f"url     = {{{address}}}" in readme


def metadata_of(place):
    "The metadata as `build` gets them from setup.py, read by the library of those who check uploads."
    script = "import build; print(build.ProjectBuilder('.').metadata_path('out'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=place, check=True, capture_output=True, text=True)
    folder = Path(done.stdout.splitlines()[-1])
    return Metadata.from_email((place / folder / "METADATA").read_bytes(), validate=True)


def test_metadata_of_the_wheel(state):
    name, place = state
    made, cfg = metadata_of(place), settings()
    assert (made.name, str(made.version), made.license_expression) == ("qlora_nb", cfg["version"], "Apache-2.0")
    assert {"unsloth", "gguf", "serve", "dev"} <= set(made.provides_extra)
    assert made.description_content_type.startswith("text/markdown") and "| claim |" in made.description
    addresses = re.findall(r"\]\(([^)\s]*)\)", re.sub(r"^```.*?^```", "", made.description, flags=re.M | re.S))
    assert addresses and all(one.startswith("https://") for one in addresses)
    if name == "no owner":
        assert not made.project_urls and not made.author_email and "nbs/images" not in made.description
        return
    repo = STATES[name].get("repo", settings()["repo"])
    start = f"https://github.com/somebody/{repo}"
    assert made.project_urls["Source"] == start and made.author_email.startswith("somebody@")
    ours = [one.removeprefix(f"{start}/") for one in addresses if one.startswith(f"{start}/")]
    pictures = [one for one in ours if one.startswith(f"raw/v{cfg['version']}/nbs/images/")]
    assert (
        len(pictures) == (ROOT / "README.md").read_text(encoding="utf-8").count("](nbs/images/") >= 1 and len(ours) > 80
    )
    for one in ours:
        assert (ROOT / one.split("/", 2)[2].partition("#")[0]).exists(), one


def test_no_placeholder_is_left():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    kinds = (".py", ".yml", ".md", ".toml", ".ini", ".txt", ".css", ".cff", ".j2", "Makefile")
    for path in (ROOT / name for name in listed if name.endswith(kinds)):
        assert not re.search(rf"\b{PLACEHOLDER}\b", path.read_text(encoding="utf-8")), path
    for path in NOTEBOOKS:  # not the letters of a picture
        made = read(path)["cells"]
        texts = [output.get("text", "") for cell in made for output in cell.get("outputs", [])] + [
            cell["source"] for cell in made
        ]
        assert not any(re.search(rf"\b{PLACEHOLDER}\b", "".join(text)) for text in texts), path


# --- the release ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## (.*)$", text, re.M)
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \((?:\d{4}-\d\d-\d\d|not released)\)", entry) for entry in entries)
    assert tool("notebook_heads")["released"]()[0] == settings()["version"]
    assert not any("not released" in entry for entry in entries[1:])


@pytest.mark.quick
def test_citation():
    "What GitHub and Zenodo ask for, and what LaTeX reads, say the same."
    cfg, made = settings(), yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= made.keys() and made["cff-version"] == "1.2.0"
    assert made["version"] == cfg["version"] and made["authors"] == [{"name": cfg["author"]}]
    block = re.search(r"^```bibtex\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    fields = dict(re.findall(r"^  (\w+) += \{(.*)\},$", block, re.M))
    assert block.startswith("@software{qlora_nb,\n") and block.count("{") == block.count("}")
    assert fields["version"] == made["version"] and fields["author"].replace("\\", "") == f"{{{cfg['author']}}}"
    assert fields["title"].replace("\\", "") == f"{made['title']}: {made['abstract']}"


@pytest.mark.quick
def test_what_keeps_a_commit_from_being_released():
    faults = tool("check_release")["faults"]
    good = {"user": "somebody", "version": "1.2.0", "published": "1.2.0"}
    assert faults(good, ("1.2.0", "2027-01-02"), "v1.2.0") == faults(good, ("1.2.0", "2027-01-02")) == []
    assert "user is empty" in faults(good | {"user": ""}, ("1.2.0", "2027-01-02"))[0]
    assert "published is '1.1.0'" in faults(good | {"published": "1.1.0"}, ("1.2.0", "2027-01-02"))[0]
    assert "CHANGELOG.md begins with 1.1.0" in faults(good, ("1.1.0", "2027-01-02"))[0]
    assert "has no date" in faults(good, ("1.2.0", None))[0]
    assert "the tag is v1.2" in faults(good, ("1.2.0", "2027-01-02"), "v1.2")[0]


@pytest.mark.quick
def test_release_workflow():
    "It runs for a tag, checks before it builds, and only the job that publishes may ask for a token."
    made = yaml.load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    assert made["on"] == {"push": {"tags": ["v*"]}} and made["permissions"] == {"contents": "read"}
    runs = [step["run"] for step in made["jobs"]["build"]["steps"] if "run" in step]
    assert [any(word in run for run in runs) for word in ("release-check TAG=", "-m build")] == [True, True]
    assert "release-check" in runs[0] and "-m build" in runs[-1] and "permissions" not in made["jobs"]["build"]
    publish = made["jobs"]["publish"]
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    assert [step["uses"].partition("@")[0] for step in publish["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]


# --- the front page ---------------------------------------------------------------------------------------------------


def readme_lines():
    return re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]


def test_readme_lines_run_as_a_script(tmp_path):
    "With the embedded model and data for the large ones: each line prints something; the question is put as trained."
    from qlora_nb.core import EMBEDDED_MODEL
    from qlora_nb.template import SYSTEM_PROMPT

    text = readme_lines()
    smaller = {
        '"unsloth/Llama-3.2-3B-Instruct"': repr(str(EMBEDDED_MODEL)),
        '"ServiceNow-AI/R1-Distill-SFT", "v0", limit=1000': "limit=64",
        "max_steps=60": "max_steps=8",
    }
    for large, small in smaller.items():
        assert text.count(large) == 1, large
        text = text.replace(large, small)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("from ")]
    assert len(lines) == 6 and "system=SYSTEM_PROMPT" in text
    (tmp_path / "lines.py").write_text(text, encoding="utf-8")
    done = processes.run_script(tmp_path / "lines.py", cwd=tmp_path, env={"QLORA_NB_PROFILE": "tiny"})
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    *said, last = done.stdout.strip().splitlines()
    assert Path(tmp_path, last).is_file() and last.endswith("my-model-Q8_0.gguf")
    assert re.match(r"run \S+, 8 steps, held-out loss [\d.]+ → [\d.]+", said[0])
    figures = next(
        i for i, line in enumerate(said) if line and not re.search(r"[\d.]+ +[\d.]+$|before +after|^run ", line)
    )
    assert " ".join(said[figures:]).strip(), "the reply is not printed"
    (run,) = (tmp_path / "runs").iterdir()
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["system"] == SYSTEM_PROMPT


# --- the page of the public interface ---------------------------------------------------------------------------------


def test_the_interface_on_one_page():
    "Each public name, each parameter with a meaning, and a lesson that is there."
    import inspect

    import qlora_nb

    made = tool("site_pages")
    page = made["api_page"]()
    parts = dict(re.findall(r"^## (\w+) \{#\1\}\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert set(parts) == set(qlora_nb.__all__)
    addresses = {re.sub(r"^\d+_", "", path.stem) for path in NOTEBOOKS}
    for name, part in parts.items():
        assert re.search(r"\*\*Explained in\*\* \[.+\]\((\w+)\.html#\w+\)", part)[1] in addresses, name
        if name != "UserError":
            own = re.split(r"^###|^\| attribute", part, flags=re.M)[0]
            rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.*?)(?: \*\(.*\)\*)? \|$", own, re.M)
            wanted = [
                n for n, p in inspect.signature(getattr(qlora_nb, name)).parameters.items() if p.kind != p.VAR_KEYWORD
            ]
            assert [row[0] for row in rows] == wanted and all(row[2].strip() for row in rows), name
    assert not re.search(r"(?<!\\)<(?!-)\w", re.sub(r"`[^`]*`", "", page)), "a < that the page takes for a tag"
    assert (
        "| `model` | `None` | the trained model, right after training" in parts["Run"]
    )  # not the setting of that name
    assert "| `learning_rate` | the profile's | peak of the schedule *(float)* |" in parts["train"]
    assert "**Raises** `UserError`" in parts["load_model"] and "`count_layer_bytes`" in page


def test_the_public_interface_has_the_methods_too():
    "Those of the public classes, and of what the public functions return: its call, parameters and faults."
    page = tool("site_pages")["api_page"]()
    parts = dict(re.findall(r"^### ([\w.]+) \{#\1\}\n(.*?)(?=^##|\Z)", page, re.M | re.S))
    wanted = {"Run.export", "Run.certify", "Run.report", "ChatSession.ask", "Plan.to_config", "Evaluation.interval"}
    assert wanted <= set(parts) and not any("._" in name for name in parts)
    assert "Run.export(quantization='q8_0')" in parts["Run.export"] and "list[Path]" in parts["Run.export"]
    assert "| `path` | required | of a YAML file *(str or Path)* |" in parts["Plan.to_config"]
    assert "**Raises** `UserError` where nothing fits" in parts["Plan.to_config"]
    for name, text in parts.items():
        does, _, rest = text.strip().partition(f"\n\n```python\n{name}(")
        assert does and rest and not re.search(r"`(self|cls)`|->|kwargs", text), text
        meanings = re.findall(r"^\| `\w+` \| .+? \| (.*?)(?:\*\(.*\)\*)? *\|$", rest, re.M)
        assert all(meaning.strip() for meaning in meanings), text
    assert "hardware" not in parts["NF4Weight.dequantize"], "the meaning of a run's setting"
    assert parts["DatasetReport.raise_for_errors"].lstrip().startswith("Raise `UserError`")
    assert re.search(r"^\| `settings` \| Keyword arguments for .+\|$", page, re.M), "the properties of a plan"
    assert "| `exact` | right answers" in page and "**`Evaluation`**: " in page, "the fields of what is returned"


@pytest.mark.quick
def test_pages_are_filled_at_their_marker(tmp_path):
    made = tool("site_pages")
    for name in made["PAGES"]:
        shutil.copy(NBS / name, tmp_path)
    made["PAGES"]["api.md"] = lambda: "the list\n"
    made["fill"](tmp_path)
    assert (tmp_path / "api.md").read_text().endswith("\n\nthe list\n")
    assert "\n## 0.1.0 (" in (tmp_path / "changelog.md").read_text()
    with pytest.raises(SystemExit, match="api.md has no line"):
        made["fill"](tmp_path)
