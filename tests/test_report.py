"""The report of a run: in a real browser, with hostile content, with files missing or broken; and comparisons.

The browser is Debian's Chromium (`apt-get install --no-install-recommends chromium`), driven by Playwright's Python
package (`pip install playwright`; its own browsers are not downloaded).
"""

import contextlib
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import processes
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from PIL import Image, ImageChops
from repository import examples, needs_browser

from qlora_nb.core import UserError, write_jsonl
from qlora_nb.evaluation import format_figure
from qlora_nb.report import (
    Chart,
    Line,
    RunFacts,
    choose_ticks,
    choose_window,
    clean_text,
    compare,
    draw_loss,
    format_value,
    gather_facts,
    load_templates,
    mark_changes,
    render_markdown,
    render_page,
    render_part,
    shorten_text,
    show_report,
    sign_test,
    write_reports,
)

# Each would set window.hit, or ask for something, if it were taken for markup.
ATTACKS = [
    "<script>window.hit=1</script>",
    '"><img src=x onerror="window.hit=2">',
    "'><svg onload='window.hit=3'>",
    "</title><script>window.hit=4</script>",
    "</style><script>window.hit=5</script>",
    "<iframe srcdoc='<script>parent.hit=6</script>'></iframe>",
    '" autofocus onfocus="window.hit=7" x="',
    "<a href='javascript:window.hit=8'>x</a><link rel=stylesheet href=https://example.com/x.css>",
    "<!-- ]]> --><![CDATA[ &lt;b&gt; &amp;#60; \u202eright to left\x00\x1b[31m",
]
NAME = "it's <img src=x onerror=window.hit=9> & more"


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def hostile(place):
    "A real run on a data set, in a file and a folder, that all try to be markup."
    rows = [
        {"messages": [
            {"role": "user", "content": f"What is {i} + 1? {ATTACKS[i % len(ATTACKS)]}"},
            {"role": "assistant", "content": f"{ATTACKS[-1 - i % len(ATTACKS)]} The answer is {i + 1}."},
        ]}
        for i in range(60)
    ]  # fmt: skip
    write_jsonl(place / "<img src=x onerror=window.hit=10>.jsonl", rows)
    done = processes.qlora_nb("train", "--data", "<img src=x onerror=window.hit=10>.jsonl", "--output", NAME,
                              "--max-steps", "12", "--eval-rows", "6", "--max-new-tokens", "48", cwd=place)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return place / NAME


def finding(code, severity, text):
    said = dict.fromkeys(("cause", "fix"), text)
    return {"code": code, "severity": severity, "count": 3, "rows": [0, 4, text], **said}


@pytest.fixture(scope="module")
def full(hostile, place):
    "That run with every optional file, hostile too, and replies that were exchanged for the attacks."
    path = shutil.copytree(hostile, place / "full <script>window.hit=11</script>".replace("/", "_"))
    (path / "manifest.json").unlink()  # it is changed on purpose
    everything = " ".join(ATTACKS)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config |= {"model": everything, "system": everything, "target_modules": ATTACKS, ATTACKS[1]: ATTACKS[2]}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    replies = [json.loads(line) for line in open(path / "evaluation.jsonl")]
    for i, row in enumerate(replies):
        row |= {"problem": everything + str(i % 6), "reply": ATTACKS[i % 9] + everything, "expected": everything,
                "exact": i % 5 != 2, "form": i >= 6}  # fmt: skip
    write_jsonl(path / "evaluation.jsonl", replies)
    summary = json.loads((path / "summary.json").read_text())
    gib = 2**30
    summary["plan"] = {"card": everything, "choice": everything, "why": everything, "budget_bytes": 14 * gib,
                       "predicted": {"allocated_bytes": 6 * gib, "reserved_bytes": 7 * gib, "moment": everything},
                       "measured": {"allocated_bytes": 5 * gib, "reserved_bytes": 7 * gib}}  # fmt: skip
    summary["before"]["exact"], summary["after"]["exact"] = 5 / 6, 4 / 6
    summary["before"]["form"], summary["after"]["form"] = 0.0, 1.0
    (path / "summary.json").write_text(json.dumps(summary))
    versions = json.loads((path / "versions.json").read_text())
    (path / "versions.json").write_text(json.dumps({**versions, "device": everything, ATTACKS[0]: everything}))
    severities = ("info", "error", "warning", ATTACKS[1])
    found = [finding(ATTACKS[i], severity, everything) for i, severity in enumerate(severities)]
    report = {"ok": False, "summary": {ATTACKS[1]: everything}, "findings": found}
    (path / "preflight.json").write_text(json.dumps(report))
    (path / "diagnosis.json").write_text(json.dumps(found))
    (path / "stopped.json").write_text(json.dumps({"step": 3, "cause": everything}))
    (path / "gguf").mkdir()
    check = {"name": everything, "quantization": "Q8_0", "top1": 0.98, "sha256": "ab" * 32, ATTACKS[1]: ATTACKS[2]}
    for name, n in (("gguf/certificate.json", 2), (f"{ATTACKS[1]}.certificate.json", 9)):
        made = {"passed": n == 2, "failures": [everything], "checks": [check] * n, everything: everything}
        (path / name).write_text(json.dumps(made))
    return path


