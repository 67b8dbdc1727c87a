"""Hostile data sets: the right finding, or one sentence with file and row; never a traceback, never silence.

Each case is a small file (or folder, or object) that is loaded and looked at as a user would. What is expected is a
code of `check_dataset` with its first row, or words of the one error that a user sees.
"""

import bz2
import copy
import gc
import gzip
import io
import json
import lzma
import re
import shutil
import tracemalloc
import zipfile

import pytest

from qlora_nb.core import EMBEDDED_MODEL, UserError
from qlora_nb.preflight import check_dataset
from qlora_nb.row_statistics import DATASET_CODES
from qlora_nb.rows import load_sft_dataset

EOT = "<|eot_id|>"
SETTINGS = {"pad_is_eos", "date_in_template", "tokenizer_too_large", "too_few_rows", "row_dropped", "length_outlier",
            "dominant_answer", "empty_content", "special_token_in_content"}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def talk(question="2+2?", reply="4"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def pair(i, answer=None):
    return {"question": f"What is {i} + 1?", "answer": f"It is {i + 1}." if answer is None else answer}


SOUND = [pair(i) for i in range(20)]
TALKS = [talk(*pair(i).values()) for i in range(20)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows, mark=","):
    return (
        mark.join(["question", "answer"]) + "\n" + "".join(f"{r['question']}{mark}{r['answer']}\n" for r in rows)
    ).encode()


def parquet(rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = io.BytesIO()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), place)
    return place.getvalue()


def zst(content):
    import pyarrow as pa

    return pa.Codec("zstd").compress(content, asbytes=True)


def zipped(**members):
    place = io.BytesIO()
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return place.getvalue()


GOOD, JSONL, CSV = 20, lines(SOUND), table(SOUND)

# --- files that can't be read: an error that names the file, and the row where there is one --------------------------

