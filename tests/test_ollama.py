"""Ollama's templates and Modelfiles: our renderer against Go's own text/template, and what a file can hold."""

import base64
import copy
import hashlib
import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_templates import TEMPLATES
from repository import ROOT, examples, go_command

from qlora_nb.chat_templates import CHAT_TEMPLATES
from qlora_nb.core import EMBEDDED_MODEL, UserError
from qlora_nb.gguf_tokens import pin_date
from qlora_nb.go_template import GO_TEMPLATES, GO_TRIM, JsonDict, add_thought, quote_go, render_go
from qlora_nb.modelfile import format_modelfile, parse_modelfile, quote_value
from qlora_nb.ollama_client import ollama_commands, ollama_create, ollama_run
from qlora_nb.ollama_export import (
    awkward_conversations,
    derive_go_template,
    modelfile_for,
    modelfile_refusal,
    split_thoughts,
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
	Words map[string]string
}

type Case struct {
	Template string
	Data Data
}

func run(c Case) map[string]any {
	asJSON := func(v any) string { b, _ := json.Marshal(v); return string(b) }
	t, err := template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": asJSON}).Parse(c.Template)
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
        return render_go(template, {"Words": {}, **data, "Number": data.get("Number", 0)}), None
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
        ".Words",
    ]
)
constants = st.sampled_from(
    ['"user"', '"a\\n\\"b\\u00e9"', "`r\\n`", "0", "1", "2", "-1", "true", "false", '""', '"é"']
)


CALLS_OF_GO = "eq ne lt le gt ge and or not len index slice print printf printf println json".split()


