// Charts: curves, bands and points over a common horizontal axis, with a read-out and zoom.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 60, right: 18, top: 10, bottom: 32 };
const FIRST_STEPS = 0.1; // the part of a run that is left out of the height of a linear loss
const FARTHEST = 1e5; // pixels
const MARKERS = ["circle", "square", "up", "diamond", "down", "plus", "cross", "star"];

// --- elements: text always goes in as text, never as markup

function make(tag, options = {}, ...children) {
  return fill(document.createElement(tag), options, children);
}

function draw(tag, options = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), options, children);
}

function fill(element, options, children) {
  for (const [name, value] of Object.entries(options)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") {
      for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    } else if (!name.includes("-") && typeof value === "boolean") {
      element.toggleAttribute(name, value); // as of `hidden`; that of `aria-...` is a word
    } else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// --- numbers as text

function shorten(number) {
  const size = Math.abs(number);
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return significant(number / unit, 3) + name;
  }
  return significant(number, 3);
}

function significant(number, digits) {
  if (number === null || number === undefined || !Number.isFinite(number)) return "–";
  if (number === 0) return "0";
  const size = Math.abs(number);
  if (size < 1e-4 || size >= 1e7) return number.toExponential(Math.max(0, digits - 1));
  const whole = Math.floor(Math.log10(size)) + 1;
  return number.toLocaleString("en", { maximumFractionDigits: Math.max(0, digits - whole) });
}

function spellCount(number) {
  return number === null || number === undefined ? "–" : Math.round(number).toLocaleString("en");
}

