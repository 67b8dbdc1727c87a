"""Files and folders as people have them: clones, spreadsheets, pandas, caches: the right rows, or one sentence."""

import gzip
import json
import shutil
import time
import tracemalloc
import zipfile

import pytest

import qlora_nb.readers as readers
from qlora_nb.core import UserError
from qlora_nb.readers import list_names, open_data_source, parse_value, show_name

pytestmark = pytest.mark.quick

TALK = [{"role": "user", "content": "it's 2+2?\n"}, {"role": "assistant", "content": 'a "4"'}]


def pair(i=0):
    return {"question": f"What is {i}?", "answer": f"It is {i}."}


def pairs(*numbers):
    return [pair(i) for i in numbers]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def rows_of(source, split="train", name=None):
    return list(open_data_source(source, name, split, False, None))


def refused(source, split="train", name=None):
    with pytest.raises(UserError) as caught:
        rows_of(source, split, name)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 3000
    return message


# --- names in messages ------------------------------------------------------------------------------------------------


def test_names_are_escaped_and_cut():
    assert show_name("\x1b]0;owned\x07 \u202egpj.\u2066") == r"\x1b]0;owned\x07 \u202egpj.\u2066"
    assert show_name("größe 数") == "größe 数" and len(show_name("x" * 500)) == 101
    assert list_names([]) == "none" and list_names(range(20)).count(",") == 19
    assert list_names(range(21)).endswith("19 and 1 more")


def test_200_000_columns_make_a_short_message(tmp_path):
    names = [f"column {i}" for i in range(200_000)]
    for name, content in [
        ("a.csv", ",".join(names) + "\n1,2\n"),
        ("b.csv", ",".join(names + names[:1]) + "\n"),
        ("c.json", json.dumps({name: [{}] for name in names[:20_000]})),
        ("d.json", json.dumps({name: [0] * (i + 1) for i, name in enumerate(names[:300])})),
    ]:
        assert len(refused(write(tmp_path / name, content))) < 1500, name
    assert len(refused(dict.fromkeys(names, 0))) < 500


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    odd = "\x1b[2J\x07\u202e"
    for path, content in [
        (tmp_path / f"{odd}.jsonl", "{"),
        (tmp_path / f"{odd}.csv", f"{odd},{odd}\n"),
        (tmp_path / f"{odd}.parquet", "PAR1"),
        (tmp_path / f"{odd}.txt", ""),
        (tmp_path / f"{odd}.xlsx", ""),
        (tmp_path / f"{odd}.jsonl.gz", "x"),
        (tmp_path / "c.json", json.dumps({odd: [{"a": 1}], f"{odd}2": [{"a": 1}]})),
        (tmp_path / "d.jsonl", '{"\x1b": 1}'),
        (tmp_path / "e.jsonl", "{'\x1b[2J': f\x1b()}"),
        (tmp_path / "f.csv", 'a,b\n"\x1b"\x1b,2\n'),
    ]:
        refused(write(path, content))
    folder = tmp_path / f"x{odd}"
    write(folder / f"test{odd}.jsonl", "{}")
    for source in (folder, f"{folder}/*.csv", str(tmp_path / f"gone{odd}"), {odd: 1}):
        refused(source)


# --- clones of the Hub, and other folders -----------------------------------------------------------------------------

CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path:
    - main/test-0.jsonl
- config_name: socratic
  {default}data_files:
  - split: train
    path: "socratic/**/t*.parquet"
