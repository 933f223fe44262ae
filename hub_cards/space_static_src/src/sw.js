// Service worker: the page and every model that was used work without a network.
// `__FILES__`, `__ASSETS__` and `__VERSION__` are filled in by vite.config.js.

const FILES = __FILES__; // kept when the page is installed
const CURRENT = __ASSETS__; // every file whose name changes with its content
const PAGE = 'nanovlm-page-__VERSION__';
const ASSETS = 'nanovlm-assets'; // survives an update: the binary is 13 MB and rarely changes
const MODELS = 'nanovlm-models';
const SCOPE = new URL('./', self.location.href).href;

self.addEventListener('install', (event) => {
  const keep = async () => {
    const [page, assets] = await Promise.all([caches.open(PAGE), caches.open(ASSETS)]);
    const kept = new Set((await assets.keys()).map(({ url }) => url));
    const named = FILES.filter((file) => !CURRENT.includes(file));
    const missing = FILES.filter((file) => CURRENT.includes(file) && !kept.has(SCOPE + file));
    await page.addAll(named.map((file) => new Request(file, { cache: 'reload' })));
    await assets.addAll(missing.map((file) => new Request(file, { cache: 'reload' })));
    await self.skipWaiting();
  };
  event.waitUntil(keep());
});

self.addEventListener('activate', (event) => {
  const claim = async () => {
    const old = (await caches.keys()).filter((name) => name.startsWith('nanovlm-page-') && name !== PAGE);
    await Promise.all(old.map((name) => caches.delete(name)));
    await forget(ASSETS, (path) => CURRENT.includes(path));
    await self.clients.claim();
  };
  event.waitUntil(claim());
});

self.addEventListener('fetch', (event) => {
  const { request } = event;
  if (request.method !== 'GET' || !request.url.startsWith(SCOPE)) return;
  const path = request.url.slice(SCOPE.length).split(/[?#]/)[0];
  if (path.startsWith('assets/')) event.respondWith(stored(event, path, ASSETS));
  else if (path.startsWith('models/')) event.respondWith(stored(event, path, MODELS));
  else if (isNamed(path)) event.respondWith(fresh(event, path));
});

/** Return whether a file whose name stays is one of this page: another page may be served below the same address. */
function isNamed(path) {
  return ['', 'index.html', 'icon.svg', 'models.json', 'NOTICE.txt'].includes(path) || path.startsWith('examples/');
}

/** Files whose names change with their content: from the cache, otherwise from the network and kept. */
async function stored(event, path, name) {
  const found = await match(name, path);
  if (found) return found;
  const answer = await fetch(event.request);
  if (answer.status === 200) keep(event, name, path, answer.clone());
  return answer;
}

/** Files whose names stay: from the network, otherwise as they were last seen. */
async function fresh(event, path) {
  const key = path === 'index.html' ? '' : path;
  try {
    const answer = await fetch(event.request);
    if (answer.status === 200) {
      keep(event, PAGE, key, answer.clone());
      if (path === 'models.json') event.waitUntil(forgetOtherModels(answer.clone()));
    }
    return answer;
  } catch (error) {
    const found = await match(PAGE, key);
    if (found) return found;
    throw error;
  }
}

async function match(name, path) {
  const cache = await caches.open(name);
  return cache.match(SCOPE + path);
}

/** Store an answer while the page already reads it; storage that is full or blocked does not disturb the page. */
function keep(event, name, path, answer) {
  const put = async () => (await caches.open(name)).put(SCOPE + path, answer);
  event.waitUntil(put().catch(() => {}));
}

async function forgetOtherModels(answer) {
  const { models } = await answer.json();
  const current = models.map(({ folder }) => `models/${folder}/`);
  await forget(MODELS, (path) => current.some((start) => path.startsWith(start)));
}

async function forget(name, isCurrent) {
  const cache = await caches.open(name);
  for (const { url } of await cache.keys()) {
    if (!isCurrent(url.slice(SCOPE.length))) await cache.delete(url);
  }
}
