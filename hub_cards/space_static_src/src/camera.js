// A photo from the camera.

const PROBLEMS = {
  NotAllowedError: "This page may not use the camera: allow it in the browser's settings, or choose a photo.",
  SecurityError: "This page may not use the camera: allow it in the browser's settings, or choose a photo.",
  NotFoundError: 'There is no camera: choose a photo.',
  OverconstrainedError: 'There is no camera: choose a photo.',
  NotReadableError: 'Another program uses the camera: close it, or choose a photo.',
};

/**
 * Show the camera in a dialog.
 * @param {HTMLDialogElement} dialog with the elements #video, #shoot and #cancel
 * @returns {Promise<Blob | null>} the photo, or null if the visitor cancelled
 * @throws {Error} with a message for the visitor
 */
export async function takePhoto(dialog) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new Error('The camera needs a page on https or localhost: choose a photo.');
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } });
  } catch (error) {
    throw new Error(PROBLEMS[error.name] ?? 'The camera does not start: choose a photo.');
  }
  const video = dialog.querySelector('#video');
  video.srcObject = stream;
  dialog.returnValue = '';
  dialog.showModal();
  dialog.querySelector('#shoot').onclick = () => dialog.close('take');
  dialog.querySelector('#cancel').onclick = () => dialog.close('');
  await new Promise((resolve) => dialog.addEventListener('close', resolve, { once: true }));
  try {
    return dialog.returnValue === 'take' && video.videoWidth ? await frame(video) : null;
  } finally {
    stream.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  }
}

function frame(video) {
  const canvas = document.createElement('canvas');
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext('2d').drawImage(video, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, 'image/png'));
}