---
# Sums
configs: no
"""


@pytest.fixture
def clone(tmp_path):
    parquet(tmp_path / "main/train-00000-of-00002.parquet", pairs(0, 1))
    parquet(tmp_path / "main/train-00001-of-00002.parquet", pairs(2))
    write(tmp_path / "main/test-0.jsonl", lines(pairs(3)))
    parquet(tmp_path / "socratic/deep/t1.parquet", pairs(4))
    write(tmp_path / "README.md", CARD.format(default=""))
    return tmp_path


def test_a_card_with_several_configurations(clone):
    assert rows_of(clone, name="main") == pairs(0, 1, 2) and rows_of(clone, "test", "main") == pairs(3)
    assert rows_of(str(clone), name="socratic") == pairs(4)
    assert "has 2 configurations (README.md lists main, socratic): choose one with name= (--data-name)" in refused(
        clone
    )
    assert "no configuration 'x' (README.md lists main, socratic)" in refused(clone, name="x")
    assert "no split 'valid' (README.md lists train, test)" in refused(clone, "valid", "main")
    write(clone / "README.md", CARD.format(default="default: true\n  "))
    assert rows_of(clone) == pairs(4)


def test_a_card_with_one_configuration_by_another_name(clone):
    write(clone / "README.md", "---\nconfigs:\n- config_name: main\n  data_files: main/test*\n---\n")
    assert rows_of(clone) == pairs(3) == rows_of(clone, name="main")


def test_archives_beside_the_data_are_left_alone(tmp_path):
    write(tmp_path / "data/train.jsonl", lines(pairs(0)))
    write(tmp_path / "images.zip", "PK")
    with zipfile.ZipFile(tmp_path / "data/train.zip", "w") as archive:
        archive.writestr("a.png", "")
        archive.writestr("b.png", "")
    assert rows_of(tmp_path) == pairs(0)


def test_a_card_whose_files_are_missing(clone):
    shutil.rmtree(clone / "socratic")
    assert (
        "no data file socratic/**/t*.parquet, which README.md lists for the split 'train' (found README.md, main/)"
        in (refused(clone, name="socratic"))
    )
    (clone / "main/train-00000-of-00002.parquet").unlink()
    assert "has only 1 of the 2 files train-…-of-00002" in refused(clone, name="main")


@pytest.mark.parametrize(
    "data_files, split, expected",
    [
        ("data_files: a.jsonl", "train", [0]),
        ("data_files: [b.csv, a.jsonl]", "train", [0, 1]),
        ("data_files: '*.jsonl'", "train", [0]),
        ("data_files: {train: b.csv, validation: a.jsonl}", "valid", [0]),
        ("data_files: [{split: train, path: b.csv}, {split: train, path: a.jsonl}]", "train", [0, 1]),
        ("data_files: [{split: train_sft, path: b.csv}]", "train_sft", [1]),
        ("data_dir: deep\n  data_files: c.json", "train", [2]),
        ("data_dir: deep", "train", [2]),
    ],
)
def test_what_a_card_may_list(data_files, split, expected, tmp_path):
    write(tmp_path / "a.jsonl", lines(pairs(0)))
    write(tmp_path / "b.csv", "question,answer\nWhat is 1?,It is 1.\n")
    write(tmp_path / "deep/c.json", json.dumps(pairs(2)))
    write(tmp_path / "README.md", f"---\nconfigs:\n- config_name: default\n  {data_files}\n---\n".replace("\n", "\r\n"))
    assert rows_of(tmp_path, split) == pairs(*expected)


@pytest.mark.parametrize("path", ["../a.jsonl", "/etc/*", "https://example.com/a.csv", "data/../../a.jsonl"])
def test_a_card_reads_nothing_outside_its_folder(path, tmp_path):
    write(tmp_path / "a.jsonl", lines(pairs(0)))
    for key in ("data_files", "data_dir"):
        write(tmp_path / "clone/README.md", f"---\nconfigs:\n- {key}: {path}\n---\n")
        assert "which is outside it" in refused(tmp_path / "clone")


@pytest.mark.parametrize(
    "head", ["configs: [", "configs: 3", "configs: []", "- a", "{a: &x [*x]}", "configs: [{config_name: a}]"]
)
def test_a_card_that_says_nothing_about_files(head, tmp_path):
    write(tmp_path / "README.md", f"---\n{head}\n---\n")
    write(tmp_path / "data/train.jsonl", lines(pairs(0)))
    assert rows_of(tmp_path) == pairs(0)


@pytest.mark.parametrize(
    "name, others",
    [
        ("train.jsonl", ["test.jsonl", "trainer.jsonl", "train/x/ignored.txt"]),
        ("data/train-00000-of-00001.jsonl", ["data/test-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"]),
        ("data/train-00000-of-00001-a09b74b3ef9c3b56.jsonl", ["data/test-00000-of-00001-b20a51e5a5f2d0a4.jsonl"]),
        ("train/0000.jsonl", ["test/0000.jsonl", "validation/0000.jsonl"]),
        ("train/part-00000.jsonl", ["test/part-00000.jsonl"]),
        ("data/train/0001.jsonl", ["data/test/0001.jsonl"]),
        ("default/train/0000.jsonl", ["default/test/0000.jsonl"]),
        ("default/partial-train/0000.jsonl", ["default/test/0000.jsonl"]),
        ("default/train/0000.jsonl", ["other/train/0000.jsonl"]),
        ("gsm8k/main/train/0.jsonl", ["gsm8k/main/test/0.jsonl"]),
        ("sums-train.jsonl", ["sums-test.jsonl", "sums-dev.jsonl"]),
        ("sums_train_v2.jsonl", ["sums_test_v2.jsonl"]),
        ("training.jsonl", ["testing.jsonl"]),
        ("TRAIN.JSONL", ["TEST.JSONL"]),
        ("train2.jsonl", ["test2.jsonl"]),
        ("train.jsonl", ["data/train.jsonl", "old/train.jsonl", ".cache/train.jsonl"]),
        ("train.jsonl", ["train_sft.jsonl", "dataset_infos.json", "config.json"]),
    ],
)
def test_names_that_say_the_split(name, others, tmp_path):
    for i, one in enumerate([name, *others]):
        write(tmp_path / one, lines(pairs(i)))
    assert rows_of(tmp_path) == pairs(0)


def test_names_of_other_splits(tmp_path):
    write(tmp_path / "valid.jsonl", lines(pairs(1)))
    write(tmp_path / "heldout.jsonl", lines(pairs(2)))
    for split in ("valid", "validation", "dev", "val"):
        assert rows_of(tmp_path, split) == pairs(1)
    assert rows_of(tmp_path, "heldout") == pairs(2)
    for split in ("train", "test", "x"):
        assert f"no split {split!r} (found heldout.jsonl, valid.jsonl): name a file, or another split" in refused(
            tmp_path, split
        )


def test_folders_around_the_split_are_configurations(tmp_path):
    for i, name in enumerate(("algebra", "geometry")):
        write(tmp_path / name / "train.jsonl", lines(pairs(i)))
    assert rows_of(tmp_path, name="geometry") == pairs(1)
    assert "several configurations (found algebra, geometry): choose one with name= (--data-name)" in refused(tmp_path)
    assert "no configuration 'x' (found algebra, geometry)" in refused(tmp_path, name="x")


def test_names_that_hold_the_split_in_two_ways(tmp_path):
    for i, name in enumerate(("train_gen", "train_sft", "test_sft")):
        parquet(tmp_path / f"data/{name}-00000-of-00001.parquet", pairs(i))
    assert "several files that could be the split 'train' (data/test_sft" in refused(tmp_path)
    assert rows_of(tmp_path, "train_sft") == pairs(1) and rows_of(tmp_path, "test") == pairs(2)


def test_a_folder_without_names_of_splits_is_taken_to_train_on_and_that_is_said(tmp_path, capsys):
    for i, name in enumerate(("b.jsonl", "a.jsonl", "part-3.jsonl.gz")):
        content = lines(pairs(i)).encode()
        write(tmp_path / "chats" / name, gzip.compress(content) if name.endswith("gz") else content)
    write(tmp_path / "chats/LICENSE", "MIT")
    for _ in range(2):
        assert rows_of(tmp_path / "chats") == pairs(1, 0, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "all are read as 'train' (a.jsonl, b.jsonl, part-3.jsonl.gz)" in said
    assert "no split 'test' (found a.jsonl" in refused(tmp_path / "chats", "test")
    write(tmp_path / "chats/c.csv", "question,answer\n")
    assert "files of several kinds (a.jsonl, b.jsonl, c.csv" in refused(tmp_path / "chats")
    (tmp_path / "none").mkdir()
    assert "no split 'train' (found no data files)" in refused(tmp_path / "none").replace(
        ": name a file, or another split", ""
    )
    write(tmp_path / "none/notes.txt", "")
    assert "(found no data files, but notes.txt)" in refused(tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train.parquet", "train.csv", "train.json.gz", "data/train-00000-of-00001.parquet"]
)
def test_pointers_of_git_lfs_are_said_to_be_such(name, tmp_path):
    write(tmp_path / name, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for source in (tmp_path, tmp_path / name):
        message = refused(source)
        assert f"{tmp_path / name} is a Git LFS pointer in place of the data: run `git lfs pull`" in message


# --- several files ----------------------------------------------------------------------------------------------------


def test_lists_and_patterns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("b", "a", "[c]")):
        write(tmp_path / f"data/{name}.jsonl", lines(pairs(i)))
    write(tmp_path / "data/README.md", "Sums")
    write(tmp_path / "other/train.csv", "question,answer\nWhat is 3?,It is 3.\n")
    assert rows_of("data/*.jsonl") == pairs(2, 1, 0) == rows_of(tmp_path / "data/*.jsonl")
    assert rows_of("data/[ab].jsonl") == pairs(1, 0) and rows_of("**/?.jsonl") == pairs(1, 0)
    assert rows_of("data/[c].jsonl") == pairs(2), "a file of that very name"
    assert (
        rows_of(["data/b.jsonl", "other", tmp_path / "data/a*"])
        == pairs(0, 3, 1)
        == rows_of(("data/b.jsonl", "other", "data/a*"))
    )
    assert capsys.readouterr().err == ""
    assert rows_of("data/*") == pairs(2, 1, 0)
    assert "not read, since they aren't data files: data/README.md" in capsys.readouterr().err
    message = refused("data/*.parquet")
    assert "no data file matches data/*.parquet: the folder data holds" in message
    assert "README.md, [c].jsonl, a.jsonl, b.jsonl" in message
    assert "the folder gone is not there" in refused("gone/*.jsonl")
    assert "there is no file or folder gone.jsonl" in refused(["data/a.jsonl", "gone.jsonl"])
    assert "name the file that holds 'test'" in refused("data/*.jsonl", "test")
    write(tmp_path / "data/d.xlsx", b"PK\3\4")
    assert "d.xlsx is a spreadsheet" in refused("data/*"), "a table is not passed over without a word"


# --- spreadsheets -----------------------------------------------------------------------------------------------------

TWO = [{"question": "What is 1,5?", "answer": "A; b"}, {"question": 'Say "hi"', "answer": "line\nline"}]


def spread(rows, mark=",", end="\r\n", names=("question", "answer"), before="", after="", quote=False):
    cell = lambda text: f'"{text.replace(chr(34), chr(34) * 2)}"' if quote or set(text) & set(f'{mark}"\n') else text  # noqa: E731
    body = [mark.join(map(cell, line)) + end for line in [names, *(row.values() for row in rows)]]
    return before + "".join(body) + after


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "how", ["plain", "quoted", "sep", "sep;;", "BOM", "UTF-16", "UTF-16BE", "blanks around", "blank lines"]
)
def test_what_spreadsheets_write(mark, end, how, tmp_path):
    kinds = {
        "quoted": {"quote": True},
        "sep": {"before": f"\ufeffsep={mark}{end}"},
        "sep;;": {"before": f"sep={mark}{mark}{end}"},
        "BOM": {"before": "\ufeff"},
        "blanks around": {"names": (" question ", "\u00a0answer ")},
        "blank lines": {"before": end * 2, "after": f"{end}   {end}{mark}{end}{mark}{end}"},
    }
    text = spread(TWO, mark, end, **kinds.get(how, {}))
    encoding = {"UTF-16": "utf-16", "UTF-16BE": "utf-16-be"}.get(how, "utf-8")
    path = write(tmp_path / "a.csv", ("\ufeff" * (how == "UTF-16BE") + text).encode(encoding))
    assert rows_of(path) == TWO
    assert rows_of(path.rename(tmp_path / "a.TSV")) == TWO


@pytest.mark.parametrize(
    "text, expected",
    [
        ("question, short;answer\nWhat, then?;4\nAnd?;1,5\n", {"question, short": "What, then?", "answer": "4"}),
        ("question, short;answer\nWhat, then?;4\n", {"question, short": "What, then?", "answer": "4"}),
        ("question, a, b;answer\nWhat?;4\nWhy?;5\n", {"question, a, b": "What?", "answer": "4"}),
        ("id,question;answer,x\n1,What;why?,4\n2,So?,5\n", {"id": "1", "question;answer": "What;why?", "x": "4"}),
        ('"question; short",answer\nWhat?,4\n', {"question; short": "What?", "answer": "4"}),
        ('"a, b";"c ""d, e"""\nWhat?;1,5\n', {"a, b": "What?", 'c "d, e"': "1,5"}),
        ("preis;text\n1,50;Ja, gern\n2,00;Nein\n", {"preis": "1,50", "text": "Ja, gern"}),
        ('question, answer\n"So, what?", "1, 2"\n', {"question": '"So', "answer": None}),
        ('"question", "answer"\n"So, what?", "1, 2"\n', {"question": "So, what?", "answer": "1, 2"}),
        ("question,answer,,\na,b,,\n", {"question": "a", "answer": "b"}),
        ("question,answer\na,b,,\n", {"question": "a", "answer": "b"}),
        ("question,answer,,\na,b\n", {"question": "a", "answer": "b"}),
        ("question,answer,\na,b,see below\n", {"question": "a", "answer": "b", "Unnamed: 2": "see below"}),
        (",question,answer\n0,a,b\n", {"Unnamed: 0": "0", "question": "a", "answer": "b"}),
        ("question,question \na,b\n", {"question": "a", "question ": "b"}),
        ("text\nfirst\n\n \n", {"text": "first"}),
        ("\n" * 70_000 + "sep\nfirst\n", {"sep": "first"}),
        ("par1,PAR1\na,b\n", {"par1": "a", "PAR1": "b"}),
        (" <htm,b\n1,2\n", {"<htm": "1", "b": "2"}),
        ("a.b|c\n1|2\n", {"a.b": "1", "c": "2"}),
    ],
)
def test_headers(text, expected, tmp_path):
    path = write(tmp_path / "a.csv", text)
    if None in expected.values():
        assert "row 1, doesn't have the 2 columns of the header" in refused(path)
    else:
        assert rows_of(path)[0] == expected


