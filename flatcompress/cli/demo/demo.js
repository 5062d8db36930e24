import * as ort from "./ort/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1; // more would need response headers that a plain file server does not send
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
const $ = (id) => document.getElementById(id);
const fetched = async (name) => {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
  return answer.arrayBuffer();
};
let facts, session, images, labels, expected, classes, size;

const normalised = (pixels) => {
  // The same float32 steps as in training: value / 255, minus mean, by std.
  const [channels, height, width] = facts.shape, area = height * width;
  const x = new Float32Array(channels * area);
  for (let c = 0; c < channels; c++) {
    const mean = Math.fround(facts.mean[c]), std = Math.fround(facts.std[c]);
    for (let i = 0; i < area; i++) {
      x[c * area + i] = Math.fround(Math.fround(Math.fround(pixels[c * area + i] / 255) - mean) / std);
    }
  }
  return x;
};
const run = async (pixels) => {
  const input = new ort.Tensor("float32", normalised(pixels), [1, ...facts.shape]);
  const begun = performance.now();
  const found = await session.run({ [session.inputNames[0]]: input });
  const ms = performance.now() - begun;
  return { output: found[session.outputNames[0]].data, ms };
};
const largest = (values) => values.reduce((best, v, i) => (v > values[best] ? i : best), 0);

const draw = (pixels) => {
  const [channels, height, width] = facts.shape, area = height * width;
  const canvas = $("picture");
  canvas.width = width;
  canvas.height = height;
  const data = new ImageData(width, height);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) data.data[4 * i + c] = pixels[Math.min(c, channels - 1) * area + i];
    data.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
};
const show = async (pixels, label) => {
  draw(pixels);
  const { output, ms } = await run(pixels);
  const top = largest(output), peak = output[top];
  const weights = Array.from(output, (v) => Math.exp(v - peak)), sum = weights.reduce((a, b) => a + b, 0);
  $("said").textContent = facts.classes[top] + (label === undefined ? "" : label === top ? " - right" : ` - wrong, it is ${facts.classes[label]}`);
  $("said").className = label === undefined ? "" : label === top ? "good" : "bad";
  const order = Array.from(output.keys()).sort((a, b) => output[b] - output[a]).slice(0, 5);
  $("scores").replaceChildren(...order.map((i) => {
    const item = document.createElement("li");
    item.textContent = `${facts.classes[i]}: ${(100 * weights[i] / sum).toFixed(1)} %`;
    return item;
  }));
  $("time").textContent = `${ms.toFixed(2)} ms in this browser`;
  return { top, output: Array.from(output), ms };
};
const sample = (i) => images.subarray(i * size, (i + 1) * size);

// An image of any size, from a file or the camera: the middle square, in the network's size and channels.
const scaled = (source, w, h) => {
  const [channels, height, width] = facts.shape, area = height * width;
  const canvas = new OffscreenCanvas(width, height), pen = canvas.getContext("2d");
  const scale = Math.min(w / width, h / height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(source, (w - scale * width) / 2, (h - scale * height) / 2, scale * width, scale * height, 0, 0, width, height);
  const rgba = pen.getImageData(0, 0, width, height).data, pixels = new Uint8Array(channels * area);
  for (let i = 0; i < area; i++) {
    const [r, g, b] = [rgba[4 * i], rgba[4 * i + 1], rgba[4 * i + 2]];
    if (channels === 1) pixels[i] = Math.round((299 * r + 587 * g + 114 * b) / 1000);
    else [r, g, b].forEach((v, c) => { pixels[c * area + i] = v; });
  }
  return pixels;
};
const fail = (error) => { $("status").textContent = `It does not work: ${error.message ?? error}`; $("status").className = "bad"; };

const check = async () => {
  let same = 0, worst = 0, times = [];
  for (let i = 0; i < facts.samples; i++) {
    const { output, ms } = await run(sample(i));
    const wanted = expected.subarray(i * classes, (i + 1) * classes);
    same += Number(largest(output) === largest(wanted));
    output.forEach((v, k) => { worst = Math.max(worst, Math.abs(v - wanted[k])); });
    times.push(ms);
  }
  times.sort((a, b) => a - b);
  const found = { samples: facts.samples, same, worst, median_ms: times[times.length >> 1] };
  $("checked").textContent = `${same} of ${facts.samples} predictions as in Python; largest difference of an output ${worst.toPrecision(3)}; median ${found.median_ms.toFixed(2)} ms`;
  return found;
};
const fileIn = async (file) => {
  const picture = await createImageBitmap(file);
  return show(scaled(picture, picture.width, picture.height));
};
const camera = async () => {
  const video = $("video");
  video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  video.hidden = false;
  await video.play();
  const frame = async () => {
    await show(scaled(video, video.videoWidth, video.videoHeight));
    setTimeout(() => requestAnimationFrame(() => frame().catch(fail)), 100);
  };
  await frame();
};

const start = async () => {
  const begun = performance.now();
  facts = JSON.parse(new TextDecoder().decode(await fetched("demo.json")));
  session = await ort.InferenceSession.create(new Uint8Array(await fetched("model.onnx")), { executionProviders: ["wasm"] });
  const loaded = performance.now() - begun;
  [images, labels, expected] = [new Uint8Array(await fetched("images.bin")), new Int32Array(await fetched("labels.bin")), new Float32Array(await fetched("expected.bin"))];
  size = facts.shape.reduce((a, b) => a * b, 1);
  classes = expected.length / facts.samples;
  $("name").textContent = facts.name;
  const kB = (n) => `${(n / 1000).toFixed(1)} kB`;
  const rows = [["File", kB(facts.bytes)], ["Certificate", facts.holds ? "holds" : "does not hold"]];
  if (facts.float_bytes) rows.push(["Float file", `${kB(facts.float_bytes)}, ${(facts.float_bytes / facts.bytes).toFixed(1)} times larger`]);
  if (facts.faster) rows.push(["Against float, in Python", `${facts.faster.toFixed(1)} times its speed`]);
  if (facts.accuracy !== null) rows.push(["Test accuracy", `${(100 * facts.accuracy).toFixed(1)} %`]);
  for (const [name, value] of rows) {
    const group = document.createElement("div");
    group.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }));
    $("facts").append(group);
  }
  let at = 0;
  const next = () => show(sample(at), labels[at++ % facts.samples]).then((r) => { at %= facts.samples; return r; });
  $("next").addEventListener("click", () => next().catch(fail));
  $("check").addEventListener("click", () => check().catch(fail));
  $("camera").addEventListener("click", () => camera().catch(fail));
  $("file").addEventListener("change", (e) => { if (e.target.files[0]) fileIn(e.target.files[0]).catch(fail); });
  const drop = $("drop");
  drop.addEventListener("dragover", (e) => { e.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (e) => { e.preventDefault(); drop.classList.remove("over"); if (e.dataTransfer.files[0]) fileIn(e.dataTransfer.files[0]).catch(fail); });
  for (const id of ["next", "check"]) $(id).disabled = false;
  await run(sample(0)); // the first call compiles
  await next();
  $("status").textContent = `Ready, loaded in ${(loaded / 1000).toFixed(1)} s.`;
  window.demo = { check };
};
start().catch(fail);
