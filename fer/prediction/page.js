"use strict";
const at = (id) => document.getElementById(id);
const made = (tag, text, parent, className) => {
  const node = document.createElement(tag);
  if (text) node.textContent = text;
  if (className) node.className = className;
  parent.append(node);
  return node;
};
const percent = (p) => `${Math.round(100 * p)} %`;

function say(text, bad) {
  at("state").textContent = text;
  at("state").className = bad ? "bad" : "";
}

function figure(parent, url, caption) {
  const holder = made("figure", "", parent);
  const image = made("img", "", holder);
  image.src = url;
  image.alt = caption;
  made("figcaption", caption, holder);
}

function show(answer) {
  const faces = answer.faces;
  at("picture").src = answer.picture;
  at("picture").alt = "the photograph with a box around each face";
  at("picture").hidden = false;
  for (const face of faces) {
    const item = made("li", "", at("faces"));
    made("h2", `${face.expression} ${percent(face.probability)}`, item);
    const pair = made("div", "", item, "pair");
    figure(pair, face.crop, "as the network gets it");
    if (face.map) figure(pair, face.map, `what speaks for ${face.expression}`);
    for (const [name, p] of Object.entries(face.probabilities)) {
      const row = made("div", "", item, "bar");
      made("span", name, row);
      made("b", "", made("i", "", row)).style.width = `${100 * p}%`;
      made("span", percent(p), row);
    }
  }
  const found = faces.length === 0 ? "No face was found." : `${faces.length} ${faces.length === 1 ? "face" : "faces"}.`;
  say(`${found} ${answer.note}`.trim());
}

async function send(picture) {
  at("faces").replaceChildren();
  at("picture").hidden = true;
  say("Looking …");
  try {
    const reply = await fetch("predict", {
      method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: picture,
    });
    const answer = await reply.json();
    if (reply.ok) show(answer);
    else say(answer.error, true);
  } catch (error) {
    say(`The server does not answer (${error.message}); is python -m fer.demo still running?`, true);
  }
}

at("pick").addEventListener("change", () => at("pick").files.length && send(at("pick").files[0]));
for (const [event, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(event, (happened) => {
    happened.preventDefault();
    at("drop").classList.toggle("over", over);
    if (event === "drop" && happened.dataTransfer.files.length) send(happened.dataTransfer.files[0]);
  });
}

function stop() {
  for (const track of at("live").srcObject?.getTracks() ?? []) track.stop();
  at("live").srcObject = null;
  at("live").hidden = at("take").hidden = true;
  at("camera").hidden = false;
}
at("camera").addEventListener("click", async () => {
  try {
    at("live").srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
    at("live").hidden = at("take").hidden = false;
    at("camera").hidden = true;
  } catch (error) {
    say(`No camera: ${error.message}`, true);
  }
});
at("take").addEventListener("click", () => {
  const still = document.createElement("canvas");
  [still.width, still.height] = [at("live").videoWidth, at("live").videoHeight];
  still.getContext("2d").drawImage(at("live"), 0, 0);
  stop();
  still.toBlob(send, "image/jpeg", 0.95);
});

fetch("about").then((reply) => reply.json()).then((run) => {
  const words = [run.name, run.test, ...run.stamps];
  if (!run.calibrated) words.push("probabilities are not calibrated (python -m fer.evaluate does that)");
  at("about").textContent = words.join(" · ");
});
