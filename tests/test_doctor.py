"""The doctor: each rule held to the installed libraries; names, places, hostile sources, files; no false alarm."""

# ruff: noqa: E501 (sources are written in one line)
import dataclasses
import fnmatch
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys

import pytest
from repository import NBS, NOTEBOOKS, ROOT, module_of

from qlora_nb.core import EMBEDDED_MODEL, Findings, UserError
from qlora_nb.doctor import (
    _LOOKS,
    _TABLE,
    KNOWN_ARGUMENTS,
    OLD_CODE_RULES,
    TESTED_VERSIONS,
    explain_name,
    explain_old_code,
    matches_name,
    parse_cell,
    read_code,
    shorten_name,
)

BY_ARGUMENT = [
    (rule, call) for rule in OLD_CODE_RULES.values() for call in rule.calls if rule.arguments and rule.value is None
]
FORWARDED = [
    (rule, call)
    for rule, call in BY_ARGUMENT
    if ("from_pretrained" in call and "Tokenizer" not in call) or "load_dataset" in call
]
PARAMETERS = [
    (rule, full)
    for rule, call in BY_ARGUMENT
    if (rule, call) not in FORWARDED
    for full in _TABLE["accepts"]
    if matches_name(shorten_name(full), call)
]


def codes(source):
    return [finding.code for finding in explain_old_code(source).findings]


def installed(dotted):
    root, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(root), name)


def parameters(dotted):
    found = inspect.signature(installed(dotted)).parameters
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in found.values()), f"{dotted} takes anything"
    return set(found)


# --- the table, and the libraries -----------------------------------------------------------------------------------


def test_the_versions_are_those_that_are_tested():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert TESTED_VERSIONS == {name: pins[name] for name in TESTED_VERSIONS}
    for name in TESTED_VERSIONS:
        if importlib.util.find_spec(name):
            from importlib.metadata import version

            assert version(name) == TESTED_VERSIONS[name], (
                f"{name} has moved: run every rule again, then change TESTED_VERSIONS"
            )


@pytest.mark.parametrize("call", _TABLE["accepts"])
def test_the_table_has_every_argument(call):
    assert parameters(call) == KNOWN_ARGUMENTS[shorten_name(call)], f"{call} has moved: write its arguments again"


def test_the_table_has_every_name():
    import pkgutil

    import trl

    names = {name for name in dir(trl) if not name.startswith("_")} | {
        m.name for m in pkgutil.iter_modules(trl.__path__)
    }
    assert set(_TABLE["exports"]["trl"]) == {name for name in names if not name.startswith("_") and name != "sys"}
    assert [name for name in _TABLE["exports"]["trl"] if explain_name(f"trl.{name}")] == []


@pytest.mark.parametrize("rule, call", PARAMETERS, ids=lambda x: getattr(x, "code", x))
def test_arguments_are_gone_and_their_heirs_are_there(rule, call):
    """An older name must be an error today. What took its place must be known to the same callable, or to `home`."""
    known, heirs = parameters(call), parameters(rule.home or call)
    assert not known & set(rule.arguments), "taken again: not to be reported"
    missing = {new for new in rule.arguments.values() if new} - heirs
    assert not missing, f"{rule.home or call} has no {missing}"


def test_every_argument_stood_somewhere():
    "A renamed setting is written for all configurations: each must be one of transformers' or TRL's own."
    fields = {f.name for f in dataclasses.fields(installed("trl.SFTConfig"))}
    fields |= {f.name for f in dataclasses.fields(installed("transformers.TrainingArguments"))}
    for code in ("warmup_ratio", "setting_renamed", "config_max_seq_length"):
        assert set(OLD_CODE_RULES[code].arguments.values()) <= fields, code
        assert not set(OLD_CODE_RULES[code].arguments) & fields, code


@pytest.mark.parametrize("rule, call", FORWARDED, ids=lambda x: getattr(x, "code", x))
def test_arguments_that_are_passed_on(rule, call, tmp_path):
    import datasets
    import peft
    import transformers

    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    files = {"data_files": str(tmp_path / "rows.jsonl"), "split": "train", "cache_dir": str(tmp_path / "cache")}

    def use(**given):
        if call == "datasets.load_dataset":
            return datasets.load_dataset("json", **files, **given)
        if call.startswith("peft."):
            return peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **given)
        model = transformers.AutoModel if "Auto" in call else transformers.LlamaForCausalLM
        return model.from_pretrained(EMBEDDED_MODEL, **given)

    if call.startswith("peft."):
        model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")

    for old in rule.arguments:
        if rule.severity == "error":
            with pytest.raises(TypeError, match=f"argument '{old}'"):
                use(**{old: True})
        else:
            assert len(use(**{old: True})) == 1
    heirs = set(rule.arguments.values()) - {""}
    if call == "datasets.load_dataset":
        assert heirs <= parameters_of_load_dataset()
    elif "quantization_config" in heirs:
        made = transformers.BitsAndBytesConfig(load_in_4bit=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, quantization_config=made)
        assert model.is_loaded_in_4bit
    elif "attn_implementation" in heirs:
        model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, attn_implementation="eager")
        assert model.config._attn_implementation == "eager"
    elif heirs:
        assert heirs == {"token"}
        assert "token" in inspect.signature(transformers.PreTrainedModel.from_pretrained).parameters


def parameters_of_load_dataset():
    import datasets

    return set(inspect.signature(datasets.load_dataset).parameters)


NAMES = [(old, new) for rule in OLD_CODE_RULES.values() for old, new in rule.names.items()]


