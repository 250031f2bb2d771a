(function () {
  "use strict";

  function keyOf(row, column) {
    const cell = row.cells[column];
    const key = cell.dataset.key;
    return key === undefined ? cell.textContent.toLowerCase() : key === "" ? null : Number(key);
  }

  function compare(a, b) {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  }

  function sort(table, heading) {
    const column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") === "ascending";
    const rows = Array.from(table.tBodies[0].rows, (row) => [keyOf(row, column), row]);
    rows.sort(function (first, second) {
      const empty = (first[0] === null) - (second[0] === null);
      return empty || (down ? -compare(first[0], second[0]) : compare(first[0], second[0]));
    });
    table.tBodies[0].append(...rows.map((pair) => pair[1]));
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  }

  function filter(input) {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = Array.from(document.getElementById(input.dataset.table).tBodies[0].rows);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    document.querySelector('[data-count="' + input.dataset.table + '"]').textContent = shown + " of " + rows.length;
  }

  for (const table of document.querySelectorAll("table")) {
    for (const heading of table.tHead.rows[0].cells) {
      heading.firstElementChild.addEventListener("click", () => sort(table, heading));
    }
  }
  for (const input of document.querySelectorAll("input[data-table]")) {
    input.addEventListener("input", () => filter(input));
  }

  const frame = document.querySelector(".graph");
  const svg = frame.querySelector("svg");
  const whole = svg.viewBox.baseVal;

  function zoom(factor) {
    const width = factor ? svg.clientWidth * factor : Math.min(frame.clientWidth - 4, whole.width);
    const middle = (frame.scrollLeft + frame.clientWidth / 2) / svg.clientWidth;
    const top = frame.scrollTop / svg.clientHeight;
    svg.setAttribute("width", Math.max(80, Math.round(width)));
    frame.scrollLeft = middle * svg.clientWidth - frame.clientWidth / 2;
    frame.scrollTop = top * svg.clientHeight;
  }

  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => zoom(Number(button.dataset.zoom)));
  }
  document.getElementById("find-node").addEventListener("input", function () {
    const word = this.value.toLowerCase().trim();
    let first = null;
    for (const box of svg.querySelectorAll(".box")) {
      const found = word !== "" && box.querySelector("title").textContent.toLowerCase().includes(word);
      box.classList.toggle("found", found);
      if (found && first === null) first = box;
    }
    if (first === null) return;
    const place = first.getBoundingClientRect();
    const around = frame.getBoundingClientRect();
    frame.scrollLeft += place.left - around.left - around.width / 2 + place.width / 2;
    frame.scrollTop += place.top - around.top - around.height / 3;
  });
  frame.scrollLeft = (svg.clientWidth - frame.clientWidth) / 2;
})();
