// The service worker that keeps the page and the weights, and what the browser must support.

const WAIT = 20_000; // ms; without a service worker the page works, but only online

/** Register the service worker and wait until it handles this page's requests, so that it keeps all that is loaded. */
export async function keepForOffline() {
  const workers = navigator.serviceWorker;
  if (!workers || workers.controller) return;
  const controlled = new Promise((resolve) => workers.addEventListener('controllerchange', resolve, { once: true }));
  try {
    const registration = await workers.register('./sw.js');
    if (registration.active) return; // a forced reload bypasses it
    await Promise.race([controlled, new Promise((resolve) => setTimeout(resolve, WAIT))]);
  } catch {
    // Storage may be blocked, as in private windows and frames of other sites.
  }
}

// A module whose only function returns a 128-bit vector.
const SIMD_MODULE = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
];

/** Return whether the browser has WebAssembly with 128-bit SIMD, which onnxruntime needs. */
export function hasSimd() {
  return typeof WebAssembly === 'object' && WebAssembly.validate(new Uint8Array(SIMD_MODULE));
}
