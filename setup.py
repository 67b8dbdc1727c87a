"""Packaging: everything is read from settings.ini."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
config = ConfigParser()
config.read(HERE / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

LICENSES = {"apache2": "Apache-2.0"}
STATUSES = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
SUFFIX = "_requirements"
REPOSITORY, TAG = cfg["git_url"], f"v{cfg['version']}"


def long_description(text):
    "The README where no file is beside it: what it links to is in the repository, and without one the words are left."

    def follow(match):
        picture, words, target = match.groups()
        if not cfg["user"]:
            return "" if picture else words
        return f"{picture}[{words}]({REPOSITORY}/{'raw' if picture else 'blob'}/{TAG}/{target})"

    return re.sub(r"(!?)\[([^\[\]]*)\]\((?!https?:|#)([^()\s]*)\)", follow, text)


class BuildWithResults(build_py):
    "The measured results go into the package: a notebook that is opened alone quotes them."

    def run(self):
        super().run()
        if not self.editable_mode:
            for path in sorted((HERE / "nbs/results").glob("*.json")):
                self.mkpath(str(Path(self.build_lib, "qlora_nb/results")))
                self.copy_file(str(path), str(Path(self.build_lib, "qlora_nb/results", path.name)))


addresses = {
    "author_email": cfg["author_email"],
    "project_urls": {
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Source": REPOSITORY,
        "Issues": f"{REPOSITORY}/issues",
        "Changelog": f"{REPOSITORY}/blob/{cfg['branch']}/CHANGELOG.md",
    },
}
extras = {key.removesuffix(SUFFIX): cfg[key].split() for key in cfg if key.endswith(SUFFIX)}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=long_description((HERE / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license_expression=LICENSES[cfg["license"]],
    license_files=["LICENSE"],
    **(addresses if cfg["user"] else {}),
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {STATUSES[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        f"Natural Language :: {cfg['language']}",
        "Operating System :: POSIX :: Linux",
        "Framework :: Jupyter",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["qlora_nb", "qlora_nb.*"]),
    package_data={
        "qlora_nb": [f"embedded/**/*.{kind}" for kind in "json jsonl yaml safetensors jinja parquet md".split()]
        + ["templates/*.j2", "templates/*.css", "templates/*.js", "doctor.yaml", "preflight.yaml", "py.typed"]
    },
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithResults},
    # `pip install -e` puts this folder on the path. By default setuptools answers imports itself, but only after the
    # path was asked, and there a clone of this name, seen from the folder above it, is a package with nothing in it.
    options={"editable_wheel": {"mode": "compat"}},
    zip_safe=False,
)
