// The page as a whole: its state, the bar of controls, and the table of runs.

const DATA = JSON.parse(document.getElementById("data").textContent);
const AXES = [["step", "Steps"], ["tokens", "Tokens"], ["hours", "Hours"],
  ["device_hours", "Device hours"], ["cost", "Cost"]];

// What the reader has chosen. It is kept in the address, so that a page that is loaded again, or
// whose address is passed on, shows the same.
class View {
  constructor(data) {
    this.runs = data.runs;
    this.charts = [];
    this.cursor = null;
    this.isDragging = false;
    this.marks = this.runs.flatMap((run, number) => [
      ...run.starts.slice(1).map((start) => ({ kind: "restart", run: number,
        at: this.atStep(run, start.from), text: `start from step ${start.from}` })),
      ...run.events.map((event) => ({ kind: "event", run: number, at: event.at,
        text: `step ${event.at[0]}: ${event.text}` })),
    ]).slice(-300);
    const kept = new URLSearchParams(location.hash.slice(1));
    const price = Number(kept.get("price") ?? data.price ?? 0);
    this.price = price > 0 && Number.isFinite(price) ? price : 0;
    this.axis = AXES.some(([axis]) => axis === kept.get("x")) ? kept.get("x") : "step";
    if (this.axis === "cost" && !this.price) this.axis = "device_hours";
    this.logX = kept.get("logx") === "1";
    this.logY = new Set((kept.get("logy") ?? this.logAtFirst()).split(",").filter(Boolean));
    this.hidden = new Set((kept.get("hide") || "").split(",").filter(Boolean).map(Number));
    const zoom = (kept.get("zoom") || "").split(",").map(Number);
    this.zoom = zoom.length === 2 && zoom[0] < zoom[1] ? zoom : null;
    this.temperature = kept.get("temperature");
    this.settings = kept.get("settings");
    this.hasFirst = kept.get("first") === "1";
    this.isPaused = kept.get("paused") === "1";
  }

  // A norm that spans more than two decades is unreadable on a linear axis.
  logAtFirst() {
    const norms = this.runs.flatMap((run) => (run.curves.grad_norm || { mean: [] }).mean)
      .filter((value) => value > 0);
    const lowest = norms.reduce((a, b) => Math.min(a, b), Infinity);
    const highest = norms.reduce((a, b) => Math.max(a, b), 0);
    return highest > 100 * lowest ? "grad_norm" : "";
  }

  save() {
    const kept = new URLSearchParams();
    if (this.axis !== "step") kept.set("x", this.axis);
    if (this.logX) kept.set("logx", "1");
    const logY = [...this.logY].join(",");
    if (logY !== this.logAtFirst()) kept.set("logy", logY);
    if (this.hidden.size) kept.set("hide", [...this.hidden].join(","));
    if (this.zoom) kept.set("zoom", this.zoom.map((end) => end.toPrecision(8)).join(","));
    if (this.price !== (DATA.price ?? 0)) kept.set("price", this.price);
    if (this.temperature) kept.set("temperature", this.temperature);
    if (this.settings) kept.set("settings", this.settings);
    if (this.hasFirst) kept.set("first", "1");
    if (this.isPaused) kept.set("paused", "1");
    history.replaceState(null, "", `#${kept}`);
  }

  label(run, name) {
    return this.runs.length > 1 ? `${run.name}: ${name}` : name;
  }

  // The places of a run's points on an axis.
  xs(run, axis) {
    if (axis !== "cost") return run.axes[axis];
    return run.axes.device_hours.map((hours) => hours * this.price);
  }

  atStep(run, step) {
    const i = closestIndex(run.axes.step, step);
    return [step, run.axes.tokens[i], run.axes.hours[i], run.axes.device_hours[i]];
  }

  // The place of something on the chosen axis.
  place([step, tokens, hours, deviceHours], axis = this.axis) {
    const places = { step, tokens, hours, device_hours: deviceHours,
      cost: deviceHours === null ? null : deviceHours * this.price };
    return places[axis];
  }

  whole() {
    let low = Infinity;
    let high = -Infinity;
    this.runs.forEach((run, number) => {
      if (this.hidden.has(number)) return;
      for (const x of this.xs(run, this.axis)) {
        if (x === null || (this.logX && x <= 0)) continue;
        low = Math.min(low, x);
        high = Math.max(high, x);
      }
    });
    if (low > high) return this.logX ? [1, 10] : [0, 1];
    if (!this.logX && low < 0.1 * high) low = 0;
    return low === high ? [low, low * 1.1 + 1e-9] : [low, high];
  }

  domain() {
    return this.zoom || this.whole();
  }

  // The axis in a unit that suits its length.
  unit() {
    if (this.axis !== "hours") {
      const names = { step: "step", tokens: "tokens", device_hours: "device hours", cost: "cost" };
      return { name: names[this.axis], times: 1 };
    }
    const [, longest] = this.whole();
    if (longest < 0.1) return { name: "seconds", times: 3600 };
    return longest < 3 ? { name: "minutes", times: 60 } : { name: "hours", times: 1 };
  }

