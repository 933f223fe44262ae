// Service worker: the page and every model that was used work without a network.
// `__FILES__` and `__VERSION__` are filled in by vite.config.js.

const FILES = __FILES__;
const PAGE = 'nanovlm-page-__VERSION__';
const MODELS = 'nanovlm-models';
const SCOPE = new URL('./', self.location.href).href;

self.addEventListener('install', (event) => {
  const keep = async () => {
    const cache = await caches.open(PAGE);
    await cache.addAll(FILES.map((file) => new Request(file, { cache: 'reload' })));
    await self.skipWaiting();
  };
  event.waitUntil(keep());
});

self.addEventListener('activate', (event) => {
  const claim = async () => {
    const old = (await caches.keys()).filter((name) => name.startsWith('nanovlm-page-') && name !== PAGE);
    await Promise.all(old.map((name) => caches.delete(name)));
    await self.clients.claim();
  };
  event.waitUntil(claim());
});

self.addEventListener('fetch', (event) => {
  const { request } = event;
  if (request.method !== 'GET' || !request.url.startsWith(SCOPE)) return;
  const path = request.url.slice(SCOPE.length).split(/[?#]/)[0];
  if (path.startsWith('assets/')) event.respondWith(stored(request, PAGE));
  else if (path.startsWith('models/')) event.respondWith(stored(request, MODELS));
  else event.respondWith(fresh(request, path));
});

/** Files whose names change with their content: from the cache, otherwise from the network and kept. */
async function stored(request, name) {
  const cache = await caches.open(name);
  const found = await cache.match(request.url);
  if (found) return found;
  const answer = await fetch(request);
  if (answer.status === 200) await cache.put(request.url, answer.clone());
  return answer;
}

/** Files whose names stay: from the network, otherwise as they were last seen. */
async function fresh(request, path) {
  const cache = await caches.open(PAGE);
  const key = SCOPE + path;
  try {
    const answer = await fetch(request);
    if (answer.status === 200) {
      await cache.put(key, answer.clone());
      if (path === 'models.json') await forgetOtherModels(await answer.clone().json());
    }
    return answer;
  } catch (error) {
    const found = await cache.match(key);
    if (found) return found;
    throw error;
  }
}

async function forgetOtherModels({ models }) {
  const cache = await caches.open(MODELS);
  const current = models.map(({ folder }) => `${SCOPE}models/${folder}/`);
  for (const { url } of await cache.keys()) {
    if (!current.some((start) => url.startsWith(start))) await cache.delete(url);
  }
}
