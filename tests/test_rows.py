"""Calls, tools, reasoning, weights, histories, preference data: every usual form comes out right, or is named."""

import copy
import json
import pickle
import random

import pytest

from qlora_nb.core import UserError
from qlora_nb.rows import data_fingerprint, load_sft_dataset
from qlora_nb.schemas import CLASS_SUFFIX, Schema, canonical_row, describe_mark, find_schema, iterate_conversations
from qlora_nb.template import SYSTEM_PROMPT
from qlora_nb.turns import FIELD_RULES, kind_of

pytestmark = pytest.mark.quick

ASKED = {"role": "user", "content": "Rain in Bern?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern", "days": 2}}}
WITH_ID = {"id": "call_1", **CALL}
ARGUMENTS = '{"city": "Bern", "days": 2}'
BARE = {"name": "weather", "arguments": {"city": "Bern", "days": 2}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
REPLY = {"role": "assistant", "content": "Yes, it is."}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "the weather now", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "clock", "arguments": {}}}
SHARED = {"from": "human", "value": "Rain in Bern?"}


def converse(row, **columns):
    return canonical_row(row, find_schema(list(row), columns))


def openai(*turns, **columns):
    return {"messages": [ASKED, *turns], **columns}


def sharegpt(*turns, **columns):
    return {"conversations": [SHARED, *({"from": name, "value": value} for name, value in turns)], **columns}


def called(**keys):
    "An assistant's turn with these keys, and no text."
    return {"role": "assistant", "content": None, **keys}


def loaded(rows, folder):
    "What each door makes of the same rows: a list, JSONL, a stream, Parquet, a saved data set, parts of it."
    import datasets

    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_sft_dataset(path)
    data.save_to_disk(folder / "saved")
    data.to_parquet(folder / "rows.parquet")
    doors = {"list": load_sft_dataset(rows), "file": data, "stream": load_sft_dataset(path, streaming=True)}
    doors |= {"saved": load_sft_dataset(folder / "saved"), "parquet": load_sft_dataset(folder / "rows.parquet")}
    doors |= {
        "pickled": pickle.loads(pickle.dumps(data)),
        "selected": data.select(range(len(rows))),
        "own": datasets.Dataset.from_list(data.to_list(), features=data.features),
    }
    return doors


# --- calls of tools -------------------------------------------------------------------------------------------------

CALLS = {
    "OpenAI, arguments as text": (
        openai(
            called(
                tool_calls=[
                    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
                ]
            )
        ),
        [WITH_ID],
    ),
    "OpenAI, arguments as an object": (openai(called(tool_calls=[WITH_ID])), [WITH_ID]),
    "several calls a turn": (openai(called(tool_calls=[WITH_ID, OTHER])), [WITH_ID, OTHER]),
    "calls as JSON text": (openai(called(tool_calls=json.dumps([WITH_ID]))), [WITH_ID]),
    "calls written by str": (openai(called(tool_calls=str([WITH_ID]))), [WITH_ID]),
    "no wrapper": (openai(called(tool_calls=[BARE])), [CALL]),
    "parameters": (openai(called(tool_calls=[{"name": "weather", "parameters": BARE["arguments"]}])), [CALL]),
    "input": (openai(called(tool_calls=[{"id": "call_1", "name": "weather", "input": BARE["arguments"]}])), [WITH_ID]),
    "one object": (openai(called(tool_call=BARE)), [CALL]),
    "in any case": (openai(called(toolCalls=[WITH_ID])), [WITH_ID]),
    "legacy function_call": (openai(called(function_call={"name": "weather", "arguments": ARGUMENTS})), [CALL]),
    "legacy and new, the same": (openai(called(function_call=BARE, tool_calls=[CALL])), [CALL]),
    "no arguments": (openai(called(tool_calls=[{"name": "clock"}])), [OTHER]),
    "empty arguments": (openai(called(tool_calls=[{"name": "clock", "arguments": ""}])), [OTHER]),
    "no content key": (openai({"role": "assistant", "tool_calls": [CALL]}), [CALL]),
    "ShareGPT": (sharegpt(("function_call", json.dumps(BARE))), [CALL]),
    "ShareGPT, an object": (sharegpt(("function_call", BARE)), [CALL]),
    "ShareGPT, a list": (sharegpt(("function_call", json.dumps([BARE, OTHER["function"]]))), [CALL, OTHER]),
    "ShareGPT, consecutive": (
        sharegpt(("function_call", json.dumps(BARE)), ("function_call", '{"name": "clock", "arguments": {}}')),
        [CALL, OTHER],
    ),
    "tool_call": (sharegpt(("tool_call", json.dumps(BARE))), [CALL]),
    "Anthropic's parts": (
        openai(
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "call_1", "name": "weather", "input": BARE["arguments"]}],
            }
        ),
        [WITH_ID],
    ),
    "parts of a JavaScript SDK": (
        openai(
            {
                "role": "assistant",
                "content": [
                    {"type": "tool-call", "toolCallId": "call_1", "toolName": "weather", "args": BARE["arguments"]}
                ],
            }
        ),
        [WITH_ID],
    ),
    "items without a role": (
        openai({"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": ARGUMENTS}),
        [WITH_ID],
    ),
    "a conversation as text": ({"messages": json.dumps([ASKED, called(tool_calls=[WITH_ID])])}, [WITH_ID]),
    "beside a prompt": ({"prompt": "Rain in Bern?", "response": None, "tool_calls": [BARE]}, [CALL]),
    "xLAM": ({"query": "Rain in Bern?", "answers": json.dumps([BARE]), "tools": json.dumps([TOOL])}, [CALL]),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    row, calls = CALLS[name]
    before = copy.deepcopy(row)
    found = converse(row)
    assert found.messages == [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]
    assert found.marks == [] and row == before
    assert canonical_row(found._asdict() | {"marks": None}) == found