@pytest.fixture(scope="module")
def plain(hostile, place):
    "The run with a harmless name and the curves of a longer training."
    path = shutil.copytree(hostile, place / "plain")
    (path / "manifest.json").unlink()  # it is changed on purpose, here and below
    rows = [
        {"step": i, "loss": 3 * math.exp(-i / 40) + 0.5 + 0.1 * math.sin(9 * i), "learning_rate": 2e-4 * (1 - i / 300),
         "grad_norm": None if i == 7 else 1 + 0.5 * math.sin(i), "tokens_per_second": 2900 + i, "peak_allocated": None,
         **({"eval_loss": 1 + 30 / i} if i % 25 == 0 else {})}
        for i in range(1, 301)
    ]  # fmt: skip
    write_jsonl(path / "metrics.jsonl", rows)
    return path


# --- a browser ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(browser, path, width=1400, scheme="light", unfold=True):
    "A page, and what went wrong in it: console messages, errors, dialogs, and requests beside the one for the page."
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong = []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda request: wrong.append(f"request: {request.url}"))
    page.on("dialog", lambda dialog: (wrong.append("dialog"), dialog.dismiss()))
    page.goto(path.as_uri())
    if unfold:
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    wrong.remove(f"request: {page.url}")
    try:
        yield page, wrong
    finally:
        page.close()


# Each width and each scheme once in `make test`, all four in `make test-all`.
heavy_screens = [pytest.param(*screen, marks=pytest.mark.heavy) for screen in (("light", 1400), ("dark", 400))]
schemes = pytest.mark.parametrize("scheme", ["light", "dark"])
screens = pytest.mark.parametrize("scheme, width", [("light", 400), ("dark", 1400), *heavy_screens])
each_run = pytest.mark.parametrize("run", ["hostile", "full", "plain"])

OUTSIDE = """() => [...document.querySelectorAll('body *')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && !e.closest('.scroll') && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(e => e.outerHTML.slice(0, 150))"""


@needs_browser
@each_run
@screens
def test_it_loads_and_fits(browser, request, run, width, scheme):
    path = write_reports(request.getfixturevalue(run))
    with opened(browser, path, width, scheme) as (page, wrong):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OUTSIDE) == [], "sticks out of the page"
        assert page.title().endswith("fine-tuning report")
        assert len(page.query_selector_all("section")) == 10
        assert wrong == []


@needs_browser
@screens
def test_the_plots_are_seen(browser, full, plain, width, scheme):
    "Every plot has a size and stands inside the page; without its lines, dots and bars each looks different."
    hide = "document.querySelectorAll('polyline, .dot, .bar').forEach(e => e.style.visibility = 'hidden')"
    for run, plots in ((plain, {".chart": 4, ".shares": 4}), (full, {".chart": 4, ".shares": 6, ".track": 5})):
        with opened(browser, write_reports(run), width, scheme, unfold=False) as (page, _):
            for kind, count in plots.items():
                boxes = [one.bounding_box() for one in page.query_selector_all(f"svg{kind}")]
                assert len(boxes) == count, kind
                for box in boxes:
                    assert box["width"] >= 100 and box["height"] >= 12, (kind, box)
                    assert box["x"] >= 0 and box["x"] + box["width"] <= width, (kind, box)
            for line in page.query_selector_all(".chart polyline"):
                box = line.bounding_box()
                assert box["width"] > 90 and (box["height"] > 5 or "level" in line.get_attribute("class")), box
            seen = page.screenshot(full_page=True)
            page.evaluate(hide)
            differs = difference(seen, page.screenshot(full_page=True))
            for one in page.query_selector_all(", ".join(f"svg{kind}" for kind in plots)):
                x, y, w, h = one.bounding_box().values()
                changed = sum(differs.crop((int(x), int(y), int(x + w), int(y + h))).histogram()[40:])
                assert changed > 20, one.get_attribute("aria-label")


