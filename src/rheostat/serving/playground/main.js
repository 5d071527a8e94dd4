// The form, and the two runs it starts.

import { get, post, stream, useKey } from "./api.js";
import { parse } from "./strategies.js";
import { Card, make, Side } from "./view.js";

const field = Object.fromEntries([...document.querySelectorAll("[id]")].map(element => [element.id, element]));
const card = new Card(field.card);
let models = new Map();
let problem = null; // the one that the prompt asks
let posing = null; // the problem that is being fetched
let running = null; // what stops the runs under way

// ---- what can be chosen ----

async function load() {
  const [listed, tasks] = await Promise.all([get("v1/models"), get("v1/playground/tasks")]);
  models = new Map(listed.data.map(model => [model.id, model.rheostat]));
  field.model.replaceChildren(...listed.data.map(model => {
    const { level } = model.rheostat;
    return make("option", { value: model.id }, `${model.id} (${level ? `${level} level` : "no adapter"})`);
  }));
  field.model.value = (listed.data.find(model => model.rheostat.level) ?? listed.data[0]).id;
  field.task.append(...tasks.tasks.map(name => make("option", { value: name }, name)));
  field.number.max = tasks.problems;
  fit();
}

// A model without a template for conversations continues text only, and so does one that is asked a task's problem.
function fit() {
  field.chat.disabled = problem !== null || !models.get(field.model.value)?.chat;
  if (field.chat.disabled) field.text.checked = true;
  field["n-shown"].textContent = field.n.value;
  field["b-shown"].textContent = field.b.value;
}

async function pose() {
  const task = field.task.value;
  field["number-field"].hidden = field.number.disabled = task === "";
  problem = null;
  field.about.textContent = "";
  if (task === "") return fit();
  if (!field.number.reportValidity()) return fit();
  const found = await get(`v1/playground/problem?${new URLSearchParams({ task, number: field.number.value })}`);
  if (task !== field.task.value || String(found.number) !== field.number.value) return; // another was chosen meanwhile
  problem = found;
  field.prompt.value = found.prompt;
  field.prompt.scrollTop = field.prompt.scrollHeight;
  field.b.value = found.max_tokens;
  const stops = found.stop.map(stop => stop.replace(/\n/g, "↵")).join(" ");
  field.about.textContent = `${found.member}, problem ${found.number}. The right answer: ${found.answer}. An answer ends at ${stops}`;
  fit();
}

// ---- running ----

function asked() {
  const seed = field.seed.value.trim();
  if (!/^-?\d*$/.test(seed) || !Number.isSafeInteger(Number(seed))) throw new Error("Seed: write a whole number, or nothing");
  const prompt = field.prompt.value;
  const isChat = field.chat.checked;
  return {
    path: isChat ? "v1/chat/completions" : "v1/completions",
    body: {
      ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
      ...(problem && { stop: problem.stop }),
      model: field.model.value,
      n: Number(field.n.value),
      max_tokens: Number(field.b.value),
      // one seed for both, so that they differ in how they sample and in nothing else
      seed: seed === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number(seed),
      stream: true,
    },
  };
}

async function follow(side, { path, body }, asks, signal) {
  try {
    for await (const chunk of stream(path, body, signal)) {
      if (chunk.rheostat) side.begin(chunk.rheostat);
      for (const { index, delta, text, rheostat, finish_reason: reason } of chunk.choices) {
        const sample = side.samples[index];
        sample.written += delta?.content ?? text ?? "";
        for (const token of rheostat?.trace ?? []) side.add(index, token);
        if (reason) sample.finish(reason);
      }
    }
    if (!asks) return "";
    const completions = side.samples.map(sample => ({ text: sample.written, finish_reason: sample.reason }));
    const { task, number } = asks;
    return side.judge((await post("v1/playground/verdicts", { task, number, completions }, signal)).verdicts);
  } finally {
    side.element.ariaBusy = "false";
  }
}

async function run() {
  const request = asked();
  const fixed = field.fixed.value.trim();
  const parameters = parse(fixed);
  const { body } = request;
  const begun = [];
  if (models.get(body.model)?.level) {
    const side = new Side("Adapted", body.model, "", body.n, card);
    begun.push([side, { ...request, body: { ...body, rheostat: { mode: "adapt", trace: true } } }]);
  }
  const side = new Side("Fixed", fixed, fixed, body.n, card);
  begun.push([side, { ...request, body: { ...body, ...parameters, rheostat: { mode: "static", trace: true } } }]);
  card.choose(null);
  field.sides.replaceChildren(...begun.map(([side]) => side.element));
  field.results.hidden = false;
  field.results.classList.toggle("single", begun.length === 1);
  running = new AbortController();
  field.run.disabled = true;
  field.stop.disabled = false;
  field.status.textContent = "Running …";
  try {
    const words = await Promise.all(begun.map(([side, own]) => follow(side, own, problem, running.signal)));
    field.status.textContent = ["Done.", ...words].join(" ").trim();
  } catch (error) {
    running.abort();
    field.status.textContent = "Stopped.";
    if (error.name !== "AbortError") throw error;
  } finally {
    running = null;
    field.run.disabled = false;
    field.stop.disabled = true;
  }
}

// ---- what the reader does ----

const stop = () => running?.abort();
const choose = () => (posing = attempt(pose));

// What goes wrong is said on the page; a key is asked for where the server wants one.
async function attempt(action) {
  field.error.textContent = "";
  useKey(field.key.value);
  try {
    await action();
  } catch (error) {
    const isLocked = error.status === 401;
    field.error.textContent = isLocked && !field.key.value ? "This server asks for its API key." : error.message;
    if (!isLocked) return;
    field["key-field"].hidden = false;
    field.key.focus();
  }
}

// Whether the prompt is that of the problem that the form names.
const isPosed = () => field.task.value === "" || String(problem?.number) === field.number.value;

async function start() {
  await posing;
  if (!models.size) await attempt(load);
  if (!field.ask.reportValidity()) return;
  if (!isPosed()) await choose();
  if (models.size && isPosed() && !running) await attempt(run);
}

field.ask.addEventListener("submit", event => {
  event.preventDefault();
  start();
});
field.stop.addEventListener("click", stop);
field.key.addEventListener("change", () => models.size || attempt(load));
field.model.addEventListener("change", fit);
for (const slider of [field.n, field.b]) slider.addEventListener("input", fit);
for (const choice of [field.task, field.number]) choice.addEventListener("change", choose);
document.addEventListener("keydown", event => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  }
});

attempt(load);
