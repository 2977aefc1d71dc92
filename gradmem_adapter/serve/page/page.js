// The page of `gradmem serve`. It has nothing but the API that everybody has; /openapi.json describes it.

const KEY = "gradmem-key";
const $ = (id) => document.getElementById(id);
let model = null; // what /v1/models says of it
let current = null; // the memory that is shown, with `chars`: its text, a list of characters as the API counts them
const running = {}; // what can be cancelled, by its name

// ---------------------------------------------------------------- the API

async function call(path, { method = "GET", body, signal } = {}) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  if (response.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  const { error } = await response.json().catch(() => ({}));
  const told = error?.message ?? `The server answered with status ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  throw new Error(wait ? `${told.replace(/ Try again later\.$/, "")} Try again in ${wait} s.` : told);
}

const get = async (path) => (await call(path)).json();

async function* events(path, body, signal) {
  const response = await call(path, { method: "POST", body: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection ended before the answer was complete.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((one) => one.startsWith("data: "))) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// Work of one name at a time: what is new cancels what was. Errors are shown.
async function attempt(name, work) {
  running[name]?.abort();
  const own = (running[name] = new AbortController());
  $("error").hidden = true;
  try {
    await work(own.signal);
  } catch (error) {
    if (own.signal.aborted) return;
    console.error(error);
    $("error").textContent = error instanceof TypeError ? "The server cannot be reached. Is it still running?" : error.message;
    $("error").hidden = false;
  } finally {
    if (running[name] === own) delete running[name];
  }
}

// ---------------------------------------------------------------- what is shown

const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const rounded = (n, digits) => n.toLocaleString("en", { maximumSignificantDigits: digits });
const nameOf = (memory) => memory.name ?? (memory.id.startsWith("mem_") ? `Memory ${memory.id.slice(4, 12)}` : memory.id);

function size(bytes) {
  const unit = bytes < 1e3 ? 0 : bytes < 1e6 ? 1 : bytes < 1e9 ? 2 : 3;
  return `${rounded(bytes / 1e3 ** unit, 3)} ${["bytes", "kB", "MB", "GB"][unit]}`;
}

function make(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function show(memory) {
  const other = memory?.id !== current?.id;
  current = memory;
  $("write").hidden = memory !== null;
  $("memory").hidden = memory === null;
  for (const button of document.querySelectorAll("#memories [data-id]"))
    button.setAttribute("aria-current", String(button.dataset.id === memory?.id));
  if (memory === null) return $("text").focus();
  $("title").textContent = nameOf(memory);
  if (other) {
    running.recite?.abort();
    for (const id of ["recital", "recited-share", "answers"]) $(id).replaceChildren();
    $("segment").replaceChildren(...memory.segments.map((_, i) => make("option", { value: i, textContent: i + 1 })));
    $("segment-label").hidden = memory.segments.length < 2;
    showText();
  }
  showSizes(memory);
  showLosses(memory.segments);
}

function showSizes({ bytes, kv_bytes: kv, text_tokens: tokens, vectors }) {
  const unwritten = bytes === undefined;
  for (const id of ["size", "ask", "recitals"]) $(id).hidden = unwritten;
  if (unwritten) return;
  for (const [id, value] of [["memory", bytes], ["kv", kv]]) {
    $(`${id}-bar`).style.width = `${(60 * value) / Math.max(bytes, kv)}%`;
    $(`${id}-bytes`).textContent = size(value);
  }
  const smaller = `${count(tokens, "token")} in ${count(vectors, "vector")}, ${rounded(kv / bytes, 2)} times smaller.`;
  $("ratio").textContent = `${smaller} Memory as it is on disk, the cache in the model's ${model.memory.dtype}.`;
}

// The mean over segments, by tokens, of those that have come so far.
function showLosses(segments) {
  const steps = Math.max(...segments.map((one) => one.write_losses.length));
  const losses = Array.from({ length: steps }, (_, step) => {
    const have = segments.filter((one) => Number.isFinite(one.write_losses[step]));
    return have.reduce((sum, one) => sum + one.tokens * one.write_losses[step], 0) / have.reduce((sum, one) => sum + one.tokens, 0);
  }).filter(Number.isFinite);
  const most = Math.max(...losses, 0.1);
  const last = Math.max(losses.length - 1, current.steps ?? 1, 1);
  const at = losses.map((loss, step) => [24 + (270 * step) / last, 105 - (80 * loss) / most]);
  const drawn = (tag, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    return made;
  };
  const few = losses.length <= 8;
  $("losses").replaceChildren(
    drawn("path", { class: "axis", d: "M14 105H310" }),
    drawn("path", { d: at.map(([x, y], i) => `${i ? "L" : "M"}${x} ${y}`).join("") }),
    ...at.flatMap(([x, y], step) => [
      drawn("circle", { cx: x, cy: y, r: few ? 4 : 2 }),
      ...(few || step === 0 || step === losses.length - 1
        ? [
            drawn("text", { class: "value", x, y: y - 9, "text-anchor": "middle" }, losses[step].toFixed(2)),
            drawn("text", { x, y: 121, "text-anchor": "middle" }, step),
          ]
        : []),
    ]),
  );
  $("losses").setAttribute("aria-label", `Write losses: ${losses.map((loss) => loss.toFixed(2)).join(", ")}`);
}

