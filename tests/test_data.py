"""Loading and preflight, on files made to be hostile: the right finding, or one clear sentence with file and row."""

import bz2
import copy
import gzip
import io
import json
import lzma
import random
import re
import time
import zipfile

import pytest

from qlora_nb.core import EMBEDDED_DATA, EMBEDDED_MODEL, UserError
from qlora_nb.preflight import DatasetReport, check_and_encode, check_dataset, encode_dataset
from qlora_nb.row_checks import find_role_problem
from qlora_nb.row_statistics import DATASET_CODES, DatasetFinding, RowStatistics
from qlora_nb.rows import data_fingerprint, load_sft_dataset
from qlora_nb.schemas import find_schema
from qlora_nb.template import SYSTEM_PROMPT, encode

pytestmark = pytest.mark.quick

PAIR = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
THINK = "<think>\n2 + 2 = 4\n</think>\n\nThe answer is 4."


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def talk(question="2+2?", reply="4", system=None):
    head = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*head, {"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def good(count=20, start=0):
    return [talk(f"What is {i} + 1?", f"The answer is {i + 1}.") for i in range(start, start + count)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(data, row=0):
    return [(m["role"], m["content"]) for m in data[row]["messages"]]


def simple(data):
    return data.to_list() == [{"messages": PAIR}]


# --- the embedded set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "heldout", "base_task"])
def test_embedded(split, tokenizer, capsys):
    data = load_sft_dataset(split=split)
    assert data.column_names == ["messages"] and len(data) >= 100
    assert capsys.readouterr().err == ""
    report = check_dataset(data, tokenizer, 256)
    assert report.ok and report.summary["usable"] == len(data)
    for row in data.to_list():
        reply = row["messages"][-1]["content"]
        systems = [m["content"] for m in row["messages"] if m["role"] == "system"]
        assert systems == ([SYSTEM_PROMPT] if "<think>" in reply else [])


def test_embedded_has_no_such_split():
    with pytest.raises(UserError, match="no split 'test' .found base_task.parquet, heldout.parquet, train.parquet"):
        load_sft_dataset(split="test")


def test_a_missing_embedded_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("qlora_nb.rows.EMBEDDED_DATA", tmp_path / "gone")
    with pytest.raises(UserError, match="there is no file or folder"):
        load_sft_dataset()


def test_limit():
    assert load_sft_dataset(limit=7).to_list() == load_sft_dataset().to_list()[:7]
    for limit in (0, -1, 1.5, "all"):
        with pytest.raises(UserError, match="limit is"):
            load_sft_dataset(limit=limit)


def test_limit_reads_no_further(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"question": "2+2?", "answer": "4"}])
    path.write_text(path.read_text() + "{broken\n")
    assert simple(load_sft_dataset(path, limit=1))


def test_speed(tokenizer):
    data, heldout = load_sft_dataset(), load_sft_dataset(split="heldout")
    start = time.process_time()
    report = check_dataset(data, tokenizer, 256, eval_data=heldout)
    assert time.process_time() - start < 3 and report.ok and report.summary["rows"] == len(data)


# --- schemas --------------------------------------------------------------------------------------------------------

V0 = {"id": "a", "reannotated_assistant_content": THINK, "problem": "2+2?", "source": "s", "solution": "4",
      "verified": None, "quality_metrics": None}  # fmt: skip
V1 = {"id": "a", "reannotated_assistant_content": THINK, "source": "s", "source_dataset": "d", "verified": None,
      "reannotated_messages": [{"content": "2+2?", "role": "user"}, {"content": THINK, "role": "assistant"}],
      "messages": PAIR, "quality_metrics": None}  # fmt: skip
REASONED = [("system", SYSTEM_PROMPT), ("user", "2+2?"), ("assistant", THINK)]
PLAIN = [("user", "2+2?"), ("assistant", "4")]


@pytest.mark.parametrize(
    "row, expected",
    [
        (V0, REASONED),
        (V1, REASONED),
        ({**V1, "reannotated_messages": None}, PLAIN),
        ({"problem": "2+2?", "solution": "4", "verified": None}, PLAIN),
        ({"question": "2+2?", "answer": "4"}, PLAIN),
        ({"prompt": "2+2?", "response": "4"}, PLAIN),
        ({"prompt": "2+2?", "completion": "4"}, PLAIN),
        ({"prompt": PAIR[:1], "completion": PAIR[1:]}, PLAIN),
        ({"prompt": PAIR[:1], "completion": "4"}, PLAIN),
        ({"instruction": "2+2?", "output": "4"}, PLAIN),
        ({"instruction": "2+2?", "input": "", "output": "4"}, PLAIN),
        ({"instruction": "Add", "input": "2 2", "output": "4"}, [("user", "Add\n\n2 2"), ("assistant", "4")]),
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, PLAIN),
        ({"conversations": PAIR}, PLAIN),
        ({"conversations": PAIR, "system": "Be brief."}, [("system", "Be brief."), *PLAIN]),
        ({"messages": PAIR, "prompt": "2+2?", "prompt_id": "1"}, PLAIN),
        ({"messages": json.dumps(PAIR)}, PLAIN),
        ({"messages": talk("2+2?", THINK, "Mine")["messages"]}, [("system", "Mine"), *REASONED[1:]]),
        ({"messages": talk("2+2?", THINK)["messages"]}, REASONED[1:]),
        ({"messages": [PAIR[0], {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]}, PLAIN),
        ({"question": "2+2?", "answer": "4", "system": " "}, PLAIN),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "rows"])
def test_schemas(row, expected, kind, tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [row]) if kind == "jsonl" else [row]
    data = load_sft_dataset(source)
    assert turns(data) == expected and data.column_names == ["messages"]


def test_what_was_recognised_is_said(capsys):
    load_sft_dataset([V0])
    assert capsys.readouterr().err == (
        "the data: 1 row, read as R1-Distill-SFT v0 (problem → prompt, reannotated_assistant_content → response); "
        "a system prompt that asks for reasoning in <think> was added to 1 row: "
        "leave it out with system=False (--no-system)\n"
    )


def test_columns_override(capsys):
    rows = [{"frage": "2+2?", "antwort": "4", "question": "no", "answer": "no"}]
    data = load_sft_dataset(rows, columns={"prompt": "frage", "response": "antwort"})
    assert simple(data) and "frage → prompt, antwort → response" in capsys.readouterr().err
    assert turns(load_sft_dataset([{"talks": PAIR}], columns={"messages": "talks"})) == PLAIN


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"prompt": "q", "response": "nein"}, "names 'nein', which is not a column: found q, a"),
        ({"prompt": "q"}, "must name messages, or prompt and response"),
        ({"user": "q", "assistant": "a"}, "has the key 'user'"),
    ],
)
def test_wrong_overrides(columns, words):
    with pytest.raises(UserError, match=words):
        load_sft_dataset([{"q": "1", "a": "2"}], columns=columns)


def test_nothing_usable():
    with pytest.raises(UserError, match="found id, text; known are problem . reannotated_assistant_content; .*columns"):
        load_sft_dataset([{"id": 1, "text": "x"}])


@pytest.mark.parametrize(
    "columns, names",
    [
        ("prompt response completion", "prompt/response .* prompt/completion"),
        ("messages conversations", "messages .* ShareGPT"),
        ("problem solution messages", "messages .* problem/solution"),
        ("question answer instruction output", "Alpaca .* question/answer"),
    ],
)
def test_ambiguity(columns, names):
    with pytest.raises(UserError, match=f"in 2 ways: {names}.* Choose one with columns="):
        find_schema(columns.split())


# --- files ----------------------------------------------------------------------------------------------------------

LINE = json.dumps({"question": "2+2?", "answer": "4"}).encode() + b"\n"
CSV = b"question,answer\n2+2?,4\n"


def zst(content):
    import pyarrow as pa

    return pa.Codec("zstd").compress(content, asbytes=True)


def zipped(content):
    place = io.BytesIO()
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("inside.dat", content)
    return place.getvalue()


PACKS = [
    ("", bytes),
    (".gz", gzip.compress),
    (".bz2", bz2.compress),
    (".xz", lzma.compress),
    (".zst", zst),
    (".zip", zipped),
]


@pytest.mark.parametrize("pack", PACKS, ids=lambda pack: pack[0])
@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", LINE),
        ("a.JSONL", b"\xef\xbb\xbf" + LINE + b"\n  \n"),
        ("a.b.ndjson", LINE.rstrip()),
        ("a.json", b"[" + LINE + b"]"),
        ("a.json", b'{"data": [\n' + LINE + b"]}"),
        ("a.json", LINE),
        ("a.csv", CSV),
        ("a.csv", b"\xef\xbb\xbf" + CSV.replace(b"\n", b"\r\n")),
        ("a.tsv", CSV.replace(b",", b"\t")),
    ],
)
def test_files(tmp_path, name, content, pack):
    path = tmp_path / (name + pack[0])
    path.write_bytes(pack[1](content))
    assert simple(load_sft_dataset(path)) and simple(load_sft_dataset(str(path)))


