"""Check the finished site as its readers see it; exit code 1 if anything is wrong: python tools/check_site.py _docs

Links and pictures lead somewhere, no raw Markdown is left in the text, the search index is small. Where Chromium is
installed, each page is opened, in light and in dark mode: none is wider than a phone's screen, asks another site for
anything or says anything on the console, and all text has the contrast that WCAG AA asks for (4.5:1); axe-core
(`make axe`) finds no violation of level A or AA. Code takes at most 35 % of a lesson's height, and the pages that
people come to first show their largest part within 1.5 s on a slow phone.
"""

import contextlib
import gzip
import os
import re
import runpy
import shutil
import sys
import threading
from configparser import ConfigParser
from functools import cache
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = ROOT / "build/site/node_modules/axe-core/axe.min.js"
PHONE, DESK = 390, 1440  # pixels
INDEX_LIMIT = 300_000  # bytes of the search index, the first time someone searches
CODE_LIMIT = 0.35  # of a lesson's height
FIRST_PAGES = ("index.html", "quickstart.html", "lora.html", "memory.html")
SPEED_LIMIT = 1.5  # seconds until the largest part of the first screen is shown
# Markdown that was not rendered.
RAW = re.compile(r"\[`?[\w.()]+`?\]\((?:https?://|[\w./-]+\.(?:html|ipynb|md))|^:::", re.M)


class Page(HTMLParser):
    "The ids, the links, the pictures, the text and the frames of a page."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.text, self.frames, self.hidden = set(), [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, pairs):
        found = dict(pairs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if tag in ("a", "img") and found.get(name)]
        self.frames += [found["srcdoc"]] if "srcdoc" in found else []
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.hidden:
            self.text.append(data)


def own_address():
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return "{doc_host}{doc_baseurl}/".format(**config["DEFAULT"])


@cache
def own_path():
    "The folder of the site on its host, with slashes around it."
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return f"{config['DEFAULT']['doc_baseurl'].rstrip('/')}/"


def check_texts(folder):
    "List what is wrong with links, pictures and text, one line each."
    folder, found, own = Path(folder), [], own_address()
    pages = {path.name: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.html"))}
    for name, page in pages.items():
        found += [f"{name}: raw Markdown: {match.group()}" for match in RAW.finditer("".join(page.text))]
        found += [f"{name}: the page in a frame is cut off" for text in page.frames if "</html>" not in text[-20:]]
        for link in page.links:
            within = link.removeprefix(own).removeprefix(own_path()).removeprefix("/")
            if re.match(r"[a-z][a-z+.-]*:", within) or link.startswith("//"):
                continue
            target, _, anchor = unquote(within).partition("#")
            other = target.removeprefix("./").partition("?")[0] or name
            if ".." in other.split("/") or not (folder / other).exists():  # beside the site nothing is published
                found.append(f"{name}: {link}: no such file")
            elif anchor and other in pages and anchor not in pages[other].ids:
                found.append(f"{name}: {link}: no such place on that page")
    return found


# What people look for, and the page that they should find first.
SEARCHES = {
    "resume": "training.html",
    "VRAM": "memory.html",
    "CUDA out of memory": "troubleshooting.html",
    "double BOS": "troubleshooting.html",
    "never stops": "troubleshooting.html",
    "garbage": "troubleshooting.html",
    "several GPUs": "several_gpus.html",
    "learning rate": "recommend.html",
    "overfitting": "recommend.html",
    "certificate": "certificate.html",
    "GGUF": "quickstart.html",
    "NF4": "glossary.html",
    "Modelfile": "glossary.html",
    "chat template": "glossary.html",
    "export_gguf": "api.html",
    "what is LoRA?": "glossary.html",
    "my runtime disconnected": "troubleshooting.html",
    "an export failed": "troubleshooting.html",
    "is it faster than Unsloth": "engine.html",
    "reproduce": "index.html",
    "understand QLoRA": "index.html",
    "what is QLoRA": "glossary.html",
    "Colab": "quickstart.html",
    "free GPU": "quickstart.html",
    "my own data": "data.html",
    "I have two GPUs": "several_gpus.html",
    "my export failed": "troubleshooting.html",
    "can’t be exported": "gguf.html",
    "multi-GPU": "several_gpus.html",
}
# As the page's own search does: by its library and its function, with its options, over its index.
FIRST_HITS = """async words => {
  const fuse = new Fuse(await (await fetch("search.json")).json(), kFuseIndexOptions);
  return words.map(one => (findWords(fuse, one, {limit: 1})[0]?.item.href ?? "nothing").split("#")[0]) }"""


def check_hits(folder, searches=SEARCHES):
    "List the searches whose first hit is on another page than the one that answers."
    with browser() as opened, served(folder) as address:
        page = opened.new_page()
        page.goto(f"{address}/index.html")
        hits = zip(searches.items(), page.evaluate(FIRST_HITS, list(searches)))
    return [f"search for {word!r}: first {hit}, not {wanted}" for (word, wanted), hit in hits if hit != wanted]


QUESTIONS = "What brings you here?"  # the front page's paragraph of links for those who come with a question
# Whether the heading that the address names, or the page's own, can be seen: on the screen, and nothing lies over it.
HEADING_SEEN = """() => {
  const place = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const heading = place ? place.querySelector("h1, h2, h3, h4") : document.querySelector("h1");
  const box = heading.getBoundingClientRect();
  return heading.contains(document.elementFromPoint(box.left + 5, box.top + 10)) }"""


def check_questions(folder):
    "List the front page's questions that don't lead, by one tap on a phone, to a heading that can be seen."
    from playwright.sync_api import TimeoutError

    found = []
    with browser() as opened, served(folder) as address:
        page = opened.new_page(viewport={"width": PHONE, "height": 844})
        page.goto(f"{address}/index.html")
        links = page.locator("p", has_text=QUESTIONS).get_by_role("link")
        for number in range(count := links.count()):
            page.goto(f"{address}/index.html")
            name = links.nth(number).inner_text()
            links.nth(number).click()
            page.wait_for_load_state("load")
            try:
                page.wait_for_function(HEADING_SEEN, timeout=5000)  # scripts move the page once it is there
            except TimeoutError:
                found.append(f"index.html: {name!r} leads to a heading that can't be seen")
    return found if count else [f"index.html: no links after {QUESTIONS!r}"]


def check_search(folder):
    "List what is wrong with the search index."
    size = (Path(folder) / "search.json").stat().st_size
    return [f"search.json: {size:,} bytes, above {INDEX_LIMIT:,}"] * (size > INDEX_LIMIT)


# --- in a browser -----------------------------------------------------------------------------------------------------


class Handler(SimpleHTTPRequestHandler):
    "Serves files packed, as a host of pages does."

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        base = own_path()  # the page for wrong addresses knows the site's place on its host
        path = Path(self.translate_path(f"/{self.path.removeprefix(base)}"))
        path = path / "index.html" if path.is_dir() else path
        if not path.is_file():
            return self.send_error(404)
        body = packed(path, path.stat().st_mtime_ns)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args): ...


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the browser has left a page before all of it came
            super().handle_error(request, client_address)


