"use strict";
// Shows what `smallcap.report` has put into the page. Everything that comes from a run becomes a text node or an
// attribute, never markup.
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const isRun = page.kind === "run";
  const isPair = isRun && page.low.length > 1;
  const LETTERS = "AB";
  const COPIED = 0.8;
  const AT_ONCE = 60;
  const $ = (id) => document.getElementById(id);

  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name.startsWith("--")) node.style.setProperty(name, value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  function svg(tag, attributes, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  const whole = (number) => number.toLocaleString("en-US");
  const shown = (number, digits) => (number === null || number === undefined ? "–" : number.toFixed(digits).replace("-", "−"));
  const percent = (share) => `${Math.round(share * 100)}%`;
  const badge = (run) => isPair && el("span", { class: `badge ${LETTERS[run].toLowerCase()}`, "aria-label": `Run ${LETTERS[run]}` }, LETTERS[run]);
  const measures = Object.fromEntries(page.measures.map((measure) => [measure.name, measure]));

  // ---- What is known of a row ------------------------------------------------------------------------------------

  const runsOf = (row) => (isRun ? row.runs : []);
  const captionsOf = (row) => (isRun ? row.runs.map((one) => one?.caption) : [row.text]).filter((text) => text !== undefined);
  const failuresOf = (row) => runsOf(row).filter((one) => one?.code !== undefined);
  const wordsOf = (text) => text.toLowerCase().match(/[\p{L}\p{N}\p{M}']+/gu) ?? [];
  const isLow = (one, run) => one?.values?.clip_score !== undefined && page.low[run] !== null && one.values.clip_score < page.low[run];
  const isCopied = (one) => (one?.values?.copied_share ?? 0) >= COPIED;

  /** The values of a measure: one for each run that has it. */
  function valuesOf(row, name) {
    if (isRun) return row.runs.map((one) => one?.values?.[name]).filter((value) => value !== undefined && value !== null);
    return [name === "words" ? row.text.split(" ").length : [...row.text].length];
  }

  const haystacks = new Map();
  function haystack(row) {
    if (!haystacks.has(row)) {
      const texts = [String(row.id), row.uri ?? "", ...captionsOf(row), ...(row.sources ?? [])];
      for (const one of runsOf(row)) {
        if (one) texts.push(one.code ?? "", one.message ?? "", ...(one.neighbours ?? []).map((neighbour) => neighbour.text));
      }
      haystacks.set(row, texts.join("\n").toLowerCase());
    }
    return haystacks.get(row);
  }

  // ---- Which rows are shown --------------------------------------------------------------------------------------

  const FILTERS = !isRun
    ? [{ name: "several", label: "In several sources", keeps: (row) => row.sources.length > 1 },
       { name: "images", label: "With an image", keeps: (row) => row.images > 0 }]
    : [{ name: "changed", label: "Changed", keeps: (row) => row.changed },
       { name: "low", label: "Low score", keeps: (row) => row.runs.some(isLow) },
       { name: "copied", label: "Copied", keeps: (row) => row.runs.some(isCopied) },
       { name: "empty", label: "Empty", keeps: (row) => row.runs.some((one) => one?.caption !== undefined && !one.caption.trim()) },
       { name: "failed", label: "Failed", keeps: (row) => failuresOf(row).length > 0 }];

  const state = { query: "", filters: new Set(), code: "", sort: "id", range: null };
  let rows = [];
  let drawn = 0;

  function select() {
    const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    const filters = FILTERS.filter((filter) => state.filters.has(filter.name));
    rows = page.rows.filter((row) =>
      words.every((word) => haystack(row).includes(word))
      && filters.every((filter) => filter.keeps(row))
      && (!state.code || failuresOf(row).some((one) => one.code === state.code))
      && (!state.range || valuesOf(row, state.range.name).some((value) => value >= state.range.low && value < state.range.high)));
    const [name, direction] = state.sort.split(" ");
    if (direction) {
      const sign = direction === "down" ? -1 : 1;
      const key = (row) => { const values = valuesOf(row, name); return values.length ? (sign > 0 ? Math.min(...values) : Math.max(...values)) : null; };
      const keys = new Map(rows.map((row) => [row, key(row)]));
      rows.sort((one, other) => {
        const [first, second] = [keys.get(one), keys.get(other)];
        if (first === null || second === null) return (first === null) - (second === null);
        return sign * (first - second);
      });
    }
    $("grid").replaceChildren();
    drawn = 0;
    drawMore();
    $("nothing").hidden = rows.length > 0;
    const noun = (isRun ? "image" : "caption") + (page.rows.length === 1 ? "" : "s");
    $("found").textContent = `${rows.length === page.rows.length ? "" : `${whole(rows.length)} of `}${whole(page.rows.length)} ${noun}.`;
    for (const button of $("filters").children) {
      if (button.dataset.filter) button.setAttribute("aria-pressed", state.filters.has(button.dataset.filter));
    }
    $("codes").hidden = !state.filters.has("failed") || $("code").options.length < 3;
  }

  function drawMore() {
    const cards = rows.slice(drawn, drawn + AT_ONCE).map((row, place) => card(row, drawn + place));
    if (drawn === 0 && cards.length) cards[0].tabIndex = 0;
    drawn += cards.length;
    $("grid").append(...cards);
  }

  function showRange(measure, bar) {
    const low = measure.start + bar * measure.width;
    const last = bar === measure.runs[0].bars.length - 1;
    const first = bar === 0;
    state.range = { name: measure.name, low: first ? -Infinity : low - measure.width * 1e-6, high: last ? Infinity : low + measure.width - measure.width * 1e-6 };
    $("filters").querySelector(".range")?.remove();
    const label = `${measure.label} ${spanOf(measure, bar, "–")} ×`;
    $("filters").append(el("button", { type: "button", class: "range", "aria-pressed": "true", title: "Remove this filter", onclick: clearRange }, label));
    openTab("captions");
    select();
  }

  /** The values of a bar in words; those of whole numbers end with the last one. */
  function spanOf(measure, bar, to) {
    const low = measure.start + bar * measure.width;
    const high = low + measure.width - (measure.digits ? 0 : 1);
    return high > low ? `${shown(low, measure.digits)}${to}${shown(high, measure.digits)}` : shown(low, measure.digits);
  }

  function clearRange() {
    state.range = null;
    $("filters").querySelector(".range")?.remove();
    select();
  }

  // ---- Cards -----------------------------------------------------------------------------------------------------

  function picture(row) {
    if (row.image) return el("div", { class: "picture" }, el("img", { src: row.image, alt: "", loading: "lazy", decoding: "async" }));
    const failure = failuresOf(row)[0];
    const why = row.missing ?? (failure ? el("code", {}, failure.code) : "No picture.");
    return el("div", { class: "picture" }, el("p", {}, why));
  }

  function captionOf(one, mark) {
    if (!one) return el("p", { class: "caption none" }, "not in this run");
    if (one.code !== undefined) return el("p", { class: "caption none" }, "no caption");
    if (!one.caption.trim()) return el("p", { class: "caption none" }, "an empty caption");
    return el("p", { class: "caption", dir: "auto" }, mark ?? one.caption);
  }

  /** A caption's pieces, with those words marked that the other caption does not have there. */
  function differences(text, other) {
    const mine = text.match(/\S+|\s+/g) ?? [];
    const own = mine.filter((piece) => piece.trim());
    const theirs = other.split(/\s+/).filter(Boolean);
    const lengths = Array.from({ length: own.length + 1 }, () => new Uint16Array(theirs.length + 1));
    for (let i = own.length - 1; i >= 0; i--) {
      for (let j = theirs.length - 1; j >= 0; j--) {
        lengths[i][j] = own[i] === theirs[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
      }
    }
    const kept = new Set();
    for (let i = 0, j = 0; i < own.length && j < theirs.length;) {
      if (own[i] === theirs[j]) { kept.add(i); i++; j++; } else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++; else j++;
    }
    let word = -1;
    return mine.map((piece) => (!piece.trim() || kept.has(++word) ? piece : el("ins", {}, piece)));
  }

  function said(row) {
    if (!isRun) return [el("p", { class: "caption", dir: "auto" }, row.text)];
    if (!isPair) return row.runs[0].code !== undefined ? [el("p", { class: "caption none", dir: "auto" }, row.runs[0].message)] : [captionOf(row.runs[0])];
    return row.runs.map((one, run) => {
      const other = row.runs[1 - run]?.caption;
      const mark = row.changed && one?.caption !== undefined && other !== undefined ? differences(one.caption, other) : null;
      return el("div", { class: `pair ${LETTERS[run].toLowerCase()}` }, badge(run), captionOf(one, mark));
    });
  }

  function tags(row) {
    if (!isRun) return [row.sources.length > 1 && el("span", { class: "tag" }, `${row.sources.length} sources`), row.images > 0 && el("span", { class: "tag" }, row.images === 1 ? "1 image" : `${whole(row.images)} images`)];
    const failure = failuresOf(row)[0];
    const scores = row.runs.map((one, run) => one?.values?.clip_score !== undefined
      && el("span", { class: `score${isLow(one, run) ? " bad" : ""}`, title: `CLIP score${isPair ? ` of run ${LETTERS[run]}` : ""}` }, shown(one.values.clip_score, 3)));
    return [failure && el("span", { class: "tag bad" }, failure.code), row.runs.some(isCopied) && el("span", { class: "tag" }, "copied"), ...scores];
  }

  function card(row, place) {
    const name = isRun ? row.id : row.sources.join(", ");
    return el("button", { type: "button", class: "card", tabindex: -1, "data-place": place, onclick: () => openDetail(place) },
      isRun && picture(row),
      el("div", { class: "said" }, said(row)),
      el("div", { class: "meta" }, el("span", { class: "name", title: name }, el("bdi", {}, name)), tags(row)));
  }

  // ---- One row, whole --------------------------------------------------------------------------------------------

  let opened = 0;

  const COMMON = new Set("the and are for from has its one per two was with".split(" "));
  const pairsOf = (words) => words.slice(1).map((word, place) => `${words[place]} ${word}`);

  /** A text with those words marked that a caption has too: in pairs, or alone where they are not very common. */
  function shared(text, caption) {
    const own = wordsOf(caption);
    const [alone, pairs] = [new Set(own.filter((word) => word.length > 2 && !COMMON.has(word))), new Set(pairsOf(own))];
    const words = wordsOf(text);
    const inPair = pairsOf(words).map((pair) => pairs.has(pair));
    const isMarked = words.map((word, place) => alone.has(word) || inPair[place] || inPair[place - 1]);
    const pieces = [];
    let word = -1;
    for (const [place, piece] of text.split(/([\p{L}\p{N}\p{M}']+)/u).entries()) {
      if (place % 2) word++;
      const marked = place % 2 ? isMarked[word] : isMarked[word] && isMarked[word + 1];
      if (marked && pieces.at(-1)?.tagName === "MARK") pieces.at(-1).append(piece);
      else pieces.push(marked ? el("mark", {}, piece) : piece);
    }
    return pieces;
  }

  function numbers(pairs) {
    return el("dl", { class: "numbers" }, pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, el("bdi", {}, value)))));
  }

  function ofRun(row, one, run) {
    if (!one) return el("div", { class: "of-run" }, el("h2", {}, badge(run), "not in this run"));
    if (one.code !== undefined) return el("div", { class: "of-run" }, el("h2", { class: "failure" }, badge(run), one.code), el("p", { dir: "auto" }, one.message));
    const other = isPair && row.changed ? row.runs[1 - run]?.caption : undefined;
    const title = !one.caption.trim() ? "an empty caption" : other === undefined ? one.caption : differences(one.caption, other);
    return el("div", { class: `of-run ${LETTERS[run].toLowerCase()}` },
      el("h2", { dir: "auto", id: run === 0 ? "detail-title" : null }, badge(run), title),
      numbers(Object.entries(one.values).map(([name, value]) => [measures[name]?.label ?? name, name === "copied_share" ? percent(value) : shown(value, measures[name]?.digits ?? 3)])),
      one.neighbours.length > 0 && el("h3", {}, "Retrieved captions, with the words that this caption shares"),
      one.neighbours.length > 0 && el("ol", { class: "neighbours" }, one.neighbours.map((neighbour) => el("li", {},
        el("span", { dir: "auto" }, shared(neighbour.text, one.caption)), el("b", {}, shown(neighbour.score, 3)),
        neighbour.sources && el("small", {}, neighbour.sources.join(", "))))),
      one.alternatives.length > 0 && el("h3", {}, "Other captions, with their log-probability"),
      one.alternatives.length > 0 && el("ol", { class: "neighbours" }, one.alternatives.map(([text, logprob]) => el("li", {}, el("span", { dir: "auto" }, text), el("b", {}, shown(logprob, 1))))));
  }

  function openDetail(place) {
    opened = place;
    const row = rows[place];
    const step = (by, label, sign) => el("button", { type: "button", "aria-label": label, title: label, disabled: !rows[place + by], onclick: () => openDetail(place + by) }, sign);
    const about = isRun
      ? [["Image", row.id], ...(row.uri && row.uri !== row.id ? [["Read from", row.uri]] : []), ...(row.size ? [["Size", `${whole(row.size[0])} × ${whole(row.size[1])}`]] : [])]
      : [["Caption", String(row.id)], ["Sources", row.sources.join(", ")], ["Images", whole(row.images)]];
    const body = isRun ? row.runs.map((one, run) => ofRun(row, one, run)) : [el("h2", { id: "detail-title", dir: "auto" }, row.text)];
    const bar = el("div", { class: "bar" }, el("span", {}, `${whole(place + 1)} of ${whole(rows.length)}`), step(-1, "Previous", "←"), step(1, "Next", "→"),
      el("button", { type: "button", "aria-label": "Close", title: "Close", onclick: () => $("detail").close() }, "×"));
    const side = el("div", { class: "side" }, body, el("h3", {}, "About"), numbers(about));
    $("detail").replaceChildren(el("div", { class: `sheet${isRun ? "" : " texts"}` }, bar, isRun && picture(row), side));
    if (!$("detail").open) $("detail").showModal();
    $("detail").querySelector(".bar button:last-child").focus();
  }

  $("detail").addEventListener("close", () => {
    while (drawn <= opened && drawn < rows.length) drawMore();
    focusCard(opened);
  });
  $("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
  $("detail").addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && rows[opened + by]) { event.preventDefault(); openDetail(opened + by); }
  });

  // ---- Charts ----------------------------------------------------------------------------------------------------

  function chart(measure) {
    const two = measure.runs.length > 1;
    const tops = measure.runs.map((run) => (two ? Math.max(...run.bars) / Math.max(1, run.count) : Math.max(...run.bars)) || 1);
    const top = two ? Math.max(...tops) : tops[0];
    const count = measure.runs[0].bars.length;
    const end = measure.start + count * measure.width - (measure.digits ? 0 : 1);
    const bars = Array.from({ length: count }, (_, bar) => {
      const counts = measure.runs.map((run) => run.bars[bar]);
      const label = `${measure.label} ${spanOf(measure, bar, " to ")}: ${counts.map((one, run) => `${two ? `${LETTERS[run]} ` : ""}${whole(one)}`).join(", ")}`;
      return el("button", { type: "button", tabindex: bar === 0 ? 0 : -1, title: label, "aria-label": label, onclick: () => showRange(measure, bar) },
        counts.map((one, run) => el("span", { "--share": (two ? one / Math.max(1, measure.runs[run].count) : one) / top, "--least": one ? "2px" : "0" })));
    });
    const digits = measure.digits;
    const group = el("div", { class: `bars${two ? " two" : ""}`, role: "group", "aria-label": measure.label }, bars);
    rove(group, () => [...group.children], 1);
    return el("figure", { class: "chart" },
      el("figcaption", {}, el("strong", {}, measure.label), el("span", {}, measure.about)),
      measure.runs.map((run, number) => el("p", { class: "summary" }, two && badge(number), "mean ", el("b", {}, shown(run.mean, Math.max(digits, 1))),
        " · median ", el("b", {}, shown(run.median, digits)), " · 5% ", el("b", {}, shown(run.low, digits)), " · 95% ", el("b", {}, shown(run.high, digits)), ` · ${whole(run.count)} captions`)),
      group, el("div", { class: "axis" }, [measure.start, (measure.start + end) / 2, end].map((value) => el("span", {}, shown(value, digits)))));
  }

  const STAGES = [["load", "load", "loaded"], ["caption", "captioning", "captioned"], ["write", "writing", "written"]];

  function timeline(attempt) {
    const [width, height, left, bottom] = [900, 240, 52, 24];
    const steps = Math.max(...STAGES.map(([name]) => attempt[name].length));
    const rates = STAGES.map(([name]) => Array.from({ length: steps }, (_, step) => (attempt[name][step] ?? 0) / attempt.step_s));
    const top = nice(Math.max(...rates.flat()) || 1);
    const x = (step) => left + ((width - left - 8) * step) / steps;
    const y = (rate) => height - bottom - ((height - bottom - 10) * rate) / top;
    const path = (values) => values.map((rate, step) => `${step ? "L" : "M"}${x(step)} ${y(rate)}L${x(step + 1)} ${y(rate)}`).join("");
    const rules = [0, 0.5, 1].map((share) => svg("g", {}, svg("line", { class: "rule", x1: left, x2: width - 8, y1: y(share * top), y2: y(share * top) }),
      svg("text", { x: left - 8, y: y(share * top) + 4, "text-anchor": "end" }, String(+(share * top).toPrecision(3)))));
    const times = [0, 0.5, 1].map((share) => svg("text", { x: x(share * steps), y: height - 6, "text-anchor": share === 0 ? "start" : share === 1 ? "end" : "middle" }, duration(share * steps * attempt.step_s)));
    const lines = STAGES.map(([, style], stage) => svg("path", { class: style, d: path(rates[stage]), fill: "none", "stroke-width": 1.8, "stroke-linejoin": "round" }));
    const totals = STAGES.map(([name, , past]) => `${whole(attempt[name].reduce((sum, images) => sum + images, 0))} ${past}`).join(", ");
    return el("figure", { class: "chart" },
      el("figcaption", {}, el("strong", {}, "Images/s over time"), el("span", {}, `attempt of ${attempt.started_at}, in steps of ${duration(attempt.step_s)}`)),
      el("p", { class: "summary legend" }, STAGES.map(([, style, past]) => el("span", { class: style }, el("i", {}), past))),
      svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Images per second by stage: ${totals}` }, ...rules, ...times, ...lines));
  }

  function nice(value) {
    const power = 10 ** Math.floor(Math.log10(value));
    return [1, 2, 2.5, 5, 10].find((step) => step * power >= value) * power;
  }

  function duration(seconds) {
    if (seconds < 120) return `${Math.round(seconds)} s`;
    return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
  }

  // ---- Keys ------------------------------------------------------------------------------------------------------

  /** Lets arrow keys move among elements of which one is a tab stop; `columns` says how many lie in a row. */
  function rove(container, items, columns) {
    container.addEventListener("keydown", (event) => {
      const all = items();
      const place = all.indexOf(document.activeElement);
      if (place < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
      const across = typeof columns === "function" ? columns(all) : columns;
      const to = { ArrowLeft: place - 1, ArrowRight: place + 1, ArrowUp: place - across, ArrowDown: place + across, Home: 0, End: all.length - 1 }[event.key];
      if (to === undefined || !all[to]) return;
      event.preventDefault();
      for (const one of all) one.tabIndex = -1;
      all[to].tabIndex = 0;
      all[to].focus();
      if (container.getAttribute("role") === "tablist") all[to].click();
    });
  }

  function focusCard(place) {
    const cards = [...$("grid").children];
    for (const one of cards) one.tabIndex = -1;
    if (!cards[place]) return;
    cards[place].tabIndex = 0;
    cards[place].focus();
  }

  const columns = (cards) => cards.findIndex((one) => one.offsetTop !== cards[0].offsetTop) >>> 0 || 1;

  const tabs = [...document.querySelectorAll("[role=tab]")];

  function openTab(id) {
    for (const tab of tabs) {
      const selected = tab.getAttribute("aria-controls") === id;
      tab.setAttribute("aria-selected", selected);
      tab.tabIndex = selected ? 0 : -1;
      $(tab.getAttribute("aria-controls")).hidden = !selected;
    }
    history.replaceState(null, "", `#${id}`);
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.ctrlKey && !event.metaKey && !$("detail").open && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      openTab("captions");
      $("query").focus();
    }
  });

  // ---- Begin -----------------------------------------------------------------------------------------------------

  for (const filter of FILTERS) {
    const count = page.rows.filter(filter.keeps).length;
    if (!count) continue;
    $("filters").append(el("button", { type: "button", "data-filter": filter.name, "aria-pressed": "false", onclick: () => {
      state.filters.has(filter.name) ? state.filters.delete(filter.name) : state.filters.add(filter.name);
      if (filter.name === "failed") $("code").value = state.code = "";
      select();
    } }, filter.label, " ", el("span", { class: "count" }, whole(count))));
  }
  const codes = [...new Set(page.rows.flatMap((row) => failuresOf(row).map((one) => one.code)))].sort();
  $("code").append(new Option("Any error", ""), ...codes.map((code) => new Option(code, code)));
  $("sort").append(new Option(isRun ? "Name" : "Number", "id"));
  const orders = { copied_share: ["least copied", "most copied"], words: ["shortest", "longest"], characters: ["fewest characters", "most characters"], caption_tokens: ["shortest", "longest"] };
  for (const measure of page.measures) {
    const [up, down] = orders[measure.name] ?? [`${measure.label}, lowest`, `${measure.label}, highest`];
    for (const [label, direction] of [[up, "up"], [down, "down"]]) $("sort").append(new Option(label[0].toUpperCase() + label.slice(1), `${measure.name} ${direction}`));
  }

  $("query").addEventListener("input", () => { state.query = $("query").value; select(); });
  $("query").addEventListener("keydown", (event) => {
    if (event.key === "Escape") { $("query").value = state.query = ""; select(); }
    if (event.key === "ArrowDown" && rows.length) { event.preventDefault(); focusCard(0); }
  });
  document.querySelector(".toolbar").addEventListener("submit", (event) => event.preventDefault());
  $("sort").addEventListener("change", () => { state.sort = $("sort").value; select(); });
  $("code").addEventListener("change", () => { state.code = $("code").value; select(); });
  $("reset").addEventListener("click", () => {
    state.filters.clear();
    state.query = $("query").value = state.code = $("code").value = "";
    clearRange();
    $("query").focus();
  });
  for (const button of document.querySelectorAll("[data-code]")) {
    button.addEventListener("click", () => {
      state.filters = new Set(["failed"]);
      state.code = $("code").value = button.dataset.code;
      state.query = $("query").value = "";
      openTab("captions");
      clearRange();
    });
  }

  const shapes = page.rows.filter((row) => row.size).map((row) => row.size[0] / row.size[1]).sort((one, other) => one - other);
  if (shapes.length) document.body.style.setProperty("--shape", Math.min(1.6, Math.max(0.8, shapes[shapes.length >> 1])));
  $("charts").append(...page.measures.map(chart));
  for (const place of document.querySelectorAll(".timelines")) place.append(...page.timelines[place.dataset.run].map(timeline));
  rove($("grid"), () => [...$("grid").children], columns);
  const tablist = document.querySelector("[role=tablist]");
  rove(tablist, () => tabs, 1);
  for (const tab of tabs) tab.addEventListener("click", () => openTab(tab.getAttribute("aria-controls")));
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting) && drawn < rows.length) drawMore();
  }, { rootMargin: "1200px" }).observe($("more"));
  select();
  const wanted = location.hash.slice(1);
  if (tabs.some((tab) => tab.getAttribute("aria-controls") === wanted)) openTab(wanted);
})();
