// The sections of the page below its head: curves, evaluations, samples, time, data, settings.

const COLORS = 12;
const PART_COLORS = ["steps", "data", "evaluation", "saves", "lost work", "start-up", "down",
  "other"];
const PART_MEANING = {
  "steps": "steps that are part of the run now",
  "data": "waiting for data, as a part of the steps",
  "evaluation": "training stood still for them",
  "saves": "training stood still for them",
  "lost work": "done again after a restart, or after the run went back",
  "start-up": "from the beginning of a process to its first step",
  "down": "between the end of a start and the next one; nobody pays for it",
  "other": "the rest, for example leaving together",
};
const SHOWN_STARTS = 100;

function section(id, title, note, ...children) {
  return make("section", { id, "aria-labelledby": `${id}-title` },
    make("h2", { id: `${id}-title` }, title),
    note ? make("p", { class: "note" }, note) : null, ...children);
}

function table(heads, rows, options = {}) {
  const classes = options.text || [];
  const cell = (tag, content, i) => {
    const more = tag === "th" ? { scope: "col" } : {};
    return make(tag, { class: classes.includes(i) ? "text" : null, ...more },
      ...(Array.isArray(content) ? content : [content]));
  };
  return make("div", { class: "panel scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...heads.map((head, i) => cell("th", head, i)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {},
      ...row.map((content, i) => cell("td", content, i)))))));
}

function choice(label, options, isChosen, choose) {
  const buttons = options.map(([value, text]) => make("button", {
    type: "button", "aria-pressed": isChosen(value), "data-value": value,
    onclick: (event) => {
      for (const button of event.currentTarget.parentNode.children) {
        button.setAttribute("aria-pressed", button === event.currentTarget);
      }
      choose(value);
    },
  }, text));
  return make("span", { class: "choice", role: "group", "aria-label": label }, ...buttons);
}

// --- curves

const SMALL_CURVES = [
  ["grad_norm", "Gradient norm", "before clipping"],
  ["lr", "Learning rate", ""],
  ["tokens_per_second", "Throughput", "tokens a second, all devices"],
  ["mfu", "MFU", "share of the devices' peak"],
  ["memory_gb", "Memory", "GB of a device, at most"],
  ["data_wait", "Waiting for data", "share of a step"],
  ["scale", "Loss scale", "of fp16"],
];

function percent(value) {
  return value === null ? "–" : `${significant(100 * value, 3)} %`;
}

function formatOf(key) {
  if (key === "mfu" || key === "data_wait") return percent;
  if (key === "tokens_per_second") return shorten;
  return (value) => significant(value, 4);
}

// A read-out of a point: its value, or the mean and the range of the steps that it stands for.
function tellCurve(curve, format) {
  return (i) => {
    if (!curve.low) return format(curve.mean[i]);
    return `${format(curve.mean[i])} (${format(curve.low[i])} to ${format(curve.high[i])})`;
  };
}

function lossChart(view, colors) {
  const series = [];
  view.runs.forEach((run, number) => {
    const curve = run.curves.loss;
    const tell = tellCurve(curve, formatOf("loss"));
    series.push({
      name: view.label(run, "training"), run: number, color: colors.ofRun(number),
      x: (axis) => view.xs(run, axis), y: curve.smooth, ghost: curve.low ? null : curve.mean,
      low: curve.low, high: curve.high,
      tell: (i) => `${significant(curve.smooth[i], 4)} smoothed, ${tell(i)}`,
    });
    run.validation.forEach((set, i) => series.push(pointSeries(view, run, number, set, {
      name: view.label(run, set.set), y: set.loss, marker: MARKERS[i % MARKERS.length],
      color: colors.ofSet(number, i),
    })));
  });
  return new Chart(view, {
    key: "loss", title: "Loss", unit: "nats a token", series, wide: true,
    notes: notesOf(view, "loss"), events: view.marks,
  });
}

function pointSeries(view, run, number, points, options) {
  const index = { step: 0, tokens: 1, hours: 2, device_hours: 3, cost: 3 };
  const format = options.format || ((value) => significant(value, 5));
  return {
    run: number, x: (axis) => points.at.map((at) => {
      const place = at[index[axis]];
      return place === null ? null : place * (axis === "cost" ? view.price : 1);
    }),
    tell: (i) => {
      const error = options.error && options.error[i];
      const spread = error ? ` ± ${significant(error, 2)}` : "";
      return `${format(options.y[i])}${spread} at step ${spellCount(points.at[i][0])}`;
    },
    ...options,
  };
}

