"""A wheel built from the commit, in an empty environment outside the repository, trains."""

import json
import sys
import zipfile
from pathlib import Path

from common import clean_env, run


def test_wheel(built, tmp_path):
    env, (source, dist) = clean_env(tmp_path), built
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    assert sdist.stat().st_size < 30e6
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("qlora_nb/embedded/") and name.endswith(".safetensors") for name in names)
    assert any(name.startswith("qlora_nb/embedded/") and name.endswith(".parquet") for name in names)
    assert {
        "qlora_nb/templates/report.html.j2",
        "qlora_nb/templates/report.css",
        "qlora_nb/doctor.yaml",
        "qlora_nb/preflight.yaml",
        "qlora_nb/py.typed",
        "qlora_nb/embedded/run/config.yaml",
        "qlora_nb/embedded/run/metrics.jsonl",
        "qlora_nb/embedded/run/adapter/adapter_model.safetensors",
        "qlora_nb/engine/install.py",
    } <= set(names)
    assert not [name for name in names if not name.startswith("qlora_nb")]

    python = tmp_path / "venv/bin/python"
    constraints = str(source / "constraints.txt")
    pip = [str(python), "-m", "pip", "install", "-q", "-c", constraints]
    run([sys.executable, "-m", "venv", str(tmp_path / "venv")], tmp_path, env, 120)
    run([*pip, "torch"], tmp_path, env, 600)
    run([*pip, str(wheel)], tmp_path, env, 600)

    outside = tmp_path / "outside"
    outside.mkdir()
    found = run([str(python), "-c", "import qlora_nb; print(qlora_nb.__file__)"], outside, env, 60)
    assert Path(found.strip()).is_relative_to(tmp_path / "venv")
    command = str(tmp_path / "venv/bin/qlora_nb")
    assert "torch" in run([command, "info"], outside, env, 120)
    out = run([command, "train", "--max-steps", "5", "--output", "run"], outside, env, 300)
    folder = Path(out.splitlines()[-1])
    assert folder == (outside / "run").resolve()
    assert (folder / "adapter/adapter_model.safetensors").stat().st_size > 0
    assert json.loads((folder / "summary.json").read_text())["backend"] == "transformers"
    assert {path.name for path in outside.iterdir()} == {"run"}
