# ruff: noqa: E501
# fmt: off
"""Hostile and odd inputs in every door: a sentence within ten seconds, no code run, no traceback, no flood, bounded memory.

Each case makes files, then runs a command or a few lines of Python in a process of its own, which may use ten seconds of
CPU and two gigabytes more than its imports. It has to end with the exit code and the words that the table says.
"""

import bz2
import gzip
import json
import lzma
import os
import random
import re
import shutil
import struct
import zipfile
from typing import NamedTuple

import processes
import pytest

from qlora_nb.core import EMBEDDED_FOLDER, EMBEDDED_MODEL, file_sha256
from qlora_nb.manifest import write_manifest
from qlora_nb.run import RUN_FORMAT

random_bytes = random.Random(0).randbytes
SECONDS = 10  # of CPU; a process that waits (for a pipe) is stopped after SILENT seconds of the clock
SILENT = 90
LONGEST = 2000  # characters of a sentence
BEFORE = f"""
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**31,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS + 2}, {SECONDS + 2}))
"""
AS_A_USER = """
import sys
from qlora_nb.core import UserError
try:
    {code}
except UserError as error:
    print("qlora_nb:", error, file=sys.stderr)
    sys.exit(2)
"""
TRAIN = ("train", "--max-steps", "1", "--eval-rows", "1", "--limit", "20", "--output", "out", "--data", str(EMBEDDED_FOLDER / "data" / "train.parquet"))


class Case(NamedTuple):
    kind: str
    make: object  # given the folder in which it runs
    command: tuple | str  # of qlora_nb, or Python
    words: str | None  # a pattern that stdout or stderr has; None: it may do no harm, but has to end well
    codes: tuple = (2,)


CASES: dict[str, Case] = {}
OFTEN: set[str] = set()  # cases of the ordinary tests


def add(kind, name, make, command, words, codes=(2,), often=False):
    name = f"{kind}: {name}"
    assert name not in CASES, name
    CASES[name] = Case(kind, make, command, words, codes)
    if often:
        OFTEN.add(name)


def write(name, content):
    "Return a maker of one file."

    def make(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content() if callable(content) else content if isinstance(content, bytes) else content.encode())

    return make


def as_if_written(run):
    "Have a changed run's manifest and summary describe its adapter as it is: it came like this from elsewhere."
    files, weights, summary = list((run / "adapter").rglob("*")), run / "adapter/adapter_model.safetensors", run / "summary.json"
    if not all(file.is_file() and not file.is_symlink() and file.stat().st_size < 10**8 for file in files):
        return
    write_manifest(run, only=["adapter"])
    if weights.exists() and summary.is_file() and not summary.is_symlink() and summary.stat().st_size < 10**6:
        old = file_sha256(EMBEDDED_FOLDER / "run/adapter/adapter_model.safetensors").encode()
        summary.write_bytes(summary.read_bytes().replace(old, file_sha256(weights).encode()))
    elif summary.is_file() and not summary.is_symlink() and summary.stat().st_size < 10**6:
        summary.write_bytes(re.sub(rb'"adapter_sha256": "\w+",', b"", summary.read_bytes()))


def a_run(change=None):
    "Return a maker of a copy of the embedded run, with something changed."

    def make(folder):
        shutil.copytree(EMBEDDED_FOLDER / "run", folder / "run")
        if change:
            change(folder / "run")
            as_if_written(folder / "run")

    return make


def a_model(change=None):
    def make(folder):
        shutil.copytree(EMBEDDED_MODEL, folder / "model")
        if change:
            change(folder / "model")

    return make


def settings(name, **changes):
    "Return a change of a JSON file in a folder; a value of ... removes the key."

    def change(folder):
        found = json.loads((folder / name).read_text())
        found.update(changes)
        (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return change


def at(name, *changes):
    "Return a change within a folder of the folder."

    def change(folder):
        for one in changes:
            one(folder / name)

    return change


def put(name, content):
    def change(folder):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if content == "folder":
            path.mkdir()
        elif content == "pipe":
            os.mkfifo(path)
        elif content == "zeros":
            path.symlink_to("/dev/zero")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def deep(n, opening="[", closing="]"):
    return opening * n + closing * n


# --- chat templates ---------------------------------------------------------------------------------------------------

OPEN = "open('ran', 'w').close()"
TEMPLATES = {
    "an endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ 1 }}",
    "a loop in a macro": "{% macro m() %}{% for i in range(99999) %}{% endfor %}{% endmacro %}{% for i in range(99999) %}{{ m() }}{% endfor %}",
    "loops six deep": "".join(f"{{% for v{i} in range(100) %}}" for i in range(6)) + "x" + "{% endfor %}" * 6 + "{{ 1 }}",
    "a loop over a filter": "{% for i in range(99999)|list * 100 %}{% for j in range(50000) %}{% endfor %}{% endfor %}{{ 1 }}",
    "a loop with a condition": "{% for i in range(99999) if false %}{% endfor %}" * 3000 + "{{ 1 }}",
    "a recursive loop": "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
    "a range of a billion": "{% for i in range(10**9) %}x{% endfor %}{{ 1 }}",
    "a list of ranges": "{{ (range(99999)|list * 1000)|length }}",
    "a loop that doubles": "{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    "a loop that doubles with ~": "{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    "a loop that doubles by format": "{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(60) %}{% set ns.a = '%s%s' % (ns.a, ns.a) %}{% endfor %}{{ ns.a }}",
    "a loop that doubles by join": "{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a]|join %}{% endfor %}{{ ns.a }}",
    "a loop that doubles lists": "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a|length }}",
    "a loop that squares": "{% set ns = namespace(a=3) %}{% for i in range(60) %}{% set ns.a = ns.a * ns.a %}{% endfor %}{{ ns.a }}",
    "ten billion letters": "{{ 'a' * 10**10 }}",
    "letters times letters": "{{ ('a' * 10**6) * 10**4 }}",
    "a power": "{{ 9 ** 9 ** 9 ** 9 ** 9 }}",
    "a power of a power": "{{ (10 ** 10 ** 7) % 7 }}",
    "a list of a billion": "{{ ([0] * 10**9)|length }}",
    "center": "{{ 'a'|center(10**10) }}",
    "center, a method": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ '1'.zfill(10**10) }}",
    "a format of a billion": "{{ '%0999999999d'|format(1) }}",
    "a format by %": "{{ '%0999999999d' % 1 }}",
    "a format by its method": "{{ '{:>9999999999}'.format(1) }}",
    "a format by a star": "{{ '%*d' % (999999999, 1) }}",
    "a format that reads attributes": "{{ '{0.__class__.__mro__}'.format('') }}{{ 1 }}",
    "join": "{{ range(99999)|join('a' * 99999) }}",
    "join, a method": "{{ ('a' * 99999).join(('a ' * 99999).split()) }}",
    "replace": "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "replace, a method": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999})|length }}",
    "expandtabs": "{{ ('\\t' * 99999).expandtabs(99999)|length }}",
    "indent": "{{ ('a\n' * 99999)|indent(99999) }}",
    "wordwrap": "{{ ('a ' * 99999)|wordwrap(1, wrapstring='b' * 99999) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list|length }}",
    "slice": "{{ [1]|slice(10**9, 0)|list|length }}",
    "tojson, wide": "{{ (range(99999)|list)|tojson(indent=99999) }}",
    "tojson of itself": "{% set d = {} %}{% set ns = namespace(d=[]) %}{% for i in range(5000) %}{% set ns.d = [ns.d] %}{% endfor %}{{ ns.d|tojson }}",
    "pprint, deep": "{% set ns = namespace(d=[]) %}{% for i in range(5000) %}{% set ns.d = [ns.d] %}{% endfor %}{{ ns.d|pprint }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "lipsum, long": "{{ lipsum(1, false, 10**8, 10**8 + 1) }}",
    "cycler and joiner": "{% set c = cycler(*range(99999)) %}{% for i in range(99999) %}{% for j in range(999) %}{{ c.next() }}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros that call each other twice": "".join(f"{{% macro m{i}() %}}{{{{ m{i + 1}() }}}}{{{{ m{i + 1}() }}}}{{% endmacro %}}" for i in range(40)) + "{% macro m40() %}a{% endmacro %}{{ m0() }}",
    "a call block that calls itself": "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{% call m() %}{{ m(m) }}{% endcall %}{% endcall %}",
    "an include": "{% include '/etc/passwd' %}{{ 1 }}",
    "an import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "from, import": "{% from 'x' import y %}{{ y }}",
    "an extends": "{% extends 'x' %}{{ 1 }}",
    "the classes of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "a class through attr": "{{ (''|attr('__class__'))|attr('mro') }}",
    "the builtins of cycler": "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "the builtins of lipsum": "{{ lipsum.__globals__['os'].system('touch ran') }}",
    "the builtins by map": "{{ ['touch ran']|map('__import__')|list }}{{ 1 }}",
    "the environment": "{{ self.__init__.__globals__ }}",
    "a mutation of the messages": "{{ messages.append(1) }}{{ messages }}",
    "a syntax error": "{{ 1 }}{% for x in %}",
    "a block that isn't closed": "{{ 1 }}{% if x %}",
    "an unknown tag": "{{ 1 }}{% evil %}",
    "an unknown filter": "{{ 1|evil }}",
    "an undefined name": "{{ a.b.c }}",
    "a division by zero": "{{ 1 / 0 }}",
    "an index beyond the end": "{{ messages[10**20].content }}{{ 1 + none }}",
    "a call of a text": "{{ 'a'() }}",
    "an exception with a long text": "{{ raise_exception('long ' * 10**5) }}",
    "an exception of a turn": "{{ raise_exception(messages) }}",
    "ten megabytes": "{{ 1 }}" + "{# long #}" * 10**6,
    "ten megabytes of text": "{{ 1 }}" + "long " * 2 * 10**6,
    "a hundred thousand prints": "{{ 1 }}" * 100_000,
    "blocks three thousand deep": "{% if 1 %}" * 3000 + "{{ 1 }}" + "{% endif %}" * 3000,
    "loops three hundred deep": "{% for x in [1] %}" * 300 + "{{ 1 }}" + "{% endfor %}" * 300,
    "brackets ten thousand deep": "{{ " + deep(10_000) + " }}",
    "brackets two hundred deep": "{{ " + deep(200, "(", ")").replace("()", "(1)") + " }}",
    "minus ten thousand times": "{{ " + "-" * 10_000 + "1 }}",
    "not ten thousand times": "{{ " + "not " * 10_000 + "1 }}",
    "a sum of ten thousand": "{{ " + "1 + " * 10_000 + "1 }}",
    "a constant that explodes": "{{ 'a' * 9999999999 }}{{ 1 }}",
    "constants that explode": "{{ 99999 ** 99999 ** 9 }}{{ 1 }}",
    "a filter on a constant that explodes": "{{ 'a'|center(99999999999) }}",
    "a test in a loop": "{% for i in range(99999) %}{% if range(99999)|select('divisibleby', 7)|list %}{% endif %}{% endfor %}",
    "sort in a loop": "{% for i in range(99999) %}{% if range(99999)|sort(reverse=true) %}{% endif %}{% endfor %}",
    "sum in a loop": "{% for i in range(99999) %}{% if range(99999)|sum %}{% endif %}{% endfor %}",
    "a bad word in its search": "{{ ('a' * 10**5 + 'b')|urlize }}{{ ('<' * 10**5)|striptags }}",
    "a slow urlize": "{{ ('http://a@' * 10**5)|urlize }}",
    "generation, nested": "{% generation %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endgeneration %}",
    "a time of a billion": "{{ strftime_now('%999999999d' ~ '%c' * 10**6) }}",
}
RENDER = AS_A_USER.format(code="""\
from transformers import AutoTokenizer
    from qlora_nb.core import EMBEDDED_MODEL
    from qlora_nb.template import render
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    found = render(turns, tokenizer, template=open("template.jinja").read())
    print("RENDERED", len(found), type(found))""")