@pytest.mark.parametrize("old, new", NAMES, ids=lambda name: name or "none")
def test_names_are_gone_and_their_heirs_are_there(old, new):
    module = "transformers" if old.startswith(".") else old.partition(".")[0]
    if "*" in old or old.count(".") > 1 or old.startswith("."):
        holders = [
            installed(f"transformers.{name}")
            for name in ("PreTrainedTokenizerBase", "PreTrainedTokenizerFast", "PreTrainedModel")
        ]
        assert not any(hasattr(holder, old[1:]) for holder in holders), old
        assert not fnmatch.filter([f"{module}.{name}" for name in dir(importlib.import_module(module))], old)
    else:
        with pytest.raises(AttributeError):
            installed(old)
    if "(" in new or "=" in new:
        return
    if new.startswith("trl.SFTConfig."):
        assert new.rpartition(".")[2] in parameters("trl.SFTConfig")
    elif new:
        assert callable(installed(new))


def test_add_eos_token_takes_the_bos_away():
    from transformers import AutoTokenizer

    def first(**given):
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, **given)
        return tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id

    assert first() and first(add_eos_token=True, add_bos_token=True)
    assert not first(add_eos_token=True) and not first(add_eos_token=False)


def test_values_and_methods_are_gone():
    import transformers
    from transformers.pipelines import PIPELINE_REGISTRY, SUPPORTED_TASKS
    from transformers.training_args import OptimizerNames

    assert not set(OLD_CODE_RULES["optim_gone"].value) & {name.value for name in OptimizerNames}
    assert not set(_TABLE["tasks"]) & {*SUPPORTED_TASKS, *PIPELINE_REGISTRY.task_aliases}
    taken = inspect.signature(transformers.PreTrainedModel.push_to_hub).parameters
    assert not set(OLD_CODE_RULES["push_to_hub"].arguments) & set(taken)


def test_what_unsloth_moves_and_drops():
    "Its tables need nothing but Python, and are read without importing it (which patches TRL)."
    if (found := importlib.util.find_spec("unsloth")) is None:
        pytest.skip("Unsloth is not installed")
    from pathlib import Path

    scope = {"__name__": "tables"}
    exec((Path(found.origin).parent / "models" / "rl_config_compat.py").read_text(), scope)
    moves, drops = set(_TABLE["unsloth"]["moves"]), set(_TABLE["unsloth"]["drops"])
    assert scope["TRL_CONFIG_RENAMES"].keys() | scope["TRANSFORMERS_CONFIG_RENAMES"].keys() <= moves
    assert set(scope["TRL_REMOVED_FIELD_ADVICE"]) == drops


@pytest.mark.parametrize(
    "use, severity",
    [
        ("SFTTrainer(tokenizer=t)", "info"),
        ("DPOTrainer(beta=0.1)", "info"),
        ("DPOTrainer(max_prompt_length=9)", "warning"),
        ("DPOTrainer(never_heard_of=1)", "error"),
        ("GRPOConfig(max_prompt_length=9)", "warning"),
        ("SFTConfig(warmup_ratio=0.1)", "info"),
        ("SFTConfig(evaluation_strategy='no')", "warning"),
        ("TrainingArguments(evaluation_strategy='no')", "error"),
    ],
)
def test_old_arguments_under_unsloth(use, severity):
    imports = (
        "from trl import DPOTrainer, GRPOConfig, SFTConfig, SFTTrainer\nfrom transformers import TrainingArguments\n"
    )
    assert [f.severity for f in explain_old_code(f"import unsloth\n{imports}{use}").findings] == [severity]
    assert [f.severity for f in explain_old_code(imports + use).findings] == ["error"]


@pytest.mark.heavy  # a fact about the installed Unsloth, which a push doesn't change
def test_the_shim_is_real(tmp_path):
    "What is called unneeded under Unsloth is taken there, and the configuration's old names are not."
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed")
    script = """
import unsloth, datasets, sys
from trl import SFTConfig, SFTTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
rows = datasets.Dataset.from_list([{"text": "one two three"}] * 4)
def build(**old):
    return SFTTrainer(model=model, train_dataset=rows, args=SFTConfig(output_dir="o", use_cpu=True), **old)
build(tokenizer=tokenizer, dataset_text_field="text", dataset_num_proc=1, packing=False)
print("RESULT", build(tokenizer=tokenizer, max_seq_length=64).args.max_length)
try: SFTConfig(output_dir="o", max_seq_length=64)
except TypeError: print("RESULT TypeError")
"""
    env = {**os.environ, "UNSLOTH_DISABLE_STATISTICS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(EMBEDDED_MODEL)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert re.findall(r"^RESULT (\w+)", done.stdout, re.M) == ["64", "TypeError"], done.stderr[-2000:]


def test_assistant_only_loss_is_refused(tmp_path):
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora_nb.chat_templates import LLAMA_3_1_TEMPLATE

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.chat_template = LLAMA_3_1_TEMPLATE
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    config = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", assistant_only_loss=True
    )
    with pytest.raises(ValueError, match="not training-compatible"):
        trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL),
            args=config,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list([{"messages": turns}] * 2),
        )


def test_rules_are_whole():
    for code, rule in OLD_CODE_RULES.items():
        assert rule.code == code and rule.severity in Findings.severities and rule.cause and rule.fix and rule.source
        left = re.sub(r"\$(old|new|call)\b", "", rule.cause + " " + rule.fix)
        assert "$" not in left, code


# --- each rule, met and not met -------------------------------------------------------------------------------------

