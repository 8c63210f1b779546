"use strict";
// The page holds one picture, which the stream keeps up to date, and draws what
// changed of it. All text goes into text nodes and fixed attributes; the policy
// that the page is served with refuses to make markup of a string.

const SHOWN = 200; // rows of a service before "show all"
const OPEN = 8; // services that are unfolded at first
const EVENTS = 50;
const WINDOW = 30 * 60e3; // of the chart
const SILENCE = 12e3; // a stream that says nothing for so long is dead: it speaks every 5 s

const picture = { services: new Map(), history: new Map(), events: [], meta: null, status: null };
const link = { source: null, heard: 0, since: Date.now(), live: false, retry: 0 };
const view = { filter: "", folded: new Map(), all: new Set(), fresh: new Map() };
let token = ""; // in memory only

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// ---- Making elements ----

// plain shows what would steer the text instead of being read as what it is.
function plain(text, limit = 240) {
  let s = String(text).replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, "\u2423");
  return s.length > limit ? s.slice(0, limit) + "…" : s;
}

// el makes an element: properties, then children that are elements or text.
function el(name, props, ...children) {
  const e = document.createElement(name);
  set(e, props);
  e.append(...children.filter((c) => c !== null && c !== undefined));
  return e;
}

function svg(name, attrs, ...children) {
  const e = document.createElementNS(SVG, name);
  for (const [k, v] of Object.entries(attrs)) e.setAttribute(k, v);
  e.append(...children);
  return e;
}

function set(e, props) {
  for (const [k, v] of Object.entries(props || {})) {
    if (k === "class") e.className = v;
    else if (k === "on") for (const [event, f] of Object.entries(v)) e.addEventListener(event, f);
    else e.setAttribute(k, v);
  }
}

// fill replaces the children of e if what they are made of differs. Elements
// that stay keep focus and selection.
function fill(e, made, make) {
  const key = JSON.stringify(made);
  if (e.made === key) return;
  e.made = key;
  e.replaceChildren(...[make()].flat().filter((c) => c !== null && c !== undefined));
}

function text(e, s) {
  if (e.textContent !== s) e.textContent = s;
}

// keyed makes the children of parent those of items, in order, and keeps the
// elements of items that stay.
function keyed(parent, items, key, make, update) {
  const old = new Map([...parent.children].map((c) => [c.key, c]));
  let at = parent.firstElementChild;
  for (const item of items) {
    const k = key(item);
    let e = old.get(k);
    old.delete(k);
    if (!e) {
      e = make(item);
      e.key = k;
    }
    if (e === at) at = at.nextElementSibling;
    else parent.insertBefore(e, at);
    update(e, item);
  }
  for (const e of old.values()) e.remove();
}

// ---- Words ----

const plural = (n, one, many) => `${n} ${n === 1 ? one : many || one + "s"}`;

