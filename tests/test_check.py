"""The preflight: what it counts and lists, what it leaves out, what it sees of the tokenizer, what training gets."""

import copy
import io
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_nb.core import EMBEDDED_MODEL, UserError
from qlora_nb.preflight import check_and_encode, check_dataset, clean_dataset, encode_dataset
from qlora_nb.row_checks import RowChecks, find_content_faults, is_placeholder
from qlora_nb.row_statistics import DATASET_CODES, ProgressLine, RowSet, encode_conversations
from qlora_nb.rows import load_sft_dataset
from qlora_nb.schemas import iterate_conversations
from qlora_nb.template import Encoded, Encoder

pytestmark = pytest.mark.quick
EOT = "<|eot_id|>"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def talk(question="2+2?", reply="4", **keys):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply, **keys}]}


def good(count=20, start=0):
    return [talk(f"What is {i} + 1?", f"The answer is {i + 1}.") for i in range(start, start + count)]


def codes(report):
    return {f.code: (f.severity, f.count, f.rows) for f in report.findings}


# --- counts and lists -----------------------------------------------------------------------------------------------

CONTENTS = [
    "2+2?",
    "4",
    "4!",
    "",
    " ",
    None,
    7,
    "nan",
    "a\0b",
    f"no{EOT}",
    "<think>x",
    "caf\u00c3\u00a9",
    "x " * 90,
    [{"type": "image"}],
]
TURNS = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "assistant", "user", "system", "tool", "developer", "robot"]),
        "content": st.sampled_from(CONTENTS),
    },
    optional={
        name: st.sampled_from([0, 1, "a", [{"function": {"name": "f"}}]])
        for name in ("weight", "name", "mood", "images")
    },
)
ROWS = st.fixed_dictionaries(
    {"messages": st.one_of(st.lists(TURNS, max_size=6), st.just(talk()["messages"]), st.just(good(1)[0]["messages"]))},
    optional={name: st.sampled_from([0, False, 1, None]) for name in ("label", "id", "kto_tag")},
)
READY = st.fixed_dictionaries(
    {"input_ids": st.sampled_from([None, [], [757, 5, 766], [757, 757, 5], [5] * 90, [757, 999]])},
    optional={"labels": st.sampled_from([[757, 5, 766], [-100] * 3, None])},
)
TEXTS = st.fixed_dictionaries(
    {"text": st.sampled_from([None, "", "The number.", "a\0", "x " * 90, f"<|begin_of_text|>a{EOT}"])}
)


def check_numbers(report, rows):
    "Each finding counts rows, each once, and the lists are complete."
    assert report.summary["rows"] == rows
    for finding in report.findings:
        assert 0 <= finding.count <= rows and len(finding.rows) <= 5, str(finding)
        assert finding.rows == sorted(set(finding.rows)) and all(0 <= row < rows for row in finding.rows), str(finding)
        assert len(finding.rows) <= finding.count or finding.code == "dominant_answer"
    for name in ("invalid_rows", "duplicate_rows", "leaked_rows", "long_rows"):
        numbers = getattr(report, name)
        assert numbers == sorted(set(numbers)) and all(0 <= row < rows for row in numbers)
        assert json.loads(json.dumps(report.to_dict()))[name] == numbers
    out = {*report.invalid_rows, *report.leaked_rows, *report.long_rows}
    assert report.summary["usable"] == rows - len(out) == len(report.kept_rows())


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(ROWS, min_size=1, max_size=12), train_on=st.sampled_from(["all", "last"]))
def test_a_count_is_a_count_of_rows(rows, train_on, tokenizer):
    report = check_dataset(rows, tokenizer, 64, eval_data=[talk()], train_on=train_on, progress=False)
    check_numbers(report, len(rows))
    made = check_and_encode(
        rows, tokenizer, 64, eval_data=[talk()], train_on=train_on, drop_invalid=True, progress=False
    )
    assert made.numbers == sorted(made.numbers) and len(made.numbers) == len(made.rows)
    assert len({*made.numbers}) == report.summary["usable"], "usable is what training takes"
    assert made.dropped == sorted({*range(len(rows))} - {*made.numbers}) and sum(made.left_out.values()) == len(
        made.dropped
    )
    if made.numbers:
        kept = clean_dataset(rows, report, too_long=True)
        again = check_dataset(kept, tokenizer, 64, eval_data=[talk()], train_on=train_on, progress=False)
        assert again.summary["usable"] == len(kept) == again.summary["rows"], "what is left is sound"
        assert made.report.ok or {f.code for f in made.report.findings if f.severity == "error"} <= {"row_dropped"}


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rows=st.one_of(st.lists(READY, min_size=1, max_size=12), st.lists(TEXTS, min_size=1, max_size=12)))
def test_so_it_is_for_rows_that_were_made_ready(rows, tokenizer):
    check_numbers(check_dataset(rows, tokenizer, 64, progress=False), len(rows))