def difference(*pictures):
    "Where two PNGs of one size differ, and how much (0 to 255)."
    a, b = (Image.open(io.BytesIO(png)).convert("L") for png in pictures)
    return ImageChops.difference(a, b)


CONTRAST = """() => {
    const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n };
    const paper = e => { for (; e; e = e.parentElement) {
        const c = parse(getComputedStyle(e).backgroundColor); if (c[3] > 0) return c } return [255, 255, 255, 1] };
    const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b };
    const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
        return (x + 0.05) / (y + 0.05) };
    const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const e = walk.currentNode.parentElement;
        if (!walk.currentNode.textContent.trim() || !e.getClientRects().length) continue;
        const s = getComputedStyle(e), ink = parse(e.closest('svg') ? s.fill : s.color);
        found.push([ratio(ink, paper(e)), 'text', walk.currentNode.textContent.slice(0, 40)]);
    }
    const marks = 'polyline.line:not(.faint):not(.level), .dot.after, .reach.after, .bar.measured';
    for (const e of document.querySelectorAll(marks)) {
        const s = getComputedStyle(e), ink = parse(s.fill === 'none' || e.matches('.reach') ? s.stroke : s.fill);
        found.push([ratio(ink, paper(e.closest('svg').parentElement)), 'mark', e.getAttribute('class')]);
    }
    return found;
}"""


@needs_browser
@schemes
@pytest.mark.parametrize("media", ["screen", "print"])
def test_text_can_be_read(browser, full, plain, scheme, media):
    "Contrast of every piece of text with what is behind it: 4.5 (WCAG AA); of the marks of plots: 3."
    for run in (full, plain):
        with opened(browser, write_reports(run), scheme=scheme) as (page, _):
            page.emulate_media(media=media, color_scheme=scheme)
            found = page.evaluate(CONTRAST)
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(kind == "text" for _, kind, _ in found) > 150 and sum(kind == "mark" for _, kind, _ in found) > 8
        assert [one for one in found if one[0] < (4.5 if one[1] == "text" else 3)] == []
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light" or media == "print"), paper


@needs_browser
@pytest.mark.parametrize("policy", [True, False], ids=["as it is", "without its policy"])
def test_hostile_content_is_inert(browser, full, place, policy):
    "Escaping alone must do: also without the page's own Content-Security-Policy nothing runs and nothing is asked for."
    text = write_reports(full).read_text(encoding="utf-8")
    if not policy:
        text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        assert count == 1
    path = place / f"inert-{policy}.html"
    path.write_text(text, encoding="utf-8")
    with opened(browser, path) as (page, wrong):
        page.wait_for_timeout(300)
        assert page.evaluate("window.hit") is None
        assert page.query_selector_all("script, img, iframe, object, embed, a, form, input, foreignObject") == []
        names = page.evaluate("[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())")
        assert [name for name in names if name.startswith("on") or name == "autofocus"] == []
        said = page.evaluate("document.body.textContent")
        for attack in ATTACKS[:-1]:
            assert said.count(attack) >= 10, f"not shown as text: {attack}"
        assert wrong == []


@needs_browser
def test_the_test_of_hostile_content_can_fail(browser, place):
    "The same checks see an attack that was let through."
    path = place / "attacked.html"
    path.write_text(f"<!DOCTYPE html><title>x</title><p>{ATTACKS[1]}", encoding="utf-8")
    with opened(browser, path) as (page, wrong):
        page.wait_for_timeout(300)
        assert page.evaluate("window.hit") == 2 and any(what.startswith("request: ") for what in wrong)


@needs_browser
@each_run
def test_it_prints(browser, request, run, place):
    with opened(browser, write_reports(request.getfixturevalue(run)), width=680) as (page, wrong):
        page.emulate_media(media="print")
        assert page.evaluate("document.documentElement.scrollWidth") <= 680  # A4 less its margins
        pdf = page.pdf(format="A4")
        assert wrong == []
    assert pdf.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type /Page\b", pdf)) <= 60


