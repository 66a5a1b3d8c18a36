// The data of the page: what Python wrote, unpacked, with the widths and costs of layers of any candidate.

const STATUS = ["ok", "raced", "failed", "pending"];

function bytesOf(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

function inflated(text) {
  return new Response(new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip")));
}

/** Options from 4, 8 or 16 bits each. */
function expanded(buffer, bits) {
  if (bits === 16) return new Uint16Array(buffer);
  const bytes = new Uint8Array(buffer);
  if (bits === 8) return bytes;
  const all = new Uint8Array(2 * bytes.length);
  for (let i = 0; i < bytes.length; i++) {
    all[2 * i] = bytes[i] & 15;
    all[2 * i + 1] = bytes[i] >> 4;
  }
  return all;
}

/** Number of heads, and of groups that share keys and values where these are fewer. */
function headsOf(heads, widths, size) {
  const groups = heads[1].reduce((sum, [column]) => sum + widths[column], 0);
  const shared = heads[1].some(([, each]) => each > 1);
  return { count: size(heads), groups: shared ? groups : null };
}

export class Store {
  /** `parts` are head, bulk and candidates, as in the page or from the server. */
  static async read(parts) {
    return new Store(parts.head, await inflated(parts.bulk).json(), parts.candidates);
  }

  constructor(head, bulk, candidates) {
    Object.assign(this, { head, ...bulk, packed: candidates, unpacking: null });
    const columns = bulk.columns;
    this.size = columns.id.length;
    this.dimensions = this.space.names.length;
    this.costs = head.costs;
    this.limited = head.costs.filter((cost) => cost.limit !== null);
    this.direction = head.run.higher_is_better ? 1 : -1;
    this.onFront = new Set(head.front);
    this.uniform = new Set(columns.uniform);
    this.places = new Map(head.front.map((row, i) => [row, i]));
    this.rowOf = new Map(columns.id.map((id, row) => [id, row]));
    const sparse = this.space.names.map((name, j) => [name.slice(0, Math.max(0, name.lastIndexOf("."))), j]);
    this.sparsity = new Map(sparse.filter(([, j]) => this.optionsOf(j)[0] === 0)); // by layer; widths begin with the dense one
  }

  /** Values of all trials by the name of a quantity: score, a cost, low, high, distortion or rank. */
  column(name) {
    const found = name in this.columns.costs ? this.columns.costs[name] : this.columns[name];
    return typeof found === "string" ? this.column(found) : found;
  }

  status(row) {
    return STATUS[this.columns.status[row]];
  }

  /** Whether a trial can be the best: finished, and within the limits of the search. */
  eligible(row) {
    return this.columns.rank[row] !== null;
  }

  dense(name) {
    return name === "score" ? this.head.dense.score : this.head.dense.costs[name];
  }

  /** Cost of a trial as limits are compared with it: the upper end of a measurement. */
  upper(name, row) {
    return this.columns.upper[name]?.[row] ?? this.column(name)[row];
  }

  predicted(name, row) {
    return this.columns.predicted[name]?.[row] ?? null;
  }

  /** Options of a trial; those of the front are there at once, others once they are unpacked. Null if left out. */
  async options(row) {
    if (row === null) return new Uint8Array(this.dimensions);
    if (this.head.options && this.places.has(row)) return this.head.options[this.places.get(row)];
    return this.atOnce(row) ?? ((await this.unpacked()) ? this.atOnce(row) : null);
  }

  /** The same without waiting; null where they are not unpacked yet. */
  atOnce(row) {
    if (this.head.options && this.places.has(row)) return this.head.options[this.places.get(row)];
    if (!this.all) return null;
    const own = new Uint16Array(this.dimensions);
    for (let j = 0; j < own.length; j++) own[j] = this.all[j * this.size + row];
    return own;
  }

  /** Unpack the options of all trials, once; null if the page was written without. */
  unpacked() {
    if (!this.packed) return Promise.resolve(null);
    this.unpacking ??= inflated(this.packed.data)
      .arrayBuffer()
      .then((buffer) => (this.all = expanded(buffer, this.packed.bits)));
    return this.unpacking;
  }

  optionsOf(dimension) {
    return this.space.options[this.space.kinds[dimension]];
  }

  /** Widths of groups and presence of branches of a candidate; null where the page cannot tell. */
  widths(options) {
    if (!this.outline || !this.effects || !options) return null;
    const found = this.outline.columns.map(([, size]) => size);
    for (let j = 0; j < options.length; j++) {
      if (!options[j]) continue;
      for (const [column, width] of this.effects[j][options[j] - 1]) found[column] = Math.min(found[column], width);
    }
    for (const [kind, to, of] of this.outline.rules) {
      if (kind === "any") found[to] = Math.min(found[to], Math.max(...of.map((column) => found[column])));
      else found[to] *= found[of[0]];
    }
    return found;
  }

  /** Width, heads, FLOPs and parameters of every layer at widths, with the latency of those of a trial where known. */
  layers(widths, row = null) {
    const size = ([fixed, shares]) => shares.reduce((sum, [column, each]) => sum + each * widths[column], fixed);
    const { ms } = this.times(row);
    const sizes = this.outline.sizes.map(size);
    const sum = (terms) => terms.reduce((all, [factor, of]) => all + of.reduce((p, i) => p * sizes[i], factor), 0);
    return this.outline.layers.map((layer, i) => ({
      width: layer.width === null ? null : size(layer.width),
      heads: layer.heads ? headsOf(layer.heads, widths, size) : null,
      ms: ms?.[i] ?? null,
      flops: sum(layer.flops),
      params: sum(layer.params),
    }));
  }

  /** Share or pattern of the elements of a layer's weight that are set to zero; null where that is not searched. */
  zeros(layer, options) {
    const j = this.sparsity.get(layer);
    return j === undefined || !options ? null : this.optionsOf(j)[options[j]];
  }

  /** Predicted milliseconds of every layer and of the rest, of a trial of the front or of the dense model (null). */
  times(row) {
    const { latency } = this.outline;
    const at = latency ? latency.trials.indexOf(row === null ? -1 : this.columns.id[row]) : -1;
    return at < 0 ? { ms: null, rest: null } : { ms: latency.layers[at], rest: latency.rest[at] };
  }

  heads(widths) {
    const size = ([fixed, shares]) => shares.reduce((sum, [column, each]) => sum + each * widths[column], fixed);
    return this.outline.heads.map((each) => size(each.size));
  }

  /**
   * Find the row of the best trial within limits on costs, as result.best() in Python; null if there is none.
   * With a worst score it is the cheapest that meets it.
   */
  best(limits, worst = null) {
    const names = new Set([...Object.keys(limits), ...this.limited.map((cost) => cost.name)]);
    const rank = this.columns.rank;
    const known = this.costs.filter(
      ({ name }) => names.has(name) && Object.keys(this.columns.predicted[name] ?? {}).some((row) => rank[row] !== null),
    );
    const first = Object.keys(limits)[0] ?? this.limited[0].name;
    const better = (a, b) => {
      const gap = worst === null ? 0 : this.column(first)[a] - this.column(first)[b];
      return (gap || rank[a] - rank[b]) < 0;
    };
    let found = null;
    for (let row = 0; row < this.size; row++) {
      if (rank[row] === null || !known.every(({ name }) => this.predicted(name, row) !== null)) continue;
      const score = this.columns.score[row];
      if (worst !== null && !(this.direction * (worst - score) <= 0)) continue;
      if (!Object.entries(limits).every(([name, limit]) => this.upper(name, row) / limit - 1 <= 0)) continue;
      if (found === null || better(row, found)) found = row;
    }
    return found;
  }
}
