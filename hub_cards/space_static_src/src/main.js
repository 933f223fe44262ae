// The page: chooses a photo, a beginning and a model, and shows the completions as they are written.

import { takePhoto } from './camera.js';
import { hasSimd, keepForOffline } from './offline.js';

const NO_SIMD =
  'This browser cannot run the model, because it lacks WebAssembly SIMD: use a current Chrome, Edge or Firefox, or Safari 16.4 or newer.';
const element = (id) => document.getElementById(id);
const MODELS = new URL('models/', document.baseURI).pathname;

let worker = null;
let photo = null; // Blob
let choices = 0; // photos that were chosen
let jobs = 0; // messages to the worker; answers to earlier ones than the last are ignored
let busy = true;
let broken = false; // the page cannot be used, and its message stays

function say(message) {
  if (!broken) element('message').textContent = message;
}

/** Show why the page cannot be used. */
function fail(message) {
  element('loading').hidden = true;
  setBusy(true);
  say(message);
  broken = true;
}

function send(message) {
  jobs += 1;
  worker.postMessage({ ...message, base: MODELS, folder: chosen().value, job: jobs });
}

function setBusy(value) {
  busy = value;
  element('complete').disabled = value;
  for (const id of ['with', 'without']) element(id).setAttribute('aria-busy', String(value));
}

function showLoading(text) {
  element('loading').hidden = false;
  element('status').textContent = text;
  element('progress').removeAttribute('value');
}

function showPhoto(blob, name) {
  photo = blob;
  const preview = element('preview');
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(blob);
  preview.alt = `The photo: ${name}`;
  preview.hidden = false;
  element('hint').hidden = true;
  say('');
}

async function setPhoto(blob, name) {
  if (!blob) return;
  choices += 1;
  const number = choices;
  try {
    (await createImageBitmap(blob)).close();
  } catch {
    if (number === choices) say(`${name}: this browser cannot read it: choose a JPEG, PNG or WebP file that is not damaged.`);
    return;
  }
  if (number === choices) showPhoto(blob, name); // another may have been chosen meanwhile
}

function chosen() {
  return document.querySelector('input[name="model"]:checked');
}

function clearTexts() {
  element('with').textContent = element('without').textContent = '';
}

function loadModel() {
  setBusy(true);
  say('');
  clearTexts(); // they are another model's, which may still be writing
  const { name, bytes } = chosen().dataset;
  showLoading(`Loading ${name} (${(bytes / 1e6).toFixed(1)} MB, kept for later visits)`);
  send({});
}

function complete(event) {
  event.preventDefault();
  if (busy) return;
  if (!photo) {
    say('Choose a photo first.');
    return;
  }
  say('');
  clearTexts();
  setBusy(true);
  element('with').scrollIntoView({ block: 'nearest' }); // below the form on a phone
  send({ photo, prefix: element('prefix').value });
}

function receive({ data }) {
  if (data.job !== jobs) return;
  if (data.type === 'progress') element('progress').value = (100 * data.received) / chosen().dataset.bytes;
  if (data.type === 'loaded') element('loading').hidden = true;
  if (data.type === 'text') element(data.field).textContent = data.text;
  if (data.type === 'error') say(data.message);
  if (data.type === 'error' || data.type === 'done') {
    element('loading').hidden = true;
    setBusy(false);
  }
}

function addModels(models) {
  for (const [index, { folder, name, style, words, bytes }] of models.entries()) {
    const radio = Object.assign(document.createElement('input'), { type: 'radio', name: 'model', value: folder });
    radio.checked = index === 0;
    radio.dataset.name = name;
    radio.dataset.bytes = bytes;
    radio.addEventListener('change', loadModel);
    const label = document.createElement('label');
    label.append(radio, `${style} (${words} words)`);
    element('models').append(label);
  }
  element('parameters').textContent = ` (parameters: ${models[0].parameters})`;
}

function addExamples(examples) {
  for (const { file, prefix } of examples) {
    const button = Object.assign(document.createElement('button'), { type: 'button' });
    button.append(Object.assign(new Image(), { src: file, alt: prefix }));
    button.addEventListener('click', async () => {
      element('prefix').value = prefix;
      await setPhoto(await (await fetch(file)).blob(), prefix);
    });
    element('examples').append(button);
  }
  element('examples').hidden = examples.length === 0;
}

function listen() {
  const drop = element('drop');
  element('form').addEventListener('submit', complete);
  element('file').addEventListener('change', ({ target }) => {
    const [file] = target.files;
    target.value = ''; // the same file can be chosen again
    setPhoto(file, file?.name);
  });
  element('take').addEventListener('click', async () => {
    try {
      await setPhoto(await takePhoto(element('camera')), 'from the camera');
    } catch (error) {
      say(error.message);
    }
  });
  for (const type of ['dragover', 'dragleave', 'drop']) {
    drop.addEventListener(type, (event) => {
      event.preventDefault();
      drop.classList.toggle('over', type === 'dragover');
    });
  }
  drop.addEventListener('drop', ({ dataTransfer }) => setPhoto(dataTransfer.files[0], dataTransfer.files[0]?.name));
  document.addEventListener('paste', ({ clipboardData }) => {
    const [file] = clipboardData.files;
    if (file) setPhoto(file, file.name);
  });
}

async function start() {
  listen();
  if (!hasSimd()) {
    fail(NO_SIMD);
    return;
  }
  await keepForOffline();
  try {
    const answer = await fetch('models.json');
    if (!answer.ok) throw new Error(`HTTP status ${answer.status}`);
    const { models, examples } = await answer.json();
    addModels(models);
    addExamples(examples);
  } catch (error) {
    fail(`models.json cannot be loaded (${error.message}): check the connection and reload the page.`);
    return;
  }
  worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
  worker.addEventListener('message', receive);
  worker.addEventListener('error', () => fail('The model stopped: reload the page.'));
  loadModel();
}

start();
