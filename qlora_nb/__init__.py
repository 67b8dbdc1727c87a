"""LoRA and QLoRA, from the mathematics to a served model. Names are loaded on first use (PEP 562)."""

import importlib
import os
import sys
from typing import TYPE_CHECKING

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
    "ChatSession": "session",
    "evaluate": "evaluation",
    "train": "workflow",
    "load_run": "workflow",
    "Run": "workflow",
    "save_adapter": "adapter",
    "load_adapter": "adapter",
    "merge_adapter": "merging",
    "save_merged": "merging",
    "export_gguf": "gguf_export",
    "push_to_hub": "publishing",
    "write_modelfile": "ollama_export",
    "certify": "certificate",
    "recommend": "recommendation",
    "diagnose": "diagnosis",
}
__all__ = sorted(_WHERE)

if TYPE_CHECKING:  # what __getattr__ gives, for type checkers and completion; a test holds it to _WHERE
    from .adapter import load_adapter as load_adapter
    from .adapter import save_adapter as save_adapter
    from .certificate import certify as certify
    from .core import UserError as UserError
    from .core import profile as profile
    from .diagnosis import diagnose as diagnose
    from .doctor import explain_old_code as explain_old_code
    from .evaluation import evaluate as evaluate
    from .generation import chat as chat
    from .gguf_export import export_gguf as export_gguf
    from .lora import LoRALinear as LoRALinear
    from .lora import count_lora_parameters as count_lora_parameters
    from .memory import estimate_memory as estimate_memory
    from .merging import merge_adapter as merge_adapter
    from .merging import save_merged as save_merged
    from .model import add_lora as add_lora
    from .model import load_model as load_model
    from .model import open_run as open_run
    from .nf4 import quantize_nf4 as quantize_nf4
    from .ollama_export import write_modelfile as write_modelfile
    from .plan import plan_training as plan_training
    from .preflight import check_dataset as check_dataset
    from .publishing import push_to_hub as push_to_hub
    from .qlora import QLoRALinear as QLoRALinear
    from .recommendation import recommend as recommend
    from .rows import load_sft_dataset as load_sft_dataset
    from .run import Settings as Settings
    from .session import ChatSession as ChatSession
    from .workflow import Run as Run
    from .workflow import load_run as load_run
    from .workflow import train as train

# OpenMP's threads spin while they wait for each other; on busy cores that costs a step many times its own work. A bound
# costs nothing on quiet ones (benchmarks/waiting.py). libgomp reads it once, when torch loads it.
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "10000"


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name):
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
