"""What people really have: tokenizers, templates and a small model, as `make real` fetches them."""

import json
import runpy
import struct
import unicodedata

import gguf_models
import pytest
import torch
from repository import MISTRALS, ROOT, real_file, real_tokenizer

from qlora_nb.chat_templates import TEMPLATE_DATE
from qlora_nb.core import UserError
from qlora_nb.generation import chat
from qlora_nb.gguf_tokens import read_vocabulary
from qlora_nb.gguf_writer import write_tokenizer
from qlora_nb.loading import load_tokenizer, read_sentencepiece, read_tekken
from qlora_nb.model import add_lora, load_model
from qlora_nb.preflight import check_dataset
from qlora_nb.rows import load_sft_dataset
from qlora_nb.template import Encoder, render
from qlora_nb.workflow import train

REAL_FILES = runpy.run_path(str(ROOT / "tools/real_files.py"))


@pytest.fixture(scope="module")
def texts():
    return REAL_FILES["awkward_texts"]()


# --- fetching -------------------------------------------------------------------------------------------------------


def test_a_part_is_fetched_whole_or_not_at_all(tmp_path):
    def broken(to, scratch):
        (to / "half").write_text("half")
        raise OSError("no route to the registry")

    def sound(to, scratch):
        (to / "whole").write_text("whole")

    REAL_FILES["PARTS"].update(broken=broken, sound=sound)
    assert REAL_FILES["fetch"]("broken", tmp_path) == "OSError: no route to the registry"
    assert REAL_FILES["fetch"]("sound", tmp_path) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["sound", "whole"]
    (tmp_path / "sound/whole").write_text("kept")
    assert REAL_FILES["fetch"]("sound", tmp_path) is None and (tmp_path / "sound/whole").read_text() == "kept"


# --- Mistral's own files --------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["tekken_240718", "tekken_240911"])
def test_a_tekken_file_gives_the_ids_of_mistral_common(name):
    file = MISTRALS[name][0]
    reference = json.loads(real_file("mistral/reference.json").read_text(encoding="utf-8"))
    backend, names = read_tekken(real_file(f"mistral/{file}"))
    assert names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    for text, ids in zip(reference["texts"], reference["ids"][file], strict=True):
        if "[INST]" not in text:  # mistral-common never reads a control token in a text
            assert backend.encode(text, add_special_tokens=False).ids == ids, text
            assert backend.decode(ids) == text
    tokenizer = real_tokenizer(name)
    assert len(tokenizer) == 131072 and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.convert_tokens_to_ids(["[INST]", "[/INST]", "<pad>", "<SPECIAL_999>"]) == [3, 4, 11, 999]


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["mistral_v1", "mistral_v3", "mistral_v7"])
def test_a_sentencepiece_file_gives_the_ids_of_mistral_common(name):
    file = MISTRALS[name][0]
    reference = json.loads(real_file("mistral/reference.json").read_text(encoding="utf-8"))
    tokenizer = real_tokenizer(name)
    for text, ids in zip(reference["texts"], reference["ids"][file], strict=True):
        if "[INST]" not in text:
            turn = tokenizer(f"</s> {text}", add_special_tokens=False)["input_ids"]  # as templates write a turn
            assert turn == [tokenizer.eos_token_id, *ids], text
            if not text.startswith((" ", "▁")):
                assert tokenizer(text)["input_ids"] == [1, *ids], text
                assert tokenizer.decode(ids) == text.replace("▁", " ")


def proto(number, value):
    "A field of a protobuf message."
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)

    def integer(value):
        return bytes([value & 127 | 128]) + integer(value >> 7) if value > 127 else bytes([value])

    if isinstance(value, int):
        return integer(number << 3) + integer(value)
    return integer(number << 3 | 2) + integer(len(value)) + value


