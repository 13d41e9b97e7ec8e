// What the page's scripts compute, and what they read of a real server: node page_test.mjs FOLDER URL

import assert from "node:assert/strict";
import { pathToFileURL } from "node:url";

const [folder, url] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(`${folder}/${name}`));
const { Events, read, ServerError, stream } = await load("api.mjs");
const { comparison, draftLength, probabilities, sentence, share, Trace, tree } = await load("trace.mjs");
const { bars, line } = await load("charts.mjs");
const tokens = (...texts) => texts.map((text, id) => ({ id, text }));

// a text is shared out whole, whatever its tokens look like alone
const shares = [
  ["a cat sat", ["a", " cat", " sat"], ["a", " cat", " sat"]],
  ["a cat sat", ["a", "cat", "sat"], ["a", " cat", " sat"]],
  ["a ☃!", ["a ", "\ufffd", "\ufffd", "!"], ["a ", "☃", "", "!"]],
  ["☃", ["\ufffd", "\ufffd"], ["☃", ""]],
  ["end", ["end", "<eos>"], ["end", ""]],
  ["", ["\ufffd"], [""]],
  ["held", [], []],
];
for (const [text, told, pieces] of shares) assert.deepEqual(share(text, tokens(...told)), pieces, text);

const drafted = [["a", -1], ["b", 0], ["c", 0], ["d", 2], ["e", -1]].map(([text, parent], id) => ({ id, text, parent }));
const step = { tokens: tokens("a", "c", "x"), drafted, accepted: [0, 2] };
assert.equal(draftLength(drafted), 3);
assert.equal(draftLength([]), 0);
const node = (text, kind) => ({ text, kind });
assert.deepEqual(tree(step), [
  {
    nodes: [node("a", "accepted")],
    next: [
      { nodes: [node("c", "accepted")], next: [
        { nodes: [node("x", "own")], next: [] },
        { nodes: [node("d", "rejected")], next: [] },
      ] },
      { nodes: [node("b", "rejected")], next: [] },
    ],
  },
  { nodes: [node("e", "rejected")], next: [] },
]);
assert.deepEqual(tree({ tokens: tokens("x"), drafted: [], accepted: [] }), [{ nodes: [node("x", "own")], next: [] }]);

const trace = new Trace(0);
trace.add({ text: "o", steps: [{ tokens: tokens("o"), drafted: [], accepted: [], cycles: [3] }], at: 500 });
trace.add({ text: "ac", steps: [{ ...step, cycles: [1, 2, 3] }], at: 1500 });
trace.add({ text: "x", at: 2000 });
assert.equal(trace.text, "oacx");
assert.deepEqual(trace.tokens.map((t) => [t.piece, t.kind, t.step, t.cycles]), [
  ["o", "own", 0, 3], ["a", "accepted", 1, 1], ["c", "accepted", 1, 2], ["x", "own", 1, 3],
]);
assert.deepEqual(trace.figures, {
  tokens: 4, passes: 1, perPass: 3, drafted: 5, accepted: 2, length: 3, wait: 0.5, perSecond: 3, depth: 9 / 4,
});
assert.equal(
  sentence(trace, 1),
  "Step 2 of 2: 5 tokens drafted over 3 positions, 2 accepted, and the target wrote one of its own. Cycles: 1, 2, 3.",
);

const plain = new Trace(0);
[..."oacx"].forEach((text, i) => plain.add({ text, steps: [{ tokens: tokens(text), drafted: [], accepted: [] }], at: 1000 * i }));
assert.deepEqual(comparison(trace, plain), [
  ["Tokens a second without drafts", "1.0"], ["Speed with drafts", "3.00 times"], ["Text without drafts", "the same"],
]);
assert.equal(comparison(plain, plain)[1][1], "nothing was drafted");
const nothing = comparison(trace, new Trace(0)).map(([, value]) => value);
assert.deepEqual(nothing.slice(0, 2), ["–", "–"]);
assert.match(nothing[2], /^another/);

const events = new Events();
assert.deepEqual(events.add('data: {"a"'), []);
assert.deepEqual(events.add(': 1}\n\ndata: [DONE]\n\nda'), ['{"a": 1}', "[DONE]"]);
assert.equal(bars([2, 0], 3), "M0.1 3V1H0.9V3Z");
assert.equal(line([1, 2], 2), "M0.5 1.000L1.5 0.000");

// what it reads of a real server
const { data: [model] } = await read(`${url}/v1/models`);
assert.equal(model.zerodraft.chat, true);
assert.ok(model.max_model_len > 0);
const common = { model: model.id, temperature: 0, max_tokens: 24, stream: true, stream_options: { include_usage: true }, zerodraft: { trace: true } };
const content = "the cat sat on the mat. the cat sat";
const asked = [
  ["chat/completions", { messages: [{ role: "user", content }], logprobs: true, top_logprobs: 3 }],
  ["completions", { prompt: content, logprobs: 3 }],
];
for (const [path, own] of asked) {
  const seen = new Trace(performance.now());
  let timings, usage;
  for await (const event of stream(`${url}/v1/${path}`, { ...common, ...own })) {
    ({ timings, usage } = { timings, usage, ...event });
    const choice = event.choices[0];
    if (!choice) continue;
    const text = choice.delta?.content ?? choice.text ?? "";
    seen.add({ text, steps: event.zerodraft?.trace, logprobs: choice.logprobs, at: performance.now() });
  }
  const { figures } = seen;
  assert.equal(seen.tokens.map((token) => token.piece).join(""), seen.text);
  assert.ok(seen.text.length > 0);
  assert.deepEqual([figures.tokens, figures.accepted], [usage.completion_tokens, timings.draft_n_accepted]);
  // whether drafts pay is measured, so there may be none
  assert.ok(figures.drafted === timings.draft_n && figures.perPass >= 1);
  assert.ok(seen.tokens.every((token) => token.top.length > 0 && token.p > 0 && token.p <= 1));
  assert.ok(seen.steps.every((_, i) => sentence(seen, i).startsWith("Step ")));
}
assert.deepEqual(probabilities(null), []);
const refused = stream(`${url}/v1/completions`, { ...common, prompt: "x", temperature: 9 });
await assert.rejects(refused.next(), (error) => error instanceof ServerError && error.status === 400 && /temperature/.test(error.message));
await assert.rejects(read("http://127.0.0.1:9/"), /cannot be reached/);
console.log("all held");