def test_row_sets_are_sets():
    draw = random.Random(1)
    for _ in range(50):
        numbers, more = ([draw.randrange(3000) for _ in range(draw.randrange(200))] for _ in range(2))
        rows = RowSet(numbers)
        assert [*rows] == sorted(set(numbers)) and len(rows) == len(set(numbers))
        rows.update(RowSet(more))
        assert [*rows] == sorted({*numbers, *more}) and len(rows) == len({*numbers, *more})
        assert all((n in rows) == (n in {*numbers, *more}) for n in range(3100))


def test_all_rows_are_listed_of_many(tokenizer):
    "The lists hold all of 5,000 rows, the findings five, and the report's memory a few bits of each."
    rows = [talk(f"{i}?", "" if i % 2 else "Yes, it is.") for i in range(2500)] * 2
    report = check_dataset(rows, tokenizer, eval_data=rows[:200:2])
    assert report.invalid_rows == [*range(1, 5000, 2)] and report.duplicate_rows == [*range(2500, 5000)]
    assert report.leaked_rows == sorted([*range(0, 200, 2), *range(2500, 2700, 2)])
    assert codes(report)["empty_content"] == ("error", 2500, [1, 3, 5, 7, 9])
    assert sum(len(rows.bits) for rows in report.sets.values()) <= 4 * 5000 // 8
    assert report.kept_rows(duplicates=True) == [*range(200, 2500, 2)]


def test_a_label_that_is_a_class_makes_no_row_invalid(tokenizer):
    "0 and 1 may be a verdict; beside 2 and 3 they are classes, and the rows with 0 are as good as the others."
    rows = [{**row, "label": i % 4} for i, row in enumerate(good())]
    report = check_dataset(rows, tokenizer)
    assert report.ok and report.invalid_rows == [] and report.summary["usable"] == 20
    judged = check_dataset([{**row, "label": i % 2} for i, row in enumerate(good())], tokenizer)
    assert judged.invalid_rows == [*range(0, 20, 2)] and judged.summary["usable"] == 10


# --- from finding to fix --------------------------------------------------------------------------------------------


def broken():
    "Twenty sound rows, and one of each kind that may be left out."
    return [
        *good(),
        talk("Hi", ""),
        talk("What is 3 + 1?", "The answer is 4."),
        talk("Leak?", "Yes."),
        talk("Long?", "x " * 200),
    ]


@pytest.mark.parametrize("kind", ["list", "conversations", "data set", "loaded", "stream"])
def test_a_cleaned_set_is_sound(kind, tokenizer):
    from datasets import Dataset

    rows = broken()
    numbered = [{**row, "id": i} for i, row in enumerate(rows)]
    data = {
        "list": rows, "conversations": [row["messages"] for row in rows], "data set": Dataset.from_list(numbered),
        "loaded": load_sft_dataset(rows), "stream": load_sft_dataset(rows, streaming=True),
    }[kind]  # fmt: skip
    held_out = [talk("leak", "No.")]
    report = check_dataset(data, tokenizer, 64, eval_data=held_out)
    assert [report.invalid_rows, report.duplicate_rows, report.leaked_rows, report.long_rows] == [
        [20],
        [21],
        [22],
        [23],
    ]
    assert report.summary["usable"] == 21 and not report.ok
    cleaned = clean_dataset(data, report)
    left = [row if isinstance(row, list) else row["messages"] for row in cleaned]
    assert left == [rows[i]["messages"] for i in [*range(20), 21, 23]]
    again = check_dataset(cleaned, tokenizer, 64, eval_data=held_out)
    assert again.ok and again.summary["usable"] == 21 and again.duplicate_rows == [20]
    strict = clean_dataset(data, report, duplicates=True, too_long=True)
    left = check_dataset(strict, tokenizer, 64, eval_data=held_out)
    assert {f.severity for f in left.findings} <= {"info"} and left.summary["usable"] == 20
    kept = clean_dataset(data, report, invalid=False, leaks=False)
    assert check_dataset(kept, tokenizer, 64, eval_data=held_out).to_dict()["findings"] == report.to_dict()["findings"]