def open_vocabulary(path):
    "llama.cpp with the tokenizer of a file alone."
    gguf_models.needed("llama_cpp")
    from qlora_nb.llama import quiet_llama

    with quiet_llama() as llama_cpp:
        return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def llama_ids(llama, text):
    return llama.tokenize(text.encode(), add_bos=False, special=True)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_llama_cpps_vocabularies_of_sentencepiece(name, texts, tmp_path):
    "Their pieces, written as tokenizer.model and read again, give llama.cpp's ids."
    gguf = gguf_models.needed("gguf")
    path = real_file(f"templates/ggml-vocab-{name}.gguf")
    fields = gguf.GGUFReader(path).fields
    columns = [fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type")]
    pieces = (proto(1, p.encode()) + proto(2, float(score)) + proto(3, kind) for p, score, kind in zip(*columns))
    settings = proto(2, proto(3, 2) + proto(35, 1)) + proto(3, proto(1, b"identity") + proto(3, 1) + proto(4, 0))
    (tmp_path / "tokenizer.model").write_bytes(b"".join(proto(1, piece) for piece in pieces) + settings)
    backend, names = read_sentencepiece(tmp_path / "tokenizer.model")
    assert names["bos_token"] == "<s>" and backend.get_vocab_size() == len(columns[0])
    llama = open_vocabulary(path)
    for text in texts:
        if not text.startswith((" ", "▁")) and "</s>" not in text:
            assert backend.encode(text, add_special_tokens=False).ids == llama_ids(llama, text), text


# --- llama.cpp's tokenizers -----------------------------------------------------------------------------------------


def vocabulary_file(tokenizer, path):
    "A GGUF of nothing but the tokenizer, and what was read of it."
    gguf = gguf_models.needed("gguf")
    found = read_vocabulary(tokenizer, len(tokenizer))
    writer = gguf.GGUFWriter(path, "llama")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(64)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    write_tokenizer(writer, found)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return found


def is_nfc(text):
    return unicodedata.is_normalized("NFC", text)


def has_no_marks(text):
    return not any(unicodedata.category(letter).startswith("M") for letter in text)


def any_text(text):
    return True


REAL = {  # tokenizer → its template, llama.cpp's name of its split, and the texts of which both make the same tokens
    "llama3_1": ("meta-llama-Llama-3.1-8B-Instruct", "llama-bpe", any_text),
    "qwen3": ("Qwen-Qwen3-0.6B", "qwen2", is_nfc),
    "deepseek_v3": ("deepseek-ai-DeepSeek-V3.1", "deepseek-v3", any_text),
    "smollm2": (None, "smollm", any_text),
    "tekken_240911": ("mistralai-Mistral-Nemo-Instruct-2407", "tekken", has_no_marks),
    "mistral_v3": (None, "default", lambda text: not text.startswith((" ", "▁"))),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", REAL)
def test_llama_cpp_makes_the_same_tokens(name, texts, tmp_path):
    template, split, same = REAL[name]
    tokenizer = real_tokenizer(name, template)
    found = vocabulary_file(tokenizer, tmp_path / "vocabulary.gguf")
    llama = open_vocabulary(tmp_path / "vocabulary.gguf")
    assert found.pre == split and llama.n_vocab() == len(tokenizer)
    tried = [text for text in texts if same(text) and "</s>" not in text]
    assert len(tried) > 60
    for text in tried:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == llama_ids(llama, text), text
    control = tokenizer.convert_ids_to_tokens([*found.special.values()])
    text = "x".join(control)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == llama_ids(llama, text)


@pytest.mark.heavy
@pytest.mark.parametrize("name, file", [("llama3", "llama-bpe"), ("qwen3", "qwen2")])
def test_llama_cpps_own_vocabularies(name, file, texts):
    tokenizer, llama = real_tokenizer(name), open_vocabulary(real_file(f"templates/ggml-vocab-{file}.gguf"))
    for text in filter(is_nfc, texts):
        if "</s>" not in text:
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == llama_ids(llama, text), text


# --- templates ------------------------------------------------------------------------------------------------------

FIRST, SECOND, LAST = "84. Naïve, isn't it?\n\n    ok", "7, as 3 + 4 = 7.", "It is 7."
QUESTION = [{"role": "user", "content": "What is 12 × 7?"}]
PLAIN = [*QUESTION, {"role": "assistant", "content": FIRST}]
TWO = [*PLAIN, {"role": "user", "content": "And 3 + 4?"}, {"role": "assistant", "content": SECOND}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *PLAIN]
REASONED = [*QUESTION, {"role": "assistant", "content": "84.", "reasoning_content": "12 × 7 is 84."}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds two.", "parameters": PARAMETERS}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}
CALLED = [
    {"role": "user", "content": "3 + 4?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "7", "name": "add", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": LAST},
]
LLAMA = ("<|eot_id|>", '{"name": "add", "parameters": {"a": 3, "b": 4}}', "")
QWEN = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'
NEMO = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 3, "b": 4}, "id": "abcdefghi"}]'
SMALL = '[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 3, "b": 4}'
FAMILIES = {  # tokenizer and template → what ends a reply, how a call is written (None: it isn't), what begins a reply
    ("llama3_1", "meta-llama-Llama-3.1-8B-Instruct"): LLAMA,
    ("llama3_1", "meta-llama-Llama-3.2-3B-Instruct"): LLAMA,
    ("llama3_1", "meta-llama-Llama-3.3-70B-Instruct"): LLAMA,
    ("qwen3", "Qwen-Qwen2.5-7B-Instruct"): ("<|im_end|>", QWEN, ""),
    ("qwen3", "Qwen-Qwen3-0.6B"): ("<|im_end|>", QWEN, "<think>\n\n</think>\n\n"),
    ("deepseek_v3", "deepseek-ai-DeepSeek-V3.1"): ("<｜end▁of▁sentence｜>", None, ""),
    ("tekken_240718", "mistralai-Mistral-Nemo-Instruct-2407"): ("</s>", NEMO, ""),
    ("tekken_240911", "Mistral-Small-3.2-24B-Instruct-2506"): ("</s>", SMALL, ""),
    ("mistral_v3", "mistralai-Mistral-Nemo-Instruct-2407"): ("</s>", NEMO.replace("][", "] ["), ""),
    ("mistral_v7", "Mistral-Small-3.2-24B-Instruct-2506"): ("</s>", SMALL.replace("]a", "] a", 1), ""),
    ("gemma3", None): ("<end_of_turn>", None, ""),
    ("smollm2", None): ("<|im_end|>", None, ""),
}


