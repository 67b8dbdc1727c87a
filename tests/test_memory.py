"""The estimate and the planner: mistakes, families, cards, what is fetched, and laws that must hold for any setting."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from qlora_nb.activations import count_engine_layer_bytes
from qlora_nb.cards import KNOWN_CARDS, Card, choose_length, find_card, match_card, measure_row_lengths
from qlora_nb.core import EMBEDDED_MODEL, UserError
from qlora_nb.memory import (
    CODEBOOK_BYTES,
    MEMORY_COMPONENTS,
    SHARDED_COMPONENTS,
    count_weight_bytes,
    estimate_memory,
)
from qlora_nb.parallel import divide_batch
from qlora_nb.plan import Rows, plan_training
from qlora_nb.shapes import count_decoder_parameters, list_architectures, model_shape

LLAMA = {
    "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    "vocab_size": 128_256, "max_position_embeddings": 131_072,
}  # fmt: skip
GiB = 2**30


@pytest.fixture(scope="module")
def embedded_in_4_bits():
    from qlora_nb.model import add_lora, load_model

    return add_lora(
        load_model("qlora_nb:embedded", load_in_4bit=True, dtype="bfloat16", backend="transformers")[0], r=8
    )


# --- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list_architectures("memory"))
def test_a_configuration_object_takes_under_50_ms_and_loads_nothing(family):
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    before = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    start = time.perf_counter()
    estimate = estimate_memory(config)
    assert time.perf_counter() - start < 0.05
    assert sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()) == before
    assert tuple(estimate.by_component) == MEMORY_COMPONENTS
    assert estimate.total_bytes == sum(estimate.by_component.values()) > estimate.allocated_bytes > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not among those"),
        ({"model_type": None}, "has no model_type"),
        ({"hidden_size": None}, "llama configuration has no hidden_size"),
        ({"vocab_size": "many"}, "'many' as its vocab_size"),
        ({"num_hidden_layers": 0}, "0 as its num_hidden_layers"),
        ({"num_attention_heads": 2.5}, "2.5 as its num_attention_heads"),
        ({"head_dim": -1}, "-1 as its head_dim"),
    ],
)
def test_a_configuration_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message) as refused:
        estimate_memory({**LLAMA, **change})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "dora"}, "method is 'dora': choose one of full, lora, qlora"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"seq_length": 200_000}, "context of 131072"),
        ({"r": 1025}, "narrowest target has 1024"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": ("c_attn",)}, "target_modules is 'c_attn'"),
        ({"optimizer": "adam"}, "optimizer is 'adam': choose one of adamw_8bit"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"backend": "mlx"}, "backend is 'mlx'"),
        ({"packing": True, "backend": "transformers"}, "packing needs backend='engine' or 'unsloth'"),
        ({"gradient_checkpointing": "selective"}, "which only the engine has"),
        ({"gradient_checkpointing": "selective", "backend": "engine", "method": "full"}, "which only the engine has"),
        ({"gradient_checkpointing": "sometimes"}, "gradient_checkpointing is 'sometimes'"),
        ({"loss_rows": -1}, "loss_rows is -1"),
        ({"gpus": 0}, "gpus is 0"),
        ({"gpus": "all"}, "gpus is 'all': give a whole number"),
        ({"gpus": 2, "shard": "yes"}, "shard is 'yes': choose one of True, False"),
        ({"shard": True}, "gpus is 1: give gpus=2 or more, or leave shard out"),
        ({"gpus": 2, "method": "full"}, "choose method='qlora' or 'lora', or gpus=1"),
        ({"gpus": 2, "backend": "unsloth"}, "choose backend='engine' or 'transformers', or gpus=1"),
        ({"gpus": 3}, "2 rows a step .* can't be shared out evenly among 3 processes"),
    ],
)
def test_a_setting_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message) as refused:
        estimate_memory(LLAMA, **change)
    assert "\n" not in str(refused.value)


def test_places_without_a_configuration(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for name, text in (("broken", "{"), ("list", "[1]"), ("latin", b"\xff\xfe{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for model, message in [
        (tmp_path / "nowhere", "there is no folder"),
        ("./nowhere", "there is no folder"),
        (tmp_path / "empty", "holds no config.json"),
        (tmp_path / "broken", "is not valid JSON"),
        (tmp_path / "latin", "is not valid JSON"),
        (tmp_path / "list", "holds a JSON list"),
        (7, "model is a int"),
        ("nobody/nothing", "can't fetch config.json of nobody/nothing"),
    ]:
        with pytest.raises(UserError, match=message) as refused:
            estimate_memory(model)
        assert "\n" not in str(refused.value)


def test_the_folder_and_the_name_of_the_embedded_model():
    assert model_shape(EMBEDDED_MODEL) == model_shape("qlora_nb:embedded") == model_shape(str(EMBEDDED_MODEL))


def test_a_model_that_also_sees():
    "The decoder under text_config is what counts; the tower's weights are there too, whatever the method."
    seen = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "image_size": 896,
    }
    text = {**LLAMA, "model_type": "gemma3_text"}
    both = estimate_memory({"model_type": "gemma3", "text_config": text, "vision_config": seen})
    alone = estimate_memory(text)
    tower = count_decoder_parameters(both.shape)["vision"]
    assert 0.40e9 < tower < 0.45e9
    assert both.by_component["base_weights"] - alone.by_component["base_weights"] == 2 * tower
    assert both.by_component["activations"] == alone.by_component["activations"]
    with pytest.raises(UserError, match="vision configuration has no hidden_size"):
        model_shape({"model_type": "gemma3", "text_config": text, "vision_config": {"image_size": 1}})


def test_a_hub_name_fetches_the_configuration_and_nothing_else(tmp_path):
    "A server that holds a whole model sees one file asked for."
    asked, body = [], json.dumps(LLAMA).encode()

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            headers = {"ETag": '"abc"', "X-Repo-Commit": "f" * 40, "Content-Length": str(len(body))}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = "from qlora_nb.memory import estimate_memory; print(estimate_memory('someone/model').total_bytes)"
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path),
           "HF_HUB_OFFLINE": "0",
           "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == estimate_memory(LLAMA).total_bytes
    assert {path for path in asked if "someone" in path} == {"/someone/model/resolve/main/config.json"}


def test_an_estimate_imports_no_heavy_library():
    script = (
        "import sys; from qlora_nb.memory import estimate_memory; estimate_memory('qlora_nb:embedded', seq_length=512);"
        "estimate_memory('qlora_nb:embedded', gpus=2, shard=True);"
        "print([name for name in ('transformers', 'unsloth', 'matplotlib', 'bitsandbytes') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


# --- laws that hold for any setting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend, checkpointing",
    [(b, c) for b in ("unsloth", "transformers", "engine") for c in (True, False)] + [("engine", "selective")],
)
def test_more_of_anything_takes_no_less(backend, checkpointing):
    def total(**more):
        return estimate_memory(LLAMA, backend=backend, gradient_checkpointing=checkpointing, **more).allocated_bytes

    for name, values in {"batch_size": (1, 2, 4, 8), "seq_length": (512, 1024, 2048, 8192), "r": (4, 16, 64)}.items():
        sizes = [total(**{name: value}) for value in values]
        assert sizes == sorted(sizes), (name, sizes)
    assert total(method="qlora") < total(method="lora")
    if checkpointing != "selective":  # which is for adapters, on the whole MLP
        assert total(method="lora") < total(method="full")
        if (backend, checkpointing) != ("engine", True):  # which makes an MLP with all its adapters in pieces
            assert total(target_modules=("q_proj", "v_proj")) < total()
    assert total(accumulation=4) >= total(accumulation=1)
    assert total(optimizer="paged_adamw_8bit") < total(optimizer="adamw_8bit") < total(optimizer="adamw_torch")


def test_the_engine_takes_less_and_less():
    "Unsloth, the engine, selective, checkpointed: the same 16,384 tokens; and the part of the inputs in main memory."

    def found(**more):
        return estimate_memory(LLAMA, batch_size=8, packing=True, **more)

    sizes = [found(gradient_checkpointing=False).allocated_bytes]
    kinds = (False, "selective", True)
    sizes += [found(backend="engine", gradient_checkpointing=kind).allocated_bytes for kind in kinds]
    assert sizes == sorted(sizes, reverse=True)
    assert found(backend="engine").total_bytes == found(backend="engine", gradient_checkpointing="unsloth").total_bytes
    plan = plan_training(LLAMA, "8 GB", backend="engine", batch_size=8, method="qlora", gradient_checkpointing=True)
    assert plan.choice.offload_ram_bytes == 28 * 2 * 3072 * 16_384
    assert "GB of main memory for the layers' inputs" in str(plan)


def test_the_engine_keeps_more_where_the_mlp_is_not_one_function():
    few = ("q_proj", "v_proj", "down_proj")
    on = {kind: count_engine_layer_bytes(model_shape(LLAMA), 16, few, kind)["activations"] for kind in (False, True)}
    assert on[False] == on[True] == 2 * (2 * 3072 + 4) + 2 * 3072 + 6 * 8192 + 2 * 16 * 3


def test_the_engine_is_planned_for_what_it_trains():
    assert set(list_architectures("engine")) <= set(list_architectures("memory"))
    with pytest.raises(UserError, match="the engine doesn't train gemma"):
        plan_training({**LLAMA, "model_type": "gemma"}, "H200", backend="engine")
    wished = plan_training(LLAMA, "H200", backend="engine", gradient_checkpointing="selective")
    assert {c.gradient_checkpointing for c in (wished.choice, *wished.rejected)} == {"selective"}
    assert "selective checkpointing" in str(wished.choice)
    with pytest.raises(UserError, match="which only the engine has"):
        plan_training(LLAMA, "H200", gradient_checkpointing="selective")


def test_accumulation_keeps_the_gradients_in_the_fullest_moment():
    one, two = (estimate_memory(LLAMA, gradient_checkpointing=False, accumulation=n) for n in (1, 2))
    adapters = 4 * 24_313_856
    assert one.moment == two.moment == "loss"
    assert (one.by_component["gradients"], two.by_component["gradients"]) == (0, adapters)


def test_the_loss_of_a_small_card_is_tiled_but_not_without_bf16():
    big, small, turing = (
        estimate_memory(LLAMA, gradient_checkpointing=False, batch_size=1, card=card, bf16=bf16).by_component[
            "logits_loss"
        ]
        for card, bf16 in ((None, True), (16 * GiB, True), (16 * GiB, False))
    )
    assert turing == big > small
    long = dict(gradient_checkpointing=False, batch_size=4)
    tiled, rows = (estimate_memory(LLAMA, bf16=bf16, **long).by_component["logits_loss"] for bf16 in (True, False))
    assert tiled != rows


def test_inputs_stay_on_the_card_where_unsloth_was_loaded_for_short_rows():
    "Source: unsloth 2026.10.9, `apply_unsloth_gradient_checkpointing`."
    short, long = (
        estimate_memory(LLAMA, batch_size=8, seq_length=256, max_seq_length=n).by_component["activations"]
        for n in (256, 2048)
    )
    assert short > long


# --- several cards --------------------------------------------------------------------------------------------------


def parts_of(units, cards):
    "Bytes of each card's parts: every unit in so many, each rounded up to 256."
    return sum(-(-unit // (cards * 256)) * 256 for unit in units)


def weigh(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("cards", [2, 3, 8])
def test_a_sharded_base_is_counted_as_its_real_tensors(embedded_in_4_bits, cards):
    "The embedded model's own bytes, unit by unit; its head is its embedding."
    base = embedded_in_4_bits.get_base_model()

    def unit(module):
        weights = [p for name, p in module.named_parameters() if "lora_" not in name]
        states = [p.quant_state for p in weights if hasattr(p, "quant_state")]
        return weigh([*weights, *(s.absmax for s in states), *(s.state2.absmax for s in states)])

    layers = [unit(layer) for layer in base.model.layers]
    embedding, norm = unit(base.model.embed_tokens), unit(base.model.norm)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    found = estimate_memory(base.config, gpus=cards, shard=True, batch_size=1, accumulation=cards, seq_length=64)
    by = found.by_component
    books = CODEBOOK_BYTES * 7 * len(layers)  # on every card
    held = sum(by[name] for name in ("base_weights", "quant_constants", "embeddings_head"))
    assert held == parts_of(layers, cards) + embedding + norm + books
    assert by["gathered_layers"] == 2 * cards * parts_of([max(layers)], cards)
    assert by["gathered_head"] == 0, "it stays whole"


@pytest.mark.parametrize("tied", [True, False])
def test_a_sharded_base_holds_what_is_counted(tied, tmp_path):
    "What a process really has, once it has read its part; its tensors begin at multiples of 256."
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlora_nb.core import EMBEDDED_MODEL
    from qlora_nb.loading import load_tokenizer
    from qlora_nb.model import load_model
    from qlora_nb.sharding import find_sharded

    config = LlamaConfig.from_pretrained(EMBEDDED_MODEL, tie_word_embeddings=tied, num_hidden_layers=3)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    load_tokenizer(str(EMBEDDED_MODEL)).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), backend="transformers", dtype="bfloat16", shard=2)
    held = find_sharded(model)
    inside = sum(unit.part.nbytes for unit in held.units)
    outside = weigh(p for p in model.parameters() if id(p) not in held.weights)
    by = estimate_memory(config, gpus=2, shard=True, batch_size=1, accumulation=2, seq_length=64).by_component
    counted = sum(by[name] for name in ("base_weights", "quant_constants", "embeddings_head")) - CODEBOOK_BYTES * 7 * 3
    between = 3 * 21 * 256
    assert counted <= inside + outside <= counted + between / 2
    gathered = by["gathered_layers"] + by["gathered_head"]
    assert gathered <= sum(buffer.nbytes for buffer in held.buffers) <= gathered + 2 * 21 * 256


@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_16_bit_base_is_counted_as_modules_without_weights(tied):
    "A wide Qwen2, whose projections have biases, on the meta device."
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 3, "num_attention_heads": 40}
    config = AutoConfig.for_model("qwen2", **sizes, num_key_value_heads=8, vocab_size=152_064, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layers, norm = [weigh(layer.parameters()) for layer in model.model.layers], weigh(model.model.norm.parameters())
    embedding = weigh(model.model.embed_tokens.parameters())
    head = weigh(model.lm_head.parameters())
    by = estimate_memory(config, "lora", gpus=4, shard=True, batch_size=1, accumulation=4).by_component
    assert by["base_weights"] + by["embeddings_head"] == norm + parts_of(layers, 4) + (
        embedding if tied else parts_of([embedding, head], 4)
    )
    assert by["quant_constants"] == 0
    assert by["gathered_layers"] == 2 * 4 * parts_of([layers[0]], 4)
    assert by["gathered_head"] == (0 if tied else 4 * parts_of([head], 4))


def test_gradients_are_added_up_in_a_tensor_of_the_counted_size(embedded_in_4_bits):
    "With many adapters' numbers and few tokens, that is the fullest moment."
    from qlora_nb.parallel import join_gradients
    from qlora_nb.trainer import trainable_parameters

    weights = [weight.float() for weight in trainable_parameters(embedded_in_4_bits).values()]
    found = estimate_memory(
        "qlora_nb:embedded", r=8, gpus=2, batch_size=1, accumulation=2, seq_length=1, backend="transformers"
    )
    assert found.moment == "adding up"
    assert found.by_component["joined_gradients"] == join_gradients(weights, torch.zeros(())).nbytes
    assert found.by_component["gradients"] == found.by_component["adapters"] == weigh(weights)


@pytest.mark.parametrize("backend", ["engine", "transformers"])
@pytest.mark.parametrize("rows, steps, cards", [(4, 4, 2), (4, 1, 2), (3, 2, 3), (8, 1, 8)])
def test_each_of_several_cards_takes_its_share_of_the_batch(rows, steps, cards, backend):
    "Without sharding, what one card takes for that share, and the gradients of all."
    size, count = divide_batch(rows, steps, cards)
    how = {"backend": backend, "seq_length": 512}
    several = estimate_memory(LLAMA, batch_size=rows, accumulation=steps, gpus=cards, **how)
    one = estimate_memory(LLAMA, batch_size=size, accumulation=count // cards, **how)
    assert (several.settings["batch_size"], several.settings["accumulation"]) == (size, count // cards)
    assert several.moment == one.moment and several.by_component == one.by_component


def test_more_cards_hold_less_each_and_waste_little():
    for method in ("lora", "qlora"):
        for family, checkpointing in (("llama", True), ("llama", False), ("qwen3", "selective")):
            config = {**LLAMA, "model_type": family}
            how = {"batch_size": 1, "accumulation": 8, "gradient_checkpointing": checkpointing, "backend": "engine"}
            whole = estimate_memory(config, method, **how)
            found = [estimate_memory(config, method, gpus=n, shard=True, **how) for n in (2, 4, 8)]
            sizes = [one.total_bytes for one in (whole, *found)]
            assert sizes[1:] == sorted(sizes[1:], reverse=True)
            books = CODEBOOK_BYTES * 7 * 28 * (method == "qlora")
            base = sum(count_weight_bytes(whole.shape, method).values()) - books
            shape = whole.shape
            outside = (
                2 * shape.hidden * (1 + shape.tied * shape.vocabulary)
            )  # the last norm, and an embedding that is the head
            for n, one in zip((2, 4, 8), found):
                held = sum(one.by_component[name] for name in SHARDED_COMPONENTS) - books
                assert 0 <= n * (held - outside) - (base - outside) <= 30 * n * 256 + n, (
                    method,
                    family,
                    n,
                )  # 28 layers, two tables
                assert f"base_weights (1/{n})" in str(one) and f"on each of {n} GPUs" in repr(one)


def test_answering_with_a_sharded_base_has_no_dense_copy():
    from qlora_nb.memory import estimate_generation

    whole, part = (estimate_generation(LLAMA, dense=False, **how) for how in ({}, {"gpus": 2, "shard": True}))
    assert part.by_component == estimate_generation(LLAMA, gpus=2, shard=True).by_component
    differ = {name for name, value in part.by_component.items() if value != whole.by_component[name]}
    assert differ == {*SHARDED_COMPONENTS, "gathered_layers"} - {"embeddings_head"}, "which are one, and whole"
    with pytest.raises(UserError, match="gpus is 1: give gpus=2 or more"):
        estimate_generation(LLAMA, shard=True)


@pytest.mark.parametrize("gpus, shard", [(2, False), (2, True), (4, True)])
@pytest.mark.parametrize("backend", ["engine", "transformers"])
def test_a_plan_for_several_cards_shares_the_same_batch(gpus, shard, backend):
    lengths = [100 + 37 * (i % 50) for i in range(500)]
    plan = plan_training(LLAMA, "12 GB", lengths, gpus=gpus, shard=shard, backend=backend)
    assert plan.fits and plan.backend == backend
    for choice in (plan.choice, *plan.rejected):
        size, steps = divide_batch(choice.batch, choice.accumulation, gpus)
        s = choice.estimate.settings
        assert (
            (size, steps // gpus) == (choice.batch, choice.accumulation // gpus) == (s["batch_size"], s["accumulation"])
        )
        assert (s["gpus"], s["shard"]) == (gpus, shard)
        if not choice.packing:
            assert choice.batch * choice.accumulation == 8
    assert plan.settings["train"]["gpus"] == gpus and plan.to_dict()["gpus"] == gpus
    alone = plan_training(LLAMA, "12 GB", lengths, backend=backend)
    if not shard:  # the same choice gets as many rows done in less time
        same = {(c.batch, str(c)): c.tokens_per_second for c in (alone.choice, *alone.rejected)}
        for choice in (plan.choice, *plan.rejected):
            if (speed := same.get((choice.batch, str(choice)))) is not None:
                assert choice.tokens_per_second == pytest.approx(gpus * speed)


def test_the_plan_of_one_process_goes_on_as_it_was():
    assert "gpus" not in plan_training(LLAMA, "L4").settings["train"]
    assert plan_training(LLAMA, "L4").backend == "unsloth"
    assert plan_training({**LLAMA, "model_type": "gemma2"}, "L4", gpus=2).backend == "transformers"


def test_cards_that_hold_the_base_together_are_a_remedy():
    "70B on cards of 24 GB: as few cards as hold it, of those that share the batch evenly."
    seventy = {**LLAMA, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
               "num_attention_heads": 64, "tie_word_embeddings": False}  # fmt: skip

    def remedy(**wishes):
        return [line for line in plan_training(seventy, "24 GB", **wishes).advice if "such cards" in line]

    assert remedy() == ["or cut the base among 4 such cards: gpus=4, shard=True, backend='engine'"]
    assert remedy(effective_batch=6) == ["or cut the base among 3 such cards: gpus=3, shard=True, backend='engine'"]
    assert remedy(gpus=4) == ["or cut the base among 4 such cards: shard=True"]
    assert remedy(gpus=2, shard=True) == ["or cut the base among 4 such cards: gpus=4"]
    assert remedy(effective_batch=1) == remedy(method="lora") == []
    for wishes in ({"gpus": 4, "shard": True}, {"gpus": 3, "shard": True, "effective_batch": 6}):
        plan = plan_training(seventy, "24 GB", **wishes)
        assert (
            plan.fits
            and not plan.advice
            and "in each process" in str(plan)
            and f"{plan.gpus} x 24 GB" in plan._repr_html_()
        )
    assert not plan_training(seventy, "24 GB", gpus=3, effective_batch=6).fits  # each would hold the whole base


# --- cards and plans ------------------------------------------------------------------------------------------------


ADVERTISED = {
    "T4": 16, "V100": 16, "L4": 24, "A10": 24, "RTX 3090": 24, "RTX 4090": 24, "A40": 48, "L40S": 48, "A100 40GB": 40,
    "A100 80GB": 80, "H100": 80, "H200": 141,
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_CARDS)
def test_each_card_is_found_by_its_names(name):
    for written in (name, name.lower(), f"NVIDIA {name}", name.replace(" ", "-")):
        assert find_card(written) is KNOWN_CARDS[name]
    assert 0.91 < KNOWN_CARDS[name].bytes / (ADVERTISED[name] * GiB) <= 1


def test_names_that_are_no_card():
    for name in ("", "RTX", "NVIDIA", "A1000", "T400", "L400", "RTX A6000"):
        assert match_card(name) is None, name
    for device in ("T5", "", "-1 GB", "0 GB", 5, -1, 10**30, None, True, [1]):
        with pytest.raises(UserError, match="there is no card|give bytes"):
            find_card(device)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="there is no GPU here"):
            find_card("cuda")


@pytest.mark.parametrize("gb", [8, 12, 16, 24, 40, 48, 80, 96])
@pytest.mark.parametrize("backend", ["unsloth", "transformers", "engine"])
def test_a_plan_fits_with_its_margin_and_keeps_the_effective_batch(gb, backend):
    lengths = [100 + 37 * (i % 50) for i in range(500)]
    plan = plan_training(LLAMA, f"{gb} GB", lengths, backend=backend)
    choice = plan.choice
    assert choice.estimate.total_bytes <= 0.94 * plan.card.bytes
    assert plan.rows.dropped <= 0.01 * len(lengths)
    tokens = choice.batch * choice.accumulation * (choice.seq_length if choice.packing else plan.rows.mean)
    assert 0.7 < tokens / (8 * plan.rows.mean) < 1.5
    assert choice.packing <= (backend != "transformers")
    fitting = [c for c in plan.rejected if c.estimate.total_bytes <= plan.budget]
    # As fast as any, to a hundredth.
    assert all(c.tokens_per_second <= choice.tokens_per_second / 0.99 for c in fitting)
    assert all(c.reason for c in plan.rejected)
    assert set(json.loads(json.dumps(plan.to_dict()))) >= {"card", "choice", "rejected", "settings", "advice"}


def test_more_memory_is_never_planned_slower():
    speeds = [plan_training(LLAMA, gb * GiB).choice.tokens_per_second for gb in (8, 12, 16, 24, 32, 48, 64, 80)]
    assert speeds == sorted(speeds)


def test_what_is_wished_is_kept():
    plan = plan_training(
        LLAMA, "A100 80GB", [300] * 100, batch_size=2, gradient_checkpointing=True, packing=False, method="lora"
    )
    c = plan.choice
    assert (c.batch, c.accumulation, c.gradient_checkpointing, c.packing, c.method) == (2, 4, True, False, "lora")
    assert plan_training(LLAMA, "T4", effective_batch=7).choice.batch in (1, 7)
    assert plan_training(LLAMA, "T4", batch_size=16).choice.accumulation == 1


def test_rows_are_not_packed_without_being_asked_where_that_was_never_tried():
    lengths = [700] * 98 + [3300] * 2
    for card, packed in (("L4", True), ("T4", False)):
        assert any(c.packing for c in plan_training(LLAMA, card, lengths).rejected) == packed
    assert plan_training(LLAMA, "T4", lengths, packing=True).choice.packing


def test_nothing_fits_and_what_to_change():
    plan = plan_training(LLAMA, "6 GB", method="lora", backend="transformers")
    assert not plan.fits and plan.choice is None
    said = str(plan)
    for part in (
        "nothing fits",
        "the smallest option (lora",
        "take a larger card: T4",
        "or method='qlora'",
        "or a smaller model",
    ):
        assert part in said, said
    with pytest.raises(UserError, match="nothing fits 6 GB") as refused:
        _ = plan.settings
    assert "\n" not in str(refused.value)
    tight = plan_training(LLAMA, "5 GB", [7000] * 90 + [200] * 10, gradient_checkpointing=False)
    assert not tight.fits and any("gradient_checkpointing=True" in a for a in tight.advice)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"effective_batch": 0}, "effective_batch is 0"),
        ({"seq_length": 0}, "seq_length is 0"),
        ({"seq_length": 10**6}, "context of 131072"),
        ({"method": "full"}, "method is 'full'"),
        ({"margin": 1.5}, "margin is 1.5"),
        ({"packing": "yes"}, "packing is 'yes'"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"data": []}, "data has no rows"),
        ({"data": [0, 5]}, "a length of 0"),
        ({"data": ["text"]}, "neither whole numbers nor rows of messages"),
        ({"data": [{"messages": []}]}, "give tokenizer="),
        ({"data": [900], "seq_length": 100}, "every row is longer than max_seq_length=100"),
        ({"optimizer": "adafactor"}, "optimizer is 'adafactor'"),
        ({"gpus": 0}, "gpus is 0"),
        ({"gpus": 3}, "3 GPUs can't share so many rows evenly: take 6 or 9"),
        ({"gpus": 16, "effective_batch": 8}, "take 16"),
        ({"shard": True}, "gpus is 1: give gpus=2 or more"),
        ({"gpus": 2, "backend": "unsloth"}, "Unsloth trains on one GPU"),
    ],
)
def test_a_wish_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message) as refused:
        plan_training(LLAMA, "T4", **change)
    assert "\n" not in str(refused.value)


def test_lengths_are_those_of_the_trainer():
    from transformers import AutoTokenizer

    from qlora_nb.preflight import encode_dataset
    from qlora_nb.rows import load_sft_dataset

    tokenizer, data = AutoTokenizer.from_pretrained(EMBEDDED_MODEL), load_sft_dataset(limit=250)
    rows, dropped = encode_dataset(data, tokenizer, 2048)
    assert measure_row_lengths(data, tokenizer) == [len(ids) for ids in rows["input_ids"]] and not dropped
    assert measure_row_lengths(iter(torch.arange(1, 4).numpy())) == [1, 2, 3]
    bad = [*data, {"messages": [{"role": "user", "content": None}]}]
    assert len(measure_row_lengths(bad, tokenizer)) == 250


def test_choose_length_keeps_99_percent():
    assert choose_length([100] * 99 + [5000], 8192) == 256
    assert choose_length([100] * 98 + [5000] * 2, 8192) == 5120
    assert choose_length([100] * 98 + [5000] * 2, 4096) == 4096
    assert choose_length([], 1024) == 1024
    assert Rows((), 512, 0).padded(3) == 512


def test_a_card_whose_memory_is_partly_taken_is_still_a_large_one():
    "Unsloth asks for the card's whole size when it chooses how to compute the loss."
    free = Card("half of it", 20 * GiB, total=80 * GiB)
    assert plan_training(LLAMA, free).choice.estimate.settings["card"] == 80 * GiB