@st.composite
def a_call(draw, depth=2):
    name = draw(st.sampled_from(CALLS_OF_GO))
    words = [name]
    if name == "printf" and draw(st.integers(0, 5)):
        words.append(
            draw(st.sampled_from(['"%s"', '"%v:%s%%"', '"%d"', '"%t %v"', '"%v %v"', '"%q"', '"%5d"', '"a"', "`%s\n`"]))
        )
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
    st.just("range $k, $v := .Words"),
    st.one_of(st.just(".Messages"), pipelines).map("with {}".format),
    pipelines.map("with $x := {}".format),
    pipelines.map("if $y := {}".format),
    pipelines.map('block "b" {}'.format),
)
leaves = st.one_of(
    plain,
    action(pipelines),
    action(st.just("$x := .System")),
    action(st.just("$x = .Role")),
    action(st.just("/* no */")),
    action(st.sampled_from(["break", "continue"])),
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
    data = {**to_ollama_data(messages), "Number": 2, "Words": {"b": "2", "a": "é"}}
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
    data["Words"] = {"b": "2", "a": "é"}
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
        '{{ range .Messages }}{{ if eq .Role "user" }}{{ continue }}{{ end }}{{ .Role }}{{ end }}': "assistant",
        "{{ range .Messages }}{{ range $.Messages }}{{ .Role }}{{ break }}{{ end }};{{ end }}": "user;user;",
        "{{ range $k, $v := .Words }}{{ $k }}={{ $v }} {{ end }}": "a=é b=2 ",
        '{{ with $x := .Words }}{{ len . }}{{ len $x }}{{ else }}no{{ end }}{{ with "" }}a{{ else }}b{{ end }}': "22b",
        '{{ block "t" .Number }}<{{ . }}>{{ end }}{{ template "t" 3 }}': "<2><3>",
        '{{ printf "%s\\n\\n%v %d%%" "a" true 5 }}|{{ print 1 2 "a" 3 true }}': "a\n\ntrue 5%|1 2a3 true",
        '{{ println "a" 1 }}{{ println }}': "a 1\n\n",
        '{{ json "<é>&" }}{{ json true }}{{ json .Number }}': '"\\u003cé\\u003e\\u0026"true2',
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
        ("é{{ urlquery 1 }}", "line 1, column 5: 'urlquery' is not in the supported part of the language"),
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


@pytest.mark.parametrize("name", ["embedded", "llama-3.1", "chatml", *DERIVED])
def test_a_thought_is_written_where_training_wrote_it(chatml, go, name):
    "A client sends thought and answer apart; without a thought nothing changes. Ollama sees the tags."
    jinja = None if name == "embedded" else DERIVED.get(name, name)
    plain, thinks = (derive_go_template(chatml, jinja, thinking) for thinking in (False, True))
    assert find_go_offers(plain) == set() and find_go_offers(thinks) == {"thinking"}
    compared = 0
    for messages in awkward_conversations():
        data = to_ollama_data(to_ollama_messages(messages))
        assert render_go(thinks, data) == render_go(plain, data) == go(thinks, data)[0]
        for whole, apart in split_thoughts([messages]):
            try:
                want = render(whole, chatml, jinja, whole[-1]["role"] != "assistant").removeprefix(chatml.bos_token)
            except UserError:
                continue
            data = to_ollama_data(to_ollama_messages(apart))
            assert render_go(thinks, data) == go(thinks, data)[0] == want
            compared += 1
    assert compared > 20


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


@pytest.mark.parametrize(
    "text, want",
    [
        ("\ufeffFROM m\n", [("FROM", "m")]),  # a byte order mark
        ("\u200bFROM m", [("FROM", "m")]),  # what can't be printed is dropped
        ("FROM m\nPARAMETER  x\n", [("FROM", "m"), ("PARAMETER ", "x")]),  # two blanks: a parameter without a name
        ("FROM m\nPARAMETER\tstop\t x ", [("FROM", "m"), ("PARAMETER stop", "x")]),
        ("FROM m\nSYSTEM ", [("FROM", "m"), ("SYSTEM", "")]),
        ("FROM\u00a0m\n", None),  # a no-break space ends no name
        ("FROM", None),
        ("FROM\nm\n", None),
        ("FROM m\n\x0b", None),
        ("FROM m\nMESSAGE  user hi\n", None),
        ("FROM m\nPARAMETER stop\n", None),
        ("FROM m\nſystem x\n", None),
    ],
)
def test_edges_are_read_as_ollama_reads_them(text, want):
    "60,000 random texts were read alike by its parser.ParseFile of 0.33, and by ours."
    if want is None:
        with pytest.raises(UserError):
            parse_modelfile(text)
    else:
        assert parse_modelfile(text).instructions == want


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
        (TOOLS, "{{ urlquery .System }}", "unknown"),  # no part of the language that is read here
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
    with pytest.raises(UserError, match="is not a GGUF file"):
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
    before = path.read_text()
    for more in ({}, {"go_template": GO_TEMPLATES["embedded"]}):
        with pytest.raises(
            UserError, match="is not the one of training, and Ollama .* would read it, because .* tools"
        ):
            write_modelfile(path, headed("{# tools #}" + own), tokenizer=tokenizer, **more)
    assert path.read_text() == before
    both = copy.deepcopy(tokenizer)
    both.chat_template = "{# tools #}" + own
    write_modelfile(path, headed(both.chat_template), tokenizer=both, system="Hi.")
    said, found = capsys.readouterr(), parse_modelfile(path.read_text())
    assert said.out == "" and len(said.err.splitlines()) == 1 and "offers tools, and TEMPLATE doesn't" in said.err
    assert "prompts that end with the user's turn are as they were trained" in said.err and "is left open" in said.err
    assert (found.one("TEMPLATE"), found.one("REQUIRES"), found.one("SYSTEM")) == (None, "0.30.0", "Hi.")
    assert "<|eot_id|>" in found.parameters["stop"] and path.read_text().startswith("# for Ollama 0.30.0 and newer")
    assert predict_template(found, headed(both.chat_template)).source == "gguf"
    write_modelfile(path, headed(both.chat_template), tokenizer=both, go_template=GO_TEMPLATES["embedded"])
    assert "OLLAMA_GO_TEMPLATE=1" in capsys.readouterr().err and "TEMPLATE" in path.read_text()  # what was given stays
    write_modelfile(path, headed(own, "laguna"), tokenizer=tokenizer)
    assert "reads neither TEMPLATE nor the chat template in the GGUF" in capsys.readouterr().err
    path.write_text("FROM ./m.gguf\nPARSER qwen3\n")
    assert predict_template(parse_modelfile(path.read_text()), headed(own)).source == "renderer"


def test_an_older_server_gets_its_template(tokenizer, headed, capsys):
    both = copy.deepcopy(tokenizer)
    both.chat_template = "{# tools #}" + tokenizer.chat_template
    gguf = headed(both.chat_template)
    for version, kept in (("0.29", True), ("v0.29.5", True), ("0.30.0", False), ("0.33.0-rc2", False), ("1", False)):
        found = parse_modelfile(write_modelfile(gguf.parent, gguf, tokenizer=both, ollama=version).read_text())
        assert (found.one("TEMPLATE") is not None, found.one("REQUIRES") is None) == (kept, kept), version
        assert ("which reads its TEMPLATE; Ollama (0.30" in capsys.readouterr().err) == kept
    with pytest.raises(UserError, match="'new' is not a version of Ollama"):
        write_modelfile(gguf.parent, gguf, tokenizer=both, ollama="new")
    with pytest.raises(UserError, match="Ollama 0.29 reads TEMPLATE and nothing else"):
        write_modelfile(gguf.parent, gguf, tokenizer=both, ollama="0.29", without_template=True)
    thinks = copy.deepcopy(tokenizer)
    thinks.chat_template = THOUGHT
    with pytest.raises(UserError, match="Ollama 0.29 needs a TEMPLATE, and none can be derived, .*use Ollama 0.30.0"):
        write_modelfile(gguf.parent, headed(THOUGHT), tokenizer=thinks, ollama="0.29")


def test_a_file_that_is_no_gguf_is_said(tokenizer, gguf, capsys):
    write_modelfile(gguf.parent, gguf, tokenizer=tokenizer)
    assert "isn't known, because" in (said := capsys.readouterr().err) and "m.gguf can't be read as a GGUF" in said


def test_a_modelfile_without_template_needs_the_template_of_training_in_the_file(tokenizer, headed, gguf, capsys):
    own = "{# tools #}" + tokenizer.chat_template
    both = copy.deepcopy(tokenizer)
    both.chat_template = own
    for other in (None, tokenizer.chat_template, own + " "):
        why = "is not the one of training, and Ollama" if other else "has no chat template, and there is no TEMPLATE"
        with pytest.raises(UserError, match=why):
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
    again = write_modelfile(tmp_path / "again", headed(THOUGHT), tokenizer=thinks)  # and so without a run
    assert "TEMPLATE" not in again.read_text() and "REQUIRES 0.30.0" in again.read_text()
    assert why in capsys.readouterr().err
    with pytest.raises(UserError, match="is not the one of training"):  # and none where the file has another template
        modelfile_for(tmp_path / "run", headed(tokenizer.chat_template), tmp_path / "M")
    assert not (tmp_path / "M").exists()


def run_folder(tokenizer, folder, **config):
    "A run's folder, as far as a Modelfile asks for it."
    tokenizer.save_pretrained(folder / "adapter")
    (folder / "config.yaml").write_text(json.dumps({"format": RUN_FORMAT, **config}))
    return folder


ASKS_FOR_THOUGHTS = "Think between <think> and </think>, then answer."


@pytest.mark.parametrize(
    "config, expected, thinks",
    [
        ({}, None, False),
        ({"system": ASKS_FOR_THOUGHTS}, None, True),
        ({"system": "Don't <think>."}, None, False),
        ({"rows_read": {"rows": 9, "thoughts": True}}, None, True),
        ({"system": ASKS_FOR_THOUGHTS, "rows_read": {"thoughts": False}}, None, False),
        ({}, ["<think>\nhm\n</think>\n\n5", "<think>a</think>b", "5"], True),
        ({}, ["<think>\nhm\n</think>\n\n5", "4", "5"], False),
        ({"rows_read": {"thoughts": True, "tools": True}}, None, True),  # its template has no tools to keep
    ],
)
def test_a_run_that_thinks_gets_thinking(tokenizer, headed, tmp_path, config, expected, thinks):
    run = run_folder(tokenizer, tmp_path / "run", **config)
    if expected is not None:
        rows = [{"stage": "before", "stops": True, "expected": text, "reply": ""} for text in expected]
        (run / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = parse_modelfile(modelfile_for(run, headed(tokenizer.chat_template)).read_text())
    assert find_go_offers(found.one("TEMPLATE")) == ({"thinking"} if thinks else set())
    for more, wanted in (({"thinking": True}, True), ({"thinking": False}, False), ({"ollama": "0.8"}, False)):
        found = parse_modelfile(modelfile_for(run, headed(tokenizer.chat_template), **more).read_text())
        assert ("thinking" in find_go_offers(found.one("TEMPLATE"))) == wanted, more


def test_a_base_with_tools_serves_thoughts_by_template_unless_the_run_had_tools(tokenizer, headed, tmp_path, capsys):
    "As many offers, though others: TEMPLATE counts. Its price is that it offers no tools."
    both = copy.deepcopy(tokenizer)
    both.chat_template = "{# tools #}" + tokenizer.chat_template
    run = run_folder(both, tmp_path / "run", rows_read={"thoughts": True})
    gguf = headed(both.chat_template)
    found = parse_modelfile(modelfile_for(run, gguf).read_text())
    assert find_go_offers(found.one("TEMPLATE")) == {"thinking"} and found.one("REQUIRES") is None
    assert predict_template(found, gguf).source == "template" and capsys.readouterr().err == ""
    run_folder(both, tmp_path / "run", rows_read={"thoughts": True, "tools": True})
    found = parse_modelfile(modelfile_for(run, gguf).read_text())
    assert (found.one("TEMPLATE"), found.one("REQUIRES")) == (None, "0.30.0")
    thinks = copy.deepcopy(tokenizer)  # where the Jinja offers both, it counts in any case
    thinks.chat_template = "{# tools <think></think> #}" + tokenizer.chat_template
    run_folder(thinks, tmp_path / "run", rows_read={"thoughts": True})
    assert parse_modelfile(modelfile_for(run, headed(thinks.chat_template)).read_text()).one("TEMPLATE") is None


# --- judged by Ollama's own ------------------------------------------------------------------------------------------

JUDGES = Path(os.environ.get("QLORA_NB_JUDGES") or ROOT / "build/judges")


def golden_data(context):
    "What Ollama makes of one of ggufdoctor's conversations before its template gets it."
    turns = [{"role": turn["role"], "content": turn.get("content") or ""} for turn in context["messages"]]
    data = to_ollama_data(to_ollama_messages(turns))
    for turn, message in zip(context["messages"], data["Messages"]):
        calls = [call["function"] for call in turn.get("tool_calls") or ()]
        arguments = [JsonDict(sorted(call["arguments"].items())) for call in calls]
        message["ToolCalls"] = [{"Function": {"Name": c["name"], "Arguments": a}} for c, a in zip(calls, arguments)]
    data["Tools"] = []
    for tool in context.get("tools", ()):
        known = sorted(tool["function"]["parameters"]["properties"].items())
        properties = JsonDict((name, {"Type": p["type"], "Description": p.get("description", "")}) for name, p in known)
        named = {"Name": tool["function"]["name"], "Description": tool["function"]["description"]}
        data["Tools"].append({"Function": {**named, "Parameters": {"Type": "object", "Properties": properties}}})
    return data


@pytest.mark.heavy
def test_ollamas_own_templates_render_as_recorded():
    "20 templates of Ollama's, rendered by its own package; all are compared but contents that its API can't take."
    folder = JUDGES / "ggufdoctor"
    if not folder.is_dir():
        pytest.skip(
            f"ggufdoctor is not in {JUDGES}: `make judges` fetches it, where the package registry can be reached"
        )
    goldens = json.loads((folder / "ollama_data/goldens.json").read_text())["renders"]
    contexts = {
        f["name"]: f["context"] for f in json.loads((folder / "fixture_data/corpus.json").read_text())["fixtures"]
    }
    compared, refused = 0, []
    for name, cases in goldens.items():
        template = (folder / f"ollama_data/{name}.gotmpl").read_text().replace("\r\n", "\n")
        for case, want in cases.items():
            if isinstance(want, dict):
                refused.append(case)
                continue
            assert render_go(template, golden_data(contexts[case])) == want, (name, case)
            compared += 1
    assert (compared, set(refused)) == (180, {"typed_content"})


# What Ollama's own functions (server/images.go of 0.33, run beside ours on 2,170 pairs of templates, all alike) find in
# each of llama.cpp's 70 templates.
REAL_OFFERS = {
    "": "google-gemma-2-2b-it microsoft-Phi-3.5-mini-instruct",
    "thinking": "HuggingFaceTB-SmolLM3-3B llama-cpp-rwkv-world",
    "tools": "ByteDance-Seed-OSS Cohere2MoE CohereForAI-c4ai-command-r7b-12-2024-tool_use LFM2-8B-A1B"
    " fireworks-ai-llama-3-firefunction-v2 muse-glimmer",
    "thinking, tools": "LFM2.5-8B-A1B LFM2.5-Instruct ibm-granite-granite-3.3-2B-Instruct",
    "thinking, tool results, tools": "Bielik-11B-v3.0-Instruct GLM-4.6 GLM-4.7-Flash Kimi-K2-Thinking MiniMax-M2"
    " NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 NVIDIA-Nemotron-Nano-v2 Qwen-QwQ-32B Qwen-Qwen3-0.6B Qwen3.5-4B Reka-Edge"
    " Spark2.5 StepFun3.5-Flash deepseek-ai-DeepSeek-R1-Distill-Llama-8B deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"
    " deepseek-ai-DeepSeek-V3.1 deepseek-ai-DeepSeek-V3.2 deepseek-ai-DeepSeek-V4-Flash-0731 deepseek-ai-DeepSeek-V4"
    " inclusionai-ling-3.0-flash llama-cpp-deepseek-r1 openbmb-MiniCPM5-1B poolside-Laguna-S-2.1"
    " poolside-Laguna-XS-2.1 poolside-Laguna-XS.2",
}


@pytest.mark.heavy
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_rule_on_real_templates(path):
    offers = {name: offered for offered, names in REAL_OFFERS.items() for name in names.split()}
    jinja, wanted = path.read_text(encoding="utf-8"), offers.get(path.stem, "tool results, tools")
    assert ", ".join(sorted(find_jinja_offers(jinja))) == wanted
    for name, template in GO_TEMPLATES.items():
        plain = {word for word in wanted.split(", ") if word and word != "tool results"}
        assert (choose_template(jinja, template).source == "gguf") == bool(plain), name
        assert (choose_template(jinja, add_thought(template)).source == "gguf") == (len(plain) == 2), name
    assert choose_template(jinja, None, "gemma4").source == "renderer"
    if plain:
        assert choose_template(jinja, None).source == "gguf"


# --- create and run -------------------------------------------------------------------------------------------------


class StandIn(BaseHTTPRequestHandler):
    "NOT Ollama: keeps what it is sent, and answers as its API does (api/types.go, server/routes.go of 0.33)."

    protocol_version = "HTTP/1.1"

    def answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self):
        self.answer(200 if self.path.rpartition("/")[2] in self.server.blobs else 404, {})

    def do_GET(self):
        self.answer(200, {"version": self.server.version, "models": []})

    def do_DELETE(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.models.clear()
        self.answer(200, {})

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":  # Ollama's own client
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, body))
        if self.path.startswith("/api/blobs/"):
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            self.server.blobs[digest] = body
            return self.answer(201 if self.path.endswith(digest) else 400, {})
        self.answer(*getattr(self, self.path.replace("/", "_"))(json.loads(body)))

    def _api_create(self, request):
        named = {**request.get("files", {}), **request.get("adapters", {}), **request.get("draft_files", {})}
        if missing := [name for name, digest in named.items() if digest not in self.server.blobs]:
            return 400, {"error": f"no blob of {missing[0]}"}
        self.server.models[request["model"]] = {k: v for k, v in request.items() if k not in self.server.unknown}
        return 200, {"status": "success"}

    def _api_show(self, request):
        model = self.server.models[request["model"]]
        lines = ["FROM /blob", *(f"{k.upper()} {model[k]}" for k in ("renderer", "parser", "requires") if k in model)]
        lines += ["ADAPTER /blob"] * bool(model.get("adapters")) + ["DRAFT /blob"] * bool(model.get("draft_files"))
        return 200, {"modelfile": "\n".join(lines) + "\n"}

    def _api_chat(self, request):
        model = self.server.models.get(request["model"])
        if model is None:
            return 404, {"error": f"model '{request['model']}' not found"}
        can = ".Thinking" in model.get("template", "")
        if request.get("think") and not can:
            return 400, {"error": f'"{request["model"]}" does not support thinking'}
        content, message = "<think>\n2 + 3 = 5\n</think>\n\nIt is 5.", {"role": "assistant"}
        if can and request.get("think", True):
            message, content = {**message, "thinking": "2 + 3 = 5\n"}, "It is 5."
        return 200, {"message": {**message, "content": content}, "done": True, "done_reason": "stop"}

    def log_message(self, *args):
        pass