@cache
def packed(path, changed):
    return gzip.compress(path.read_bytes())


@contextlib.contextmanager
def served(folder):
    "The address of a server of the folder on this machine."
    server = Server(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@contextlib.contextmanager
def browser():
    from playwright.sync_api import sync_playwright

    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield opened
        opened.close()


# Texts with a contrast below 4.5:1, as {element and contrast: how many}.
FAINT = """() => {
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                       return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const rgba = text => { const c = text.match(/[\\d.]+/g).map(Number); return c.length < 4 ? [...c, 1] : c };
  const over = (top, below, alpha) => below.map((v, i) => v * (1 - alpha) + top[i] * alpha);
  const up = function* (e) { for (; e; e = e.parentElement) yield getComputedStyle(e) };
  const found = {}, walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || e.closest("svg, style, script, button")) continue;
    const backgrounds = [...up(e)].map(style => rgba(style.backgroundColor)).reverse();
    const background = backgrounds.reduce((below, c) => over(c, below, c[3]), [255, 255, 255]);
    const ink = rgba(getComputedStyle(e).color), opacity = [...up(e)].reduce((o, style) => o * style.opacity, ink[3]);
    const [low, high] = [light(background), light(over(ink, background, opacity))].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05), name = `${e.tagName.toLowerCase()}.${e.className} ${ratio.toFixed(2)}`;
    if (ratio < 4.5) found[name] = (found[name] || 0) + 1;
  }
  return found }"""
NOT_DARK = "() => Boolean(window.quartoToggleColorScheme && !document.body.matches('.quarto-dark'))"
STYLED = "() => [...document.querySelectorAll('link[rel~=stylesheet]')].every(link => link.sheet)"
RUN_AXE = """async only => (await axe.run(document, {runOnly: only, resultTypes: ["violations"]})).violations.map(
  v => `${v.id}: ${v.nodes.length} times, first ${v.nodes[0].html.slice(0, 160)}`)"""
# The dark page differs in its colours alone.
ASKED = {"light": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "dark": ["color-contrast"]}


# Code of a lesson is read on a phone without scrolling sideways; outputs keep their columns.
CUT = """() => [...document.querySelectorAll("pre.code-with-copy")]
  .filter(e => e.checkVisibility() && !e.closest(".cell-output") && e.scrollWidth > e.clientWidth + 1).length"""


def check_looks(folder, names=None):
    "List what a browser shows or says that it shouldn't, one line each."
    names, found = names or sorted(path.name for path in Path(folder).glob("*.html")), []
    with browser() as opened, served(folder) as address:
        for scheme in ("light", "dark"):
            page, said = listened(opened, address, scheme)
            for name in names:
                page.goto(f"{address}/{name}")
                if scheme == "dark":
                    said += ["light, although the system is dark"] * page.evaluate(NOT_DARK)
                    page.wait_for_function(STYLED)  # the dark sheets are loaded only now
                    page.evaluate("document.getAnimations().forEach(one => one.finish())")
                width = page.evaluate("document.scrollingElement.scrollWidth")
                said += [f"{width} pixels wide on a screen of {PHONE}"] * (width > PHONE)
                said += [f"code runs out of its box, {cut} times" for cut in [page.evaluate(CUT)] if cut]
                said += [f"{what}: too faint, {n} times" for what, n in page.evaluate(FAINT).items()]
                if AXE.exists():
                    page.set_viewport_size({"width": DESK, "height": 900})
                    page.evaluate(AXE.read_text(encoding="utf-8"))
                    said += [f"axe: {line}" for line in page.evaluate(RUN_AXE, ASKED[scheme])]
                    page.set_viewport_size({"width": PHONE, "height": 844})
                found += [f"{name}, {scheme}: {line}" for line in said]
                said.clear()
    return found


def listened(opened, address, scheme):
    "A page on a phone's screen, and a list of what it says on the console and asks other sites for, to no avail."
    page, said = opened.new_page(viewport={"width": PHONE, "height": 844}, color_scheme=scheme), []
    page.on("console", lambda one: one.type in ("error", "warning") and said.append(f"console: {one.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda one: leaves(one.url, address) and said.append(f"request: {one.url}"))
    page.route(lambda url: leaves(url, address), lambda route: route.abort())
    return page, said


def leaves(url, address):
    return not url.startswith((address, "data:", "blob:"))


# The heights of a page's text and of the code in it that can be seen; outputs are no code.
HEIGHTS = """() => {
  const height = e => e.getBoundingClientRect().height;
  const code = [...document.querySelectorAll("main div.sourceCode")];
  const seen = code.filter(e => e.checkVisibility() && !e.closest(".cell-output-stdout"));
  return [height(document.querySelector("main")), seen.reduce((sum, e) => sum + height(e), 0)] }"""


def code_shares(folder, names):
    "The share of each page's height that is code, on a desk's screen."
    with browser() as opened, served(folder) as address:
        page, shares = opened.new_page(viewport={"width": DESK, "height": 900}), {}
        for name in names:
            page.goto(f"{address}/{name}")
            whole, code = page.evaluate(HEIGHTS)
            shares[name] = code / whole
    return shares


def lessons(folder):
    "The pages of the lessons that are there."
    stems = runpy.run_path(str(Path(__file__).with_name("house.py")))["LESSONS"]
    names = (re.sub(r"^\d+_", "", stem) + ".html" for stem in stems)
    return [name for name in names if (Path(folder) / name).exists()]


def check_code(folder):
    "Print how much of each lesson is code, and list the lessons with too much of it."
    shares = code_shares(folder, lessons(folder))
    for name, share in sorted(shares.items(), key=lambda pair: -pair[1]):
        print(f"code {share:4.0%} {name}")
    return [f"{name}: {share:.0%} of its height is code" for name, share in shares.items() if share > CODE_LIMIT]


LARGEST = """() => new Promise(done => new PerformanceObserver(list => done(list.getEntries().at(-1).startTime / 1000))
  .observe({type: "largest-contentful-paint", buffered: true}))"""


def largest_paint(opened, url):
    "Seconds until a phone with a slow processor on slow 4G has drawn the largest part of its first screen."
    context = opened.new_context(viewport={"width": PHONE, "height": 844}, device_scale_factor=3, is_mobile=True)
    page = context.new_page()
    devtools = context.new_cdp_session(page)
    devtools.send("Network.enable")
    slow = {"offline": False, "latency": 150, "downloadThroughput": 200_000, "uploadThroughput": 93_750}
    devtools.send("Network.emulateNetworkConditions", slow)
    devtools.send("Emulation.setCPUThrottlingRate", {"rate": 4})
    page.goto(url, wait_until="load")
    seconds = page.evaluate(LARGEST)
    context.close()
    return seconds


def check_speed(folder, names=FIRST_PAGES):
    "Print and judge the best of three loads: a busy machine only adds to them."
    found = []
    with browser() as opened, served(folder) as address:
        for name in names:
            seconds = min(largest_paint(opened, f"{address}/{name}") for _ in range(3))
            print(f"largest part shown after {seconds:.2f} s: {name}")
            found += [f"{name}: {seconds:.2f} s until the largest part is shown"] * (seconds > SPEED_LIMIT)
    return found


def main(folder):
    found = check_texts(folder) + check_search(folder)
    if CHROMIUM:
        if not AXE.exists():
            print("axe-core is not there (make axe): accessibility was not checked but for contrast", file=sys.stderr)
        found += (
            check_hits(folder)
            + check_questions(folder)
            + check_looks(folder)
            + check_code(folder)
            + check_speed(folder)
        )
    else:
        print("Chromium is not installed: the pages were not looked at", file=sys.stderr)
    print(*found, sep="\n", end="\n" * bool(found), file=sys.stderr)
    sys.exit(bool(found))


if __name__ == "__main__":
    main(sys.argv[1])
