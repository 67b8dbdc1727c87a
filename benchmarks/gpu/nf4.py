"""NF4 on a GPU: bitsandbytes' CUDA kernels, our torch code on the same card, and our result on the CPU.

python benchmarks/gpu/nf4.py nbs/results/nf4.json
python benchmarks/gpu/nf4.py out.json --device cpu      (dry run)
"""

import argparse
import statistics

import bitsandbytes.functional as bnb
from common import now, torch, write

from qlora_nb.nf4 import NF4_CODE, NF4Weight, find_code_bounds, quantize_nf4


def rate(function, weights, device, repeats=20):
    "Billion weights a second, by the median of some calls after three for warming up."
    times = []
    for _ in range(repeats + 3):
        start = now(device)
        function()
        times.append(now(device) - start)
    return round(weights / statistics.median(times[3:]) / 1e9, 3)


def plain_quantize(weight, bounds):
    "The definition itself, for torch.compile: blocks of 64, nearest value, two in a byte."
    blocks = weight.view(-1, 64).float()
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)
    index = (scaled.unsqueeze(-1) > bounds).sum(-1, dtype=torch.int32).view(-1, 2)
    return (index[:, 0] * 16 + index[:, 1]).to(torch.uint8), absmax


def plain_dequantize(packed, absmax, code, dtype):
    index = torch.stack([packed >> 4, packed & 15], 1).int()
    return (code[index].view(-1, 64) * absmax.unsqueeze(1)).to(dtype).view(-1)


def indices(packed):
    "The 4-bit indices, on the CPU."
    return torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).int().view(-1).cpu()


def relative(found, wanted):
    found, wanted = found.cpu().float(), wanted.cpu().float()
    return ((found - wanted).norm() / wanted.norm()).item()


def ours_on_both(weight, device):
    "Our code on the device against our code on the CPU."
    here, there = quantize_nf4(weight), quantize_nf4(weight.to(device))
    here1, there1 = quantize_nf4(weight, double_quant=False), quantize_nf4(weight.to(device), double_quant=False)
    return {
        "packed_equal": torch.equal(there.packed.cpu(), here.packed),
        "absmax_equal": torch.equal(there1.absmax.cpu(), here1.absmax),
        "dequantized_equal": torch.equal(there1.dequantize().cpu(), here1.dequantize()),
        "offset_difference": (there.offset.cpu() - here.offset).abs().item(),
        "constants_that_differ": int((there.absmax.cpu() != here.absmax).sum()),
        "constants": here.absmax.numel(),
    }


def theirs_against_ours(weight, device):
    "bitsandbytes on the device against our code on the CPU, which is bitsandbytes on the CPU."
    ours, single = quantize_nf4(weight), quantize_nf4(weight, double_quant=False)
    packed, state = bnb.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
    packed1, state1 = bnb.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=False)
    restored, step = bnb.dequantize_4bit(packed, state), (indices(packed) - indices(ours.packed)).abs()
    same = NF4Weight(packed1, state1.absmax, single.code, None, None, None, 64, weight.shape, weight.dtype)
    blocks = weight.float().view(-1, 64)
    near = (blocks / blocks.abs().amax(1, keepdim=True)).view(-1)[step > 0].unsqueeze(1) - find_code_bounds(NF4_CODE)
    return {
        "indices_that_differ": int((step > 0).sum()),
        "indices": step.numel(),
        "largest_step": int(step.max()),
        "farthest_from_a_boundary": near.abs().amin(1).max().item() if len(near) else 0.0,
        "absmax_equal": torch.equal(state1.absmax.cpu(), single.absmax),
        "offset_difference": (state.offset.cpu() - ours.offset).abs().item(),
        "constants_that_differ": int((state.absmax.cpu() != ours.absmax).sum()),
        "dequantized_difference": relative(restored, ours.dequantize()),
        "their_error": relative(restored, weight),
        "our_error": relative(ours.dequantize(), weight),
        "same_buffers_same_values": torch.equal(bnb.dequantize_4bit(packed1, state1), same.dequantize()),
    }


def speeds(weight, device):
    "Billion weights a second: bitsandbytes, ours as it is, and the definition compiled by torch."
    n, dtype = weight.numel(), weight.dtype
    code = NF4_CODE.to(device)
    bounds = find_code_bounds(code)
    quantize, dequantize = torch.compile(plain_quantize), torch.compile(plain_dequantize)
    packed, absmax = quantize(weight, bounds)
    single = quantize_nf4(weight, double_quant=False)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    return {
        "compiled_equals_ours": torch.equal(packed, single.packed.view(-1))
        and torch.equal(dequantize(packed, absmax, code, dtype), single.dequantize().view(-1)),
        "quantize": {
            "bitsandbytes": rate(lambda: bnb.quantize_4bit(weight, quant_type="nf4"), n, device),
            "ours": rate(lambda: quantize_nf4(weight, double_quant=False), n, device),
            "compiled": rate(lambda: quantize(weight, bounds), n, device),
        },
        "dequantize": {
            "bitsandbytes": rate(lambda: bnb.dequantize_4bit(theirs, state), n, device),
            "ours": rate(single.dequantize, n, device),
            "compiled": rate(lambda: dequantize(packed, absmax, code, dtype), n, device),
        },
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    size, runs = 4096 if args.device == "cuda" else 256, []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        weight = torch.randn(size, size, dtype=dtype)
        row = {"dtype": str(dtype), "shape": list(weight.shape)}
        row["ours_gpu_against_ours_cpu"] = ours_on_both(weight, args.device)
        row["bitsandbytes_gpu_against_ours_cpu"] = theirs_against_ours(weight, args.device)
        row["billion_weights_per_second"] = speeds(weight.to(args.device), args.device)
        runs.append(row)
        print(row, flush=True)
        write(args.out, args.device, runs)


if __name__ == "__main__":
    main()