def test_rows_without_a_value_are_left_out_at_the_end_alone(tmp_path):
    path = write(tmp_path / "a.csv", "question,answer,\na,b,\n,,\n\nc,d,\n,,\n , ,\n")
    assert rows_of(path) == [
        {"question": "a", "answer": "b"},
        {"question": "", "answer": ""},
        {"question": "c", "answer": "d"},
    ]
    write(path, "question,answer\na,b\n,\nc\n")
    assert "a.csv, row 3, doesn't have the 2 columns of the header, but 1 value (it ends in line 4)" in refused(path)
    write(path, 'question,answer\n"a\nb",c\na,b,c,d\n')
    assert "row 2, doesn't have the 2 columns of the header, but 4 values (it ends in line 4)" in refused(path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "a.csv",
            "question,answer\na,b\ncafé,c\n".encode("cp1252"),
            "(line 3: byte 0xe9 after 'caf', 'é' in Windows-1252)",
        ),
        ("a.csv", "Frage;Antwort\n" * 3000 + "a;“b”\n", None),
        ("a.csv", ("Frage;Antwort\n" * 3000 + "a;“b”\n").encode("cp1252"), "line 3001: byte 0x93 after 'a;', '“'"),
        ("a.jsonl", '{"a": "b"}\n{"a": "größe"}\n'.encode("cp1252"), "line 2, is not UTF-8 text (byte 0xf6 after"),
        ("a.json", '[{"a": "b"},\n{"a": "größe"}]\n'.encode("cp1252"), "line 2, is not UTF-8 text (byte 0xf6 after"),
        ("a.xlsx", b"PK\x03\x04", "save it as CSV UTF-8"),
        ("a.xls", b"\xd0\xcf\x11\xe0", "save it as CSV UTF-8"),
        ("a.ods", b"PK\x03\x04", "save it as CSV UTF-8"),
        ("a.csv", b"PK\x03\x04\x14\0\x06\0", "is a zip archive or an Excel workbook"),
        ("a.csv", b"\xd0\xcf\x11\xe0\xa1", "is an Excel workbook"),
        ("a.csv", "question,answer\na,b\n".encode("utf-16-le"), "looks like UTF-16"),
        ("a.csv", b"<!doctype html><html>", "is a web page: download the file itself"),
        ("a.json", b"\n\n<html>", "is a web page"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "is compressed with gzip: add .gz to its name"),
        ("a.jsonl", b"PAR1\x15", "is a Parquet file: name it .parquet"),
        ("a.jsonl", "{}\n".encode("utf-16")[:-1], "starts as utf-16"),
    ],
)
def test_what_is_not_a_table_of_text(name, content, words, tmp_path):
    path = write(tmp_path / name, content)
    if words:
        assert words in refused(path)
    else:
        assert rows_of(path)[-1] == {"Frage": "a", "Antwort": "“b”"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_text_in_the_encoding_that_its_first_bytes_announce(name, encoding, tmp_path):
    rows = [{"question": f"größe 数 🙂 {i}", "answer": "x" * i} for i in range(3000)]
    text = (
        lines(rows) if name == "a.jsonl" else json.dumps(rows, ensure_ascii=False) if name == "a.json" else spread(rows)
    )
    assert rows_of(write(tmp_path / name, text.encode(encoding))) == rows


# --- what Python, pandas and numpy write ------------------------------------------------------------------------------


def test_cells_as_pandas_and_numpy_write_them(tmp_path):
    "The very texts, written by the libraries and read back."
    import numpy as np
    import pandas as pd

    talks = [
        TALK,
        [{"role": "user", "content": "[x] {y} 'z' \"w\" \\n\\ é"}, {"role": "assistant", "content": "} {'a': 1}"}],
    ]
    array = [np.array(talk, dtype=object) for talk in talks]
    for cells in (
        talks,
        array,
        [repr(one) for one in array],
        [str(one) for one in array],
        [json.dumps(one) for one in talks],
    ):
        pd.DataFrame({"messages": cells}).to_csv(tmp_path / "a.csv")
        found = rows_of(tmp_path / "a.csv")
        assert [parse_value(row["messages"], "here") for row in found] == talks
        assert [row["Unnamed: 0"] for row in found] == ["0", "1"]
    assert parse_value(str(np.array(["it's", 'a "b"', "c"])), "here") == ["it's", 'a "b"', "c"]
    assert parse_value(str([np.float64(0.5), np.int64(3), np.str_("x"), np.bool_(True)]), "here") == [0.5, 3, "x", True]
    assert parse_value("{'a': (1, None), 'b': [nan, -inf]}", "here")["a"] == [1, None]
    long = str(np.array([{"role": "user", "content": i} for i in range(2000)], dtype=object))
    with pytest.raises(UserError, match="here is not JSON .*it was cut short with"):
        parse_value(long, "here")


@pytest.mark.parametrize(
    "text, words",
    [
        ("[open('/etc/passwd')]", "it calls open"),
        ("[__import__('os').system('true')]", "it calls"),
        ("[x for x in [1]]", "not a Python literal"),
        ("[a]", "it names a"),
        ("[Timestamp('2024-01-01')]", "it calls Timestamp"),
        ("[{'a': 1, 'a': 2}]", "duplicate key"),
        ('[{"a": 1, "a": 2}]', "duplicate key 'a'"),
        ("[{'a': 'b'}, {'a': 'c", "not a Python literal"),
        ("[b'x']", "it holds bytes"),
        ("[{1, 2}]", "it holds a set"),
        ("[...]", "cut short"),
        ("[" * 100_000, "not a Python literal"),
        ("['a'" + "+'a'" * 100_000 + "]", "not a Python literal"),
        ("", "not a Python literal"),
        ("[1\0]", "not a Python literal"),
    ],
)
def test_cells_that_are_no_values(text, words):
    with pytest.raises(UserError, match=f"^the column 'x' is not JSON .*{words}") as caught:
        parse_value(text, "the column 'x'")
    assert str(caught.value).isprintable() and str(caught.value).endswith("write it with json.dumps")


def test_rows_that_python_wrote(tmp_path):
    rows = [{"messages": TALK, "n": None}, {"messages": TALK, "n": True}]
    assert rows_of(write(tmp_path / "a.jsonl", "\n".join(map(str, rows)))) == rows
    assert rows_of(write(tmp_path / "b.jsonl", lines(rows[:1]) + str(rows[1]))) == rows
    assert "line 1, is not UTF-8 text" in refused(write(tmp_path / "c.jsonl", "{'a': 'é'}\n".encode("latin-1")))


# --- the shapes of JSON -----------------------------------------------------------------------------------------------

ROWS = pairs(0, 1, 2)
JSON = {
    "a list": ROWS,
    "columns": {"question": [row["question"] for row in ROWS], "answer": [row["answer"] for row in ROWS]},
    "version and data": {"version": "1.0", "data": ROWS},
    "examples": {"examples": ROWS, "license": "MIT", "authors": ["a", "b"]},
    "the only list": {"sums": ROWS, "count": 3},
    "the only list, and tools": {"sums": ROWS, "tools": [{"type": "function"}]},
    "splits": {"train": ROWS, "test": pairs(9)},
    "splits of columns": {"train": {name: [row[name] for row in ROWS] for name in ROWS[0]}, "test": {}},
    "deep": {"dataset": {"version": 2, "items": ROWS}},
    "ids": {f"id-{i}": row for i, row in enumerate(ROWS)},
    "numbers as ids": {str(i): row for i, row in enumerate(ROWS)},
    "the Hub's viewer": {"features": [{}], "rows": [{"row_idx": i, "row": row} for i, row in enumerate(ROWS)]},
}  # fmt: skip


@pytest.mark.parametrize("shape", JSON)
@pytest.mark.parametrize("indent", [None, 2])
def test_shapes_of_json(shape, indent, tmp_path, capsys):
    assert rows_of(write(tmp_path / "a.json", json.dumps(JSON[shape], indent=indent))) == ROWS
    beside = [key for key in JSON[shape] if key not in ("sums", "data", "examples", "train", "rows")]
    said = capsys.readouterr().err
    if shape in ("version and data", "examples", "the only list, and tools", "splits"):
        assert said.endswith(f"not read: {', '.join(beside)}\n"), "what lies beside the rows is named"


@pytest.mark.parametrize("orient", ["records", "columns", "index", "split", "table"])
def test_orients_of_pandas(orient, tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"messages": [TALK, TALK[:1]], "id": ["a", "b"]})
    frame.to_json(tmp_path / "a.json", orient=orient)
    found = [{name: row[name] for name in ("messages", "id")} for row in rows_of(tmp_path / "a.json")]
    assert found == [{"messages": TALK, "id": "a"}, {"messages": TALK[:1], "id": "b"}]
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    assert rows_of(tmp_path / "a.jsonl") == found


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        "".join(json.dumps(row, indent=2) for row in ROWS),
        "\n\n  ".join(json.dumps(row) for row in ROWS) + "\n",
        "\ufeff" + json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
        json.dumps(ROWS).replace("}, ", "},\n"),
        json.dumps(ROWS[:1]) + "\n" + json.dumps(ROWS[1:]),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson.gz"])
