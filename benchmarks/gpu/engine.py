"""The engine on a GPU: is it right there, which attention is fastest, and where does a step's time go?

python benchmarks/gpu/engine.py nbs/results/engine_gpu.json
python benchmarks/gpu/engine.py out.json --size tiny --tokens 2048 --device cpu      (dry run)

- gradients: of each parameter of a four-layer model in NF4, engine against plain peft on padded rows, in fp32; in bf16
  both against fp32 of the same weights, so that the engine's error stands beside the plain path's own. Also of layers
  that run again, replayed and not.
- passes: milliseconds of our kernels at the shape's widths, of torch.compile on the plain functions where it can, and
  of the bytes alone.
- attention: milliseconds, forward and backward, of each kernel at the shape's heads, for the rows of one line.
- step: milliseconds by kind of kernel in one step of the size, from torch's profiler, and its longest kernels.
"""

import argparse
import collections
import functools
import itertools
import random
import statistics
import unittest.mock

from common import SHAPES, add_adapters, now, quantized_llama, torch, write

from qlora_nb.engine import install
from qlora_nb.engine import line as line_module
from qlora_nb.engine.install import Engine, install_engine, remove_engine
from qlora_nb.engine.line import attention_kernel, join_rows
from qlora_nb.engine.passes import PLAIN_PASSES, choose_passes

KINDS = {  # words in a kernel's name, the first that fits
    "attention": ("flash", "fmha", "attn", "attention"),
    "our passes": ("_swiglu", "_add_norm", "_norm_back", "_cross_entropy"),
    "dequantize": ("dequant",),
    "liger": ("_rms_norm", "_rope"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "splitk"),
    "copies": ("copy", "memcpy", "memset", "cat"),
    "elementwise": ("elementwise",),
}


def lengths_of(tokens, longest=2048):
    "Row lengths of a full line: log-normal, median 600."
    rng, found = random.Random(0), []
    while sum(found) < tokens:
        found.append(min(longest, max(32, int(600 * rng.lognormvariate(0, 0.7))), tokens - sum(found)))
    return found


