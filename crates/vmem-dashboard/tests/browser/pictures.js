"use strict";
// Takes a picture of the page: `node pictures.js URL FOLDER`, once it has shown enough to see.
const path = require("node:path");
const { launch, open, sleep, wait_for_snapshots } = require("./browser.js");

const [url, folder] = process.argv.slice(2);
const SNAPSHOTS = Number(process.env.VMEM_SNAPSHOTS ?? 40);

(async () => {
  const browser = await launch();
  try {
    const views = [["light", "dashboard.png"], ["phone", "dashboard-phone.png"]];
    const pages = await Promise.all(
      views.map(async ([view, file]) => {
        const page = await open(browser, view);
        await page.goto(url);
        return [page, file];
      }),
    );
    for (const [page, file] of pages) {
      await wait_for_snapshots(page, SNAPSHOTS);
      // When there is something to see: a read that waits, or, after a while, whatever there is.
      for (let tries = 0; tries < 200; tries += 1) {
        const verdict = await page.textContent("#verdict");
        if (verdict.includes("for memory")) break;
        await sleep(100);
      }
      const { width } = page.viewportSize();
      const clip = { x: 0, y: 0, width, height: 1000 };
      await page.screenshot({ path: path.join(folder, file), fullPage: true, clip });
    }
  } finally {
    await browser.close();
  }
})().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
