"""Ids, labels and stop tokens: equal to the tokenizer's own, exact, and never cut."""

import copy
import json
import random

import pytest
import real_templates
from hypothesis import given, settings
from hypothesis import strategies as st
from made_conversations import Maker, lost_words
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
    row = encode(messages, tok, template=template, max_length=10**6, train_on="last")
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


TOOL_TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"""

PIECES = ["<|eot_id|>", "<|end_header_id|>", "\n\n", "\n", " ", "12", "ab"]
parts = st.lists(st.text(max_size=8) | st.sampled_from(PIECES), max_size=8)


@settings(max_examples=examples(300), deadline=None)
@given(left=parts, right=parts)
def test_counting_a_prefix_is_tokenizing_it(tokenizer, encoder, left, right):
    "The short way, by the last control token, says what tokenizing the prefix says."
    prefix, whole = "".join(left), "".join(left + right)
    ids, own = tokenize_texts([whole, prefix], tokenizer)
    expected = len(own) if ids[: len(own)] == own else None
    assert encoder.count_prefix(len(prefix), whole, ids) == expected


def test_the_work_for_a_row_does_not_grow_with_the_square_of_its_turns(tokenizer, monkeypatch):
    "Control tokens are looked for once, prompts aren't copied, one more text says which turns are written."
    encoder, searched, rendered = Encoder(tokenizer, TOOL_TEMPLATE), [], []
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "5"}]
    messages = [*chat("2 + 3?"), *(turns * 30), *chat("", "It is 5.")[1:]]
    assert encoder.encode([messages[:3] + messages[-1:]])[0].replies == 2, "now all is probed"
    find, render = encoder._find_anchor, encoder.planner.render
    monkeypatch.setattr(encoder, "_find_anchor", lambda *args: searched.append(args[0]) or find(*args))
    monkeypatch.setattr(
        encoder.planner, "render", lambda *args, **kwargs: rendered.append(1) or render(*args, **kwargs)
    )
    (row,) = encoder.encode([messages])
    assert (row.code, row.replies) == (None, 31) and searched == ["<|eot_id|>"]
    assert len(rendered) == 2 * 31 + 1, "each prompt, each reply, and one more"
    (part,) = encoder.planner.plan(chat(*"abcd"))
    assert [reply.prompt for _, reply in part.replies] == [part.text[: reply.asked] for _, reply in part.replies]
    assert not any("prompt" in vars(reply) for _, reply in part.replies)


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
        (  # the assistant's header stands there whether asked for or not, as in the first template of Llama 3
            "{{ bos_token }}{% for m in messages %}{{ m.role + '\n\n' + m.content + '<|eot_id|>' }}{% endfor %}"
            "{{ 'assistant\n\n' }}",
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


# It drops the reasoning of all replies but the last.
DROPS_EARLIER = """{{ bos_token }}{% for m in messages %}
{{- m.role + '\n' + (m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1]) + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"""


def test_reasoning_that_a_template_drops(tokenizer):
    "As DeepSeek-R1's template does it in every turn, and Qwen3's in all but the last."
    content = "m.content.split('</think>')[-1] if m.role == 'assistant' {} else m.content"
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + '\n' + (CONTENT) + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    reply = "<think>\nhm\n</think>\n\n4"
    always = template.replace("CONTENT", content.format(""))
    row = encode_batch([chat("2+2?", reply)], tokenizer, template=always)[0]
    assert row.code is None and tokenizer.decode([i for i in row.labels if i != -100]) == reply + "<|eot_id|>"
    short = template.replace("CONTENT", "m.content[-1:] if m.role == 'assistant' else m.content")  # it names no tag
    row = encode_batch([chat("2+2?", reply)], tokenizer, template=short)[0]
    assert (row.code, row.missing) == ("text_missing", ("reasoning of assistant turn 2",))
    older = template.replace("CONTENT", content.format("and not loop.last"))
    row = encode_batch([chat("2+2?", reply)], tokenizer, template=older)[0]
    assert (row.code, row.missing, row.parts) == (None, (), ())
    both = [chat("2+2?", reply, "3+3?", reply.replace("4", "6"))]
    row = encode_batch(both, tokenizer, template=older, train_on="last")[0]
    assert (row.code, row.replies, row.parts) == (None, 1, ())
    row = encode_batch(both, tokenizer, template=older)[0]
    texts = [tokenizer.decode([label for label in one.labels if label != -100]) for one in (row, *row.parts)]
    assert texts == ["<think>\nhm\n</think>\n\n6<|eot_id|>", reply + "<|eot_id|>"] and row.replies == 2
    assert tokenizer.decode(row.input_ids).count("hm") == 1, (
        "the first reply stands in the second's row without its reasoning"
    )


def test_earlier_replies_are_kept_where_the_last_does_not_fit(tokenizer):
    messages = chat("a", "<think>\nhm\n</think>\n\n4", "b", "<think>\nso\n</think>\n\n6", "c", "7", "d", "no " * 90)
    settings = {"template": DROPS_EARLIER}
    row = encode(messages, tokenizer, **settings)
    sizes = [len(one["input_ids"]) for one in (row, *row["parts"])]
    assert len(sizes) == 3 and sizes[0] > max(sizes[1:])
    few = encode(messages, tokenizer, max_seq_length=max(sizes[1:]), **settings)
    assert few == {**row["parts"][0], "parts": row["parts"][1:]}
    assert encode(messages, tokenizer, max_seq_length=min(sizes), **settings) == min(
        row["parts"], key=lambda one: len(one["input_ids"])
    )
    assert encode(messages, tokenizer, max_seq_length=min(sizes) - 1, **settings) is None


def test_an_empty_reasoning_before_a_reply_is_no_change(tokenizer):
    "As Qwen3's template says that a reply doesn't reason; Qwen3.5's prompt begins the reasoning."
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + '\\n' + (CONTENT) + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
    )
    says = template.replace("CONTENT", "('<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' else '') + m.content")
    opens = template.replace("CONTENT", "m.content").replace("{{ 'assistant\\n' }}", "{{ 'assistant\\n<think>\\n' }}")
    reasons = "<think>\nHm.\n</think>\n\n4"
    for text, reply, code, empty in [
        (says, "4", None, True),
        (opens, reasons, None, False),
        (opens, "4", None, True),
        (says.replace("m.content", "'No'"), "4", "text_missing", False),
    ]:
        row = encode_batch([chat("2+2?", reply)], tokenizer, template=text)[0]
        assert (row.code, row.empty_reasoning) == (code, empty)


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
    assert [(row.code, row.missing) for row in found] == [(None, ())] * 3, "they go by the names that it has"
    assert "system\n" + text in tokenizer.decode(found[0].input_ids) and found[0].input_ids == found[1].input_ids
    assert f'tool\n"{text}"' in tokenizer.decode(found[2].input_ids)
    only = SOME_ROLES.replace("'ipython'", "'python'").replace("'system', ", "")
    found = encode_batch(rows, tokenizer, template=only)
    assert [row.missing for row in found] == [("developer turn 1",), ("system turn 1",), ("tool turn 3",)]
    assert [row.code for row in found] == ["text_missing", "text_missing", "tools_unsupported"]
    assert not any(row.input_ids for row in found)
    assert found[0].why.endswith("the developer turn 1: put that text at the beginning of the first user turn")


def test_quoted_turns_are_not_altered(tokenizer):
    rows = [[*chat("2+2?", "I'll look."), {"role": "ipython", "content": '{"is": "é 4"}\n'}, *chat("Well?", "4")[1:]]]
    row = encode_batch(rows, tokenizer, template=SOME_ROLES)[0]
    assert (row.missing, row.code) == ((), None)


def test_turns_that_a_template_alters(tokenizer):
    shouts = SOME_ROLES.replace("m.content | trim", "(m.content | upper if m.role == 'user' else m.content)")
    row = encode_batch([chat("What?", "So.", "Why?", "It is.")], tokenizer, template=shouts)[0]
    assert (row.missing, row.code) == (("user turn 1", "user turn 3"), "text_missing")
    assert "user turn 1, user turn 3" in row.why
    drops = SOME_ROLES.replace("m.content | trim", "m.content.split('</think>')[-1] | trim")
    row = encode_batch(
        [chat("What?", "<think>\nHm.\n</think>\n\nSo.", "Why?", "It is.")], tokenizer, template=drops, train_on="last"
    )[0]
    assert (row.missing, row.code) == ((), None), "an earlier reply, as the template has it"


@pytest.mark.parametrize("template", [None, "llama-3.1", "chatml", "embedded"])
def test_our_templates_leave_nothing_out(tokenizer, chatml, template):
    rows = [chat(" a\n\nb ", "c", 'd "e"', " f\n", system=" s\n"), chat("a", "<think>\n1\n</think>\n\n2")]
    for row in encode_batch(rows, chatml if template == "chatml" else tokenizer, template=template):
        assert (row.missing, row.code) == ((), None)


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


# --- tools ----------------------------------------------------------------------------------------------------------

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 'é "3"'}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RETURNED = {"role": "tool", "tool_call_id": "call_1", "content": '{"sum": 5}'}
ASKED = [{"role": "user", "content": "2+3?"}, CALLED, RETURNED, {"role": "assistant", "content": "Five."}]
# A template with calls: %s is how it writes one (`f` is the function), and what stands for its turn.
TOOLS = """{{ bos_token }}{% for t in tools or [] %}{{ 'tools\n' + t | tojson + '<|eot_id|>' }}{% endfor %}
{%- for m in messages %}{{ m.role + '\n' }}
{%- if m.tool_calls %}{% for c in m.tool_calls %}{% set f = c.function %}CALL{% endfor %}
{%- else %}{{ m.content }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"""
AS_JSON = "{{ '{\"name\": \"' + f.name + '\", \"arguments\": ' + (f.arguments | tojson) + '}' }}"
WRITTEN = {"a": 2, "b": 'é "3"'}


def rows_of(found):
    return [found, *found.parts]


def learned_texts(tokenizer, found):
    return [tokenizer.decode([label for label in row.labels if label != -100]) for row in rows_of(found)]


def encoded(messages, tokenizer, template, tools=None, **settings):
    (found,) = encode_batch([messages], tokenizer, template=template, tools=[tools], **settings)
    return found


@pytest.mark.parametrize(
    "writes, call",
    [
        (AS_JSON, '{"name": "add", "arguments": {"a": 2, "b": "é \\"3\\""}}'),  # an object is wanted
        ("{{ '<' + f.name + '>' + f.arguments + '</>' }}", '<add>{"a": 2, "b": "é \\"3\\""}</>'),  # JSON text
        (
            "{{ f.name }}{% for k, v in f.arguments.items() %}{{ ' ' + k + '=' + v | string }}{% endfor %}",
            'add a=2 b=é "3"',
        ),
        (
            "{% if m.content is none %}" + AS_JSON + "{% endif %}",
            '{"name": "add", "arguments": {"a": 2, "b": "é \\"3\\""}}',
        ),
        (
            "{% if 'content' not in m %}" + AS_JSON + "{% endif %}",
            '{"name": "add", "arguments": {"a": 2, "b": "é \\"3\\""}}',
        ),
    ],
)
@pytest.mark.parametrize("given", ["object", "text"])
def test_a_call_is_written_as_the_template_wants_it(tokenizer, writes, call, given):
    arguments = WRITTEN if given == "object" else json.dumps(WRITTEN)
    asked = copy.deepcopy(ASKED)
    asked[1]["tool_calls"][0]["function"]["arguments"] = arguments
    before = copy.deepcopy(asked)
    found = encoded(asked, tokenizer, TOOLS.replace("CALL", writes), [ADD])
    assert (found.code, found.why, found.replies) == (None, None, 2)
    assert learned_texts(tokenizer, found) == [f"{call}<|eot_id|>Five.<|eot_id|>"], "calls are learned, results aren't"
    text = tokenizer.decode(found.input_ids)
    assert text.startswith("<|begin_of_text|>tools\n" + json.dumps(ADD)) and 'tool\n{"sum": 5}<|eot_id|>' in text
    assert asked == before, "the row isn't touched"


def test_empty_fields_and_a_missing_content_change_nothing(tokenizer):
    template = TOOLS.replace("CALL", AS_JSON)
    nulls = [{"name": None, "tool_calls": None, "reasoning_content": None, **turn} for turn in ASKED]
    absent = [{key: value for key, value in turn.items() if value != ""} for turn in ASKED]
    none = [{**turn, "content": turn["content"] or None} for turn in ASKED]
    wanted = encoded(ASKED, tokenizer, template)
    assert wanted.code is None and all(encoded(turns, tokenizer, template) == wanted for turns in (nulls, absent, none))
    assert encode(ASKED, tokenizer, template=template)["labels"] == wanted.labels
    prompt = prompt_ids(ASKED[:3], tokenizer, template)
    assert wanted.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    "change, turns, tools, why",
    [
        (lambda t: t.replace(AS_JSON, ""), ASKED, None, "doesn't write the call of add in assistant turn 2"),
        (
            lambda t: t.replace("tools or []", "[]"),
            ASKED[:1] + ASKED[3:],
            [ADD],
            "doesn't write the tool add: choose a template",
        ),
        (
            lambda t: t.replace("m.content }}", "m.content if m.role != 'tool' }}"),
            ASKED,
            None,
            "doesn't write the tool turn 3",
        ),
        (
            lambda t: t,
            [ASKED[0], {**CALLED, "content": "Let's see."}, *ASKED[2:]],
            None,
            "the text beside the call of assistant turn 2",
        ),
        (
            lambda t: (
                "{% for m in messages if m.tool_calls | length > 1 %}{{ raise_exception('one at a time') }}{% endfor %}"
                + t
            ),
            [ASKED[0], {**CALLED, "tool_calls": [CALL, CALL]}, *ASKED[2:]],
            None,
            "can't write the several calls of one turn of this conversation: one at a time",
        ),
        (
            lambda t: t.replace("{% set f", "{{ raise_exception('nine letters') if c.id | length != 9 }}{% set f"),
            ASKED,
            None,
            "can't write the tool calls, tool turns of this conversation: nine letters",
        ),
        (
            lambda t: t.replace("{{ '<|eot_id|>' }}", "{{ '<|eot_id|>' if not m.tool_calls }}"),
            ASKED,
            None,
            "no end-of-turn token",
        ),
    ],
)
def test_what_a_template_has_not_of_tools_is_refused_by_name(tokenizer, change, turns, tools, why):
    template = change(TOOLS.replace("CALL", AS_JSON)).replace(
        "m.role != 'tool' }}", "m.role in ['user', 'assistant'] }}"
    )
    found = encoded(turns, tokenizer, template, tools)
    assert found.code == "tools_unsupported" and why in found.why and found.input_ids is None
    with pytest.raises(UserError, match="tools_unsupported"):
        encode(turns, tokenizer, template=template, tools=tools)


def test_our_templates_refuse_calls_by_name(tokenizer, chatml):
    for template in (None, "llama-3.1", "chatml", "embedded"):
        found = encoded(ASKED, chatml if template == "chatml" else tokenizer, template, [ADD])
        assert found.code == "tools_unsupported" and "call of add in assistant turn 2, tool add" in found.why


@pytest.mark.parametrize("calls", ["add", [{"function": {}}], [{"function": {"name": "add", "arguments": 4}}], [4]])
def test_calls_that_are_none(tokenizer, calls):
    found = encoded([ASKED[0], {**CALLED, "tool_calls": calls}], tokenizer, None)
    assert found.code == "tools_unsupported" and "message 2 (assistant) are not a list of functions" in found.why


# --- reasoning ------------------------------------------------------------------------------------------------------

THOUGHT = {"role": "assistant", "content": "5", "reasoning_content": "Two, three."}
BLOCK = "<think>\nTwo, three.\n</think>\n\n5"
# `W` writes a reply's turn, `P` ends the generation prompt.
THINKS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ':' }}"
    "{% if m.role == 'assistant' %}W{% else %}{{ m.content }}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' + P }}{% endif %}"
)
KEEPS = "{{ m.content }}"
DROPS = "{{ m.content.split('</think>')[-1].strip() }}"
BY_KEY = "{{ '[' + m.KEY + ']' + m.content if m.KEY else m.content }}"


def thinking(writes, prompt="''"):
    return THINKS.replace("W", writes).replace("P", prompt)


@pytest.mark.parametrize(
    "template, text, empty",
    [
        (thinking(KEEPS), BLOCK, "5"),
        (thinking(BY_KEY.replace("KEY", "reasoning_content")), "[Two, three.]5", "5"),
        (thinking(BY_KEY.replace("KEY", "thinking")), "[Two, three.]5", "5"),
        (thinking(BY_KEY.replace("KEY", "reasoning")), "[Two, three.]5", "5"),
        (thinking(DROPS), BLOCK, "5"),
        (thinking(DROPS, "'<think>\n'"), BLOCK.removeprefix("<think>\n"), "\n</think>\n\n5"),
        (thinking(KEEPS, "'<think>\n'"), BLOCK.removeprefix("<think>\n"), "\n</think>\n\n5"),
        (thinking(KEEPS, "'<think>'"), BLOCK.removeprefix("<think>"), "\n</think>\n\n5"),
        (  # as GLM's does
            thinking("{{ '<think>' + (m.reasoning_content or '') + '</think>' + m.content }}", "'<think>'"),
            "Two, three.</think>5",
            "</think>5",
        ),
    ],
)
def test_reasoning_is_learned_where_the_template_has_it(tokenizer, template, text, empty):
    for turn in (THOUGHT, {"role": "assistant", "content": BLOCK}):
        found = encoded([*chat("2+3?"), turn], tokenizer, template)
        assert (found.code, found.empty_reasoning) == (None, False)
        assert learned_texts(tokenizer, found) == [text + "<|eot_id|>"]
        prompt = prompt_ids(chat("2+3?"), tokenizer, template)
        assert found.input_ids[: len(prompt)] == prompt and set(found.labels[: len(prompt)]) == {-100}
    found = encoded(chat("2+3?", "5"), tokenizer, template)
    assert learned_texts(tokenizer, found) == [empty + "<|eot_id|>"] and found.empty_reasoning == (empty != "5")


SWITCH = thinking(KEEPS, "('<think>\n' if enable_thinking | default(false) else '<think>\n\n</think>\n\n')")


def test_a_prompt_with_an_empty_block(tokenizer):
    found = encoded(chat("2+3?", "5"), tokenizer, SWITCH)
    assert (found.code, found.empty_reasoning) == (None, False) and learned_texts(tokenizer, found) == ["5<|eot_id|>"]
    assert tokenizer.decode(found.input_ids).endswith("<think>\n\n</think>\n\n5<|eot_id|>")
    thought = [*chat("2+3?"), THOUGHT]
    found = encoded(thought, tokenizer, SWITCH)
    assert found.code == "generation_prompt_mismatch"
    assert (
        'give template_kwargs={"enable_thinking": True} (--template-kwargs \'{"enable_thinking": true}\')' in found.why
    )
    found = encoded(thought, tokenizer, SWITCH, template_kwargs={"enable_thinking": True})
    assert learned_texts(tokenizer, found) == [BLOCK.removeprefix("<think>\n") + "<|eot_id|>"]


def test_a_template_kwarg_reaches_every_text(tokenizer):
    dated = "{{ date_string }} {{ mood | default('') }}" + thinking(KEEPS)
    kwargs = {"mood": "glad", "date_string": "today"}
    assert render(chat("Hi"), tokenizer, dated, template_kwargs=kwargs).startswith("today glad")
    for ids in (
        prompt_ids(chat("Hi"), tokenizer, dated, template_kwargs=kwargs),
        encode(chat("Hi", "Ho"), tokenizer, template=dated, template_kwargs=kwargs)["input_ids"],
    ):
        assert tokenizer.decode(ids).startswith("today glad")
    own = template_fingerprint(tokenizer, dated)
    assert own == template_fingerprint(tokenizer, dated, {}) != template_fingerprint(tokenizer, dated, kwargs)


# --- several replies ------------------------------------------------------------------------------------------------


def test_a_reply_with_weight_0_is_read_and_not_learned(tokenizer):
    turns = chat("2+3?", "6", "Sure?", "5", "Thanks", "Bye")
    for weights, texts in (
        ((0, 1, 1), "5<|eot_id|>Bye<|eot_id|>"),
        ((1, 0, 1), "6<|eot_id|>Bye<|eot_id|>"),
        ((1, 1, 0), "6<|eot_id|>5<|eot_id|>"),
    ):
        rows = [{**turn, "weight": weights[i // 2]} if i % 2 else turn for i, turn in enumerate(turns)]
        found = encoded(rows, tokenizer, None)
        assert learned_texts(tokenizer, found) == [texts] and found.replies == 2
        assert tokenizer.decode(found.input_ids).count("<|eot_id|>") == (4 if weights[2] == 0 else 6)
    none = [{**turn, "weight": 0} if i % 2 else turn for i, turn in enumerate(turns)]
    assert encoded(none, tokenizer, None).code == "no_weight"
    assert encoded([*none[:-1], turns[-1]], tokenizer, None, train_on="last").replies == 1
    assert encoded([*turns[:-1], none[-1]], tokenizer, None, train_on="last").code == "no_weight"


def test_replies_that_change_become_rows_of_their_own(tokenizer):
    "Also where only some of them change, and with a system turn and long prompts to cut."
    strips = thinking("{{ (m.content if loop.last else m.content.split('</think>')[-1].strip()) }}")
    turns = chat("a", "<think>\n1\n</think>\n\nx", "b", "y", "c", "<think>\n3\n</think>\n\nz", system="word " * 80)
    found = encoded(turns, tokenizer, strips)
    assert learned_texts(tokenizer, found) == [
        "y<|eot_id|><think>\n3\n</think>\n\nz<|eot_id|>",
        "<think>\n1\n</think>\n\nx<|eot_id|>",
    ]
    assert found.replies == 3 and found.learned == sum(label != -100 for label in found.labels)
    whole = encode(turns, tokenizer, template=strips)
    assert [whole["input_ids"], *(part["input_ids"] for part in whole["parts"])] == [
        r.input_ids for r in rows_of(found)
    ]
    cut = encode(turns, tokenizer, template=strips, max_length=120, truncation="cut_prompt")
    for part, full in zip((cut, *cut["parts"]), rows_of(found)):
        assert len(part["input_ids"]) <= 120 and learned(part) == [label for label in full.labels if label != -100]


def test_a_reply_is_moved_behind_its_prompt(tokenizer):
    "As Mistral Nemo puts the system text before the last question; gpt-oss keeps a call's reasoning until the answer."
    nemo = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|eom_id|>' + (messages[0].content + '\n' if loop.last and messages[0].role == 'system' else '') }}"
        "{{ m.content }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
    )
    found = encoded(chat("a?", "b.", "c?", "d.", system="Short!"), tokenizer, nemo)
    assert [tokenizer.decode(row.input_ids) for row in rows_of(found)] == [
        "<|begin_of_text|><|eom_id|>a?b.<|eot_id|><|eom_id|>Short!\nc?d.<|eot_id|>",
        "<|begin_of_text|><|eom_id|>Short!\na?b.<|eot_id|>",
    ]
    assert learned_texts(tokenizer, found) == ["d.<|eot_id|>", "b.<|eot_id|>"]


def test_a_template_that_ends_a_reply_with_the_next_turn(tokenizer):
    "As GLM's does: `<|user|>` ends the assistant's turn."
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    other.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    found = encoded(chat("a", "b", "c", "d"), other, None)
    assert learned_texts(other, found) == ["b<|user|>d<|user|>"]
    assert other.decode([turn_end(other)]) == "<|user|>" and turn_end(other) in stop_tokens(other)


@pytest.mark.parametrize(
    "template, end",
    [  # what stands behind a reply at the end of a conversation, and only there, ends no turn
        (
            "{% for m in messages %}{{ m.role + ':' + m.content + '<|eom_id|>\n' }}{% endfor %}"
            "{{ '' if add_generation_prompt else '<|end_of_text|>' }}",
            "<|eom_id|>",
        ),
        (
            "{% for m in messages %}{{ m.role + ':' + m.content + '<|python_tag|><|eom_id|>' }}{% endfor %}",
            "<|eom_id|>",
        ),
    ],
)
def test_several_tokens_behind_a_reply(tokenizer, template, end):
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    assert tokenizer.decode([turn_end(tokenizer, template)]) == end
    found = encoded(chat("a", "b", "c", "d"), tokenizer, template)
    assert found.code is None and found.parts == () and found.replies == 2


def test_a_template_that_always_asks_is_named(tokenizer):
    always = "{% for m in messages %}{{ m.role + '\n\n' + m.content + '<|eot_id|>' }}{% endfor %}{{ 'assistant\n\n' }}"
    found = encoded(chat("a", "b"), tokenizer, always)
    assert found.code == "generation_prompt_mismatch" and "even if no reply is asked for" in found.why


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}{{ '' }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 // 0 }}",
        "{{ [][3] + 1 }}",
    ],
)
def test_a_hostile_template_is_refused(tokenizer, template):
    assert encoded(chat("a", "b"), tokenizer, template).code == "template_refused"
    with pytest.raises(UserError, match="can't render these messages"):
        render(chat("a"), tokenizer, template)


@pytest.mark.parametrize(
    "template",
    ["{{ 'a' * (10 ** 30) }}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ 1 }}"],
)
def test_a_template_that_costs_too_much_is_refused_for_all_rows_at_once(tokenizer, template):
    for use in (encoded, render):
        with pytest.raises(UserError, match="asks for a text or list of more|may have no end"):
            use(chat("a", "b"), tokenizer, template)


# --- nothing is lost ------------------------------------------------------------------------------------------------

QWEN_LIKE = """{{ bos_token }}{% for t in tools or [] %}{{ 'tools\n' + t | tojson + '<|eot_id|>\n' }}{% endfor %}
{%- for m in messages %}{{ m.role + ':' }}
{%- if m.reasoning_content and loop.last %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}
{{- m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|eot_id|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
SEVERAL = [
    QWEN_LIKE,
    QWEN_LIKE.replace("{{ 'assistant:' }}", "{{ 'assistant:<think>\n' }}"),
    QWEN_LIKE.replace("m.reasoning_content and loop.last", "false"),
    QWEN_LIKE.replace("m.role + ':'", "m.role + ':' if m.role in ['system', 'user', 'assistant'] else ''"),
    QWEN_LIKE.replace("| tojson }}{% endfor %}{{", "| tojson | e }}{% endfor %}{{").replace(
        "m.content }}", "m.content | e }}"
    ),
    TOOLS.replace("CALL", AS_JSON),
    SWITCH,
    None,
]


def count_silent(tokenizer, template, number, seed):
    "How many conversations came out without an error; raise where a word of one is lost."
    encoder = Encoder(tokenizer, template)
    maker = Maker(random.Random(seed))
    taken = 0
    for _ in range(number):
        messages, tools = maker.conversation()
        (row,) = encoder.encode([messages], tools=[tools])
        if row.code is None:
            lost = [*lost_words(tokenizer, messages, tools, row)]
            assert not lost, (lost, messages, tools)
            assert all(one.learned for one in rows_of(row))
            taken += 1
        else:
            assert row.why and row.input_ids is None
    return taken


@pytest.mark.parametrize("number", range(len(SEVERAL)))
def test_no_word_is_lost(tokenizer, number):
    taken = count_silent(tokenizer, SEVERAL[number], examples(1000), number)
    assert taken > 20 or number >= 4


@settings(max_examples=examples(300), deadline=None)
@given(messages=conversations, number=st.sampled_from(range(3)))
def test_the_short_way_is_the_long_way(tokenizer, messages, number):
    "Plain conversations are written by a skeleton: what is learned is the same as turn by turn."
    planner = Encoder(tokenizer, [QWEN_LIKE, None, thinking(DROPS, "'<think>\n'")][number]).planner
    try:
        long = planner._plan_turns(messages, None, "all")
    except Exception as error:
        with pytest.raises(type(error)):
            planner.plan(messages)
        return
    for a, b in zip(planner.plan(messages), long, strict=True):
        replies = [
            [(i, r.prompt, r.text[: r.end], r.closed, r.empty_reasoning) for i, r in part.replies] for part in (a, b)
        ]
        ours = [(i, prompt, a.text[: len(text)], *rest) for i, prompt, text, *rest in replies[1]]
        assert a.text == b.text and ours == replies[1]
        assert [(i, prompt, closed) for i, prompt, _, closed, _ in replies[0]] == [
            (i, p, c) for i, p, _, c, _ in replies[1]
        ]


# --- real templates -------------------------------------------------------------------------------------------------

needs_real = pytest.mark.skipif(not real_templates.TEMPLATES, reason="no real templates: make real")


@needs_real
def test_real_templates_take_plain_conversations():
    found = {path.stem: real_templates.outcomes(path) for path in real_templates.TEMPLATES}
    refused = {stem: why for stem, why in found.items() if any(why.values())}
    assert len(found) - len(refused) >= 60, refused
    for stem, whys in refused.items():
        assert all(why is None or ": " in why for why in whys.values())
        if any(name in stem for name in real_templates.NEEDS_TOOLS[:2]):
            assert "with tools only" in whys["plain"]
    assert refused["google-gemma-2-2b-it"]["plain"] is None
    assert "System role not supported" in refused["google-gemma-2-2b-it"]["system"]


@needs_real
@pytest.mark.parametrize("stem", sorted(real_templates.OWN))
def test_real_ids_are_the_templates_own(stem):
    "Where the text is the template's own, so are the ids, with the real tokenizer where it is there."
    path = next(path for path in real_templates.TEMPLATES if path.stem == stem)
    tokenizer = real_templates.tokenizer_for(path)
    messages = real_templates.PLAIN["several"]
    text = path.read_text(encoding="utf-8")
    (row,) = encode_batch([messages], tokenizer, template=text)
    own = tokenizer.apply_chat_template(messages, chat_template=text, date_string=TEMPLATE_DATE)["input_ids"]
    if "QwQ" not in stem and "deepseek-r1" not in stem:
        assert row.input_ids == own
    texts = [real_templates.learned_text(tokenizer, one) for one in rows_of(row)]
    assert (
        all(text.count(reply["content"]) == 1 for text, reply in zip(reversed(texts), messages[1::2]))
        or len(texts) == 1
    )
    assert row.replies == 2 and "56 boxes" in "".join(texts) and "63, I'd say" in "".join(texts)


@needs_real
@pytest.mark.parametrize(
    "stem", ["Qwen-Qwen3-0.6B", "meta-llama-Llama-3.2-3B-Instruct", "openai-gpt-oss-120b", "GLM-4.6"]
)
def test_no_word_is_lost_in_real_templates(stem):
    path = next(path for path in real_templates.TEMPLATES if path.stem == stem)
    template = path.read_text(encoding="utf-8")
    assert count_silent(real_templates.tokenizer_for(path), template, examples(1250), 7) > 5


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
    with_tools = copy.deepcopy(tokenizer)
    with_tools.chat_template = {"default": tokenizer.chat_template, "tool_use": TOOL_TEMPLATE}
    assert template_fingerprint(with_tools) != own == template_fingerprint(with_tools, tokenizer.chat_template)
    with_tools.chat_template["tool_use"] = tokenizer.chat_template
    assert template_fingerprint(with_tools) == own


def test_what_only_loading_reads_is_not_dropped_in_silence(tokenizer):
    turns = chat("2+3?", "5")
    for key, value, name in (
        ("thinking", "Hm.", "reasoning_content"),
        ("reasoning", "Hm.", "reasoning_content"),
        ("function_call", {"name": "add", "arguments": "{}"}, "tool_calls"),
        ("train", False, "weight"),
    ):
        row = [turns[0], {**turns[1], key: value}]
        found = encoded(row, tokenizer, None)
        assert found.code == "unused_key" and f"(assistant) has the key {key!r}, which load_sft_dataset" in found.why
        assert name in found.why and found.input_ids is None
        for empty in (None, "", []):
            assert encoded([turns[0], {**turns[1], key: empty}], tokenizer, None).code is None
    with pytest.raises(UserError, match="'thinking', which load_sft_dataset reads as reasoning_content"):
        encode([turns[0], {**turns[1], "thinking": "Hm."}], tokenizer)
    for weight, code in ((0.5, "unused_key"), ("0", "unused_key"), (2, "unused_key"), (True, None), (1.0, None)):
        assert encoded([turns[0], {**turns[1], "weight": weight}], tokenizer, None).code == code


@pytest.mark.parametrize("given", ["", " \n", None, "null", "{}", {}])
def test_a_call_may_have_no_arguments(tokenizer, given):
    writes = "{% for c in m.tool_calls %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ':' + m.content }}" + writes + "{{ '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": given}}]}
    found = encoded([ASKED[0], call], tokenizer, template)
    assert learned_texts(tokenizer, found) == ["now{}<|eot_id|>"]


def test_turns_after_the_last_reply_are_named_as_such(tokenizer):
    assert encoded(chat("Hi", "Ho", "Again"), tokenizer, None).why.endswith("assistant's: turns follow the last reply")
    assert encoded(chat("Hi"), tokenizer, None).why.endswith("assistant's: there is no reply to learn")


def test_pictures_in_messages_given_directly_are_not_dropped_in_silence(tokenizer):
    turns = chat("What is this?", "A cat.")
    row = [{**turns[0], "images": ["a.png"]}, turns[1]]
    found = encoded(row, tokenizer, None)
    assert (
        found.code == "unused_key" and "message 1 (user) has the key 'images'" in found.why and found.input_ids is None
    )
    assert encoded([{**turns[0], "images": []}, turns[1]], tokenizer, None).code is None
