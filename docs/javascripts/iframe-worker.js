// Browsers start no worker from a file. Where a page was opened from the file system, the search runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      inner.postMessage = (data) => this.onmessage?.({ data });
      const element = inner.document.createElement("script");
      element.src = script;
      element.onerror = (error) => this.onerror?.(error);
      element.onload = () => {
        this.ready = true;
        this.waiting.forEach((data) => this.postMessage(data));
      };
      inner.document.body.append(element);
    }
    postMessage(data) {
      if (this.ready) this.frame.contentWindow.onmessage({ data });
      else this.waiting.push(data);
    }
    terminate() {
      this.frame.remove();
    }
  };
}
