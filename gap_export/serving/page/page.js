// The page of `gap-export serve`: one image, some expressions, and what the model answers with its
// original position ids (GAP) and with renumbered ones (compact), side by side.

const MAX_SHOWN_PX = 1600;
const TYPING_MS = 600;
const NAMES = { gap: "GAP", compact: "Compact" };
const REQUEST_STAGES = { decode: "read the image", wait: "wait in line", run: "run the model" };

const $ = (id) => document.getElementById(id);
const make = (tag, className, text = "") => {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
};

// The API key lives here alone, and goes with the page.
let key = "";
let models = [];
// { blob, bitmap, truth: Map of expression to box }; the bitmap is null where this browser cannot read it.
let frame = null;
// Of the frame: { gap: {...}, compact: {...} }, each an answer with `round`, its milliseconds from here.
let answers = {};
let picked = null;
let asking = null;
let stream = null;
let nextExample = 0;
let exampleText = "";
let lastTyped = -TYPING_MS;

// ---- Asking the server

class Problem extends Error {
  constructor(detail, status, retryAfter) {
    super(detail);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function request(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (err) {
    if (err.name === "AbortError") throw err;
    throw new Problem("The server does not answer.");
  }
  if (answer.ok) return answer.json();
  const body = await answer.json().catch(() => ({}));
  if (answer.status === 401) askForKey();
  const detail = body.detail ?? `${answer.status} ${answer.statusText}`;
  throw new Problem(detail, answer.status, Number(answer.headers.get("Retry-After")));
}

async function ground(blob, expressions, positions, signal) {
  const form = new FormData();
  form.append("image", blob, "image");
  for (const one of expressions) form.append("expressions", one);
  form.append("positions", positions);
  form.append("kept_tokens", "true");
  form.append("model", $("model").value);
  const started = performance.now();
  const answer = await request("v1/ground", { method: "POST", body: form, signal });
  return { ...answer, round: performance.now() - started };
}

// Ask about a frame, then show it with its answers; a newer question ends an older one.
async function ask(of, expressions) {
  asking?.abort();
  const mine = (asking = new AbortController());
  const modes = $("compare").checked ? ["gap", "compact"] : ["gap"];
  const results = await Promise.allSettled(
    modes.map((positions) => ground(of.blob, expressions, positions, mine.signal)),
  );
  if (mine.signal.aborted) return null;
  asking = null;
  const problems = results.filter((one) => one.status === "rejected").map((one) => one.reason);
  frame = of;
  answers = {};
  modes.forEach((positions, at) => (answers[positions] = results[at].value));
  showProblems(problems);
  draw();
  return problems;
}

const expressionsTyped = () =>
  $("expressions").value.split("\n").map((one) => one.trim()).filter(Boolean);

// What the button, Ctrl + Enter, a new image and the switches do.
async function askNow({ isForced = false } = {}) {
  const expressions = expressionsTyped();
  if (stream) return;
  if (!frame || !expressions.length) {
    if (!isForced) return;
    say(frame ? "Type what to look for." : "Choose an image first.");
    $(frame ? "expressions" : "file").focus();
    return;
  }
  say("Looking …");
  const problems = await ask(frame, expressions);
  if (!problems) return;
  say(answers.gap ? summary() : "");
  // On a phone the answer is below the question.
  if ($("status").getBoundingClientRect().top > 0.7 * innerHeight) $("status").scrollIntoView();
}

// ---- Images: a file, an example, the camera

async function useBlob(blob, name, truth = new Map()) {
  stopCamera();
  asking?.abort();
  const bitmap = await createImageBitmap(blob).catch(() => null);
  frame = { blob, bitmap, truth };
  answers = {};
  $("source").textContent = bitmap ? name : `${name} (this browser cannot show it)`;
  showProblems([]);
  draw();
  say(expressionsTyped().length ? "" : "Now type what to look for.");
  await askNow();
}

async function showExample() {
  const example = await request(`v1/examples/${nextExample}`);
  nextExample += 1;
  const bytes = Uint8Array.from(atob(example.image), (one) => one.charCodeAt(0));
  // What somebody typed stays.
  if ([exampleText, ""].includes($("expressions").value.trim())) {
    exampleText = example.expressions.join("\n");
    $("expressions").value = exampleText;
  }
  const truth = new Map(example.expressions.map((one, at) => [one, example.boxes[at]]));
  await useBlob(new Blob([bytes], { type: "image/png" }), `example ${nextExample}`, truth);
}

async function startCamera() {
  if (!navigator.mediaDevices) throw new Problem("Browsers lend a camera to https and localhost alone.");
  const wanted = { video: { facingMode: "environment", width: { ideal: 1280 } } };
  stream = await navigator.mediaDevices.getUserMedia(wanted).catch((err) => {
    throw new Problem(`The camera cannot be used: ${err.message}`);
  });
  $("camera").setAttribute("aria-pressed", "true");
  $("camera").textContent = "Stop the camera";
  $("source").textContent = "camera";
  // A line for each frame is too much to be read out.
  $("status").setAttribute("aria-live", "off");
  const video = document.createElement("video");
  video.muted = video.playsInline = true;
  video.srcObject = stream;
  await video.play();
  await watch(video, stream);
}

function stopCamera() {
  if (!stream) return;
  for (const track of stream.getTracks()) track.stop();
  stream = null;
  $("camera").setAttribute("aria-pressed", "false");
  $("camera").textContent = "Use the camera";
  $("source").textContent = "the camera's last frame";
  $("status").removeAttribute("aria-live");
}

// One frame after the other, each shown together with its own answers.
async function watch(video, mine) {
  let expressions = [];
  while (stream === mine) {
    const started = performance.now();
    if (document.hidden) {
      await sleep(200);
      continue;
    }
    if (started - lastTyped > TYPING_MS) expressions = expressionsTyped();
    const grabbed = await grab(video);
    if (stream !== mine) return;
    let problems = [];
    if (expressions.length) {
      problems = (await ask(grabbed, expressions)) ?? [];
    } else {
      frame = grabbed;
      answers = {};
      draw();
    }
    if (stream !== mine) return;
    const isBusy = problems.some((one) => [429, 503, 504].includes(one.status));
    if (problems.length && !isBusy && !answers.gap) {
      stopCamera();
      say("The camera was stopped.");
      return;
    }
    await sleep(isBusy ? 1000 * (problems[0].retryAfter || 1) : 15);
    const rate = 1000 / (performance.now() - started);
    say(`${rate.toFixed(1)} frames a second. ${expressions.length ? summary() : "Type what to look for."}`);
  }
}

async function grab(video) {
  const bitmap = await createImageBitmap(video);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  return { blob, bitmap, truth: new Map() };
}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

// ---- Showing

function draw() {
  const isCompared = $("compare").checked;
  $("compact").hidden = !isCompared;
  $("panes").classList.toggle("alone", !isCompared);
  const expressions = (answers.gap ?? answers.compact)?.groundings ?? [];
  if (picked !== null && picked >= expressions.length) picked = null;
  const names = isCompared ? ["gap", "compact"] : ["gap"];
  for (const name of names) drawPane($(name), answers[name]);
  drawFound(names);
  const hasTruth = expressions.some((one) => frame.truth.has(one.expression));
  const isTokens = $("tokens").checked && expressions.length > 0;
  $("legend-tokens").hidden = !isTokens;
  $("legend-truth").hidden = !hasTruth;
  $("legend-gap").hidden = hasTruth || !(answers.gap && answers.compact && isCompared);
  drawTimings();
}

function drawPane(pane, answer) {
  const groundings = answer?.groundings ?? [];
  const size = groundings[0]?.image_size ?? [frame?.bitmap?.width ?? 4, frame?.bitmap?.height ?? 3];
  pane.querySelector(".frame").style.setProperty("--ratio", size[0] / size[1]);
  drawImage(pane.querySelector("canvas"), groundings);
  drawTokens(pane.querySelector("svg"), $("tokens").checked ? groundings[picked ?? 0] : undefined);
  const truths = groundings.flatMap((one, at) => {
    const truth = frame.truth.get(one.expression);
    return truth ? [makeBox(truth, size, `true ${fade(at)}`)] : [];
  });
  const tagged = [];
  const boxes = groundings.flatMap((one, at) =>
    boxesOf(one).map(({ box, found }) => {
      const made = makeBox(box, size, `c${at % 8} ${fade(at)} ${found === false ? "absent" : ""}`);
      const corner = [box[0] / size[0], box[1] / size[1]];
      const isOnly = groundings.length === 1 || picked === at;
      made.append(makeTag(isOnly ? `${at + 1} ${one.expression}` : `${at + 1}`, corner, tagged));
      return made;
    }),
  );
  pane.querySelector(".boxes").replaceChildren(...truths, ...boxes);
}

const boxesOf = (one) => (one.boxes?.length ? one.boxes : one.box ? [one] : []);
const fade = (at) => (picked === null || picked === at ? "" : "faint");

function drawImage(canvas, groundings) {
  const bitmap = frame?.bitmap;
  const scale = bitmap ? Math.min(1, MAX_SHOWN_PX / Math.max(bitmap.width, bitmap.height)) : 1;
  canvas.width = Math.max(1, Math.round((bitmap?.width ?? 1) * scale));
  canvas.height = Math.max(1, Math.round((bitmap?.height ?? 1) * scale));
  canvas.classList.toggle("small", canvas.width < 300);
  if (bitmap) canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const words = groundings.map((one, at) => `${at + 1}: ${one.expression}, ${describe(one)}`);
  const shown = frame && !bitmap ? "This browser cannot show the image" : "The image";
  canvas.setAttribute("aria-label", `${shown}. ${words.join(". ") || "No answer yet"}`);
}

// Darkens what was pruned; of an image in tiles, both grids darken it by half.
function drawTokens(svg, grounding) {
  svg.replaceChildren();
  if (!grounding) return;
  svg.setAttribute("viewBox", `0 0 ${grounding.image_size.join(" ")}`);
  for (const { rows, cols, frame: [left, top, width, height], kept } of grounding.tokens) {
    const [w, h, seen] = [width / cols, height / rows, new Set(kept)];
    let d = "";
    for (let at = 0; at < rows * cols; at += 1) {
      if (seen.has(at)) continue;
      d += `M${left + (at % cols) * w} ${top + Math.floor(at / cols) * h}h${w}v${h}h${-w}z`;
    }
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", d);
    path.classList.toggle("half", grounding.tokens.length > 1);
    svg.append(path);
  }
}

function makeBox([x1, y1, x2, y2], [width, height], className) {
  const box = make("div", `box ${className}`);
  const percent = (part, whole) => `${(100 * part) / whole}%`;
  box.style.left = percent(x1, width);
  box.style.top = percent(y1, height);
  box.style.width = percent(x2 - x1, width);
  box.style.height = percent(y2 - y1, height);
  return box;
}

// Tags of boxes that begin at one place stand side by side.
function makeTag(text, [x, y], tagged) {
  const tag = make("span", "tag", text);
  const isRight = x > 0.55;
  const before = tagged.filter((one) => Math.abs(one[0] - x) < 0.12 && Math.abs(one[1] - y) < 0.06).length;
  tagged.push([x, y]);
  tag.classList.toggle("inside", y < 0.1);
  tag.style[isRight ? "right" : "left"] = `${24 * before - 3}px`;
  if (isRight) tag.style.left = "auto";
  return tag;
}

// One line for each expression, with both answers.
function drawFound(names) {
  const shown = names.filter((name) => answers[name]);
  const first = answers[shown[0]]?.groundings ?? [];
  const lines = first.map(({ expression }, at) => {
    const line = document.createElement("li");
    const pick = make("button", `pick c${at % 8}`);
    pick.type = "button";
    pick.dataset.at = at;
    pick.setAttribute("aria-pressed", picked === at);
    pick.append(make("span", "number", at + 1), make("span", "words", expression));
    const warnings = new Map();
    for (const name of shown) {
      const one = answers[name].groundings[at];
      const cell = make("span", "answer");
      cell.append(make("span", "name", NAMES[name]), ` ${describe(one)}${compare(one, at, name)}`);
      pick.append(cell);
      for (const warning of one.warnings) {
        warnings.set(warning, [...(warnings.get(warning) ?? []), NAMES[name]]);
      }
    }
    for (const [warning, of] of warnings) {
      const whose = of.length < shown.length ? `${of[0]}: ` : "";
      pick.append(make("span", "warning", whose + warning));
    }
    line.append(pick);
    return line;
  });
  $("found").replaceChildren(...lines);
}

function compare(one, at, name) {
  const truth = frame.truth.get(one.expression);
  const other = truth ?? (name === "compact" ? answers.gap?.groundings[at].box : null);
  return one.box && other ? ` · IoU\u00a0${iou(one.box, other).toFixed(2)}` : "";
}

function describe(one) {
  const verdict = { true: "there · ", false: "not there · " }[one.found] ?? "";
  if (!one.box) return `${verdict}no box; the model said: ${one.text}`;
  const score = typeof one.score === "number" ? ` · score\u00a0${one.score.toPrecision(2)}` : "";
  const more = boxesOf(one).length > 1 ? ` and ${boxesOf(one).length - 1} more` : "";
  return `${verdict}${one.box.map((side) => Math.round(side)).join(",\u00a0")}\u00a0px${score}${more}`;
}

function iou(a, b) {
  const side = (low, high) => Math.max(0, Math.min(a[high], b[high]) - Math.max(a[low], b[low]));
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  const shared = side(0, 2) * side(1, 3);
  return shared / (area(a) + area(b) - shared) || 0;
}

function drawTimings() {
  const both = [answers.gap, answers.compact];
  const first = answers.gap ?? answers.compact;
  $("timings").hidden = !first;
  if (!first) return;
  const row = (label, value, className = "") => {
    const made = make("tr", className);
    const head = make("th", "", label);
    head.scope = "row";
    made.append(head);
    for (const answer of both) made.append(make("td", "", (answer && value(answer)?.toFixed(1)) ?? "–"));
    return made;
  };
  const rows = [];
  for (const [stage, label] of Object.entries(REQUEST_STAGES)) {
    rows.push(row(label, (answer) => answer.timings_ms[stage]));
  }
  // A stage whose result was still kept from another question is in one of them alone.
  const stages = both.flatMap((answer) => Object.keys(answer?.groundings[0].timings_ms ?? {}));
  const order = [...new Set(stages)].filter((stage) => stage !== "total");
  for (const stage of order) {
    rows.push(row(stage.replaceAll("_", " "), (answer) => answer.groundings[0].timings_ms[stage], "part"));
  }
  rows.push(row("in the server", (answer) => answer.timings_ms.total, "sum"));
  rows.push(row("from this browser and back", (answer) => answer.round, "sum"));
  $("timings").tBodies[0].replaceChildren(...rows);
}

function summary() {
  const first = answers.gap ?? answers.compact;
  if (!first) return "";
  const there = first.groundings.filter((one) => one.box && one.found !== false).length;
  const verb = first.groundings.some((one) => one.found !== null) ? "are there" : "have a box";
  const { kept, all } = tokensOf(first.groundings[picked ?? 0]);
  return `${there} of ${first.groundings.length} ${verb}. The model saw ${kept} of ${all} visual tokens.`;
}

const tokensOf = (one) => ({ kept: one.keep_indices.length, all: one.num_visual_tokens });

function say(text) {
  $("status").textContent = text;
}

function showProblems(problems) {
  const texts = new Set(problems.map((one) => one.message));
  $("problem").hidden = !texts.size;
  $("problem").textContent = [...texts].join("\n");
}

// ---- Models and keys

async function loadModels() {
  models = (await request("v1/models")).data;
  $("key-form").hidden = true;
  $("model").replaceChildren(...models.map((one) => new Option(one.id, one.id)));
  $("model-field").hidden = models.length < 2;
  describeModel();
}

function describeModel() {
  const chosen = models.find((one) => one.id === $("model").value)?.gap_export;
  if (!chosen) return;
  const { num_kept_tokens: kept, num_visual_tokens: all } = chosen;
  const note = kept < all ? "" : "; nothing is pruned, so GAP and compact ids are the same";
  $("about").textContent = `${chosen.model}: the pruner ${chosen.pruner} keeps ${kept} of ${all} visual tokens${note}`;
}

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

// ---- What the user does

const reported = (action) => async (event) => {
  event?.preventDefault();
  try {
    await action(event);
  } catch (err) {
    if (err.name === "AbortError") return;
    if (!(err instanceof Problem)) throw err;
    showProblems([err]);
    say("");
  }
};

const useFile = async (files) => {
  const file = files[0];
  if (!file) throw new Problem("That is no file; save the image first.");
  await useBlob(file, file.name);
};

$("question").addEventListener("submit", reported(() => {
  lastTyped = -TYPING_MS;
  return askNow({ isForced: true });
}));
$("expressions").addEventListener("input", () => (lastTyped = performance.now()));
$("expressions").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("question").requestSubmit();
});
$("file").addEventListener("change", reported(async () => {
  const files = [...$("file").files];
  // The same file may be chosen again.
  $("file").value = "";
  if (files.length) await useFile(files);
}));
$("example").addEventListener("click", reported(showExample));
$("camera").addEventListener("click", reported(() => (stream ? stopCamera() : startCamera())));
$("compare").addEventListener("change", () => {
  draw();
  if (frame && $("compare").checked) reported(askNow)();
});
$("tokens").addEventListener("change", draw);
$("model").addEventListener("change", reported(async () => {
  describeModel();
  await askNow();
}));
$("found").addEventListener("click", (event) => {
  const pick = event.target.closest(".pick");
  if (!pick) return;
  const at = Number(pick.dataset.at);
  picked = picked === at ? null : at;
  draw();
  $("found").querySelector(`[data-at="${at}"]`)?.focus();
});
$("key-form").addEventListener("submit", reported(async () => {
  key = $("key").value.trim();
  $("key").value = "";
  showProblems([]);
  await loadModels();
}));
for (const kind of ["dragenter", "dragover"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
}
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", reported(async (event) => {
  document.body.classList.remove("dragging");
  await useFile(event.dataTransfer.files);
}));
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) reported(() => useFile(event.clipboardData.files))(event);
});
addEventListener("pagehide", stopCamera);

reported(loadModels)();