@pytest.fixture
def stand_in():
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.seen, server.blobs, server.models, server.version, server.unknown = [], {}, {}, "0.33.0", ()
    server.host = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def created(stand_in):
    "The bodies that came to /api/create."
    return [json.loads(body) for path, body in stand_in.seen if path == "/api/create"]


def test_what_is_sent_is_what_ollamas_own_client_sends(tokenizer, gguf, stand_in):
    client = pytest.importorskip("ollama").Client(host=stand_in.host)
    path = write_modelfile(
        gguf.parent, gguf, tokenizer=tokenizer, system="Be brief.", parameters={"num_ctx": 64}, license="free"
    )
    result = ollama_create("my-model", path, host=stand_in.host)
    assert (result.done, str(result)) == (True, "created my-model (success)")
    (blob, data), (create, request) = stand_in.seen
    request = json.loads(request)
    assert data == b"GGUF" and create == "/api/create"
    assert request["files"] == {"m.gguf": blob.removeprefix("/api/blobs/")}
    assert (request["model"], request["system"], request["license"]) == ("my-model", "Be brief.", ["free"])
    assert request["template"] == GO_TEMPLATES["embedded"]
    assert request["parameters"]["num_ctx"] == 64 and request["parameters"]["temperature"] == 0.7
    assert request["parameters"]["stop"] == ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    names = ("model", "files", "template", "system", "parameters", "license")
    client.create(**{name: request[name] for name in names}, stream=False)
    assert created(stand_in)[1] == request
    ollama_create("again", path, host=stand_in.host)
    assert [path for path, _ in stand_in.seen].count(blob) == 1  # what the server has isn't sent again
    gguf.unlink()
    with pytest.raises(UserError, match="says FROM ./m.gguf, but .*m.gguf isn't there"):
        ollama_create("my-model", path, host=stand_in.host)


