// The page: what the person does, what the server answers, and what is shown of it.

import { read, ServerError, stream } from "./api.mjs";
import { bars, chart, line } from "./charts.mjs";
import { comparison, sentence, Trace, tree } from "./trace.mjs";

const at = (id) => document.getElementById(id);
const DEEPEST = 8;
// pictures are drawn this often while an answer comes, in milliseconds
const PAUSE = 150;

let model = null;
let key = "";
let talk = [];
// the answer that is being written, and the one whose steps are shown
let running = null;
let shown = null;

const make = (tag, className, text = "") => {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
};
const number = (value, digits = 1) => (value === null ? "–" : value.toFixed(digits));
const percent = (p) => `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
const depthClass = (cycles) => `d${Math.min(cycles, DEEPEST)}`;
const chats = () => at("mode-chat").checked;

// -- the server ---------------------------------------------------------------------------------------------------

async function meet() {
  say("");
  try {
    const { data } = await read("v1/models", key);
    model = data[0];
  } catch (error) {
    at("key-form").hidden = error.status !== 401;
    if (error.status === 401) at("key").focus();
    at("model").textContent = error.status === 401 ? "This server asks for a key." : "";
    say(error instanceof ServerError ? error.message : String(error));
    return;
  }
  const { chat, cycles, exit_rule: rule } = model.zerodraft;
  at("key-form").hidden = true;
  const exits = rule === "off" ? "" : `, exit rule ${rule}`;
  const looped = cycles ? `, a looped model of ${cycles} cycles${exits}` : "";
  at("model").textContent = `${model.id}${looped}; prompt and answer have room for ${model.max_model_len} tokens`;
  at("max-tokens").value = Math.min(256, Math.floor(model.max_model_len / 2));
  at("no-chat").hidden = chat;
  at("mode-chat").disabled = !chat;
  at("mode-text").checked ||= !chat;
  at("colours").hidden = !cycles;
  choose();
  at("send").disabled = false;
}

function request(text) {
  const given = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  const scored = at("scored").checked;
  const common = {
    model: model.id,
    temperature: given("temperature"),
    max_tokens: given("max-tokens"),
    // known, so that the answer can be written once more
    seed: Math.floor(Math.random() * 2 ** 31),
    stream: true,
    stream_options: { include_usage: true },
    zerodraft: { trace: true },
  };
  if (!chats()) return ["v1/completions", { ...common, prompt: text, ...(scored && { logprobs: 5 }) }];
  const system = at("system").value ? [{ role: "system", content: at("system").value }] : [];
  const messages = [...system, ...talk, { role: "user", content: text }];
  return ["v1/chat/completions", { ...common, messages, ...(scored && { logprobs: true, top_logprobs: 5 }) }];
}

/** Hands on what the server tells until it is over; returns why it is, and nothing if nobody is interested any more. */
async function receive(run, [path, body], take) {
  running = run;
  busy(true);
  say("");
  let why = "";
  try {
    for await (const event of stream(path, body, { key, signal: run.stop.signal })) {
      take(event);
      why = event.choices[0]?.finish_reason ?? why;
    }
  } catch (error) {
    why = error.name === "AbortError" ? "stopped" : "error";
    // a cleared conversation has nothing to say any more
    if (why === "error" && running === run) say(error instanceof ServerError ? error.message : String(error));
    if (error.status === 401) at("key-form").hidden = false;
  }
  if (running !== run) return null;
  running = null;
  busy(false);
  return why;
}

async function answer(text) {
  const asked = request(text);
  const view = { asked, trace: new Trace(performance.now()), step: null, stop: new AbortController(), usage: null };
  const user = message(chats() ? "You" : "Text", text);
  Object.assign(view, answerOf(view));
  show(view);
  const why = await receive(view, asked, (event) => take(view, event));
  if (why === null) return;
  view.whole = why === "stop" || why === "length";
  if (!view.trace.tokens.length) {
    // nothing was said: the text goes back to where it was written
    for (const element of [user, view.element]) element.remove();
    at("text").value ||= text;
    show(null);
    return;
  }
  if (chats()) talk.push({ role: "user", content: text }, { role: "assistant", content: view.trace.text });
  const { tokens, perSecond } = view.trace.figures;
  const ends = { stop: "The model ended here.", length: "The limit of tokens ended it here.", stopped: "You stopped it here." };
  view.end.textContent = ends[why] ?? `It ended here (${why}).`;
  at("status").textContent = `Answer of ${tokens} tokens, ${number(perSecond)} tokens a second.`;
  refresh(view);
}

/** Writes the shown answer once more, without drafts. */
async function compare(view) {
  const [path, body] = view.asked;
  const plain = new Trace(performance.now());
  const again = { ...body, max_tokens: view.trace.tokens.length, zerodraft: { trace: true, drafts: false } };
  const why = await receive({ stop: new AbortController() }, [path, again], (event) => plain.add(told(event)));
  if (why === "stop" || why === "length") {
    view.plain = plain;
    at("status").textContent = comparison(view.trace, plain).map((said) => said.join(": ")).join(". ");
  }
  if (shown === view) refresh(view);
}

/** What an event tells of an answer. */
function told(event) {
  const choice = event.choices[0];
  const text = choice?.delta?.content ?? choice?.text ?? "";
  return { text, steps: event.zerodraft?.trace, logprobs: choice?.logprobs, at: performance.now() };
}

function take(view, event) {
  view.usage = event.usage ?? view.usage;
  if (!event.choices.length) return;
  const last = view.trace.tokens.at(-1);
  const added = view.trace.add(told(event));
  if (last && !added.length) view.words.lastChild.textContent = last.piece;
  const end = nearEnd();
  view.words.append(...added.map((token) => span(view, token)));
  if (end) at("messages").scrollTop = at("messages").scrollHeight;
  view.late ??= setTimeout(() => refresh(view), PAUSE);
}

// -- the conversation ---------------------------------------------------------------------------------------------

function message(who, text) {
  const element = make("article", "message");
  element.append(make("h2", "who", who), make("p", "words", text));
  at("messages").append(element);
  at("messages").scrollTop = at("messages").scrollHeight;
  return element;
}

function answerOf(view) {
  const element = message("Model", "");
  element.classList.add("answer");
  const [words, foot] = [element.querySelector(".words"), make("p", "foot")];
  const [end, button] = [make("span", "end"), make("button", "", "Show its steps")];
  button.type = "button";
  button.addEventListener("click", () => show(view));
  foot.append(end, button);
  element.append(foot);
  words.addEventListener("click", (event) => {
    const found = event.target.closest(".token");
    if (found) pick(view, Number(found.dataset.step));
  });
  return { element, words, end, button };
}

function span(view, token) {
  const parity = token.step % 2 ? "odd" : "even";
  const element = make("span", `token ${token.kind} ${parity}`, token.piece);
  if (token.cycles) element.classList.add(depthClass(token.cycles));
  element.dataset.step = token.step;
  const how = token.kind === "own" ? "written by the target" : "accepted from the draft";
  const depth = token.cycles ? `, ${token.cycles} cycles` : "";
  const others = token.top ? `\n${percent(token.p)}; ${candidates(token)}` : "";
  element.title = `Step ${token.step + 1}: ${how}${depth}${others}`;
  return element;
}

const candidates = (token) => token.top.map(({ text, p }) => `“${visible(text)}” ${percent(p)}`).join(", ");

function nearEnd() {
  const box = at("messages");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 40;
}

// -- how the text came to be --------------------------------------------------------------------------------------

const pickShown = (place) => shown && pick(shown, place);
const charts = {
  drafts: chart("Draft of each step: its length, and what was accepted", ["drafted", "accepted", "picked"], pickShown),
  passes: chart("Tokens of each pass, and their mean so far", ["brought", "mean"], (place) => pickShown(place + 1)),
  depths: chart("Cycles of each token", ["d1", "d2", "d3", "d4", "d5", "d6", "d7", "d8"], (place) => {
    if (shown?.trace.tokens[place]) pick(shown, shown.trace.tokens[place].step);
  }),
};

function show(view) {
  shown = view;
  at("seen").hidden = !view;
  at("nothing").hidden = Boolean(view);
  for (const element of document.querySelectorAll(".answer")) element.classList.toggle("shown", element === view?.element);
  if (view) refresh(view);
}

function pick(view, step) {
  view.step = Math.max(0, Math.min(step, view.trace.steps.length - 1));
  if (shown === view) refresh(view);
  else show(view);
}

function refresh(view) {
  clearTimeout(view.late);
  view.late = null;
  if (view !== shown) return;
  const { trace, usage } = view;
  const figures = trace.figures;
  const rows = [
    ["Tokens", figures.tokens],
    ["Tokens a second", number(figures.perSecond)],
    ["Tokens a pass", number(figures.perPass, 2)],
    ["Accepted of drafted", `${figures.accepted} of ${figures.drafted}`],
    ["Mean draft length", number(figures.length)],
    ["Seconds to the first token", number(figures.wait, 2)],
    ["Prompt tokens", usage ? usage.prompt_tokens : "–"],
    ["Of these kept from before", usage ? usage.prompt_tokens_details.cached_tokens : "–"],
  ];
  if (figures.depth !== null) rows.splice(3, 0, ["Mean cycles", number(figures.depth, 2)]);
  if (view.plain) rows.splice(2, 0, ...comparison(trace, view.plain));
  offer();
  at("figures").replaceChildren(
    ...rows.map(([name, value]) => {
      const row = make("div", "");
      row.append(make("dt", "", name), make("dd", "", value));
      return row;
    }),
  );
  draw(trace, view.step);
  explain(view);
}

function draw(trace, picked) {
  const lengths = trace.steps.map((step) => step.length);
  const accepted = trace.steps.map((step) => step.accepted.length);
  const longest = Math.max(4, ...lengths);
  const marked = bars(lengths.map((_, i) => (i === picked ? longest : 0)), longest);
  const drafts = { picked: marked, drafted: bars(lengths, longest), accepted: bars(accepted, longest) };
  charts.drafts.draw(drafts, longest, lengths.length, "step");
  const brought = trace.passes.map((step) => step.tokens.length);
  const most = Math.max(4, ...brought);
  charts.passes.draw({ brought: bars(brought, most), mean: line(trace.means, most) }, most, brought.length, "pass");
  const cycles = trace.tokens.map((token) => token.cycles ?? 0);
  const deepest = model.zerodraft.cycles ?? 1;
  const series = {};
  for (let d = 1; d <= DEEPEST; d++) series[`d${d}`] = bars(cycles, deepest, (i) => Math.min(cycles[i], DEEPEST) === d);
  charts.depths.draw(series, deepest, cycles.length, "token");
  charts.depths.figure.hidden = !model.zerodraft.cycles;
}

function explain(view) {
  const { trace } = view;
  const count = trace.steps.length;
  const step = view.step ?? count - 1;
  at("step").max = Math.max(count, 1);
  at("step").value = step + 1;
  at("before").disabled = step <= 0;
  at("after").disabled = step >= count - 1;
  for (const element of document.querySelectorAll(".token.picked")) element.classList.remove("picked");
  at("step-said").textContent = count ? sentence(trace, step) : "Waiting for the first token.";
  at("step").setAttribute("aria-valuetext", at("step-said").textContent);
  if (!count) {
    at("tree").replaceChildren();
    at("candidates").replaceChildren();
    return;
  }
  if (view.step !== null) {
    for (const element of view.words.querySelectorAll(`[data-step="${step}"]`)) element.classList.add("picked");
  }
  const drawn = tree(trace.steps[step]);
  at("tree").replaceChildren(...(drawn.length ? [listed(drawn)] : []));
  const scored = trace.tokens.filter((token) => token.step === step && token.top);
  const lines = scored.map((token) => make("li", "", `“${visible(token.text)}” ${percent(token.p)}: ${candidates(token)}`));
  const list = make("ul", "");
  list.append(...lines);
  at("candidates").replaceChildren(...(lines.length ? [make("h3", "", "Most probable at each place"), list] : []));
}

function listed(runs) {
  const list = make("ul", "tree");
  for (const run of runs) {
    const item = make("li", "");
    let kind = "";
    for (const node of run.nodes) {
      if (node.kind !== kind) item.append(make("span", "unseen", ` ${node.kind}: `));
      kind = node.kind;
      item.append(make("span", `token ${kind}`, visible(node.text)));
    }
    if (run.next.length) item.append(listed(run.next));
    list.append(item);
  }
  return list;
}

// -- what the person does -----------------------------------------------------------------------------------------

function say(problem) {
  at("problem").textContent = problem;
}

function busy(is) {
  at("send").disabled = is;
  at("stop").disabled = !is;
  offer();
  if (is) at("status").textContent = "The model writes.";
}

/** A comparison, where there is a whole answer that has none. */
function offer() {
  at("compare").disabled = Boolean(running) || !shown?.whole || Boolean(shown.plain);
}

function choose() {
  at("system-row").hidden = !chats();
  at("text-label").textContent = chats() ? "Your message" : "Text to continue";
  const byDepth = at("colour-depth").checked && Boolean(model?.zerodraft.cycles);
  at("messages").className = byDepth ? "by-depth" : "by-step";
  const depths = Array.from({ length: model?.zerodraft.cycles ?? 0 }, (_, i) => i + 1);
  const meanings = byDepth
    ? depths.map((d) => [`token ${depthClass(d)}`, `${d} cycle${d > 1 ? "s" : ""}`])
    : [
        ["token accepted even", "accepted from a draft"],
        ["token own even", "written by the target"],
        ["token rejected", "drafted and rejected"],
      ];
  at("legend").replaceChildren(
    ...meanings.map(([className, meaning]) => {
      const item = make("li", "");
      item.append(make("span", className, meaning));
      return item;
    }),
  );
  at("legend").className = byDepth ? "legend by-depth" : "legend by-step";
}

function send() {
  const text = at("text").value;
  if (running || !model || !text) return;
  at("text").value = "";
  answer(text);
}

function clear() {
  const view = running;
  running = null;
  view?.stop.abort();
  talk = [];
  at("messages").replaceChildren();
  at("status").textContent = "The conversation is cleared.";
  say("");
  show(null);
  at("send").disabled = !model;
  at("stop").disabled = true;
  at("text").focus();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value;
  meet();
});
at("text").addEventListener("keydown", (event) => {
  // while characters are being composed, Enter chooses one of them
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.stop.abort();
});
at("stop").addEventListener("click", () => {
  running?.stop.abort();
  at("text").focus();
});
at("clear").addEventListener("click", clear);
at("compare").addEventListener("click", () => compare(shown));
for (const id of ["mode-chat", "mode-text", "colour-step", "colour-depth"]) at(id).addEventListener("change", choose);
at("step").addEventListener("input", () => pickShown(Number(at("step").value) - 1));
for (const [id, by] of [["before", -1], ["after", 1]]) {
  at(id).addEventListener("click", () => pickShown(Number(at("step").value) - 1 + by));
}
at("charts").append(...Object.values(charts).map(({ figure }) => figure));
meet();
