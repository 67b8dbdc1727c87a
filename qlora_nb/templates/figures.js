// What the figures share: elements, controls, a chart of lines. No library, nothing from elsewhere.
const SVG = new Set(["svg", "g", "rect", "path", "circle", "text", "title"]);

function make(tag, attributes = {}, ...children) {
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null && value !== false) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A labelled control. `options` makes a select of [value, text] pairs; `steps` a slider over these values; else a field for a number.
// `value` reads and sets what was chosen.
function control(title, { options, steps, show = String, value, least = 1, check = false }) {
  const said = make("span");
  const input = options
    ? make("select", {}, ...options.map(([one, text]) => make("option", { value: one }, text)))
    : steps
      ? make("input", { type: "range", min: 0, max: steps.length - 1, step: 1 })
      : make("input", check ? { type: "checkbox" } : { type: "number", min: least, step: 1 });
  input.setAttribute("aria-label", title); // the text of the label holds a select's options, too
  const read = () => (steps ? steps[input.value] : check ? input.checked : options ? input.value : Number(input.value));
  const tell = () => {
    said.textContent = steps ? `${title}: ${show(read())}` : title;
    if (steps) input.setAttribute("aria-valuetext", show(read()));
  };
  const write = (to) => {
    if (check) input.checked = to;
    else input.value = steps ? nearest(steps, to) : to;
    tell();
  };
  input.addEventListener("input", tell);
  write(value);
  const label = make("label", {}, said, input);
  return { label, input, get value() { return read(); }, set value(to) { write(to); } };
}

const nearest = (values, to) => values.reduce((best, value, i) => (Math.abs(value - to) < Math.abs(values[best] - to) ? i : best), 0);
const heading = (said) => make("div", { class: "qnb-heading" }, said);
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;
const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(2)}\u00a0GiB`;
const words = (name) => name.replaceAll("_", " ");

// Lines and dots over x (`log` by powers of two) and y from 0; `rules` are dashed lines across, at x or y.
function chart(width, { label, x, y, lines = [], dots = [], rules = [], levels = [], low = 0 }) {
  const height = 240, left = 46, right = 12, top = 24, bottom = 40;
  const at = (v) => (x.log ? Math.log2(v) : v);
  const px = (v) => left + ((at(v) - at(x.from)) / (at(x.to) - at(x.from))) * (width - left - right);
  const py_ = (v) => top + (1 - (v - low) / (y.to - low)) * (height - top - bottom);
  const inside = ([a, b]) => a >= x.from && a <= x.to && b >= low && b <= y.to;
  const line = (d, more = {}) => make("path", { d, fill: "none", stroke: "currentColor", ...more });
  const text = (a, b, said, anchor = "middle") => make("text", { x: a, y: b, "text-anchor": anchor }, said);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  svg.append(line(`M${left} ${top}V${height - bottom}H${width - right}`, { opacity: 0.6 }));
  for (const v of x.ticks) svg.append(text(px(v), height - bottom + 16, x.show ? x.show(v) : v));
  for (const v of y.ticks) svg.append(text(left - 6, py_(v) + 4, y.show ? y.show(v) : v, "end"));
  svg.append(text((left + width - right) / 2, height - 4, x.title), text(2, 10, y.title, "start"));
  for (const v of levels) if (inside([x.from, v])) svg.append(line(`M${left} ${py_(v)}H${width - right}`, { opacity: 0.45 }));
  for (const rule of rules) {
    const across = rule.y !== undefined;
    if (across && rule.y > y.to) continue;
    svg.append(line(across ? `M${left} ${py_(rule.y)}H${width - right}` : `M${px(rule.x)} ${top}V${height - bottom}`, { "stroke-dasharray": "4 3" }));
    if (rule.label) svg.append(text(left + 6, py_(rule.y) - 5, rule.label, "start"));
  }
  for (const { points, colour = "currentColor", thick = 2, opacity = 1 } of lines) {
    const shown = points.filter(inside).map(([a, b]) => `${px(a).toFixed(1)} ${py_(b).toFixed(1)}`);
    if (shown.length) svg.append(line(`M${shown.join("L")}`, { stroke: colour, "stroke-width": thick, opacity }));
  }
  for (const { point, title, colour = "currentColor", full = true, r = 4, name } of dots) {
    if (!inside(point)) continue;
    const fill = full ? colour : "none";
    const dot = make("circle", { cx: px(point[0]), cy: py_(point[1]), r, fill, stroke: colour, "stroke-width": 1.5, class: name });
    if (title) dot.append(make("title", {}, title));
    svg.append(dot);
  }
  return svg;
}

// Steps of 1, 2 or 5 times a power of ten, about `count` up to `to`.
function ticks(to, count = 5) {
  const raw = to / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5, 10].find((m) => m * power >= raw) ?? 10);
  return Array.from({ length: Math.floor(to / step + 1e-9) + 1 }, (_, i) => Number((i * step).toPrecision(6)));
}

// Start every figure of a kind that isn't live yet, and draw it again when its width changes.
function startFigures(kind, start) {
  for (const root of document.querySelectorAll(`.qnb-figure[data-figure="${kind}"]:not([data-live])`)) {
    root.dataset.live = "";
    const draw = start(root, JSON.parse(root.querySelector("script").textContent));
    const width = () => Math.round(Math.max(280, Math.min(680, root.clientWidth - 28)));
    let last = 0;
    const again = () => draw((last = width()));
    root.addEventListener("input", again);
    again();
    new ResizeObserver(() => width() !== last && again()).observe(root);
  }
}
