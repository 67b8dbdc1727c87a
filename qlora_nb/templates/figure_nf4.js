// Sixteen values and real numbers. `draw_weights`, `round_blocks` and `relative_error` are translated from the Python source.
startFigures("nf4", (root, data) => {
  const same = (pairs) => Object.entries(pairs);
  const c = {
    blocksize: control("weights in a block", { steps: data.blocksizes, value: data.start.blocksize }),
    kind: control("the weights' distribution", { options: same(data.kinds), value: data.start.kind }),
    code: control("values", { options: same(data.code_names), value: "nf4" }),
    block: control("which block", { value: 1 }),
  };
  const samples = {}, errors = {};
  const sample = (kind) => (samples[kind] ??= draw_weights(kind, data.count));
  const error = (kind, code, blocksize) =>
    (errors[[kind, code, blocksize]] ??= relative_error(sample(kind), round_blocks(sample(kind), data.codes[code], blocksize)));
  root.error = error; // for those who want the numbers
  root.restore = (kind, code, blocksize) => round_blocks(sample(kind), data.codes[code], blocksize);
  const said = make("output", { "aria-live": "polite" }), pictures = make("div");
  root.replaceChildren(make("div", { class: "qnb-controls" }, ...Object.values(c).map((one) => one.label)), said, pictures);

  return (width) => {
    const { value: kind } = c.kind, { value: code } = c.code, { value: size } = c.blocksize, blocks = data.count / size;
    c.block.input.max = blocks;
    const number = Math.min(Math.max(Math.trunc(c.block.value) || 1, 1), blocks);
    const weights = sample(kind).slice((number - 1) * size, number * size), absmax = Math.max(...weights.map(Math.abs));
    const levels = data.codes[code].map((value) => value * absmax), restored = round_blocks(weights, data.codes[code], size);
    const bits = 4 + 32 / size, double = 4 + 8 / size + 32 / (256 * size), shown = Math.min(size, 64), step = ticks(absmax, 2);
    said.textContent = `Error: ${percent(error(kind, code, size), 2)} of the weights' own size, at ${bits.toFixed(3)} bits a weight (${double.toFixed(3)} with double quantization). ` +
      `Block ${number} of ${blocks}: its largest weight, ${absmax.toFixed(2)}, stretches the ${levels.length} lines; shown are ${shown === size ? "all" : "the first"} ${shown} weights.`;
    const block = chart(width, {
      label: `${shown} weights and the ${levels.length} values that four bits can name, between ${(-absmax).toFixed(2)} and ${absmax.toFixed(2)}`,
      x: { from: -1, to: shown, title: "position in the block", ticks: ticks(shown, 4) },
      y: { to: 1.08 * absmax, title: "weight; orange: what comes back", ticks: [...step.slice(1).map((v) => -v), ...step] },
      low: -1.08 * absmax, levels,
      dots: weights.slice(0, shown).flatMap((w, i) => [{ point: [i, w], r: 2.5, colour: "#0072B2" }, { point: [i, restored[i]], r: 5, full: false, colour: "#D55E00" }]),
    });
    const curves = Object.keys(data.kinds).map((one) => ({
      one, points: data.blocksizes.map((n) => [n, 100 * error(one, code, n)]), colour: data.colours[one], thick: one === kind ? 3.5 : 1.5,
    }));
    const top = 1.1 * Math.max(...curves.flatMap(({ points }) => points.map(([, e]) => e)));
    const by = chart(width, {
      label: `Error by block size: ${curves.map(({ one, points }) => `${data.kinds[one]} ${points.map(([n, e]) => `${n}: ${e.toFixed(1)} %`).join(", ")}`).join("; ")}`,
      x: { from: 32, to: 4096, log: true, title: "weights in a block", ticks: [32, 128, 512, 2048] },
      y: { to: top, title: "error, % of the weights' size", ticks: ticks(top) },
      lines: curves, rules: [{ x: size }], dots: [{ point: [size, 100 * error(kind, code, size)], colour: data.colours[kind], r: 5 }],
    });
    const legend = make("ul", { class: "qnb-legend" }, ...Object.entries(data.kinds).map(([one, title]) =>
      make("li", {}, make("i", { style: `background: ${data.colours[one]}` }), make("span", {}, title), make("b", {}, percent(error(one, code, size), 2)))));
    pictures.replaceChildren(heading("One block"), block, heading("Error by block size"), by, legend);
  };
});