def test_values_one_after_the_other(text, name, tmp_path):
    content = text.encode()
    assert rows_of(write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)) == ROWS


@pytest.mark.parametrize(
    "value, expected",
    [
        ({"messages": TALK}, [{"messages": TALK}]),
        ({"messages": TALK, "tools": [{"type": "function"}]}, [{"messages": TALK, "tools": [{"type": "function"}]}]),
        ({"messages": [TALK, TALK]}, [{"messages": TALK}] * 2),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, [{"prompt": TALK[:1], "completion": TALK[1:]}]),
        ({"chosen": TALK, "rejected": TALK}, [{"chosen": TALK, "rejected": TALK}]),
        ({"prompt": TALK[0], "completion": TALK[1]}, [{"prompt": TALK[0], "completion": TALK[1]}]),
        (TALK, [{"messages": TALK}]),
        ([TALK, TALK[:1]], [{"messages": TALK}, {"messages": TALK[:1]}]),
        ({"data": [TALK, TALK]}, [{"messages": TALK}] * 2),
        ({"data": [TALK], "version": 1}, [{"messages": TALK}]),
        ([{"from": "a@b.c", "subject": "x"}], [{"from": "a@b.c", "subject": "x"}]),
        ([{"role": "user", "content": "a", "chat": 1}], [{"role": "user", "content": "a", "chat": 1}]),
        (pair(), [pair()]),
        ({"messages": TALK, "items": [{"a": 1}]}, [{"messages": TALK, "items": [{"a": 1}]}]),
        ({"question": ["a"], "meta": [{"x": 1}]}, [{"question": "a", "meta": {"x": 1}}]),
        ({"data": []}, []),
        ({"question": [], "answer": []}, []),
    ],
)
def test_conversations_and_single_rows(value, expected, tmp_path):
    assert rows_of(write(tmp_path / "a.json", json.dumps(value))) == expected


