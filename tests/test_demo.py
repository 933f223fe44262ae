"""The demo: streaming, the page in a real browser, and the same page as a Space."""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from huggingface_hub import RepoCard
from PIL import Image
from starlette.middleware import Middleware

from nanovlm_hf import InputError, completion
from nanovlm_hf.hub_cards.space import app
from nanovlm_hf.loading import load_model

from helpers.hub_client import online
from helpers.image_files import png_header
from helpers.models import random_image, tiny_model, tiny_processor
from helpers.output import only_line
from helpers.servers import serve

CHROMIUM = shutil.which("chromium")
HEADLESS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "ball.png"
    random_image(size=(300, 200)).save(path)
    return path


def test_stream_yields_growing_text(tokenizer):
    model, processor = tiny_model(), tiny_processor(tokenizer)
    image = random_image()
    said = list(completion.stream(model, processor, image, " There is a big "))
    assert len(said) > 5
    assert all(text.startswith("There is a big") for text in said)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(said))


def test_stream_ends_with_the_text_of_complete(photo):
    model, processor = load_model("mini-short")
    (whole,) = completion.complete(model, processor, [photo], "There is a", blind=True, num_beams=1)
    said = list(app.complete(str(photo), "There is a", "mini", "short"))
    assert said[-1] == (whole.texts[0], whole.blind[0])
    assert len(said) > 10
    assert said[0][1] == ""


def test_error_during_streaming_reaches_the_caller(tokenizer, monkeypatch):
    model, processor = tiny_model(), tiny_processor(tokenizer)
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(completion.stream(model, processor, random_image()))
    with pytest.raises(InputError, match="leave no room"):
        list(completion.stream(model, processor, random_image(), "word " * 400))


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def running(command, port, output=subprocess.PIPE, pids=(), **options):
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, **options)
    try:
        if isinstance(pids, list):
            pids.append(process.pid)
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline, "the page does not start"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert answer.status == 200
                yield f"http://127.0.0.1:{port}/"
                return
            except OSError:
                time.sleep(0.3)
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the log of the server and a program `gs` in its path, which leaves the file `started`."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {folder / 'started'}\nexit 1\n")
    (folder / "gs").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def server_process():
    """The process id of the server, once it runs."""
    return []


@pytest.fixture(scope="module")
def address(folder, server_process):
    port = free_port()
    command = [sys.executable, "-m", "nanovlm_hf.cli", "demo", "--port", str(port)]
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "GRADIO_TEMP_DIR": str(folder / "uploads")}
    with (
        (folder / "log").open("w") as log,
        running(command, port, output=log, pids=server_process, env=environment) as url,
    ):
        yield url


class Api:
    """HTTP client of the demo."""

    def __init__(self, address: str):
        self.address = f"{address}gradio_api/"

    def upload(self, path, content=None):
        content = path.read_bytes() if content is None else content
        answer = requests.post(f"{self.address}upload", files={"files": (path.name, content)}, timeout=60)
        assert answer.status_code == 200, answer.text
        return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}

    def ask(self, photo, prefix="There is a", size="mini", style="short"):
        data = {"data": [photo, prefix, size, style]}
        return requests.post(f"{self.address}call/complete", json=data, timeout=60)

    def answer(self, asked):
        """Wait for the last event: its name and data."""
        events = requests.get(f"{self.address}call/complete/{asked.json()['event_id']}", timeout=120).text.split("\n\n")
        name, data = next(event for event in reversed(events) if event).split("\n")
        return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def refused(self, *arguments, **more) -> str:
        name, data = self.answer(self.ask(*arguments, **more))
        assert name == "error", data
        return data["error"]


@pytest.fixture(scope="module")
def api(address):
    return Api(address)


@pytest.mark.slow
def test_api_returns_the_same_text_as_the_page(api, photo):
    name, data = api.answer(api.ask(api.upload(photo)))
    assert (name, tuple(data)) == ("complete", list(app.complete(str(photo), "There is a", "mini", "short"))[-1])


