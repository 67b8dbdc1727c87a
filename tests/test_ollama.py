"""Ollama's templates and Modelfiles: our renderer against Go's own text/template, and what a file can hold."""

import base64
import copy
import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repository import examples, go_command

from qlora_nb.chat_templates import CHAT_TEMPLATES
from qlora_nb.core import EMBEDDED_MODEL, UserError
from qlora_nb.gguf_tokens import pin_date
from qlora_nb.go_template import GO_TEMPLATES, GO_TRIM, quote_go, render_go
from qlora_nb.modelfile import format_modelfile, parse_modelfile, quote_value
from qlora_nb.ollama_client import ollama_commands, ollama_create
from qlora_nb.ollama_export import (
    derive_go_template,
    modelfile_for,
    modelfile_refusal,
    to_ollama_data,
    to_ollama_messages,
    write_modelfile,
)
from qlora_nb.run import RUN_FORMAT
from qlora_nb.template import render
from qlora_nb.template_choice import (
    choose_template,
    find_go_offers,
    find_jinja_offers,
    predict_template,
    read_header_texts,
)

# One template and its data a line in; one line out: what Go wrote (base64, since it may be cut within a character).
PROGRAM = """
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type Message struct {
	Role, Content, Thinking, ToolName string
	ToolCalls []string
}

type Data struct {
	System, Response, Suffix string
	Messages []*Message
	Tools []string
	Think, IsThinkSet bool
	Number int
}

type Case struct {
	Template string
	Data Data
}

func run(c Case) map[string]any {
	t, err := template.New("").Option("missingkey=zero").Parse(c.Template)
	var b bytes.Buffer
	if err == nil {
		err = t.Execute(&b, c.Data)
	}
	if err != nil {
		return map[string]any{"error": err.Error()}
	}
	return map[string]any{"text": b.Bytes()}
}

func main() {
	in, out := bufio.NewReader(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		line, err := in.ReadBytes('\\n')
		if err != nil {
			return
		}
		var c Case
		if err := json.Unmarshal(line, &c); err != nil {
			panic(err)
		}
		out.Encode(run(c))
	}
}
"""


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    "A function (template, data) → (text, None) or (None, Go's error), by Go's own text/template."
    command, environment = go_command()
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM)
    environment.setdefault("GOCACHE", str(folder / "cache"))
    subprocess.run([command, "build", "-o", "render", "main.go"], cwd=folder, env=environment, check=True, timeout=300)
    process = subprocess.Popen([folder / "render"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(template, data):
        process.stdin.write(json.dumps({"Template": template, "Data": data}).encode() + b"\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        if "error" in answer:
            return None, answer["error"]
        return base64.b64decode(answer["text"] or "").decode("utf-8", "surrogateescape"), None

    yield ask
    process.stdin.close()
    assert process.wait(timeout=10) == 0


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def chatml(tokenizer):
    "A tokenizer that has ChatML's tokens as well."
    both = copy.deepcopy(tokenizer)
    both.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return both


def ours(template, data):
    try:
        return render_go(template, {**data, "Number": data.get("Number", 0)}), None
    except UserError as error:
        return None, str(error)


# What we write: printable and not, look-alikes of tokens and of both template languages, white space on all sides.
texts = st.text(
    st.one_of(st.sampled_from(' \n\t\r"\\{}|<>`$.é東\u200b\u00a0'), st.characters(codec="utf-8")), max_size=12
)
contents = st.one_of(
    texts, st.sampled_from(["<|eot_id|>", "{{ .System }}", '"""', "  two\n\nlines \t", "", "\x00", "👩‍💻"])
)
roles = st.sampled_from(["system", "user", "assistant"])
conversations = st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), min_size=1, max_size=5)
properties = settings(
    max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def alternating(messages):
    "Messages that the chat templates of training render and Ollama doesn't merge."
    found = []
    for message in messages:
        if message["role"] != "system" and (not found or found[-1]["role"] != message["role"]):
            found.append(message)
    first = [messages[0]] if messages[0]["role"] == "system" else []
    return first + found or [{"role": "user", "content": "x"}]


# --- the renderer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GO_TEMPLATES)
@properties
@given(messages=conversations)
def test_our_templates_render_as_in_go(go, name, messages):
    data = to_ollama_data(to_ollama_messages(messages))
    want, error = go(GO_TEMPLATES[name], data)
    assert error is None
    assert render_go(GO_TEMPLATES[name], data) == want


fields = st.sampled_from(
    [
        ".System",
        ".Response",
        ".Number",
        ".Messages",
        ".Think",
        "$.System",
        "$x",
        "$y",
        ".",
        ".Role",
        ".Content",
        "$m.Content",
        "$i",
        ".Missing",
    ]
)
constants = st.sampled_from(
    ['"user"', '"a\\n\\"b\\u00e9"', "`r\\n`", "0", "1", "2", "-1", "true", "false", '""', '"é"']
)


@st.composite
def a_call(draw, depth=2):
    name = draw(st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "len", "index", "slice"]))
    words = [name]
    for _ in range(draw(st.integers(1, 3))):
        inner = depth and draw(st.integers(0, 3)) == 0
        words.append(f"({draw(a_call(depth - 1))})" if inner else draw(st.one_of(fields, constants)))
    return " ".join(words)


