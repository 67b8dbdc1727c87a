"""The hand-written QLoRA product against bitsandbytes' Linear4bit with peft's adapter, on a GPU.

python benchmarks/gpu/layer.py nbs/results/qlora_layer.json
python benchmarks/gpu/layer.py out.json --tiny --device cpu      (dry run)
"""

import argparse
import statistics

from common import now, torch, write


def make(out_features, in_features, r, dtype, adapter_dtype, device):
    "A Linear4bit with peft's adapter on it, B filled, so that every gradient flows."
    import bitsandbytes as bnb
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, device=device, dtype=dtype) * 0.02
    base = bnb.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    base.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=base
    ).to(device)
    if base.weight.quant_state is None:
        base.weight = base.weight._quantize(device)
    base.support_avx512bf16_for_cpu = False
    base.requires_grad_(False)
    layer = Linear4bit(
        base, "default", LoraConfig(r=r, lora_alpha=2 * r, init_lora_weights=False), r=r, lora_alpha=2 * r
    ).to(device)
    layer.lora_A.to(adapter_dtype)
    layer.lora_B.to(adapter_dtype)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(0, 0.02)
    return layer.train()


def ours(layer, x):
    from qlora_nb.qlora import qlora_matmul

    base = layer.base_layer
    return qlora_matmul(
        x,
        base.weight,
        base.bias,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.scaling["default"],
    )


def once(layer, path, x, dy, autocast):
    "One forward and backward: output and gradients of x, A, B."
    x = x.detach().requires_grad_()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.grad = B.grad = None
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
        y = layer(x) if path == "peft" else ours(layer, x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, "A": A.grad, "B": B.grad}


def reference(layer, x, dy):
    "The same in double precision, from the same dequantized weight."
    import bitsandbytes.functional as F

    W = F.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).double()
    A, B = (m["default"].weight.double() for m in (layer.lora_A, layer.lora_B))
    s, x, dy = layer.scaling["default"], x.double(), dy.double()
    dxa = s * dy @ B
    return {"y": x @ W.T + s * (x @ A.T) @ B.T, "x": dy @ W + dxa @ A, "A": dxa.T @ x, "B": s * dy.T @ (x @ A.T)}


def error(found, wanted):
    "Relative error in the Frobenius norm."
    return {k: ((found[k].double() - wanted[k]).norm() / wanted[k].norm()).item() for k in wanted}


def measure(layer, path, x, dy, autocast, repeats):
    "Median seconds of forward and backward, and on a GPU the bytes kept between them and the peak."
    cuda, device = x.is_cuda, x.device.type
    found, seconds = {}, []
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for i in range(repeats + 3):
        v = x.detach().requires_grad_()
        A.grad = B.grad = None
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = now(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            y = layer(v) if path == "peft" else ours(layer, v)
        if cuda:
            found["kept_bytes"] = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
        y.backward(dy)
        if i >= 3:
            seconds.append(now(device) - start)
        if cuda:
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        del y, v
    return {**found, "milliseconds": round(1000 * statistics.median(seconds), 4)}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--device", default="cuda")
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--repeats", type=int, default=20)
    a = p.parse_args()
    shapes = [(256, 256), (512, 256)] if a.tiny else [(3072, 3072), (8192, 3072)]  # (out, in)
    tokens = 32 if a.tiny else 4096
    kinds = [
        ("bf16", torch.bfloat16, torch.bfloat16, False),
        ("fp32", torch.float32, torch.float32, False),
        ("bf16, fp32 adapters", torch.bfloat16, torch.float32, False),
        ("bf16, fp32 adapters, autocast", torch.bfloat16, torch.float32, True),
    ]
    torch.backends.cuda.matmul.allow_tf32 = False
    runs = []
    for out_features, in_features in shapes:
        for name, dtype, adapter_dtype, autocast in kinds:
            layer = make(out_features, in_features, a.r, dtype, adapter_dtype, a.device)
            x = torch.randn(1, tokens, in_features, device=a.device, dtype=dtype)
            dy = torch.randn(1, tokens, out_features, device=a.device, dtype=dtype)
            wanted = reference(layer, x[0], dy[0])
            wanted = {k: v[None] if k in "yx" else v for k, v in wanted.items()}
            for path in ("peft", "ours"):
                row = {
                    "stack": path,
                    "shape": [out_features, in_features],
                    "tokens": tokens,
                    "r": a.r,
                    "kind": name,
                    "base": "4",
                    "error": error(once(layer, path, x, dy, autocast), wanted),
                    **measure(layer, path, x, dy, autocast, 3 if a.tiny else a.repeats),
                }
                runs.append(row)
                print(row, flush=True)
            write(a.out, a.device, runs)


if __name__ == "__main__":
    main()