// The text, with the places that an answer is from, and the answer in them.
function showText(places = [], answer = "") {
  const pieces = [];
  let done = 0;
  for (const { start, end } of [...places].sort((a, b) => a.start - b.start)) {
    if (start > done) pieces.push(current.chars.slice(done, start).join(""));
    const parts = [current.chars.slice(Math.max(start, done), end).join("")];
    const at = answer ? parts[0].toLowerCase().indexOf(answer.toLowerCase()) : -1;
    if (at >= 0) {
      const [whole] = parts;
      const found = make("span", { className: "found", textContent: whole.slice(at, at + answer.length) });
      parts.splice(0, 1, whole.slice(0, at), found, whole.slice(at + answer.length));
    }
    pieces.push(make("mark", { className: "place" }, ...parts));
    done = Math.max(done, end);
  }
  pieces.push(current.chars.slice(done).join(""));
  $("source").replaceChildren(...pieces);
  const first = $("source").querySelector(".found, .place");
  if (first) $("source").scrollTop = first.offsetTop - $("source").offsetTop - 60;
}

// ---------------------------------------------------------------- memories

async function list(after = "") {
  const { data, has_more: more } = await get(`/v1/memories${after && `?after=${encodeURIComponent(after)}`}`);
  const items = data.map((memory) => {
    const about = `${count(memory.text_tokens, "token")}, ${size(memory.bytes)}`;
    const open = make("button", { type: "button", onclick: () => attempt("open", () => openMemory(memory.id)) });
    open.append(nameOf(memory), make("small", { textContent: about }));
    open.dataset.id = memory.id;
    open.setAttribute("aria-current", String(memory.id === current?.id));
    const remove = make("button", { type: "button", textContent: "Delete", title: `Delete ${nameOf(memory)}` });
    remove.setAttribute("aria-label", remove.title);
    remove.onclick = () => attempt("delete", () => deleteMemory(memory));
    return make("li", {}, open, remove);
  });
  if (after) $("memories").append(...items);
  else $("memories").replaceChildren(...items);
  $("none").hidden = $("memories").children.length > 0;
  $("more").hidden = !more;
  $("more").onclick = () => attempt("list", () => list(data.at(-1).id));
}

async function openMemory(id) {
  running.write?.abort();
  const memory = await get(`/v1/memories/${id.split("/").map(encodeURIComponent).join("/")}?text=true`);
  memory.chars = [];
  for (const { start, text } of memory.segments) {
    while (memory.chars.length < start) memory.chars.push("\n"); // white space between segments is in none of them
    memory.chars.push(...Array.from(text ?? "").slice(memory.chars.length - start));
  }
  show(memory);
  $("status").textContent = count(memory.segments.length, "segment");
}

async function deleteMemory(memory) {
  if (!confirm(`Delete ${nameOf(memory)}? Its text and its vectors are removed from the disk.`)) return;
  await call(`/v1/memories/${memory.id.split("/").map(encodeURIComponent).join("/")}`, { method: "DELETE" });
  if (current?.id === memory.id) show(null);
  await list();
}

$("write-form").onsubmit = (submitted) => {
  submitted.preventDefault();
  const body = { text: $("text").value, name: $("name").value.trim() || null, steps: $("steps").valueAsNumber };
  if (Number.isNaN(body.steps)) delete body.steps;
  attempt("write", async (signal) => {
    try {
      $("write-form").querySelector(".primary").disabled = true;
      for await (const event of events("/v1/memories", body, signal)) written(event, body);
      await list();
      $("write-form").reset();
      $("title").focus();
      attempt("recite", recite);
    } finally {
      $("write-form").querySelector(".primary").disabled = false;
      $("cancel").hidden = true;
      if (current && current.bytes === undefined) show(null); // not to its end
    }
  });
};

function written(event, { text, name }) {
  if (event.object === "memory.begun") {
    const segments = event.segments.map((one) => ({ ...one, write_losses: [] }));
    $("cancel").hidden = false;
    show({ id: event.id, name, segments, chars: Array.from(text) });
    $("status").textContent = "Writing …";
  } else if (event.object === "memory.step") {
    current.steps = event.steps;
    for (const one of event.segments) current.segments[one.segment].write_losses[event.step] = one.write_loss;
    const share = event.segments.reduce((sum, one) => sum + one.recovered, 0) / event.segments.length;
    $("status").textContent = `Step ${event.step} of ${event.steps}: ${rounded(100 * share, 3)} % of tokens come back, given those before them.`;
    showLosses(current.segments);
  } else {
    const known = current?.id === event.id; // or it had been written before
    show({ ...event, chars: Array.from(text) });
    if (!known) $("status").textContent = "This text was already written.";
  }
}