def test_a_stream_keeps_the_marks_of_its_late_rows(tokenizer, tmp_path):
    rows = [*good(150), talk("Hi", ""), {**talk("Late?", "Yes."), "label": False}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_sft_dataset(path, streaming=True)
    report = check_dataset(data, tokenizer)
    assert report.invalid_rows == [150, 151]
    half = clean_dataset(data, report, invalid=False)
    assert check_dataset(half, tokenizer).invalid_rows == [150, 151]
    assert check_dataset(clean_dataset(data, report), tokenizer).ok


def test_a_stream_keeps_the_keys_of_its_late_rows(tokenizer, tmp_path):
    calls = [
        [{"type": "function", "function": {"name": "f", "arguments": found}}]
        for found in ({"a": 1, "b": None}, {"a": 1})
    ]
    rows = [*good(150), *[talk("Late?", "", tool_calls=call) for call in calls]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_sft_dataset(path, streaming=True)
    for late in (data, clean_dataset(data, check_dataset(data, tokenizer), invalid=False)):
        assert check_dataset(late, tokenizer).duplicate_rows == []
        found = [row.messages[1].get("tool_calls") for batch in iterate_conversations(late) for row in batch]
        assert [call["function"]["arguments"] for found in found[150:] for call in found] == [
            {"a": 1, "b": None},
            {"a": 1},
        ]
    assert [*encode_conversations(data, tokenizer, drop_invalid=True).faulty] == [150, 151], "the template has no calls"


def test_what_can_not_be_cleaned(tokenizer):
    rows = broken()
    report = check_dataset(rows, tokenizer, 64)
    with pytest.raises(UserError, match="the report is for 24 rows, but the data has 20"):
        clean_dataset(good(), report)
    with pytest.raises(UserError, match="an iterator, which the check has used up"):
        clean_dataset(iter(rows), report)
    with pytest.raises(UserError, match="none of 2 rows is left"):
        clean_dataset(rows[20:21] * 2, check_dataset(rows[20:21] * 2, tokenizer))


def test_training_leaves_out_what_it_is_told_to(tokenizer):
    rows, held_out = broken(), [talk("leak", "No.")]
    how = {"eval_data": held_out}
    plain = check_and_encode(rows, tokenizer, 64, **how)
    assert not plain.report.ok and plain.dropped == [23] and plain.left_out == {"too_long": 1}
    valid = check_and_encode(rows, tokenizer, 64, **how, drop_invalid=True)
    assert valid.left_out == {"invalid": 1, "leaked": 1, "too_long": 1} and valid.dropped == [20, 22, 23]
    assert valid.report.ok and len(valid.rows) == valid.report.summary["usable"] == 21
    forgiven = {f.code: f for f in valid.report.findings if f.code in ("empty_content", "leakage")}
    assert {f.severity for f in forgiven.values()} == {"warning"} and all(
        "--drop-invalid" in f.fix for f in forgiven.values()
    )
    severities = ["error", "warning", "info"]
    assert [f.severity for f in valid.report.findings] == sorted(
        (f.severity for f in valid.report.findings), key=severities.index
    )
    both = check_and_encode(rows, tokenizer, 64, **how, drop_invalid=True, drop_duplicates=True)
    assert both.left_out["duplicate"] == 1 and both.numbers == [*range(20)]
    assert both.rows.to_list() == encode_dataset(good(), tokenizer, 64)[0].to_list()
    nothing = check_and_encode([talk("Hi", "")] * 3, tokenizer, drop_invalid=True)
    assert len(nothing.rows) == 0 and not nothing.report.ok, "with nothing left, the cause stays an error"


def test_only_repetitions_that_are_left_out_count(tokenizer):
    rows = [*good(), *good(2), *[talk("Long?", "x " * 200)] * 2]
    kept = check_and_encode(rows, tokenizer, 64)
    assert kept.left_out == {"too_long": 2} and kept.report.summary["usable"] == len(kept.rows) == 22
    once = check_and_encode(rows, tokenizer, 64, drop_duplicates=True, max_steps=8)
    assert once.left_out == {"duplicate": 3, "too_long": 1} and once.report.summary["usable"] == len(once.rows) == 20
    assert "too_few_rows" in codes(once.report) and "too_few_rows" not in codes(
        check_dataset(rows, tokenizer, 64, max_steps=8)
    )


def test_a_row_with_an_error_is_no_original(tokenizer):
    rows = [
        *good(),
        {**talk("So?", "Yes."), "label": False},
        {**talk("So?", "Yes."), "label": True},
        talk("So?", "Yes."),
    ]
    found = check_and_encode(rows, tokenizer, drop_invalid=True, drop_duplicates=True)
    assert found.numbers == [*range(20), 21] and found.left_out == {"invalid": 1, "duplicate": 1}
    ready = [{"input_ids": [757, 5, 766], "labels": labels} for labels in ([-100] * 3, [-100, 5, 766], [-100, 5, 766])]
    assert check_dataset(ready, tokenizer).duplicate_rows == [2]


def test_what_follows_the_last_learned_reply_is_not_rendered(tokenizer):
    alternating = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
        "<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
    )
    rows = [*good(), {"messages": [*talk()["messages"], {"role": "assistant", "content": "5", "weight": 0}]}]
    report = check_dataset(rows, tokenizer, template=alternating)
    assert report.invalid_rows == [20] and "bad_roles" in codes(report)
    assert check_and_encode(rows, tokenizer, template=alternating).numbers == [*range(21)]


def test_long_conversations_are_encoded_a_few_at_a_time(tokenizer, monkeypatch):
    sizes, encode = [], Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, rows, *more: sizes.append(len(rows)) or encode(self, rows, *more)
    )
    rows = [{"messages": talk("x " * 150, "y " * 150)["messages"] * 60}] * 4 + good(5)
    checked, plain = check_and_encode(rows, tokenizer, 64), encode_conversations(rows, tokenizer, 64)
    assert sizes == [1, 1, 1, 6] * 2 and checked.numbers == plain.numbers == [*range(4, 9)]