HARMLESS = {"a power of a power", "the environment", "a loop with a condition", "a hundred thousand prints", "ten megabytes", "ten megabytes of text", "brackets two hundred deep",
            "a format that reads attributes", "the builtins by map", "the classes of a text", "a class through attr", "an undefined name",
            "not ten thousand times", "a bad word in its search", "expandtabs", "a time of a billion", "blocks three thousand deep", "loops three hundred deep"}
for name, text in TEMPLATES.items():
    harmless = name in HARMLESS  # refused or small: both are well
    add("chat template", name, write("template.jinja", text), RENDER, None if harmless else "template", (0, 2) if harmless else (2,),
        often=name in ("an endless loop", "ten billion letters", "a loop that doubles with ~"))
IN_DOORS = ("an endless loop", "ten billion letters", "center", "loops six deep", "a macro that calls itself")
for name in IN_DOORS:
    text = TEMPLATES[name]
    turned = settings("tokenizer_config.json", chat_template=text)
    alone = put("chat_template.jinja", text)
    add("chat template", f"{name}, in chat", a_run(at("adapter", alone)), ("chat", "run", "--message", "2+2?", "--max-new-tokens", "2"), "template")
    add("chat template", f"{name}, in check", a_model(alone), ("check", str(EMBEDDED_FOLDER / "data" / "heldout.parquet"), "--model", "model"), "template", (1, 2))
    add("chat template", f"{name}, in train", a_model(alone), (*TRAIN, "--model", "model"), "template", (1, 2), often=name == "center")
    add("chat template", f"{name}, in answer", lambda f, alone=alone: (a_run(at("adapter", alone))(f), write("prompts.txt", "2+2?\n" * 200)(f)), ("answer", "prompts.txt", "run", "--max-new-tokens", "2"), "template", (1, 2))
    add("chat template", f"{name}, in evaluate", a_run(at("adapter", alone)), ("evaluate", "run", "--limit", "20", "--max-new-tokens", "2"), "template", (1, 2))
    add("chat template", f"{name}, in tokenizer_config.json", a_model(at("", lambda f: (f / "chat_template.jinja").unlink(), turned)),
        ("chat", "--model", "model", "--message", "2+2?"), "template")
GO = {
    "ranges in ranges": "{{ range .Messages }}{{ range $.Messages }}" * 30 + "x" + "{{ end }}{{ end }}" * 30,
    "ten thousand deep": "{{ if .System }}" * 10_000 + "x" + "{{ end }}" * 10_000,
    "brackets ten thousand deep": "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
    "a template that uses itself": '{{ define "a" }}{{ template "a" . }}{{ end }}{{ template "a" . }}',
    "a call": "{{ call .System }}",
    "a printf of a billion": '{{ printf "%0999999999d" 1 }}',
    "an open action": "{{ range",
    "a slow comment": "{{/* " * 20_000,
    "an open string": '{{ "' + "\\" * 100_001,
    "two megabytes": "{{ .Prompt }} " * 150_000,
}
for name, text in GO.items():
    code = AS_A_USER.format(code="""\
from qlora_nb.go_template import render_go
    turns = [{"role": "user", "content": "2+2?"}] * 10
    print("RENDERED", len(render_go(open("template").read(), turns)))""")
    add("chat template", f"Go: {name}", write("template", text), code, None, (0, 2))

# --- adapters ---------------------------------------------------------------------------------------------------------

