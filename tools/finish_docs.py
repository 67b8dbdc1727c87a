"""What Quarto leaves to do on the finished pages: python tools/finish_docs.py _docs

The search finds prose, not code, in an index small enough for a phone; scripts don't hold up the first screen; outputs
of sentences wrap, wide ones can be scrolled by the keyboard, and wide tables stand upright on a phone.
"""

import html
import json
import re
import runpy
import sys
from pathlib import Path

import tinycss2
from bs4 import BeautifulSoup

INDEX_LIMIT = runpy.run_path(str(Path(__file__).with_name("check_site.py")))["INDEX_LIMIT"]  # bytes
MACHINERY = 4  # a reference page gets a quarter of the words that a lesson gets
WIDE = 80  # characters
COLUMNS, NARROW = 3, 55  # two columns wrap well on a phone, and so many characters of a row have room
PHONE, SQUEEZED = 38, 4  # characters in a line of a table on a phone; lines that a cell may take
NOT_PROSE = (
    "pre, script, style, math, svg, figure, details, .cell-output:not(.cell-output-markdown), .anchorjs-link, nav"
)
ON_EACH_PAGE = ("In Colab: upload", "Needs ")  # how a paragraph begins that says where a notebook runs
FUNCTION = re.compile(
    r"[a-z0-9]+(_[a-z0-9]+)+|\w*[a-z0-9][A-Z]\w*"
)  # its heading: the public ones are on a page of their own


def prose_of(section):
    "The text of a section without its code, its outputs, its heading and the sections in it."
    parts = []
    for child in section.find_all(recursive=False):
        text = child.get_text(" ")
        if child.name not in ("section", "h1", "h2", "h3", "h4") and not text.strip().startswith(ON_EACH_PAGE):
            parts.append(text)
    return straighten(re.sub(r"\s+", " ", " ".join(parts)).strip())


def straighten(text):
    "Apostrophes as keyboards have them: Quarto's are curved, and a phone's may be either."
    return text.replace("’", "'")


def shorten(text, limit):
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0]


def parts_of(section, anchor, lesson):
    "A section's own entry, and in a lesson one for each section of the third level in it: Quarto's index has none."
    yield anchor, "", prose_of(section)
    for part in section.select("section.level3") if anchor and lesson else ():
        heading = re.sub(r"\s+", " ", part.find("h3").get_text()).strip()
        if not FUNCTION.fullmatch(heading):
            yield part["id"], heading, prose_of(part)


def search_index(folder, entries):
    "Quarto's entries with the prose of their sections, the longest cut until the index is small enough."
    pages, kept = {}, []
    for entry in entries:
        name, _, anchor = entry["href"].partition("#")
        if name not in pages:
            pages[name] = BeautifulSoup((folder / name).read_text(encoding="utf-8"), "html.parser").find("main")
            for found in pages[name].select(NOT_PROSE):
                found.decompose()
        section = pages[name].find(id=anchor) if anchor else pages[name]
        if section is None or anchor.startswith("exercises"):
            continue
        share = MACHINERY if "Reference" in entry.get("crumbs", ()) else 1
        for part, heading, text in parts_of(section, anchor, share == 1):
            head = {"href": f"{name}#{part}" if part else name, "title": straighten(entry["title"])}
            kept.append((head | {"section": straighten(heading or entry["section"]), "text": text}, share))
    limit = 4000
    while len(packed := pack(kept, limit)) > INDEX_LIMIT and limit:  # if titles alone are too many, check_site says so
        limit = limit * 49 // 50
    return packed


