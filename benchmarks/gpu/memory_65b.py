"""QLoRA of a 65B-shaped and a 70B-shaped model within what a 48 GB card offers, r=64 on all linear layers.

    python benchmarks/gpu/memory_65b.py nbs/results/memory_65b.json
    python benchmarks/gpu/memory_65b.py out.json --tiny --device cpu      (dry run)

torch may hold 44.5 GiB (a 48 GB card with ECC, less its context), from before the first weight on. Random weights are
made and quantized matrix by matrix, so that the model never exists in 16 bits. NF4 with double quantization, gradient
checkpointing, 8-bit AdamW (not paged: neither the limit nor torch's peak sees managed memory), a loss that makes the
logits of 512 tokens at a time. Where adapters in fp32 don't fit they are tried in bf16, and the row says which it was.
"""

import argparse
import gc
import time

from common import PROJECTIONS, add_adapters, now, quantized_llama, torch, write

LIMIT = 44.5  # GiB


def chunked_loss(model, ids, size=512):
    "Mean cross entropy of the next token; logits exist for `size` tokens at a time, and are made again going back."
    base = model.get_base_model()
    hidden, target = base.model(input_ids=ids).last_hidden_state[:, :-1], ids[:, 1:]

    def part(h, t):
        return torch.nn.functional.cross_entropy(base.lm_head(h).float().flatten(0, 1), t.flatten(), reduction="sum")

    pairs = zip(hidden.split(size, 1), target.split(size, 1))
    total = sum(torch.utils.checkpoint.checkpoint(part, h, t, use_reentrant=False) for h, t in pairs)
    return total / target.numel()


def train(model, optimizer, tokens, steps, device):
    "The steps' losses and seconds, and the peaks. Raises OutOfMemoryError."
    cuda, losses, seconds, used = device == "cuda", [], [], []
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for i in range(steps):
        ids = torch.randint(10, 600, (1, tokens), device=device, generator=torch.Generator(device).manual_seed(i))
        start = now(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = chunked_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(round(now(device) - start, 3))
        losses.append(round(loss.item(), 4))
        if cuda:
            free, total = torch.cuda.mem_get_info()
            used.append(total - free)
    found = {"seq_length": tokens, "steps": steps, "losses": losses, "seconds": seconds}
    if cuda:
        found |= {
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
            "device_used": max(used),
        }
        found |= {f"{k}_gib": round(found[k] / 2**30, 3) for k in ("peak_allocated", "peak_reserved", "device_used")}
    return found


def attempt(size, adapter_dtype, lengths, args):
    "One model, trained at each length until one does not fit."
    import bitsandbytes as bnb

    begun, rows = time.time(), []
    same = {"stack": "peft", "size": size, "method": "qlora", "base": 4, "r": args.r, "batch": 1, "accumulation": 1}
    same |= {
        "optimizer": "adamw_8bit",
        "adapter_dtype": adapter_dtype,
        "limit_gib": LIMIT,
        "target_modules": PROJECTIONS,
    }
    model = add_adapters(quantized_llama(size, args.device, torch.bfloat16), args.r, checkpointing=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    if adapter_dtype == "bf16":
        for p in trained:
            p.data = p.data.bfloat16()
    same["trainable"] = sum(p.numel() for p in trained)
    if args.device == "cuda":
        same["resident_gib"] = round(torch.cuda.memory_allocated() / 2**30, 3)
    same["build_seconds"] = round(time.time() - begun, 1)
    optimizer = bnb.optim.AdamW8bit(trained, lr=1e-4)
    for tokens in lengths:
        try:
            rows.append({**same, "outcome": "trained", **train(model, optimizer, tokens, args.steps, args.device)})
        except torch.OutOfMemoryError as error:
            rows.append(
                {**same, "seq_length": tokens, "outcome": "OutOfMemoryError", "error": str(error).split(". ")[0]}
            )
            break
        finally:
            print(rows[-1] if rows else "nothing", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--r", type=int, default=64)
    args = parser.parse_args()
    if args.device == "cuda":
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(LIMIT * 2**30 / total)
    runs = []
    plans = [("65b", [512, 2048]), ("70b", [512, 1024, 1536, 2048, 2560, 3072, 4096])]
    for size, lengths in [("tiny", [32, 64])] if args.tiny else plans:
        for adapter_dtype in ("fp32", "bf16"):
            try:
                rows = attempt(size, adapter_dtype, lengths, args)
            except torch.OutOfMemoryError as error:
                rows = [
                    {
                        "size": size,
                        "adapter_dtype": adapter_dtype,
                        "outcome": "OutOfMemoryError while building",
                        "error": str(error)[:200],
                    }
                ]
            runs += rows
            write(args.out, args.device, runs, limit_gib=LIMIT)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            if size != "70b" and rows[-1]["outcome"] == "trained":
                break


if __name__ == "__main__":
    main()
