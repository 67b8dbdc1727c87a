import sys

import pytest
from common import clean_env, clone, run


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "A clone of the commit, and the folder of the wheel and the archive of sources that are built from it, once."
    place = tmp_path_factory.mktemp("built")
    source = clone(place)
    run([sys.executable, "-m", "build", "--outdir", str(place / "dist"), str(source)], place, clean_env(place), 300)
    return source, place / "dist"