@needs_browser
def test_shown_inside_a_notebook(browser, full, place):
    "The frame of a notebook holds the whole page, and nothing gets out of it."
    path = place / "notebook.html"
    shown = show_report(full)._repr_html_()
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8><title>x</title>{shown}", encoding="utf-8")
    with opened(browser, path) as (page, wrong):
        frame = page.frame_locator("iframe")
        assert frame.locator("section").count() == 10 and ATTACKS[0] in frame.locator("h1").inner_text()
        assert page.evaluate("window.hit") is None and page.locator("h1").count() == 0
        assert [what for what in wrong if "srcdoc" not in what] == []


@needs_browser
@screens
def test_a_comparison_in_the_browser(browser, full, plain, hostile, place, width, scheme):
    path = compare([full, plain, hostile]).write(place / "comparison.html")
    with opened(browser, path, width, scheme) as (page, wrong):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OUTSIDE) == []
        assert len(page.query_selector_all(".chart polyline")) == 3
        assert [one for one in page.evaluate(CONTRAST) if one[0] < (4.5 if one[1] == "text" else 3)] == []
        assert page.evaluate("window.hit") is None and wrong == []


# --- what it says ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    "Elements, attributes and text of a page, by Python's own parser."

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.code = set(), set(), "", []
        self.inside = None
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.tags.add(name)
        self.attributes |= {(name, key) for key, _ in attributes}
        self.inside = name
        if name == "code":
            self.code.append("")

    def handle_endtag(self, name):
        self.inside = None

    def handle_data(self, data):
        self.text += "" if self.inside == "style" else data
        if self.inside == "code":
            self.code[-1] += data


TAGS = set(
    "html head meta link title style body main header footer section h1 h2 h3 h4 p b dl div dt dd details summary ul "
    "li span code pre figure figcaption svg line text polyline circle rect article blockquote del ins table thead "
    "tbody tr th td".split()
)


@each_run
def test_only_our_own_elements(request, run):
    page = Page(render_page(request.getfixturevalue(run)))
    assert page.tags <= TAGS, page.tags - TAGS
    outside = {pair for pair in page.attributes if pair[1].startswith("on") or pair[1] in ("href", "src", "srcdoc")}
    assert outside == {("link", "href")}


text = st.text(st.one_of(st.sampled_from("<>\"'&;/=!-[]\x00\ud800\u202e\n"), st.characters()), max_size=60)


@settings(max_examples=examples(60), deadline=None)
@given(text)
def test_any_text_is_escaped(value):
    made = load_templates().from_string('<p title="{{ v }}" class="{{ v }}">{{ v }}</p>').render(v=value)
    page = Page(made)
    assert page.tags == {"p"} and page.attributes == {("p", "title"), ("p", "class")}
    made.encode("utf-8")


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text, text)
def test_marking_keeps_the_text(before, after):
    for made, wanted in zip(mark_changes(before, after), (before, after)):
        assert isinstance(made, Markup) and Page(made).tags <= {"ins", "del"}
        assert html.unescape(re.sub("</?(?:ins|del)>", "", made)) == clean_text(wanted)


def test_marking_hostile_lengths():
    start = time.process_time()
    mark_changes(shorten_text("a " * 100_000), shorten_text("a b " * 100_000))
    mark_changes(shorten_text("ab" * 100_000 + "()" * 9), shorten_text("()" * 100_000))
    assert time.process_time() - start < 5


def test_the_page_asks_for_nothing(full):
    page = render_page(full)
    assert page.count("<link") == 1 and '<link rel="icon" href="data:,">' in page
    assert not re.search(r"url\(|@import|@font-face|<script|<img", page.partition("<body>")[0])
    assert "default-src 'none'" in page


