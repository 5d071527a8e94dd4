// Strategies: reading them, their order from greedy to hot, and their colours, as in the reports.

const FIELDS = { T: "temperature", k: "top_k", p: "top_p", m: "min_p" };
const NAMES = Object.values(FIELDS);

// The request's fields of a strategy as Rheostat writes it, or of a bare temperature.
export function parse(text) {
  const wanted = text.trim();
  if (wanted === "greedy") return { temperature: 0 };
  if (wanted !== "" && Number.isFinite(Number(wanted))) return { temperature: Number(wanted) };
  const fields = {};
  for (const part of wanted.split(",")) {
    const [short, value = "", ...more] = part.split("=").map(piece => piece.trim());
    const name = FIELDS[short] ?? short;
    if (!NAMES.includes(name) || more.length || value === "" || !Number.isFinite(Number(value))) {
      throw new Error(`Fixed strategy: “${part.trim()}” is not understood; write greedy, or T=0.8,k=50,p=0.95,m=0.05`);
    }
    if (name in fields) throw new Error(`Fixed strategy: ${name} is written twice`);
    fields[name] = Number(value);
  }
  return { temperature: 1, ...fields };
}

// Positions of strategies from greedy to the hottest, truncated before free.
export function byRandomness(names) {
  const key = name => {
    if (name === "greedy") return [0, 0];
    const parts = name.split(",");
    return [Number(parts[0].replace("T=", "")), 1 - parts.length];
  };
  const keys = names.map(key);
  return names.map((_, index) => index).sort((a, b) => keys[a][0] - keys[b][0] || keys[a][1] - keys[b][1] || a - b);
}

const LIGHT = ["#2b4a8b", "#4f86c6", "#93bfdd", "#f0c24f", "#e8823a", "#a92c2c"];
const DARK = ["#4a6fc4", "#6aa3e0", "#a9d0ea", "#f3cd6b", "#ee9152", "#cf4a43"];

function blend(anchors, share) {
  const place = share * (anchors.length - 1);
  const start = Math.min(Math.floor(place), anchors.length - 2);
  const [from, to] = [start, start + 1].map(at => [1, 3, 5].map(i => parseInt(anchors[at].slice(i, i + 2), 16)));
  return "#" + from.map((a, i) => Math.round(a + (place - start) * (to[i] - a)).toString(16).padStart(2, "0")).join("");
}

// On a light and on a dark page; share is 0 for greedy and 1 for the hottest.
export const colour = share => [blend(LIGHT, share), blend(DARK, share)];