LLAMA = (
    "<|start_header_id|>user<|end_header_id|>\\n\\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n{}"
)
SAMPLES = {  # code: (what meets it, what comes near and doesn't)
    "trainer_tokenizer": ("SFTTrainer(tokenizer=t)", "SFTTrainer(processing_class=t)"),
    "trainer_max_seq_length": ("SFTTrainer(max_seq_length=9)", "FastLanguageModel.from_pretrained(max_seq_length=9)"),
    "trainer_setting": ("SFTTrainer(dataset_text_field='text')", "SFTConfig(dataset_text_field='text')"),
    "argument_gone": ("TrainingArguments(overwrite_output_dir=True)", "TrainingArguments(output_dir='o')"),
    "max_prompt_length": ("GRPOConfig(max_prompt_length=9)", "GRPOConfig(max_completion_length=9)"),
    "model_argument": (
        "AutoModelForCausalLM.from_pretrained('m', resume_download=True)",
        "AutoTokenizer.from_pretrained('m', resume_download=True)",
    ),
    "name_removed": (
        "from transformers import TFAutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM",
    ),
    "trl_gone": ("from trl.core import LengthSampler", "from trl.experimental.orpo import ORPOTrainer"),
    "trl_moved": ("from trl import ORPOTrainer, ORPOConfig", "from trl import DPOTrainer, DPOConfig"),
    "method_gone": ("ids = tok.batch_encode_plus(texts)", "ids = tok.batch_decode(texts)"),
    "pipeline_task": ("pipeline('text2text-generation', model='m')", "pipeline('text-generation', model='m')"),
    "config_max_seq_length": ("SFTConfig(max_seq_length=9)", "SFTConfig(max_length=9)"),
    "warmup_ratio": ("TrainingArguments(warmup_ratio=0.1)", "TrainingArguments(warmup_steps=0.1)"),
    "setting_renamed": ("TrainingArguments(evaluation_strategy='no')", "TrainingArguments(eval_strategy='no')"),
    "setting_spelled": ("TrainingArguments(group_by_length=True)", "TrainingArguments(length_column_name='n')"),
    "optim_gone": ("TrainingArguments(optim='adamw_hf')", "TrainingArguments(optim='paged_adamw_8bit')"),
    "add_eos_token": (
        "from transformers import AutoTokenizer\nAutoTokenizer.from_pretrained('m', add_eos_token=True)",
        "from transformers import AutoTokenizer\nAutoTokenizer.from_pretrained('m', add_eos_token=True, add_bos_token=True)",
    ),
    "push_to_hub": ("model.push_to_hub('m', use_auth_token=True)", "model.push_to_hub('m', token=True)"),
    "load_in_4bit": (
        "AutoModelForCausalLM.from_pretrained('m', load_in_4bit=True)",
        "FastLanguageModel.from_pretrained('m', load_in_4bit=True)",
    ),
    "use_flash_attention_2": (
        "AutoModelForCausalLM.from_pretrained('m', use_flash_attention_2=True)",
        "AutoModelForCausalLM.from_pretrained('m', attn_implementation='flash_attention_2')",
    ),
    "use_auth_token": ("load_dataset('a/b', use_auth_token=True)", "load_dataset('a/b', token=True)"),
    "load_dataset_gone": ("load_dataset('a/b', ignore_verifications=True)", "load_dataset('a/b')"),
    "trust_remote_code": ("load_dataset('a/b', trust_remote_code=True)", "pipeline('a/b', trust_remote_code=True)"),
    "name_gone": ("from transformers import AdamW", "from torch.optim import AdamW"),
    "completion_collator": ("DataCollatorForCompletionOnlyLM('x', tokenizer=t)", "DataCollatorForLanguageModeling(t)"),
    "constant_length": (
        "from trl.trainer.utils import ConstantLengthDataset",
        "from mine import ConstantLengthDataset",
    ),
    "load_metric": ("import datasets\ndatasets.load_metric('f1')", "import evaluate\nevaluate.load('f1')"),
    "training_arguments": ("a = TrainingArguments(output_dir='o')\nSFTTrainer(args=a)", "SFTTrainer(args=SFTConfig())"),
    "seq2seq_collator": (
        "SFTTrainer(data_collator=DataCollatorForSeq2Seq(t))",
        "Trainer(data_collator=DataCollatorForSeq2Seq(t))",
    ),
    "collator_with_packing": (
        "import unsloth\nSFTTrainer(args=SFTConfig(packing=True), data_collator=DataCollatorForSeq2Seq(t))",
        "import unsloth\nSFTTrainer(args=SFTConfig(packing=True))",
    ),
    "packing_without_flash": (
        "SFTConfig(packing=True)",
        "m = AutoModelForCausalLM.from_pretrained('m', attn_implementation='flash_attention_2')\nSFTConfig(packing=True)",
    ),
    "formatting_list": (
        "def f(e):\n    return [a for a in e['q']]\nSFTTrainer(formatting_func=f)",
        "def f(e):\n    return e['q']\nSFTTrainer(formatting_func=f)",
    ),
    "assistant_only_loss": (
        "m = 'meta-llama/Llama-3.2-3B-Instruct'\nSFTConfig(assistant_only_loss=True)",
        "m = 'Qwen/Qwen3-4B'\nSFTConfig(assistant_only_loss=True)",
    ),
    "unsloth_late": ("from trl import SFTTrainer\nimport unsloth", "import unsloth\nfrom trl import SFTTrainer"),
    "train_loss": ("print(stats.metrics['train_loss'])", "print(stats.metrics['train_runtime'])"),
    "pad_is_eos": (
        "DataCollatorForLanguageModeling(tok, mlm=False)\ntok.pad_token = tok.eos_token",
        "DataCollatorForSeq2Seq(tok)\ntok.pad_token = tok.eos_token",
    ),
    "hot": ("model.generate(**x, temperature=1.5)", "model.generate(**x, temperature=1.5, min_p=0.1)"),
    "chat_ids": ("model.generate(tok.apply_chat_template(m))", "model.generate(**tok.apply_chat_template(m))"),
    "chat_text_tokenized": (
        "text = tok.apply_chat_template(m, tokenize=False)\ntok([text], return_tensors='pt')",
        "text = tok.apply_chat_template(m, tokenize=False)\ntok(text, add_special_tokens=False)",
    ),
    "text_column": (
        "def f(e):\n    texts = [tok.apply_chat_template(c, tokenize=False) for c in e['c']]\n    return {'text': texts}",
        "def f(e):\n    return {'text': tok.apply_chat_template(e['c'], tokenize=False).removeprefix(tok.bos_token)}",
    ),
    "text_before_bos": (f"T = 'Think.<|begin_of_text|>{LLAMA}<|eot_id|>'", f"T = '{LLAMA}<|eot_id|>'"),
    "hand_bos": (f"T = '<|begin_of_text|>{LLAMA}<|eot_id|>'", "assert tok.bos_token == '<|begin_of_text|>'"),
    "one_newline": (
        "T = '<|start_header_id|>user<|end_header_id|>\\n{}<|eot_id|>'",
        "train_on_responses_only(t, instruction_part='<|start_header_id|>user<|end_header_id|>\\n\\n')",
    ),
    "no_end_of_turn": (f"T = '{LLAMA}'", f"EOS = tok.eos_token\nT = '{LLAMA}'\ntexts = T.format(a, b) + EOS"),
    "format_template": (f"('{LLAMA}<|eot_id|>').format(a, b)", "'a {} b'.format(1)"),
    "format_braces": (f"'{{\"a\": 1}} {LLAMA}<|eot_id|>'.format(a, b)", f"('{{{{}}}} {LLAMA}<|eot_id|>').format(a, b)"),
    "unsloth_template": (
        "n = 'unsloth/Llama-3.2-3B-Instruct'\nget_chat_template(tok, chat_template='llama-3.1')",
        "n = 'unsloth/Llama-3.2-3B'\nget_chat_template(tok, chat_template='llama-3.1')",
    ),
    "r1_columns": (
        "d = load_dataset('ServiceNow-AI/R1-Distill-SFT', 'v0')\nd[0]['prompt']",
        "d = load_dataset('ServiceNow-AI/R1-Distill-SFT', 'v0').rename_column('problem', 'prompt')\nd[0]['prompt']",
    ),
    "split_slice": (
        "load_dataset('a/b', split='train[:9]')",
        "load_dataset('json', data_files='a', split='train[:9]')",
    ),
    "unreadable": (["x = 1", "y = = 2"], ["x = 1", "y = 2"]),
    "pip_old": ("!pip install 'trl<0.9'", "!pip install 'trl>=1.15'"),
    "pip_git": ("!pip install git+https://github.com/unslothai/unsloth", "!pip install git+https://github.com/me/mine"),
    "pip_xformers": ("!pip install xformers==0.0.26", "!pip install torch"),
}


