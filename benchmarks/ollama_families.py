"""For each family of models: which template Ollama reads, what the Modelfile holds, and whether the certificate holds.

    python benchmarks/ollama_families.py      # writes nbs/results/ollama_families.json (some minutes on 2 cores)

The chat templates are the real ones (`make real` fetches them), the tokenizers the real ones where those are there,
else a stand-in with the control tokens that the template writes. The models are tiny Llamas with random weights: what
is tried is template, tokens and file, and no model's quality. Which template is read is the package's own rule;
`tests/test_ollama.py` holds it against what Ollama's own functions found.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # not this folder, whose gguf.py is no package

FAMILIES = {  # name: (file with its template, or tokenizer that has it; architecture in the GGUF)
    "Llama 3.1, 3.2": ("meta-llama-Llama-3.2-3B-Instruct", "llama"),
    "Llama 3.3": ("meta-llama-Llama-3.3-70B-Instruct", "llama"),
    "Qwen2.5": ("Qwen-Qwen2.5-7B-Instruct", "qwen2"),
    "Qwen3": ("Qwen-Qwen3-0.6B", "qwen3"),
    "Qwen3-Coder": ("Qwen3-Coder", "qwen3moe"),
    "Qwen3.5": ("Qwen3.5-4B", "qwen35"),
    "QwQ": ("Qwen-QwQ-32B", "qwen2"),
    "SmolLM2": ("smollm2", "llama"),
    "SmolLM3": ("HuggingFaceTB-SmolLM3-3B", "smollm3"),
    "DeepSeek R1 Distill (Llama)": ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "llama"),
    "DeepSeek R1 Distill (Qwen)": ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "qwen2"),
    "Mistral Nemo": ("mistralai-Mistral-Nemo-Instruct-2407", "llama"),
    "Mistral Small 3.2": ("Mistral-Small-3.2-24B-Instruct-2506", "llama"),
    "Gemma 2": ("google-gemma-2-2b-it", "gemma2"),
    "Gemma 3": ("gemma3", "gemma3"),
    "Gemma 4": ("google-gemma-4-31B-it", "gemma4"),
    "Phi-3.5": ("microsoft-Phi-3.5-mini-instruct", "phi3"),
    "Granite 3.3": ("ibm-granite-granite-3.3-2B-Instruct", "granite"),
    "Granite 4": ("ibm-granite-granite-4.0", "granite"),
    "GLM 4.6": ("GLM-4.6", "glm4"),
    "gpt-oss": ("openai-gpt-oss-120b", "gpt-oss"),
    "Laguna": ("poolside-Laguna-XS.2", "laguna"),
    "Nemotron 3 Nano": ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "nemotron_h"),
}


def with_bos(tokenizer, bos):
    "A copy of a stand-in that puts its BOS before a text, or (None) nothing."
    from tokenizers import processors

    found = copy.deepcopy(tokenizer)
    processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        known = [(bos, found.convert_tokens_to_ids(bos))]
        processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=known)
    found.backend_tokenizer.post_processor = processor
    return found


def make_stand_in(jinja, bos, eos):
    "The embedded model's tokenizer with a template, and the control tokens that it writes."
    from real_templates import embedded, names_written

    tokenizer = copy.deepcopy(embedded())
    tokenizer.add_tokens(names_written(jinja), special_tokens=True)
    tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos})
    return tokenizer


def find_tokenizer(source):
    "The tokenizer that a family's template is tried with, its template on it, and whether it is the model's own."
    from real_templates import OWN, REAL, TOKENIZERS, real_tokenizer, tokenizer_for

    from qlora_nb.chat_templates import render_messages
    from qlora_nb.core import UserError

    if source == "smollm2":
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(REAL / "smollm2"), True
    path = REAL / "templates" / f"{source}.jinja"
    jinja = real_tokenizer(source).chat_template if source in TOKENIZERS else path.read_text(encoding="utf-8")
    own = OWN.get(source) in TOKENIZERS and "gemma" not in source
    # A Gemma's own tokenizer goes into the file of a Gemma alone, and the model here is a Llama.
    tokenizer = make_stand_in(jinja, "<bos>", "<eos>") if "gemma" in source else copy.deepcopy(tokenizer_for(path))
    tokenizer.chat_template = jinja
    if not own:
        with contextlib.suppress(UserError):
            text = render_messages([{"role": "user", "content": "Hi"}], tokenizer, None, True)
            tokenizer = with_bos(tokenizer, tokenizer.bos_token if text.startswith(tokenizer.bos_token) else None)
    return tokenizer, own


def make_rows(count=12):
    "Plain conversations, of one turn and of two, a reply's end in each."
    import datasets

    from qlora_nb.rows import load_sft_dataset

    rows = load_sft_dataset(split="heldout", limit=2 * count, system=False)["messages"]
    plain = [[{**turn, "content": turn["content"].rpartition("</think>")[2].strip()} for turn in row] for row in rows]
    talks = [a + b if i % 3 == 0 else a for i, (a, b) in enumerate(zip(plain[::2], plain[1::2]))]
    return datasets.Dataset.from_list([{"messages": talk} for talk in talks])


def tiny_llama(tokenizer):
    "A small Llama with random weights, for as many tokens as the tokenizer has."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 32) * 32, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def describe(modelfile, choice):
    "What a Modelfile holds, in words."
    template = modelfile.one("TEMPLATE") or ""
    holds = ["TEMPLATE with .Thinking" if ".Thinking" in template else "TEMPLATE" if template else "no TEMPLATE"]
    holds += [f"REQUIRES {modelfile.one('REQUIRES')}"] if modelfile.one("REQUIRES") else []
    return {"reads": choice.source, "holds": ", ".join(holds), "stops": modelfile.parameters.get("stop", [])}


def find_capabilities(choice, jinja, modelfile):
    "What Ollama will say that the model can do, beside completion."
    from qlora_nb.template_choice import find_go_offers, find_jinja_offers

    if choice.source == "renderer":
        return None
    read = find_go_offers(modelfile.one("TEMPLATE")) if choice.source == "template" else find_jinja_offers(jinja)
    return sorted(read - {"tool results"})


def ask_certificate(model, tokenizer, gguf, modelfile):
    "What the certificate says, in a few words."
    from qlora_nb.certificate import certify
    from qlora_nb.core import UserError

    try:
        limits = {"data": make_rows(), "model_rows": 3, "max_new_tokens": 0}
        found = certify(model, tokenizer=tokenizer, gguf=gguf, modelfile=modelfile, **limits)
    except UserError as error:
        return f"not possible: {error}"
    return (
        "passed"
        if found.passed
        else next(f"failed: {line[2:300]}" for line in str(found).splitlines() if line[:2] == "- ")
    )


def measure(family, source, architecture, place):
    "The family's row."
    from qlora_nb.gguf_export import export_gguf
    from qlora_nb.modelfile import parse_modelfile
    from qlora_nb.ollama_export import write_modelfile
    from qlora_nb.template_choice import choose_template, read_header_texts

    tokenizer, own = find_tokenizer(source)
    jinja, model = tokenizer.chat_template, tiny_llama(tokenizer)
    row = {"family": family, "template": source, "sha256": hashlib.sha256(jinja.encode()).hexdigest()}
    row["tokenizer"] = "its own" if own else "stand-in"
    gguf = export_gguf(model, tokenizer, place / "model.gguf", "f32")
    inside = read_header_texts(gguf)["tokenizer.chat_template"]
    for name in ("plain", "thinking"):
        file = place / f"Modelfile-{name}"
        write_modelfile(file, gguf, tokenizer=tokenizer, thinking=name == "thinking")
        modelfile = parse_modelfile(file.read_text(encoding="utf-8"))
        choice = choose_template(inside, modelfile.one("TEMPLATE"), architecture)
        side = {**describe(modelfile, choice), "capabilities": find_capabilities(choice, jinja, modelfile)}
        if choice.source == "renderer":
            side["holds"] = "no TEMPLATE, REQUIRES 0.30.0"  # what its own architecture would get
            side["certificate"] = "not possible: the renderer is not in the file"
        elif name != "plain" and side["holds"] == row["plain"]["holds"]:
            side["certificate"] = row["plain"]["certificate"]
        else:
            side["certificate"] = ask_certificate(model, tokenizer, gguf, file)
        row[name] = side
    return row


def main():
    from qlora_nb.certificate_checks import list_versions

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "nbs/results/ollama_families.json")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this one; the others stay")
    options = parser.parse_args()
    known = json.loads(options.output.read_text(encoding="utf-8"))["rows"] if options.output.exists() else []
    rows = {row["family"]: row for row in known}
    for family in options.family or FAMILIES:
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
            rows[family] = row = measure(family, *FAMILIES[family], Path(place))
        for side in (row["plain"], row["thinking"]):
            said = f"{side['reads']}; {side['holds']}; {side['certificate'][:150]}"
            print(f"{family:28} {row['tokenizer']:9} {said}", flush=True)
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "ollama": "0.33 (source of August 2026)",
            "versions": list_versions(),
        }
        text = json.dumps(
            {**facts, "rows": [rows[name] for name in FAMILIES if name in rows]}, indent=1, ensure_ascii=False
        )
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