def learned_texts(rows, tokenizer):
    "What is learned in each row, decoded stretch by stretch."
    found = []
    for row in rows:
        stretch = []
        for token, label in [*zip(row.input_ids, row.labels, strict=True), (None, -100)]:
            if label != -100:
                assert label == token
                stretch.append(token)
            elif stretch:
                found.append(tokenizer.decode(stretch))
                stretch = []
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("name, template", FAMILIES)
def test_a_conversation_becomes_what_the_template_writes(name, template):
    tokenizer, (end, call, begin) = real_tokenizer(name, template), FAMILIES[name, template]
    encoder = Encoder(tokenizer)
    answers = {
        "plain": (PLAIN, None, [FIRST]),
        "two replies": (TWO, None, [FIRST, SECOND]),
        "system": (SYSTEM, None, [FIRST]),
        "tools": (CALLED, TOOLS, [call, LAST]),
    }
    for kind, (messages, tools, replies) in answers.items():
        found = encoder.encode([messages], None, [tools])[0]
        if None in replies:
            assert found.code == "tools_unsupported", (kind, found.why)
            continue
        assert found.code is None and not found.missing, (kind, found.why)
        settings = {"tools": tools, "date_string": TEMPLATE_DATE, "tokenize": True, "return_dict": False}
        if kind == "system" and call in (NEMO, NEMO.replace("][", "] [")):
            # Nemo's template has a system text only where a user's turn comes last: the reply is put behind that.
            asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **settings)
            assert found.input_ids[: len(asked)] == asked and SYSTEM[0]["content"] in tokenizer.decode(asked)
        else:
            assert found.input_ids == tokenizer.apply_chat_template(messages, **settings), kind
        texts = [text.removeprefix(" ") for text in learned_texts((*found.parts, found), tokenizer)]
        assert texts == [begin + reply + end for reply in replies], kind
        assert found.replies == len(replies)
    found = encoder.encode([REASONED])[0]
    if template == "deepseek-ai-DeepSeek-V3.1":  # its prompt closes the thinking before it began
        assert found.code == "generation_prompt_mismatch"
        found = Encoder(tokenizer, template_kwargs={"thinking": True}).encode([REASONED])[0]
    assert found.code is None, found.why
    learned = learned_texts([found], tokenizer)[0].replace("</think>84", "\n</think>\n\n84")  # V3.1 writes no line ends
    assert learned.endswith(f"12 × 7 is 84.\n</think>\n\n84.{end}")