def test_every_rule_has_a_sample():
    assert set(SAMPLES) == set(OLD_CODE_RULES)


@pytest.mark.parametrize("code", SAMPLES)
def test_rules(code):
    met, near = SAMPLES[code]
    assert code in codes(met)
    assert code not in codes(near)


@pytest.mark.parametrize(
    "source",
    [
        "from trl import SFTTrainer as T\nT(tokenizer=t)",
        "import trl\ntrl.SFTTrainer(tokenizer=t)",
        "import trl as r\nr.SFTTrainer(tokenizer=t)",
        "import trl.trainer.sft_trainer\ntrl.trainer.sft_trainer.SFTTrainer(tokenizer=t)",
        "from trl.trainer.sft_trainer import SFTTrainer\nSFTTrainer(tokenizer=t)",
        "from trl import *\nSFTTrainer(tokenizer=t)",
        "from trl import SFTTrainer\nMine = SFTTrainer\nMine(tokenizer=t)",
        "from trl import SFTTrainer\nclass Mine(SFTTrainer):\n    pass\nMine(tokenizer=t)",
        "from trl import SFTTrainer\nkw = {'tokenizer': t}\nSFTTrainer(**kw)",
        "from trl import SFTTrainer\nkw = dict(tokenizer=t)\nSFTTrainer(**kw)",
        "from functools import partial\nfrom trl import SFTTrainer\npartial(SFTTrainer, tokenizer=t)",
        "def main():\n    from trl import SFTTrainer\n    SFTTrainer(tokenizer=t)",
        "try:\n    from trl import SFTTrainer\nexcept ImportError:\n    pass\nif x:\n    for i in y:\n        SFTTrainer(tokenizer=t)",
        "SFTTrainer(tokenizer=t)",
    ],
)
def test_names_are_followed(source):
    assert codes(source) == ["trainer_tokenizer"]


@pytest.mark.parametrize(
    "source",
    [
        "from mine import SFTTrainer\nSFTTrainer(tokenizer=t)",
        "from .trl import SFTTrainer\nSFTTrainer(tokenizer=t)",
        "class SFTTrainer:\n    pass\nSFTTrainer(tokenizer=t)",
        "def SFTTrainer(tokenizer):\n    pass\nSFTTrainer(tokenizer=t)",
        "from trl import SFTTrainer\nclass Mine(SFTTrainer):\n    def __init__(self, tokenizer): ...\nMine(tokenizer=t)",
        "def f(SFTTrainer):\n    return SFTTrainer(tokenizer=t)",
        "x = 'SFTTrainer(tokenizer=t)'",
        "# SFTTrainer(tokenizer=t)",
        '"""SFTTrainer(tokenizer=t) and <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n{}"""',
        "def f():\n    '''<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n{}'''",
        "tok.chat_template = '''{{ bos_token }}{% for m in messages %}<|start_header_id|>x<|end_header_id|>\\n{% endfor %}'''",
        "stop = ['<|eot_id|>', '<|start_header_id|>']",
        "names = '<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>'.split()",
    ],
)
def test_no_false_alarm(source):
    assert codes(source) == []