@pytest.mark.parametrize(
    "text, words",
    [
        (
            '{"math": [{"a": 1}], "code": [{"a": 2}], "n": 1}',
            "a.json holds several lists of objects (math, code): keep one of them, or name it 'train'",
        ),
        ('{"a": ["x", "y"], "b": ["x"]}', "a.json holds columns of different lengths (a: 2, b: 1): make them equal"),
        ('{"data": [{"a": 1}], "items": [{"a": 2}]}', "several lists of objects (data, items)"),
        ('{"data": [{"a": 1, "a": 2}]}', "duplicate key 'a'"),
        ('{"data": {"a": 1, "a": 2}}', "duplicate key 'a'"),
        ('{\n"a": 1}\n{"a": 1,\n"a": 2}', "duplicate key 'a'"),
        ('{\n"a": 1}\n{"a": }', "a.json, line 3, object 2, is not JSON"),
        ('{"data": [1, 2]}\n{"data": x}', "is not JSON"),
        ('[{"a": 1}] x', "object 2, is not JSON"),
        ("[[1, 2], [3, 4]]", "row 1, is a JSON list, not an object"),
    ],
)
def test_json_that_is_not_clear(text, words, tmp_path):
    assert words in refused(write(tmp_path / "a.json", text))


def test_numbers_that_json_does_not_have(tmp_path):
    found = rows_of(write(tmp_path / "a.jsonl", '{"a": NaN, "b": Infinity, "c": -Infinity}\n'))[0]
    assert found["a"] != found["a"] and (found["b"], found["c"]) == (float("inf"), float("-inf"))