calls = a_call()
pipelines = st.one_of(fields, constants, calls, st.builds("{} | {}".format, st.one_of(fields, constants), calls))
opens, closes = st.sampled_from(["{{ ", "{{- ", "{{"]), st.sampled_from([" }}", " -}}", "}}"])


@st.composite
def action(draw, body):
    return draw(opens) + draw(body) + draw(closes)


plain = st.sampled_from(["a", " ", "\n", " b\n", "é", "}}", "{", ""])
heads = st.one_of(
    pipelines.map("if {}".format),
    pipelines.map("range {}".format),
    pipelines.map("range $i, $m := {}".format),
    pipelines.map("range $m := {}".format),
    st.just("range $i, $m := .Messages"),
    st.just("range .Messages"),
)
leaves = st.one_of(
    plain,
    action(pipelines),
    action(st.just("$x := .System")),
    action(st.just("$x = .Role")),
    action(st.just("/* no */")),
)
ends = action(st.just("end"))


@st.composite
def a_template(draw, depth=3):
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        return "".join(draw(st.lists(leaves, max_size=3)))
    parts = [draw(action(heads)), draw(a_template(depth - 1))]
    for middle in draw(st.lists(st.one_of(st.just("else"), pipelines.map("else if {}".format)), max_size=2)):
        parts += [draw(action(st.just(middle))), draw(a_template(depth - 1))]
    return draw(leaves) + "".join(parts) + draw(ends) + draw(leaves)


templates = a_template()


@settings(properties, max_examples=examples(500))
@given(template=templates, messages=conversations)
def test_random_templates_render_as_in_go(go, template, messages):
    "What we render, Go renders alike. What we refuse, Go refuses, or it is outside the part that we read."
    template = '{{ $x := "s" }}{{ $y := 1 }}' + template
    data = {**to_ollama_data(messages), "Number": 2}
    (want, error), (got, _) = go(template, data), ours(template, data)
    if got is not None:
        assert (got, error) == (want, None)


@settings(properties, max_examples=examples(200))
@given(
    template=st.lists(
        st.sampled_from(
            [
                "{{",
                "}}",
                "{{- ",
                " -}}",
                " ",
                "end",
                "if ",
                "else",
                ".System",
                '"',
                "`",
                "(",
                ")",
                "|",
                ":=",
                "$x",
                "range ",
                "x",
                "\n",
                "/*",
                "*/",
                "len ",
            ]
        ),
        max_size=12,
    ).map("".join)
)
def test_broken_templates_are_not_rendered(go, template):
    data = to_ollama_data([{"role": "user", "content": "x"}])
    (want, error), (got, refused) = go(template, data), ours(template, data)
    if got is not None:
        assert (got, error) == (want, None), template
    else:
        assert refused.startswith("the template can't be read at line ")


def test_most_random_templates_render(go):
    "The property above would hold for a renderer that refuses everything: this one doesn't."
    data = {**to_ollama_data([{"role": "user", "content": " hé "}, {"role": "assistant", "content": "b"}]), "Number": 2}
    samples = {
        "{{ range $i, $m := .Messages }}{{ $i }}{{ len $m.Content }}{{ end }}": "0511",
        '{{ $x := "" }}{{ range .Messages }}{{ $x = .Role }}{{ end }}{{ $x }}': "assistant",
        '{{ if eq (index .Messages 0).Role "a" "user" }}yes{{ else }}no{{ end }}': "yes",
        "{{ if false }}a{{ else if .Number }}b{{ else }}c{{ end }}": "b",
        "{{ .Number | eq 2 }} {{ slice `abc` 1 2 }} {{- /* gone */ -}} {{ index `abc` 1 }}": "true b98",
        '{{ define "t" }}{{ if . }}{{ slice . 0 1 }}{{ template "t" (slice . 1) }}{{ end }}{{ end }}'
        '{{ template "t" "abc" }}': "abc",
        "{{ and 1 0 }}{{ or 0 `` 3 }}{{ not .System }}": "03true",
        "{{ len (slice .Messages 1) }}{{ (index .Messages 1).Content }}": "1b",
    }
    for template, want in samples.items():
        assert (ours(template, data)[0], go(template, data)[0]) == (want, want), template