TRAINERS = ("SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO", "ORPO")


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_is_known(name):
    "The same three faults in each trainer and its configuration, whatever it is imported from."
    home = f"trl.experimental.{name.lower()}" if name == "ORPO" else "trl"
    source = f"""from {home} import {name}Config, {name}Trainer
args = {name}Config(evaluation_strategy="no", max_length=9, loging_steps=1)
{name}Trainer(model, args=args, tokenizer=t, learning_rate=1e-4)"""
    found = {(f.code, f.old.partition("=")[0]) for f in explain_old_code(source).findings}
    wrong = {("argument_gone", "max_length")} if name in ("GRPO", "RLOO") else set()
    assert found - wrong == {
        ("setting_renamed", "evaluation_strategy"),
        ("argument_gone", "loging_steps"),
        ("trainer_tokenizer", "tokenizer"),
        ("trainer_setting", "learning_rate"),
    }
    assert wrong <= found
    fix = [f.fix for f in explain_old_code(source).findings if f.code == "trainer_setting"]
    assert fix == [f"{name}Trainer(args={name}Config(learning_rate=…, …), …)"]


def test_a_marimo_notebook():
    "Its cells are functions, whose arguments are the names of other cells; its prose is a text."
    prose = "mo.md(r'''Think. <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n{}''')"
    source = f"""@app.cell
def _():
    import unsloth
    from trl import SFTTrainer
    return (SFTTrainer,)
@app.cell(hide_code=True)
def _(mo):
    {prose}
    return
@app.cell
def _(SFTTrainer, model):
    SFTTrainer(model, tokenizer=t)"""
    assert [(f.code, f.severity, f.line) for f in explain_old_code(source).findings] == [
        ("trainer_tokenizer", "info", 12)
    ]


def test_unsloth_is_late_once():
    source = "import trl\nfrom unsloth import FastLanguageModel\nfrom unsloth.chat_templates import get_chat_template"
    assert [(f.code, f.line) for f in explain_old_code(source).findings] == [("unsloth_late", 2)]


def test_slices_that_leave_most_out():
    for split, found in (("train[:500]", 1), ("train[:5%]", 1), ("train[:]", 0), ("train[5%:]", 0), ("train[:90%]", 0)):
        assert codes(f"load_dataset('a/b', split='{split}')") == ["split_slice"] * found, split
    assert codes("load_dataset('a/b', split=f'train[:{n}%]')\nload_dataset('a/b', split=f'train[{n}%:]')") == []


def test_a_class_with_fields_of_its_own_is_not_judged():
    own = "class Args(TrainingArguments):\n    cache_dir: str = None\nArgs(cache_dir='c', evaluation_strategy='no')"
    assert codes(own) == []


MASKS = [
    "from transformers import DataCollatorForLanguageModeling as D\nD(tok, mlm=False)",
    "DataCollatorForLanguageModeling(tok)",
]
MASKS += ["import transformers\ntransformers.DataCollatorForLanguageModeling(tok, mlm=False)"]
MASKS += ["import transformers as tr\ncollate = tr.data.data_collator.DataCollatorForLanguageModeling(tok, False)"]
PADS = [
    "tok.pad_token = tok.eos_token",
    "tok.pad_token_id = tok.eos_token_id",
    "self.tok.pad_token = self.tok.eos_token",
]
PADS += [
    "tok.add_special_tokens({'pad_token': tok.eos_token})",
    "tok = AutoTokenizer.from_pretrained('m', pad_token='</s>')",
]
PADS += ["if tok.pad_token is None:\n    tok.pad_token, x = '<|im_end|>', 1\n    tok.pad_token = '<|im_end|>'"]
PADS += [
    "end = tok.eos_token\ntok.pad_token = end",
    "extra = {'pad_token': '<|eot_id|>'}\ntok.add_special_tokens(extra)",
]
APART = ["model.config.pad_token_id = tok.eos_token_id", "model.generation_config.pad_token_id = tok.eos_token_id"]
APART += [
    "tok.pad_token = tok.unk_token",
    "tok.add_special_tokens({'pad_token': '[PAD]'})",
    "tok.eos_token = tok.pad_token",
]
APART += ["model.generate(x, pad_token_id=tok.eos_token_id)", "tok.pad_token = '<|endoftext|>'"]


@pytest.mark.parametrize("mask", MASKS)
def test_padding_that_ends_turns(mask):
    for pad in PADS:
        assert codes(f"{mask}\n{pad}") == ["pad_is_eos"], pad
        assert codes(pad) == [], pad
    for apart in APART:
        assert codes(f"{mask}\n{apart}") == [], apart