BROKEN = {
    # JSONL
    "jsonl: broken in the middle": ("a.jsonl", JSONL + b'{"question": "2\n' + JSONL, "line 21, is not JSON"),
    "jsonl: cut short": ("a.jsonl", JSONL[:-9], "line 20, is not JSON"),
    "jsonl: two objects on a line": ("a.jsonl", JSONL + JSONL[:-1].replace(b"\n", b" "), "line 21, is not JSON"),
    "jsonl: one quote too many": (
        "a.jsonl",
        JSONL + b'{"question": "say "hi"", "answer": ""}\n',
        "line 21, is not JSON",
    ),
    "jsonl: a call in Python's quotes": (
        "a.jsonl",
        JSONL + b"{'question': f(), 'answer': 'b'}\n",
        "line 21, is not JSON",
    ),
    "jsonl: a list among objects": ("a.jsonl", JSONL + b"[1]\n", "line 21, is a JSON list"),
    "jsonl: a number among objects": ("a.jsonl", b"3\n" + JSONL, "line 1, is a JSON int"),
    "jsonl: null among objects": ("a.jsonl", JSONL + b"null\n", "line 21, is a JSON NoneType"),
    "jsonl: a key twice": (
        "a.jsonl",
        JSONL + b'{"question": "a", "answer": "b", "answer": "c"}\n',
        "line 21, .*duplicate key 'answer'",
    ),
    "jsonl: Latin-1": (
        "a.jsonl",
        JSONL + '{"question": "Größe?", "answer": "é"}\n'.encode("latin-1"),
        "line 21, is not UTF-8",
    ),
    "jsonl: UTF-16 without a mark": ("a.jsonl", JSONL.decode().encode("utf-16-le"), "line 1, is not"),
    "jsonl: zeros at the end": ("a.jsonl", JSONL + b"\0" * 512 + b"\n", "line 21, is not JSON"),
    "jsonl: nested too deeply": ("a.jsonl", JSONL + b'{"question": ' + b"[" * 99_999 + b"\n", "line 21, is not JSON"),
    "jsonl: a number of ten thousand digits": (
        "a.jsonl",
        JSONL + b'{"question": ' + b"9" * 10_000 + b"}\n",
        "line 21, is not JSON",
    ),
    "jsonl: empty": ("a.jsonl", b"", "a.jsonl has no rows"),
    "jsonl: blank lines alone": ("a.jsonl", b"\n \n\n", "a.jsonl has no rows"),
    "jsonl: unknown columns": (
        "a.jsonl",
        lines([{"frage": "a", "antwort": "b"}]),
        "no usable columns: found frage, antwort",
    ),
    "jsonl: two ways to read": (
        "a.jsonl",
        lines([{**pair(1), "prompt": "a", "response": "b"}]),
        "can be read in 2 ways",
    ),
    "jsonl: HTML in its place": ("a.jsonl", b"<!DOCTYPE html>\n<html></html>\n", "a.jsonl is a web page"),
    "jsonl: a conversation as broken text": ("a.jsonl", lines([{"messages": "[{]"}]), "a.jsonl, row 1: a conversation"),
    "jsonl: 50 MB on one line, broken": (
        "a.jsonl",
        JSONL + b'{"question": "' + b"x " * 25_000_000 + b"\n",
        "line 21, is not JSON",
    ),
    # JSON
    "json: broken in the middle": (
        "a.json",
        json.dumps(SOUND).replace('"What is 9', "What is 9").encode(),
        r"a.json is not JSON .*\(row 10\)",
    ),
    "json: broken in the middle, many lines": (
        "a.json",
        json.dumps(SOUND, indent=1).replace('"What is 9', "What is 9").encode(),
        "a.json, line 39, is not JSON",
    ),
    "json: cut short": ("a.json", json.dumps(SOUND).encode()[:-30], r"\(row 20\)"),
    "json: a list of numbers": ("a.json", b"[1, 2]", "row 1, is a JSON int"),
    "json: a list of lists": ("a.json", b'[["a", "b"]]', "row 1, is a JSON list"),
    "json: one text": ("a.json", b'"hello"', "row 1, is a JSON str"),
    "json: an empty list": ("a.json", b"[]", "has no rows"),
    "json: empty": ("a.json", b"  \n", "has no rows"),
    "json: Latin-1": (
        "a.json",
        json.dumps([*SOUND, pair(1, "é")], indent=1, ensure_ascii=False).encode("latin-1"),
        "a.json, line 84, is not UTF-8",
    ),
    "json: a list of Latin-1 lines": (
        "a.json",
        JSONL + b'{"question": "\xe9", "answer": "b"}\n',
        "line 21, is not UTF-8",
    ),
    "json: columns of two lengths": (
        "a.json",
        json.dumps({"question": ["a", "b"], "answer": ["c"]}).encode(),
        "a.json holds columns of different lengths .question: 2, answer: 1.",
    ),
    "json: nested too deeply": ("a.json", b"[" * 99_999, "a.json is not JSON"),
    "json: a trailing comma": ("a.json", json.dumps(SOUND).encode()[:-1] + b",]", "a.json is not JSON"),
    # CSV and TSV
    "csv: a value too few": ("a.csv", CSV + b"alone\n", "row 21, doesn't have the 2 columns"),
    "csv: a comma that is not quoted": ("a.csv", CSV + b"a, b,c\n", "row 21, doesn't have the 2 columns"),
    "csv: a quote that is never closed": ("a.csv", CSV + b'"open,b\n' + CSV, "row 21, is not CSV"),
    "csv: text behind a quote": ("a.csv", CSV + b'"a"b,c\n', "row 21, is not CSV"),
    "csv: Latin-1": ("a.csv", CSV + "Größe,b\n".encode("latin-1"), r"near row \d+, is not UTF-8"),
    "csv: UTF-16, cut short": (
        "a.csv",
        CSV.decode().encode("utf-16")[:-1],
        "a.csv starts as utf-16.* text, but isn.t valid",
    ),
    "csv: empty": ("a.csv", b"", "has no rows"),
    "csv: a header alone": ("a.csv", b"question,answer\n", "has no rows"),
    "csv: no header": ("a.csv", b"What is 2?,It is 2.\nWhat is 3?,It is 3.\n", "no usable columns: found What is 2"),
    "csv: a column missing": ("a.csv", b"question\nWhat?\n", "no usable columns: found question"),
    "csv: a column twice": (
        "a.csv",
        b"question,answer,answer\na,b,c\n",
        "row 0 .the header., names the column 'answer' twice",
    ),
    "tsv: blanks in place of tabs": ("a.tsv", CSV.replace(b",", b" "), "no usable columns: found question answer"),
    # Parquet
    "parquet: empty": ("a.parquet", b"", "a.parquet, after row 0, is not a readable Parquet file"),
    "parquet: cut short": ("a.parquet", parquet(SOUND)[:-40], "a.parquet, after row 0, is not a readable Parquet file"),
    "parquet: its middle destroyed": (
        "a.parquet",
        parquet(SOUND)[:4] + b"\xff" * 300 + parquet(SOUND)[304:],
        "a.parquet.* after row 0",
    ),
    "parquet: a CSV by that name": ("a.parquet", CSV, "a.parquet, after row 0, is not a readable Parquet file"),
    "parquet: no rows": ("a.parquet", parquet(SOUND[:1])[:0] or None, "has no rows"),
    "parquet: a column twice": ("a.parquet", "twice", "names the column 'answer' twice"),
    "parquet: unknown columns": ("a.parquet", parquet([{"a": "b"}]), "no usable columns: found a"),
    # packed
    "gzip: cut short": ("a.jsonl.gz", gzip.compress(JSONL)[:-30], "a.jsonl.gz can't be read after row"),
    "gzip: its middle destroyed": (
        "a.jsonl.gz",
        gzip.compress(JSONL)[:40] + b"\0" * 40 + gzip.compress(JSONL)[80:],
        "a.jsonl.gz can't be read after row",
    ),
    "gzip: not packed at all": ("a.jsonl.gz", JSONL, "after row 0 .* compressed as its name says"),
    "gzip: broken JSON inside": ("a.jsonl.gz", gzip.compress(JSONL + b"{"), "line 21, is not JSON"),
    "gzip: Parquet cut short inside": (
        "a.parquet.gz",
        gzip.compress(parquet(SOUND)[:-9]),
        "a.parquet.gz, after row 0, is not a readable Parquet",
    ),
    "bzip2: cut short": ("a.csv.bz2", bz2.compress(CSV)[:-20], "a.csv.bz2 can't be read after row"),
    "bzip2: not packed at all": ("a.jsonl.bz2", JSONL, "a.jsonl.bz2 can't be read after row 0"),
    "xz: cut short": ("a.json.xz", lzma.compress(json.dumps(SOUND).encode())[:-20], "a.json.xz can't be read after"),
    "zstd: cut short": ("a.jsonl.zst", zst(JSONL * 50)[:-40], r"a.jsonl.zst"),
    "zstd: not packed at all": ("a.jsonl.zst", JSONL, "a.jsonl.zst can't be read after row 0"),
    "zip: cut short": ("a.jsonl.zip", zipped(a_jsonl=JSONL)[:-30], "a.jsonl.zip can't be read after row"),
    "zip: two files": ("a.zip", zipped(a_jsonl=JSONL, b_jsonl=JSONL), "a.zip holds 2 files"),
    "zip: empty": ("a.zip", zipped(), "a.zip holds 0 files"),
    # names
    "a pickle": ("a.pkl", b"\x80\x04.", "a.pkl has no known suffix"),
    "plain text": ("a.txt", b"hello", "a.txt has no known suffix"),
    "no suffix": ("a", JSONL, "a has no known suffix"),
}