@pytest.mark.parametrize(
    "text, sent",
    [
        ("FROM ./m.gguf\nADAPTER ./lora.gguf\n", {"adapters": {"lora.gguf": "lora"}}),
        ("FROM ./m.gguf\nrenderer qwen3-coder\nPARSER qwen3\n", {"renderer": "qwen3-coder", "parser": "qwen3"}),
        ("FROM ./m.gguf\r\nREQUIRES 0.30.0\r\n", {"requires": "0.30.0"}),
        ("FROM ./m.gguf\nDRAFT ./lora.gguf\n", {"draft_files": {"lora.gguf": "lora"}}),
        ("FROM ./m.gguf\nFROM ./lora.gguf\n", {"files": {"m.gguf": "GGUF", "1-lora.gguf": "lora"}}),
        ("FROM llama3.2\nADAPTER ./lora.gguf\n", {"from": "llama3.2", "adapters": {"lora.gguf": "lora"}}),
        ("FROM ./m.gguf\nMESSAGE user Hi\nMESSAGE assistant Ho\n", {"messages": 2}),
    ],
)
def test_every_instruction_is_sent(gguf, stand_in, text, sent):
    (gguf.parent / "lora.gguf").write_bytes(b"lora")
    (gguf.parent / "M").write_bytes(text.encode())
    assert ollama_create("my-model", gguf.parent / "M", host=stand_in.host).done
    [request] = created(stand_in)
    for name, value in sent.items():
        found = request[name]
        if isinstance(value, dict):
            found = {file: stand_in.blobs[digest].decode() for file, digest in found.items()}
        assert (len(found) if name == "messages" else found) == value


