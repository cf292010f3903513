"use strict";
// The page holds no state of its own: the server decides what is asked next, and an answer counts once the server has
// acknowledged it.

const MARKED_MS = 200; // how long the chosen picture stays marked
const PAUSE_MS = 300; // so that a double tap does not answer the next question too
const REMEMBERED = "dalle-human-study-code";
const $ = (id) => document.getElementById(id);
const choices = [...document.querySelectorAll(".choice")];
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

let code = null; // of the annotator
let task = null; // the pair on the screen and the questions still to be asked about it
let ready = false; // true while the page takes an answer

function remember(value) {
  try {
    if (value === null) localStorage.removeItem(REMEMBERED);
    else localStorage.setItem(REMEMBERED, value);
  } catch { /* no storage in a private window: the code is asked again */ }
}

function remembered() {
  try { return localStorage.getItem(REMEMBERED); } catch { return null; }
}

function show(id) {
  for (const main of document.querySelectorAll("main")) main.hidden = main.id !== id;
}

function trouble(text) {
  $("trouble").hidden = text === null;
  $("trouble").textContent = text ?? "";
}

function setReady(value) {
  ready = value;
  $("judge").dataset.ready = String(value);
}

// Return the server's answer, retrying until there is one, so that a restarted server is found again.
async function call(url, options, waiting) {
  for (let pause = 500; ; pause = Math.min(2 * pause, 5000)) {
    try {
      const response = await fetch(url, options);
      if (response.status < 500) {
        trouble(null);
        return { status: response.status, body: await response.json() };
      }
    } catch { /* unreachable: try again below */ }
    trouble(waiting);
    await wait(pause);
  }
}

async function next() {
  setReady(false);
  const own = code;
  const options = { cache: "no-store", headers: { Authorization: `Bearer ${own}` } };
  const { status, body } = await call("/api/next", options, "The study cannot be reached. Trying again …");
  if (own !== code) return;
  if (status !== 200) {
    leave();
    trouble(body.error);
    return;
  }
  $("bar").max = Math.max(body.total, 1);
  $("bar").value = body.done;
  $("count").textContent = `${body.done} of ${body.total} done`;
  $("who").textContent = body.annotator;
  if (body.tasks.length === 0) {
    $("summary").textContent = body.done === 1 ? "You judged 1 pair." : `You judged ${body.done} pairs.`;
    show("end");
    document.querySelector("#end h1").focus();
    return;
  }
  task = body.tasks[0];
  show("judge");
  await showPictures();
  if (own !== code) return;
  showQuestion();
  for (const side of body.tasks[1] ? ["left", "right"] : []) new Image().src = body.tasks[1][side];
}

async function showPictures() {
  $("judge").dataset.loading = "true";
  document.querySelector("#caption q").textContent = task.caption;
  for (;;) {
    try {
      await Promise.all(choices.map((choice) => {
        const image = choice.querySelector("img");
        image.src = task[choice.dataset.side];
        return image.decode();
      }));
      break;
    } catch {
      trouble("The pictures do not load. Trying again …");
      await wait(1000);
      for (const choice of choices) choice.querySelector("img").removeAttribute("src");
    }
  }
  trouble(null);
  $("judge").dataset.loading = "false";
}

async function showQuestion() {
  const question = task.questions[0];
  $("judge").dataset.question = question.id;
  $("question").textContent = question.wording;
  let past = true;
  for (const step of document.querySelectorAll(".steps li")) {
    const now = step.dataset.step === question.id;
    if (now) past = false;
    step.className = now ? "now" : past ? "past" : "";
  }
  for (const choice of [...choices, $("neither")]) choice.classList.remove("chosen", "other");
  $("neither").hidden = !question.answers.includes("neither");
  const shown = task;
  await wait(PAUSE_MS);
  if (task === shown) setReady(true);
}

async function choose(answer) {
  if (!ready || !task.questions[0].answers.includes(answer)) return;
  setReady(false);
  for (const choice of choices) choice.classList.add(choice.dataset.side === answer ? "chosen" : "other");
  $("neither").classList.add(answer === "neither" ? "chosen" : "other");
  const own = code;
  const vote = { item: task.item, question: task.questions[0].id, answer };
  const headers = { Authorization: `Bearer ${own}`, "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(vote) };
  const [{ status }] = await Promise.all([
    call("/api/vote", options, "Your answer is not saved yet. Trying again …"), wait(MARKED_MS)]);
  if (own !== code) return;
  task.questions.shift();
  // 409: answered before, in another window or before a lost reply, or no longer wanted. Ask the server what is next.
  if (status === 200 && task.questions.length > 0) await showQuestion();
  else await next();
}

function join(value) {
  code = value;
  remember(value);
  next();
}

function leave() {
  code = task = null;
  setReady(false);
  remember(null);
  trouble(null);
  history.replaceState(null, "", "/");
  show("welcome");
  $("code").value = "";
  $("code").focus();
}

$("join").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = $("code").value.trim();
  if (/^[\w-]+$/.test(value)) join(value);
  else trouble("A code has letters, digits, - and _ only.");
});
for (const button of document.querySelectorAll(".leave")) button.addEventListener("click", leave);
for (const choice of choices) choice.addEventListener("click", () => choose(choice.dataset.side));
$("neither").addEventListener("click", () => choose("neither"));
document.addEventListener("keydown", (event) => {
  if ($("judge").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const answer = {
    1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 3: "neither", ArrowDown: "neither",
  }[event.key];
  if (answer) {
    event.preventDefault();
    choose(answer);
  }
});

addEventListener("hashchange", () => location.reload()); // another link was opened in this tab
const linked = location.hash.slice(1);
if (remembered() && (!linked || linked === remembered())) join(remembered());
else {
  $("code").value = linked;
  show("welcome");
}
