"""Small random models and tokenizers of each kind that GGUF export knows, and llama.cpp to judge them."""

import importlib
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
from repository import ROOT


def needed(name):
    "The package; without it the tests that ask for it are skipped, but in CI they fail."
    return importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name)


SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|endoftext|>",
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim if m.content else '' }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content or '' }} [/INST]"
    "{% else %} {{ m.content or '' }}{{ eos_token }}{% endif %}{% endfor %}"
)


def corpus():
    "The licence, the sources of the tests and a few lines in other scripts."
    texts = [(ROOT / "LICENSE").read_text(encoding="utf-8"), Path(__file__).read_text(encoding="utf-8")]
    lines = [line for text in texts for line in text.splitlines()]
    return (
        lines
        + ["Füße, naïve café — “quotes” … 東京 привет 你好 שלום مرحبا 1234 77", "def f(x):\n    return x ** 2\n"] * 5
    )


def byte_level(kind):
    "A byte-level BPE with one of the splits: llama3, smaug, qwen2, gpt2, smollm."
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(QWEN_2 if kind == "qwen2" else LLAMA_3), "isolated")
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    made.pre_tokenizer = {"gpt2": whole, "smollm": digits}.get(kind) or pre_tokenizers.Sequence([split, plain])
    made.normalizer = normalizers.NFC() if kind == "qwen2" else None
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    names = {"eos_token": "<|eot_id|>", "pad_token": "<|endoftext|>"}
    if kind in ("llama3", "smaug"):
        bos = SPECIALS[0]
        made.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))])
        names["bos_token"] = bos
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    tokenizer.chat_template = LLAMA_TEMPLATE if "bos_token" in names else LLAMA_TEMPLATE.replace("{{ bos_token }}", "")
    return tokenizer


def sentencepiece(folder, kind="first"):
    """A SentencePiece BPE like Llama 2's and Mistral's, as transformers makes it from tokenizer.model.

    kind: first (today's), always (legacy=True), normalizer (the tokenizer.json of Llama 2's time).
    """
    import sentencepiece as spm
    from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
    from transformers import LlamaTokenizer

    text = folder / "corpus.txt"
    text.write_text("\n".join(line for row in corpus() for line in row.splitlines() if line), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=700, byte_fallback=True,
        character_coverage=0.995, split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2, user_defined_symbols=[],
    )  # fmt: skip
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=kind == "always")
    if kind == "normalizer":
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([])
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = json.loads(backend.to_str())
        parts["pre_tokenizer"] = None
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    special = [AddedToken(token, special=True, normalized=False) for token in ("[INST]", "[/INST]")]
    tokenizer.add_tokens(special if kind == "first" else [], special_tokens=True)
    tokenizer.chat_template = MISTRAL_TEMPLATE if kind == "first" else None
    tokenizer.sp_file = folder / "tokenizer.model"
    return tokenizer


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
USUAL_ROPE = {"rope_type": "default", "rope_theta": 1e6}
MODELS = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama 3 rope": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA_ROPE}),
    "llama 3 rope, untied": ("Llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA_ROPE}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, all heads": ("Llama", {"num_key_value_heads": 4}),
    "llama, linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, own head_dim": ("Mistral", {"head_dim": 64, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2, tied": (
        "Qwen2",
        {"tie_word_embeddings": True, "rope_parameters": USUAL_ROPE},
    ),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "qwen3, tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def random_model(name, rows, seed=0, **more):
    "A model with random weights of a size at which every part shows: norms and biases too."
    import transformers

    kind, settings = MODELS[name]
    settings = {**SIZES, "vocab_size": rows, "max_position_embeddings": 256, **settings, **more}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(bos_token_id=None, eos_token_id=None, pad_token_id=None, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for place, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1 if "embed" in place else 0.08)
        else:
            torch.nn.init.normal_(parameter, mean=0.0 if place.endswith("bias") else 1.0, std=0.2)
    return model


def open_llama(path, context=256, **settings):
    "llama.cpp on one thread, quiet, its cache of keys and values in fp32."
    from qlora_nb.llama import quiet_llama

    with quiet_llama() as llama_cpp:
        return llama_cpp.Llama(
            str(path),
            n_ctx=context,
            logits_all=True,
            verbose=False,
            n_threads=1,
            type_k=0,
            type_v=0,
            flash_attn=False,
            **settings,
        )


def llama_logits(llama, ids):
    from qlora_nb.llama import quiet_llama

    with quiet_llama():
        llama.reset()
        llama.eval(ids)
    return torch.tensor(llama._scores[: len(ids)].copy())


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def strings(specials=(), seed=0, count=300):
    "Text of every kind: words, digits, white space, scripts, emoji, bytes that are no words, control tokens in it."
    parts = [
        "Hello", "world", " the", "isn't", "I'LL", "WE'Ve", "x=1", "3.14159", "1234567",
        " 42", "٣٤", "²", "Ⅷ", "\n", "\n\n", "\r\n", "\t", " ", "  ", "    ", "\u00a0",
        "\u3000", "é", "ñandú", "Füße", "東京", "你好", "привет", "שלום", "مرحبا", "한국어", "🙂",
        "👩‍🚀", "🇩🇪", "…", "—", "“q”", "<", ">", "</", "think", "{}[]", "def f(x):", "\\n",
        "_", "'", "''s", "°C", "ﬁ", "ǅ", "𝔘𝔫𝔦", "ก็", "\u200b", "\x00", "\x7f", "▁", "Ġ",
        "<0x0A>", "a" * 40, ";;;;", "!?!", "https://a.b/c?d=e&f#g",
    ]  # fmt: skip
    made, draw = (
        [*parts, " " + parts[0], "", *(a + b for a in specials for b in ("", "a", " a", "\n"))],
        random.Random(seed),
    )
    while len(made) < count:
        words = draw.choices([*parts, *specials], k=draw.randint(2, 9))
        made.append("".join(words))
    return made


def large_tokenizer(size=128_000):
    "A byte-level BPE as large as Llama 3's, its merges made up."
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = list(letters), []
    pairs = ((a, b) for width in (1, 2) for a in list(tokens if width == 2 else letters) for b in letters)
    known = set(tokens)
    for a, b in pairs:
        if len(tokens) == size:
            break
        if a + b not in known:
            known.add(a + b)
            tokens.append(a + b)
            merges.append((a, b))
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    bos = SPECIALS[0]
    made.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token="<|eot_id|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = LLAMA_TEMPLATE
    return tokenizer


def write_llama_1b(folder, shards=3, layers=16):
    "A folder with the shape of Llama-3.2-1B and random bf16 weights, 2.5 GB, written a tensor at a time."
    import safetensors.torch
    import transformers

    rope = {**LLAMA_ROPE, "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters=rope, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    # Random bits of bf16 below 2 in size, the same 16 million again and again: to make them all takes too long.
    bits = torch.randint(0, 2**16, (1 << 24,), dtype=torch.uint16) & 0xBF7F
    block = bits.view(torch.bfloat16).repeat(-(-max(map(math.prod, shapes.values())) // len(bits)))
    names, weight_map = list(shapes), {}
    for i in range(shards):
        mine = names[i::shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {name: block[: math.prod(shapes[name])].reshape(shapes[name]).clone() for name in mine}
        safetensors.torch.save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