@pytest.mark.parametrize(
    "template, where",
    [
        ("ab\n{{ if .System }}", "line 2, column 4: {{ if }} is never closed"),
        ("{{ end }}", "line 1, column 1: {{ end }} closes nothing"),
        ("{{ .Nothing }}", "line 1, column 4: there is no field .Nothing here"),
        ("{{ $x }}", "line 1, column 4: the variable $x is not declared"),
        ("{{ $x = 1 }}", "line 1, column 4: the variable $x is not declared"),
        ("{{ if .System }}{{ $x }}{{ end }}", "line 1, column 20: the variable $x is not declared"),
        ("{{ range $m := .Messages }}{{ end }}{{ if .System }}{{ $m }}{{ end }}", "the variable $m is not declared"),
        ('{{ $x := 1 }}{{ define "a" }}{{ $x }}{{ end }}', "the variable $x is not declared"),
        ("é{{ printf 1 }}", "line 1, column 5: 'printf' is not in the supported part of the language"),
        ("{{ (len .System }}", "a bracket is not closed"),
        ('{{ slice "é" 0 9 }}', "slice from 0 to 9 of 2 is out of range"),
        ('{{ template "none" }}', "there is no part named 'none'"),
        ('{{ define "a" }}{{ template "a" . }}{{ end }}{{ template "a" . }}', "calls itself endlessly"),
        ("{{ 'a' }}", 'found "\'" within an action'),
        ("{{", "found the end of the text within an action"),
    ],
)
def test_a_broken_template_is_named_with_its_place(template, where):
    with pytest.raises(UserError) as error:
        render_go(template, to_ollama_data([{"role": "user", "content": "x"}]))
    assert where in str(error.value)


@properties
@given(text=texts)
def test_quoted_strings(go, text):
    assert render_go("{{ " + quote_go(text) + " }}", {}) == text
    assert go("{{ " + quote_go(text) + " }}", {})[0] == text
    quote_value(quote_go(text).replace('"""', ""), "a quoted string")  # printable throughout


@properties
@given(text=st.text(st.sampled_from(" \t\n\r\v\fab é東"), max_size=30))
def test_trim_takes_white_space_from_both_ends(go, text):
    template = GO_TRIM + '{{ template "trim" .System }}'
    assert render_go(template, {"System": text}) == go(template, {"System": text})[0] == text.strip(" \t\n\r\v\f")


# --- the templates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@properties
@given(messages=conversations)
def test_named_templates_write_what_training_writes(chatml, name, messages):
    messages = [{**m, "content": m["content"].strip().strip("\x1c\x1d\x1e\x1f\x85")} for m in alternating(messages)]
    messages = [{**m, "content": f" \n{m['content']}\t "} if m["content"] else m for m in messages]
    want = render(messages, chatml, name, add_generation_prompt=messages[-1]["role"] != "assistant")
    got = render_go(GO_TEMPLATES[name], to_ollama_data(to_ollama_messages(messages)))
    assert got == want.removeprefix(chatml.bos_token)


HEADERS = "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|eot_id|>' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
DERIVED = {
    "not trimmed": HEADERS + ASK,
    "default system": "{{ bos_token }}{% if messages[0].role != 'system' %}"
    "{{ '<system>Be good.<|eot_id|>' }}{% endif %}" + HEADERS.removeprefix("{{ bos_token }}") + ASK,
    "no system": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<' + m.role + '>' + m.content|trim + '<|eot_id|>' }}{% endfor %}" + ASK,
    "braces": HEADERS.replace("'<' + ", "'{{ \"x\" }}\\n<' + ") + ASK.replace("<assistant>", '{{ "x" }}\\n<assistant>'),
    "trims the user alone": "{{ bos_token }}{% for m in messages %}"
    "{{ '<' + m.role + '>' + (m.content|trim if m.role == 'user' else m.content)"
    " + '<|eot_id|>\\n\\n' }}{% endfor %}" + ASK,
}


@pytest.mark.parametrize("name", DERIVED)
@properties
@given(messages=conversations)
def test_derived_templates_write_what_training_writes(tokenizer, go, name, messages):
    messages = [{**m, "content": m["content"].strip().strip("\x1c\x1d\x1e\x1f\x85")} for m in alternating(messages)]
    if name == "no system":
        messages = [m for m in messages if m["role"] != "system"] or [{"role": "user", "content": "x"}]
    messages = [{**m, "content": f"\n {m['content']} "} if m["content"] else m for m in messages]
    template = derived(tokenizer, name)
    want = render(messages, tokenizer, DERIVED[name], add_generation_prompt=messages[-1]["role"] != "assistant")
    data = to_ollama_data(to_ollama_messages(messages))
    assert render_go(template, data) == go(template, data)[0] == want.removeprefix(tokenizer.bos_token)


def derived(tokenizer, name, known={}):  # noqa: B006
    if name not in known:
        known[name] = derive_go_template(tokenizer, DERIVED[name])
    return known[name]


@pytest.mark.parametrize(
    "jinja, why",
    [
        (HEADERS.replace("m.content", "m.content|upper") + ASK, "the Ollama template writes"),
        (HEADERS.replace("m.content", "loop.index|string + m.content") + ASK, "in one place and"),
        (HEADERS.replace("{{ bos_token }}", "") + ASK, "doesn't begin with <|begin_of_text|>"),
        (HEADERS.replace("m.content", "m.content[:20] + m.content[:20]") + ASK, "contents for 1 messages"),
        (HEADERS.replace("m.content", "m.content.lstrip()") + ASK, "in a way that is not known here"),
        (HEADERS.replace("m.content", "m.content.split('</think>')[-1]") + ASK, "(turns user"),
    ],
)
def test_templates_that_cannot_be_derived_are_refused(tokenizer, jinja, why):
    with pytest.raises(UserError) as error:
        derive_go_template(tokenizer, jinja)
    assert why in str(error.value)