function smallChart(view, colors, [key, title, unit]) {
  const series = [];
  view.runs.forEach((run, number) => {
    const curve = run.curves[key];
    if (!curve) return;
    series.push({
      name: run.name, run: number, color: colors.ofRun(number),
      x: (axis) => view.xs(run, axis), y: curve.mean, low: curve.low, high: curve.high,
      tell: tellCurve(curve, formatOf(key)),
    });
  });
  if (!series.some((one) => one.y.some((value) => value !== null))) return null;
  return new Chart(view, { key, title, unit, series, notes: notesOf(view, key),
    spellTick: formatOf(key) === percent ? percent : null });
}

function notesOf(view, key) {
  return view.runs
    .filter((run) => run.curves[key] && run.curves[key].not_finite)
    .map((run) => `${run.name}: ${spellCount(run.curves[key].not_finite)} values are missing or` +
      " not finite, and not drawn.");
}

function bitsChart(view, colors) {
  const series = [];
  view.runs.forEach((run, number) => run.validation.forEach((set, i) => {
    series.push(pointSeries(view, run, number, set, {
      name: view.label(run, set.set), y: set.bits, marker: MARKERS[i % MARKERS.length],
      color: colors.ofSet(number, i),
    }));
  }));
  if (!series.length) return null;
  return new Chart(view, { key: "bits", title: "Held-out text", unit: "bits a byte", series });
}

function shareCharts(view, colors) {
  const charts = [];
  view.runs.forEach((run, number) => {
    const names = Object.keys(run.shares);
    if (names.length < 2) return;
    const series = [];
    names.forEach((name, i) => {
      const { share, asked } = run.shares[name];
      const common = { run: number, color: colors.plain(i), x: (axis) => view.xs(run, axis) };
      series.push({ ...common, name, y: share,
        tell: (n) => `${percent(share[n])} of ${percent(asked[n])} asked` });
    });
    charts.push(new Chart(view, {
      key: `shares-${number}`, title: "Shares of the sources",
      unit: view.runs.length > 1 ? run.name : "", series, hasLegend: true,
      spellTick: percent,
    }));
  });
  return charts;
}

function taskCharts(view, colors) {
  const charts = new Map();
  view.runs.forEach((run, number) => run.evaluations.forEach((curve) => {
    const key = JSON.stringify([curve.task, curve.metric]);
    if (!charts.has(key)) charts.set(key, { curve, series: [] });
    const { series } = charts.get(key);
    series.push(pointSeries(view, run, number, curve, {
      name: run.name, y: curve.value, error: curve.stderr, color: colors.ofRun(number),
      marker: MARKERS[number % MARKERS.length],
    }));
  }));
  return [...charts.values()].map(({ curve, series }, i) => new Chart(view, {
    key: `task-${i}`, title: curve.task, unit: curve.metric, series,
  }));
}

// --- samples

function samplesSection(view) {
  const runs = view.runs.filter((run) => run.samples.length);
  if (!runs.length) return null;
  const temperatures = [...new Set(runs.flatMap((run) =>
    run.samples.flatMap((entry) => entry.texts.map((text) => text.temperature))))];
  let shown = view.temperature;
  if (!temperatures.includes(shown)) shown = temperatures[temperatures.length - 1];
  const rows = make("div", {});
  const show = () => rows.replaceChildren(...runs.flatMap((run) => [
    view.runs.length > 1 ? make("h3", {}, run.name) : null, sampleRow(run, shown),
  ].filter(Boolean)));
  show();
  const pick = choice("Temperature", temperatures.map((value) => [value, value]),
    (value) => value === shown, (value) => {
      shown = value;
      view.temperature = value;
      view.save();
      show();
    });
  return section("samples", "Samples over time",
    "What the model wrote at its evaluations, after the same prompt each time.",
    make("div", { class: "tools" }, make("span", {}, "Temperature"), pick), rows);
}