CHAT = ("chat", "run", "--message", "2+2?", "--max-new-tokens", "2")
EVIL = "(([a-z0-9_.]+)+)+X"
ADAPTERS = {
    "a slow pattern of targets": ({"target_modules": EVIL}, "arget.modules"),
    "a slow pattern in alpha_pattern": ({"alpha_pattern": {EVIL: 1}}, None),
    "a slow pattern in rank_pattern": ({"rank_pattern": {EVIL: 1}}, None),
    "a slow pattern in exclude_modules": ({"exclude_modules": EVIL}, None),
    "a slow pattern in layers_pattern": ({"layers_pattern": [EVIL], "layers_to_transform": [0]}, "layers_pattern"),
    "a pattern that can't be read": ({"target_modules": "((("}, "target_modules"),
    "a pattern in alpha_pattern that can't be read": ({"alpha_pattern": {"(((": 1}}, "alpha_pattern"),
    "a pattern of a million letters": ({"target_modules": "(a|" * 300_000 + ")"}, "target_modules"),
    "targets nested deep": ({"target_modules": json.loads(deep(500))}, "target_modules"),
    "a hundred thousand targets": ({"target_modules": [f"layer{i}" for i in range(100_000)]}, "adapter"),
    "a hundred thousand ranks": ({"rank_pattern": {f"layer{i}": 4 for i in range(100_000)}}, None),
    "a hundred thousand exclusions": ({"exclude_modules": [f"layer{i}" for i in range(100_000)]}, None),
    "a hundred thousand endings of one name": ({"target_modules": [f"layer{i}.q_proj" for i in range(100_000)] + ["q_proj"]}, None),
    "targets that are a number": ({"target_modules": 7}, "target_modules"),
    "targets that are null": ({"target_modules": None}, "adapter"),
    "modules_to_save that is text": ({"modules_to_save": EVIL}, "adapter"),
    "modules_to_save that is a number": ({"modules_to_save": 7}, "modules_to_save"),
    "layer_replication of 100,000": ({"layer_replication": [[0, 4]] * 100_000}, "layer_replication"),
    "layers_to_transform of a billion": ({"layers_to_transform": 10**9}, "adapter"),
    "a rank of a billion": ({"r": 10**9}, "r is|rank"),
    "a rank of zero": ({"r": 0}, "adapter"),
    "a rank below zero": ({"r": -1}, "adapter"),
    "a rank that is text": ({"r": "16"}, "adapter"),
    "a rank that is a list": ({"r": [16]}, "adapter"),
    "an alpha of 1e30": ({"lora_alpha": 1e30}, "lora_alpha"),
    "an alpha of 1e400": ({"lora_alpha": float("inf")}, "lora_alpha"),
    "an alpha that is NaN": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "an alpha that is text": ({"lora_alpha": "16"}, "lora_alpha"),
    "an alpha pattern of 1e30": ({"alpha_pattern": {"q_proj": 1e30}}, "alpha_pattern"),
    "a rank pattern of a billion": ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern"),
    "a dropout of 7": ({"lora_dropout": 7}, "lora_dropout"),
    "a dropout that is text": ({"lora_dropout": "a"}, "lora_dropout"),
    "a bias of its own": ({"bias": "evil"}, "adapter"),
    "fan_in_fan_out that is text": ({"fan_in_fan_out": "yes"}, None),
    "prefix tuning": ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
    "an unknown kind": ({"peft_type": "EVIL"}, "EVIL"),
    "a kind that is a list": ({"peft_type": ["LORA"] * 10_000}, "type"),
    "a kind of a million letters": ({"peft_type": "x" * 10**6}, "type"),
    "another task": ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
    "a task that is an object": ({"task_type": {"a": ["b"] * 10_000}}, "trained for"),
    "auto_mapping": ({"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}, None),
    "a parent library that runs": ({"auto_mapping": {"parent_library": "ran", "base_model_class": "x"}}, None),
    "megatron": ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron"),
    "an init that is a path": ({"init_lora_weights": "/etc/passwd"}, None),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"a": 1}}, "loftq"),
    "a corda_config": ({"corda_config": {"cache_file": "/etc/passwd"}}, None),
    "an eva_config": ({"eva_config": {"rho": 10**9}}, None),
    "trainable tokens beyond the vocabulary": ({"trainable_token_indices": [10**9]}, "adapter"),
    "trainable tokens from the vocabulary's end on": ({"trainable_token_indices": [768, 10**9]}, "adapter"),
    "trainable tokens that are text": ({"trainable_token_indices": "evil"}, "trainable_token_indices"),
    "a key of a million letters": ({"x" * 10**6: 1}, "adapter"),
    "a hundred thousand unknown keys": ({f"evil_{i}": 1 for i in range(100_000)}, "adapter"),
    "a hundred thousand notes": ({f"_note{i}": 1 for i in range(100_000)}, None),
    "runtime_config that is a list": ({"runtime_config": [1]}, None),
}
for name, (changes, words) in ADAPTERS.items():
    change = at("adapter", settings("adapter_config.json", **changes))
    often = name in ("a slow pattern of targets", "layer_replication of 100,000", "an alpha of 1e30")
    add("adapter", name, a_run(change), CHAT, words, (2,) if words else (0, 2), often=often)
BASES = {"/etc": "/etc", "a URL": "https://evil.example/model", "a path up": "../../../etc/passwd", "NUL": "a\0b", "ten thousand letters": "a" * 10_000,
         "a list": ["a"], "a number": 7, "an empty text": "", "file://": "file:///etc/passwd", "a tilde": "~root", "a name": "evil/model"}
for name, base in BASES.items():

    def change(folder, base=base):
        settings("adapter_config.json", base_model_name_or_path=base)(folder / "adapter")
        (folder / "adapter").rename(folder.parent / "alone")

    add("adapter", f"its base is {name}", a_run(change), ("chat", "--adapter", "alone", "--message", "2+2?"), "base|model|adapter")
VALUES = {
    "an empty list": "[]", "null": "null", "text": '"a"', "a number": "7", "1e999": "1e999", "3,000 deep": deep(3000), "100,000 deep": deep(100_000), "deep objects": '{"a":' * 3000 + "1" + "}" * 3000,
    "binary": random_bytes(4000), "empty": "", "a folder": "folder", "a pipe": "pipe", "/dev/zero": "zeros", "half": '{"r": 16, "pef', "a number of a million digits": '{"a": ' + "9" * 10**6 + "}",
    "UTF-16": '{"r": 16}'.encode("utf-16"), "100 MB": b'{"a": "' + b"x" * 10**8 + b'"}', "NaN in it": '{"step": NaN, "loss": Infinity, "a": -Infinity}', "duplicate keys": '{"r": 1, "r": 2, "r": 3}',
}
for name, value in VALUES.items():
    add("adapter", f"adapter_config.json is {name}", a_run(at("adapter", put("adapter_config.json", value))), CHAT, "adapter", often=name in ("a pipe", "3,000 deep"))


def tensors(change):
    "Return a change of an adapter's numbers."

    def apply(folder):
        import torch
        from safetensors.torch import load_file, save_file

        found = load_file(folder / "adapter_model.safetensors")
        first = next(iter(found))
        change(found, first, torch)
        save_file(found, folder / "adapter_model.safetensors")

    return apply


def header(text, rest=b"\0" * 64, size=None):
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + rest


def entry(**values):
    return json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | values})


def fill(value, kind=None):
    def change(found, first, torch):
        found[first] = torch.full_like(found[first], value) if kind is None else found[first].to(getattr(torch, kind))

    return change


NUMBERS = {
    "NaN": fill(float("nan")), "infinity": fill(float("inf")), "1e38": fill(1e38), "64 bits": fill(0, "float64"), "integers": fill(0, "int32"), "8-bit floats": fill(0, "float8_e4m3fn"),
    "1e20": fill(1e20), "complex numbers": fill(0, "complex64"), "true and false": fill(0, "bool"),
    "another shape": lambda f, k, t: f.update({k: f[k][:1]}), "no elements": lambda f, k, t: f.update({k: f[k][:0]}), "a number without a shape": lambda f, k, t: f.update({k: t.tensor(1.0)}),
    "a tensor less": lambda f, k, t: f.pop(k), "no tensors": lambda f, k, t: f.clear(), "a tensor more": lambda f, k, t: f.update({"evil": f[k].clone()}),
    "a name with control characters": lambda f, k, t: f.update({"\x1b[2J\a" + k: f[k].clone()}), "20,000 tensors more": lambda f, k, t: f.update({f"evil.{i}": t.zeros(1) for i in range(20_000)}),
    "a name of a million letters": lambda f, k, t: f.update({"x" * 10**6: t.zeros(1)}),
}
for name, change in NUMBERS.items():
    add("adapter", f"numbers: {name}", a_run(at("adapter", tensors(change))), CHAT, None if name in ("64 bits", "integers", "true and false", "complex numbers", "8-bit floats") else "adapter",
        (0, 2) if name in ("64 bits", "integers", "true and false", "complex numbers", "8-bit floats") else (2,), often=name == "NaN")
