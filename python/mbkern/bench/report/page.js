const body = document.body.dataset;
body.errors = "";
window.addEventListener("error", (event) => { body.errors += event.message + "\n"; });
const forced = location.hash.slice(1);
if (forced === "dark" || forced === "light") document.documentElement.classList.add(forced);
const preference = matchMedia("(prefers-color-scheme: dark)");

function colours() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink"), line = style.getPropertyValue("--line");
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
  return { ink, axis };
}

function drawn(spec) {
  const { ink, axis } = colours();
  const narrow = innerWidth < 600;
  const axes = Object.entries(spec.layout).filter(([name]) => /^[xy]axis/.test(name));
  return {
    ...spec.layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, size: narrow ? 10 : 12 },
    ...Object.fromEntries(axes.map(([name, own]) => [name, { ...own, ...axis }])),
    legend: { ...spec.layout.legend, bgcolor: "rgba(0,0,0,0)" },
  };
}

function draw() {
  const all = specs.map((spec, k) =>
    Plotly.react(`plot-${k}`, spec.data, drawn(spec), { responsive: true, displayModeBar: false }));
  return Promise.all(all).then(() => {
    body.drawn = document.querySelectorAll(".js-plotly-plot").length;
    body.overflow = Math.max(0, document.documentElement.scrollWidth - innerWidth);
  });
}

draw().catch((error) => { body.errors += error + "\n"; });
preference.addEventListener("change", draw);
