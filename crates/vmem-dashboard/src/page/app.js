"use strict";
(() => {
  // Snapshots of a minute, the newest last: rates are made of two of them.
  const KEPT = 60;
  const RECENT = 10;
  const STAGES = {
    space: "wait for memory",
    turn: "wait for their turn on the link",
    io: "are being loaded",
    copy: "are being copied in memory",
    gate: "wait for a change of their object",
    runtime: "wait for the runtime, or for their caller",
  };
  const history = [];
  let paused = false;
  let last_heard = 0;

  const find = (id) => document.getElementById(id);

  // An element with its class, text and children.
  const make = (tag, cls, ...inside) => {
    const element = document.createElement(tag);
    if (cls) element.className = cls;
    element.append(...inside);
    return element;
  };

  const put = (parent, ...children) => parent.replaceChildren(...children);

  // Text that is changed only where it differs, so that readers of a screen are not told again.
  const say = (element, text) => {
    if (element.textContent !== text) element.textContent = text;
  };

  const three = (value) => (value >= 100 ? value.toFixed(0) : value.toPrecision(3));

  const bytes = (count) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let unit = 0;
    while (count >= 1000 && unit < units.length - 1) {
      count /= 1024;
      unit += 1;
    }
    return `${unit === 0 ? Math.round(count) : three(count)} ${units[unit]}`;
  };

  const count = (value) => {
    if (value >= 1e6) return `${three(value / 1e6)} M`;
    if (value >= 1e4) return `${three(value / 1e3)} k`;
    return `${Math.round(value)}`;
  };

  const time = (us) => {
    if (us === null || us === undefined) return "–";
    if (us < 1000) return `${us} µs`;
    if (us < 1e6) return `${three(us / 1e3)} ms`;
    return `${three(us / 1e6)} s`;
  };

  const percent = (part, whole) => (whole > 0 ? (100 * part) / whole : 0);

  // What grew between two snapshots, a second.
  const rate = (now, before, total) => {
    const seconds = (now.at_ms - before.at_ms) / 1000;
    return seconds > 0 ? Math.max(0, total(now) - total(before)) / seconds : 0;
  };

  const rates = (total) => history.slice(1).map((now, at) => rate(now, history[at], total));

  const newest = (values) => (values.length ? values[values.length - 1] : 0);

  const line = (svg, values, most) => {
    const top = most || Math.max(1, ...values);
    const step = 120 / (KEPT - 1);
    const from = 120 - step * (values.length - 1);
    const points = values.map(
      (value, at) => `${(from + at * step).toFixed(1)},${(23 - (22 * value) / top).toFixed(1)}`,
    );
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
    put(svg, path);
  };

  const small_line = (values) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("class", "line");
    svg.setAttribute("viewBox", "0 0 120 24");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    line(svg, values);
    return svg;
  };

  const rail = (part, whole, peak, label) => {
    const element = make("div", "rail");
    const fill = make("i");
    fill.style.width = `${Math.min(100, percent(part, whole))}%`;
    element.append(fill);
    if (peak !== null) {
      const mark = make("b");
      mark.style.left = `calc(${Math.min(100, percent(peak, whole))}% - 2px)`;
      element.append(mark);
    }
    element.setAttribute("role", "img");
    element.setAttribute("aria-label", label);
    return element;
  };

  const host_parts = (snapshot, tier) => {
    const parts = [
      ["held by readers", snapshot.memory.held],
      ["pinned", snapshot.memory.pinned],
      ["dirty", snapshot.memory.dirty],
    ];
    const rows = parts.map(([what, part]) => {
      const share = percent(part, tier.capacity).toFixed(0);
      const label = `${what}: ${share} percent of the capacity`;
      return make(
        "div", "part",
        rail(part, tier.capacity, null, label),
        make("span", "", `${what} ${bytes(part)}, ${share} %`),
      );
    });
    return make("div", "parts", ...rows);
  };

  // Of all devices: the only copy there is.
  const vram_parts = ({ memory }) =>
    make("div", "parts", make("div", "part", make("span"), make("span", "", `dirty ${bytes(memory.vram_dirty)}`)));

  const show_tier = (snapshot, tier) => {
    const share = percent(tier.used, tier.capacity).toFixed(0);
    const label = `${tier.tier}: ${share} percent of ${bytes(tier.capacity)} in use`;
    const row = make(
      "div", "tier",
      make("span", "name", tier.tier),
      rail(tier.used, tier.capacity, tier.peak, label),
      make("span", "amount", `${bytes(tier.used)} of ${bytes(tier.capacity)}, ${share} %`),
    );
    if (tier.tier === "host") row.append(host_parts(snapshot, tier));
    if (tier.tier === "vram") row.append(vram_parts(snapshot));
    return row;
  };

  // Between two tiers: what flows up, and what flows down.
  const show_flow = (upper, lower) => {
    const way = (from, to, arrow) => {
      const total = (snapshot) =>
        snapshot.links.find((link) => link.from === from && link.to === to)?.bytes ?? 0;
      const values = rates(total);
      return make(
        "span", "",
        `${arrow} ${from} to ${to}`,
        make("strong", "", `${bytes(newest(values))}/s`),
        small_line(values),
      );
    };
    return make("div", "flow", make("span"), way(lower, upper, "↑"), way(upper, lower, "↓"));
  };

  const show_tiers = (snapshot) => {
    const rows = [];
    const devices = snapshot.tiers.filter((tier) => tier.tier.startsWith("vram"));
    for (const tier of snapshot.tiers) {
      if (tier.tier === "host" && devices.length) rows.push(show_flow("vram", "host"));
      if (tier.tier === "disk") rows.push(show_flow("host", "disk"));
      if (tier.tier === "remote") rows.push(show_flow("host", "remote"));
      rows.push(show_tier(snapshot, tier));
    }
    put(find("tiers"), ...rows);
  };

  const show_reads = (snapshot) => {
    const hits = rates((one) => one.reads.hits);
    const misses = rates((one) => one.reads.misses);
    const ratios = hits.map((hit, at) => percent(hit, hit + misses[at]));
    const sum = (values) => values.slice(-RECENT).reduce((all, one) => all + one, 0);
    const both = sum(hits) + sum(misses);
    say(find("hit-rate"), count(newest(hits)));
    say(find("miss-rate"), count(newest(misses)));
    say(find("hit-ratio"), both > 0 ? `${percent(sum(hits), both).toFixed(1)} %` : "–");
    say(find("ended-badly"), count(snapshot.reads.failed + snapshot.reads.cancelled));
    line(find("hit-line"), hits);
    line(find("miss-line"), misses);
    line(find("ratio-line"), ratios, 100);

    const now = Object.entries(STAGES).map(([stage, what]) => [stage, what, snapshot.reads.now[stage]]);
    const most = Math.max(1, ...now.map(([, , reads]) => reads));
    const rows = now.map(([stage, what, reads]) => {
      const bar = make("span", `bar ${stage}`);
      bar.style.width = `${(50 * reads) / most}%`;
      return make(
        "li", "",
        make("span", "", stage),
        make("span", "count", `${reads}`),
        make("span", "what", bar, make("small", "", what)),
      );
    });
    put(find("stages"), ...rows);
    const waiters = snapshot.reads.waiters;
    say(
      find("waiters"),
      `${waiters} ${waiters === 1 ? "request waits" : "requests wait"} for space, writes and pins ` +
        `among them; ${snapshot.counts.migrations_in_flight} migrations are in flight.`,
    );
  };

  const show_slow = (snapshot) => {
    const most = Math.max(1, ...snapshot.slowest.map((read) => read.total));
    const rows = snapshot.slowest.map((read) => {
      const name = read.name ?? `object ${read.handle}`;
      const others = read.objects > 1 ? ` and ${read.objects - 1} more` : "";
      const parts = Object.keys(STAGES).filter((stage) => read.stages[stage] > 0);
      const stack = make("div", "stack");
      for (const stage of parts) {
        const part = make("i", stage);
        part.style.width = `${percent(read.stages[stage], most)}%`;
        stack.append(part);
      }
      const words = parts.map((stage) => `${stage} ${time(read.stages[stage])}`).join(", ");
      stack.setAttribute("role", "img");
      stack.setAttribute("aria-label", words || "no time at all");
      stack.title = words;
      const head = make(
        "div", "head",
        make("strong", "", `${name}${others}`),
        make("em", "", `${bytes(read.bytes)} from ${read.tier}`),
        make("span", "", `mostly ${read.cause}`),
      );
      if (read.joined) head.append(make("em", "", "joined another read"));
      if (read.outcome !== "served") {
        head.append(make("span", "bad", read.error ? `failed: ${read.error}` : read.outcome));
      }
      head.append(make("span", "took", time(read.total)));
      return make("li", "", head, stack);
    });
    if (!rows.length) rows.push(make("li", "", "None: every read was a hit."));
    put(find("slow"), ...rows);
  };

  const show_legend = () => {
    const one = (stage) => make("span", "", make("i", stage), stage);
    put(find("legend"), ...Object.keys(STAGES).map(one));
  };

  const table = (heads, rows) => {
    const head = make("tr", "", ...heads.map((text) => {
      const cell = make("th", "", text);
      cell.scope = "col";
      return cell;
    }));
    const body = rows.map(([first, ...others]) => {
      const name = make("th", "", first);
      name.scope = "row";
      return make("tr", "", name, ...others.map((text) => make("td", "", text)));
    });
    return make("table", "", make("thead", "", head), make("tbody", "", ...body));
  };

  const show_latency = (snapshot) => {
    const rows = snapshot.latencies.flatMap(({ tier, all, recent }) => {
      const row = (what, q) =>
        [what, count(q.count), time(q.p50), time(q.p90), time(q.p99), time(q.max)];
      return [row(`from ${tier}, last 10 s`, recent), row(`from ${tier}, ever`, all)];
    });
    const none = make("p", "note", "None yet.");
    const heads = ["served", "reads", "p50", "p90", "p99", "max"];
    put(find("latency"), rows.length ? table(heads, rows) : none);
  };

  const show_moves = () => {
    const sums = new Map();
    const recent = history.slice(-RECENT);
    for (const move of recent.flatMap((one) => one.migrations)) {
      const key = `${move.cause}, ${move.from} to ${move.to}`;
      const [times, moved] = sums.get(key) ?? [0, 0];
      sums.set(key, [times + move.count, moved + move.bytes]);
    }
    const rows = [...sums].sort(([, one], [, other]) => other[1] - one[1]);
    const cells = rows.map(([key, [times, moved]]) => [key, count(times), bytes(moved)]);
    const none = make("p", "note", "None.");
    put(find("moves"), rows.length ? table(["cause", "migrations", "moved"], cells) : none);
  };

  const show_holders = ({ holders, memory }) => {
    const name = (held) => held.name ?? `object ${held.handle}`;
    const cells = holders.map((held) => [name(held), held.kind, held.tier, bytes(held.bytes)]);
    const none = make("p", "note", "No pin and no lease keeps an object.");
    const parts = [cells.length ? table(["object", "kept by", "in", "footprint"], cells) : none];
    if (memory.held > 0) parts.push(make("p", "note", `Readers hold ${bytes(memory.held)} of host memory.`));
    put(find("holders"), ...parts);
  };

  const show_faults = ({ tiers, incidents, counts }) => {
    const total = (what) => tiers.reduce((sum, tier) => sum + tier[what], 0);
    const [refusals, faults, fallbacks] = ["refusals", "faults", "fallbacks"].map(total);
    const text = refusals + faults + fallbacks + counts.errors === 0
      ? "Nothing has failed, and nothing was refused."
      : `${count(refusals)} requests got no space, ${count(faults)} operations of a tier failed, ` +
        `${count(fallbacks)} reads were served by the tier below instead.`;
    const parts = [make("p", "note", text)];
    if (incidents.length) {
      const one = ({ at_ms, kind, tier, handle, error, left_out }) => {
        const when = new Date(at_ms).toLocaleTimeString();
        const which = handle === null ? "" : `object ${handle}, `;
        const others = left_out > 0 ? ` (and ${count(left_out)} before it)` : "";
        return make("li", "", `${when} ${kind} in ${tier}: ${which}${error}${others}`);
      };
      parts.push(make("ul", "list", ...incidents.map(one)));
    }
    put(find("faults"), ...parts);
  };

  const show_machine = ({ machine, memory, counts }) => {
    const rows = [["disk", machine.disk]];
    for (const note of machine.notes) rows.push(["refused", note]);
    if (machine.tmpfs) rows.push(["warning", "the directory is a tmpfs: its files take memory"]);
    machine.devices.forEach((device, at) => rows.push([`vram ${at}`, device]));
    if (machine.no_vram) rows.push([machine.devices.length ? "vram" : "no vram", machine.no_vram]);
    rows.push(["staging", `${bytes(memory.staging)}${machine.staging_registered ? ", registered" : ""}`]);
    rows.push(["streams", bytes(memory.streams)]);
    rows.push(["objects", `${count(counts.objects)}, their metadata ${bytes(memory.metadata)}`]);
    const cells = rows.flatMap(([name, text]) => [make("dt", "", name), make("dd", "", text)]);
    put(find("machine"), ...cells);
  };

  // What keeps host memory, where that is most of it.
  const why = ({ tiers, memory }) => {
    const host = tiers.find((tier) => tier.tier === "host");
    const kept = [["readers hold", memory.held], ["pins hold", memory.pinned], ["is dirty", memory.dirty]];
    const [what, most] = kept.sort(([, one], [, other]) => other - one)[0];
    const share = percent(most, host.capacity);
    if (share < 50) return "";
    return what === "is dirty" ? `: ${share.toFixed(0)} % of host is dirty`
      : `: ${what} ${share.toFixed(0)} % of host`;
  };

  // One sentence: what fills, what waits and why.
  const verdict = (snapshot) => {
    const said = [];
    for (const tier of snapshot.tiers) {
      const share = percent(tier.used, tier.capacity);
      if (share >= 90) said.push(`${tier.tier} is ${share.toFixed(0)} % full`);
    }
    const waits = Object.keys(STAGES).map((stage) => [stage, snapshot.reads.now[stage]]);
    waits.sort(([, one], [, other]) => other - one);
    const under_way = waits.reduce((sum, [, reads]) => sum + reads, 0);
    const [[stage, most]] = waits;
    if (most > 0) {
      const one = (text) => text.replace(/^wait /, "waits ").replace(/^are /, "is ");
      const what = most === 1 ? one(STAGES[stage]) : STAGES[stage];
      said.push(`${most} of ${under_way} reads under way ${what}${stage === "space" ? why(snapshot) : ""}`);
    } else if (snapshot.reads.waiters > 0) {
      const { waiters } = snapshot.reads;
      said.push(`${waiters} ${waiters === 1 ? "request waits" : "requests wait"} for space${why(snapshot)}`);
    } else {
      said.push("no read waits");
    }
    const text = said.join("; ");
    return `${text[0].toUpperCase()}${text.slice(1)}.`;
  };

  const show = (snapshot) => {
    history.push(snapshot);
    if (history.length > KEPT) history.shift();
    if (paused) return;
    say(find("verdict"), verdict(snapshot));
    show_tiers(snapshot);
    show_reads(snapshot);
    show_slow(snapshot);
    show_latency(snapshot);
    show_moves();
    show_holders(snapshot);
    show_faults(snapshot);
    show_machine(snapshot);
    document.body.dataset.snapshots = `${Number(document.body.dataset.snapshots ?? 0) + 1}`;
  };

  const set_live = (state, text) => {
    find("live").dataset.state = state;
    say(find("live"), text);
  };

  const connect = () => {
    const base = location.pathname.replace(/\/$/, "");
    const source = new EventSource(`${base}/stream`);
    source.onmessage = (event) => {
      last_heard = Date.now();
      set_live("live", paused ? "paused" : "live");
      show(JSON.parse(event.data));
    };
    source.onerror = () => {
      set_live("lost", "no connection, trying again");
      // A browser gives up for good where the answer was no stream.
      if (source.readyState === EventSource.CLOSED) setTimeout(connect, 5000);
    };
  };

  find("pause").addEventListener("click", () => {
    paused = !paused;
    find("pause").setAttribute("aria-pressed", `${paused}`);
    say(find("pause"), paused ? "Go on" : "Pause");
    if (find("live").dataset.state === "live") set_live("live", paused ? "paused" : "live");
  });

  setInterval(() => {
    if (last_heard > 0 && Date.now() - last_heard > 5000) set_live("lost", "no news for 5 s");
  }, 1000);

  show_legend();
  connect();
})();
