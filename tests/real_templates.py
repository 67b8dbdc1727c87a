"""Real chat templates and tokenizers, where they are there: in $QLORA_NB_REAL, else in build/real (`make real`).

    python tests/real_templates.py

prints which of the templates take plain conversations, and why the others don't. A template whose tokenizer isn't there
gets a stand-in: the embedded model's tokenizer, with the control tokens that the template names.
"""

import copy
import functools
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("QLORA_NB_REAL") or ROOT / "build/real")
TEMPLATES = sorted((REAL / "templates").glob("*.jinja"))
TOKENIZERS = {path.parent.name: path.parent for path in sorted((REAL / "tokenizers").glob("*/tokenizer.json"))}
# What looks like a control token in the templates that we know.
CONTROL = re.compile(
    r"""<\|[^<>|\n'"{}]{1,40}\|>|<｜[^<>｜\n'"]{1,60}｜>|<\|[A-Za-z_]{2,20}>|<[a-z_]{2,20}\|>|</?s>|<sep>|<sop>|\[gMASK\]"""
    r"""|<(?:start|end)_of_turn>|<(?:begin|end|beginning)_of_(?:document|sentence)>|<seed:[a-z_:]+>|<SPECIAL_\d+>|〈\|EOS\|〉"""
    r"""|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|ARGS|CALL_ID|THINK)\]"""
    r"""|\]~!b\[|\]~b\]|\[e~\[|</?(?:assistant|user|system)>"""
)
# The tokens that a tokenizer gives its template by name; the embedded model's where none is listed.
NAMED = {
    "mistral": ("<s>", "</s>"),
    "devstral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<eos>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}
# The templates of the tokenizers that are there.
OWN = {
    "Qwen-Qwen3-0.6B": "qwen3",
    "Qwen-Qwen2.5-7B-Instruct": "qwen3",
    "Qwen3-Coder": "qwen3",
    "Qwen-QwQ-32B": "qwen3",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3_1",
    "meta-llama-Llama-3.2-3B-Instruct": "llama3_1",
    "meta-llama-Llama-3.3-70B-Instruct": "llama3_1",
    "deepseek-ai-DeepSeek-V3.1": "deepseek_v3",
    "llama-cpp-deepseek-r1": "deepseek_v3",
    "google-gemma-2-2b-it": "gemma3",
}
QUESTION = {"role": "user", "content": "How many boxes are 7 x 8 boxes?"}
REPLY = {"role": "assistant", "content": "That makes 56 boxes."}
SYSTEM = {"role": "system", "content": "Answer in one sentence, please."}
PLAIN = {
    "plain": [QUESTION, REPLY],
    "system": [SYSTEM, QUESTION, REPLY],
    "several": [
        QUESTION,
        REPLY,
        {"role": "user", "content": "And 7 x 9?"},
        {"role": "assistant", "content": "63, I'd say."},
    ],
}
NEEDS_TOOLS = ("command-r-plus-tool_use", "Hermes", "firefunction")  # they refuse a conversation without tools


@functools.cache
def embedded():
    from transformers import AutoTokenizer

    from qlora_nb.core import EMBEDDED_MODEL

    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@functools.cache
def real_tokenizer(name):
    "A real tokenizer, with the ids of its own file."
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(TOKENIZERS[name])


def names_written(text):
    "The control tokens in a template, and in what it writes."
    from qlora_nb.chat_templates import render_messages
    from qlora_nb.core import UserError

    found = set(CONTROL.findall(text))
    for messages in ([QUESTION], *PLAIN.values()):
        try:
            found |= {*CONTROL.findall(render_messages(messages, embedded(), text, messages[-1] is QUESTION))}
        except UserError:
            pass
    return sorted(found)


@functools.cache
def tokenizer_for(path):
    "The template's own tokenizer, or a stand-in that has its control tokens: to be used with `template=`."
    if OWN.get(path.stem) in TOKENIZERS:
        return real_tokenizer(OWN[path.stem])
    text = path.read_text(encoding="utf-8")
    tokenizer = copy.deepcopy(embedded())
    tokenizer.add_tokens(names_written(text), special_tokens=True)
    if named := next((tokens for name, tokens in NAMED.items() if name in path.stem.lower()), None):
        tokenizer.add_special_tokens(dict(zip(("bos_token", "eos_token"), named)))
    return tokenizer


def learned_text(tokenizer, row):
    "What is learned in a row, as text."
    return tokenizer.decode([label for label in row.labels if label != -100])


def outcomes(path):
    "For each kind of plain conversation, None where it is taken; else why not."
    from qlora_nb.template import encode_batch

    rows = encode_batch(list(PLAIN.values()), tokenizer_for(path), template=path.read_text(encoding="utf-8"))
    return dict(zip(PLAIN, (row.code and f"{row.code}: {row.why}" for row in rows)))


def main():
    taken = 0
    for path in TEMPLATES:
        found = outcomes(path)
        whys = {why for why in found.values() if why}
        taken += not whys
        marks = " ".join(f"{name} {'no' if why else 'yes'}" for name, why in found.items())
        print(f"{path.stem:55} {marks}  {'; '.join(sorted(whys))[:220]}")
    print(f"{taken} of {len(TEMPLATES)} take all three")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