  zoomTo(range) {
    this.zoom = null;
    if (range) {
      const [low, high] = this.whole();
      const left = Math.max(range[0], low);
      const right = Math.min(range[1], high);
      const isWhole = left <= low && right >= high;
      if (!isWhole && right > left) this.zoom = [left, right];
    }
    this.show();
  }

  // Change the axis, and keep in sight what is in sight.
  chooseAxis(axis) {
    const run = this.runs.find((_, number) => !this.hidden.has(number)) || this.runs[0];
    const before = this.xs(run, this.axis);
    const ends = this.zoom && this.zoom.map((end) => closestIndex(before, end));
    this.axis = axis;
    this.zoom = null;
    if (ends && ends[0] < ends[1]) this.zoom = ends.map((i) => this.xs(run, axis)[i]);
    if (this.zoom && !(this.zoom[0] < this.zoom[1])) this.zoom = null;
    this.show();
  }

  setCursor(value, chart) {
    this.cursor = value;
    for (const one of this.charts) one.drawCursor(value, one === chart);
  }

  speak(text) {
    clearTimeout(this.speaking);
    this.speaking = setTimeout(() => {
      document.getElementById("spoken").textContent = text;
    }, 250);
  }

  show() {
    this.cursor = null;
    this.save();
    for (const chart of this.charts) chart.draw();
    this.onShow();
  }
}

// Each run has a colour, and so has each of its validation sets, as long as there are some.
class Colors {
  constructor(runs) {
    let next = 0;
    this.runs = runs.map(() => next++);
    this.sets = runs.map((run) => run.validation.map(() => next++));
  }

  plain(number) {
    return `var(--c${number % COLORS})`;
  }

  ofRun(number) {
    return this.plain(this.runs[number]);
  }

  ofSet(number, set) {
    return this.plain(this.sets[number][set]);
  }
}

function header(view) {
  const names = view.runs.map((run) => run.name).join(" · ");
  return make("header", {}, make("p", { class: "kicker" }, "dist_lm report"),
    make("h1", {}, names));
}

// --- the table of runs

function overview(view, colors) {
  const body = make("div", { id: "overview" });
  const heads = ["run", "state", "steps", "tokens", "loss", "best held-out", "hours",
    "device hours", "cost"];
  const rowOf = (run, number) => {
    const { total } = run;
    const best = bestOf(run);
    const expected = total.expected || {};
    const cost = (hours) => (view.price ? significant(hours * view.price, 4) : "–");
    const cells = [
      runToggle(view, colors, number), stateOf(run), progressOf(total),
      withExpected(shorten(total.tokens), expected.tokens, shorten), significant(total.loss, 4),
      best ? [significant(best.loss, 5), make("small", {}, `${best.set} at ${
        spellCount(best.step)}`)] : "–",
      withExpected(spellDuration(3600 * total.hours), expected.hours,
        (hours) => spellDuration(3600 * hours)),
      withExpected(significant(total.device_hours, 3), expected.device_hours,
        (hours) => significant(hours, 3)),
      withExpected(cost(total.device_hours), view.price ? expected.device_hours : null, cost),
    ];
    return cells;
  };
  const show = () => body.replaceChildren(table(heads, view.runs.map(rowOf), { text: [0, 1] }));
  show();
  return { element: body, show };
}

function runToggle(view, colors, number) {
  return make("button", {
    type: "button", class: "run-toggle", "aria-pressed": !view.hidden.has(number),
    title: "Show or hide the curves of this run",
    onclick: () => {
      if (!view.hidden.delete(number)) view.hidden.add(number);
      view.show();
    },
  }, make("span", { class: "swatch", style: { background: colors.ofRun(number) } }),
  view.runs[number].name);
}

function bestOf(run) {
  const first = run.validation[0];
  if (!first) return null;
  let best = null;
  first.loss.forEach((loss, i) => {
    if (loss !== null && (!best || loss < best.loss)) {
      best = { loss, step: first.at[i][0], set: first.set };
    }
  });
  return best;
}

function stateOf(run) {
  const kind = run.state === "done" ? "good" : isFailure(run.state) ? "bad" : null;
  const isQuiet = run.state === "running" || run.state.startsWith("no word");
  return [make("span", { class: isQuiet ? null : kind }, run.state),
    make("small", {}, `last line ${spellTime(run.updated)}`)];
}

function progressOf(total) {
  if (!total.expected || total.expected.steps === total.steps) return spellCount(total.steps);
  const share = (100 * total.steps) / total.expected.steps;
  return [spellCount(total.steps), make("small", {}, `of ${spellCount(total.expected.steps)}`),
    make("span", { class: "way" }, make("i", { style: { width: `${share}%` } }))];
}

// A figure, and what it is expected to be at the end if that is more.
function withExpected(text, expected, spell) {
  if (expected === null || expected === undefined || spell(expected) === text) return text;
  return [text, make("small", {}, `of about ${spell(expected)}`)];
}

// --- the bar

