"""LoRA from scratch: equal to peft, exact to undo, and clear about what can't be."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import examples
from torch import nn

from qlora_nb.core import UserError
from qlora_nb.lora import LoRALayer, LoRALinear, count_lora_parameters, swap_layers
from qlora_nb.shapes import KNOWN_ARCHITECTURES, projection_shapes

HALVES = (torch.bfloat16, torch.float16)
SIDES = st.integers(1, 24)


@st.composite
def cases(draw):
    "Sizes, settings and a seed for one layer and one input."
    columns, rows = draw(SIDES), draw(SIDES)
    return {
        "columns": columns,
        "rows": rows,
        "r": draw(st.integers(1, min(columns, rows))),
        "alpha": draw(st.one_of(st.integers(1, 64), st.floats(0.1, 64))),
        "dropout": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "rslora": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, *HALVES])),
        "lead": draw(st.lists(st.integers(1, 4), max_size=3)),  # the input's shape before its last dimension
        "seed": draw(st.integers(0, 2**31)),
    }


def base_layer(case):
    torch.manual_seed(case["seed"])
    return nn.Linear(case["columns"], case["rows"], bias=case["bias"]).to(case["dtype"])


def pair(case):
    "Our layer and peft's, each around its own copy of one linear layer, with the same B, not zero."
    from peft import LoraConfig
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import cast_adapter_dtype

    base = base_layer(case)
    torch.manual_seed(case["seed"] + 1)
    config = LoraConfig(lora_dropout=case["dropout"], use_rslora=case["rslora"])
    theirs = Linear(copy.deepcopy(base), "default", config, r=case["r"], lora_alpha=case["alpha"])
    cast_adapter_dtype(theirs, "default")
    torch.manual_seed(case["seed"] + 1)
    ours = LoRALinear(copy.deepcopy(base), case["r"], case["alpha"], case["dropout"], case["rslora"])
    with torch.no_grad():
        theirs.lora_B["default"].weight.copy_(ours.lora_B.normal_(std=0.2))
    return ours, theirs


def backward(layer, x, seed):
    "The output, in training mode, and the input's gradient of a loss that weighs each output in its own way."
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)).sum().backward()
    return y, x.grad


@settings(max_examples=examples(400), deadline=None, derandomize=True)
@given(case=cases())
def test_equal_to_peft(case):
    ours, theirs = pair(case)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    assert ours.lora_A.dtype == A.dtype == (torch.float32 if case["dtype"] in HALVES else case["dtype"])
    assert ours.scaling == theirs.scaling["default"] and torch.equal(ours.lora_A, A)
    x = torch.randn(*case["lead"], case["columns"]).to(case["dtype"])
    for got, wanted in zip(backward(ours, x, case["seed"]), backward(theirs, x, case["seed"])):
        assert got.dtype == wanted.dtype == case["dtype"] and torch.equal(got, wanted)
    assert torch.equal(ours.lora_A.grad, A.grad) and torch.equal(ours.lora_B.grad, B.grad)
    assert ours.base.weight.grad is None
    assert torch.equal(ours.delta_weight(), theirs.get_delta_weight("default"))
    before = ours.base.weight.clone()
    ours.merge()
    theirs.merge()
    assert torch.equal(ours.base.weight, theirs.get_base_layer().weight)
    assert torch.equal(ours(x), theirs(x))
    ours.merge()
    ours.unmerge()
    ours.unmerge()
    assert torch.equal(ours.base.weight, before)


@settings(max_examples=examples(300), deadline=None, derandomize=True)
@given(case=cases())
def test_starts_as_the_base_and_is_one_product(case):
    torch.manual_seed(case["seed"])
    base = base_layer(case).double()
    layer = LoRALinear(base, case["r"], case["alpha"], 0.0, case["rslora"])
    x = torch.randn(*case["lead"], case["columns"], dtype=torch.float64)
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.lora_B)
    scale = case["alpha"] / (math.sqrt(case["r"]) if case["rslora"] else case["r"])
    weight = base.weight + scale * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, base.bias))
    assert torch.linalg.matrix_rank(layer.delta_weight()) <= case["r"]


def test_gradcheck():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(5, 4, dtype=torch.float64), r=3, lora_alpha=7)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    B = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    A = layer.lora_A.detach().clone().requires_grad_()
    call = torch.func.functional_call
    assert torch.autograd.gradcheck(lambda x, A, B: call(layer, {"lora_A": A, "lora_B": B}, x), (x, A, B))


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_adapters_follow_peft(dtype):
    "Someone who casts the whole model has adapters in 16 bits: the product is still made in fp32."
    case = {"columns": 24, "rows": 16, "r": 4, "alpha": 9, "dropout": 0.0, "rslora": False, "bias": True}
    ours, theirs = pair({**case, "dtype": dtype, "seed": 1})
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x = torch.randn(5, 24).to(dtype)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.delta_weight(), theirs.get_delta_weight("default"))
    ours.merge()
    theirs.merge()
    assert torch.equal(ours.base.weight, theirs.get_base_layer().weight)


def test_autocast_follows_peft():
    case = {"columns": 24, "rows": 16, "r": 4, "alpha": 9, "dropout": 0.0, "rslora": True, "bias": True}
    ours, theirs = pair({**case, "dtype": torch.float32, "seed": 1})
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16 and torch.equal(ours(x), theirs(x))


# --- merging --------------------------------------------------------------------------------------------------------


def filled(dtype=torch.float32, std=0.2):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(12, 8).to(dtype), r=4)
    nn.init.normal_(layer.lora_B, std=std)
    return layer


def test_unmerge_is_exact_even_after_training_goes_on_or_a_copy():
    layer = filled(torch.bfloat16)
    before = layer.base.weight.clone()
    layer.merge()
    nn.init.normal_(layer.lora_B)  # the change that was merged is gone; the old weight is not
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    for each in (layer, again):
        assert each.merged
        each.unmerge()
        assert torch.equal(each.base.weight, before) and not each.merged


def test_the_kept_weight_moves_with_the_layer():
    layer = filled()
    before = layer.base.weight.double()
    layer.merge()
    layer.double()
    layer.unmerge()
    assert layer.base.weight.dtype == torch.float64 and torch.equal(layer.base.weight, before)


def test_a_merge_that_overflows_changes_nothing():
    layer = filled(torch.float16)
    layer.lora_B.data.fill_(1e6)
    before = layer.base.weight.clone()
    with pytest.raises(UserError, match="NaN or infinite values in torch.float16"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.base.weight, before)
    layer.lora_B.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the adapter is broken"):
        layer.merge()


def test_a_merged_layer_saves_no_state_and_an_unmerged_one_loads_its_own():
    model = nn.Sequential(filled())
    model[0].merge()
    with pytest.raises(UserError, match="^0 is merged, .*unmerge.* or save its .base"):
        model.state_dict()
    assert set(model[0].base.state_dict()) == {"weight", "bias"}
    with pytest.raises(UserError, match="^0 is merged, and can't load a state: unmerge"):
        model.load_state_dict({"0.base.weight": torch.zeros(8, 12)}, strict=False)
    assert model[0].base.weight.any()
    model[0].unmerge()
    other = nn.Sequential(LoRALinear(nn.Linear(12, 8), r=4))
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 12)
    assert torch.equal(other(x), model(x))


# --- a whole model --------------------------------------------------------------------------------------------------


def tiny(kind="llama", **more):
    "A configuration whose sides all differ."
    from transformers import AutoConfig

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "pad_token_id": 0}
    return AutoConfig.for_model(kind, **{**sizes, **more})


def test_a_model_trains_as_with_peft():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny())
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    ours = copy.deepcopy(base)
    torch.manual_seed(1)
    made = swap_layers(ours, lambda layer: LoRALinear(layer, r=4, lora_alpha=8), targets)
    assert len(made) == 9 and all(isinstance(ours.get_submodule(name), LoRALinear) for name in made)
    ids = torch.randint(0, 64, (2, 12))
    losses = []
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 18
        optimizer, found = torch.optim.AdamW(trained, lr=1e-2), []
        for _ in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0] - 0.05


def test_a_failing_swap_leaves_the_model_alone():
    model = nn.Sequential()
    model.q_proj, model.v_proj = nn.Linear(8, 8), nn.Embedding(8, 8)
    with pytest.raises(UserError, match="base is a Embedding"):
        swap_layers(model, lambda layer: LoRALinear(layer, r=2), ["q_proj", "v_proj"])
    assert type(model.q_proj) is nn.Linear and model.q_proj.weight.requires_grad
    with pytest.raises(UserError, match="target_modules names k_proj, which the model doesn't have"):
        swap_layers(model, LoRALinear, ["q_proj", "k_proj"])


@pytest.mark.parametrize("kind", KNOWN_ARCHITECTURES)
@pytest.mark.parametrize("targets", [None, ("k_proj", "down_proj"), "q_proj,v_proj"], ids=str)
def test_counts_are_pefts(kind, targets):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = tiny(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = targets.split(",") if isinstance(targets, str) else targets or list(projection_shapes(config))
    for name, (columns, rows) in projection_shapes(config).items():
        found = [m.weight.shape for n, m in model.named_modules() if n.endswith(name)]
        assert found == [(rows, columns)] * config.num_hidden_layers, name
    adapted = get_peft_model(model, LoraConfig(r=5, target_modules=list(names)), low_cpu_mem_usage=True)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    more = {} if targets is None else {"target_modules": targets}
    assert count_lora_parameters(config, r=5, **more) == trained
    assert count_lora_parameters(config.to_dict(), r=5, **more) == trained


def test_a_configuration_may_leave_out_what_has_a_default():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    assert projection_shapes(sizes)["k_proj"] == (64, 64)
    assert count_lora_parameters(sizes, 2) == 2 * 2 * (4 * 128 + 3 * 160)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0, -1, True, 1.0, 2.5, "8", None, math.nan, 9, 10**9])
def test_rank(r):
    base = nn.Linear(12, 8)
    with pytest.raises(UserError, match=f"^r is {r!r}[,:].*choose a rank from 1 to 8|^r is {r!r}: the rank is a whole"):
        LoRALinear(base, r=r)
    assert base.weight.requires_grad  # untouched


@pytest.mark.parametrize("alpha", [0, -2, math.inf, math.nan, True, "16", None])
def test_alpha(alpha):
    with pytest.raises(UserError, match=f"^lora_alpha is {alpha!r}: "):
        LoRALinear(nn.Linear(8, 8), r=2, lora_alpha=alpha)


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.0, math.nan, True, "0.1", None])
def test_dropout(dropout):
    with pytest.raises(UserError, match=f"^lora_dropout is {dropout!r}: "):
        LoRALinear(nn.Linear(8, 8), r=2, lora_dropout=dropout)


def with_weight(weight):
    layer = nn.Linear(8, 8).requires_grad_(False)
    layer.weight.data = weight
    return layer


def linear_4bit():
    import bitsandbytes

    return bitsandbytes.nn.Linear4bit(64, 64)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Embedding(8, 8), "base is a Embedding: give an nn.Linear"),
        (lambda: nn.Conv1d(8, 8, 1), "base is a Conv1d: give an nn.Linear"),
        (lambda: torch.ones(8, 8), "base is a Tensor: give an nn.Linear"),
        (lambda: LoRALinear(nn.Linear(8, 8), r=2), "has an adapter already"),
        (linear_4bit, "base is a Linear4bit, whose weight is quantized: use qlora_nb.qlora.QLoRALinear"),
        (lambda: with_weight(torch.ones(8, 8, dtype=torch.int8)), "a weight of torch.int8"),
        (lambda: with_weight(torch.ones(8, 8).to(torch.float8_e4m3fn)), "a weight of torch.float8_e4m3fn"),
        (lambda: with_weight(torch.ones(8, 8, dtype=torch.complex64)), "a weight of torch.complex64"),
        (lambda: with_weight(torch.empty(0, 8)), "an empty weight of shape .0, 8."),
        (lambda: with_weight(torch.full((8, 8), math.nan)), "64 NaN or infinite values in its weight of shape .8, 8."),
        (lambda: with_weight(torch.diag(torch.full((8,), math.inf))), "8 NaN or infinite values"),
    ],
)
def test_base(make, message):
    with pytest.raises(UserError, match=message):
        LoRALinear(make(), r=2)


def test_pefts_own_layer_is_not_a_base():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(UserError, match="has an adapter already"):
        LoRALinear(model.base_model.model[0], r=2)


@pytest.mark.parametrize(
    "config, settings, message",
    [
        (3, {}, "model is a int: give a configuration"),
        ({"model_type": "gpt2"}, {}, "architecture 'gpt2' is not among those with Llama's layers"),
        ({"hidden_size": 64}, {}, "the llama configuration has no intermediate_size"),
        (None, {"r": 0}, "r is 0"),
        (None, {"r": 33}, "r is 33, but the weight has only 32"),
        (None, {"target_modules": ["c_attn"]}, "target_modules names c_attn: choose from q_proj"),
        (None, {"target_modules": []}, "target_modules is .*: name at least one layer"),
        (None, {"target_modules": None}, "target_modules is None: give names of layers"),
        (None, {"target_modules": ["q_proj", 3]}, "target_modules is .*: give names of layers"),
    ],
)
def test_counting(config, settings, message):
    with pytest.raises(UserError, match=message):
        count_lora_parameters(tiny() if config is None else config, **settings)


def test_meta_layers_hold_no_memory():
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(2**16, 2**16), r=64)
    assert layer.lora_A.is_meta and layer.lora_B.is_meta
    assert layer(torch.empty(2, 2**16, device="meta")).shape == (2, 2**16)


def test_the_path_alone():
    layer = LoRALayer(6, 4, r=2, lora_alpha=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer.path(x), x @ layer.delta_weight().T)