@pytest.mark.parametrize(
    "loads, two",
    [
        ("tok = AutoTokenizer.from_pretrained('Qwen/Qwen2.5-7B-Instruct')", False),
        ("name = 'HuggingFaceTB/SmolLM2-135M'\ntok = AutoTokenizer.from_pretrained(name)", False),
        ("class C:\n    model_name: str = 'Qwen/Qwen3-4B'\ntok = AutoTokenizer.from_pretrained(C().model_name)", False),
        (
            "all = ['unsloth/llama-3-8b']\nm, tok = FastLanguageModel.from_pretrained(model_name='unsloth/gpt-oss-20b')",
            False,
        ),
        ("tok = AutoTokenizer.from_pretrained('deepseek-ai/DeepSeek-R1-Distill-Qwen-7B')", True),
        ("tok = AutoTokenizer.from_pretrained('meta-llama/Llama-3.1-8B-Instruct')", True),
        ("tok = AutoTokenizer.from_pretrained('google/gemma-2-2b-it')", True),
        ("tok = AutoTokenizer.from_pretrained('./somewhere')", True),
        ("", True),
    ],
)
def test_a_second_bos_needs_a_first(loads, two):
    uses = "text = tok.apply_chat_template(m, tokenize=False)\n"
    assert codes(f"{loads}\n{uses}tok(text)") == (["chat_text_tokenized"] if two else [])
    assert codes(f"{loads}\n{uses}row = {{'text': text}}") == (["text_column"] if two else [])


def test_texts_that_a_loop_gathers():
    gathers = """def f(rows):
    texts = []
    for turns in rows["conversations"]:
        text = tok.apply_chat_template(turns, tokenize=False)
        texts.append(text)
    return {"text": texts}"""
    assert codes(gathers) == ["text_column"]
    assert explain_old_code(gathers).findings[0].line == 4


def test_a_name_that_is_bound_again():
    source = "from trl import SFTTrainer\nSFTTrainer(tokenizer=a)\nfrom mine import SFTTrainer\nSFTTrainer(tokenizer=b)"
    assert [f.line for f in explain_old_code(source).findings] == [2]


def test_cells_share_their_names():
    report = explain_old_code(["from trl import SFTTrainer as T", "x = 1\n%time\nT(a,\n  tokenizer=t)"])
    found = report.findings[0]
    assert (found.cell, found.line, found.column, found.old) == (2, 4, 3, "tokenizer=t")
    assert found.where == "cell 2, line 4, column 3"


def test_a_result_used_in_a_later_cell():
    report = explain_old_code(["enc = tok.apply_chat_template(m)", "model.generate(enc)", "model.generate(enc)"])
    assert [(f.code, f.cell, f.line, f.column) for f in report.findings] == [("chat_ids", 1, 1, 7)]


def test_columns_count_characters():
    source = "größe = 'ß'; SFTTrainer(tokenizer=t)"
    found = explain_old_code(source).findings[0]
    assert source[found.column - 1 :].startswith("tokenizer=t") and found.old == "tokenizer=t"


@pytest.mark.parametrize(
    "use",
    [
        "enc.shape",
        "enc[0]",
        "enc[:, 3:]",
        "len(enc)",
        "enc + [1]",
        "tok.decode(enc)",
        "torch.tensor(enc)",
        "model.generate(inputs=enc)",
        "{'input_ids': enc}",
        "model.generate(enc.to('cuda'))",
    ],
)
def test_uses_as_ids(use):
    assert codes(f"enc = tok.apply_chat_template(m)\n{use}") == ["chat_ids"]
    assert codes(f"enc = tok.apply_chat_template(m, return_dict=False)\n{use}") == []


# --- hostile sources ------------------------------------------------------------------------------------------------


def test_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "import antigravity_that_is_not_there\nopen('made', 'w')\n!touch made\n__import__('os').system('touch made')\nexit()"
    assert codes(source) == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "source, words",
    [
        ("x = 1\ny = = 2", "line 2 is not Python"),
        ("def f(:\n", "line 1 is not Python"),
        ("print 'old'", "line 1 is not Python"),
        ("  x = 1", "line 1 is not Python"),
        ("'''never closed", "line 1 is not Python"),
        ("x = 1\n\0", "null bytes"),
        ("x = '\ud800'", "can't be read as Python"),
        ("(" * 5000, "not Python|can't be read"),
        ("-" * 100_000 + "1", "not Python|can't be read|too deep"),
        ("+".join(["'a'"] * 20_000), "can't be read|too deep"),
        ("old.ipynb", "is the name of a file"),
        (" train.py ", "is the name of a file"),
        (json.dumps({"cells": [{"cell_type": "code", "source": "x"}]}), "notebook's JSON"),
        (None, "is a NoneType"),
        (b"x = 1", "is a bytes"),
        (["x = 1", None], "give a cell as text"),
        (["x = = 1", "y = = 2"], "cell 1, line 1 is not Python"),
        ("x = 1\n" * 1_000_000, "more than 1,000,000 are not read"),
    ],
    ids=range(18),
)
def test_what_is_no_code_is_one_sentence(source, words):
    with pytest.raises(UserError, match=words) as caught:
        explain_old_code(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "!pip install 'trl<0.9'\nx = 1",
        "%pip install trl==0.8.6",
        "pip install trl==0.8.6",
        "%%capture\n!pip install trl==0.8.6",
        "\n\n%%capture\n!pip install trl==0.8.6",
        "%%bash\necho $((1 +\npip install trl==0.8.6",
        "if True:\n    !pip install trl==0.8.6\nelse:\n    x = 1",
        "out = !pip install trl==0.8.6",
        "!pip install -q \\\n    peft \\\n    trl==0.8.6\nx = 1",
        "!pip uninstall -y trl && pip install trl==0.8.6",
        "!pip install 'trl==0.8.6",
        "!pip install trl==0.8.* # pinned",
        "x?\n!pip install trl==0.8.6\ny??",
        "%%capture\n%pip install -q \\\n  peft \\\n  'trl<0.9' \\\n\nx = 1",
        "%%bash\nset -e\npip install \\\n  peft \\\n  trl==0.8.6",
        "%%bash\nfor i in 1 2; do\n  pip install trl==0.8.6\ndone",
        "%env TOKEN='a (b\n%env X=0.6B\n!pip install trl==0.8.6",
        "!python train.py \\\n  --size 0.6B_x \\\n  --json '{\"a\": [1,' \\\n  --end\n!pip install trl==0.8.6",
        "%%time\n%%capture\n!pip install trl==0.8.6\nx = [1,\n  2]",
        "!uv pip -q install trl==0.8.6",
        "%cd /content\n!git clone https://x/y (\n!python -m pip install trl==0.8.6 2>&1 | tail -1",
        "# %%\n# !pip install trl==0.8.6\nx = 1",
        "!echo don't (\n!pip install trl==0.8.6",
    ],
)
def test_magics(source):
    report = explain_old_code(source)
    assert [f.code for f in report.findings] == ["pip_old"]
    found = report.findings[0]
    assert source.split("\n")[found.line - 1][found.column - 1 :].startswith("trl")


