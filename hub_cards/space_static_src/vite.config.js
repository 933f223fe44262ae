import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { defineConfig } from 'vite';

const WASM = 'node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs'; // the build without WebGPU, which needs a smaller binary

/** Write `sw.js` with the names of the files to keep, and a version that changes with any of them. */
function serviceWorker() {
  return {
    name: 'service-worker',
    apply: 'build',
    enforce: 'post',
    generateBundle(_, bundle) {
      const names = Object.keys(bundle).sort();
      const version = createHash('sha256');
      for (const name of names) version.update(name).update(bundle[name].code ?? bundle[name].source);
      const assets = names.filter((name) => name.startsWith('assets/'));
      // The binary is kept when it is first used: the visitor sees that something is loading.
      const files = ['./', 'icon.svg', ...assets.filter((name) => !name.endsWith('.wasm'))];
      const source = readFileSync('src/sw.js', 'utf8')
        .replace('__FILES__;', `${JSON.stringify(files)};`)
        .replace('__ASSETS__;', `${JSON.stringify(assets)};`)
        .replace('__VERSION__\';', `${version.digest('hex').slice(0, 12)}';`);
      this.emitFile({ type: 'asset', fileName: 'sw.js', source });
    },
  };
}

// Packages whose code is in the bundle; jinja and tokenizers are part of transformers.js' own file.
const BUNDLED = ['@huggingface/transformers', '@huggingface/jinja', '@huggingface/tokenizers', 'onnxruntime-common', 'onnxruntime-web'];
// The npm packages of onnxruntime lack its licence and those of what is compiled into its binary.
const LICENCES = { 'onnxruntime-web': 'licences/onnxruntime.txt', 'onnxruntime-common': null };

/** Write `NOTICE.txt` with the licences of the bundled packages; a package that is not listed stops the build. */
function notice() {
  return {
    name: 'notice',
    apply: 'build',
    generateBundle() {
      for (const id of this.getModuleIds()) {
        const name = id.match(/\/node_modules\/((?:@[^/]+\/)?[^/]+)\//)?.[1];
        if (name && !BUNDLED.includes(name)) this.error(`${name} is not in BUNDLED of vite.config.js`);
      }
      const parts = BUNDLED.map((name) => {
        const folder = join('node_modules', name);
        const { version, license } = JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8'));
        const file = name in LICENCES ? LICENCES[name] : join(folder, 'LICENSE');
        const text = file ? readFileSync(file, 'utf8') : 'See onnxruntime-web below.';
        return `${name} ${version}, ${license}\n\n${text.trim()}\n`;
      });
      const head = 'This page contains the following libraries, bundled by Vite.\n';
      this.emitFile({ type: 'asset', fileName: 'NOTICE.txt', source: [head, ...parts].join(`\n${'='.repeat(80)}\n\n`) });
    },
  };
}

export default defineConfig({
  base: './',
  resolve: { alias: [{ find: /^onnxruntime-web(\/webgpu)?$/, replacement: join(import.meta.dirname, WASM) }] },
  worker: { format: 'es', plugins: () => [notice()] }, // the libraries are in the worker alone
  build: { outDir: '../space_static', emptyOutDir: true, target: 'es2022', assetsInlineLimit: 0, chunkSizeWarningLimit: 2000 },
  plugins: [serviceWorker()],
});
