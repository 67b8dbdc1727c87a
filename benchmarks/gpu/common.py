"""What the GPU scripts share: a Llama of a real shape with random NF4 weights, and the result file."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repository
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch  # noqa: E402

SHAPES = {  # hidden, intermediate, layers, heads, kv heads, head_dim, tied, vocabulary
    "tiny": (256, 512, 2, 4, 2, 64, True, 768),
    "1b": (2048, 8192, 16, 32, 8, 64, True, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128, True, 128256),
    "65b": (8192, 22016, 80, 64, 64, 128, False, 32000),
    "70b": (8192, 28672, 80, 64, 8, 128, False, 128256),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def versions():
    names = ("torch", "transformers", "peft", "bitsandbytes", "flash-attn-4")
    there = {d.name: d.version for d in importlib.metadata.distributions() if d.name in names}
    return {"python": sys.version.split()[0], **{name: there[name] for name in names if name in there}}


def gpu_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else "none (dry run on a CPU)"


def write(path, device, runs, **more):
    "The result file, whole or not at all."
    script = pathlib.Path(sys.argv[0]).resolve()
    command = " ".join(["python", f"benchmarks/gpu/{script.name}", pathlib.Path(sys.argv[1]).name, *sys.argv[2:]])
    found = {
        "gpu": gpu_name(device),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": command,
        **({"dry_run": True} if device == "cpu" else {}),
        **more,
        "runs": runs,
    }
    part = pathlib.Path(str(path) + ".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def quantized_llama(size, device, compute_dtype):
    "A Llama with random weights: NF4 with double quantization in the projections, `compute_dtype` elsewhere."
    import bitsandbytes as bnb
    from transformers import LlamaConfig, LlamaForCausalLM

    h, i, n, q, kv, d, tied, vocabulary = SHAPES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=h,
        intermediate_size=i,
        num_hidden_layers=n,
        num_attention_heads=q,
        num_key_value_heads=kv,
        head_dim=d,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        use_cache=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    torch.manual_seed(0)
    torch.set_default_dtype(compute_dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    for name, module in list(model.named_modules()):
        if name.rsplit(".", 1)[-1] not in PROJECTIONS:
            continue
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=compute_dtype,
            quant_type="nf4",
            compress_statistics=True,
            device="meta",
        )
        weight = torch.randn(module.out_features, module.in_features, device=device, dtype=compute_dtype) * 0.02
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
        )
        layer.to(device)
        if layer.weight.quant_state is None:
            layer.weight = layer.weight._quantize(device)
        layer.support_avx512bf16_for_cpu = False
        parent = model.get_submodule(name.rsplit(".", 1)[0])
        setattr(parent, name.rsplit(".", 1)[-1], layer)
    for name, p in list(model.named_parameters()):
        if p.is_meta:
            value = (
                torch.randn(p.shape, device=device, dtype=compute_dtype) * 0.02
                if p.ndim == 2
                else torch.ones(p.shape, device=device, dtype=compute_dtype)
            )
            parent = model.get_submodule(name.rsplit(".", 1)[0])
            setattr(parent, name.rsplit(".", 1)[-1], torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    rotary = type(model.model.rotary_emb)(config, device=device)
    model.model.rotary_emb = rotary
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def add_adapters(model, r, checkpointing):
    "peft's LoRA on the seven projections, adapters in fp32 as peft leaves them."
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        model, LoraConfig(r=r, lora_alpha=r, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    )
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()
