"""Compare the runtimes of a released checkpoint: PyTorch, onnxruntime, a browser and `nanovlm serve`.

`python benchmarks/runtimes.py mini-short` completes the beginnings of the demo's sentences about its images greedily,
alternating between the runtimes. It prints the size of the weights, the median time of a completion as a multiple of
PyTorch's, and how many texts equal PyTorch's. The browser (headless Chromium, one WebAssembly thread) completes each
beginning with and without the image, and half of that time counts. The server needs Transformers 5, and the browser
Playwright and Chromium; they are left out without them.
"""

import argparse
import base64
import shutil
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from timing import median_seconds

from nanovlm_hf import completion
from nanovlm_hf.checkpoints import SHIPPED
from nanovlm_hf.export.onnx import write_onnx
from nanovlm_hf.export.page import EXAMPLES, build_page
from nanovlm_hf.export.page_server import page_server
from nanovlm_hf.export.runtime import OnnxModel
from nanovlm_hf.images import open_image_file
from nanovlm_hf.loading import load_model

IMAGES = Path(str(files("nanovlm_hf.hub_cards.space"))) / "examples"
HEADLESS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def pytorch(name):
    """Return a function that completes a prefix about an image file."""
    model, processor = load_model(name)

    def call(path, prefix):
        (one,) = completion.complete(model, processor, [path], prefix, num_beams=1)
        return one.texts[0]

    return call


def onnxruntime(name, folder, dtype):
    write_onnx(name, folder, dtype)
    model = OnnxModel(folder)
    return lambda path, prefix: model.complete(open_image_file(path), prefix, num_beams=1)


@contextmanager
def browser(name):
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        build_page(Path(folder), [name])
        server = page_server(Path(folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=HEADLESS)
        page = chromium.new_page()
        page.set_default_timeout(120_000)
        page.goto(f"http://localhost:{server.server_port}/")
        page.locator("#complete:enabled").wait_for()

        def call(path, prefix):
            page.locator("#file").set_input_files(path)
            page.locator(f"#preview[alt$='{path.name}']").wait_for()
            page.locator("#prefix").fill(prefix)
            page.locator("#complete").click()
            page.locator("#complete:enabled").wait_for()
            return page.locator("#with").inner_text()

        yield call
        chromium.close()
        server.shutdown()


@contextmanager
def server(name):
    import uvicorn
    from openai import OpenAI

    from nanovlm_hf.serving import build_app

    running = uvicorn.Server(uvicorn.Config(build_app(name), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started and thread.is_alive():
        thread.join(0.05)
    port = running.servers[0].sockets[0].getsockname()[1]
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

    def call(path, prefix):
        url = f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prefix}]
        messages = [{"role": "user", "content": parts}]
        chunks = client.chat.completions.create(model=name, messages=messages, stream=True)  # a stream is greedy
        return prefix + "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    yield call
    running.should_exit = True
    thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="mini-short", choices=SHIPPED)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = arguments.checkpoint
    weights = sum(path.stat().st_size for path in SHIPPED[name].glob("model*.safetensors"))
    items = [(IMAGES / f"{image}.jpg", prefix) for image, prefix in EXAMPLES.items()]
    with ExitStack() as stack:
        runtimes, sizes = {"PyTorch": pytorch(name)}, {"PyTorch": weights}
        for dtype in ("fp32", "fp16", "int8"):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            runtimes[f"onnxruntime, {dtype}"] = onnxruntime(name, folder, dtype)
            sizes[f"onnxruntime, {dtype}"] = sum(path.stat().st_size for path in folder.glob("onnx/*.onnx"))
        if find_spec("playwright") is not None and shutil.which("chromium") is not None:
            runtimes["Chromium, fp16"] = stack.enter_context(browser(name))
            sizes["Chromium, fp16"] = sizes["onnxruntime, fp16"]
        if transformers.__version__.startswith("5.") and find_spec("fastapi") is not None:
            runtimes["nanovlm serve"] = stack.enter_context(server(name))
            sizes["nanovlm serve"] = weights
        texts = {runtime: [call(*item) for item in items] for runtime, call in runtimes.items()}
        calls = {
            runtime: lambda number, call=call: call(*items[number % len(items)]) for runtime, call in runtimes.items()
        }
        seconds = median_seconds(calls, arguments.rounds, warm_up=len(items))
    seconds = {runtime: time / 2 if "Chromium" in runtime else time for runtime, time in seconds.items()}
    print(f"{name}, {arguments.threads} threads, PyTorch {seconds['PyTorch'] * 1000:.0f} ms per completion")
    print(f"{'runtime':<20} {'weights':>10} {'time':>8} {'equal texts':>12}")
    for runtime in runtimes:
        equal = sum(one == other for one, other in zip(texts[runtime], texts["PyTorch"], strict=True))
        ratio = seconds[runtime] / seconds["PyTorch"]
        print(f"{runtime:<20} {sizes[runtime] / 1e6:>7.1f} MB {ratio:>7.2f}x {equal:>5} of {len(items)}")


if __name__ == "__main__":
    main()