function bar(view, colors) {
  const axis = choice("Horizontal axis", AXES, (one) => one === view.axis,
    (one) => view.chooseAxis(one));
  const costButton = axis.querySelector('[data-value="cost"]');
  const logX = make("button", { type: "button", class: "log-x", title:
    "Logarithmic horizontal axis", "aria-pressed": view.logX, onclick: () => {
    view.logX = !view.logX;
    if (view.zoom && view.logX && view.zoom[0] <= 0) view.zoom = null;
    view.show();
  } }, "log x");
  const price = make("input", { type: "number", class: "price", min: "0", step: "any",
    value: view.price || "", "aria-label": "Price of a device hour", placeholder: "none",
    oninput: () => {
      view.price = Math.max(0, Number(price.value) || 0);
      if (view.axis === "cost") view.zoom = null;
      if (view.axis === "cost" && !view.price) view.axis = "device_hours";
      view.show();
    } });
  const reset = make("button", { type: "button", class: "reset", onclick: () => view.zoomTo(null) },
    "Reset zoom");
  const legend = make("span", { class: "group runs" });
  const element = make("div", { class: "bar" },
    make("span", { class: "group" }, make("span", { class: "label" }, "Along"), axis, logX),
    make("span", { class: "group" }, make("label", { class: "group" },
      make("span", { class: "label" }, "Price of a device hour"), price)),
    make("span", { class: "group push" }, ...live(view), reset),
    legend);
  const show = () => {
    if (view.runs.length > 1) {
      legend.replaceChildren(...view.runs.map((_, number) => runToggle(view, colors, number)));
    }
    costButton.disabled = !view.price;
    costButton.title = view.price ? "" : "Needs the price of a device hour";
    reset.disabled = !view.zoom;
    logX.setAttribute("aria-pressed", view.logX);
    for (const button of axis.children) {
      button.setAttribute("aria-pressed", button.dataset.value === view.axis);
    }
  };
  show();
  return { element, show };
}

// While a run goes on, the file is written again now and then. A page that was opened from a disk
// may read no other file, so it loads itself again. What the reader has chosen is in the address.
function live(view) {
  if (!DATA.reload_seconds) return [];
  const text = () => (view.isPaused ? "Paused" : `Live, every ${DATA.reload_seconds} s`);
  const button = make("button", { type: "button", class: "live",
    title: "Pause or go on loading this page again", "aria-pressed": !view.isPaused,
    onclick: () => {
      view.isPaused = !view.isPaused;
      button.textContent = text();
      button.setAttribute("aria-pressed", !view.isPaused);
      view.save();
    } }, text());
  setInterval(() => {
    const isBusy = view.isPaused || view.isDragging || document.hidden ||
      document.activeElement.tagName === "INPUT";
    if (!isBusy) location.reload();
  }, 1000 * DATA.reload_seconds);
  return [button];
}

// --- the start

function curvesNote(view) {
  const longest = view.runs.reduce((a, b) => Math.max(a, b.steps_a_point), 1);
  const points = longest > 1 ?
    `Runs of more than ${spellCount(DATA.points)} steps are drawn in points of up to ` +
    `${longest} steps: the line is their mean, the band reaches from the lowest to the highest. ` :
    "";
  return `${points}Drag over a curve to zoom all of them, double-click to see everything. ` +
    "Dotted lines are restarts, red ones events.";
}

function startPage() {
  const view = new View(DATA);
  const colors = new Colors(view.runs);
  const runs = overview(view, colors);
  const controls = bar(view, colors);
  const curves = [lossChart(view, colors), bitsChart(view, colors),
    ...SMALL_CURVES.map((curve) => smallChart(view, colors, curve)),
    ...shareCharts(view, colors)].filter(Boolean);
  const tasks = taskCharts(view, colors);
  view.charts = [...curves, ...tasks];
  view.onShow = () => {
    runs.show();
    controls.show();
  };
  const hours = "Hours and device hours count the processes of all starts, lost work and start-up" +
    " included, and not the time between two starts. A process is one device.";
  document.getElementById("page").append(...[
    header(view), runs.element, controls.element,
    section("curves", "Curves", curvesNote(view),
      make("div", { class: "charts" }, ...curves.map((chart) => chart.element))),
    tasks.length ? section("evaluations", "Evaluations", "Whiskers are one standard error.",
      make("div", { class: "charts" }, ...tasks.map((chart) => chart.element))) : null,
    samplesSection(view), timeSection(view), dataSection(view), eventsSection(view),
    settingsSection(view, DATA.defaults, DATA.meaning),
    make("footer", {}, `Made ${spellTime(DATA.made)} by dist_lm ${DATA.version}. ${hours} ` +
      "What is expected assumes that the run goes on as it did."),
  ].filter(Boolean));
  const drawAll = () => view.charts.forEach((chart) => chart.draw());
  drawAll();
  for (const [event, isPrinting] of [["beforeprint", true], ["afterprint", false]]) {
    addEventListener(event, () => {
      view.isPrinting = isPrinting;
      drawAll();
    });
  }
  new ResizeObserver(() => {
    const isOther = (chart) => Math.abs(chart.svg.getBoundingClientRect().width - chart.width) > 2;
    if (!view.isPrinting && view.charts.some(isOther)) drawAll();
  }).observe(document.getElementById("page"));
}

startPage();