# --- Arrow, caches, what is in memory ---------------------------------------------------------------------------------


def test_arrow_files(tmp_path):
    import pyarrow as pa
    import pyarrow.feather as feather

    table = pa.Table.from_pylist(pairs(*range(2500)))
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=999)
    feather.write_feather(table, tmp_path / "c.feather")
    write(tmp_path / "d.arrow.gz", gzip.compress((tmp_path / "a.arrow").read_bytes()))
    for name in ("a.arrow", "b.arrow", "c.feather", "d.arrow.gz"):
        assert rows_of(tmp_path / name) == table.to_pylist()
        assert list(open_data_source(tmp_path / name, None, "train", False, lambda names: names[1:]))[7] == {
            "answer": "It is 7."
        }
    for content in (
        b"",
        b"nonsense",
        (tmp_path / "b.arrow").read_bytes()[:-40],
        (tmp_path / "a.arrow").read_bytes()[:200],
    ):
        assert "e.arrow" in refused(write(tmp_path / "e.arrow", content))


def test_caches_and_saved_data_sets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i, split in enumerate(("train", "test")):
        write(tmp_path / f"{split}.jsonl", lines(pairs(i, i + 5)))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    data = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    data["train"].map(lambda row: {"answer": "another"})  # leaves a cache-….arrow beside
    folder = next((tmp_path / "cache").rglob("dataset_info.json")).parent
    for place in (folder, folder.parents[1]):
        assert rows_of(place) == pairs(0, 5) and rows_of(place, "test") == pairs(1, 6)
    data.save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved", "test") == pairs(1, 6)
    assert "no split 'valid': choose one of train, test" in refused(tmp_path / "saved", "valid")
    (tmp_path / "saved/dataset_dict.json").unlink()
    assert rows_of(tmp_path / "saved") == pairs(0, 5) and rows_of(tmp_path / "saved", "test") == pairs(1, 6)


