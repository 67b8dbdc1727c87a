"""Activation memory and time with and without gradient checkpointing, by sequence length.

QLoRA on a Llama-3.2-3B shape with random NF4 weights, r=16 on the seven projections, one sequence a step.

    python benchmarks/gpu/checkpointing.py nbs/results/checkpointing.json
    python benchmarks/gpu/checkpointing.py out.json --tiny --device cpu      (dry run)
"""

import argparse
import statistics

from common import add_adapters, now, quantized_llama, torch, write


def measure(model, ids, device, repeats):
    "Bytes kept by the decoder layers, peak over resident, and seconds: one row of the result."
    base = model.get_base_model()
    autocast = torch.autocast(device, dtype=torch.bfloat16)
    at_head, seconds = [], []
    handle = base.lm_head.register_forward_pre_hook(
        lambda *_: at_head.append(torch.cuda.memory_allocated()) if device == "cuda" else None
    )
    for i in range(repeats + 1):
        for p in model.parameters():
            if p.requires_grad:  # the gradients' own memory is there before, so that it is not counted
                p.grad = torch.zeros_like(p)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated()
        start = now(device)
        with autocast:
            loss = model(input_ids=ids, labels=ids).loss
        after = torch.cuda.memory_allocated() if device == "cuda" else None
        loss.backward()
        if i:
            seconds.append(now(device) - start)
        value = loss.item()
        del loss
    handle.remove()
    found = {"seconds": round(statistics.median(seconds), 4), "loss": round(value, 5)}
    if device == "cuda":
        found.update(
            resident_bytes=resident,
            layers_bytes=at_head[-1] - resident,
            forward_bytes=after - resident,
            peak_bytes=torch.cuda.max_memory_allocated() - resident,
        )
    return found


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--size", default="3b")
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--device", default="cuda")
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--repeats", type=int, default=3)
    a = p.parse_args()
    size = "tiny" if a.tiny else a.size
    lengths = [32, 64] if a.tiny else [512, 1024, 2048, 4096, 8192]
    model = add_adapters(quantized_llama(size, a.device, torch.bfloat16), a.r, checkpointing=False)
    runs = []
    for checkpointing in (True, False):
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.get_base_model().gradient_checkpointing_disable()
        for n in lengths:
            ids = torch.randint(10, 600, (1, n), device=a.device, generator=torch.Generator(a.device).manual_seed(n))
            row = {
                "stack": "peft",
                "size": size,
                "base": "4",
                "batch": 1,
                "accumulation": 1,
                "r": a.r,
                "seq_length": n,
                "gradient_checkpointing": checkpointing,
            }
            try:
                row.update(measure(model, ids, a.device, a.repeats))
            except torch.OutOfMemoryError:
                row["outcome"] = "OutOfMemoryError"
                for q in model.parameters():
                    q.grad = None
                torch.cuda.empty_cache()
            runs.append(row)
            print(row, flush=True)
            write(a.out, a.device, runs)


if __name__ == "__main__":
    main()
