"""Check the finished site as its readers see it; exit code 1 if anything is wrong: python tools/check_site.py _docs

Links and pictures lead somewhere, and no raw Markdown is left in the text. Where Chromium is installed: no page is
wider than a phone's screen, and all text has the contrast that WCAG AA asks for (4.5:1), in light and in dark mode.
"""

import os
import re
import shutil
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = 390  # pixels
# Markdown that was not rendered.
RAW = re.compile(r"\[`?[\w.()]+`?\]\((?:https?://|[\w./-]+\.(?:html|ipynb|md))|^:::", re.M)


class Page(HTMLParser):
    "The ids, the links, the pictures and the text of a page."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.text, self.hidden = set(), [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, pairs):
        found = dict(pairs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if tag in ("a", "img") and found.get(name)]
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


def check_texts(folder):
    "List what is wrong with links, pictures and text, one line each."
    folder, found, own = Path(folder), [], own_address()
    pages = {path.name: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.html"))}
    for name, page in pages.items():
        found += [f"{name}: raw Markdown: {match.group()}" for match in RAW.finditer("".join(page.text))]
        for link in page.links:
            if re.match(r"[a-z][a-z+.-]*:|//", link.removeprefix(own)):
                continue
            target, _, anchor = unquote(link.removeprefix(own)).partition("#")
            other = target.removeprefix("./").partition("?")[0] or name
            if not (folder / other).exists():
                found.append(f"{name}: {link}: no such file")
            elif anchor and other in pages and anchor not in pages[other].ids:
                found.append(f"{name}: {link}: no such place on that page")
    return found


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
GO_DARK = "() => window.quartoToggleColorScheme && !document.body.matches('.quarto-dark') && quartoToggleColorScheme()"
STYLED = "() => [...document.querySelectorAll('link[rel~=stylesheet]')].every(l => l.sheet || !/^file:/.test(l.href))"


def check_looks(folder, names=None):
    "List what a browser shows too wide for a phone or too faint, one line each."
    from playwright.sync_api import sync_playwright

    names, found = names or sorted(path.name for path in Path(folder).glob("*.html")), []
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": PHONE, "height": 844}, color_scheme=scheme)
            # No fonts, badges and formulas from elsewhere: the page is judged as it stands.
            page.route(re.compile("^https?:"), lambda route: route.abort())
            for name in names:
                page.goto((Path(folder) / name).resolve().as_uri())
                if scheme == "dark":
                    page.evaluate(GO_DARK)
                    page.wait_for_function(STYLED)  # the dark sheets are loaded only now
                    page.evaluate("document.getAnimations().forEach(one => one.finish())")
                width = page.evaluate("document.scrollingElement.scrollWidth")
                found += [f"{name}, {scheme}: {width} pixels wide on a screen of {PHONE}"] * (width > PHONE)
                found += [f"{name}, {scheme}: {what}: too faint, {n} times" for what, n in page.evaluate(FAINT).items()]
        browser.close()
    return found


def main(folder):
    found = check_texts(folder)
    if CHROMIUM:
        found += check_looks(folder)
    else:
        print("Chromium is not installed: page widths and contrast were not checked", file=sys.stderr)
    print(*found, sep="\n", end="\n" * bool(found), file=sys.stderr)
    sys.exit(bool(found))


if __name__ == "__main__":
    main(sys.argv[1])
