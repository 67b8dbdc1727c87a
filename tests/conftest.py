import os

import pytest

# Nothing in the tests may need the network, or send anything over it.
# Two tests run at a time, each with one thread: threads that wait for each other make them five times as slow.
os.environ.update(
    UNSLOTH_DISABLE_STATISTICS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    QLORA_NB_PROFILE="tiny",
)
# Notebooks choose their own backend for figures.
os.environ.pop("MPLBACKEND", None)


def pytest_collection_modifyitems(items):
    "Tests that share what was made once for their module run in one process: two would make it twice."
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if any(one[-1].scope == "module" for one in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
