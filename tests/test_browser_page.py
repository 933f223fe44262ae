"""The page that runs the model in the browser: the committed bundle in headless Chromium, its server and its Space."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import RepoCard
from PIL import Image

from nanovlm_hf import completion
from nanovlm_hf.export import page as page_files
from nanovlm_hf.export.page_server import page_server
from nanovlm_hf.generation_nanovlm import greedy_settings
from nanovlm_hf.loading import load_model

from helpers.hub_client import online
from helpers.models import random_image
from helpers.output import only_line
from helpers.servers import serve

CHROMIUM = shutil.which("chromium")
HEADLESS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    # For the test of memory: no process that waits for the next page, and garbage is collected when it says so.
    "--disable-features=SpareRendererForSitePerProcess",
    "--js-flags=--expose-gc",
]
ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "hub_cards/space_static"
SOURCE = ROOT / "hub_cards/space_static_src"
PATIENCE = 60_000  # ms


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    page_files.build_page(folder)
    return folder


@contextmanager
def served(folder):
    server = page_server(folder, free_port())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def address(built):
    with served(built) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=HEADLESS)
        yield browser
        browser.close()


@pytest.fixture
def context(chromium):
    context = chromium.new_context()
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


def opened(context, address, ready="#complete:enabled"):
    page = context.new_page()
    page.goto(address)
    page.locator(ready).first.wait_for()
    return page


def completed(page, image, prefix):
    """Return both texts of the page, or its message."""
    page.locator("#file").set_input_files(image)
    page.locator(f"#preview[alt$='{image.name}']").wait_for()
    page.locator("#prefix").fill(prefix)
    page.locator("#complete").click()
    page.locator("#complete:enabled").wait_for()
    message = page.locator("#message").inner_text()
    return message or (page.locator("#with").inner_text(), page.locator("#without").inner_text())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The demo's photos, and one that a phone turned, in a file without loss."""
    folder = tmp_path_factory.mktemp("images")
    examples = Path(str(page_files.files("nanovlm_hf.hub_cards.space"))) / "examples"
    with Image.open(examples / "coffee.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    random_image(2, (300, 200)).convert("RGBA").save(folder / "drawn.png")
    return [examples / "camera.jpg", examples / "cat.jpg", folder / "turned.png", folder / "drawn.png"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["short", "long"])
def test_texts_equal_pytorchs(context, address, images, variant):
    model, processor = load_model(f"mini-{variant}")
    page = opened(context, address)
    page.get_by_role("radio", name=variant).check()
    page.locator("#complete:enabled").wait_for()
    for image in images:
        (expected,) = completion.complete(
            model, processor, [image], "There is a", blind=True, **greedy_settings(model.generation_config)
        )
        assert completed(page, image, " There is a ") == (expected.texts[0], expected.blind[0]), image.name


@pytest.mark.slow
def test_nothing_is_requested_elsewhere_and_the_page_works_offline(context, address, images):
    asked, problems = [], []
    context.on("request", lambda request: asked.append(request.url))
    page = opened(context, address)
    context.on("weberror", lambda error: problems.append(error.error))
    online_texts = completed(page, images[0], "A man")
    assert any(url.endswith(".onnx") for url in asked)
    assert [url for url in asked if not url.startswith((address, "blob:"))] == []
    context.set_offline(True)
    page.close()
    page = opened(context, address)
    assert completed(page, images[0], "A man") == online_texts
    assert page.locator("#examples img").count() == len(page_files.EXAMPLES)
    assert problems == []


def memory_without_garbage(page):
    """Return the resident memory of this process' Chromium renderers in MiB, after a garbage collection."""
    for one in (*page.workers, page):
        one.evaluate("gc()")
    lines = subprocess.run(["ps", "-eo", "pid,ppid,rss,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    rows = [line.split(maxsplit=3) for line in lines]
    family = {str(os.getpid())}
    for _ in range(5):
        family |= {pid for pid, parent, *_ in rows if parent in family}
    return sum(int(rss) for pid, _, rss, args in rows if pid in family and "--type=renderer" in args) // 1024


@pytest.mark.slow
def test_memory_stays_flat(context, address, images):
    page = opened(context, address)
    for _ in range(10):
        completed(page, images[1], "There is a")
    before = memory_without_garbage(page)
    for _ in range(50):
        completed(page, images[1], "There is a")
    assert before > 50
    pixels = 50 * 2 * 3 * 224 * 224 * 4 // 2**20  # of the images and the blank ones, if they were kept: 57 MiB
    assert memory_without_garbage(page) < before + 0.8 * pixels


@pytest.mark.slow
def test_the_last_choice_of_a_photo_and_a_model_counts(context, address, images):
    """A photo that is decoded more slowly than the next one, and a completion that another model interrupts."""
    page = context.new_page()
    slow = """
        const decode = window.createImageBitmap;
        let calls = 0;
        window.createImageBitmap = async (blob) => {
          calls += 1;
          if (calls === 1) await new Promise((resolve) => setTimeout(resolve, 1000));
          return decode(blob);
        };
    """
    page.add_init_script(slow)
    page.goto(address)
    page.locator("#complete:enabled").wait_for()
    page.locator("#file").set_input_files(images[0])
    page.locator("#file").set_input_files(images[1])
    page.locator(f"#preview[alt$='{images[1].name}']").wait_for()
    page.wait_for_timeout(1500)
    assert page.locator("#preview").get_attribute("alt").endswith(images[1].name)
    page.locator("#complete").click()
    page.get_by_role("radio", name="long").check()
    page.locator("#complete:enabled").wait_for()
    assert page.locator("#loading").is_hidden()
    assert page.locator("#with").inner_text() == ""


@pytest.mark.slow
def test_an_update_keeps_the_binary_and_other_pages_alone(context, built, images, tmp_path):
    folder = tmp_path / "page"
    shutil.copytree(built, folder)
    (folder / "other.txt").write_text("of another page")
    with served(folder) as url:
        page = opened(context, url)
        worker = (folder / "sw.js").read_text()
        version = re.search(r"nanovlm-page-([0-9a-f]{12})", worker).group(1)
        (folder / "sw.js").write_text(worker.replace(version, "0" * 12))
        page.evaluate("() => navigator.serviceWorker.ready.then((registration) => registration.update())")
        page.wait_for_function(
            "async () => (await caches.keys()).sort().join(' ') === "
            f"'nanovlm-assets nanovlm-models nanovlm-page-{'0' * 12}'"
        )
        assert page.evaluate("() => fetch('other.txt').then((answer) => answer.text())") == "of another page"
        for binary in folder.glob("assets/*.wasm"):
            binary.unlink()
        page.close()
        page = opened(context, url)
        assert isinstance(completed(page, images[0], "There is a"), tuple)
        context.set_offline(True)
        page.close()
        page = opened(context, f"{url}index.html")
        assert isinstance(completed(page, images[0], "There is a"), tuple)
        assert page.evaluate("() => fetch('other.txt').then(() => 'kept', () => 'not kept')") == "not kept"


@pytest.mark.slow
def test_mistakes_of_a_visitor(context, address, images, tmp_path):
    page = opened(context, address)
    message = page.locator("#message:not(:empty)")
    page.locator("#complete").click()
    assert message.inner_text() == "Choose a photo first."
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(images[0].read_bytes()[:300])
    for path in (broken, SOURCE / "package.json"):
        page.locator("#file").set_input_files(path)
        page.get_by_text(f"{path.name}: this browser cannot read it").wait_for()
    for token in ("<image>", "<eos>"):
        assert completed(page, images[0], f"a {token}").startswith(f"{token} has a special meaning for the model")
    page.locator("#take").click()
    page.get_by_text(re.compile("camera.*choose a photo", re.IGNORECASE)).wait_for()


@pytest.mark.slow
def test_camera_that_is_denied_or_missing(context, address):
    deny = "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NAME') }"
    for name, expected in (("NotAllowedError", "may not use the camera"), ("NotFoundError", "There is no camera")):
        page = context.new_page()
        page.add_init_script(deny.replace("NAME", name))
        page.goto(address)
        page.locator("#models input").first.wait_for()  # a message before is removed when the first model loads
        page.locator("#take").click()
        page.locator("#message", has_text=expected).wait_for()
        page.close()


@pytest.mark.slow
def test_browser_without_simd_and_lost_weights(context, address):
    page = context.new_page()
    page.add_init_script("WebAssembly.validate = () => false")
    page.goto(address)
    page.locator("#message", has_text="lacks WebAssembly SIMD").wait_for()
    page.locator("#file").set_input_files(Path(__file__))  # a message about it would hide the reason
    page.wait_for_timeout(500)
    assert "lacks WebAssembly SIMD" in page.locator("#message").inner_text()
    assert page.locator("#complete").is_disabled()
    page.close()
    context.route("**/*.onnx", lambda route: route.abort())
    page = opened(context, address, ready="#message:not(:empty)")
    assert page.locator("#message").inner_text().startswith("The model cannot be loaded or run (")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_page_fits_the_window_and_has_labels(chromium, address, width, scheme):
    page = chromium.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.goto(address)
    page.locator("#models input").first.wait_for()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    red = int(re.search(r"\d+", background).group())
    assert red < 64 if scheme == "dark" else red > 192
    nameless = "() => [...document.querySelectorAll('input')].filter((one) => one.labels.length === 0).length"
    assert page.evaluate(nameless) == 0
    assert page.evaluate("() => [...document.images].every((one) => one.hidden || one.alt)")
    page.close()


def test_server_serves_only_the_folder(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "page"
    (folder / "models").mkdir(parents=True)
    for name in ("index.html", "a.js", "a.wasm", "a.onnx", "models/a.json"):
        (folder / name).write_text("x")
    with served(folder) as url:
        types = {"": "text/html", "a.js": "text/javascript", "a.wasm": "application/wasm"}
        types |= {"a.onnx": "application/octet-stream", "models/a.json": "application/json"}
        for path, kind in types.items():
            with urllib.request.urlopen(url + path) as answer:
                assert answer.headers["Content-Type"] == kind
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
        for path in ("../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt", "models/", "models/../../secret.txt"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(url + path)


def test_port_in_use_and_missing_packages(run, monkeypatch):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        code, _, errors = run("demo", "--browser", "--port", port)
    assert code == 1
    assert f"port {port} is in use" in only_line(errors)
    monkeypatch.setattr("nanovlm_hf.extras.find_spec", lambda name: None)
    code, _, errors = run("demo", "--browser")
    assert code == 2
    assert "pip install 'nanovlm-hf[onnx]'" in only_line(errors)


def test_bundle_is_complete_and_small():
    html = (BUNDLE / "index.html").read_text()
    for name in re.findall(r'(?:src|href)="\./([^"]+)"', html):
        assert (BUNDLE / name).is_file(), name
    kept = json.loads(re.search(r"FILES = (\[.*?\]);", (BUNDLE / "sw.js").read_text()).group(1))
    assert {name for name in kept if name != "./"} <= {
        str(path.relative_to(BUNDLE)) for path in BUNDLE.rglob("*") if path.is_file()
    }
    assert sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file()) < 15_500_000
    assert "unsafe" not in html
    assert not re.search(r'(?:src|href)="(?:https?:)?//', html)


def test_notice_names_the_locked_libraries():
    notice = (BUNDLE / "NOTICE.txt").read_text()
    locked = json.loads((SOURCE / "package-lock.json").read_text())["packages"]
    for name in ("@huggingface/transformers", "@huggingface/jinja", "@huggingface/tokenizers", "onnxruntime-web"):
        assert f"\n{name} {locked[f'node_modules/{name}']['version']}, " in notice
    asked = json.loads((SOURCE / "package.json").read_text())
    for version in {**asked["dependencies"], **asked["devDependencies"]}.values():
        assert version[0].isdigit(), "exact versions"


@pytest.mark.slow
def test_static_space(tmp_path, built):
    with serve("hub_server.py", tmp_path / "hub") as hub:
        environment = online(hub, tmp_path / "home")
        assets = tmp_path / "home/assets/nanovlm_hf"
        assets.parent.mkdir(parents=True)
        shutil.copytree(Path(os.environ["HF_HOME"]) / "assets/nanovlm_hf", assets)
        command = [sys.executable, "-m", "nanovlm_hf.cli", "demo", "--browser", "--push", "org/page"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [f"{hub.url}/spaces/org/page"]
        fetch = "import sys, huggingface_hub as hub; "
        fetch += "hub.snapshot_download('org/page', repo_type='space', local_dir=sys.argv[1])"
        subprocess.run([sys.executable, "-c", fetch, tmp_path / "space"], env=environment, check=True)
    space = tmp_path / "space"
    card = RepoCard.load(space / "README.md", ignore_metadata_errors=False)
    assert (card.data.sdk, card.data.app_file) == ("static", "index.html")
    for path in built.rglob("*"):
        if path.is_file():
            assert (space / path.relative_to(built)).read_bytes() == path.read_bytes()