def test_tables_in_memory():
    import datasets
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    columns = {"question": ["What is 0?", "What is 1?"], "answer": ["It is 0.", "It is 1."]}
    for source in (
        columns,
        pd.DataFrame(columns),
        pa.table(columns),
        datasets.Dataset.from_dict(columns),
        {"train": columns},
        (pair(i) for i in (0, 1)),
    ):
        assert rows_of(source) == pairs(0, 1)
    frame = pd.DataFrame({"messages": [np.array(TALK, dtype=object)], "n": [np.int64(3)]})
    assert rows_of(frame) == [{"messages": TALK, "n": 3}]
    for twice in (frame.loc[:, ["n", "n"]], pa.table([[1], [2]], names=["n", "n"])):
        assert "names the column 'n' twice" in refused(twice)
    assert "a dict without a split 'train' (found test, valid)" in refused({"test": [], "valid": [1]})


# --- memory and time --------------------------------------------------------------------------------------------------


def with_peak(call, *args):
    tracemalloc.start()
    try:
        return call(*args), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_MOST_BYTES", 2**21)
    spaces = gzip.compress(b'{"a": "' + b" " * 2**25)
    for name, words in [
        ("a.jsonl.gz", "has a line of more than 2 MB"),
        ("a.csv.gz", "has a line of more than 2 MB"),
        ("a.json.gz", "unpacks to more than 2 MB"),
        ("a.parquet.gz", "unpacks to more than 2 MB"),
        ("a.arrow.gz", "unpacks to more than 2 MB"),
    ]:
        message, peak = with_peak(refused, write(tmp_path / name, spaces))
        assert words in message and peak < 2**24, name
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", b" " * 2**23)
    assert "has a line of more than 2 MB" in refused(tmp_path / "a.jsonl.zip")
    long = [{"question": "x" * 300, "answer": "y"}] * 5000
    for name, text in (("a.jsonl.gz", lines(long)), ("a.csv.gz", spread(long))):
        assert rows_of(write(tmp_path / name, gzip.compress(text.encode()))) == long, "many lines are no bomb"
    assert len(rows_of(write(tmp_path / "a.json", json.dumps(long)))) == 5000, (
        "nor is a file that is as large as it looks"
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_rows_are_read_as_they_come(name, tmp_path):
    "Memory of a pass over 20,000 rows (9 MB) is that of some; and it is quick."
    rows = [{"question": f"{i} " + "q" * 200, "answer": f"{i} " + "a" * 200} for i in range(20_000)]
    path = tmp_path / name
    if name == "a.parquet":
        parquet(path, rows)
    elif name == "a.arrow":
        import pyarrow as pa

        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        text = (spread(rows) if "csv" in name else lines(rows)).encode()
        write(path, gzip.compress(text, 1) if "gz" in name else text)
    list(zip(range(2), open_data_source(path, None, "train", False, None)))  # imports
    start = time.process_time()
    assert sum(1 for _ in open_data_source(path, None, "train", False, None)) == 20_000
    assert time.process_time() - start < 3
    rows = zip(range(5000), open_data_source(path, None, "train", False, None))
    count, peak = with_peak(lambda: sum(1 for _ in rows))
    assert count == 5000 and peak < 4e6


# --- all the way ------------------------------------------------------------------------------------------------------


def test_a_clone_and_a_spreadsheet_give_conversations(tmp_path, capsys):
    from qlora_nb.rows import load_sft_dataset

    parquet(tmp_path / "clone/data/train-00000-of-00001.parquet", [{"messages": TALK}] * 2)
    write(
        tmp_path / "a.csv",
        spread(
            [{"instruction": "Add 1,5", "input": "", "output": "So; 2"}],
            ";",
            names=("instruction", "input", "output"),
            before="\ufeffsep=;\r\n",
        ),
    )
    assert load_sft_dataset(tmp_path / "clone").to_list() == [{"messages": TALK}] * 2
    turns = [{"role": "user", "content": "Add 1,5"}, {"role": "assistant", "content": "So; 2"}]
    assert load_sft_dataset(tmp_path / "a.csv").to_list() == [{"messages": turns}]
    both = load_sft_dataset([str(tmp_path / "clone"), tmp_path / "clone/data/*.parquet"])
    assert both.to_list() == [{"messages": TALK}] * 4


def test_a_configuration_that_nothing_has_is_refused(tmp_path):
    "A name that is not used must not vanish."
    from qlora_nb.rows import load_sft_dataset

    file = write(tmp_path / "a.jsonl", b'{"prompt": "a", "response": "b"}\n')
    for source in (file, str(tmp_path / "*.jsonl"), [file], [{"prompt": "a", "response": "b"}]):
        with pytest.raises(
            UserError, match=r"the configuration 'v1' can't be chosen: .*leave out name= \(--data-name\)"
        ):
            load_sft_dataset(source, "v1")
