// Browsers start no worker from a file. Where a page was opened from the file system, the search runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(script) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      this.inner = this.frame.contentWindow;
      this.inner.postMessage = (data) => setTimeout(() => this.onmessage?.({ data })); // later, as a worker's come
      const element = this.inner.document.createElement("script");
      this.ready = new Promise((resolve) => element.addEventListener("load", resolve));
      element.addEventListener("error", (error) => this.onerror?.(error));
      element.src = script;
      this.inner.document.body.append(element);
    }
    postMessage(data) {
      this.ready.then(() => setTimeout(() => this.inner.onmessage({ data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
