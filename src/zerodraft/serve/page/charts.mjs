// Small pictures of an answer: paths for SVG, one for each series, so that long answers stay cheap.

const SVG = "http://www.w3.org/2000/svg";
// fewer bars than this do not fill the width
const FEWEST = 32;

/** Bars from the ground up, one unit wide; places that `when` refuses stay empty. */
export function bars(values, top, when = () => true) {
  const drawn = values.map((value, i) => (value && when(i) ? `M${i + 0.1} ${top}V${top - value}H${i + 0.9}V${top}Z` : ""));
  return drawn.join("");
}

/** A line through the middles of the places. */
export function line(values, top) {
  return values.map((value, i) => `${i ? "L" : "M"}${i + 0.5} ${(top - value).toFixed(3)}`).join("");
}

/**
 * A figure with a caption and a path for each name. `draw` takes these as `{ name: path }`, the highest value, the
 * number of places and what a place is called; `onPick` is told which place was clicked.
 */
export function chart(caption, names, onPick) {
  const figure = document.createElement("figure");
  const said = document.createElement("figcaption");
  said.textContent = caption;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", caption);
  const paths = {};
  for (const name of names) {
    paths[name] = document.createElementNS(SVG, "path");
    paths[name].classList.add(name);
    svg.append(paths[name]);
  }
  const scale = document.createElement("p");
  scale.className = "scale";
  const ends = ["", "", ""].map(() => document.createElement("span"));
  scale.append(...ends);
  figure.append(said, svg, scale);
  let places = 1;
  if (onPick) {
    svg.addEventListener("click", (event) => {
      const box = svg.getBoundingClientRect();
      onPick(Math.floor(((event.clientX - box.left) / box.width) * places));
    });
  }
  return {
    figure,
    draw(series, top, count, unit) {
      places = Math.max(count, FEWEST);
      svg.setAttribute("viewBox", `0 0 ${places} ${top}`);
      for (const name of names) paths[name].setAttribute("d", series[name] ?? "");
      ends[0].textContent = `${unit} 1`;
      ends[1].textContent = `height: ${top}`;
      ends[2].textContent = `${unit} ${places}`;
    },
  };
}