@pytest.mark.parametrize("line", ["ADAPTER ./m.gguf", "PARSER qwen3", "RENDERER qwen3-coder", "DRAFT ./m.gguf"])
def test_a_base_is_not_left_under_the_name_of_a_fine_tune(gguf, stand_in, line):
    "A server that doesn't know an instruction drops it without a word."
    stand_in.unknown = ("adapters", "parser", "renderer", "draft_files")
    (gguf.parent / "M").write_text(f"FROM ./m.gguf\n{line}\n")
    with pytest.raises(UserError, match=f"dropped {line.split()[0]} from the Modelfile, so my-model was deleted again"):
        ollama_create("my-model", gguf.parent / "M", host=stand_in.host)
    assert stand_in.models == {}


def test_an_older_server_is_told_before_anything_is_sent(gguf, stand_in):
    (gguf.parent / "M").write_text("FROM ./m.gguf\nREQUIRES 0.30.0\n")
    for version, fits in (
        ("0.14.1", False),
        ("0.29.9", False),
        ("0.30.0-rc2", True),
        ("0.33.1", True),
        ("0.0.0", True),
    ):
        stand_in.version = version
        if fits:
            assert ollama_create("m", gguf.parent / "M", host=stand_in.host).done
            continue
        with pytest.raises(UserError, match=f"is version {version}, and .* requires 0.30.0: .*--ollama {version}"):
            ollama_create("m", gguf.parent / "M", host=stand_in.host)
        assert stand_in.seen == []


