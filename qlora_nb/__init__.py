"""LoRA and QLoRA, from the mathematics to a served model. Names are loaded on first use (PEP 562)."""

import importlib
import os
import sys

__version__ = "0.1.0"

_WHERE = {
    "UserError": "core",
    "profile": "core",
    "Settings": "run",
    "LoRALinear": "lora",
    "count_lora_parameters": "lora",
    "quantize_nf4": "nf4",
    "QLoRALinear": "qlora",
    "estimate_memory": "memory",
    "plan_training": "plan",
    "explain_old_code": "doctor",
    "load_model": "model",
    "add_lora": "model",
    "open_run": "model",
    "load_sft_dataset": "rows",
    "check_dataset": "preflight",
    "chat": "generation",
    "evaluate": "evaluation",
    "train": "workflow",
    "load_run": "workflow",
    "Run": "workflow",
    "save_adapter": "adapter",
    "load_adapter": "adapter",
    "merge_adapter": "merging",
    "save_merged": "merging",
    "export_gguf": "gguf_export",
    "write_modelfile": "ollama_export",
    "certify": "certificate",
    "recommend": "recommendation",
    "diagnose": "diagnosis",
}
__all__ = sorted(_WHERE)

# OpenMP's threads spin while they wait for each other; on busy cores that costs a step many times its own work. A bound
# costs nothing on quiet ones (benchmarks/waiting.py). libgomp reads it once, when torch loads it.
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "10000"


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__():
    return sorted({*globals(), *__all__})