def test_every_door_gives_the_same_calls(tmp_path):
    rows = [row for row, _ in CALLS.values() if "messages" in row]
    expected = [canonical_row(row) for row in rows]
    for door, data in loaded(rows, tmp_path).items():
        found = [row for batch in iterate_conversations(data) for row in batch]
        assert [row.messages for row in found] == [row.messages for row in expected], door
        assert [
            list(call["function"]["arguments"])
            for row in found
            for m in row.messages
            for call in m.get("tool_calls", ())
        ] == [
            list(call["function"]["arguments"])
            for row in expected
            for m in row.messages
            for call in m.get("tool_calls", ())
        ], door
        assert data_fingerprint(data) == data_fingerprint(rows), door


RESULTS = {
    "OpenAI": (
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"content": "rain", "tool_call_id": "call_1"},
    ),
    "legacy function": (
        {"role": "function", "name": "weather", "content": "rain"},
        {"content": "rain", "name": "weather"},
    ),
    "ShareGPT": ({"from": "observation", "value": "rain"}, {"content": "rain"}),
    "Llama": ({"role": "ipython", "content": "rain"}, {"content": "rain"}),
    "an object": ({"role": "tool", "content": {"sky": "grau", "°C": 4.5}}, {"content": '{"sky": "grau", "°C": 4.5}'}),
    "a number": ({"role": "tool", "content": 4.5}, {"content": "4.5"}),
    "parts": ({"role": "tool", "content": [{"type": "text", "text": "rain"}]}, {"content": "rain"}),
    "Anthropic": (
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "rain"}]}
            ],
        },
        {"content": "rain", "tool_call_id": "call_1"},
    ),
    "an item without a role": (
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
        {"content": "rain", "tool_call_id": "call_1"},
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_what_tools_return(name):
    written, turn = RESULTS[name]
    found = converse(openai(called(tool_calls=[CALL]), written, REPLY))
    assert found.messages == [ASKED, CALLED, {"role": "tool", **turn}, REPLY] and found.marks == []


def test_a_text_beside_a_call():
    for turn in (
        {"role": "assistant", "content": "Let me see.", "tool_calls": [WITH_ID]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": BARE["arguments"]},
            ],
        },
    ):
        assert converse(openai(turn)).messages[1] == {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [WITH_ID],
        }
    merged = converse(
        sharegpt(
            ("gpt", "Let me see."), ("function_call", json.dumps(BARE)), ("observation", "rain"), ("gpt", "Yes, it is.")
        )
    )
    assert merged.messages == [ASKED, {**CALLED, "content": "Let me see."}, {"role": "tool", "content": "rain"}, REPLY]
    more = [{"type": "tool_result", "tool_use_id": "call_1", "content": "rain"}, {"type": "text", "text": "And now?"}]
    both = converse(openai(called(tool_calls=[WITH_ID]), {"role": "user", "content": more}, REPLY))
    assert [turn["role"] for turn in both.messages] == ["user", "assistant", "tool", "user", "assistant"]
    assert both.messages[3]["content"] == "And now?"


@pytest.mark.parametrize(
    "turn, mark",
    [
        (called(tool_calls=[{"id": "1"}]), "error key tool_calls"),
        (called(tool_calls=[CALL, {"id": "1"}]), "error key tool_calls"),
        (called(tool_calls="weather(Bern)"), "error key tool_calls"),
        (called(tool_calls=[{"name": "weather", "arguments": [1]}]), "error key tool_calls"),
        (called(function_call="weather"), "error key function_call"),
        ({"from": "function_call", "value": "weather(Bern)"}, "error key function_call"),
        ({"role": "user", "content": "Hi", "tool_calls": [CALL]}, "error key tool_calls"),
        (called(tool_calls=[{**CALL, "result": "rain"}]), "warning key tool_calls.result"),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]}, "error part tool_use"),
    ],
)
def test_calls_that_cannot_be_read_are_named(turn, mark, tmp_path):
    row = openai(turn)
    assert converse(row).marks == [mark]
    assert load_sft_dataset([row])["unused"][:] == [[mark]]
    cause, fix = describe_mark(*mark.split(" ", 2))
    assert mark.split(" ", 2)[2] in cause and (fix is None or len(fix) > 20)
    if turn.get("value"):
        assert converse(row).messages[1]["content"] == turn["value"], "what can't be read as a call stays as a text"


def test_arguments_that_are_no_object_stay_a_text():
    for text in ("city=Bern", "[1]", '{"city": '):
        found = converse(openai(called(tool_calls=[{"name": "weather", "arguments": text}])))
        assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == text and found.marks == []


def test_arguments_keep_every_value(tmp_path):
    "Numbers that Arrow's or pandas' JSON would change, nulls, order of keys, texts that look like JSON."
    odd = {
        "z": None,
        "share": 0.41,
        "n": 2**70,
        "tiny": 1e-12,
        "a": {"x": [1, 1.0, True, None]},
        "text": "[1]",
        "ü": "\u2028",
    }
    rows = [
        openai(
            called(tool_calls=[{"name": "f", "arguments": json.dumps(odd)}]),
            tools=[{**TOOL, "function": {**TOOL["function"], "parameters": odd}}],
        ),
        openai(called(tool_calls=[{"name": "f", "arguments": {"b": 1}}])),
    ]
    for door, data in loaded(rows, tmp_path).items():
        found = [row for batch in iterate_conversations(data) for row in batch]
        for arguments in (
            found[0].messages[1]["tool_calls"][0]["function"]["arguments"],
            found[0].tools[0]["function"]["parameters"],
        ):
            assert json.dumps(arguments) == json.dumps(odd), door
        assert found[1].messages[1]["tool_calls"][0]["function"]["arguments"] == {"b": 1}, "no keys of other rows"
        assert found[1].tools is None and found[0].marks == found[1].marks == []


