// What a trace says of an answer: pure functions on the server's JSON, and no page.

// how far from where it is expected a token's text may stand
const NEAR = 8;

/**
 * Share a text out among its tokens. The pieces joined are the text, whatever a tokenizer makes of a single token: a
 * space before it may be missing, and a part of a character is none.
 */
export function share(text, tokens) {
  const pieces = tokens.map(() => "");
  let at = 0;
  let waits = -1;
  tokens.forEach((token, i) => {
    const known = token.text !== "" && !token.text.includes("\ufffd");
    const from = known ? text.indexOf(token.text, at) : -1;
    if (from < 0 || from - at > NEAR) {
      if (waits < 0) waits = i;
      return;
    }
    pieces[waits < 0 ? i : waits] = text.slice(at, from);
    pieces[i] += token.text;
    at = from + token.text.length;
    waits = -1;
  });
  if (tokens.length) pieces[waits < 0 ? tokens.length - 1 : waits] += text.slice(at);
  return pieces;
}

/** How many positions a draft had: the length of its longest path. */
export function draftLength(drafted) {
  const depths = [];
  for (const { parent } of drafted) depths.push(parent < 0 ? 1 : depths[parent] + 1);
  return Math.max(0, ...depths);
}

/**
 * A step's draft as runs of tokens: a run goes on until its tokens are followed by several, and these begin runs of
 * their own. Each token is "accepted", "rejected" or the target's "own"; what became text comes first.
 */
export function tree({ tokens, drafted, accepted }) {
  const nodes = drafted.map((token, i) => ({
    text: token.text,
    kind: accepted.includes(i) ? "accepted" : "rejected",
    next: [],
  }));
  const roots = [];
  const below = (parent) => (parent < 0 ? roots : nodes[parent].next);
  drafted.forEach(({ parent }, i) => below(parent).push(nodes[i]));
  if (tokens.length > accepted.length) {
    below(accepted.at(-1) ?? -1).push({ text: tokens[accepted.length].text, kind: "own", next: [] });
  }
  const isText = (node) => node.kind !== "rejected";
  const run = (node) => {
    const found = [node];
    while (found.at(-1).next.length === 1) found.push(found.at(-1).next[0]);
    return { nodes: found.map(({ text, kind }) => ({ text, kind })), next: runs(found.at(-1).next) };
  };
  const runs = (all) => [...all.filter(isText), ...all.filter((node) => !isText(node))].map(run);
  return runs(roots);
}

/** A token's log probabilities in a chat's form or a completion's, as probabilities; none if none were asked for. */
export function probabilities(logprobs) {
  const pair = ({ token, logprob }) => ({ text: token, p: Math.exp(logprob) });
  if (logprobs?.content) {
    return logprobs.content.map((entry) => ({ p: Math.exp(entry.logprob), top: entry.top_logprobs.map(pair) }));
  }
  return (logprobs?.token_logprobs ?? []).map((logprob, i) => ({
    p: Math.exp(logprob),
    top: Object.entries(logprobs.top_logprobs[i]).map(([token, value]) => pair({ token, logprob: value })),
  }));
}

/** An answer as it grows: its steps, and its tokens with the step that brought each. */
export class Trace {
  steps = [];
  tokens = [];
  text = "";

  constructor(askedAt) {
    this.askedAt = askedAt;
  }

  /** Take what came with one event, at this time in milliseconds. Returns the new tokens. */
  add({ text = "", steps = [], logprobs = null, at }) {
    this.text += text;
    const told = steps.flatMap((step) => step.tokens);
    const pieces = share(text, told);
    const scores = probabilities(logprobs);
    const added = [];
    for (const step of steps) {
      this.firstAt ??= at;
      this.lastAt = at;
      step.tokens.forEach((token, i) => {
        added.push({
          piece: pieces[added.length],
          text: token.text,
          kind: i < step.accepted.length ? "accepted" : "own",
          step: this.steps.length,
          cycles: step.cycles?.[i] ?? null,
          ...scores[added.length],
        });
      });
      this.steps.push({ ...step, length: draftLength(step.drafted) });
    }
    // what was held back belongs to the token before
    if (text && !told.length && this.tokens.length) this.tokens.at(-1).piece += text;
    this.tokens.push(...added);
    return added;
  }

  /** Steps but the first, which reads the prompt and has no draft. */
  get passes() {
    return this.steps.slice(1);
  }

  /** Tokens a pass, its own one counted, after each pass. */
  get means() {
    let tokens = 0;
    return this.passes.map((step, i) => (tokens += step.tokens.length) / (i + 1));
  }

  /** Numbers of the whole; null where there is none yet. */
  get figures() {
    const sum = (values) => values.reduce((a, b) => a + b, 0);
    const cycles = this.tokens.map((token) => token.cycles).filter((value) => value !== null);
    const seconds = (this.lastAt - this.firstAt) / 1000;
    // the clock begins when the first step's tokens are there
    const timed = this.tokens.length - (this.steps[0]?.tokens.length ?? 0);
    return {
      tokens: this.tokens.length,
      passes: this.passes.length,
      perPass: this.means.at(-1) ?? null,
      drafted: sum(this.steps.map((step) => step.drafted.length)),
      accepted: sum(this.steps.map((step) => step.accepted.length)),
      length: this.passes.length ? sum(this.passes.map((step) => step.length)) / this.passes.length : null,
      wait: this.firstAt === undefined ? null : (this.firstAt - this.askedAt) / 1000,
      perSecond: seconds > 0 ? timed / seconds : null,
      depth: cycles.length ? sum(cycles) / cycles.length : null,
    };
  }
}

/** What drafts gained over the same answer by plain decoding: its speed, the ratio of both, and whose text it is. */
export function comparison(trace, plain) {
  const [fast, slow] = [trace.figures.perSecond, plain.figures.perSecond];
  const ratio = fast && slow ? `${(fast / slow).toFixed(2)} times` : "–";
  // two plain runs differ by chance alone
  const gain = trace.steps.some((step) => step.drafted.length) ? ratio : "nothing was drafted";
  const same = plain.text === trace.text ? "the same" : "another, as two tokens were almost equally probable";
  return [
    ["Tokens a second without drafts", slow ? slow.toFixed(1) : "–"],
    ["Speed with drafts", gain],
    ["Text without drafts", same],
  ];
}

/** One sentence about a step, counted from 0. */
export function sentence(trace, index) {
  const step = trace.steps[index];
  const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
  const own = step.tokens.length > step.accepted.length;
  const begin = `Step ${index + 1} of ${trace.steps.length}`;
  const cycles = step.cycles ? ` Cycles: ${step.cycles.join(", ")}.` : "";
  if (index === 0) return `${begin} read the prompt and wrote the first token.${cycles}`;
  if (!step.drafted.length) return `${begin} had no draft; the target wrote ${count(step.tokens.length, "token")}.${cycles}`;
  const draft = `${count(step.drafted.length, "token")} drafted over ${count(step.length, "position")}`;
  const end = own ? " and the target wrote one of its own" : " and the text ended";
  return `${begin}: ${draft}, ${step.accepted.length} accepted,${end}.${cycles}`;
}