def test_the_command_gives_the_same_adapter(hostile, place):
    "What stands under 'Run it again' is read by a shell as it stands, and run."
    command = next(code for code in Page(render_page(hostile)).code if code.startswith("qlora_nb train --config"))
    program = place / "bin" / "qlora_nb"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    read = subprocess.run(command, shell=True, cwd=place, env=env, capture_output=True, text=True, check=True)
    done = processes.qlora_nb(*json.loads(read.stdout), cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    again = Path(done.stdout.splitlines()[-1])
    old, new = (json.loads((path / "summary.json").read_text()) for path in (hostile, again))
    assert new["adapter_sha256"] == old["adapter_sha256"] and new["after"] == old["after"]


def test_the_four_lines_give_the_reply(hostile, place):
    lines = next(code for code in Page(render_page(hostile)).code if code.startswith("from qlora_nb import"))
    assert len(lines.splitlines()) == 4
    done = processes.run(lines, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    reply = next(row["reply"] for row in gather_facts(hostile).replies if row["stage"] == "after")
    assert reply.strip()[:40] in done.stdout  # the evaluation stops at 48 tokens


def test_figures_are_those_of_the_folder(plain):
    page, folder = Page(render_page(plain)), gather_facts(plain)
    config, summary, versions = folder.config, folder.summary, folder.versions
    for value in (config["r"], config["learning_rate"], summary["trainable"], versions["torch"]):
        assert format_value(value) in page.text
    for stage in ("before", "after"):
        assert f"{100 * folder.summary[stage]['exact']:.1f} %" in page.text
        assert f"{folder.summary[stage]['loss']:.3f}" in page.text
        assert folder.summary[stage]["form"] is None and "form that was asked for" not in page.text
        assert format_figure("base_perplexity", folder.summary[stage]["base_perplexity"]) in page.text
        assert (
            format_figure("loss", folder.summary[stage]["loss"], folder.summary[stage]["intervals"]["loss"])
            in page.text
        )
    assert "held-out" in page.text and "mean of 10" in page.text and "clipped above 1" in page.text


def without_answers(path):
    "The folder of a run whose expected replies hold no answer: its figures as `train` writes them."
    summary = json.loads((path / "summary.json").read_text())
    for stage in ("before", "after"):
        summary[stage].update(exact=None, form=None, base_perplexity=None)
    (path / "summary.json").write_text(json.dumps(summary))
    replies = [{**json.loads(line), "exact": None, "form": None} for line in open(path / "evaluation.jsonl")]
    write_jsonl(path / "evaluation.jsonl", replies)
    return summary


def test_the_held_out_loss_leads_where_nothing_can_be_judged(plain, tmp_path):
    path = shutil.copytree(plain, tmp_path / "copy")
    summary = without_answers(path)
    page = render_page(path)
    (big,) = re.findall(r'<p class="big">([^<]*)</p>', page)
    before, after = (f"{summary[stage]['loss']:.3f}" for stage in ("before", "after"))
    assert big == after and f"<b>{before}</b> before training" in page
    said = Page(page).text
    assert "6 rows got better, 0 worse" in said.partition("What was trained")[0]
    for word in ("right answers", "answered right", "form that was asked", "was forgotten", "base's own"):
        assert word not in said, word
    table = said.partition("In brackets")[2]
    assert table.index("held-out loss") < table.index("its perplexity") < table.index("stops by itself")
    assert 'class="tag ok">right' not in page and 'class="tag error">wrong' not in page and "no form" not in said
    figures = compare([path, path]).figures
    assert "held-out loss, after" in figures and not [n for n in figures if re.search("right|form|base", n)]


def test_a_mixture_says_how_many_rows_were_judged(plain, tmp_path):
    path = shutil.copytree(plain, tmp_path / "copy")
    replies = [json.loads(line) for line in open(path / "evaluation.jsonl")]
    replies = [{**row, "exact": row["exact"] if i % 3 else None} for i, row in enumerate(replies)]
    write_jsonl(path / "evaluation.jsonl", replies)
    said = Page(render_page(path)).text
    assert (
        "of the 4 of 6 held-out rows that can be judged answered right, judged by the number that it ends with" in said
    )
    assert (
        "Right answers: the 4 of 6 held-out rows that can be judged" in said
        and "right answers (number), 4 rows" in said
    )
    assert "Stops by itself: " not in said


def test_a_run_that_went_on_from_a_trained_adapter_says_so(plain, tmp_path):
    assert "trained adapter" not in Page(render_page(plain)).text
    path = shutil.copytree(plain, tmp_path / "copy")
    config = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump({**config, "started_from": "ab" * 32}))
    said = Page(render_page(path)).text
    assert f"this run started from a trained adapter, SHA-256 {'ab' * 32}" in said.partition("Run it again")[2]


def test_the_full_report_says_all(full):
    text = Page(render_page(full)).text
    assert "Predicted 6.00 GiB allocated, measured 5.00 GiB: 20.0 % too much." in text
    assert "The run was stopped at step 3" in text and "budget of the card" in text
    assert text.count("passed") == 1 and text.count("failed") == 1 and "abababababab…" in text


def test_held_out_loss_at_both_ends(plain, tmp_path):
    path = shutil.copytree(plain, tmp_path / "copy")
    rows = [{k: v for k, v in row.items() if k != "eval_loss"} for row in gather_facts(path).metrics]
    write_jsonl(path / "metrics.jsonl", rows)
    summary = json.loads((path / "summary.json").read_text())
    for stage in ("before", "after"):
        summary[stage].pop("loss")
    (path / "summary.json").write_text(json.dumps(summary))
    assert "held-out: " not in render_page(path)
    summary["before"]["loss"], summary["after"]["loss"] = 2.5, 1.25
    (path / "summary.json").write_text(json.dumps(summary))
    page = render_page(path)
    assert "held-out: 2.5 at step 0, 1.25 at the last" in page
    top = Page(page).text.partition("What was trained")[0]
    assert "1.250" in top and "2.500 before training" in top and "hesitates between 3.49 tokens" in top


def test_the_file_replaces_the_old_one(plain):
    path = write_reports(str(plain))
    assert path == plain / "report.html" and path.read_text(encoding="utf-8") == render_page(plain)
    (plain / "report.html").write_text("old")
    assert write_reports(plain).stat().st_size > 20_000
    assert [p.name for p in plain.iterdir() if p.name.startswith(".report")] == []


def test_a_report_is_the_same_twice(full):
    assert render_page(full) == render_page(full)


def test_markdown_of_the_same_facts(full, plain):
    "report.md is written beside the page; texts of others leave no mark of Markdown or HTML in its tables."
    path = write_reports(plain).with_name("report.md")
    said = path.read_text(encoding="utf-8")
    assert said == render_markdown(plain) and said.startswith("# Run of ") and "not finished" not in said
    for stage in ("before", "after"):
        assert (
            format_figure("loss", gather_facts(plain).summary[stage]["loss"])
            in said.partition("## Before and after")[2]
        )
    (rows,) = re.findall(r"\| problem \| before \| after \|\n\|---\|---\|---\|\n(.*?)\n\n", render_markdown(full), re.S)
    assert len(rows.split("\n")) == 3 and all(row.count("|") == 4 for row in rows.split("\n"))
    assert not set(re.findall(r"<[^>]*>", rows)) - {"<br>"} and "`" not in rows


# --- what is missing or broken --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "summary.json",
            "This run is not finished (it has no summary.json). Resume it with: qlora_nb train --resume copy",
        ),
        ("metrics.jsonl", "No step was logged yet"),
        ("evaluation.jsonl", "There are no replies to show"),
        ("versions.json", "Run it again"),
        ("preflight.json", "Look at them with qlora_nb check"),
        ("certificate.json", "Make it with qlora_nb certify copy."),
        ("adapter/adapter_model.safetensors", "There is no adapter yet"),
    ],
)
def test_a_missing_file(plain, tmp_path, name, said):
    path = shutil.copytree(plain, tmp_path / "copy")
    (path / name).unlink(missing_ok=True)
    assert said in Page(render_page(path)).text


