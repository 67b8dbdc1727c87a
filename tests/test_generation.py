"""Talking to models: prompts, batches, sampling, inference mode, both backends."""

import logging

import pytest
import torch

from qlora_nb.core import UserError
from qlora_nb.generation import (
    Reply,
    as_conversation,
    chat,
    default_batch_size,
    generate_replies,
    generation_mode,
    left_pad,
    make_batches,
    to_reply,
)

ASK = [{"role": "user", "content": "What is 2+2? Think step by step."}]
QUESTIONS = [
    "What is 3 + 4?",
    "Ben has 23 pens. He loses 10. He gives 11 to Lina. How many pens does Ben have now?",
    "Work out 12 + 30.",
    "Hi",
    "Mia has 4 boxes of 6 plums. She buys 10 more. She sells 7. How many plums does Mia have in the end?",
    "The house is red. " * 12 + "What colour is the house?",
]


def load(**settings):
    from qlora_nb.model import load_model

    return load_model("qlora_nb:embedded", backend="transformers", **settings)


@pytest.fixture(scope="module")
def exact():
    "The embedded model in fp32."
    return load(load_in_4bit=False, dtype="float32")


@pytest.fixture(scope="module")
def adapted():
    "The embedded model in 4 bits with an adapter that changes what it says."
    from qlora_nb.model import add_lora

    model, tokenizer = load()
    model = add_lora(model, r=8)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model, tokenizer


# --- without a model ------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "message, system, said",
    [
        ("", None, "empty"),
        (" \n", None, "empty"),
        ([], None, "no turns"),
        ([{"role": "user", "content": ""}], None, "empty"),
        ([{"role": "user"}], None, "turn 1"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": None}], None, "turn 2"),
        ([*ASK, {"role": "assistant", "content": "4"}], None, "ends with the assistant"),
        ([{"role": "system", "content": "a"}, *ASK], "b", "a system turn already"),
    ],
)
def test_conversations_that_cant_be_answered(message, system, said):
    with pytest.raises(UserError, match=said):
        as_conversation(message, system)


@pytest.mark.quick
def test_conversation_is_a_copy():
    turns = [dict(turn) for turn in ASK]
    as_conversation(turns, "Be brief.")[1]["content"] = "changed"
    assert turns == ASK
    assert as_conversation(ASK) == ASK, "system=None adds nothing"


@pytest.mark.quick
def test_batches_hold_each_row_once():
    lengths = [(7 * i) % 50 + 1 for i in range(120)]
    batches = make_batches(lengths, 16, max_new_tokens=10, context=50)
    assert sorted(i for batch in batches for i in batch) == list(range(120))
    for batch in batches:
        assert len(batch) <= 16
        if len(batch) > 1:
            assert max(lengths[i] for i in batch) + 10 <= 50, "a row short of room limits the others"


@pytest.mark.quick
def test_left_pad_of_one_row():
    ids, mask = left_pad([[1, 2]], 0)
    assert ids.tolist() == [[1, 2]] and mask.tolist() == [[1, 1]]


@pytest.mark.quick
def test_batch_size_follows_the_size():
    def sized(n):
        return torch.nn.ParameterList([torch.nn.Parameter(torch.empty(n, device="meta"))])

    assert [default_batch_size(sized(n)) for n in (3_000_000, 1_600_000_000, 8_000_000_000)] == [50, 16, 8]


# --- with the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -5}, "max_new_tokens is -5"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_settings_that_cant_be_meant(exact, settings, said):
    with pytest.raises(UserError, match=said):
        chat(*exact, "Hello", **settings)
    with pytest.raises(UserError, match="batch_size is 0"):
        generate_replies(*exact, [ASK], batch_size=0)


def test_greedy_takes_no_temperature(exact):
    assert chat(*exact, "Hello", temperature=0, do_sample=False, max_new_tokens=4) is not None


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_a_batch_changes_nothing(exact, batch_size):
    alone = [generate_replies(*exact, [question], max_new_tokens=32)[0] for question in QUESTIONS]
    assert generate_replies(*exact, QUESTIONS, max_new_tokens=32, batch_size=batch_size) == alone
    assert all(reply.text for reply in alone)


def test_no_conversations(exact):
    assert generate_replies(*exact, []) == []


def test_the_same_as_plain_transformers(exact):
    model, tokenizer = exact
    ids = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    said = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert chat(model, tokenizer, ASK, max_new_tokens=24, do_sample=False) == said.strip()


def test_with_an_adapter_in_4_bit(adapted):
    model, tokenizer = adapted
    with_adapter = generate_replies(model, tokenizer, QUESTIONS, max_new_tokens=16)
    with model.disable_adapter():
        without = generate_replies(model, tokenizer, QUESTIONS, max_new_tokens=16)
    assert with_adapter != without
    assert without == generate_replies(*load(), QUESTIONS, max_new_tokens=16)


def test_replies_hold_no_special_tokens(adapted):
    model, tokenizer = adapted
    torch.manual_seed(0)
    replies = generate_replies(model, tokenizer, QUESTIONS * 3, max_new_tokens=24, do_sample=True, temperature=3.0)
    assert not any(token in reply.text for reply in replies for token in tokenizer.all_special_tokens)
    assert all(1 <= reply.tokens <= 24 for reply in replies)
    assert all(reply.stopped for reply in replies if reply.tokens < 24)


