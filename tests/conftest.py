import gc
import os
import signal
from collections import defaultdict
from pathlib import Path

import processes
import pytest
from hypothesis import is_hypothesis_test
from repository import SITE_CHECK
from xdist.scheduler import LoadScopeScheduling

# Nothing in the tests may need the network, or send anything over it.
# Two tests run at a time, each with one thread: threads that wait for each other make them five times as slow.
os.environ.update(
    UNSLOTH_DISABLE_STATISTICS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    QLORA_NB_PROFILE="tiny",
)
# What runs in the background, or under nohup, ignores these, and so does what it starts: the tests send them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
# Notebooks choose their own backend for figures.
os.environ.pop("MPLBACKEND", None)

# CPU seconds of each test file in `make test`: what it may cost, not what a test fails for (machines differ).
BUDGETS = Path(__file__).with_name("budgets.txt")
LIMIT = 24  # CPU minutes of all of `make test`: twelve on two cores


@pytest.fixture(scope="module")
def browser():
    with SITE_CHECK["browser"]() as opened:
        yield opened


def pytest_addoption(parser):
    help_text = "the tests marked heavy, and those of properties with all their examples: a part of `make test-all`"
    parser.addoption("--heavy", action="store_true", help=help_text)


def pytest_configure(config):
    if config.getoption("--heavy"):
        os.environ["QLORA_NB_ALL_EXAMPLES"] = "1"
    if config.getoption("-m") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what these tests say is said of CPUs, whatever card there is


def pytest_collection_modifyitems(config, items):
    "Choose the tier."
    heavy, gpu = config.getoption("--heavy"), config.getoption("-m") == "cuda"
    wanted, other = [], []
    for item in items:
        mark = item.get_closest_marker
        tier = bool(mark("heavy")) == heavy or (heavy and is_hypothesis_test(getattr(item, "function", None)))
        right = bool(mark("cuda")) == gpu and (gpu or tier)
        (wanted if right else other).append(item)
    config.hook.pytest_deselected(items=other)
    items[:] = wanted


class OneProcessAFile(LoadScopeScheduling):
    """Tests that share what was made once for their module run in one process: two would make it twice. Others run one
    by one. (xdist's own groups do nothing with pytest 9.)"""

    def _split_scope(self, nodeid):
        file = Path(nodeid.split("::")[0])
        return str(file) if file.name in SHARING else nodeid


SHARING = {path.name for path in Path(__file__).parent.glob("test_*.py") if 'scope="module"' in path.read_text()}


@pytest.hookimpl(optionalhook=True)  # without xdist there is nothing to schedule
def pytest_xdist_make_scheduler(config, log):
    return OneProcessAFile(config, log)


# --- imports are not looked at again --------------------------------------------------------------------------------

_FROZEN_FOR = []


def freeze_imports(path):
    "Before a file's first test: a garbage collection (each training makes one) then passes over what is imported."
    if path not in _FROZEN_FOR:
        _FROZEN_FOR.append(path)
        gc.collect()
        gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or nanobind takes what it finds at the end for leaks


# --- what each file costs -------------------------------------------------------------------------------------------


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    "The CPU time of a test with its fixtures, in this process and in those that it started and waited for."
    before = sum(os.times()[:4]) + processes.spent
    item.cpu_seconds = lambda: sum(os.times()[:4]) + processes.spent - before
    freeze_imports(item.path)
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "teardown":
        outcome.get_result().user_properties.append(("cpu_seconds", item.cpu_seconds()))


def pytest_terminal_summary(terminalreporter, config):
    "A line a file: CPU seconds, and the budget where they are over it; when workers ended; the slowest tests with -vv."
    spent, tests, ends = defaultdict(float), [], defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if worker := getattr(report, "worker_id", None):
                ends[worker] = max(ends[worker], report.stop)
            for name, seconds in getattr(report, "user_properties", []):
                if name == "cpu_seconds" and report.when == "teardown":
                    spent[report.nodeid.split("::")[0]] += seconds
                    tests.append((seconds, report.nodeid))
    if sum(spent.values()) < 60:
        return
    budgets = {}
    if not config.getoption("--heavy"):
        budgets = {name: float(seconds) for name, seconds in map(str.split, BUDGETS.read_text().splitlines())}
    terminalreporter.section("CPU seconds of each file")
    for name, seconds in sorted(spent.items(), key=lambda pair: -pair[1]):
        budget = budgets.get(Path(name).stem, 10 if budgets else 0)
        over = f"   over its budget of {budget:.0f}" if budget and seconds > budget else ""
        terminalreporter.write_line(f"{seconds:8.1f}  {name}{over}")
    minutes = sum(spent.values()) / 60
    over = f"   over the {LIMIT} of make test" if budgets and minutes > LIMIT else ""
    terminalreporter.write_line(f"{minutes:8.1f}  CPU minutes in all{over}")
    if ends:
        waited = ", ".join(f"{worker} {max(ends.values()) - end:.0f} s" for worker, end in sorted(ends.items()))
        terminalreporter.write_line(f"          workers that had nothing left to do, before the end: {waited}")
    if config.getoption("verbose") > 1:
        terminalreporter.section("the slowest tests")
        for seconds, name in sorted(tests, reverse=True)[:150]:
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    "Runs the command line in this process, in a folder of its own: (exit code, stdout, stderr)."
    from qlora_nb.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            main([str(a) for a in arguments])
        except SystemExit as stopped:
            return stopped.code or 0, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return run