def test_json_with_one_object_a_line(tmp_path):
    (tmp_path / "a.json").write_bytes(LINE * 3)
    assert len(load_sft_dataset(tmp_path / "a.json")) == 3


def parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", [V0])
    assert turns(load_sft_dataset(path)) == REASONED
    packed = tmp_path / "b.parquet.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert turns(load_sft_dataset(packed)) == REASONED


def test_csv_with_newlines_quotes_and_a_long_field(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"a\n\n""b"", c","' + "x" * 300_000 + '"\n')
    assert turns(load_sft_dataset(path)) == [("user", 'a\n\n"b", c'), ("assistant", "x" * 300_000)]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"\n\n", "has no rows"),
        ("a.json", b"", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"question,answer\n", "has no rows"),
        ("a.parquet", b"", "not a readable Parquet file"),
        ("a.parquet", b"PAR1 nonsense", "not a readable Parquet file"),
        ("a.jsonl", LINE * 500 + b'{"question": "2\n' + LINE, "a.jsonl, line 501, is not JSON"),
        ("a.jsonl", LINE + b"[1, 2]\n", "a.jsonl, line 2, is a JSON list"),
        ("a.jsonl", LINE + b'"\xff"\n', "a.jsonl, line 2, is not UTF-8"),
        ("a.jsonl", LINE.decode().encode("utf-16-le"), "a.jsonl, line 1, is not UTF-8"),
        ("a.jsonl", b'{"question": ' + b"[" * 100_000 + b"\n", "a.jsonl, line 1, is not JSON"),
        ("a.jsonl", b'{"question": ' + b"9" * 10_000 + b"}\n", "a.jsonl, line 1, is not JSON"),
        ("a.json", b'[{"a": 1},\n{"a": }]', "a.json, line 2, is not JSON"),
        ("a.json", b'{"data": [\n  {"a": 1},\n', "a.json, line 3, is not JSON|a.json, line 2, is not JSON"),
        ("a.json", b"[1, 2]", "a.json, row 1, is a JSON int"),
        ("a.json", b"3", "a.json, row 1, is a JSON int"),
        ("a.csv", CSV + b"only one\n", "a.csv, row 2, doesn't have the 2 columns"),
        ("a.csv", CSV + b"1,2,3\n", "a.csv, row 2, doesn't have the 2 columns"),
        ("a.csv", CSV + b'"open,2\n', "a.csv, row 2, is not CSV"),
        ("a.csv", CSV + b"\xff\xfe,1\n", "a.csv, near row . is not UTF-8|a.csv, near row ., is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINE * 1000, mtime=0)[:-20], "a.jsonl.gz can't be read after row"),
        ("a.csv.gz", gzip.compress(CSV, mtime=0)[:-9], "a.csv.gz can't be read after row"),
        ("a.jsonl.gz", LINE, "a.jsonl.gz can't be read after row 0 .* compressed as its name says"),
        ("a.jsonl.bz2", LINE, "a.jsonl.bz2 can't be read"),
        ("a.jsonl.xz", LINE, "a.jsonl.xz can't be read after row 0 .* compressed as its name says"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0)[:-3], "a.parquet.gz can't be read after row 0"),
        ("a.txt", b"hello", "a.txt has no known suffix"),
        ("a", b"hello", "a has no known suffix"),
        ("a.pkl", b"\x80\x04.", "a.pkl has no known suffix"),
        ("a.jsonl.zip", b"PK", "a.jsonl.zip can't be read after row 0 .* compressed as its name says"),
        ("a.jsonl", b'{"messages": "[broken"}\n', "a.jsonl, row 1: a conversation written as text is not JSON"),
    ],
)
def test_broken_files(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_sft_dataset(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "sub/gone.json.gz", "a/b/c", "./gone", "/gone"])
def test_missing_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no file or folder"):
        load_sft_dataset(name)


def test_a_file_has_one_split(tmp_path):
    with pytest.raises(UserError, match="one file, which holds only the split 'train'"):
        load_sft_dataset(jsonl(tmp_path / "a.jsonl", good()), split="test")


def test_a_long_line(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [talk(reply="long " * 2_000_000)])
    assert len(load_sft_dataset(path)[0]["messages"][1]["content"]) == 10_000_000


def test_parquet_reads_the_needed_columns_alone(tmp_path):
    "The bytes of the other columns are destroyed, and nobody notices."
    import pyarrow.parquet as pq

    rows = [{**V0, "problem": f"{i}+2?", "junk": "x" * 1000 + str(i)} for i in range(50)]
    path = parquet(tmp_path / "a.parquet", rows)
    group = pq.ParquetFile(path).metadata.row_group(0)
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "junk")
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    assert len(load_sft_dataset(path)) == 50
    with pytest.raises(UserError, match="a.parquet"):
        load_sft_dataset(path, columns={"prompt": "problem", "response": "junk"})


def test_a_data_set_gives_the_needed_columns_alone():
    from datasets import Dataset

    class Spy(Dataset):
        asked = []

        def select_columns(self, names):
            Spy.asked.append(names)
            return super().select_columns(names)

    one = Dataset.from_list([V1])
    data = load_sft_dataset(Spy(one.data, one.info))
    assert turns(data) == REASONED and Spy.asked == [["reannotated_messages", "messages"]]


def test_zip(tmp_path):
    for name, members in [("a.zip", {"rows.csv": CSV}), ("b.jsonl.zip", {"__MACOSX/x": b"", "x": LINE})]:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        assert simple(load_sft_dataset(tmp_path / name))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("a.csv", CSV)
        archive.writestr("b.csv", CSV)
    with pytest.raises(UserError, match="c.zip holds 2 files: unpack it"):
        load_sft_dataset(tmp_path / "c.zip")


@pytest.mark.parametrize("mark", [";", "|", "\t"])
def test_csv_with_another_separator(mark, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(CSV.replace(b",", mark.encode()))
    assert simple(load_sft_dataset(path))


def test_streaming(tmp_path, tokenizer, capsys):
    "Nothing is kept, the source is opened again for each pass, and a limit gives an ordinary data set."
    import datasets

    path = jsonl(tmp_path / "a.jsonl", [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(300)])
    data = load_sft_dataset(path, streaming=True)
    assert isinstance(data, datasets.IterableDataset) and data.column_names == ["messages"]
    assert "streamed, read as question/answer" in capsys.readouterr().err
    assert list(data) == load_sft_dataset(path).to_list() == list(data)
    assert check_dataset(data, tokenizer).summary["rows"] == 300
    assert isinstance(load_sft_dataset(path, streaming=True, limit=5), datasets.Dataset)
    assert len(load_sft_dataset(path, streaming=True, limit=5)) == 5
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UserError, match="a.jsonl, line 301, is not JSON"):
        list(load_sft_dataset(path, streaming=True))
    with pytest.raises(UserError, match="has no rows"):
        load_sft_dataset([], streaming=True)


def test_the_broken_row_of_a_list_on_one_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"question": "a", "answer": "b"}, {"question": "c", "answer": d}]')
    with pytest.raises(UserError, match=r"a.json is not JSON .*\(row 2\)"):
        load_sft_dataset(path)
    path.write_text('{"data": [{"question": "[1, 2]", "answer": "}"} , {"question": "c", "answer": "d"}, {"question')
    with pytest.raises(UserError, match=r"a.json is not JSON .*\(row 3\)"):
        load_sft_dataset(path)


# --- folders, objects, the Hub --------------------------------------------------------------------------------------


def test_folder_of_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list([{"question": "2+2?", "answer": "4"}])
    one.save_to_disk(tmp_path / "one", num_proc=None)
    DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "two")
    assert simple(load_sft_dataset(tmp_path / "one"))
    assert simple(load_sft_dataset(tmp_path / "two", split="test"))
    with pytest.raises(UserError, match="no split 'valid': choose one of train, test"):
        load_sft_dataset(tmp_path / "two", split="valid")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(UserError, match="looks like a data set saved by datasets, but can't be read"):
        load_sft_dataset(tmp_path / "one")


def test_folder_of_files(tmp_path):
    jsonl(tmp_path / "train-00000-of-00002.jsonl", good(3))
    jsonl(tmp_path / "train-00001-of-00002.jsonl", good(2))
    jsonl(tmp_path / "trainer.jsonl", [{"state": 1}])
    assert len(load_sft_dataset(tmp_path)) == 5
    with pytest.raises(UserError, match="no split 'test' .found train-00000"):
        load_sft_dataset(tmp_path, split="test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found no data files"):
        load_sft_dataset(tmp_path / "empty")


def test_objects():
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list([V0])
    assert turns(load_sft_dataset(one)) == turns(load_sft_dataset(DatasetDict({"train": one}))) == REASONED
    assert turns(load_sft_dataset(one.to_iterable_dataset(), limit=1)) == REASONED
    with pytest.raises(UserError, match="without a split 'train'"):
        load_sft_dataset(DatasetDict({"test": one}))
    with pytest.raises(UserError, match="the data is a int"):
        load_sft_dataset(3)
    with pytest.raises(UserError, match="rows of type int"):
        load_sft_dataset([1, 2])
    with pytest.raises(UserError, match="has no rows"):
        load_sft_dataset([])


