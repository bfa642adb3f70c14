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

// Maps of masks: a canvas of dots, each an entry or a block of entries.
if (data.maps && data.maps.length) {
  const canvas = byId("map"), context = canvas.getContext("2d");
  const view = { x: 0, y: 0, scale: 1, least: 1 };
  let map = null, picture = null;
  const shades = [[38, 22, 60], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const shade = (share) => {
    const place = Math.min(0.9999, Math.max(0, share)) * (shades.length - 1), low = Math.floor(place);
    return shades[low].map((value, i) => value + (place - low) * (shades[low + 1][i] - value));
  };
  const share = (row, column) => {
    const index = row * map.size[1] + column;
    return map.block === 1 ? (map.bytes[index >> 3] >> (7 - (index & 7))) & 1 : map.high * map.bytes[index] / 255;
  };
  const paint = () => {
    const [rows, columns] = map.size;
    picture = document.createElement("canvas");
    picture.width = columns; picture.height = rows;
    const drawn = picture.getContext("2d"), image = drawn.createImageData(columns, rows);
    for (let row = 0; row < rows; row += 1) for (let column = 0; column < columns; column += 1) {
      image.data.set([...shade(share(row, column) / (map.high || 1)), 255], 4 * (row * columns + column));
    }
    drawn.putImageData(image, 0, 0);
  };
  const draw = () => {
    context.imageSmoothingEnabled = view.scale < 1;
    context.fillStyle = "#16191c";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(picture, -view.x * view.scale, -view.y * view.scale, map.size[1] * view.scale, map.size[0] * view.scale);
    const rows = [Math.max(0, Math.floor(view.y)), Math.min(map.size[0], Math.ceil(view.y + canvas.height / view.scale))];
    const columns = [Math.max(0, Math.floor(view.x)), Math.min(map.size[1], Math.ceil(view.x + canvas.width / view.scale))];
    const what = map.block === 1 ? "entry by entry" : `blocks of ${map.block} x ${map.block}`;
    canvas.dataset.zoom = String(view.scale / view.least);
    byId("map-text").textContent = `${map.name}: ${map.shape.join(" x ")}, ${(100 * map.share).toFixed(2)} % removed, ${what}; `
      + `rows ${rows[0] * map.block} to ${Math.min(map.shape[0], rows[1] * map.block) - 1}, columns ${columns[0] * map.block} to ${Math.min(map.shape[1], columns[1] * map.block) - 1}; `
      + `${(view.scale / view.least).toFixed(1)} times`;
  };
  const whole = () => {
    view.least = view.scale = Math.min(canvas.width / map.size[1], canvas.height / map.size[0]);
    view.x = (map.size[1] - canvas.width / view.scale) / 2;
    view.y = (map.size[0] - canvas.height / view.scale) / 2;
    draw();
  };
  const zoom = (times, x = canvas.width / 2, y = canvas.height / 2) => {
    const scale = Math.min(64, Math.max(view.least, view.scale * times));
    view.x += x / view.scale - x / scale;
    view.y += y / view.scale - y / scale;
    view.scale = scale;
    if (scale === view.least) whole(); else draw();
  };
  const move = (x, y) => { view.x += x / view.scale; view.y += y / view.scale; draw(); };
  const choose = () => {
    map = data.maps[Number(byId("map-mask").value)].maps[Number(byId("map-matrix").value)];
    map.bytes = map.bytes || Uint8Array.from(atob(map.data), (character) => character.charCodeAt(0));
    paint();
    whole();
  };
  const list = () => {
    byId("map-matrix").replaceChildren(...data.maps[Number(byId("map-mask").value)].maps.map((each, index) => {
      const option = element("option", each.name);
      option.value = index;
      return option;
    }));
    choose();
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
  };
  byId("map-mask").addEventListener("input", list);
  byId("map-matrix").addEventListener("input", choose);
  byId("map-in").addEventListener("click", () => zoom(1.5));
  byId("map-out").addEventListener("click", () => zoom(1 / 1.5));
  byId("map-whole").addEventListener("click", whole);
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, ...place(event)); }, { passive: false });
  let last = null;
  canvas.addEventListener("pointerdown", (event) => { last = place(event); canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const now = place(event);
    move(last[0] - now[0], last[1] - now[1]);
    last = now;
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
  const keys = { "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), "0": whole, ArrowLeft: () => move(-40, 0),
    ArrowRight: () => move(40, 0), ArrowUp: () => move(0, -40), ArrowDown: () => move(0, 40) };
  canvas.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  list();
}
