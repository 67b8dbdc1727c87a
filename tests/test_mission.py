"""The mission, section by section: each of its rows has a heading in a notebook, and a cell that runs under it."""

import re

import pytest
from repository import NBS, read

pytestmark = pytest.mark.quick

# topic: (notebook, beginning of a heading, what the notebook has to mention), …
MISSION = {
    "what fine-tuning is": [
        ("40_takeaways", "What fine-tuning is", "training a model from nothing"),
        ("40_takeaways", "All weights, or a few", "Parameter-efficient"),
        ("40_takeaways", "Forgetting, shown", "catastrophic forgetting"),
    ],
    "LoRA": [
        ("01_lora", "The layer", "alpha"),
        ("01_lora", "How many parameters, how many megabytes", "0.1 %;100 MB;8 GB;28 GB;14 GB"),
    ],
    "QLoRA": [
        ("02_nf4", "Is NF4 optimal", "normal"),
        ("02_nf4", "Double quantization", "absmax"),
        ("03_qlora", "The layer", "dequant;4 bits;16 or 32 bits"),
        ("03_qlora", "Paged optimizers", "paged"),
    ],
    "memory": [
        ("04_memory", "How much VRAM", "65B"),
        ("04_memory", "65B on one 48 GB card", "41.4"),
    ],
    "Unsloth": [
        ("33_why_it_is_fast", "What Unsloth does", "Unsloth"),
        ("30_quickstart", "What it costs on a GPU", "Unsloth"),
    ],
    "step 1": [("30_quickstart", "Step 1:", "install")],
    "step 2": [
        ("10_model", "Step 2:", "max_seq_length;dtype;fp16;bf16;unsloth/Llama-3.2-3B-Instruct"),
        ("30_quickstart", "Step 2:", "load_model"),
    ],
    "step 3": [
        ("10_model", "Step 3:", "lora_alpha;lora_dropout;target_modules;bias;use_gradient_checkpointing;3407"),
        ("30_quickstart", "Step 3:", "add_lora"),
    ],
    "step 4": [
        ("12_data", "Step 4:", "ServiceNow-AI/R1-Distill-SFT;Parquet;JSONL"),
        ("30_quickstart", "Step 4:", "load_sft_dataset"),
    ],
    "step 5": [
        ("11_template", "Step 5:", "step by step"),
        ("30_quickstart", "Step 5:", "template"),
    ],
    "step 6": [
        (
            "15_training",
            "Step 6:",
            "per_device_train_batch_size;gradient_accumulation_steps;warmup_steps;max_steps;seed",
        ),
        ("15_training", "Step 6:", "learning_rate;optim;weight_decay;lr_scheduler_type;logging_steps;packing"),
    ],
    "step 7": [("15_training", "Step 7:", "loss")],
    "step 8": [("13_generate", "Step 8:", "max_new_tokens;temperature"), ("30_quickstart", "Step 8:", "2+2")],
    "save": [("16_merge", "Save", "save_adapter;save_merged")],
    "GGUF": [("17_gguf", "GGUF", "q4_k_m;q8_0")],
    "Ollama": [("18_ollama", "Ollama", "Modelfile;ollama serve;ollama create;ollama run;What is machine learning?")],
    "best practices": [
        ("05_recommend", "Best practices", "rank 16;alpha = r;1e-4 to 3e-4;as large as memory allows;1 to 3 epochs"),
        ("05_recommend", "Out of memory", "qlora_nb diagnose too_large;qlora_nb plan;checkpointing;4 bits"),
        ("05_recommend", "Slow", "qlora_nb diagnose slow;larger batch;**Unsloth**"),
        ("05_recommend", "Poor quality", "qlora_nb diagnose poor;qlora_nb recommend;more data;the rank"),
        ("05_recommend", "Overfitting", "qlora_nb diagnose memorised;fewer epochs;dropout;more varied rows"),
        ("05_recommend", "Forgetting", "qlora_nb diagnose run;disable_adapter;full fine-tuning"),
    ],
    "takeaways": [("40_takeaways", "Takeaways", "held;qualified;refuted")],
    "resources": [
        ("40_takeaways", "Resources", "2106.09685;2305.14314;unslothai/unsloth;ollama.com;bitsandbytes-foundation")
    ],
}
ROWS = [(topic, *row) for topic, rows in MISSION.items() for row in rows]

HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*$", re.M)
UNSEEN = re.compile(r"^\s*#\s*\|\s*(hide\b|include:\s*false|eval:\s*false|export|default_exp)", re.M)


FENCE = re.compile(r"^```.*?^```", re.M | re.S)


def parts_of(source):
    "A text cell from heading to heading: (level, title, text); level 0 is what stands before the first."
    plain = FENCE.sub(lambda fence: re.sub("^#", "\0", fence[0], flags=re.M), source)
    heads = list(HEADING.finditer(plain))
    yield 0, "", plain[: heads[0].start() if heads else None]
    for head, following in zip(heads, [*heads[1:], None]):
        yield len(head[1]), head[2], plain[head.start() : following.start() if following else None]


def section_under(sources, beginning):
    "(text, code cells) from the heading that begins so to the next of its level or above; None where there is none."
    text, code, level = [], [], None
    for kind, source in sources:
        if kind == "markdown":
            for depth, title, part in parts_of(source):
                if level is None and depth and title.strip("`*").lower().startswith(beginning.lower()):
                    level = depth
                elif level and level > 1 and 0 < depth <= level:
                    return "\n".join(text), code
                if level:
                    text.append(part)
        elif level:
            text.append(source)
            code.append(source)
    return ("\n".join(text), code) if level else None


def notebook_cells(stem):
    return [(cell["cell_type"], "".join(cell["source"])) for cell in read(NBS / f"{stem}.ipynb")["cells"]]


@pytest.mark.parametrize("topic, stem, heading, words", ROWS, ids=[f"{row[0]}: {row[2]}" for row in ROWS])
def test_a_row_of_the_mission(topic, stem, heading, words):
    sources = notebook_cells(stem)
    found = section_under(sources, heading)
    assert found is not None, f"{topic}: {stem} has no heading that begins with {heading!r}"
    text, code = " ".join(found[0].split()).lower(), found[1]
    assert any(not UNSEEN.search(source) for source in code), f"{topic}: nothing runs under {heading!r} in {stem}"
    missing = [word for word in words.split(";") if word.lower() not in text]
    assert not missing, f"{topic}: under {heading!r} {stem} says nothing of {missing}"


def test_a_section_ends_with_the_next_heading_of_its_level():
    sources = [
        ("markdown", "# Title"), ("markdown", "## Step 1: install"), ("code", "a"), ("markdown", "x\n### More\ny"),
        ("code", "b"), ("markdown", "z\n## Step 2\nw"), ("code", "c"),
    ]  # fmt: skip
    text, code = section_under(sources, "step 1")
    assert code == ["a", "b"] and "y" in text and "z" in text and "w" not in text
    assert section_under(sources, "Step 3") is None and section_under(sources, "step 2")[1] == ["c"]
    assert section_under(sources, "title")[1] == ["a", "b", "c"]
    assert section_under([("markdown", "```\n# Step 1\n```"), ("code", "a")], "Step 1") is None
    assert UNSEEN.search("#| hide\n1") and not UNSEEN.search("#| label: fig-a\n1")