def some_rows(lengths, words, device):
    "Random rows, a quarter of each a prompt."
    chance = torch.Generator().manual_seed(0)
    ids = [torch.randint(10, words, (n,), generator=chance) for n in lengths]
    rows = [{"input_ids": t.tolist(), "labels": [-100] * (len(t) // 4) + t[len(t) // 4 :].tolist()} for t in ids]
    place = functools.partial(torch.tensor, device=device)
    longest = max(map(len, ids))
    padded = {
        "input_ids": place([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]),
        "labels": place([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]),
        "attention_mask": place([[1] * len(t) + [0] * (longest - len(t)) for t in ids]),
    }
    return padded, moved(join_rows(rows), device)


def moved(batch, device):
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


# --- is it right? ---------------------------------------------------------------------------------------------------


def small(dtype, device):
    "Four layers of NF4 with live adapters; the same weights in every dtype, rounded to bf16."
    SHAPES["small"] = (512, 1024, 4, 8, 2, 64, True, 4096)
    model = add_adapters(quantized_llama("small", device, torch.bfloat16), 16, False)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = (torch.randn(weight.shape, device=device) * 0.05).bfloat16().float()
        elif weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    for layer in model.modules():
        if getattr(getattr(layer, "weight", None), "quant_state", None) is not None:
            layer.weight.quant_state.dtype = layer.compute_dtype = dtype
    return model


def gradients_of(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def installed(model, name, engine):
    "The engine, in layers that run again or not."
    base = model.get_base_model()
    base.gradient_checkpointing_disable()
    if name in ("run again", "replayed"):
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with unittest.mock.patch.object(install, "REPLAY_DEVICES", () if name == "run again" else install.REPLAY_DEVICES):
        return install_engine(model, engine)


def apart(ours, theirs):
    "The largest relative difference over all parameters."
    assert list(ours) == list(theirs) and ours
    return max(((ours[name] - g).norm() / g.norm()).item() for name, g in theirs.items())


def measure_gradients(device):
    padded, line = some_rows((9, 300, 1, 170, 64), 4096, device)
    model = small(torch.float32, device)
    loss, wanted = gradients_of(model, padded)
    engines = {"all": Engine(), "no kernels": Engine(kernels=False, compiled=False)}
    engines |= {name: Engine(**{name: True}) for name in ("selective", "dense")}
    engines |= {"run again": Engine(), "replayed": Engine()}  # the first with no device to record on
    found = {}
    for name, engine in engines.items():
        on = installed(model, name, engine)
        ours = gradients_of(model, line)
        found[f"fp32, {name}"] = {"gradient": apart(ours[1], wanted), "loss": abs(ours[0] - loss) / loss, "on": str(on)}
    remove_engine(model)
    del model
    half = small(torch.bfloat16, device)
    found["bf16, plain"] = {"gradient": apart(gradients_of(half, padded)[1], wanted)}
    for name, engine in engines.items():
        on = installed(half, name, engine)
        ours = gradients_of(half, line)
        found[f"bf16, {name}"] = {"gradient": apart(ours[1], wanted), "loss": abs(ours[0] - loss) / loss, "on": str(on)}
        found[f"bf16, {name}"]["attention"] = attention_kernel(half)
    return found


# --- passes over memory ---------------------------------------------------------------------------------------------


def measure_passes(size, tokens, device):
    "Each of the engine's passes: as one kernel, by torch.compile, as it stands; and the bytes that it must move."
    hidden, inner, *_, words = SHAPES[size]
    some = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    wide, x = [some(tokens, inner) for _ in range(3)], [some(tokens, hidden) for _ in range(3)]
    thins, weights = [some(tokens, 16) for _ in range(3)], [some(inner, 16) for _ in range(3)]
    rstd = torch.rand(tokens, 1, device=device)
    calls = {  # arguments, and tensors that are read and written
        "swiglu": ((*wide[:2], thins[:2], weights[:2]), 3, inner),
        "swiglu_back": ((*wide, thins, weights), 5, inner),
        "add_norm": ((x[0], x[1], x[2][0], 1e-5), 4, hidden),
        "norm_back": ((*x, rstd, x[2][0]), 4, hidden),
        "cross_entropy_": ((some(512, words), torch.arange(512, device=device)), 3 * 512 / tokens, words),
    }
    fused, found = choose_passes(torch.device(device), torch.bfloat16), {}
    for name, (given, count, width) in calls.items():
        plain = getattr(PLAIN_PASSES, name)
        ways = {"kernel": getattr(fused, name), "as it stands": plain, "compiled by torch": torch.compile(plain)}
        found[name] = {"bytes": round(2 * count * tokens * width)}
        for way, function in ways.items():
            try:
                found[name][way] = timed(functools.partial(function, *given), device, 30)
            except Exception as error:  # noqa: BLE001  what can't be compiled is a result, too
                found[name][way] = f"{type(error).__name__}: {error}"[:200]
    return found


# --- attention ------------------------------------------------------------------------------------------------------


def timed(run, device, repeats=10):
    "Median milliseconds after a warm-up."
    for _ in range(3):
        run()
    marks = []
    for _ in range(repeats):
        begun = now(device)
        run()
        marks.append(1e3 * (now(device) - begun))
    return round(statistics.median(marks), 3)


def by_cudnn(query, key, value, bounds, longest, scaling):
    "cuDNN's attention through torch's jagged tensors; it has no grouped heads there."
    from torch.nn.attention import SDPBackend, sdpa_kernel

    groups = query.shape[1] // key.shape[1]
    lines = (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
    jagged = [torch.nested.nested_tensor_from_jagged(t, bounds.long(), max_seqlen=longest) for t in lines]
    jagged = [t.transpose(1, 2) for t in jagged]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*jagged, is_causal=True, scale=scaling)
    return out.transpose(1, 2).values()


def measure_attention(size, tokens, device):
    _, _, _, heads, kv_heads, width, _, _ = SHAPES[size]
    lengths = lengths_of(tokens)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    shapes = [(tokens, n, width) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    wish, scaling = torch.randn(tokens, heads, width, device=device, dtype=torch.bfloat16), width**-0.5
    repeated = [inputs[0], *(t.detach().repeat_interleave(heads // kv_heads, 1).requires_grad_() for t in inputs[1:])]

    def by_row(query, key, value, bounds, longest, scaling):
        return line_module._row_by_row(*(t.transpose(0, 1)[None] for t in (query, key, value)), bounds, scaling)[0]

    ways = {name: (kernel, inputs) for name, kernel in line_module.ATTENTION_KERNELS.items()}
    ways["torch's varlen_attn, key heads repeated"] = (line_module.ATTENTION_KERNELS["torch's varlen_attn"], repeated)
    ways |= {"cuDNN by jagged tensors": (by_cudnn, inputs), "one call a row": (by_row, inputs)}
    found = {"rows": len(lengths), "tokens": tokens, "pairs": sum(n * (n + 1) // 2 for n in lengths)}
    for name, (kernel, tensors) in ways.items():
        try:
            call = functools.partial(kernel, *tensors, bounds, max(lengths), scaling)
            place = (torch.device(device), torch.bfloat16, heads, kv_heads, width, scaling)
            right = line_module._is_right(kernel, *place)
            both = timed(lambda: torch.autograd.grad(call(), tensors, wish), device)  # noqa: B023
            with torch.no_grad():
                found[name] = {"right": right, "forward_ms": timed(call, device), "both_ms": both}
        except Exception as error:  # noqa: BLE001  a kernel that isn't there is a result, too
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    return found


# --- a step ---------------------------------------------------------------------------------------------------------


def kind_of(name):
    low = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in low for word in words)), "other")


def measure_step(size, tokens, device, engine):
    "Milliseconds of one step, as the clock has it, and by kind of kernel."
    model = add_adapters(quantized_llama(size, device, torch.bfloat16), 16, False)
    on = install_engine(model, engine)
    _, line = some_rows(lengths_of(tokens), min(4096, SHAPES[size][-1]), device)
    line["labels"] = line["input_ids"].clone()
    for bound in line["cu_seq_lens_q"][:-1].tolist():
        line["labels"][0, bound] = -100

    def step():
        model(**line, use_cache=False).loss.backward()

    milliseconds = timed(step, device, 5)
    kinds = [torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as seen:
        step()
        now(device)
    totals, longest = collections.Counter(), []
    for event in seen.key_averages():
        spent = (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e3
        totals[kind_of(event.key)] += spent
        longest.append([event.key[:120], round(spent, 3), event.count])
    found = {"engine": f"{on}; attention by {attention_kernel(model)}", "milliseconds": milliseconds, "tokens": tokens}
    found["tokens_per_second"] = round(1e3 * tokens / milliseconds)
    found["by_kind"] = {name: round(value, 2) for name, value in totals.most_common()}
    found["longest"] = sorted(longest, key=lambda one: -one[1])[:25]
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out")
    p.add_argument("--size", default="3b", choices=[*SHAPES])
    p.add_argument("--tokens", type=int, default=16_384)
    p.add_argument("--device", default="cuda")
    p.add_argument("--parts", nargs="*", default=["gradients", "passes", "attention", "step"])
    a = p.parse_args()
    found = {}
    makers = {
        "gradients": lambda: measure_gradients(a.device),
        "passes": lambda: measure_passes(a.size, a.tokens, a.device),
        "attention": lambda: measure_attention(a.size, a.tokens, a.device),
        "step": lambda: measure_step(a.size, a.tokens, a.device, Engine(dense=True)),
    }
    for part in a.parts:
        found[part] = makers[part]()
        print(part, found[part], flush=True)
        write(a.out, a.device, found, size=a.size)


if __name__ == "__main__":
    main()