@pytest.mark.slow
def test_invalid_requests_get_a_readable_error(api, photo, tmp_path):
    uploaded = api.upload(photo)
    for name, content in (("text.png", b"not an image"), ("drawing.svg", b"<svg/>"), ("empty.jpg", b"")):
        assert api.refused(api.upload(tmp_path / name, content)).startswith(f"{name}: ")
    assert api.refused(uploaded, "a" * 401) == app.TOO_LONG
    for wrong in (None, 5, ["a"], {"a": 1}):
        assert api.refused(uploaded, wrong) == app.TOO_LONG
    for wrong in ("huge", "../mini", None, ["mini"], {}):
        assert api.refused(uploaded, size=wrong).startswith("Choose one of mini")
        assert api.refused(uploaded, style=wrong).startswith("Choose one of mini")
    assert api.refused(None) == "Choose a photo first."
    assert api.refused({"path": str(photo)}) == "Upload the photo first.", "a local file"
    assert api.refused({"url": "data:image/png;base64,AAAA"}) == "Choose a photo first."
    assert api.refused(uploaded | {"path": f"{uploaded['path']}x"}).endswith("x: no such file")
    answer = requests.post(f"{api.address}upload", files={"files": ("a.png", bytes(25_000_000))}, timeout=60)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/gradio_api/call/complete", app.LARGEST_REQUEST),
        ("/gradio_api/run/upload", app.LARGEST_REQUEST),
        ("/upload", app.LARGEST_REQUEST),
        ("/gradio_api/upload/", app.LARGEST_REQUEST),
        ("/gradio_api/upload", app.LARGEST_REQUEST + app.LARGEST_UPLOAD),
    ],
)
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("chunked", [True, False])
def test_the_size_of_a_request_is_bounded(path, limit, more, chunked):
    from fastapi import Body, FastAPI
    from fastapi.testclient import TestClient

    served = FastAPI(middleware=[Middleware(app.SmallRequests)])
    served.post("/{path:path}")(lambda content=Body(): len(content) + 2)  # noqa: B008
    client = TestClient(served, headers={"Content-Type": "application/json"})
    content = b'"%s"' % (b"a" * (limit + more - 2))
    answer = client.post(path, content=iter([content[:9], content[9:]]) if chunked else content)
    assert answer.status_code == (413 if more else 200)
    assert answer.json() == ({"detail": app.TOO_LONG} if more else limit)


@pytest.mark.slow
def test_oversized_request_is_rejected_immediately(api, photo):
    uploaded = api.upload(photo)
    start = time.monotonic()
    answer = api.ask(uploaded, "a" * 10_000_000)
    assert answer.status_code == 413
    assert answer.json()["detail"] == app.TOO_LONG
    assert time.monotonic() - start < 20


@pytest.mark.slow
def test_queue_is_bounded(api, photo):
    uploaded = api.upload(photo)
    with ThreadPoolExecutor(10) as pool:
        asked = list(pool.map(lambda _: api.ask(uploaded), range(60)))
        refused = [one for one in asked if one.status_code != 200]
        assert len(refused) >= 20, "about 20 wait, and as many as there are cores are processed"
        for one in refused:
            assert one.status_code == 503
            assert "Queue is full" in one.json()["detail"]
        answers = list(pool.map(api.answer, [one for one in asked if one.status_code == 200]))
    assert [data for name, data in answers if name != "complete"] == [], "queued requests are answered"
    for path in ("run/complete", "api/complete"):
        data = {"data": [uploaded, "A", "mini", "short"]}
        assert requests.post(f"{api.address}{path}", json=data, timeout=60).status_code == 404, "bypasses the queue"


@pytest.mark.slow
def test_a_file_that_is_not_an_image_leaves_no_traceback(api, folder, photo, tmp_path):
    before = (folder / "log").read_text()
    assert api.refused(api.upload(tmp_path / "text.jpg", b"text")).startswith("text.jpg: ")
    assert api.refused(api.upload(photo), style="poem").startswith("Choose one of")
    assert api.refused(api.upload(photo), "a" * 500).startswith("The beginning of")
    said = (folder / "log").read_text().removeprefix(before)
    assert "Traceback" not in said
    assert "Error" not in said


