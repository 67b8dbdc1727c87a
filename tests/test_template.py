"""Ids, labels and stop tokens: equal to the tokenizer's own, exact, and never cut."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import examples

from qlora_nb.chat_templates import (
    CHAT_TEMPLATES,
    TEMPLATE_DATE,
    adds_bos,
    stop_tokens,
    template_text,
    tokenize_texts,
    turn_end,
)
from qlora_nb.core import EMBEDDED_MODEL, UserError
from qlora_nb.template import SYSTEM_PROMPT, Encoder, encode, encode_batch, prompt_ids, render, template_fingerprint

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer)


@pytest.fixture(scope="module")
def chatml(tokenizer):
    "A tokenizer that also has ChatML's tokens."
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return other


def chat(*contents, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def learned(row):
    return [label for label in row["labels"] if label != -100]


# --- random conversations -------------------------------------------------------------------------------------------

ODD = ["\n\nHi\n", " x", "<think>\n1\n</think>\n\n2", "a {b} {{ c }} {% d %}", "é🙂\u200b"]
contents = st.text(max_size=60) | st.sampled_from(ODD)
conversations = st.builds(
    lambda pairs, system: chat(*(text for pair in pairs for text in pair), system=system),
    st.lists(st.tuples(contents, contents.filter(str.strip)), min_size=1, max_size=3),
    st.none() | contents,
)


@pytest.mark.parametrize("template", [None, "llama-3.1", "chatml", "embedded"])
@settings(max_examples=examples(200), deadline=None)
@given(messages=conversations)
def test_random_conversations(tokenizer, chatml, template, messages):
    tok = chatml if template == "chatml" else tokenizer
    end = "<|im_end|>" if template == "chatml" else "<|eot_id|>"
    text = template_text(tok, template)
    row = encode(messages, tok, template=template, max_length=10**6)
    own = tok.apply_chat_template(messages, chat_template=text, date_string=TEMPLATE_DATE)["input_ids"]
    assert row["input_ids"] == own
    assert own.count(tok.bos_token_id) == 1 and own[0] == tok.bos_token_id
    assert tok.decode(own) == render(messages, tok, template)
    assert tok.decode(learned(row)) == messages[-1]["content"].strip() + end
    prompt = prompt_ids(messages[:-1], tok, template)
    assert own[: len(prompt)] == prompt
    covered = [i for i, label in enumerate(row["labels"]) if label != -100]
    assert covered == list(range(len(prompt), covered[-1] + 1)), "labels are not one span right after the prompt"
    assert [own[i] for i in covered] == learned(row) and len(row["labels"]) == len(own)
    every = encode(messages, tok, template=template, max_length=10**6, train_on="all")
    replies = [m["content"].strip() + end for m in messages if m["role"] == "assistant"]
    assert tok.decode(learned(every)) == "".join(replies) and every["input_ids"] == own


def test_a_batch_is_the_same_as_one_by_one(tokenizer):
    rows = [chat(f"What is {i} + 1?", str(i + 1), system=SYSTEM_PROMPT if i % 2 else None) for i in range(20)]
    for messages, row in zip(rows, encode_batch(rows, tokenizer)):
        assert encode(messages, tokenizer) == {"input_ids": row.input_ids, "labels": row.labels}


# --- length ---------------------------------------------------------------------------------------------------------


def test_a_row_that_does_not_fit_is_none(tokenizer):
    messages = chat("Hi", "word " * 50)
    size = len(encode(messages, tokenizer)["input_ids"])
    assert encode(messages, tokenizer, max_length=size) is not None
    assert encode(messages, tokenizer, max_length=size - 1) is None


def test_the_middle_of_the_prompt_is_cut(tokenizer):
    system = "You are brief."
    messages = chat("first " + "word " * 80 + "last?", "The answer is 5.", system=system)
    whole = encode(messages, tokenizer, max_length=9999)
    for size in (90, 120, len(whole["input_ids"]) - 1):
        row = encode(messages, tokenizer, max_length=size, truncation="cut_prompt")
        assert len(row["input_ids"]) == len(row["labels"]) == size and learned(row) == learned(whole)
        text = tokenizer.decode(row["input_ids"])
        assert text.startswith(f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>")
        assert "user<|end_header_id|>\n\nfirst word" in text and "\n[…]\n" in text and "last?<|eot_id|>" in text
        assert all(a in (-100, b) for a, b in zip(row["labels"], row["input_ids"]))
    assert encode(messages, tokenizer, max_length=9999, truncation="cut_prompt") == whole
    assert encode(messages, tokenizer, max_length=50, truncation="cut_prompt") is None
    long_reply = chat("word " * 80, "word " * 80)
    assert encode(long_reply, tokenizer, max_length=120, truncation="cut_prompt") is None
    with pytest.raises(UserError, match="truncation is 'left': choose 'drop' or 'cut_prompt'"):
        encode(long_reply, tokenizer, truncation="left")


def test_a_huge_row_is_not_tokenized(tokenizer):
    row = encode_batch([chat("Hi", "many words " * 200_000)], tokenizer, max_seq_length=2048)[0]
    assert row.code == "too_long" and row.input_ids is None and row.length > 400_000
    assert encode(chat("Hi", "many words " * 200_000), tokenizer) is None


PIECES = ["<|eot_id|>", "<|end_header_id|>", "\n\n", "\n", " ", "12", "ab"]
parts = st.lists(st.text(max_size=8) | st.sampled_from(PIECES), max_size=8)


@settings(max_examples=examples(300), deadline=None)
@given(left=parts, right=parts)
def test_counting_a_prefix_is_tokenizing_it(tokenizer, encoder, left, right):
    "The short way, by the last control token, says what tokenizing the prefix says."
    prefix, whole = "".join(left), "".join(left + right)
    ids, own = tokenize_texts([whole, prefix], tokenizer)
    expected = len(own) if ids[: len(own)] == own else None
    assert encoder.count_prefix(prefix, whole, ids) == expected


# --- what can't be encoded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages, words",
    [
        ([], "no messages"),
        (None, "no messages"),
        ("Hi", "no messages"),
        (["Hi"], "message 1 has no role"),
        ([{"content": "Hi"}], "message 1 has no role"),
        (chat("Hi"), "the last turn is the user's"),
        (chat("Hi", "Ho", "Again"), "the last turn is the user's"),
        ([{"role": "assistant", "content": "Hi"}], "nothing before"),
        (chat("Hi", None), r"message 2 \(assistant\) is NoneType"),
        (chat(4, "four"), r"message 1 \(user\) is int"),
        (chat("Hi", ["a", "b"]), "is list, not text"),
        (chat("Hi", "\ud800"), "lone surrogate"),
    ],
)
def test_unusable_messages(tokenizer, messages, words):
    with pytest.raises(UserError, match=words):
        encode(messages, tokenizer)


def test_missing_content_never_becomes_the_word_none(tokenizer):
    with pytest.raises(UserError, match="NoneType"):
        render(chat("Hi", None), tokenizer)
    with pytest.raises(UserError, match="NoneType"):
        prompt_ids(chat(None), tokenizer)


def test_prompt_ids_wants_an_open_question(tokenizer):
    with pytest.raises(UserError, match="ends with the assistant's turn"):
        prompt_ids(chat("Hi", "Ho"), tokenizer)


def test_train_on(tokenizer):
    with pytest.raises(UserError, match="choose 'last' or 'all'"):
        encode(chat("Hi", "Ho"), tokenizer, train_on="first")


# --- templates ------------------------------------------------------------------------------------------------------


def test_no_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template: name one with template= .llama-3.1, chatml"):
        encode(chat("Hi", "Ho"), bare)
    assert encode(chat("Hi", "Ho"), bare, template="llama-3.1")["input_ids"][0] == bare.bos_token_id


def test_unknown_template_and_missing_tokens(tokenizer):
    with pytest.raises(UserError, match="no template 'llama-4'"):
        render(chat("Hi"), tokenizer, "llama-4")
    with pytest.raises(UserError, match="needs the token <.im_end.>"):
        render(chat("Hi"), tokenizer, "chatml")


@pytest.mark.parametrize(
    "template, code",
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.content }}", "template_refused"),
        ("{{ raise_exception('roles must alternate') }}", "template_refused"),
        ("{{ bos_token }}{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", "no_end_of_turn"),
        ("{{ bos_token }}{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}", "no_end_of_turn"),
        (  # the reply stands before the question
            "{{ bos_token }}{% for m in messages | reverse %}{{ m.content + '<|eot_id|>' }}{% endfor %}",
            "prompt_not_prefix",
        ),
        (  # the generation prompt opens the reasoning, the row doesn't
            "{% for m in messages %}{{ m.role + '\n' + m.content + '<|eot_id|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant\n<think>\n' }}{% endif %}",
            "generation_prompt_mismatch",
        ),
        (  # a reply is never asked for
            "{{ bos_token }}{% for m in messages %}{{ m.role + '\n' + m.content + '<|eot_id|>' }}{% endfor %}",
            "generation_prompt_mismatch",
        ),
        (  # the whole conversation is counted before its first turn
            "{{ messages | length }}{% for m in messages %}{{ m.role + '\n' + m.content + '<|eot_id|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}",
            "prompt_not_prefix",
        ),
    ],
)
def test_bad_templates(tokenizer, template, code):
    assert encode_batch([chat("What?", "That.")], tokenizer, template=template)[0].code == code
    cure = "use another template" if code in ("no_end_of_turn", "generation_prompt_mismatch") else "fix these messages"
    with pytest.raises(UserError, match=rf"\({code}\): {cure}"):
        encode(chat("What?", "That."), tokenizer, template=template)


def test_reasoning_that_a_template_drops(tokenizer):
    "As DeepSeek-R1's template does it in every turn, and Qwen3's in all but the last."
    content = "m.content.split('</think>')[-1] if m.role == 'assistant' {} else m.content"
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + '\n' + (CONTENT) + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    reply = "<think>\nhm\n</think>\n\n4"
    always = template.replace("CONTENT", content.format(""))
    assert encode_batch([chat("2+2?", reply)], tokenizer, template=always)[0].changed
    older = template.replace("CONTENT", content.format("and not loop.last"))
    row = encode_batch([chat("2+2?", reply)], tokenizer, template=older)[0]
    assert not row.changed and row.code is None
    both = [chat("2+2?", reply, "3+3?", reply)]
    assert encode_batch(both, tokenizer, template=older)[0].code is None
    assert encode_batch(both, tokenizer, template=older, train_on="all")[0].code == "prompt_not_prefix"


def test_an_empty_reasoning_before_a_reply_is_no_change(tokenizer):
    "As Qwen3's template says that a reply doesn't reason; Qwen3.5's prompt begins the reasoning."
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + '\\n' + (CONTENT) + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
    )
    says = template.replace("CONTENT", "('<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' else '') + m.content")
    opens = template.replace("CONTENT", "m.content").replace("{{ 'assistant\\n' }}", "{{ 'assistant\\n<think>\\n' }}")
    reasons = "<think>\nHm.\n</think>\n\n4"
    for text, reply, changed in [
        (says, "4", False),
        (opens, reasons, False),
        (says.replace("m.content", "'No'"), "4", True),
    ]:
        row = encode_batch([chat("2+2?", reply)], tokenizer, template=text)[0]
        assert (row.changed, row.code) == (changed, None)


# As Qwen's templates pass over `developer`, Phi's over `tool` too; Llama's quotes what tools return.
SOME_ROLES = """{{ bos_token }}{% for m in messages %}
{%- if m.role in ['system', 'user', 'assistant'] %}{{ m.role + '\\n' + m.content | trim + '<|eot_id|>' }}
{%- elif m.role == 'ipython' %}{{ 'tool\\n' + m.content | tojson + '<|eot_id|>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"""


@pytest.mark.parametrize("text", ["a", "Be brief.", "assistant", "2+2?"])
def test_turns_that_a_template_leaves_out(tokenizer, text):
    "Also a text that stands elsewhere: what counts is whether the template writes the turn."
    rows = [[{"role": role, "content": text}, *chat(" 2+2?\n", "4")] for role in ("developer", "system")]
    rows.append([*chat("2+2?", "I'll look."), {"role": "tool", "content": text}, *chat("Well?", "4")[1:]])
    found = encode_batch(rows, tokenizer, template=SOME_ROLES)
    assert [row.left_out for row in found] == [("developer",), (), ("tool",)]
    assert [row.code for row in found] == [None] * 3 and not any(row.altered or row.changed for row in found)


def test_quoted_turns_are_not_altered(tokenizer):
    rows = [[*chat("2+2?", "I'll look."), {"role": "ipython", "content": '{"is": "é 4"}\n'}, *chat("Well?", "4")[1:]]]
    row = encode_batch(rows, tokenizer, template=SOME_ROLES)[0]
    assert (row.left_out, row.altered, row.code) == ((), (), None)


def test_turns_that_a_template_alters(tokenizer):
    shouts = SOME_ROLES.replace("m.content | trim", "(m.content | upper if m.role == 'user' else m.content)")
    row = encode_batch([chat("What?", "So.", "Why?", "It is.")], tokenizer, template=shouts)[0]
    assert (row.left_out, row.altered, row.changed) == ((), ("user", "user"), False)
    drops = SOME_ROLES.replace("m.content | trim", "m.content.split('</think>')[-1] | trim")
    row = encode_batch([chat("What?", "<think>\nHm.\n</think>\n\nSo.", "Why?", "It is.")], tokenizer, template=drops)[0]
    assert (row.left_out, row.altered, row.changed) == ((), ("assistant",), False)


@pytest.mark.parametrize("template", [None, "llama-3.1", "chatml", "embedded"])
def test_our_templates_leave_nothing_out(tokenizer, chatml, template):
    rows = [chat(" a\n\nb ", "c", 'd "e"', " f\n", system=" s\n"), chat("a", "<think>\n1\n</think>\n\n2")]
    for row in encode_batch(rows, chatml if template == "chatml" else tokenizer, template=template):
        assert (row.left_out, row.altered, row.changed, row.code) == ((), (), False, None)


def test_a_reply_that_melts_with_the_header_is_found(chatml):
    "ChatML without trimming: the header's newline and the reply's become one token."
    template = CHAT_TEMPLATES["chatml"].replace(" | trim", "")
    assert encode_batch([chat("Hi", "\nHo")], chatml, template=template)[0].code == "prompt_not_prefix"
    assert encode_batch([chat("Hi", "\nHo")], chatml, template="chatml")[0].code is None


def test_the_date_does_not_move(tokenizer):
    dated = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    assert render(chat("Hi"), tokenizer, dated) == TEMPLATE_DATE
    text = render(chat("Hi", system=" Be brief. "), tokenizer, "llama-3.1")
    assert f"Today Date: {TEMPLATE_DATE}\n\nBe brief.<|eot_id|>" in text


def test_llama_template_to_the_letter(tokenizer):
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    date = "Today Date: 26 Jul 2024\n\n<|eot_id|>"
    turns = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert render(chat(" Hi\n"), tokenizer, "llama-3.1", add_generation_prompt=True) == head + date + turns
    assert render(chat("Hi", "Ho "), tokenizer, "llama-3.1") == head + date + turns + "Ho<|eot_id|>"


def test_system_prompt():
    assert SYSTEM_PROMPT == (
        "Reflect before you answer: think it through thoroughly, step by step, between <think> and </think>, "
        "then state the answer."
    )


# --- stop tokens and fingerprint ------------------------------------------------------------------------------------


class FakeModel:
    def __init__(self, eos):
        self.generation_config = type("Config", (), {"eos_token_id": eos})()


def test_stop_tokens(tokenizer, chatml):
    names = tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer))
    assert set(names) == {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}
    assert chatml.convert_tokens_to_ids("<|im_end|>") in stop_tokens(chatml)
    known = stop_tokens(tokenizer)
    assert stop_tokens(tokenizer, FakeModel([5, 7])) == sorted({5, 7, *known})
    assert stop_tokens(tokenizer, FakeModel(5)) == sorted({5, *known})
    assert stop_tokens(tokenizer, FakeModel(None)) == stop_tokens(tokenizer, object()) == known


