"use strict";
// A headless Chromium, for the test and for the pictures. `VMEM_CHROMIUM` names another one.
const { chromium } = require("playwright-core");

// How the page is looked at: on a desk and on a phone, by day and by night.
const VIEWS = {
  light: { width: 1120, height: 900, scheme: "light", mobile: false },
  dark: { width: 1120, height: 900, scheme: "dark", mobile: false },
  phone: { width: 360, height: 740, scheme: "dark", mobile: true },
};

// Playwright gives each launch an empty directory of its own for its data.
const launch = () =>
  chromium.launch({
    executablePath: process.env.VMEM_CHROMIUM ?? "/usr/bin/chromium",
    args: [
      "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
      "--disable-background-networking", "--disable-component-update", "--disable-sync",
    ],
  });

const open = async (browser, view) => {
  const { width, height, scheme, mobile } = VIEWS[view];
  const context = await browser.newContext({
    viewport: { width, height },
    colorScheme: scheme,
    reducedMotion: "reduce",
    isMobile: mobile,
    hasTouch: mobile,
  });
  return context.newPage();
};

const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));

const snapshots = (page) => page.evaluate(() => Number(document.body.dataset.snapshots ?? 0));

// Waits until the page has shown so many snapshots.
const wait_for_snapshots = async (page, count) => {
  for (let tries = 0; tries < 600; tries += 1) {
    if ((await snapshots(page)) >= count) return;
    await sleep(100);
  }
  throw new Error(`no ${count} snapshots within a minute`);
};

module.exports = { VIEWS, launch, open, sleep, snapshots, wait_for_snapshots };