def test_nulls_that_arrow_filled_in_say_nothing(tmp_path):
    from datasets import Dataset

    rows = [
        openai(called(tool_calls=[{"name": "f", "arguments": {"a": 1}}]), tools=[TOOL]),
        openai(called(tool_calls=[{"name": "g", "arguments": {"b": "x"}}]), tools=None),
    ]
    own = Dataset.from_list(rows)
    own.to_parquet(tmp_path / "own.parquet")
    assert own[0]["messages"][1]["tool_calls"][0]["arguments"] == {"a": 1, "b": None}
    for data in (own, load_sft_dataset(own), load_sft_dataset(tmp_path / "own.parquet")):
        found = [row for batch in iterate_conversations(data) for row in batch]
        assert [row.messages[1]["tool_calls"][0]["function"]["arguments"] for row in found] == [{"a": 1}, {"b": "x"}]
        assert found[0].tools == [TOOL]
    assert load_sft_dataset([openai(called(tool_calls=[{"name": "f", "arguments": {"a": None}}]))])[0]["messages"][1][
        "tool_calls"
    ][0]["function"]["arguments"] == {"a": None}


# --- tools ----------------------------------------------------------------------------------------------------------

TOOLS = {
    "OpenAI": {"tools": [TOOL]},
    "as text": {"tools": json.dumps([TOOL])},
    "written by str": {"tools": str([TOOL])},
    "texts in a list": {"tools": [json.dumps(TOOL)]},
    "one a line": {"tools": json.dumps(TOOL) + "\n" + json.dumps(TOOL["function"])},
    "functions": {"functions": [TOOL["function"]]},
    "functions as text": {"functions": json.dumps([TOOL["function"]])},
    "no wrapper": {"tools": [TOOL["function"]]},
    "a flat wrapper": {"tools": [{"type": "function", **TOOL["function"]}]},
    "Anthropic": {"tools": [{"name": "weather", "description": "the weather now", "input_schema": PARAMETERS}]},
    "one object": {"tools": TOOL},
    "by name": {"tools": {"weather": {"description": "the weather now", "parameters": PARAMETERS}}},
    "parameters as text": {
        "tools": [{"type": "function", "function": {**TOOL["function"], "parameters": json.dumps(PARAMETERS)}}]
    },
    "both columns": {"tools": [TOOL], "functions": [TOOL["function"]]},
}


@pytest.mark.parametrize("name", TOOLS)
def test_tools(name):
    found = converse(openai(REPLY, **TOOLS[name]))
    assert {json.dumps(tool) for tool in found.tools} == {json.dumps(TOOL)} and found.marks == []
    inside = converse({"messages": [{"role": "system", "content": "Be brief.", **TOOLS[name]}, ASKED, REPLY]})
    assert inside.tools == found.tools and inside.messages[0] == {"role": "system", "content": "Be brief."}
    assert converse({"messages": [{"role": "system", **TOOLS[name]}, ASKED, REPLY]}).messages == [ASKED, REPLY]
    data = load_sft_dataset([openai(REPLY, **TOOLS[name]), openai(REPLY)])
    assert data.column_names == ["messages", "tools"] and data[0]["tools"] == found.tools and data[1]["tools"] is None


def test_tools_that_cannot_be_read_are_named():
    for value in ("weather", ["weather"], [{"type": "code_interpreter"}], 3):
        assert converse(openai(REPLY, tools=value)).marks == ["warning column tools"]
        assert converse(openai(CALLED, tools=value)).marks == ["error column tools"]
    assert converse({"messages": [ASKED, {**REPLY, "tools": ["weather"]}]}).marks == ["error key tools"]


def test_tools_that_the_system_text_describes_are_not_given_twice(capsys):
    "Hermes' rows: the tools stand in the system text, the calls in the replies, and a column lists the tools again."
    told = {"role": "system", "content": f"You may call <tools>{json.dumps([TOOL])}</tools>"}
    reply = {"role": "assistant", "content": f"<tool_call>{json.dumps(BARE)}</tool_call>"}
    row = {"messages": [told, ASKED, reply], "tools": json.dumps([TOOL])}
    assert converse(row) == ([told, ASKED, reply], None, ["info column tools"])
    load_sft_dataset([row])
    assert "columns not used: tools\n" in capsys.readouterr().err
    mentioned = {"role": "system", "content": "You may call weather."}
    assert converse({"messages": [mentioned, ASKED, REPLY], "tools": [TOOL]}).tools == [TOOL]
    assert converse({"messages": [told, ASKED, CALLED], "tools": [TOOL]}).tools == [TOOL]


# --- reasoning ------------------------------------------------------------------------------------------------------

