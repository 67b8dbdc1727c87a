"""Judging replies, intervals, perplexity, and that measuring changes nothing."""

import copy
import hashlib
import html
import io
import itertools
import json
import math
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_nb.core import UserError, escape_controls, render_html_table
from qlora_nb.evaluation import (
    Evaluation,
    EvaluationProgress,
    answer_loss,
    before_and_after,
    bootstrap_interval,
    describe_changes,
    evaluate,
    expected_answer,
    has_form,
    measure_change,
    measure_perplexity,
    name_faster_engine,
    parse_answer,
    row_losses,
    wilson_interval,
)
from qlora_nb.forgetting import encode_general_text, load_base_rows, read_general_text
from qlora_nb.row_statistics import encode_last_replies, find_unusable_rows, split_reply, write_expected
from qlora_nb.scorers import (
    common_length,
    find_scorer,
    load_metric,
    normalise_text,
    score_contains,
    score_exact,
    score_rouge,
)


def row(question, reply):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


ROWS = [
    row("What is 3 + 4?", "The answer is 7."),
    row("Work out 12 + 30.", "The answer is 42."),
    row("Ben has 23 pens. He loses 10. How many pens does Ben have now?", "<think>\n23 - 10 = 13\n</think>\n\n13"),
    row("Hi", "Hello, how are you today? I am well, thank you."),
    row("What is 9 - 1?", "8"),
]


# --- answers and form -----------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "text, answer",
    [
        ("The answer is 7.", "7"),
        ("7.", "7"),
        ("7.0", "7"),
        ("7.50", "7.5"),
        ("1,000", "1000"),
        ("1,234,567.80", "1234567.8"),
        ("1,2", "2"),
        ("12,3456", "3456"),
        ("first 3, then 4", "4"),
        ("-3", "-3"),
        ("x = -3", "-3"),
        ("x = −3", "-3"),
        ("5-3", "3"),
        ("5 - 3", "3"),
        ("(2)-1", "1"),
        ("-0", "0"),
        ("-0.0", "0"),
        (".5", "0.5"),
        ("0.50", "0.5"),
        ("$12.00", "12"),
        ("50%", "50"),
        (r"\boxed{42}", "42"),
        ("**42**", "42"),
        ("007", "7"),
        ("no number", None),
        ("", None),
        ("<think>\n1 + 1 = 2\n</think>\n\nThe answer is 3.", "3"),
        ("<think>\n1 + 1 = 2\n</think>\n\nDone.", None),
        ("<think>\n1 + 1 = 2", "2"),
        ("<think>1</think> 2 </think> 3", "3"),
        ("it was 10, not 1</think>", None),
        ("123456789012345678901234567890.0", "123456789012345678901234567890"),
        ("٣", None),
    ],
)
def test_parse_answer(text, answer):
    assert parse_answer(text) == answer


