// The model: loads it and completes sentences, away from the page's thread.

import { AutoModelForImageTextToText, AutoTokenizer, Tensor, TextStreamer, env } from '@huggingface/transformers';
import wasm from 'onnxruntime-web/ort-wasm-simd-threaded.wasm?url';
import { blankPixelValues, decode, PhotoError, pixelValues } from './pixels.js';

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.useBrowserCache = false; // the service worker keeps the files
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = { wasm: new URL(wasm, self.location.href).href };
env.backends.onnx.wasm.numThreads = 1; // more need headers that a static host may not send

const IMAGE_TOKEN = '<image>';
let job = 0; // number of the message in work, which the page finds in every answer
let loaded = null; // { folder, model, tokenizer, preprocessor }

/** Fetch as usual; while graphs are loaded, tell the page how many bytes have arrived. */
let received = 0;
env.fetch = async (address, options) => {
  const answer = await fetch(address, options);
  if (!answer.ok || !String(address).endsWith('.onnx')) return answer;
  const count = new TransformStream({
    transform(chunk, controller) {
      received += chunk.byteLength;
      post({ type: 'progress', received });
      controller.enqueue(chunk);
    },
  });
  return new Response(answer.body.pipeThrough(count), answer);
};

function post(message) {
  self.postMessage({ ...message, job });
}

/** Load a model unless it is loaded; only one is kept in memory. */
async function load(base, folder) {
  if (loaded?.folder === folder) return;
  await loaded?.model.dispose();
  loaded = null;
  received = 0;
  env.localModelPath = base; // a path: with a full address the library looks for no tokenizer
  const answer = await fetch(`${base}${folder}/preprocessor_config.json`);
  if (!answer.ok) throw new Error(`${folder}: HTTP status ${answer.status}`);
  const preprocessor = await answer.json();
  const tokenizer = await AutoTokenizer.from_pretrained(folder);
  const model = await AutoModelForImageTextToText.from_pretrained(folder, { dtype: 'fp16', device: 'wasm' });
  loaded = { folder, model, tokenizer, preprocessor };
}

/** Complete a prefix for an image, posting the text so far after each word. */
async function complete(pixels, prefix, field) {
  const { model, tokenizer, preprocessor } = loaded;
  const { width, height } = preprocessor.size;
  const prompt = tokenizer(IMAGE_TOKEN.repeat(model.config.image_seq_length) + prefix);
  const room = model.config.max_position_embeddings - prompt.input_ids.dims[1];
  if (room < 1) throw new PhotoError('The beginning of the sentence is too long for the model: shorten it.');
  let text = prefix;
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (words) => {
      text += words;
      post({ type: 'text', field, text: oneLine(text) });
    },
  });
  const tokens = await model.generate({
    ...prompt,
    pixel_values: new Tensor('float32', pixels, [1, 3, height, width]),
    max_new_tokens: Math.min(model.generation_config.max_new_tokens ?? 96, room),
    num_beams: 1,
    do_sample: false,
    streamer,
  });
  const [whole] = tokenizer.batch_decode(tokens, { skip_special_tokens: true });
  post({ type: 'text', field, text: oneLine(whole) });
}

function oneLine(text) {
  return text.trim().split(/\s+/).join(' ');
}

async function handle({ base, folder, photo, prefix }) {
  await load(base, folder);
  post({ type: 'loaded' });
  if (photo === undefined) return;
  const trimmed = prefix.trim();
  const special = loaded.tokenizer.all_special_tokens.find((token) => trimmed.includes(token));
  if (special !== undefined) {
    throw new PhotoError(`${special} has a special meaning for the model: remove it from the beginning of the sentence.`);
  }
  await complete(pixelValues(await decode(photo), loaded.preprocessor), trimmed, 'with');
  await complete(blankPixelValues(loaded.preprocessor), trimmed, 'without');
}

let queue = Promise.resolve();
self.addEventListener('message', ({ data }) => {
  queue = queue.then(async () => {
    job = data.job;
    try {
      await handle(data);
      post({ type: 'done' });
    } catch (error) {
      const message =
        error instanceof PhotoError
          ? error.message
          : `The model cannot be loaded or run (${String(error.message ?? error).split('\n')[0]}): check the connection and reload the page.`;
      post({ type: 'error', message });
    }
  });
});
