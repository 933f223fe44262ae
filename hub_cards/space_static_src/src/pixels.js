// Pixels as the Python package prepares them: Pillow's resampling in 8-bit fixed-point arithmetic.

const PRECISION = 22; // bits of a coefficient, as in Pillow's Resample.c
const GAP = 3; // an image is first reduced to no less than three times the model's size, as `open_image_file` does
const LARGEST_CANVAS = 16_000_000; // pixels; phones refuse larger canvases

const FILTERS = {
  bicubic: {
    support: 2,
    weight(distance) {
      const x = Math.abs(distance);
      const a = -0.5;
      if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
      if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
      return 0;
    },
  },
  hamming: {
    support: 1,
    weight(distance) {
      const x = Math.abs(distance);
      if (x === 0) return 1;
      if (x >= 1) return 0;
      const angle = x * Math.PI;
      return (Math.sin(angle) / angle) * (0.54 + 0.46 * Math.cos(angle));
    },
  },
};

/** A decoding error whose message is for the visitor. */
export class PhotoError extends Error {}

/**
 * Decode a file and return its upright pixels on white.
 * @param {Blob} blob
 * @returns {Promise<{data: Uint8ClampedArray, width: number, height: number}>} four channels, alpha 255
 */
export async function decode(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: 'from-image', colorSpaceConversion: 'none' });
  } catch {
    throw new PhotoError('This browser cannot read the photo: choose a JPEG, PNG or WebP file that is not damaged.');
  }
  const scale = Math.min(1, Math.sqrt(LARGEST_CANVAS / (bitmap.width * bitmap.height)));
  const width = Math.max(1, Math.floor(bitmap.width * scale));
  const height = Math.max(1, Math.floor(bitmap.height * scale));
  const context = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
  context.fillStyle = '#fff';
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = 'high';
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

/**
 * Return an image as the vision encoder takes it.
 * @param {{data: Uint8ClampedArray, width: number, height: number}} image four channels
 * @param {object} settings the content of preprocessor_config.json
 * @returns {Float32Array} 3 x height x width
 */
export function pixelValues(image, settings) {
  const { width, height } = settings.size;
  let small = settings.do_center_crop ? centralSquare(image) : image;
  const factor = Math.floor(Math.min(small.width / (GAP * width), small.height / (GAP * height)));
  if (factor > 1) {
    small = resize(small, Math.ceil(small.width / factor), Math.ceil(small.height / factor), FILTERS.hamming);
  }
  small = resize(small, width, height, FILTERS.bicubic);
  return normalised(small, settings);
}

/** Return a uniform image in the mean colour, as the vision encoder takes it. */
export function blankPixelValues(settings) {
  const { width, height } = settings.size;
  const data = new Uint8ClampedArray(4 * width * height);
  const colour = [...settings.image_mean.map((mean) => Math.round(255 * mean)), 255];
  for (let i = 0; i < data.length; i++) data[i] = colour[i % 4];
  return normalised({ data, width, height }, settings);
}

function normalised({ data, width, height }, { rescale_factor: factor, image_mean: mean, image_std: std }) {
  const values = new Float32Array(3 * width * height);
  for (let channel = 0; channel < 3; channel++) {
    const start = channel * width * height;
    const scale = factor / std[channel];
    const shift = -mean[channel] / std[channel];
    for (let i = 0; i < width * height; i++) values[start + i] = data[4 * i + channel] * scale + shift;
  }
  return values;
}

function centralSquare({ data, width, height }) {
  const side = Math.min(width, height);
  const left = Math.floor((width - side) / 2);
  const top = Math.floor((height - side) / 2);
  const square = new Uint8ClampedArray(4 * side * side);
  for (let y = 0; y < side; y++) {
    const start = 4 * ((top + y) * width + left);
    square.set(data.subarray(start, start + 4 * side), 4 * y * side);
  }
  return { data: square, width: side, height: side };
}

function resize(image, width, height, filter) {
  const wide = image.width === width ? image : onePass(image, width, filter, true);
  return image.height === height ? wide : onePass(wide, height, filter, false);
}

/** Resize along one axis; each pass is rounded and clipped to 8 bits, as in Pillow. */
function onePass(image, size, filter, horizontal) {
  const rows = horizontal ? image.height : image.width;
  const [width, height] = horizontal ? [size, image.height] : [image.width, size];
  const [along, across] = horizontal ? [4, 4 * image.width] : [4 * image.width, 4];
  const [outAlong, outAcross] = horizontal ? [4, 4 * width] : [4 * width, 4];
  const source = image.data;
  const target = new Uint8ClampedArray(4 * width * height).fill(255);
  coefficients(horizontal ? image.width : image.height, size, filter).forEach(({ first, weights }, position) => {
    for (let row = 0; row < rows; row++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 1 << (PRECISION - 1);
        let from = first * along + row * across + channel;
        for (let i = 0; i < weights.length; i++, from += along) sum += source[from] * weights[i];
        target[position * outAlong + row * outAcross + channel] = sum >> PRECISION; // the array clips
      }
    }
  });
  return { data: target, width, height };
}

function coefficients(from, to, { support, weight }) {
  const step = from / to;
  const scale = Math.max(step, 1);
  return Array.from({ length: to }, (_, position) => {
    const center = (position + 0.5) * step;
    const first = Math.max(0, Math.trunc(center - support * scale + 0.5));
    const last = Math.min(from, Math.trunc(center + support * scale + 0.5));
    const exact = Array.from({ length: last - first }, (_, i) => weight((first + i - center + 0.5) / scale));
    const total = exact.reduce((sum, one) => sum + one, 0);
    const weights = Int32Array.from(exact, (one) => rounded((one / total) * (1 << PRECISION)));
    return { first, weights };
  });
}

function rounded(value) {
  return Math.trunc(value + (value < 0 ? -0.5 : 0.5));
}
