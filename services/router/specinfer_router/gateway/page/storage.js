// Keeps named JSON values in the browser, or in memory where the browser keeps nothing.
// It knows neither conversations nor settings.

export class Storage {
  /** @param area a web storage, or null to keep to memory */
  constructor(area = usableArea()) {
    this.area = area;
    this.memory = new Map();
  }

  /** Whether values outlive the page. */
  get lasting() {
    return this.area !== null;
  }

  /** The value under this name, or `otherwise` when there is none or it is no JSON. */
  read(name, otherwise) {
    try {
      const text = this.area ? this.area.getItem(`specinfer.${name}`) : this.memory.get(name);
      return text === null || text === undefined ? otherwise : JSON.parse(text);
    } catch {
      return otherwise;
    }
  }

  /** Keep a value; returns false when the browser has no room for it. */
  write(name, value) {
    const text = JSON.stringify(value);
    if (!this.area) {
      this.memory.set(name, text);
      return true;
    }
    try {
      this.area.setItem(`specinfer.${name}`, text);
      return true;
    } catch {
      return false;
    }
  }
}

function usableArea() {
  try {
    const area = window.localStorage;
    area.setItem("specinfer.probe", "1");
    area.removeItem("specinfer.probe");
    return area;
  } catch {
    return null;
  }
}
