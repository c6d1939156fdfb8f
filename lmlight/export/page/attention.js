/** Shows attention weights: as lines from the selected token to those that it attends to, and as a map. */
export class AttentionView {
  /**
   * @param page - The elements of the page by id.
   * @param {Model} model
   * @param {function(number)} pin - Called with the position of a token that was clicked in the map.
   */
  constructor(page, model, pin) {
    Object.assign(this, { page, model, tokens: [], selected: -1, maps: null });
    for (const choice of [page.layer, page.head]) choice.addEventListener("change", () => this.choose());
    page.map.addEventListener("pointermove", (event) => this.maps && this.describe(...this.cell(event)));
    page.map.addEventListener("click", (event) => this.maps && pin(this.maps.start + this.cell(event)[0]));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.drawMap());
    new ResizeObserver(() => this.drawLines()).observe(page.view);
  }

  /** Lists the layers and heads. */
  async open() {
    const { page, model } = this;
    const { layers, heads } = await model.attention([model.bos_id ?? 0]);
    for (let layer = 0; layer < layers; layer++) page.layer.add(new Option(layer + 1, layer));
    page.head.add(new Option("mean", "mean"));
    for (let head = 0; head < heads; head++) page.head.add(new Option(head + 1, head));
  }

  /** Shows the window of a text around a token, or around the last one if none is selected. */
  async show(tokens, selected) {
    Object.assign(this, { tokens, selected });
    const at = selected < 0 ? tokens.length - 1 : selected;
    const { window } = this.model;
    const start = Math.max(0, Math.min(at - (window >> 1), tokens.length - window));
    const ids = tokens.slice(start, start + window).map(({ id }) => id);
    const key = `${start}:${ids}`;
    if (!ids.length) this.maps = null;
    else if (this.maps?.key !== key) this.maps = { key, start, ...(await this.model.attention(ids)) };
    this.choose();
  }

  /** Takes the weights (queries, keys) of the chosen layer and head, or the mean of its heads. */
  choose() {
    if (this.maps) {
      const { weights, heads, queries, keys } = this.maps;
      const { layer, head } = this.page;
      const size = queries * keys;
      const several = head.value === "mean" ? [...Array(heads).keys()] : [Number(head.value)];
      this.weights = new Float32Array(size);
      for (const one of several) {
        const from = (Number(layer.value) * heads + one) * size;
        for (let at = 0; at < size; at++) this.weights[at] += weights[from + at] / several.length;
      }
    }
    this.drawMap();
    this.drawLines();
  }

  /** The row of the selected token; -1 if it has none. */
  get query() {
    const row = this.selected < 0 ? -1 : this.selected - this.maps.start;
    return row < this.maps.queries ? row : -1;
  }

  drawMap() {
    const { page, maps } = this;
    const context = page.map.getContext("2d");
    context.clearRect(0, 0, page.map.width, page.map.height);
    if (!maps) return;
    const [red, green, blue] = getComputedStyle(page.generate).backgroundColor.match(/[\d.]+/g).map(Number);
    const image = new ImageData(maps.keys, maps.queries);
    this.weights.forEach((weight, at) => {
      image.data.set([red, green, blue, 255 * Math.sqrt(weight)], 4 * at); // small weights stay visible
    });
    const small = new OffscreenCanvas(maps.keys, maps.queries);
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, page.map.width, page.map.height);
    if (this.query < 0) return;
    const size = page.map.width / maps.queries;
    context.strokeStyle = getComputedStyle(document.body).color;
    context.lineWidth = 2;
    context.strokeRect(0, this.query * size, (this.query + 1) * size, size);
  }

  drawLines() {
    const { page, maps } = this;
    page.lines.replaceChildren();
    if (!maps || this.query < 0) return;
    const origin = page.chips.getBoundingClientRect();
    const middle = (key) => {
      const box = page.chips.children[maps.start + key + 1].getClientRects()[0]; // the first child is the lines
      return [box.left - origin.left + box.width / 2, box.top - origin.top];
    };
    const [toX, toY] = middle(this.query);
    for (let key = 0; key <= this.query; key++) {
      const weight = this.weights[this.query * maps.keys + key];
      if (weight < 0.01) continue;
      const [x, y] = middle(key);
      const path = page.lines.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
      path.setAttribute("d", `M ${toX} ${toY} Q ${(x + toX) / 2} ${Math.min(y, toY) - 14 - Math.abs(x - toX) / 8} ${x} ${y}`);
      path.setAttribute("opacity", Math.sqrt(weight).toFixed(3));
      Object.assign(path.dataset, { key: maps.start + key, weight });
    }
  }

  /** The query and the key under the mouse. */
  cell(event) {
    const box = this.page.map.getBoundingClientRect();
    const size = box.width / this.maps.queries;
    return [event.clientY - box.top, event.clientX - box.left].map((at) => Math.floor(at / size));
  }

  describe(query, key) {
    const name = (at) => `“${(this.tokens[this.maps.start + at]?.text ?? "").replaceAll("\n", "↵")}”`;
    const weight = this.weights[query * this.maps.keys + key];
    this.page.weight.textContent = key <= query ? `${name(query)} attends to ${name(key)}: ${weight.toFixed(4)}` : "\u00a0";
  }
}