async function recite(signal) {
  const body = { memory: current.id, segment: Number($("segment").value) };
  $("recital").replaceChildren();
  $("recited-share").textContent = "Reciting …";
  try {
    for await (const event of events("/v1/recitals", body, signal)) {
      if (event.object === "recital.piece")
        $("recital").append(make("span", { className: { true: "right", false: "wrong" }[event.right] ?? "", textContent: event.text }));
      else $("recited-share").textContent = `${event.right_tokens ?? "?"} of ${count(event.tokens, "token")} at their places.`;
    }
  } finally {
    if ($("recited-share").textContent.endsWith("…")) $("recited-share").textContent = "";
  }
}

// ---------------------------------------------------------------- questions

$("ask-form").onsubmit = (submitted) => {
  submitted.preventDefault();
  const question = $("question").value.trim();
  if (!question) return;
  running.recite?.abort(); // which would take its turns from the answer
  const answer = make("div", { className: "answer" });
  const about = make("div", { className: "line" });
  const item = make("li", {}, make("div", { className: "question", textContent: question }), answer, about);
  $("answers").prepend(item);
  $("question").value = "";
  attempt("ask", (signal) => ask(question, { item, answer, about }, signal));
};

async function ask(question, { item, answer, about }, signal) {
  const memory = $("from").value === "auto" ? "auto" : [current.id];
  const body = { model: model.id, messages: [{ role: "user", content: question }], memory, support: true, max_tokens: 64 };
  let [places, support] = [[], null];
  item.setAttribute("aria-busy", "true");
  try {
    for await (const event of events("/v1/chat/completions", body, signal)) {
      if (event.memory) ({ memory: places, support } = event);
      answer.append(event.choices[0]?.delta.content ?? "");
    }
  } catch (error) {
    item.remove();
    throw error;
  } finally {
    item.removeAttribute("aria-busy");
  }
  const text = answer.textContent.trim();
  const absent = model.memory.refusal !== null && text.toLowerCase().startsWith(model.memory.refusal.toLowerCase());
  if (absent) answer.textContent = "Not in memory";
  item.classList.toggle("absent", absent);
  if (support !== null) {
    about.append(`support ${support.toFixed(2)}`, make("meter", { value: support, ariaLabel: "Support by memory" }));
  }
  if (!places.length) about.append("No memory was read: the model answered by itself.");
  if (absent || !places.length) return showText();
  const source = async () => {
    if (places[0].id !== current.id) {
      const kept = [...$("answers").children];
      await openMemory(places[0].id);
      $("answers").replaceChildren(...kept);
    }
    showText(places.filter((place) => place.id === current.id), text.replace(/\.$/, ""));
  };
  about.append(make("button", { type: "button", textContent: "Show source", onclick: () => attempt("open", source) }));
  await source();
}

// ---------------------------------------------------------------- the rest

async function take(file) {
  if (!file) return;
  try {
    $("text").value = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} is not a text file in UTF-8.`);
  }
  $("name").value = file.name;
}

$("new").onclick = () => {
  running.write?.abort();
  show(null);
};
$("cancel").onclick = () => running.write?.abort();
$("choose").onclick = () => $("file").click();
$("file").onchange = () => attempt("file", () => take($("file").files[0]));
$("example").onclick = () =>
  attempt("file", async () => {
    const { context, source, questions, elsewhere } = await get("example.json");
    [$("text").value, $("name").value] = [context, source.split(": ").at(-1).split(",")[0]];
    $("questions").replaceChildren(...[...questions, ...elsewhere].map((value) => make("option", { value })));
  });
$("recite").onclick = $("segment").onchange = () => attempt("recite", recite);
$("text").ondragover = (over) => {
  if (over.dataTransfer.types.includes("Files")) over.preventDefault(); // it may be dropped
  $("text").classList.add("over");
};
$("text").ondragleave = () => $("text").classList.remove("over");
$("text").ondrop = (dropped) => {
  $("text").classList.remove("over");
  if (!dropped.dataTransfer.files.length) return; // a text, which the browser puts in
  dropped.preventDefault();
  attempt("file", () => take(dropped.dataTransfer.files[0]));
};
$("key-form").onsubmit = (submitted) => {
  submitted.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  attempt("start", start);
};

async function start() {
  [model] = (await get("/v1/models")).data;
  $("key-form").hidden = true;
  $("model").textContent = `${model.id}: ${model.memory.vectors} vectors for each segment of a text`;
  $("steps").placeholder = `${model.memory.write_steps} (trained)`;
  await list();
}

attempt("start", start);