def test_neighbours_of_one_role_are_merged():
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    assert [t["content"] for t in to_ollama_messages(turns)] == ["a\n\nb", "c"]
    assert turns[0]["content"] == "a"  # what was passed in stays
    assert to_ollama_messages(turns, "S")[0] == {"role": "system", "content": "S"}
    own = [{"role": "system", "content": "mine"}, *turns]
    assert to_ollama_messages(own, "S")[0]["content"] == "mine"
    examples = [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]
    assert [t["role"] for t in to_ollama_messages(turns, "S", examples)] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]


# --- the Modelfile --------------------------------------------------------------------------------------------------


@settings(properties, max_examples=examples(500))
@given(text=contents, name=st.sampled_from(["SYSTEM", "TEMPLATE", "LICENSE", "PARAMETER stop", "MESSAGE user"]))
def test_reading_back_gives_what_was_written(text, name):
    instructions = [("FROM", "./m.gguf"), (name, text), ("SYSTEM", "last")]
    try:
        written = format_modelfile(instructions)
    except UserError as error:
        assert name in str(error)
        # No needless refusal: this text, written all the same, doesn't come back.
        raw = f'FROM ./m.gguf\n{name} """{text}"""\nSYSTEM """last"""\n'
        try:
            assert '"""' in text or parse_modelfile(raw).instructions != instructions
        except UserError:
            pass
        return
    assert parse_modelfile(written).instructions == instructions


@pytest.mark.parametrize(
    "text, why",
    [
        ("nothing\n", "'nothing' is not an instruction"),
        ("SYSTEM hello\n", "no FROM line"),
        ('FROM m\nSYSTEM """open\n', "line 2, column 1: the value is never closed"),
        ("FROM m\nPARAMETER\n", "PARAMETER needs a name"),
        ("FROM m\nMESSAGE robot hi\n", "MESSAGE needs the role system, user or assistant"),
    ],
)
def test_a_broken_modelfile_is_named_with_its_place(text, why):
    with pytest.raises(UserError) as error:
        parse_modelfile(text)
    assert why in str(error.value)


def test_comments_and_quotes():
    found = parse_modelfile(
        '# a comment\n\n  from ./m.gguf \nSYSTEM "one # line"\nsystem no "quotes" # here\nTEMPLATE """a"b"""  \n'
    )
    assert found.instructions == [
        ("FROM", "./m.gguf"),
        ("SYSTEM", "one # line"),
        ("SYSTEM", 'no "quotes" # here'),
        ("TEMPLATE", 'a"b'),
    ]
    assert found.one("SYSTEM") == 'no "quotes" # here'


@pytest.fixture
def gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    return tmp_path / "m.gguf"


def test_write_modelfile(tokenizer, gguf):
    path = write_modelfile(
        gguf.parent,
        gguf,
        "llama-3.2",
        tokenizer=tokenizer,
        system="Be brief.",
        license=["one", "two"],
        parameters={"temperature": 0, "num_ctx": 64},
        messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    )
    found = parse_modelfile(path.read_text(encoding="utf-8"))
    assert path.name == "Modelfile" and found.one("FROM") == "./m.gguf"
    assert found.one("TEMPLATE") == GO_TEMPLATES["llama-3.1"] and "<|begin_of_text|>" not in path.read_text()
    assert found.parameters["stop"] == ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert (
        found.parameters["temperature"] == ["0"]
        and found.parameters["num_ctx"] == ["64"]
        and found.parameters["repeat_penalty"] == ["1.0"]
    )
    assert (found.one("SYSTEM"), found.all("LICENSE"), len(found.messages)) == ("Be brief.", ["one", "two"], 2)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"system": 'say """'}, 'SYSTEM holds """'),
        ({"system": "a\u00a0b"}, "SYSTEM holds U+00A0 (NO-BREAK SPACE) at line 1, column 2"),
        ({"license": "x\x07"}, "LICENSE holds U+0007"),
        ({"parameters": {"num ctx": 1}}, "the parameter 'num ctx' can't be written to a Modelfile"),
        ({"parameters": {"num_ctx": None}}, "the parameter num_ctx is None"),
        ({"template": "chatml"}, "needs the token <|im_end|>"),
        ({"template": "alpaca"}, "there is no template 'alpaca'"),
        ({"go_template": "{{ .Prompt }}"}, "there is no field .Prompt"),
        ({"go_template": GO_TEMPLATES["llama-3.1"]}, "where training wrote"),
        ({"go_template": GO_TEMPLATES["llama-3.1"]}, "go_template= can't be proved to serve what was trained, because"),
        ({"go_template": GO_TEMPLATES["embedded"], "without_template": True}, "exclude each other"),
        ({"go_template": "<|begin_of_text|>" + GO_TEMPLATES["embedded"]}, "where training wrote"),
    ],
)
def test_what_cannot_be_held_is_refused_and_nothing_is_written(tokenizer, gguf, change, why):
    with pytest.raises(UserError) as error:
        write_modelfile(gguf.parent / "M", gguf, tokenizer=tokenizer, **change)
    assert why in str(error.value)
    assert sorted(path.name for path in gguf.parent.iterdir()) == ["m.gguf"]


