// What is drawn. Text of the model is only ever set as text.

import { byRandomness, colour } from "./strategies.js";

const SURE = 0.95; // of p_max: above it every action draws nearly the same token
const HOT = 2; // temperature at the end of the scale

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const percent = share => (share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
const counted = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

const steers = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu;
const safe = text => text.replace(steers, c => `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

// A token's text in which line ends, tabs, and spaces that stand alone or in rows can be seen.
const visible = text =>
  safe(text).replace(/^ +$| {2,}/g, spaces => "␣".repeat(spaces.length)).replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t") || "∅";

function tint(element, colours) {
  element.classList.toggle("tinted", colours !== null);
  if (colours === null) return;
  element.style.setProperty("--light", colours[0]);
  element.style.setProperty("--dark", colours[1]);
}

// A strategy's name, which may break after its commas.
const breakable = name => name.split(/(?<=,)/).flatMap(part => [part, document.createElement("wbr")]);

const chip = colours => {
  const drawn = make("span", { className: "chip" });
  tint(drawn, colours);
  return drawn;
};

function bar(name, share, colours, isChosen) {
  const filled = make("i");
  filled.style.width = `${100 * share}%`;
  tint(filled, colours);
  const row = make("li", { className: isChosen ? "chosen" : "" });
  row.append(
    make("span", { className: "name" }, ...breakable(name)),
    make("span", { className: "track" }, filled),
    make("span", { className: "share" }, percent(share)),
  );
  return row;
}

// How an answer was sampled: its actions from greedy to hot, and the colour of each token.
class Colours {
  constructor(info, fixed) {
    const names = info?.actions ?? [];
    this.names = names;
    this.order = byRandomness(names);
    this.level = info?.level ?? null;
    this.chosen = info?.strategy ?? null;
    this.fixed = fixed;
    this._of = new Map(this.order.map((action, place) => [action, colour(place / Math.max(names.length - 1, 1))]));
  }

  ofAction(action) {
    return this._of.get(action) ?? null;
  }

  ofToken(token) {
    if (token.p_max > SURE) return null;
    if (this.level === "token") return this.ofAction(token.action);
    if (this.level === "sequence") return this.ofAction(this.names.indexOf(this.chosen));
    if (this.level === "autodeco") return colour(Math.min(token.temperature, HOT) / HOT);
    return ["var(--faint)", "var(--faint)"];
  }

  // [name, colours, which tokens it counts]
  legend() {
    const sure = ["over 95 % sure", null, token => token.p_max > SURE];
    const unsure = token => token.p_max <= SURE;
    if (this.level === "token") {
      return [...this.order.map(a => [this.names[a], this.ofAction(a), t => unsure(t) && t.action === a]), sure];
    }
    if (this.level === "sequence") return [[this.chosen, this.ofAction(this.names.indexOf(this.chosen)), unsure], sure];
    if (this.level === "autodeco") return [...[0, 1, HOT].map(t => [`T=${t}`, colour(t / HOT), null]), sure];
    return [[this.fixed, ["var(--faint)", "var(--faint)"], unsure], sure];
  }
}

// The numbers of the token that is pointed at.
export class Card {
  constructor(element) {
    this.element = element;
    this.chosen = null; // the token that stays when the pointer leaves
  }

  show(span) {
    this.shown?.classList.remove("shown");
    this.shown = span;
    this.element.classList.toggle("empty", !span);
    this.element.querySelector(".hint").hidden = Boolean(span);
    this.element.querySelector(".numbers-of-token").hidden = !span;
    if (!span) return;
    span.classList.add("shown");
    const { token, colours } = span;
    tint(this.element.querySelector(".which .chip"), colours.ofToken(token));
    this.element.querySelector("code").textContent = visible(token.text).replace(/[\n\t]/g, "").replace(/ /g, "␣");
    const rows = [
      ["action", colours.names[token.action] ?? colours.chosen ?? "–"],
      ["temperature", token.temperature === 0 ? "0, greedy" : String(token.temperature)],
      ["top-p", token.top_p < 1 ? String(token.top_p) : "off"],
      ["entropy", `${token.entropy.toFixed(2)} nats`],
      ["likeliest token", percent(token.p_max)],
      ["remaining budget", counted(token.remaining, "token")],
    ];
    this.element.querySelector("dl").replaceChildren(
      ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, ...breakable(value))]),
    );
    this.element.querySelector(".shares").hidden = token.pi === null;
    this.element.querySelector("ul").replaceChildren(
      ...(token.pi === null ? [] : colours.order).map(a =>
        bar(colours.names[a], token.pi[a], colours.ofAction(a), a === token.action),
      ),
    );
  }

  choose(span) {
    this.chosen = span;
    this.show(span);
  }
}

// One completion.
class Sample {
  constructor(number, title, card) {
    this.card = card;
    this.tokens = [];
    this.badge = make("span", { className: "badge" });
    this.end = make("p", { className: "end" });
    this.text = make("div", { className: "text", role: "listbox", ariaLabel: `${title}, sample ${number}; arrow keys move between tokens` });
    this.element = make("article", { className: "sample" });
    this.element.append(make("h3", {}, `Sample ${number} `, this.badge), this.text, this.end);
    this.text.addEventListener("pointerleave", () => card.show(card.chosen));
    this.written = "";
    this.reason = null;
  }

  add(token, colours) {
    const span = make("span", { className: "t", role: "option", tabIndex: this.tokens.length ? -1 : 0, token, colours });
    span.textContent = visible(token.text);
    tint(span, colours.ofToken(token));
    const index = this.tokens.push(span) - 1;
    span.addEventListener("pointerenter", event => event.pointerType === "mouse" && this.card.show(span));
    span.addEventListener("focus", () => this._choose(span));
    span.addEventListener("click", () => span.focus());
    span.addEventListener("keydown", event => this._move(event, index));
    this.text.append(span);
  }

  _choose(span) {
    for (const token of this.tokens) {
      token.tabIndex = token === span ? 0 : -1;
      token.ariaSelected = String(token === span);
    }
    this.card.choose(span);
  }

  _move(event, index) {
    const last = this.tokens.length - 1;
    const steps = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1, Home: 0, End: last };
    if (event.key === "Escape") {
      this.tokens[index].blur();
      this.card.choose(null);
    }
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.tokens[Math.min(Math.max(steps[event.key], 0), last)].focus();
  }

  finish(reason) {
    this.reason = reason;
    const length = counted(this.tokens.length, "token");
    this.end.textContent = reason === "stop" ? `ended by itself after ${length}` : `cut off after ${length}`;
  }

  judge({ correct, detail }) {
    this.badge.textContent = correct === null ? "? no verdict" : correct ? "✓ right" : "✗ wrong";
    this.badge.classList.add(correct === null ? "unknown" : correct ? "right" : "wrong");
    if (correct !== true && !detail.startsWith("score")) this.end.textContent += `; ${detail}`;
  }
}

// One run: what chose, and its samples.
export class Side {
  constructor(title, model, fixed, count, card) {
    this.title = title;
    this.fixed = fixed;
    this.card = card;
    this.colours = new Colours(null, fixed);
    this.outcome = make("p", { className: "outcome" });
    this.facts = make("p", { className: "note" }, "waiting for the first token");
    this.chart = make("ul", { className: "chart", hidden: true, ariaLabel: "Probabilities of the strategies for this prompt" });
    this.legend = make("ul", { className: "legend", ariaLabel: "Colours of the actions, with the number of tokens that got them" });
    this.samples = Array.from({ length: count }, (_, i) => new Sample(i + 1, title, card));
    const samples = make("div", { className: "samples" }, ...this.samples.map(sample => sample.element));
    this.element = make("section", { className: "side", ariaBusy: "true", ariaLabel: title });
    const heading = make("h2", {}, `${title} `, make("small", {}, model));
    this.element.append(heading, this.facts, this.outcome, this.chart, this.legend, samples);
  }

  // How the answer is sampled, known with its first token.
  begin(info) {
    this.colours = new Colours(info, this.fixed);
    const { names, order, chosen } = this.colours;
    const facts = {
      sequence: `one strategy for the whole answer: ${chosen}`,
      token: `one of ${names.length} strategies at every token`,
      autodeco: "a temperature and a top-p at every token",
    };
    this.facts.textContent = `${facts[info.level] ?? `always ${info.strategy}`} · seed ${info.seed}`;
    if (info.probabilities) {
      const bars = order.map(a => bar(names[a], info.probabilities[names[a]], this.colours.ofAction(a), names[a] === chosen));
      this.chart.replaceChildren(...bars);
      this.chart.hidden = false;
    }
    this._drawLegend();
  }

  add(index, token) {
    this.samples[index].add(token, this.colours);
    for (const [counts, shown] of this._counts) {
      if (counts?.(token)) shown.textContent = String(Number(shown.textContent) + 1);
    }
  }

  _drawLegend() {
    this._counts = [];
    this.legend.replaceChildren(...this.colours.legend().map(([name, colours, counts]) => {
      const shown = make("small", {}, counts ? "0" : "");
      this._counts.push([counts, shown]);
      return make("li", {}, chip(colours), make("span", {}, ...breakable(name)), shown);
    }));
  }

  // Verdicts of all samples; returns what they come to, in words.
  judge(verdicts) {
    verdicts.forEach((verdict, index) => this.samples[index].judge(verdict));
    const count = verdicts.length;
    const right = verdicts.filter(verdict => verdict.correct).length;
    const missing = verdicts.filter(verdict => verdict.correct === null).length;
    const passed = right > 0 ? "1, solved" : missing > 0 ? "unknown" : "0, not solved";
    this.outcome.textContent = `${right} of ${count} right · pass@${count} of this run: ${passed}`;
    return `${this.title}: ${right} of ${count} right.`;
  }
}