def test_rows_are_faulty_at_any_length(tokenizer):
    rows, how = broken(), {"eval_data": [talk("leak", "No.")], "drop_invalid": True}
    for size in (32, 64, 2048):
        assert [*check_and_encode(rows, tokenizer, size, **how).faulty] == [20, 22]
        assert [*check_and_encode(rows, tokenizer, size, **how, drop_duplicates=True).faulty] == [20, 21, 22]
        unchecked = encode_conversations([*good(3), rows[23], {"messages": []}], tokenizer, size, drop_invalid=True)
        assert [*unchecked.faulty] == [4]
    assert [*check_and_encode(rows, tokenizer, 64).faulty] == []


def test_rows_that_can_not_be_used_are_left_out_unchecked(tokenizer):
    rows = [*good(3), {"messages": talk()["messages"][:1]}, talk("Long?", "x " * 200)]
    with pytest.raises(
        UserError, match=r"row 3: .*check_dataset \(qlora_nb check\).*drop_invalid=True \(--drop-invalid\)"
    ):
        encode_dataset(rows, tokenizer, 64)
    data, dropped = encode_dataset(rows, tokenizer, 64, drop_invalid=True)
    assert len(data) == 3 and dropped == [3, 4]
    found = encode_conversations(rows, tokenizer, 64, drop_invalid=True)
    assert found.numbers == [0, 1, 2] and found.left_out == {"invalid": 1, "too_long": 1} and found.report is None
    with pytest.raises(UserError, match="none of 1 row can be used"):
        encode_dataset(rows[3:4], tokenizer, drop_invalid=True)