FILES = {
    "a header of an exabyte": header("{}", size=2**60), "a header of 2**64": header("{}", size=2**64 - 1), "a header that isn't JSON": header("evil"), "a header that is a list": header("[]"),
    "a header 100,000 deep": header('{"a":' + deep(100_000) + "}"), "an empty header": header("{}"), "no header": b"", "a shape of 2**62": header(entry(shape=[2**62, 2**62])),
    "a shape below zero": header(entry(shape=[-1])), "offsets beyond the end": header(entry(data_offsets=[0, 2**60])), "offsets turned round": header(entry(data_offsets=[16, 0])),
    "offsets that overlap": header(json.dumps({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"})), "an unknown type": header(entry(dtype="EVIL")),
    "a million tensors of nothing": header("{" + ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(200_000)) + "}", b""),
    "random bytes": random_bytes(10_000), "a pickle": b"\x80\x04\x95cos\nsystem\n(S'touch ran'\ntR.", "a folder": "folder", "a pipe": "pipe", "zeros": "zeros", "a zip": b"PK\x03\x04" + bytes(100),
}
for name, content in FILES.items():
    add("adapter", f"adapter_model.safetensors is {name}", a_run(at("adapter", put("adapter_model.safetensors", content))), CHAT, "adapter", often=name in ("a header of an exabyte",))


def pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


add("adapter", "a pickle alone", a_run(at("adapter", pickled)), CHAT, "pickle", often=True)
add("adapter", "a link to outside", a_run(at("adapter", lambda f: (shutil.rmtree(f), f.symlink_to("/etc")))), CHAT, "adapter|run")
add("adapter", "a link to itself", a_run(at("adapter", lambda f: (shutil.rmtree(f), f.symlink_to(f)))), CHAT, "adapter|run")

# --- models -----------------------------------------------------------------------------------------------------------

ASK = ("chat", "--model", "model", "--message", "2+2?", "--max-new-tokens", "2")
MODELS = {
    "a width that is text": {"hidden_size": "256"}, "a width of zero": {"hidden_size": 0}, "a width below zero": {"hidden_size": -4}, "a width of 1e9": {"hidden_size": 10**9}, "a width that is a float": {"hidden_size": 0.5},
    "a width that is null": {"hidden_size": None}, "a million layers": {"num_hidden_layers": 10**6}, "layers as text": {"num_hidden_layers": "4"}, "layers below zero": {"num_hidden_layers": -1}, "layers that are a list": {"num_hidden_layers": [4]},
    "a vocabulary of a billion": {"vocab_size": 10**9}, "a vocabulary of 1e30": {"vocab_size": 10**30}, "a vocabulary of one": {"vocab_size": 1}, "a vocabulary as text": {"vocab_size": "many"}, "no heads": {"num_attention_heads": 0},
    "a million heads": {"num_attention_heads": 10**6}, "three heads of keys": {"num_key_value_heads": 3}, "a context of 1e30": {"max_position_embeddings": 10**30}, "a context as text": {"max_position_embeddings": "long"}, "a context of zero": {"max_position_embeddings": 0},
    "attention from the Hub": {"attn_implementation": "evil/kernel"}, "attention of its own": {"_attn_implementation": "evil"}, "code in auto_map": {"auto_map": {"AutoModelForCausalLM": "ran.Model", "AutoConfig": "ran.Config"}},
    "an unknown model_type": {"model_type": "evil"}, "a model_type that is a list": {"model_type": ["llama"]}, "no model_type": {"model_type": ...}, "a BERT": {"model_type": "bert"}, "an unknown architecture": {"architectures": ["Evil"]},
    "architectures that are a number": {"architectures": 7}, "rope that is a list": {"rope_scaling": [1], "rope_parameters": [1]}, "rope that is text": {"rope_parameters": "evil"}, "rope of an unknown kind": {"rope_parameters": {"rope_type": "evil", "factor": 8}},
    "rope of 1e400": {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}}, "an activation of its own": {"hidden_act": "evil"}, "an activation that is a number": {"hidden_act": 7}, "an epsilon as text": {"rms_norm_eps": "small"}, "NaN as epsilon": {"rms_norm_eps": float("nan")},
    "a dtype of its own": {"dtype": "evil", "torch_dtype": "evil"}, "a dtype that is a list": {"dtype": [1]}, "quantization that is a list": {"quantization_config": [1]}, "quantization of its own": {"quantization_config": {"quant_method": "evil"}},
    "quantization that is text": {"quantization_config": "evil"}, "a text_config that is a list": {"text_config": [1]}, "an eos that is text": {"eos_token_id": "evil"}, "an eos of 1e30": {"eos_token_id": 10**30}, "a pad below zero": {"pad_token_id": -7},
    "tp_plan": {"base_model_tp_plan": {"*": "evil"}}, "device_map": {"device_map": "evil"}, "a name that is a path": {"_name_or_path": "/etc/passwd"}, "100,000 labels": {"num_labels": 100_000}, "labels of a billion": {"num_labels": 10**9}, "id2label that is a number": {"id2label": 7},
    "layer_types of its own": {"layer_types": ["evil"] * 4}, "100,000 keys": {f"evil{i}": i for i in range(100_000)}, "a key that is a method": {"to_dict": 1, "__class__": 2, "from_pretrained": "x"},
}
PASSES = {"attention from the Hub", "attention of its own", "code in auto_map", "an unknown architecture", "architectures that are a number", "no model_type", "an eos of 1e30", "a pad below zero", "tp_plan", "device_map", "a name that is a path",
          "100,000 labels", "id2label that is a number", "100,000 keys", "a key that is a method", "rope that is a list", "rope that is text", "rope of an unknown kind", "rope of 1e400", "a text_config that is a list", "an eos that is text",
          "a dtype of its own", "a dtype that is a list", "layer_types of its own", "a context of 1e30", "quantization that is a list", "quantization of its own", "quantization that is text", "a context as text", "NaN as epsilon", "three heads of keys", "labels of a billion"}
for name, changes in MODELS.items():
    fine = name in PASSES
    add("model", name, a_model(settings("config.json", **changes)), ASK, None if fine else "model", (0, 2) if fine else (2,),
        often=name in ("a million layers", "a width that is text", "code in auto_map"))
for name, value in VALUES.items():
    odd = name in ("NaN in it", "duplicate keys")
    add("model", f"config.json is {name}", a_model(put("config.json", value)), ASK, "config.json|model", often=name == "an empty list")
    add("model", f"tokenizer.json is {name}", a_model(put("tokenizer.json", value)), ASK, "tokenizer|model")
    if name != "a folder":
        add("model", f"generation_config.json is {name}", a_model(put("generation_config.json", value)), ASK, None, (0, 2))
    add("model", f"tokenizer_config.json is {name}", a_model(put("tokenizer_config.json", value)), ASK, None, (0, 2))
    add("model", f"plan, config.json is {name}", a_model(put("config.json", value)), ("plan", "--model", "model", "--gpu", "T4"), "config|model")


def weights(change):
    def apply(folder):
        import torch
        from safetensors.torch import load_file, save_file

        found = load_file(folder / "model.safetensors")
        change(found, next(name for name in found if "q_proj" in name), torch)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return apply


for name in ("NaN", "infinity", "another shape", "no elements", "a tensor less", "no tensors", "a tensor more", "20,000 tensors more", "a name of a million letters"):
    add("model", f"numbers: {name}", a_model(weights(NUMBERS[name])), ASK, "model", often=name == "NaN")
for name, content in FILES.items():
    add("model", f"model.safetensors is {name}", a_model(put("model.safetensors", content)), ASK, "model")
INDEX = {"outside": {"weight_map": {"a": "../../../etc/passwd"}}, "an absolute path": {"weight_map": {"a": "/etc/passwd"}}, "a list": [], "no map": {}, "a map that is a list": {"weight_map": [1]}, "numbers as files": {"weight_map": {"a": 7}},
         "a hundred thousand files": {"weight_map": {f"a{i}": f"{i}.safetensors" for i in range(100_000)}}, "a device": {"weight_map": {"a": "/dev/zero"}}}
for name, value in INDEX.items():
    change = at("", put("model.safetensors.index.json", json.dumps(value)), lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00001.safetensors"))
    add("model", f"its index is {name}", a_model(change), ASK, "model")
TOKENIZERS = {
    "an unknown class": {"tokenizer_class": "Evil"}, "a class that is a list": {"tokenizer_class": ["a"]}, "code in auto_map": {"auto_map": {"AutoTokenizer": ["ran.Tokenizer", None]}}, "a template that is a number": {"chat_template": 7},
    "a template that is a list": {"chat_template": ["a"]}, "a template that is an object": {"chat_template": {"evil": "{{ 1 }}"}}, "a length below zero": {"model_max_length": -1}, "a length as text": {"model_max_length": "long"}, "an eos that is a list": {"eos_token": ["a"]}, "an eos that is unknown": {"eos_token": "<|evil|>"},
    "added tokens that are a list": {"added_tokens_decoder": [1]}, "an added token of 1e9": {"added_tokens_decoder": {"1000000000": {"content": "evil", "special": True}}}, "100,000 added tokens": {"added_tokens_decoder": {str(i): {"content": f"<{i}>", "special": True} for i in range(768, 100_768)}},
    "a backend of its own": {"backend": "evil"},
}
for name, changes in TOKENIZERS.items():
    add("model", f"tokenizer: {name}", a_model(settings("tokenizer_config.json", **changes)), ASK, None, (0, 2))


def gguf(**changes):
    "Return the bytes of a GGUF header."
    values = {"version": 3, "tensors": 0, "keys": 0, "rest": b""} | changes
    return b"GGUF" + struct.pack("<IQQ", values["version"], values["tensors"], values["keys"]) + values["rest"]


def gguf_key(name, kind, content):
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + content


GGUFS = {
    "a header alone": gguf(), "2**63 tensors": gguf(tensors=2**63), "2**63 keys": gguf(keys=2**63), "a key of 2**62 letters": gguf(keys=1, rest=struct.pack("<Q", 2**62) + b"a"), "a text of 2**62 letters": gguf(keys=1, rest=gguf_key("a", 8, struct.pack("<Q", 2**62))),
    "a list of 2**62": gguf(keys=1, rest=gguf_key("a", 9, struct.pack("<IQ", 4, 2**62))), "lists in lists": gguf(keys=1, rest=gguf_key("a", 9, struct.pack("<IQ", 9, 1) * 5000)), "a kind of value that isn't": gguf(keys=1, rest=gguf_key("a", 99, b"")), "version 99": gguf(version=99),
    "random bytes": b"GGUF" + random_bytes(10_000), "empty": b"", "a tensor of 2**60": gguf(tensors=1, rest=struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 2**60, 0, 0)), "a tensor of 99 dimensions": gguf(tensors=1, rest=struct.pack("<Q", 1) + b"a" + struct.pack("<I", 99) + struct.pack("<Q", 2) * 99),
    "4,000,000,000 dimensions": gguf(tensors=1, rest=struct.pack("<Q", 1) + b"a" + struct.pack("<I", 4 * 10**9)),
}
for name, content in GGUFS.items():
    add("model", f"GGUF: {name}", write("a.gguf", content), ("chat", "--model", "a.gguf", "--message", "2+2?"), "gguf", often=name == "2**63 keys")
    add("model", f"GGUF, certified: {name}", lambda f, content=content: (a_run()(f), (f / "a.gguf").write_bytes(content)), ("certify", "run", "a.gguf"), "gguf")

# --- run folders ------------------------------------------------------------------------------------------------------

READERS = {
    "config.yaml": ("report", "diagnose", "chat", "evaluate", "publish", "resume", "compare", "config"),
    "summary.json": ("report", "diagnose", "publish", "compare"),
    "metrics.jsonl": ("report", "diagnose", "compare"),
    "evaluation.jsonl": ("report", "diagnose"),
    "preflight.json": ("report",),
    "versions.json": ("report", "publish", "compare"),
    "stopped.json": ("diagnose", "report"),
    "samples.jsonl": ("report",),
    "diagnosis.json": ("report",),
    "certificate.json": ("report", "publish"),
    "heldout.jsonl": ("evaluate",),
}
COMMANDS = {
    "report": ("report", "run"), "diagnose": ("diagnose", "run"), "chat": CHAT, "evaluate": ("evaluate", "run", "--limit", "1"), "publish": ("publish", "run", "--repo", "me/x", "--dry-run"),
    "resume": ("train", "--resume", "run"), "compare": ("compare", "run", "run"), "config": (*TRAIN, "--config", "run/config.yaml"), "export": ("export", "run"), "certify": ("certify", "run"),
}
LINES = {"a list on a line": "[]\n", "null on a line": "null\n", "1e999 on a line": '{"step": 1e999, "loss": 1e999}\n{"step": 1}\n', "numbers as text": '{"step": "1", "loss": "2", "stage": 3}\n', "200,000 lines": '{"step": 1, "loss": 2.0, "learning_rate": 1e-4}\n' * 200_000}
for file, commands in READERS.items():
    for name, value in (VALUES | (LINES if file.endswith(".jsonl") else {})).items():
        for command in commands:
            sure = command in ("diagnose", "chat", "resume", "config") and file == "config.yaml" and name not in ("NaN in it", "duplicate keys", "UTF-16")
            add("run folder", f"{command}, {file} is {name}", a_run(put(file, value)), COMMANDS[command], "config" if sure else None, (2,) if sure else (0, 1, 2),
                often=(command, file, name) in (("report", "metrics.jsonl", "a pipe"), ("diagnose", "summary.json", "3,000 deep"), ("diagnose", "metrics.jsonl", "/dev/zero"), ("chat", "config.yaml", "an empty list")))
for command in ("export", "certify"):
    for name in ("an empty list", "3,000 deep", "a pipe", "binary", "/dev/zero"):
        for file in ("config.yaml", "adapter/adapter_config.json", "adapter/tokenizer.json"):
            add("run folder", f"{command}, {file} is {name}", a_run(put(file, VALUES[name])), COMMANDS[command], None, (0, 1, 2))
SETTINGS = {
    "format is a list": "format: [2]", "lora_alpha is 1e400": "format: 3\nlora_alpha: 1e400", "steps of 1e30": "format: 3\nmax_steps: 1000000000000000000000000000000", "a model that is a list": "format: 3\nmodel: [a]", "a scorer of its own": "format: 3\nscorer: os.system",
    "a seed of 1e30": "format: 3\nseed: 1000000000000000000000000000000", "a seed below zero": "format: 3\nseed: -1", "a revision that is a path": "format: 3\nmodel: a/b\nrevision: ../../etc", "data that is a device": "format: 3\ndata: /dev/zero", "a template that is a bomb": "format: 3\ntemplate: '{{ \"a\" * 10**10 }}'",
    "switches that are a list": "format: 3\ntemplate_kwargs: [1]", "a learning rate of NaN": "format: 3\nlearning_rate: .nan", "a dropout of 7": "format: 3\nlora_dropout: 7", "a rank of a billion": "format: 3\nr: 1000000000", "a batch of a billion": "format: 3\nper_device_train_batch_size: 1000000000000",
    "a length of 1e12": "format: 3\nmax_seq_length: 1000000000000", "an optimizer of its own": "format: 3\noptim: evil", "a schedule of its own": "format: 3\nlr_scheduler_type: evil", "10,000 unknown settings": "format: 3\n" + "".join(f"evil{i}: 1\n" for i in range(10_000)),
    "a setting of a million letters": "format: 3\n" + "x" * 10**6 + ": 1", "report_to of its own": "format: 3\nreport_to: [evil]", "epochs of 1e300": "format: 3\nnum_train_epochs: 1.0e+300", "a target that is a pattern": f"format: 3\ntarget_modules: ['{EVIL}']",
}
for name, text in SETTINGS.items():
    add("YAML", f"a setting: {name}", write("own.yaml", text + "\n"), ("train", "--max-steps", "1", "--eval-rows", "1", "--limit", "20", "--output", "out", "--config", "own.yaml") if "max_steps" not in text
        and "epochs" not in text else ("train", "--eval-rows", "1", "--limit", "20", "--output", "out", "--config", "own.yaml"), "own.yaml|is |there is|know|data|template|model")

# --- YAML -------------------------------------------------------------------------------------------------------------

assert RUN_FORMAT == 3  # in SETTINGS and YAMLS: with another number they would be refused for that alone
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
YAMLS = {
    "a billion laughs": LAUGHS, "a billion laughs in a setting": LAUGHS + "template_kwargs: {a: *a11}\nformat: 3\n", "laughs by merging": "a0: &a0 {k0: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}], k{i}: 1}}\n" for i in range(1, 12)),
    "an alias of itself": "format: 3\na: &a [*a]\n", "3,000 deep": "a: " + deep(3000), "3,000 deep by lines": "\n".join(" " * i + "a:" for i in range(3000)), "100,000 deep": deep(100_000), "100,000 deep objects": "{a: " * 100_000, "a python tag": "format: !!python/object/apply:os.system ['touch ran']\n",
    "a python name": "format: !!python/name:os.system\n", "a tag of its own": "format: !evil 2\n", "a merge of a list": "<<: [1]\nformat: 3\n", "a merge of text": "<<: a\n", "a huge number": "format: 3\nseed: " + "9" * 10**6 + "\n", "a huge number by sixties": "format: 3\nseed: " + "59:" * 10**5 + "59\n",
    "a huge number in hex": "format: 3\nseed: 0x" + "f" * 10**6 + "\n", "a duplicate setting": "format: 3\nseed: 1\nseed: 2\n", "keys that are lists": "? [a]\n: 1\n", "keys that are objects": "? {a: 1}\n: 1\n", "several documents": "a: 1\n---\nb: 2\n", "a tab": "a:\n\t- b\n", "a NUL": "format: 3\na: \0\n", "an impossible date": "format: 3\nseed: 2026-99-99\n",
    "a date": "format: 3\nseed: 2026-12-01\n", "binary in base 64": "format: 3\nmodel: !!binary aGVsbG8=\n", "a set": "format: 3\nmodel: !!set {a, b}\n", "a million keys": "".join(f"k{i}: 1\n" for i in range(10**6)), "100,000 anchors": "".join(f"k{i}: &k{i} 1\n" for i in range(10**5)), "a text of 50 MB": "format: 3\nmodel: " + "x" * 50_000_000,
    "random bytes": random_bytes(5000), "UTF-32": "format: 3\nseed: 1\n".encode("utf-32"), "quotes that don't end": 'format: "2', "brackets that don't end": "[" * 50_000, "a thousand comments": "# a\n" * 10**6, "dashes": "- " * 5000, "question marks": "? " * 5000, "a directive": "%YAML 9.9\n---\nformat: 3\n", "100,000 directives": "%TAG ! evil\n" * 10**5,
}
for name, text in YAMLS.items():
    # ours may be a setting that is unknown, or a run that trains
    fine = name in ("a date", "an impossible date", "a directive")
    add("YAML", f"--config: {name}", write("own.yaml", text), (*TRAIN, "--config", "own.yaml"), "own.yaml|is ", (2,), often=name in ("a billion laughs", "3,000 deep", "a python tag"))
    if name not in ("a duplicate setting", "a directive"):
        add("YAML", f"report: {name}", a_run(put("config.yaml", text if isinstance(text, bytes) else text)), ("report", "run"), "config.yaml")