function sampleRow(run, temperature) {
  const last = run.samples.length - 1;
  const kept = new Set([0, Math.round(last / 2), last]); // on paper
  const cards = run.samples.map((entry, i) => {
    const text = entry.texts.find((one) => one.temperature === temperature);
    const loss = entry.loss ? `loss ${entry.loss}` : "";
    return make("article", { class: `panel sample${kept.has(i) ? " kept" : ""}` },
      make("h4", {}, `step ${spellCount(entry.step)}`, make("span", {}, loss)),
      make("pre", { tabindex: "0" }, text ? text.text : "(no text)"));
  });
  return make("div", { class: "samples", tabindex: "0", role: "region",
    "aria-label": `Samples of ${run.name}` }, ...cards);
}

// --- time

function timeSection(view) {
  const runs = view.runs.filter((run) => run.starts.length);
  if (!runs.length) return null;
  return section("time", "Where the hours went",
    "From the first start to the last line, restarts and standstill included.",
    ...runs.flatMap((run) => timeOfRun(view, run)));
}

function timeOfRun(view, run) {
  const total = Object.values(run.seconds).reduce((sum, part) => sum + part, 0) || 1;
  const parts = PART_COLORS.map((name, i) => [name, run.seconds[name] || 0, `var(--p${i})`])
    .filter(([, seconds]) => seconds > 0);
  const bar = make("div", { class: "hours", role: "img",
    "aria-label": parts.map(([name, seconds]) => `${name} ${percent(seconds / total)}`)
      .join(", ") },
  ...parts.map(([name, seconds, color]) => make("i", {
    title: `${name}: ${spellDuration(seconds)}, ${percent(seconds / total)}`,
    style: { width: `${(100 * seconds) / total}%`, background: color },
  })));
  const legend = make("ul", { class: "legend" }, ...parts.map(([name, seconds, color]) =>
    make("li", { title: PART_MEANING[name] },
      make("span", { class: "swatch", style: { background: color } }),
      `${name} ${(100 * seconds / total).toFixed(1)} % · ${spellDuration(seconds)}`)));
  return [
    view.runs.length > 1 ? make("h3", {}, run.name) : null,
    make("div", { class: "panel timeline" }, bar, legend, timeline(run)),
    startsTable(run),
  ].filter(Boolean);
}

function timeline(run) {
  const width = 1100;
  const first = run.starts[0].began;
  const last = Math.max(...run.starts.map((start) => start.ended));
  const x = makeScale(first, last > first ? last : first + 1, 2, width - 2, false);
  const svg = draw("svg", { viewBox: `0 0 ${width} 62`, role: "img",
    "aria-label": `All ${run.starts.length} starts of ${run.name} on a line of time` });
  for (const start of run.starts) {
    const cause = start.cause || run.state;
    const title = `${spellTime(start.began)} to ${spellTime(start.ended)}: ${cause}`;
    const bar = (from, to, kind) => draw("rect", { x: x(from), y: 14, height: 20, class: kind,
      width: Math.max(1, x(to) - x(from)) }, draw("title", {}, title));
    const trains = Math.min(start.trains_from, start.ended);
    svg.append(bar(trains, start.ended, "trained"), bar(start.began, trains, "starting"));
    if (isFailure(start.cause)) {
      const end = x(start.ended);
      svg.append(draw("path", { class: "cut", d: `M${end},12l4.5,-8h-9Z` },
        draw("title", {}, title)));
    }
  }
  const labels = [[first, 2, "start"], [last, width - 2, "end"]];
  for (const [time, place, anchor] of labels) {
    svg.append(draw("text", { x: place, y: 54, "text-anchor": anchor }, spellTime(time)));
  }
  svg.append(draw("text", { x: width / 2, y: 54, "text-anchor": "middle" },
    `${run.starts.length} ${run.starts.length === 1 ? "start" : "starts"} in ` +
    spellDuration(last - first)));
  return svg;
}

function isFailure(cause) {
  return cause !== "" && !/^(done|preempted|unfinished)/.test(cause);
}

function spellTime(seconds) {
  if (!seconds) return "–";
  return new Date(1000 * seconds).toLocaleString("en-GB", { dateStyle: "medium",
    timeStyle: "short" });
}