function spellDuration(seconds) {
  if (seconds === null || !Number.isFinite(seconds)) return "–";
  if (seconds < 60) return `${significant(seconds, 2)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

// --- scales

function linearTicks(low, high, most) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const rough = span / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= rough);
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) {
    ticks.push(Number((n * step).toPrecision(12)));
  }
  return ticks;
}

function logTicks(low, high, most) {
  const decades = Math.log10(high / low);
  if (decades < 0.6) return linearTicks(low, high, most).filter((tick) => tick > 0);
  let digits = [1, 2, 5];
  if (decades < 1.2) digits = [1, 2, 3, 4, 6, 8];
  if (decades > most / 3) digits = [1, 3];
  if (decades > most) digits = [1];
  const every = Math.max(1, Math.ceil(decades / most));
  const ticks = [];
  const first = Math.floor(Math.log10(low));
  for (let power = first; power <= Math.log10(high); power += every) {
    for (const digit of digits) {
      const tick = Number((digit * 10 ** power).toPrecision(3));
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return ticks;
}

function makeScale(low, high, from, to, isLog) {
  const bend = isLog ? Math.log10 : (value) => value;
  const begin = bend(low);
  const span = bend(high) - begin || 1;
  // Far outside of the picture all places are alike, and a path takes no numbers of any size.
  const scale = (value) => {
    const place = from + ((bend(value) - begin) / span) * (to - from);
    return Math.min(Math.max(place, -FARTHEST), FARTHEST);
  };
  scale.invert = (place) => {
    const value = begin + ((place - from) / (to - from)) * span;
    return isLog ? 10 ** value : value;
  };
  scale.low = low;
  scale.high = high;
  scale.isLog = isLog;
  return scale;
}

// --- markers

function markerPath(kind, x, y, size) {
  const a = size;
  const shapes = {
    circle: `M${x - a},${y}a${a},${a} 0 1,0 ${2 * a},0a${a},${a} 0 1,0 ${-2 * a},0Z`,
    square: `M${x - a},${y - a}h${2 * a}v${2 * a}h${-2 * a}Z`,
    up: `M${x},${y - 1.2 * a}L${x + 1.15 * a},${y + a}H${x - 1.15 * a}Z`,
    down: `M${x},${y + 1.2 * a}L${x + 1.15 * a},${y - a}H${x - 1.15 * a}Z`,
    diamond: `M${x},${y - 1.35 * a}l${1.35 * a},${1.35 * a}l${-1.35 * a},${1.35 * a}l${
      -1.35 * a},${-1.35 * a}Z`,
  };
  if (shapes[kind]) return shapes[kind];
  const turns = { plus: [0, 4, 0.34], cross: [Math.PI / 4, 4, 0.34], star: [0, 5, 0.5] };
  const [begin, arms, waist] = turns[kind];
  const corners = [];
  for (let n = 0; n < 2 * arms; n++) {
    const reach = (n % 2 ? waist : 1.45) * a;
    const angle = begin - Math.PI / 2 + (n * Math.PI) / arms;
    corners.push(`${(x + reach * Math.cos(angle)).toFixed(2)},${
      (y + reach * Math.sin(angle)).toFixed(2)}`);
  }
  return `M${corners.join("L")}Z`;
}

// --- a chart
//
// A series has: name, run (its number), color, x(axis) -> places, y -> values, and perhaps
// `ghost` (values of a faint line), `low` and `high` (a band), `marker` (points, joined by dashes),
// `error` (a whisker's length), `dashed`, and tell(i) -> text of the read-out.

class Chart {
  constructor(view, { key, title, unit = "", series, wide = false, hasLegend = wide, notes = [],
    events = [], spellTick = null }) {
    Object.assign(this, { view, key, title, series, wide, events });
    this.spellTick = spellTick || ((tick) => (tick >= 10000 || (tick < 0.01 && tick > 0) ?
      shorten(tick) : significant(tick, 4)));
    this.height = wide ? 360 : 210;
    this.logButton = make("button", {
      type: "button", title: "Logarithmic vertical axis",
      onclick: () => this.toggleLog(),
    }, "log y");
    const heading = make("h3", {}, title, unit ? make("span", {}, `  ${unit}`) : null);
    this.svg = draw("svg", {
      role: "img", tabindex: "0",
      "aria-label": `${title}. Arrow keys move the read-out, plus and minus zoom, Escape resets.`,
    });
    this.tip = make("div", { class: "tip", hidden: true });
    this.element = make("figure", { class: `panel chart${wide ? " wide" : ""}`, "data-key": key },
      make("div", { class: "chart-head" }, heading,
        make("span", { class: "buttons" }, this.firstButton(), this.logButton)),
      hasLegend ? this.legend() : null,
      this.svg, this.tip,
      ...notes.map((text) => make("p", { class: "missing" }, text)));
    this.listen();
  }

  // The losses of the first steps are so high that those of all others would be one flat line.
  firstButton() {
    if (!this.wide) return null;
    const { view } = this;
    const button = make("button", { type: "button", class: "first",
      title: "Make room for the losses of the first steps", "aria-pressed": view.hasFirst,
      onclick: () => {
        view.hasFirst = !view.hasFirst;
        button.setAttribute("aria-pressed", view.hasFirst);
        view.save();
        this.draw();
      } }, "first steps");
    return button;
  }

  legend() {
    const items = this.series.map((series) => {
      const style = { stroke: series.color };
      const sign = draw("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" },
        draw("path", {
          d: "M1,6H25", class: `curve${series.marker ? " points" : series.dashed ? " asked" : ""}`,
          style,
        }));
      if (series.marker) {
        sign.append(draw("path", { d: markerPath(series.marker, 13, 6, 4), class: "marker",
          style: { fill: series.color } }));
      }
      return make("li", { "data-run": series.run }, sign, series.name);
    });
    return make("ul", { class: "legend" }, ...items);
  }

  // What is drawn: series of runs that are not hidden, and their places on the chosen axis.
  shown() {
    return this.series.filter((series) => !this.view.hidden.has(series.run));
  }

  isLog() {
    return this.view.logY.has(this.key) && this.shown().some((s) => s.y.some((v) => v > 0));
  }

  toggleLog() {
    const keys = this.view.logY;
    if (!keys.delete(this.key)) keys.add(this.key);
    this.view.save();
    this.draw();
  }

  draw() {
    const shown = Math.round(this.svg.getBoundingClientRect().width) || 560;
    const width = this.view.isPrinting ? (this.wide ? 760 : 370) : Math.max(280, shown);
    const { view, height } = this;
    const isLog = this.isLog();
    this.logButton.setAttribute("aria-pressed", view.logY.has(this.key));
    const [left, right] = view.domain();
    this.x = makeScale(left, right, MARGIN.left, width - MARGIN.right, view.logX);
    const [low, high] = this.heights(left, right, isLog);
    this.y = makeScale(low, high, height - MARGIN.bottom, MARGIN.top, isLog);
    this.width = width;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const clip = `clip-${this.key}`;
    const inside = draw("g", { "clip-path": `url(#${clip})` });
    for (const event of this.events) this.drawEvent(inside, event);
    for (const series of this.shown()) this.drawBand(inside, series);
    for (const series of this.shown()) this.drawSeries(inside, series);
    this.over = draw("g", {});
    this.svg.replaceChildren(
      draw("defs", {}, draw("clipPath", { id: clip }, draw("rect", {
        x: MARGIN.left - 5, y: MARGIN.top - 4, width: width - MARGIN.left - MARGIN.right + 10,
        height: height - MARGIN.top - MARGIN.bottom + 8,
      }))), this.drawAxes(), inside, this.over);
  }

  // The lowest and highest value between two places, with a little air around them.
  heights(left, right, isLog) {
    let low = Infinity;
    let high = -Infinity;
    const isCut = this.wide && !isLog && !this.view.hasFirst && !this.view.zoom;
    const begin = isCut ? this.x.invert(
      this.x(left) + FIRST_STEPS * (this.x(right) - this.x(left))) : left;
    for (const series of this.shown()) {
      const xs = series.x(this.view.axis);
      for (const ys of [series.y, series.ghost, series.low, series.high]) {
        if (!ys) continue;
        for (let i = 0; i < xs.length; i++) {
          if (xs[i] < begin) continue;
          const y = ys[i];
          if (y === null || xs[i] === null || xs[i] < left || xs[i] > right) continue;
          if (isLog && y <= 0) continue;
          if (y < low) low = y;
          if (y > high) high = y;
        }
      }
    }
    if (low > high) return isLog ? [1, 10] : [0, 1];
    if (isLog) {
      const air = (high / low) ** 0.05 || 1.1;
      return low === high ? [low / 1.5, high * 1.5] : [low / air, high * air];
    }
    const air = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    const isNearZero = low >= 0 && low - air < 0;
    return [isNearZero ? 0 : low - air, high + air];
  }

  drawAxes() {
    const { x, y, width, height } = this;
    const group = draw("g", {});
    const bottom = height - MARGIN.bottom;
    const ticksY = y.isLog ? logTicks(y.low, y.high, 6) : linearTicks(y.low, y.high, 5);
    for (const tick of ticksY) {
      const at = y(tick);
      group.append(
        draw("line", { class: "gridline", x1: MARGIN.left, x2: width - MARGIN.right, y1: at,
          y2: at }),
        draw("text", { x: MARGIN.left - 8, y: at + 4, "text-anchor": "end" },
          this.spellTick(tick)));
    }
    const unit = this.view.unit();
    const most = Math.max(2, Math.floor((width - MARGIN.left) / 90));
    const low = x.low * unit.times;
    const high = x.high * unit.times;
    const ticksX = x.isLog ? logTicks(low, high, most) : linearTicks(low, high, most);
    for (const tick of ticksX) {
      const at = x(tick / unit.times);
      group.append(
        draw("line", { class: "axisline", x1: at, x2: at, y1: bottom, y2: bottom + 4 }),
        draw("text", { x: at, y: bottom + 16, "text-anchor": "middle" }, shorten(tick)));
    }
    group.append(
      draw("line", { class: "axisline", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom,
        y2: bottom }),
      draw("text", { x: width - MARGIN.right, y: height - 3, "text-anchor": "end" }, unit.name));
    return group;
  }

  // A path through the points that lie in sight or next to it.
  path(xs, ys) {
    const { x, y } = this;
    const parts = [];
    let isBroken = true;
    for (let i = 0; i < xs.length; i++) {
      if (xs[i] === null || ys[i] === null || (y.isLog && ys[i] <= 0) ||
        (x.isLog && xs[i] <= 0)) {
        isBroken = ys[i] === null || isBroken;
        continue;
      }
      const isLeft = i + 1 < xs.length && xs[i + 1] !== null && xs[i + 1] < x.low;
      const isRight = i > 0 && xs[i - 1] !== null && xs[i - 1] > x.high;
      if (isLeft || isRight) continue;
      parts.push(`${isBroken ? "M" : "L"}${x(xs[i]).toFixed(1)},${y(ys[i]).toFixed(1)}`);
      isBroken = false;
    }
    return parts.join("");
  }

  drawBand(group, series) {
    if (!series.low) return;
    const xs = series.x(this.view.axis);
    const { x, y } = this;
    const floor = y.isLog ? y.low : -Infinity;
    // On an axis of hours, an evaluation leaves a gap.
    const gap = (8 * (xs[xs.length - 1] - xs[0])) / xs.length;
    const paths = [];
    let above = [];
    let below = [];
    const close = () => {
      if (above.length) paths.push(`M${above.join("L")}L${below.reverse().join("L")}Z`);
      [above, below] = [[], []];
    };
    for (let i = 0; i < xs.length; i++) {
      if (xs[i] === null || series.low[i] === null || (x.isLog && xs[i] <= 0)) continue;
      if (y.isLog && series.high[i] <= 0) continue;
      if (i && Math.abs(xs[i] - xs[i - 1]) > gap) close();
      const at = x(xs[i]).toFixed(1);
      above.push(`${at},${y(series.high[i]).toFixed(1)}`);
      below.push(`${at},${y(Math.max(series.low[i], floor)).toFixed(1)}`);
    }
    close();
    group.append(draw("path", { class: "band", d: paths.join(""), style: { fill: series.color } }));
  }

  drawSeries(group, series) {
    const xs = series.x(this.view.axis);
    const style = { stroke: series.color };
    if (series.ghost) {
      group.append(draw("path", { class: "ghost", d: this.path(xs, series.ghost), style }));
    }
    const kind = series.marker ? " points" : series.dashed ? " asked" : "";
    const thin = this.wide || kind ? "" : " thin";
    group.append(draw("path", { class: `curve${kind}${thin}`, d: this.path(xs, series.y), style }));
    if (series.marker) this.drawMarkers(group, series, xs);
  }

  drawMarkers(group, series, xs) {
    const { x, y } = this;
    const every = Math.max(1, Math.ceil(xs.length / 120));
    const style = { fill: series.color };
    for (let i = xs.length - 1; i >= 0; i -= every) {
      const value = series.y[i];
      if (xs[i] === null || value === null || xs[i] < x.low || xs[i] > x.high) continue;
      if ((y.isLog && value <= 0) || (x.isLog && xs[i] <= 0)) continue;
      const error = series.error ? series.error[i] : null;
      if (error && !(y.isLog && value - error <= 0)) {
        group.append(draw("line", { class: "whisker", x1: x(xs[i]), x2: x(xs[i]),
          y1: y(value - error), y2: y(value + error), style: { stroke: series.color } }));
      }
      group.append(draw("path", { class: "marker", style,
        d: markerPath(series.marker, x(xs[i]), y(value), 4) }));
    }
  }

  drawEvent(group, event) {
    if (this.view.hidden.has(event.run)) return;
    const at = this.view.place(event.at);
    if (at === null || at < this.x.low || at > this.x.high || (this.x.isLog && at <= 0)) return;
    const place = this.x(at);
    group.append(draw("line", { class: event.kind, x1: place, x2: place, y1: MARGIN.top,
      y2: this.height - MARGIN.bottom }, draw("title", {}, event.text)));
  }

  // --- the read-out

  nearest(series, value) {
    const xs = series.x(this.view.axis);
    const at = this.x(value);
    let best = -1;
    let distance = Infinity;
    for (let i = 0; i < xs.length; i++) {
      if (xs[i] === null || xs[i] < this.x.low || xs[i] > this.x.high) continue;
      const away = Math.abs(this.x(xs[i]) - at);
      if (away < distance) [best, distance] = [i, away];
    }
    const reach = series.marker ? 14 : 40;
    return distance <= reach ? best : -1;
  }

  drawCursor(value, isActive) {
    this.over.replaceChildren();
    this.tip.hidden = true;
    if (value === null || value < this.x.low || value > this.x.high) return;
    const at = this.x(value);
    this.over.append(draw("line", { class: "cursor", x1: at, x2: at, y1: MARGIN.top,
      y2: this.height - MARGIN.bottom }));
    const told = [];
    for (const series of this.shown()) {
      const i = this.nearest(series, value);
      if (i < 0 || series.y[i] === null) continue;
      const y = series.y[i];
      if (!(this.y.isLog && y <= 0)) {
        this.over.append(draw("circle", { class: "dot", r: 4,
          cx: this.x(series.x(this.view.axis)[i]), cy: this.y(y),
          style: { fill: series.color } }));
      }
      told.push([series, i]);
    }
    if (isActive) this.showTip(at, value, told);
  }

  showTip(at, value, told) {
    const unit = this.view.unit();
    const title = `${unit.name} ${spellPlace(value * unit.times)}`;
    const rows = told.map(([series, i]) => make("div", {},
      make("span", { class: "swatch", style: { background: series.color } }),
      make("span", {}, series.name), make("span", {}, series.tell(i))));
    this.tip.replaceChildren(make("b", {}, title), ...rows);
    this.tip.hidden = false;
    const inside = this.svg.getBoundingClientRect();
    const outside = this.element.getBoundingClientRect();
    const box = this.tip.getBoundingClientRect();
    const place = inside.left - outside.left + at * (inside.width / this.width);
    const isRight = place + box.width + 24 > this.element.clientWidth;
    const left = isRight ? place - box.width - 14 : place + 14;
    this.tip.style.setProperty("left", `${Math.max(4, left)}px`);
    this.tip.style.setProperty("top", `${inside.top - outside.top + 8}px`);
    this.view.speak([title, ...told.map(([series, i]) => `${series.name} ${series.tell(i)}`)]
      .join(", "));
  }

  // --- mouse, touch and keys

  listen() {
    let from = null;
    const placeOf = (event) => {
      const box = this.svg.getBoundingClientRect();
      const place = ((event.clientX - box.left) / box.width) * this.width;
      return Math.min(Math.max(place, MARGIN.left), this.width - MARGIN.right);
    };
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      from = placeOf(event);
      this.view.isDragging = true;
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointermove", (event) => {
      const to = placeOf(event);
      this.view.setCursor(this.x.invert(to), this);
      if (from !== null && Math.abs(to - from) > 4) {
        this.over.append(draw("rect", { class: "selection", x: Math.min(from, to), y: MARGIN.top,
          width: Math.abs(to - from), height: this.height - MARGIN.top - MARGIN.bottom }));
      }
    });
    this.svg.addEventListener("pointerup", (event) => {
      const to = placeOf(event);
      const ends = from === null ? null : [from, to].sort((a, b) => a - b);
      from = null;
      this.view.isDragging = false;
      if (ends && ends[1] - ends[0] > 6) this.view.zoomTo(ends.map((end) => this.x.invert(end)));
    });
    this.svg.addEventListener("pointercancel", () => {
      from = null;
      this.view.isDragging = false;
    });
    this.svg.addEventListener("pointerleave", () => {
      if (from === null) this.view.setCursor(null, null);
    });
    this.svg.addEventListener("dblclick", () => this.view.zoomTo(null));
    this.svg.addEventListener("keydown", (event) => this.onKey(event));
    this.svg.addEventListener("blur", () => this.view.setCursor(null, null));
  }

  onKey(event) {
    const { x, view } = this;
    const places = this.places();
    const now = view.cursor === null ? -1 : closestIndex(places, view.cursor);
    const stride = event.shiftKey ? Math.max(1, Math.round(places.length / 20)) : 1;
    const moves = {
      ArrowLeft: now < 0 ? places.length - 1 : now - stride, ArrowRight: now < 0 ? 0 : now + stride,
      Home: 0, End: places.length - 1,
    };
    if (event.key in moves) {
      const to = Math.min(Math.max(moves[event.key], 0), places.length - 1);
      if (places.length) view.setCursor(places[to], this);
    } else if (event.key === "+" || event.key === "=" || event.key === "-") {
      const middle = view.cursor === null ? (MARGIN.left + this.width) / 2 : x(view.cursor);
      const reach = (this.width - MARGIN.left - MARGIN.right) * (event.key === "-" ? 1 : 0.25);
      view.zoomTo([x.invert(middle - reach), x.invert(middle + reach)]);
    } else if (event.key === "Escape" || event.key === "0") {
      view.zoomTo(null);
    } else return;
    event.preventDefault();
  }

  // The places in sight that have a value, of all series.
  places() {
    const places = new Set();
    for (const series of this.shown()) {
      for (const place of series.x(this.view.axis)) {
        if (place !== null && place >= this.x.low && place <= this.x.high) places.add(place);
      }
    }
    return [...places].sort((a, b) => a - b);
  }
}

function spellPlace(value) {
  return Math.abs(value) >= 100 ? spellCount(value) : significant(value, 4);
}

function closestIndex(values, value) {
  let best = 0;
  values.forEach((other, i) => {
    if (Math.abs(other - value) < Math.abs(values[best] - value)) best = i;
  });
  return best;
}