def test_the_end_of_turn_is_what_the_template_writes(tokenizer, chatml):
    assert tokenizer.decode([turn_end(tokenizer)]) == "<|eot_id|>"
    assert chatml.decode([turn_end(chatml, "chatml")]) == "<|im_end|>"
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|no one knows this|>"], special_tokens=True)
    other.chat_template = tokenizer.chat_template.replace("<|eot_id|>", "<|no one knows this|>")
    row = encode(chat("Hi", "Ho"), other)
    assert other.decode(learned(row)) == "Ho<|no one knows this|>" and turn_end(other) in stop_tokens(other)
    assert turn_end(tokenizer, CHAT_TEMPLATES["embedded"].replace("<|eot_id|>", "\n")) is None
    other.chat_template = None
    assert turn_end(other) is None


def test_the_callers_tokenizer_is_not_changed(tokenizer):
    "What a caller has set of padding, truncation and special tokens matters to no id, and stays set."
    other = copy.deepcopy(tokenizer)
    backend = other.backend_tokenizer
    backend.enable_padding(length=40, pad_id=other.pad_token_id, pad_token=other.pad_token, direction="left")
    backend.enable_truncation(max_length=5, stride=1)
    backend.encode_special_tokens = True
    before = backend.to_str(), dict(vars(other)), other.chat_template
    found = []
    for tok in (tokenizer, other):
        rows = encode_batch([chat("What?", "That."), chat("a" * 300, "word " * 40)], tok)
        cut = encode(chat("word " * 80, "Yes."), tok, max_length=60, truncation="cut_prompt")
        asked = prompt_ids(chat("Hi"), tok), prompt_ids(chat("Hi"), tok, "llama-3.1")
        ends = stop_tokens(tok), turn_end(tok), adds_bos(tok), template_fingerprint(tok)
        found.append((rows, cut, asked, ends, tokenize_texts(["Hi<|eot_id|>"], tok, add_special_tokens=True)))
    assert found[0] == found[1]
    assert (backend.to_str(), dict(vars(other)), other.chat_template) == before and backend.encode_special_tokens


def test_an_unknown_token_does_not_stop(tokenizer):
    "Where a vocabulary has an unknown token, names that it lacks must not become its id."
    other = copy.deepcopy(tokenizer)
    other.unk_token = "<|reserved_special_token_0|>"
    assert other.unk_token_id not in stop_tokens(other)


def test_fingerprint(tokenizer):
    own = template_fingerprint(tokenizer)
    assert own == template_fingerprint(copy.deepcopy(tokenizer)) != template_fingerprint(tokenizer, "llama-3.1")
    assert own == template_fingerprint(tokenizer, tokenizer.chat_template)
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|end_of_text|>"
    assert template_fingerprint(other) != own
