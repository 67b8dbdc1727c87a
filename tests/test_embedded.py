"""The embedded model and data set are what their recipe makes, and no problem is where it must not be."""

import ast
import hashlib
import json
import random
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from repository import NBS, PACKAGE, read

EMBEDDED_FOLDER = PACKAGE / "embedded"
MODEL = EMBEDDED_FOLDER / "model"
SPLITS = {"train": (3000, "train"), "heldout": (400, "heldout"), "base_task": (300, "heldout")}
CORPUS = "d99be8b1c74e3d5ba0e97590ad39077ebbbcf8de15450293b39de6aea15b903e"
WEIGHTS = "257763dd13818fdc72772e30bd8be10a4891e3c20901c8dc19fcb3f92f99a156"
MEGABYTE = 10**6

# From Meta's Llama-3 release.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = """<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|>
    <|finetune_right_pad_id|> <|reserved_special_token_2|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>
    <|python_tag|>""".split()


def only_defines(statement):
    "Whether it is an import, a function, a class, or a constant in capitals."
    if isinstance(statement, ast.Assign):
        targets = [t for target in statement.targets for t in getattr(target, "elts", [target])]
        return all(isinstance(t, ast.Name) and t.id.isupper() for t in targets)
    return isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom))


@pytest.fixture(scope="module")
def recipe():
    "What the recipe notebook defines before it comes to pre-training."
    names = {"__name__": "recipe"}
    for cell in read(NBS / "31_tiny_base.ipynb")["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if re.search(r"^## Pre-training$", source, re.M):
                return names
        elif not source.startswith("#| eval: false") and all(map(only_defines, ast.parse(source).body)):
            exec(compile(source, f"31_tiny_base, cell {cell['id']}", "exec"), names)
    raise AssertionError("the notebook has no section 'Pre-training'")


@pytest.fixture(scope="module")
def corpus(recipe):
    "The texts of all documents, and the state of the generator after them."
    pairs, rng = recipe["make_corpus"]()
    return [text for _, text in pairs], rng.getstate()


@pytest.fixture(scope="module")
def tables():
    return {name: pq.read_table(EMBEDDED_FOLDER / "data" / f"{name}.parquet") for name in SPLITS}


@pytest.fixture(scope="module")
def rows(tables):
    return {name: table.to_pylist() for name, table in tables.items()}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


# --- a reader of problems that shares no code with the recipe --------------------------------------------------------

BARE = ["What is {}?", "Work out {}.", "{} = ?", "How much is {}?", "Please compute {}."]
BARE = [re.compile(re.escape(form).replace(r"\{\}", r"(\d+) ([-+*/]) (\d+)")) for form in BARE]
SENTENCES = {
    "B": re.compile(r"[A-Z][a-z]+ has (\d+) [a-z]+ of (\d+) [a-z]+\."),
    "A": re.compile(r"[A-Z][a-z]+ has (\d+) [a-z]+\."),
    "+": re.compile(r"(?:(?:He|She) (?:buys|finds)|[A-Z][a-z]+ gives [A-Z][a-z]+) (\d+) more\."),
    "-": re.compile(r"(?:He|She) (?:(?:loses|sells) (\d+)|gives (\d+) to [A-Z][a-z]+)\."),
    "b": re.compile(r"(?:He|She) buys (\d+) [a-z]+ of (\d+) [a-z]+\."),
    "*": re.compile(r"Then (?:he|she) has (twice|three times) as many\."),
}
ASKED = re.compile(r" How many [a-z]+ does [A-Z][a-z]+ have (?:now|in the end)\?")
TIMES = {"twice": 2, "three times": 3}


def calculate(a, op, b):
    assert op != "/" or a % b == 0
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else None}[op]


def read_bare(text):
    "Key and equations of a bare question; None where it is none."
    for i, form in enumerate(BARE):
        if found := form.fullmatch(text):
            a, op, b = found.groups()
            return f"q:{a}{op}{b}:{i}", [(text, [f"{a} {op} {b} = {calculate(int(a), op, int(b))}"])]


def read_story(text):
    "Key, and each sentence with its equations."
    kinds, numbers, told, value = "", [], [], None

    def step(a, op, b):
        return f"{a} {op} {b} = {calculate(a, op, b)}", calculate(a, op, b)

    for sentence in re.split(r"(?<=\.) ", text):
        kind, found = next((k, m) for k, form in SENTENCES.items() if (m := form.fullmatch(sentence)))
        ns = [TIMES.get(n) or int(n) for n in found.groups() if n]
        work = []
        if kind == "A":
            value = ns[0]
        elif kind in "Bb":
            equation, product = step(ns[0], "*", ns[1])
            work.append(equation)
            if kind == "B":
                value = product
            else:
                equation, value = step(value, "+", product)
                work.append(equation)
        else:
            equation, value = step(value, kind, ns[0])
            work.append(equation)
        kinds, numbers, told = kinds + kind, numbers + ns, [*told, (sentence, work)]
    return f"{kinds}:{','.join(map(str, numbers))}", told


def read_problem(text):
    if bare := read_bare(text):
        return bare
    story, asked, rest = text.partition(ASKED.search(text).group())
    assert asked and not rest
    return read_story(story)


def share_of(key):
    number = int.from_bytes(hashlib.sha256(f"qlora_nb:{key}".encode()).digest()[:4], "big") % 100
    return "pretrain" if number < 60 else "train" if number < 90 else "heldout"


# --- the data set ----------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_schema(tables):
    strings = ["id", "reannotated_assistant_content", "problem", "source", "solution"]
    nulls = ["verified", "quality_metrics"]
    wanted = pa.schema([*((name, pa.string()) for name in strings), *((name, pa.null()) for name in nulls)])
    for name, table in tables.items():
        assert table.schema.equals(wanted, check_metadata=True), name
        assert table.num_rows == SPLITS[name][0]
        assert all(table[column].null_count == 0 for column in strings)
        assert set(table["source"].to_pylist()) == {"qlora_nb"}


@pytest.mark.quick
def test_files_are_what_the_recipe_writes(recipe, tables, tmp_path):
    recipe["write_data"](tmp_path / "once")
    recipe["write_data"](tmp_path / "twice")
    for name, table in tables.items():
        once, twice, ours = (
            folder / f"{name}.parquet" for folder in (tmp_path / "once", tmp_path / "twice", EMBEDDED_FOLDER / "data")
        )
        assert once.read_bytes() == twice.read_bytes()
        assert pq.read_table(once).equals(table, check_metadata=True), f"{name}.parquet was made differently"
        metadata = pq.read_metadata(ours)
        assert metadata.row_group(0).column(1).compression == "ZSTD"
        if metadata.created_by == pq.read_metadata(once).created_by:  # another pyarrow may write other bytes
            assert once.read_bytes() == ours.read_bytes()


@pytest.mark.quick
def test_no_problem_twice_and_no_key_in_two_splits(recipe, rows):
    texts = [row["problem"] for split in rows.values() for row in split]
    assert len(set(texts)) == len(texts) == sum(count for count, _ in SPLITS.values())
    ids = [row["id"] for split in rows.values() for row in split]
    assert ids == [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    keys = [read_problem(text)[0] for text in texts]
    assert len(set(keys)) == len(keys)
    for name, (_, wanted) in SPLITS.items():
        for row in rows[name]:
            key = read_problem(row["problem"])[0]
            assert share_of(key) == recipe["share"](key) == wanted, row


def check_reply(row, reasoning):
    "Compare a row with its problem worked out anew; returns the number of steps."
    told = read_problem(row["problem"])[1]
    work = [equation for _, equations in told for equation in equations]
    answer = work[-1].rpartition(" = ")[2]
    assert row["solution"] == answer and 0 <= int(answer) <= 99
    reply = f"The answer is {answer}."
    if reasoning:
        lines = [f"{sentence[:-1]}: {' and '.join(w)}." if w else sentence for sentence, w in told]
        reply = "\n".join(["<think>", *lines, "</think>", "", reply])
    assert row["reannotated_assistant_content"] == reply
    return len(work)


@pytest.mark.quick
def test_replies_are_right(rows):
    for name, wanted in {"train": {2, 3}, "heldout": {2, 3}, "base_task": {1}}.items():
        steps = Counter(check_reply(row, name != "base_task") for row in rows[name])
        assert set(steps) == wanted and min(steps.values()) >= 0.4 * len(rows[name])


@pytest.mark.quick
def test_a_wrong_row_would_be_found(rows):
    "The reader of these tests does not simply agree."
    key, told = read_problem("Eva has 3 bags of 4 keys. She buys 2 packs of 5 keys. How many keys does Eva have now?")
    assert key == "Bb:3,4,2,5" and [w for _, w in told] == [["3 * 4 = 12"], ["2 * 5 = 10", "12 + 10 = 22"]]
    assert read_problem("Work out 12 / 4.") == ("q:12/4:1", [("Work out 12 / 4.", ["12 / 4 = 3"])])
    with pytest.raises(StopIteration):
        read_story("Eva has 3 dogs and a cat.")
    row = rows["train"][0]
    answer = row["solution"]
    for column, old, new in [
        ("solution", answer, str(int(answer) + 1)),
        ("reannotated_assistant_content", f"= {answer}.", f"= {int(answer) + 1}."),
        ("reannotated_assistant_content", "</think>", ""),
        ("problem", "3 bags of 2", "4 bags of 2"),
    ]:
        assert old in row[column]
        with pytest.raises(AssertionError):
            check_reply({**row, column: row[column].replace(old, new)}, reasoning=True)


@pytest.mark.quick
def test_answers_vary(rows):
    for name, split in rows.items():
        answers = Counter(row["solution"] for row in split)
        assert answers.most_common(1)[0][1] <= 0.06 * len(split), name
        assert len(answers) >= 70, name


@pytest.mark.quick
def test_order_is_mixed(rows):
    "Neither sorted nor in blocks: each tenth of a split has both numbers of steps, or both kinds of question."
    for split in rows.values():
        tenth = len(split) // 10
        for start in range(0, len(split), tenth):
            kinds = Counter(
                (row["problem"].count("."), row["reannotated_assistant_content"].count("="))
                for row in split[start : start + tenth]
            )
            assert len(kinds) > 1


@pytest.mark.quick
def test_datasets_reads_it():
    from datasets import Value, load_dataset

    files = {name: str(EMBEDDED_FOLDER / "data" / f"{name}.parquet") for name in SPLITS}
    loaded = load_dataset("parquet", data_files=files)
    assert {name: len(split) for name, split in loaded.items()} == {name: count for name, (count, _) in SPLITS.items()}
    assert loaded["train"].features["verified"] == Value("null")


# --- the pre-training corpus -----------------------------------------------------------------------------------------

USER = re.compile(r"<\|start_header_id\|>user<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", re.S)
COPIES = [
    re.compile(r"Repeat this: (.*)"),
    re.compile(r"(.*) Which numbers are in this text\?"),
    re.compile(r"(.*) Say the (?:first|second|third|fourth) sentence again\."),
    re.compile(r"Write each sentence on a line of its own: (.*)"),
]


def read_user(text):
    "The key of what a user of the corpus says."
    text = re.sub(r" (?:Show the sum|Write the sum first)\.$", "", text)
    for form in COPIES:
        if found := form.fullmatch(text):
            return read_story(found.group(1))[0]
    return read_problem(text)[0]


@pytest.mark.heavy
def test_the_corpus_holds_no_problem_of_the_data_set(corpus, rows):
    documents, _ = corpus
    digest = hashlib.sha256()
    for text in documents:
        digest.update(text.encode())
    assert len(documents) == 400_000 and digest.hexdigest() == CORPUS
    users = {turn for text in documents for turn in USER.findall(text)}
    assert len(users) > 100_000
    problems = {row["problem"] for split in rows.values() for row in split}
    assert not users & problems
    keys = {read_user(text) for text in users}
    assert not keys & {read_problem(text)[0] for text in problems}
    assert {share_of(key) for key in keys} == {"pretrain"}
    # Outside of a user's turn there is no question at all.
    others = [USER.sub("", text) for text in documents]
    assert not any(re.search(r"\?|How many|Work out|Please compute", text) for text in others)


@pytest.mark.heavy
def test_the_tokenizer_is_what_the_recipe_makes(recipe, corpus, tmp_path):
    documents, state = corpus
    rng = random.Random()
    rng.setstate(state)
    bpe = recipe["train_bpe"](documents[:50_000] + recipe["reasoning_rows"](rng))
    recipe["wrap"](bpe).save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (MODEL / path.name).read_text(), path.name


# --- the model's files -----------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_sizes():
    files = [path for path in EMBEDDED_FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".yaml", ".safetensors", ".jinja", ".parquet", ".md"}
    assert sum(path.stat().st_size for path in files) <= 12 * MEGABYTE
    assert sum(path.stat().st_size for path in files if path.suffix == ".parquet") < MEGABYTE / 2


@pytest.mark.quick
def test_weights():
    content = (MODEL / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == WEIGHTS
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    assert {tensor["dtype"] for tensor in tensors.values()} == {"BF16"}
    assert all(size % 64 == 0 for tensor in tensors.values() for size in tensor["shape"])


@pytest.mark.quick
def test_card():
    card = (EMBEDDED_FOLDER / "README.md").read_text(encoding="utf-8")
    assert WEIGHTS in card and "Apache-2.0" in card
    for name, (count, _) in SPLITS.items():
        assert f"| `{name}.parquet` | {count} |" in card


@pytest.mark.quick
def test_configurations_hold_nothing_odd():
    generation, tokenizer, model = (
        json.loads((MODEL / f"{name}.json").read_text()) for name in ("generation_config", "tokenizer_config", "config")
    )
    ids = {"bos_token_id": 757, "eos_token_id": 766, "pad_token_id": 761}
    generation.pop("transformers_version")
    assert generation == ids
    assert ids.items() <= model.items() and model["vocab_size"] == 768
    assert model["architectures"] == ["LlamaForCausalLM"]
    assert tokenizer == {
        "backend": "tokenizers",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "model_max_length": model["max_position_embeddings"],
        "pad_token": "<|finetune_right_pad_id|>",
        "tokenizer_class": "TokenizersBackend",
    }


@pytest.mark.quick
def test_tokenizer_is_llama3s():
    made = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    assert made["truncation"] is None and made["padding"] is None and made["normalizer"] is None
    split, to_bytes = made["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": LLAMA3_SPLIT} and split["behavior"] == "Isolated" and not split["invert"]
    assert to_bytes["type"] == "ByteLevel" and not to_bytes["use_regex"] and not to_bytes["add_prefix_space"]
    assert [token["content"] for token in made["added_tokens"]] == LLAMA3_SPECIAL
    assert [token["id"] for token in made["added_tokens"]] == list(range(757, 768))
    assert all(token["special"] and not token["normalized"] for token in made["added_tokens"])
    template = made["post_processor"]["processors"][1]
    assert template["single"][0] == {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    assert made["model"]["ignore_merges"] and len(made["model"]["vocab"]) == 757


@pytest.mark.quick
def test_tokenizer_round_trip(tokenizer, rows):
    texts = [row[column] for row in rows["heldout"] for column in ("problem", "reannotated_assistant_content")]
    texts += [" two  spaces ", "don't , stop .", "naïve 東京 🙂\r\n\t", "1234567", "", "<think>\n\n</think>"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.decode(ids[1:]) == text
    assert len(tokenizer) == 768
    for token in LLAMA3_SPECIAL:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
        assert tokenizer.decode(tokenizer.encode(token), skip_special_tokens=True) == ""
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.quick
def test_chat_template(tokenizer):
    turns = [{"role": "user", "content": " Hi \n"}, {"role": "assistant", "content": "Yes."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    )
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("assistant<|end_header_id|>\n\n")


# --- the finished run -----------------------------------------------------------------------------------------------


def test_the_run_is_of_this_model_these_data_and_this_template():
    from transformers import AutoTokenizer

    from qlora_nb.core import file_sha256
    from qlora_nb.rows import data_fingerprint, load_sft_dataset
    from qlora_nb.run import RunFolder
    from qlora_nb.template import template_fingerprint

    run = RunFolder.open(EMBEDDED_FOLDER / "run")
    config, tokenizer = run.config, AutoTokenizer.from_pretrained(MODEL)
    assert run.summary["adapter_sha256"] == file_sha256(run.adapter / "adapter_model.safetensors")
    assert config["fingerprints"] == {
        "data": data_fingerprint(load_sft_dataset()),
        "eval_data": data_fingerprint(load_sft_dataset(split="heldout").select(range(200))),
        "template": template_fingerprint(tokenizer),
    }
    assert len(run.metrics) == config["max_steps"] and len(run.replies) == 2 * 200


def test_the_run_answers_as_its_file_says(tmp_path):
    "By the model of today: twenty of the stored replies, and their score."
    from qlora_nb.evaluation import evaluate
    from qlora_nb.model import open_run
    from qlora_nb.rows import load_sft_dataset
    from qlora_nb.run import RunFolder, copy_embedded_run

    path = copy_embedded_run(tmp_path)
    stored = [row for row in RunFolder.open(path).replies if row["stage"] == "after"][:20]
    rows = load_sft_dataset(split="heldout").select(range(20))
    found = evaluate(*open_run(path), rows, max_new_tokens=112)
    same = sum(ours["reply"] == theirs["reply"] for ours, theirs in zip(found.rows, stored))
    assert same >= 18, f"{same} of 20"  # other processors round otherwise
    assert abs(found.exact - sum(row["exact"] for row in stored) / 20) <= 0.1