THOUGHT = "Clouds mean rain."
THINK = f"<think>\n{THOUGHT}\n</think>\n\nYes, it is."
REASONED = {"role": "assistant", "content": "Yes, it is.", "reasoning_content": THOUGHT}
REASONING = {
    **{
        name: openai({**REPLY, name: THOUGHT})
        for name in (
            "reasoning_content",
            "reasoning",
            "thinking",
            "thought",
            "Thoughts",
            "chain_of_thought",
            "reasoningContent",
        )
    },
    "a list": openai({**REPLY, "reasoning": [THOUGHT]}),
    "blocks": openai({**REPLY, "thinking_blocks": [{"type": "thinking", "thinking": THOUGHT, "signature": "abc"}]}),
    "details beside the text": openai(
        {**REPLY, "reasoning": THOUGHT, "reasoning_details": [{"type": "reasoning.text", "text": THOUGHT}]}
    ),
    "in <think> of its own": openai({**REPLY, "reasoning": f"<think>\n{THOUGHT}\n</think>"}),
    "an empty block in the content": openai(
        {**REPLY, "content": "<think>\n\n</think>\n\nYes, it is.", "reasoning": THOUGHT}
    ),
    "a part": openai(
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": THOUGHT, "signature": "abc"},
                {"type": "text", "text": "Yes, it is."},
            ],
        }
    ),
    "a part of texts": openai(
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]},
                {"type": "text", "text": "Yes, it is."},
            ],
        }
    ),
    "a part named reasoning": openai(
        {
            "role": "assistant",
            "content": [{"type": "reasoning", "text": THOUGHT}, {"type": "text", "text": "Yes, it is."}],
        }
    ),
    "a turn of its own": sharegpt(("thinking", THOUGHT), ("gpt", "Yes, it is.")),
    "an item without a role": openai(
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]}, REPLY
    ),
    "ShareGPT": {"conversations": [SHARED, {"from": "gpt", "value": "Yes, it is.", "thinking": THOUGHT}]},
    "beside prompt and response": {"prompt": "Rain in Bern?", "response": "Yes, it is.", "reasoning": THOUGHT},
    "cot": {"question": "Rain in Bern?", "answer": "Yes, it is.", "cot": THOUGHT},
    "capitals": {"Question": "Rain in Bern?", "Response": "Yes, it is.", "Complex_CoT": THOUGHT},
    "trajectories": {"question": "Rain in Bern?", "solution": "Yes, it is.", "thinking_trajectories": [THOUGHT]},
}


@pytest.mark.parametrize("name", REASONING)
def test_reasoning(name, capsys):
    found = converse(REASONING[name])
    assert found.messages == [ASKED, REASONED] and found.marks == []
    data = load_sft_dataset([REASONING[name]])
    assert data.column_names == ["messages"] and data[0]["messages"][1] == {**REASONED}
    assert "with reasoning (1 row)" in capsys.readouterr().err
    assert canonical_row(data[0]) == found


def test_reasoning_is_not_learned_twice():
    inside = {"role": "assistant", "content": THINK}
    for keys in ({"reasoning": THOUGHT}, {"reasoning_content": f" {THOUGHT}\n"}, {"thinking": [THOUGHT]}):
        assert converse(openai({**inside, **keys})) == ([ASKED, inside], None, [])
    assert converse({"prompt": "Rain in Bern?", "response": THINK, "cot": THOUGHT}) == ([ASKED, inside], None, [])
    closed = {"role": "assistant", "content": THINK.removeprefix("<think>\n")}
    assert converse(openai({**closed, "reasoning": THOUGHT})) == ([ASKED, closed], None, [])


def test_reasoning_that_has_no_place_is_named():
    inside = {"role": "assistant", "content": THINK}
    assert converse(openai({**inside, "reasoning": "Another."})) == ([ASKED, inside], None, ["warning key reasoning"])
    two = converse(openai({**REPLY, "reasoning": THOUGHT, "cot": "Another."}))
    assert two == ([ASKED, REASONED], None, ["warning key cot"])
    assert converse(openai({**REPLY, "reasoning": 3})).marks == ["warning key reasoning"]
    assert converse({"prompt": "a", "response": "b", "reasoning": 3}).marks == ["warning column reasoning"]
    assert converse(openai(REPLY, reasoning=THOUGHT)).marks == ["warning column reasoning"]
    for name in ("rationale", "explanation"):
        assert converse({"prompt": "a", "response": "b", name: THOUGHT}).marks == [f"warning column {name}"]
    named = converse(
        {"prompt": "Rain in Bern?", "response": "Yes, it is.", "rationale": THOUGHT},
        prompt="prompt",
        response="response",
        reasoning="rationale",
    )
    assert named == ([ASKED, REASONED], None, [])
    assert converse(openai(REPLY, why=THOUGHT), messages="messages", reasoning="why") == ([ASKED, REASONED], None, [])


@pytest.mark.parametrize("value", [None, "", " ", [], [""], {"text": None}])
def test_empty_reasoning_says_nothing(value):
    assert converse(openai({**REPLY, "reasoning_content": value})) == ([ASKED, REPLY], None, [])
    assert load_sft_dataset([{"prompt": "a", "response": "b", "cot": value}]).to_list() == [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ]


# --- weights, histories, names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "train", "loss", "learn", "trainable", "train_on_turn", "Loss_Weight"])
def test_weights_of_turns(name):
    for value in (0, 0.0, False, "false", "0"):
        assert converse(openai({**REPLY, name: value})) == ([ASKED, {**REPLY, "weight": 0}], None, [])
    for value in (1, 1.0, True, "true", None):
        assert converse(openai({**REPLY, name: value})) == ([ASKED, REPLY], None, [])
    for value in (0.5, 2, -1, "half"):
        assert converse(openai({**REPLY, name: value})) == ([ASKED, REPLY], None, [f"error key {name}"])
    assert converse({"messages": [{**ASKED, name: 0}, REPLY]}) == ([ASKED, REPLY], None, [])