@pytest.mark.parametrize(
    "text, why",
    [
        ("FROM ./folder\n", "line 1 of .*M says FROM ./folder, which is a folder, .*safetensors"),
        ("FROM .\n", "which is a folder"),
        ("FROM ./m.gguf\nADAPTER ./folder\n", "line 2 of .* says ADAPTER ./folder, which is a folder"),
        ("FROM ./m.gguf\nADAPTER lora\n", "line 2 of .* says ADAPTER lora, but .* isn't there"),
        ("FROM ./m.gguf\nADAPTER ./m.gguf\nADAPTER ./m.gguf\n", "leave one of each"),
        ("FROM ./m.gguf\nFROM llama3.2\n", "names several models, adapters or drafts, of which Ollama would take one"),
        (
            "FROM ./none.gguf\n",
            "says FROM ./none.gguf, but .*none.gguf isn't there: export it again, or correct line 1",
        ),
        ("FROM none.gguf\n", "but .*none.gguf isn't there"),
        (
            "FROM ./m.gguf\nPARAMETER top_q 1\n",
            "line 2 of .*M has PARAMETER top_q 1, which Ollama's server doesn't know",
        ),
        ("FROM ./m.gguf\nPARAMETER  1\n", "line 2 of .*M has PARAMETER  1, which Ollama's server doesn't know"),
        ("FROM ./m.gguf\nPARAMETER mirostat 1\n", "PARAMETER mirostat 1, which Ollama's server doesn't know"),
        ("FROM ./m.gguf\nPARAMETER num_ctx 2k\n", "PARAMETER num_ctx 2k, which should be a whole number"),
        ("FROM ./m.gguf\nPARAMETER num_ctx 64.0\n", "which should be a whole number"),
        ("FROM ./m.gguf\nPARAMETER temperature nan\n", "which should be a number"),
        ("FROM ./m.gguf\nPARAMETER top_p 1_0\nPARAMETER top_p 1\n", "line 2 .*which should be a number"),
        ("FROM ./m.gguf\nPARAMETER use_mmap 3\n", "which should be true or false"),
    ],
)
def test_what_would_be_dropped_is_refused(gguf, stand_in, text, why):
    "Nothing is sent; the command that would do it stands in the message where there is one."
    (gguf.parent / "folder").mkdir()
    (gguf.parent / "M").write_bytes(text.encode())
    with pytest.raises(UserError, match=why) as error:
        ollama_create("my-model", gguf.parent / "M", host=stand_in.host)
    assert stand_in.seen == []
    assert (f"type ollama create my-model -f {gguf.parent / 'M'}" in str(error.value)) == ("is a folder" in why)