def test_hub_name_with_no_network():
    with pytest.raises(UserError, match="'nobody/no-such-data' is not a file .*can't be loaded from the Hub"):
        load_sft_dataset("nobody/no-such-data")


class Hub:
    "Stands in for `datasets.load_dataset`."

    def __init__(self, rows):
        self.rows, self.calls, self.read = rows, [], 0

    def __call__(self, source, name, *, split, streaming):
        self.calls.append((source, name, split, streaming))
        for row in self.rows:
            self.read += 1
            if isinstance(row, Exception):
                raise row
            yield row


def test_hub_streams_with_a_limit_and_names_the_licence(monkeypatch, capsys):
    import datasets

    hub = Hub([V0] * 50 + [OSError("connection lost\nmore")])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    data = load_sft_dataset("ServiceNow-AI/R1-Distill-SFT", "v0", limit=10)
    assert len(data) == 10 and hub.read == 10
    assert hub.calls == [("ServiceNow-AI/R1-Distill-SFT", "v0", "train", True)]
    said = capsys.readouterr().err
    assert "cc-by-nc-sa-4.0, non-commercial" in said and said.count("\n") == 1
    with pytest.raises(UserError, match="from the Hub stopped: connection lost$"):
        load_sft_dataset("a/b")
    assert hub.calls[-1][-1] is False
    with pytest.raises(UserError, match="stopped"):
        load_sft_dataset("a/b", limit=60)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_what_datasets_itself_streams(kind, tmp_path, monkeypatch, tokenizer):
    "The real streams of `datasets`, over files in place of the Hub: with a limit, without one, and not streamed."
    import datasets

    rows = [{**V0, "problem": f"What is {i} + 1?", "quality_metrics": None} for i in range(300)]
    path = tmp_path / f"train.{kind}"
    getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(path)
    real, asked = datasets.load_dataset, []

    def load_dataset(source, name, *, split, streaming):
        asked.append(streaming)
        place = str(tmp_path / "cache")
        return real(kind, data_files={split: str(path)}, split=split, streaming=streaming, cache_dir=place)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    few = load_sft_dataset("a/b", "v0", limit=5)
    assert isinstance(few, datasets.Dataset) and len(few) == 5 and few[4]["messages"][1]["content"] == "What is 4 + 1?"
    endless = load_sft_dataset("a/b", "v0", streaming=True)
    assert isinstance(endless, datasets.IterableDataset)
    whole = load_sft_dataset("a/b", "v0")
    assert asked == [True, True, False] and whole.column_names == ["messages"]
    assert list(endless) == whole.to_list() and asked == [True, True, False, True]
    assert check_dataset(endless, tokenizer).to_dict() == check_dataset(whole, tokenizer).to_dict()
    assert load_sft_dataset(real(kind, data_files=str(path), split="train", streaming=True), limit=9).num_rows == 9


# --- what loads, and becomes a finding ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 4, 4.5, True, {"a": 1}, ["x"], []])
def test_contents_that_are_no_text(value, tmp_path, tokenizer, capsys):
    rows = [{"question": "2+2?", "answer": "4"}] * 2 + [{"question": "3+3?", "answer": value}]
    data = load_sft_dataset(jsonl(tmp_path / "a.jsonl", rows))
    assert turns(data, 2) == [("user", "3+3?"), ("assistant", None)]
    assert "contents that are not text: 1 (row 3)\n" in capsys.readouterr().err
    assert codes(check_dataset(data, tokenizer))["non_string_content"] == ("error", 1, [2])


def test_many_contents_that_are_no_text(capsys):
    load_sft_dataset([{"question": "3+3?", "answer": value} for value in ("6", 6, 6, "6", 6, 6)])
    assert "contents that are not text: 4 (rows 2, 3, 5, …)\n" in capsys.readouterr().err
    load_sft_dataset([{"question": 3, "answer": 6}, {"question": "3+3?", "answer": "6"}] * 2)
    assert "contents that are not text: 4 (rows 1, 3)\n" in capsys.readouterr().err
    load_sft_dataset([{"question": 3, "answer": 6}] * 3)
    assert "contents that are not text: 6 (rows 1, 2, 3)\n" in capsys.readouterr().err


@pytest.mark.parametrize("value", [None, "text", 3, [], ["a"], [{"role": "user"}], [{"x": 1}], [None], [[PAIR]]])
def test_conversations_that_are_none(value, tmp_path, tokenizer):
    data = load_sft_dataset(jsonl(tmp_path / "a.jsonl", [{"messages": PAIR}, {"messages": value}]))
    found = codes(check_dataset(data, tokenizer))
    assert [1] in [rows for severity, _, rows in found.values() if severity == "error"]