BROKEN = {
    "cut off": b'{"a": [1, ',
    "empty": b"",
    "a list": b"[1, 2]",
    "a number": b"7",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "nan": b'{"step": NaN, "loss": Infinity, "findings": NaN, "summary": 3, "plan": 4, "before": 5, '
           b'"after": {"exact": "x"}, "stage": 1, "device": 3, "torch": [1]}',
    "odd": json.dumps({
        "step": 1, "loss": "high", "passed": "maybe", "failures": 3, "findings": {"a": 1}, "stage": "before",
        "reply": None, "problem": [1], "train_seconds": "long", "rows": [{}, {"a": None}], "steps": None,
        "plan": {"predicted": "much", "measured": [1], "budget_bytes": -1}, "trainable": -3, "total": 0,
        "before": {"exact": 7, "form": -2}, "after": {"exact": 1e9, "form": True, "base_perplexity": 0},
    }).encode(),
    "huge": b'{"step": 1' + b"0" * 400 + b', "loss": 1e308, "seconds": 1' + b"0" * 400 + b"}",
}  # fmt: skip
FILES = [f"{name}.json" for name in ("summary", "versions", "preflight", "diagnosis", "stopped", "certificate")]
FILES += ["metrics.jsonl", "evaluation.jsonl"]


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file(plain, tmp_path, name):
    "A report is made whatever an optional file holds, and what can't be read is named."
    path = shutil.copytree(plain, tmp_path / "copy")
    for kind, content in BROKEN.items():
        (path / name).write_bytes(content)
        text = Page(render_page(path)).text
        assert text.count("Run it again") == 1, kind
        if kind in ("no text", "deep") or (kind == "cut off" and not name.endswith("l")):
            assert f"{name} can't be read" in text or f"{name}, line 1" in text, kind