def test_a_conversation_may_become_several_rows(tokenizer, monkeypatch):
    "Each of its rows is kept with its number, fits or not by itself, and counts as one row of the data."

    class Several:
        planner = Encoder(tokenizer).planner

        def __init__(self, *args, **more):
            pass

        def encode(self, rows, max_seq_length=None, tools=None):
            def piece(size, parts=()):
                ids = [757, *[5] * (size - 2), 766]
                return Encoded(ids, ids, length=size, learned=size, replies=1 + len(parts), parts=parts)

            return [piece(10 * len(row), tuple(piece(10 * n) for n in range(2, len(row), 2))) for row in rows]

    for module in ("row_checks", "row_statistics"):
        monkeypatch.setattr(f"qlora_nb.{module}.Encoder", Several)
    long = [m for row in good(3, start=50) for m in row["messages"]]
    rows = [*good(20), {"messages": long}, {"messages": long[:4]}, {"messages": long * 3}]
    made = check_and_encode(rows, tokenizer, 45)
    assert made.numbers == [*range(20), 20, 20, 21, 21, *[22] * 2] and made.dropped == []
    assert [len(ids) for ids in made.rows["input_ids"][20:]] == [20, 40, 40, 20, 20, 40]
    check_numbers(made.report, 23)
    assert codes(made.report)["too_long"] == ("warning", 2, [20, 22]) and made.report.long_rows == []
    assert made.report.summary["usable"] == 23 and made.report.summary["encoded_rows"] == 26
    assert [made.report.summary[name] for name in ("replies", "learned_replies")] == [34, 26]
    assert encode_conversations(rows, tokenizer, 45).numbers == made.numbers
    short = check_and_encode(rows, tokenizer, 19)
    assert short.dropped == [*range(23)] and short.report.summary["usable"] == 0


# --- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["nan", "NaN", "None", " null\n", "N/A", "n/a", "<NA>", "NaT", "undefined", "<think>\nHm\n</think>\n\nNone"]
)
def test_missing_values_are_no_answers(text, tokenizer):
    assert codes(check_dataset([*good(), talk("Hi", text)], tokenizer))["placeholder_reply"] == ("error", 1, [20])
    assert codes(check_dataset([*good(), talk(text, "Ho")], tokenizer))["placeholder_reply"] == ("warning", 1, [20])
    assert check_dataset([*good(), talk("Hi", text)], tokenizer).invalid_rows == [20]


@pytest.mark.parametrize(
    "text",
    ["None.", "Nan is a name", "none", "Null and void", "NA", "Nancy", "The result is null", "nan " * 20, "-", "0"],
)
def test_answers_that_look_like_it(text):
    assert not is_placeholder(text)


def test_turns_without_words():
    "A reply that calls a tool needs none; one that isn't learned is no error; a tool may return null."
    special = RowChecks.__init__.__globals__["re"].compile("<eot>")

    def faults(*turns):
        return [(code, severity) for code, severity, _ in find_content_faults([*turns], special)]

    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    assert faults(call, {"role": "tool", "content": "null"}) == []
    assert faults({"role": "assistant", "content": "", "weight": 0}) == [("empty_content", "warning")]
    assert faults({"role": "assistant", "content": "nan", "weight": 0}) == [("placeholder_reply", "warning")]
    hidden = {**call, "tool_calls": [{"function": {"name": "f", "arguments": {"a": "<eot>"}}}]}
    assert faults(hidden) == [("special_token_in_content", "error")]
    assert faults({"role": "assistant", "content": "4", "reasoning_content": "<eot>"}) == [
        ("special_token_in_content", "error")
    ]


def test_other_keys_and_columns_are_listed_once(tokenizer):
    rows = [
        {"messages": [{**turn, f"key{i % 3}": i + 1} for turn in row["messages"]], f"column{i % 2}": 1}
        for i, row in enumerate(good())
    ]
    found = [f for f in check_dataset(rows, tokenizer).findings if f.code.startswith("unused")]
    assert sorted((f.code, f.count) for f in found) == [("unused_column", 20), ("unused_key", 20)]
    causes = " ".join(f.cause for f in found)
    assert all(causes.count(name) == 1 for name in ("key0", "key1", "key2", "column0", "column1"))


def test_every_code_is_told_in_words():
    for code, (severity, fix) in DATASET_CODES.items():
        assert severity in ("error", "warning", "info") and len(fix) > 20, code
        for argument, flag in [
            ("drop_invalid", "--drop-invalid"),
            ("drop_duplicates", "--drop-duplicates"),
            ("eval_data", "--eval-data"),
        ]:
            assert (argument in fix) == (flag in fix), f"{code} names {argument} for one kind of reader alone"


# --- tokenizers -----------------------------------------------------------------------------------------------------


def normalized(tokenizer, normalizer):
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.normalizer = normalizer
    return other