def pack(entries, limit):
    cut = [entry | {"text": shorten(entry["text"], limit // share)} for entry, share in entries]
    return json.dumps(cut, ensure_ascii=False, separators=(",", ":")).encode()


# What Quarto 1.6's script says, and what it is to say.
SEARCH = {
    "ignoreLocation: true,": "ignoreLocation: true, useExtendedSearch: true,",
    "await index.search(query, fuseOptions)": "await findWords(index, query, fuseOptions)",
    "now - then > kFuseMaxWait &&": "findWords.narrow && now - then > kFuseMaxWait &&",
}
# First come sections whose heading, up to a colon, is what is asked for, then those with its words as one phrase.
# What is found by the first of the ways holds what a longer search of this way finds: Quarto then looks there alone.
FIND_WORDS = r"""
function findWords(index, query, options) {
  const small = new RegExp("^(a|an|and|are|at|be|been|by|can|do|does|for|from|get|got|has|have|how|i|i'm|i've|in|is|it"
    + "|it's|me|my|of|on|or|that|the|there|this|to|use|was|were|what|when|where|which|why|will|with|you|your|)$", "i");
  const words_of = text => text.replace(/[‘’]/g, "'").trim().split(/\s+/).map(word => word.replace(/[?.,!:]+$/, ""));
  const telling_of = words => words.some(word => !small.test(word)) ? words.filter(word => !small.test(word)) : words;
  const words = words_of(query), many = /^(two|2|three|3|four|4|eight|8|multi|multiple)[- ]gpus?$/i;
  const asked = telling_of(words).join(" ").replace(many, "several GPUs").split(" ");
  const phrase = asked.join(" ").toLowerCase();
  const anywhere = word => ({ $or: ["title", "section", "text"].map(key => ({ [key]: word })) });
  const ways = [asked.join(" "), { $and: asked.map(anywhere) }, asked.join(" | ")];
  const { limit = Infinity, ...others } = options;
  const head = item => telling_of(words_of((item.section || item.title || "").split(/[:?]/)[0])).join(" ");
  const all = item => [item.section, item.title, item.text].join(" ").toLowerCase();
  const says = item => asked.length > 1 && all(item).includes(phrase);
  const rank = ({ item = {} }) => head(item).toLowerCase() === phrase ? 0 : says(item) ? 1 : 2;
  for (const way of ways) {
    const found = index.search(way, others).sort((a, b) => rank(a) - rank(b)).slice(0, limit);
    findWords.narrow = way === ways[0] && phrase === words.join(" ").toLowerCase();
    if (found.length) return found;
  }
  return [];
}
"""


def find_words(folder):
    """Let the search find entries that have all of its words that tell something, then those that have some of them.

    Quarto's looks for the words as one phrase.
    """
    script = folder / "site_libs/quarto-search/quarto-search.js"
    text = script.read_text(encoding="utf-8")
    if FIND_WORDS in text:
        return
    for old, new in SEARCH.items():
        if text.count(old) != 1:
            raise SystemExit(f"{script}: {old!r} is not where Quarto 1.6 has it: adapt find_words")
        text = text.replace(old, new)
    script.write_text(text + FIND_WORDS, encoding="utf-8")


SHEET = re.compile(r'<link [^>]*rel="stylesheet"[^>]*>\n?')
SCRIPT = re.compile(r'<script src="(?!https?:)([^"]+)"></script>')


def show_first(text):
    "Put what the first screen waits for first: the sheets, before scripts (in their order) and pictures further down."
    head, end, rest = text.partition("</head>")
    sheets = "".join(SHEET.findall(head))
    head = SCRIPT.sub(r'<script defer fetchpriority="low" src="\1"></script>', SHEET.sub("", head))
    head = head.replace('<meta charset="utf-8">', f'<meta charset="utf-8">{sheets}', 1)
    return head + end + rest.replace('<img src="', '<img loading="lazy" src="')


def wrap_sentences(text):
    "Outputs of sentences wrap; those with columns, which two blanks in a line part, keep their lines and scroll."

    def wrap(match):
        lines = html.unescape(re.sub(r"<[^>]*>", "", match[1])).splitlines()
        long = [line for line in lines if len(line) > PHONE]
        columns = any(re.search(r"\S {2,}\S|[│┃|]", line) for line in lines)
        # No quotes: the text may stand in a frame's attribute.
        return f"<pre class=wrap><code>{match[1]}" if long and not columns else match[0]

    return re.sub(r"<pre><code>(.*?)(?=</code></pre>)", wrap, text, flags=re.S)


def reach_by_key(text):
    "Outputs and tables with lines too long for the page scroll: a keyboard must get to them."

    def focus(match):
        rows = re.split(r"</tr>|\n" if match[1] == "pre" else r"</tr>", match[0])
        longest = max(len(html.unescape(re.sub(r"<[^>]*>|\n", "", row))) for row in rows)
        # No quotes: the text may stand in a frame's attribute.
        return match[0].replace(match[1], f"{match[1]} tabindex=0", 1) if longest > WIDE else match[0]

    return re.sub(r"<(pre|table)\b(?! class=(?:\"sourceCode|wrap)).*?</\1>", focus, text, flags=re.S)


def stack_rows(text):
    "Name its column in each cell of a table too wide for a phone; there the sheet puts a row's cells below each other."

    def stack(match):
        if not match["table"]:
            return match[0]
        table = BeautifulSoup(match[0], "html.parser").table
        heads = [head.get_text(" ", strip=True) for head in table.select("thead tr:last-of-type > *")]
        rows = [row.find_all(["td", "th"], recursive=False) for row in table.select("tbody > tr")]
        texts = [heads, *([cell.get_text(" ", strip=True) for cell in row] for row in rows)]
        if any(len(row) != len(heads) for row in texts) or not (is_wide(texts) or is_squeezed(rows)):
            return match[0]
        table["class"] = [*table.get("class", []), "stack"]
        for head, cell in (pair for row in rows for pair in zip(heads, row)):
            cell["data-head"] = head
        return str(table)

    # A page in a frame stands in an attribute, whose quotes a changed table would close.
    return re.sub(r"srcdoc=(['\"]).*?\1|(?P<table><table\b.*?</table>)", stack, text, flags=re.S)


def is_wide(texts):
    return len(texts[0]) >= COLUMNS and max(sum(len(text) + 3 for text in row) for row in texts) > NARROW


def is_squeezed(rows):
    "Whether the names in the first of two columns, which are not broken, leave the second one too little."
    if not rows or len(rows[0]) != 2:
        return False
    names = [word for row in rows for name in row[0].find_all(["code", "a"]) for word in name.get_text().split()]
    room = PHONE - max(map(len, names), default=0)
    return max(len(row[1].get_text(" ", strip=True)) for row in rows) > SQUEEZED * room


TALL = re.compile(r"<(mfrac|munder|mover|munderover|msqrt|mroot|mtable)\b")
BRACKETS = re.compile(
    r'<mo stretchy="true" form="prefix">([(\[])</mo>((?:(?!<mo stretchy="true").)*?)'
    r'<mo stretchy="true" form="postfix">([)\]])</mo>',
    re.S,
)


def flatten_brackets(text):
    "Brackets around what is no taller than a line keep their size: without a font for formulas they would be huge."

    def flatten(match):
        return match[0] if TALL.search(match[2]) else match[0].replace('stretchy="true"', 'stretchy="false"')

    before = None
    while before != text:  # the inner ones first
        before, text = text, BRACKETS.sub(flatten, text)
    return text


def used_icons(folder):
    "Of the two thousand icons of the theme, the rules of those that the site shows."
    sheet = folder / "site_libs/bootstrap/bootstrap-icons.css"
    read = [path for kind in ("*.html", "*.js", "*.min.css") for path in folder.rglob(kind)]
    used = {name for path in read for name in re.findall(r"\bbi-[\w-]+", path.read_text(encoding="utf-8"))}
    rule = re.compile(r"^\.(bi-[\w-]+)::before *\{[^}]*\}\n?", re.M)
    text = rule.sub(lambda one: one[0] * (one[1] in used), sheet.read_text(encoding="utf-8"))
    sheet.write_text(text, encoding="utf-8")


CLASS = re.compile(r"\.((?:[\w-]|\\.)+)")


def used_rules(rules, words):
    "Of a sheet's rules, those whose classes all stand in a page or a script."
    kept = []
    for rule in rules:
        if rule.type == "qualified-rule":
            selectors = re.split(r",(?![^(]*\))", tinycss2.serialize(rule.prelude))
            met = [
                one
                for one in selectors
                if {c.replace("\\", "") for c in CLASS.findall(re.sub(r":not\([^)]*\)", "", one))} <= words
            ]
            kept += [f"{','.join(met)}{{{tinycss2.serialize(rule.content)}}}"] if met else []
        elif rule.type == "at-rule" and rule.content is not None and rule.lower_at_keyword in ("media", "supports"):
            inner = used_rules(tinycss2.parse_rule_list(rule.content, skip_comments=True, skip_whitespace=True), words)
            kept += [f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}{{{inner}}}"] if inner else []
        else:
            kept.append(rule.serialize())
    return "".join(kept)


def thin_sheets(folder):
    "The theme has rules for components that no page shows; a phone waits for all of them."
    words, scripts = set(), [script.read_text(encoding="utf-8") for script in folder.rglob("*.js")]
    for page in folder.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        words |= {name for classes in re.findall(r'class="([^"]*)"', text) for name in classes.split()}
        scripts += re.findall(r"<script[^>]*>(.*?)</script>", text, re.S)
    words |= {word for script in scripts for word in re.findall(r"[\w-]+", script)}
    for sheet in (folder / "site_libs/bootstrap").glob("bootstrap-*.min.css"):
        rules = tinycss2.parse_stylesheet(sheet.read_text(encoding="utf-8"), skip_comments=True, skip_whitespace=True)
        sheet.write_text(used_rules(rules, words), encoding="utf-8")


STEPS = (show_first, flatten_brackets, wrap_sentences, stack_rows, reach_by_key)


def main(folder):
    folder = Path(folder)
    used_icons(folder)
    thin_sheets(folder)
    find_words(folder)
    for page in folder.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        for change in STEPS:
            text = change(text)
        page.write_text(text, encoding="utf-8")
    index = folder / "search.json"
    index.write_bytes(search_index(folder, json.loads(index.read_text(encoding="utf-8"))))
    print(f"search index: {index.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