def test_every_parameter_is_sent_as_its_kind(gguf, stand_in):
    "Stops that look like numbers stay text; the last of several values counts, as in Ollama."
    lines = ["stop 1", "stop true", "top_k 1", "top_k 40", "temperature 1", "min_p .5e-1", "use_mmap False", "seed -1"]
    (gguf.parent / "M").write_text("FROM ./m.gguf\n" + "".join(f"PARAMETER {line}\n" for line in lines))
    ollama_create("my-model", gguf.parent / "M", host=stand_in.host)
    [request] = created(stand_in)
    assert request["parameters"] == {
        "stop": ["1", "true"],
        "top_k": 40,
        "temperature": 1.0,
        "min_p": 0.05,
        "use_mmap": False,
        "seed": -1,
    }
    assert "template" not in request
    text = "FROM ./m.gguf\r\nSYSTEM é\r\n"
    for data in (
        text.encode("utf-8-sig"),
        b"\xff\xfe" + text.encode("utf-16-le"),
        b"\xfe\xff" + text.encode("utf-16-be"),
    ):
        (gguf.parent / "M").write_bytes(data)  # as editors of Windows write it
        ollama_create("my-model", gguf.parent / "M", host=stand_in.host)
        assert created(stand_in)[-1]["system"] == "é"


