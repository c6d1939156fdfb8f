/** Shows the settings with which tokens are drawn: sliders, and fields for numbers. */
const find = (id) => document.getElementById(id);
const sliders = ["temperature", "top_k", "top_p", "min_p"].map(find);
const fields = ["seed", "tokens"].map(find);
const exact = {}; // settings of the model between two positions of a slider, until it is moved

/** The settings for `probabilities`. */
export function settings() {
  return Object.fromEntries(sliders.map((slider) => [slider.id, exact[slider.id] ?? slider.valueAsNumber]));
}

/** Shows the settings of a model, and calls `changed` whenever a slider is moved. */
export function openSettings(sampling, changed) {
  for (const slider of sliders) {
    const value = sampling[slider.id] ?? Number(slider.dataset.off);
    slider.max = Math.max(Number(slider.max), value);
    slider.value = value;
    if (slider.valueAsNumber !== value) exact[slider.id] = value;
    showValue(slider);
    slider.addEventListener("input", () => {
      delete exact[slider.id];
      showValue(slider);
      changed();
    });
  }
  [find("seed").value, find("tokens").value] = [sampling.seed, sampling.max_new_tokens];
  for (const field of fields) {
    field.addEventListener("change", () => {
      const value = Math.round(field.valueAsNumber || 0);
      field.value = Math.min(Number(field.max), Math.max(Number(field.min), value));
    });
  }
}

function showValue(slider) {
  const value = exact[slider.id] ?? slider.value;
  slider.ariaValueText = slider.dataset.off === value ? "off" : value;
  document.querySelector(`output[for="${slider.id}"]`).textContent = slider.ariaValueText;
}
