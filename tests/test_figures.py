"""Interactive figures: in a browser their JavaScript gives what Python gives, and they need nothing outside themselves.

The browser is Chromium, driven by Playwright's Python package, as in test_report.py. The large grid is a part of
`make test-all`.
"""

import contextlib
import random
import re
from dataclasses import asdict
from fnmatch import fnmatch

import pytest
import torch
from repository import NOTEBOOKS, PACKAGE, ROOT, needs_browser, read, tool

from qlora_nb.core import UserError
from qlora_nb.figures import (
    CALCULATOR_SHAPES,
    SAMPLE_WEIGHTS,
    WEIGHT_KINDS,
    draw_weights,
    memory_calculator,
    nf4_figure,
    rank_figure,
    read_measured_runs,
)
from qlora_nb.javascript import write_javascript
from qlora_nb.lora import TARGET_MODULES
from qlora_nb.memory import CHECKPOINTING_KINDS, MEMORY_BACKENDS, OPTIMIZER_KINDS, TRAINING_METHODS, estimate_memory
from qlora_nb.nf4 import FOUR_BIT_CODES, KNOWN_BLOCKSIZES, fake_quantize, quantize_nf4
from qlora_nb.shapes import Shape, list_architectures

CHANGES = {
    "layers.0.q_proj": torch.randn(24, 40, generator=torch.Generator().manual_seed(0)),
    "layers.0.up_proj": 3 * torch.outer(torch.arange(1.0, 101), torch.arange(1.0, 81)),
    "layers.1.q_proj": torch.randn(24, 40, generator=torch.Generator().manual_seed(1)).cumsum(1),
}


@pytest.fixture(scope="module")
def figures():
    return {"memory": memory_calculator(), "nf4": nf4_figure(), "rank": rank_figure(CHANGES)}


