/** Shows tokens: those of a text, colored by loss, and lists of those that were likely. */
import { largest, probabilities } from "./model.js";

const RED = 8; // nats of the strongest color

/** Shows a text as tokens. `chips` has one more child before them: the lines of attention. */
export function showTokens(chips, tokens) {
  while (chips.children.length - 1 > tokens.length) chips.lastChild.remove();
  tokens.forEach((token, at) => {
    let chip = chips.children[at + 1];
    if (!chip) {
      chip = chips.appendChild(element("span", "chip"));
      chip.setAttribute("role", "option");
      chip.id = `token-${at}`;
    }
    if (chip.shown !== token.text) {
      chip.replaceChildren(...visible(token.text));
      chip.shown = token.text;
    }
    if (chip.nats !== token.nats) {
      chip.nats = token.nats;
      chip.classList.toggle("unscored", token.nats === undefined);
      chip.style.setProperty("--loss", Math.min(1, (token.nats ?? 0) / RED).toFixed(3));
    }
  });
}

/**
 * Shows the likeliest tokens with their probabilities before and after the settings; none without logits.
 * `actual` is the token of the text.
 */
export function showBars(list, model, logits, settings, actual) {
  const [before, after] = logits ? [probabilities(logits), probabilities(logits, settings)] : [[], []];
  const ids = largest(before, 10);
  if (logits && actual !== undefined && !ids.includes(actual)) ids[9] = actual;
  const rows = ids.map((id) => {
    const row = element("li");
    row.classList.toggle("actual", id === actual);
    row.classList.toggle("removed", after[id] === 0);
    Object.assign(row.dataset, { id, before: before[id], after: after[id] });
    const name = row.appendChild(element("code"));
    name.append(...visible(model.label(id), true));
    const track = row.appendChild(element("span", "track"));
    track.appendChild(element("i", "after")).style.setProperty("--after", after[id]);
    track.appendChild(element("i", "before")).style.setProperty("--before", before[id]);
    row.append(element("span", "value", percent(after[id])), element("span", "value muted", percent(before[id])));
    return row;
  });
  list.replaceChildren(...rows);
}

function percent(probability) {
  return `${(100 * probability).toFixed(1)}%`;
}

/** A text with symbols for line breaks, tabs and spaces at its end; with `start`, also for those at its start. */
function visible(text, start = false) {
  return text.split(start ? /(\n|\t|^ +| +$)/ : /(\n|\t| +$)/).filter(Boolean).map((part) => {
    if (!/^\s+$/.test(part)) return part;
    return element("span", "symbol", part.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t").replaceAll(" ", "␣"));
  });
}

function element(name, className = "", text = "") {
  return Object.assign(document.createElement(name), { className, textContent: text });
}
