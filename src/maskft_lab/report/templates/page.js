"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const element = (tag, text) => { const made = document.createElement(tag); made.textContent = text; return made; };

// Light and dark: as the system says, until the button is used.
const theme = byId("theme");
const isDark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const showTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-pressed", String(isDark())); };
theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; showTheme(); });
showTheme();

// Tables that sort: by data-sort where a cell has it, else by its text. Cells without a number stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.sort;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined && y === undefined) return direction * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
      if (x === undefined || y === undefined) return x === undefined ? 1 : -1;
      return direction * (Number(x) - Number(y));
    });
    table.tBodies[0].append(...rows);
  }));
}

// Filters: rows that hold every word.
for (const input of document.querySelectorAll("input[data-filter]")) {
  const table = byId(input.dataset.filter);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    byId(`${table.id}-count`).textContent = words.length ? `${shown} of ${table.tBodies[0].rows.length} rows` : "";
  });
}

// Items won and lost.
if (data.items && data.items.length) {
  const page = 25;
  const names = { prompt: "question", answer: "reference" };
  let limit = page;
  const digits = (record, value) => record.unit === "fraction" ? value.toFixed(2) : value.toFixed(4);
  const show = () => {
    const record = data.items[Number(byId("items-method").value)];
    const kind = byId("items-kind").value;
    const words = byId("items-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = record.rows.filter((row) => (kind === "all" || (row.gain > 0) === (kind === "won"))
      && words.every((word) => [row.id, ...Object.values(row.texts)].join("\n").toLowerCase().includes(word)));
    const texts = ["prompt", "answer", "output_baseline", "output_method"].filter((name) => record.rows.some((row) => name in row.texts));
    const heads = ["item", "change", `${record.metric}, ${record.baseline}`, `${record.metric}, ${record.method}`,
      ...texts.map((name) => names[name] || (name === "output_method" ? record.method : record.baseline))];
    const head = document.createElement("tr");
    head.append(...heads.map((text) => { const cell = element("th", text); cell.scope = "col"; return cell; }));
    byId("items-table").tHead.replaceChildren(head);
    byId("items-table").tBodies[0].replaceChildren(...rows.slice(0, limit).map((row) => {
      const line = document.createElement("tr");
      line.append(element("td", row.id), element("td", `${row.gain > 0 ? "▲ won" : "▼ lost"} ${digits(record, Math.abs(row.gain))}`), element("td", digits(record, row.baseline)),
        element("td", digits(record, row.method)), ...texts.map((name) => element("td", row.texts[name] ?? "")));
      return line;
    }));
    byId("items-more").hidden = rows.length <= limit;
    const seeds = record.num_seeds > 1 ? `, mean of ${record.num_seeds} seeds` : "";
    byId("items-count").textContent = `${record.method}: ${record.won} won, ${record.lost} lost, ${record.tied} tied${seeds}. `
      + `Of the ${record.rows.length} that changed most, ${rows.length} match; ${Math.min(limit, rows.length)} shown.`;
  };
  for (const id of ["items-method", "items-kind", "items-search"]) byId(id).addEventListener("input", () => { limit = page; show(); });
  byId("items-more").addEventListener("click", () => { limit += page; show(); });
  show();
}