def test_a_tokenizer_that_changes_the_text_is_found(tokenizer):
    from tokenizers import Regex, normalizers

    rows = [talk(f"Is Café {i}²  open?", f"Yes, it is open at {i}.") for i in range(30)]
    for normalizer, lost in [
        (normalizers.Replace(" ", ""), "blanks"), (normalizers.Replace(Regex(" +"), " "), "blanks"),
        (normalizers.Lowercase(), "capital letters"),
        (normalizers.NFKC(), "'²'"), (normalizers.StripAccents(), "'é'"),
        (normalizers.Replace(Regex("[^\x00-\x7f]"), ""), "'é²'"),
    ]:  # fmt: skip
        if lost == "'é'":
            normalizer = normalizers.Sequence([normalizers.NFD(), normalizer])
        report = check_dataset(rows, normalized(tokenizer, normalizer), eval_data=None)
        finding = next(f for f in report.findings if f.code == "tokenizer_changes_text")
        assert (finding.severity, finding.count, finding.rows) == (
            "error",
            30,
            [0, 1, 2, 3, 4],
        ) and lost in finding.cause
        assert report.invalid_rows == [], "it is the tokenizer's fault, and no row's"
        assert not check_and_encode(rows, normalized(tokenizer, normalizer), drop_invalid=True).report.ok


def test_a_tokenizer_that_keeps_the_text_is_not_accused(tokenizer):
    "Composed accents are the same text, and so is white space that belongs to a control token."
    from tokenizers import AddedToken, normalizers

    rows = [talk(f"Cafe\u0301 {i}\n\n  \u00e4\u0323 \U0001f642?", f" नमस्ते {i}\t\n") for i in range(30)]
    greedy = copy.deepcopy(tokenizer)
    greedy.add_special_tokens({"eos_token": AddedToken(EOT, rstrip=True, lstrip=True, normalized=False, special=True)})
    for other in (
        tokenizer,
        normalized(tokenizer, normalizers.NFC()),
        normalized(tokenizer, normalizers.NFD()),
        greedy,
    ):
        assert "tokenizer_changes_text" not in codes(check_dataset(rows, other))


def test_late_rows_and_rare_shapes_are_decoded(tokenizer):
    from tokenizers import normalizers

    lower = normalized(tokenizer, normalizers.Replace("Q", ""))
    rare = {"messages": [{"role": "system", "content": "Answer Quickly."}, *talk("Hi", "Ho")["messages"]]}
    plain = [talk(f"what is {i}?", "it is that.") for i in range(2000)]
    report = check_dataset([*plain, rare], lower)
    assert codes(report)["tokenizer_changes_text"] == ("warning", 1, [2000]), (
        "a shape of its own is looked at; few rows, a warning"
    )
    half = [*plain[:1000], *(talk(f"Quick: {i}?", "it is.") for i in range(1000))]
    for data in (half, iter(half)):
        severity, count, rows = codes(check_dataset(data, lower))["tokenizer_changes_text"]
        assert severity == "error" and count > 20 and all(row >= 1000 for row in rows)


def test_characters_that_a_tokenizer_does_not_know():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "▁user", "▁bot", "▁Hi", "▁Ho"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    small = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    small.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ ('user ' if m.role == 'user' else 'bot ') + m.content + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'bot' }}{% endif %}"
    )
    sound = [talk("Hi", "Ho")] * 20
    assert "tokenizer_changes_text" not in codes(check_dataset(sound, small)), "SentencePiece's blanks are no loss"
    report = check_dataset([*sound, talk("Hi", "Ho é")], small)
    [unknown] = [f for f in report.findings if f.code == "tokenizer_changes_text"]
    assert (
        unknown.rows == [20]
        and unknown.severity == "error"
        and "<unk>" in unknown.cause
        and report.invalid_rows == [20]
    )


def test_padding_that_ends_no_turn_is_no_fault(tokenizer):
    "`<|end_of_text|>` is known as an end of turn; as padding it matters where the template writes it, or as EOS."
    other = copy.deepcopy(tokenizer)
    other.pad_token = "<|end_of_text|>"
    assert other.pad_token_id not in (other.eos_token_id, None) and check_dataset(good(), other).findings == []
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    finding = check_dataset(good(), same).findings[0]
    assert finding.code == "pad_is_eos" and any(repr(token) in finding.fix for token in tokenizer.added_tokens_encoder)
    ends = other.chat_template.replace(EOT, "<|end_of_text|>")
    assert "pad_is_eos" in codes(check_dataset(good(), other, template=ends))


