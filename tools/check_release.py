"""Says what keeps this commit from being released: python tools/check_release.py [TAG]

The steps of a release: date the changelog's first entry, set `version` and `published` in settings.ini to it, `make
export`, `make release-check`, commit, tag `v<version>`, push the tag; .github/workflows/release.yml does the rest.
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def faults(cfg, released, tag=None):
    "What is wrong with the settings, the changelog's first entry (version, date) and the tag, one line each."
    version, date = released
    checks = {
        "settings.ini: user is empty, so no link leads to the repository": cfg["user"],
        f"settings.ini: published is '{cfg['published']}', and this is {cfg['version']}": cfg["published"]
        == cfg["version"],
        f"CHANGELOG.md begins with {version}, and this is {cfg['version']}": version == cfg["version"],
        f"CHANGELOG.md: {version} has no date": date,
        f"the tag is {tag}, and this is v{cfg['version']}": tag in (None, f"v{cfg['version']}"),
    }
    return [line for line, holds in checks.items() if not holds]


def main(tag=None):
    heads = runpy.run_path(str(ROOT / "tools/notebook_heads.py"))
    if found := faults(heads["settings"](), heads["released"](), tag):
        sys.exit("not to be released:\n" + "\n".join(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
