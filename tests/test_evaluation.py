"""Judging replies, intervals, perplexity, and that measuring changes nothing."""

import hashlib
import html
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_nb.core import UserError
from qlora_nb.evaluation import (
    Evaluation,
    answer_loss,
    evaluate,
    has_form,
    parse_answer,
    perplexity,
    side_by_side,
    split_reply,
    wilson,
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


# --- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("hits, n, low, high", [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662)])
def test_wilson_against_published_values(hits, n, low, high):
    "Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662."
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.quick
@given(st.integers(1, 2000), st.data())
def test_wilson_holds_the_share(n, data):
    hits = data.draw(st.integers(0, n))
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    wider = wilson(hits, n, 0.99)
    assert wider[0] <= low and high <= wider[1]


@pytest.mark.quick
@pytest.mark.parametrize("hits, n", [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses(hits, n):
    with pytest.raises(UserError):
        wilson(hits, n)


# --- the table ------------------------------------------------------------------------------------------------------


def evaluation(replies, problem="p"):
    rows = [
        {"problem": problem, "expected": "1", "reply": reply, "exact": False, "form": True, "stops": True}
        for reply in replies
    ]
    return Evaluation(exact=0.0, form=1.0, stops=1.0, base_perplexity=None, rows=rows)


@pytest.mark.quick
@given(st.text(max_size=300))
def test_any_text_fits_into_a_cell(text):
    table = side_by_side(evaluation([text]), evaluation([text]))
    assert len(table.split("\n")) == 3 and table.split("\n")[2].count("|") == 4
    assert set(re.findall(r"<[^>]*>?", table)) <= {"<br>"}
    # (str.splitlines knows more line ends than the table does)
    cell = table.split("\n")[2].split(" | ")[1].rpartition("<br>")[0]
    assert html.unescape(cell.replace("<br>", "\n")) == html.unescape(html.escape(text.replace("\r", "")))


@pytest.mark.quick
def test_table_shows_the_first_rows():
    table = side_by_side(evaluation(list("abcd")), evaluation(list("efgh")), n=2)
    assert len(table.splitlines()) == 4 and "e<br>" in table and "g<br>" not in table
    assert "x &#91;…&#93;<br>" in side_by_side(evaluation(["x" * 5000]), evaluation(["y"]))


@pytest.mark.quick
@pytest.mark.parametrize("after", [evaluation(["a", "b"]), evaluation(["a"], "q")])
def test_table_of_different_rows(after):
    with pytest.raises(UserError, match="different rows"):
        side_by_side(evaluation(["a"]), after)


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
    assert found.summary() == {"exact": None, "form": 0.5, "stops": 1.0, "base_perplexity": 2.0}
    assert found.interval("exact") is None
    assert found.interval("form") == wilson(1, 2)


@pytest.mark.quick
@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "0 held-out rows"),
        ([ROWS[0], {"messages": ROWS[0]["messages"][:1]}], "row 2"),
        ([{"messages": ROWS[0]["messages"][1:]}], "row 1"),
        ([{"messages": []}], "row 1"),
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
    assert perplexity(*exact, ROWS) == pytest.approx(math.exp(loss), rel=1e-6)


def test_perplexity_does_not_depend_on_batch_or_order(exact):
    wanted = perplexity(*exact, ROWS)
    for size in (1, 2, 5):
        assert perplexity(*exact, ROWS[::-1], batch_size=size) == pytest.approx(wanted, rel=1e-4)


def test_rows_that_do_not_fit_are_left_out(exact):
    long = row("word " * 3000, "The answer is 1.")
    assert perplexity(*exact, [*ROWS, long]) == pytest.approx(perplexity(*exact, ROWS), rel=1e-4)
    with pytest.raises(UserError, match="none of the 1 rows fits"):
        perplexity(*exact, [long])


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

    assert perplexity(Uniform(exact[0]), exact[1], ROWS) == pytest.approx(768, rel=1e-4)


def test_exact_is_none_where_nothing_is_expected(exact):
    found = evaluate(*exact, [ROWS[3]], max_new_tokens=4)
    assert found.exact is None and found.rows[0]["exact"] is None and found.base_perplexity is None
    mixed = evaluate(*exact, ROWS[3:], max_new_tokens=8)
    assert mixed.exact in (0.0, 1.0), "the row without a number does not count"


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