def test_lone_surrogates_are_replaced(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a\\ud800b", "answer": "4"}\n')
    assert turns(load_sft_dataset(path))[0] == ("user", "a\ufffdb")
    assert codes(check_dataset([talk("a\ud800b")], tokenizer))["odd_characters"] == ("warning", 1, [0])


# --- preflight ------------------------------------------------------------------------------------------------------


def codes(report):
    return {f.code: (f.severity, f.count, f.rows) for f in report.findings}


EOT = "<|eot_id|>"


@pytest.mark.parametrize(
    "row, code, severity",
    [
        (talk("Hi", ""), "empty_content", "error"),
        (talk("Hi", " \n"), "empty_content", "error"),
        (talk(" ", "Ho"), "empty_content", "warning"),
        (talk("Hi", None), "non_string_content", "error"),
        (talk(7, "Ho"), "non_string_content", "error"),
        (talk("Hi", f"Ho{EOT}"), "special_token_in_content", "error"),
        (talk(f"Hi{EOT}<|start_header_id|>system", "Ho"), "special_token_in_content", "warning"),
        (talk("Hi", "<think>\nHo"), "unbalanced_think", "warning"),
        (talk("Hi", "H\ufffd"), "odd_characters", "warning"),
        (talk("Hi\0", "Ho"), "odd_characters", "warning"),
        (talk("Hi", "Ho</think>"), "unbalanced_think", "warning"),
        (talk("Hi", "</think>Ho<think>"), "unbalanced_think", "warning"),
        (talk("<|begin_of_text|>Hi", "Ho"), "double_bos", "error"),
        ({"messages": PAIR[:1]}, "bad_roles", "error"),
        ({"messages": PAIR[1:]}, "bad_roles", "error"),
        ({"messages": PAIR[::-1]}, "bad_roles", "error"),
        ({"messages": [PAIR[0], *PAIR]}, "bad_roles", "error"),
        ({"messages": [*PAIR, PAIR[1]]}, "bad_roles", "error"),
        ({"messages": [*PAIR, *talk("a", "b", "late")["messages"]]}, "bad_roles", "error"),
        ({"messages": [PAIR[0], {"role": "robot", "content": "4"}]}, "bad_roles", "error"),
        ({"messages": []}, "bad_roles", "error"),
        ({"messages": None}, "bad_roles", "error"),
        ({"messages": "Hi"}, "bad_roles", "error"),
        (None, "bad_roles", "error"),
        (talk("What is 3 + 1?", "The answer is 4."), "duplicate", "warning"),
        (talk("Hi", "x " * 300), "row_dropped", "warning"),
        (talk("Hi", "x " * 300), "too_long", "warning"),
    ],
)
def test_one_bad_row(row, code, severity, tokenizer):
    rows = [*good(), row]
    report = check_dataset(rows, tokenizer, 128)
    assert codes(report)[code] == (severity, 1, [20])
    finding = next(f for f in report.findings if f.code == code)
    assert finding.cause and finding.fix
    assert report.ok == (not any(f.severity == "error" for f in report.findings))
    if severity == "error":
        with pytest.raises(UserError, match=f"{code} in 1 row .first 20"):
            report.raise_for_errors()


def test_a_good_set_has_no_findings(tokenizer):
    report = check_dataset(good(), tokenizer, eval_data=good(5, start=100))
    assert report.findings == [] and report.ok and report.raise_for_errors() is None
    assert report.table() == "no findings" and "rows 20" in str(report) and "no findings" in report._repr_html_()


def test_every_kind_of_source_gives_the_same_report(tokenizer):
    from datasets import Dataset

    rows = [*good(300), talk("Hi", None), talk("What is 3 + 1?", "The answer is 4.")]
    data = Dataset.from_list(rows)
    sources = [rows, tuple(rows), iter(rows), data, data.to_iterable_dataset(), [row["messages"] for row in rows]]
    reports = [str(check_dataset(source, tokenizer)) for source in sources]
    assert reports == [reports[0]] * 6 and "duplicate (1; rows 301)" in reports[0]


def test_figures(tokenizer):
    rows = good(10)
    made = [encode(row["messages"], tokenizer) for row in rows]
    lengths = [len(row["input_ids"]) for row in made]
    summary = check_dataset(rows, tokenizer, min_rows=1).summary
    assert summary["rows"] == summary["usable"] == 10
    assert summary["tokens"] == sum(lengths) and summary["longest"] == max(lengths)
    assert summary["learned_tokens"] == sum(label != -100 for row in made for label in row["labels"])


def test_leakage(tokenizer):
    held_out = [talk("what  is 3 + 1?\n", "another reply"), talk("What is 33 + 1?", "no")]
    assert codes(check_dataset(good(), tokenizer, eval_data=held_out))["leakage"] == ("error", 1, [3])
    with pytest.raises(UserError, match="no messages"):
        check_dataset(good(), tokenizer, eval_data=[{"text": "x"}])


def test_lengths(tokenizer):
    rows = good(199) + [talk("Hi", "x " * 300)]
    report = check_dataset(rows, tokenizer, 128)
    best = report.summary["keeps_99_percent"]
    finding = next(f for f in report.findings if f.code == "row_dropped")
    assert "0.5 % of the rows" in finding.cause and f"max_seq_length={best} keeps 99 %" in finding.fix
    sizes = [len(encode(row["messages"], tokenizer, max_length=9999)["input_ids"]) for row in rows]
    assert sum(n <= best for n in sizes) >= 0.99 * 200 > sum(n < best for n in sizes)
    everything = check_dataset(rows, tokenizer, 8)
    assert codes(everything)["row_dropped"][:2] == ("error", 200) and everything.summary["usable"] == 0


def test_prompts_that_are_cut(tokenizer):
    "The preflight counts what `encode_dataset` will make with the same setting."
    rows = [talk(f"Read {i}. " + "word " * (i * 10) + "?", f"Page {i}.") for i in range(30)]
    rows.append(talk("Tell.", "word " * 300))
    with_cut = check_dataset(rows, tokenizer, 120, truncation="cut_prompt")
    found = {f.code: f.count for f in with_cut.findings}
    made, dropped = encode_dataset(rows, tokenizer, 120, truncation="cut_prompt")
    plain = check_dataset(rows, tokenizer, 120)
    assert with_cut.summary["usable"] == len(made) == 30 and dropped == [30] and found["row_dropped"] == 1
    assert found["prompt_cut"] == len(made) - plain.summary["usable"] > 10
    fitting = check_dataset(rows[:-1], tokenizer, 120, truncation="cut_prompt").summary
    assert fitting["tokens"] == sum(map(len, made["input_ids"])) and fitting["longest"] == 120
    assert fitting["learned_tokens"] == sum(label != -100 for row in made["labels"] for label in row)
    with pytest.raises(UserError, match="truncation is 'left': choose 'drop' or 'cut_prompt'"):
        check_dataset(rows, tokenizer, truncation="left")


def test_near_duplicates_leave_digits_alone(tokenizer):
    rows = good()
    for near in (talk("what is 3+1", "the answer is 4"), talk("What  is\n3 + 1 ?", "The answer is 4 .")):
        assert codes(check_dataset([*rows, near], tokenizer)) == {"near_duplicate": ("info", 1, [20])}
    others = [talk("What is 3 - 1?", "The answer is 4."), talk("What is 3.1?", "The answer is 4."),
              talk("What is 31?", "The answer is 4."), talk("What is 3 + 1?", "The answer is 4.5"),
              talk("What is 3 + 10?", "The answer is 4.")]  # fmt: skip
    assert codes(check_dataset([*rows, *others], tokenizer)) == {}


def test_dominant_answer(tokenizer):
    rows = [talk(f"What is {i} + 1?", f"<think>\nHm {i}.\n</think>\n\nYes.") for i in range(11)]
    found = check_dataset([*rows, *good(10, start=50)], tokenizer).findings
    assert [(f.code, f.severity, f.count, f.rows) for f in found] == [
        ("dominant_answer", "warning", 11, [0, 1, 2, 3, 4])
    ]
    assert "52 % of the answers are 'Yes.'" in found[0].cause
    assert codes(check_dataset([*rows, *good(11, start=50)], tokenizer)) == {}, "half is not more than half"


def test_dominant_answer_among_very_many(tokenizer):
    "More answers than counters: found all the same, and counted from below."
    statistics = RowStatistics()
    for i in range(4000):
        statistics.add_reply(i, "Yes." if i % 5 < 3 else str(i))
    most = max(statistics.answers.values(), key=lambda answer: answer.count)
    assert 2400 - 4000 / 256 <= most.count <= 2400 and most.cause == "Yes." and len(statistics.answers) <= 255
    assert most.rows[0] == 0 and len(most.rows) == 5


def test_length_outliers(tokenizer):
    report = check_dataset([*good(30), talk("Hi", "x " * 300), talk("Ho", "x " * 400)], tokenizer)
    finding = next(f for f in report.findings if f.code == "length_outlier")
    assert (finding.severity, finding.count, finding.rows) == ("info", 2, [30, 31])
    spread = [talk(f"Hi {i}", "x " * (20 * i)) for i in range(1, 41)]
    assert "length_outlier" not in codes(check_dataset(spread, tokenizer)), "a wide spread is no outlier"


@pytest.mark.parametrize(
    "content, odd",
    [
        ("a\0b", "NUL"), ("a\ufffdb", "U+FFFD"), ("caf\u00c3\u00a9", "another encoding"),
        ("it\u00e2\u20ac\u2122s", "another encoding"), ("%&/()=?!" * 10, "hardly any text"),
        ("\x01\x02\x03\x04\x05" * 6 + "abcdefghij" * 3, "hardly any text"), ("Größe", None), ("---", None),
        ("नमस्ते दुनिया, आप कैसे हैं?", None), ("สวัสดีชาวโลกทั้งหลาย", None), ("Ã la carte", None),
        ("🙂🙂🙂🙂🙂🙂🙂", None), ("x = {a[i]: (b + c) * d}", None),
    ],
)  # fmt: skip
def test_odd_characters(content, odd, tokenizer):
    found = {f.code: f for f in check_dataset([*good(), talk(content, "The answer is 77.")], tokenizer).findings}
    assert (odd in found["odd_characters"].cause) if odd else "odd_characters" not in found


def test_memory_for_rows_is_bounded():
    statistics = RowStatistics(capacity=1000)
    assert not statistics.remember("row", "0")
    size = len(statistics.tables["row"])
    texts = [str(i) for i in range(1, 3000)]
    assert not any(statistics.remember("row", text) for text in texts)
    assert len(statistics.tables["row"]) == size and statistics.remembered == {"row": 1000}
    assert all(statistics.remember("row", text) for text in ["0", *texts[:999]])
    assert not any(statistics.remember("row", text) for text in texts[999:])
    assert not statistics.remember("question", "0"), "each kind has a table of its own"


def test_a_set_with_more_rows_than_are_remembered(monkeypatch, tokenizer):
    monkeypatch.setattr("qlora_nb.preflight.REMEMBERED_ROWS", 16)
    report = check_dataset([*good(40), good(1)[0], good(1, start=39)[0]], tokenizer)
    assert codes(report)["duplicate"] == ("warning", 1, [40]), "the last row repeats one that was not remembered"
    assert "among the first 16 different ones" in report.summary["note"] and "among the first 16" in str(report)
    assert check_dataset(good(10), tokenizer).summary["note"] is None


def test_the_picture(tokenizer):
    import matplotlib

    matplotlib.use("Agg")
    report = check_dataset([*good(40), talk("Hi", "x " * 200)], tokenizer, 128)
    ax = report.plot()
    dark, light = ax.containers
    heights = [a.get_height() + b.get_height() for a, b in zip(dark, light)]
    assert sum(heights) == pytest.approx(41) and ax.get_lines()[0].get_xdata()[0] == 128
    assert ax.get_xlabel() and ax.get_ylabel()
    assert report.plot(ax) is ax
    assert check_dataset([{"messages": []}], tokenizer).plot() is not None, "a set with no row to show"


def test_row_counts(tokenizer):
    assert codes(check_dataset(good(15), tokenizer)) == {"too_few_rows": ("warning", 15, [])}
    assert check_dataset(good(15), tokenizer, min_rows=15).findings == []
    assert check_dataset(good(160), tokenizer, max_steps=60).findings == []
    assert list(codes(check_dataset(good(159), tokenizer, max_steps=60))) == ["too_few_rows"]


def test_settings(tokenizer):
    import torch

    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    assert codes(check_dataset(good(), other)) == {"pad_is_eos": ("warning", 1, [])}

    class Model:
        def __init__(self, rows):
            self.embedding = torch.nn.Embedding(rows, 2)

        def get_input_embeddings(self):
            return self.embedding

    assert check_dataset(good(), tokenizer, model=Model(768)).findings == []
    assert codes(check_dataset(good(), tokenizer, model=Model(767))) == {"tokenizer_too_large": ("info", 1, [])}
    used = codes(check_dataset(good(), tokenizer, model=Model(760)))
    assert used["tokenizer_too_large"] == ("error", 20, [0, 1, 2, 3, 4])


def test_templates(tokenizer):
    def found(text):
        return codes(check_dataset(good(), tokenizer, template=text))

    turn = "{% for m in messages %}{{ m.role + '\n' + m.content + '<|eot_id|>' }}{% endfor %}"
    ask = "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    everywhere = ("error", 20, [0, 1, 2, 3, 4])
    assert found("{{ bos_token }}" + turn + ask) == {}
    assert found(turn + ask) == {"no_bos": everywhere}
    assert found("{{ bos_token + bos_token }}" + turn + ask) == {"double_bos": everywhere}
    assert found("{{ bos_token }}" + turn.replace(EOT, "\n") + ask) == {"no_end_of_turn": everywhere}
    other = ask.replace("assistant", "Assistant")
    assert found("{{ bos_token }}" + turn + other) == {"generation_prompt_mismatch": everywhere}
    assert found("{{ bos_token }}" + turn) == {"generation_prompt_mismatch": everywhere}
    assert found("{{ bos_token }}{{ messages | length }}" + turn + ask) == {
        "prompt_not_prefix": everywhere,
    }
    assert found("{{ raise_exception('no') }}") == {"template_refused": everywhere}
    dated = ("warning", 1, [])
    assert found("{{ bos_token }}{{ strftime_now('%Y') }}" + turn + ask) == {"date_in_template": dated}
    given = "{{ date_string if date_string is defined else strftime_now('%Y') }}"
    assert found("{{ bos_token }}" + given + turn + ask) == {"date_in_template": ("info", 1, [])}
    assert found("{{ bos_token }}{# {{ strftime_now('%Y') }} #}" + turn + ask) == {}, "a comment writes no date"
    dropped = turn.replace("m.content +", "m.content.replace('answer', '') +")
    assert codes(check_dataset(good(), tokenizer, template="{{ bos_token }}" + dropped + ask)) == {
        "text_missing": ("error", 20, [0, 1, 2, 3, 4])
    }


def test_no_template_at_all(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        check_dataset(good(), bare)


def test_text(tokenizer):
    everywhere = [0, 1, 2, 3, 4]
    texts = [{"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)} for row in good()]
    found = {"double_bos": ("error", 20, everywhere), "prompt_labelled": ("warning", 20, everywhere)}
    assert codes(check_dataset(texts, tokenizer)) == found
    cut = [{"text": row["text"].removeprefix("<|begin_of_text|>").removesuffix(EOT)} for row in texts]
    assert list(codes(check_dataset(cut, tokenizer))) == ["no_end_of_turn", "prompt_labelled"]
    plain_text = [{"text": f"The number {i}.<|end_of_text|>"} for i in range(20)]
    assert codes(check_dataset(plain_text, tokenizer)) == {}, "text that is no conversation is learned whole"
    for value, code in [(None, "non_string_content"), (4, "non_string_content"), (" ", "empty_content")]:
        found = codes(check_dataset([*plain_text, {"text": value}], tokenizer))
        assert found == {code: ("error", 1, [20])}


def test_ready_ids(tokenizer):
    ready, _ = encode_dataset(good(), tokenizer)
    assert check_dataset(ready, tokenizer).findings == []
    assert check_dataset(ready.with_format("torch"), tokenizer).findings == []
    assert codes(check_dataset(ready, tokenizer, 12))["end_cut"][0] == "error"
    rows = ready.to_list()
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    assert list(codes(check_dataset(masked, tokenizer))) == ["all_masked"]
    bare = [{"input_ids": row["input_ids"]} for row in rows]
    assert list(codes(check_dataset(bare, tokenizer))) == ["prompt_labelled"]
    marked = [{**b, "completion_mask": [int(x != -100) for x in row["labels"]]} for b, row in zip(bare, rows)]
    assert codes(check_dataset(marked, tokenizer)) == {}
    longer = encode_dataset([talk(f"{i}?", "two words " * 30) for i in range(4)], tokenizer)[0].to_list()
    cut = [{name: row[name][:45] for name in row} for row in [*rows, *longer]]
    assert max(len(row["input_ids"]) for row in rows) < 45
    assert codes(check_dataset(cut, tokenizer))["end_cut"] == ("error", 4, [20, 21, 22, 23])


@pytest.mark.parametrize(
    "ids, labels",
    [(None, None), ([], []), ("757", "757"), ([757, 1.5], [757, 1.5]), ([757, 768], [757, 768]), ([-1], [-1]),
     ([757, 5], [757]), ([757, 5], None), ([757, 5, 766], [5, 766, -100])],
)  # fmt: skip
def test_ids_that_are_none(ids, labels, tokenizer):
    ready = encode_dataset(good(), tokenizer)[0].to_list()
    found = codes(check_dataset([*ready, {"input_ids": ids, "labels": labels}], tokenizer))
    assert found == {"bad_ids": ("error", 1, [20])}


def test_replies_earlier_in_a_row_may_be_labelled(tokenizer):
    turns_ = [m for row in good(3) for m in row["messages"]]
    row = encode(turns_, tokenizer, train_on="all")
    assert "prompt_labelled" not in codes(check_dataset([row], tokenizer))
    row["labels"][1] = row["input_ids"][1]
    assert "prompt_labelled" in codes(check_dataset([row], tokenizer))


@pytest.mark.parametrize("data", [[], [{"question": "a"}], {"train": []}, "rows.jsonl", None])
def test_nothing_to_look_at(data, tokenizer):
    with pytest.raises(UserError):
        check_dataset(data, tokenizer)
    with pytest.raises(UserError):
        encode_dataset(data, tokenizer)


def test_report():
    report = DatasetReport(
        [DatasetFinding("b", "warning", "a | b", "do", 9, [1, 2]), DatasetFinding("a", "error", "c", "<do>", 1, [7])],
        {"rows": 9},
    )
    assert [f.code for f in report.findings] == ["a", "b"] and not report.ok
    assert str(report) == "rows 9\n" + report.table()
    assert "error: a (1; rows 7)" in report.table() and "warning: b (9; rows 1, 2…)" in report.table()
    assert "&lt;do&gt;" in report._repr_html_() and "<do>" not in report._repr_html_()
    assert json.loads(json.dumps(report.to_dict()))["findings"][0]["code"] == "a"
    with pytest.raises(UserError, match="a in 1 row .first 7.: c; <do>$"):
        report.raise_for_errors()


def test_roles():
    def problem(*names):
        return find_role_problem([{"role": name, "content": "x"} for name in names])

    assert problem("user", "assistant") is problem("developer", "user", "assistant", "tool", "assistant") is None
    assert problem("system", "assistant") == "the first turn after the system is the assistant's, not the user's"
    assert problem("user", "assistant", "assistant") == "two assistant turns follow each other"


def test_each_code_says_what_to_do():
    assert all(severity in ("error", "warning", "info") and len(fix) > 20 for severity, fix in DATASET_CODES.values())


# --- what training doesn't use --------------------------------------------------------------------------------------


def unused(report):
    "Severity, count and rows of what isn't used, by place and name."
    found = {}
    for f in report.findings:
        if f.code.startswith("unused_"):
            name = re.search("'(.*?)'", f.cause)
            found[f.code.removeprefix("unused_"), name and name[1]] = (f.severity, f.count, f.rows)
    return found


def doors(rows, path):
    "The same rows as a list, loaded from a file, streamed, as a data set of one's own, and a part of what was loaded."
    from datasets import Dataset

    loaded = load_sft_dataset(jsonl(path / "a.jsonl", [*rows, talk("What?", "That.")]))
    return {
        "list": rows,
        "file": load_sft_dataset(jsonl(path / "b.jsonl", rows)),
        "stream": load_sft_dataset(path / "b.jsonl", streaming=True),
        "own": Dataset.from_list(rows),
        "part": loaded.select(range(len(rows))),
    }


def keyed(role, **keys):
    "A row whose turn of this role has more keys."
    return {"messages": [{**turn, **keys} if turn["role"] == role else turn for turn in PAIR]}


CALL = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]
TALK = {"messages": PAIR}


@pytest.mark.parametrize(
    "row, place, name, severity",
    [
        (keyed("assistant", tool_calls=[{"id": "1"}]), "key", "tool_calls", "error"),
        (keyed("assistant", toolCalls="look it up"), "key", "toolCalls", "error"),
        (keyed("assistant", function_call={"arguments": '{"a": 1}'}), "key", "function_call", "error"),
        (keyed("user", tool_calls=CALL), "key", "tool_calls", "error"),
        (keyed("assistant", weight=0.5), "key", "weight", "error"),
        (keyed("assistant", loss=0.83), "key", "loss", "error"),
        (keyed("user", images=["a.png"]), "key", "images", "error"),
        (keyed("user", reasoning_content="2 and 2"), "key", "reasoning_content", "warning"),
        (keyed("assistant", rationale="2 and 2"), "key", "rationale", "warning"),
        (keyed("user", tool_call_id="1"), "key", None, "warning"),
        (keyed("user", whatever=0), "key", None, "warning"),
        (keyed("user", value="another text"), "key", None, "warning"),
        ({**TALK, "tools": ["look"]}, "column", "tools", "warning"),
        ({**TALK, "reasoning": "2 and 2"}, "column", "reasoning", "warning"),
        ({**TALK, "Thought": "2 and 2"}, "column", "Thought", "warning"),
        ({**TALK, "label": False}, "column", "label", "error"),
        ({**TALK, "label": "false"}, "column", "label", "error"),
        ({**TALK, "kto_tag": 0}, "column", "kto_tag", "error"),
        ({**TALK, "chosen": "4"}, "column", "chosen", "error"),
        ({**TALK, "rejected": "5"}, "column", "rejected", "error"),
        ({**TALK, "weight": 0.2}, "column", "weight", "error"),
        ({**TALK, "history": [["1+1?", "2"]]}, "column", "history", "error"),
        ({**TALK, "images": ["a.png"]}, "column", "images", "error"),
        ({**TALK, "function_call": {"name": "f"}}, "column", "function_call", "error"),
        ({**TALK, "score": 3.5, "id": 7}, "column", None, "info"),
        ({**TALK, "label": "arithmetic"}, "column", None, "info"),
    ],
)  # fmt: skip
def test_what_is_not_used_is_named(row, place, name, severity, tokenizer, tmp_path):
    rows = [row, *good(20)]
    for door, data in doors(rows, tmp_path).items():
        report, loaded = check_dataset(data, tokenizer), door in ("file", "stream", "part")
        expected = (severity, 21, []) if loaded and severity == "info" else (severity, 1, [0])
        assert unused(report) == {(place, name): expected}, door
        finding = next(f for f in report.findings if f.code == f"unused_{place}")
        assert len(finding.fix) > 20 and report.ok == (severity != "error")
        assert data_fingerprint(load_sft_dataset(rows)) == data_fingerprint(load_sft_dataset([TALK, *good(20)]))


def test_the_calls_decide_about_the_tools(tokenizer):
    "Tools that can't be read are an error where the row calls one."
    calls = {**keyed("assistant", tool_calls=CALL), "tools": ["look"]}
    asks = {"messages": [*PAIR, {"role": "tool", "content": "5"}, PAIR[1]], "tools": ["look"]}
    for row in (calls, asks):
        assert unused(check_dataset([*good(), row], tokenizer))["column", "tools"] == ("error", 1, [20])
        assert unused(check_dataset([{**TALK, "tools": ["look"]}, row], tokenizer))["column", "tools"][:2] == (
            "error",
            2,
        )


@pytest.mark.parametrize("kind", ["image_url", "image", "tool_use", "redacted_thinking", None])
def test_parts_that_are_no_text(kind, tokenizer):
    part = {"image_url": {"url": "a.png"}, **({"type": kind} if kind else {})}
    row = talk([{"type": "text", "text": "What is it?"}, part], "A cat.")
    for data in ([*good(), row], load_sft_dataset([*good(), row])):
        report = check_dataset(data, tokenizer)
        assert unused(report) == {("part", kind or "unknown"): ("error", 1, [20])}
        assert codes(report)["non_string_content"][:2] == ("error", 1)
    plain = talk([{"type": "text", "text": "What is it?"}], "A cat.")
    assert check_dataset(load_sft_dataset([*good(), plain]), tokenizer).findings == []


def test_what_says_nothing_is_passed_over(tokenizer, tmp_path, capsys):
    nothing = {
        "tool_calls": None,
        "name": "",
        "function_call": {"name": None, "arguments": None},
        "images": [],
        "x": [{}],
    }
    row = {
        "messages": [{**turn, **nothing} for turn in PAIR],
        "tools": "[]",
        "history": [],
        "label": None,
        "id": float("nan"),
    }
    more = [keyed("assistant", weight=1), keyed("assistant", train=True), keyed("user", weight=0, train=False)]
    shared = [{"role": turn["role"], "content": turn["content"], "value": turn["content"]} for turn in PAIR]
    rows = [row, *more, {"messages": shared}, *good(20)]
    data = load_sft_dataset(rows)
    assert data.column_names == ["messages"] and "not used" not in capsys.readouterr().err
    assert unused(check_dataset(rows, tokenizer)) == unused(check_dataset(data, tokenizer)) == {}


def test_late_rows_are_looked_at(tokenizer, tmp_path):
    "A key that no early row has: in a file, in a stream whose columns are settled by then, in a list."
    rows = [*good(1100), keyed("assistant", weight=0.5)]
    expected = {("key", "weight"): ("error", 1, [1100])}
    path = jsonl(tmp_path / "a.jsonl", rows)
    data, stream = load_sft_dataset(path), load_sft_dataset(path, streaming=True)
    assert data.column_names == ["messages", "unused"] and stream.column_names == ["messages"]
    assert data["unused"][:] == [None] * 1100 + [["error key weight"]]
    assert [unused(check_dataset(each, tokenizer)) for each in (data, stream, rows)] == [expected] * 3
    early = load_sft_dataset(jsonl(path, rows[::-1]), streaming=True)
    assert early.column_names == ["messages", "unused"]
    assert next(iter(early.take(1)))["unused"] == ["error key weight"]
    assert unused(check_dataset(early.take(5), tokenizer)) == {("key", "weight"): ("error", 1, [0])}


def test_what_is_not_used_travels_with_its_rows(tokenizer, tmp_path):
    import datasets

    rows = [{**row, "id": i, **({"label": False} if i % 3 == 0 else {})} for i, row in enumerate(good(30))]
    data = load_sft_dataset(rows)
    data.save_to_disk(tmp_path / "saved")
    both = data.train_test_split(test_size=10, seed=1)
    for part in (data, both["train"], both["test"], data.select(range(5, 25)), load_sft_dataset(tmp_path / "saved")):
        marked = [i for i, marks in enumerate(part["unused"]) if marks]
        report = check_dataset(part, tokenizer, min_rows=1)
        assert unused(report)["column", "label"] == ("error", len(marked), marked[:5])
        with pytest.raises(
            UserError, match="unused_column in .* rows have the column 'label', which training doesn't use"
        ):
            report.raise_for_errors()
    assert unused(check_dataset(data, tokenizer))["column", None][0] == "info"
    kept = data.filter(lambda marks: not marks, input_columns="unused")
    assert isinstance(kept, datasets.Dataset) and check_dataset(kept, tokenizer).ok and len(kept) == 20
    with pytest.raises(UserError, match=r"row 0: rows have the column 'label', .*\(unused_column\)"):
        encode_dataset(data, tokenizer)
    encoded, dropped = encode_dataset(data, tokenizer, drop_invalid=True)
    assert encoded.column_names == ["input_ids", "labels"] and dropped == [*range(0, 30, 3)]


def test_what_is_not_used_is_said_on_loading(capsys, tmp_path):
    rows = [{**keyed("user", mood="calm"), "id": 1, "split": "a"}, *good(3)]
    load_sft_dataset(rows)
    assert capsys.readouterr().err.endswith("; not used: mood (1 row); columns not used: id, split\n")
    load_sft_dataset(parquet(tmp_path / "a.parquet", [{"question": "2+2?", "answer": "4", "tools": [], "id": 1}]))
    assert capsys.readouterr().err.endswith("answer → response); columns not used: id\n")
    load_sft_dataset(jsonl(tmp_path / "a.jsonl", rows), streaming=True)
    assert "; of the first 4 rows: not used: mood (1 row); columns" in capsys.readouterr().err


def test_names_without_end_are_cut_short(tokenizer, capsys):
    rows = [{**keyed("user", **{f"key {i}": 1}), f"column {i}": 1} for i in range(150)]
    for data in (rows, load_sft_dataset(rows)):
        report = check_dataset(data, tokenizer)
        assert len(report.findings) < 20 and unused(report)["key", None] == ("warning", 150, [0, 1, 2, 3, 4])
        assert all(len(f.cause) < 2000 and f.cause.endswith("…") for f in report.findings if f.code == "unused_key")
    assert len(capsys.readouterr().err) < 3000


def test_columns_that_find_no_place(tokenizer):
    "What is read, and yet has no place in a row: an input that is no text, a second system text."
    rows = [{"instruction": f"Add {i}", "input": "", "output": "4", "system": ""} for i in range(20)]
    for row, expected in [
        ({**rows[0], "input": [2, 2]}, {("column", "input"): ("error", 1, [20])}),
        ({**rows[0], "instruction": PAIR[:1], "input": "2 2"}, {("column", "input"): ("error", 1, [20])}),
        ({**rows[0], "input": "2 2", "system": "Be brief."}, {}),
        ({**rows[0], "instruction": talk("a", "b", "One")["messages"][:2], "system": "Two"},
         {("column", "system"): ("warning", 1, [20])}),
    ]:  # fmt: skip
        assert unused(check_dataset(load_sft_dataset([*rows, row]), tokenizer)) == expected


def test_pairs_of_preferences(tokenizer):
    rows = [{"prompt": f"{i}+1?", "chosen": str(i + 1), "rejected": "no"} for i in range(20)]
    with pytest.raises(
        UserError, match="chosen, rejected are preference data: .*columns=.*--columns prompt=prompt,response=chosen"
    ):
        load_sft_dataset(rows)
    data = load_sft_dataset(rows, columns={"prompt": "prompt", "response": "chosen"})
    report = check_dataset(data, tokenizer)
    assert report.ok and unused(report) == {("column", None): ("info", 20, [])}, "the better reply was named by you"
    judged = [{"prompt": row["prompt"], "completion": row["chosen"], "rejected": "no"} for row in rows]
    assert unused(check_dataset(load_sft_dataset(judged), tokenizer))["column", "rejected"] == (
        "error",
        20,
        [0, 1, 2, 3, 4],
    )


@pytest.mark.parametrize("kind", ["Image", "List"])
def test_pictures_are_not_opened(kind, tokenizer):
    import datasets

    one = datasets.Image() if kind == "Image" else datasets.List(datasets.Image())
    picture = {"bytes": b"not a picture", "path": None}
    text = datasets.Value("string")
    features = datasets.Features({"question": text, "answer": text, "images": one})
    row = {"question": "2+2?", "answer": "4", "images": picture if kind == "Image" else [picture]}
    bare = {**row, "images": None if kind == "Image" else []}
    data = load_sft_dataset(datasets.Dataset.from_list([row, bare], features=features))
    assert unused(check_dataset(data, tokenizer))["column", "images"] == ("error", 1, [0])


# --- the system text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_system_text(streaming, tmp_path, capsys):
    rows = [talk("2+2?", THINK), talk("3+3?", "6"), talk("4+4?", THINK, "Mine")]
    path = jsonl(tmp_path / "a.jsonl", rows)

    def loaded(**settings):
        data = [*load_sft_dataset(path, streaming=streaming, **settings)]
        first = [row["messages"][0]["content"] if row["messages"][0]["role"] == "system" else None for row in data]
        return first, capsys.readouterr().err

    first, said = loaded()
    assert first == [None, None, "Mine"] and "added to" not in said, "no text is added to rows of your own"
    first, said = loaded(system=False)
    assert first == [None, None, "Mine"] and "added to" not in said
    first, said = loaded(system="Be brief.")
    assert first == ["Be brief.", "Be brief.", "Mine"] and "the system text was added to 2 rows" in said
    with_column = load_sft_dataset([{"question": "a", "answer": THINK, "system": "Own"}], system="Be brief.")
    assert turns(with_column)[0] == ("system", "Own")


def test_system_text_of_the_embedded_set(capsys):
    assert turns(load_sft_dataset(system=False, limit=1))[0][0] == "user"
    assert turns(load_sft_dataset(system="Be brief.", limit=1))[0] == ("system", "Be brief.")
    assert capsys.readouterr().err == ""
    for system in (True, " ", 3, ["Be brief."]):
        with pytest.raises(UserError, match="system is .*: give a text, False for none"):
            load_sft_dataset(system=system)


# --- other layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["USER ASSISTANT", "Human Gpt", "prompter ai", "user MODEL", " User  Assistant "])
def test_roles_in_any_case(names):
    asks, replies = names.split()
    assert (
        turns(load_sft_dataset([{"conversations": [{"from": asks, "value": "2+2?"}, {"from": replies, "value": "4"}]}]))
        == PLAIN
    )
    assert (
        turns(
            load_sft_dataset([{"conversation": [{"role": asks, "content": "2+2?"}, {"role": replies, "content": "4"}]}])
        )
        == PLAIN
    )


def test_a_role_that_is_not_known_keeps_its_name(tokenizer):
    data = load_sft_dataset([{"messages": [{"role": "Robot", "content": "2+2?"}, PAIR[1]]}])
    assert "'Robot'" in next(f.cause for f in check_dataset(data, tokenizer).findings if f.code == "bad_roles")


@pytest.mark.parametrize(
    "value, count",
    [
        ({"question": ["2+2?"] * 3, "answer": ["4"] * 3}, 3),
        ({"question": {"0": "2+2?", "1": "2+2?"}, "answer": {"0": "4", "1": "4"}}, 2),
        ({"messages": [PAIR, PAIR]}, 2),
        ({"messages": PAIR}, 1),
        ({"prompt": PAIR[:1], "completion": PAIR[1:]}, 1),
        ({"question": "2+2?", "answer": "4"}, 1),
    ],
)
def test_json_by_columns(value, count, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(value))
    data = load_sft_dataset(tmp_path / "a.json")
    assert len(data) == count and {tuple(turns(data, i)) for i in range(count)} == {tuple(PLAIN)}


def test_json_columns_of_other_lengths_are_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"question": ["2+2?"] * 3, "answer": ["4"] * 2}))
    with pytest.raises(UserError, match="columns of different lengths .question: 3, answer: 2.: make them equal"):
        load_sft_dataset(tmp_path / "a.json")