@pytest.mark.parametrize(
    "call",
    [
        "get_ipython().system('pip install -q trl==0.8.6')",
        "get_ipython().run_line_magic('pip', 'install trl==0.8.6')",
        "get_ipython().run_cell_magic('capture', '', '!pip install trl==0.8.6\\n')",
        "os.system('pip install trl==0.8.6')",
        "subprocess.run([sys.executable, '-m', 'pip', 'install', 'trl==0.8.6'])",
    ],
)
def test_pip_called_by_python(call):
    assert codes(call) == ["pip_old"]
    assert codes(call.replace("==0.8.6", "")) == []


def test_python_below_magics_is_read():
    for magics in (
        "!a \\\n  --b 0.6B\n",
        "%%capture\n!x 'y\n",
        "%env A=0.6B\n",
        "!echo \"it's (\n",
        "%load_ext autoreload\n%autoreload 2\n",
    ):
        report = explain_old_code(f"{magics}x = '''\n!no\n'''\nSFTTrainer(\n  tokenizer=t)")
        assert [(f.code, f.line) for f in report.findings] == [("trainer_tokenizer", magics.count("\n") + 5)], magics


def test_a_cell_that_cannot_be_read_costs_no_other():
    cells = [
        "from trl import SFTTrainer as T",
        "git clone https://x.y/z",
        "T(tokenizer=t)",
        "x = (",
        "-" * 100_000 + "1",
        "T(model, ...)",
    ]
    report = explain_old_code(cells)
    found = [(f.code, f.cell) for f in report.findings]
    assert found == [("unreadable", 2), ("trainer_tokenizer", 3), ("unreadable", 4), ("unreadable", 5)]
    assert "cell 2, line 1 is not Python" in str(report) and not report.ok
    assert explain_old_code(["x = 1", "y = = 2"]).summary == {"error": 0, "warning": 1, "info": 0}


def test_the_cells_of_a_script():
    "One cell in the middle is no Python; the lines of the others stay what they are."
    script = "# %%\nfrom trl import SFTTrainer as T\n# %% [markdown]\n# text\n# %%\ngit clone x y\n# %%\nT(\n  tokenizer=t)\n"
    found = [(f.code, f.cell, f.line) for f in explain_old_code(script).findings]
    assert found == [("unreadable", None, 6), ("trainer_tokenizer", None, 9)]
    with pytest.raises(UserError, match="line 2 is not Python"):
        explain_old_code("x = 1\ngit clone x y\n")


def test_what_a_terminal_would_obey_is_escaped():
    report = explain_old_code(
        "T = trl.SFTTrainer(tokenizer='\x1b]0;a\x07\u202e\x9b')\n!pip install 'trl<0.9' \x1b[2J".replace(
            "T =", "import trl\nT ="
        )
    )
    assert len(report.findings) == 2 and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", str(report))
    assert r"\x1b]0;a\x07\u202e" in str(report)


def test_magics_within_a_text_stay():
    assert parse_cell('x = """\n!pip install trl==0.8.6\n%time\n"""')[1] == []
    assert codes('x = """\n!pip install trl==0.8.6\n"""') == []
    assert codes("x = (7\n% 3)") == []


def test_python_below_a_cell_magic_is_read():
    for magic in ("%%time", "%%capture out", "%%writefile train.py", "%%my_profiler"):
        assert codes(f"{magic}\nSFTTrainer(tokenizer=t)") == ["trainer_tokenizer"]
    assert codes("%%html\n<b>SFTTrainer(tokenizer=t)</b>") == []
    assert codes("%time trainer = SFTTrainer(tokenizer=t)") == ["trainer_tokenizer"]


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_other_line_ends(newline):
    found = explain_old_code(newline.join(["x = 1", "SFTTrainer(", "    tokenizer=t)"])).findings[0]
    assert (found.line, found.column, found.old) == (3, 5, "tokenizer=t")


def test_a_large_source_is_read_in_time():
    import time

    source = "\n".join(f"x{i} = f(x{i - 1}, a={i})" for i in range(20_000)) + "\nSFTTrainer(tokenizer=t)"
    start = time.perf_counter()
    assert codes(source) == ["trainer_tokenizer"]
    assert time.perf_counter() - start < 60


def test_names_in_a_circle():
    assert codes("n = n.func\nn.x\nt = t.format(1)\nt.format(2)\nu = 'a'\nu = u + u\n" + "u = u + u\n" * 60) == []
    assert codes("a = b\nb = a\na = a.to(b)\nmodel.generate(a)\nt = t + 'x'\nSFTTrainer(tokenizer=a)") == [
        "trainer_tokenizer"
    ]


# --- the report -----------------------------------------------------------------------------------------------------