function startsTable(run) {
  const shown = run.starts.slice(-SHOWN_STARTS);
  const rows = shown.map((start, i) => [
    String(run.starts.length - shown.length + i + 1), spellTime(start.began),
    spellDuration(start.ended - start.began), `${start.devices}`, start.strategy || "–",
    `${spellCount(start.from)} to ${spellCount(start.to)}`,
    make("span", { class: isFailure(start.cause) ? "bad" : null }, start.cause || run.state),
  ]);
  const heads = ["start", "began", "lasted", "devices", "strategy", "steps", "ended by"];
  const hidden = run.starts.length - shown.length;
  const failed = run.stops_before_training.map((cause) =>
    make("p", { class: "note" }, `A start ended before it trained: ${cause}`));
  return make("details", { open: shown.length <= 12 },
    make("summary", {}, `Starts and their ends${hidden ? `, the last ${SHOWN_STARTS}` : ""}`),
    table(heads, rows, { text: [6] }), ...failed.slice(-20));
}

// --- data, events, settings

function dataSection(view) {
  const rows = view.runs.flatMap((run) => run.sources.map((source) => [
    view.runs.length > 1 ? run.name : null, source.name || "data.input", source.input || "–",
    percent(source.share), source.asked === undefined ? "–" : percent(source.asked),
    source.tokens === null ? "–" : shorten(source.tokens),
    source.size === null ? "–" : shorten(source.size),
    source.passes === undefined || source.passes === null ? "–" : significant(source.passes, 3),
  ].slice(view.runs.length > 1 ? 0 : 1)));
  const heads = ["source", "input", "share", "asked for", "tokens trained on", "its tokens",
    "passes"];
  const shift = view.runs.length > 1 ? 1 : 0;
  return section("data", "What it trained on", "",
    table(shift ? ["run", ...heads] : heads, rows, { text: [0, shift, shift + 1] }));
}

function eventsSection(view) {
  const rows = view.runs.flatMap((run) => run.events.map((event) => [
    view.runs.length > 1 ? run.name : null, spellCount(event.at[0]),
    make("span", { class: "bad" }, event.kind), event.text,
  ].slice(view.runs.length > 1 ? 0 : 1)));
  const shift = view.runs.length > 1 ? 1 : 0;
  const heads = ["step", "event", "what happened, and what was done"];
  if (!rows.length) return null;
  return section("events", "Events",
    "Spikes, what was stepped over, and figures that are not finite.",
    table(shift ? ["run", ...heads] : heads, rows,
      { text: shift ? [0, 2, 3] : [1, 2] }));
}

function settingsSection(view, defaults, meaning) {
  if (!view.runs.some((run) => Object.keys(run.settings).length)) return null;
  const body = make("div", {});
  const several = view.runs.length > 1;
  const kinds = [["default", "Not the default"], ["all", "All"]];
  if (several) kinds.unshift(["differ", "Differences between the runs"]);
  let shown = view.settings;
  if (!kinds.some(([kind]) => kind === shown)) shown = kinds[0][0];
  const search = make("input", { type: "search", placeholder: "Search", "aria-label":
    "Search settings", oninput: () => show() });
  const show = () => body.replaceChildren(
    settingsTable(view, { defaults, meaning, kind: shown }, search.value.trim().toLowerCase()));
  const pick = choice("Which settings", kinds, (kind) => kind === shown, (kind) => {
    shown = kind;
    view.settings = kind;
    view.save();
    show();
  });
  show();
  return section("settings", "Settings", several ? "Marked: what is not as in the first run." : "",
    make("div", { class: "tools" }, pick, search), body);
}

function settingsTable(view, { defaults, meaning, kind }, words) {
  const names = [...new Set([...Object.keys(defaults), ...view.runs.flatMap((run) =>
    Object.keys(run.settings))])];
  const rows = [];
  for (const name of names) {
    const values = view.runs.map((run) => run.settings[name]);
    if (values.every((value) => value === undefined)) continue;
    const differs = new Set(values).size > 1;
    const isDefault = values.every((value) => value === defaults[name]);
    if (kind === "differ" && !differs) continue;
    if (kind === "default" && isDefault) continue;
    if (words && !`${name} ${values.join(" ")}`.toLowerCase().includes(words)) continue;
    const cells = [make("span", { class: "setting", title: meaning[name] }, name),
      ...values.map((value) => make("span", {
        class: value === values[0] ? "setting" : "setting other" }, value ?? "–")),
      make("span", { class: "setting" }, defaults[name] ?? "–")];
    rows.push(cells);
  }
  if (!rows.length) return make("p", { class: "note" }, "There is none.");
  const heads = ["setting", ...view.runs.map((run) => run.name), "default"];
  const text = heads.map((_, i) => i);
  return table(heads, rows, { text });
}
