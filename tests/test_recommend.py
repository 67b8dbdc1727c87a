"""Settings with reasons: the rules from both sides, and that what is advised can be used."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_nb.cards import KNOWN_CARDS
from qlora_nb.core import UserError
from qlora_nb.memory import estimate_memory
from qlora_nb.recommendation import (
    ADVICE_SOURCES,
    AdviceFacts,
    _adapter_parameters,
    advise_batch,
    advise_dropout,
    advise_epochs,
    advise_learning_rate,
    advise_rank,
    advise_schedule,
    count_data,
    count_steps,
    rate_for_width,
    recommend,
)
from qlora_nb.shapes import count_decoder_parameters, model_shape

LLAMA_3B = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True, "model_type": "llama",
    "max_position_embeddings": 131072, "head_dim": 128,
}  # fmt: skip
LLAMA_8B = {
    **LLAMA_3B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
ROWS = st.one_of(st.none(), st.integers(1, 10**7))


def facts(rows=None, tokens=None, method="qlora", config=LLAMA_3B, parameters=None):
    shape = model_shape(config)
    return AdviceFacts(shape, parameters or count_decoder_parameters(shape)["total"], method, rows, tokens, "cpu")


# --- the rules ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "parameters, method, rate",
    [
        (1.2e9, "qlora", 2e-4), (3.2e9, "lora", 2e-4), (13.1e9, "qlora", 2e-4), (33e9, "qlora", 1e-4),
        (70e9, "lora", 1e-4), (8e9, "full", 2e-5), (70e9, "full", 1e-5),
    ],
)  # fmt: skip
def test_the_papers_rates(parameters, method, rate):
    assert advise_learning_rate(facts(method=method, parameters=parameters)).value == pytest.approx(rate)


@pytest.mark.quick
def test_small_models_follow_the_width():
    "By hand, for a Llama of width 256: 5e-4 * (2000 / 256) ** 0.781."
    assert rate_for_width(256) == pytest.approx(5e-4 * 7.8125**0.781)
    assert rate_for_width(256, "full") == pytest.approx(rate_for_width(256) / 10)
    assert rate_for_width(4096, family="qwen3") == pytest.approx(5e-4 * (2000 / 4096) ** 0.0775)
    assert rate_for_width(2000) == pytest.approx(5e-4)


@pytest.mark.quick
@given(st.integers(1, 10**9))
def test_the_rank_has_room_for_the_tokens_or_says_so(tokens):
    advice = advise_rank(facts(10**5, tokens))[0]
    shape = model_shape(LLAMA_3B)
    assert advice.value in (16, 32, 64, 128)
    if _adapter_parameters(shape, advice.value) < tokens:
        assert advice.value == 128 and "full fine-tuning" in advice.reason
    elif advice.value > 16:
        assert _adapter_parameters(shape, advice.value // 2) < tokens, "half the rank would have had room"


@pytest.mark.quick
def test_few_rows_get_a_smaller_rank_and_steps_enough():
    assert advise_rank(facts(499))[0].value == 8
    assert advise_rank(facts(500))[0].value == advise_rank(facts())[0].value == 16
    for rows in (10, 60, 100, 300, 700, 3000):
        found = facts(rows)
        assert count_steps(found) >= 100 or advise_epochs(found).value == 8, rows


@pytest.mark.quick
def test_adapter_parameters_against_peft():
    from qlora_nb.model import add_lora, count_parameters, load_model

    model, _ = load_model("qlora_nb:embedded", load_in_4bit=False, dtype="float32", backend="transformers")
    counted = count_parameters(add_lora(model, r=8))["trainable"]
    assert _adapter_parameters(model_shape(model.config), 8) == counted


@pytest.mark.quick
@given(ROWS)
def test_batch_epochs_and_warm_up_hang_together(rows):
    found = facts(rows)
    batch, passes, steps = advise_batch(found).value, advise_epochs(found).value, count_steps(found)
    assert 1 <= batch <= 32 and 1 <= passes <= 8
    warm = next(a.value for a in advise_schedule(found) if a.name == "warmup_steps")
    if rows is None:
        assert steps is None and warm == 5
    else:
        assert steps * batch >= rows * passes > (steps - passes) * batch
        assert 0 <= warm <= min(100, steps), "a run is not all warm-up"
        assert warm <= max(steps / 5, 0.05 * steps)


@pytest.mark.quick
@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_more_rows_never_mean_more_passes(a, b):
    few, many = sorted((a, b))
    assert advise_epochs(facts(few)).value >= advise_epochs(facts(many)).value
    assert advise_batch(facts(few)).value <= advise_batch(facts(many)).value
    assert advise_dropout(facts(few)).value >= advise_dropout(facts(many)).value


# --- the data -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from qlora_nb.model import load_model

    return load_model("qlora_nb:embedded", load_in_4bit=False, dtype="float32", backend="transformers")[1]


def test_learned_tokens_are_those_of_the_replies(tokenizer):
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer is 7."}]}]
    ids = tokenizer("The answer is 7.", add_special_tokens=False)["input_ids"]
    assert count_data(rows, tokenizer) == (1, len(ids) + 1), "the reply's tokens and the end of its turn"
    assert count_data(rows * 5, tokenizer) == (5, 5 * (len(ids) + 1))
    assert count_data(iter(rows * 5), tokenizer)[0] == 5


def test_many_rows_are_estimated(tokenizer):
    from qlora_nb.rows import load_sft_dataset

    data = list(load_sft_dataset(split="train"))
    exact = count_data(data, tokenizer)[1]
    estimated = count_data(data * 2, tokenizer)[1]
    assert estimated == pytest.approx(2 * exact, rel=0.02)


@pytest.mark.quick
@pytest.mark.parametrize("data, said", [(0, "data is 0"), (-3, "data is -3"), ([], "no rows"), (iter([]), "no rows")])
def test_no_data(data, said):
    with pytest.raises(UserError, match=said):
        recommend(LLAMA_3B, data, "cpu")


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("device", ["cpu", *KNOWN_CARDS])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_every_setting_has_a_reason_and_a_source(device, method):
    found = recommend(LLAMA_3B, 1000, device, method=method)
    assert len({a.name for a in found.advice}) == len(found.advice)
    for advice in found.advice:
        assert advice.reason, advice
        assert all(source in ADVICE_SOURCES.values() for source in known_sources(advice.source)), advice
    batch = found["per_device_train_batch_size"] * found["gradient_accumulation_steps"]
    assert batch == found["effective_batch"]
    assert found["lora_alpha"] == found["r"]
    if device != "cpu":
        assert found["load_in_4bit"] is (method == "qlora")


def known_sources(text):
    "The sources that a line names: some hold a semicolon themselves."
    for source in ADVICE_SOURCES.values():
        if source in text:
            text = text.replace(source, "")
            yield source
    assert not text.strip("; "), f"unknown source: {text}"


@pytest.mark.quick
def test_what_is_advised_is_taken():
    "Names and types are those of `train`, `add_lora` and `load_model`."
    import inspect

    from qlora_nb.model import add_lora, load_model
    from qlora_nb.run import resolve_settings, settings_of_part

    for device in ("cpu", "T4"):
        found = recommend(LLAMA_3B, 1000, device).settings
        assert set(found["add_lora"]) <= set(inspect.signature(add_lora).parameters)
        assert set(found["load_model"]) <= set(inspect.signature(load_model).parameters)
        assert set(found["train"]) <= set(settings_of_part("trainer"))
        taken = dataclasses.asdict(resolve_settings(found["train"]))
        assert {name: taken[name] for name in found["train"]} == found["train"]
    assert set(found) == {"load_model", "add_lora", "train"}


@pytest.mark.quick
def test_full_fine_tuning_gets_no_adapter_settings():
    found = recommend(LLAMA_3B, 1000, "cpu", method="full")
    assert found.settings["add_lora"] == {}
    assert found["learning_rate"] == pytest.approx(2e-5) and found["trainer"] == "trl.SFTTrainer"


@pytest.mark.quick
def test_full_fine_tuning_fits_the_card_or_is_refused():
    "8B weights, their gradients and states take more than 50 GiB: a T4 can't, and an A100 with 80 GB can."
    with pytest.raises(UserError, match=r"8\.0B parameters in fp32, .* GiB at least, and T4 has 13.* method='qlora'"):
        recommend(LLAMA_8B, 1000, "T4", method="full")
    with pytest.raises(UserError, match="a larger card: A100 80GB is enough"):
        recommend(LLAMA_8B, 1000, "A100 40GB", method="full")
    found = recommend(LLAMA_8B, 1000, "A100 80GB", method="full")
    assert found["load_in_4bit"] is False and found["dtype"] == "bfloat16" and found.settings["add_lora"] == {}


@pytest.mark.quick
@pytest.mark.parametrize("card", ["V100", "A100 40GB", "A100 80GB", "H200"])
def test_full_fine_tuning_takes_the_largest_batch_that_fits(card):
    small = {**LLAMA_3B, "hidden_size": 1024, "num_attention_heads": 8} if card == "V100" else LLAMA_3B
    found = recommend(small, 1000, card, method="full")
    batch, accumulation = found["per_device_train_batch_size"], found["gradient_accumulation_steps"]
    assert batch * accumulation == found["effective_batch"] == 8
    assert found["dtype"] == ("bfloat16" if KNOWN_CARDS[card].bf16 else "float32"), "pure fp16 weights can't be trained"

    known = KNOWN_CARDS[card]

    def fits(rows, checkpointing):
        estimate = estimate_memory(
            small, "full", batch_size=rows, accumulation=8 // rows, gradient_checkpointing=checkpointing,
            card=known.bytes, dtype="bf16" if known.bf16 else "fp32", bf16=known.bf16, hopper=known.hopper,
        )  # fmt: skip
        return estimate.total_bytes <= 0.94 * known.bytes

    checkpointing = found["gradient_checkpointing"]
    assert fits(batch, checkpointing) and (batch == 8 or not fits(2 * batch, checkpointing))
    assert not checkpointing or not fits(1, False), "checkpointing only where it is needed"


@pytest.mark.quick
def test_full_fine_tuning_looks_at_the_rows(tokenizer):
    "Short rows leave room for more of them than full ones of 2,048 tokens do."
    from qlora_nb.rows import load_sft_dataset

    data = load_sft_dataset(split="train")
    full, short = (
        recommend(LLAMA_3B, rows, "A100 80GB", tokenizer=tokenizer, method="full") for rows in (len(data), data)
    )
    assert short["max_seq_length"] < full["max_seq_length"] == 2048
    assert short["per_device_train_batch_size"] >= full["per_device_train_batch_size"]
    with pytest.raises(UserError, match="qlora"):
        recommend(LLAMA_3B, data, "L4", tokenizer=tokenizer, method="full")


@pytest.mark.quick
def test_text_and_html():
    found = recommend(LLAMA_3B, 1000, "cpu")
    assert str(found).count("\n") == 2 * len(found.advice) - 1
    assert found._repr_html_().count("<tr>") == len(found.advice) + 1
    assert found.to_dict()["r"]["value"] == 16 and found.why("r").startswith("r = 16: ")
    for wrong in (lambda: found["colour"], lambda: found.why("colour"), lambda: recommend(LLAMA_3B, method="prefix")):
        with pytest.raises(UserError):
            wrong()


def test_advice_trains(tokenizer, tmp_path):
    "A short run with all that is recommended, on the embedded model."
    from qlora_nb.model import add_lora, load_model
    from qlora_nb.rows import load_sft_dataset
    from qlora_nb.workflow import train

    data = load_sft_dataset(split="train").select(range(12))
    model, tokenizer = load_model("qlora_nb:embedded", backend="transformers", max_seq_length=256)
    advised = recommend(model, data, "cpu", tokenizer=tokenizer).settings
    model = add_lora(model, **advised["add_lora"])
    # `max_steps` would come from the profile; the recommendation speaks of epochs.
    run = train(model, tokenizer, data, output=tmp_path / "run", eval_rows=0, check=False, **advised["train"])
    assert run.summary["steps"] == 4 * 6 and run.metrics[-1]["loss"] < run.metrics[0]["loss"]