def test_paths_of_the_model(tokenizer, gguf, tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        write_modelfile(tmp_path, tmp_path / "none.gguf", tokenizer=tokenizer)
    odd = tmp_path / "my model é.gguf"
    odd.write_bytes(b"GGUF")
    assert (
        parse_modelfile(write_modelfile(tmp_path, odd, tokenizer=tokenizer).read_text()).one("FROM")
        == "./my model é.gguf"
    )
    (tmp_path / "elsewhere").mkdir()
    path = write_modelfile(tmp_path / "elsewhere", gguf, tokenizer=tokenizer)
    assert parse_modelfile(path.read_text()).one("FROM") == str(gguf)


# --- which template Ollama reads ------------------------------------------------------------------------------------

# What each real template does that counts here, in as few words (the real ones were tried by hand: 25 of the 27 of
# llama.cpp's that a TEMPLATE can be derived from are read in its place, those of Gemma 2 and Phi-3.5 are not).
LOOP = "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
TRAITS = {
    "Llama 3.1, 3.2, 3.3": "{% if tools is not none %}{{ tools }}{% endif %}{% if m.role == 'ipython' %}{% endif %}",
    "Qwen2.5": "{% if tools %}<tools></tools>{% endif %}{{ message.tool_calls }}<tool_call><tool_response>",
    "Mistral Small": "{% if message['role'] == 'tool' %}[TOOL_RESULTS]{% endif %}{{ message['tool_calls'] }}",
    "Granite 4": "{% if available_tools %}<|tool_call|>{% endif %}",
    "calls alone": "{{ message.tool_call }}",
    "Qwen3": "{% if tools %}{% endif %}<think>\n\n</think>",
    "both tags": "{{ '<think>' + reasoning + '</think>' }}",
    "cuts thoughts": '{% set content = content.split("</think>")[-1] %}',
}
USED = {
    "Gemma 2": "{{ raise_exception('System role not supported') }}<start_of_turn>model",
    "Phi-3.5": "<|end|>{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "one tag": "{{ content.split('<think>') }}",
    "cuts, but has the reasoning by itself": "{{ content.split('</think>') }}{{ m.reasoning_content }}",
    "a tool": "{% if m.role == 'tool' %}{% endif %}",
    **CHAT_TEMPLATES,
}


@pytest.mark.parametrize("name", [*TRAITS, *USED])
@pytest.mark.parametrize("ours", ["llama-3.1", "chatml", "embedded"])
def test_which_template_is_read(name, ours):
    choice = choose_template(LOOP + {**TRAITS, **USED}[name], GO_TEMPLATES[ours], "llama")
    assert choice.source == ("gguf" if name in TRAITS else "template")
    assert ("tools" in choice.reason or "thinking" in choice.reason) and "0.30" in str(choice)
    assert choose_template(LOOP + {**TRAITS, **USED}[name], GO_TEMPLATES[ours], "gemma4").source == "renderer"


TOOLS, CALLS = "{% if tools %}{% endif %}", "{{ m.tool_calls }}<tool_response>"
ASKS = "{{ if .Tools }}tools{{ end }}"
ANSWERS = ASKS + '{{ range .Messages }}{{ if eq .Role "tool" }}{{ len .ToolCalls }}{{ end }}{{ end }}'
THINKS = "{{ range .Messages }}{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ end }}"


@pytest.mark.parametrize(
    "jinja, template, source",
    [
        (TOOLS, ASKS, "template"),
        (TOOLS + CALLS, ASKS, "gguf"),  # it reads results, too
        (TOOLS + CALLS, ANSWERS, "template"),
        (TOOLS + "<think></think>", ANSWERS, "template"),  # offers more, and yet doesn't read results
        (TOOLS + CALLS + "<think></think>", ANSWERS, "gguf"),
        ("<think></think>", THINKS, "template"),
        (TOOLS + "<think></think>", THINKS, "gguf"),
        (TOOLS, THINKS, "template"),  # as many, though others
        (TOOLS, "{{ .Suffix }}{{ .Prompt }}", "template"),
        ("<think></think>", "{{ .Tools }}", "template"),
        (None, ASKS, "template"),
        ("", ASKS, "template"),
        (TOOLS, None, "gguf"),
        (TOOLS, "", "gguf"),
        ("x" * 2000, None, "gguf"),
        ("x" * 1999, None, "unknown"),  # may be taken for a well-known one
        (None, None, "none"),
        (TOOLS, "{{ printf .System }}", "unknown"),  # no part of the language that is read here
    ],
)
def test_the_rule_of_choice(jinja, template, source):
    assert choose_template(jinja, template).source == source


@pytest.mark.parametrize(
    "template, offers",
    [
        ("{{ $.Tools }}", {"tools"}),
        ("{{ range $i, $t := .Tools }}{{ $t }}{{ end }}", {"tools"}),
        ('{{ define "x" }}{{ .Tools }}{{ end }}', {"tools"}),
        (".Tools {{/* .Tools */}}{{ `.Tools` }}", set()),
        ("{{ .Thinking }}", set()),
        ("<think>{{ .Thinking }}</think>", set()),
        ("{{ range .Messages }}<think>{{ .Thinking }}</think>{{ end }}", {"thinking"}),
        ("{{ range .Messages }}{{ if .Role }}<a>{{ .Thinking }}</a>{{ end }}{{ end }}", {"thinking"}),
        ("{{ range .Messages }}{{ if .Role }}{{ else }}<a>{{ .Thinking }}</a>{{ end }}{{ end }}", {"thinking"}),
        ("{{ range .Messages }}{{ if .Thinking }}{{ .Thinking }}{{ end }}{{ end }}", set()),
        ("{{ range .Messages }} {{ .Thinking }}</think>{{ end }}", set()),
        ("{{ range $m := .Messages }}<think>{{ $m.Thinking }}</think>{{ end }}", set()),  # not seen by Ollama
        ("{{ range .Tools }}<think>{{ .Thinking }}</think>{{ end }}", {"tools"}),
        ("{{ range .Messages }}<think>{{ len .Thinking }}</think>{{ end }}{{ .Suffix }}", {"thinking", "insert"}),
        (ANSWERS, {"tools", "tool results"}),
    ],
)
def test_what_a_template_offers(template, offers):
    assert find_go_offers(template) == offers


@pytest.mark.parametrize("name", GO_TEMPLATES)
def test_our_templates_offer_nothing_but_replies(name):
    assert find_go_offers(GO_TEMPLATES[name]) == set() == find_jinja_offers(CHAT_TEMPLATES["llama-3.1"])


@pytest.fixture
def headed(tmp_path):
    "A function that writes a GGUF by llama.cpp's own package: a header with values of every kind, no weights."
    gguf = pytest.importorskip("gguf")

    def write(template, architecture="llama", name="m.gguf"):
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        writer.add_uint32("a.number", 7)
        writer.add_float64("a.float", 0.5)
        writer.add_bool("a.switch", True)
        writer.add_token_list([b"a", "é".encode(), b""])
        writer.add_token_types([1, 3, 1])
        writer.add_array("a.nest", [["x", "yz"], ["w"]])
        if template is not None:
            writer.add_chat_template(template)
        writer.add_string("last", "naïve 東京")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return tmp_path / name

    return write


def test_the_header_is_read_as_by_the_gguf_package(headed):
    import gguf

    path = headed("{{ é }}")
    reader = gguf.GGUFReader(path)
    texts = {key: part.contents() for key, part in reader.fields.items() if part.types == [gguf.GGUFValueType.STRING]}
    assert read_header_texts(path) == texts and texts["last"] == "naïve 東京"
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="m.gguf can't be read as a GGUF"):
            read_header_texts(path)
    for size in (2**31, 2**63 - 1, 2**64 - 1):  # a length that leads far beyond the end
        path.write_bytes(whole[:24] + size.to_bytes(8, "little") + whole[32:])
        with pytest.raises(UserError, match="m.gguf can't be read as a GGUF"):
            read_header_texts(path)
    path.write_bytes(b"PK" + whole[2:])
    with pytest.raises(UserError, match="it begins with b'PKUF'"):
        read_header_texts(path)
    with pytest.raises(UserError, match="can't be read as a GGUF"):
        read_header_texts(path.parent)


