"use strict";
// Looks at the page of a store that is at work: `node check.js URL`. Prints what it found; the
// exit status is 1 if something is wrong.
const fs = require("node:fs");
const { VIEWS, launch, open, sleep, snapshots, wait_for_snapshots } = require("./browser.js");

const url = process.argv[2];
const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const wrong = [];

const expect = (view, what, holds) => {
  if (!holds) wrong.push(`${view}: ${what}`);
};

// The figures that a load changes.
const figures = (page) =>
  page.evaluate(() => ({
    rates: ["hit-rate", "miss-rate", "hit-ratio"].map((id) => document.getElementById(id).textContent),
    tiers: [...document.querySelectorAll(".tier .amount, .flow strong")].map((one) => one.textContent),
    stages: [...document.querySelectorAll("#stages .count")].map((one) => one.textContent),
    slow: document.querySelectorAll("#slow .stack i").length,
    latency: document.querySelectorAll("#latency tbody tr").length,
    moves: document.querySelectorAll("#moves tbody tr").length,
    holders: document.querySelectorAll("#holders tbody tr").length,
    verdict: document.getElementById("verdict").textContent,
    live: document.getElementById("live").dataset.state,
    lines: [...document.querySelectorAll(".line path")].map((one) => one.getAttribute("d")),
  }));

const check_keyboard = async (page, view) => {
  await page.evaluate(() => document.activeElement?.blur());
  await page.keyboard.press("Tab");
  const focused = await page.evaluate(() => {
    const style = getComputedStyle(document.activeElement);
    return { id: document.activeElement.id, outline: style.outlineStyle };
  });
  expect(view, `the first stop of Tab is the button, not ${focused.id}`, focused.id === "pause");
  expect(view, "the focus is seen", focused.outline !== "none");
  await page.keyboard.press("Enter");
  expect(view, "Enter pauses", (await page.getAttribute("#pause", "aria-pressed")) === "true");
  const before = await snapshots(page);
  await sleep(2500);
  expect(view, "a paused page stands still", (await snapshots(page)) === before);
  await page.keyboard.press("Space");
  await wait_for_snapshots(page, before + 1);
};

const check_access = async (page, view) => {
  // By the debugger: the policy of the page lets no other script in.
  await page.evaluate(axe);
  const found = await page.evaluate(() =>
    globalThis.axe.run(document, {
      runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
    }),
  );
  for (const violation of found.violations) {
    const nodes = violation.nodes.map((node) => node.target.join(" ")).slice(0, 3);
    wrong.push(`${view}: axe: ${violation.id}: ${violation.help} (${nodes.join("; ")})`);
  }
  return found.passes.length;
};

// Keeps what the stream last told the page. By the debugger, as above.
const keep_last_snapshot = (page) =>
  page.addInitScript(() => {
    globalThis.EventSource = class extends EventSource {
      constructor(...of) {
        super(...of);
        this.addEventListener("message", (event) => (globalThis.last_snapshot = event.data));
      }
    };
  });

// The page says of each of the slowest reads what the snapshot says that it shows. Both are taken
// at once: the store has others to show a moment later.
const check_causes = async (page, view) => {
  const [told, shown] = await page.evaluate(() => [
    JSON.parse(globalThis.last_snapshot).slowest,
    [...document.querySelectorAll("#slow li")].map((read) => ({
      name: read.querySelector(".head strong")?.textContent,
      head: read.querySelector(".head")?.textContent ?? "",
      parts: [...read.querySelectorAll(".stack i")].map((part) => part.className),
    })),
  ]);
  expect(view, `${shown.length} slow reads for ${told.length}`, told.length > 0 && shown.length === told.length);
  told.forEach((read, at) => {
    const { name, head, parts } = shown[at] ?? { head: "", parts: [] };
    const object = read.name ?? `object ${read.handle}`;
    const stages = Object.keys(read.stages).filter((stage) => read.stages[stage] > 0);
    expect(view, `read ${at}: ${name} for ${object}`, `${name}`.startsWith(object));
    expect(view, `${object}: ${head} for ${read.cause}`, head.includes(`mostly ${read.cause}`));
    expect(view, `${object}: ${parts} for ${stages}`, `${[...parts].sort()}` === `${stages.sort()}`);
  });
};

const check_view = async (browser, view) => {
  const page = await open(browser, view);
  page.on("pageerror", (error) => wrong.push(`${view}: script: ${error}`));
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) wrong.push(`${view}: ${message.text()}`);
  });
  page.on("request", (request) => {
    const own = request.url().startsWith(url) || request.url().startsWith("data:");
    expect(view, `asks for ${request.url()}`, own);
  });
  await keep_last_snapshot(page);
  await page.goto(url);
  await wait_for_snapshots(page, 3);
  const first = await figures(page);
  const picture = await page.screenshot();
  await wait_for_snapshots(page, 7);
  const later = await figures(page);
  expect(view, `it is live, not ${later.live}`, later.live === "live");
  expect(view, "rates change", `${first.rates}` !== `${later.rates}`);
  expect(view, "tiers and flows change", `${first.tiers}` !== `${later.tiers}`);
  expect(view, "lines are drawn", later.lines.some((line) => line.length > 20));
  expect(view, "each stage is counted", later.stages.length === 6);
  expect(view, "slow reads have their times", later.slow > 0);
  expect(view, "latencies are shown", later.latency >= 2);
  expect(view, "migrations are shown", later.moves > 0);
  expect(view, "who keeps what is shown", later.holders > 0);
  expect(view, `a verdict: ${later.verdict}`, /reads under way|waits? for space|no read waits/i.test(later.verdict));
  await check_causes(page, view);
  expect(view, "the picture changes", !picture.equals(await page.screenshot()));

  const { width, scheme } = VIEWS[view];
  const looks = await page.evaluate(() => ({
    wide: document.scrollingElement.scrollWidth,
    page: getComputedStyle(document.body).backgroundColor,
  }));
  expect(view, `it is ${looks.wide} wide, the screen ${width}`, looks.wide <= width);
  const [red] = looks.page.match(/\d+/g).map(Number);
  expect(view, `${looks.page} is ${scheme}`, scheme === "dark" ? red < 64 : red > 192);
  await check_keyboard(page, view);
  const passes = await check_access(page, view);
  console.log(`${view}: ${later.verdict} axe: ${passes} rules pass`);
  await page.context().close();
};

(async () => {
  const browser = await launch();
  try {
    console.log(`Chromium ${browser.version()}`);
    for (const view of Object.keys(VIEWS)) await check_view(browser, view);
  } finally {
    await browser.close();
  }
  for (const what of wrong) console.error(`wrong: ${what}`);
  process.exitCode = wrong.length > 0 ? 1 : 0;
})().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