def two_columns_of_one_name():
    import pyarrow as pa

    return parquet(pa.table([["a"], ["b"], ["c"]], names=["question", "answer", "answer"]))


def no_rows():
    import pyarrow as pa

    return parquet(pa.schema([("question", pa.string()), ("answer", pa.string())]).empty_table())


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_one_sentence(case, tmp_path):
    name, content, words = BROKEN[case]
    path = tmp_path / name
    path.write_bytes(no_rows() if content is None else two_columns_of_one_name() if content == "twice" else content)
    with pytest.raises(UserError) as caught:
        load_sft_dataset(path)
    message = str(caught.value)
    assert re.search(words, message) and "\n" not in message
    assert name in message or "columns" in message


# --- what loads, and becomes a finding -------------------------------------------------------------------------------


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


ODD = {  # a file's name and rows, the code, the row
    "numbers as content": ("a.jsonl", lines([*SOUND, pair(1, 4)]), "non_string_content", 20),
    "null as content": ("a.jsonl", lines([*SOUND, {"question": None, "answer": "b"}]), "non_string_content", 20),
    "a list as content": ("a.jsonl", lines([*SOUND, pair(1, ["a", ["b"]])]), "non_string_content", 20),
    "an object as content": ("a.jsonl", lines([*SOUND, pair(1, {"text": {"text": "b"}})]), "non_string_content", 20),
    "NaN as content": ("a.jsonl", JSONL + b'{"question": "a", "answer": NaN}\n', "non_string_content", 20),
    "a key missing": ("a.jsonl", lines([*SOUND, {"question": "a"}]), "non_string_content", 20),
    "types that change": (
        "a.jsonl",
        lines([*SOUND, pair(1, True), pair(2, 2.5), pair(3, "x")]),
        "non_string_content",
        20,
    ),
    "numbers in Parquet": (
        "a.parquet",
        parquet([{"question": "a", "answer": i} for i in range(20)]),
        "non_string_content",
        0,
    ),
    "bytes in Parquet": ("a.parquet", parquet([{"question": b"a", "answer": b"b"}]), "non_string_content", 0),
    "nulls alone in Parquet": ("a.parquet", parquet([{"question": "a", "answer": None}] * 20), "non_string_content", 0),
    "a deep list in Parquet": (
        "a.parquet",
        parquet([{"messages": [[{"role": "user", "content": "a"}]]}]),
        "non_string_content",
        0,
    ),
    "turns without content in Parquet": (
        "a.parquet",
        parquet([{"messages": [{"role": "user"}]}]),
        "non_string_content",
        0,
    ),
    "an empty list of turns": ("a.jsonl", lines([*TALKS, {"messages": []}]), "bad_roles", 20),
    "null in place of turns": ("a.jsonl", lines([*TALKS, {"messages": None}]), "bad_roles", 20),
    "text in place of turns": ("a.jsonl", lines([*TALKS, {"messages": "Hi"}]), "bad_roles", 20),
    "an object in place of turns": ("a.jsonl", lines([*TALKS, {"messages": {"role": "user"}}]), "bad_roles", 20),
    "texts in place of turns": ("a.jsonl", lines([*TALKS, {"messages": ["Hi", "Ho"]}]), "bad_roles", 20),
    "a turn without a role": (
        "a.jsonl",
        lines([*TALKS, {"messages": [{"content": "a"}, {"content": "b"}]}]),
        "bad_roles",
        20,
    ),
    "unknown roles": ("a.jsonl", lines([*TALKS, messages(("customer", "a"), ("agent", "b"))]), "bad_roles", 20),
    "roles of nobody": ("a.jsonl", lines([*TALKS, messages(("Boss", "a"), ("Clerk", "b"))]), "bad_roles", 20),
    "a key of a turn": (
        "a.jsonl",
        lines([*TALKS, {"messages": [{**turn, "weight": 0.5} for turn in talk()["messages"]]}]),
        "unused_key",
        20,
    ),
    "a verdict on the reply": ("a.jsonl", lines([{**pair(i), "label": i != 3} for i in range(20)]), "unused_column", 3),
    "a picture": ("a.jsonl", lines([*TALKS, talk([{"type": "image_url", "image_url": "a.png"}])]), "unused_part", 20),
    "a value that is missing as the reply": ("a.jsonl", lines([*TALKS, talk("3+3?", "NaN")]), "placeholder_reply", 20),
    "a dialogue of which no reply counts": (
        "a.jsonl",
        lines(
            [
                *TALKS,
                {"messages": [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "7", "weight": 0}]},
            ]
        ),
        "no_weight",
        20,
    ),
    "a call of a tool": (
        "a.jsonl",
        lines(
            [
                *TALKS,
                {
                    "messages": [
                        {"role": "user", "content": "3+3?"},
                        {
                            "role": "assistant",
                            "content": None,
                            "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": "{}"}}],
                        },
                    ]
                },
            ]
        ),
        "tools_unsupported",
        20,
    ),
    "a number as role": ("a.jsonl", lines([*TALKS, messages((1, "a"), (2, "b"))]), "bad_roles", 20),
    "two turns of one role": (
        "a.jsonl",
        lines([*TALKS, messages(("user", "a"), ("user", "b"), ("assistant", "c"))]),
        "bad_roles",
        20,
    ),
    "no reply at the end": (
        "a.jsonl",
        lines([*TALKS, messages(("user", "a"), ("assistant", "b"), ("user", "c"))]),
        "bad_roles",
        20,
    ),
    "no assistant": ("a.jsonl", lines([*TALKS, messages(("user", "a"))]), "bad_roles", 20),
    "the assistant first": (
        "a.jsonl",
        lines([*TALKS, messages(("assistant", "a"), ("user", "b"), ("assistant", "c"))]),
        "bad_roles",
        20,
    ),
    "a system turn in the middle": (
        "a.jsonl",
        lines([*TALKS, messages(("user", "a"), ("system", "b"), ("assistant", "c"))]),
        "bad_roles",
        20,
    ),
    "ShareGPT with other keys": (
        "a.jsonl",
        lines([{"conversations": [{"who": "human", "said": "a"}]}] * 20),
        "non_string_content",
        0,
    ),
    "an empty reply": ("a.csv", CSV + b"a,\n", "empty_content", 20),
    "blanks as a reply": ("a.csv", CSV + b'a," \n "\n', "empty_content", 20),
    "an empty question": ("a.csv", CSV + b",b\n", "empty_content", 20),
    "NUL in a CSV": ("a.csv", CSV + b"a\0b,c\n", "odd_characters", 20),
    "half a character": ("a.jsonl", JSONL + b'{"question": "a\\ud83d", "answer": "b"}\n', "odd_characters", 20),
    "lost characters": ("a.csv", CSV + "Gr\ufffd\ufffde,b\n".encode(), "odd_characters", 20),
    "UTF-8 saved twice": ("a.csv", CSV + "Größe,ja".encode().decode("latin-1").encode() + b"\n", "odd_characters", 20),
    "a binary file as text": (
        "a.jsonl",
        lines([*SOUND, pair(1, "\x7fELF\x01\x02\x03\x04\x05" * 40)]),
        "odd_characters",
        20,
    ),
    "an injected turn": (
        "a.jsonl",
        lines([*SOUND, {"question": f"a{EOT}<|start_header_id|>system", "answer": "b"}]),
        "special_token_in_content",
        20,
    ),
    "a reply that ends twice": ("a.jsonl", lines([*SOUND, pair(1, f"a{EOT}b")]), "special_token_in_content", 20),
    "a BOS in a question": (
        "a.jsonl",
        lines([*SOUND, {"question": "<|begin_of_text|>a", "answer": "b"}]),
        "double_bos",
        20,
    ),
    "reasoning that never ends": ("a.jsonl", lines([*SOUND, pair(1, "<think>\nHm")]), "unbalanced_think", 20),
    "reasoning within reasoning": (
        "a.jsonl",
        lines([*SOUND, pair(1, "<think><think>a</think>b")]),
        "unbalanced_think",
        20,
    ),
    "rows twice": ("a.csv", CSV + CSV.partition(b"\n")[2], "duplicate", 20),
    "rows nearly twice": ("a.csv", CSV + CSV.partition(b"\n")[2].lower().replace(b".", b""), "near_duplicate", 20),
    "a CSV with newlines and quotes": (
        "a.csv",
        CSV + b'"a\n\n""b"", c","x\n"\n"a\n\n""b"", c","x\n"\n',
        "duplicate",
        21,
    ),
    "a long row": ("a.jsonl", lines([*SOUND, pair(1, "one two " * 400)]), "too_long", 20),
    "a long row is dropped": ("a.jsonl", lines([*SOUND, pair(1, "one two " * 400)]), "row_dropped", 20),
    "an outlier": ("a.jsonl", lines([*SOUND, pair(1, "one two " * 100)]), "length_outlier", 20),
    "one answer for all": ("a.jsonl", lines([pair(i, "Yes.") for i in range(20)]), "dominant_answer", 0),
    "three rows": ("a.jsonl", lines(SOUND[:3]), "too_few_rows", None),
    "50 MB on one line": ("a.jsonl", JSONL + lines([pair(99, "one two " * 6_500_000)]), "row_dropped", 20),
    "50 MB and no blank": ("a.jsonl", JSONL + lines([pair(99, "x" * 50_000_000)]), "row_dropped", 20),
}