@pytest.mark.heavy
@pytest.mark.parametrize("name, template", [("deepseek_v3", "llama-cpp-deepseek-r1"), ("qwen3", "Qwen-QwQ-32B")])
def test_a_reply_goes_on_where_the_prompt_opened_its_thinking(name, template):
    tokenizer = real_tokenizer(name, template)
    kwargs = {"enable_thinking": True} if name == "qwen3" else None
    found = Encoder(tokenizer, template_kwargs=kwargs).encode([REASONED])[0]
    prompt = render(QUESTION, tokenizer, add_generation_prompt=True, template_kwargs=kwargs)
    assert prompt.endswith("<think>\n") and found.code is None, found.why
    text = tokenizer.decode(found.input_ids).rstrip("\n")
    assert text == prompt + learned_texts([found], tokenizer)[0]
    assert text.removeprefix(prompt).removesuffix(tokenizer.eos_token) == "12 × 7 is 84.\n</think>\n\n84."


@pytest.mark.heavy
def test_the_first_llama_3_template_is_told_its_fault():
    found = Encoder(real_tokenizer("llama3")).encode([PLAIN])[0]
    assert found.code == "generation_prompt_mismatch" and "as the first Llama 3 template does" in found.why


# --- models ---------------------------------------------------------------------------------------------------------


def rows(count=16):
    "Distinct short conversations."
    turns = ({"role": "user", "content": f"What is {i} + {i + 3}?"} for i in range(count))
    return [[turn, {"role": "assistant", "content": f"{i} + {i + 3} = {2 * i + 3}."}] for i, turn in enumerate(turns)]


@pytest.mark.heavy
def test_gemma_3s_token_without_a_row(tmp_path, capfd):
    "262,145 tokens, 262,144 rows: the placeholder for images, that a model without eyes never meets."
    from datasets import Dataset
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    config = Gemma3TextConfig(vocab_size=262144, num_key_value_heads=1, max_position_embeddings=512, **sizes)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    for file in real_file("tokenizers/gemma3").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model, tokenizer = load_model(tmp_path, load_in_4bit=False, max_seq_length=512)
    assert len(tokenizer) == 262145 and tokenizer.convert_ids_to_tokens(262144) == "<image_soft_token>"
    report = check_dataset(Dataset.from_dict({"messages": rows(40)}), tokenizer, 512, model=model)
    assert report.ok, report  # the token is named, as something to know
    with pytest.raises(UserError, match="prepares text in an unknown way"):
        read_vocabulary(tokenizer, 262144)
    said = capfd.readouterr().err
    assert said.count("<image_soft_token> has no row in the embedding, and nothing uses it") == 1


@pytest.mark.heavy
def test_smollm2_from_its_folder_to_a_reply(tmp_path, capfd):
    folder = real_file("smollm2")
    tokenizer = load_tokenizer(folder)
    assert "so the file's own tokenizer is used" in capfd.readouterr().err  # GPT-2's class forgets the digits
    assert tokenizer.tokenize("x 1234") == ["x", "Ġ", "1", "2", "3", "4"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows()))
    model, tokenizer = load_model(folder, max_seq_length=128)
    report = check_dataset(load_sft_dataset(str(data)), tokenizer, 128, model=model)
    assert report.ok and report.summary["usable"] == 16
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "eval_rows": 0, "max_steps": 4}
    run = train(
        add_lora(model, r=8),
        tokenizer,
        load_sft_dataset(str(data)),
        output=tmp_path / "run",
        learning_rate=1e-3,
        **sizes,
    )
    losses = [row["loss"] for row in run.metrics if "loss" in row]
    assert losses[-1] < losses[0] < 5
    model, tokenizer = load_model(folder, adapter=run.path / "adapter", max_seq_length=128)
    said = chat(model, tokenizer, "What is the capital of France?", max_new_tokens=12, do_sample=False)
    assert "Paris" in said