def test_a_reply_comes_with_its_thought(tokenizer, gguf, stand_in):
    "Whether the server splits it off or leaves the tags in."
    for name, thinking in (("thinks", True), ("plain", False)):
        path = write_modelfile(gguf.parent / name, gguf, tokenizer=tokenizer, thinking=thinking)
        ollama_create(name, path, host=stand_in.host)
        for think in (None, True, False):
            if think and not thinking:
                with pytest.raises(UserError, match="does not support thinking.*--thinking"):
                    ollama_run(name, "2 + 3?", think=think, host=stand_in.host)
                continue
            reply = ollama_run(name, "2 + 3?", think=think, host=stand_in.host, options={"temperature": 0})
            assert (reply.done, reply.text, reply.thinking) == (True, "It is 5.", "2 + 3 = 5"), (name, think)
            sent = json.loads(stand_in.seen[-1][1])
            assert sent.get("think") is think and sent["options"] == {"temperature": 0} and sent["stream"] is False
    with pytest.raises(UserError, match="model 'none' not found.: create it first"):
        ollama_run("none", [{"role": "user", "content": "Hi"}], host=stand_in.host)


def test_without_a_server_the_commands_come_back(tokenizer, gguf, monkeypatch):
    path = write_modelfile(gguf.parent, gguf, tokenizer=tokenizer)
    result = ollama_create("my-model", path, host="127.0.0.1:9")
    assert not result.done and f"ollama create my-model -f {path}" in str(result) and "ollama serve" in str(result)
    assert "ollama run my-model 'What is machine learning?'" in str(result)
    assert "'a b'" in ollama_commands("m", "a b")
    assert "ollama run m 'Who?'" in str(ollama_run("m", "Who?", host="127.0.0.1:9"))
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:8")  # never asked for this machine
    assert "no Ollama server answers at http://127.0.0.1:9" in str(ollama_create("m", path))
    with pytest.raises(UserError, match="can't be a model's name"):
        ollama_create("my model", path)
    with pytest.raises(UserError, match="there is no Modelfile"):
        ollama_create("my-model", path.parent / "none")


def test_what_is_no_ollama_is_said(gguf, stand_in, monkeypatch):
    (gguf.parent / "M").write_text("FROM ./m.gguf\n")
    monkeypatch.setattr(StandIn, "do_GET", lambda self: self.answer(200, [1]))
    with pytest.raises(UserError, match="refuses .what answers is not an Ollama server"):
        ollama_create("m", gguf.parent / "M", host=stand_in.host)
    monkeypatch.setattr(StandIn, "do_GET", lambda self: self.answer(500, {"error": "out of luck"}))
    with pytest.raises(UserError, match="refuses .out of luck"):
        ollama_run("m", "Hi", host=stand_in.host)