def test_metrics_that_are_odd():
    values = [(1, float("nan")), (2, None), (3, 1.0), (3, -1.0)]
    rows = [{"step": step, "loss": loss} for step, loss in values]
    run = RunFacts(Path(), {}, metrics=rows)
    assert run.curve("loss") == [(3, 1.0), (3, -1.0)]
    drawn = render_part("chart", draw_loss(run))
    assert "polyline" in drawn and "nan" not in drawn
    assert render_part("chart", Chart("Zero", [Line("zero", [(1, 0.0)])])).count("polyline") == 2


def test_mistakes_are_one_sentence(tmp_path, plain):
    (tmp_path / "other").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.yaml").write_text("a: [")
    for run, said in [
        (tmp_path / "nothing", "there is no folder .*: name the run folder"),
        (tmp_path / "other", "is not a run folder"),
        (tmp_path / "bad", "is not YAML"),
        (7, "run is a int: give a run"),
    ]:
        for function in (write_reports, show_report, lambda run: compare([run, plain])):
            with pytest.raises(UserError, match=said) as error:
                function(run)
            assert "\n" not in str(error.value)
    assert not (tmp_path / "nothing").exists()


# --- comparisons ----------------------------------------------------------------------------------------------------


def test_compare(plain, tmp_path):
    other = shutil.copytree(plain, tmp_path / "plain")
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["r"], config["fingerprints"]["eval_data"] = 32, "f" * 64
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    found = compare([plain, other])
    assert found.names == [f"{plain.parent.name}/plain", f"{other.parent.name}/plain"]
    assert found.settings["r"] == ["16", "32"] and set(found.settings) == {"r", "eval_data fingerprint"}
    changed = [note for note in found.notes if "manifest.json is missing" in note]  # they were changed on purpose
    assert len(changed) == 2
    assert found.notes == [*changed, "the runs were not evaluated on the same rows, so their shares can't be compared"]
    lines = str(found).splitlines()
    assert lines[1].split() == ["r", "16", "32"] and lines[-1].startswith("note: ")
    (other / "summary.json").unlink()
    assert any(note.endswith("is not finished") for note in compare([plain, other]).notes)
    assert compare([plain, plain]).names == [f"{i}: {plain.parent.name}/plain" for i in (1, 2)]
    with pytest.raises(UserError, match="is a folder: name a file"):
        found.write(tmp_path)
    for runs in ([plain], [], plain, str(plain)):
        with pytest.raises(UserError, match="at least two runs"):
            compare(runs)


def test_compare_plots_on_the_given_axes(plain, hostile):
    import matplotlib.pyplot as plt

    figure_, ax = plt.subplots()
    assert compare([plain, hostile]).plot(ax) is ax
    assert [len(line.get_xdata()) for line in ax.get_lines()] == [300, 12]
    figure_.canvas.draw()  # a name with $ or _ is no mathematics
    plt.close(figure_)


# --- arithmetic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("better, worse", [(0, 0), (1, 0), (3, 1), (5, 5), (9, 2), (0, 12)])
def test_sign_test_by_counting_coins(better, worse):
    n, uneven = better + worse, abs(better - worse)
    tosses = list(itertools.product((0, 1), repeat=n))
    assert sign_test(better, worse) == sum(abs(2 * sum(toss) - n) >= uneven for toss in tosses) / len(tosses)


@given(st.floats(1e-12, 1e12), st.integers(3, 6))
def test_ticks(top, most):
    found = choose_ticks(0, top, most)
    assert 2 <= len(found) <= most + 1 and found[0] == 0
    assert top / 2 * (1 - 1e-6) <= found[-1] <= top * (1 + 1e-6)
    assert choose_window(len(found)) == 3