def test_report():
    report = explain_old_code("SFTTrainer(tokenizer='<b>&', packing=True)\nload_dataset('a/b', split='train[:1]')")
    assert not report.ok and report.summary == {"error": 2, "warning": 1, "info": 1}
    assert "<b>" not in report._repr_html_() and "&lt;b&gt;&amp;" in report._repr_html_()
    assert "processing_class=tokenizer" in str(report) and "\n" not in repr(report)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["ok"] is False and len(found["findings"]) == 4
    assert set(found["findings"][0]) == {"code", "severity", "cell", "line", "column", "old", "cause", "fix", "source"}
    assert explain_old_code("load_dataset('a/b', split='train[:1]')").ok
    assert (
        explain_old_code("").ok
        and "nothing found" in str(explain_old_code(""))
        and "nothing found" in explain_old_code("")._repr_html_()
    )


def test_nothing_of_ours_is_old():
    for path in NOTEBOOKS:
        if path.stem != "70_doctor":  # it holds the old tutorial itself
            found = explain_old_code(read_code(path)).findings
            allowed = set()
            if path.stem in ("11_template", "12_data", "09_preflight", "90_chat_templates", "91_row_checks"):
                allowed = set(
                    """train_loss hot hand_bos text_before_bos one_newline no_end_of_turn format_template format_braces
                    chat_text_tokenized text_column pad_is_eos""".split()
                )
            elif path.stem == "84_go_template":
                allowed = {"no_end_of_turn"}  # a piece of a template, put together with the rest
            elif path.stem == "41_exam":
                allowed = {"one_newline"}  # a template that lies is one of its questions
            assert {f.code for f in found} <= allowed, (path.name, [(f.code, f.where, f.old) for f in found])


def test_every_look_is_in_the_list():
    import qlora_nb.doctor as doctor

    looks = {f for name, f in vars(doctor).items() if name.startswith("look_")}
    assert looks == set(_LOOKS)


# --- files ----------------------------------------------------------------------------------------------------------


def test_script(tmp_path):
    path = tmp_path / "old.py"
    path.write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\nSFTTrainer(tokenizer=t)\n")
    assert codes(read_code(path)) == ["trainer_tokenizer"]
    path.write_bytes(b"\xef\xbb\xbfSFTTrainer(tokenizer=t)\n")
    assert codes(read_code(path)) == ["trainer_tokenizer"]


def test_notebooks(tmp_path):
    path = tmp_path / "old.ipynb"
    new = {
        "cells": [
            {"cell_type": "markdown", "source": "# = ="},
            {"cell_type": "code", "source": ["import trl\n", "x = 1"]},
            {"cell_type": "code", "source": "trl.SFTTrainer(tokenizer=t)"},
            {"cell_type": "code"},
        ],
        "nbformat": 4,
    }
    path.write_text(json.dumps(new))
    assert read_code(path) == ["import trl\nx = 1", "trl.SFTTrainer(tokenizer=t)", ""]
    assert explain_old_code(read_code(path)).findings[0].cell == 2
    path.write_text(json.dumps({"worksheets": [{"cells": [{"cell_type": "code", "input": ["x = 1"]}]}], "nbformat": 3}))
    assert read_code(path) == ["x = 1"]
    assert len(read_code(NBS / "30_quickstart.ipynb")) > 5


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("gone.py", None, "check the name"),
        ("gone.ipynb", None, "check the name"),
        ("old.txt", b"x", "neither .py nor .ipynb"),
        ("old", b"x", "neither .py nor .ipynb"),
        ("old.ipynb", b"", "is not JSON"),
        ("old.ipynb", b'{"cells": [', "is not JSON"),
        ("old.ipynb", b"[" * 100_000, "is not JSON"),
        ("old.ipynb", b"[1]", "not a notebook: it is a list"),
        ("old.ipynb", b"{}", "no list of cells"),
        ("old.ipynb", b'{"cells": 3}', "no list of cells"),
        ("old.ipynb", b'{"cells": [3]}', "no list of cells"),
        ("old.ipynb", b'{"worksheets": [3]}', "no list of cells"),
        ("old.ipynb", b'{"cells": [], "metadata": {"kernelspec": {"language": "R"}}}', "a notebook in R"),
        ("old.ipynb", b'{"cells": ["\xff"]}', "save it as UTF-8"),
        ("old.py", b"x = '\xe9'", "save it as UTF-8"),
        ("old.py", b"# coding: klingon\nx", "save it as UTF-8"),
        ("old.py", b"# coding: rot13\nx", "save it as UTF-8"),
        ("old.py", "x".encode("utf-16"), "save it as UTF-8"),
    ],
    ids=range(18),
)
def test_files_that_cannot_be_read(name, content, words, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_code(path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_standard_input(monkeypatch):
    notebook = json.dumps(
        {
            "cells": [
                {"cell_type": "code", "source": "x = 1"},
                {"cell_type": "code", "source": "SFTTrainer(tokenizer=t)"},
            ]
        }
    )
    for data, found in ((notebook, (2, 1)), ("x = 1\nSFTTrainer(tokenizer=t)", (None, 2))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
        report = explain_old_code(read_code("-"))
        assert [(f.cell, f.line) for f in report.findings] == [found]


def test_a_file_without_end(tmp_path):
    (tmp_path / "zero.py").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is a pipe or a device"):
        read_code(tmp_path / "zero.py")


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "old.py").mkdir()
    with pytest.raises(UserError, match="can't be read"):
        read_code(tmp_path / "old.py")


def test_public_name():
    import qlora_nb

    assert qlora_nb.explain_old_code is explain_old_code
    assert "doctor" in [module_of(path) for path in NOTEBOOKS]