# --- without a browser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "nf4", "rank"])
def test_a_figure_is_one_piece(figures, kind):
    "Nothing from elsewhere, no id (two on a page would share it), nothing that ends the raw HTML or a script."
    text = figures[kind]._repr_html_()
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<[^>]+\s(?:id|on\w+)=|\bimport\b|@import|url\(|fetch\(|eval\(|innerHTML", text)
    assert not re.search(r"^\s*(```|~~~)", text, re.M) and text.count("</script>") == 2
    bundle = figures[kind]._repr_mimebundle_()
    assert bundle["text/html"] == text and bundle["image/svg+xml"].startswith("<svg ") and bundle["text/plain"]


def test_scripts_are_in_the_package():
    names = {"figures.css", "python.js", "figures.js", *(f"figure_{kind}.js" for kind in ("memory", "nf4", "rank"))}
    assert names <= {path.name for path in (PACKAGE / "templates").iterdir()}
    packed = re.findall(r'"templates/(\*\.\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    listed = re.search(r"qlora_nb/templates (.*)", (ROOT / "MANIFEST.in").read_text(encoding="utf-8"))[1].split()
    for patterns in (packed, listed):
        assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in names)


def test_stored_figures_are_made_by_the_scripts_of_today(figures):
    "The notebooks store a figure with its program: tools/refresh_figures.py puts in that of today."
    found = []
    for path in NOTEBOOKS:
        for cell in read(path)["cells"]:
            for output in cell.get("outputs", []):
                text = "".join(output.get("data", {}).get("text/html", ""))
                if match := re.match(r'<div class="qnb-figure" data-figure="(\w+)"', text):
                    found.append((path.stem, match[1]))
                    made = figures[match[1]]._repr_html_()
                    where = f"{path.name} cell {cell['id']}: run python tools/refresh_figures.py"
                    assert text.partition("</div>")[2] == made.partition("</div>")[2], where
                    assert "image/svg+xml" in output["data"], where
    assert {("38_figures", kind) for kind in figures} <= set(found)


def test_the_measured_runs_can_be_set():
    "Each is one of the calculator's models, methods and lengths."
    data = memory_calculator().data
    for run in read_measured_runs():
        chosen = run["settings"]
        assert chosen["model"] in data["models"] and chosen["seq_length"] in data["lengths"]
        assert chosen["optimizer"] in data["optimizers"] and chosen["backend"] in data["backends"]


def test_what_is_no_arithmetic_is_refused():
    def opens(name):
        with open(name) as file:
            return file.read()

    def unknown(x):
        return undefined_name(x)  # noqa: F821

    def named(a, *, b=2):
        return a + b

    def same_list(x):
        return x == [1, 2]

    def rounded(x):
        return round(x, 2)

    refused = {opens: "With can't", unknown: "undefined_name is neither", named: "only a name", same_list: "Eq can't"}
    for function, words in (refused | {rounded: "round with digits"}).items():
        with pytest.raises(UserError, match=words):
            write_javascript(function)


# --- in a browser -----------------------------------------------------------------------------------------------------


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>figures</title><style>@media (prefers-color-scheme: dark) {{ body {{ background: #222; color: #eee }} }}</style>
</head><body><main>{}</main></body></html>"""


@contextlib.contextmanager
def opened(browser, folder, *figures, width=1000, scheme="light", script=True):
    "A page with these figures, and what went wrong in it: console messages, errors, requests beside the one for it."
    (folder / "page.html").write_text(PAGE.format("\n".join(f._repr_html_() for f in figures)), encoding="utf-8")
    size = {"width": width, "height": 900}
    page = browser.new_page(viewport=size, color_scheme=scheme, java_script_enabled=script)
    wrong = []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda request: wrong.append(f"request: {request.url}"))
    page.goto((folder / "page.html").as_uri())
    wrong = [line for line in wrong if not line.startswith(("request: file:", "request: data:"))]
    try:
        yield page, wrong
    finally:
        page.close()


def said(page, number=0):
    return page.locator("output").nth(number).inner_text().replace("\u00a0", " ")


def random_case(draw):
    "A shape and settings, some of them odd; None where Python refuses them."
    kv_heads, heads = draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 4, 7])
    shape = Shape(
        draw.choice(list_architectures("memory")), draw.choice([256, 896, 2048, 3072, 3584, 5120, 8192]),
        draw.choice([512, 4864, 8192, 11008, 14336, 28672]), draw.randint(1, 90), kv_heads * heads, kv_heads,
        draw.choice([64, 128, 256]), draw.choice([768, 32_000, 32_768, 128_256, 151_936, 256_000]), draw.random() < 0.5,
        131_072, draw.choice([2, 4]), *(draw.random() < 0.3 for _ in range(3)), draw.choice([0, 0, 0, 412_345_678]),
    )  # fmt: skip
    choices = dict(
        method=TRAINING_METHODS, r=(1, 7, 8, 16, 64, 256), batch_size=(1, 2, 3, 8, 64), backend=MEMORY_BACKENDS,
        max_seq_length=(None, 1, 2, 255, 512, 1000, 4097, 131_072), seq_length=(None, None, 1, 300, 2048, 32_768),
        gradient_checkpointing=CHECKPOINTING_KINDS, optimizer=tuple(OPTIMIZER_KINDS), dtype=("bf16", "fp16", "fp32"),
        accumulation=(1, 4), padded=(False, False, True), adapter_bytes=(2, 4), bf16=(True, True, False),
        card=(None, 16e9, 24.5 * 2**30, 150e9), hopper=(True, False), loss_rows=(None, None, 1, 512),
        packing=(False, True), gpus=(1, 1, 1, 2, 4), shard=(False, False, True),
    )  # fmt: skip
    settings = {name: draw.choice(values) for name, values in choices.items()}
    settings["target_modules"] = draw.sample(TARGET_MODULES, draw.randint(1, 7))
    try:
        return shape, estimate_memory(shape, **settings)
    except UserError:
        return None


@needs_browser
@pytest.mark.parametrize("count", [400, pytest.param(5000, marks=pytest.mark.heavy)])
def test_the_calculator_is_pythons_to_the_byte(figures, browser, tmp_path, count):
    draw, cases = random.Random(3407 + count), []
    while len(cases) < count:
        if case := random_case(draw):
            cases.append(case)
    estimates = [estimate for _, estimate in cases]
    assert {e.moment for e in estimates} == {
        "loss", "last layer", "first layer", "optimizer", "embedding", "adding up"
    }  # fmt: skip
    assert {(e.settings["gpus"], e.settings["shard"]) for e in estimates} == {
        (1, False), (2, False), (4, False), (2, True), (4, True)
    }  # fmt: skip
    assert {e.settings["backend"] for e in estimates} == set(MEMORY_BACKENDS)
    rows = [[asdict(shape), estimate.settings] for shape, estimate in cases]
    with opened(browser, tmp_path, figures["memory"]) as (page, wrong):
        found = page.evaluate("rows => rows.map(r => document.querySelector('.qnb-figure').estimate(...r))", rows)
    assert wrong == []
    for row, estimate, one in zip(rows, estimates, found):
        assert one == {"by_component": estimate.by_component, "moment": estimate.moment}, row


@needs_browser
def test_the_calculators_controls_set_what_they_say(figures, browser, tmp_path):
    "Every measured run by its entry, own numbers, keys: the total is Python's; what is invalid is said."
    cards = memory_calculator().data["cards"]

    def expected(shape, card, method, **settings):
        gpu = {"card": cards[card]["total"], "bf16": cards[card]["bf16"], "hopper": cards[card]["hopper"]}
        return f"{estimate_memory(shape, method, **{**gpu, **settings}).total_bytes / 2**30:.2f} GiB"

    with opened(browser, tmp_path, figures["memory"]) as (page, wrong):
        box = lambda name: page.get_by_label(name, exact=True)  # noqa: E731
        three = CALCULATOR_SHAPES["Llama-3.2-3B"]
        assert said(page).startswith(f"Fits: {expected(three, 'T4', 'qlora')} of ")
        for number, run in enumerate(read_measured_runs()):
            box("a measured run (one H200)").select_option(str(number))
            chosen = {name: value for name, value in run["settings"].items() if name not in ("model", "method")}
            shape = CALCULATOR_SHAPES[run["settings"]["model"]]
            total = expected(shape, "H200", run["settings"]["method"], **chosen, **run["extra"])
            assert f" {total} of " in said(page), run["label"]
            assert page.locator("circle.measured").count() >= 1
            text = page.locator(".qnb-figure p").inner_text().replace("\u00a0", " ")
            assert f"included: {run['bytes'] / 2**30:.2f} GiB; computed for it: {total} (" in text
        box("method").select_option("qlora")
        box("GPU").select_option("RTX 4090")
        box("backend").select_option("unsloth")
        box("model").select_option("Gemma-2-9B")
        box("rows in a batch").fill("1")
        box("rank").fill("16")
        page.locator("input[type=range]").focus()
        page.keyboard.press("Home")
        gemma = CALCULATOR_SHAPES["Gemma-2-9B"]
        begin = expected(gemma, "RTX 4090", "qlora", batch_size=1, seq_length=256)
        assert said(page).startswith(f"Fits: {begin} of ")
        page.keyboard.press("ArrowRight")
        assert page.locator("input[type=range]").get_attribute("aria-valuetext") == "384"
        after = expected(gemma, "RTX 4090", "qlora", batch_size=1, seq_length=384)
        assert said(page).startswith(f"Fits: {after} of ")
        assert box("backend").locator("option[value=engine]").is_disabled()
        page.locator("summary").click()
        box("layers").fill("84")
        assert box("model").input_value() == "own"
        own = Shape(**{**asdict(gemma), "layers": 84})
        assert expected(own, "RTX 4090", "qlora", batch_size=1, seq_length=384) in said(page)
        several = {**asdict(gemma), "layers": 84}
        box("GPUs").fill("2")
        assert box("backend").input_value() == "transformers"
        assert box("backend").locator("option[value=unsloth]").is_disabled()
        how = {"batch_size": 1, "accumulation": 2, "seq_length": 384, "gpus": 2}
        for shard in (False, True):
            box("base sharded").set_checked(shard)
            assert expected(Shape(**several), "RTX 4090", "qlora", shard=shard, **how) in said(page)
            assert "Each of 2 GPUs takes this, and a step reads 2 × 1 rows." in said(page)
        box("method").select_option("full")
        assert said(page) == "GPUs: several share the training of an adapter, not of a whole model"
        box("method").select_option("qlora")
        box("GPUs").fill("1")
        assert box("base sharded").is_disabled() and not box("base sharded").is_checked()
        box("backend").select_option("unsloth")
        box("rank").fill("100000")
        assert said(page).startswith("rank: the narrowest matrix has 2048 rows or columns")
        box("rank").fill("1.5")
        assert said(page) == "rank: give a whole number of at least 1"
    assert wrong == []


@needs_browser
def test_the_calculator_begins_with_several_gpus(browser, tmp_path):
    figure = memory_calculator("Llama-3.1-70B", card="RTX 4090", gpus=4, shard=True, batch_size=2, accumulation=4)
    gpu = figure.data["cards"]["RTX 4090"]
    how = {"card": gpu["total"], "hopper": False, "gpus": 4, "shard": True, "batch_size": 2, "accumulation": 4}
    total = f"{estimate_memory(CALCULATOR_SHAPES['Llama-3.1-70B'], **how).total_bytes / 2**30:.2f} GiB"
    assert figure.title.endswith(f"takes {total} on each of 4 GPUs")
    with opened(browser, tmp_path, figure) as (page, wrong):
        assert said(page).startswith(f"Fits: {total} of ") and "on each RTX 4090" in said(page)
        assert page.get_by_label("base sharded", exact=True).is_checked()
        assert page.locator("circle.measured").count() == 0
    assert wrong == []


@needs_browser
def test_nf4_is_pythons(figures, browser, tmp_path):
    "Also the package's own quantizer's: the same weights come back, but for what fp32 rounds."
    with opened(browser, tmp_path, figures["nf4"]) as (page, wrong):
        for kind in WEIGHT_KINDS:
            weights = torch.tensor(draw_weights(kind, SAMPLE_WEIGHTS), dtype=torch.float64)
            for code, blocksize in [(c, b) for c in FOUR_BIT_CODES for b in KNOWN_BLOCKSIZES]:
                restored = fake_quantize(weights.float(), code, blocksize).double()
                error = ((restored - weights).norm() / weights.norm()).item()
                given = [kind, code, blocksize]
                found = page.evaluate("given => document.querySelector('.qnb-figure').error(...given)", given)
                assert found == pytest.approx(error, rel=1e-6), given
            ours = quantize_nf4(weights.float(), 64, double_quant=False).dequantize()
            theirs = page.evaluate("kind => document.querySelector('.qnb-figure').restore(kind, 'nf4', 64)", kind)
            torch.testing.assert_close(torch.tensor(theirs), ours, rtol=1e-6, atol=1e-6)
        page.get_by_label("the weights' distribution", exact=True).select_option("outliers")
        page.get_by_label("values", exact=True).select_option("int4")
        shown = page.evaluate("document.querySelector('.qnb-figure').error('outliers', 'int4', 64)")
        assert said(page).startswith(f"Error: {100 * shown:.2f} % of the weights' own size, at 4.500 bits a weight")
        page.locator("input[type=range]").focus()
        page.keyboard.press("End")
        assert "at 4.008 bits a weight" in said(page) and "Block 1 of 2" in said(page)
    assert wrong == []


@needs_browser
def test_rank_is_pythons(figures, browser, tmp_path):
    def share(names, r):
        squares = [torch.linalg.svdvals(CHANGES[name].double()).square() for name in names]
        return sum(s[:r].sum() for s in squares) / sum(s.sum() for s in squares)

    with opened(browser, tmp_path, figures["rank"]) as (page, wrong):
        for names in (list(CHANGES), ["layers.0.q_proj"], ["layers.1.q_proj"]):
            for r in (1, 2, 8, 23, 24, 64):
                given = [names, r]
                found = page.evaluate("given => document.querySelector('.qnb-figure').energy(...given)", given)
                assert found == pytest.approx(share(names, r).item(), abs=2e-5), given
        page.get_by_label("matrix", exact=True).select_option("layers.1.q_proj")
        page.locator("input[type=range]").focus()
        page.keyboard.press("Home")
        kept = 100 * share(["layers.1.q_proj"], 1).item()
        assert said(page).startswith(
            f"The best update of rank 1 keeps {kept:.1f} % of the change's energy, with 64 numbers"
        )
        assert "1,519,616 parameters, 6.1 MB" in said(page)
    assert wrong == []


@needs_browser
@pytest.mark.parametrize("scheme, width", [("light", 1000), ("dark", 390)])
def test_two_of_each_live_on_one_page(figures, browser, tmp_path, scheme, width):
    "In both schemes, at a phone's width; every control and picture has a name, and its text a contrast of 4.5."
    with opened(browser, tmp_path, *figures.values(), *figures.values(), width=width, scheme=scheme) as (page, wrong):
        assert page.locator(".qnb-figure[data-live] output").count() == 6 and page.locator("img").count() == 0
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        assert page.evaluate("[...document.querySelectorAll('input, select')].every(e => e.getAttribute('aria-label'))")
        assert page.evaluate("[...document.querySelectorAll('svg')].every(e => e.getAttribute('aria-label'))")
        assert page.evaluate(tool("check_site")["FAINT"]) == {}
        first, second = said(page, 0), said(page, 3)
        page.locator("input[type=range]").nth(0).press("ArrowRight")
        assert said(page, 0) != first and said(page, 3) == second, "each has its own controls"
    assert wrong == []


@needs_browser
def test_without_scripts_a_picture_stands_there(figures, browser, tmp_path):
    with opened(browser, tmp_path, *figures.values(), script=False) as (page, _):
        pictures = page.locator(".qnb-figure img")
        assert pictures.count() == 3 and page.locator("input, select").count() == 0
        for i in range(3):
            size = pictures.nth(i).bounding_box()
            assert size["width"] > 300 and size["height"] > 80 and pictures.nth(i).get_attribute("alt")
