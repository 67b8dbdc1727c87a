"""Paged against plain AdamW through a spike: short batches, one long batch, short batches again.

QLoRA on a Llama-3.2-3B shape with random NF4 weights and a large rank, so that the optimizer's state is some GB.
torch may hold (`set_per_process_memory_fraction`) what the long batch needs without any optimizer state, plus a
quarter of that state: plain AdamW, whose state torch holds, cannot fit. A paged state lies in managed memory, outside
torch's limit; before each batch its pages are sent to the host (`cuMemPrefetchAsync`), and the card's used
memory is sampled, so that it shows whether all of it stays within the same budget. Each arm is a process of its own.

    python benchmarks/gpu/paged.py nbs/results/paged.json
    python benchmarks/gpu/paged.py out.json --tiny --device cpu      (dry run: nothing can page, nothing is limited)

The card is never oversubscribed: managed memory is asked for only while several times as much is free. What moves the
pages here is a prefetch, not the driver's own eviction under pressure.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

from common import add_adapters, now, quantized_llama, torch, write

ARMS = (
    "control",
    "plain32",
    "plain8",
    "paged32",
    "paged8",
)  # control: plain 32-bit with the whole card, and it calibrates
MIB = 2**20


class Sampler(threading.Thread):
    "Reads the card's free memory every few milliseconds: what torch's own counters cannot see."

    def __init__(self):
        super().__init__(daemon=True)
        self.rows, self.stop = [], False

    def run(self):
        while not self.stop:
            free, total = torch.cuda.mem_get_info()
            self.rows.append((time.perf_counter(), total - free, torch.cuda.memory_reserved()))
            time.sleep(0.002)

    def between(self, start, end):
        "Least and most device memory in use, and least and most of it outside torch's allocator, in the time given."
        rows = [r for r in self.rows if start <= r[0] <= end] or self.rows[-1:]
        outside = [used - reserved for _, used, reserved in rows]
        return {
            "device_used_max": max(r[1] for r in rows),
            "outside_torch_min": min(outside),
            "outside_torch_max": max(outside),
            "samples": len(rows),
        }


def batch(tokens, device, seed):
    return torch.randint(10, 600, (1, tokens), device=device, generator=torch.Generator(device).manual_seed(seed))


def forward_backward(model, ids, device):
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


def drop_gradients(model):
    for p in model.parameters():
        p.grad = None


def fits(model, ids, limit):
    "Whether the long batch's forward and backward work when torch may hold `limit` bytes."
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        forward_backward(model, ids, "cuda")
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        drop_gradients(model)
        torch.cuda.empty_cache()


def calibrate(model, ids):
    "The least memory that torch must hold for the long batch without any optimizer state, to 64 MiB."
    torch.cuda.reset_peak_memory_stats()
    forward_backward(model, ids, "cuda")
    low, high = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    drop_gradients(model)
    if fits(model, ids, low):
        return low
    while high - low > 64 * MIB:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(model, ids, middle) else (middle, high)
    return high


def make_optimizer(arm, parameters):
    import bitsandbytes as bnb

    bits = 8 if arm.endswith("8") else 32
    return bnb.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, optim_bits=bits, is_paged=arm.startswith("paged"))


def state_bytes(arm, parameters):
    "Bytes of the two moments: 8 a parameter in 32 bits; in 8 bits 2 (the part that is paged), plus a scale per 256."
    n = sum(p.numel() for p in parameters)
    return 8 * n if not arm.endswith("8") else 2 * n


def counted_state_bytes(optimizer):
    "Counted from the buffers: all, and those in managed memory."
    tensors = [
        t for s in optimizer.state.values() for k, t in s.items() if torch.is_tensor(t) and not k.startswith("qmap")
    ]
    return {
        "state_bytes": sum(t.numel() * t.element_size() for t in tensors),
        "paged_bytes": sum(t.numel() * t.element_size() for t in tensors if getattr(t, "is_paged", False)),
    }


def limit_torch(leave):
    "From here on torch may hold `leave` bytes."
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(leave / torch.cuda.mem_get_info()[1])


def send_to_host(optimizer):
    """Move the state's pages to the host, as the driver would under pressure. Returns their bytes, and seconds.

    By the driver's own call: bitsandbytes 0.50.2's `prefetch_tensor(to_cpu=True)` ends the process on CUDA 13
    ("invalid device ordinal").
    """
    prefetch = ctypes.CDLL("libcuda.so.1").cuMemPrefetchAsync
    prefetch.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    start, moved = now("cuda"), 0
    for state in optimizer.state.values():
        for t in state.values():
            if getattr(t, "is_paged", False):
                code = prefetch(t.data_ptr(), t.nbytes, -1, None)  # -1 is the host
                assert code == 0, f"cuMemPrefetchAsync returned {code}"
                moved += t.nbytes
    return moved, now("cuda") - start


def one_step(model, optimizer, tokens, i, a, sampler, paged):
    "One row: the step's times, loss and memory. Raises OutOfMemoryError."
    cuda = a.device == "cuda"
    ids = batch(tokens, a.device, i)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row = {"step": i, "tokens": tokens}
    if cuda and paged:
        assert torch.cuda.mem_get_info()[0] > 3 * paged, "managed memory is only used where there is plenty"
        row["sent_to_host_bytes"], seconds = send_to_host(optimizer)
        row["sent_to_host_seconds"] = round(seconds, 4)
    start = now(a.device)
    row["loss"] = forward_backward(model, ids, a.device)
    middle = now(a.device)
    begin = now(a.device)
    optimizer.step()
    end = now(a.device)
    optimizer.zero_grad(set_to_none=True)
    row.update(forward_backward_seconds=round(middle - start, 4), optimizer_seconds=round(end - begin, 4))
    if cuda:
        row.update(
            peak_allocated=torch.cuda.max_memory_allocated(),
            peak_reserved=torch.cuda.max_memory_reserved(),
            **{f"forward_backward_{k}": v for k, v in sampler.between(start, middle).items()},
            **{f"optimizer_{k}": v for k, v in sampler.between(begin, end).items()},
        )
    return row


def run_arm(a):
    "One process: its result goes to stdout as a line that starts with ARM."
    cuda = a.device == "cuda"
    model = add_adapters(
        quantized_llama("tiny" if a.tiny else a.size, a.device, torch.bfloat16), a.r, checkpointing=True
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = {
        "stack": "peft",
        "size": "tiny" if a.tiny else a.size,
        "base": "4",
        "batch": 1,
        "accumulation": 1,
        "r": a.r,
        "arm": a.arm,
        "optimizer": a.arm,
        "trainable": sum(p.numel() for p in parameters),
    }
    sampler = None
    if cuda:
        forward_backward(model, batch(a.short, a.device, 0), a.device)  # kernels and libraries take their memory now
        drop_gradients(model)
        torch.cuda.empty_cache()
        if a.arm == "control":
            found["spike_needs"] = calibrate(model, batch(a.long, a.device, 1))
        else:
            a.leave = a.need + int(0.25 * state_bytes(a.arm, parameters))
            limit_torch(a.leave)
            found.update(limit_bytes=a.leave)
        free, total = torch.cuda.mem_get_info()
        found.update(device_total=total, context_bytes=total - free - torch.cuda.memory_reserved())
        sampler = Sampler()
        sampler.start()
    optimizer = make_optimizer(a.arm, parameters)
    paged = state_bytes(a.arm, parameters) if a.arm.startswith("paged") else 0
    steps, outcome = [], "survived"
    for i, tokens in enumerate([a.short] * 3 + [a.long] + [a.short] * 3):
        try:
            steps.append(one_step(model, optimizer, tokens, i, a, sampler, paged))
        except torch.OutOfMemoryError as error:
            outcome = f"OutOfMemoryError at step {i}"
            found["error"] = str(error).split(". ")[0]
            break
        if i == 0:
            found.update(counted_state_bytes(optimizer))
        print(a.arm, steps[-1], file=sys.stderr, flush=True)
    if sampler:
        sampler.stop = True
        sampler.join()
        first = sampler.rows[0][0]
        found["trace"] = [(round(t - first, 3), u, r) for t, u, r in sampler.rows[:: max(1, len(sampler.rows) // 300)]]
    found.update(outcome=outcome, steps=steps)
    print("ARM " + json.dumps(found), flush=True)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--size", default="3b")
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--device", default="cuda")
    p.add_argument("--r", type=int, default=None, help="256; 16 for --tiny")
    p.add_argument("--short", type=int, default=None, help="tokens of the short batches: 512")
    p.add_argument("--long", type=int, default=None, help="tokens of the long batch: 8192")
    p.add_argument("--arms", default=",".join(ARMS))
    p.add_argument("--arm", help="run this one in this process (inner use)")
    p.add_argument("--need", type=int, default=0, help="bytes, from the control arm (inner use)")
    a = p.parse_args()
    a.r, a.short, a.long = (
        a.r or (16 if a.tiny else 256),
        a.short or (16 if a.tiny else 512),
        a.long or (64 if a.tiny else 8192),
    )
    a.leave = 0
    if a.arm:
        return run_arm(a)
    runs, need = [], 0
    for arm in a.arms.split(","):
        command = [
            sys.executable,
            os.path.abspath(__file__),
            a.out,
            "--size",
            a.size,
            "--device",
            a.device,
            "--r",
            str(a.r),
            "--short",
            str(a.short),
            "--long",
            str(a.long),
            "--arm",
            arm,
            "--need",
            str(need),
            *(["--tiny"] if a.tiny else []),
        ]
        start = time.time()
        with tempfile.TemporaryFile("w+") as errors:
            out = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=120)
            errors.seek(0)
            sys.stderr.write(errors.read()[-3000:])
        line = [row for row in out.stdout.splitlines() if row.startswith("ARM ")]
        if not line:
            runs.append({"arm": arm, "outcome": f"the process ended with code {out.returncode}"})
        else:
            runs.append(json.loads(line[0][4:]))
            need = runs[-1].get("spike_needs", need)
        runs[-1]["process_seconds"] = round(time.time() - start, 1)
        print(arm, runs[-1]["outcome"], runs[-1]["process_seconds"], "s", flush=True)
        write(a.out, a.device, runs)
        if a.device == "cuda" and not need:
            raise SystemExit("the control arm did not say what the long batch needs")


if __name__ == "__main__":
    main()