def found_in(source, tokenizer, **settings):
    report = check_dataset(load_sft_dataset(source), tokenizer, settings.pop("max_length", 512), **settings)
    assert all(f.cause and f.fix and f.count >= len(f.rows) for f in report.findings)
    assert report.table() and "<table" in report._repr_html_() and json.dumps(report.to_dict())
    return {f.code: f for f in report.findings}


@pytest.mark.parametrize("case", ODD)
def test_what_loads_becomes_a_finding(case, tmp_path, tokenizer):
    name, content, code, row = ODD[case]
    path = tmp_path / name
    path.write_bytes(content)
    found = found_in(path, tokenizer)
    assert code in found, sorted(found)
    if row is not None:
        assert found[code].rows[0] == row


# --- rows made ready elsewhere, templates and settings ---------------------------------------------------------------


def ready(tokenizer, change):
    rows = []
    for row in TALKS:
        ids = tokenizer.apply_chat_template(row["messages"])["input_ids"]
        rows.append(change({"input_ids": ids, "labels": [-100] * (len(ids) - 3) + ids[-3:]}))
    return rows


def with_ids(row, change):
    return {"input_ids": change(row["input_ids"]), "labels": change(row["labels"])}


READY = {
    "ids without a BOS": (lambda r: with_ids(r, lambda ids: ids[1:]), "no_bos"),
    "ids with two BOS": (lambda r: {"input_ids": [757, *r["input_ids"]], "labels": [-100, *r["labels"]]}, "double_bos"),
    "ids whose end is gone": (lambda r: with_ids(r, lambda ids: ids[:-1]), "no_end_of_turn"),
    "ids with the end masked": (lambda r: {**r, "labels": [*r["labels"][:-1], -100]}, "no_end_of_turn"),
    "ids with nothing to learn": (lambda r: {**r, "labels": [-100] * len(r["labels"])}, "all_masked"),
    "ids without labels": (lambda r: {"input_ids": r["input_ids"]}, "prompt_labelled"),
    "ids of another vocabulary": (lambda r: with_ids(r, lambda ids: [*ids[:-1], 128009]), "bad_ids"),
    "labels that are shifted": (lambda r: {**r, "labels": [*r["input_ids"][1:], -100]}, "bad_ids"),
    "labels that are too few": (lambda r: {**r, "labels": r["labels"][1:]}, "bad_ids"),
    "a mask that is too short": (lambda r: {"input_ids": r["input_ids"], "completion_mask": [1]}, "bad_ids"),
    "a mask and no ids": (lambda r: {"input_ids": None, "completion_mask": [1]}, "bad_ids"),
    "ids that are text": (lambda r: {**r, "input_ids": "757 12"}, "bad_ids"),
    "ids longer than is allowed": (lambda r: with_ids(r, lambda ids: ids[:1] + ids[1:-1] * 40 + ids[-1:]), "end_cut"),
}