@pytest.mark.slow
def test_an_eps_upload_starts_no_program(api, folder, tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    assert "not an image that Pillow can read" in api.refused(api.upload(tmp_path / "photo.jpg", eps))
    assert not (folder / "started").exists()


def memory_of(process: int, what: str) -> int:
    """Return a field of /proc/PID/status in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) // 1024


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_huge_image_needs_little_memory_and_releases_it(api, server_process, photo, tmp_path, mode):
    huge = tmp_path / "huge.png"
    Image.new(mode, (10_900, 10_900)).save(huge)  # 118.8 million pixels
    assert api.answer(api.ask(api.upload(photo)))[0] == "complete"
    before = memory_of(server_process[0], "VmRSS")
    assert api.answer(api.ask(api.upload(huge)))[0] == "complete"
    assert memory_of(server_process[0], "VmHWM") < 1400
    assert memory_of(server_process[0], "VmRSS") < before + 100
    assert api.refused(api.upload(tmp_path / "bomb.png", png_header(20_000, 20_000))).startswith("bomb.png: ")


def test_space_pins_the_tested_versions():
    root = Path(app.__file__).parents[2]
    tested = dict(
        line.split("==") for line in (root / "constraints/transformers-5.txt").read_text().splitlines() if "==" in line
    )
    lines = (Path(app.__file__).parent / "requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith(("#", "--")))
    assert {"torch", "transformers", "pillow", "safetensors", "huggingface_hub"} <= set(pinned)
    assert pinned.items() <= tested.items()
    card = RepoCard.load(Path(app.__file__).parent / "README.md", ignore_metadata_errors=False)
    assert card.data.sdk_version == tested["gradio"]


@pytest.fixture
def browser(address):
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=HEADLESS)
        yield chromium
        chromium.close()


def open_page(browser, address, **options):
    page = browser.new_page(**options)
    page.set_default_timeout(60_000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.get_by_role("button", name="Complete", exact=True).wait_for()
    return page, asked


def complete_on(page, photo):
    page.locator("input[type=file]").first.set_input_files(photo)
    page.locator(f"img[src*='{photo.name}']").first.wait_for()
    page.get_by_role("button", name="Complete", exact=True).click()
    seen, unseen = page.locator("#looking textarea"), page.locator("#blind textarea")
    deadline = time.monotonic() + 180
    while not re.search(r"[.!?]$", unseen.input_value()):
        assert time.monotonic() < deadline, "no text appears"
        page.wait_for_timeout(50)
    return seen.input_value(), unseen.input_value()


@pytest.mark.slow
def test_upload_and_complete_in_a_browser(browser, address, photo):
    page, asked = open_page(browser, address)
    page.get_by_label("Beginning of the sentence").fill("There is a big")
    seen, unseen = complete_on(page, photo)
    assert seen.startswith("There is a big ")
    assert unseen.startswith("There is a big ")
    assert seen != unseen
    longer, _ = open_page(browser, address)
    longer.get_by_label("long (60 to 70 words)").check()
    assert len(complete_on(longer, photo)[0].split()) > 1.5 * len(seen.split())
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))], "no third-party requests"


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_page_fits_the_window(browser, address, photo, width, scheme):
    page, _ = open_page(browser, address, viewport={"width": width, "height": 900}, color_scheme=scheme)
    complete_on(page, photo)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(re.search(r"\d+", background).group())
    assert red < 64 if scheme == "dark" else red > 192


@pytest.mark.slow
def test_mistakes_of_a_visitor(browser, address, tmp_path, photo):
    page, _ = open_page(browser, address)
    page.get_by_role("button", name="Complete", exact=True).click()
    page.get_by_text("Choose a photo first.").wait_for()
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:200])
    page.locator("input[type=file]").first.set_input_files(broken)
    page.locator("img[src*='broken.png']").first.wait_for(state="attached")
    page.get_by_role("button", name="Complete", exact=True).click()
    page.get_by_text("broken.png").last.wait_for()


@pytest.mark.slow
def test_an_example_can_be_completed(browser, address):
    page, _ = open_page(browser, address)
    page.get_by_text("A brown cat looks").click()
    page.get_by_label("Beginning of the sentence").locator("visible=true").wait_for()
    page.locator(".image-container img[src*='cat.jpg'], [data-testid='image'] img[src*='cat.jpg']").first.wait_for()
    page.get_by_role("button", name="Complete", exact=True).click()
    page.wait_for_function("document.querySelector('#blind textarea').value.endsWith('.')")
    assert page.locator("#looking textarea").input_value().startswith("A brown cat looks ")


def test_missing_gradio_and_port_in_use(run, monkeypatch):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        code, _, errors = run("demo", "--port", port)
    assert code == 1
    assert str(port) in only_line(errors)
    monkeypatch.delitem(sys.modules, "nanovlm_hf.hub_cards.space.app")
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, errors = run("demo")
    assert code == 2
    assert "pip install 'nanovlm-hf[demo]'" in only_line(errors)


def test_example_images_have_a_licence():
    folder = Path(app.__file__).parent / "examples"
    told = (folder / "README.md").read_text()
    assert {path.stem for path in folder.glob("*.jpg")} == set(app.EXAMPLES)
    for name in app.EXAMPLES:
        assert re.search(rf"- `{name}.jpg`: .*(CC0|public domain)", told)
        assert max(Image.open(folder / f"{name}.jpg").size) <= 400


@pytest.mark.slow
def test_space_serves_the_same_page(tmp_path):
    with serve("hub_server.py", tmp_path / "hub") as hub:
        environment = online(hub, tmp_path / "home")
        command = [sys.executable, "-m", "nanovlm_hf.cli", "demo", "--push", "org/demo"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [f"{hub.url}/spaces/org/demo"]
        assert len([entry for entry in hub.entries() if "/commit/" in entry["path"]]) == 1
        fetch = "import sys, huggingface_hub as hub; "
        fetch += "hub.snapshot_download('org/demo', repo_type='space', local_dir=sys.argv[1])"
        subprocess.run([sys.executable, "-c", fetch, tmp_path / "space"], env=environment, check=True, timeout=300)
    space = tmp_path / "space"
    card = RepoCard.load(space / "README.md", ignore_metadata_errors=False)
    assert (card.data.sdk, card.data.app_file) == ("gradio", "app.py")
    assert "gradio" not in (space / "requirements.txt").read_text()
    port = free_port()
    # Use the package in the Space, not the installed one.
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(space)}
    with running([sys.executable, "app.py"], port, cwd=space, env=environment):
        pass
    check = "import nanovlm_hf, pathlib; print(pathlib.Path(nanovlm_hf.__file__).parents[1])"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=space, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == str(space)