def test_more_tokens_than_the_embedding_has_rows(tokenizer):
    "One that no row uses is no error, one that a row uses is: in messages, ids and text."
    extra = copy.deepcopy(tokenizer)
    extra.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    extra.add_tokens(["quokka"])
    config = type("Config", (), {"text_config": type("Text", (), {"vocab_size": len(tokenizer)})})
    report = check_dataset(good(), extra, model=config)
    assert [(f.code, f.severity) for f in report.findings] == [("tokenizer_too_large", "info")]
    assert "no row holds one" in report.findings[0].cause and "<image_soft_token>" in report.findings[0].cause
    report = check_dataset([*good(), talk("What is a quokka?", "An animal.")], extra, model=config)
    assert codes(report) == {"tokenizer_too_large": ("error", 1, [20])} and report.invalid_rows == [20]
    assert "'quokka'" in report.findings[0].cause
    texts = [{"text": f"Number {i}.<|end_of_text|>"} for i in range(20)]
    assert "tokenizer_too_large" in codes(
        check_dataset([*texts, {"text": "quokka<|end_of_text|>"}], extra, model=config)
    )


# --- progress -------------------------------------------------------------------------------------------------------


def test_progress(tokenizer, capsys):
    seen = []
    check_dataset(good(600), tokenizer, progress=lambda done, total: seen.append((done, total)))
    check_dataset(iter(good(300)), tokenizer, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(250, 600), (500, 600), (600, 600), (250, None), (300, None)]
    check_dataset(good(600), tokenizer)
    assert capsys.readouterr() == ("", ""), "a short check says nothing"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_line(terminal):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    now, stream = [0.0], Stream()
    line = ProgressLine(stream=stream, clock=lambda: now[0])
    for now[0] in range(100):
        line(now[0] * 10, None if now[0] < 50 else 1000)
    line.close()
    text = stream.getvalue()
    if terminal:
        assert "\n" not in text and text.endswith("\r") and text.count("\r") == 98 + 2
        assert max(map(len, text.split("\r"))) < 80
    else:
        assert text == "300 rows checked\n600 of 1,000 rows checked (60 %)\n900 of 1,000 rows checked (90 %)\n"


def test_unchecked_rows_keep_no_error_of_their_own(tokenizer):
    "What check_dataset calls invalid is not learned without the check, either."
    turns = talk()["messages"]
    odd = [
        ("unused_column", {**talk(), "label": False}),
        ("unused_column", {**talk(), "image": "a.png"}),
        ("unused_key", talk(weight=0.5)),
        ("unused_key", talk(tool_calls=[{"function": 4}])),
        ("unused_part", {"messages": [{**turns[0], "content": [{"type": "image_url", "image_url": "x"}]}, turns[1]]}),
        ("bad_roles", {"messages": [*turns, turns[1]]}),
    ]
    rows = [*good(16), *(row for _, row in odd)]
    assert check_dataset(rows, tokenizer, progress=False).invalid_rows == [*range(16, 22)]
    assert encode_dataset(rows, tokenizer, drop_invalid=True)[1] == [*range(16, 22)]
    found = encode_conversations(rows, tokenizer, drop_invalid=True)
    assert found.left_out == {"invalid": 6} and [*found.faulty] == [*range(16, 22)]
    for code, row in odd:
        code = "non_string_content" if code == "unused_part" else code
        with pytest.raises(UserError, match=rf"row 16: .*\({code}\); check_dataset .*drop_invalid=True"):
            encode_dataset([*good(16), row], tokenizer)
    with pytest.raises(UserError, match="none of 1 row can be used"):
        encode_dataset([odd[0][1]], tokenizer, drop_invalid=True)


def test_unchecked_labels_that_are_classes_judge_no_reply(tokenizer, tmp_path):
    rows = [{**row, "label": i % 3} for i, row in enumerate(good(18))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for data in (rows, load_sft_dataset(str(tmp_path / "rows.jsonl"))):
        assert check_dataset(data, tokenizer, progress=False).invalid_rows == []
        assert encode_dataset(data, tokenizer)[1] == encode_dataset(data, tokenizer, drop_invalid=True)[1] == []
    assert encode_dataset([row for row in rows if row["label"] < 2], tokenizer, drop_invalid=True)[1] == [
        *range(0, 12, 2)
    ]


def test_marks_of_a_stream_s_late_rows_count_unchecked(tokenizer, tmp_path):
    rows = [*good(120), {**talk(), "image": "a.png"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stream = load_sft_dataset(str(tmp_path / "rows.jsonl"), streaming=True)
    assert encode_dataset(stream, tokenizer, drop_invalid=True)[1] == [120]