def test_the_template_counts_that_is_in_the_file(tokenizer, headed, capsys):
    "The tokenizer's own has no word of tools; the file's has, or is another one."
    own = tokenizer.chat_template
    path = write_modelfile(headed(own).parent, headed(own), tokenizer=tokenizer)
    assert (
        capsys.readouterr().err == ""
        and predict_template(parse_modelfile(path.read_text()), headed(own)).source == "template"
    )
    write_modelfile(path, headed("{# tools #}" + own), tokenizer=tokenizer)
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert "reads the chat template in the GGUF" in said.err and "offers tools, and TEMPLATE doesn't" in said.err
    assert "the file holds another chat template than the one of training" in said.err
    both = copy.deepcopy(tokenizer)
    both.chat_template = "{# tools #}" + own
    write_modelfile(path, headed(both.chat_template), tokenizer=both)
    said = capsys.readouterr().err
    assert "prompts that end with the user's turn stay the same" in said and "OLLAMA_GO_TEMPLATE=1" in said
    assert "with the assistant's turn is left open" in said and "TEMPLATE" in path.read_text()
    write_modelfile(path, headed(own, "laguna"), tokenizer=tokenizer)
    assert "reads neither TEMPLATE nor the chat template in the GGUF" in capsys.readouterr().err
    path.write_text("FROM ./m.gguf\nPARSER qwen3\n")
    assert predict_template(parse_modelfile(path.read_text()), headed(own)).source == "renderer"