def test_weights_of_rows(capsys):
    turns = [ASKED, REPLY, ASKED, REPLY]
    found = converse({"messages": turns, "weight": 0})
    assert [turn.get("weight") for turn in found.messages] == [None, 0, None, 0] and found.marks == []
    assert converse({"messages": turns, "weight": 1}).messages == turns
    assert converse({"messages": turns, "sample_weight": 0.5}).marks == ["error column sample_weight"]
    data = load_sft_dataset([{"messages": turns, "weight": 0}, {"messages": turns}])
    assert "replies not to learn (1 row)" in capsys.readouterr().err
    assert [turn["weight"] for turn in data[0]["messages"]] == [None, 0, None, 0]
    plain = load_sft_dataset([{"messages": [{**turn, "weight": 1} for turn in turns]}])
    assert plain.to_list() == [{"messages": turns}], "a weight of 1 is what every reply has"


@pytest.mark.parametrize(
    "history",
    [
        [["Hi", "Hello"]],
        json.dumps([["Hi", "Hello"]]),
        [("Hi", "Hello")],
        [["Hi", "Hello"], ["", ""]],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "[['Hi', 'Hello']]",
    ],
)
def test_history(history):
    row = {"instruction": "Add", "input": "2 2", "output": "4", "system": "Be brief.", "history": history}
    assert [(turn["role"], turn["content"]) for turn in converse(row).messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add\n\n2 2"),
        ("assistant", "4"),
    ]
    assert converse(row).marks == []


def test_a_history_that_cannot_be_read_is_named():
    for history in ("we spoke before", [["Hi"]], [3]):
        assert converse({"prompt": "a", "response": "b", "history": history}).marks == ["error column history"]
    assert converse(openai(REPLY, history=[["Hi", "Hello"]])).marks == ["error column history"]
    for nothing in ([], "[]", None, ""):
        assert converse({"prompt": "a", "response": "b", "history": nothing}).marks == []


@pytest.mark.parametrize(
    "names",
    [
        "Question Answer",
        "PROMPT COMPLETION",
        "Instruction Output",
        "Query Response",
        "input output",
        "question Response",
        "User Assistant",
    ],
)
def test_names_of_columns(names):
    prompt, response = names.split()
    assert load_sft_dataset([{prompt: "Rain in Bern?", response: "Yes, it is."}]).to_list() == [
        {"messages": [ASKED, REPLY]}
    ]
    assert find_schema([prompt, response]).columns == [prompt, response]


def test_rarer_names_give_way():
    assert find_schema(["question", "answer", "response", "chat"]).name == "question/answer"
    assert find_schema(["instruction", "input", "output"]).name == "Alpaca"
    assert find_schema(["question", "Question", "answer"]).columns == ["question", "answer"]
    for name in ("dialogue", "Dialog", "chat", "Conversation", "MESSAGES"):
        assert load_sft_dataset([{name: [ASKED, REPLY]}]).to_list() == [{"messages": [ASKED, REPLY]}]


def test_names_of_speakers_are_kept():
    turns = [{"role": "developer", "content": "Be brief."}, {**ASKED, "name": "Kim"}, REPLY]
    assert converse({"messages": turns}) == (turns, None, [])
    assert [turn["name"] for turn in load_sft_dataset([{"messages": turns}])[0]["messages"]] == [None, "Kim", None]


# --- preference data ------------------------------------------------------------------------------------------------

