// The memory calculator. `_estimate` and what it uses are translated from the Python source.
startFigures("memory", (root, data) => {
  const own = ["hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocabulary"];
  const same = (names) => names.map((name) => [name, words(name)]);
  const c = {
    model: control("model", { options: [...same(Object.keys(data.models)), ["own", "own numbers"]], value: data.start.model }),
    method: control("method", { options: [["full", "full"], ["lora", "LoRA"], ["qlora", "QLoRA"]], value: data.start.method }),
    r: control("rank", { value: data.start.r }),
    batch_size: control("rows in a batch", { value: data.start.batch_size }),
    accumulation: control("accumulation", { value: data.start.accumulation }),
    gradient_checkpointing: control("gradient checkpointing", { options: [["true", "on"], ["false", "off"], ["selective", "selective"]], value: String(data.start.gradient_checkpointing) }),
    optimizer: control("optimizer", { options: data.optimizers.map((name) => [name, name]), value: data.start.optimizer }),
    backend: control("backend", { options: same(data.backends), value: data.start.backend }),
    dtype: control("weights (full)", { options: same(["bf16", "fp16", "fp32"]), value: data.start.dtype }),
    card: control("GPU", { options: same(Object.keys(data.cards)), value: data.start.card }),
    count: control("GPUs", { value: data.start.gpus ?? 1 }),
    shard: control("base sharded", { check: true, value: data.start.shard ?? false }),
    seq_length: control("tokens in a row", { steps: data.lengths, value: data.start.seq_length, show: (n) => n.toLocaleString("en") }),
    run: control("a measured run (one H200)", { options: [["", "none chosen"], ...data.runs.map((run, i) => [i, run.label])], value: "" }),
  };
  const numbers = Object.fromEntries(own.map((name) => [name, control(words(name), { value: 1 })]));
  numbers.tied = control("tied embeddings", { check: true, value: true });
  let model = data.models[data.start.model], extra = {};

  const fill = () => Object.entries(numbers).forEach(([name, one]) => (one.value = model[name]));
  const settings = (seq_length) => ({
    ...data.defaults, method: c.method.value, r: c.r.value, batch_size: c.batch_size.value, accumulation: c.accumulation.value,
    gradient_checkpointing: { true: true, false: false, selective: "selective" }[c.gradient_checkpointing.value],
    optimizer: c.optimizer.value, dtype: c.dtype.value, seq_length, backend: c.method.value === "full" ? "transformers" : c.backend.value,
    card: data.cards[c.card.value].total, bf16: data.cards[c.card.value].bf16, hopper: data.cards[c.card.value].hopper,
    gpus: c.count.value, shard: c.shard.value, ...extra,
  });
  const whole = (shape) => ({ ...shape, query: query(shape), kv: kv(shape) });
  root.estimate = (shape, s) => _estimate(whole(shape), s); // for those who want the numbers

  function problem(shape, s) {
    const wrong = [...own.map((name) => [words(name), shape[name]]), ["rank", s.r], ["rows", s.batch_size], ["accumulation", s.accumulation], ["GPUs", c.count.value]];
    for (const [name, value] of wrong) if (!Number.isInteger(value) || value < 1) return `${name}: give a whole number of at least 1`;
    if (c.count.value > 1 && s.method === "full") return "GPUs: several share the training of an adapter, not of a whole model";
    const narrow = Math.min(...Object.values(projection_shapes(shape)).flat());
    return s.method !== "full" && s.r > narrow ? `rank: the narrowest matrix has ${narrow} rows or columns` : "";
  }

  function limitChoices() {
    const full = c.method.value === "full", option = (one, value) => [...one.input.options].find((o) => o.value === value);
    const several = c.count.value > 1;
    option(c.backend, "engine").disabled = !model.engine;
    option(c.backend, "unsloth").disabled = several; // it trains on one
    if (!model.engine && c.backend.value === "engine") c.backend.value = several ? "transformers" : "unsloth";
    if (several && c.backend.value === "unsloth") c.backend.value = model.engine ? "engine" : "transformers";
    c.shard.input.disabled = !several;
    if (!several) c.shard.value = false;
    const selective = !full && c.backend.value === "engine";
    option(c.gradient_checkpointing, "selective").disabled = !selective;
    if (!selective && c.gradient_checkpointing.value === "selective") c.gradient_checkpointing.value = "true";
    c.r.input.disabled = full;
    c.backend.input.disabled = full;
    c.dtype.input.disabled = !full;
  }

  root.addEventListener("input", ({ target }) => {
    if (target === c.run.input && c.run.value !== "") {
      const run = data.runs[c.run.value];
      for (const [name, value] of Object.entries(run.settings)) if (name in c) c[name].value = String(value);
      c.card.value = "H200";
      c.count.value = 1;
      model = data.models[run.settings.model];
      extra = run.extra;
      fill();
    } else if (target !== c.seq_length.input) {
      c.run.value = "";
      extra = {};
    }
    if (target === c.model.input && c.model.value !== "own") { model = data.models[c.model.value]; fill(); }
    if (Object.values(numbers).some((one) => one.input === target)) {
      c.model.value = "own";
      model = { ...model, ...Object.fromEntries(Object.entries(numbers).map(([name, one]) => [name, one.value])) };
    }
    limitChoices();
  });

  const matching = (s) => data.runs.filter((run) => s.gpus === 1).filter((run) => {
    const has = { ...run.settings, ...run.extra }, now = { ...s, model: c.model.value };
    return Object.entries(has).every(([name, value]) => name === "seq_length" || name === "card" || now[name] === value);
  });

  const said = make("output", { "aria-live": "polite" }), pictures = make("div");
  const controls = Object.values(c).map((one) => one.label);
  for (const one of [c.seq_length, c.run]) one.label.className = "qnb-wide";
  root.replaceChildren(
    make("div", { class: "qnb-controls" }, ...controls),
    make("details", {}, make("summary", {}, "Own numbers, as in config.json"), make("div", { class: "qnb-controls" }, ...Object.values(numbers).map((one) => one.label))),
    said, pictures);
  fill();
  limitChoices();

  return (width) => {
    const card = data.cards[c.card.value], s = settings(c.seq_length.value), budget = card.bytes * (1 - data.margin), wrong = problem(model, s);
    pictures.replaceChildren();
    if (wrong) return void (said.textContent = wrong);
    const shape = whole(model), total = (found) => py.sum(Object.values(found.by_component)), found = _estimate(shape, s), need = total(found);
    const byLength = data.lengths.filter((n) => n <= shape.context).map((n) => [n, total(_estimate(shape, settings(n)))]);
    const longest = Math.max(0, ...byLength.filter(([, bytes]) => bytes <= budget).map(([n]) => n)), runs = matching(s);
    said.textContent = (need <= budget ? `Fits: ${gib(need)} of ` : `Doesn't fit: ${gib(need)}, and there are `) +
      `${gib(budget)} on ${c.count.value > 1 ? `each ${c.card.value}` : `one ${c.card.value}`} (${percent(data.margin, 0)} left free). Fullest moment: ${found.moment}. ` +
      (longest ? `Longest row here that fits: ${longest.toLocaleString("en")} tokens.` : "No row of this chart fits.") +
      (c.count.value > 1 ? ` Each of ${c.count.value} GPUs takes this, and a step reads ${c.count.value} × ${s.batch_size * s.accumulation} rows.` : "");
    const parts = Object.entries(found.by_component).filter(([, bytes]) => bytes > 0), scale = width / Math.max(need, budget);
    const bar = make("svg", { viewBox: `0 0 ${width} 44`, role: "img", "aria-label": `Memory by component, ${gib(need)} in all; the GPU offers ${gib(budget)}` });
    let left = 0;
    for (const [name, bytes] of parts) {
      bar.append(make("rect", { x: left, y: 8, width: bytes * scale, height: 28, fill: data.colours[name] }, make("title", {}, `${words(name)}: ${gib(bytes)}`)));
      left += bytes * scale;
    }
    bar.append(make("path", { d: `M${Math.min(budget * scale, width - 1)} 2V42`, stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": "4 2" }));
    const legend = make("ul", { class: "qnb-legend" }, ...parts.map(([name, bytes]) =>
      make("li", {}, make("i", { style: `background: ${data.colours[name]}` }), make("span", {}, words(name)), make("b", {}, gib(bytes)))));
    const top = 1.15 * Math.max(budget, need) / 2 ** 30, measured = runs.map((run) => [run.settings.seq_length, run.bytes / 2 ** 30]);
    const lines = chart(width, {
      label: `GiB by row length: ${byLength.map(([n, bytes]) => `${n} tokens ${gib(bytes)}`).join(", ")}`,
      x: { from: 256, to: byLength.at(-1)[0], log: true, title: "tokens in a row", ticks: [256, 1024, 4096, 16384, 65536].filter((n) => n <= shape.context), show: (n) => (n < 1024 ? n : `${n / 1024}k`) },
      y: { to: top, title: "GiB; filled: fits; orange: measured", ticks: ticks(top) },
      lines: [{ points: byLength.map(([n, bytes]) => [n, bytes / 2 ** 30]), colour: "#0072B2" }],
      rules: [{ y: budget / 2 ** 30, label: c.card.value }, { x: c.seq_length.value }],
      dots: [...byLength.map(([n, bytes]) => ({ point: [n, bytes / 2 ** 30], full: bytes <= budget, colour: "#0072B2", title: `${n} tokens: ${gib(bytes)}` })),
             ...measured.map((point) => ({ point, colour: "#D55E00", r: 6, full: false, name: "measured", title: `measured at ${point[0]} tokens: ${point[1].toFixed(2)} GiB` }))],
    });
    pictures.append(heading("Where the bytes go"), bar, legend, heading("By the length of a row"), lines);
    const now = (run) => run?.settings.seq_length === c.seq_length.value, chosen = data.runs[c.run.value];
    const here = now(chosen) ? chosen : runs.find(now); // the same settings may have been measured twice
    if (here) {
      const h200 = data.cards.H200, there = total(_estimate(shape, { ...s, card: h200.total, bf16: h200.bf16, hopper: h200.hopper }));
      pictures.append(make("p", {}, `Measured on one H200, CUDA's context included: ${gib(here.bytes)}; computed for it: ${gib(there)} (${there >= here.bytes ? "+" : ""}${percent(there / here.bytes - 1)}).`));
    }
  };
});
