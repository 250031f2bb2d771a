(function () {
  "use strict";

  const data = JSON.parse(document.getElementById("data").textContent);
  const drawn = [];

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  }

  function safe(text) {
    return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function short(text, most) {
    return safe(text.length > most ? "…" + text.slice(1 - most) : text);
  }

  function number(value) {
    return value === null ? "–" : Number(value).toLocaleString("en", { maximumSignificantDigits: 4 });
  }

  function axis(title, more) {
    return Object.assign(
      { title: { text: title, standoff: 6 }, gridcolor: color("line"), zerolinecolor: color("line"), automargin: true },
      more
    );
  }

  function draw(id, build) {
    const place = document.getElementById(id);
    if (place === null) return;
    const figure = build(place.clientWidth);
    const layout = Object.assign(
      {
        margin: { l: 48, r: 12, t: 28, b: 40 },
        height: 300,
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: color("text"), size: 12, family: "system-ui, sans-serif" },
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
        hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("text") } },
      },
      figure.layout
    );
    Plotly.react(place, figure.traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }

  function chart(id, build) {
    if (document.getElementById(id) === null) return;
    drawn.push([id, build]);
    draw(id, build);
  }

  function again() {
    for (const [id, build] of drawn) draw(id, build);
  }

  function siteTrace(kind, key, name, look) {
    const sites = data.sites.filter((site) => site.kind === kind);
    return Object.assign(
      {
        x: sites.map((site) => site.order),
        y: sites.map((site) => site[key]),
        text: sites.map((site) => safe(site.name) + "<br>" + safe(site.module)),
        hovertemplate: "%{text}<br>%{y:.1f} dB<extra>" + name + "</extra>",
        name: name,
        type: "scatter",
      },
      look
    );
  }

  function sqnr() {
    return {
      traces: [
        siteTrace("activation", "sqnr", "activation", { mode: "lines+markers", line: { color: color("integer") } }),
        siteTrace("activation", "own", "its own rounding", { mode: "markers", marker: { color: color("end"), symbol: "x-thin-open" } }),
        siteTrace("weight", "sqnr", "weight", { mode: "markers", marker: { color: color("float"), symbol: "diamond" } }),
      ],
      layout: { xaxis: axis("place in the graph", { showticklabels: false }), yaxis: axis("SQNR (dB)") },
    };
  }

  function noise(width) {
    const most = data.sites.filter((site) => site.noise !== null).sort((a, b) => b.noise - a.noise).slice(0, 15).reverse();
    return {
      traces: [{
        type: "bar", orientation: "h",
        x: most.map((site) => site.noise),
        y: most.map((_, i) => i),
        marker: { color: most.map((site) => color(site.kind === "weight" ? "float" : "integer")) },
        text: most.map((site) => safe(site.name) + " (" + site.kind + ")<br>" + safe(site.why)),
        textposition: "none",
        hovertemplate: "%{text}<br>%{x:.1%}<extra></extra>",
      }],
      layout: {
        height: 70 + 22 * most.length,
        xaxis: axis("share of the noise", { tickformat: ".0%" }),
        yaxis: axis("", { tickvals: most.map((_, i) => i), ticktext: most.map((site) => short(site.name, width < 500 ? 16 : 40)) }),
      },
    };
  }

  function work() {
    const traces = [true, false].map(function (kind) {
      const rows = data.work.map((row, i) => [i, row]).filter((pair) => pair[1].integer === kind);
      return {
        type: "bar", name: kind ? "integer" : "float", marker: { color: color(kind ? "integer" : "float") },
        x: rows.map((pair) => pair[0]),
        y: rows.map((pair) => pair[1].macs),
        text: rows.map((pair) => safe(pair[1].node) + "<br>" + safe(pair[1].module)),
        textposition: "none",
        hovertemplate: "%{text}<br>%{y:,} multiply-accumulates<extra></extra>",
      };
    });
    return {
      traces: traces.filter((trace) => trace.x.length),
      layout: { showlegend: false, barmode: "overlay", bargap: 0.15, xaxis: axis("layer", { showticklabels: false }), yaxis: axis("multiply-accumulates", { exponentformat: "SI" }) },
    };
  }

  function times() {
    return {
      traces: ["float", "quantized"].map((name) => ({
        type: "box", name: name, boxpoints: "all", jitter: 0.5, pointpos: 0, y: data.times[name].map((s) => s * 1e3),
        marker: { color: color(name === "float" ? "float" : "integer"), size: 4 }, hovertemplate: "%{y:.3g} ms<extra></extra>",
      })),
      layout: { showlegend: false, yaxis: axis("ms", { rangemode: "tozero" }) },
    };
  }

  function line(at, name) {
    return { type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", line: { color: color(name), width: 2, dash: "dash" } };
  }

  function word(at, text, anchor) {
    return { x: at, y: 1, yref: "paper", yanchor: "bottom", xanchor: anchor, text: text, showarrow: false, font: { size: 11, color: color("mark") } };
  }

  function range(row, width) {
    const names = width < 500 ? ["", ""] : ["smallest ", "largest "];
    const middle = row.counts.map((_, i) => row.start + (i + 0.5) * row.step);
    return {
      traces: [{
        type: "bar", x: middle, y: row.counts.map((count) => count || null),
        marker: { color: middle.map((at) => color(at < row.low - row.scale / 2 || at > row.high + row.scale / 2 ? "mark" : "integer")) },
        hovertemplate: "%{x:.4g}: %{y:,} values<extra></extra>",
      }],
      layout: {
        bargap: 0.05,
        shapes: [line(row.low, "mark"), line(row.high, "mark")],
        annotations: [word(row.low, names[0] + number(row.low), width < 500 ? "right" : "left"), word(row.high, names[1] + number(row.high), width < 500 ? "left" : "right")],
        xaxis: axis("value", { range: [row.start, row.start + row.counts.length * row.step] }),
        yaxis: axis("values", { type: "log", exponentformat: "power", dtick: 1, range: [-0.2, 0.1 + Math.log10(Math.max(...row.counts))] }),
      },
    };
  }

  function rangeText(row) {
    const used = (Math.min(row.most, row.high) - Math.max(row.least, row.low)) / (row.high - row.low);
    return row.operator + (row.module ? " in " + row.module : "") + ": scale " + number(row.scale) + ", zero point " + row.zero_point +
      "; values from " + number(row.least) + " to " + number(row.most) + ", " + (100 * used).toFixed(0) + " % of the range; " +
      row.clipped.toLocaleString("en") + " of " + row.total.toLocaleString("en") + " clipped";
  }

  function weight(row) {
    const edge = (sign) => ({
      type: "scatter", mode: row.channels.length > 1 ? "lines" : "markers", line: { shape: "hvh", color: color("mark"), width: 1.2 },
      x: row.channels, y: row.reach.map((value) => sign * value), name: "reach of the scale", showlegend: sign > 0,
      hovertemplate: "channel %{x}: %{y:.4g}<extra>reach</extra>",
    });
    return {
      traces: [{
        type: "bar", name: "values", x: row.channels, base: row.low, y: row.high.map((high, i) => high - row.low[i]),
        marker: { color: color("integer") }, customdata: row.high,
        hovertemplate: "channel %{x}: %{base:.4g} to %{customdata:.4g}<extra></extra>",
      }, edge(1), edge(-1)],
      layout: { bargap: 0.1, xaxis: axis("channel"), yaxis: axis("value") },
    };
  }

  function weightText(row) {
    const reach = row.reach.filter((value) => value > 0);
    const ratio = Math.max(...reach) / Math.min(...reach);
    return "shape " + row.shape.join(" × ") + "; the largest channel reaches " + number(ratio) + " times as far as the smallest";
  }

  function picked(selector, chartId, textId, rows, build, words) {
    const select = document.getElementById(selector);
    if (select === null || rows.length === 0) return;
    rows.forEach(function (row, i) {
      const place = row.module ? " · " + row.module : "";
      select.add(new Option(row.name + place, String(i)));
    });
    const show = function () {
      document.getElementById(textId).textContent = words(rows[select.selectedIndex]);
      draw(chartId, (width) => build(rows[select.selectedIndex], width));
    };
    select.addEventListener("change", show);
    for (const button of select.parentElement.querySelectorAll("[data-step]")) {
      button.addEventListener("click", function () {
        select.selectedIndex = (select.selectedIndex + Number(button.dataset.step) + rows.length) % rows.length;
        show();
      });
    }
    document.getElementById(textId).textContent = words(rows[0]);
    chart(chartId, (width) => build(rows[select.selectedIndex], width));
  }

  chart("chart-sqnr", sqnr);
  chart("chart-noise", noise);
  chart("chart-work", work);
  chart("chart-times", times);
  picked("pick-range", "chart-range", "text-range", data.ranges, range, rangeText);
  picked("pick-weight", "chart-weight", "text-weight", data.weights, weight, weightText);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  matchMedia("print").addEventListener("change", again);
})();
