// What the tests ask of the page; each is run in it.

// What each tile and each metric shows, with the time of the sample that it is from.
function readPage() {
  const figure = (node, name) => [name, node.dataset.value, node.textContent];
  const textOf = (id) => document.getElementById(id).textContent;
  const ids = ["verdict", "phase", "speed", "memory", "limit"];
  return {
    t: Number(document.body.dataset.t),
    overview: {
      ...Object.fromEntries(ids.map((id) => [id, textOf(id)])),
      alerts: [...document.querySelectorAll("#active-alerts li")].map((node) => node.textContent),
    },
    tiles: [...document.querySelectorAll("#tiles dd")].map((node) => figure(node, node.dataset.path)),
    metrics: [...document.querySelectorAll("#metrics-table [data-metric]")].map((node) =>
      figure(node, node.dataset.metric),
    ),
    map: [...document.querySelectorAll("#map-table tbody tr")].map((row) =>
      [...row.cells].map((cell) => cell.textContent),
    ),
  };
}

// Of each chart, whether something is drawn, or the text that stands there instead.
function readCharts() {
  const drawn = (node) => {
    const picture = node.querySelector("svg[role=img]");
    const paths = [...picture.querySelectorAll("path")];
    return paths.some((path) => path.getAttribute("d").length > 20) || picture.textContent;
  };
  return Object.fromEntries([...document.querySelectorAll(".chart")].map((node) => [node.dataset.chart, drawn(node)]));
}

// Number, share in memory and text of each layer, and the names of the other parts.
function readLayers() {
  const layers = [...document.querySelectorAll("#layers li")].map((node) =>
    [node.querySelector("b").textContent, Number(node.dataset.share), node.textContent],
  );
  return [layers, [...document.querySelectorAll("#parts-table th")].map((node) => node.textContent)];
}

// How many pixels of each colour the map of a tier has.
function readMap(id) {
  const canvas = document.getElementById(id);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const counts = {};
  for (let i = 0; i < data.length; i += 4) {
    const colour = data.slice(i, i + 3).join();
    if (data[i + 3] === 255) counts[colour] = (counts[colour] ?? 0) + 1;
  }
  return counts;
}

const rgb = (text) => text.match(/[\d.]+/g).map(Number);

function luminance(colour) {
  const [r, g, b] = colour.map((part) => part / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function background(node) {
  for (let at = node; at; at = at.parentElement) {
    const colour = rgb(getComputedStyle(at).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour.slice(0, 3);
  }
  return [255, 255, 255];
}

// The contrast (WCAG 2) of each text with what is behind it.
function readContrast() {
  const result = {};
  for (const node of document.querySelectorAll("body *")) {
    if (![...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())) continue;
    const style = getComputedStyle(node);
    const colour = rgb(node instanceof SVGElement ? style.fill : style.color).slice(0, 3);
    const [dark, bright] = [luminance(colour), luminance(background(node))].sort((a, b) => a - b);
    result[`${node.tagName}#${node.id} ${node.textContent.slice(0, 20)}`] = (bright + 0.05) / (dark + 0.05);
  }
  return result;
}

// Controls and pictures that a screen reader would have no word for.
function readNameless() {
  const named = (node) => {
    const ids = (node.getAttribute("aria-labelledby") ?? "").split(" ");
    const labelled = ids.some((id) => document.getElementById(id)?.textContent);
    const own = ["A", "BUTTON"].includes(node.tagName) && node.textContent.trim();
    return own || labelled || node.getAttribute("aria-label") || node.labels?.length;
  };
  const nodes = document.querySelectorAll("a, button, select, input, canvas, [role=img]");
  return [...nodes].filter((node) => !named(node)).map((node) => node.outerHTML.slice(0, 80));
}