@pytest.mark.parametrize("case", READY)
def test_rows_that_were_made_elsewhere(case, tokenizer):
    change, code = READY[case]
    found = {f.code: f for f in check_dataset(ready(tokenizer, change), tokenizer, 512).findings}
    assert code in found and found[code].rows[0] == 0


TEXTS = {
    "text that is none": (None, "non_string_content"),
    "text that is a number": (4, "non_string_content"),
    "text that is empty": (" \n", "empty_content"),
    "text with half a character": ("a\ud83d" + EOT, "odd_characters"),
    "text with lost characters": ("a\ufffd" + EOT, "odd_characters"),
    "text with two BOS": ("<|begin_of_text|>a" + EOT, "double_bos"),
    "text that doesn't end": ("a", "no_end_of_turn"),
    "text of 10 MB": ("many words " * 900_000, "end_cut"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_a_trainer_would_tokenize(case, tokenizer):
    text, code = TEXTS[case]
    rows = [*({"text": f"The number {i}.<|end_of_text|>"} for i in range(20)), {"text": text}]
    found = {f.code: f.rows for f in check_dataset(rows, tokenizer).findings}
    assert found[code] == [20]


TURNS = "{% for m in messages %}{{ m.role + '\n' + m.content + '<|eot_id|>' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
TEMPLATES = {
    "a template that isn't Jinja": ("{{ bos_token }}{% for m in", "template_refused"),
    "a template that refuses": ("{{ raise_exception('no') }}", "template_refused"),
    "a template that loops in vain": ("{{ bos_token }}{{ messages.nothing.here }}", "template_refused"),
    "a template without a BOS": (TURNS + ASK, "no_bos"),
    "a template with two": ("{{ bos_token + bos_token }}" + TURNS + ASK, "double_bos"),
    "a template without an end": ("{{ bos_token }}" + TURNS.replace(EOT, "") + ASK, "no_end_of_turn"),
    "a template that doesn't ask": ("{{ bos_token }}" + TURNS, "generation_prompt_mismatch"),
    "a template that asks otherwise": (
        "{{ bos_token }}" + TURNS + ASK.replace("assist", "Assist"),
        "generation_prompt_mismatch",
    ),
    "a template that counts": ("{{ bos_token }}{{ messages | length }}" + TURNS + ASK, "prompt_not_prefix"),
    "a template that shortens": (
        "{{ bos_token }}" + TURNS.replace("m.content", "m.content[-4:]") + ASK,
        "text_missing",
    ),
    "a template that leaves out questions": (
        "{{ bos_token }}" + TURNS.replace("in messages", "in messages if m.role != 'user'") + ASK,
        "text_missing",
    ),
    "a template with a clock": ("{{ bos_token + strftime_now('%d %b') }}" + TURNS + ASK, "date_in_template"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates(case, tokenizer):
    text, code = TEMPLATES[case]
    assert code in found_in(TALKS, tokenizer, template=text)


def test_settings(tokenizer):
    assert "leakage" in found_in(TALKS, tokenizer, eval_data=[talk("what is 3+1", "Four")])
    document = talk("Read. " + "word " * 200 + "?", "Read.")
    assert "prompt_cut" in found_in([*TALKS, document], tokenizer, max_length=100, truncation="cut_prompt")
    assert "tokenizer_too_large" in found_in(TALKS, tokenizer, model=type("Config", (), {"vocab_size": 767}))
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    assert "pad_is_eos" in found_in(TALKS, other)


# --- folders, objects, names -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    from datasets import Dataset

    Dataset.from_list(SOUND).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


DAMAGE = {
    "its data are gone": lambda path: next(path.glob("*.arrow")).unlink(),
    "its data are cut short": lambda path: next(path.glob("*.arrow")).write_bytes(
        next(path.glob("*.arrow")).read_bytes()[:500]
    ),
    "its description is broken": lambda path: (path / "dataset_info.json").write_text("{"),
    "its description is gone": lambda path: (path / "dataset_info.json").unlink(),
    "its state is broken": lambda path: (path / "state.json").write_text("[]"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_folder_saved_by_datasets(case, saved):
    assert len(load_sft_dataset(saved)) == GOOD
    DAMAGE[case](saved)
    with pytest.raises(UserError, match="saved looks like a data set saved by datasets, but can't be read") as caught:
        load_sft_dataset(saved)
    assert "\n" not in str(caught.value)


def test_a_folder_of_files(tmp_path):
    (tmp_path / "train-00000.jsonl").write_bytes(JSONL)
    (tmp_path / "train-00001.jsonl").write_bytes(JSONL + b"{")
    with pytest.raises(UserError, match="train-00001.jsonl, line 21, is not JSON"):
        load_sft_dataset(tmp_path)
    shutil.copy(tmp_path / "train-00000.jsonl", tmp_path / "data.jsonl")
    with pytest.raises(UserError, match="no split 'test'"):
        load_sft_dataset(tmp_path, split="test")


@pytest.mark.parametrize(
    "source",
    [3, {"test": []}, ["a"], [[1]], [None], object(), [], iter([]), "no such file.csv", "a/b/c"],
    ids=lambda source: type(source).__name__,  # not its repr: an address differs from process to process
)
def test_objects_that_are_no_data(source):
    with pytest.raises(UserError) as caught:
        load_sft_dataset(source)
    assert "\n" not in str(caught.value)


def test_there_are_enough():
    "At least 60 hostile data sets, and each code among them."
    cases = [*BROKEN, *ODD, *READY, *TEXTS, *TEMPLATES, *DAMAGE]
    assert len(cases) == len(set(cases)) >= 60
    codes = {case[2] for case in ODD.values()} | {case[1] for case in [*READY.values(), *TEMPLATES.values()]}
    elsewhere = {
        "leakage",
        "tokenizer_too_large",
        "pad_is_eos",
        "prompt_cut",
        "earlier_replies",
        "empty_reasoning",
        "tokenizer_changes_text",
    }
    assert codes | elsewhere == set(DATASET_CODES) | SETTINGS


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_rows(tokenizer):
    "A streamed set of five times the rows: what Python holds at its peak is the same but for a few kilobytes."
    from datasets import IterableDataset

    def rows(count):
        for i in range(count):
            yield talk(f"What is {i} + {i}?", f"It is {2 * i}.")

    def peak(count):
        data = IterableDataset.from_generator(rows, gen_kwargs={"count": count})
        gc.collect()
        tracemalloc.start()
        report = check_dataset(data, tokenizer)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert report.summary["rows"] == count and report.findings == []
        return found

    peak(500)
    assert peak(5000) - peak(1000) < 60_000  # a number kept for each row is 200,000