def test_a_file_that_is_no_gguf_is_said(tokenizer, gguf, capsys):
    write_modelfile(gguf.parent, gguf, tokenizer=tokenizer)
    assert "isn't known, because" in (said := capsys.readouterr().err) and "m.gguf can't be read as a GGUF" in said


def test_a_modelfile_without_template_needs_the_template_of_training_in_the_file(tokenizer, headed, gguf, capsys):
    own = "{# tools #}" + tokenizer.chat_template
    both = copy.deepcopy(tokenizer)
    both.chat_template = own
    for other in (None, tokenizer.chat_template, own + " "):
        with pytest.raises(UserError, match="is not the one of training, and without TEMPLATE Ollama would read it"):
            write_modelfile(gguf.parent, headed(other), tokenizer=both, without_template=True)
    gguf.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="can't be read as a GGUF"):
        write_modelfile(gguf.parent, gguf, tokenizer=both, without_template=True)
    assert not (gguf.parent / "Modelfile").exists()
    dated = CHAT_TEMPLATES["llama-3.1"]  # its date is pinned in the file
    path = write_modelfile(
        gguf.parent, headed(pin_date(dated)), dated, tokenizer=both, system="Hi.", without_template=True
    )
    found = parse_modelfile(path.read_text())
    assert found.one("TEMPLATE") is None and found.one("SYSTEM") == "Hi." and "<|eot_id|>" in found.parameters["stop"]
    assert "may be taken for a well-known one" in capsys.readouterr().err


# A last reply is written with an empty thought before it, as Qwen3's template does; no TEMPLATE can say that.
EMPTY_THOUGHT = "{% set t = '<think></think>' if loop.last and m.role == 'assistant' else '' %}{{ '<'"
THOUGHT = HEADERS.replace("{{ '<'", EMPTY_THOUGHT).replace("m.content", "t + m.content") + ASK


def test_a_run_whose_template_cannot_be_derived_gets_a_modelfile_without_one(tokenizer, headed, tmp_path, capsys):
    thinks = copy.deepcopy(tokenizer)
    thinks.chat_template = THOUGHT
    why = modelfile_refusal(thinks)
    assert "<think></think>" in why and "in one place and" in why
    assert (
        "go_template" not in why and "without_template" not in why and "0.30" in why
    )  # words of the command line's door
    assert modelfile_refusal(tokenizer) is None and modelfile_refusal(thinks, "llama-3.2") is None
    with pytest.raises(UserError, match="there is no template 'alpaca'"):
        modelfile_refusal(thinks, "alpaca")
    thinks.save_pretrained(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text(f"format: {RUN_FORMAT}\nsystem: Be brief.\nmax_seq_length: 256\n")
    found = parse_modelfile(modelfile_for(tmp_path / "run", headed(THOUGHT)).read_text())
    assert (
        found.one("TEMPLATE") is None and found.one("SYSTEM") == "Be brief." and found.parameters["num_ctx"] == ["256"]
    )
    assert why in (said := capsys.readouterr().err) and "reads the chat template in the GGUF" in said
    with pytest.raises(
        UserError, match="no TEMPLATE for Ollama can be derived.*pass go_template=, or without_template=True"
    ):
        write_modelfile(tmp_path / "M", headed(THOUGHT), tokenizer=thinks)
    with pytest.raises(UserError, match="is not the one of training"):  # and none where the file has another template
        modelfile_for(tmp_path / "run", headed(tokenizer.chat_template), tmp_path / "M")
    assert not (tmp_path / "M").exists()


# --- create and run -------------------------------------------------------------------------------------------------


class StandIn(BaseHTTPRequestHandler):
    "NOT Ollama: records what the real client sends, and answers in the shape that the client expects."

    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200 if "error" not in body else 400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer({"models": []})

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, body))
        self.answer({"status": "success"})

    def log_message(self, *args):
        pass


@pytest.fixture
def stand_in():
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_real_client_sends_the_modelfile_to_a_stand_in_server(tokenizer, gguf, stand_in):
    "Ollama itself is not run here: only what its own Python client sends is looked at."
    pytest.importorskip("ollama")
    host = f"127.0.0.1:{stand_in.server_port}"
    path = write_modelfile(
        gguf.parent, gguf, tokenizer=tokenizer, system="Be brief.", parameters={"num_ctx": 64}, license="free"
    )
    result = ollama_create("my-model", path, host=host)
    assert (result.done, str(result)) == (True, "created my-model (success)")
    (blob, data), (create, request) = stand_in.seen
    request = json.loads(request)
    assert data == b"GGUF" and create == "/api/create"
    assert request["files"] == {"m.gguf": blob.removeprefix("/api/blobs/")}
    assert (request["model"], request["system"], request["license"]) == ("my-model", "Be brief.", ["free"])
    assert request["template"] == GO_TEMPLATES["embedded"]
    assert request["parameters"]["num_ctx"] == 64 and request["parameters"]["temperature"] == 0.7
    assert request["parameters"]["stop"] == ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    gguf.unlink()
    with pytest.raises(UserError, match="names .*m.gguf, which isn't there"):
        ollama_create("my-model", path, host=host)


