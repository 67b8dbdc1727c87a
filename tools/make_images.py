"""Draws the site's favicon and the card that is shown where someone links to it, into nbs/images."""

from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLUE, RED, INK = "#0072B2", "#D55E00", "#1d2433"

# A large square that stays, and two thin bars that learn.
FAVICON = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect x="2" y="2" width="20" height="20" rx="3" fill="{BLUE}"/>
<rect x="25" y="2" width="5" height="20" rx="2" fill="{RED}"/>
<rect x="2" y="25" width="20" height="5" rx="2" fill="{RED}"/>
</svg>
"""

# What opens a notebook in Colab, served by the site itself.
BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="126" height="22" viewBox="0 0 126 22">
<rect width="126" height="22" rx="4" fill="#343a40"/><path d="M10 6l8 5-8 5z" fill="#f9ab00"/>
<text x="26" y="15.5" fill="#fff" font-family="system-ui, sans-serif" font-size="12.5">Open in Colab</text>
</svg>
"""


def draw_card(path, title, text):
    "1,200 × 630 pixels: the name, the sentence, the sign."
    import matplotlib

    matplotlib.use("Agg")
    import textwrap

    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="white")
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, 1200), ylim=(0, 630))
    ax.axis("off")
    for x, y, w, h, colour in ((80, 220, 240, 240, BLUE), (350, 220, 55, 240, RED), (80, 135, 240, 55, RED)):
        box = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=14", fc=colour, ec="none")
        ax.add_patch(box)
    for x, y, label, size in ((200, 340, "W", 76), (377, 340, "B", 30), (200, 162, "A", 30)):
        ax.text(x, y, label, color="white", size=size, ha="center", va="center", weight="bold", family="DejaVu Serif")
    ax.text(470, 400, title, color=INK, size=58, weight="bold", va="center")
    ax.text(470, 325, textwrap.fill(text, 37), color=INK, size=24, va="top", linespacing=1.45)
    # No version of matplotlib in the file: the same picture gives the same bytes.
    fig.savefig(path, metadata={"Software": None})
    plt.close(fig)


def main(folder=ROOT / "nbs/images"):
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    folder.mkdir(exist_ok=True)
    (folder / "favicon.svg").write_text(FAVICON, encoding="utf-8")
    draw_card(folder / "card.png", config["DEFAULT"]["title"], config["DEFAULT"]["description"])


if __name__ == "__main__":
    main()
