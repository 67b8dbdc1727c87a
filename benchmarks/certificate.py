"""The certificate on real models: right exports and planted faults, with the figures that the lesson quotes.

A finished run (its base, its adapter) is exported in F16, Q8_0 and Q4_K_M and certified, then exported in F16 with one
fault at a time. After that the same with random models under real tokenizers.

    python benchmarks/certificate.py --run RUN --data held_out.jsonl --out nbs/results/certificate_real.json
    python benchmarks/certificate.py --real build/real --tokenizers llama3_1 qwen3 mistral

`--real` is the folder that `make real` fills. On two CPU cores a run of SmolLM2-135M takes about a quarter of an hour.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import sys
import tempfile
import time
import unittest.mock as mock
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of this file has a gguf.py

KINDS = ("f16", "q8_0", "q4_k_m")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, action="append", default=[], help="a finished run; may be given several times")
    p.add_argument("--data", help="held-out rows for the runs")
    p.add_argument("--real", type=Path, help="folder with tokenizers/, templates/ and mistral/")
    p.add_argument("--tokenizers", nargs="*", default=[], help="of random models: llama3_1, qwen3, mistral")
    p.add_argument("--rows", type=int, default=60)
    p.add_argument("--model-rows", type=int, default=12)
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--only", nargs="*", help="of the planted faults, these")
    p.add_argument(
        "--fault-rows", type=int, default=4, help="conversations for each fault; half of them through the models"
    )
    p.add_argument("--kinds", nargs="*", default=KINDS, help="formats of the right export; none skips it")
    p.add_argument("--out", type=Path)
    return p.parse_args()


def describe(found):
    "What is kept of a certificate."
    keys = "quantization mean_kl reply_kl top1 replies accuracy reference_accuracy ids tokens rounding_bound".split()
    checks = [check.to_dict() for check in found.checks]
    return {
        "passed": found.passed, "headline": found.headline, "hides": found.hidden, "failures": found.failures,
        "remarks": found.remarks, "base_mean_kl": checks[0]["base_mean_kl"], "seconds": round(found.seconds, 1),
        "checks": [
            {key: check[key] for key in keys}
            | {
                "adapter": check["adapter_in_weights"] and check["adapter_in_weights"]["share"],
                "equal_tensors": check["equal_tensors"],
                "llama_cpp_mean_kl": check["reference"] and check["reference"]["mean_kl"],
            }
            for check in checks
        ],
    }  # fmt: skip


def faults(subject, export, wrong_base):
    "name → a function that writes a wrong F16 file, by `export(file, *patches)`; `wrong_base(file)` has another base."
    from qlora_nb import gguf_export, gguf_writer, merging

    whole, rope, words = merging.merge_weight, gguf_writer.read_rope, gguf_export.read_vocabulary
    asked = []

    def scaled(layer, adapter, base):
        return base + 2 * (whole(layer, adapter, base) - base)

    def without_one(layer, adapter, base):
        asked.append(layer)  # the export merges one layer after the other
        return base if len(asked) == 5 else whole(layer, adapter, base)

    def words_with(**changed):
        def read(*given):
            found = words(*given)
            if "eos" in changed:
                return dataclasses.replace(found, special={**found.special, "eos": found.special["eos"] + 7})
            if found.model == "llama":  # SentencePiece has no split by a regex, but a blank in front or none
                return dataclasses.replace(
                    found, flags={**found.flags, "add_space_prefix": not found.flags["add_space_prefix"]}
                )
            return dataclasses.replace(found, **changed)

        return read

    other = "llama-bpe" if subject_pre(subject) == "gpt-2" else "gpt-2"
    planted = {
        "q and k not permuted": lambda at: export(at, (gguf_export, "permute_rows", lambda rows, heads: rows)),
        "another rope base": lambda at: export(at, (gguf_writer, "read_rope", lambda c: rope(c) | {"rope_theta": 7e4})),
        "twice the scale": lambda at: export(at, (merging, "merge_weight", scaled)),
        "adapter dropped": lambda at: export(at, (merging, "merge_weight", lambda layer, adapter, base: base)),
        "one layer left out": lambda at: export(at, (merging, "merge_weight", without_one)),
        "the other precision's base": wrong_base,
        "digits split otherwise": lambda at: export(at, (gguf_export, "read_vocabulary", words_with(pre=other))),
        "another end of text": lambda at: export(at, (gguf_export, "read_vocabulary", words_with(eos=1))),
        "another template": lambda at: export(at, template=True),
    }  # fmt: skip
    if subject.model.config.model_type not in ("llama", "mistral"):
        del planted["q and k not permuted"]  # which is right for this architecture
    return planted


def subject_pre(subject):
    from qlora_nb.gguf_tokens import read_vocabulary

    return read_vocabulary(subject.tokenizer, subject.model.config.vocab_size).pre


def judge(subject, folder, source, wrong_base, settings, args):
    "The right files of a subject, then each wrong one."
    import copy

    from qlora_nb.certificate import certify
    from qlora_nb.gguf_export import export_gguf

    def export(at, *patches, template=False):
        tokenizer = copy.deepcopy(subject.tokenizer)
        if template:
            tokenizer.chat_template += "{{ ' ' }}"
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(mock.patch.object(*patch))
            return export_gguf(source, tokenizer, at, "f16")

    found = {"right": None, "wrong": {}}
    if args.kinds:
        files = export_gguf(source, subject.tokenizer, folder / "right", list(args.kinds))
        right = certify(subject, gguf=files, **settings)
        print(right, flush=True)
        found["right"] = describe(right)
    few = {**settings, "rows": args.fault_rows, "model_rows": max(1, args.fault_rows // 2), "max_new_tokens": 0}
    for name, write in faults(subject, export, wrong_base).items():
        if args.only is not None and name not in args.only:
            continue
        wrong = certify(subject, gguf=write(folder / "wrong.gguf"), **few)
        found["wrong"][name] = describe(wrong)
        print(f"{name}: {'PASSED' if wrong.passed else 'FAILED'}", *wrong.failures, sep="\n  ", flush=True)
        if args.out:  # kept as it goes: a machine may be needed elsewhere
            args.out.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
    return found


def judge_run(run, args):
    from qlora_nb.certificate_checks import open_subject
    from qlora_nb.gguf_export import export_gguf
    from qlora_nb.rows import load_sft_dataset

    subject = open_subject(run)
    data = load_sft_dataset(args.data, system=subject.config.get("add_system"), limit=args.rows)
    settings = {"data": data, "rows": args.rows, "model_rows": args.model_rows, "max_new_tokens": args.max_new_tokens}
    bits = not subject.config["load_in_4bit"]
    with tempfile.TemporaryDirectory() as place:
        other = lambda at: export_gguf(run, None, at, "f16", load_in_4bit=bits)  # noqa: E731
        found = judge(subject, Path(place), run, other, settings, args)
    return {"name": run.name, "model": Path(subject.config["model"]).name, "load_in_4bit": not bits, **found}


def read_tokenizer(name, real):
    "A real tokenizer, and a template that goes with it."
    from transformers import PreTrainedTokenizerFast

    if name == "mistral":
        import sentencepiece  # noqa: F401
        from transformers import LlamaTokenizer

        with tempfile.TemporaryDirectory() as place:
            source = real / "mistral" / "mistral_instruct_tokenizer_240323.model.v3"
            (Path(place) / "tokenizer.model").write_bytes(source.read_bytes())
            (Path(place) / "config.json").write_text('{"model_type": "llama"}')
            tokenizer = LlamaTokenizer.from_pretrained(place)
        tokenizer.chat_template = MISTRAL
        return tokenizer
    tokenizer = PreTrainedTokenizerFast.from_pretrained(real / "tokenizers" / name)
    template = {"llama3_1": "meta-llama-Llama-3.2-3B-Instruct", "qwen3": "Qwen-Qwen3-0.6B"}[name]
    tokenizer.chat_template = (real / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


def make_random(name, tokenizer):
    "A small model of random weights with a random adapter; Llama 3.2's stretched rotary positions with its tokenizer."
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    rows = -(-len(tokenizer) // 64) * 64
    shape = {
        "vocab_size": rows, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tie_word_embeddings": True,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    }  # fmt: skip
    kind = {"qwen3": "Qwen3", "mistral": "Mistral"}.get(name, "Llama")
    if kind == "Llama":
        scaling = {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
        }
        shape["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500_000.0, **scaling}
    if kind == "Mistral":
        shape["sliding_window"] = None
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape))
    for weight in model.parameters():
        weight.data = weight.data * 4 if weight.ndim > 1 else weight.data
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=projections))
    for name, weight in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.02)
    return model.eval()


def judge_random(name, args):
    from qlora_nb.certificate_checks import open_subject
    from qlora_nb.gguf_export import export_gguf
    from qlora_nb.rows import load_sft_dataset

    tokenizer = read_tokenizer(name, args.real)
    model = make_random(name, tokenizer)
    subject = open_subject(model, tokenizer)
    data = load_sft_dataset(split="heldout").select(range(40))
    if name == "mistral":
        data = [{"messages": row["messages"][1:]} for row in data]
    settings = {"data": data, "rows": 40, "model_rows": 6, "max_new_tokens": 0}

    def rounded_base(at):
        "The adapter merged into a base that lost what 4 bits lose."
        import copy

        from qlora_nb.nf4 import quantize_nf4

        other = copy.deepcopy(model)
        for layer in other.modules():
            if hasattr(layer, "lora_A"):
                weight = layer.base_layer.weight
                weight.data = quantize_nf4(weight.data).dequantize().to(weight.dtype).reshape(weight.shape)
        return export_gguf(other, tokenizer, at, "f16")

    with tempfile.TemporaryDirectory() as place:
        found = judge(subject, Path(place), model, rounded_base, settings, args)
    return {"name": f"random, {name}", "model": type(model.get_base_model()).__name__, "load_in_4bit": False, **found}


def main():
    args, start = arguments(), time.time()
    from qlora_nb.certificate_checks import list_versions

    runs = [judge_run(run, args) for run in args.run] + [judge_random(name, args) for name in args.tokenizers]
    machine = {"device": "cpu", "machine": platform.machine(), "date": datetime.date.today().isoformat()}
    command = (
        "python benchmarks/certificate.py --run RUN --data DATA --real build/real --tokenizers llama3_1 qwen3 mistral"
    )
    result = {
        **machine,
        "versions": list_versions(),
        "command": command,
        "seconds": round(time.time() - start),
        "runs": runs,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert all(
        (run["right"] is None or run["right"]["passed"]) and not any(one["passed"] for one in run["wrong"].values())
        for run in runs
    )


if __name__ == "__main__":
    main()