function span(ms) {
  const s = Math.max(0, ms) / 1000;
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} days`;
}

const clock = (ms) => new Date(ms).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

// now is Redis' time, as far as this page knows.
function now() {
  const m = picture.meta;
  return m && m.now ? m.now + m.redis.age_ms + (performance.now() - m.got) : Date.now();
}

const moment = (ms) => Math.abs(now() - ms) > 20 * 3600e3 ? new Date(ms).toLocaleString() : clock(ms);

function when(ms) {
  const d = new Date(ms);
  return el("time", { datetime: d.toISOString(), title: d.toLocaleString() }, moment(ms));
}

// said is by whom an override is, until when it holds at most, and of whom.
function said(w, until) {
  if (!w) return "";
  return [w.by ? "by " + plain(w.by, 80) : "", until ? "until " + moment(until) : "", w.scope === "registration" ? "of this registration alone" : ""].filter(Boolean).join(", ");
}

// announce speaks to screen readers, at most once a second.
const spoken = [];
let speaking = 0;
function announce(what) {
  if (spoken.length < 3) spoken.push(what);
  else spoken[3] = "and more";
  if (!speaking) speaking = setTimeout(speak, 300);
}
function speak() {
  text($("news"), spoken.splice(0).join(". "));
  speaking = setTimeout(() => { speaking = 0; if (spoken.length) speak(); }, 1000);
}

// ---- The stream ----

function connect() {
  if (link.source) link.source.close();
  const source = new EventSource("v1/stream");
  link.source = source;
  const on = (name, f) => source.addEventListener(name, (e) => {
    link.heard = performance.now();
    link.retry = 0;
    if (!link.live) { link.live = true; link.since = Date.now(); }
    f(JSON.parse(e.data));
    draw();
  });
  on("reset", () => {
    picture.services.clear();
    picture.history.clear();
    picture.events = [];
    picture.status = null;
    picture.filling = true;
  });
  on("meta", (m) => { m.got = performance.now(); picture.meta = m; });
  on("status", (s) => { picture.status = s; });
  on("service", (d) => {
    compare(picture.services.get(d.service), d);
    picture.services.set(d.service, d);
    remember(d);
  });
  on("beats", (b) => {
    const d = picture.services.get(b.service);
    if (!d) return;
    d.now = b.now;
    for (const i of d.instances) if (i.addr in b.age_ms) i.age_ms = b.age_ms[i.addr];
  });
  on("removed", (r) => { picture.services.delete(r.service); picture.history.delete(r.service); });
  on("history", (all) => {
    for (const [name, points] of Object.entries(all)) picture.history.set(name, points);
    picture.filling = false;
  });
  on("events", (list) => {
    picture.events = list.reverse().concat(picture.events).slice(0, EVENTS);
  });
  source.onerror = () => {
    lost();
    if (source.readyState === EventSource.CLOSED && source === link.source) again();
  };
}

function lost() {
  if (link.live) { link.live = false; link.since = Date.now(); }
  draw();
}

// again connects anew where the browser has given up.
function again() {
  clearTimeout(link.timer);
  link.retry = Math.min(link.retry + 1, 5);
  link.timer = setTimeout(connect, 1000 + Math.random() * 1000 * 2 ** link.retry);
}

// compare finds what changed between two documents of a service, to show and to
// say it.
function compare(old, d) {
  if (picture.filling || !old) return;
  const before = new Map(old.instances.map((i) => [i.addr, i]));
  for (const i of d.instances) {
    const b = before.get(i.addr);
    before.delete(i.addr);
    const is = stateOf(d.service, i);
    if (is === "gone" && !(b && b.state !== "gone")) continue;
    if (b && stateOf(d.service, b) === is && b.weight === i.weight && b.id === i.id) continue;
    view.fresh.set(d.service + " " + i.addr, performance.now());
    announce(b ? `${d.service} ${i.addr} is ${word(is)}${b.weight === i.weight ? "" : ", weight " + i.weight}` : `${d.service} ${i.addr} joined`);
  }
  for (const addr of before.keys()) {
    const gone = d.gone.find((g) => g.addr === addr);
    announce(`${d.service} ${addr} is gone${gone ? ": " + gone.reason : ""}`);
  }
}

// remember adds to a service's history as the server does.
function remember(d) {
  if (picture.filling) return; // the history follows
  const points = picture.history.get(d.service) || [];
  const c = [0, 0, 0];
  for (const i of d.instances) {
    if (i.silent || i.state === "absent") c[2]++;
    else if (i.state === "ready") c[0]++;
    else if (i.state !== "garbage" && i.state !== "gone") c[1]++;
  }
  const last = points[points.length - 1];
  if (!last || last[1] !== c[0] || last[2] !== c[1] || last[3] !== c[2]) points.push([Math.round(now()), ...c]);
  picture.history.set(d.service, points.slice(-300));
}

// ---- Drawing ----

let drawing = false;
function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; drawAll(); });
}

function drawAll() {
  const docs = [...picture.services.values()].sort((a, b) => a.service < b.service ? -1 : 1);
  drawHead();
  drawBanners();
  drawTiles(docs);
  drawChart(docs);
  drawServices(docs);
  drawBalancers(docs);
  drawReapers();
  drawEvents();
}

function drawHead() {
  const m = picture.meta;
  if (m) {
    text($("namespace"), m.namespace === "rollcall" ? "" : plain(m.namespace));
    text($("about"), `rollcall ${m.version.slice(0, 12)}.`);
    text($("rights"), m.writes ? "Changes need a token." : "Read-only: started without --token-file.");
  }
  const l = $("link");
  const old = !link.live || (m && !m.redis.answers);
  l.className = "link" + (!m ? "" : old ? " lost" : " live");
  text($("link-text"), !m ? "connecting" : !link.live ? "reconnecting" : old ? "old data" : "live");
  $("forget").hidden = token === "";
}

// stateOf is the state that a person wants to see first.
function stateOf(service, i) {
  if (i.state === "absent" || i.state === "garbage" || i.state === "gone" || i.state === "away") return i.state;
  if (i.silent) return isHeld(service) ? "held" : "silent";
  // Serving is said only of what every live balancer that is to serve it does serve.
  if (i.state === "ready" && (!i.balancers || i.serving < i.balancers)) return "unserved";
  return i.state;
}

// WORDS are what a state is called where that is not its name.
const WORDS = { ready: "serving", unserved: "not served", away: "absent" };
const word = (state) => WORDS[state] || state;

function isHeld(service) {
  return ((picture.status && picture.status.held) || []).some((h) => h.service === "" || h.service === service);
}

function drawBanners() {
  const out = [];
  const m = picture.meta, s = picture.status;
  if (!link.live && link.heard) {
    out.push({ key: "link", bad: true, title: "The connection to rollcall serve is lost", lines: [`Last heard ${span(performance.now() - link.heard)} ago; showing old data. It reconnects by itself.`] });
  } else if (!link.live && performance.now() > 3000) {
    out.push({ key: "link", bad: true, title: "No connection to rollcall serve", lines: ["It connects by itself as soon as it can."] });
  }
  if (link.live && m && !m.redis.answers) {
    const lines = m.redis.heard
      ? [`Last answer ${span(m.redis.age_ms + performance.now() - m.got)} ago, at ${clock(Date.parse(m.redis.heard))}; what is shown is from then. What balancers have stays in force, and nobody is taken out.`]
      : ["It has not answered since this server was started: nothing is known, which is not the same as nothing being there."];
    if (m.redis.error) lines.push(plain(m.redis.error));
    out.push({ key: "redis", bad: true, title: "Redis does not answer", lines });
  }
  if (s && link.live && m && m.redis.answers) {
    for (const h of s.held || []) {
      const whom = h.service === "" ? "every service" : h.service;
      out.push({
        key: "held " + h.service, title: `Removal is held for ${whom}`,
        lines: [
          `${h.suspects} of ${h.members} look dead at once, since ${clock(h.since)}: ${h.rule}. That is more like a cut network than deaths.`,
          `It ends when they have been back for ${span(2 * s.registry.interval_ms)}. ` + (now() < h.let_go ? `From ${clock(h.let_go)} on one is let go every 10 s.` : `Since ${clock(h.let_go)} one is let go every 10 s.`) + " To take them out now, without proof that they are dead:",
        ],
        code: s.overrule,
      });
    }
    if (!(s.reapers || []).some((r) => r.live && r.armed)) {
      const wait = (s.reapers || []).filter((r) => r.live && r.until > now()).map((r) => r.until);
      const why = (s.reapers || []).filter((r) => r.live && r.cause).map((r) => `${r.reaper}: ${r.cause}`);
      out.push({ key: "armed", bad: !wait.length, title: "No reaper is armed, so nobody who dies is taken out", lines: [wait.length ? `One is armed at ${clock(Math.min(...wait))} at the earliest.` : why.length ? plain(why.join("; ")) : "Start one: rollcall reap. Two or more, anywhere, are better."] });
    }
  }
  keyed($("banners"), out, (b) => b.key, (b) => el("div", { class: "banner" + (b.bad ? " bad" : "") }, el("b", {}, plain(b.title)), el("div"), b.code ? el("code", { tabindex: "0" }) : null), (e, b) => {
    e.className = "banner" + (b.bad ? " bad" : "");
    fill(e.children[1], b.lines, () => b.lines.map((l) => el("p", {}, l)));
    if (b.code) text(e.children[2], b.code);
  });
}

function drawTiles(docs) {
  const n = { ready: 0, unserved: 0, out: 0, bad: 0, serving: 0 };
  for (const d of docs) {
    if (d.instances.some((i) => i.state !== "gone")) n.serving++;
    for (const i of d.instances) {
      const s = stateOf(d.service, i);
      if (s === "gone") continue;
      if (s === "ready") n.ready++;
      else if (s === "unserved") n.unserved++;
      else if (s === "drain" || s === "draining" || s === "maint") n.out++;
      else n.bad++;
    }
  }
  const live = new Map();
  for (const d of docs) for (const b of d.balancers) if (b.live) live.set(b.balancer, Math.max(live.get(b.balancer) || 0, b.behind));
  for (const b of (picture.status && picture.status.balancers) || []) if (b.live && !live.has(b.balancer)) live.set(b.balancer, 0);
  const behind = [...live.values()].filter((b) => b > 0).length;
  const reapers = ((picture.status && picture.status.reapers) || []).filter((r) => r.live);
  const armed = reapers.filter((r) => r.armed).length;
  const known = picture.status !== null;
  const tiles = [
    { key: "ready", n: n.ready, label: "serving" },
    ...(n.unserved ? [{ key: "unserved", n: n.unserved, label: "not served", class: "bad" }] : []),
    { key: "out", n: n.out, label: "drained or leaving", class: n.out ? "warn" : "" },
    { key: "bad", n: n.bad, label: "silent or unclear", class: n.bad ? "bad" : "" },
    { key: "services", n: n.serving, label: n.serving === 1 ? "service" : "services" },
    { key: "balancers", n: live.size, label: (live.size === 1 ? "balancer" : "balancers") + (behind ? `, ${behind} behind` : live.size ? ", up to date" : ""), class: behind ? "warn" : "" },
    { key: "reapers", n: armed, label: (armed === 1 ? "reaper" : "reapers") + " armed", class: known && !armed ? "bad" : "" },
  ];
  keyed($("tiles"), tiles, (t) => t.key, () => el("li", {}, el("b"), el("span")), (e, t) => {
    e.className = t.class || "";
    text(e.children[0], known ? String(t.n) : "–");
    text(e.children[1], t.label);
  });
}

// total adds the histories up: [[at, ready, out, silent]…] from a time on.
function total(docs, from, to) {
  const steps = [];
  for (const d of docs) {
    let last = [0, 0, 0];
    for (const [at, ...c] of picture.history.get(d.service) || []) {
      steps.push([Math.min(Math.max(at, from), to), c[0] - last[0], c[1] - last[1], c[2] - last[2]]);
      last = c;
    }
  }
  steps.sort((a, b) => a[0] - b[0]);
  const out = [];
  let sum = [0, 0, 0];
  for (const [at, ...c] of steps) {
    sum = sum.map((v, k) => v + c[k]);
    if (out.length && at - out[out.length - 1][0] < 1) out[out.length - 1] = [at, ...sum];
    else out.push([at, ...sum]);
  }
  return out;
}

let drawn = -1e9, later = 0;
function drawChart(docs) {
  const box = $("chart");
  const wide = box.clientWidth, high = box.clientHeight;
  if (!wide) return;
  const early = drawn + 250 - performance.now(); // a burst of changes is drawn as one
  if (early > 0 && box.wide === wide) {
    clearTimeout(later);
    later = setTimeout(draw, early);
    return;
  }
  box.wide = wide;
  const to = now();
  const first = Math.min(to, ...docs.map((d) => ((picture.history.get(d.service) || [])[0] || [to])[0]));
  const length = Math.min(WINDOW, Math.max(60e3, to - first));
  const from = to - length;
  const points = total(docs, from, to);
  const top = niceTop(Math.max(1, ...points.map((p) => p[1] + p[2] + p[3])));
  const left = 34, right = 8, above = 8, below = 20;
  const x = (t) => left + (wide - left - right) * (t - from) / length;
  const y = (v) => above + (high - above - below) * (1 - v / top);
  const begin = Math.max(from, first);
  const steps = points.map((p) => [Math.max(p[0], begin), p[1], p[1] + p[2], p[1] + p[2] + p[3]]);
  if (steps.length) {
    steps.push([to, ...steps[steps.length - 1].slice(1)]);
    drawn = performance.now();
  }
  const edge = (k) => steps.map((p, i) => (i === 0 ? `M${x(p[0]).toFixed(1)} ${y(p[k]).toFixed(1)}` : `H${x(p[0]).toFixed(1)}V${y(p[k]).toFixed(1)}`)).join("");
  // The lower side of layer k, from right to left: its level holds from each
  // point to the next.
  const back = (k) => {
    let d = "";
    for (let i = steps.length - 2; i >= 0; i--) d += `V${y(k ? steps[i][k] : 0).toFixed(1)}H${x(steps[i][0]).toFixed(1)}`;
    return d;
  };
  const parts = [svg("defs", {}, hatch("hatch-out", "rotate(45)", 7), hatch("hatch-silent", "rotate(-45)", 4))];
  for (const v of top > 1 ? [0, top / 2, top] : [0, top]) {
    parts.push(svg("line", { class: "grid", x1: left, x2: wide - right, y1: Math.round(y(v)) + .5, y2: Math.round(y(v)) + .5 }));
    parts.push(label(left - 6, y(v) + 4, "end", String(v)));
  }
  if (steps.length) {
    // From the top, so that of two edges at one level the lower layer's is seen.
    for (const [k, name] of [...["ready", "out", "silent"].entries()].reverse()) {
      if (k && !steps.some((p) => p[k + 1] > p[k])) continue;
      parts.push(svg("path", { class: "layer " + name, d: edge(k + 1) + back(k) + "Z" }));
      parts.push(svg("path", { class: "edge " + name, d: edge(k + 1) }));
    }
  }
  for (const e of picture.events) {
    if (e.what !== "expired" || e.at < from || e.at > to) continue;
    const at = x(e.at);
    parts.push(svg("path", { class: "mark", d: `M${at - 3.5} ${above - 5}l7 7m0 -7l-7 7` }));
  }
  const ticks = wide < 500 ? [0, .5, 1] : [0, .25, .5, .75, 1];
  for (const t of ticks) parts.push(label(x(from + t * length), high - 5, t === 0 ? "start" : t === 1 ? "end" : "middle", t === 1 ? "now" : "−" + span((1 - t) * length)));
  const end = steps.length ? steps[steps.length - 1] : [0, 0, 0, 0];
  box.replaceChildren(svg("svg", { role: "img", viewBox: `0 0 ${wide} ${high}`, "aria-label": `Instances over the last ${span(length)}: now ${end[1]} to serve, ${end[2] - end[1]} drained or leaving, ${end[3] - end[2]} silent; at most ${Math.max(0, ...steps.map((p) => p[3]))} and at least ${steps.length ? Math.min(...steps.map((p) => p[1])) : 0} to serve.` }, ...parts));
}

function niceTop(v) {
  const unit = 10 ** Math.floor(Math.log10(v));
  for (const m of [1, 2, 4, 6, 8, 10]) if (v <= m * unit) return Math.max(1, m * unit);
  return v;
}

function hatch(id, transform, size) {
  return svg("pattern", { id, width: size, height: size, patternUnits: "userSpaceOnUse", patternTransform: transform },
    svg("rect", { class: id + "-back", width: size, height: size }), svg("line", { class: id, x1: 0, y1: 0, x2: 0, y2: size }));
}

const label = (x, y, anchor, s) => svg("text", { x, y, "text-anchor": anchor }, s);

function spark(points) {
  const to = now(), from = Math.max(to - WINDOW, Math.min(to - 60e3, points.length ? points[0][0] : to)), wide = 84, high = 20;
  const top = Math.max(1, ...points.map((p) => p[1]));
  const x = (t) => wide * (Math.max(t, from) - from) / (to - from), y = (v) => 1.5 + (high - 3) * (1 - v / top);
  const d = points.map((p, i) => (i ? `H${x(p[0]).toFixed(1)}V` : `M${x(p[0]).toFixed(1)} `) + y(p[1]).toFixed(1)).join("") + `H${wide}`;
  // A service may come before its history: a line without a beginning is an error.
  return svg("svg", { class: "spark", viewBox: `0 0 ${wide} ${high}`, "aria-hidden": "true" }, ...(points.length ? [svg("path", { d })] : []));
}

// ---- Services ----

function drawServices(docs) {
  const m = picture.meta;
  const shown = docs.map((d) => ({ d, rows: matching(d) })).filter((s) => s.rows.length || view.filter === "");
  const none = $("none");
  none.hidden = shown.length > 0;
  text(none, view.filter && docs.length ? "Nothing matches the filter." : picture.status ? "No service has an instance." : "Nothing is known yet.");
  keyed($("list"), shown, (s) => s.d.service, makeService, (e, s) => updateService(e, s, docs.length, m && m.writes));
}

function matching(d) {
  const words = view.filter.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return rowsOf(d);
  return rowsOf(d).filter((i) => {
    const w = i.word || {};
    const hay = [d.service, i.addr, i.state, word(stateOf(d.service, i)), i.zone || "", i.reason || "", w.state || "", w.by || "", ...Object.entries(i.tags || {}).map(([k, v]) => k + "=" + v)].join(" ").toLowerCase();
    return words.every((w) => hay.includes(w));
  });
}

// rowsOf is what the table of a service shows: its instances, and then overrides that are
// in force for none.
function rowsOf(d) {
  return d.instances.concat(d.away.map((a) => ({ addr: a.addr, state: "away", reason: a.reason || a.word.reason, word: a.word })));
}

const rowKey = (i) => i.state === "away" ? `${i.addr} ${i.word.scope}` : i.addr;

const COLUMNS = ["Address", "State", "In HAProxy", "Weight", "Last heartbeat", "Zone", "Tags"];
const COLUMN_CLASS = { "Address": "col-address", "State": "col-state", "In HAProxy": "col-haproxy", "Weight": "col-weight number", "Last heartbeat": "col-beat", "Zone": "col-zone", "Tags": "col-tags", "": "col-act" };

function makeService({ d }) {
  const table = el("table", { class: "cards", role: "table" },
    el("caption", { class: "hidden" }, `Instances of ${plain(d.service)}`),
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" })), el("tbody", { role: "rowgroup" }));
  const e = el("details", { class: "service" },
    el("summary", {}, el("h3", {}, plain(d.service)), el("span", { class: "sum" }), el("span", { class: "lag chips" }), el("span", { class: "line" }), el("span", { class: "version" })),
    table, el("button", { class: "more", type: "button", on: { click: () => { view.all.add(d.service); draw(); } } }), el("p", { class: "none" }));
  e.addEventListener("toggle", () => {
    if (e.expected !== e.open) view.folded.set(d.service, !e.open);
    e.expected = e.open;
    draw();
  });
  return e;
}

function updateService(e, { d, rows }, services, writes) {
  const open = view.folded.has(d.service) ? !view.folded.get(d.service) : services <= OPEN || view.filter !== "";
  e.expected = open;
  if (e.open !== open) e.open = open;
  const [, sum, lag, line, version] = e.querySelector("summary").children;
  const counts = new Map();
  for (const i of d.instances) counts.set(stateOf(d.service, i), (counts.get(stateOf(d.service, i)) || 0) + 1);
  const words = ["ready", "unserved", "draining", "drain", "maint", "silent", "held", "absent", "garbage", "gone"].filter((s) => counts.has(s)).map((s) => `${counts.get(s)} ${word(s)}`);
  if (!words.length) words.push(lastGone(d));
  if (d.away_count) words.push(plural(d.away_count, "override") + " without an instance");
  text(sum, words.join(", "));
  const behind = d.balancers.filter((b) => b.live && b.behind > 0);
  const live = d.balancers.filter((b) => b.live).length;
  fill(lag, [behind.length, live], () => behind.length ? el("span", { class: "chip drain" }, live === 1 ? "balancer behind" : `${behind.length} of ${live} balancers behind`) : []);
  fill(line, [picture.history.get(d.service), Math.round(now() / 5000)], () => spark(picture.history.get(d.service) || []));
  text(version, `version ${d.version}`);
  if (!open) return;
  const balanced = rows.some((i) => (i.haproxy || []).length);
  const columns = COLUMNS.filter((c) => c !== "In HAProxy" || balanced).concat(writes ? [""] : []);
  const table = e.children[1];
  table.hidden = rows.length === 0;
  fill(table.tHead.rows[0], columns, () => columns.map((c) => el("th", { scope: "col", role: "columnheader", class: COLUMN_CLASS[c] }, c || el("span", { class: "hidden" }, "Change"))));
  const some = view.all.has(d.service) ? rows : rows.slice(0, SHOWN);
  keyed(table.tBodies[0], some, rowKey, (i) => makeRow(d.service, i), (tr, i) => updateRow(tr, d, i, columns));
  const more = e.children[2];
  more.hidden = some.length === rows.length;
  text(more, `Show all ${rows.length}`);
  const cut = e.children[3];
  cut.hidden = d.away_count <= d.away.length;
  text(cut, `Of ${d.away_count} overrides without an instance the first ${d.away.length} are here.`);
}

function lastGone(d) {
  const g = d.gone[0];
  return g ? `no instance; ${g.addr} ${g.reason} at ${clock(g.at)}` : "no instance";
}

function makeRow(service, i) {
  return el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader", class: "addr" }, plain(i.addr)));
}

function cell(tr, column, name) {
  let td = tr.cells[column];
  if (!td || td.name !== name) {
    const made = el("td", { role: "cell", "data-label": name });
    made.name = name;
    if (name === "Weight") made.className = "number";
    if (td) td.replaceWith(made);
    else tr.append(made);
    td = made;
  }
  return td;
}

function updateRow(tr, d, i, columns) {
  const key = d.service + " " + i.addr;
  const state = stateOf(d.service, i);
  const fresh = performance.now() - (view.fresh.get(key) || -1e9) < 2500;
  if (!fresh) view.fresh.delete(key);
  tr.classList.toggle("fresh", fresh);
  const unreal = state === "absent" || state === "garbage" || state === "gone"; // nothing to change
  tr.classList.toggle("old", unreal || state === "away");
  const w = i.word || {};
  while (tr.cells.length > columns.length) tr.lastElementChild.remove();
  for (const [k, name] of columns.entries()) {
    if (k === 0) continue;
    const td = cell(tr, k, name);
    switch (name) {
      case "State":
        td.classList.toggle("wide", !!(i.reason || w.state && said(w, w.until)));
        // What an operator said stays visible under what is worse.
        fill(td, [state, i.state, i.reason, w], () => {
          const under = state === "away" ? w.state : state !== i.state && i.state !== "ready" ? i.state : "";
          const who = w.state ? said(w, w.until) : state === "away" ? said(w, w.weight_until) : "";
          return el("div", {}, el("span", { class: "chips" }, el("span", { class: "chip " + state }, word(state)), under ? el("span", { class: "chip " + under }, under) : null),
            i.reason ? el("bdi", { class: "why" }, plain(i.reason)) : null, who ? el("bdi", { class: "said" }, who) : null);
        });
        break;
      case "In HAProxy":
        td.classList.toggle("empty", !(i.haproxy || []).length);
        fill(td, i.haproxy || [], () => el("span", { class: "chips" }, ...(i.haproxy || []).map(inHAProxy)));
        break;
      case "Weight":
        td.classList.toggle("empty", !i.beat && typeof w.weight !== "number");
        text(td, i.beat ? String(i.weight) : typeof w.weight === "number" ? String(w.weight) : "–");
        if (typeof w.weight === "number") td.title = said(w, w.weight_until) || "by an operator";
        else td.removeAttribute("title");
        break;
      case "Last heartbeat":
        td.classList.toggle("empty", !i.beat);
        text(td, i.beat ? span(i.age_ms) + " ago" : "–");
        break;
      case "Zone":
        td.classList.toggle("empty", !i.zone);
        fill(td, i.zone || "", () => i.zone ? el("bdi", {}, plain(i.zone, 80)) : "–");
        break;
      case "Tags":
        td.classList.toggle("empty", !Object.keys(i.tags || {}).length);
        fill(td, i.tags || {}, () => el("span", { class: "tags" }, ...Object.entries(i.tags || {}).sort().slice(0, 20).map(([k, v]) => el("bdi", { class: "tag" }, plain(k, 40) + "=" + plain(v, 80)))));
        break;
      default:
        td.className = "act";
        if (unreal) td.replaceChildren();
        else if (!td.firstChild) td.append(el("button", { type: "button", "aria-label": `Change ${state === "away" ? "the override of " : ""}${plain(d.service)} ${plain(i.addr)}`, on: { click: () => openChange(d.service, rowKey(i)) } }, "Change"));
    }
  }
}

// inHAProxy is a chip of what one balancer has, with its name where there is
// more than one.
function inHAProxy(s, _, all) {
  const said = !s.server && s.state === "maint" ? ["maint", "maint"] // it needs no server for that
    : !s.server ? ["off", s.note || "not there"]
    : s.check === "down" ? ["bad", "check down"]
    : s.state === "maint" ? ["maint", "maint"]
    : s.state === "drain" ? ["drain", "drain"]
    : s.serving ? ["up", s.check === "up" ? "up" : "serving"] : ["off", s.weight === 0 ? "weight 0" : plain(s.state, 40)];
  const many = new Set(all.map((x) => x.balancer)).size > 1, backends = new Set(all.map((x) => x.backend)).size > 1;
  const where = [many ? s.balancer : "", backends ? s.backend : ""].filter(Boolean).join(" ");
  const note = s.note && s.server ? s.note : "";
  return el("span", { class: "lb", title: plain(`${s.balancer}, backend ${s.backend}${s.server ? ", server " + s.server : ""}${s.why ? ": " + s.why : ""}`) },
    el("span", { class: "chip " + said[0] }, said[1]),
    where ? el("small", {}, plain(where, 60)) : null,
    note ? el("small", {}, plain(note, 40) + (s.until ? ` until ${clock(s.until)}` : "")) : null);
}

// ---- Who is at work ----

function drawBalancers(docs) {
  const rows = docs.flatMap((d) => d.balancers).sort((a, b) => (b.live - a.live) || (a.balancer < b.balancer ? -1 : a.balancer > b.balancer ? 1 : a.service < b.service ? -1 : 1)).slice(0, 300);
  const known = new Set(rows.map((r) => r.balancer));
  for (const b of (picture.status && picture.status.balancers) || []) if (!known.has(b.balancer)) rows.push({ ...b, service: "", behind: 0, applied: "" });
  const table = $("balancers");
  table.hidden = rows.length === 0;
  $("no-balancers").hidden = rows.length > 0;
  keyed(table.tBodies[0], rows, (r) => r.balancer + " " + r.service, () => el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader" }), el("td", { role: "cell" }), el("td", { role: "cell" }), el("td", { role: "cell", class: "number" })), (tr, r) => {
    text(tr.cells[0], plain(r.balancer));
    text(tr.cells[1], r.service ? plain(r.service) : "–");
    const lag = !r.live ? ["off", r.seen ? "silent for " + span(now() - r.seen) : "never seen"] : r.double ? ["drain", "two lbsyncs use this id"] : r.behind > 0 ? ["drain", plural(r.behind, "version") + " behind"] : ["ready", r.service ? "up to date" : "alive"];
    fill(tr.cells[2], lag, () => el("span", { class: "chip " + lag[0] }, lag[1]));
    text(tr.cells[3], String(r.applied));
  });
}

function drawReapers() {
  const rows = (picture.status && picture.status.reapers) || [];
  const table = $("reapers");
  table.hidden = rows.length === 0;
  $("no-reapers").hidden = rows.length > 0;
  keyed(table.tBodies[0], rows, (r) => r.reaper, () => el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader" }), el("td", { role: "cell" }), el("td", { role: "cell" })), (tr, r) => {
    text(tr.cells[0], plain(r.reaper));
    const state = !r.live ? ["off", "silent"] : r.armed ? ["ready", "armed"] : ["drain", "not armed"];
    fill(tr.cells[1], [state, r.cause, r.error], () => el("div", {}, el("span", { class: "chip " + state[0] }, state[1]), r.cause ? el("bdi", { class: "why" }, plain(r.error ? r.cause + ": " + r.error : r.cause)) : null));
    fill(tr.cells[2], r.since || 0, () => r.since ? when(r.since) : "–");
  });
}

function drawEvents() {
  const list = picture.events;
  $("no-events").hidden = list.length > 0;
  keyed($("events"), list, (e) => e.id, (e) => el("li", {}, when(e.at), el("span", {}, el("span", { class: "chip " + (KINDS[e.what] || "off") }, plain(e.what, 40))), el("span", { class: "what" }, ...wording(e))), () => {});
}

const KINDS = { joined: "ready", ready: "ready", released: "ready", expired: "bad", unhealthy: "bad", protected: "held", drained: "drain", draining: "draining", maint: "maint" };

const OPERATORS = new Set(["drained", "maint", "ready", "weight", "deregistered"]);

// wording is what an event says beside its time and kind. Of an instance's own "by" is its
// id, which tells nobody anything.
function wording(e) {
  const out = [el("b", {}, plain(e.service || "every service")), e.addr ? " " : null, e.addr ? el("span", { class: "addr" }, plain(e.addr)) : null];
  if (e.why) out.push(" ", el("bdi", { class: "note" }, plain(e.why)));
  if (e.what === "protected" || e.what === "released") out.push(" ", el("bdi", { class: "note" }, "by reaper " + plain(e.by)));
  else if (OPERATORS.has(e.what) && e.by) out.push(" ", el("bdi", { class: "note" }, "by " + plain(e.by, 80)));
  return out.filter((c) => c !== null);
}

// ---- Changing ----

// last is the verb that was refused for an instance that is the last that serves.
const change = { service: "", addr: "", away: false, busy: false, last: "", back: null };

function openChange(service, key) {
  const d = picture.services.get(service);
  const i = d && rowsOf(d).find((x) => rowKey(x) === key);
  const addr = key.split(" ")[0], w = i && i.word || {}, away = !!i && i.state === "away";
  Object.assign(change, { service, addr, away, busy: false, last: "", back: document.activeElement });
  text($("change-title"), `${plain(service)} ${plain(addr)}`);
  const override = [w.state, typeof w.weight === "number" ? "weight " + w.weight : ""].filter(Boolean).join(", ");
  text($("change-now"), (!i ? "It is gone." : away ? "No instance has it now." : `Now ${word(stateOf(service, i))}, weight ${i.weight}.`) + (override ? ` Override: ${[override, said(w, w.until || w.weight_until)].filter(Boolean).join(", ")}.` : ""));
  $("change-form").reset();
  const first = w.state ? "ready" : away ? "weight" : "drain";
  for (const r of document.getElementsByName("verb")) r.checked = r.value === first;
  result("", "");
  fields();
  $("change").showModal();
  (token ? document.querySelector("[name=verb]:checked") : $("token")).focus();
}

const verb = () => document.querySelector("[name=verb]:checked").value;

function fields() {
  const v = verb();
  $("token-field").hidden = token !== "";
  $("reason-field").hidden = v !== "drain" && v !== "maint";
  $("weight-field").hidden = v !== "weight";
  $("for-field").hidden = v === "ready" || v === "deregister";
  $("force-field").hidden = v !== "deregister" && v !== change.last;
  text($("force-text"), v === "deregister" ? "Also if it beats; its next beat brings it back" : "Take out the last one: no other is left to answer");
  $("change-do").disabled = change.busy;
}

function result(kind, what) {
  $("change-result").className = kind;
  text($("change-result"), what);
}

async function doChange() {
  if (change.busy) return;
  const v = verb(), typed = $("token").value.trim();
  const secret = token || typed;
  if (!secret) { result("bad", "Type a token of the server's --token-file."); $("token").focus(); return; }
  const body = {};
  if (v === "drain" || v === "maint") {
    body.reason = $("reason").value.trim();
    if (!body.reason) { result("bad", "Say a reason, for whoever wonders."); $("reason").focus(); return; }
  }
  if (v === "weight") {
    const w = $("weight").value.trim();
    body.weight = w === "" ? null : Number(w);
    if (!$("weight").checkValidity() || body.weight !== null && !Number.isInteger(body.weight)) { result("bad", "The weight is a whole number from 0 to 256."); $("weight").focus(); return; }
  }
  if (!$("for-field").hidden && $("for").value.trim()) body.for = $("for").value.trim();
  change.busy = true;
  fields();
  result("", "Waiting until every live balancer has applied it…");
  const path = `v1/services/${encodeURIComponent(change.service)}/instances/${encodeURIComponent(change.addr)}`;
  try {
    const r = await fetch(`${v === "deregister" ? path : `${path}/${v}`}?wait=10s${$("force").checked ? "&force=true" : ""}${change.away ? "&absent=true" : ""}`, {
      method: v === "deregister" ? "DELETE" : "POST", cache: "no-store", credentials: "omit",
      headers: { "Authorization": "Bearer " + secret, "Content-Type": "application/json" },
      body: v === "deregister" ? undefined : JSON.stringify(body),
    });
    const answer = await r.json();
    if (r.status === 401) { token = $("token").value = ""; result("bad", "That is not a token of this server."); return; }
    // These are answers to who may write; others, a 429 say, tell nothing of it.
    if (r.ok || [400, 404, 409].includes(r.status)) { token = secret; $("token").value = ""; }
    if (r.status === 409 && v !== "deregister") {
      change.last = v;
      fields();
      result("bad", `Nothing was done: ${plain(answer.error.split("; ")[0])}. Start another first, drain it, which waits for one, or tick the box and do it again.`);
      $("force").focus();
      return;
    }
    if (!r.ok) { result("bad", plain(answer.error || `the server says ${r.status}`)); return; }
    change.last = "";
    $("force").checked = false;
    const n = (answer.balancers || []).length;
    if (answer.applied) result("good", n ? `Done: applied by ${plural(n, "balancer")}.` : "Done. No live balancer has this service.");
    else result("bad", `Written, but not applied everywhere yet: ${plain(answer.waits || answer.why || "")}`);
  } catch (err) {
    result("bad", "No answer. Whether it was done is unknown: " + plain(err.message));
  } finally {
    change.busy = false;
    fields();
    if (!token && $("change").open) $("token").focus();
    draw();
  }
}

// ---- Start ----

$("change-form").addEventListener("submit", (e) => { e.preventDefault(); doChange(); });
$("change-form").addEventListener("change", (e) => {
  if (e.target.name === "verb") $("force").checked = false; // it was ticked for another
  fields();
});
$("change-close").addEventListener("click", () => $("change").close());
$("change").addEventListener("close", () => { $("token").value = ""; if (change.back && change.back.isConnected) change.back.focus(); });
$("forget").addEventListener("click", () => { token = ""; draw(); });
$("filter").addEventListener("input", (e) => { view.filter = e.target.value; draw(); });
addEventListener("resize", draw);
setInterval(() => {
  if (link.live && performance.now() - link.heard > SILENCE) {
    lost();
    connect();
  }
  draw();
}, 1000);
connect();
draw();