def test_a_reply_ends_with_the_context(exact):
    model, tokenizer = exact
    context = model.config.max_position_embeddings
    words = tokenizer("word " * context, add_special_tokens=False)["input_ids"]

    def prompt(room):
        "A question that leaves `room` tokens."
        from qlora_nb.template import prompt_ids

        frame = len(prompt_ids(as_conversation("a"), tokenizer))
        text = tokenizer.decode(words[: context - room - frame + 1])
        while len(prompt_ids(as_conversation(text), tokenizer)) > context - room:
            text = text[:-1]
        return text, context - len(prompt_ids(as_conversation(text), tokenizer))

    text, room = prompt(5)
    assert 5 <= room < 12
    tight, roomy = generate_replies(model, tokenizer, [text, QUESTIONS[0]], max_new_tokens=32)
    assert tight.tokens <= room
    assert roomy == generate_replies(model, tokenizer, [QUESTIONS[0]], max_new_tokens=32)[0]
    with pytest.raises(UserError, match=f"prompt 2 of 2 has .* the model's context is {context}"):
        generate_replies(model, tokenizer, ["Hi", "word " * context])


def test_sampling_follows_the_seed(exact):
    def draw(seed):
        torch.manual_seed(seed)
        return generate_replies(*exact, QUESTIONS, max_new_tokens=16, do_sample=True, temperature=1.5)

    assert draw(1) == draw(1)
    assert len({str(draw(seed)) for seed in range(4)}) > 1


def test_greedy_draws_nothing(exact):
    before = torch.get_rng_state()
    generate_replies(*exact, QUESTIONS[:2], max_new_tokens=4)
    assert torch.equal(before, torch.get_rng_state())


def test_drawn_as_often_as_computed(exact):
    from qlora_nb.template import prompt_ids

    model, tokenizer = exact
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([prompt_ids(ASK, tokenizer)])).logits[0, -1] / 1.5, -1)
    assert float(p.sum()) == pytest.approx(1, abs=1e-4)
    torch.manual_seed(0)
    n = 1000
    drawn = generate_replies(
        model, tokenizer, [ASK] * n, max_new_tokens=1, do_sample=True, temperature=1.5, batch_size=n
    )
    for token in p.topk(3).indices.tolist():
        text = to_reply([token], tokenizer, set()).text
        same = [i for i in range(len(p)) if to_reply([i], tokenizer, set()).text == text] if p[token] > 0.02 else []
        share, wanted = sum(reply.text == text for reply in drawn) / n, float(p[same].sum())
        assert not same or abs(share - wanted) < 5 * (wanted * (1 - wanted) / n) ** 0.5 + 1e-3


def test_the_models_own_settings_neither_count_nor_warn(exact, recwarn):
    from transformers import GenerationConfig

    model, tokenizer = exact
    wanted = chat(model, tokenizer, QUESTIONS[1], do_sample=False, max_new_tokens=24)
    own, said = model.generation_config, []
    theirs = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=2.0, max_length=30, eos_token_id=own.eos_token_id
    )
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        model.generation_config = theirs
        assert chat(model, tokenizer, QUESTIONS[1], do_sample=False, max_new_tokens=24) == wanted
        chat(model, tokenizer, QUESTIONS[1], max_new_tokens=24)
        assert model.generation_config is theirs
    finally:
        model.generation_config = own
        logging.getLogger("transformers").removeHandler(handler)
    assert said == [] and [str(w.message) for w in recwarn] == []


def test_nothing_is_printed(exact, capfd):
    generate_replies(*exact, QUESTIONS, max_new_tokens=4)
    assert capfd.readouterr() == ("", "")


def modes(model):
    return {
        name: (m.training, getattr(m, "gradient_checkpointing", None))
        for name, m in [("", model), *model.named_modules()]
    }


def test_training_mode_comes_back(adapted):
    model, tokenizer = adapted
    model.train()
    model.get_base_model().model.layers[1].eval()
    before = modes(model)
    assert len(set(before.values())) > 2
    chat(model, tokenizer, "Hello", max_new_tokens=2)
    assert modes(model) == before
    with pytest.raises(ZeroDivisionError), generation_mode(model):
        assert not any(m.training for m in model.modules())
        raise ZeroDivisionError
    assert modes(model) == before


def test_training_goes_on_after_a_chat(adapted):
    "The gradients of one step, with and without a chat before it."
    model, tokenizer = adapted
    ids = tokenizer("Ann has 3 apples.", return_tensors="pt")["input_ids"]

    def gradients():
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    chat(model, tokenizer, "Hello", max_new_tokens=8)
    after = gradients()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(float(g.abs().max()) > 0 for g in before.values())


@pytest.mark.quick
def test_reply_is_a_plain_record():
    assert Reply("a", True, 2) == Reply(text="a", stopped=True, tokens=2)


def test_a_merged_adapter_that_is_off_does_not_answer():
    "peft takes a merged adapter out of the weights where it is switched off; so does the fast path."
    from qlora_nb.model import add_lora

    model, tokenizer = load(load_in_4bit=False, dtype="float32")
    model = add_lora(model, r=8)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with model.disable_adapter():
        base = generate_replies(model, tokenizer, QUESTIONS[:2], max_new_tokens=12)
    tuned = generate_replies(model, tokenizer, QUESTIONS[:2], max_new_tokens=12)
    model.merge_adapter()
    assert generate_replies(model, tokenizer, QUESTIONS[:2], max_new_tokens=12) == tuned != base
    with model.disable_adapter():
        assert generate_replies(model, tokenizer, QUESTIONS[:2], max_new_tokens=12) == base