@pytest.mark.parametrize(
    "text, why",
    [
        ("FROM ./m.gguf\n# a comment\nADAPTER ./lora.gguf\n", "line 3 of .*M has ADAPTER, .*doesn't send"),
        ("\n\nrenderer qwen3-coder\nFROM ./m.gguf\n", "line 3 of .*M has RENDERER"),
        ('FROM ./m.gguf\nSYSTEM """a\nb"""\nPARSER qwen3\n', "line 4 of .*M has PARSER"),
        ("FROM ./m.gguf\r\nREQUIRES 0.30.0\r\n", "line 2 of .*M has REQUIRES"),
        ("FROM ./m.gguf\nDRAFT ./m.gguf\n", "line 2 of .*M has DRAFT"),
        ("FROM ./m.gguf\nFROM ./mmproj.gguf\n", "M has FROM in the lines 1, 2, and one GGUF is sent"),
        ("FROM ./folder\n", "line 1 of .*M says FROM ./folder, which is a folder, .*safetensors"),
        ("FROM .\n", "which is a folder"),
        (
            "SYSTEM x\nFROM llama3.2\n",
            "line 2 of .*M says FROM llama3.2, which is not a file; if it is a model in Ollama",
        ),
        ("FROM ./none.gguf\n", "names .*none.gguf, which isn't there: export it again, or correct FROM in line 1"),
        ("FROM none.gguf\n", "names .*none.gguf, which isn't there"),
        (
            "FROM ./m.gguf\nPARAMETER top_q 1\n",
            "line 2 of .*M has PARAMETER top_q 1, which Ollama's server doesn't know",
        ),
        ("FROM ./m.gguf\nPARAMETER mirostat 1\n", "PARAMETER mirostat 1, which Ollama's server doesn't know"),
        ("FROM ./m.gguf\nPARAMETER num_ctx 2k\n", "PARAMETER num_ctx 2k, which should be a whole number"),
        ("FROM ./m.gguf\nPARAMETER num_ctx 64.0\n", "which should be a whole number"),
        ("FROM ./m.gguf\nPARAMETER temperature nan\n", "which should be a number"),
        ("FROM ./m.gguf\nPARAMETER top_p 1_0\nPARAMETER top_p 1\n", "line 2 .*which should be a number"),
        ("FROM ./m.gguf\nPARAMETER use_mmap 3\n", "which should be true or false"),
    ],
)
def test_what_the_client_would_drop_is_refused(gguf, stand_in, text, why):
    "Nothing is sent; the command that keeps it stands in the message, but where no command would help."
    pytest.importorskip("ollama")
    (gguf.parent / "folder").mkdir()
    (gguf.parent / "M").write_bytes(text.encode())
    with pytest.raises(UserError, match=why) as error:
        ollama_create("my-model", gguf.parent / "M", host=f"127.0.0.1:{stand_in.server_port}")
    assert stand_in.seen == []
    helped = "PARAMETER" not in text and "none.gguf" not in text
    assert (f"type ollama create my-model -f {gguf.parent / 'M'}" in str(error.value)) == helped


def test_every_parameter_is_sent_as_its_kind(gguf, stand_in):
    "Stops that look like numbers stay text; the last of several values counts, as in Ollama."
    pytest.importorskip("ollama")
    lines = ["stop 1", "stop true", "top_k 1", "top_k 40", "temperature 1", "min_p .5e-1", "use_mmap False", "seed -1"]
    (gguf.parent / "M").write_text("FROM ./m.gguf\n" + "".join(f"PARAMETER {line}\n" for line in lines))
    ollama_create("my-model", gguf.parent / "M", host=f"127.0.0.1:{stand_in.server_port}")
    request = json.loads(stand_in.seen[-1][1])
    assert request["parameters"] == {
        "stop": ["1", "true"],
        "top_k": 40,
        "temperature": 1.0,
        "min_p": 0.05,
        "use_mmap": False,
        "seed": -1,
    }
    assert "template" not in request


def test_without_a_server_the_commands_come_back(tokenizer, gguf):
    path = write_modelfile(gguf.parent, gguf, tokenizer=tokenizer)
    result = ollama_create("my-model", path, host="127.0.0.1:9")
    assert not result.done and f"ollama create my-model -f {path}" in str(result) and "ollama serve" in str(result)
    assert "ollama run my-model 'What is machine learning?'" in str(result)
    assert "'a b'" in ollama_commands("m", "a b")
    with pytest.raises(UserError, match="can't be a model's name"):
        ollama_create("my model", path)
    with pytest.raises(UserError, match="there is no Modelfile"):
        ollama_create("my-model", path.parent / "none")
