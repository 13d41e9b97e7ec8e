// The sums of whatif.py, anew whenever a cost is changed. `results` and `costs` are elements of the page.
"use strict";

// Straight lines between the points [tokens, ms], constant beyond.
function target(points, tokens) {
  const after = points.findIndex(([k]) => k >= tokens);
  if (after === 0) return points[0][1];
  if (after < 0) return points[points.length - 1][1];
  const [[a, low], [b, high]] = [points[after - 1], points[after]];
  return low + ((high - low) * (tokens - a)) / (b - a);
}

// Of steps [drafted, accepted, times, by_model]: the speedup, and what a draft may cost before it stops paying.
function modelled(steps, costs) {
  let tokens = 0, rest = 0, drafts = 0;
  for (const [drafted, accepted, times, byModel = drafted > 0] of steps) {
    tokens += (accepted + 1) * times;
    rest += (target(costs.points, drafted + 1) + (drafted ? costs.other : 0)) * times;
    drafts += byModel ? times : 0;
  }
  const plain = tokens * target(costs.points, 1);
  const spent = rest + drafts * costs.draft;
  return { speedup: spent ? plain / spent : null, breakEven: drafts ? (plain - rest) / drafts : null };
}

function shown(value, unit, digits) {
  return value === null ? "-" : value.toFixed(digits) + unit;
}

function refill() {
  const form = document.getElementById("costs");
  if (!form.checkValidity()) return;
  const fields = [...form.querySelectorAll("input")];
  const value = (name) => Number(form.elements[name].value);
  const points = fields.filter((f) => f.dataset.tokens).map((f) => [Number(f.dataset.tokens), Number(f.value)]);
  const costs = { points, draft: value("draft"), other: value("other") };
  const results = JSON.parse(document.getElementById("results").textContent);
  for (const box of document.querySelectorAll("[data-acceptance]")) {
    const { steps, by_task: tasks } = results[box.dataset.acceptance];
    box.querySelector(".note").textContent = "With the costs above.";
    for (const row of box.querySelectorAll("tbody tr")) {
      const mine = steps[row.cells[0].textContent];
      const all = modelled(Object.values(mine).flat(), costs);
      const parts = Object.keys(tasks).map((task) => shown(modelled(mine[task], costs).speedup, "x", 2));
      const cells = [shown(all.speedup, "x", 2), ...parts, shown(all.breakEven, "", 1)];
      cells.forEach((text, at) => { row.cells[at + 1].textContent = text; });
    }
  }
}

if (typeof document !== "undefined") {
  const form = document.getElementById("costs");
  form.hidden = false;
  form.addEventListener("input", refill);
  form.addEventListener("submit", (event) => event.preventDefault());
}