@pytest.mark.quick
@pytest.mark.parametrize(
    "text, answer",
    [
        ("The answer is 48.", "48"),
        ("48", "48"),
        ("= 48", "48"),
        ("#### 48", "48"),
        ("####48", "48"),
        ("<think>\n2 times\n</think>\n\nThe answer is 48.", "48"),
        ("The answer is: 48 square metres.", "48"),
        ("6 * 8 = 48 apples", "48"),
        ("They drove 48 km.", "48"),
        ("It is 48.5 %", "48.5"),
        ("It costs **$1,048.00**!", "1048"),
        (r"So \[ x = \boxed{48} \]", "48"),
        (r"\boxed{48\text{ km}}", "48"),
        ("x = -48", "-48"),
        ("答案是48。", "48"),
        ("5, 6", "6"),
        ("You get it back within 30 days. I've opened ticket #48 for you.", None),
        ("You will hear from us within 30 days.", None),
        ("We are open from 9 to 5, Monday to Friday.", None),
        ("I've opened ticket #48.", None),
        ("Call us: 0800 555 0148.", None),
        ("Call 555-0148.", None),
        ("Your parcel comes at 9:48.", None),
        ("It was sent on 12/05/2048.", None),
        ("It was sent on 2048-05-12.", None),
        ("Please update to version 2.0.48.", None),
        ("Take vitamin B12.", None),
        ("You are the 48th.", None),
        ("The answer is 48, since he has eaten the others.", None),
        ("<think>\n48\n</think>\n\nDone.", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_that_an_expected_reply_ends_with(text, answer):
    assert expected_answer(text) == answer


@pytest.mark.quick
@given(st.text(alphabet=st.one_of(st.sampled_from("0123456789 .,-=#$%/<>"), st.characters()), max_size=80))
def test_what_is_wanted_is_what_is_read(text):
    assert expected_answer(text) in (None, parse_answer(text))


@pytest.mark.quick
@given(st.integers(-(10**20), 10**20), st.integers(0, 4), st.booleans())
def test_a_number_is_the_same_however_it_is_written(number, zeros, separators):
    text = f"{number:,}" if separators else str(number)
    assert parse_answer(f"<think>\n99\n</think>\n\nIt is {text}{'.' * bool(zeros)}{'0' * zeros}.") == str(number)


@pytest.mark.quick
@given(st.text(max_size=200))
def test_parse_answer_takes_any_text(text):
    found = parse_answer(text)
    assert found is None or re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", found)


@pytest.mark.quick
@pytest.mark.parametrize(
    "text, good",
    [
        ("<think>\na\n</think>\n\n2", True),
        ("<think></think>2", True),
        (" <think>a</think> 2", False),
        ("<think>a", False),
        ("<think>a</think>", False),
        ("<think>a</think> \n", False),
        ("a</think> 2", False),
        ("<think>a</think> b </think> 2", False),
        ("2", False),
        ("", False),
    ],
)
def test_has_form(text, good):
    assert has_form(text) is good


# --- scorers ---------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from("the cat sat on mat a dog".split()), max_size=30)


@pytest.mark.quick
@given(WORDS, WORDS)
def test_common_length_by_the_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert common_length(a, b) == common_length(b, a) == table[-1][-1]


@pytest.mark.quick
@given(WORDS, WORDS)
def test_rouge_is_googles(a, b):
    "Their package, where it is installed."
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    found = score_rouge(" ".join(a), " ".join(b))
    assert found is None if not b else found == pytest.approx(scorer.score(" ".join(b), " ".join(a))["rougeL"].fmeasure)


@pytest.mark.quick
@given(st.text(max_size=60))
def test_scorers_take_any_text(text):
    plain = normalise_text(text)
    assert normalise_text(plain) == plain and score_exact(text, text)
    assert score_contains(text, text) in (True, None) and score_rouge(text, text) in (1.0, None)


@pytest.mark.quick
@pytest.mark.parametrize(
    "expected, name",
    [
        (["spam", "ham"] * 8, "exact"),
        (["Spam.", "Ham."] * 8, "exact"),
        ([f"intent_{i}" for i in "abcdefghijklmnop"], "exact"),
        (["<think>\nIt sells something.\n</think>\n\nspam", "<think>\nA friend.\n</think>\n\nham"] * 4, "exact"),
        (["1", "5", "3", "4"] * 4, "number"),
        (["It is 48.", *["Thank you for your message, we will look into it."] * 4], "number"),
        (["Thank you for your message, we will look into it."] * 16, None),
        (["Thank you!", "You're welcome.", "See you soon!", "Not at all."], None),
        (["spam\nham", "ham\nspam"] * 8, None),
        ([""] * 8, None),
    ],
)
def test_the_data_choose_a_scorer(expected, name):
    found = find_scorer(None, expected)
    assert (found and found.name) == name


@pytest.mark.quick
def test_a_metric_of_hugging_faces_evaluate(monkeypatch):
    "The package isn't installed here: one that behaves as its documentation says."
    import types

    def load(name):
        if name not in ("chrf", "wer"):
            raise FileNotFoundError(name)
        compute = lambda predictions, references: {"score": 50.0, "chrf": 100.0 * (predictions == references)}  # noqa: E731
        return types.SimpleNamespace(compute=compute if name == "chrf" else lambda predictions, references: 0.25)

    monkeypatch.setitem(sys.modules, "evaluate", types.SimpleNamespace(load=load))
    score = find_scorer("evaluate:chrf", ["a"]).score
    assert (score("<think>x</think> a", "a"), score("b", "a")) == (100.0, 0.0)
    assert find_scorer("evaluate:wer", ["a"]).score("b", "a") == 0.25, "a number alone, not figures by name"
    with pytest.raises(UserError, match="evaluate can't load the metric 'chrg' .FileNotFoundError"):
        load_metric("chrg")


# --- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("hits, n, low, high", [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662)])
def test_wilson_against_published_values(hits, n, low, high):
    "Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662."
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.quick
@given(st.integers(1, 2000), st.data())
def test_wilson_holds_the_share(n, data):
    hits = data.draw(st.integers(0, n))
    low, high = wilson_interval(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    wider = wilson_interval(hits, n, 0.99)
    assert wider[0] <= low and high <= wider[1]


@pytest.mark.quick
@pytest.mark.parametrize("hits, n", [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses(hits, n):
    with pytest.raises(UserError):
        wilson_interval(hits, n)


@pytest.mark.quick
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(1, 50)), min_size=1, max_size=60))
def test_bootstrap_lies_within_the_rows(rows):
    sums, counts = zip(*rows)
    low, high = bootstrap_interval(sums, counts, draws=200)
    ratios = [a / b for a, b in rows]
    assert min(ratios) - 1e-9 <= low <= high <= max(ratios) + 1e-9
    assert (low, high) == bootstrap_interval(sums, counts, draws=200), "the same rows give the same interval"
    wider = bootstrap_interval(sums, counts, 0.99, draws=200)
    assert wider[0] <= low and high <= wider[1]


@pytest.mark.quick
def test_bootstrap_against_numpy():
    "The same statistic by another route: every draw made with numpy."
    import numpy

    chance = numpy.random.default_rng(1)
    sums, counts = chance.gamma(2, 3, 80), chance.integers(1, 30, 80)
    picks = chance.integers(0, 80, (20_000, 80))
    wanted = numpy.quantile(sums[picks].sum(1) / counts[picks].sum(1), [0.025, 0.975])
    assert bootstrap_interval(sums.tolist(), counts.tolist(), draws=20_000) == pytest.approx(wanted, rel=0.02)


@pytest.mark.quick
@pytest.mark.parametrize("sums, counts", [([], None), ([1.0], [1, 2])])
def test_bootstrap_refuses(sums, counts):
    with pytest.raises(UserError):
        bootstrap_interval(sums, counts)


# --- changes --------------------------------------------------------------------------------------------------------


def measured(losses, base=(), exact=None):
    rows = [
        {"problem": str(i), "expected": "1", "reply": "1", "exact": exact and exact[i], "form": True, "stops": True,
         "length": 3, "loss": loss, "tokens": 4 + i}
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    return Evaluation(None, 1.0, 1.0, None, rows=rows, base_losses=list(base))


@pytest.mark.quick
def test_a_change_is_paired():
    "Rows differ much, their changes little: the interval of the change is narrow."
    before = [float(i % 7) for i in range(50)]
    old, new = measured(before), measured([x + 0.1 for x in before])
    moved, low, high = measure_change(old, new, "loss")
    assert moved == pytest.approx(0.1) and high - low < 1e-9
    a, b = old.interval("loss")
    assert b - a > 0.5


@pytest.mark.quick
def test_a_change_of_perplexity_is_a_factor():
    old = measured([1.0], base=[(2.0, 10), (4.0, 20)])
    new = measured([1.0], base=[(2.0 + 10 * math.log(2), 10), (4.0 + 20 * math.log(2), 20)])
    assert measure_change(old, new, "base_perplexity") == pytest.approx((2, 2, 2))


@pytest.mark.quick
def test_changes_that_cannot_be():
    assert measure_change(measured([1.0]), measured([2.0]), "base_perplexity") is None
    with pytest.raises(UserError, match="different rows"):
        measure_change(measured([1.0]), measured([1.0, 2.0]), "loss")


@pytest.mark.quick
def test_changes_are_of_rows_that_were_judged_both_times():
    assert measure_change(measured([1.0, None]), measured([1.5, 2.0]), "loss")[0] == pytest.approx(0.5)
    assert measure_change(measured([None, 1.0]), measured([1.0, None]), "loss") is None
    old, new = measured([1.0] * 3, exact=[False, None, True]), measured([1.0] * 3, exact=[None, True, True])
    assert measure_change(old, new, "exact")[0] == 0


@pytest.mark.quick
def test_exact_changes_over_the_rows_that_have_an_answer():
    old, new = (measured([1.0] * 4, exact=[True, right, right, None]) for right in (False, True))
    assert measure_change(old, new, "exact")[0] == pytest.approx(2 / 3)


# --- the table ------------------------------------------------------------------------------------------------------


def evaluation(replies, problem="p"):
    rows = [
        {"problem": problem, "expected": "1", "reply": reply, "exact": False, "form": True, "stops": True}
        for reply in replies
    ]
    return Evaluation(exact=0.0, form=1.0, stops=1.0, base_perplexity=None, rows=rows)


@pytest.mark.quick
@given(st.text(max_size=300))
def test_any_text_fits_into_a_table(text):
    "Replies are shown in the core's table: whatever is in them, it is text there."
    table = render_html_table(("problem", "before"), [(text, f"{text}<b>")])
    assert set(re.findall(r"<[^>]*>?", table)) <= set(
        re.findall("<[^>]*>", render_html_table(("a", "b"), [("c", "d")]))
    )
    cells = re.findall("<td>(.*?)</td>", table, re.S)
    shown = escape_controls(text)
    assert [html.unescape(cell) for cell in cells] == [html.unescape(html.escape(t)) for t in (shown, f"{shown}<b>")]


@pytest.mark.quick
@pytest.mark.parametrize("after", [evaluation(["a", "b"]), evaluation(["a"], "q")])
def test_changes_between_different_rows(after):
    with pytest.raises(UserError, match="different rows"):
        measure_change(evaluation(["a"]), after, "stops")


@pytest.mark.quick
def test_evaluation_summary_and_interval():
    found = Evaluation(
        exact=None,
        form=0.5,
        stops=1.0,
        base_perplexity=2.0,
        rows=[
            {"exact": None, "form": True, "stops": True},
            {"exact": None, "form": False, "stops": True},
        ],
    )
    figures = dict.fromkeys(("loss", "perplexity", "exact", "score", "length")) | {"form": 0.5, "stops": 1.0}
    figures |= {"base_perplexity": 2.0, "rows": 2, "scorer": None, "base_text": None}
    intervals = {"form": list(wilson_interval(1, 2)), "stops": list(wilson_interval(2, 2))}
    assert found.summary() == {**figures, "intervals": intervals}
    assert list(found.summary())[:2] == ["loss", "perplexity"] and list(found.figures) == [
        "form",
        "stops",
        "base_perplexity",
    ]
    json.dumps(found.summary())
    assert found.interval("exact") is found.interval("loss") is found.interval("base_perplexity") is None
    assert found.interval("form") == wilson_interval(1, 2)


@pytest.mark.quick
@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "0 held-out rows"),
        ([ROWS[0], {"messages": ROWS[0]["messages"][:1]}], "row 1 "),
        ([{"messages": ROWS[0]["messages"][1:]}], "row 0 "),
        ([{"messages": []}], "row 0 "),
    ],
)
def test_rows_without_a_reply(rows, said):
    with pytest.raises(UserError, match=said):
        split_reply(rows)


# --- with the model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact():
    from qlora_nb.model import load_model

    return load_model("qlora_nb:embedded", load_in_4bit=False, dtype="float32", backend="transformers")


@pytest.fixture(scope="module")
def adapted():
    from qlora_nb.model import add_lora, load_model

    model, tokenizer = load_model("qlora_nb:embedded", backend="transformers")
    return add_lora(model, r=8), tokenizer


def by_hand(model, tokenizer, rows):
    "Log-likelihoods of the reply tokens, row by row with no padding; where a reply begins is found from its text."
    nats = []
    for entry in rows:
        text = tokenizer.apply_chat_template(entry["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(entry["messages"][:-1], tokenize=False, add_generation_prompt=True)
        ids, start = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, prompt))
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats.append([-float(log_p[i - 1, ids[i]]) for i in range(len(start), len(ids))])
    return nats


def test_perplexity_by_hand(exact):
    nats = by_hand(*exact, ROWS)
    tokens = [x for each in nats for x in each]
    loss, count = answer_loss(*exact, ROWS)
    assert count == len(tokens)
    assert loss == pytest.approx(sum(tokens) / len(tokens), rel=1e-4)
    of_rows = sum(sum(each) / len(each) for each in nats) / len(nats)
    assert abs(of_rows - loss) > 0.01, "these rows can't tell a mean of tokens from a mean of rows"
    assert measure_perplexity(*exact, ROWS) == pytest.approx(math.exp(loss), rel=1e-6)


def test_perplexity_does_not_depend_on_batch_or_order(exact):
    wanted = measure_perplexity(*exact, ROWS)
    for size in (1, 2, 5):
        assert measure_perplexity(*exact, ROWS[::-1], batch_size=size) == pytest.approx(wanted, rel=1e-4)


def test_rows_that_do_not_fit_are_left_out(exact):
    long = row("word " * 3000, "The answer is 1.")
    assert measure_perplexity(*exact, [*ROWS, long]) == pytest.approx(measure_perplexity(*exact, ROWS), rel=1e-4)
    with pytest.raises(UserError, match="none of the 1 rows fits"):
        measure_perplexity(*exact, [long])


def test_losses_come_in_the_order_of_the_rows(exact):
    long = row("word " * 3000, "The answer is 1.")
    found = row_losses(*exact, [ROWS[0], long, *ROWS[1:]], batch_size=2)
    assert found.pop(1) is None
    for (loss, tokens), nats in zip(found, by_hand(*exact, ROWS)):
        assert tokens == len(nats) and loss == pytest.approx(sum(nats), rel=1e-4, abs=1e-5)


def test_the_evaluation_holds_the_loss(exact):
    found = evaluate(*exact, ROWS, max_new_tokens=8, base_data=ROWS[:2])
    assert found.loss == pytest.approx(answer_loss(*exact, ROWS)[0], rel=1e-6)
    assert found.base_perplexity == pytest.approx(measure_perplexity(*exact, ROWS[:2]), rel=1e-6)
    assert found.length == sum(r["length"] for r in found.rows) / 5 and max(r["length"] for r in found.rows) <= 8
    for name in ("loss", "length", "base_perplexity", "form", "stops", "exact"):
        low, high = found.interval(name)
        assert low <= getattr(found, name) <= high
    with pytest.raises(UserError, match="0 held-out rows"):
        evaluate(*exact, [])


def test_replies_one_by_one_and_in_a_batch(exact):
    from qlora_nb.rows import load_sft_dataset

    data = load_sft_dataset(split="heldout").select(range(24))
    together, alone = (evaluate(*exact, data, max_new_tokens=64, batch_size=size) for size in (24, 1))
    for a, b in zip(together.rows, alone.rows):
        assert {**a, "loss": 0} == {**b, "loss": 0}


def test_switched_off_is_the_base(exact):
    from qlora_nb.model import add_lora, load_model

    base = evaluate(*exact, ROWS, max_new_tokens=16, base_data=ROWS)
    model, tokenizer = load_model("qlora_nb:embedded", load_in_4bit=False, dtype="float32", backend="transformers")
    model = add_lora(model, r=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before, after = before_and_after(model, tokenizer, iter(ROWS), max_new_tokens=16, base_data=ROWS)
    assert before.rows == base.rows and before.summary() == base.summary()
    assert abs(after.loss - before.loss) > 0.1
    moved, low, high = measure_change(before, after, "loss")
    assert moved == pytest.approx(after.loss - before.loss, rel=1e-5) and low <= moved <= high
    assert not any(getattr(m, "disable_adapters", False) is True for m in model.modules()), "the adapter is on again"
    with pytest.raises(UserError, match="no adapter to switch off"):
        before_and_after(*exact, ROWS)


def test_a_uniform_model_hesitates_between_all_tokens(exact):
    class Uniform(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.config, self.embed = model.config, model.get_input_embeddings()

        def get_input_embeddings(self):
            return self.embed

        def forward(self, input_ids, attention_mask):
            import types

            return types.SimpleNamespace(logits=torch.zeros(*input_ids.shape, 768))

    assert measure_perplexity(Uniform(exact[0]), exact[1], ROWS) == pytest.approx(768, rel=1e-4)


def test_exact_is_none_where_nothing_is_expected(exact):
    found = evaluate(*exact, [ROWS[3]], max_new_tokens=4)
    assert found.exact is None and found.rows[0]["exact"] is None and found.base_perplexity is None
    mixed = evaluate(*exact, ROWS[3:], max_new_tokens=8)
    assert mixed.exact in (0.0, 1.0), "the row without a number does not count"


SUPPORT = [
    row("Where is my parcel?", "It comes within 2 days. I've opened ticket #48 for you."),
    row("I want my money back.", "You get it within 30 days, in 2 parts. Ask for ticket #49 at any time."),
    row("Are you open today?", "Yes, from 9 to 5. See you!"),
    row("It is broken.", "I'm sorry! Please send it to us; call 0800 555 0148."),
    row("When was your shop built?", "In 1948."),
    row("Thank you.", "You're welcome."),
]


def test_support_replies_are_not_judged_by_their_numbers(exact):
    found = evaluate(*exact, SUPPORT, max_new_tokens=6)
    assert (found.exact, found.form, found.base_perplexity) == (None, None, None) and found.loss > 0
    assert {r["exact"] for r in found.rows} == {r["form"] for r in found.rows} == {None}, "one of six is too few"
    assert found.interval("exact") is None and measure_change(found, found, "form") is None
    assert "exact" not in repr(found) and "form" not in repr(found) and "loss" in repr(found)


def test_the_embedded_rows_are_all_judged():
    from qlora_nb.rows import load_sft_dataset

    for split, form in (("heldout", True), ("base_task", False)):
        replies = [r["messages"][-1]["content"] for r in load_sft_dataset(split=split)]
        assert [expected_answer(reply) for reply in replies] == [parse_answer(reply) for reply in replies]
        assert None not in map(expected_answer, replies) and {has_form(reply) for reply in replies} == {form}


def test_a_mixture_is_judged_where_it_can_be(exact):
    found = evaluate(*exact, [*SUPPORT, *ROWS], max_new_tokens=24)
    judged = [r for r in found.rows if r["exact"] is not None]
    assert [r["expected"] for r in judged] == [r["messages"][1]["content"] for r in [SUPPORT[4], *ROWS[:3], ROWS[4]]]
    assert found.exact == sum(r["exact"] for r in judged) / 5
    assert found.form is None, "one of eleven has the form"
    thinking = evaluate(*exact, [ROWS[2], SUPPORT[0]], max_new_tokens=8)
    assert thinking.form == 0.0 and [r["form"] for r in thinking.rows] == [False, None]


def test_shares_are_those_of_the_rows(exact):
    found = evaluate(*exact, ROWS, max_new_tokens=24)
    assert [r["problem"] for r in found.rows] == [r["messages"][0]["content"] for r in ROWS]
    assert [r["expected"] for r in found.rows] == [r["messages"][1]["content"] for r in ROWS]
    assert found.stops == sum(r["stops"] for r in found.rows) / 5
    assert found.exact == sum(r["exact"] for r in found.rows if r["exact"] is not None) / 4
    assert found.seconds > 0


def state(model):
    "Bytes of every tensor (4-bit blocks and their scales, too), and every layer's mode."
    tensors = {
        name: hashlib.sha256(t.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in model.state_dict().items()
    }
    return tensors, [(name, m.training) for name, m in model.named_modules()]


def test_evaluating_changes_nothing(adapted, capfd):
    model, tokenizer = adapted
    model.train()
    before, random = state(model), torch.get_rng_state()
    assert any("nested_absmax" in name for name in before[0])
    first = evaluate(model, tokenizer, ROWS, max_new_tokens=8, base_data=ROWS)
    assert state(model) == before
    assert torch.equal(random, torch.get_rng_state())
    again = evaluate(model, tokenizer, ROWS, max_new_tokens=8, base_data=ROWS)
    assert again.rows == first.rows and again.summary() == first.summary()
    assert capfd.readouterr() == ("", "")


def test_a_hub_data_set_is_taken(exact):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    assert evaluate(*exact, data, max_new_tokens=4).rows == evaluate(*exact, ROWS, max_new_tokens=4).rows


LABELS = [
    row(f"Classify: {text}", label) for text, label in (("win money", "spam"), ("lunch?", "ham"), ("buy now", "spam"))
]


def test_a_scorer_of_every_kind(exact):
    "One pass of replies for each; what is counted is what the rows say."
    labels = evaluate(*exact, LABELS, max_new_tokens=4)
    assert (
        labels.scorer == "exact"
        and labels.exact == 0.0
        and [r["read_expected"] for r in labels.rows] == ["spam", "ham", "spam"]
    )
    seen = []

    def own(reply, expected, found):
        seen.append((reply, expected, found))
        return None if expected == "ham" else 0.25

    found = evaluate(*exact, LABELS, max_new_tokens=4, scorer=own)
    assert (found.scorer, found.exact, found.score) == ("own", None, 0.25) and [r["score"] for r in found.rows] == [
        0.25,
        None,
        0.25,
    ]
    assert [row for *_, row in seen] == LABELS and [text for text, *_ in seen] == [r["reply"] for r in labels.rows]
    assert found.interval("score") == (0.25, 0.25) and "score (own), 2 rows" in str(found)
    with pytest.raises(UserError, match="none of the 3 expected replies ends with a number"):
        evaluate(*exact, LABELS, scorer="number")


def test_before_and_after_as_a_table(exact):
    found = evaluate(*exact, ROWS[:3], max_new_tokens=4, base_data=ROWS[:2])
    lines = describe_changes(found, found).splitlines()
    assert lines[0].split() == ["3", "held-out", "rows", "before", "after", "change"] and lines[1].startswith(
        "held-out loss"
    )
    assert max(map(len, lines)) < 100 and sum(line.endswith("none") for line in lines) == len(found.figures)
    assert f"{found.loss:#.3g}" in lines[1] and f"{found.perplexity:#.3g}" in lines[2]


def test_a_faster_engine_is_named_where_it_is_installed(exact, capfd, tmp_path, monkeypatch):
    "On a GPU, once, as the time is; it is found without an import."
    cpu, gpu = map(torch.device, ("cpu", "cuda"))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "vllm", None)  # also where it is installed
        assert name_faster_engine(gpu) is None
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise RuntimeError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    named = name_faster_engine(gpu)
    assert named.startswith("vLLM is installed") and "vllm serve" in named and name_faster_engine(cpu) is None
    seconds = itertools.count()
    monkeypatch.setattr(EvaluationProgress.__init__, "__defaults__", (None, lambda: float(next(seconds)), None))
    for device, times in ((cpu, 0), (gpu, 1)):
        monkeypatch.setattr("qlora_nb.evaluation.input_device", lambda model, device=device: device)
        evaluate(*exact, ROWS[:1], max_new_tokens=8, progress=True)
        said = capfd.readouterr().err
        assert "1 reply of at most 8 tokens: at most" in said and said.count(named) == times


def test_the_progress_of_an_evaluation(exact, capfd):
    heard = []
    from qlora_nb.generation import generate_replies

    prompts = [entry["messages"][:1] for entry in ROWS]
    replies = generate_replies(*exact, prompts, max_new_tokens=6, batch_size=2, progress=lambda *now: heard.append(now))
    done, most = zip(*heard)
    assert (
        list(done) == sorted(done)
        and all(a <= b for a, b in heard)
        and most[0] == 18
        and list(most) == sorted(most, reverse=True)
    )
    assert done[-1] == most[-1] or max(reply.tokens for reply in replies) < 6
    evaluate(*exact, ROWS[:2], max_new_tokens=4, progress=None)
    assert capfd.readouterr() == ("", ""), "a short one is silent"


@pytest.mark.quick
def test_a_terminal_gets_one_line_and_a_file_few():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, pieces in ((Terminal(), 40), (io.StringIO(), 4)):
        now = [0.0]
        with EvaluationProgress("after training", 8, 64, stream, lambda now=now: now[0]) as progress:
            for done in range(101):
                progress.count_steps(done, 100)
                now[0] += 1
        text = stream.getvalue()
        first, _, rest = text.partition("\n")
        assert first.strip() == "8 replies of at most 64 tokens, after training: at most 100 s"
        assert len(rest.split("\r" if stream.isatty() else "\n")) <= pieces * 3 and rest.count("\n") == (
            0 if stream.isatty() else 3
        )
        assert not stream.isatty() or text.rstrip(" ").endswith("\r"), "the line is cleared"


@pytest.mark.quick
def test_the_general_text_is_what_is_said_of_it():
    passages = read_general_text()
    assert len(passages) == len({row["text"] for row in passages}) == 59
    assert all(80 < len(row["text"]) < 700 or row["language"] in ("zh", "ja") for row in passages)
    for text in ("zh", "ru", "ja"):
        assert all(
            re.search("[\u0400-\u04ff\u3040-\u9fff]", row["text"]) for row in passages if row["language"] == text
        )


def test_a_model_of_some_size_reads_part_of_it_on_a_cpu(exact, monkeypatch):
    model, tokenizer = exact
    assert len(encode_general_text(tokenizer, model)) == 59
    monkeypatch.setattr(type(model), "parameters", lambda self: iter([torch.empty(3 * 10**7, device="meta")]))
    assert len(encode_general_text(tokenizer, model)) == 24


def test_base_rows_from_a_file(exact, tmp_path):
    (tmp_path / "keep.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ROWS))
    found = load_base_rows(*exact[:1], exact[1], str(tmp_path / "keep.jsonl"))
    assert len(found) == 5 and found.name.endswith("keep.jsonl")
    assert measure_perplexity(*exact, found) == pytest.approx(measure_perplexity(*exact, ROWS), rel=1e-6)


# --- rows as they are stored ------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_raw_calls_are_expected_replies_too():
    for call in (
        {"function": {"name": "rain"}},
        {"name": "rain"},
        {"type": "function", "function": {"name": "rain", "arguments": {}}},
    ):
        assert write_expected({"content": None, "tool_calls": [call]}) == '{"name": "rain", "arguments": {}}'


def stored(tokenizer):
    "A row as files hold it, the same row as training reads it, and a template that writes the tools."
    kind = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [
        {"type": "function", "function": {"name": "rain", "parameters": parameters}}
        for parameters in (json.dumps(kind), kind)
    ]
    raw, read = ({**ROWS[0], "tools": [tool]} for tool in tools)
    return (
        raw,
        read,
        "{% for t in tools or [] %}{{ t.function.name }} {{ t.function.parameters.type }}{{ t | tojson }}{% endfor %}"
        + tokenizer.chat_template,
    )


def test_stored_rows_are_evaluated_and_counted_as_they_are_trained(exact):
    "Parameters that are JSON text in the file are objects in training."
    from datasets import Dataset

    from qlora_nb.cards import measure_row_lengths
    from qlora_nb.row_statistics import count_data

    model, tokenizer = exact
    raw, read, template = stored(tokenizer)
    ids = [row.input_ids for row in encode_last_replies([raw, read], tokenizer, template=template)]
    assert ids[0] == ids[1] and "rain object" in tokenizer.decode(ids[0])
    a, b = (evaluate(model, tokenizer, [row], template=template, max_new_tokens=2) for row in (raw, read))
    assert a.rows == b.rows and len(a.rows[0]["reply"]) == len(b.rows[0]["reply"])
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    for rows in ([raw], Dataset.from_list([raw]), [read]):
        assert measure_row_lengths(rows, own) == [len(ids[0])]
        assert count_data(rows, own) == count_data([read], own)


def test_a_row_that_is_marked_as_a_bad_answer_is_not_an_expected_one(exact):
    bad = {**ROWS[1], "unused": ["error column label"]}
    fine = {**ROWS[2], "unused": ["warning column label", "info column id"]}
    found = find_unusable_rows([ROWS[0], bad, fine, {"messages": []}], exact[1])
    assert list(found) == [1, 3] and "'label'" in found[1] and "bad_roles" in found[3]