PLAIN = (
    "1f5250e6696c17a06d1605512787aa0e6e8317d3c7ae25341b9b621498cbe5f9"  # of BETTER, since before turns had more keys
)
BETTER, WORSE = [ASKED, REPLY], [ASKED, {"role": "assistant", "content": "No."}]
PREFERENCES = {
    "texts": {"prompt": "Rain in Bern?", "chosen": "Yes, it is.", "rejected": "No."},
    "replies": {"prompt": "Rain in Bern?", "chosen": BETTER[1:], "rejected": WORSE[1:]},
    "turns": {"prompt": [ASKED], "chosen": BETTER[1:], "rejected": WORSE[1:]},
    "whole conversations": {
        "prompt": "Rain in Bern?",
        "chosen": BETTER,
        "rejected": WORSE,
        "score_chosen": 9.0,
        "score_rejected": 2.0,
    },
    "no prompt": {"chosen": BETTER, "rejected": WORSE},
    "question": {"system": "", "question": "Rain in Bern?", "chosen": "Yes, it is.", "rejected": "No."},
    "responses": {"question": "Rain in Bern?", "response_chosen": "Yes, it is.", "response_rejected": "No."},
    "j and k": {"question": "Rain in Bern?", "response_j": "Yes, it is.", "response_k": "No."},
    "preferred_output": {
        "input": {"messages": [ASKED]},
        "preferred_output": BETTER[1:],
        "non_preferred_output": WORSE[1:],
    },
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_data(name):
    "Refused, with the words that load it: both those of Python and those of the command line."
    row = PREFERENCES[name]
    with pytest.raises(UserError, match="are preference data: pairs of a better and a worse reply") as error:
        load_sft_dataset([row])
    named = json.loads(str(error.value).partition("columns=")[2].partition(" (--columns ")[0])
    flag = str(error.value).partition("(--columns ")[2].removesuffix(")")
    assert dict(word.split("=") for word in flag.split(",")) == named
    data = load_sft_dataset([row], columns=named)
    assert data.to_list() == [{"messages": BETTER}], "what the error proposes works, and gives the better reply"


@pytest.mark.parametrize(
    "row, marks",
    [
        ({"prompt": "a", "completion": "b", "label": False}, ["error column label"]),
        ({"prompt": "a", "completion": "b", "label": True}, ["info column label"]),
        ({"messages": BETTER, "kto_tag": False}, ["error column kto_tag"]),
        ({"messages": BETTER, "desirable": 0}, ["error column desirable"]),
        ({"prompt": "a", "response": "b", "rejected": "c"}, ["error column rejected"]),
        (
            {
                "conversations": [SHARED],
                "chosen": {"from": "gpt", "value": "Yes"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            ["error column chosen", "error column rejected"],
        ),
        (
            {"messages": BETTER, "chosen": BETTER, "rejected": WORSE, "score_chosen": 9.0},
            ["info column chosen", "info column rejected", "info column score_chosen"],
        ),
        ({"messages": WORSE, "chosen": BETTER, "rejected": WORSE}, ["error column chosen", "error column rejected"]),
    ],
)
def test_verdicts_beside_a_reply_are_named(row, marks):
    assert converse(row).marks == marks


# --- what is left out, and what is put in -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image_url", "image", "input_image", "input_audio", "video"])
def test_images_are_said_to_be_images(kind):
    seen = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": kind, kind: "a.png"}]}
    found = converse({"messages": [seen, REPLY]})
    assert found.marks == [f"error part {kind}"] and found.messages[0]["content"] is None
    assert "images, audio or video" in describe_mark("error", "part", kind)[0]
    for row in ({"messages": BETTER, "images": ["a.png"]}, {"messages": [{**ASKED, "images": ["a.png"]}, REPLY]}):
        (mark,) = converse(row).marks
        assert mark.startswith("error ") and "images, audio or video" in describe_mark(*mark.split(" ", 2))[0]


def test_parts_are_joined_with_a_blank_line():
    parts = [{"type": "text", "text": "Rain"}, {"type": "input_text", "text": "in Bern?"}]
    assert (
        converse({"messages": [{"role": "user", "content": parts}, REPLY]}).messages[0]["content"] == "Rain\n\nin Bern?"
    )
    filled = [{"type": "text", "text": "Rain in Bern?", "image_url": None}]
    assert converse({"messages": [{"role": "user", "content": filled}, REPLY]}) == (BETTER, None, [])
    hidden = [{"type": "text", "text": "What is it?", "image": "a.png", "cache_control": {"type": "ephemeral"}}]
    assert converse({"messages": [{"role": "user", "content": hidden}, REPLY]}).marks == [
        "error part text.image",
        "warning part text.cache_control",
    ]


def test_literal_words_stay_in_the_data():
    for word in ("nan", "None", "null", "NaN", "[]"):
        assert load_sft_dataset([{"question": "a", "answer": word}])[0]["messages"][1]["content"] == word
        assert converse(openai({"role": "assistant", "content": word, "id": 1})).messages[1]["content"] == word


def test_every_other_key_is_named_once(capsys):
    rows = [{"messages": [{**ASKED, "mood": "calm"}, {**REPLY, "mood": "sure", "id": 3}], "source": "x"}] * 2
    data = load_sft_dataset(rows)
    assert data["unused"][:] == [["warning key mood", "warning key id"]] * 2
    assert capsys.readouterr().err.endswith("; not used: mood (2 rows), id (2 rows); columns not used: source\n")


def test_system_text_is_put_in_where_it_was_asked_for(capsys):
    think = [ASKED, {"role": "assistant", "content": THINK}]
    rows = [
        {"messages": think},
        {"messages": BETTER},
        {"messages": [{"role": "developer", "content": "Mine"}, *BETTER]},
    ]
    assert [row["messages"][0]["role"] for row in load_sft_dataset(rows)] == ["user", "user", "developer"]
    assert "system" not in capsys.readouterr().err
    asked = load_sft_dataset(rows, system="Be brief.")
    assert [row["messages"][0]["content"] for row in asked] == ["Be brief.", "Be brief.", "Mine"]
    assert "the system text was added to 2 rows" in capsys.readouterr().err
    mission = load_sft_dataset([{"problem": "Rain in Bern?", "reannotated_assistant_content": THINK}])
    assert mission[0]["messages"] == [{"role": "system", "content": SYSTEM_PROMPT}, *think]
    assert "was added to 1 row: leave it out with system=False (--no-system)" in capsys.readouterr().err


# --- as a data set --------------------------------------------------------------------------------------------------


def test_plain_rows_are_stored_as_plain_rows():
    data = load_sft_dataset(
        [{"messages": [{**turn, "tool_calls": None, "name": None, "weight": None} for turn in BETTER], "tools": None}]
    )
    assert data.to_list() == [{"messages": BETTER}]
    assert str(data.features) == "{'messages': List({'role': Value('string'), 'content': Value('string')})}"
    assert data_fingerprint(data) == data_fingerprint([BETTER]) == PLAIN


def test_keys_that_come_late(tmp_path):
    "After a thousand rows: a file gives the key to all, a stream that has settled its columns says where it is."
    rows = [openai(REPLY)] * 1500 + [openai(called(tool_calls=[WITH_ID]), tools=[TOOL])]
    data = load_sft_dataset(rows)
    assert len(data) == 1501 and data[1500]["tools"] == [TOOL] and data[0]["tools"] is None
    assert data[1500]["messages"][1]["tool_calls"] == [WITH_ID] and data[0]["messages"][1]["tool_calls"] is None
    assert [len(batch["messages"]) for batch in data.iter(500)] == [500, 500, 500, 1]
    stream = load_sft_dataset(rows, streaming=True)
    with pytest.raises(UserError, match="row 1501, is the first with tool_calls, .* load it with streaming=False"):
        list(stream)
    first = load_sft_dataset(rows[::-1], streaming=True)
    assert next(iter(first)) == data[1500] and sum(1 for _ in first) == 1501


def test_the_fingerprint_sees_every_key_and_tool():
    base = openai(CALLED, {"role": "tool", "content": "rain"}, REPLY, tools=[TOOL])
    rows = [base, openai(CALLED, {"role": "tool", "content": "rain"}, REPLY)]
    rows += [openai({**CALLED, "tool_calls": [OTHER]}, {"role": "tool", "content": "rain"}, REPLY, tools=[TOOL])]
    rows += [
        openai(CALLED, {"role": "tool", "content": "rain", key: "1"}, REPLY, tools=[TOOL])
        for key in ("name", "tool_call_id")
    ]
    rows += [
        openai(CALLED, {"role": "tool", "content": "rain"}, {**REPLY, **keys}, tools=[TOOL])
        for keys in ({"weight": 0}, {"reasoning": THOUGHT})
    ]
    prints = [data_fingerprint([row]) for row in rows]
    assert len({*prints}) == len(rows) and prints == [data_fingerprint(load_sft_dataset([row])) for row in rows]
    assert prints[0] == data_fingerprint([{**base, "id": 7}])


def test_lone_surrogates_in_calls_are_replaced():
    found = load_sft_dataset(
        [
            openai(
                called(tool_calls=[{"name": "f", "arguments": {"a": "x\ud800"}}]),
                tools=[{"name": "f", "description": "\udfff"}],
            )
        ]
    )
    assert found[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": "x\ufffd"}
    assert found[0]["tools"][0]["function"]["description"] == "\ufffd"


# --- nothing vanishes -------------------------------------------------------------------------------------------------

KEYS = [name for rule in FIELD_RULES.values() for name in rule.names.split()] + [
    "mood",
    "name",
    "tool_call_id",
    "Output",
]
FORMS = {
    "text": lambda word: word,
    "list": lambda word: [word],
    "object": lambda word: {"inner": word},
    "call": lambda word: [{"name": "f", "arguments": {"a": word}}],
    "call with more": lambda word: {"function": {"name": "f", "arguments": "{}", "more": word}},
    "text of a call": lambda word: json.dumps({"name": word, "arguments": {}}),
    "tool": lambda word: {"type": "function", "function": {"name": "f", "description": word}},
    "thought": lambda word: [{"type": "thinking", "thinking": word}],
    "pairs": lambda word: [[word, "b"]],
    "turns": lambda word: [{"role": "user", "content": word}],
}
ROLES = ["user", "assistant", "system", "tool", "function_call", "thinking", "observation", "developer", "robot"]
PARTS = ["text", "thinking", "tool_use", "tool_result", "image_url", "reasoning", "video"]


def random_row(draw):
    "A row of unlikely turns and columns, and the words in it, each with the names that lead to it."
    words = {}

    def word(*names):
        words[f"w{len(words)}w"] = names
        return f"w{len(words) - 1}w"

    def value(*names):
        return FORMS[draw.choice([*FORMS])](word(*names))

    def turn():
        role = draw.choice(ROLES)
        if draw.random() < 0.3:
            kind = draw.choice(PARTS)
            content = [{"type": kind, draw.choice(["text", "thinking", "content", "input"]): word(kind, role)}]
            content += [{"type": "text", "text": word(kind, role)}] if draw.random() < 0.5 else []
        else:
            content = word(role)
        more = {name: value(name) for name in draw.sample(KEYS, draw.choice([0, 1, 3]))}
        return {"role": role, "content": content, **more}

    columns = {name: value(name) for name in draw.sample(KEYS, draw.choice([0, 1, 3]))}
    if draw.random() < 0.3:
        return {**columns, "prompt": word("prompt"), "response": word("response")}, words
    return {**columns, "messages": [turn() for _ in range(draw.randint(1, 4))]}, words


@pytest.mark.parametrize("seed", range(4))
def test_nothing_vanishes(seed):
    "Each word of a row is in what training reads, or its key, column or part is named; but for weights of questions."
    draw = random.Random(seed)
    for _ in range(1000):
        row, words = random_row(draw)
        found = canonical_row(row, Schema("pair", prompt="prompt", response="response") if "prompt" in row else None)
        read = json.dumps([found.messages, found.tools])
        named = {name for mark in found.marks for name in mark.split(" ", 2)[2].split(".")}
        named |= {name.removesuffix(CLASS_SUFFIX) for name in named}
        for word, names in words.items():
            assert word in read or named & {*names} or kind_of(names[0]) == "weights", (word, names, row, found)


# --- cells of numpy and pandas ----------------------------------------------------------------------------------------


def test_cells_of_numpy_are_read_like_lists(tmp_path):
    "As pd.read_parquet gives them: arrays in arrays, nulls where other rows have a key, pd.NA, numpy's numbers."
    import numpy as np
    import pandas as pd
    from datasets import Dataset

    calls = [
        called(tool_calls=[CALL]),
        called(tool_calls=[{**OTHER, "function": {**OTHER["function"], "arguments": {"at": "x"}}}]),
    ]
    rows = [openai(turn, {"role": "tool", "content": "rain"}, REPLY, tools=[TOOL]) for turn in calls]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    frame = pd.read_parquet(tmp_path / "a.parquet").assign(more=[np.array([1, 2]), pd.NA], id=np.int64(3))
    assert type(frame["messages"][0]).__name__ == "ndarray"
    expected = [canonical_row(row) for row in rows]
    for data in (frame, frame.to_dict("records")):
        assert [tuple(row)[:2] for row in map(canonical_row, load_sft_dataset(data))] == [
            tuple(row)[:2] for row in expected
        ]
    raw = [row for batch in iterate_conversations(frame.to_dict("records")) for row in batch]
    assert [row.messages for row in raw] == [row.messages for row in expected]
    when = {"n": np.int64(2), "at": pd.Timestamp("2026-01-31")}
    turn = converse(openai(called(tool_calls=[{"name": "f", "arguments": when}]))).messages[1]
    assert turn["tool_calls"][0]["function"]["arguments"] == {"n": 2, "at": "2026-01-31T00:00:00"}
    assert converse({"messages": BETTER, "side": np.array([1, 2]), "none": pd.NaT}).messages == BETTER
    plain = Dataset.from_list([{"messages": BETTER, "id": 1}] * 3).with_format("numpy")
    assert load_sft_dataset(plain).to_list() == [{"messages": BETTER}] * 3


def test_tables_are_read_as_rows_and_texts_are_refused():
    import pandas as pd

    rows = [{"messages": BETTER}, {"messages": WORSE}]
    assert [*iterate_conversations(pd.DataFrame(rows))] == [[canonical_row(row) for row in rows]]
    with pytest.raises(UserError, match=r"a row is a str \(Hi\): give dicts of columns"):
        list(iterate_conversations(["Hi"]))


def test_turns_as_an_object_of_lists():
    cells = {"role": ["user", "assistant"], "content": ["Rain in Bern?", "Yes, it is."]}
    assert load_sft_dataset([{"messages": cells}]).to_list() == [{"messages": BETTER}]
    shared = {"from": ["human", "gpt"], "value": cells["content"], "weight": None}
    assert load_sft_dataset([{"conversations": shared}]).to_list() == [{"messages": BETTER}]
    assert converse({"messages": {**cells, "role": ["user"]}}).messages == []


def test_hermes_rows_are_written_once():
    "Tools and tags that the texts hold are not written a second time by the template."
    reply = f"<tool_call>\n{json.dumps(BARE)}\n</tool_call>"
    back = "<tool_response>\nrain\n</tool_response>\n<tool_response>\nwind\n</tool_response>\n"
    told = {"from": "system", "value": f"Call these: <tools>{json.dumps([TOOL])}</tools>"}
    turns = [told, SHARED, {"from": "gpt", "value": reply}, {"from": "tool", "value": back}]
    found = converse({"conversations": [*turns, {"from": "gpt", "value": "Yes."}], "tools": json.dumps([TOOL])})
    assert found.tools is None and found.marks == ["info column tools"]
    assert [turn["content"] for turn in found.messages if turn["role"] == "tool"] == ["rain", "wind"]
    for text in (f"So: {back}", "<tool_response>rain", "<tool_response><tool_response></tool_response>"):
        assert converse(openai(CALLED, {"role": "tool", "content": text}, REPLY)).messages[2]["content"] == text


def test_images_in_results_are_named():
    picture = {"type": "image", "source": {"type": "base64", "data": "iVBO"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "See:"}, picture]}
    for turn in ({"role": "user", "content": [result]}, {"role": "tool", "content": [picture]}):
        found = converse(openai(CALLED, turn, REPLY))
        assert found.marks == ["error part image"] and found.messages[2] == {
            "role": "tool",
            "content": None,
            **({"tool_call_id": "1"} if turn["role"] == "user" else {}),
        }


def test_a_reply_that_is_one_call():
    row = {"instruction": "Rain in Bern?", "output": json.dumps(BARE), "tools": [TOOL]}
    assert converse(row) == ([ASKED, CALLED], [TOOL], [])
    other = converse({**row, "output": '{"name": "clock", "arguments": {}}'})
    assert other.messages[1]["tool_calls"] == [OTHER] and other.marks == ["warning column tools"]
    for text in ('{"name": "Kim", "age": 3}', '{"name": "Kim"}', '{"name": "f", "arguments": {}, "why": "rain"}'):
        assert converse({**row, "output": text}).messages[1]["content"] == text, "an answer in JSON stays a text"


def test_a_generator_is_not_streamed():
    with pytest.raises(UserError, match="a generator, which can be read only once.*load it with streaming=False"):
        load_sft_dataset(iter([{"messages": BETTER}]), streaming=True)
    assert len(load_sft_dataset(iter([{"messages": BETTER}]))) == 1


def test_reasoning_under_a_name_of_its_own_is_named():
    rows = [
        {"question": f"{i}?", "solution": f"{i}!", "gemini_thinking_trajectory": "Hm.", "model_reasoning": "So."}
        for i in range(3)
    ]
    found = [canonical_row(row, find_schema(list(row), {"prompt": "question", "response": "solution"})) for row in rows]
    assert all(
        {"warning column gemini_thinking_trajectory", "warning column model_reasoning"} <= {*one.marks} for one in found
    )


@pytest.mark.parametrize("system", ["systemInstruction", "system_instruction"])
@pytest.mark.parametrize("tools", ["functionDeclarations", "function_declarations"])
def test_contents_of_parts(system, tools):
    "What Gemini is tuned on: parts of a turn, calls and results among them, and pictures that are named."
    row = {
        system: {"role": "system", "parts": [{"text": "Be brief."}]},
        "tools": [{tools: [{"name": "rain"}, {"name": "snow"}]}],
        "contents": [
            {"role": "user", "parts": [{"text": "Rain"}, {"text": "or snow?"}]},
            {"role": "model", "parts": [{"text": "Let me look."}, {"functionCall": {"name": "rain", "args": {}}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": "rain", "response": {"mm": 3}}}]},
            {"role": "model", "parts": [{"text": "Rain."}]},
        ],
    }
    found = canonical_row(row, find_schema(row))
    assert [turn["role"] for turn in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert [turn["content"] for turn in found.messages] == [
        "Be brief.",
        "Rain\n\nor snow?",
        "Let me look.",
        '{"mm": 3}',
        "Rain.",
    ]
    assert [call["function"]["name"] for call in found.messages[2]["tool_calls"]] == ["rain"]
    assert [tool["function"]["name"] for tool in found.tools] == ["rain", "snow"] and not found.marks
    row["contents"][0]["parts"].append({"inlineData": {"mimeType": "image/png", "data": "aGk="}})
    assert any(mark.startswith("error") for mark in canonical_row(row, find_schema(row)).marks)
