// How much of a change the first r directions hold.
startFigures("rank", (root, data) => {
  const names = Object.keys(data.changes);
  const c = {
    r: control("rank r", { steps: data.ranks, value: data.start.r }),
    name: control("matrix", { options: [["", "all of them"], ...names.map((name) => [name, name])], value: "" }),
  };
  c.r.label.className = "qnb-wide";
  const energy = (chosen, r) => {
    const kept = chosen.map((name) => data.changes[name].total * py.sum(data.changes[name].shares.slice(0, r)));
    return py.sum(kept) / py.sum(chosen.map((name) => data.changes[name].total));
  };
  const chosen = () => (c.name.value ? [c.name.value] : names);
  root.energy = energy; // for those who want the numbers
  const said = make("output", { "aria-live": "polite" }), pictures = make("div");
  root.replaceChildren(make("div", { class: "qnb-controls" }, ...Object.values(c).map((one) => one.label)), said, pictures);

  return (width) => {
    const r = c.r.value, these = chosen(), kept = energy(these, r), last = data.ranks.at(-1), number = (n) => n.toLocaleString("en");
    const of = these.map((name) => data.changes[name].shape), trained = py.sum(of.map(([a, b]) => Math.min(r, a, b) * (a + b))), all = py.sum(of.map(([a, b]) => a * b));
    said.textContent = `The best update of rank ${r} keeps ${percent(kept)} of the change's energy, with ${number(trained)} numbers instead of ${number(all)} (${percent(trained / all)}). ` +
      `${data.model}, its seven projections in all layers: ${number(r * data.per_rank)} parameters, ${(r * data.per_rank * 4 / 1e6).toFixed(1)} MB in fp32.`;
    const curve = (chosen) => data.ranks.map((one) => [one, 100 * energy(chosen, one)]);
    const lines = chart(width, {
      label: `Share of the energy kept by rank: ${[1, 2, 4, 8, 16, 32, 64].filter((one) => one <= last).map((one) => `${one}: ${percent(energy(these, one))}`).join(", ")}`,
      x: { from: 1, to: last, log: true, title: "rank r", ticks: [1, 2, 4, 8, 16, 32, 64].filter((one) => one <= last) },
      y: { to: 108, title: "energy kept, %", ticks: [0, 25, 50, 75, 100] },
      lines: [...names.map((name) => ({ points: curve([name]), thick: 1, opacity: 0.45 })), { points: curve(these), colour: "#0072B2", thick: 3 }],
      rules: [{ x: r }], dots: [{ point: [r, 100 * kept], colour: "#0072B2", r: 5 }],
    });
    pictures.replaceChildren(lines);
  };
});