@pytest.mark.parametrize("first", ["sep=;", "SEP=;\r", '"sep=;"', "\ufeffsep=;\r", "sep=\t", "sep=|"])
def test_csv_whose_first_line_names_the_separator(first, tmp_path):
    mark = first.strip('"\r')[-1]
    text = f'{first}\nquestion{mark}answer\n2+2?{mark}"4"\n'
    (tmp_path / "a.csv").write_text(text, encoding="utf-8", newline="")
    assert simple(load_sft_dataset(tmp_path / "a.csv"))


def test_a_clone_from_the_hub(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("---\nconfigs: []\n---\n")
    for i in range(2):
        parquet(tmp_path / f"data/train-0000{i}-of-00002.parquet", good(3, start=3 * i))
    parquet(tmp_path / "data/test-00000-of-00001.parquet", good(2))
    assert load_sft_dataset(tmp_path).to_list() == good(6) and len(load_sft_dataset(tmp_path, split="test")) == 2
    with pytest.raises(UserError, match="no split 'valid' .found data/test-00000-of-00001.parquet, data/train-"):
        load_sft_dataset(tmp_path, split="valid")
    (tmp_path / "data/train-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="has only 1 of the 2 files train-…-of-00002: copy the missing ones"):
        load_sft_dataset(tmp_path)


# --- turns that are left out, replies that aren't learned, counts ----------------------------------------------------

TURN = "{{ m.role + '\n' + m.content | trim + '<|eot_id|>' }}"
TURN = "{% for m in messages %}{% if m.role in ROLES %}" + TURN + "{% endif %}{% endfor %}"
DEAF = "{{ bos_token }}" + TURN + "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"


def test_turns_that_the_template_leaves_out(tokenizer):
    "A finding for each kind of turn; `developer` is system where the template has no such role."

    def found(rows, *roles):
        report = check_dataset(rows, tokenizer, template=DEAF.replace("ROLES", str([*roles, "user", "assistant"])))
        return {
            (f.code, re.search(r"write the (\w+)", f.cause)[1]): f.rows
            for f in report.findings
            if f.severity == "error"
        }

    developer = [{"messages": [{"role": "developer", "content": "a"}, *row["messages"]]} for row in good(3)]
    tool = {"messages": [*PAIR, {"role": "tool", "content": "2+2?"}, {"role": "assistant", "content": "5"}]}
    rows = [*good(17), *developer, talk("Hm?", "So.", "Be brief."), tool]
    expected = {
        ("text_missing", "system"): [20],
        ("text_missing", "developer"): [17, 18, 19],
        ("tools_unsupported", "tool"): [21],
    }
    assert found(rows) == expected
    assert found(rows, "system") == {("tools_unsupported", "tool"): [21]}
    assert found(rows, "system", "tool", "developer") == {} == found(good())


def test_replies_that_are_not_learned(tokenizer):
    def dialogue(i, pairs):
        return {"messages": [m for j in range(pairs) for m in talk(f"{i} and {j}?", f"{i} {j}.")["messages"]]}

    rows = [*good(20), *(dialogue(i, 3) for i in range(10))]
    report = check_dataset(rows, tokenizer, train_on="last")
    finding = next(f for f in report.findings if f.code == "earlier_replies")
    assert (finding.severity, finding.count, finding.rows) == ("warning", 10, [20, 21, 22, 23, 24])
    assert "20 of 50 replies (40 %) are not" in finding.cause and "--train-on all" in finding.fix
    assert [report.summary[name] for name in ("replies", "learned_replies")] == [50, 30]
    every = check_dataset(rows, tokenizer)
    assert every.findings == [] and every.summary["learned_replies"] == 50
    assert every.summary["learned_tokens"] > report.summary["learned_tokens"]
    assert check_dataset(good(), tokenizer).findings == []


def odd_rows(draw, count):
    "Rows of all kinds, sound ones among them."
    texts = [
        "2+2?",
        "",
        " ",
        None,
        4,
        "caf\u00c3\u00a9",
        f"a{EOT}",
        "x " * 200,
        "<think>",
        THINK,
        [{"type": "image"}],
        "\ud800",
    ]
    keys = [{}, {}, {"tool_calls": CALL}, {"weight": 0}, {"name": "Kim"}, {"reasoning": "so"}]
    columns = [{}, {}, {"label": False}, {"tools": CALL}, {"id": 7}, {"history": [["a", "b"]]}]

    def row():
        roles = draw.choice(
            [["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant"] * 3, ["user"], ["robot"], []]
        )
        turns_ = [{"role": role, "content": draw.choice(texts), **draw.choice(keys)} for role in roles]
        return {"messages": draw.choice([turns_, turns_, turns_, None, "Hi"]), **draw.choice(columns)}

    return [row() if draw.random() < 0.8 else good(1, start=draw.randrange(9))[0] for _ in range(count)]


@pytest.mark.parametrize("seed", range(12))
def test_no_finding_counts_more_rows_than_there_are(seed, tokenizer):
    draw = random.Random(seed)
    rows = odd_rows(draw, draw.choice([1, 7, 40]))
    text = [{"text": draw.choice(["", " ", None, f"a{EOT}", "a\ufffd", "x " * 200, "a"])} for _ in rows]
    ids = [
        {"input_ids": draw.choice([[757, 757, 5], [5], [], [999], [757] * 90]), "labels": draw.choice([[5], [], None])}
        for _ in rows
    ]
    sources = [(rows, "drop"), (rows, "cut_prompt"), (load_sft_dataset(rows), "drop"), (text, "drop"), (ids, "drop")]
    reports = [
        check_dataset(data, tokenizer, 64, eval_data=good(5), max_steps=9, truncation=cut) for data, cut in sources
    ]
    for report in reports:
        assert report.findings and report.summary["rows"] == len(rows)
        for f in report.findings:
            assert 0 <= f.count <= len(rows) and len(f.rows) <= min(5, f.count), f
            assert len({*f.rows}) == len(f.rows) and all(0 <= i < len(rows) for i in f.rows), f
            assert f.rows == sorted(f.rows) or f.code == "length_outlier", f
            assert f.cause and f.fix, f


def test_a_row_counts_once_for_a_code(tokenizer):
    "Empty questions with empty replies, and a fault in between: 20 rows, not 35."
    rows = [talk(" ", " ", f"Be {i}.") for i in range(20)]
    assert codes(check_dataset(rows, tokenizer))["empty_content"] == ("error", 20, [0, 1, 2, 3, 4])


# --- ids and labels -------------------------------------------------------------------------------------------------


def test_encode_dataset(tokenizer):
    rows = [*good(3), talk("Hi", "x " * 300), *good(3, start=9)]
    data, dropped = encode_dataset(rows, tokenizer, 128)
    assert dropped == [3] and data.column_names == ["input_ids", "labels"] and data.cache_files == []
    kept = [row for i, row in enumerate(rows) if i != 3]
    assert data.to_list() == [encode(row["messages"], tokenizer, max_length=128) for row in kept]
    again, _ = encode_dataset(load_sft_dataset(rows), tokenizer, 128)
    assert again.to_list() == data.to_list()


def test_rows_that_keep_their_reply(tokenizer):
    rows = [*good(3), talk("Read this. " + "word " * 200 + "Why?", "Because."), talk("Hi", "x " * 300)]
    data, dropped = encode_dataset(rows, tokenizer, 128, truncation="cut_prompt")
    assert dropped == [4] and [len(ids) == 128 for ids in data["input_ids"]] == [False] * 3 + [True]
    assert data[3] == encode(rows[3]["messages"], tokenizer, max_length=128, truncation="cut_prompt")
    with pytest.raises(UserError, match="truncation is 'right'"):
        encode_dataset(rows, tokenizer, 128, truncation="right")


@pytest.mark.parametrize("kind", ["list", "data set", "stream"])
@pytest.mark.parametrize("truncation", ["drop", "cut_prompt"])
def test_a_check_hands_on_what_it_encoded(kind, truncation, tokenizer):
    document = talk("Read this. " + "word " * 200 + "Why?", "Because.")
    rows = [*good(300), document, talk("Hi", "x " * 300), *good(3, start=900)]
    data = {"list": rows, "data set": load_sft_dataset(rows), "stream": load_sft_dataset(rows, streaming=True)}[kind]
    settings = {"eval_data": good(3, start=50), "max_steps": 60, "min_rows": 500}
    checked = check_and_encode(data, tokenizer, 128, truncation=truncation, **settings)
    encoded, dropped = encode_dataset(rows, tokenizer, 128, truncation=truncation)
    assert checked.dropped == dropped and len(dropped) == (1 if truncation == "cut_prompt" else 2)
    assert checked.rows.features == encoded.features and checked.rows.to_list() == encoded.to_list()
    report = check_dataset(data, tokenizer, 128, truncation=truncation, **settings)
    assert checked.report.to_dict() == report.to_dict() and checked.report.lengths == report.lengths


def test_a_check_that_finds_errors_keeps_the_other_rows(tokenizer):
    checked = check_and_encode([talk("Hi", None), *good(2), {"messages": PAIR[:1]}], tokenizer)
    assert checked.dropped == [0, 3] and len(checked.rows) == 2 and not checked.report.ok
    assert checked.rows.to_list() == encode_dataset(good(2), tokenizer)[0].to_list()
    nothing = check_and_encode(good(3), tokenizer, 8)
    assert len(nothing.rows) == 0 and nothing.dropped == [0, 1, 2] and not nothing.report.ok
    for data in ([], [{"input_ids": [757]}], [{"text": "a"}]):
        with pytest.raises(UserError):
            check_and_encode(data, tokenizer)


def test_a_row_is_rendered_and_tokenized_once(tokenizer, monkeypatch):
    "What the template is like is asked once for all rows; of a check, 256 rows are rendered again."
    from qlora_nb import conversations, template

    rendered, tokenized = [], []
    render, tokenize = conversations.render_messages, template.tokenize_texts
    monkeypatch.setattr(
        conversations, "render_messages", lambda *args, **more: rendered.append(1) or render(*args, **more)
    )
    counted = lambda texts, *args, **more: tokenized.extend(texts) or tokenize(texts, *args, **more)  # noqa: E731
    monkeypatch.setattr(template, "tokenize_texts", counted)
    rows = load_sft_dataset(good(1000))
    by_batch = lambda data, tok: template.encode_batch(data["messages"][:], tok)  # noqa: E731
    for encode_rows in (check_and_encode, encode_dataset, by_batch):
        encode_rows(rows, tokenizer)
        decoded = 256 if encode_rows is check_and_encode else 0  # rows of the sample, which are rendered once more
        assert 0 <= len(rendered) - 1000 - decoded <= 20 and 1000 <= len(tokenized) <= 1020
        rendered.clear()
        tokenized.clear()


def test_a_check_leaves_the_tokenizer_as_it_was(tokenizer):
    other = copy.deepcopy(tokenizer)
    backend = other.backend_tokenizer
    backend.enable_padding(length=40, pad_id=other.pad_token_id, pad_token=other.pad_token, direction="left")
    backend.enable_truncation(max_length=12, stride=2)
    before = backend.to_str(), dict(vars(other)), other.chat_template
    for data in (good(), [{"text": "The number 5.<|end_of_text|>"}] * 20, encode_dataset(good(), tokenizer)[0]):
        assert check_dataset(data, other, 64).to_dict() == check_dataset(data, tokenizer, 64).to_dict()
    assert encode_dataset(good(), other, 64)[0].to_list() == encode_dataset(good(), tokenizer, 64)[0].to_list()
    assert (backend.to_str(), dict(vars(other)), other.chat_template) == before


def test_encode_dataset_errors(tokenizer):
    with pytest.raises(UserError, match="no row fits max_seq_length=8: the shortest has .* tokens, the longest"):
        encode_dataset(good(), tokenizer, 8)
    with pytest.raises(UserError, match="row 20: the last turn is the user's"):
        encode_dataset([*good(), {"messages": PAIR[:1]}], tokenizer)
    data = load_sft_dataset([{"question": "2+2?", "answer": 4}])
    with pytest.raises(UserError, match="row 0: the content of message 2 .assistant. is NoneType"):
        encode_dataset(data, tokenizer)


def test_encoding_leaves_bars_as_they_were(tokenizer, capsys):
    import datasets

    before = datasets.are_progress_bars_disabled()
    encode_dataset(good(), tokenizer)
    assert datasets.are_progress_bars_disabled() == before and capsys.readouterr().err == ""


def test_fingerprint(tmp_path):
    rows = [{"question": "2+2?", "answer": "4"}, {"question": "3+3?", "answer": "é"}]
    data = load_sft_dataset(jsonl(tmp_path / "a.jsonl", rows))
    assert data_fingerprint(data) == data_fingerprint(load_sft_dataset(rows)) == data_fingerprint(data.to_list())
    assert len(data_fingerprint(data)) == 64
    assert data_fingerprint(load_sft_dataset(rows[::-1])) != data_fingerprint(data)
    assert data_fingerprint(load_sft_dataset(EMBEDDED_DATA)) == data_fingerprint(load_sft_dataset())