for name in ("a billion laughs", "3,000 deep", "a million keys", "an alias of itself", "laughs by merging"):
    card = f"---\n{YAMLS[name]}\n---\n"
    rows = b'{"question": "a", "answer": "b"}\n' * 20
    add("YAML", f"a data set's card: {name}", lambda f, card=card, rows=rows: (write("data/README.md", card)(f), write("data/train.jsonl", rows)(f)), ("check", "data"), None, (0, 1, 2))

# --- data -------------------------------------------------------------------------------------------------------------

CHECK = ("check", "data.jsonl")
ROW = b'{"question": "What is 1 + 1?", "answer": "It is 2."}\n'
ZEROS = 6 * 2**30


def packed(name, opener, head=b"", block=b"\0", tail=b"", size=ZEROS):
    "Return a maker of a bomb: one block again and again, compressed."

    def make(folder):
        with opener(folder / name) as file:
            file.write(head)
            part = block * (2**24 // len(block))
            for _ in range(size // 2**24):
                file.write(part)
            file.write(tail)

    return make


def gz(path):
    return gzip.open(path, "wb", 1)


def gz_members(name, block, size=ZEROS):
    "As `packed`, quickly: one compressed member again and again, as gzip allows."

    def make(folder):
        member = gzip.compress(block * (2**26 // len(block)))
        with open(folder / name, "wb") as file:
            for _ in range(size // 2**26):
                file.write(member)

    return make


def zip_bomb(name, member, block, size=ZEROS // 3):
    def make(folder):
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open(member, "w", force_zip64=True) as file:
            for _ in range(size // 2**24):
                file.write(block * 2**24)

    return make


def zst_bomb(name, block, size=ZEROS):
    def make(folder):
        import pyarrow as pa

        with pa.CompressedOutputStream(str(folder / name), "zstd") as file:
            for _ in range(size // 2**26):
                file.write(block * 2**26)

    return make


def parquet(name, build):
    def make(folder):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(build(pa), folder / name)

    return make


def nested(pa, depth):
    kind = pa.string()
    value = "a"
    for _ in range(depth):
        kind, value = pa.list_(kind), [value]
    return pa.table({"question": pa.array([value] * 20, kind), "answer": ["b"] * 20})


def damaged(name, change):
    def make(folder):
        parquet(name, lambda pa: pa.table({"question": [f"What is {i}?" for i in range(20)], "answer": ["b"] * 20}))(folder)
        content = bytearray((folder / name).read_bytes())
        change(content)
        (folder / name).write_bytes(content)

    return make


def huge_footer(content):
    content[-8:-4] = struct.pack("<I", 2**31 - 1)


def noise(content):
    for i in range(100, len(content) - 8, 7):
        content[i] ^= 0x55


DATA = {
    "gzip, one line of 6 GB": (gz_members("data.jsonl.gz", b"x"), "data.jsonl.gz", "line|MB"), "gzip, zeros of 6 GB": (gz_members("data.jsonl.gz", b"\0"), "data.jsonl.gz", "data"), "gzip, 6 GB of blank lines": (gz_members("data.jsonl.gz", b"\n"), "data.jsonl.gz", "blank|no rows"),
    "gzip, 6 GB in a CSV's field": (gz_members("data.csv.gz", b"x"), "data.csv.gz", "data"), "gzip, 6 GB of CSV lines": (gz_members("data.csv.gz", b"\n"), "data.csv.gz", "data|rows"), "gzip, a JSON of 6 GB": (gz_members("data.json.gz", b"["), "data.json.gz", "MB"), "gzip, a Parquet of 6 GB": (gz_members("data.parquet.gz", b"\0"), "data.parquet.gz", "MB"),
    "gzip, 6 GB of blanks": (gz_members("data.jsonl.gz", b" "), "data.jsonl.gz", "line|MB"),
    "bzip2 of 1 GB": (lambda f: (f / "data.jsonl.bz2").write_bytes(bz2.compress(b"x" * 2**26) * 16), "data.jsonl.bz2", "line|MB"), "xz of 2 GB": (lambda f: (f / "data.jsonl.xz").write_bytes(lzma.compress(b"x" * 2**26, preset=0) * 32), "data.jsonl.xz", "line|MB"),
    "zstd of 6 GB": (zst_bomb("data.jsonl.zst", b"x"), "data.jsonl.zst", "line|MB"), "zstd, 6 GB of blank lines": (zst_bomb("data.jsonl.zst", b"\n"), "data.jsonl.zst", "blank|rows"), "zip of 2 GB": (zip_bomb("data.jsonl.zip", "data.jsonl", b"x"), "data.jsonl.zip", "line|MB"), "zip, a JSON of 2 GB": (zip_bomb("data.json.zip", "data.json", b"["), "data.json.zip", "MB"),
    "zip, a name that goes up": (lambda f: zipped(f, {"../../ran": b"x", "a.jsonl": ROW * 20}), "data.zip", "files"), "zip, 100,000 files": (lambda f: zipped(f, {f"{i}.jsonl": b"" for i in range(100_000)}), "data.zip", "files"), "zip in zip": (lambda f: zipped(f, {"a.zip": b"PK\x03\x04" * 100}), "data.zip", "zip"),
    "zip with a password": (lambda f: locked(f), "data.jsonl.zip", "data"),
    "a line of 300 MB": (write("data.jsonl", lambda: b'{"question": "' + b"x" * 300_000_000 + b'", "answer": "b"}\n'), "data.jsonl", "MB"), "a CSV field of 300 MB": (write("data.csv", lambda: b"question,answer\n" + b"x" * 300_000_000 + b",b\n"), "data.csv", "data"),
    "a CSV field in quotes of 300 MB": (write("data.csv", lambda: b'question,answer\n"' + b"x\n" * 150_000_000 + b'",b\n'), "data.csv", "data"), "a number of a million digits": (write("data.jsonl", ROW * 20 + b'{"question": ' + b"9" * 10**6 + b', "answer": "b"}\n'), "data.jsonl", "line 21"),
    "100,000 deep": (write("data.jsonl", ROW * 20 + deep(100_000).encode() + b"\n"), "data.jsonl", "line 21"), "3,000 deep in a row": (write("data.jsonl", ROW * 20 + b'{"question": ' + deep(3000).encode() + b', "answer": "b"}\n'), "data.jsonl", None), "500 deep in a row": (write("data.jsonl", ROW * 20 + b'{"question": ' + deep(500).encode() + b', "answer": "b"}\n'), "data.jsonl", None),
    "messages 300 deep": (write("data.jsonl", (b'{"messages": ' + deep(300).encode() + b"}\n") * 20), "data.jsonl", None), "objects 900 deep": (write("data.jsonl", (b'{"question": ' + b'{"a": ' * 900 + b"1" + b"}" * 900 + b', "answer": "b"}\n') * 20), "data.jsonl", None),
    "200,000 columns": (write("data.csv", (",".join(f"column{i}" for i in range(200_000)) + "\n" + ",".join("1" for i in range(200_000)) + "\n").encode()), "data.csv", "column"), "200,000 keys": (write("data.jsonl", json.dumps({f"key{i}": "a" for i in range(200_000)}).encode() + b"\n"), "data.jsonl", "key"),
    "a column of a million letters": (write("data.csv", b"x" * 10**6 + b",b\n1,2\n"), "data.csv", "data"), "names with control characters": (write("data.csv", b"\x1b[2J\x07,b\n1,2\n"), "data.csv", "data"), "a million turns": (write("data.jsonl", lambda: json.dumps({"messages": [{"role": "user", "content": "a"}] * 10**6}).encode() + b"\n"), "data.jsonl", None),
    "roles of a million letters": (write("data.jsonl", json.dumps({"messages": [{"role": "x" * 10**6, "content": "a"}, {"role": "assistant", "content": "a"}]}).encode() + b"\n"), "data.jsonl", None), "NUL bytes": (write("data.jsonl", b"\0" * 10**7), "data.jsonl", "data"), "random bytes": (write("data.jsonl", random_bytes(10**6)), "data.jsonl", "data"),
    "Parquet, 100 deep": (parquet("data.parquet", lambda pa: nested(pa, 90)), "data.parquet", None), "Parquet, a footer of 2 GB": (damaged("data.parquet", huge_footer), "data.parquet", "data"), "Parquet, noise": (damaged("data.parquet", noise), "data.parquet", "data"), "Parquet, cut": (damaged("data.parquet", lambda c: c.__delitem__(slice(200, 400))), "data.parquet", "data"),
    "Parquet, a billion equal rows": (lambda f: repeated(f), "data.parquet", None), "a pipe": (lambda f: os.mkfifo(f / "data.jsonl"), "data.jsonl", "data.jsonl"), "/dev/zero": (lambda f: (f / "data.jsonl").symlink_to("/dev/zero"), "data.jsonl", "data.jsonl"), "/dev/zero itself": (lambda f: None, "/dev/zero", "zero"), "/dev/stdin": (lambda f: None, "/dev/stdin", "stdin"),
    "/proc/self/mem": (lambda f: None, "/proc/self/mem", "mem"), "a link to itself": (lambda f: (f / "data.jsonl").symlink_to(f / "data.jsonl"), "data.jsonl", "data.jsonl"), "a folder of links to itself": (lambda f: ((f / "data").mkdir(), [(f / "data" / str(i)).symlink_to(f / "data") for i in range(6)]), "data", "data"), "a folder of 20,000 files": (lambda f: many(f), "data", None),
    "a path of 10,000 letters": (lambda f: None, "x" * 10_000, "file|name"), "a path that goes up": (lambda f: None, "../../../../etc/passwd", "passwd"), "a pattern that is everything": (lambda f: None, "/**/*", "|"), "a pattern that is everything, and nothing": (lambda f: None, "/**/nothing.jsonl", "pattern|match"), "a pattern of stars": (lambda f: None, "/" + "**/" * 500 + "*", "pattern"), "a pattern over links to itself": (lambda f: (many_links(f), write("data/train.jsonl", ROW * 20)(f)), "data/**/*", None), "a pattern deeper than Python's stack": (lambda f: None, "/" + "*/" * 3000, "name|pattern"),
    "150 deep in a row": (write("data.jsonl", ROW * 20 + b'{"question": ' + deep(150).encode() + b', "answer": "b"}\n'), "data.jsonl", "deep"), "literals 150 deep": (write("data.jsonl", (b"{'question': " + deep(150).encode() + b", 'answer': 'b'}\n") * 20), "data.jsonl", "deep"), "a cell of JSON 900 deep": (write("data.csv", ('messages\n"' + deep(900) + '"\n').encode() * 1), "data.csv", None),
    "6 GB of blanks, a JSON": (lambda f: sparse(f, b" ", "data.json"), "data.json", "MB"), "zeros of 6 GB, a JSON": (lambda f: sparse(f, b"\0", "data.json"), "data.json", "data"), "blank lines, then rows": (write("data.jsonl", lambda: b"\n" * 10**7 + ROW * 20), "data.jsonl", None), "gzip, 6 GB of equal rows": (gz_members("data.jsonl.gz", ROW), "data.jsonl.gz", None),
    "a dataset script": (lambda f: (write("data/data.py", OPEN)(f)), "data", "data"), "a folder saved by datasets with code": (lambda f: (write("data/state.json", "{}")(f), write("data/ran.py", OPEN)(f)), "data", "data"),
    "6 GB of blank lines, plain": (lambda f: sparse(f, b"\n"), "data.jsonl", "blank|rows"),
}


def zipped(folder, members):
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def locked(folder):
    "A zip whose member says that it is encrypted."
    zipped(folder, {"data.jsonl": ROW * 20})
    content = bytearray((folder / "data.zip").read_bytes())
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    (folder / "data.jsonl.zip").write_bytes(content)


def repeated(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"question": pa.array(["a"] * 10**6).dictionary_encode(), "answer": pa.array(["b"] * 10**6).dictionary_encode()})
    with pq.ParquetWriter(folder / "data.parquet", table.schema) as writer:
        for _ in range(40):
            writer.write_table(table)


def many(folder):
    (folder / "data").mkdir()
    for i in range(20_000):
        (folder / "data" / f"{i}.txt").touch()


def many_links(folder):
    (folder / "data").mkdir()
    for i in range(6):
        (folder / "data" / str(i)).symlink_to(folder / "data")


def sparse(folder, byte, name="data.jsonl"):
    with open(folder / name, "wb") as file:
        for _ in range(16):
            file.write(byte * 2**26)


for name, (make, source, words) in DATA.items():
    add("data", name, make, ("check", source), words, (2,) if words else (0, 1, 2), often=name in ("zstd of 6 GB", "200,000 columns", "a pipe"))
PROMPTS = {"a pipe": "pipe", "/dev/zero": "zeros", "a folder": "folder", "binary": random_bytes(4000), "a line of 300 MB": None, "empty": "", "3,000 deep": deep(3000)}
for name, value in PROMPTS.items():
    for suffix in ("txt", "jsonl"):
        make = write(f"prompts.{suffix}", lambda: b"x" * 300_000_000) if value is None else put(f"prompts.{suffix}", value)
        add("data", f"answer, .{suffix}: {name}", lambda f, make=make: (a_run()(f), make(f)), ("answer", f"prompts.{suffix}", "run", "--max-new-tokens", "2"), "prompts", (1, 2))

# --- doctor -----------------------------------------------------------------------------------------------------------

CELL = {"cell_type": "code", "source": ["x = 1\n"], "metadata": {}, "outputs": []}
DOCTOR = {
    "100,000 cells": ("a.ipynb", lambda: json.dumps({"cells": [CELL] * 100_000, "metadata": {}}).encode()), "a million empty cells": ("a.ipynb", lambda: json.dumps({"cells": [{"cell_type": "code", "source": ""}] * 10**6, "metadata": {}}).encode()), "200 MB": ("a.ipynb", lambda: json.dumps({"cells": [CELL | {"outputs": ["x" * 200_000_000]}]}).encode()),
    "binary": ("a.py", random_bytes(10_000)), "binary notebook": ("a.ipynb", random_bytes(10_000)), "deep JSON": ("a.ipynb", deep(100_000)), "cells that are a number": ("a.ipynb", '{"cells": 7}'), "cells that are objects": ("a.ipynb", '{"cells": {"a": 1}}'), "cells that are null": ("a.ipynb", '{"cells": [null]}'), "sources that are numbers": ("a.ipynb", '{"cells": [{"cell_type": "code", "source": 7}]}'),
    "metadata that is a list": ("a.ipynb", '{"cells": [], "metadata": [1]}'), "brackets 100,000 deep": ("a.py", deep(100_000)), "brackets 90 deep, nested calls": ("a.py", "f(" * 90 + ")" * 90), "attributes 50,000 deep": ("a.py", "a" + ".b" * 50_000), "a sum of 50,000": ("a.py", "x = " + "1 + " * 50_000 + "1"), "minus 50,000 times": ("a.py", "-" * 50_000 + "1"),
    "a line of 10 MB": ("a.py", "x = '" + "a" * 10**7 + "'"), "a number of a million digits": ("a.py", "x = " + "9" * 10**6), "a coding that isn't": ("a.py", "# coding: evil\nx = 1"), "a coding that runs": ("a.py", "# coding: rot13\nx = 1"), "UTF-7": ("a.py", b"# coding: utf-7\nx = '+AGE-'"), "NUL": ("a.py", "x = 1\0"), "an empty file": ("a.py", ""), "a million blank lines": ("a.py", "\n" * 10**6),
    "a million assignments": ("a.py", "x = 1\n" * 300_000), "100,000 magics": ("a.py", "# %%\n!pip install x\n" * 100_000), "100,000 magics without an exclamation mark": ("a.py", "pip install x\n" * 70_000), "magics among assignments": ("a.py", ("x = 1\n" * 1000 + "!ls\n") * 150), "20,000 functions": ("a.py", "".join(f"def f{i}():\n    return f{i - 1}()\n" for i in range(20_000))), "functions in functions": ("a.py", "".join(" " * i + f"def f{i}():\n" for i in range(90)) + " " * 90 + "pass\n"), "names that follow each other": ("a.py", "".join(f"x{i + 1} = x{i}\n" for i in range(20_000)) + "x0 = x20000\ntrain(x20000)"),
    "a name that doubles": ("a.py", "x0 = 'a'\n" + "".join(f"x{i + 1} = x{i} + x{i}\n" for i in range(60)) + "from trl import SFTTrainer\nSFTTrainer(x60, tokenizer=x60)\n"), "a text that multiplies": ("a.py", "x = 'a' * 10**12\nfrom trl import SFTTrainer\nSFTTrainer(x, max_seq_length=10**10**10)\n"), "f-strings, nested": ("a.py", "x = f'{" + "f\"{" * 1 + "1" + "}\"" * 1 + "}'\n"), "a lambda 500 deep": ("a.py", "x = " + "lambda: " * 500 + "1"),
    "control characters": ("a.py", "x = '\x1b[2J\x07'\nfrom trl import SFTTrainer\nSFTTrainer(m, tokenizer='\x1b]0;evil\x07')\n"), "a slow comment": ("a.py", "# " + "%" * 10**6), "slow spaces": ("a.py", "x = 1" + " " * 10**6 + "\n!" + " " * 10**6 + "pip"), "a slow magic": ("a.ipynb", json.dumps({"cells": [CELL | {"source": "!pip install " + "-" * 10**6}], "metadata": {}})),
}
for name, (file, content) in DOCTOR.items():
    add("doctor", name, write(file, content), ("doctor", file), None, (0, 1, 2), often=name in ("100,000 cells", "brackets 100,000 deep"))
add("doctor", "/dev/zero", lambda f: (f / "a.py").symlink_to("/dev/zero"), ("doctor", "a.py"), "a.py", often=True)
add("doctor", "/dev/zero as a notebook", lambda f: (f / "a.ipynb").symlink_to("/dev/zero"), ("doctor", "a.ipynb"), "a.ipynb")
add("doctor", "a pipe", lambda f: os.mkfifo(f / "a.py"), ("doctor", "a.py"), "a.py")
add("doctor", "a folder", lambda f: (f / "a.py").mkdir(), ("doctor", "a.py"), "a.py")

# --- command line -----------------------------------------------------------------------------------------------------

LONG = "x" * 10_000
ARGUMENTS = {
    **{f"{flag} {value}": (*TRAIN, f"{flag}={value}") for flag in ("--learning-rate", "--r", "--lora-alpha", "--max-seq-length", "--seed", "--warmup-steps", "--weight-decay", "--per-device-train-batch-size", "--lora-dropout")
       for value in ("1e400", "nan", "-1", "x", "9" * 400)},
    **{f"{command[0]} with {len(LONG):,} letters": (*command, LONG) for command in (("chat",), ("report",), ("diagnose",), ("export",), ("doctor",), ("check",), ("publish", "--repo", "a/b"), ("evaluate",), ("certify",), ("train", "--resume"), ("train", "--config"), ("train", "--model"), ("train", "--data"), ("train", "--output"), ("plan", "--model"), ("plan", "--gpu"), ("train", "--template"))},
    "a path of 10,000 folders": ("report", "a/" * 10_000), "a path that goes up 10,000 times": ("report", "../" * 10_000), "an unknown command of 10,000 letters": (LONG,), "an unknown flag of 10,000 letters": ("train", f"--{LONG}"), "10,000 arguments": ("certify", *["a"] * 10_000), "an empty path": ("report", ""), "a minus": ("report", "-"),
    "--columns, 10,000 of them": ("check", "--columns", ",".join(f"a{i}=b" for i in range(10_000))), "--columns, deep": ("check", "--columns", '{"prompt": ' + deep(50_000) + "}"), "--template-kwargs, deep": ("check", "--template-kwargs", '{"a": ' + deep(50_000) + "}"), "--template-kwargs, 900 deep": ("check", "--template-kwargs", '{"a": ' + deep(900) + "}"), "--template-kwargs, 150 deep": ("check", "--template-kwargs", '{"a": ' + deep(150) + "}"), "--columns, 900 deep": ("check", "--columns", '{"prompt": ' + deep(900) + "}"),
    "a seed of 10,000 letters": ("train", "--seed", LONG), "an argument more, of 10,000 letters": ("report", "run", LONG), "10,000 arguments more": ("report", "run", *["a"] * 10_000), "a short flag of 10,000 letters": ("train", f"-{LONG}"), "a switch with a value of 10,000 letters": ("train", f"--packing={LONG}"), "an unknown flag before the command": (f"--{LONG}", "train"), "an unknown command with control characters": ("\x1b[2J\x07" * 3000,),
    "--template-kwargs, a number of 5,000 digits": ("check", "--template-kwargs", "a=" + "9" * 5000),
    "--sample-prompts, deep": (*TRAIN, "--sample-prompts", deep(50_000)), "--template, a bomb": (*TRAIN, "--template", "{{ 'a' * 10**10 }}"), "--template, endless": ("check", "--template", TEMPLATES["an endless loop"]), "--target-modules, 10,000": (*TRAIN, "--target-modules", ",".join(f"a{i}" for i in range(10_000))), "--gpu, 1e400 GB": ("plan", "--gpu", "1e400 GB"), "--gpu, NaN GB": ("plan", "--gpu", "nan GB"),
    "--gpu, 10,000 digits": ("plan", "--gpu", "9" * 10_000 + " GB"), "--repo, a path": ("publish", "run", "--repo", "../../x"), "--export of 10,000 kinds": (*TRAIN, "--export", ",".join(["x"] * 10_000)), "a Hub name that goes up": ("chat", "--model", "../..", "a"), "a Hub name of 10,000 letters": ("chat", "--model", f"a/{LONG}", "b"),
}
for name, arguments in ARGUMENTS.items():
    add("command line", name[:80], lambda f: None, arguments, None, (0, 1, 2), often=name in ("--seed nan", "report with 10,000 letters"))
for name, value in {"empty": "", "odd": "evil", "a path": "../../etc", "10,000 letters": LONG, "control characters": "\x1b[2J"}.items():
    add("command line", f"QLORA_NB_PROFILE is {name}", lambda f: None, AS_A_USER.format(code=f"import os; os.environ['QLORA_NB_PROFILE'] = {value!r}\n    from qlora_nb import profile\n    print(profile().name)"), None, (0, 2))
for name, text in {"a NUL": "a\0b", "half a character": "a\udc80b", "control characters": "a\x1b[2J\x07\u202e"}.items():
    for call in ("qlora_nb.diagnose(text)", "qlora_nb.load_sft_dataset(text)", "qlora_nb.load_model(text)", "qlora_nb.open_run(text)"):
        code = AS_A_USER.format(code=f"import qlora_nb, qlora_nb.diagnosis\n    qlora_nb.diagnose = qlora_nb.diagnosis.diagnose\n    text = {text!r}\n    {call}")
        add("command line", f"{call.removeprefix('qlora_nb.')} with {name}", lambda f: None, code, None)


# --- the tests --------------------------------------------------------------------------------------------------------


def run_case(name, folder):
    "Run one case; return what is wrong with how it ended, else None."
    case = CASES[name]
    case.make(folder)
    before, started = set(folder.rglob("ran*")), processes.spent
    try:
        if isinstance(case.command, str):
            ended = processes.run(case.command, cwd=folder, first=BEFORE, timeout=SILENT)
        else:
            ended = processes.run(processes.COMMAND, *case.command, cwd=folder, first=BEFORE, timeout=SILENT)
    except processes.subprocess.TimeoutExpired:
        return f"still there after {SILENT} s"
    seconds, code = processes.spent - started, ended.returncode
    text = ended.stdout + ended.stderr
    shown = f"exit code {code}, {seconds:.1f} s: {text[:300]!r} … {text[-500:]!r}"
    if "Traceback" in text:
        return f"a traceback; {shown}"
    if code not in case.codes:
        return f"another exit code; {shown}"
    if seconds > SECONDS:
        return f"too slow; {shown}"
    last = next((line for line in reversed(ended.stderr.splitlines()) if line.startswith("qlora_nb: ")), "")
    if code == 2 and not last and not isinstance(case.command, str) and not re.search("Usage: |Error: ", ended.stderr):
        return f"no sentence; {shown}"
    if len(last) > LONGEST + 10 or len(ended.stderr) > 3 * LONGEST or max(map(len, text.splitlines() or [""])) > 5 * LONGEST:
        return f"a flood of {len(last):,} and {len(text):,} characters; {shown}"
    if case.words and not re.search(case.words, text):
        return f"other words; {shown}"
    if set(folder.rglob("ran*")) != before:
        return f"code was run; {shown}"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f\x9b\u202e]", text.replace("\r", "")):
        return f"control characters; {shown}"
    return None


@pytest.fixture(scope="module", autouse=True)
def forks(tmp_path_factory):
    "The server of processes, started before the first case is timed."
    processes.run("pass", cwd=tmp_path_factory.mktemp("forks"))


@pytest.mark.parametrize("case", sorted(OFTEN))
def test_hostile_input_gets_a_sentence(case, tmp_path):
    assert run_case(case, tmp_path) is None


@pytest.mark.heavy
@pytest.mark.parametrize("case", sorted(CASES))
def test_every_hostile_input_gets_a_sentence(case, tmp_path):
    found = run_case(case, tmp_path)
    shutil.rmtree(tmp_path, ignore_errors=True)  # some are large
    assert found is None


def test_there_are_enough_hostile_inputs():
    kinds = {case.kind for case in CASES.values()}
    assert len(CASES) >= 200 and kinds == {"chat template", "adapter", "model", "run folder", "YAML", "data", "doctor", "command line"}
