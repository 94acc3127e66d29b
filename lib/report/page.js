/**
 * The script of the report page: draws the charts from the numbers in `#data`, sorts tables, and
 * searches. It makes no request and writes names as text only, on canvases and by `textContent`.
 * Runs in a browser, after uPlot.
 */
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const count = new Intl.NumberFormat("en-US");
  const compact = new Intl.NumberFormat("en-US", { notation: "compact" });
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const font = (size) => `${size}px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif`;
  const months = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(" ");
  const utc = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ");

  function duration(us) {
    const digits = (value) => String(Number(value.toPrecision(2)));
    if (us < 1000) return `${digits(us)} µs`;
    return us < 1e6 ? `${digits(us / 1000)} ms` : `${digits(us / 1e6)} s`;
  }

  const axis = (more) => ({
    stroke: colour("muted"),
    font: font(12),
    grid: { stroke: colour("grid"), width: 1 },
    ticks: { show: false },
    gap: 6,
    ...more,
  });

  /** An axis of numbers on the left, as wide as its longest label. */
  const numberAxis = (show) =>
    axis({
      values: (_plot, splits) => splits.map(show),
      size: (plot, labels) => {
        plot.ctx.font = font(12 * devicePixelRatio);
        const widths = (labels ?? [""]).map((label) => plot.ctx.measureText(label ?? "").width);
        return Math.ceil(Math.max(...widths) / devicePixelRatio) + 14;
      },
    });

  /** Sums of series up to each of them, as bars: drawn from the highest down they look stacked. */
  function stack(series, size) {
    const sums = [];
    for (const { values } of series) {
      const below = sums.at(-1);
      sums.push(values.map((value, i) => value + (below ? below[i] : 0)));
    }
    const bars = series.map(({ name, tint = name }) => ({
      fill: colour(tint),
      width: 0,
      points: { show: false },
      paths: uPlot.paths.bars({ size }),
    }));
    return { sums: sums.reverse(), bars: [{}, ...bars.reverse()] };
  }

  /** Tells what is under the pointer in the line below the chart. */
  function readout(element, describe) {
    const line = element.parentElement.querySelector(".readout");
    const hint = line.textContent;
    return (plot) => {
      const i = plot.cursor.idx;
      line.textContent = i === null || i === undefined ? hint : describe(i);
    };
  }

  /** Labels of times: the hour where they are near to each other, and the day where it is new. */
  function timeLabels(_plot, splits, _axis, _space, incrementS) {
    let shown = "";
    return splits.map((seconds) => {
      const [, month, day, time] = /-(\d+)-(\d+)T(.{8})/.exec(new Date(seconds * 1000).toISOString());
      const date = `${Number(day)} ${months[Number(month) - 1]}`;
      const isNew = date !== shown;
      shown = date;
      if (incrementS >= 86400) return date;
      const clock = incrementS < 60 ? time : time.slice(0, 5);
      return isNew ? `${clock}\n${date}` : clock;
    });
  }

  /** 1, 2, 5, 10 ... */
  const wholeSteps = Array.from({ length: 30 }, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3));

  function timeChart(element, { at, series, bucketS }) {
    const { sums, bars } = stack(series, [0.86, 48]);
    const describe = (i) =>
      `${utc(at[i] - bucketS / 2)} UTC: ${series
        .map(({ name, values }) => `${count.format(values[i])} ${name}`)
        .join(", ")}`;
    const options = {
      tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
      scales: {
        x: { range: [at[0] - bucketS / 2, at.at(-1) + bucketS / 2] },
        y: { range: (_plot, _min, max) => [0, Math.max(1, max) * 1.05] },
      },
      axes: [
        axis({
          grid: { show: false },
          space: 74,
          size: (_plot, labels) => (labels?.some((label) => label.includes("\n")) ? 42 : 26),
          values: timeLabels,
        }),
        { ...numberAxis((value) => compact.format(value)), incrs: wholeSteps },
      ],
      series: bars,
      hooks: { setCursor: [readout(element, describe)] },
    };
    return { options, values: [at, ...sums] };
  }

  /** Lines over time, in percent. */
  function freeChart(element, { at, series }) {
    const describe = (i) =>
      `${utc(at[i])} UTC: ${series
        .map(({ name, free, total }) => `${name} ${count.format(free[i])} of ${count.format(total)}`)
        .join(", ")}`;
    const options = {
      tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
      scales: { x: { range: [at[0], Math.max(at.at(-1), at[0] + 1)] }, y: { range: [0, 105] } },
      axes: [
        axis({ grid: { show: false }, space: 74, size: 42, values: timeLabels }),
        numberAxis((value) => `${value}%`),
      ],
      series: [
        {},
        ...series.map(({ tint }) => ({
          ...{ stroke: colour(tint), width: 2, points: { show: false } },
          paths: uPlot.paths.stepped({ align: -1 }),
        })),
      ],
      hooks: { setCursor: [readout(element, describe)] },
    };
    return { options, values: [at, ...series.map(({ shares }) => shares)] };
  }

  function latencyChart(element, { centresUs, labels, series }) {
    const marks = [2, 3, 4, 5, 6, 7, 8].flatMap((n) => [1, 2, 5].map((step) => step * 10 ** n));
    const describe = (i) =>
      `${labels[i]}: ${series.map(({ name, shares }) => `${name} ${shares[i]}%`).join(", ")}`;
    const options = {
      scales: {
        x: { time: false, distr: 3, range: [centresUs[0], centresUs.at(-1)] },
        y: { range: (_plot, _min, max) => [0, Math.max(1, max) * 1.08] },
      },
      axes: [
        axis({
          splits: (plot) => {
            const { min, max } = plot.scales.x;
            const inside = marks.filter((mark) => mark >= min && mark <= max);
            const room = plot.bbox.width / devicePixelRatio / 52;
            const decades = inside.filter((mark) => Number.isInteger(Math.log10(mark)));
            return inside.length <= room || decades.length < 2 ? inside : decades;
          },
          filter: (_plot, splits) => splits,
          values: (_plot, splits) => splits.map(duration),
          size: 26,
        }),
        numberAxis((value) => `${value}%`),
      ],
      series: [
        {},
        ...series.map((_, i) => ({
          stroke: colour(`c${i}`),
          fill: series.length === 1 ? colour("soft") : undefined,
          width: 2,
          points: { show: false },
          paths: uPlot.paths.spline(),
        })),
      ],
      hooks: { setCursor: [readout(element, describe)] },
    };
    return { options, values: [centresUs, ...series.map(({ shares }) => shares)] };
  }

  /** Cuts a name to a width, for a canvas. */
  function fit(context, name, width) {
    if (context.measureText(name).width <= width) return name;
    const letters = [...name];
    while (letters.length > 1 && context.measureText(`${letters.join("")}…`).width > width) {
      letters.pop();
    }
    return `${letters.join("")}…`;
  }

  /** Lying bars, stacked; names on the left, what they stand for behind their end. */
  function barChart(element, { names, series, labels, max }) {
    const rows = names.map((_, i) => i);
    const { sums, bars } = stack(series, [0.56, 100]);
    const width = element.clientWidth;
    const context = document.createElement("canvas").getContext("2d");
    context.font = font(12);
    const widest = (texts) => Math.max(...texts.map((text) => context.measureText(text).width));
    const nameWidth = Math.min(Math.ceil(widest(names)) + 2, Math.floor(width * 0.36));
    const labelWidth = Math.ceil(widest(labels)) + 10;
    const shown = names.map((name) => fit(context, name, nameWidth));
    const top = Math.max(max ?? 0, ...(sums[0] ?? []), 1);
    const drawLabels = (plot) => {
      const { ctx, bbox } = plot;
      ctx.save();
      ctx.font = font(12 * devicePixelRatio);
      ctx.fillStyle = colour("text");
      ctx.textBaseline = "middle";
      ctx.textAlign = "left";
      rows.forEach((row) => {
        const x = max === undefined ? plot.valToPos(sums[0][row], "y", true) : bbox.left + bbox.width;
        ctx.fillText(labels[row], x + 8 * devicePixelRatio, plot.valToPos(row, "x", true));
      });
      ctx.restore();
    };
    const drawTracks = (plot) => {
      if (max === undefined) return;
      const { ctx, bbox } = plot;
      const thick = (bbox.height / rows.length) * 0.56;
      ctx.save();
      ctx.fillStyle = colour("grid");
      rows.forEach((row) => {
        ctx.fillRect(bbox.left, plot.valToPos(row, "x", true) - thick / 2, bbox.width, thick);
      });
      ctx.restore();
    };
    const options = {
      padding: [0, labelWidth, 0, 0],
      cursor: { show: false },
      scales: {
        x: { time: false, ori: 1, dir: -1, range: [-0.5, rows.length - 0.5] },
        y: { ori: 0, dir: 1, range: [0, top] },
      },
      axes: [
        axis({
          side: 3,
          stroke: colour("text"),
          splits: () => rows,
          values: () => shown,
          filter: (_plot, splits) => splits,
          size: nameWidth + 12,
          gap: 8,
          grid: { show: false },
        }),
        axis({ side: 2, show: false }),
      ],
      series: bars,
      hooks: { drawAxes: [drawTracks], draw: [drawLabels] },
    };
    return { options, values: [rows, ...sums] };
  }

  const charts = { time: timeChart, free: freeChart, latency: latencyChart, bars: barChart };
  const drawn = new Map();

  function draw(element) {
    const one = data[element.dataset.chart];
    const { options, values } = charts[one.type](element, one);
    drawn.get(element)?.destroy();
    const all = {
      width: element.clientWidth,
      height: element.clientHeight,
      legend: { show: false },
      padding: [10, 22, 0, 0],
      ...options,
      cursor: {
        y: false,
        points: { show: false },
        drag: { x: false, y: false, setScale: false },
        ...options.cursor,
      },
    };
    drawn.set(element, new uPlot(all, values, element));
    element.dataset.width = String(all.width);
  }

  const elements = [...document.querySelectorAll("[data-chart]")];
  const drawAll = () => elements.forEach(draw);
  drawAll();
  const observer = new ResizeObserver((changes) => {
    for (const { target } of changes) {
      if (String(target.clientWidth) !== target.dataset.width) draw(target);
    }
  });
  for (const element of elements) observer.observe(element);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", drawAll);
  root.dataset.drawn = String(drawn.size);

  /** Sizes of units; of durations in µs. */
  const units = { µs: 1, ms: 1e3, s: 1e6, m: 6e7, h: 3.6e9, kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12 };

  /** What a cell of numbers is worth: `1,234`, `2m05s`, `1.5MB/s`, `3/100`; nothing is least. */
  function worth(text) {
    const parts = text.replaceAll(",", "").split("/")[0].matchAll(/([\d.]+)(µs|[a-zA-Z]*)/g);
    return [...parts].reduce((sum, [, value, unit]) => Math.max(0, sum) + value * (units[unit] ?? 1), -1);
  }

  const collator = new Intl.Collator("en", { numeric: true });

  /** Makes the heads of a table buttons that sort it: numbers from the largest, texts from A. */
  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    const [body] = table.tBodies;
    if (body.rows.length < 2) return;
    for (const [i, head] of heads.entries()) {
      const isNumber = head.classList.contains("number");
      const value = (row) => row.cells[i].textContent;
      const compare = isNumber
        ? (a, b) => worth(value(a)) - worth(value(b))
        : (a, b) => collator.compare(value(a), value(b));
      head.firstChild.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const isUp = before ? before === "descending" : !isNumber;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
        body.append(...[...body.rows].sort((a, b) => (isUp ? compare(a, b) : compare(b, a))));
      });
    }
  }
  for (const table of document.querySelectorAll("table")) sortable(table);

  for (const button of document.querySelectorAll(".few-more")) {
    button.addEventListener("click", () => {
      const above = button.previousElementSibling;
      (above.querySelector(".few") ?? above).classList.remove("few");
      button.remove();
    });
  }

  /** Says of each table whether some of it is out of sight. */
  const widths = new ResizeObserver((changes) => {
    for (const { target } of changes) {
      target.classList.toggle("cut", target.scrollWidth > target.clientWidth + 1);
    }
  });
  for (const box of document.querySelectorAll(".scroll")) widths.observe(box);

  const search = document.getElementById("search");
  const found = document.getElementById("found");
  /** What is found or hidden as a whole, with its text. */
  let parts;
  const partsOf = () =>
    [...document.querySelectorAll("tbody tr, .item, .pods li")]
      .filter((one) => !one.parentElement.closest(".item"))
      .map((one) => {
        const { title = "" } = one.querySelector("a[title]") ?? {};
        const network = one.closest(".network")?.querySelector("h4")?.textContent ?? "";
        return [one, `${one.textContent} ${title} ${network}`.toLowerCase()];
      });

  function filter() {
    parts ??= partsOf();
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [one, text] of parts) {
      const isFound = words.every((word) => text.includes(word));
      one.classList.toggle("nothing", !isFound);
      if (isFound) shown++;
    }
    const isAsked = words.length > 0;
    root.classList.toggle("searching", isAsked);
    const kept = ":is(tbody tr, .item, .pods li):not(.nothing)";
    for (const one of document.querySelectorAll("main section, .network, .node, .scroll")) {
      one.classList.toggle("nothing", isAsked && !one.querySelector(kept));
    }
    for (const one of document.querySelectorAll("main details:not(.item)")) {
      one.open = isAsked && one.querySelector(kept) !== null;
    }
    document.querySelector(".tiles").classList.toggle("nothing", isAsked);
    found.textContent = isAsked ? `${count.format(shown)} of ${count.format(parts.length)} found` : "";
  }

  search.form.addEventListener("submit", (event) => event.preventDefault());
  let waiting;
  search.addEventListener("input", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(filter);
  });
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target instanceof HTMLInputElement;
    if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      search.focus();
    } else if (event.key === "Escape" && search.value !== "") {
      search.value = "";
      filter();
    }
  });

  /** Opens the section that a link leads to; what a search has hidden is shown again. */
  function follow() {
    const target = document.getElementById(location.hash.slice(1));
    if (!target) return;
    if (target.closest(".nothing")) {
      search.value = "";
      filter();
    }
    if (target instanceof HTMLDetailsElement) {
      target.classList.add("kept");
      target.open = true;
      target.querySelector("summary").focus({ preventScroll: true });
    }
    target.scrollIntoView();
  }
  addEventListener("hashchange", follow);
  follow();

  /** Marks a pod on all of its networks. */
  function same(event) {
    const link = event.target.closest?.(".pods a");
    for (const one of document.querySelectorAll(".pods .same")) one.classList.remove("same");
    if (!link || link.hash === "#attachments" || link.hash === "#failures") return;
    for (const one of document.querySelectorAll(`.pods a[href="${link.hash}"]`)) {
      one.classList.add("same");
    }
  }
  for (const name of ["mouseover", "focusin"]) {
    document.querySelector(".map")?.addEventListener(name, same);
  }
})();
