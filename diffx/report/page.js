"use strict";
const root = document.documentElement;
root.classList.add("scripted");

// ---- light and dark ----
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
const toggle = document.getElementById("theme");
function showTheme() {
  toggle.textContent = isDark() ? "Light colours" : "Dark colours";
  recolour();
}
toggle.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
dark.addEventListener("change", showTheme);

// ---- sorting ----
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}
function sortBy(head) {
  const table = head.closest("table"), body = table.tBodies[0];
  const column = [...head.parentNode.children].indexOf(head);
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.children) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");  // what is missing comes last either way
    const numbers = [Number(x), Number(y)];
    const order = numbers.some(Number.isNaN) ? x.localeCompare(y, "en", { numeric: true }) : numbers[0] - numbers[1];
    return down ? -order : order;
  };
  body.append(...[...body.rows].sort(compare));
  document.getElementById("said").textContent = `Sorted by ${head.textContent.trim()}, ${down ? "descending" : "ascending"}.`;
}

// ---- samples over training ----
const slider = document.getElementById("step");
if (slider) {
  const steps = JSON.parse(slider.dataset.steps), output = document.getElementById("step-shown");
  const show = () => {
    const step = steps[slider.value];
    output.textContent = `step ${step.toLocaleString("en")}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    for (const figure of document.querySelectorAll(".gallery figure")) {
      const pictures = [...figure.querySelectorAll("img")];
      const newest = pictures.findLast((picture) => Number(picture.dataset.step) <= step);
      for (const picture of pictures) picture.hidden = picture !== newest;
      const remark = figure.querySelector(".none");
      remark.hidden = newest !== undefined && Number(newest.dataset.step) === step;
      remark.textContent = newest ? `of step ${newest.dataset.step}: none is newer` : "no picture yet at this step";
    }
  };
  slider.addEventListener("input", show);
  show();
}

// ---- plots ----
const plots = [];
const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
function coloured(layout, data, width) {
  const names = data.filter((trace) => trace.showlegend).map((trace) => trace.name.length);
  const columns = Math.max(1, Math.floor((width - 80) / (7 * Math.max(...names, 1) + 50)));
  const rows = layout.showlegend ? Math.ceil(names.length / columns) : 0;
  const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), tickcolor: colour("--line") };
  const legend = { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", maxheight: 0.9 };
  return {
    ...layout, height: layout.height + 20 * rows, xaxis: { ...layout.xaxis, ...axis }, yaxis: { ...layout.yaxis, ...axis }, legend,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--text"), size: 13 },
    margin: { l: 60, r: 16, t: 16, b: 50 }, hovermode: "closest", dragmode: "zoom",
    hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--text") } },
  };
}
function draw({ box, live, content }) {
  const chosen = [...box.querySelectorAll("fieldset")].map((set) => set.querySelector("input:checked").value);
  const { data, layout } = content.figures[chosen.join("|")];
  const options = {
    responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { format: "svg", filename: content.key },
  };
  Plotly.react(live, data, coloured(layout, data, live.clientWidth), options);
}
function recolour() {
  plots.forEach(draw);
}
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) recolour();  // the legend takes other lines
  width = innerWidth;
});
async function start() {
  const packed = document.getElementById("plotly");
  if (!packed) return;
  const failed = document.getElementById("no-plots");
  if (!("DecompressionStream" in window)) {
    failed.hidden = false;
    return;
  }
  try {
    const bytes = Uint8Array.from(atob(packed.textContent.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    for (const box of document.querySelectorAll(".plot")) {
      const content = JSON.parse(box.querySelector("script[type='application/json']").textContent);
      const plot = { box, live: box.querySelector(".live"), content };
      box.classList.add("drawn");
      draw(plot);
      plots.push(plot);
      for (const input of box.querySelectorAll("input")) input.addEventListener("change", () => draw(plot));
    }
    root.dataset.plots = "drawn";
  } catch (error) {
    for (const box of document.querySelectorAll(".plot")) box.classList.remove("drawn");
    failed.hidden = false;
    console.error(error);
  }
}

// ---- print: what is folded away on the screen is wanted on paper ----
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details.on-paper:not([open])")];
  for (const details of opened) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of opened) details.open = false;
});

showTheme();
start();
