"use strict";
// Draws every chart from the specification beside it, in the colours of the page, again whenever those change.
(() => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let drawn = [];

  function config() {
    const [ink, muted, line] = ["--ink", "--muted", "--line"].map(colour);
    const words = { labelColor: muted, titleColor: muted, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
    return {
      background: null,
      font: "system-ui, sans-serif",
      axis: { ...words, gridColor: line, domainColor: line, tickColor: line, gridOpacity: 0.6 },
      legend: { ...words, labelColor: ink },
      view: { stroke: null },
      bar: { color: colour("--c0") },
      rule: { color: muted },
      tick: { color: ink },
      range: { category: [0, 1, 2, 3, 4, 5, 6].map((number) => colour(`--c${number}`)) },
    };
  }

  async function draw() {
    drawn.splice(0).forEach((result) => result.finalize());
    for (const place of document.querySelectorAll(".chart")) {
      const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent);
      drawn.push(await vegaEmbed(place, spec, {
        actions: false,
        renderer: "svg",
        ast: true, // expressions are interpreted: the page's policy allows no code made from text
        config: config(),
        tooltip: { theme: dark.matches ? "dark" : "light" },
      }));
    }
    document.documentElement.dataset.charts = drawn.length;
  }

  dark.addEventListener("change", draw);
  draw();
})();
